"""One text for two drivers."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from policy import statements
from tests.policy.stores import only_postgresql


def test_both_stores_are_spoken_to_in_their_own_marks() -> None:
    assert statements.insert("sqlite", "t", "a, b") == "INSERT INTO t (a, b) VALUES (?, ?)"
    assert (
        statements.insert("postgresql", "t", "a", "DO NOTHING")
        == "INSERT INTO t (a) VALUES (%s) ON CONFLICT DO NOTHING"
    )
    assert statements.marks("postgresql", 3) == "%s, %s, %s"
    assert statements.mark("sqlite") == "?"


def test_the_marks_are_those_of_the_driver(conn: Connection) -> None:
    sql = statements.insert(conn.dialect.name, "cursor", "stream, last_id", "(stream) DO NOTHING")
    assert conn.exec_driver_sql(sql, [("a", "1-1"), ("b", "2-2"), ("a", "3-3")]).rowcount == 2
    asked = f"SELECT last_id FROM cursor WHERE stream IN ({statements.marks(conn.dialect.name, 2)}) ORDER BY stream"
    assert [row[0] for row in conn.exec_driver_sql(asked, ("a", "b"))] == ["1-1", "2-2"]


@only_postgresql
def test_rows_that_are_known_to_be_new_are_copied(conn: Connection) -> None:
    hits = [(1, mref, 2, 0, 3, 20_000, None if mref else 4, 3) for mref in (-(1 << 63), 0, (1 << 63) - 1)]
    columns = "job, mref, kind, link, hour, day, visitor, mode"
    with pytest.raises(DBAPIError, match="visitor"), conn.begin_nested():
        statements.copy(conn, "hit", columns, hits)
    statements.copy(conn, "hit", columns, [(*row[:6], 4, 3) for row in hits])
    found = conn.exec_driver_sql(f"SELECT {columns} FROM hit ORDER BY mref").all()
    assert [tuple(row) for row in found] == [(*row[:6], 4, 3) for row in hits]


def test_what_a_known_row_is_asked_by_is_spelled_once() -> None:
    assert statements.known("message", "job, mref") == (
        "SELECT r.job, r.mref FROM unnest(%s::bigint[], %s::bigint[]) AS r(job, mref),"
        " LATERAL (SELECT 1 FROM message t WHERE t.job = r.job AND t.mref = r.mref AND t.day >= %s LIMIT 1) AS k"
    )
