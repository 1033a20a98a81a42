"""Restoring a backup: made ready beside the store, marked, then put in its place in one step (P-11).

(`policy.restore` is about a Redis that came back older; this is about SQL that is brought back older on purpose.)

    1 lock      the writer's own: a running writer is refused, none can start meanwhile; nor may readers live (vitals)
    2 unpack    into ``data_dir/restoring``; digests compared, the copy checked, numbers raised (`raise_numbers`)
    3 mark      ``data_dir/quarantine.json``, state "swapping", on the disk
    4 swap      the old store's log goes, the copy takes the store's name (rename), folder synced
    5 mark      state "standing": `policy.quarantine` leads out of it

Laws:
- until the mark of step 3 nothing has happened; from it on no writer serves before `policy.quarantine.leave` is
  through. Killed anywhere, `finish` (called by both) or the same command again comes to the same end;
- the old store's write-ahead log never meets the new file: SQLite would replay it into a database that is not its own;
- numbers that delivered mail, Redis or trackers know (jobs, lists, the negative list …) are never given out twice: each
  sequence jumps past whatever may have been given out since the backup;
- what is past its end is not restored, and weekly keys past their time do not come back (`restore_keys`).

PostgreSQL: psql runs pg_restore's script in one transaction, which empties the schema `public` first: the database is
taken to be ours alone. It stands for step 4; a restore that was killed in between is to be run again.

Known limits: the old store is gone when this is done; copy it first if it is still good for something. Its blocks are
not overwritten (encrypt the disk). Consent, requests, figures and audit lines since the backup are lost: tombstones
bring back erasures, suppressions and withdrawals, mail to the officer the rest. Checkpoints of the audit chain that are
elsewhere and younger than the backup no longer fit: move them aside, the line `restored` says where the chain was cut.
PostgreSQL: the script lies in clear in ``data_dir/restoring`` meanwhile; its programs may not be older than the server.
Jobs the backup knows as under way and Redis no longer holds are told as lost (T12).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Integer, MetaData, make_url, text

from policy import keys, schema
from policy.backup import (
    COPIES,
    KEYS,
    LEDGER,
    MANIFEST,
    BackupError,
    Manifest,
    is_key_name,
    run_postgres,
    sync_folder,
)
from policy.containers import ContainerError, Secret, head_of, unpack
from policy.instants import SECOND_US, WEEK_US, rfc3339
from policy.settings import PolicySettings
from policy.vitals import read_all

MARK: Final = "quarantine.json"
SWAPPING, STANDING = "swapping", "standing"
FOLDER: Final = "restoring"  # under data_dir
LONG_JUMP: Final = 1 << 20  # of 64-bit numbers; jobs have 40 bits in tokens: a million restores
SHORT_JUMP: Final = 1 << 16  # of 32-bit numbers: 32,000 restores
_FRESH_SECONDS: Final = 10.0  # five beats: a process that was killed is waited for as long
_AUDIT: Final = "audit"  # its numbers have no gaps (policy.audit)
_KEPT: Final = {"queue": 1, "kek": 2}  # weekly keys that stay however old they are (policy.chores)

Step = Callable[[str, int, int], None]  # what is under way, bytes done, bytes in all
Reached = Callable[[str], None]  # told where the work is: a test ends the process there


class RestoreError(Exception):
    """Nothing was restored, or it is not finished. The text says which, and the way out."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Why this installation is quarantined. at: the backup's instant; tombstones: lines there were then, with the hash
    of the last; keys: fingerprint of the keyring; forgiven: an officer took it upon himself to go on without them."""

    state: str
    at: int
    restored: int
    store: str
    tombstones: int
    tombstones_hash: str
    keys: str
    digest: str
    forgiven: bool = False


# --- the mark -------------------------------------------------------------------------------------------------------


def is_quarantined(data_dir: Path) -> bool:
    """Whether this installation may not serve: one look at a name."""
    return (data_dir / MARK).exists()


def read_mark(data_dir: Path) -> Mark | None:
    """Raises RestoreError: it is there and cannot be read. Then nothing is served."""
    try:
        return Mark(**json.loads((data_dir / MARK).read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise RestoreError(f"{data_dir / MARK} cannot be read: restore the backup again") from None


def put_mark(data_dir: Path, mark: Mark) -> None:
    """On the disk when this returns."""
    draft = data_dir / f"{MARK}.new"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(mark), file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(data_dir / MARK)
    sync_folder(data_dir)


def take_mark(data_dir: Path) -> None:
    """Out of quarantine."""
    (data_dir / MARK).unlink(missing_ok=True)
    sync_folder(data_dir)


def forgive(data_dir: Path) -> Mark:
    """Go on without tombstones; told to the audit chain when the quarantine ends. Raises RestoreError."""
    mark = read_mark(data_dir)
    if mark is None:
        raise RestoreError("this installation is not quarantined")
    mark = replace(mark, forgiven=True)
    put_mark(data_dir, mark)
    return mark


# --- the store ------------------------------------------------------------------------------------------------------


def restore(
    settings: PolicySettings,
    secret: Secret,
    source: Path,
    now: int,
    step: Step = lambda *_: None,
    *,
    forgiven: bool = False,
    reached: Reached = lambda _point: None,
) -> Mark:
    """The whole way. Raises RestoreError, ContainerError, BackupError, OSError."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    dialect = make_url(settings.sql_address()).get_backend_name()
    with _locked(settings.data_dir):
        _check_alone(settings.data_dir, now)
        before = read_mark(settings.data_dir)
        if before is not None and before.state == SWAPPING and dialect == "sqlite":
            finish(settings)  # the store is then one of the two, whole
        folder = settings.data_dir / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            told, copies = _unpacked(secret, source, LEDGER, folder, frozenset(COPIES.values()).__contains__, now, step)
            reached("unpacked")
            if told.store != dialect:
                raise RestoreError(f"this is a backup of {told.store}, the settings name {dialect}")
            copy = copies[COPIES[dialect]]
            _check_revision(told.revision)
            if dialect == "sqlite":
                _prepare(copy)
            reached("prepared")
            mark = Mark(
                SWAPPING, told.at, now, dialect, told.tombstones, told.tombstones_hash, told.keys,
                told.files[COPIES[dialect]], forgiven,
            )  # fmt: skip
            put_mark(settings.data_dir, mark)
            reached("marked")
            if dialect == "sqlite":
                finish(settings, reached)
            else:
                _restore_postgres(settings, copy)
                put_mark(settings.data_dir, replace(mark, state=STANDING))
        except BaseException:
            after = read_mark(settings.data_dir)
            if after is None or after.state != SWAPPING:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        standing = read_mark(settings.data_dir)
        assert standing is not None
        return standing


def finish(settings: PolicySettings, reached: Reached = lambda _point: None) -> None:
    """Steps 4 and 5 of a restore that was marked, as often as wanted; the caller holds the writer's lock. Without a
    mark, what an unfinished restore left is removed. Raises RestoreError, OSError."""
    mark = read_mark(settings.data_dir)
    folder = settings.data_dir / FOLDER
    if mark is not None and mark.state == SWAPPING:
        if mark.store != "sqlite":
            raise RestoreError("a restore was interrupted: run `sales-push restore` with the same backup again")
        store = Path(str(make_url(settings.sql_address()).database)).absolute()
        copy = folder / COPIES["sqlite"]
        if copy.exists():  # else it has its name already, and a log beside it would be its own
            for suffix in ("-wal", "-shm", "-journal"):
                store.with_name(store.name + suffix).unlink(missing_ok=True)
            sync_folder(store.parent)
            reached("cleared")
            _moved(copy, store)
            sync_folder(store.parent)
            reached("swapped")
        put_mark(settings.data_dir, replace(mark, state=STANDING))
        reached("standing")
    shutil.rmtree(folder, ignore_errors=True)


def _moved(copy: Path, store: Path) -> None:
    try:
        copy.rename(store)
    except OSError as error:  # sql_url on another file system than data_dir
        raise RestoreError(f"{store} must be on the file system of data_dir: {error.strerror}") from None


def _check_alone(data_dir: Path, now: int) -> None:
    """Nobody of this host reads the store: whoever has it open would go on reading the old one."""
    for sign in read_all(data_dir):
        if abs(now / SECOND_US - sign.at) < _FRESH_SECONDS:
            raise RestoreError(f"{sign.role} {sign.index} was alive a moment ago: stop the service on every host first")


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    handle = os.open(data_dir / "policy.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RestoreError("the policy process is running: stop the service on every host first") from None
        yield
    finally:
        os.close(handle)


def _unpacked(
    secret: Secret, source: Path, kind: str, folder: Path, may: Callable[[str], bool], now: int, step: Step
) -> tuple[Manifest, dict[str, Path]]:
    size, done = source.stat().st_size, 0

    def counted(more: int) -> None:
        nonlocal done
        done += more
        step("opening", done, size)

    paths: dict[str, Path] = {}
    digests: dict[str, str] = {}
    with source.open("rb") as file:
        for name, path, digest in unpack(
            file, secret, kind, folder, lambda name: name == MANIFEST or may(name), counted
        ):
            paths[name], digests[name] = path, digest
    if MANIFEST not in paths:
        raise ContainerError("it holds no manifest")
    told = Manifest.of(paths.pop(MANIFEST).read_bytes())
    del digests[MANIFEST]
    if told.files != digests:
        raise ContainerError("what it holds is not what its manifest says")
    if now >= told.ends:
        raise RestoreError(f"this backup was to be destroyed by {rfc3339(told.ends)[:10]}: it is not restored (P-11)")
    return told, paths


def head_of_backup(source: Path) -> dict[str, Any]:
    """What stands in clear: kind, at, ends. Raises ContainerError, OSError."""
    with source.open("rb") as file:
        return head_of(file)


def _check_revision(revision: str) -> None:
    folder = Path(schema.__file__).parent / "migrations" / "versions"
    if revision not in {path.stem[1:].partition("_")[0] for path in folder.glob("r*.py")}:
        raise RestoreError("this backup was made by a newer program than this one: install that first")


def _prepare(copy: Path) -> None:
    """The copy is a whole database of ours, and gives out no number twice."""
    try:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            [(told,)] = connection.execute("PRAGMA quick_check(1)").fetchall()
            if told != "ok":
                raise RestoreError("the database in this backup is damaged")
    except sqlite3.DatabaseError:
        raise RestoreError("the database in this backup is damaged") from None
    engine = schema.open_store(f"sqlite:///{copy}", writer=True)
    try:
        schema.upgrade(engine)  # first: a table made anew forgets how far its numbers were
        with engine.begin() as conn:
            raise_numbers(conn)
        with engine.connect() as conn:
            raw: Any = conn.connection.driver_connection
            if conn.in_transaction():
                conn.rollback()
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        engine.dispose()
    for suffix in ("-wal", "-shm"):
        left = copy.with_name(copy.name + suffix)
        if left.exists() and left.stat().st_size and suffix == "-wal":
            raise RestoreError("the copy could not be made ready: try again")
        left.unlink(missing_ok=True)
    handle = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def raise_numbers(conn: Connection, metadata: MetaData = schema.metadata) -> None:
    """Every sequence past what may have been given out since the backup."""
    for table in metadata.sorted_tables:
        column = table.autoincrement_column
        if column is None or table.name == _AUDIT:
            continue
        is_sqlite = conn.dialect.name == "sqlite"
        if is_sqlite and not table.dialect_options["sqlite"]["autoincrement"]:
            continue  # numbers of rows that nobody outside of the store knows
        jump = SHORT_JUMP if isinstance(column.type, Integer) and not _is_big(column.type) else LONG_JUMP
        if is_sqlite:
            named = {"name": table.name}
            known = conn.execute(text("SELECT seq FROM sqlite_sequence WHERE name = :name"), named).scalar()
            if known is None:
                conn.execute(
                    text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :jump)"), named | {"jump": jump}
                )
            else:
                conn.execute(
                    text("UPDATE sqlite_sequence SET seq = seq + :jump WHERE name = :name"), named | {"jump": jump}
                )
        else:
            sequence = conn.execute(
                text("SELECT pg_get_serial_sequence(:name, :column)"),
                {"name": f'"{table.name}"', "column": column.name},
            ).scalar()
            if sequence is not None:
                conn.execute(
                    text("SELECT setval(:sequence, nextval(:sequence) + :jump)"), {"sequence": sequence, "jump": jump}
                )


def _is_big(kind: Any) -> bool:
    return kind is schema.BIG


def _restore_postgres(settings: PolicySettings, copy: Path) -> None:
    """All of it or nothing: one transaction. Not `pg_restore --clean`: it cannot drop what partitions inherit."""
    script = copy.with_name("policy.sql")
    try:
        run_postgres("pg_restore", None, "--no-owner", "--no-privileges", f"--file={script}", str(copy))
        script.chmod(0o600)
        run_postgres(
            "psql", settings.sql_address(), "--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1",
            "--command=DROP SCHEMA public CASCADE", "--command=CREATE SCHEMA public", f"--file={script}",
        )  # fmt: skip
    except BackupError as error:
        raise RestoreError(f"{error}: the store is as it was, and quarantined until a restore is through") from None
    engine = schema.open_store(settings.sql_address(), writer=True)
    try:
        with engine.begin() as conn:
            raise_numbers(conn)
    finally:
        engine.dispose()


# --- keys -----------------------------------------------------------------------------------------------------------


def restore_keys(settings: PolicySettings, secret: Secret, source: Path, now: int) -> tuple[list[str], list[str]]:
    """Key files that are missing, out of a backup of keys: (those that came back, those that stay destroyed). Nothing
    is replaced. Raises RestoreError, ContainerError, KeyringError, OSError."""
    if settings.keys_command:
        raise RestoreError("keys come from a command here: restore them where it keeps them")
    target = settings.keys_dir
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(settings.data_dir):
        folder = settings.data_dir / FOLDER
        if is_quarantined(settings.data_dir):
            finish(settings)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            _, paths = _unpacked(secret, source, KEYS, folder, is_key_name, now, lambda *_: None)
            lost = _too_old({*paths, *(path.name for path in target.iterdir())}, now)
            back = []
            for name, path in sorted(paths.items()):
                (target / name).parent.mkdir(mode=0o700, exist_ok=True)
                if name not in lost and not (target / name).exists():
                    shutil.copyfile(path, draft := target / f".{path.name}.{os.urandom(4).hex()}")
                    draft.chmod(0o600)
                    draft.rename(target / name)
                    back.append(name)
            sync_folder(target)
            return back, sorted(lost & paths.keys())
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _too_old(names: set[str], now: int) -> set[str]:
    """Weekly keys whose time is over: they were destroyed, or will be within the hour."""
    over: set[str] = set()
    for kind, keep in _KEPT.items():
        weeks = sorted(
            int(name.rpartition(".")[2]) for name in names if keys.is_key(name) and name.startswith(f"{kind}.")
        )
        over |= {f"{kind}.{week}" for week in weeks[:-keep] if now >= (week + 1) * WEEK_US + keys.QUEUE_KEY_LIFE_US}
    return over
