"""Signed words about the audit chain, kept where whoever can write the database cannot write.

A chain alone shows a changed line, not a chain made anew or cut at its end. So every hour in which a line was written,
and when the writer stops, the number and hash of the last line are signed (Ed25519, RFC 8032) and taken elsewhere.

    1 `round`      a head that no checkpoint covers yet -> a signed row of the table checkpoint
    2 the log      one line with the whole document: a log collector on another host is a place elsewhere
    3 `Elsewhere`  a folder (a mount of another host) gets `audit-<seq>.json`, a command gets it on its input
    4 exported     noted when every place took it; else the next round takes what is missing there, oldest first

Laws:
- a document elsewhere is never replaced: another one of the same number is an error that stays in the log and in the
  figures until somebody looks;
- audit lines are dropped only up to a checkpoint that is elsewhere (`policy.audit.droppable`);
- the key (`audit.<n>` in the keys folder, 0600, 64 hex digits) only signs checkpoints: what is signed begins with a
  line that says so. The newest key signs, all of them verify, so an old one may be kept as long as its checkpoints.

Documents hold numbers, hashes and instants: nobody's data. `policy.verifier` judges them without us.

Known limits: between two checkpoints a tail can still be cut unseen, an hour at most; `uncovered` of the verifier says
how many lines that are. Without a folder and a command the log is the only place. A key that somebody copied signs what
he wants: where that matters, let the command have a service of its own sign once more or stamp the time (RFC 3161).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Row, func, insert, select, update

from policy import audit, canonical, verifier
from policy.instants import rfc3339
from policy.keys import KeyringError
from policy.schema import checkpoint as table
from policy.store import Store

log = structlog.get_logger()

HOUR_SECONDS: Final = 3600.0
VERSION: Final = 1
_NAME: Final = "audit"
_COMMAND_SECONDS: Final = 60.0
_AT_ONCE: Final = 100  # documents a round takes elsewhere: a place that was away for a month is brought up in hours


@dataclass(frozen=True, slots=True, repr=False)
class AuditKeys:
    """Keys that sign checkpoints, by number; the newest signs."""

    keys: dict[int, Ed25519PrivateKey]

    @classmethod
    def load(cls, folder: Path) -> AuditKeys:
        """Raises KeyringError: none there, readable by others, no key."""
        found = {int(path.suffix[1:]): _read(path) for path in folder.glob(f"{_NAME}.*") if path.suffix[1:].isdigit()}
        if not found:
            raise KeyringError(f"key file {folder / _NAME}.1 is missing: run `sales-push init`, or restore it")
        return cls(found)

    @classmethod
    def ensure(cls, folder: Path) -> AuditKeys:
        """Load, making the first key where there is none. Raises KeyringError, OSError (the folder is read-only)."""
        if not any(path.suffix[1:].isdigit() for path in folder.glob(f"{_NAME}.*")):
            _write(folder / f"{_NAME}.1")
        return cls.load(folder)

    @property
    def newest(self) -> int:
        return max(self.keys)

    @property
    def public(self) -> dict[str, bytes]:
        """What a verifier needs: raw public keys by name."""
        return {f"{_NAME}.{number}": key.public_key().public_bytes_raw() for number, key in sorted(self.keys.items())}

    def __repr__(self) -> str:
        return f"<AuditKeys newest={self.newest}>"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Where documents are taken besides the log. command: run once a document, which it reads from its input."""

    folder: Path | None = None
    command: Sequence[str] = ()

    async def take(self, name: str, document: bytes) -> None:
        """Raises OSError when a place did not take it."""
        if self.folder is not None:
            await asyncio.to_thread(_put, self.folder / name, document)
        if self.command:
            await _run(self.command, document)


class Checkpoints:
    """The writer's hand for them. keys: asked at each use."""

    def __init__(
        self, store: Store, keys: Callable[[], AuditKeys], clock: Callable[[], int], elsewhere: Elsewhere | None = None
    ) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._elsewhere = elsewhere or Elsewhere()
        self._turn = asyncio.Lock()
        self.made = 0
        self.failures = 0
        self.waiting = 0  # documents that are not elsewhere yet

    def __repr__(self) -> str:
        return f"<Checkpoints made={self.made} waiting={self.waiting}>"

    async def round(self) -> float:
        """Sign what is new, take elsewhere what is not there yet; seconds until the next round. Also the last act of a
        writer that stops. Raises the store's error."""
        async with self._turn:
            try:
                keys = await asyncio.to_thread(self._keys)
            except (KeyringError, OSError) as error:
                self.failures += 1
                log.error("audit checkpoints cannot be signed", error=str(error))
                return HOUR_SECONDS
            if await self._store.write(lambda conn: sign(conn, keys, self._clock())) is not None:
                self.made += 1
            await self._take_elsewhere()
            return HOUR_SECONDS

    async def _take_elsewhere(self) -> None:
        rows, self.waiting = await self._store.write(_not_elsewhere)
        for row in rows:
            document = document_of(row)
            log.info("audit checkpoint", document=document.decode().rstrip())
            try:
                await self._elsewhere.take(f"{_NAME}-{row.seq:012d}.json", document)
            except OSError as error:
                self.failures += 1
                log.error("a checkpoint was not taken elsewhere", seq=row.seq, error=error.strerror or str(error))
                return  # the next round begins with this one
            await self._store.write(partial(_exported, seq=int(row.seq), at=self._clock()))
            self.waiting -= 1

    def statistics(self) -> dict[str, float]:
        return {
            "checkpoints": float(self.made),
            "checkpoint_failures": float(self.failures),
            "checkpoints_waiting": float(self.waiting),
        }


class CheckpointOperations:
    """What the writer does when asked: `sales-push audit checkpoint`."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    async def op_checkpoint(self) -> dict[str, int]:
        """made: 1 when there was something new; waiting: documents that a place did not take."""
        before = self._checkpoints.made
        await self._checkpoints.round()
        return {"made": self._checkpoints.made - before, "waiting": self._checkpoints.waiting}


def sign(conn: Connection, keys: AuditKeys, now: int) -> int | None:
    """A checkpoint of the chain as it is; its number, or None when the last one covers everything."""
    seq, digest = audit.head(conn)
    if seq <= int(conn.execute(select(func.max(table.c.seq))).scalar() or 0):
        return None
    number = keys.newest
    words = _words(seq, digest, now, f"{_NAME}.{number}")
    signature = keys.keys[number].sign(verifier.signed_bytes(words))
    conn.execute(insert(table).values(seq=seq, hash=digest, at=now, key_id=words["key_id"], signature=signature))
    return seq


def documents(conn: Connection) -> list[bytes]:
    """All that are still kept, as they were taken elsewhere."""
    return [document_of(row) for row in conn.execute(select(table).order_by(table.c.seq))]


def document_of(row: Row[Any]) -> bytes:
    """RFC 8785, with a line end."""
    words = _words(row.seq, row.hash, row.at, row.key_id)
    return canonical.encode(words | {"signature": row.signature.hex()}) + b"\n"


def _words(seq: int, digest: bytes, at: int, key_id: str) -> dict[str, Any]:
    return {"v": VERSION, "seq": seq, "hash": digest.hex(), "ts": rfc3339(at), "key_id": key_id}


def _not_elsewhere(conn: Connection) -> tuple[Sequence[Row[Any]], int]:
    waiting = table.c.exported.is_(None)
    count = conn.execute(select(func.count()).select_from(table).where(waiting)).scalar_one()
    return conn.execute(select(table).where(waiting).order_by(table.c.seq).limit(_AT_ONCE)).all(), int(count)


def _exported(conn: Connection, seq: int, at: int) -> None:
    conn.execute(update(table).where(table.c.seq == seq).values(exported=at))


def _put(path: Path, document: bytes) -> None:
    """Whole or not at all, on the disk, never over another. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            if path.read_bytes() != document:
                raise FileExistsError(
                    0, "another checkpoint of that number is there: was the chain made anew?"
                ) from None
    finally:
        draft.unlink()
    _sync_folder(path.parent)


async def _run(command: Sequence[str], document: bytes) -> None:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        await asyncio.wait_for(process.communicate(document), _COMMAND_SECONDS)
    except TimeoutError:
        raise OSError(f"the command did not end within {_COMMAND_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise OSError(f"the command ended with {process.returncode}")


def _read(path: Path) -> Ed25519PrivateKey:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(128)
    except OSError as error:
        raise KeyringError(f"key file {path} cannot be read: {error.strerror}") from None
    granted = os.environ.get("CREDENTIALS_DIRECTORY")  # there the group's bits are the mask of our ACL entry, acl(5)
    if stat.S_IMODE(mode) & (0o007 if granted and Path(granted) == path.parent else 0o077):
        raise KeyringError(f"key file {path} is readable by others: chmod 0600 {path}, and consider it known to them")
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text.decode("ascii").strip()))
    except ValueError:
        raise KeyringError(
            f"key file {path} is not 64 hexadecimal digits: restore it from where keys are kept"
        ) from None


def _write(path: Path) -> None:
    """As keys are made (policy.keys): whole or not at all, never over one that somebody else just made."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
