"""The queue on a real server: every transition of T2 to T8, and after each the census of legal states.

Each test runs on the embedded Valkey 9; those marked debian again on Debian's Redis 7.0, so that the scripts keep to
what both share.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from engine.queue import slices
from engine.queue.lanes import (
    FactsRequest,
    GateRequest,
    JobState,
    Lanes,
    Lease,
    PutRequest,
    QueueError,
    Retry,
    Settled,
    SettleRequest,
)
from engine.queue.permits import Permits
from engine.queue.slices import Contents, Header
from policy import keyspace
from policy.events import Reason
from policy.gate import Standing
from policy.valkey import EmbeddedServer, connect
from tests.world.queue_census import FAR, KEY, KEYS, SITE, assert_legal, census, lane_named, some_slice
from tests.world.valkey_server import running_valkey

PART = 7
JOB = 1 << 33  # beyond 32 bits: a job number has 40
LANE, OTHER = lane_named("A"), lane_named("B")
STATE = JobState(5, 6, 0, priority=False, expires_at=FAR, resend_in_doubt=False, buckets=2)
DOMAIN = b"d" * 12


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=pytest.mark.debian)])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    binary = None
    if request.param == "redis":
        found = shutil.which("redis-server")
        assert found is not None, "Debian's redis-server is not installed"
        binary = Path(found)
    with running_valkey(binary) as running:
        yield running


@pytest.fixture
async def redis(server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = connect(server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def lanes(redis: Redis) -> Lanes:
    return Lanes(redis, "host/worker-0")


def share(*built: bytes, chunk: int = 0, due: int = 0, events: tuple[bytes, ...] = ()) -> PutRequest:
    return PutRequest(PART, JOB, chunk, STATE, [(due, data) for data in built], events)


async def leased(lanes: Lanes, count: int = 1, site: str = SITE) -> list[Lease]:
    return (await lanes.lease(PART, [(site, count)])).slices


async def put_at_site(lanes: Lanes, *built: bytes) -> None:
    """Put slices whose lanes are assigned to SITE already."""
    assert await lanes.put([share(*built)]) == [True]
    for lane in (LANE, OTHER):
        await lanes.assign(PART, lane, SITE)


async def one_lease(lanes: Lanes, count: int = 64, *, expires_at: int = FAR, flags: int = 0) -> Lease:
    await put_at_site(lanes, some_slice(JOB, PART, LANE, count, expires_at=expires_at, flags=flags))
    (lease,) = await leased(lanes)
    return lease


def opened(lease: Lease) -> tuple[Header, Contents]:
    found = slices.open_slice(KEYS, PART, lease.data)
    assert not isinstance(found, slices.Lost)
    return found


async def events(redis: Redis) -> list[bytes]:
    found = []
    for _, fields in await redis.xrange(keyspace.events(PART)) or ():
        assert fields is not None
        assert list(fields) == [b"b"]
        batch = dict(fields)[b"b"]
        assert isinstance(batch, bytes)
        found.append(batch)
    return found


async def redis_now(redis: Redis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1_000_000 + int(micros)


# --- facts and put: T2 ----------------------------------------------------------------------------------------------


def asking(chunk: int, *mrefs: int, tags: tuple[bytes, ...] = ()) -> FactsRequest:
    rows = [(mref, tags[place] if tags else place.to_bytes(12, "big")) for place, mref in enumerate(mrefs)]
    return FactsRequest(PART, JOB, chunk, 2, 5, 6, 0, rows, [DOMAIN] * len(rows))


async def test_duplicates_are_found_within_a_chunk_and_between_chunks(lanes: Lanes) -> None:
    twice = bytes([0, 0, Reason.DUPLICATE])

    assert await lanes.facts([asking(0, -(2**63), 2**63 - 1, -(2**63))]) == [twice]
    assert await lanes.facts([asking(0, -(2**63), 2**63 - 1, -(2**63))]) == [twice]  # a repeat is told the same
    assert await lanes.facts([asking(1, -(2**63), 5)]) == [bytes([Reason.DUPLICATE, 0])]


async def test_two_chunks_asking_at_once_share_nobody(lanes: Lanes) -> None:
    mrefs = list(range(-300, 300))
    told = await asyncio.gather(*(lanes.facts([asking(chunk, *mrefs)]) for chunk in range(5)))

    for place in range(len(mrefs)):
        assert sorted(facts[0][place] for facts in told) == [0] + [Reason.DUPLICATE] * 4


async def test_facts_know_suppression_by_scope_and_domain(lanes: Lanes, redis: Redis) -> None:
    tags = tuple(os.urandom(12) for _ in range(8))
    cells = [
        b"\x01" + bytes(4) + b"\x01",  # platform
        b"\x02\x00\x00\x00\x05\x03",  # our account
        b"\x02\x00\x00\x00\x06\x03",  # another account
        b"\x03\x00\x00\x00\x06\x01",  # our list
        b"\x03\x00\x00\x00\x07\x01\x01\x00\x00\x00\x00\x04",  # another list, and the platform
        b"\x04\x00\x00\x00\x00\x01",  # a topic; ours has none
        b"\x03\x00\x00",  # damaged
    ]
    for tag, value in zip(tags, cells, strict=False):
        await redis.hset(keyspace.suppression(PART, tag), tag, value)

    assert await lanes.facts([asking(0, *range(8), tags=tags)]) == [bytes([1, 3, 0, 1, 4, 0, 3, 0])]

    await redis.hset(keyspace.suppression(PART, DOMAIN), DOMAIN, cells[0])
    assert await lanes.facts([asking(1, *range(100, 108), tags=tags)]) == [bytes([1, 3, 1, 1, 4, 1, 3, 1])]


async def test_a_chunk_is_put_once(lanes: Lanes, redis: Redis) -> None:
    request = share(some_slice(JOB, PART, LANE, 64), some_slice(JOB, PART, OTHER, 3), events=(b"refusals", b"more"))

    assert await lanes.put([request]) == [True]
    before = await census(redis, PART)
    assert await lanes.put([request]) == [False]

    assert await census(redis, PART) == before
    assert len(before.slices) == 2
    assert await lanes.waiting(JOB) == 67
    assert await redis.xlen(keyspace.events(PART)) == 2
    assert await lanes.put([share(some_slice(JOB, PART, LANE, 1), chunk=1)]) == [True]
    assert await lanes.waiting(JOB) == 68
    await assert_legal(redis, PART)


async def test_a_share_of_refusals_alone_is_put(lanes: Lanes, redis: Redis) -> None:
    assert await lanes.put([share(events=(b"refusals",))]) == [True]
    assert await lanes.put([share(events=(b"refusals",))]) == [False]

    assert await redis.xlen(keyspace.events(PART)) == 1
    assert await lanes.waiting(JOB) == 0


async def test_put_wakes_the_couriers(lanes: Lanes, redis: Redis) -> None:
    async with redis.pubsub() as channel:
        await channel.subscribe(keyspace.WAKE)
        await channel.get_message(timeout=5)
        await lanes.put([share(some_slice(JOB, PART, LANE, 1))])
        message = await channel.get_message(timeout=5)

    assert message is not None
    assert message["data"] == str(PART).encode()


async def test_a_forgotten_script_is_sent_again(lanes: Lanes, redis: Redis) -> None:
    await lanes.put([share(some_slice(JOB, PART, LANE, 1))])
    await redis.script_flush()

    assert await lanes.put([share(some_slice(JOB, PART, LANE, 1), chunk=1)]) == [True]


# --- lease and assign: T3, decision 4 -------------------------------------------------------------------------------


async def test_a_lease_fixes_the_date_and_carries_a_token(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)

    header, contents = opened(lease)
    assert header.token == lease.token == 1
    assert abs(header.date - await redis_now(redis)) < 60_000_000
    assert (lease.lane, lease.site, len(contents.rows)) == (LANE, SITE, 64)
    assert await lanes.holder_leases(PART, "host/worker-0") == [(lease.slice_id, 1)]
    assert await leased(lanes) == []
    await assert_legal(redis, PART)

    assert await lanes.release(PART, lease.slice_id, lease.token) is Settled.KEPT
    (again,) = await leased(lanes)
    assert (again.token, opened(again)[0].date) == (2, header.date)
    await assert_legal(redis, PART)


async def test_no_slice_is_leased_twice(lanes: Lanes, redis: Redis) -> None:
    await put_at_site(lanes, *(some_slice(JOB, PART, LANE, 1) for _ in range(100)))
    workers = [Lanes(redis, f"host/worker-{number}") for number in range(5)]

    taken = await asyncio.gather(*(leased(workers[turn % 5], 7) for turn in range(20)))

    names = [lease.slice_id for leases in taken for lease in leases]
    assert len(names) == len(set(names)) == 100
    assert len({lease.token for leases in taken for lease in leases}) == 100
    await assert_legal(redis, PART)


async def test_only_sites_named_are_read(lanes: Lanes) -> None:
    await put_at_site(lanes, some_slice(JOB, PART, LANE, 1))

    found = await lanes.lease(PART, [("x" * 11, 5)], unresolved=5)
    assert found.slices == []
    assert [site for site, _ in found.ready] == [SITE]


async def test_a_lane_without_a_site_is_leased_once_then_assigned(lanes: Lanes, redis: Redis) -> None:
    await lanes.put([share(*(some_slice(JOB, PART, LANE, 1) for _ in range(50)), some_slice(JOB, PART, OTHER, 1))])

    found = await lanes.lease(PART, [], unresolved=5)
    assert [lease.lane for lease in found.slices] in ([LANE], [LANE, OTHER])  # one a lane, within the bounded look
    assert [site for site, _ in found.ready] == [keyspace.UNRESOLVED]

    await lanes.assign(PART, LANE, SITE)
    seen = await census(redis, PART)
    assert len(seen.due["d", SITE]) == 49
    assert OTHER in [lease.lane for lease in found.slices + (await lanes.lease(PART, [], unresolved=5)).slices]
    first = found.slices[0]
    await lanes.release(PART, first.slice_id, first.token)
    assert len((await census(redis, PART)).due["d", SITE]) == 50  # handed back to where its lane lives now
    await assert_legal(redis, PART)


async def test_a_long_lane_moves_in_steps_and_keeps_its_priorities(lanes: Lanes, redis: Redis) -> None:
    await lanes.put([share(*(some_slice(JOB, PART, LANE, 1, flags=number % 2) for number in range(2500)))])

    await lanes.assign(PART, LANE, SITE)
    await assert_legal(redis, PART)
    await lanes.assign(PART, LANE, "T" * 11)
    await lanes.assign(PART, LANE, "T" * 11)

    seen = await census(redis, PART)
    assert {key: len(members) for key, members in seen.due.items()} == {("d", "T" * 11): 1250, ("D", "T" * 11): 1250}
    await assert_legal(redis, PART)


async def test_a_lane_that_is_gone_is_not_remembered(lanes: Lanes, redis: Redis) -> None:
    await lanes.assign(PART, LANE, SITE)

    assert (await census(redis, PART)).sites == {}


async def test_a_straggler_of_an_interrupted_move_finds_its_site(lanes: Lanes, redis: Redis) -> None:
    await lanes.put([share(some_slice(JOB, PART, LANE, 1))])
    await redis.hset(keyspace.lane_sites(PART), LANE, SITE)  # what assign.lua does first

    assert (await lanes.lease(PART, [], unresolved=5)).slices == []
    assert len(await leased(lanes)) == 1


async def test_priority_goes_first_and_campaigns_are_not_starved(lanes: Lanes) -> None:
    built = [some_slice(JOB, PART, LANE, 1, flags=slices.FLAG_PRIORITY) for _ in range(20)]
    await put_at_site(lanes, *built, *(some_slice(JOB, PART, OTHER, 1) for _ in range(20)))

    order = [(await leased(lanes))[0].slice_id[0] for _ in range(16)]

    assert order.count("c") == 4
    assert order[:3] == ["p", "p", "p"]
    assert "cc" not in "".join(order)


async def test_what_is_due_later_waits(lanes: Lanes, redis: Redis) -> None:
    due = await redis_now(redis) + 3_600_000_000
    await lanes.put([share(some_slice(JOB, PART, LANE, 1), due=due)])
    await lanes.assign(PART, LANE, SITE)

    found = await lanes.lease(PART, [(SITE, 5)])
    assert found.slices == []
    assert found.ready == [(SITE, due)]


async def test_nothing_is_due_after_its_expiry(lanes: Lanes, redis: Redis) -> None:
    soon = await redis_now(redis) + 60_000_000
    lease = await one_lease(lanes, 1, expires_at=soon)

    await lanes.release(PART, lease.slice_id, lease.token, 3600.0)

    assert (await lanes.lease(PART, [(SITE, 5)])).ready == [(SITE, soon)]


async def test_postponing_a_lane_that_does_not_resolve(lanes: Lanes, redis: Redis) -> None:
    await lanes.put(
        [share(some_slice(JOB, PART, LANE, 1), some_slice(JOB, PART, LANE, 1), some_slice(JOB, PART, OTHER))]
    )
    await lanes.postpone(PART, LANE, 600.0)

    found = await lanes.lease(PART, [], unresolved=5)
    assert [lease.lane for lease in found.slices] == [OTHER]
    assert found.ready[0][1] > found.now_us + 500_000_000
    await assert_legal(redis, PART)


async def test_at_the_cap_of_the_event_stream_leasing_stops(redis: Redis) -> None:
    lanes = Lanes(redis, "host/worker-0", event_cap=2)
    await put_at_site(lanes, some_slice(JOB, PART, LANE, 1))
    for _ in range(2):
        await redis.xadd(keyspace.events(PART), {"b": "x"})

    found = await lanes.lease(PART, [(SITE, 5)])
    assert (found.slices, found.full) == ([], True)

    await redis.xtrim(keyspace.events(PART), maxlen=1, approximate=False)
    assert len(await leased(lanes)) == 1


@pytest.mark.parametrize("what", ["a5", f"j{JOB}", f"l{LANE}"])
async def test_what_is_halted_is_neither_leased_nor_let_through_the_gate(lanes: Lanes, redis: Redis, what: str) -> None:
    first = await one_lease(lanes)
    await lanes.put([share(some_slice(JOB, PART, LANE, 1), chunk=1)])
    await lanes.halt(what, [PART])

    assert await leased(lanes) == []
    answer = await lanes.gate(asked(first, 1))
    assert answer is not None
    assert answer.standing is (Standing.FROZEN if what.startswith("a") else Standing.PAUSED)

    await lanes.resume(what, [PART])
    ready = (await lanes.lease(PART, [(SITE, 1)])).ready
    assert [site for site, _ in ready] == [SITE]
    assert ready[0][1] - await redis_now(redis) < 5_000_000
    answer = await lanes.gate(asked(first, 1))
    assert answer is not None
    assert answer.standing is Standing.CLEAR
    await assert_legal(redis, PART)


async def test_what_is_let_go_is_due_at_once_and_everybody_is_told(lanes: Lanes, redis: Redis) -> None:
    """A job that waited for its last audience entry starts then, not when what was passed over is looked at again."""
    await put_at_site(lanes, some_slice(JOB, PART, LANE, 1))
    await lanes.halt(f"j{JOB}", [PART])
    assert await leased(lanes) == []
    async with redis.pubsub() as listener:
        await listener.subscribe(keyspace.WAKE)
        assert (await listener.get_message(timeout=5.0) or {})["type"] == "subscribe"

        await lanes.let_go(f"j{JOB}")

        told = await listener.get_message(ignore_subscribe_messages=True, timeout=5.0)
        assert told is not None
        assert told["data"] == str(PART).encode()
    assert len(await leased(lanes)) == 1
    await assert_legal(redis, PART)


async def test_small_shares_of_one_moment_travel_together_and_wake_each_partition_once(
    lanes: Lanes, redis: Redis
) -> None:
    async with redis.pubsub() as listener:
        await listener.subscribe(keyspace.WAKE)
        assert (await listener.get_message(timeout=5.0) or {})["type"] == "subscribe"
        before = (await redis.info("commandstats")).get("cmdstat_publish", {}).get("calls", 0)

        jobs = range(JOB, JOB + 20)
        shares = [PutRequest(PART, job, 0, STATE, [(0, some_slice(job, PART, LANE, 1))]) for job in jobs]
        assert await asyncio.gather(*[lanes.put([one]) for one in shares]) == [[True]] * 20

        assert (await redis.info("commandstats"))["cmdstat_publish"]["calls"] == before + 1
        told = await listener.get_message(ignore_subscribe_messages=True, timeout=5.0)
        assert told is not None
        assert told["data"] == str(PART).encode()
    assert await asyncio.gather(*[lanes.put([one]) for one in shares]) == [[False]] * 20
    await assert_legal(redis, PART)


async def test_an_error_among_shares_that_travel_together_is_its_own(lanes: Lanes, redis: Redis) -> None:
    await redis.set(keyspace.chunks_put(PART, JOB + 1), "x")
    await redis.delete(keyspace.job(PART, JOB + 1))
    await redis.set(keyspace.job(PART, JOB + 1), "no hash: every script that writes there fails")
    shares = [PutRequest(PART, job, 0, STATE, [(0, some_slice(job, PART, LANE, 1))]) for job in (JOB, JOB + 1, JOB + 2)]

    told = await asyncio.gather(*[lanes.put([one]) for one in shares], return_exceptions=True)

    assert told[0] == told[2] == [True]
    assert isinstance(told[1], RedisError)


async def test_a_paused_job_steps_aside_for_the_others(lanes: Lanes, redis: Redis) -> None:
    paused = PutRequest(
        PART, 9, 0, JobState(5, 6, 0, False, FAR, False, 1, "paused"),
        [(0, some_slice(9, PART, LANE, 1)) for _ in range(100)],
    )  # fmt: skip
    await lanes.put([paused])
    await put_at_site(lanes, some_slice(JOB, PART, LANE, 1))

    found: list[Lease] = []
    for _ in range(10):  # each call looks past a bounded number and parks them
        found += await leased(lanes)
    assert [opened(lease)[0].job for lease in found] == [JOB]


async def test_what_expires_while_halted_is_leased_to_be_ended(lanes: Lanes) -> None:
    await lanes.halt("a5", [PART])
    await put_at_site(lanes, some_slice(JOB, PART, LANE, 1, expires_at=1))

    (lease,) = await leased(lanes)
    answer = await lanes.gate(asked(lease, 1))
    assert answer is not None
    assert answer.standing is Standing.EXPIRED


async def test_ready_shows_more_sites_than_the_earliest_by_chance(lanes: Lanes) -> None:
    for number in range(30):
        lane = f"{number:011d}"
        await lanes.put([share(some_slice(JOB, PART, lane, 1), chunk=number)])
        await lanes.assign(PART, lane, f"{number:011x}")

    seen: set[str] = set()
    for _ in range(200):
        seen |= {site for site, _ in (await lanes.lease(PART, [], ready_limit=5)).ready}
    assert len(seen) == 30


# --- gate: T4 (its laws are in tests/laws/test_gate_laws.py) --------------------------------------------------------


def asked(lease: Lease, count: int, token: int | None = None) -> GateRequest:
    tags = [bytes([index]) * 12 for index in range(count)]
    return GateRequest(PART, lease.slice_id, lease.token if token is None else token, tags, DOMAIN)


async def test_the_gate_answers_for_everyone_asked_about(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    tag = bytes([3]) * 12
    await redis.hset(keyspace.suppression(PART, tag), tag, b"\x02\x00\x00\x00\x05\x01")

    answer = await lanes.gate(asked(lease, 5))
    assert answer is not None
    assert (answer.standing, answer.facts) == (Standing.CLEAR, bytes([0, 0, 0, 1, 0]))


@pytest.mark.parametrize(
    ("word", "standing"),
    [
        ("paused", Standing.PAUSED),
        ("cancelled", Standing.CANCELLED),
        ("expired", Standing.EXPIRED),
        ("expanding", Standing.CLEAR),
        ("a word of next year", Standing.PAUSED),
    ],
)
async def test_the_jobs_state_stands_before_everyone(lanes: Lanes, redis: Redis, word: str, standing: Standing) -> None:
    lease = await one_lease(lanes)
    await redis.hset(keyspace.job(PART, JOB), "st", word)

    answer = await lanes.gate(asked(lease, 1))
    assert answer is not None
    assert answer.standing is standing


async def test_a_job_nobody_knows_is_gone(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    await redis.delete(keyspace.job(PART, JOB))

    answer = await lanes.gate(asked(lease, 1))
    assert answer is not None
    assert (answer.standing, answer.facts) == (Standing.GONE, b"")


async def test_a_stale_token_is_refused_everywhere(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    before = await census(redis, PART)
    stale = lease.token + 1

    answer = await lanes.gate(asked(lease, 1, stale))
    assert answer is not None
    assert answer.standing is Standing.STALE
    assert await lanes.settle(SettleRequest(PART, lease.slice_id, stale, [0], [1], b"event")) is Settled.STALE
    assert await lanes.release(PART, lease.slice_id, stale) is Settled.STALE
    assert await census(redis, PART) == before
    assert await redis.xlen(keyspace.events(PART)) == 0


# --- settle: T7, T8 -------------------------------------------------------------------------------------------------


async def test_a_slice_is_settled_bit_by_bit(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    request = SettleRequest(PART, lease.slice_id, lease.token, [0, 63], [5], b"batch")

    assert await lanes.settle(request) is Settled.KEPT
    header = (await census(redis, PART)).slices[lease.slice_id]
    assert header.pending() == list(range(1, 63))
    assert [index for index in range(64) if header.in_doubt(index)] == [5]
    assert await lanes.waiting(JOB) == 62
    assert await events(redis) == [b"batch"]
    await assert_legal(redis, PART)

    rest = SettleRequest(PART, lease.slice_id, lease.token, range(64), events=b"last")
    assert await lanes.settle(rest) is Settled.GONE
    assert await lanes.settle(rest) is Settled.STALE
    assert await lanes.waiting(JOB) == 0
    assert await redis.xlen(keyspace.events(PART)) == 2
    seen = await census(redis, PART)
    assert (seen.slices, seen.lanes, seen.due, seen.leases, seen.sites) == ({}, {}, {}, {}, {})
    await assert_legal(redis, PART)


async def test_the_same_settle_twice_is_the_same_as_once(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    header, contents = opened(lease)
    retry = Retry(30.0, slices.retry_of(KEY, 2900, PART, header, contents, [2, 3]), [2, 3])
    request = SettleRequest(PART, lease.slice_id, lease.token, [0], [9], b"batch", [retry])

    assert await lanes.settle(request) is Settled.KEPT
    before = await census(redis, PART)
    assert await lanes.settle(request) is Settled.KEPT

    assert await census(redis, PART) == before
    assert await redis.xlen(keyspace.events(PART)) == 1
    assert await lanes.waiting(JOB) == 63
    await assert_legal(redis, PART)


async def test_a_retry_is_due_later_in_the_same_lane(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes, 3, flags=slices.FLAG_PRIORITY)
    header, contents = opened(lease)
    retry = Retry(600.0, slices.retry_of(KEY, 2900, PART, header, contents, [1]), [1])

    assert await lanes.settle(SettleRequest(PART, lease.slice_id, lease.token, [0, 2], retries=[retry])) is Settled.GONE

    assert await lanes.waiting(JOB) == 1
    found = await lanes.lease(PART, [(SITE, 5)])
    assert found.slices == []
    assert found.ready[0][1] - found.now_us == pytest.approx(600_000_000, abs=60_000_000)
    (kept,) = await lanes.lane_slices(PART, LANE)
    again, rest = slices.open_slice(KEYS, PART, kept.data)  # type: ignore[misc]  # a Lost would not unpack: test fails
    assert (again.attempt, again.date, again.priority) == (1, header.date, True)
    assert rest.rows == [contents.rows[1]]
    await assert_legal(redis, PART)


async def test_a_retry_that_contradicts_what_is_settled_is_refused_whole(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    header, contents = opened(lease)
    await lanes.settle(SettleRequest(PART, lease.slice_id, lease.token, [1]))
    before = await census(redis, PART)
    retry = Retry(1.0, slices.retry_of(KEY, 2900, PART, header, contents, [1, 2]), [1, 2])

    with pytest.raises(QueueError):
        await lanes.settle(SettleRequest(PART, lease.slice_id, lease.token, [5], events=b"x", retries=[retry]))

    assert await census(redis, PART) == before
    assert await redis.xlen(keyspace.events(PART)) == 0


async def test_binary_events_arrive_as_they_left(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    event = bytes(range(256)) * 8

    await lanes.settle(SettleRequest(PART, lease.slice_id, lease.token, [0], events=event))

    assert await events(redis) == [event]


async def test_a_store_that_does_not_answer_settles_nothing(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    await redis.delete(keyspace.events(PART))
    await redis.set(keyspace.events(PART), "not a stream")

    request = SettleRequest(PART, lease.slice_id, lease.token, [0], events=b"x")
    assert await lanes.settle(request) is None

    unreachable = Lanes(connect("unix:///nonexistent/socket"), "host/worker-1")
    assert await unreachable.settle_many([request, request]) == [None, None]


# --- heartbeat and the dead -----------------------------------------------------------------------------------------


async def test_the_living_are_not_reclaimed(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    reclaimer = Lanes(redis, "host/worker-1")
    seen = (await reclaimer.holders(PART))["host/worker-0"]
    await lanes.heartbeat([PART])

    assert await reclaimer.reclaim(PART, "host/worker-0", seen) is None
    assert await lanes.release(PART, lease.slice_id, lease.token) is Settled.KEPT


async def test_the_dead_are_reclaimed_and_their_late_words_refused(lanes: Lanes, redis: Redis) -> None:
    await put_at_site(lanes, *(some_slice(JOB, PART, LANE, 2) for _ in range(3)))
    first, second, _ = await leased(lanes, 3)
    await lanes.settle(SettleRequest(PART, first.slice_id, first.token, [0]))
    reclaimer = Lanes(redis, "host/worker-1")
    seen = (await reclaimer.holders(PART))["host/worker-0"]

    assert await reclaimer.reclaim(PART, "host/worker-0", seen) == 3
    await assert_legal(redis, PART)
    assert await lanes.settle(SettleRequest(PART, second.slice_id, second.token, [0, 1])) is Settled.STALE
    again = {lease.slice_id: lease for lease in await leased(reclaimer, 5)}
    assert len(again) == 3
    assert opened(again[first.slice_id])[0].pending() == [1]
    await assert_legal(redis, PART)


async def test_a_counter_forgotten_and_begun_again_never_repeats(lanes: Lanes, redis: Redis) -> None:
    await one_lease(lanes)
    seen = (await lanes.holders(PART))["host/worker-0"]
    await lanes.reclaim(PART, "host/worker-0", seen)

    await lanes.heartbeat([PART])

    assert (await lanes.holders(PART))["host/worker-0"] > seen


async def test_leaving_is_for_those_with_empty_hands(lanes: Lanes, redis: Redis) -> None:
    lease = await one_lease(lanes)
    await lanes.leave([PART])
    assert "host/worker-0" in await lanes.holders(PART)

    await lanes.release(PART, lease.slice_id, lease.token)
    await lanes.leave([PART])
    assert await lanes.holders(PART) == {}
    await assert_legal(redis, PART)


async def test_a_lane_can_be_looked_at(lanes: Lanes) -> None:
    await put_at_site(lanes, some_slice(JOB, PART, LANE, 2), some_slice(JOB, PART, LANE, 3))
    (lease,) = await leased(lanes)

    found = {waiting.slice_id: waiting for waiting in await lanes.lane_slices(PART, LANE)}
    assert len(found) == 2
    assert found[lease.slice_id].holder == "host/worker-0"
    assert {waiting.holder for name, waiting in found.items() if name != lease.slice_id} == {""}
    assert await lanes.lane_slices(PART, OTHER) == []


# --- permits and rate -----------------------------------------------------------------------------------------------


async def test_permits_never_exceed_the_cap(redis: Redis) -> None:
    permits = Permits(redis)
    taken = await asyncio.gather(*(permits.take(SITE, [f"w{worker}/{n}" for n in range(4)], 10) for worker in range(5)))

    assert sum(taken) == 10
    assert await permits.take(SITE, ["late"], 10) == 0
    assert await permits.take(SITE, ["w0/0"], 10) == (1 if taken[0] else 0)  # who holds one keeps it
    await permits.give_back(SITE, ["w0/0"])
    assert await permits.take(SITE, ["late"], 10) == 1


async def test_a_permit_that_expired_is_told_at_renewal(redis: Redis) -> None:
    permits = Permits(redis, life=60)
    assert await permits.take(SITE, ["a", "b"], 2) == 2
    await redis.zadd(keyspace.site_permits(SITE), {"a": 1})  # as if its minute were over

    assert await permits.take(SITE, ["c"], 2) == 1
    assert await permits.renew(SITE, ["a", "b", "c"]) == [False, True, True]
    assert await redis.pttl(keyspace.site_permits(SITE)) > 0


async def test_the_rate_grants_a_burst_and_then_waits(redis: Redis) -> None:
    permits = Permits(redis)
    first = await permits.tokens(SITE, 100, per_second=0.5, burst=10)
    assert first.granted == 10
    assert first.wait == pytest.approx(2, abs=1)

    second = await permits.tokens(SITE, 100, per_second=0.5, burst=10)
    assert second.granted <= 1  # one only if two seconds went by between the calls
    assert 0 < second.wait <= 2
    assert await redis.pttl(keyspace.site_rate(SITE)) > 18_000


async def test_a_clock_that_stepped_back_stops_a_site_for_one_burst_at_most(redis: Redis) -> None:
    permits = Permits(redis)
    await redis.set(keyspace.site_rate(SITE), str(await redis_now(redis) + 10**12))

    assert (await permits.tokens(SITE, 1, per_second=1000, burst=5)).wait <= 0.001


async def test_a_fast_rate_keeps_its_promise_over_a_window(redis: Redis) -> None:
    permits = Permits(redis)
    start, granted = await redis_now(redis), 0
    for _ in range(200):
        granted += (await permits.tokens(SITE, 7, per_second=3000, burst=20)).granted

    assert granted <= (await redis_now(redis) - start) * 3000 / 1_000_000 + 20 + 1


async def test_a_back_off_only_gets_longer(redis: Redis) -> None:
    permits = Permits(redis)
    await permits.back_off(SITE, 100)
    await permits.back_off(SITE, 1)
    await permits.back_off("T" * 11, 0.5)

    first, second, none = await permits.back_offs([SITE, "T" * 11, "U" * 11])
    assert first == pytest.approx(100, abs=30)
    assert none == 0
    assert second <= 0.5
    await permits.back_off(SITE, 1000)
    assert (await permits.back_offs([SITE]))[0] > 500
    await permits.forgive(SITE)
    assert await permits.back_offs([SITE]) == [0]


async def test_keys_are_all_in_the_inventory(lanes: Lanes, redis: Redis) -> None:
    await lanes.facts([asking(0, 1, 2)])
    await one_lease(lanes)
    await lanes.halt("a77", [PART])
    permits = Permits(redis)
    await permits.take(SITE, ["a"], 1)
    await permits.tokens(SITE, 1, 1.0, 1)
    await permits.back_off(SITE, 5)

    keys = [key.decode() for key in await redis.keys("*") if isinstance(key, bytes)]
    assert [key for key in keys if keyspace.entry_of(key) is None] == []
    assert {keyspace.entry_of(key).name for key in keys} >= {"site permits", "site rate", "halts", "duplicates"}  # type: ignore[union-attr]  # None was ruled out above


async def test_impossible_calls_are_our_fault(lanes: Lanes, redis: Redis) -> None:
    with pytest.raises(QueueError):
        Lanes(redis, "two words")
    with pytest.raises(QueueError):
        await lanes.facts([FactsRequest(PART, JOB, 0, 1, 5, 6, 0, [(1, b"short")], [DOMAIN])])
    with pytest.raises(QueueError):
        await lanes.gate(GateRequest(PART, "c1", 1, [b"short"], DOMAIN))
    with pytest.raises(QueueError):
        await Permits(redis).tokens(SITE, 1, 0.0, 1)
    await redis.set(keyspace.chunks_put(PART, JOB), "x")
    await redis.delete(keyspace.chunks_put(PART, JOB))
    await redis.hset(keyspace.chunks_put(PART, JOB), "wrong", "type")
    with pytest.raises(ResponseError):
        await lanes.put([share(some_slice(JOB, PART, LANE, 1))])
