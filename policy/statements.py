"""SQL for the driver itself, one text for both stores: SQLite marks a value ``?``, psycopg ``%s``, the rest is alike.

Where a statement takes thousands of rows (ledger, vault, consent), SQLAlchemy's own parameter handling costs more than
SQLite does: 3 to 5 µs a row for dictionaries, bind processors and the garbage collector that walks them, against 2 for
binding a tuple (benchmarks/test_vault.py). Those rooms hand ``Connection.exec_driver_sql`` a text of this room and a
list of tuples; everything else stays SQLAlchemy Core.

Law: a text of this room holds no value, only names that stand in the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError


def mark(dialect: str) -> str:
    """Where a value goes. dialect: `Connection.dialect.name`."""
    return "?" if dialect == "sqlite" else "%s"


@lru_cache(maxsize=64)
def insert(dialect: str, table: str, columns: str, on_conflict: str = "") -> str:
    """columns: names with commas between; on_conflict: what follows ON CONFLICT, "" for a plain insert."""
    tail = f" ON CONFLICT {on_conflict}" if on_conflict else ""
    return f"INSERT INTO {table} ({columns}) VALUES ({marks(dialect, columns.count(',') + 1)}){tail}"


def marks(dialect: str, count: int) -> str:
    """Marks for `count` values with commas between: of a row, or behind IN."""
    return ", ".join([mark(dialect)] * count)


@lru_cache(maxsize=16)
def known(table: str, identity: str) -> str:
    """PostgreSQL's: which of the rows with these identities are in a table that is divided by day, from a day on.

    identity: whole numbers, names with commas between. Takes a list a column, then the first day. LIMIT keeps the
    planner at one look into the index a row: it would read whole partitions to join them otherwise.
    """
    names = identity.split(", ")
    lists = ", ".join(["%s::bigint[]"] * len(names))
    told = ", ".join(f"r.{name}" for name in names)
    same = " AND ".join(f"t.{name} = r.{name}" for name in names)
    return (
        f"SELECT {told} FROM unnest({lists}) AS r({identity}),"
        f" LATERAL (SELECT 1 FROM {table} t WHERE {same} AND t.day >= %s LIMIT 1) AS k"
    )


def copy(conn: Connection, table: str, columns: str, rows: Iterable[Sequence[Any]]) -> None:
    """PostgreSQL's: rows that are known to be new, 6 µs each instead of the 27 of ``executemany`` (both sides'
    together). Raises DBAPIError: nothing of the transaction can be kept then."""
    raw: Any = conn.connection.dbapi_connection
    try:
        with raw.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as stream:
            for row in rows:
                stream.write_row(row)
    except conn.dialect.loaded_dbapi.Error as error:
        raise DBAPIError(f"COPY {table}", None, error) from error
