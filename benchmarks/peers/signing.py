"""Signing: one RSA-2048 key for all peers, the signer a careful team writes on `cryptography`, and the judge.

`CachedSigner` is what the peer `aiosmtplib_cryptography` signs with: the key parsed once, everything constant made
once, relaxed/simple (the cheapest pair: the body is hashed as it is), the digest signed prehashed. It does nothing
else: no second key, no oversigning beyond From.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import dkim  # type: ignore[import-untyped]  # dkimpy has no types
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

SELECTOR: Final = "peer1"
SIGNED: Final = (
    b"from", b"reply-to", b"to", b"subject", b"date", b"message-id", b"mime-version", b"content-type", b"list-id",
    b"list-unsubscribe", b"list-unsubscribe-post", b"feedback-id",
)  # fmt: skip
_FIELD: Final = re.compile(rb"^([!-9;-~]+)[ \t]*:((?:[^\r\n]|\r\n[ \t])*)", re.MULTILINE)
_PKCS1: Final = padding.PKCS1v15()
_SHA256: Final = Prehashed(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Key:
    """pem: PKCS#8, unencrypted, of this run only; record: TXT at peer1._domainkey.<domain>."""

    pem: bytes
    record: bytes


def make_key() -> Key:
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Key(pem, b"v=DKIM1; k=rsa; p=" + base64.b64encode(der))


class CachedSigner:
    """Use: ``signer.sign(message)`` -> the message with its signature in front. Raises ValueError for no RSA key."""

    def __init__(self, domain: str, selector: str, pem: bytes) -> None:
        key = serialization.load_pem_private_key(pem, password=None)  # 37 ms: once
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("not an RSA key")
        self._key = key
        self._lead = f"v=1; a=rsa-sha256; c=relaxed/simple; d={domain}; s={selector}; t=".encode()

    def sign(self, message: bytes) -> bytes:
        head, _, body = message.partition(b"\r\n\r\n")
        if body.endswith(b"\r\n\r\n") or not body.endswith(b"\r\n"):  # RFC 6376 3.4.3
            body = body.rstrip(b"\r\n") + b"\r\n"
        fields = {name.lower(): b" ".join(value.split()) for name, value in _FIELD.findall(head)}
        names = [name for name in SIGNED if name in fields]
        value = b"%s%d; h=%s; bh=%s; b=" % (
            self._lead,
            time.time(),
            b":".join([*names, b"from"]),
            base64.b64encode(sha256(body).digest()),
        )
        lines = [name + b":" + fields[name] for name in names]
        lines.append(b"dkim-signature:" + value)
        digest = sha256(b"\r\n".join(lines)).digest()
        signature = base64.b64encode(self._key.sign(digest, _PKCS1, _SHA256))
        return b"DKIM-Signature: %s%s\r\n%s" % (value, signature, message)


class DkimpySigner:
    """dkimpy as its documentation shows it, with the cheapest canonicalization pair; it parses the key each time."""

    def __init__(self, domain: str, selector: str, pem: bytes) -> None:
        self._domain, self._selector, self._pem = domain.encode(), selector.encode(), pem

    def sign(self, message: bytes) -> bytes:
        field: bytes = dkim.sign(
            message, self._selector, self._domain, self._pem, canonicalize=(b"relaxed", b"simple"),
            include_headers=list(SIGNED), linesep=b"\r\n",
        )  # fmt: skip
        return field + message


SIGNERS: Final[Mapping[str, type[CachedSigner] | type[DkimpySigner]]] = {
    "cryptography": CachedSigner,
    "dkimpy": DkimpySigner,
}


def verified(wire: bytes, domain: str, record: bytes) -> bool:
    """What dkimpy says of the first signature, which must be by our domain, RSA and SHA-256."""
    wanted = f"{SELECTOR}._domainkey.{domain}".encode()

    def ask(name: bytes, timeout: float = 5.0) -> bytes | None:
        return record if name.rstrip(b".") == wanted else None

    field = re.search(rb"^DKIM-Signature:(?:[^\r\n]|\r\n[ \t])*", wire, re.MULTILINE | re.IGNORECASE)
    if field is None or b"a=rsa-sha256" not in field[0].replace(b" ", b""):
        return False
    try:
        return bool(dkim.verify(wire, dnsfunc=ask))
    except dkim.DKIMException:
        return False
