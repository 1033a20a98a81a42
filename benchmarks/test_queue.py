"""What the queue costs: CPU of worker and server for put + lease + gate + settle, and memory, a recipient.

The unit is µs of CPU a message at 64-recipient slices, the worker's process and the server's added up, with
``appendfsync always`` as in production. The bound is 15 µs: everything must vanish beside a signature (design, 6).
Figures are in each benchmark's extra_info and printed as a line of JSON; the median is the time of one such round.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from redis.asyncio import Redis

from engine.queue import slices
from engine.queue.lanes import FactsRequest, GateRequest, JobState, Lanes, LeaseRequest, PutRequest, SettleRequest
from engine.queue.slices import Contents, Row
from policy import keyspace
from policy.events import Batch, Event, Kind, encode_batch
from policy.valkey import EmbeddedServer, connect
from tests.world.queue_census import FAR
from tests.world.valkey_server import running_valkey

BOUND_US = 15.0
PEOPLE = 20_000
CHUNK = 1_000
SITE = "S" * 11
KEY = bytes(32)


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with running_valkey() as running:
        yield running


def server_cpu(server: EmbeddedServer) -> float:
    """Seconds of CPU, user and system, of all threads. /proc/pid/stat counts in 10 ms, schedstat in ns."""
    tasks = Path(f"/proc/{server.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class Meter:
    """CPU of both processes by step."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server
        self.worker: dict[str, float] = {}
        self.redis: dict[str, float] = {}

    def start(self) -> None:
        self._before = (time.process_time(), server_cpu(self._server))

    def stop(self, step: str) -> None:
        worker, redis = time.process_time() - self._before[0], server_cpu(self._server) - self._before[1]
        self.worker[step] = self.worker.get(step, 0.0) + worker
        self.redis[step] = self.redis.get(step, 0.0) + redis


def requests_of(chunk: int, partition: int) -> tuple[PutRequest, FactsRequest]:
    state = JobState(1, 2, 0, False, FAR, False, PEOPLE // 64)
    built = []
    for start in range(0, CHUNK, 64):
        people = range(start, min(start + 64, CHUNK))
        rows = [Row(f"first.last{i}", 1 << 62, (1 << 62) + i, 1, 1, [f"Reader {i}", "gold", i]) for i in people]
        contents = Contents("example.test", ["name", "tier", "points"], rows)
        built.append((0, slices.build(KEY, 1, 7, partition, "L" * 11, contents, expires_at=FAR)))
    rows_asked = [(hash((chunk, i)), os.urandom(12)) for i in range(CHUNK)]
    facts = FactsRequest(partition, 7, chunk, PEOPLE // 64, 1, 2, 0, rows_asked, [b"d" * 12] * CHUNK)
    return PutRequest(partition, 7, chunk, state, built), facts


def outcome(count: int) -> bytes:
    events = [
        Event(Kind.DELIVERED, (1 << 62) + i, 0, 1_760_000_000_000_000, 1 << 62, bytes(12), 0, 250, "2.0.0", 3)
        for i in range(count)
    ]
    return encode_batch(Batch(7, "example.test", events))


async def drive(redis: Redis, meter: Meter, partition: int) -> int:
    lanes = Lanes(redis, "host/worker-0")
    prepared = [requests_of(chunk, partition) for chunk in range(PEOPLE // CHUNK)]
    batch = {count: outcome(count) for count in (64, CHUNK % 64)}
    tags = [os.urandom(12) for _ in range(64)]
    meter.start()
    for _, facts in prepared:
        await lanes.facts([facts])
    meter.stop("facts")
    meter.start()
    for put, _ in prepared:
        await lanes.put([put])
    meter.stop("put")
    await lanes.assign(partition, "L" * 11, SITE)
    settled = 0
    while True:
        meter.start()
        (leased,) = await lanes.lease_many([LeaseRequest(partition, [(SITE, 8)])], ready_limit=16)
        meter.stop("lease")
        if not leased.slices:
            return settled
        counts = [lease.data[8] for lease in leased.slices]
        meter.start()
        answers = await lanes.gate_many(
            [
                GateRequest(partition, lease.slice_id, lease.token, tags[:count], b"d" * 12)
                for lease, count in zip(leased.slices, counts, strict=True)
            ]
        )
        meter.stop("gate")
        assert all(answer is not None and not any(answer.facts) for answer in answers)
        meter.start()
        await lanes.settle_many(
            [
                SettleRequest(partition, lease.slice_id, lease.token, range(count), events=batch[count])
                for lease, count in zip(leased.slices, counts, strict=True)
            ]
        )
        meter.stop("settle")
        settled += sum(counts)


def test_a_message_costs_the_queue_at_most_15_us(benchmark: BenchmarkFixture, server: EmbeddedServer) -> None:
    meter = Meter(server)
    partitions = iter(range(keyspace.PARTITIONS))

    async def run(meter: Meter) -> int:
        redis = connect(server.url)
        try:
            return await drive(redis, meter, next(partitions))
        finally:
            await redis.aclose()

    asyncio.run(run(Meter(server)))  # warm: scripts, caches
    rounds = 3
    settled = benchmark.pedantic(lambda: asyncio.run(run(meter)), rounds=rounds)  # type: ignore[no-untyped-call]  # its gap
    assert settled == PEOPLE
    steps = ("put", "lease", "gate", "settle")
    people = PEOPLE * rounds
    total = sum(meter.worker[step] + meter.redis[step] for step in steps) / people * 1e6
    figures = {
        f"{step}_{side}_us": round(cost[step] / people * 1e6, 2)
        for step in (*steps, "facts")
        for side, cost in (("worker", meter.worker), ("redis", meter.redis))
    }
    benchmark.extra_info.update(us_per_message=round(total, 2), bound=BOUND_US, **figures)
    print(json.dumps({"benchmark": "queue", **benchmark.extra_info}))
    assert total <= BOUND_US


def test_memory_of_a_waiting_recipient(server: EmbeddedServer) -> None:
    """Slices with three short fields, fingerprints included: what a million waiting people need of Redis."""

    async def run() -> tuple[float, float]:
        redis = connect(server.url)
        try:
            lanes = Lanes(redis, "host/worker-0")
            prepared = [requests_of(chunk, 1) for chunk in range(PEOPLE // CHUNK)]
            await lanes.facts([prepared[0][1]])
            await lanes.put([prepared[0][0]])
            before = await used(redis)
            for _, facts in prepared[1:]:
                await lanes.facts([facts])
            between = await used(redis)
            for put, _ in prepared[1:]:
                await lanes.put([put])
            people = PEOPLE - CHUNK
            assert await lanes.waiting(7, [1]) == PEOPLE
            return (between - before) / people, (await used(redis) - between) / people
        finally:
            await redis.aclose()

    async def used(redis: Redis) -> int:
        usage = await redis.info("memory")
        return int(usage["used_memory"])

    fingerprint, waiting = asyncio.run(run())
    print(
        json.dumps(
            {"benchmark": "queue_memory", "fingerprint_bytes": round(fingerprint, 1), "slice_bytes": round(waiting, 1)}
        )
    )
    assert fingerprint <= 32
    assert waiting <= 160


def test_keys_of_the_benchmark_are_ours() -> None:
    """The bound on memory counts on listpacks: a bucket must stay small at the sizes used here."""
    assert PEOPLE / (PEOPLE // 64) <= 128
    assert keyspace.SUPPRESSION_BUCKETS == 1024
