"""When a desk asks for more: slices are leased several at a time, and a narrow site asks as soon as one is missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.delivery.campaigns import Loaded
from engine.delivery.desk import MOST, Desk
from engine.delivery.hand import Hand
from engine.delivery.pool import Limits
from engine.queue.lanes import Lease
from engine.queue.pace import Profile
from engine.queue.slices import Contents, Header, Row

pytestmark = pytest.mark.doubles


def _desk(width: int) -> Desk:
    nobody = cast(Any, SimpleNamespace())
    return Desk(nobody, nobody, "site", Limits(connections=width), Profile(start=float(width), ceiling=64.0))


def _fill(desk: Desk, waiting: int) -> None:
    header = Header(7, 1, waiting, 0, 0, 0, 0, 1, 5, 2, "L" * 11)
    rows = [Row(f"x{number}", 0, 0, 0, 0, []) for number in range(waiting)]
    job = cast(Loaded, SimpleNamespace(job_key=bytes(32)))
    hand = Hand(Lease(3, "c1", "S" * 11, "L" * 11, 5, b""), header, Contents("them.example", [], rows), job, bytes(32))
    desk.stock.add(hand, range(waiting))


@pytest.mark.parametrize("width", [1, 2, 4, 8, 32, 64])
def test_it_asks_when_a_quarter_is_missing_and_never_for_less_than_a_line_takes(width: int) -> None:
    desk = _desk(width)
    room = desk.appetite
    assert room == width * MOST * 4
    least = max(MOST, room // 4)

    _fill(desk, room - least)
    assert desk.is_hungry
    assert desk.appetite == least

    desk.stock.pop()
    assert desk.is_hungry

    _fill(desk, 2)
    assert desk.appetite == least - 1
    assert not desk.is_hungry


def test_an_empty_one_is_hungry_and_a_full_one_never() -> None:
    desk = _desk(16)
    assert desk.is_hungry
    _fill(desk, 10_000)
    assert not desk.is_hungry
    assert desk.appetite == 0
