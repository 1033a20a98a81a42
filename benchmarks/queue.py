"""``make bench-queue``: what the queue costs a recipient in memory and CPU; last, one line of JSON.

    python -m benchmarks.queue [--people N] [--tail-domains N] [--tail-sites N] [--suppressed N] [--only LOAD]

Three loads on a server of their own, ``appendfsync always`` as in production, driven through `engine.queue.lanes`:

- ``few``   a million recipients (address and two fields) over 20 domains: memory with the duplicates' index, CPU of
  worker and server for put, lease, gate and settle (bounds: 100 bytes, 15 us)
- ``tail``  a million over 400 thousand domains that share 4,000 sites, so slices hold one or two: leases name no site
  at first and learn it (bounds: 350 bytes, 60 us)
- ``single``  the same with neighbours that share nothing, a fifth of it: slices of one, for comparison
- ``suppressed``  a million suppressed addresses (bound: 32 bytes an entry)

Memory is what the server says it uses (``used_memory``) beyond the empty server, divided by recipients; CPU is process
time here plus /proc schedstat there, so other load on the machine does not count. Sealing and packing of slices is done
before the clock starts: it is campaign.expand's, measured by benchmarks/test_expand.py. Exit code 1 when a bound is
broken.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from benchmarks.test_queue import Meter
from engine.campaign.acceptance import ROWS_A_BUCKET
from engine.delivery.leasing import FEW
from engine.queue import slices
from engine.queue.lanes import FactsRequest, GateRequest, JobState, Lanes, LeaseRequest, PutRequest, SettleRequest
from engine.queue.slices import Contents, Row
from policy import keyspace, suppression
from policy.address import domain_tag, mref_of, normalise, tag_of
from policy.events import Batch, Event, Kind, Reason, encode_batch
from policy.valkey import EmbeddedServer, call, connect
from tests.world.queue_census import FAR
from tests.world.valkey_server import running_valkey

JOB = 7
CHUNK = 1_000
KEY, PEPPER, JOB_KEY, LANE_KEY = (bytes([n]) * 32 for n in range(1, 5))
BOUNDS = {
    "few_bytes": 100.0,
    "few_us": 15.0,
    "tail_bytes": 350.0,
    "tail_us": 60.0,
    "suppressed_bytes": 32.0,
}
STEPS = ("put", "lease", "assign", "gate", "settle")


@dataclass(frozen=True)
class Load:
    """people over domains, which share sites; chunks as intake makes them."""

    name: str
    people: int
    domains: int
    sites: int
    pairs: bool = True

    def domain(self, number: int) -> int:
        """Of five people in a row two and two are colleagues, so slices of a long tail hold one or two; without pairs
        neighbours are at unrelated domains."""
        if self.pairs:
            block, place = divmod(number, 5)
            number = 2 * block + place // 2 if place < 4 else 2 * block + 1 + self.domains // 2
        return (number * 2_654_435_761) % self.domains

    def site(self, domain: int) -> str:
        return keyspace.site_ref(f"mx{domain % self.sites}.test", LANE_KEY)


@dataclass
class Share:
    """A chunk's part in one partition, ready to be asked about and put."""

    facts: FactsRequest
    put: PutRequest


@dataclass
class Lane:
    partition: int
    name: str
    site: str
    tag: bytes


@dataclass
class World:
    load: Load
    lanes: dict[str, Lane] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def _lane(world: World, domain: int) -> Lane:
    name = f"d{domain}.example"
    partition = keyspace.partition_of(name)
    reference = keyspace.lane_ref(name, LANE_KEY)
    known = world.lanes.get(reference)
    if known is None:
        known = Lane(partition, reference, world.load.site(domain), domain_tag(PEPPER, name))
        world.lanes[reference] = known
    return known


def chunk(world: World, number: int) -> list[Share]:
    """One chunk of the audience, cut as expansion cuts it."""
    load = world.load
    by_partition: dict[int, dict[int, list[tuple[Row, int, bytes]]]] = {}
    for i in range(number * CHUNK, min((number + 1) * CHUNK, load.people)):
        domain = load.domain(i)
        lane = _lane(world, domain)
        local = f"first.last{i}"
        normalised = normalise(local, f"d{domain}.example")
        row = Row(local, (1 << 62) + i, (1 << 61) + i, 1, 1, [f"Reader {i}", "gold"])
        asked = (row, mref_of(JOB_KEY, normalised), tag_of(PEPPER, normalised))
        by_partition.setdefault(lane.partition, {}).setdefault(domain, []).append(asked)
    buckets = 1 + load.people // ROWS_A_BUCKET
    state = JobState(1, 2, 0, False, FAR, False, buckets)
    shares = []
    for partition, domains in by_partition.items():
        built: list[tuple[int, bytes]] = []
        rows: list[tuple[int, bytes]] = []
        tags: list[bytes] = []
        for domain, people in domains.items():
            lane = _lane(world, domain)
            contents = [person for person, _, _ in people]
            for start, end in slices.cut_rows(contents):
                body = Contents(f"d{domain}.example", ["name", "tier"], contents[start:end])
                built.append((0, slices.build(KEY, 1, JOB, partition, lane.name, body, expires_at=FAR)))
            rows += [(mref, tag) for _, mref, tag in people]
            tags += [lane.tag] * len(people)
        facts = FactsRequest(partition, JOB, number, buckets, 1, 2, 0, rows, tags)
        shares.append(Share(facts, PutRequest(partition, JOB, number, state, built)))
    return shares


def outcomes(header: slices.Header) -> bytes:
    # what a settle carries in production: one event a recipient, an mref and a pseudonym of 63 bits, a 12-byte tag
    events = [
        Event(Kind.DELIVERED, (1 << 62) + i, 0, 1_760_000_000_000_000, 1 << 62, bytes(12), 0, 250, "2.0.0", 3)
        for i in range(header.count)
    ]
    return encode_batch(Batch(JOB, "example.test", events))


async def used(redis: Redis) -> int:
    told = await redis.info("memory")
    return int(told["used_memory"])


async def fill(lanes: Lanes, load: Load, world: World, meter: Meter, say: Progress) -> None:
    for number in range(-(-load.people // CHUNK)):
        shares = chunk(world, number)
        meter.start()
        await lanes.facts([share.facts for share in shares])
        meter.stop("facts")
        meter.start()
        await lanes.put([share.put for share in shares])
        meter.stop("put")
        say.told(f"{load.name}: put", (number + 1) * CHUNK, load.people)


async def empty(redis: Redis, lanes: Lanes, world: World, meter: Meter, say: Progress) -> int:
    """Lease, learn sites, gate, settle, until nothing is left; how many were settled. As the courier does it: several
    partitions a round, all due sites of each that answered with one."""
    settled = 0
    ready: dict[int, list[str]] = {partition: [] for partition in range(keyspace.PARTITIONS)}
    held: dict[int, bytes] = {}
    while ready:
        requests = [LeaseRequest(p, [(site, 8) for site in sites], 32) for p, sites in ready.items()]
        meter.start()
        answers = await lanes.lease_many(requests)
        meter.stop("lease")
        ready = {}
        for answer in answers:
            sites = [site for site, due in answer.ready if site != keyspace.UNRESOLVED and due <= answer.now_us]
            if answer.ready:
                ready[answer.partition] = sites
        leases = [lease for answer in answers for lease in answer.slices]
        if not leases:
            continue
        fresh = [lease for lease in leases if lease.site == keyspace.UNRESOLVED and lease.others >= FEW]
        meter.start()
        for lease in fresh:
            await lanes.assign(lease.partition, lease.lane, world.lanes[lease.lane].site)
        meter.stop("assign")
        headers = [slices.parse_header(lease.data) for lease in leases]
        parsed = [header for header in headers if isinstance(header, slices.Header)]
        assert len(parsed) == len(leases)
        tags = [os.urandom(12) for _ in range(64)]
        for header in parsed:
            if header.count not in held:
                held[header.count] = outcomes(header)
        questions = [
            GateRequest(lease.partition, lease.slice_id, lease.token, tags[: header.count], world.lanes[lease.lane].tag)
            for lease, header in zip(leases, parsed, strict=True)
        ]
        meter.start()
        told = await lanes.gate_many(questions)
        meter.stop("gate")
        assert all(answer is not None and not any(answer.facts) for answer in told)
        ends = [
            SettleRequest(lease.partition, lease.slice_id, lease.token, range(header.count), events=held[header.count])
            for lease, header in zip(leases, parsed, strict=True)
        ]
        meter.start()
        await lanes.settle_many(ends)
        meter.stop("settle")
        settled += sum(header.count for header in parsed)
        say.told(f"{world.load.name}: settled", settled, world.load.people)
        if settled % 50_000 < 2_000:  # the writer's part: streams are drained as they fill
            for partition in range(keyspace.PARTITIONS):
                await redis.xtrim(keyspace.events(partition), maxlen=0, approximate=False)
    return settled


class Progress:
    """A line on stderr every two seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def told(self, what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 2.0
            print(f"  {what} {done:,} of {of:,}", file=sys.stderr, flush=True)


async def queue(server: EmbeddedServer, load: Load, say: Progress) -> dict[str, Any]:
    """Figures of one load."""
    redis = connect(server.url)
    try:
        await call(redis, "FLUSHALL", "SYNC")  # else the last load is still being freed when memory is looked at
        lanes, world, meter = Lanes(redis, "host/worker-0"), World(load), Meter(server)
        before = await used(redis)
        await fill(lanes, load, world, meter, say)
        held = (await used(redis) - before) / load.people
        gc.collect()  # as the worker does (engine.worker): what is alive need not be looked at again
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        settled = await empty(redis, lanes, world, meter, say)
        assert settled == load.people, f"{settled} of {load.people} came back"
        figures: dict[str, Any] = {"people": load.people, "domains": load.domains, "sites": load.sites}
        figures["bytes"] = round(held, 1)
        us = {
            f"{step}_{side}_us": round(cost.get(step, 0.0) / load.people * 1e6, 2)
            for step in (*STEPS, "facts")
            for side, cost in (("worker", meter.worker), ("redis", meter.redis))
        }
        figures["us"] = round(sum(value for name, value in us.items() if not name.startswith("facts")), 2)
        return {**figures, **us}
    finally:
        await redis.aclose()


def entries(count: int) -> Iterator[Sequence[suppression.Field]]:
    batch: list[suppression.Field] = []
    for i in range(count):
        name = f"d{i % 5_000}.example"
        tag = tag_of(PEPPER, f"gone{i}@{name}")
        cell = b"\x02\x00\x00\x00\x01" + bytes((int(Reason.SUPPRESSED),))
        batch.append(suppression.Field(keyspace.partition_of(name), tag, cell))
        if len(batch) == 5_000:
            yield batch
            batch = []
    if batch:
        yield batch


async def suppressed(server: EmbeddedServer, count: int, say: Progress) -> float:
    """Bytes an entry."""
    redis = connect(server.url)
    try:
        await call(redis, "FLUSHALL", "SYNC")
        before, done = await used(redis), 0
        for batch in entries(count):
            await suppression.push(redis, batch)
            done += len(batch)
            say.told("suppressed", done, count)
        return (await used(redis) - before) / count
    finally:
        await redis.aclose()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description=__doc__)
    parser.add_argument("--people", type=int, default=1_000_000, help="recipients in the queue")
    parser.add_argument("--tail-domains", type=int, default=400_000, help="domains of the long tail")
    parser.add_argument("--tail-sites", type=int, default=4_000, help="MX sets those domains share")
    parser.add_argument("--only", default="", help="one of few, tail, single; default all, and the suppressed")
    parser.add_argument("--suppressed", type=int, default=1_000_000, help="suppressed addresses")
    asked = parser.parse_args()
    say = Progress()
    figures: dict[str, Any] = {"benchmark": "queue"}
    with running_valkey() as server:
        for load in (
            Load("few", asked.people, 20, 20),
            Load("tail", asked.people, asked.tail_domains, asked.tail_sites),
            Load("single", asked.people // 5, asked.tail_domains // 5, asked.tail_sites // 5, pairs=False),
        ):
            if asked.only not in ("", load.name):
                continue
            told = asyncio.run(queue(server, load, say))
            figures |= {f"{load.name}_{name}": value for name, value in told.items()}
        if not asked.only:
            figures["suppressed_bytes"] = round(asyncio.run(suppressed(server, asked.suppressed, say)), 1)
    bounds = {name: bound for name, bound in BOUNDS.items() if name in figures}
    broken = {name: figures[name] for name, bound in bounds.items() if figures[name] > bound}
    figures["bounds"], figures["broken"] = bounds, sorted(broken)
    for name, bound in bounds.items():
        print(f"{name:<18} {figures[name]:>8} (at most {bound:g}){'  BROKEN' if name in broken else ''}")
    print(json.dumps(figures))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
