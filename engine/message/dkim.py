"""DKIM: signatures for a batch of messages (RFC 6376, 8301, 8463; decision 2; mail-standards.md 2.3).

Law: relaxed/relaxed, rsa-sha256 always and ed25519-sha256 beside it when there is a key; h= names every header we
write and oversigns those that must not be added to; t= is the message's Date and x= 14 days later, so that a second
attempt is the same message; never l= (it lets a stranger append to a signed body).

The body is hashed as it is: engine.message.mime builds it as its own canonical form. The static headers are hashed
once per campaign, here that hash is copied and finished. What remains is the RSA signature, 0.27 ms, the physical
limit of the whole product; it releases the GIL, so `sign_batch` may run in a thread pool. It holds no state but its
arguments.

`Signer` is the seam for a faster implementation (multi-buffer RSA signs eight at a time, performance.md): it is given
digests, not messages.

Known limit: whether the public key is in DNS is not asked here.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from engine.message import headers
from engine.message.compose import Message, Unsigned

VALID_SECONDS: Final = 14 * 86_400  # longer than any queue life (5 days), short enough to hinder replay
_DOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)+\Z")
_SELECTOR = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*\Z")


class Signer(Protocol):
    """One key of one domain. algorithm: "rsa-sha256" or "ed25519-sha256"; sign: SHA-256 digests to raw signatures."""

    @property
    def algorithm(self) -> str: ...

    @property
    def domain(self) -> str: ...

    @property
    def selector(self) -> str: ...

    def sign(self, digests: Sequence[bytes]) -> list[bytes]: ...


class OpenSSLSigner:
    """A key held by `cryptography`, parsed once (parsing costs 37 ms, signing 0.27). Thread-safe."""

    def __init__(self, domain: str, selector: str, key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> None:
        if not _DOMAIN.match(domain) or not _SELECTOR.match(selector):
            raise ValueError("a DKIM domain and selector are lower-case DNS names")
        if isinstance(key, rsa.RSAPrivateKey) and not 2048 <= key.key_size <= 4096:
            raise ValueError("a DKIM RSA key has 2048 to 4096 bits (RFC 8301; verifiers need not take longer ones)")
        self.domain, self.selector, self._key = domain, selector, key
        self.algorithm = "rsa-sha256" if isinstance(key, rsa.RSAPrivateKey) else "ed25519-sha256"

    def __repr__(self) -> str:
        return f"OpenSSLSigner({self.selector}._domainkey.{self.domain}, {self.algorithm})"

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        key = self._key
        if isinstance(key, rsa.RSAPrivateKey):
            return [key.sign(digest, _PKCS1, _SHA256) for digest in digests]
        return [key.sign(digest) for digest in digests]  # RFC 8463 3: the digest is what PureEdDSA signs

    def public_record(self) -> str:
        """The TXT record at <selector>._domainkey.<domain>."""
        public = self._key.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            data = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            kind = "rsa"
        else:
            data = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
            kind = "ed25519"
        return f"v=DKIM1; k={kind}; p={base64.b64encode(data).decode('ascii')}"

    def self_test(self) -> bool:
        """Does the key sign what its own public half verifies? Asked once at start."""
        digest = sha256(b"sales-push").digest()
        signature = self.sign([digest])[0]
        public = self._key.public_key()
        try:
            if isinstance(public, rsa.RSAPublicKey):
                public.verify(signature, digest, _PKCS1, _SHA256)
            else:
                public.verify(signature, digest)
        except InvalidSignature:
            return False
        return True


_PKCS1 = padding.PKCS1v15()
_SHA256 = Prehashed(hashes.SHA256())


def load_signer(domain: str, selector: str, pem: bytes) -> OpenSSLSigner:
    """From a PEM private key. Raises ValueError when it is no RSA or Ed25519 key; the text never holds the key."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise ValueError(f"the DKIM key of {selector}._domainkey.{domain} is not a PEM private key") from None
    if not isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise ValueError(f"the DKIM key of {selector}._domainkey.{domain} is neither RSA nor Ed25519")
    return OpenSSLSigner(domain, selector, key)


def sign_batch(unsigned: Sequence[Unsigned], signers: Sequence[Signer]) -> list[Message]:
    """Signed messages in order, a signature of every signer on each. Blocking and thread-safe; batches of 8 and more
    are best. Raises ValueError without an RSA signer (RFC 8463 4: many receivers know nothing else)."""
    if not any(signer.algorithm == "rsa-sha256" for signer in signers):
        raise ValueError("no RSA signer: every message carries an RSA signature")
    body_hashes = [base64.b64encode(sha256(message.body).digest()) for message in unsigned]
    fields: list[list[bytes]] = [[] for _ in unsigned]
    for signer in signers:
        tails: list[tuple[bytes, bytes]] = []
        digests: list[bytes] = []
        for message, body_hash in zip(unsigned, body_hashes, strict=True):
            wire_lead, canonical_lead = _lead(signer.algorithm, signer.domain, signer.selector, message.signed)
            times = b" t=%d; x=%d;" % (message.at, message.at + VALID_SECONDS)
            digest = message.head_hash.copy()
            digest.update(b"%b%b bh=%b; b=" % (canonical_lead, times, body_hash))
            digests.append(digest.digest())
            tails.append((wire_lead, b"%b\r\n bh=%b;\r\n b=" % (times, body_hash)))
        for own, (wire_lead, tail), signature in zip(fields, tails, signer.sign(digests), strict=True):
            encoded = base64.b64encode(signature)
            folded = b"\r\n ".join([encoded[at : at + 72] for at in range(0, len(encoded), 72)])
            own.append(headers.finished("DKIM-Signature", wire_lead + tail + folded + b"\r\n"))
    return [
        Message(message.job, message.mref, b"".join([*own, message.head, b"\r\n", message.body]))
        for message, own in zip(unsigned, fields, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _lead(algorithm: str, domain: str, selector: str, signed: str) -> tuple[bytes, bytes]:
    """Everything before t=, as written and in canonical form."""
    names = signed.split(":")
    rows = [":".join(names[at : at + 5]) for at in range(0, len(names), 5)]
    listed = ":\r\n ".join(rows)
    wire = f"DKIM-Signature: v=1; a={algorithm}; c=relaxed/relaxed; d={domain};\r\n s={selector};\r\n h={listed};\r\n"
    canonical = wire.replace("\r\n", "").replace("DKIM-Signature: ", "dkim-signature:")
    return wire.encode("ascii"), canonical.encode("ascii")
