"""One text for two drivers."""

from __future__ import annotations

from sqlalchemy import Connection

from policy import statements


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
