"""Consent that ends by itself: its subject is on the negative list within a look, and off it when they agree anew."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Engine

from policy import consent, keyspace, negative
from policy.consent import Evidence
from policy.enforcement import Effects, Enforcement
from policy.lapsing import Lapsing
from policy.operations import _lift
from policy.schema import open_store
from policy.store import Store

NOW = 1_795_376_640_000_000
END = NOW + 1_000_000


class World:
    """The writer's hands, and a clock that is set by hand."""

    def __init__(self, engine: Engine, redis: Redis) -> None:
        url = engine.url.render_as_string(hide_password=False)
        self.now = NOW
        self.redis = redis
        self.store = Store(engine)
        self.enforcement = Enforcement(self.store, redis, lambda: self.now, lambda: open_store(url, writer=False))

    def lapsing(self) -> Lapsing:
        return Lapsing(self.store, self.enforcement, lambda: self.now)

    async def agree(self, subject: int, ends: int | None, purpose: str = "open_tracking", at: int = NOW - 9) -> None:
        given = Evidence(subject, purpose, "express", "v1", "form", at, ends)
        await self.store.write(lambda conn: consent.record(conn, [given], self.now))

    async def listed(self) -> set[int]:
        return (await self.store.write(negative.load))[0]

    async def announced(self) -> list[tuple[int, str]]:
        entries: Any = await self.redis.xrange(keyspace.NEGATIVE)  # redis-py's types say less than its answers
        return [(int(said[b"s"]), said[b"r"].decode()) for _, said in entries]


@pytest.fixture
async def world(store: Engine, redis: Redis) -> AsyncIterator[World]:
    made = World(store, redis)
    yield made
    await made.enforcement.close()
    await made.store.close()


async def test_at_its_end_and_not_before_hits_are_no_longer_stored(world: World) -> None:
    await world.agree(7, END)
    await world.agree(8, END + 1)
    await world.agree(9, END, "mail_marketing")
    await world.agree(10, None)
    lapsing = world.lapsing()
    world.now = END - 1
    assert await lapsing.look() >= 1
    assert await world.listed() == set()
    world.now = END
    await lapsing.look()
    assert await world.listed() == {7}
    assert await world.announced() == [(7, "withdrawn")]
    await lapsing.look()
    world.now = END + 1
    await lapsing.look()
    assert await world.announced() == [(7, "withdrawn"), (8, "withdrawn")]
    assert lapsing.lapsed == 2


async def test_what_ended_while_nobody_looked_is_found_at_the_start_and_once(world: World) -> None:
    await world.agree(7, END)
    world.now = END + 10**12
    assert await world.lapsing().look() >= 1
    assert await world.lapsing().look() >= 1
    assert await world.announced() == [(7, "withdrawn")]


async def test_who_agreed_anew_or_withdrew_before_is_passed_over(world: World) -> None:
    await world.agree(7, END)
    await world.agree(7, None, at=NOW - 5)
    await world.agree(8, END)
    await world.store.write(lambda conn: consent.withdraw(conn, 8, "open_tracking", "page", NOW))
    world.now = END
    await world.lapsing().look()
    assert await world.announced() == []
    assert await world.listed() == {8}


async def test_agreeing_anew_to_all_of_it_takes_somebody_off(world: World) -> None:
    await world.agree(7, END)
    await world.agree(7, END, "click_tracking")
    world.now = END
    await world.lapsing().look()

    async def agree_anew(purpose: str) -> None:
        await world.agree(7, None, purpose, at=END)
        await world.enforcement.apply(lambda conn, effects: _lift(conn, effects, {7}, world.now))

    await agree_anew("open_tracking")
    assert await world.listed() == {7}, "clicks of old mail would be stored under a consent that ended"
    await agree_anew("click_tracking")
    assert await world.listed() == set()
    assert await world.announced() == [(7, "withdrawn"), (7, "lifted")]


async def test_a_restriction_is_not_lifted_by_it(world: World) -> None:
    def restrict(conn: object, effects: Effects) -> None:
        effects.negative.append((7, "restricted", negative.add(conn, 7, "restricted", NOW)))  # type: ignore[arg-type]

    await world.enforcement.apply(restrict)
    await world.agree(7, END)
    world.now = END
    await world.lapsing().look()
    await world.agree(7, None, at=END)
    await world.enforcement.apply(lambda conn, effects: _lift(conn, effects, {7}, world.now))
    assert await world.listed() == {7}
    assert await world.announced() == [(7, "restricted")]


async def test_more_ends_than_one_look_takes(world: World) -> None:
    for number in range(1, 8):
        await world.agree(number, END + number % 3)
    world.now = END + 9
    lapsing = world.lapsing()
    original = consent.lapsed
    try:
        consent.lapsed = lambda conn, after, now: original(conn, after, now, 2)  # type: ignore[assignment,misc]
        looks = 1
        while await lapsing.look() == 0.0:
            looks += 1
    finally:
        consent.lapsed = original
    assert await world.listed() == set(range(1, 8))
    assert looks > 1
