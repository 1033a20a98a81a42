"""The return path of a message: ``b+<token>@bounce.domain``, so that a bounce says whose it is and cannot be forged.

Token: version 1, key id 1, job 5, mref 8, MAC 10 octets (BLAKE2b keyed), as 40 characters of lower-case base32 without
padding; 42 octets of local part, below the 64 of RFC 5321 4.5.3.1.1. Case-insensitive, because servers on the way
back lower and upper local parts. The format is on delivered mail: it may get a new version, never another meaning.

Law: what `ReturnPaths.open` accepts was made by `ReturnPaths.make` with a key of the ring; comparison is constant-time.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

from tracker.links import Base32

PREFIX = "b+"
VERSION = 1
_MAC = 10  # octets: 80 bits (design section 5)
_BYTES = 2 + 5 + 8 + _MAC
_CHARS = 40  # 25 octets are exactly 40 characters of base32
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"  # RFC 4648 section 6, lower case
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}
_base32 = Base32(_BYTES)


@dataclass(frozen=True, slots=True)
class Returned:
    """Whose message came back."""

    job: int
    mref: int


class ReturnPaths:
    """Makes and opens return paths. keys: policy.keys.Keyring.return_path; key_id: the one that makes new ones."""

    def __init__(self, keys: Mapping[int, bytes], key_id: int, domain: str) -> None:
        if key_id not in keys or not 0 <= key_id <= 255:
            raise ValueError("the key of new return paths is not in the ring")
        self._keys = dict(keys)
        self._head = bytes((VERSION, key_id))
        self._mac = _keyed(keys[key_id])
        self._suffix = "@" + domain

    def __repr__(self) -> str:
        return f"<ReturnPaths {self._suffix} keys {sorted(self._keys)}>"

    def make(self, job: int, mref: int) -> str:
        """The envelope sender of this message. job: 40 bits; mref: signed 64 bits. OverflowError beyond."""
        body = self._head + job.to_bytes(5, "big") + mref.to_bytes(8, "big", signed=True)
        mac = self._mac.copy()  # the key's own block of the hash is done
        mac.update(body)
        return PREFIX + _base32(body + mac.digest()) + self._suffix

    def open(self, address: str) -> Returned | None:
        """Whose message this return path belongs to, or None for anything not made by us. Never raises."""
        local, at, domain = address.strip().lower().rpartition("@")
        if not at or "@" + domain != self._suffix.lower() or not local.startswith(PREFIX):
            return None
        token = local[len(PREFIX) :]
        if len(token) != _CHARS:
            return None
        number = 0
        for letter in token:
            value = _VALUES.get(letter)
            if value is None:
                return None
            number = number << 5 | value
        data = number.to_bytes(_BYTES, "big")
        key = self._keys.get(data[1])
        if data[0] != VERSION or key is None:
            return None
        if not hmac.compare_digest(_mac(key, data[:-_MAC]), data[-_MAC:]):
            return None
        return Returned(int.from_bytes(data[2:7], "big"), int.from_bytes(data[7:15], "big", signed=True))


def _keyed(key: bytes) -> blake2b:
    return blake2b(digest_size=_MAC, key=key, person=b"sp-return-path")


def _mac(key: bytes, body: bytes) -> bytes:
    mac = _keyed(key)
    mac.update(body)
    return mac.digest()
