"""Zip files: written byte for byte the same each time, or sealed so that any zip program opens them with a passphrase.

Promise: `write` makes a zip (PKWARE APPNOTE 6.3) of stored entries in the order given, with no date, no owner and no
trace of the machine. With a passphrase each entry is AES-256 by the WinZip specification AE-2 (2009), which 7-Zip,
WinZip, Keka and libarchive read: whoever asks for their data needs no program of ours (GDPR 12(1)). `read` opens both.

Why it is safe although AE-2 stretches a passphrase with 1,000 rounds of PBKDF2-SHA1 only: `passphrase` draws 120
random bits, which nobody tries out. Never let people choose one.

    entry   16 bytes salt · 2 bytes verifier · AES-CTR ciphertext · 10 bytes HMAC-SHA1 over the ciphertext

Entries are stored, not deflated: a compressor's bytes change with its version, and reproducible bytes are promised.

Known limits: names and sizes of entries are in clear, so names say nothing about anybody. No zip64: 4 GiB and 65,535
entries at most. Plain entries of other programs are read when stored or deflated, sealed ones when stored.
"""

from __future__ import annotations

import base64
import hmac
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from hashlib import pbkdf2_hmac, sha1
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_AES: Final = struct.pack("<HHH2sBH", 0x9901, 7, 2, b"AE", 3, 0)  # AE-2, 256 bits, the entry itself is stored
_SEALED: Final = 99
_STORED: Final = 0
_UTF8: Final = 0x800
_ENCRYPTED: Final = 1
_EPOCH: Final = (0, 0x21)  # time and date of 1980-01-01 00:00: the first that the format knows
_UNIX: Final = 3 << 8
_MODE: Final = 0o100600 << 16
_SALT: Final = 16
_MAC: Final = 10
_ROUNDS: Final = 1000
_OVERHEAD: Final = _SALT + 2 + _MAC
_LARGEST: Final = (1 << 32) - 1
READ_LIMIT: Final = 256 * 1024 * 1024  # bytes of all entries together: a small file can inflate to fill the memory


class ZipError(ValueError):
    """Not a zip we read, another passphrase, or changed on the way. The text names no content."""


def passphrase() -> str:
    """120 random bits in groups that can be read over the telephone: 24 letters and digits (base 32)."""
    letters = base64.b32encode(os.urandom(15)).decode()
    return "-".join(letters[at : at + 6] for at in range(0, len(letters), 6))


def write(entries: Mapping[str, bytes], secret: str = "") -> bytes:
    """A zip of these entries; secret: seals it. Raises ValueError above 4 GiB."""
    out = io.BytesIO()
    directory = bytearray()
    version, method = (51, _SEALED) if secret else (20, _STORED)
    flags, extra = (_UTF8 | _ENCRYPTED, _AES) if secret else (_UTF8, b"")
    for name, content in entries.items():
        raw, at = name.encode(), out.tell()
        body = _seal(content, secret) if secret else content
        crc = 0 if secret else zlib.crc32(content)  # AE-2 keeps none: it would tell of the content
        if at + len(body) > _LARGEST - (1 << 20) or len(entries) > 0xFFFF:
            raise ValueError("a bundle above 4 GiB cannot be written as a plain zip")
        sizes = (crc, len(body), len(content))
        out.write(_LOCAL.pack(b"PK\3\4", version, flags, method, *_EPOCH, *sizes, len(raw), len(extra)))
        out.write(raw + extra + body)
        directory += _CENTRAL.pack(
            b"PK\1\2", _UNIX | version, version, flags, method, *_EPOCH, *sizes,
            len(raw), len(extra), 0, 0, 0, _MODE, at,
        )  # fmt: skip
        directory += raw + extra
    at, n = out.tell(), len(entries)
    out.write(directory)
    out.write(_END.pack(b"PK\5\6", 0, 0, n, n, len(directory), at, 0))
    return out.getvalue()


def is_sealed(data: bytes) -> bool:
    """Whether a passphrase is needed. Raises ZipError."""
    with _opened(data) as archive:
        return any(one.flag_bits & _ENCRYPTED for one in archive.infolist())


def read(data: bytes, secret: str = "") -> dict[str, bytes]:
    """The entries by name. Raises ZipError."""
    entries: dict[str, bytes] = {}
    with _opened(data) as archive:
        infos = [one for one in archive.infolist() if not one.is_dir()]
        if sum(one.file_size for one in infos) > READ_LIMIT:
            raise ZipError(f"the entries are larger than {READ_LIMIT >> 20} MiB together")
        for one in infos:
            if one.filename in entries:
                raise ZipError("two entries have one name")
            try:
                if one.flag_bits & _ENCRYPTED:
                    entries[one.filename] = _open(_body(data, one), secret)
                elif one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ZipError("an entry is packed in a way we do not know")
                else:
                    with archive.open(one) as entry:  # at most what the directory says: it may lie
                        entries[one.filename] = entry.read(one.file_size + 1)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, IndexError):
                raise ZipError("an entry cannot be read: the file was changed") from None
    return entries


def _opened(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, struct.error, UnicodeDecodeError, NotImplementedError):
        raise ZipError("this is not a zip file") from None


def _body(data: bytes, one: zipfile.ZipInfo) -> bytes:
    """What lies behind the local header of an entry; the standard library does not hand out sealed ones."""
    if one.compress_type != _SEALED or _AES not in one.extra:
        raise ZipError("an entry is sealed in a way we do not know")
    head = _LOCAL.unpack_from(data, one.header_offset)
    start = one.header_offset + _LOCAL.size + head[-2] + head[-1]
    body = data[start : start + one.compress_size]
    if head[0] != b"PK\3\4" or len(body) != one.compress_size or len(body) < _OVERHEAD:
        raise ZipError("an entry is cut short")
    return body


def _seal(content: bytes, secret: str) -> bytes:
    salt = os.urandom(_SALT)
    key, signing, verifier = _keys(secret, salt)
    hidden = _ctr(key, content)
    return salt + verifier + hidden + hmac.digest(signing, hidden, sha1)[:_MAC]


def _open(body: bytes, secret: str) -> bytes:
    if not secret:
        raise ZipError("this file needs its passphrase")
    key, signing, verifier = _keys(secret, body[:_SALT])
    if not hmac.compare_digest(verifier, body[_SALT : _SALT + 2]):
        raise ZipError("the passphrase is not the one of this file")
    hidden = body[_SALT + 2 : -_MAC]
    if not hmac.compare_digest(hmac.digest(signing, hidden, sha1)[:_MAC], body[-_MAC:]):
        raise ZipError("an entry was changed, or the passphrase is another")
    return _ctr(key, hidden)


def _keys(secret: str, salt: bytes) -> tuple[bytes, bytes, bytes]:
    """For the content, for its signature, and two bytes that tell a mistyped passphrase."""
    made = pbkdf2_hmac("sha1", secret.encode(), salt, _ROUNDS, 66)
    return made[:32], made[32:64], made[64:]


def _ctr(key: bytes, content: bytes) -> bytes:
    """AES-CTR as WinZip does it: the counter begins at 1 and is little-endian, which no library offers as a mode."""
    if not content:
        return b""
    blocks = b"".join(n.to_bytes(16, "little") for n in range(1, (len(content) + 15) // 16 + 1))
    # the counter blocks themselves are what is enciphered: ECB is the bare block cipher here
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)[: len(content)]
    return (int.from_bytes(content, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(content), "big")
