"""How far each stream is in the ledger, and the few words that must be committed with that: one table, `schema.cursor`.

Law: a row here stands in the transaction of what it tells of, never in one of its own after it: what has been read,
which commit Redis must know, which run and epoch of Redis were let in (policy.restore).

Stream ids are ``<milliseconds>-<number>`` and compared as pairs of numbers; ``0-0`` is before every entry.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, insert, select, update

from policy.schema import cursor


def load(conn: Connection) -> dict[str, str]:
    return {row.stream: row.last_id for row in conn.execute(select(cursor.c.stream, cursor.c.last_id))}


def set_rows(conn: Connection, rows: Mapping[str, str | int]) -> None:
    """Words that stand beside the cursors, so that they are committed with them."""
    for name, value in rows.items():
        if conn.execute(update(cursor).where(cursor.c.stream == name).values(last_id=str(value))).rowcount == 0:
            conn.execute(insert(cursor).values(stream=name, last_id=str(value)))


def is_before(one: str, other: str) -> bool:
    """Of two stream ids."""
    return _id(one) < _id(other)


def after(identity: str) -> str:
    """The next id there can be."""
    ms, seq = _id(identity)
    return f"{ms}-{seq + 1}"


def _id(text: str) -> tuple[int, int]:
    ms, _, seq = text.partition("-")
    return int(ms), int(seq or 0)
