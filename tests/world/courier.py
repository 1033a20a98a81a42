"""One courier in this process, between a real Valkey and a scripted server: for tests that must look inside it.

    async with courier_world("dot.late.0.2") as world:
        job = world.job(window=..., priority=True)      a compiled campaign whose window the test opens and closes
        await world.put(job, ["ada", "bob"])            slices on the lanes of one domain
        await world.until(lambda: len(world.arrived()) == 2)

No policy floor, no intake, no SQL: jobs are made here, events stay in their streams. `CourierWorld.events` reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from engine.bounce.verp import ReturnPaths
from engine.delivery import pool
from engine.delivery.campaigns import Campaigns, Loaded
from engine.delivery.connection import Target
from engine.delivery.courier import Courier
from engine.delivery.site import Resolver, Site
from engine.message import Campaign, OpenSSLSigner, Program, compile_campaign, load_signer
from engine.queue import pace, schedule, slices
from engine.queue.journal import Journal, boot_id
from engine.queue.lanes import JobState, Lanes, PutRequest, Waiting
from engine.queue.permits import Permits
from engine.queue.windows import Window
from engine.smtp.words import Tls
from policy import keyspace
from policy.events import Event, decode_batch
from policy.gate import Mode
from policy.instants import week_of
from policy.keys import Keyring
from tests.chaos.sink import Entry, Sink, read_record
from tests.chaos.sink_script import parse
from tests.world.servers import ValkeyServer, short_folder, valkey_server
from tracker.links import Links

DOMAIN = "people.test"
SENDER = "letter.example"


@dataclass(frozen=True, slots=True, eq=False)
class Job(Loaded):
    """A job whose delivery window a test opens and closes: shut is [0.0] while it is open, else seconds."""

    priority: bool = False
    shut: list[float] = field(default_factory=lambda: [0.0])

    def opens_in(self, now_us: int) -> float:
        return self.shut[0]


def make_job(number: int, keyring: Keyring, *, priority: bool = False, window: Window | None = None) -> Job:
    """A campaign with a link, and everything else that makes tokens; transactional with priority."""
    program = compile_campaign(
        Campaign(
            "Hello {{ name }}",
            f"hello@{SENDER}",
            html='<p>Dear {{ name }}, <a href="https://shop.example/offer">look</a></p>',
            bulk=not priority,
            list_id="" if priority else f"letter.{SENDER}",
            account_name="The Shop",
            postal_address="1 High Street",
        )
    )
    assert isinstance(program, Program), program
    return Job(
        number, os.urandom(32), 0 if priority else 1, program, [_signer()],
        Links(keyring.token, keyring.token_id, "https://track.example"),
        ReturnPaths(keyring.return_path, keyring.return_path_id, "bounce.example"),
        window, priority,
    )  # fmt: skip


def row(name: str, place: int = 0) -> slices.Row:
    """Somebody who agreed to everything that makes a token."""
    return slices.Row(name, 100 + place, 200 + place, Mode.INDIVIDUAL, Mode.INDIVIDUAL, [name.title()])


@dataclass
class CourierWorld:
    """courier: running; lanes: of a holder of its own, for putting; keyring: of everything sealed here."""

    folder: Path
    server: ValkeyServer
    lanes: Lanes
    keyring: Keyring
    courier: Courier
    record: Path
    jobs: dict[int, Job]
    chunks: int = 0

    def job(self, *, priority: bool = False, window: Window | None = None) -> Job:
        made = make_job(len(self.jobs) + 1, self.keyring, priority=priority, window=window)
        self.jobs[made.number] = made
        return made

    async def put(
        self,
        job: Job,
        names: Sequence[str],
        *,
        expires_in: float = 3600.0,
        due: int = 0,
        domain: str = DOMAIN,
        resend: bool = False,
    ) -> None:
        """Queue one recipient a name, as expansion would; one slice for every 64."""
        expires = time.time_ns() // 1000 + round(expires_in * 1e6)
        partition, lane = keyspace.partition_of(domain), keyspace.lane_ref(domain, self.keyring.lane)
        flags = (slices.FLAG_PRIORITY if job.priority else 0) | (slices.FLAG_RESEND if resend else 0)
        rows = [row(name, place) for place, name in enumerate(names)]
        built = []
        for start in range(0, len(rows), slices.MAX_ROWS):
            contents = slices.Contents(domain, ["name"], rows[start : start + slices.MAX_ROWS])
            data = slices.build(
                self.keyring.queue[self.keyring.queue_id], self.keyring.queue_id, job.number, partition, lane, contents,
                expires_at=expires, flags=flags,
            )  # fmt: skip
            built.append((due, data))
        self.chunks += 1
        state = JobState(1, 0, 0, job.priority, expires, resend, 1)
        assert await self.lanes.put([PutRequest(partition, job.number, self.chunks, state, built)]) == [True]

    def arrived(self) -> list[Entry]:
        """What the server took, in the order in which its ends came."""
        return sorted(
            (e for e in read_record(self.record) if e.accepted), key=lambda e: (e.t_dot or 0.0, e.transaction)
        )

    def names(self) -> list[str]:
        return [entry.rcpt.partition("@")[0] for entry in self.arrived()]

    async def events(self, domain: str = DOMAIN) -> list[Event]:
        """Everything told to the ledger about a domain, in order."""
        stream: Any = await self.server.client.xrange(keyspace.events(keyspace.partition_of(domain)))
        return [event for _, fields in stream for event in decode_batch(fields[b"b"]).events]

    async def waiting(self, domain: str = DOMAIN) -> list[Waiting]:
        """Every slice of a domain's lane."""
        return await self.lanes.lane_slices(keyspace.partition_of(domain), keyspace.lane_ref(domain, self.keyring.lane))

    async def sites(self, domain: str = DOMAIN) -> list[str]:
        """Those that lanes of the domain's partition are assigned to."""
        told: Any = await self.server.client.hvals(keyspace.lane_sites(keyspace.partition_of(domain)))
        return sorted({site.decode() for site in told})

    async def now_us(self) -> int:
        """Redis TIME."""
        seconds, micros = await self.server.client.time()
        return int(seconds) * 1_000_000 + int(micros)

    async def until(self, is_so: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for something nobody can call us about."""
        async with asyncio.timeout(seconds):
            while not is_so():
                await asyncio.sleep(0.03)


class _Jobs(Campaigns):
    """Campaigns without SQL."""

    def __init__(self, jobs: dict[int, Job]) -> None:
        self.jobs = jobs
        self.nothing = Loaded(0, b"", 0, None, (), None, None)

    async def get(self, number: int) -> Loaded | None:
        return self.jobs.get(number)


class _OneSite(Resolver):
    """Every domain's mail goes to our server."""

    def __init__(self, port: int) -> None:
        self.site = Site("sink", (Target("sink.test", "127.0.0.1", port),), Tls.NEVER)

    async def resolve(self, domain: str) -> Site:
        return self.site


@functools.cache
def _signer() -> OpenSSLSigner:
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return load_signer(SENDER, "s1", pem)


@contextlib.asynccontextmanager
async def courier_world(
    words: str = "",
    *,
    connections: int = 1,
    retry: schedule.Retry | None = None,
    keep: bool = False,
) -> AsyncIterator[CourierWorld]:
    """words: the script of the one port (tests.chaos.sink_script); keep: messages are kept in folder/kept."""
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        server = await stack.enter_async_context(valkey_server())
        record = folder / "sink.jsonl"
        sink = Sink([("sink", 0, parse(words))], record=record, keep=folder / "kept" if keep else None)
        ports, _ = await sink.start()
        stack.push_async_callback(sink.stop)
        keyring = Keyring.create(folder / "keys", week_of(time.time_ns() // 1000))
        journal = Journal.open(folder / "journal", "here:0:1", boot_id())
        stack.push_async_callback(journal.close)
        jobs: dict[int, Job] = {}
        courier = Courier(
            redis=server.client,
            lanes=Lanes(server.client, "here:0:1"),
            permits=Permits(server.client),
            journal=journal,
            campaigns=_Jobs(jobs),
            resolver=_OneSite(ports["sink"]),
            keyring=lambda: keyring,
            limits=lambda site: (pool.Limits(connections=connections), pace.Profile(start=float(connections))),
            retry=retry or schedule.Retry(schedule=(0.3,)),
            hello="us.example",
            patience={},
            lease_seconds=10.0,
            settle_seconds=0.05,
        )
        running = asyncio.create_task(courier.run())

        async def end() -> None:
            await courier.drain(5.0)
            await asyncio.wait_for(running, 10.0)

        stack.push_async_callback(end)
        yield CourierWorld(folder, server, Lanes(cast(Any, server.client), "putter"), keyring, courier, record, jobs)
