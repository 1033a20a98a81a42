"""From XADD to the lanes, over a real Valkey and the real SQL writer: nothing lost, nothing twice, refusals told."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from sqlalchemy import select

from engine.campaign import acceptance
from engine.campaign.claims import Limits
from engine.campaign.intake import Intake
from engine.client import AsyncProducer, JobProblem, Producer, chunks
from engine.queue.lanes import Lanes, LeaseRequest
from engine.queue.slices import Contents, Header, Lost, open_slice
from policy import keyspace, schema
from policy.address import mref_of, normalise, tag_of
from policy.events import Batch, Event, Kind, encode_batch
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US, SECOND_US, rfc3339, week_of
from policy.keys import Keyring, open_sealed
from policy.ledger import JobStatus, Reader
from policy.schema import open_store
from policy.settings import Officer, PolicySettings
from policy.suppression import Scope
from policy.valkey import Client, connect
from policy.wire import SuppressionRecord, WriterClient
from policy.writer import Writer
from tests.engine.test_job import THIRTY, good
from tests.world.valkey_server import running_valkey

YES = {"source": "form", "time": "2026-03-01T10:00:00Z", "wording": "v2"}


@dataclass
class Clock:
    """Time moves when a test says so."""

    ahead: int = 0

    def __call__(self) -> int:
        return time.time_ns() // 1000 + self.ahead


class Crash(Exception):
    """The worker is gone at this instruction."""


class CrashingLanes(Lanes):
    """Counts calls to the store and dies at one of them, before or after it had its effect."""

    calls = 0
    crash_at = -1

    def _step(self) -> None:
        self.calls += 1
        if self.calls == self.crash_at:
            raise Crash

    async def facts(self, requests: Any) -> list[bytes]:
        self._step()
        answer = await super().facts(requests)
        self._step()
        return answer

    async def put(self, requests: Any) -> list[bool]:
        self._step()
        done = []
        for request in requests:
            done += await super().put([request])
            self._step()
        return done


@dataclass
class World:
    redis: Client
    url: str
    writer: WriterClient
    keyring: Keyring
    settings: PolicySettings
    clock: Clock
    reader: Reader
    intakes: list[Intake] = field(default_factory=list)

    def intake(self, name: str = "w1", *, lanes: Lanes | None = None, idle: float = 60.0) -> Intake:
        made = Intake(
            self.redis, lanes or Lanes(self.redis, name), self.writer,
            open_store(self.settings.sql_address(), writer=False), lambda: self.keyring, lambda: {"acme.example"},
            name, {}, limits=Limits(claim_idle=idle), clock=self.clock,
        )  # fmt: skip
        self.intakes.append(made)
        return made

    def job(self, **changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "created_at": rfc3339(self.clock()),
            "from": {"address": "news@acme.example", "name": "Acme"},
            "legal_basis": {"basis": "legitimate-interest"},
            "postal_address": "1 Road, Town",
        }
        return good(**{**base, **changes})

    async def submit(self, job: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> None:
        async with AsyncProducer(self.url) as producer:
            await producer.submit(job, rows)

    async def add(self, **fields: Any) -> None:
        await self.redis.xadd(keyspace.INTAKE, cast(dict[Any, Any], fields))

    async def settle(self, *intakes: Intake, until: Callable[[], bool] | None = None) -> None:
        """Rounds until the stream is empty (or `until` holds); a bound instead of a sleep."""
        for _ in range(400):
            for intake in intakes:
                await intake.step()
            if until() if until is not None else await self.redis.xlen(keyspace.INTAKE) == 0:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"the intake does not come to rest: {[intake.counts for intake in intakes]}")

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # another task's commit
                await asyncio.sleep(0.01)

    async def slices(self) -> list[tuple[Header, Contents]]:
        found = []
        async for key in self.redis.scan_iter(match="sp:*:s:*", count=1000):
            data = await self.redis.get(key)
            assert isinstance(data, bytes)
            opened = open_slice(self.keyring.queue, int(key[5:7]), data)
            assert not isinstance(opened, Lost)
            found.append(opened)
        return found

    async def queued(self, job_id: str = "") -> list[str]:
        """Addresses in the lanes, of one job or of all."""
        number = self.status(job_id).number if job_id else 0
        return sorted(
            f"{row.local}@{contents.domain}"
            for header, contents in await self.slices()
            for row in contents.rows
            if number in (0, header.job)
        )

    def status(self, job_id: str = "letter-47") -> JobStatus:
        found = self.reader.job_status(f"acme/{job_id}", self.clock())
        assert found is not None
        return found

    async def refused(self, job_id: str = "letter-47", *, rows: int) -> dict[str, int]:
        """Refusals by reason, once the ledger has that many terminal rows."""
        for _ in range(1000):
            found = self.status(job_id)
            if found.terminal >= rows:
                return found.reasons.get("refused", {})
            await asyncio.sleep(0.01)
        raise AssertionError(f"the ledger has {self.status(job_id)}")

    async def rejected(self, stream: str = keyspace.REJECTED, aad: bytes = b"rejected") -> list[dict[str, Any]]:
        entries: Any = await self.redis.xrange(stream)
        return [msgspec.msgpack.decode(open_sealed(self.keyring.service, f[b"sealed"], aad)) for _, f in entries]

    async def pending(self) -> int:
        told: Any = await self.redis.xpending(keyspace.INTAKE, keyspace.INTAKE_GROUP)
        return int(told["pending"])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_valkey() as running:
        yield running.url


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sp-intake-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def world(server: str, folder: Path) -> AsyncIterator[World]:
    redis = connect(server)
    await redis.flushall()
    clock = Clock()
    keyring = Keyring.create(folder / "keys", week_of(clock()))
    settings = PolicySettings(
        officer=Officer(name="DPO", address="dpo@acme.example"), data_dir=folder, redis_url=server,
        bounce_domain="bounce.acme.example",
    )  # fmt: skip
    policy = Writer(settings, keyring, clock=clock)
    await policy.start()
    engine = open_store(settings.sql_address(), writer=False)
    writer = WriterClient(settings.writer_socket)
    made = World(redis, server, writer, keyring, settings, clock, Reader(engine))
    try:
        await writer.account_add("acme", display_name="Acme", postal_address="1 Road", opens_mode=3, clicks_mode=3)
        await made.intake("first").prepare()
        yield made
    finally:
        await writer.close()
        await policy.stop()
        for intake in made.intakes:
            intake.engine.dispose()
        engine.dispose()
        await redis.aclose()


def people(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"address": f"p{n}@d{n % 7}.example", "name": f"P{n}", "fields": {"points": n}}
        for n in range(first, first + count)
    ]


async def test_a_job_with_its_people_reaches_the_lanes(world: World) -> None:
    rows = [
        {"address": "Ada@one.example", "name": "Ada"},
        {"address": "bob@two.example", "name": "Bob"},
        {"address": "nobody", "name": "X"},
        {"address": "ada@one.example", "name": "Twin"},
        {"address": "blocked@two.example", "name": "B"},
        {"address": "anonymous@two.example"},
    ]
    tag = tag_of(world.keyring.pepper, normalise("blocked", "two.example"))
    block = SuppressionRecord(tag, keyspace.partition_of("two.example"), Scope.PLATFORM, 0, "manual")
    await world.writer.suppress([block])
    await world.submit(world.job(recipients=rows))
    intake = world.intake()
    await world.settle(intake)
    assert await world.queued() == ["Ada@one.example", "bob@two.example"]
    assert await world.pending() == 0
    assert await world.refused(rows=4) == {"invalid": 2, "duplicate": 1, "suppressed": 1}
    status = world.status()
    assert (status.state, status.rows_submitted, status.waiting) == ("sending", 6, 2)
    for header, contents in await world.slices():
        assert contents.columns == ["name"]
        assert header.job == status.number
    payload = world.reader.job_payload(status.number)
    assert payload is not None
    terms, expansion = acceptance.terms(payload, world.keyring)
    assert (expansion.required, expansion.one_line) == (["name"], ["name"])
    assert terms.job_key not in (payload.job_key, payload.payload)


async def test_a_lost_job_is_taken_up_under_the_key_that_named_its_people(world: World) -> None:
    """T12: with another key whoever had an end would be somebody else, and be written to again."""
    job = world.job(recipients=people(3))
    await world.submit(job)
    await world.settle(world.intake("one"))
    number = world.status().number
    stored = world.reader.job_payload(number)
    assert stored is not None
    terms, _ = acceptance.terms(stored, world.keyring)
    people_of = {mref_of(terms.job_key, f"p{n}@d{n}.example") for n in range(3)}
    await world.writer.job_state(number, "lost")
    async for key in world.redis.scan_iter(match="sp:*"):  # what a restored store does not hold
        await world.redis.delete(key)
    lost = [Event(Kind.LOST, mref, 1, world.clock()) for mref in people_of]
    await world.redis.xadd(keyspace.events(3), {"b": encode_batch(Batch(number, "d0.example", lost))})
    await world.until(lambda: world.status().done_at is not None)
    two = world.intake("two")
    await world.submit(job)
    await world.settle(two)
    assert (world.status().number, world.status().state) == (number, "sending")
    again, _ = await two.filling.terms(number, "")
    assert again.job_key == terms.job_key
    assert len(await world.queued()) == 3


async def test_two_workers_share_an_audience_in_any_order(world: World) -> None:
    rows = people(2500) + people(300)  # the last 300 are there already
    job = world.job(audience={"chunks": 3}, recipients=...)
    cut = [data for data, _ in chunks(rows)]
    await world.add(job=json.dumps(job))
    for number in (2, 0, 1):
        await world.add(audience=job["job_id"], account="acme", n=number, data=cut[number])
    one, two = world.intake("one"), world.intake("two")
    for intake in (one, two):
        intake.claims.limits = Limits(claim=2)
    await world.settle(one, two)
    assert one.counts.entries + two.counts.entries == 4
    assert one.counts.rows + two.counts.rows == 2800
    assert min(one.counts.entries, two.counts.entries) >= 1
    assert await world.queued() == sorted(row["address"] for row in people(2500))
    assert await world.refused(rows=300) == {"duplicate": 300}
    assert world.status().rows_submitted == 2800


async def test_thirty_mistakes_come_back_at_once_and_sealed(world: World) -> None:
    await world.add(job=json.dumps({**THIRTY, "job_id": "thirty", "account": "acme", "text": "{{ name"}))
    intake = world.intake()
    await world.settle(intake)
    [body] = await world.rejected()
    assert len(body["problems"]) >= 30
    assert (body["account"], body["job_id"], body["entry"]) == ("acme", "thirty", "job")
    assert "$.text" in {path for path, _, _ in body["problems"]}
    assert intake.counts.rejected == 1
    assert await world.pending() == 0
    raw: Any = await world.redis.xrange(keyspace.REJECTED)
    assert b"thirty" not in repr(raw).encode()


async def test_a_producer_reads_what_became_of_its_jobs(world: World) -> None:
    """T0: with nothing but Redis; over a connection that decodes, too; a refusal says everything, a repeat no harm."""
    text = world.url + ("&" if "?" in world.url else "?") + "decode_responses=True"
    async with AsyncProducer(world.url) as producer:
        assert await producer.status("acme", "letter-47") is None
        await world.submit(world.job(recipients=people(5), html="<p>{{ nmae }}</p>"))
        await world.settle(world.intake())
        wrong = await producer.status("acme", "letter-47")
        assert wrong is not None
        assert (wrong.state, wrong.rows, wrong.counts) == ("rejected", None, {})
        assert wrong.problems_total == len(wrong.problems)
        assert isinstance(wrong.problems[0], JobProblem)
        assert any(path == "$.html" and "nmae" in message for path, message, _ in wrong.problems)
        assert wrong.reason.startswith(wrong.problems[0].path)

        def ask() -> Any:
            with Producer(text) as sync:
                return sync.status("acme", "letter-47")

        assert await asyncio.to_thread(ask) == wrong
        job = world.job(recipients=people(5))  # mended: the id was free
        await world.submit(job)
        await world.settle(world.intake())
        for _ in range(1000):
            right = await producer.status("acme", "letter-47")
            if right is not None and right.state == "sending":
                break
            await asyncio.sleep(0.01)
        assert right is not None
        assert (right.state, right.reason, right.rows, right.problems) == ("sending", "", 5, [])
        await world.submit({**job, "subject": "Other"})  # a conflict: told, and the job goes on
        await world.settle(world.intake())
        taken = await producer.status("acme", "letter-47")
        assert taken is not None
        assert (taken.state, taken.rows) == ("sending", 5)
        assert [problem.path for problem in taken.problems] == ["$.job_id"]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"account": "stranger"}, "$.account"),
        ({"from": {"address": "news@other.example"}}, "$.from.address"),
        ({"html": "<p>{{ nmae }}</p>"}, "$.html"),
        ({"html": "<p>{{ name </p>"}, "$.html"),
        ({"subject": "{% if %}"}, "$.subject"),
    ],
)
async def test_what_only_the_house_can_know_is_told_too(world: World, changes: dict[str, Any], path: str) -> None:
    await world.submit(world.job(**changes))
    await world.settle(world.intake())
    [body] = await world.rejected()
    assert path in {place for place, _, _ in body["problems"]}


async def test_a_frozen_account_sends_nothing(world: World) -> None:
    await world.writer.account_freeze("acme", True)
    await world.submit(world.job())
    await world.settle(world.intake())
    [body] = await world.rejected()
    assert [path for path, _, _ in body["problems"]] == ["$.account"]
    assert await world.queued() == []


async def test_the_same_job_again_has_no_effect_another_is_a_conflict(world: World) -> None:
    job = world.job(recipients=people(5))
    intake = world.intake()
    await world.submit(job)
    await world.settle(intake)
    before = await world.queued()
    await world.submit(job)
    await world.submit({**job, "subject": "Other"})
    await world.settle(intake)
    assert await world.queued() == before
    assert intake.counts.accepted == 1
    [body] = await world.rejected()
    assert [path for path, _, _ in body["problems"]] == ["$.job_id"]
    assert world.status().rows_submitted == 5


async def test_other_bytes_under_a_known_number_stop_the_job(world: World) -> None:
    job = world.job(audience={"chunks": 3}, recipients=...)
    intake = world.intake()
    await world.add(job=json.dumps(job))
    for data in (b'{"address": "a@one.example", "name": "A"}', b'{"address": "b@one.example", "name": "B"}'):
        await world.add(audience=job["job_id"], account="acme", n=0, data=data)
        await world.settle(intake)
    assert world.status().state == "cancelled"
    assert "twice" in world.status().reason
    assert len(await world.rejected()) == 1


async def test_a_worker_may_die_anywhere(world: World) -> None:
    """T2: crash before or after any question or put, another worker takes over, and everyone is there exactly once."""
    rows = [*people(40), {"address": "nobody", "name": "N"}, *people(3)]
    crash_at = 0
    died = True
    while died:
        crash_at += 1
        name = f"round-{crash_at}"
        lanes = CrashingLanes(world.redis, "victim")
        lanes.crash_at = crash_at
        victim, heir = world.intake("victim", lanes=lanes), world.intake("heir", idle=0.0)
        await world.submit(world.job(job_id=name, recipients=...), rows)
        while lanes.calls < crash_at and await world.redis.xlen(keyspace.INTAKE):
            await victim.step()
        died = lanes.calls >= crash_at
        await world.settle(heir)
        assert await world.queued(name) == sorted(row["address"] for row in people(40)), crash_at
        assert await world.refused(name, rows=4) == {"invalid": 1, "duplicate": 3}
        assert world.status(name).rows_submitted == 44
    assert crash_at > 8
    assert await world.rejected() == []


async def test_poison_ends_in_the_dead_stream_and_others_go_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = acceptance.review

    def poisoned(reading: Any, *rest: Any, **named: Any) -> Any:
        if reading.job_id == "poison":
            raise RuntimeError("a bug of ours")
        return whole(reading, *rest, **named)

    monkeypatch.setattr(acceptance, "review", poisoned)
    await world.submit(world.job(job_id="poison"))
    await world.submit(world.job())
    intake = world.intake(idle=0.0)
    await world.settle(intake)
    assert await world.queued() == ["ada@one.example"]
    assert await world.rejected() == []
    [body] = await world.rejected(keyspace.DEAD, b"dead")
    assert b"poison" in body["payload"]
    assert (intake.counts.failures, intake.counts.dead) == (5, 1)
    assert await world.pending() == 0


async def test_garbage_is_refused_without_harm(world: World) -> None:
    for fields in (
        {"x": "y"},
        {"job": b"\xff\x00"},
        {"sealed": b"nonsense"},
        {"audience": b"\xff", "n": b"1"},
        {"audience": "letter-47", "n": "-1", "data": ""},
        {"audience": "letter-47", "n": "9" * 30, "data": ""},
        {"audience": "letter-47", "account": "acme", "n": "5", "data": "{}"},
        {"held": "1", "n": "0", "sealed": b"x" * 60},
        {"held": b"\xff", "n": b"\xff", "sealed": b""},
    ):
        await world.add(**fields)
    await world.submit(world.job())
    intake = world.intake()
    await world.settle(intake, until=lambda: intake.counts.entries >= 9)
    await world.settle(intake)
    assert await world.queued() == ["ada@one.example"]
    assert len(await world.rejected()) == 8
    assert intake.counts.dropped == 1  # the entry that came before its job
    assert intake.counts.failures == 0


async def test_an_entry_that_cannot_be_opened_or_read_stops_its_job(world: World) -> None:
    job = world.job(audience={"chunks": 2}, recipients=...)
    await world.add(job=json.dumps(job))
    await world.add(audience=job["job_id"], account="acme", n=0, sealed=b"for another service" * 9)
    await world.settle(world.intake())
    assert world.status().state == "cancelled"


async def test_rows_that_cannot_be_read_are_refused_alone(world: World) -> None:
    job = world.job(audience={"chunks": 1}, recipients=...)
    lines = [
        b'{"address": "a@one.example", "name": "A"}', b"", b"nonsense", b'{"address": 5}',
        b'{"address": "b@one.example", "name": "B", "name": "C"}', b'{"address": "c@one.example"}',
    ]  # fmt: skip
    await world.add(job=json.dumps(job))
    await world.add(audience=job["job_id"], account="acme", n=0, data=b"\n".join(lines))
    await world.settle(world.intake())
    assert await world.queued() == ["a@one.example"]
    assert await world.refused(rows=4) == {"invalid": 4}
    assert world.status().rows_submitted == 5


async def test_an_audience_may_come_before_its_job_is_accepted(world: World) -> None:
    """Another worker is just accepting the job: its audience waits, and waiting is not a delivery."""
    one, two = world.intake("one"), world.intake("two", idle=0.0)
    job = world.job(audience={"chunks": 1}, recipients=...)
    await world.add(job=json.dumps(job))
    await world.add(audience=job["job_id"], account="acme", n=0, data=b'{"address": "a@one.example", "name": "A"}')
    first = await one.claims.new(1, 0.0)
    for _ in range(20):
        await two.claims.keep_parked()
        for entry in await two.claims.new(1, 0.0) + await two.claims.due():
            await two._handle(entry)
    assert two.counts.entries == 0
    assert await one._handle(first[0])
    await world.settle(two)
    assert await world.queued() == ["a@one.example"]
    assert two.counts.dead == 0


async def test_an_audience_of_nobody_is_dropped(world: World) -> None:
    await world.add(audience="never", account="acme", n=0, data=b'{"address": "a@one.example"}')
    intake = world.intake()
    await intake.step()
    assert await world.redis.xlen(keyspace.INTAKE) == 1
    world.clock.ahead = HOUR_US
    await world.settle(intake)
    assert intake.counts.dropped == 1
    assert await world.rejected() == []


async def test_leftovers_of_a_rejected_submission_do_not_mix_with_the_next(world: World) -> None:
    wrong = world.job(audience={"chunks": 1}, recipients=..., kind="campagne")
    right = world.job(audience={"chunks": 1}, recipients=...)
    for job, who in ((wrong, b"old"), (right, b"new")):
        await world.add(job=json.dumps(job))
        await world.add(
            audience=job["job_id"], account="acme", n=0, data=b'{"address": "%s@one.example", "name": "N"}' % who
        )
    await world.settle(world.intake())
    assert await world.queued() == ["new@one.example"]
    assert world.status().state == "sending"


async def test_wait_holds_everything_until_the_last_entry(world: World) -> None:
    job = world.job(audience={"chunks": 2}, recipients=..., wait=True)
    lanes = Lanes(world.redis, "courier")
    intake = world.intake()
    partition = keyspace.partition_of("one.example")

    async def leased() -> int:
        told = await lanes.lease_many([LeaseRequest(partition, [], 8)])
        return len(told[0].slices)

    await world.add(job=json.dumps(job))
    await world.add(audience=job["job_id"], account="acme", n=1, data=b'{"address": "b@one.example", "name": "B"}')
    await world.settle(intake)
    assert await world.queued() == ["b@one.example"]
    assert await leased() == 0
    assert world.status().state == "expanding"
    await world.add(audience=job["job_id"], account="acme", n=0, data=b'{"address": "a@two.example", "name": "A"}')
    await world.settle(intake)
    assert world.status().state == "sending"
    for _ in range(800):  # what was passed over is due again within five seconds (queue.lanes)
        if await leased():
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("nothing is leased after the last entry")


async def test_a_job_for_later_stays_sealed_until_an_hour_before(world: World) -> None:
    send_at = world.clock() + 5 * HOUR_US
    job = world.job(send_at=rfc3339(send_at), recipients=...)
    intake = world.intake()
    await world.submit(job, people(1200))
    await world.settle(intake)
    assert await world.queued() == []
    held: Any = await world.redis.xrange(keyspace.stream_of_chunks(world.status().number))
    assert len(held) == 2
    assert b"example" not in repr(held).encode()
    world.clock.ahead = 4 * HOUR_US + SECOND_US
    intake._next_held = 0.0
    await world.settle(intake, until=lambda: intake.counts.rows == 1200)
    await world.settle(intake)
    assert len(await world.queued()) == 1200
    assert not await world.redis.exists(keyspace.stream_of_chunks(world.status().number))
    lanes = [key async for key in world.redis.scan_iter(match="sp:*:l:*")]
    dues: Any = await world.redis.zrange(lanes[0], 0, 0, withscores=True)
    assert round(dues[0][1]) == send_at
    assert world.status().rows_submitted == 1200


async def test_a_job_without_all_its_entries_expires(world: World) -> None:
    expires = world.clock() + DAY_US
    job = world.job(audience={"chunks": 3}, recipients=..., expires_at=rfc3339(expires))
    intake = world.intake()
    await world.add(job=json.dumps(job))
    await world.add(audience=job["job_id"], account="acme", n=1, data=b'{"address": "a@one.example", "name": "A"}')
    await world.settle(intake)
    world.clock.ahead = 2 * DAY_US
    for _ in range(1000):
        if world.status().state == "expired":
            break
        await asyncio.sleep(0.01)
    assert world.status().state == "expired"
    await world.add(audience=job["job_id"], account="acme", n=0, data=b'{"address": "b@one.example", "name": "B"}')
    await world.settle(intake)
    assert await world.queued() == ["a@one.example"]


async def test_consent_is_recorded_and_decides_what_is_tracked(world: World) -> None:
    rows = [
        {"address": "yes@one.example", "name": "Y", "consent": {"mail_marketing": YES, "open_tracking": YES}},
        {"address": "mail@one.example", "name": "M", "consent": {"mail_marketing": YES}},
        {"address": "none@one.example", "name": "N"},
        {"address": "gone@one.example", "name": "G", "consent": {"mail_marketing": YES, "open_tracking": YES}},
    ]
    intake = world.intake()
    asked: dict[str, Any] = {"legal_basis": {"basis": "consent"}, "tracking": {"opens": "individual"}}
    await world.submit(world.job(**asked, recipients=rows))
    await world.settle(intake)
    tag = tag_of(world.keyring.pepper, "gone@one.example")
    assert await world.writer.withdraw(1, tag, "mail_marketing")
    assert await world.writer.withdraw(1, tag_of(world.keyring.pepper, "yes@one.example"), "open_tracking")
    await world.submit(
        world.job(**asked, job_id="second", recipients=[*rows, {"address": "new@one.example", "name": "N"}])
    )
    await world.settle(intake)
    modes = {
        (header.job, row.local): Mode(row.mode_opens)
        for header, contents in await world.slices()
        for row in contents.rows
    }
    first, second = world.status().number, world.status("second").number
    assert modes == {
        (first, "yes"): Mode.INDIVIDUAL, (first, "mail"): Mode.OFF, (first, "gone"): Mode.INDIVIDUAL,
        (second, "yes"): Mode.OFF, (second, "mail"): Mode.OFF,
    }  # fmt: skip
    assert await world.refused(rows=1) == {"no-consent": 1}
    assert await world.refused("second", rows=3) == {"no-consent": 2, "suppressed": 1}


async def test_nothing_of_a_person_is_in_clear_after_expansion(world: World) -> None:
    rows = [{"address": f"person{n}@hidden.example", "name": "Marianne"} for n in range(20)]
    await world.submit(world.job(recipients=rows))
    intake = world.intake()
    await world.settle(intake)
    assert await world.redis.xlen(keyspace.INTAKE) == 0
    async for key in world.redis.scan_iter(count=1000):
        assert keyspace.entry_of(key.decode()) is not None, key
        dump: Any = await world.redis.dump(key)
        assert b"person1" not in dump
        assert b"Marianne" not in dump


async def test_the_loop_survives_a_store_that_goes_away(world: World) -> None:
    lost = connect(world.url.replace("valkey.sock", "nowhere.sock"))
    intake = world.intake()
    present = intake.redis
    intake.redis = intake.claims.redis = intake.filling.redis = lost
    stop = asyncio.Event()
    running = asyncio.create_task(intake.run(stop))
    await asyncio.sleep(0)
    await world.submit(world.job())
    intake.redis = intake.claims.redis = intake.filling.redis = present
    for _ in range(1000):
        if await world.queued():
            break
        await asyncio.sleep(0.01)
    stop.set()
    await running
    await lost.aclose()
    assert await world.queued() == ["ada@one.example"]


async def test_refusals_and_slices_add_up(world: World) -> None:
    rows = [*people(100), *people(10), {"address": "x"}, {"address": "y@one.example"}]
    await world.submit(world.job(recipients=...), rows)
    await world.settle(world.intake())
    refused = await world.refused(rows=12)
    status = world.status()
    assert Counter(refused) == {"duplicate": 10, "invalid": 2}
    assert status.rows_submitted == len(rows)
    assert len(await world.queued()) + sum(refused.values()) == len(rows)


async def test_many_small_jobs_are_taken_together_and_each_is_whole(world: World) -> None:
    """More of them a step than chunks of an audience; acknowledged in few transactions, and nobody twice or lost."""
    for number in range(150):
        rows = [{"address": f"p{number}@d{number % 7}.example", "fields": {"name": "P"}}]
        await world.add(job=json.dumps(world.job(job_id=f"small-{number}", recipients=rows)))
    before = (await world.redis.info("commandstats")).get("cmdstat_multi", {}).get("calls", 0)
    intake = world.intake()
    steps = 0
    while await world.redis.xlen(keyspace.INTAKE):
        await intake.step()
        steps += 1
        assert steps < 20
    assert await world.pending() == 0
    assert await world.queued() == sorted(f"p{n}@d{n % 7}.example" for n in range(150))
    assert steps < 150 / Limits().claim
    assert (await world.redis.info("commandstats"))["cmdstat_multi"]["calls"] - before < 75
    for number in (0, 149):
        status = world.status(f"small-{number}")
        assert (status.state, status.rows_submitted, status.waiting) == ("sending", 1, 1)


async def test_large_entries_are_taken_no_more_at_a_time_than_before(world: World) -> None:
    intake = world.intake()
    rows = [{"address": "p@d.example", "fields": {"name": "P"}}]
    for number in range(20):
        await world.add(job=json.dumps(world.job(job_id=f"large-{number}", recipients=rows, text="x" * 40_000)))
    for _ in range(2):
        assert await intake.step() == Limits().claim


async def test_terms_of_a_job_just_accepted_are_those_that_are_stored(world: World) -> None:
    """A worker goes on with what it has in hand; another one, or it after a crash, with what SQL has."""
    await world.submit(
        world.job(
            recipients=[{"address": "a@d.example", "name": "A"}], rate=5.0, list="Weekly",
            tracking={"opens": "individual", "clicks": "aggregate"}, consent={"mail_marketing": YES},
            window={"from": "08:00", "to": "20:00", "zone": "Europe/Berlin"},
        )
    )  # fmt: skip
    intake = world.intake()
    await world.settle(intake)
    number = world.status().number
    own = await intake.filling.terms(number, "sending")
    other = await world.intake("other").filling.terms(number, "sending")
    assert own == other


async def test_jobs_with_one_template_share_no_page_that_differs(world: World) -> None:
    """The web version is kept for jobs with the same contents, not for those of another sender or other words."""
    page = "<p>Hello {{ name }}</p><p>{{ postal_address }}</p>"
    rows = [{"address": "a@d.example", "name": "A"}]
    asked = [
        ("one", page, "1 Road"),
        ("two", page, "1 Road"),
        ("three", page, "2 Lane"),
        ("four", page + "!", "1 Road"),
    ]
    for name, html, place in asked:
        await world.submit(world.job(job_id=name, html=html, postal_address=place, recipients=rows))
    intake = world.intake()
    await world.settle(intake)
    with intake.engine.connect() as conn:
        asked_for = select(schema.job.c.job_id, schema.job_view.c.html)
        found = conn.execute(asked_for.join(schema.job, schema.job.c.number == schema.job_view.c.job)).all()
    views = {str(name): str(html) for name, html in found}
    assert views["one"] == views["two"]
    assert "1 Road" in views["one"]
    assert "2 Lane" in views["three"]
    assert "!" in views["four"]
    assert len(set(views.values())) == 3
