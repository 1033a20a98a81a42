"""DKIM: signatures for a batch of messages (RFC 6376, 8301, 8463; decision 2; mail-standards.md 2.3).

Law: relaxed/relaxed, rsa-sha256 always and ed25519-sha256 beside it when there is a key; h= names every header we
write and oversigns those that must not be added to; t= is the message's Date and x= 14 days later, so that a second
attempt is the same message; never l= (it lets a stranger append to a signed body).

The body is hashed as it is, being its own canonical form, or as `compose` hands its canonical form over (`hashed`).
The static headers are hashed once per campaign, here that hash is copied and finished. What remains is the RSA
signature, 0.25 ms, the physical limit of the whole product; it releases the GIL, so `sign_batch` may run in a thread
pool. It holds no state but its arguments.

`Signer` is the seam for a faster implementation (`multibuffer` signs eight at a time): it is given digests, not
messages.

Cost beside signature and body hash: 3.5 us a message with one signer, 5.5 with two (benchmarks/test_sign.py).

Known limit: whether the public key is in DNS is not asked here.
"""

from __future__ import annotations

import base64
import functools
import re
from binascii import b2a_base64
from collections.abc import Sequence
from hashlib import sha256
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from nacl import bindings

from engine.message import headers
from engine.message.compose import Message, Unsigned

_ED25519_BYTES: Final = 64
_LONGEST: Final = 512  # octets of a signature: RSA-4096
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
    """A key held by `cryptography`, parsed once (parsing costs 37 ms, signing 0.27). Thread-safe.

    Ed25519 is signed by libsodium from the same seed: 18 us against OpenSSL's 31, the signature is the same octets
    (RFC 8032 leaves no choice), and dkimpy's own Ed25519 brings the library along."""

    def __init__(self, domain: str, selector: str, key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> None:
        if not _DOMAIN.match(domain) or not _SELECTOR.match(selector):
            raise ValueError("a DKIM domain and selector are lower-case DNS names")
        if isinstance(key, rsa.RSAPrivateKey) and not 2048 <= key.key_size <= 4096:
            raise ValueError("a DKIM RSA key has 2048 to 4096 bits (RFC 8301; verifiers need not take longer ones)")
        self.domain, self.selector, self.key = domain, selector, key
        self.algorithm = "rsa-sha256" if isinstance(key, rsa.RSAPrivateKey) else "ed25519-sha256"
        self._secret = b""
        if isinstance(key, ed25519.Ed25519PrivateKey):
            _, self._secret = bindings.crypto_sign_seed_keypair(key.private_bytes_raw())

    def __repr__(self) -> str:
        return f"OpenSSLSigner({self.selector}._domainkey.{self.domain}, {self.algorithm})"

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        key = self.key
        if isinstance(key, rsa.RSAPrivateKey):
            return [key.sign(digest, _PKCS1, _SHA256) for digest in digests]
        secret = self._secret
        # RFC 8463 3: the digest is what PureEdDSA signs; the message stands behind its signature
        return [bindings.crypto_sign(digest, secret)[:_ED25519_BYTES] for digest in digests]

    def public_record(self) -> str:
        """The TXT record at <selector>._domainkey.<domain>."""
        public = self.key.public_key()
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
        public = self.key.public_key()
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
    bodies = [message.body if message.hashed is None else message.hashed for message in unsigned]
    hashes = [b2a_base64(sha256(body).digest(), newline=False) for body in bodies]
    wires: list[list[bytes]] = [[] for _ in unsigned]  # the pieces of each
    for signer in signers:
        algorithm, domain, selector = signer.algorithm, signer.domain, signer.selector
        signed: str | None = None
        at = 0  # what the lead is for: nearly always one, a batch is of one job and one slice
        lead = canonical = b""
        digests: list[bytes] = []
        for message, body_hash, wire in zip(unsigned, hashes, wires, strict=True):
            if message.at != at or message.signed != signed:
                signed, at = message.signed, message.at
                lead, canonical = _lead(algorithm, domain, selector, signed, at)
            digest = message.head_hash.copy()
            digest.update(canonical + body_hash + b"; b=")
            digests.append(digest.digest())
            wire += lead, body_hash, b";\r\n b="
        for wire, signature in zip(wires, signer.sign(digests), strict=True):
            wire += _folded(signature), b"\r\n"
    messages: list[Message] = []
    for message, wire in zip(unsigned, wires, strict=True):
        wire += message.head, b"\r\n", message.body
        messages.append(Message(message.job, message.mref, b"".join(wire)))
    return messages


def _folded(signature: bytes) -> bytes:
    """base64 in lines of 72. RSA-2048 has 344 characters and is nearly all there is: fixed slices, 0.4 us less."""
    encoded = b2a_base64(signature, newline=False)
    if len(encoded) == 344:
        return b"\r\n ".join((encoded[:72], encoded[72:144], encoded[144:216], encoded[216:288], encoded[288:]))
    return b"\r\n ".join([encoded[at : at + 72] for at in range(0, len(encoded), 72)])


@functools.lru_cache(maxsize=1024)
def _lead(algorithm: str, domain: str, selector: str, signed: str, at: int) -> tuple[bytes, bytes]:
    """Everything before the value of bh=, as written and in canonical form.

    What comes behind it is base64 in lines of 72 by construction. So the header writer judges the field here, once,
    with a hash and the longest signature there is in place (14 us; it was that much for every message).
    """
    names = signed.split(":")
    rows = [":".join(names[start : start + 5]) for start in range(0, len(names), 5)]
    listed = ":\r\n ".join(rows)
    fixed = f"DKIM-Signature: v=1; a={algorithm}; c=relaxed/relaxed; d={domain};\r\n s={selector};\r\n h={listed};\r\n"
    wire = (fixed + f" t={at:d}; x={at + VALID_SECONDS:d};\r\n bh=").encode("ascii")
    headers.finished("DKIM-Signature", b"%b%b;\r\n b=%b\r\n" % (wire, b"h" * 44, _folded(bytes(_LONGEST))))
    canonical = wire.replace(b"\r\n", b"").replace(b"DKIM-Signature: ", b"dkim-signature:", 1)
    return wire, canonical
