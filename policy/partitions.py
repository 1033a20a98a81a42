"""A day of the large tables is a table of its own on PostgreSQL: what a class ends is dropped, not deleted (P-10).

SQLite deletes by day in chunks and wipes what it freed (``secure_delete``). PostgreSQL cannot: a deleted row stays in
its page until somebody vacuums, and in the file until the page is written again. A dropped table is gone from the disk
with its indexes, in milliseconds whatever its size. So `message`, `history` and `hit` are partitioned by ``day``
(revision 0005), one partition a day: with weeks or months all but the last day of a range would have to be deleted row
by row after all, because classes end by the day. Classes of 90 days and 13 months make 98 and 404 partitions, and
PostgreSQL handles some thousands where questions name the day, or the day from which on.

    `prepare`    partitions from yesterday to `AHEAD` days from today; what stood in the default partition moves
    `days`       which days a table holds, without reading it
    `drop_day`   a day goes: its partition, and what of it is in the default partition

Law: no row is refused or lost for want of a partition. A day that nobody prepared (a clock that is wrong, a writer that
did not run for a week) goes into the default partition; `prepare` makes its partition, moves it, and tells how many
they were (the writer logs an error).

Law: a partition is dropped in the transaction that records the sweep: both happened or neither. A writer never waits
for readers longer than `_LOCK_MS`.

On SQLite the same calls are one ``DELETE`` and one walk along the index, so that callers need not ask where they are.

Known limits: dropping waits for readers of the table and holds up new ones and the writer meanwhile, so it gives up
after `_LOCK_MS` (sqlalchemy.exc.OperationalError; the sweep comes again within a minute, `prepare` in an hour). A row
that is deleted for itself (an erasure, an account that keeps less, a day around jobs that are not over) stays in its
page until a vacuum, and its bytes until the page is written over, at the latest until the day's partition is dropped.
What PostgreSQL's write-ahead log and its own backups still hold is the database operator's: recycle and destroy them
within the classes' periods (docs/privacy.md).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Final

from sqlalchemy import Connection, Table, delete, func, select
from sqlalchemy.exc import OperationalError

from policy import schema

# Every table with a day that grows with each message. Names stand in SQL texts below: from here, never from a caller.
PARTITIONED: Final[dict[str, Table]] = {
    table.name: table for table in (schema.message, schema.history, schema.hit)
}  # fmt: skip
AHEAD: Final = 7  # days: a writer that is away for a week finds its partitions when it is back
_BEHIND: Final = 1  # events of yesterday still come
_HOLLOW: Final = 14  # days after which a partition that has no row is taken away: nothing was sent on that day
_LOCK_MS: Final = 250  # an opt-out waits for readers of a dropped day no longer than that
_NAME: Final = re.compile(r"_d(\d{1,7})\Z")


@dataclass(frozen=True, slots=True)
class Prepared:
    """made: partitions; adopted: rows that had come for days without one (an alarm unless the store was just
    upgraded); hollow: partitions without a row, taken away; refused: tables whose readers did not let go, so that there
    is something left for the next time."""

    made: int = 0
    adopted: int = 0
    hollow: int = 0
    refused: int = 0


def is_partitioned(conn: Connection, table: str) -> bool:
    """Whether a day of this table can be dropped as a whole."""
    return conn.dialect.name != "sqlite" and table in PARTITIONED


def prepare(conn: Connection, today: int) -> Prepared:
    """Partitions for the days to come. Idempotent; at the writer's start and every hour. today: days since 1970."""
    if conn.dialect.name == "sqlite":
        return Prepared()
    told = Prepared()
    for name in PARTITIONED:
        try:
            with conn.begin_nested(), _impatient(conn):
                done = _prepare(conn, name, today)
        except OperationalError as error:
            if error.connection_invalidated:
                raise
            done = Prepared(refused=1)  # a day has a week to get its partition
        told = Prepared(*map(sum, zip(astuple(told), astuple(done), strict=True)))
    return told


def _prepare(conn: Connection, name: str, today: int) -> Prepared:
    """Of one table, all or nothing."""
    made = hollow = 0
    have = set(_partitions(conn, name))
    strays = {
        int(day): int(rows)
        for day, rows in conn.exec_driver_sql(f"SELECT day, count(*) FROM {name}_default GROUP BY day")
    }
    wanted = set(range(max(0, today - _BEHIND), today + AHEAD + 1)) | strays.keys()
    for day in sorted(day for day in wanted if day >= 0):
        if day not in have:
            _make(conn, name, day, move=day in strays)
            made += 1
    for day in sorted(have):
        if day < today - _HOLLOW and not _has_rows(conn, f"{name}_d{day}"):
            conn.exec_driver_sql(f"DROP TABLE {name}_d{day}")
            hollow += 1
    return Prepared(made, sum(rows for day, rows in strays.items() if day >= 0), hollow)


def days(conn: Connection, table: str) -> list[int]:
    """The days that have rows, in order. From the catalogue where the table is partitioned, else one step along the
    index a day: 5 million rows are not read to learn 90 numbers."""
    column = PARTITIONED[table].c.day
    if not is_partitioned(conn, table):
        found: list[int] = []
        day = conn.execute(select(func.min(column))).scalar()
        while day is not None:
            found.append(int(day))
            day = conn.execute(select(func.min(column)).where(column > day)).scalar()
        return found
    held = {day for day in _partitions(conn, table) if _has_rows(conn, f"{table}_d{day}")}
    held.update(int(day) for (day,) in conn.exec_driver_sql(f"SELECT DISTINCT day FROM {table}_default"))
    return sorted(held)


def drop_day(conn: Connection, table: str, day: int, *, rows: int | None = None) -> int:
    """A day of a table goes, whatever is in it; how many rows that was. rows: how many there are, if the caller counted
    them in this transaction. Raises OperationalError when readers do not let go of the table in time: then nothing has
    changed once the transaction is rolled back."""
    large = PARTITIONED[table]
    if not is_partitioned(conn, table) or day not in _partitions(conn, table):
        return conn.execute(delete(large).where(large.c.day == day)).rowcount
    name = f"{table}_d{int(day)}"
    count: int = conn.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one() if rows is None else rows
    with _impatient(conn):
        conn.exec_driver_sql(f"DROP TABLE {name}")
    return count


def _partitions(conn: Connection, table: str) -> list[int]:
    """The days that have a partition."""
    sql = "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = %s::regclass"
    found = (_NAME.search(name) for (name,) in conn.exec_driver_sql(sql, (table,)))
    return sorted(int(match[1]) for match in found if match)


def _has_rows(conn: Connection, name: str) -> bool:
    there: Any = conn.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM {name})").scalar()
    return bool(there)


def _make(conn: Connection, table: str, day: int, *, move: bool) -> None:
    """Made apart and attached: ``CREATE … PARTITION OF`` would lock the whole table against its readers, and refuse
    where the default partition has rows of the day."""
    name = f"{table}_d{int(day)}"
    conn.exec_driver_sql(f"CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS)")
    if move:
        conn.exec_driver_sql(
            f"WITH moved AS (DELETE FROM {table}_default WHERE day = %s RETURNING *)"
            f" INSERT INTO {name} SELECT * FROM moved",
            (day,),
        )
    conn.exec_driver_sql(
        f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({int(day)}) TO ({int(day) + 1})"
    )


@contextlib.contextmanager
def _impatient(conn: Connection) -> Iterator[None]:
    """Locks are waited for no longer than `_LOCK_MS`. After an error this is rolled back with the transaction."""
    before = conn.exec_driver_sql("SELECT current_setting('lock_timeout')").scalar_one()
    conn.exec_driver_sql("SELECT set_config('lock_timeout', %s, true)", (str(_LOCK_MS),))
    yield
    conn.exec_driver_sql("SELECT set_config('lock_timeout', %s, true)", (before,))
