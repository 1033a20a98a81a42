"""The audit chain: every line follows the one before, and whoever changes one is named (P-38, requirements 4.4)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, delete, insert, select, update

from policy import audit, canonical
from policy.schema import audit as table
from policy.schema import checkpoint, cursor, open_store, sweep
from tests.policy.stores import only_postgresql, url_of

NOW = 1_795_376_640_000_000
DAY = 86_400_000_000


def write(conn: Connection, count: int, at: int = NOW) -> None:
    for n in range(count):
        audit.append(conn, at + n, "operator", "job-paused", f"job/{n}", "operation", "done")


def cover(conn: Connection, seq: int, *, exported: int | None = NOW) -> None:
    digest = conn.execute(select(table.c.hash).where(table.c.seq == seq)).scalar_one()
    conn.execute(
        insert(checkpoint).values(seq=seq, hash=digest, at=NOW, key_id="audit.1", signature=b"", exported=exported)
    )


def test_a_line_is_hashed_in_a_form_that_anybody_can_make(conn: Connection) -> None:
    """The oracle is the standard library alone, fed with what the requirements name."""
    digest = audit.append(conn, NOW, "operator", "job-paused", "job/7", 'Grüße \u2028 \x01 "x"', "done")
    entry = {
        "seq": 1, "ts": "2026-11-22T19:44:00.000000Z", "actor_ref": "operator", "action": "job-paused",
        "object_ref": "job/7", "purpose": 'Grüße \u2028 \x01 "x"', "result": "done", "prev": "00" * 32,
    }  # fmt: skip
    said = json.dumps(entry, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    assert digest == sha256(said).digest()
    [line] = audit.export(conn)
    assert json.loads(line) == entry | {"hash": digest.hex()}
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1


def test_lines_have_numbers_without_gaps_and_each_names_the_one_before(conn: Connection) -> None:
    assert audit.head(conn) == (0, audit.GENESIS)
    assert audit.verify(conn) is None
    write(conn, 3)
    rows = conn.execute(select(table).order_by(table.c.seq)).all()
    assert [row.seq for row in rows] == [1, 2, 3]
    assert [row.prev for row in rows] == [audit.GENESIS, rows[0].hash, rows[1].hash]
    assert audit.head(conn) == (3, rows[2].hash)
    assert audit.verify(conn) is None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("actor", "intake"), ("action", "job-sending"), ("object_ref", "job/8"), ("purpose", ""), ("result", "denied"),
        ("at", NOW + 7), ("prev", bytes(32)), ("hash", bytes(32)),
    ],
)  # fmt: skip
def test_a_changed_line_is_named(conn: Connection, column: str, value: object) -> None:
    write(conn, 5)
    conn.execute(update(table).where(table.c.seq == 3).values({column: value}))
    assert audit.verify(conn) == 3


def test_a_missing_line_is_named_by_what_follows_it_and_a_missing_tail_by_its_first_number(conn: Connection) -> None:
    write(conn, 5)
    conn.execute(delete(table).where(table.c.seq == 5))
    assert audit.verify(conn) == 5
    conn.execute(delete(table).where(table.c.seq == 2))
    assert audit.verify(conn) == 3
    conn.execute(delete(table))
    assert audit.verify(conn) == 1


def test_lines_moved_are_named(conn: Connection) -> None:
    write(conn, 4)
    for seq, to in ((2, 90), (3, 2), (90, 3)):
        conn.execute(update(table).where(table.c.seq == seq).values(seq=to))
    assert audit.verify(conn) == 2


def test_a_line_whose_act_was_undone_leaves_no_gap(store: Engine) -> None:
    with store.begin() as conn:
        write(conn, 2)
    with pytest.raises(RuntimeError), store.begin() as conn:
        write(conn, 2)
        raise RuntimeError("the act failed")
    with store.begin() as conn:
        write(conn, 1)
        assert audit.verify(conn) is None
        assert audit.head(conn)[0] == 3


def test_a_chain_of_before_the_head_was_kept_goes_on(conn: Connection) -> None:
    write(conn, 2)
    conn.execute(delete(cursor).where(cursor.c.stream == audit.HEAD))
    write(conn, 1)
    assert audit.verify(conn) is None
    assert audit.head(conn)[0] == 3


def test_old_lines_go_up_to_a_checkpoint_that_is_elsewhere_and_the_rest_still_proves_itself(conn: Connection) -> None:
    write(conn, 4, NOW)
    write(conn, 4, NOW + DAY)
    cover(conn, 2)
    assert audit.droppable(conn, NOW + DAY) == 2
    cover(conn, 3)
    cover(conn, 4, exported=None)
    assert audit.droppable(conn, NOW + DAY) == 3
    cover(conn, 6)
    assert audit.droppable(conn, NOW + DAY) == 3, "it covers lines that are younger"
    assert audit.droppable(conn, NOW) == 0
    conn.execute(delete(table).where(table.c.seq <= audit.droppable(conn, NOW + DAY)))
    assert audit.verify(conn) is None
    assert [json.loads(line)["seq"] for line in audit.export(conn)] == [4, 5, 6, 7, 8]
    assert [json.loads(line)["seq"] for line in audit.export(conn, 7)] == [7, 8]
    write(conn, 1)
    assert audit.verify(conn) is None
    conn.execute(delete(table).where(table.c.seq == 4))
    assert audit.verify(conn) == 5, "its checkpoint is not elsewhere"
    conn.execute(update(checkpoint).values(hash=bytes(32), exported=NOW))
    assert audit.verify(conn) == 5, "it stands for another line"


def test_the_manifest_of_a_sweep_stands_for_what_it_took(conn: Connection) -> None:
    write(conn, 4)
    last = conn.execute(select(table.c.hash).where(table.c.seq == 2)).scalar_one()
    conn.execute(delete(table).where(table.c.seq <= 2))
    assert audit.verify(conn) == 3
    conn.execute(insert(sweep).values(retention="R7", place="audit", day=1, account=0, rows=2, digest=last, at=NOW))
    assert audit.verify(conn) is None
    conn.execute(delete(table))
    assert audit.verify(conn) == 1


texts = st.text(max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.LARGEST, canonical.LARGEST) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_the_canonical_form_says_what_was_given_and_nothing_else(value: object) -> None:
    raw = canonical.encode(value)
    assert json.loads(raw) == value
    assert canonical.encode(json.loads(raw)) == raw


def test_the_examples_of_rfc_8785() -> None:
    """3.2.3: sorted by UTF-16 code units, so the emoji (a surrogate pair) comes before U+FB33."""
    names = {"\u20ac": "Euro", "\r": "CR", "\ufb33": "Dalet", "1": "One", "\U0001f600": "Smiley", "\u0080": "Control",
             "\u00f6": "O umlaut"}  # fmt: skip
    said = canonical.encode(names).decode()
    order = ["CR", "One", "Control", "O umlaut", "Euro", "Smiley", "Dalet"]
    assert [said.index(f'"{name}"') for name in order] == sorted(said.index(f'"{name}"') for name in order)
    assert canonical.encode('\u20ac$\u000f\nA\'\u0042"\\\\"/') == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'.encode()
    assert canonical.encode({"a": [], "b": {}, "c": [1, True, None]}) == b'{"a":[],"b":{},"c":[1,true,null]}'


@pytest.mark.parametrize("value", [1.0, 2**53, "\ud800", {"x": {1: 2}}, b"raw", [object()]])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        canonical.encode(value)


@only_postgresql
def test_two_writers_take_turns(store: Engine, tmp_path: Path) -> None:
    """Over PostgreSQL each host has a writer: no two lines follow the same one, whoever of them is first."""

    def hand(_: int) -> None:
        engine = open_store(url_of(tmp_path), writer=True)
        try:
            for _ in range(20):
                with engine.begin() as conn:
                    write(conn, 1)
        finally:
            engine.dispose()

    with store.begin() as conn:
        write(conn, 1)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(hand, range(3)))
    with store.begin() as conn:
        assert audit.verify(conn) is None
        assert audit.head(conn)[0] == 61
