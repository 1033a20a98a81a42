"""One look at all streams, and how long the oldest event has been waiting (metric `ledger_lag_seconds`)."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from redis.asyncio import Redis
from sqlalchemy import Connection, select

from policy import drains, keyspace, streams
from policy.events import Batch, Event, Hit, Kind, encode_batch, encode_hits
from policy.schema import message
from policy.streams import Lag, Look, Read
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]

SECOND = 1_000_000


class Clock:
    """Ours, microseconds; Redis's is 5 s ahead in these tests."""

    def __init__(self) -> None:
        self.now = 1_000 * SECOND

    def __call__(self) -> int:
        return self.now

    @property
    def of_redis(self) -> int:
        return self.now + 5 * SECOND


def looked(clock: Clock, *, oldest: int | None = None, left: int | None = None) -> Look:
    """oldest, left: seconds before now."""

    def place(age: int | None) -> dict[str, int]:
        return {} if age is None else {"s": clock.of_redis // 1000 - 1000 * age}

    return Look(Read(first=place(oldest), left=place(left)), Read(), clock.of_redis)


def test_lag_is_the_age_of_the_oldest_event_by_the_clock_of_redis() -> None:
    clock = Clock()
    lag = Lag(clock)
    assert lag.seconds() == 0.0
    look = looked(clock, oldest=3)
    lag.looked(look)
    assert lag.seconds() == 3.0
    clock.now += 4 * SECOND  # a commit that takes long
    assert lag.seconds() == 7.0
    lag.committed(look)
    assert lag.seconds() == 3.0  # as at the last look
    lag.looked(looked(clock))
    assert lag.seconds() == 0.0


def test_lag_goes_on_while_a_look_leaves_something_behind() -> None:
    clock = Clock()
    lag = Lag(clock)
    look = looked(clock, oldest=30, left=20)
    lag.looked(look)
    clock.now += 15 * SECOND
    lag.committed(look)
    assert lag.seconds() == 35.0


async def test_a_look_takes_events_and_hits_and_says_what_it_left(redis: Redis) -> None:
    def batch(mref: int) -> dict[Any, Any]:
        return {"b": encode_batch(Batch(1, "one.example", [Event(Kind.DELIVERED, mref, 1, 5)]))}

    for n in range(3):
        await redis.xadd(keyspace.events(1), batch(n), id=f"{1000 + n}-1")
    await redis.xadd(keyspace.events(2), batch(9), id="900-1")
    await redis.xadd(keyspace.HITS, {"b": encode_hits([Hit(Kind.OPENED, 1, 2, 3, 3, 32)])}, id="800-1")
    look = await streams.look(redis, {keyspace.events(1): "1000-1"}, 2)
    assert [(stream, identity) for stream, identity, _ in look.events.items] == [
        (keyspace.events(1), "1001-1"), (keyspace.events(1), "1002-1"), (keyspace.events(2), "900-1"),
    ]  # fmt: skip
    assert look.events.last == {keyspace.events(1): "1002-1", keyspace.events(2): "900-1"}
    assert look.hits.last == {keyspace.HITS: "800-1"}
    assert look.oldest == 800
    assert (look.is_full, look.left, look.is_empty) == (True, 1002, False)
    seconds, micros = await redis.time()
    assert 0 <= int(seconds) * SECOND + int(micros) - look.now < 60 * SECOND

    rest = await streams.look(redis, look.events.last | look.hits.last, 2)
    assert (rest.is_empty, rest.is_full, rest.oldest, rest.left) == (True, False, None, None)


def test_every_tag_is_sealed_under_a_nonce_of_its_own(conn: Connection) -> None:
    """The nonces of a transaction are drawn at once; AES-GCM is broken by one that is used twice."""
    key = os.urandom(32)
    book = drains.EventBook(conn.dialect.name, key)
    sizes = [1, 4, 1, 2, 5]
    batches = [
        Batch(1, "", [Event(Kind.DELIVERED, 100 * b + n, 1, 5, tag=bytes([b, n]) * 6) for n in range(size)])
        for b, size in enumerate(sizes)
    ]
    book.record(conn, [("s", f"1-{n}", batch) for n, batch in enumerate(batches)])
    sealed = {row.mref: row.tag_sealed for row in conn.execute(select(message.c.mref, message.c.tag_sealed))}
    assert len({value[:12] for value in sealed.values()}) == sum(sizes)
    for b, size in enumerate(sizes):
        for n in range(size):
            value = sealed[100 * b + n]
            assert AESGCM(key).decrypt(value[:12], value[12:], drains.TAG_AAD) == bytes([b, n]) * 6


async def test_a_look_at_nothing_is_empty(redis: Redis) -> None:
    look = await asyncio.wait_for(streams.look(redis, {}), 10)
    assert look.is_empty
    assert not look.is_full


def test_rows_of_a_batch_are_entered_with_their_cursor(conn: Connection) -> None:
    book = drains.EventBook(conn.dialect.name, bytes(32))
    batch = Batch(1, "one.example", [Event(Kind.DELIVERED, n, 1, 5) for n in range(3)])
    recorded = book.record(conn, [("s", "1-1", batch), ("s", "1-2", batch)])
    assert (recorded.events, recorded.folded, dict(recorded.terminal)) == (6, 3, {1: 3})
    assert sorted(conn.scalars(select(message.c.mref))) == [0, 1, 2]


async def test_the_writer_tells_how_long_an_event_has_been_waiting(world: PolicyWorld) -> None:
    """Seen while the store is busy, gone when the event is in the ledger."""
    free = threading.Event()
    busy = asyncio.create_task(world.writer.store.write(lambda conn: free.wait(30)))
    seconds, _ = await world.redis.time()
    batch = Batch(1, "one.example", [Event(Kind.DELIVERED, 1, 1, 5)])
    await world.redis.xadd(keyspace.events(1), {"b": encode_batch(batch)}, id=f"{(int(seconds) - 100) * 1000}-1")
    async with asyncio.timeout(20):
        while (lag := (await world.ask.statistics())["ledger_lag_seconds"]) == 0:
            await asyncio.sleep(0.01)
    assert 99 < lag < 130
    free.set()
    assert await busy
    await world.drain()
    async with asyncio.timeout(20):
        while (await world.ask.statistics())["ledger_lag_seconds"] != 0:
            await asyncio.sleep(0.01)
    assert world.reader.accounted(1, [1])[1] == {1}
