"""SQL for the driver itself, one text for both stores: SQLite marks a value ``?``, psycopg ``%s``, the rest is alike.

Where a statement takes thousands of rows (ledger, vault, consent), SQLAlchemy's own parameter handling costs more than
SQLite does: 3 to 5 µs a row for dictionaries, bind processors and the garbage collector that walks them, against 2 for
binding a tuple (benchmarks/test_vault.py). Those rooms hand ``Connection.exec_driver_sql`` a text of this room and a
list of tuples; everything else stays SQLAlchemy Core.

Law: a text of this room holds no value, only names that stand in the code.
"""

from __future__ import annotations

from functools import lru_cache


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
