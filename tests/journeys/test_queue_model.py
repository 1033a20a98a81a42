"""The queue against a model: any sequence of what workers do to it, on a real server.

Laws, checked after every step: the census finds only legal states; nobody who is done is leased again; a slice is in
one hand; a stale hand changes nothing. At the end everybody put is done exactly once and no key of them is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.queue import slices
from engine.queue.lanes import JobState, Lanes, Lease, PutRequest, Retry, Settled, SettleRequest
from engine.queue.slices import Contents, Header, Row
from policy import keyspace
from policy.valkey import EmbeddedServer, connect
from tests.world.queue_census import FAR, KEY, KEYS, assert_legal
from tests.world.valkey_server import running_valkey

PART = 11
JOBS = (3, 1 << 35)
LANES = ("A" * 11, "B" * 11, "C" * 11)
SITES = ("S" * 11, "T" * 11)
HOLDERS = ("host/0", "host/1")
Answered = TypeVar("Answered")
Person = tuple[int, str]


@dataclass
class Hand:
    """A lease as its holder remembers it, current or not."""

    holder: str
    lease: Lease
    header: Header
    contents: Contents
    pending: set[int]

    def person(self, index: int) -> Person:
        return self.header.job, self.contents.rows[index].local


class Queue(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = connect(self.url)
        self.workers = {name: Lanes(self.redis, name) for name in HOLDERS}
        self.everybody: set[Person] = set()
        self.done: list[Person] = []
        self.hands: dict[str, Hand] = {}  # by slice id: the current ones
        self.stale: list[Hand] = []
        self.put: list[PutRequest] = []

    def wait(self, work: Awaitable[Answered]) -> Answered:
        async def waited() -> Answered:
            return await work

        return self.runner.run(waited())

    @initialize()
    def empty(self) -> None:
        self.wait(self.redis.flushall())

    @rule(job=st.sampled_from(JOBS), sizes=st.lists(st.sampled_from([1, 2, 3, 5, 64]), max_size=4), data=st.data())
    def put_a_chunk(self, job: int, sizes: list[int], data: st.DataObject) -> None:
        built = []
        for size in sizes:
            locals_ = [f"r{len(self.everybody) + place}" for place in range(size)]
            self.everybody |= {(job, name) for name in locals_}
            contents = Contents("x.test", [], [Row(name, 1, 2, 0, 0, []) for name in locals_])
            lane, flags = data.draw(st.sampled_from(LANES)), data.draw(st.integers(0, 3))
            built.append((0, slices.build(KEY, 2900, job, PART, lane, contents, expires_at=FAR, flags=flags)))
        request = PutRequest(PART, job, len(self.put), JobState(1, 2, 3, False, FAR, False, 1), built)
        self.put.append(request)
        assert self.wait(self.workers[HOLDERS[0]].put([request])) == [True]

    @precondition(lambda self: self.put)
    @rule(data=st.data())
    def put_it_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.put))
        assert self.wait(self.workers[HOLDERS[1]].put([request])) == [False]

    @rule(lane=st.sampled_from(LANES), site=st.sampled_from(SITES))
    def assign(self, lane: str, site: str) -> None:
        self.wait(self.workers[HOLDERS[0]].assign(PART, lane, site))

    @rule(holder=st.sampled_from(HOLDERS), wanted=st.lists(st.integers(0, 3), min_size=3, max_size=3))
    def lease(self, holder: str, wanted: list[int]) -> None:
        found = self.wait(self.workers[holder].lease(PART, [*zip(SITES, wanted, strict=False)], wanted[2]))
        assert len(found.slices) <= sum(wanted)
        for lease in found.slices:
            opened = slices.open_slice(KEYS, PART, lease.data)
            assert not isinstance(opened, slices.Lost)
            header, contents = opened
            assert lease.slice_id not in self.hands
            assert (header.token, header.lane) == (lease.token, lease.lane)
            hand = Hand(holder, lease, header, contents, set(header.pending()))
            assert not {hand.person(index) for index in hand.pending} & set(self.done)
            self.hands[lease.slice_id] = hand

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), twice=st.booleans())
    def settle(self, data: st.DataObject, twice: bool) -> None:
        hand = data.draw(st.sampled_from([*self.hands.values()]))
        pending = sorted(hand.pending)
        fates = data.draw(st.lists(st.sampled_from("kdrq"), min_size=len(pending), max_size=len(pending)))
        gone, again, doubt = (
            {index for index, fate in zip(pending, fates, strict=True) if fate == wanted} for wanted in "drq"
        )
        retries = []
        if again:
            rows = sorted(again)
            blob = slices.retry_of(KEY, 2900, PART, hand.header, hand.contents, rows)
            retries.append(Retry(0.0, blob, rows))
        request = SettleRequest(PART, hand.lease.slice_id, hand.lease.token, sorted(gone), sorted(doubt), b"", retries)
        worker = self.workers[hand.holder]
        told = self.wait(worker.settle(request))
        self.done += [hand.person(index) for index in gone]
        hand.pending -= gone | again
        assert told is (Settled.KEPT if hand.pending else Settled.GONE)
        if twice:
            assert self.wait(worker.settle(request)) is (Settled.KEPT if hand.pending else Settled.STALE)
        if not hand.pending:
            self.let_go(hand)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from([*self.hands.values()]))
        told = self.wait(self.workers[hand.holder].release(PART, hand.lease.slice_id, hand.lease.token))
        assert told is Settled.KEPT
        self.let_go(hand)

    @rule(holder=st.sampled_from(HOLDERS), beats=st.booleans())
    def reclaim(self, holder: str, beats: bool) -> None:
        other = self.workers[HOLDERS[holder == HOLDERS[0]]]
        seen = self.wait(other.holders(PART)).get(holder, 0)
        if beats:
            self.wait(self.workers[holder].heartbeat([PART]))
            assert self.wait(other.reclaim(PART, holder, seen)) is None
            return
        lost = [hand for hand in self.hands.values() if hand.holder == holder]
        assert self.wait(other.reclaim(PART, holder, seen)) == len(lost)
        for hand in lost:
            self.let_go(hand)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def speak_too_late(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from(self.stale))
        request = SettleRequest(PART, hand.lease.slice_id, hand.lease.token, range(hand.header.count), events=b"late")
        assert self.wait(self.workers[hand.holder].settle(request)) is Settled.STALE
        assert (
            self.wait(self.workers[hand.holder].release(PART, hand.lease.slice_id, hand.lease.token)) is Settled.STALE
        )

    @invariant()
    def is_legal(self) -> None:
        self.wait(assert_legal(self.redis, PART))
        waiting = sum(self.wait(self.workers[HOLDERS[0]].waiting(job, [PART])) for job in JOBS)
        assert waiting == len(self.everybody) - len(self.done)
        assert len(self.done) == len(set(self.done))

    def let_go(self, hand: Hand) -> None:
        del self.hands[hand.lease.slice_id]
        self.stale.append(hand)

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.wait(self.redis.aclose())
            self.runner.close()

    def drain(self) -> None:
        for hand in list(self.hands.values()):
            self.wait(self.workers[hand.holder].release(PART, hand.lease.slice_id, hand.lease.token))
            self.let_go(hand)
        rounds = 0
        while len(self.done) < len(self.everybody):
            rounds += 1
            assert rounds < 200, "somebody is never leased again"
            self.lease(HOLDERS[0], [50, 50, 50])
            for hand in list(self.hands.values()):
                request = SettleRequest(PART, hand.lease.slice_id, hand.lease.token, sorted(hand.pending))
                assert self.wait(self.workers[hand.holder].settle(request)) is Settled.GONE
                self.done += [hand.person(index) for index in hand.pending]
                self.let_go(hand)
        assert sorted(self.done) == sorted(self.everybody)
        for worker in self.workers.values():
            self.wait(worker.leave([PART]))
        left = {key.decode() for key in self.wait(self.redis.keys("*")) if isinstance(key, bytes)}
        allowed = {keyspace.counter(PART)}
        for job in JOBS:
            allowed |= {keyspace.job(PART, job), keyspace.chunks_put(PART, job)}
        assert left <= allowed


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with running_valkey() as running:
        yield running


def test_whatever_workers_do_everybody_is_done_once(server: EmbeddedServer) -> None:
    Queue.url = server.url
    run_state_machine_as_test(Queue, settings=settings(max_examples=50, stateful_step_count=30, deadline=None))
