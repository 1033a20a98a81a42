"""Laws of the gate: nobody gets leave by accident (promise T4, design decision 7).

The pure half is policy.gate; the other half is gate.lua on a real server, compared with a model of what a set of cells
means, and a store that is away, full, read-only or out of its mind.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from engine.queue import lanes as room
from engine.queue.lanes import FactsRequest, GateRequest, JobState, Lanes, Lease, PutRequest, SettleRequest
from policy import keyspace
from policy.events import Reason
from policy.gate import PERMIT_SECONDS, Permit, Refusal, Standing, decide, decide_entry
from policy.valkey import EmbeddedServer, connect
from tests.world.queue_census import FAR, SITE, lane_named, some_slice
from tests.world.valkey_server import running_valkey

PART, JOB, ACCOUNT, LIST, TOPIC = 3, 77, 500, 600, 700
DOMAIN = b"@" * 12
LANE = lane_named("L")
RESTRICTED = int(Reason.RESTRICTED)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with running_valkey() as running:
        yield running


@pytest.fixture
async def redis(server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


# --- pure -----------------------------------------------------------------------------------------------------------


@given(st.integers(-(2**40), 2**40))
def test_only_nothing_known_gives_leave(fact: int) -> None:
    """Every fact but 0 is a refusal, known or not."""
    verdict = decide(fact, JOB, 5, 1.0)

    assert isinstance(verdict, Permit) == (fact == 0)
    if isinstance(verdict, Refusal):
        assert verdict.reason is not Reason.NONE


@given(st.integers(0, 255), st.booleans(), st.booleans())
def test_consent_never_turns_a_refusal_into_leave(fact: int, needs: bool, has: bool) -> None:
    """Consent in a job can only take leave away (decision 19)."""
    verdict = decide_entry(fact, JOB, 5, 1.0, needs_consent=needs, has_consent=has)

    assert isinstance(verdict, Permit) == (fact == 0 and (has or not needs))


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_a_permit_is_void_unless_it_is_young(asked_at: float, now: float) -> None:
    """Void after half a second, before it was asked for, and on any clock that is not a number."""
    young = 0.0 <= now - asked_at <= PERMIT_SECONDS

    assert Permit(1, 2, asked_at).is_void(now) is not young


def test_the_age_counts_from_the_question() -> None:
    permit = Permit(1, 2, 100.0)
    assert not permit.is_void(100.0)
    assert not permit.is_void(100.5)
    assert permit.is_void(100.51)
    assert permit.is_void(99.99)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.binary(max_size=6) | st.text(max_size=6)
    | st.just(ResponseError("OOM")),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(JUNK)
def test_an_answer_in_other_words_is_no_answer(told: object) -> None:
    """What the store says is taken only when it is a standing we know and exactly one fact for everyone asked about."""
    request = GateRequest(PART, "c1", 1, [bytes(12), bytes(12)], DOMAIN)

    [answer] = room._answers([request], told)

    if answer is not None:
        assert isinstance(answer.standing, Standing)
        assert len(answer.facts) == (2 if answer.standing is Standing.CLEAR else 0)


@pytest.mark.parametrize(
    "told", [[0, b""], [0, b"\0"], [0, b"\0\0\0"], [0, "\0\0"], [7, b""], [1, b"\0\0"], [0], b"\0\0"]
)
def test_a_short_or_long_answer_is_no_answer(told: object) -> None:
    request = GateRequest(PART, "c1", 1, [bytes(12), bytes(12)], DOMAIN)
    assert room._answers([request], told) == [None]
    assert room._answers([request, request], told) == [None, None]


# --- the script against a model -------------------------------------------------------------------------------------

CELL = st.tuples(
    st.integers(0, 6), st.sampled_from([0, ACCOUNT, LIST, TOPIC, 9, 2**32 - 1]), st.sampled_from([0, 1, 3, 4, 9])
)
CELLS = st.lists(CELL, max_size=4)


def packed(cells: list[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack(">BIB", *cell) for cell in cells)


def model(cells: list[tuple[int, int, int]], topic: int) -> int:
    """What the cells of one tag mean for our job, said a second time and in another language."""
    worst = 0
    ours = {(2, ACCOUNT), (3, LIST)} | ({(4, topic)} if topic else set())
    for scope, number, reason in cells:
        if scope not in (1, 2, 3, 4):
            worst = max(worst, RESTRICTED)
        elif scope == 1 or (scope, number) in ours:
            worst = max(worst, reason or RESTRICTED)
    return worst


async def leased_slice(redis: Redis, count: int, topic: int) -> tuple[Lanes, Lease]:
    await redis.flushall()
    lanes = Lanes(redis, "host/worker-0")
    state = JobState(ACCOUNT, LIST, topic, False, FAR, False, 1)
    await lanes.put([PutRequest(PART, JOB, 0, state, [(0, some_slice(JOB, PART, LANE, count))])])
    await lanes.assign(PART, LANE, SITE)
    (lease,) = (await lanes.lease(PART, [(SITE, 1)])).slices
    return lanes, lease


@settings(max_examples=60, deadline=None)
@given(st.lists(CELLS, min_size=1, max_size=8), CELLS, st.sampled_from([0, TOPIC]))
def test_gate_and_expansion_judge_as_the_model_does(
    server: EmbeddedServer,
    people: list[list[tuple[int, int, int]]],
    domain: list[tuple[int, int, int]],
    topic: int,
) -> None:
    """Both scripts, for any cells of addresses and domain: the worst applicable reason, unknown scopes included."""
    tags = [bytes([place]) + b"t" * 11 for place in range(len(people))]

    async def ask() -> tuple[bytes, bytes]:
        redis = connect(server.url)
        try:
            lanes, lease = await leased_slice(redis, len(people), topic)
            for tag, cells in [*zip(tags, people, strict=True), (DOMAIN, domain)]:
                if cells:
                    await redis.hset(keyspace.suppression(PART, tag), tag, packed(cells))
            answer = await lanes.gate(GateRequest(PART, lease.slice_id, lease.token, tags, DOMAIN))
            rows = list(enumerate(tags))
            (entry,) = await lanes.facts(
                [FactsRequest(PART, JOB + 1, 0, 1, ACCOUNT, LIST, topic, rows, [DOMAIN] * len(rows))]
            )
            assert answer is not None
            assert answer.standing is Standing.CLEAR
            return answer.facts, entry
        finally:
            await redis.aclose()

    gate, entry = asyncio.run(ask())

    assert list(gate) == [max(model(cells, topic), model(domain, topic)) for cells in people]
    assert entry == gate


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=20).filter(lambda value: len(value) % 6))
def test_damaged_cells_refuse(server: EmbeddedServer, value: bytes) -> None:
    """A value that is not a whole number of cells is read by nobody, so nobody gets leave by it."""

    async def ask() -> int:
        redis = connect(server.url)
        try:
            lanes, lease = await leased_slice(redis, 1, 0)
            await redis.hset(keyspace.suppression(PART, DOMAIN), DOMAIN, value)
            answer = await lanes.gate(GateRequest(PART, lease.slice_id, lease.token, [b"p" * 12], DOMAIN))
            assert answer is not None
            return answer.facts[0]
        finally:
            await redis.aclose()

    assert asyncio.run(ask()) == RESTRICTED


# --- a store in trouble ---------------------------------------------------------------------------------------------


async def test_a_suppression_acknowledged_is_in_force_at_the_next_question(redis: Redis) -> None:
    lanes, lease = await leased_slice(redis, 1, 0)
    request = GateRequest(PART, lease.slice_id, lease.token, [b"p" * 12], DOMAIN)
    first = await lanes.gate(request)
    await redis.hset(keyspace.suppression(PART, b"p" * 12), b"p" * 12, packed([(1, 0, 1)]))
    second = await lanes.gate(request)

    assert first is not None
    assert second is not None
    assert (first.facts, second.facts) == (b"\0", bytes([Reason.SUPPRESSED]))


async def test_a_store_out_of_memory_gives_no_leave(redis: Redis) -> None:
    """It can still be read, but what we send could not be settled."""
    lanes, lease = await leased_slice(redis, 1, 0)
    request = GateRequest(PART, lease.slice_id, lease.token, [b"p" * 12], DOMAIN)
    await redis.config_set("maxmemory", "1")
    try:
        assert await lanes.gate(request) is None
        assert await lanes.settle(SettleRequest(PART, lease.slice_id, lease.token, [0], events=b"x")) is None
    finally:
        await redis.config_set("maxmemory", "0")
    assert await lanes.gate(request) is not None


async def test_a_replica_gives_no_leave(redis: Redis) -> None:
    """After a failover the old primary may still answer questions, with old answers."""
    lanes, lease = await leased_slice(redis, 1, 0)
    request = GateRequest(PART, lease.slice_id, lease.token, [b"p" * 12], DOMAIN)
    await redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]  # redis-py's gap
    try:
        assert await lanes.gate(request) is None
    finally:
        await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]  # redis-py's gap
    assert await lanes.gate(request) is not None


async def test_a_bucket_of_another_type_gives_no_leave(redis: Redis) -> None:
    lanes, lease = await leased_slice(redis, 2, 0)
    await redis.set(keyspace.suppression(PART, b"p" * 12), "not a hash")

    assert await lanes.gate(GateRequest(PART, lease.slice_id, lease.token, [b"q" * 12, b"p" * 12], DOMAIN)) is None


async def test_a_store_that_is_away_gives_no_leave() -> None:
    redis = connect("unix:///nonexistent/socket")
    lanes = Lanes(redis, "host/worker-0")

    assert await lanes.gate_many([GateRequest(PART, "c1", 1, [bytes(12)], DOMAIN)] * 2) == [None, None]
    await redis.aclose()


async def test_one_broken_bucket_does_not_stop_the_others(redis: Redis) -> None:
    lanes, lease = await leased_slice(redis, 2, 0)
    await redis.set(keyspace.suppression(PART, b"p" * 12), "not a hash")
    good = GateRequest(PART, lease.slice_id, lease.token, [b"q" * 12], DOMAIN)
    bad = GateRequest(PART, lease.slice_id, lease.token, [b"p" * 12], DOMAIN)

    first, second, third = await lanes.gate_many([good, bad, good])

    assert first is not None
    assert second is None
    assert third == first
