"""The ledger as a file: every row once, nobody named, whole or not at all."""

from __future__ import annotations

import importlib
import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, insert, select

from policy import exporting, schema
from policy.address import mref_bytes
from policy.exporting import ExportError
from policy.instants import DAY_US, HOUR_US, parse_rfc3339
from policy.keys import Keyring
from policy.schema import history, hit, message
from tests.policy.bundle.house import BOB, EVE, NOW, furnish
from tests.policy.people import row_of
from tests.policy.stores import only_sqlite, policy_store

TABLES = {"message": message, "history": history, "hit": hit}


def rows_of(engine: Engine, **wanted: Any) -> list[dict[str, Any]]:
    return [row for page in exporting.read(engine, **wanted) for row in page]


@pytest.fixture
def furnished(store: Engine, keyring: Keyring) -> Engine:
    with store.begin() as conn:
        furnish(conn, keyring)
    return store


def _oracle(engine: Engine) -> list[tuple[str, int, int, int]]:
    """(record, job, reference, kind) of every row, read by nobody's help."""
    with engine.connect() as conn:
        return sorted(
            (name, row.job, row.mref, row.kind)
            for name, table in TABLES.items()
            for row in conn.execute(select(table.c.job, table.c.mref, table.c.kind))
        )


@pytest.mark.parametrize("page", [1, 2, 3, 1000])
def test_every_row_is_there_once_whatever_the_page(furnished: Engine, page: int) -> None:
    told = rows_of(furnished, page=page)
    with furnished.connect() as conn:
        jobs = {row.job_id: row.number for row in conn.execute(select(schema.job))}
    kinds = {"delivered": 1, "bounced": 2, "deferred": 16, "complained": 17, "opened": 32, "clicked": 33}
    assert sorted(
        (
            row["record"], jobs[row["job"]],
            int.from_bytes(bytes.fromhex(row["reference"]), "big", signed=True), kinds[row["kind"]],
        )
        for row in told
    ) == _oracle(furnished)  # fmt: skip
    assert told == rows_of(furnished)
    assert exporting.count(furnished) == len(told) == len(_oracle(furnished))
    assert exporting.people(furnished) == len({row["pseudonym"] for row in told if row.get("pseudonym")}) == 5


def test_what_a_row_says(furnished: Engine) -> None:
    [row] = [row for row in rows_of(furnished) if row["job"] == "job-1" and row["domain"] == "example.com"][:1]
    with furnished.connect() as conn:
        number = conn.execute(select(schema.job.c.number).where(schema.job.c.job_id == "job-1")).scalar_one()
        held = conn.execute(select(message).where(message.c.job == number).order_by(message.c.mref)).first()
    assert held is not None
    assert row == {
        "record": "message", "account": "acme", "job": "job-1", "reference": mref_bytes(held.mref).hex(),
        "pseudonym": f"{held.pseudonym:016x}", "at": NOW - 20 * DAY_US, "kind": "bounced", "reason": "user-unknown",
        "domain": "example.com", "code": 550, "enhanced": "5.1.1", "attempt": 1, "tls": "TLS 1.2",
    }  # fmt: skip


def test_nobody_is_named(furnished: Engine, keyring: Keyring, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    exporting.write(path, exporting.read(furnished))
    content = path.read_bytes()
    for address in (EVE, BOB):
        tag, _, _ = row_of(keyring.pepper, address)
        local = address.partition("@")[0]
        for canary in (local, local.lower(), tag.hex()):
            assert canary.encode() not in content
    assert b"taken" not in content  # of the reply, which quotes the address
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_since_and_job_choose(furnished: Engine) -> None:
    everything = rows_of(furnished)
    boundary = NOW - 3 * DAY_US + HOUR_US  # the delivery of job-2, to the microsecond
    assert {row["job"] for row in rows_of(furnished, since=boundary)} == {"job-2"}
    assert [row["kind"] for row in rows_of(furnished, since=boundary)] == ["delivered", "complained"]
    assert [row["kind"] for row in rows_of(furnished, since=boundary + 1)] == ["complained"]
    assert exporting.count(furnished, since=boundary + 1) == 1
    with furnished.connect() as conn:
        number = conn.execute(select(schema.job.c.number).where(schema.job.c.job_id == "job-0")).scalar_one()
    assert rows_of(furnished, of=number) == [row for row in everything if row["job"] == "job-0"]
    assert rows_of(furnished, of=999) == []
    hits = [row for row in everything if row["record"] == "hit"]
    assert [row for row in rows_of(furnished, since=hits[0]["at"] + HOUR_US) if row["record"] == "hit"] == [
        row for row in hits if row["at"] > hits[0]["at"]
    ]


def test_rows_whose_job_is_gone_are_told_by_its_number(store: Engine) -> None:
    with store.begin() as conn:
        row = {"job": 77, "mref": -1, "kind": 1, "reason": 0, "domain": 0, "code": 0, "enhanced": "", "attempts": -3,
               "at": NOW, "day": NOW // DAY_US, "pseudonym": 0, "tls": 0}  # fmt: skip
        conn.execute(insert(message).values(row))
    [told] = rows_of(store)
    assert (told["account"], told["job"], told["reference"]) == (None, "77", "f" * 16)
    assert (told["pseudonym"], told["attempt"]) == (None, 0)


@only_sqlite
def test_no_transaction_is_open_while_somebody_reads_the_page(furnished: Engine) -> None:
    """A slow disk must not keep the writer's log from being checkpointed."""
    begun: list[str] = []
    event.listen(furnished, "begin", lambda conn: begun.append("begin"))
    event.listen(furnished, "rollback", lambda conn: begun.append("end"))
    for _ in exporting.read(furnished, page=1):
        assert begun.count("begin") == begun.count("end")
    assert begun


@only_sqlite
def test_pages_are_entered_by_an_index(furnished: Engine) -> None:
    """The price of a page must not grow with the rows before it."""
    asked: list[tuple[str, Any]] = []
    event.listen(
        furnished, "before_cursor_execute", lambda _c, _cur, text, values, *_: asked.append((text, values))
    )  # fmt: skip
    list(exporting.read(furnished, page=1))
    pages = [one for one in asked if "LIMIT" in one[0] and ">=" in one[0]]
    assert {table for table in TABLES for text, _ in pages if f"FROM {table} " in text.replace("\n", " ")} == set(
        TABLES
    )
    with furnished.connect() as conn:
        for text, values in pages:
            plan = conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values).all()
            assert all("SCAN" not in step[3] for step in plan), plan


@settings(max_examples=40, deadline=None)
@given(
    st.sets(
        st.tuples(st.integers(1, 3), st.integers(-2, 2), st.integers(-2, 2), st.sampled_from([3, 16])), max_size=25
    ),
    st.integers(1, 6),
)
def test_paging_over_any_rows(tmp_path_factory: pytest.TempPathFactory, rows: set[tuple[int, ...]], page: int) -> None:
    with policy_store(tmp_path_factory.mktemp("store")) as engine:
        with engine.begin() as conn:
            for job, mref, attempt, kind in rows:
                row = {"job": job, "mref": mref, "attempt": attempt, "kind": kind, "at": NOW, "day": NOW // DAY_US,
                       "reason": 0, "code": 0, "enhanced": ""}  # fmt: skip
                conn.execute(insert(history).values(row))
        names = {"refused": 3, "deferred": 16}
        told = [
            (
                int(row["job"]), int.from_bytes(bytes.fromhex(row["reference"]), "big", signed=True), row["attempt"],
                names[row["kind"]],
            )
            for row in rows_of(engine, page=page)
        ]  # fmt: skip
        assert told == sorted(rows)


def test_json_lines_are_read_back(furnished: Engine) -> None:
    out = io.BytesIO()
    told: list[int] = []
    total = exporting.put(out, exporting.read(furnished, page=2), wrote=told.append)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert total == sum(told) == len(lines)
    assert [{**line, "at": parse_rfc3339(line["at"])} for line in lines] == rows_of(furnished)


def test_a_file_appears_whole_or_not_at_all(furnished: Engine, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("yesterday's")

    def broken() -> Any:
        yield from exporting.read(furnished, page=1)
        raise OSError("the database went away")

    with pytest.raises(OSError, match="went away"):
        exporting.write(path, broken())
    assert path.read_text() == "yesterday's"
    assert os.listdir(tmp_path).count("ledger.jsonl.part") == 0


def test_parquet_without_pyarrow_says_what_to_do(
    furnished: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExportError, match="pip install pyarrow"):
        exporting.write(tmp_path / "x.parquet", exporting.read(furnished), "parquet")
    assert not list(tmp_path.glob("x.parquet*"))
    with pytest.raises(ExportError, match="jsonl or parquet"):
        exporting.put(io.BytesIO(), [], "xlsx")


def test_parquet_is_read_back(furnished: Engine, tmp_path: Path) -> None:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    path = tmp_path / "ledger.parquet"
    assert exporting.write(path, exporting.read(furnished, page=2), "parquet") == exporting.count(furnished)
    told = parquet.read_table(path).to_pylist()
    assert [
        {name: value for name, value in row.items() if value is not None and name != "at"} for row in told
    ] == [
        {name: value for name, value in row.items() if value is not None and name != "at"} for row in rows_of(furnished)
    ]  # fmt: skip
    assert [round(row["at"].timestamp() * 1e6) for row in told] == [row["at"] for row in rows_of(furnished)]


@pytest.mark.parametrize("text", ["2026-11-22", "2026-11-22T00:00:00Z", "2026-11-22T01:00:00+01:00"])
def test_since_is_a_date_or_an_instant(text: str) -> None:
    assert exporting.since_of(text) == parse_rfc3339("2026-11-22T00:00:00Z")


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-22T00:00:00", "22.11.2026"])
def test_since_is_nothing_else(text: str) -> None:
    with pytest.raises(ValueError):
        exporting.since_of(text)
