"""Backups: a consistent copy of the SQL store in a sealed container, with an end, and never with what opens it.

Promise (P-11, P-36): a backup holds the SQL store and nothing else: no key, no tombstones, no queue. Keys are backed up
apart (`pack_keys`), best to another place and under another secret; tombstones are not backed up at all, they are what
a restored backup catches up from (`policy.tombstones`).

    1 `Frame`     head of the tombstones, instant, then the copy: so a replay from that instant on misses nothing
    2 `snapshot`  SQLite: VACUUM INTO on a reading connection (one snapshot, no free pages with deleted bytes in them);
                  PostgreSQL: pg_dump of the PATH, custom format
    3 `write`     manifest and copy into OUT.part, sealed (`policy.containers`), synced
    4 `op_backup_made`  the row of table backup and the audit line
    5 `publish`   OUT.part gets its name. A crash before leaves no OUT; a row without its file is told destroyed

The copy lies unsealed in ``data_dir/backup`` while it is packed, as sensitive as the database beside it; it is removed
at the end, and by the next backup or within some hours where a crash left it.

Ends: 35 days at most for the store (requirements, contradiction 6), 14 for keys: weekly keys are destroyed 14 days
after their week, and no copy of theirs may live longer. A restore refuses what is past its end. `BackupOperations`
lists what is due to be destroyed, the figures count it; destroying is done where the copies are, and then told.

Cost, 193 MB with 1.5 million messages on SQLite, on the build machine: 1.3 s to back up, 0.7 s to restore.

Known limits: nobody can see from here whether a copy was destroyed. SQLite's copy takes the disk space of the database
once more, and its read snapshot keeps the write-ahead log from being cut meanwhile. pg_dump must not be older than its
server. What is not in SQL is not in the backup: queue, journals, letters and bundles not sent yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets as random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Final

import structlog
from sqlalchemy import Connection, func, insert, make_url, select, text, update

from policy import audit, tombstones
from policy.containers import ContainerError, Secret, pack
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.jobs import Refused
from policy.keys import Keyring, is_key
from policy.schema import backup as table
from policy.schema import open_store
from policy.settings import PolicySettings
from policy.store import Store

log = structlog.get_logger()

LEDGER, KEYS = "ledger", "keys"
LONGEST_DAYS: Final = 35
KEYS_DAYS: Final = 14
FOLDER: Final = "backup"  # under data_dir
MANIFEST: Final = "manifest.json"
COPIES: Final = {"sqlite": "policy.db", "postgresql": "policy.dump"}
_HOUR_SECONDS: Final = 3600.0
_FORGOTTEN_US: Final = 6 * HOUR_US

Step = Callable[[str, int, int], None]  # what is under way, bytes done, bytes in all (0: not known)


class BackupError(Exception):
    """No backup was made. The text names programs, folders and the way out."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a container says of itself, sealed with it. at: every commit from before it is in the copy; tombstones: how
    many lines there were then, and the hash of the last; keys: fingerprint of the keyring that opens the copy."""

    version: int
    kind: str
    at: int
    ends: int
    program: str
    store: str
    revision: str
    audit_seq: int
    audit_hash: str
    tombstones: int
    tombstones_hash: str
    keys: str
    files: dict[str, str]

    @classmethod
    def of(cls, raw: bytes) -> Manifest:
        """Raises ContainerError."""
        try:
            told = cls(**json.loads(raw))
        except (ValueError, TypeError):
            raise ContainerError("its manifest cannot be read") from None
        if told.version != 1:
            raise ContainerError("it was made by a newer program than this one")
        return told


@dataclass(frozen=True, slots=True)
class Made:
    """A container that is written and has no name yet."""

    part: Path
    at: int
    ends: int
    digest: bytes
    bytes: int


def fingerprint(keyring: Keyring) -> str:
    """Tells keyrings apart, and nothing about them: of the one key that never rotates."""
    return blake2b(keyring.lane, digest_size=8, person=b"sp-backup-keys").hexdigest()


# --- the store ------------------------------------------------------------------------------------------------------


def write(
    settings: PolicySettings, keyring: Keyring, secret: Secret, out: Path, now: int, days: int, step: Step
) -> Made:
    """Steps 1 to 3. Raises BackupError, OSError."""
    days = _bounded(days, LONGEST_DAYS)
    if out.exists():
        raise BackupError(f"{out} is there already: a backup replaces nothing")
    lines, last = head_of_tombstones(settings)
    folder = settings.data_dir / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what a crash left
    folder.mkdir(mode=0o700)
    try:
        dialect = make_url(settings.sql_address()).get_backend_name()
        copy = folder / f"{random.token_hex(4)}-{COPIES[dialect]}"
        if dialect == "sqlite":
            snapshot(settings, copy, step)
            revision, seq, digest = _facts(f"sqlite:///{copy}")
        else:  # a line that is written meanwhile may be in the copy and not in the manifest
            revision, seq, digest = _facts(settings.sql_address())
            dump(settings.sql_address(), copy)
        told = Manifest(
            version=1, kind=LEDGER, at=now, ends=now + days * DAY_US, program=version("sales-push"), store=dialect,
            revision=revision, audit_seq=seq, audit_hash=digest.hex(), tombstones=lines, tombstones_hash=last,
            keys=fingerprint(keyring), files={COPIES[dialect]: _digest(copy, step)},
        )  # fmt: skip
        return _packed(secret, out, told, [(COPIES[dialect], copy)], step)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def snapshot(settings: PolicySettings, copy: Path, step: Step) -> None:
    """A copy of the SQLite store as of one instant; nobody who writes waits for it."""
    source = Path(str(make_url(settings.sql_address()).database)).absolute()
    if not source.exists():
        raise BackupError(f"there is no database in {source.parent}")
    os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # VACUUM INTO takes an empty file
    size = source.stat().st_size
    # not `open_store`: its readers are query_only, which refuses to write even elsewhere. mode=ro never checkpoints
    connection = sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=30.0)
    try:
        connection.set_progress_handler(lambda: step("copying", copy.stat().st_size, size), 1_000_000)
        connection.execute("VACUUM INTO ?", (str(copy),))
    except sqlite3.Error as error:
        raise BackupError(f"the database cannot be copied ({error.sqlite_errorname})") from None
    finally:
        connection.close()


def dump(url: str, copy: Path) -> None:
    """pg_dump into a file. Raises BackupError."""
    run_postgres("pg_dump", url, "--format=custom", "--no-owner", "--no-privileges", f"--file={copy}")
    copy.chmod(0o600)


def run_postgres(program: str, url: str | None, *arguments: str) -> None:
    """A program of PostgreSQL on this store (None: on files only); the password goes by the environment.

    Raises BackupError: the program's own words are not repeated, they may quote rows."""
    if shutil.which(program) is None:
        raise BackupError(f"{program} is not on the PATH: install PostgreSQL's client programs of the server's version")
    more: dict[str, str] = {}
    if url is not None:
        parsed = make_url(url)
        bare = parsed.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
        arguments = (f"--dbname={bare}", *arguments)
        more = {"PGPASSWORD": str(parsed.password)} if parsed.password else {}
    done = subprocess.run([program, *arguments], env={**os.environ, **more}, capture_output=True)
    if done.returncode:
        older = " (it is older than the server)" if b"version mismatch" in done.stderr else ""
        raise BackupError(f"{program} ended with code {done.returncode}{older}")


def _facts(url: str) -> tuple[str, int, bytes]:
    """Revision of the schema, number and hash of the last audit line."""
    engine = open_store(url, writer=False)
    try:
        with engine.connect() as conn:
            revision = conn.execute(text("SELECT version_num FROM schema_version")).scalar_one()
            return str(revision), *audit.head(conn)
    finally:
        engine.dispose()


def head_of_tombstones(settings: PolicySettings) -> tuple[int, str]:
    """How many lines the tombstones say they have, and the hash of the last; (0, ""): none were ever written."""
    head = settings.tombstones_dir / f"{tombstones.NAME}.head"
    try:
        number, last = head.read_text("ascii").split()
        return int(number), last
    except FileNotFoundError:
        return 0, ""
    except ValueError:
        raise BackupError(f"{head} cannot be read: look at the tombstones before you rely on a backup") from None


# --- keys -----------------------------------------------------------------------------------------------------------


def pack_keys(settings: PolicySettings, keyring: Keyring, secret: Secret, out: Path, now: int, days: int) -> Made:
    """The key files, in a container of their own. Raises BackupError, OSError."""
    if settings.keys_command:
        raise BackupError("keys come from a command here: back them up where it keeps them")
    if out.exists():
        raise BackupError(f"{out} is there already: a backup replaces nothing")
    files = list(_key_files(settings.keys_dir))
    told = Manifest(
        version=1, kind=KEYS, at=now, ends=now + _bounded(days, KEYS_DAYS) * DAY_US, program=version("sales-push"),
        store="", revision="", audit_seq=0, audit_hash="", tombstones=0, tombstones_hash="", keys=fingerprint(keyring),
        files={name: sha256(content).hexdigest() for name, content in files},
    )  # fmt: skip
    return _packed(secret, out, told, files, lambda *_: None)


def is_key_name(name: str) -> bool:
    """Whether a container of keys may hold it."""
    folder, slash, file = name.rpartition("/")
    if slash:
        return folder == "dkim" and file.endswith(".pem") and file == Path(file).name
    return is_key(name) or (name.startswith("audit.") and name[6:].isdigit())


def _key_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted([*folder.iterdir(), *folder.glob("dkim/*.pem")]):
        name = path.relative_to(folder).as_posix()
        if is_key_name(name):
            yield name, path.read_bytes()


# --- packing --------------------------------------------------------------------------------------------------------


def _bounded(days: int, most: int) -> int:
    if days < 1:
        raise BackupError("a backup is kept for a day at least")
    return min(days, most)


def _digest(path: Path, step: Step) -> str:
    made, done, size = sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            made.update(data)
            done += len(data)
            step("reading", done, size)
    return made.hexdigest()


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest, self.bytes = sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def _packed(secret: Secret, out: Path, told: Manifest, files: Sequence[tuple[str, bytes | Path]], step: Step) -> Made:
    part = out.with_name(out.name + ".part")
    part.unlink(missing_ok=True)
    size = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for _, one in files)
    done = 0

    def counted(more: int) -> None:
        nonlocal done
        done += more
        step("sealing", done, size)

    head = {"at": rfc3339(told.at), "ends": rfc3339(told.ends), "version": 1}
    manifest = json.dumps(asdict(told), sort_keys=True, indent=1).encode()
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        hashed = _Hashed(file)
        pack(hashed, secret, told.kind, head, [(MANIFEST, manifest), *files], counted)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return Made(part, told.at, told.ends, hashed.digest.digest(), hashed.bytes)


def publish(made: Made, out: Path) -> None:
    """Give it its name; never in place of another. Raises FileExistsError, OSError."""
    try:
        os.link(made.part, out)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if out.exists():
            raise FileExistsError(out) from None
        made.part.rename(out)
    with contextlib.suppress(FileNotFoundError):
        made.part.unlink()
    sync_folder(out.absolute().parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_copies(folder: Path, now: int) -> int:
    """Unsealed copies that nobody has touched for six hours: the backup they were for was killed. How many."""
    gone = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns // 1000 < now - _FORGOTTEN_US:
                path.unlink()
                gone += 1
    return gone


# --- what the writer knows of them ----------------------------------------------------------------------------------


class BackupOperations:
    """What the writer does when asked, and its hourly look at what is due to be destroyed."""

    def __init__(self, store: Store, clock: Callable[[], int], data_dir: Path) -> None:
        self._store = store
        self._clock = clock
        self._folder = data_dir / FOLDER
        self.kept = self.due = 0
        self._newest = 0

    async def op_backup_made(self, at: int, ends: int, digest: bytes, size: int) -> int:
        """A copy is about to get its name; its number."""
        now = self._clock()
        if len(digest) != 32 or size <= 0 or not at < ends <= at + LONGEST_DAYS * DAY_US or at > now + DAY_US:
            raise Refused("refused", f"a backup has a digest, a size and an end within {LONGEST_DAYS} days")

        def work(conn: Connection) -> int:
            made = conn.execute(insert(table).values(at=at, digest=digest, bytes=size, ends=ends)).inserted_primary_key
            assert made is not None
            audit.append(conn, now, "operator", "backup-made", f"backup/{made[0]}", "backup", f"ends {rfc3339(ends)}")
            return int(made[0])

        return await self._store.write(work)

    async def op_backups(self, due_only: bool = False) -> list[dict[str, Any]]:
        """The newest first; due: its end has come and nobody said that it was destroyed."""
        now = self._clock()
        rows = await self._store.write(lambda conn: conn.execute(select(table).order_by(table.c.number.desc())).all())
        told = [
            {
                "number": row.number, "at": row.at, "ends": row.ends, "bytes": row.bytes, "digest": row.digest.hex(),
                "destroyed": row.destroyed, "due": row.destroyed is None and row.ends <= now,
            }
            for row in rows
        ]  # fmt: skip
        return [one for one in told if one["due"]] if due_only else told

    async def op_backup_destroyed(self, number: int) -> bool:
        """Every copy of it was destroyed; False: that was known."""
        now = self._clock()

        def work(conn: Connection) -> bool:
            there = conn.execute(select(table.c.destroyed).where(table.c.number == number)).one_or_none()
            if there is None:
                raise Refused("not-found", "there is no backup of that number")
            if there.destroyed is not None:
                return False
            conn.execute(update(table).where(table.c.number == number).values(destroyed=now))
            audit.append(conn, now, "operator", "backup-destroyed", f"backup/{number}", "backup", "done")
            return True

        return await self._store.write(work)

    async def round(self) -> float:
        """Seconds until the next look."""
        now = self._clock()

        def work(conn: Connection) -> tuple[int, int, int]:
            mine = select(func.count(), func.max(table.c.at)).where(table.c.destroyed.is_(None))
            kept, newest = conn.execute(mine).one()
            return kept, conn.execute(mine.where(table.c.ends <= now)).one()[0], newest or 0

        self.kept, self.due, self._newest = await self._store.write(work)
        if await asyncio.to_thread(forget_copies, self._folder, now):
            log.warning("an unsealed copy of a backup that never ended is removed")
        if self.due:
            log.error("backups are past their end: destroy them, `sales-push backups --due`", backups=self.due)
        return _HOUR_SECONDS

    def statistics(self) -> dict[str, float]:
        """For /metrics, as of the last look. The newest's age: 0 while there is none."""
        age = (self._clock() - self._newest) / 1e6 if self._newest else 0.0
        return {"backups_kept": float(self.kept), "backups_due": float(self.due), "backup_age_seconds": max(age, 0.0)}
