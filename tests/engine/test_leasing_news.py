"""When a round of leasing follows another at once: what would otherwise wait for a sweep or for others' news."""

from __future__ import annotations

from typing import Any, cast

import pytest

from engine.delivery.leasing import UNRESOLVED_SLICES, Leasing
from engine.queue.lanes import Lease, Leased
from policy import keyspace

NOW = 1_000_000
SITE = "s" * 11


class Courier:
    """What leasing tells of an answer."""

    def __init__(self) -> None:
        self.heard = 0

    def hear_time(self, now_us: int) -> None:
        self.heard = now_us

    def now_us(self) -> int:
        return self.heard


def leasing() -> Leasing:
    nothing = cast(Any, None)
    return Leasing(
        cast(Any, Courier()), redis=nothing, lanes=nothing, campaigns=nothing, resolver=nothing, keyring=nothing,
        limits=nothing, conclusions=nothing, most_slices=4,
    )  # fmt: skip


def answer(*ready: tuple[str, int], slices: list[Lease] | None = None) -> Leased:
    return Leased(3, NOW, slices or [], list(ready), full=False)


def unresolved(count: int) -> list[Lease]:
    return [Lease(3, f"c{n}", keyspace.UNRESOLVED, "l" * 11, n, b"") for n in range(count)]


@pytest.mark.parametrize("due", [NOW, NOW - 5_000_000])
def test_a_site_that_nobody_knew_of_is_looked_at_at_once_and_only_once(due: int) -> None:
    """Without this a first slice for a known site waits for the sweep, up to a quarter of a second and more."""
    made = leasing()
    made._learn(answer((SITE, due)))
    assert made._news.is_set()
    made._news.clear()
    made._learn(answer((SITE, due)))
    assert not made._news.is_set()  # it is not wanted now, or it would have been taken: its desk wakes us


def test_what_is_due_later_is_no_news_until_then() -> None:
    made = leasing()
    made._learn(answer((SITE, NOW + 1)))
    assert not made._news.is_set()
    assert made._next_due() < float("inf")  # the loop's own timer brings it


def test_more_lanes_without_a_site_than_a_round_takes_are_gone_on_with() -> None:
    made = leasing()
    made._learn(answer((keyspace.UNRESOLVED, NOW), slices=unresolved(UNRESOLVED_SLICES)))
    assert made._news.is_set()


def test_lanes_without_a_site_that_nobody_could_take_make_no_loop() -> None:
    """All of them paused, or the event stream full: asked again by the sweep, not in circles."""
    made = leasing()
    made._learn(answer((keyspace.UNRESOLVED, NOW)))
    assert not made._news.is_set()
    made._learn(answer(slices=unresolved(2)))
    assert not made._news.is_set()
