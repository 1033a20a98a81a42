"""What the tracker knows by heart: shelves that survive SQL, and the negative list, followed (decision 12)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from policy.keyspace import NEGATIVE
from tests.tracker.twins import MemoryRedis, MemorySource, until
from tracker.tables import Shelf, Unavailable, Withdrawn


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def at_once(question: Callable[[], Any]) -> Any:
    await asyncio.sleep(0)
    return question()


def shelf(source: MemorySource, clock: Clock, capacity: int = 10) -> Shelf[int, tuple[str, ...]]:
    return Shelf(source.links, at_once, capacity=capacity, seconds=60.0, clock=clock)


async def test_a_table_is_read_once_however_many_ask() -> None:
    source, clock = MemorySource(), Clock()
    kept = shelf(source, clock)
    assert len(set(await asyncio.gather(*(kept.get(7) for _ in range(50))))) == 1
    assert source.asked == 1


async def test_a_table_is_served_stale_when_sql_fails_and_unknown_ones_are_an_error() -> None:
    source, clock = MemorySource(), Clock()
    kept = shelf(source, clock)
    table = await kept.get(7)
    source.down = True
    clock.now = 1000.0
    assert await kept.get(7) == table
    with pytest.raises(Unavailable):
        await kept.get(8)


async def test_unknown_jobs_are_asked_about_again_soon_and_known_ones_late() -> None:
    source, clock = MemorySource(), Clock()
    kept = shelf(source, clock)
    assert await kept.get(8) is None
    source.tables[8] = ("https://late.example/",)
    assert await kept.get(8) is None
    clock.now = 2.0
    assert await kept.get(8) == ("https://late.example/",)
    del source.tables[8]
    clock.now = 50.0
    assert await kept.get(8) is not None
    clock.now = 63.0
    assert await kept.get(8) is None


async def test_the_least_recently_used_goes_first() -> None:
    source, clock = MemorySource(), Clock()
    source.tables = {number: (f"https://{number}.example/",) for number in range(20)}
    kept = shelf(source, clock, capacity=3)
    for number in (1, 2, 3, 1, 4):
        await kept.get(number)
    asked = source.asked
    await kept.get(1)
    assert source.asked == asked
    await kept.get(2)
    assert source.asked == asked + 1
    assert len(kept) == 3


async def test_one_impatient_visitor_does_not_spoil_the_answer_for_others() -> None:
    source, clock = MemorySource(), Clock()
    kept = shelf(source, clock)
    impatient = asyncio.create_task(kept.get(7))
    patient = asyncio.create_task(kept.get(7))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient is not None


class Rig:
    def __init__(self) -> None:
        self.source, self.redis, self.clock = MemorySource(), MemoryRedis(), Clock()
        self.withdrawn = Withdrawn(
            self.source.withdrawn,
            at_once,
            cast(Any, self.redis),
            stale_seconds=1.0,
            reload_seconds=100.0,
            clock=self.clock,
        )
        self.following: asyncio.Task[None]

    async def tell(self, subject: int, reason: str = "withdrawn") -> None:
        await self.redis.xadd(NEGATIVE, {"s": subject, "r": reason, "q": 1})

    def follow(self) -> None:
        self.following = asyncio.create_task(self.withdrawn.run())


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    try:
        yield made
    finally:
        made.following.cancel()
        await asyncio.gather(made.following, return_exceptions=True)


async def test_the_list_is_sql_and_then_the_news(rig: Rig) -> None:
    rig.source.negative = {1, 2}
    rig.follow()
    await until(rig.withdrawn.is_loaded)
    assert 1 in rig.withdrawn
    assert 3 not in rig.withdrawn
    await rig.tell(3)
    await until(lambda: 3 in rig.withdrawn)
    await rig.tell(3, "lifted")
    await until(lambda: 3 not in rig.withdrawn)


async def test_news_during_the_reading_of_sql_are_not_lost(rig: Rig) -> None:
    first = rig.source.withdrawn

    def slow() -> set[int]:
        found = first()
        assert not found
        rig.redis.streams[NEGATIVE].append((b"1-0", {b"s": b"5", b"r": b"objected", b"q": b"1"}))
        return found

    rig.withdrawn._load = slow
    rig.follow()
    await until(lambda: rig.withdrawn.is_loaded() and 5 in rig.withdrawn)


async def test_it_is_fresh_only_while_news_can_come(rig: Rig) -> None:
    assert not rig.withdrawn.is_fresh()
    rig.follow()
    await until(rig.withdrawn.is_fresh)
    rig.redis.down = True
    await until(lambda: rig.redis.refused > 0)
    rig.clock.now = 1.5
    assert not rig.withdrawn.is_fresh()
    rig.source.negative = {9}  # happened while Redis was away: SQL is the truth
    rig.redis.down = False
    await until(lambda: rig.withdrawn.is_fresh() and 9 in rig.withdrawn)


async def test_sql_away_at_the_start_means_not_fresh_and_is_tried_again(rig: Rig) -> None:
    rig.source.down = True
    rig.follow()
    await until(lambda: rig.source.asked > 0)
    assert not rig.withdrawn.is_fresh()
    rig.source.down = False
    await until(rig.withdrawn.is_fresh)


async def test_the_list_is_read_anew_after_a_while(rig: Rig) -> None:
    rig.source.negative = {1}
    rig.follow()
    await until(rig.withdrawn.is_loaded)
    rig.source.negative = {2}
    rig.clock.now = 101.0
    await until(lambda: 2 in rig.withdrawn and 1 not in rig.withdrawn)
