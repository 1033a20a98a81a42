"""Delivery windows where they count: at the lease, in the stock of a desk, on the wire, for retries and at the end."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from engine.delivery.connection import Connection, Outbound
from engine.delivery.courier import Courier
from engine.delivery.desk import MOST
from engine.delivery.hand import Hand, Letter
from engine.delivery.press import ask_again
from engine.queue import windows
from engine.queue.lanes import Answer, GateRequest, Lease
from engine.queue.slices import Contents, Header, Row, build, parse_header
from engine.queue.windows import Window
from policy import keyspace
from policy.events import Kind
from policy.gate import Standing
from policy.instants import SECOND_US
from tests.world.courier import DOMAIN, CourierWorld, Job, courier_world
from tests.world.mail import job, mail_world, rows
from tests.world.queue_census import FAR, KEY


async def at_rest(world: CourierWorld) -> None:
    """Until nothing is leased and nothing is on the wire."""
    partition = keyspace.partition_of(DOMAIN)
    async with asyncio.timeout(20):
        while world.courier.hands or await world.server.client.hlen(keyspace.leases(partition)):
            await asyncio.sleep(0.02)


def names(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


async def test_nothing_leaves_while_the_window_is_closed() -> None:
    async with courier_world() as world:
        shut = world.job()
        shut.shut[0] = 3600.0
        free = world.job()
        await world.put(shut, names(100))
        await world.put(free, ["other"])
        await world.until(lambda: len(world.arrived()) == 1)
        await at_rest(world)

        assert world.names() == ["other"]
        waiting = await world.waiting()
        ahead = [(each.due - await world.now_us()) / SECOND_US for each in waiting]
        assert len(ahead) == 2
        assert all(3500 < seconds <= 3600 for seconds in ahead), "due when it opens, and leased no sooner"
        assert await world.lanes.waiting(shut.number) == 100


async def test_what_is_due_when_it_opens_goes_then() -> None:
    async with courier_world() as world:
        shut = world.job()
        shut.shut[0] = 0.3
        await world.put(shut, names(10))
        while not (ahead := await world.waiting()) or ahead[0].due <= await world.now_us():
            await asyncio.sleep(0.01)
        shut.shut[0] = 0.0
        await world.until(lambda: len(world.arrived()) == 10)

        assert sorted(world.names()) == sorted(names(10))


async def test_letters_in_stock_when_it_closes_are_not_sent() -> None:
    async with courier_world("dot.late.30ms") as world:
        closing = world.job()
        await world.put(closing, names(70))
        await world.until(lambda: len(world.arrived()) >= 5)
        closing.shut[0] = 3600.0
        closed_at = time.monotonic()
        await at_rest(world)

        arrived = world.arrived()
        assert len(arrived) < 70
        late = sum(entry.t_rcpt > closed_at for entry in arrived)
        assert late <= 2 * MOST, "what was written for the line while it was open, and nothing else"
        assert await world.lanes.waiting(closing.number) == 70 - len(arrived)
        soon = await world.now_us() + 3000 * SECOND_US
        assert all(each.due > soon for each in await world.waiting())
        assert {event.kind for event in await world.events()} == {Kind.DELIVERED}

        closing.shut[0] = 0.0  # it opens: what waits is made due by hand, the hour is not waited for
        client: Any = world.server.client
        partition = keyspace.partition_of(DOMAIN)
        [site] = await world.sites() or [keyspace.UNRESOLVED]
        for each in await world.waiting():
            await client.zadd(f"{keyspace.prefix(partition)}d:{site}", {each.slice_id: 1})
        await client.zadd(keyspace.due_sites(partition), {site: 1})
        await world.until(lambda: len(world.arrived()) == 70)
        assert sorted(world.names()) == sorted(names(70)), "everybody once"


async def test_a_job_that_is_cancelled_while_it_is_closed_ends_now() -> None:
    async with courier_world() as world:
        closed = world.job()
        closed.shut[0] = 3600.0
        await world.lanes.halt(f"j{closed.number}", [keyspace.partition_of(DOMAIN)])
        await world.put(closed, names(70))
        await world.server.client.hset(keyspace.job(keyspace.partition_of(DOMAIN), closed.number), "st", "cancelled")
        await world.lanes.resume(f"j{closed.number}", [keyspace.partition_of(DOMAIN)])
        async with asyncio.timeout(20):
            while len(events := await world.events()) < 70:
                await asyncio.sleep(0.02)

        assert {event.kind for event in events} == {Kind.CANCELLED}
        assert world.arrived() == []


async def test_what_expires_before_it_opens_ends_expired() -> None:
    async with courier_world() as world:
        closed = world.job()
        closed.shut[0] = 3600.0
        await world.put(closed, names(3), expires_in=1.0)
        async with asyncio.timeout(20):
            while len(events := await world.events()) < 3:
                await asyncio.sleep(0.02)

        assert [event.kind for event in events] == [Kind.EXPIRED] * 3
        assert world.arrived() == []


async def test_a_retry_waits_for_the_window() -> None:
    async with courier_world("dot.451") as world:
        minute = int(time.time()) // 60 % 1440
        night = Window((minute + 120) % 1440, (minute + 180) % 1440, "UTC")  # closed now, and for two hours
        deferred = world.job(window=night)  # the attempt is made all the same: shut says open
        await world.put(deferred, ["ada"], expires_in=6 * 3600.0)
        async with asyncio.timeout(20):
            while len(await world.events()) < 1:
                await asyncio.sleep(0.02)
        await at_rest(world)

        [event] = await world.events()
        [again] = await world.waiting()
        assert event.kind == Kind.DEFERRED
        assert again.due - await world.now_us() > 100 * 60 * SECOND_US
        assert windows.opens_in(again.due + 1, night) == 0
        assert windows.opens_in(again.due - SECOND_US, night) > 0


async def test_a_retry_that_would_wait_for_the_window_beyond_its_expiry_ends_now() -> None:
    async with courier_world("dot.451") as world:
        minute = int(time.time()) // 60 % 1440
        night = Window((minute + 120) % 1440, (minute + 180) % 1440, "UTC")
        await world.put(world.job(window=night), ["ada"], expires_in=3600.0)
        async with asyncio.timeout(20):
            while len(events := await world.events()) < 1:
                await asyncio.sleep(0.02)

        assert [event.kind for event in events] == [Kind.EXPIRED]
        assert await world.waiting() == []


class _Wire:
    """A connection whose RCPT waits for a fresh Permit."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def renew(self, message: Outbound, void_at: float) -> None:
        self.said.append("renewed")

    def withdraw(self, message: Outbound) -> None:
        self.said.append("withdrawn")


class _Gate:
    def __init__(self) -> None:
        self.asked_at = time.monotonic()
        self.answers = [Answer(Standing.CLEAR, b"\0")]
        self.gatekeeper = self

    async def ask(self, requests: list[GateRequest]) -> _Gate:
        return self

    def now_us(self) -> int:
        return 0


@pytest.mark.parametrize(("shut", "said"), [(0.0, "renewed"), (5.0, "withdrawn")])
async def test_a_permit_that_aged_is_not_renewed_outside_the_window(shut: float, said: str) -> None:
    contents = Contents(DOMAIN, [], [Row("ada", 1, 1, 0, 0, [])])
    data = build(KEY, 2900, 1, 3, "l" * 11, contents, expires_at=FAR)
    header = parse_header(data)
    assert isinstance(header, Header)
    job = Job(1, b"k" * 32, 0, None, (), None, None, shut=[shut])
    letter = Letter(Hand(Lease(3, "c1", "s", "l" * 11, 1, data), header, contents, job, b"p" * 32), 0, 7)
    message = Outbound(letter, "a@b.test", "ada@x.test", b"Hello\r\n", 0.0, True)
    wire = _Wire()

    await ask_again(cast(Courier, _Gate()), cast(Connection, wire), message, letter)

    assert wire.said == [said]


async def test_from_the_producer_to_the_lane_a_closed_window_holds_and_an_open_one_does_not() -> None:
    """The whole way, with the real clock: a window that is two hours off, and one that is always open."""
    async with mail_world() as mail:
        await mail.start_worker()
        minute = int(time.time()) // 60 % 1440

        def clock(minutes: int) -> str:
            return f"{minutes % 1440 // 60:02}:{minutes % 60:02}"

        away = {"from": clock(minute + 120), "to": clock(minute + 180), "zone": "UTC"}
        open_ = {"from": "00:00", "to": "24:00", "zone": "Pacific/Auckland"}
        await mail.submit(job("away", window=away), rows(20, "a.accept.test"))
        await mail.submit(job("here", window=open_), rows(20, "b.accept.test"))
        status = await mail.finished("here")

        assert status.counts == {"delivered": 20}
        async with asyncio.timeout(20):
            while (
                told := mail.policy.reader.job_status("away", mail.policy.clock())
            ) is None or not told.rows_submitted:
                await asyncio.sleep(0.05)
        assert told.terminal == 0
        assert (await mail.sink_counts())["accept"]["accepted"] == 20
