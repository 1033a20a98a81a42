"""A new pepper over the old tags: nobody's opt-out is lost, and no address is needed for it (decision 13).

Law: whoever was suppressed is suppressed after a rotation, in every spelling that was one before; no tag is made with a
pepper that the store does not have, or the other way round (`check` refuses to start).

A pepper never replaces another, it is chained over it: tag2 = BLAKE2b(pepper2, tag1), tag1 = BLAKE2b(pepper1, address).
So stored tags move by themselves, and an address is taken through all peppers in turn (`policy.address.tag_of`, one
microsecond a generation). Who stole pepper 1 and the old tags can test addresses against the old tags only.

The rotation (`rotate`, command ``sales-push keys rotate-pepper``), with the service stopped on every host:

    1. drafts ``pepper.<n>.next`` and ``token.<n>.next`` are written and synced; nobody reads drafts
    2. one SQL transaction: every tag goes forward, the turn and its instant are noted beside the cursors, the commit
       number rises (so the writer rebuilds Redis at its next start), one line of audit
    3. the drafts get their names, pepper first: between the two every process refuses the keyring

Killed anywhere, the same command goes on: before the commit nothing has changed, after it `check` and the keyring
refuse until the names are there. With keys from elsewhere (systemd, a command) the operator puts ``pepper.<n>`` and
``token.<n>`` there and the command does step 2.

Tags that are not in a column of their own:

    delivered mail   links carry the tag of the day; their token key's number tells its peppers (`Keyring.heard`)
    message rows     `open_tag` goes by the instant of the row: sealed before a turn, brought forward over it
    streams, journals  told before the turn, so they reach the ledger as rows of before it
    erasure ledger   its lines should carry `Keyring.pepper_id`, and come back by `Keyring.forward`

Suppressions also keep their old tag for `OVERLAP_US`, with an end: a worker that nobody stopped still refuses everybody
who was suppressed at the turn. It would not see opt-outs that come later, and would make people anew in the vault:
stop them all.

Cost: 24 µs of CPU a suppression (a twin is written), 13 µs a subject (100,000 of each over SQLite, build machine): a
million of both in about 50 s.

Known limits: one transaction: SQLite's log grows by the tables' size meanwhile. Old peppers can never be thrown away.
A token key's number is one byte, so there are at most 254 turns.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Column, Connection, Engine, Table, insert, select, update

from policy import audit, statements
from policy.cursors import set_rows
from policy.drains import TAG_AAD
from policy.enforcement import COMMIT, commit_number
from policy.instants import DAY_US
from policy.keys import Keyring, KeyringError, give_name, is_key, open_sealed, read_key, write_key
from policy.schema import cursor, erasure, request, subject
from policy.schema import suppression as suppression_table

OVERLAP_US: Final = 14 * DAY_US  # what a forgotten worker may still ask by
_TURN: Final = "pepper."  # rows of `cursor`: "pepper.2" with the instant of the turn
_ROWS: Final = 5000
_DRAFT: Final = ".next"
_PAIR: Final = ("pepper", "token")  # in this order: a pepper without its token key is refused by everybody


class PepperError(Exception):
    """A rotation cannot be done now; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Rows whose tags were brought forward. pepper_id: the generation they have now."""

    pepper_id: int
    suppressions: int = 0
    subjects: int = 0
    others: int = 0


def turns(conn: Connection) -> dict[int, int]:
    """The instant of each turn, by the number of the pepper that it brought; empty before the first."""
    rows = conn.execute(
        select(cursor.c.stream, cursor.c.last_id).where(cursor.c.stream.startswith(_TURN, autoescape=True))
    )
    return {int(row.stream.removeprefix(_TURN)): int(row.last_id) for row in rows}


def generation(conn: Connection, keyring: Keyring) -> int:
    """The pepper that the tags of the store were made with last."""
    return max(turns(conn), default=keyring.pepper_ids[0])


def check(conn: Connection, keyring: Keyring) -> None:
    """Raises KeyringError when the store's tags are of another pepper than ours: nobody would be found."""
    held = generation(conn, keyring)
    if held < keyring.pepper_id:
        raise KeyringError(
            f"pepper.{keyring.pepper_id} is newer than the tags of the store (pepper.{held}): stop the service on every"
            " host and run `sales-push keys rotate-pepper`"
        )
    if held > keyring.pepper_id:
        raise KeyringError(
            f"the tags of the store were made with pepper.{held}, the newest key file is pepper.{keyring.pepper_id}:"
            " restore it, or finish with `sales-push keys rotate-pepper`"
        )


def open_tag(keyring: Keyring, when: Mapping[int, int], sealed: bytes, at: int) -> bytes:
    """Today's tag of a row of `message`. when: `turns`; at: the row's instant. Raises SealError."""
    made_with = max((number for number, since in when.items() if since <= at), default=keyring.pepper_ids[0])
    return keyring.forward(open_sealed(keyring.service, sealed, TAG_AAD), made_with)


def rewrite(snapshot: Connection, conn: Connection, keyring: Keyring, now: int) -> Rewritten:
    """Bring every tag of the store to the keyring's newest pepper, in the caller's transaction. A repeat does nothing.

    snapshot: another connection, for reading: it does not see what is written meanwhile."""
    held = generation(conn, keyring)
    if held >= keyring.pepper_id:
        return Rewritten(held)
    suppressions = _rewrite_suppressions(snapshot, conn, keyring, held, now)
    subjects = _rewrite(snapshot, conn, keyring, held, subject, subject.c.number)
    others = _rewrite(snapshot, conn, keyring, held, erasure, erasure.c.number)
    others += _rewrite(snapshot, conn, keyring, held, request, request.c.number)
    set_rows(conn, {f"{_TURN}{keyring.pepper_id}": now, COMMIT: commit_number(conn) + 1})
    what = f"key/pepper.{keyring.pepper_id}"
    audit.append(conn, now, "operator", "pepper-rotated", what, "security", f"{suppressions} {subjects} {others}")
    return Rewritten(keyring.pepper_id, suppressions, subjects, others)


def _rewrite_suppressions(snapshot: Connection, conn: Connection, keyring: Keyring, held: int, now: int) -> int:
    """Each entry a second time under its new tag; the old one ends after the overlap."""
    table, end = suppression_table, now + OVERLAP_US
    conn.execute(update(table).where((table.c.expires.is_(None)) | (table.c.expires > end)).values(expires=end))
    count = 0
    for rows in _read(snapshot, select(table)):
        conn.execute(insert(table), [{**row, "tag": keyring.forward(row["tag"], held)} for row in rows])
        count += len(rows)
    return count


def _rewrite(
    snapshot: Connection, conn: Connection, keyring: Keyring, held: int, table: Table, number: Column[Any]
) -> int:
    one = statements.mark(conn.dialect.name)
    sql = f"UPDATE {table.name} SET tag = {one} WHERE {number.name} = {one}"
    count = 0
    for rows in _read(snapshot, select(number.label("number"), table.c.tag).order_by(number)):
        conn.exec_driver_sql(sql, [(keyring.forward(row["tag"], held), row["number"]) for row in rows])
        count += len(rows)
    return count


def _read(snapshot: Connection, statement: Any) -> Iterator[list[dict[str, Any]]]:
    found = snapshot.execute(statement.execution_options(yield_per=_ROWS)).mappings()
    for some in found.partitions():
        yield [dict(row) for row in some]


def rotate(folder: Path, writer: Engine, reader: Engine, now: int) -> Rewritten:
    """A new pepper in a folder of keys, or the end of a rotation that was begun. Nothing else may run (`alone`).

    Raises PepperError, KeyringError, OSError, the store's error: run it again."""
    number = _pending(folder)
    if number is None:
        keyring = Keyring.load(folder)
        with reader.connect() as conn:
            held = generation(conn, keyring)
        if held < keyring.pepper_id:  # keys put there by hand, or a store from before the last turn
            return bring_forward(keyring, writer, reader, now)
        if held > keyring.pepper_id:
            raise PepperError(f"pepper.{held}, with which the store's tags were made, is missing: restore it")
        number = 1 + max(_numbers(folder, "token", "") + _numbers(folder, "pepper", ""))
    if number > 255:
        raise PepperError("no number is left for a further token key: 255 is the last")
    for name in _PAIR:
        if not (folder / f"{name}.{number}").exists():
            write_key(folder / f"{name}.{number}{_DRAFT}")
    done = bring_forward(_with_drafts(folder, number), writer, reader, now)
    for name in _PAIR:
        give_name(folder / f"{name}.{number}{_DRAFT}", folder / f"{name}.{number}")
    return done


def bring_forward(keyring: Keyring, writer: Engine, reader: Engine, now: int) -> Rewritten:
    """`rewrite` in a transaction of its own: for keys that are where they belong. Raises the store's error."""
    with reader.connect() as snapshot, writer.begin() as conn:
        return rewrite(snapshot, conn, keyring, now)


def _pending(folder: Path) -> int | None:
    """The number of a rotation that was begun: it has a draft, or a pepper whose token key is not there yet."""
    half = set(sorted(_numbers(folder, "pepper", ""))[1:]).difference(_numbers(folder, "token", ""))
    half.update(*(_numbers(folder, name, _DRAFT) for name in _PAIR))
    if len(half) > 1:
        raise PepperError(f"several rotations are half done in {folder}: keep one pair pepper.<n>, token.<n>")
    return next(iter(half), None)


def _numbers(folder: Path, name: str, ending: str) -> list[int]:
    names = [path.name.removesuffix(ending) for path in folder.glob(f"{name}.*{ending}")]
    return [int(key.rpartition(".")[2]) for key in names if is_key(key)]


def _with_drafts(folder: Path, number: int) -> Keyring:
    """The keyring as it will be. Drafts are read as strictly as keys."""
    found = {path.name: read_key(path) for path in sorted(folder.iterdir()) if is_key(path.name)}
    for name in _PAIR:
        draft = folder / f"{name}.{number}{_DRAFT}"
        if draft.exists():
            found[f"{name}.{number}"] = read_key(draft)
    return Keyring.of(found, f"{folder}/", folder)


@contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Hold the writer's lock of a data folder. Raises PepperError while the service runs on this host."""
    handle = os.open(data_dir / "policy.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PepperError("the policy process runs: stop the service on every host first") from None
        yield
    finally:
        os.close(handle)
