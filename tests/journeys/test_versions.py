"""Rolling restart (issue 3, item 7): programs and queues of several versions on one Redis.

- a Redis whose schema is newer than ours is refused, one we support is accepted, and raised once nobody old is at work;
- slices of a newer layout are left alone by every script, byte for byte, and said loudly;
- the queue as release 0.1.0 left it, its worker killed, is loaded and delivered by today's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.queue import states
from engine.queue.journal import BOOT_VARIABLE, read_head
from engine.queue.lanes import JobState, Lanes, PutRequest, Settled
from engine.queue.sweeps import Sweeps
from policy import hosts, keyspace
from policy.valkey import Client, ServerRefused, call, check_server, raise_schema
from tests.world.mail import MailWorld, job, mail_world, rows
from tests.world.queue_census import FAR, census, lane_named, some_slice
from tests.world.release import load
from tests.world.servers import PolicyWorld, ValkeyServer, valkey, world

__all__ = ["valkey", "world"]

DATA = Path(__file__).parent / "data"
P = 7
LANE = lane_named("L")


def someone(holder: str, schema: int) -> hosts.Worker:
    return hosts.Worker(holder=holder, pid=1, version="0.2.0", schema=schema, state="working")


async def schema_of(redis: Client) -> int:
    held = await redis.hget(keyspace.META, "schema")
    assert held is not None
    return int(held)


# --- the schema number ------------------------------------------------------------------------------------------------


async def test_a_newer_schema_is_refused_and_the_text_says_what_to_do(valkey: ValkeyServer) -> None:
    await valkey.client.hset(keyspace.META, "schema", str(keyspace.SCHEMA_VERSION + 1))
    with pytest.raises(ServerRefused, match=r"newer sales-push.*install the newer version on this host"):
        await check_server(valkey.client)
    assert await schema_of(valkey.client) == keyspace.SCHEMA_VERSION + 1


async def test_a_schema_older_than_we_can_work_on_is_refused(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyspace, "SCHEMA_VERSION", 5)
    monkeypatch.setattr(keyspace, "OLDEST_SCHEMA", 3)
    await valkey.client.hset(keyspace.META, "schema", "2")
    with pytest.raises(ServerRefused, match=r"has schema 2.*needs 3 at least"):
        await check_server(valkey.client)


async def test_a_schema_that_is_no_number_is_refused(valkey: ValkeyServer) -> None:
    await valkey.client.hset(keyspace.META, "schema", "two")
    with pytest.raises(ServerRefused, match="no number"):
        await check_server(valkey.client)


async def test_an_older_schema_is_raised_when_the_last_old_program_has_gone(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = valkey.client
    await check_server(redis)
    old = keyspace.SCHEMA_VERSION
    monkeypatch.setattr(keyspace, "SCHEMA_VERSION", old + 1)
    assert await check_server(redis) == [], "accepted as it is"
    await hosts.say(redis, someone("mx1:0:1-new", old + 1))
    await hosts.say(redis, someone("mx2:0:2-old", old))
    unregistered = Lanes(redis, "mx3:0:3-ancient")
    await unregistered.heartbeat([P])

    assert await raise_schema(redis) == ["mx2:0:2-old", "mx3:0:3-ancient"]
    await hosts.withdraw(redis, ["mx2:0:2-old"])
    assert await raise_schema(redis) == ["mx3:0:3-ancient"]
    assert await schema_of(redis) == old
    await unregistered.leave([P])
    assert await raise_schema(redis) == []
    assert await schema_of(redis) == old + 1
    monkeypatch.undo()
    with pytest.raises(ServerRefused, match="newer"):
        await check_server(redis)


async def test_the_writer_raises_it(world: PolicyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    await hosts.say(world.redis, someone("mx2:0:2-old", keyspace.SCHEMA_VERSION))
    monkeypatch.setattr(keyspace, "SCHEMA_VERSION", keyspace.SCHEMA_VERSION + 1)
    await world.restart_writer()
    assert await schema_of(world.redis) == keyspace.SCHEMA_VERSION - 1
    await hosts.withdraw(world.redis, ["mx2:0:2-old"])
    async with asyncio.timeout(30):
        while await schema_of(world.redis) != keyspace.SCHEMA_VERSION:
            await asyncio.sleep(0.05)


async def test_what_a_newer_program_says_of_itself_counts_as_newer(valkey: ValkeyServer) -> None:
    await valkey.client.hset(keyspace.HOSTS, "mx9:0:1-future", b'{"holder":"mx9:0:1-future","mood":"fine"}')
    [worker] = (await hosts.read(valkey.client)).workers
    assert worker.holder == "mx9:0:1-future"
    assert worker.schema > keyspace.SCHEMA_VERSION


# --- slices of a newer layout ---------------------------------------------------------------------------------------


async def put(redis: Client, count: int = 3) -> Lanes:
    lanes = Lanes(redis, "mx1:0:1-aa")
    state = JobState(1, 0, 0, False, FAR, False, 1)
    slices = [(0, some_slice(5, P, LANE, 2)) for _ in range(count)]
    assert await lanes.put([PutRequest(P, 5, 0, state, slices)]) == [True]
    return lanes


async def make_newer(redis: Any, slice_id: str) -> bytes:
    """As a layout might be whose fields lie elsewhere."""
    key = keyspace.slice_key(P, slice_id)
    held = await redis.get(key)
    assert held is not None
    newer = bytes([2]) + bytes(reversed(held[1:]))
    await redis.set(key, newer)
    return newer


async def slice_ids(redis: Any) -> list[str]:
    prefix = keyspace.slice_key(P, "")
    return sorted([key.decode().removeprefix(prefix) async for key in redis.scan_iter(prefix + "*")])


async def test_a_newer_slice_is_not_leased_and_holds_nobody_up(valkey: ValkeyServer) -> None:
    lanes = await put(valkey.client, 3)
    first, *others = await slice_ids(valkey.client)
    newer = await make_newer(valkey.client, first)

    told = await lanes.lease(P, [(keyspace.UNRESOLVED, 5)])
    assert sorted(lease.slice_id for lease in told.slices) == others
    assert told.strangers == 1
    again = await lanes.lease(P, [(keyspace.UNRESOLVED, 5)])
    assert (again.slices, again.strangers) == ([], 0), "put off, not looked at in every call"
    assert await valkey.client.get(keyspace.slice_key(P, first)) == newer
    assert await Sweeps(valkey.client, lanes.holder).hasten(P, [first]) is not None
    assert await valkey.client.get(keyspace.slice_key(P, first)) == newer
    assert await valkey.client.hlen(keyspace.leases(P)) == 2


async def test_many_newer_slices_before_ours_are_passed_in_few_calls(valkey: ValkeyServer) -> None:
    lanes = await put(valkey.client, 100)
    ids = await slice_ids(valkey.client)
    due: Any = await valkey.client.zrange(keyspace.due(P, keyspace.UNRESOLVED, False), 0, -1)
    order = [name.decode() for name in due]
    assert sorted(order) == ids
    for name in order[:-1]:
        await make_newer(valkey.client, name)
    met = []
    for _ in range(4):
        told = await lanes.lease(P, [(keyspace.UNRESOLVED, 1)])
        met += [lease.slice_id for lease in told.slices]
    assert met == order[-1:]


async def test_a_newer_slice_leased_by_a_dead_newer_worker_stays_its_own(valkey: ValkeyServer) -> None:
    redis = valkey.client
    lanes = await put(redis, 2)
    leased = (await lanes.lease(P, [(keyspace.UNRESOLVED, 5)])).slices
    newer = await make_newer(redis, leased[0].slice_id)
    seen = (await lanes.holders(P))[lanes.holder]

    assert await lanes.reclaim(P, lanes.holder, seen) == 1
    assert await lanes.holder_leases(P, lanes.holder) == [(leased[0].slice_id, leased[0].token)]
    assert await lanes.holders(P) == {lanes.holder: seen}, "whoever understands it can reclaim it later"
    assert await lanes.release(P, leased[0].slice_id, leased[0].token) is Settled.KEPT
    assert await redis.get(keyspace.slice_key(P, leased[0].slice_id)) == newer
    assert await lanes.holder_leases(P, lanes.holder) == [(leased[0].slice_id, leased[0].token)]


async def test_an_old_worker_leaves_newer_slices_to_the_new_one_and_says_so() -> None:
    async with mail_world() as mail:
        redis: Any = mail.policy.redis
        partition = keyspace.partition_of("b.accept.test")
        await mail.submit(job("mixed"), rows(10, "a.accept.test") + rows(10, "b.accept.test"))
        async with frozen(mail, partition):
            await mail.start_worker()
            async with asyncio.timeout(30):
                while not (keys := await redis.keys(keyspace.slice_key(partition, "*"))):
                    await asyncio.sleep(0.01)
            [key] = keys
            held = await redis.get(key)
            await redis.set(key, b"\x02" + held[1:])
        reader = mail.policy.reader
        async with asyncio.timeout(30):
            while (status := reader.job_status("mixed", mail.policy.clock())) is None or status.terminal < 10:
                await asyncio.sleep(0.05)
            while "slices of a newer layout are left alone" not in mail.log():
                await asyncio.sleep(0.05)
        left = await redis.get(key)
        assert left == b"\x02" + held[1:]
        await redis.set(key, held)  # the new program has come
        status = await mail.finished("mixed")
        assert status.counts == {"delivered": 20}


@contextlib.asynccontextmanager
async def frozen(mail: MailWorld, partition: int) -> AsyncIterator[None]:
    """Nothing of the account is leased from this partition."""
    await call(mail.policy.redis, "SADD", keyspace.halts(partition), "a1")
    yield
    await call(mail.policy.redis, "SREM", keyspace.halts(partition), "a1")


# --- what a release left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("booted", [False, True], ids=["same-boot", "next-boot"])
@pytest.mark.parametrize("path", sorted(DATA.glob("queue-*.json")), ids=lambda path: str(path.stem))
async def test_the_queue_of_a_past_release_is_delivered_to_the_end(
    path: Path, booted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the machine that it was made on, and as after this one went down: then who was leased is in doubt (T8)."""
    document = json.loads(path.read_text())

    async def prepare(folder: Path) -> None:
        await load(document, folder)
        [left] = (folder / "journal").rglob("*.journal")
        monkeypatch.setenv(BOOT_VARIABLE, "the-next-boot" if booted else read_head(left).boot)

    async with mail_world("accept:0:name=slow", "accept:0:name=away", prepare=prepare) as mail:
        reader, clock = mail.policy.reader, mail.policy.clock
        names = ("paused", "deferred", "under-way", "letters")
        before = {name: reader.job_status(name, clock()) for name in names}
        await mail.start_worker()
        await mail.policy.ask.job_state("paused", "sending")
        after = {name: await mail.finished(name) for name in names}
        sink = await mail.sink_counts()
        assert await mail.drain(mail.workers[0]) == 0

        told = {"delivered", "unknown"}
        for name, rows_there in (("paused", 30), ("deferred", 8), ("under-way", 300), ("letters", 20)):
            status, was = after[name], before[name]
            assert was is not None
            assert (status.rows_submitted, status.terminal) == (rows_there, rows_there)
            assert {kind for kind, count in status.counts.items() if count} - {"deferred"} <= told
            assert status.counts.get("delivered", 0) >= was.counts.get("delivered", 0)
        assert after["letters"].counts["delivered"] == 20, "in doubt: one more attempt"
        assert after["paused"].counts.get("unknown", 0) == 0, "it was in nobody's hands"
        if booted:
            assert after["deferred"].counts == {"unknown": 8}, "their lease was the dead worker's, its tail may be gone"
            assert after["under-way"].counts["delivered"] >= 10, "what is on the disk, and what waited in the lanes"
        else:
            assert after["deferred"].counts["delivered"] == 8
            assert after["under-way"].counts["delivered"] >= 100, "what waited in the lanes"
        assert sink["slow"]["accepted"] == sink["slow"]["unique"]
        for partition in range(keyspace.PARTITIONS):
            assert states.violations(await census(mail.policy.redis, partition)) == []
        assert await mail.policy.redis.keys("sp:{p*}:[sjwu]:*") == []
