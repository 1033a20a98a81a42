"""Pause, resume and cancel of jobs, accounts and domains: in SQL, in the queue, on the wire (issue 3, item 1)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from engine.queue import slices
from engine.queue.lanes import GateRequest, JobState, Lanes, PutRequest
from engine.queue.slices import Contents, Row
from engine.queue.sweeps import Sweeps
from policy import halts, keyspace
from policy.gate import Standing
from policy.instants import rfc3339
from policy.ledger import JobStatus
from policy.schema import open_store
from policy.wire import WireError
from tests.journeys.test_policy_cli import Shell
from tests.journeys.test_writer import accept
from tests.world.mail import MailWorld, job, mail_world, rows
from tests.world.queue_census import FAR, SITE, assert_legal, lane_named
from tests.world.servers import PolicyWorld, ValkeyServer, valkey, world

__all__ = ["valkey", "world"]

PART = 7
JOB, OTHER_JOB = 11, 12
LANE, OTHER_LANE = lane_named("A"), lane_named("B")
STATE = JobState(5, 6, 0, priority=False, expires_at=FAR, resend_in_doubt=False, buckets=2)
KEY = os.urandom(32)
HOUR_US = 3600 * 1_000_000


def words(lane: str) -> tuple[str, str]:
    return f"l{lane}", f"c{lane}"


async def members(redis: Redis, partition: int) -> set[str]:
    return {word.decode() for word in await redis.smembers(keyspace.halts(partition)) if isinstance(word, bytes)}


async def everywhere(redis: Redis, word: str) -> bool:
    held = [word in await members(redis, partition) for partition in range(keyspace.PARTITIONS)]
    assert len(set(held)) == 1
    return held[0]


# --- SQL and Redis --------------------------------------------------------------------------------------------------


async def test_an_account_is_paused_beside_being_frozen(world: PolicyWorld) -> None:
    await accept(world)
    number = world.reader.account("acme")
    assert number is not None
    word = f"a{number.number}"

    assert (await world.ask.halt_account("acme", "pause", "complaints")).state == "paused"
    assert not (await world.ask.halt_account("acme", "pause")).changed
    assert await everywhere(world.redis, word)
    await world.ask.account_freeze("acme", True)
    assert (await world.ask.halt_account("acme", "resume")).state == "frozen"
    assert await everywhere(world.redis, word)  # two reasons: one of them still stands
    await world.ask.halt_account("acme", "pause")
    await world.ask.account_freeze("acme", False)
    assert await everywhere(world.redis, word)
    told = await world.ask.halt_account("acme", "resume")
    assert (told.state, told.changed) == ("active", True)
    assert not await everywhere(world.redis, word)
    assert not (await world.ask.halt_account("acme", "resume")).changed
    with pytest.raises(WireError) as refused:
        await world.ask.halt_account("nobody", "pause")
    assert refused.value.kind == "not-found"
    with pytest.raises(WireError, match="can be paused"):
        await world.ask.halt_account("acme", "explode")


async def test_cancelling_an_account_cancels_its_open_jobs_only(world: PolicyWorld) -> None:
    first, second = await accept(world, "one"), await accept(world, "two")
    await world.ask.job_state(first.number, "cancelled")
    told = await world.ask.halt_account("acme", "cancel", "fraud")
    assert (told.state, told.changed, told.jobs) == ("active", True, (second.number,))
    status = world.reader.job_status("two", world.clock())
    assert status is not None
    assert (status.state, status.reason) == ("cancelled", "fraud")
    assert not (await world.ask.halt_account("acme", "cancel")).changed
    assert (await accept(world, "three")).status == "new"


async def test_a_domain_is_halted_in_its_partition_and_nowhere_else(world: PolicyWorld) -> None:
    lane = keyspace.lane_ref("xn--bcher-kva.example", world.keyring.lane)
    where = keyspace.partition_of("xn--bcher-kva.example")
    paused, cancelled = words(lane)

    assert (await world.ask.halt_domain("Bücher.example", "pause", "asked by phone")).state == "paused"
    assert await members(world.redis, where) == {paused}
    assert await members(world.redis, (where + 1) % keyspace.PARTITIONS) == set()
    [halt] = world.reader.halts()
    assert (halt.domain, halt.lane, halt.state, halt.reason) == (
        "xn--bcher-kva.example",
        lane,
        "paused",
        "asked by phone",
    )
    assert (await world.ask.halt_domain("bücher.example", "cancel")).state == "cancelled"
    assert await members(world.redis, where) == {cancelled}
    assert (await world.ask.halt_domain("bücher.example", "resume")).state == "active"
    assert await members(world.redis, where) == set()
    assert world.reader.halts() == []
    with pytest.raises(WireError) as refused:
        await world.ask.halt_domain("not a domain", "pause")
    assert refused.value.kind == "refused"
    assert "not a domain" not in str(refused.value)


async def test_what_is_halted_is_rebuilt_from_sql(world: PolicyWorld) -> None:
    """T12: after a loss everything that stands is back; after a restore nothing stays that was lifted since."""
    paused = (await accept(world, "one")).number
    waits = (await accept(world, "two", wait=True)).number
    ended = (await accept(world, "three")).number
    await world.ask.chunk(ended, 0, b"a" * 32, 1)
    await world.ask.job_state(paused, "paused")
    await world.ask.job_state(ended, "cancelled")
    await world.ask.halt_account("acme", "pause")
    await world.ask.halt_domain("one.example", "pause")
    await world.ask.halt_domain("two.example", "cancel")
    one, two = (keyspace.lane_ref(f"{name}.example", world.keyring.lane) for name in ("one", "two"))
    wanted = {f"j{paused}", f"j{waits}", f"x{ended}", "a1"}
    for partition in range(keyspace.PARTITIONS):
        await world.redis.delete(keyspace.halts(partition))
        await world.redis.sadd(keyspace.halts(partition), "a9", "j1000000", f"l{two}", f"j{ended}")

    reader = open_store(world.settings.sql_address(), writer=False)
    try:
        with reader.connect() as conn:
            assert await halts.rebuild(world.redis, conn, add_only=True) == 6
            assert {"a9", f"j{ended}", *wanted} < await members(world.redis, 33)
            assert await halts.rebuild(world.redis, conn) == 6
    finally:
        reader.dispose()
    for partition in range(keyspace.PARTITIONS):
        here = {f"l{one}"} if partition == keyspace.partition_of("one.example") else set()
        here |= {f"c{two}"} if partition == keyspace.partition_of("two.example") else set()
        # a job younger than what SQL showed may have been held by its intake meanwhile
        assert await members(world.redis, partition) == wanted | here | {"j1000000"}


async def test_a_lost_redis_is_told_of_halts_again(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    await world.ask.halt_domain("one.example", "cancel")
    await world.ask.job_state(number, "paused")
    await world.redis.flushall()
    lane = keyspace.lane_ref("one.example", world.keyring.lane)
    where = keyspace.partition_of("one.example")
    await _until(lambda: _holds(world.redis, where, {f"c{lane}", f"j{number}"}))


async def test_what_redis_did_not_hear_it_hears_when_it_is_back(world: PolicyWorld) -> None:
    paused, going = (await accept(world, "one")).number, (await accept(world, "two")).number
    for number in (paused, going):
        await world.redis.hset(keyspace.job(3, number), mapping={"st": "sending", "nb": 1})
    await world.ask.job_state(going, "paused")
    await world.ask.halt_domain("one.example", "pause")
    await world.server.stop()
    for answer in (
        world.ask.job_state(paused, "paused"),
        world.ask.job_state(going, "sending"),
        world.ask.halt_domain("one.example", "resume"),
        world.ask.halt_account("acme", "pause"),
    ):
        with pytest.raises(WireError) as refused:
            await answer
        assert refused.value.kind == "redis"
    await world.server.start()
    for partition in (3, keyspace.partition_of("one.example")):
        await _until(lambda partition=partition: _holds(world.redis, partition, {f"j{paused}", "a1"}))  # type: ignore[misc]  # a default argument
    await _until(lambda: _state(world.redis, paused, b"paused"))
    await _until(lambda: _state(world.redis, going, b"sending"))


async def _state(redis: Redis, number: int, wanted: bytes) -> bool:
    return bool(await redis.hget(keyspace.job(3, number), "st") == wanted)


async def _holds(redis: Redis, partition: int, wanted: set[str]) -> bool:
    return await members(redis, partition) == wanted


# --- commands -------------------------------------------------------------------------------------------------------


async def test_commands(world: PolicyWorld) -> None:
    sh = Shell(world.settings.data_dir)
    await accept(world)
    assert "acme: paused" in await sh("account", "pause", "acme", "--reason", "asked")
    assert (await sh.json("account", "list"))[0]["paused"] is True
    assert "paused" in await sh("account", "list")
    assert (await sh.json("account", "resume", "acme")) == {
        "name": "acme", "state": "active", "changed": True, "jobs": [],
    }  # fmt: skip
    assert "1 jobs cancelled" in await sh("account", "cancel", "acme")
    assert "no such account" in await sh("account", "pause", "nobody", code=1)
    assert "no domain" in await sh("domain", "list")
    assert (await sh.json("domain", "pause", "One.Example", "--reason", "wrong")) == {
        "domain": "One.Example", "state": "paused", "changed": True,
    }  # fmt: skip
    assert "one.example: cancelled" in await sh("domain", "cancel", "one.example")
    [listed] = await sh.json("domain", "list")
    assert (listed["domain"], listed["state"]) == ("one.example", "cancelled")
    assert "cancelled" in await sh("domain", "list")
    assert "one.example: active" in await sh("domain", "resume", "one.example")
    assert "not a domain" not in await sh("domain", "pause", "not a domain", code=1)


# --- scripts --------------------------------------------------------------------------------------------------------


def a_slice(job: int = JOB, lane: str = LANE, names: int = 3, *, expires_at: int = FAR, flags: int = 0) -> bytes:
    people = [Row(f"reader{place}", place, place, 0, 0, []) for place in range(names)]
    contents = Contents("example.test", [], people)
    return slices.build(KEY, 2900, job, PART, lane, contents, expires_at=expires_at, flags=flags)


async def put(redis: Redis, *data: bytes, job: int = JOB, due: int = 0, chunk: int = 0) -> None:
    await Lanes(redis, "putter").put([PutRequest(PART, job, chunk, STATE, [(due, each) for each in data])])


async def leased(redis: Redis, site: str = keyspace.UNRESOLVED, count: int = 9) -> list[str]:
    lanes = Lanes(redis, "worker")
    found = await (lanes.lease(PART, [], count) if site == keyspace.UNRESOLVED else lanes.lease(PART, [(site, count)]))
    return [lease.slice_id for lease in found.slices]


async def standing(redis: Redis, slice_id: str) -> Standing:
    token = (await redis.hget(keyspace.leases(PART), slice_id) or b"").split(b" ")[0]  # type: ignore[arg-type]  # bytes
    answer = await Lanes(redis, "worker").gate(GateRequest(PART, slice_id, int(token), [], b"d" * 12))
    assert answer is not None
    return answer.standing


async def test_a_cancelled_domain_is_leased_and_the_gate_says_so(valkey: ValkeyServer) -> None:
    redis = valkey.client
    await put(redis, a_slice(), a_slice(lane=OTHER_LANE))
    await redis.sadd(keyspace.halts(PART), f"c{LANE}", f"l{OTHER_LANE}", "a5", f"j{JOB}")
    [slice_id] = await leased(redis)  # though its account and its job are halted, too; the other lane rests
    assert await standing(redis, slice_id) is Standing.CANCELLED
    await redis.srem(keyspace.halts(PART), f"c{LANE}", "a5", f"j{JOB}")
    assert await standing(redis, slice_id) is Standing.CLEAR
    await redis.sadd(keyspace.halts(PART), f"l{LANE}")
    assert await standing(redis, slice_id) is Standing.PAUSED
    await assert_legal(redis, PART)


async def test_a_cancelled_job_is_leased_whatever_else_is_paused(valkey: ValkeyServer) -> None:
    redis = valkey.client
    await put(redis, a_slice())
    await redis.hset(keyspace.job(PART, JOB), "st", "cancelled")
    await redis.sadd(keyspace.halts(PART), "a5", f"j{JOB}", f"l{LANE}")
    [slice_id] = await leased(redis)
    assert await standing(redis, slice_id) is Standing.CANCELLED


async def test_a_share_put_after_the_job_was_cancelled_begins_cancelled(valkey: ValkeyServer) -> None:
    """The chunk was on its way when the word came, and this partition knew nothing of the job: nobody is written to."""
    redis = valkey.client
    await redis.sadd(keyspace.halts(PART), f"x{JOB}")
    await put(redis, a_slice())
    [slice_id] = await leased(redis)
    assert await standing(redis, slice_id) is Standing.CANCELLED


async def test_hasten_takes_what_is_cancelled_and_waits_and_nothing_else(valkey: ValkeyServer) -> None:
    redis, lanes = valkey.client, Lanes(valkey.client, "worker")
    await put(redis, a_slice(), due=FAR - 1)  # deferred for long
    await put(redis, a_slice(flags=slices.FLAG_PRIORITY), chunk=1)
    await put(redis, a_slice(OTHER_JOB), job=OTHER_JOB)
    await lanes.assign(PART, LANE, SITE)
    await put(redis, a_slice(OTHER_JOB, OTHER_LANE), job=OTHER_JOB, chunk=1, due=FAR - 1)
    sweeps = Sweeps(redis, "worker")
    _, seen = await sweeps.scan(0, 1000)
    everyone = [one.slice_id for one in seen]
    assert len(everyone) == 4
    assert (await sweeps.hasten(PART, everyone)).leases == []

    await redis.hset(keyspace.job(PART, JOB), "st", "cancelled")
    await redis.sadd(keyspace.halts(PART), f"c{OTHER_LANE}", "a5")
    hastened = await sweeps.hasten(PART, everyone)
    assert sorted((slices.parse_header(lease.data).job, lease.lane) for lease in hastened.leases) == [  # type: ignore[union-attr]  # a Header
        (JOB, LANE), (JOB, LANE), (OTHER_JOB, OTHER_LANE),
    ]  # fmt: skip
    assert all(slices.parse_header(lease.data).token == lease.token for lease in hastened.leases)  # type: ignore[union-attr]  # a Header
    assert (await sweeps.hasten(PART, everyone)).leases == []
    assert len(await lanes.holder_leases(PART, "worker")) == 3
    await assert_legal(redis, PART)
    assert len(await sweeps.lane(PART, LANE, 0, 10)) == 3
    assert len(await sweeps.lane(PART, LANE, 2, 10)) == 1


async def test_hasten_leases_nothing_while_the_event_stream_is_full(valkey: ValkeyServer) -> None:
    redis = valkey.client
    await put(redis, a_slice())
    await redis.hset(keyspace.job(PART, JOB), "st", "cancelled")
    await redis.xadd(keyspace.events(PART), {"b": b"x"})
    sweeps = Sweeps(redis, "worker", event_cap=1)
    _, [seen] = await sweeps.scan(0, 1000)
    told = await sweeps.hasten(PART, [seen.slice_id])
    assert (told.leases, told.full) == ([], True)


@pytest.mark.parametrize("what", ["a5", f"j{JOB}", f"l{LANE}", "st"])
async def test_after_a_resume_what_was_passed_over_is_due_at_once(valkey: ValkeyServer, what: str) -> None:
    redis, sweeps = valkey.client, Sweeps(valkey.client, "worker")
    await put(redis, a_slice(), a_slice(flags=slices.FLAG_PRIORITY))
    await put(redis, a_slice(), chunk=1, due=await _now(redis) + 4_000_000)  # due later by itself
    await Lanes(redis, "worker").assign(PART, LANE, SITE)
    if what == "st":
        await redis.hset(keyspace.job(PART, JOB), "st", "paused")
    else:
        await redis.sadd(keyspace.halts(PART), what)
    assert await leased(redis, SITE) == []
    assert await leased(redis, SITE) == []
    await redis.hset(keyspace.job(PART, JOB), "st", "sending")
    await redis.delete(keyspace.halts(PART))
    assert await leased(redis, SITE) == []  # out of the way for five seconds

    assert await sweeps.unpark() == 2
    assert len(await leased(redis, SITE)) == 2
    assert await sweeps.unpark() == 0
    await assert_legal(redis, PART)


async def _now(redis: Redis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1_000_000 + int(micros)


# --- on the wire ----------------------------------------------------------------------------------------------------


async def test_a_domain_is_paused_and_resumed_in_the_middle_of_a_job() -> None:
    async with mail_world("slow:0:name=slow,delay=0.1", sink_options=("--record-recipients",)) as mail:
        await mail.start_worker()
        await mail.submit(job("one"), rows(150, "a.slow.test") + rows(60, "b.slow.test"))
        await _accepted(mail, "slow", 10)
        await mail.policy.ask.halt_domain("a.slow.test", "pause", "asked")
        await _until(lambda: _delivered_at_least(mail, 60))
        # what was permitted in the last half second has its reply; then nothing of it moves any more
        await _until(lambda: _leases_gone(mail))
        status = mail.policy.reader.job_status("one", mail.policy.clock())
        assert status is not None
        assert 60 <= status.counts["delivered"] < 150
        assert status.state == "sending"
        await mail.policy.ask.halt_domain("a.slow.test", "resume")
        assert (await mail.finished("one")).counts == {"delivered": 210}


async def test_a_paused_account_sends_nothing_and_goes_on() -> None:
    async with mail_world("slow:0:name=slow,delay=0.1") as mail:
        await mail.start_worker()
        await mail.submit(job("one"), rows(150, "a.slow.test"))
        await _accepted(mail, "slow", 10)
        await mail.policy.ask.halt_account("shop", "pause")
        await _until(lambda: _leases_gone(mail))
        before = (await mail.sink_counts())["slow"]["accepted"]
        assert before < 150
        assert (await mail.submit(job("two"), rows(5, "b.slow.test"))) is not None
        await _until(lambda: _expanded(mail, "two"))
        assert (await mail.sink_counts())["slow"]["accepted"] == before
        await mail.policy.ask.halt_account("shop", "resume")
        assert (await mail.finished("one")).counts == {"delivered": 150}
        assert (await mail.finished("two")).counts == {"delivered": 5}


async def test_a_cancelled_domain_ends_those_who_wait_and_those_who_come() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        await mail.start_worker()
        await mail.submit(job("one"), rows(150, "a.slow.test") + rows(20, "b.slow.test"))
        await _accepted(mail, "slow", 10)
        await mail.policy.ask.halt_domain("a.slow.test", "cancel", "no such customer")
        first = await mail.finished("one")
        assert first.terminal == 170
        assert first.counts["cancelled"] > 50
        assert first.counts["delivered"] >= 20
        await mail.submit(job("two"), rows(30, "a.slow.test"))
        assert (await mail.finished("two")).counts == {"cancelled": 30}
        await mail.policy.ask.halt_domain("a.slow.test", "resume")
        await mail.submit(job("three"), rows(30, "a.slow.test"))
        assert (await mail.finished("three")).counts == {"delivered": 30}


async def test_a_cancelled_account_ends_every_job() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        await mail.start_worker()
        await mail.submit(job("one"), rows(100, "a.slow.test"))
        await mail.submit(job("two"), rows(100, "b.slow.test"))
        await _accepted(mail, "slow", 5)
        await mail.policy.ask.halt_account("shop", "pause")
        told = await mail.policy.ask.halt_account("shop", "cancel", "fraud")
        assert len(told.jobs) == 2
        for name in ("one", "two"):  # also while the account stays paused
            status = await mail.finished(name)
            assert status.state == "cancelled"
            assert status.terminal == 100
            assert status.counts["cancelled"] > 20


async def test_who_was_deferred_for_hours_ends_soon_when_the_job_is_cancelled() -> None:
    """The retry is two hours away, one site is greylisting and another takes no connection at all."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with mail_world("greylist:0:name=grey,seconds=3600", others={"dead": closed.getsockname()[1]}) as mail:
            _patient(mail)
            await mail.start_worker()
            people = rows(100, "a.grey.test") + rows(50, "b.dead.test") + rows(40, "c.grey.test")
            await mail.submit(job("one"), people)
            await mail.submit(job("two"), rows(10, "d.grey.test"))
            await _until(lambda: _deferred(mail, "one", 140))
            await _until(lambda: _deferred(mail, "two", 10))
            await mail.policy.ask.job_state("one", "cancelled", "wrong list")
            status = await mail.finished("one", 30.0)

            assert status.counts["cancelled"] == 190
            assert status.waiting == 0
            other = mail.policy.reader.job_status("two", mail.policy.clock())
            assert other is not None
            assert other.waiting == 10  # nobody else is touched
            await mail.policy.ask.halt_domain("d.grey.test", "cancel")
            assert (await mail.finished("two", 30.0)).counts["cancelled"] == 10
            assert not await mail.policy.redis.keys("sp:{p*}:[sjwu]:*")


async def test_a_job_cancelled_before_its_hour_ends_without_waiting_for_it() -> None:
    async with mail_world() as mail:
        await mail.start_worker()
        later = rfc3339(mail.policy.clock() + 5 * HOUR_US)
        await mail.submit(job("one", send_at=later), rows(20, "a.accept.test"))
        await _until(lambda: _held(mail))
        await mail.policy.ask.job_state("one", "cancelled")
        status = await mail.finished("one", 40.0)
        assert status.counts == {"cancelled": 20}
        assert not await mail.policy.redis.keys("salespush:{in}:held:*")


async def test_a_job_cancelled_before_all_of_its_audience_came_is_over_with_what_came() -> None:
    async with mail_world() as mail:
        await mail.start_worker()
        await mail.policy.ask.halt_account("shop", "pause")
        await _offer(mail, {**job("one"), "audience": {"chunks": 2}}, rows(20, "a.accept.test"))
        await _until(lambda: _waiting(mail, 20))
        await mail.policy.ask.job_state("one", "cancelled")
        status = await mail.finished("one")
        assert (status.counts, status.rows_submitted) == ({"cancelled": 20}, 20)
        await _until(lambda: _nothing_left(mail))


async def test_an_entry_registered_and_not_expanded_ends_with_its_cancelled_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker died between the two, and the word came before the next one: its rows are known, so they end."""
    async with mail_world() as mail:
        monkeypatch.setenv("SALESPUSH_CRASH_AT", "after-register:1")
        first = await mail.start_worker()
        monkeypatch.delenv("SALESPUSH_CRASH_AT")
        await mail.submit(job("one"), rows(20, "a.accept.test"))
        async with asyncio.timeout(30):
            assert await first.wait() == -signal.SIGKILL
        await _silent_for_long(mail)
        await mail.policy.ask.job_state("one", "cancelled")
        await mail.start_worker()
        status = await mail.finished("one")
        assert (status.counts, status.rows_submitted) == ({"cancelled": 20}, 20)
        assert (await mail.sink_counts())["accept"]["accepted"] == 0
        await _until(lambda: _nothing_left(mail))


async def _offer(mail: MailWorld, made: dict[str, Any], people: list[dict[str, Any]]) -> None:
    """A job and the first entry of its audience, as a program writes them that knows the contract only."""
    data = "\n".join(json.dumps(row) for row in people)
    await mail.policy.redis.xadd(keyspace.INTAKE, {"job": json.dumps(made)})
    await mail.policy.redis.xadd(keyspace.INTAKE, {"audience": made["job_id"], "account": "shop", "n": 0, "data": data})


async def _silent_for_long(mail: MailWorld) -> None:
    """Entries in the hands of the dead are anybody's after a minute: that minute is over."""
    redis = mail.policy.redis
    pending = await redis.xpending_range(keyspace.INTAKE, keyspace.INTAKE_GROUP, min="-", max="+", count=10)
    assert pending
    for entry in pending:
        identity, holder = entry["message_id"], entry["consumer"]
        assert isinstance(identity, bytes)
        assert isinstance(holder, bytes)
        await redis.xclaim(keyspace.INTAKE, keyspace.INTAKE_GROUP, holder, 0, [identity], idle=120_000, justid=True)


async def _waiting(mail: MailWorld, count: int) -> bool:
    status = _status(mail, "one")
    return status is not None and await Lanes(mail.policy.redis, "looker").waiting(status.number) == count


async def _nothing_left(mail: MailWorld) -> bool:
    words = {
        word[0] for partition in range(keyspace.PARTITIONS) for word in await members(mail.policy.redis, partition)
    }
    return not await mail.policy.redis.keys("sp:{p*}:[sjwu]:*") and words <= {"a"}


def _patient(mail: MailWorld) -> None:
    text = mail.config.read_text()
    assert "schedule = [0.5, 0.7, 1]" in text
    mail.config.write_text(text.replace("schedule = [0.5, 0.7, 1]", "schedule = [7200]"))


def _status(mail: MailWorld, job_id: str) -> JobStatus | None:
    return mail.policy.reader.job_status(job_id, mail.policy.clock())


def _expanded(mail: MailWorld, job_id: str) -> bool:
    status = _status(mail, job_id)
    return status is not None and status.rows_submitted is not None


def _deferred(mail: MailWorld, job_id: str, count: int) -> bool:
    status = _status(mail, job_id)
    return status is not None and status.deferrals >= count


def _delivered_at_least(mail: MailWorld, count: int) -> bool:
    status = _status(mail, "one")
    return status is not None and status.counts.get("delivered", 0) >= count


async def _held(mail: MailWorld) -> bool:
    return bool(await mail.policy.redis.keys("salespush:{in}:held:*"))


async def _leases_gone(mail: MailWorld) -> bool:
    held = [await mail.policy.redis.hlen(keyspace.leases(partition)) for partition in range(keyspace.PARTITIONS)]
    return sum(held) == 0


async def _accepted(mail: MailWorld, provider: str, count: int) -> None:
    async with asyncio.timeout(30):
        while (await mail.sink_counts())[provider]["accepted"] < count:
            await asyncio.sleep(0.02)


async def _until(is_so: Callable[[], bool | Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            told = is_so()
            if told if isinstance(told, bool) else await told:
                return
            await asyncio.sleep(0.02)
