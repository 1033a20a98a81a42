"""What the matrix calls broken: each law of a cell has a history that breaks it, and one that does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.chaos.cell_laws import Facts, again, broken_by, twice
from tests.chaos.cells import Row
from tests.chaos.checker import History, Job
from tests.chaos.matrix import table
from tests.chaos.sink_record import Entry

QUIET = Facts("always", "kill", fault=100.0, back=101.0, acked={"old": 90.0, "new": 99.5}, ended=Counter(refused=3))


def an_entry(at: float, mref: int = 1, job: int = 1) -> Entry:
    return Entry(
        0, "fast@127.0.0.1", 1, mref, "", f"p{mref}@a.fast.test", "", job, mref, "", at, "250", at, "250 ok", True, at,
        1, "x", "x", 0,
    )  # fmt: skip


def laws(facts: Facts, history: History | None = None) -> list[str]:
    return [broken.law for broken in broken_by(facts, history or History())]


def test_nothing_is_broken_where_nothing_happened() -> None:
    assert laws(QUIET) == []


@pytest.mark.parametrize(
    ("sync", "kind", "job", "law"),
    [
        ("always", "kill", "new", ["T0"]),
        ("everysec", "full", "new", ["T0"]),
        ("always", "power", "new", ["T0"]),
        ("everysec", "power", "new", []),
        ("everysec", "power", "old", ["T0"]),
        ("always", "dump", "old", []),
    ],
)
def test_who_may_lose_which_job(sync: str, kind: str, job: str, law: list[str]) -> None:
    facts = replace(QUIET, sync=sync, kind=kind, refused=100.0, missing={job})
    assert laws(facts) == law
    assert laws(replace(facts, missing=set(), lost={job: (15, 15, 4)})) == law


def test_a_job_acknowledged_after_the_fault_is_never_lost() -> None:
    facts = replace(QUIET, kind="dump", acked={"late": 100.5})
    assert laws(replace(facts, missing={"late"})) == ["T0"]


def test_what_is_lost_is_told_to_the_last_row() -> None:
    assert laws(replace(QUIET, kind="dump", lost={"new": (15, 11, 4)})) == ["T12"]


@pytest.mark.parametrize(
    ("sync", "kind", "law"),
    [("always", "power", ["T0"]), ("everysec", "power", []), ("everysec", "kill", ["T0"]), ("always", "dump", [])],
)
def test_acknowledged_writes_that_are_gone(sync: str, kind: str, law: list[str]) -> None:
    assert laws(replace(QUIET, sync=sync, kind=kind, beats={1, 2, 3}, beats_found={1, 2})) == law


@pytest.mark.parametrize("ended", [Counter(), Counter(delivered=1, refused=2), Counter(unknown=1)])
def test_opt_outs_survive_everything(ended: Counter[str]) -> None:
    assert laws(replace(QUIET, ended=ended)) == ["T11"]


def test_a_full_disk_fails_closed() -> None:
    facts = replace(QUIET, kind="full", refused=100.0, back=103.0)
    people = {n: f"p{n}@a.fast.test" for n in (1, 2)}
    told = History(jobs=[Job(1, "j", "hold", "", 2, people)], entries=[an_entry(100.5, 1), an_entry(103.5, 2)])
    closed = [broken for broken in broken_by(facts, told) if broken.law == "T4"]
    assert closed == []
    late = replace(told, entries=[an_entry(102.0, 1)])
    assert "T4" in laws(facts, late)
    assert laws(replace(facts, refused=None)) == ["T4"], "a disk that was full and refused nothing was not full"


def test_figures() -> None:
    people = {n: f"p{n}@a.fast.test" for n in (1, 2)}
    jobs = [Job(1, "h", "hold", "", 2, people), Job(2, "r", "resend", "", 2, people)]
    times = [99.5, 99.9, 100.2, 104.0, 104.1]
    entries = [an_entry(at, job=2 if at > 104 else 1, mref=1 if at < 100 else 2) for at in times]
    told = History(jobs=jobs, entries=entries)
    assert again(told, QUIET) == 3.0, "from the end of the fault to the end of the longest silence"
    assert twice(told) == (2, 0)
    lines = table([Row("always/kill", recipients=12), Row("everysec/power", lost=3)]).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
