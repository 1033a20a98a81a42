"""The census finds each illegal state: a checker that cannot fail would prove nothing about the queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.queue.slices import Header
from engine.queue.states import Snapshot, violations

WAITING = Header(5, 1, 2, 0, 0, 0, 0, 0, 0, 99, "l" * 11)
LEASED = replace(WAITING, token=3, done=1 << 63)
LEGAL = Snapshot(
    slices={"c1": WAITING, "c2": LEASED},
    lanes={"l" * 11: {"c1": 10, "c2": 10}},
    sites={"l" * 11: "site"},
    due={("d", "site"): {"c1": 10}},
    index={"site": 10},
    leases={"c2": (3, "h/0")},
    holders={"h/0": 1},
    tokens=3,
    waiting={5: 3},
)


def test_the_legal_state_is_legal() -> None:
    assert violations(LEGAL) == []
    assert violations(Snapshot()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"leases": {}}, "c2 is in 0 states"),
        ({"leases": {"c2": (3, "h/0"), "c1": (0, "h/0")}}, "c1 is in 2 states"),
        ({"lanes": {"l" * 11: {"c1": 10}}}, "c2 is not in its lane"),
        ({"lanes": {"l" * 11: {"c1": 10, "c2": 10, "c3": 1}}}, "holds c3, which is gone"),
        ({"due": {("D", "site"): {"c1": 10}}}, "wrong queue"),
        ({"due": {("d", "site"): {"c1": 10, "c4": 10}}}, "d:site holds c4"),
        ({"due": {("d", "other"): {"c1": 10}}, "index": {"other": 10}}, "not its lane's"),
        ({"index": {"site": 11}}, "idx does not lead"),
        ({"index": {}}, "idx does not lead"),
        ({"leases": {"c2": (2, "h/0")}}, "another token"),
        ({"leases": {"c2": (3, "h/0"), "c9": (3, "h/0")}}, "two leases have one token"),
        ({"leases": {"c2": (3, "h/0"), "c9": (1, "h/0")}}, "a lease of c9"),
        ({"tokens": 2}, "never given"),
        ({"holders": {}}, "without heartbeat"),
        ({"waiting": {5: 4}}, "counts 4 waiting, its slices hold 3"),
        ({"waiting": {}}, "counts None waiting"),
        ({"slices": {"c1": WAITING, "c2": replace(LEASED, done=3 << 62)}}, "finished and not gone"),
        ({"slices": {"c1": WAITING, "c2": replace(LEASED, done=1)}}, "done bits of nobody"),
        ({"sites": {"l" * 11: "site", "<" + "l" * 11: "?"}}, "still being moved"),
        ({"sites": {"l" * 11: "site", "m" * 11: "site"}}, "its site is remembered"),
    ],
)
def test_every_illegal_state_is_found(change: dict[str, Any], word: str) -> None:
    assert any(word in violation for violation in violations(replace(LEGAL, **change)))
