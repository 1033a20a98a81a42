"""Sealed containers: files of any size, streamed, that open whole and unchanged under one secret or not at all.

    sales-push backup 1\\n   {"kind": …, "secret": …, "salt": …}\\n   chunk · chunk · … · last chunk

A container is a tar of a few files, cut into chunks of 1 MiB, each sealed with AES-256-GCM (STREAM: Hoang,
Reyhanitabar, Rogaway, Vizar 2015). The nonce is 7 zero bytes, the chunk's number (4 bytes) and whether it is the last
(1), so a chunk that is taken out, moved or repeated does not open, and a file that was cut is seen; the head is
associated data of every chunk. The key is HKDF-SHA256 of the secret under 32 random bytes of salt: no two containers
share a key, so no nonce is used twice.

The secret is a key file (64 hexadecimal digits, 0600, `new_key_file`) or a passphrase of 20 characters or more in a
file (scrypt, N = 2^16, r = 8, p = 1: 64 MiB and a quarter of a second a guess; RFC 7914).

Law: nothing that was read is handed on before its chunk is opened; `unpack` tells success only after the last chunk.

Known limits: the head is in clear, so it says nothing about anybody: kind, instants and sizes are the caller's choice.
Four petabytes at most. Whoever unpacks throws away what he has when `ContainerError` comes late.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import scrypt, sha256
from pathlib import Path
from typing import IO, Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MAGIC: Final = b"sales-push backup 1\n"
CHUNK: Final = 1 << 20
_TAG: Final = 16
_SALT: Final = 32
_HEAD: Final = 4096  # bytes of the head at most: who reads an unknown file reads no more of it before he knows
_SHORTEST: Final = 20
_NONCE: Final = struct.Struct(">7xIB")

Step = Callable[[int], None]  # told how many bytes were done


class ContainerError(Exception):
    """Not a container, another secret, or changed or cut on the way. The text names no content."""


class Secret:
    """What seals containers. kind: "key" or "passphrase"."""

    def __init__(self, kind: str, material: bytes) -> None:
        self.kind = kind
        self._material = material

    def __repr__(self) -> str:
        return f"<Secret {self.kind}>"

    @classmethod
    def of_key_file(cls, path: Path) -> Secret:
        """Raises ContainerError: open to others, or no key."""
        text = _private(path)
        if not re.fullmatch(rb"[0-9a-f]{64}", text):
            raise ContainerError(f"{path} is no key file of 64 hexadecimal digits: make one with --new-key")
        return cls("key", bytes.fromhex(text.decode("ascii")))

    @classmethod
    def of_passphrase_file(cls, path: Path) -> Secret:
        """The file's first line. Raises ContainerError: open to others, or too short."""
        text = (_private(path).splitlines() or [b""])[0]
        if len(text) < _SHORTEST:
            raise ContainerError(f"the passphrase in {path} has fewer than {_SHORTEST} bytes")
        return cls("passphrase", text)

    def key(self, kind: str, salt: bytes) -> AESGCM:
        material = self._material
        if self.kind == "passphrase":
            material = scrypt(material, salt=salt, n=1 << 16, r=8, p=1, maxmem=1 << 27, dklen=32)
        made = HKDF(SHA256(), 32, salt, b"sp-container-1 " + kind.encode())
        return AESGCM(made.derive(material))


def new_key_file(path: Path) -> None:
    """Raises FileExistsError: a key is never replaced."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _private(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ContainerError(f"{path} is readable by others: chmod 0600 {path}")
            return file.read(4096).strip()
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror}") from None


class _Sealer(io.RawIOBase):
    """What is written is sealed behind the head; `end` writes the last chunk."""

    def __init__(self, out: IO[bytes], key: AESGCM, head: bytes) -> None:
        self._out, self._key, self._head = out, key, head
        self._waiting = bytearray()
        self._number = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._waiting += data
        while len(self._waiting) > CHUNK:  # the last chunk is never written here, it may be a full one
            self._seal(bytes(self._waiting[:CHUNK]), 0)
            del self._waiting[:CHUNK]
        return len(data)

    def end(self) -> None:
        self._seal(bytes(self._waiting), 1)

    def _seal(self, data: bytes, last: int) -> None:
        self._out.write(self._key.encrypt(_NONCE.pack(self._number, last), data, self._head))
        self._number += 1


class _Opener(io.RawIOBase):
    """Reads what `_Sealer` wrote."""

    def __init__(self, source: IO[bytes], key: AESGCM, head: bytes, step: Step) -> None:
        self._source, self._key, self._head, self._step = source, key, head, step
        self._next = source.read(CHUNK + _TAG)
        self._opened = memoryview(b"")
        self._number = 0
        self._is_over = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._opened and not self._is_over:
            self._open()
        taken = min(len(buffer), len(self._opened))
        buffer[:taken] = self._opened[:taken]
        self._opened = self._opened[taken:]
        return taken

    def _open(self) -> None:
        sealed, self._next = self._next, self._source.read(CHUNK + _TAG)
        self._is_over = not self._next
        try:
            nonce = _NONCE.pack(self._number, int(self._is_over))
            self._opened = memoryview(self._key.decrypt(nonce, sealed, self._head))
        except (InvalidTag, ValueError):
            if self._number:
                raise ContainerError(f"changed or cut at byte {self._number * (CHUNK + _TAG)}") from None
            raise ContainerError("it does not open: another key or passphrase, or it was changed") from None
        self._number += 1
        self._step(len(sealed))


def pack(
    out: IO[bytes], secret: Secret, kind: str, told: Mapping[str, Any], files: Sequence[tuple[str, bytes | Path]],
    step: Step = lambda _bytes: None,
) -> None:  # fmt: skip
    """Write a container of these files (name, content or where it lies), in this order. told: stands in the head."""
    salt = os.urandom(_SALT)
    head = json.dumps({**told, "kind": kind, "secret": secret.kind, "salt": salt.hex()}, sort_keys=True).encode()
    if len(head) >= _HEAD:
        raise ValueError("the head of a container has 4 kB at most")
    out.write(MAGIC + head + b"\n")
    sealer = _Sealer(out, secret.key(kind, salt), head)
    with tarfile.open(fileobj=sealer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.mode = 0o600
            if isinstance(content, Path):
                with content.open("rb") as file:
                    entry.size = os.fstat(file.fileno()).st_size
                    archive.addfile(entry, _Counted(file, step))
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    sealer.end()


class _Counted:
    def __init__(self, file: IO[bytes], step: Step) -> None:
        self._file, self._step = file, step

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._step(len(data))
        return data


def head_of(source: IO[bytes]) -> dict[str, Any]:
    """What stands in clear before the chunks; the file is then at the first of them. Raises ContainerError."""
    return _head(source)[0]


def _head(source: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    if source.read(len(MAGIC)) != MAGIC:
        raise ContainerError("this is no backup of ours")
    raw = source.readline(_HEAD)
    try:
        told = json.loads(raw)
        if not isinstance(told, dict) or len(bytes.fromhex(told["salt"])) != _SALT:
            raise ValueError
        if told["secret"] not in ("key", "passphrase") or not isinstance(told["kind"], str):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ContainerError("the head of this backup cannot be read") from None
    return told, raw.removesuffix(b"\n")


def unpack(
    source: IO[bytes], secret: Secret, kind: str, folder: Path, may: Callable[[str], bool],
    step: Step = lambda _bytes: None,
) -> Iterator[tuple[str, Path, str]]:  # fmt: skip
    """Each file into the folder: (name, where it lies, SHA-256). may(name): whether such a file belongs into this kind.

    Go to the end: only then is it known that nothing is missing. Raises ContainerError, OSError."""
    told, head = _head(source)
    if told["kind"] != kind:
        raise ContainerError(f"this is a backup of the {told['kind']}, not of the {kind}")
    if told["secret"] != secret.kind:
        raise ContainerError(f"this backup was sealed with a {told['secret']}, not with a {secret.kind}")
    opener = io.BufferedReader(_Opener(source, secret.key(kind, bytes.fromhex(told["salt"])), head, step), CHUNK)
    try:
        with tarfile.open(fileobj=opener, mode="r|") as archive:
            for entry in archive:
                content = archive.extractfile(entry) if entry.isreg() and may(entry.name) else None
                if content is None:
                    raise ContainerError("it holds a file that does not belong there")
                target, digest = folder / entry.name.replace("/", "_"), sha256()
                handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "wb") as file:
                    while data := content.read(CHUNK):
                        file.write(data)
                        digest.update(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield entry.name, target, digest.hexdigest()
    except tarfile.TarError:
        raise ContainerError("what is inside is no archive") from None
    while opener.read(CHUNK):
        pass
