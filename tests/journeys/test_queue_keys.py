"""Queue keys: re-sealed while slices wait, destroyed after their time, and what no key opens ends lost (decision 3)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import select

from engine.delivery.resealing import Resealing, Walked
from engine.queue import slices
from engine.queue.lanes import JobState, Lanes, PutRequest
from engine.queue.slices import Contents, Header, Row
from engine.queue.sweeps import Sweeps
from policy import chores, keyspace
from policy.instants import DAY_US, WEEK_US
from policy.keys import Keyring, destroy_old, ensure_week
from policy.schema import audit
from policy.vitals import read_all
from tests.world.courier import courier_world
from tests.world.mail import MailWorld, job, mail_world, rows
from tests.world.queue_census import FAR, assert_legal, lane_named
from tests.world.servers import PolicyWorld, ValkeyServer, valkey, world

__all__ = ["valkey", "world"]

OLD, NEW = 2966, 2967
KEYS = {OLD: os.urandom(32), NEW: os.urandom(32)}
JOB = 77
STATE = JobState(5, 6, 0, priority=False, expires_at=FAR, resend_in_doubt=False, buckets=2)


def a_slice(partition: int, *, key_id: int = OLD, key: bytes = b"", names: int = 3, job: int = JOB) -> bytes:
    people = [Row(f"reader{place}", place, place, 0, 0, ["Ada"]) for place in range(names)]
    contents = Contents("example.test", ["name"], people)
    return slices.build(
        key or KEYS[key_id], key_id, job, partition, lane_named("A"), contents, expires_at=FAR, doubt=(1,)
    )


async def put(redis: Redis, partition: int, *data: bytes, chunk: int = 0, due: int = 0) -> None:
    request = PutRequest(partition, JOB, chunk, STATE, [(due, each) for each in data])
    assert await Lanes(redis, "putter").put([request]) == [True]


async def stored(redis: Redis, partition: int) -> dict[str, bytes]:
    found = {}
    for key in await redis.keys(f"{keyspace.prefix(partition)}s:*"):
        data = await redis.get(key)
        assert isinstance(data, bytes)
        assert isinstance(key, bytes)
        found[key.decode().rpartition(":")[2]] = data
    return found


def opened(partition: int, data: bytes, keys: dict[int, bytes] | None = None) -> tuple[Header, Contents]:
    found = slices.open_slice(keys or KEYS, partition, data)
    assert not isinstance(found, slices.Lost), found
    return found


def resealing(redis: Redis, keyring: Callable[[], Keyring], **more: float) -> Resealing:
    return Resealing(Sweeps(redis, "walker"), keyring, is_busy=lambda: False, must_wait=lambda: False, **more)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """A week's key, and a younger one."""
    ring = Keyring.create(tmp_path / "keys", OLD)
    assert ensure_week(tmp_path / "keys", NEW)
    ring = Keyring.load(tmp_path / "keys")
    assert ring.queue_id == NEW
    return ring


# --- the swap -------------------------------------------------------------------------------------------------------


async def test_only_the_key_changes(valkey: ValkeyServer) -> None:
    redis, sweeps = valkey.client, Sweeps(valkey.client, "walker")
    await put(redis, 3, a_slice(3), due=FAR - 1)
    before = await stored(redis, 3)
    due = await redis.zrange(keyspace.due(3, "?", False), 0, -1, withscores=True)
    _, [seen] = await sweeps.scan(0, 1000)
    [data] = await sweeps.read([seen])
    assert data is not None
    moved = slices.resealed(KEYS, NEW, 3, data)
    assert isinstance(moved, bytes)

    assert await sweeps.reseal([(seen, moved)]) == 1
    assert await sweeps.reseal([(seen, moved)]) == 0  # asked again, or by somebody else who had read the same
    after = await stored(redis, 3)
    [(name, old)], [(same, new)] = before.items(), after.items()
    assert name == same
    assert (old[:6], old[8:67]) == (new[:6], new[8:67])
    assert opened(3, new, {NEW: KEYS[NEW]})[1] == opened(3, old, {OLD: KEYS[OLD]})[1]
    assert opened(3, new)[0].in_doubt(1)
    assert await redis.zrange(keyspace.due(3, "?", False), 0, -1, withscores=True) == due
    await assert_legal(redis, 3)


async def test_what_is_leased_or_has_changed_is_left_alone(valkey: ValkeyServer) -> None:
    redis, sweeps, lanes = valkey.client, Sweeps(valkey.client, "walker"), Lanes(valkey.client, "worker")
    await put(redis, 3, a_slice(3))
    _, [seen] = await sweeps.scan(0, 1000)
    [data] = await sweeps.read([seen])
    assert data is not None
    moved = slices.resealed(KEYS, NEW, 3, data)
    assert isinstance(moved, bytes)

    [lease] = (await lanes.lease(3, [], 1)).slices
    assert await sweeps.reseal([(seen, moved)]) == 0
    await lanes.release(3, lease.slice_id, lease.token)
    assert await sweeps.reseal([(seen, moved)]) == 0  # it has a date and a token now
    assert opened(3, (await stored(redis, 3))[seen.slice_id])[0].token == lease.token
    await redis.delete(keyspace.slice_key(3, seen.slice_id))
    assert await sweeps.reseal([(seen, moved)]) == 0
    assert await stored(redis, 3) == {}


# --- the walk -------------------------------------------------------------------------------------------------------


async def test_a_walk_moves_everything_that_waits_and_a_second_finds_nothing(
    valkey: ValkeyServer, keyring: Keyring
) -> None:
    redis, key = valkey.client, keyring.queue[OLD]
    for partition in (0, 7, 63):
        await put(redis, partition, *[a_slice(partition, key=key) for _ in range(40)])
    await put(redis, 9, a_slice(9, key_id=NEW, key=keyring.queue[NEW]))
    sweep = resealing(redis, lambda: keyring)

    assert await sweep.walk() == Walked(121, 120, 120, 0)
    assert await sweep.walk() == Walked(121, 0, 0, 0)
    for partition in (0, 7, 63, 9):
        for data in (await stored(redis, partition)).values():
            assert opened(partition, data, {NEW: keyring.queue[NEW]})[0].key_id == NEW
        await assert_legal(redis, partition)
    assert sweep.statistics() == {"reseal_walks": 2, "slices_resealed": 120, "slices_unopenable": 0}


async def test_two_walks_at_once_do_no_harm(valkey: ValkeyServer, keyring: Keyring) -> None:
    redis, key = valkey.client, keyring.queue[OLD]
    await put(redis, 5, *[a_slice(5, key=key) for _ in range(300)])

    walked = await asyncio.gather(*[resealing(redis, lambda: keyring).walk() for _ in range(3)])
    assert sum(one.resealed for one in walked) == 300
    for data in (await stored(redis, 5)).values():
        assert opened(5, data, {NEW: keyring.queue[NEW]})[0].count == 3


async def test_slices_beside_workers_are_neither_lost_nor_sealed_twice(valkey: ValkeyServer, keyring: Keyring) -> None:
    """Workers lease, release and settle while the walk goes on: nobody is missing, nothing fails to open."""
    redis, key = valkey.client, keyring.queue[OLD]
    await put(redis, 5, *[a_slice(5, key=key) for _ in range(200)])
    lanes = Lanes(redis, "worker")

    async def work() -> None:
        for _ in range(60):
            for lease in (await lanes.lease(5, [], 4)).slices:
                assert opened(5, lease.data, keyring.queue)[1].rows[2].local == "reader2"
                await lanes.release(5, lease.slice_id, lease.token)

    async def walk() -> None:
        for _ in range(4):
            await resealing(redis, lambda: keyring).walk()

    await asyncio.gather(work(), walk())
    await assert_legal(redis, 5)
    await resealing(redis, lambda: keyring).walk()
    held = await stored(redis, 5)
    assert len(held) == 200
    assert {opened(5, data, keyring.queue)[0].key_id for data in held.values()} == {NEW}


async def test_what_no_key_opens_is_counted_and_left(valkey: ValkeyServer, keyring: Keyring) -> None:
    redis = valkey.client
    await put(redis, 5, a_slice(5, key=keyring.queue[OLD]), a_slice(5, key=os.urandom(32)))
    await put(redis, 6, a_slice(6, key_id=OLD - 9, key=os.urandom(32)))
    sweep = resealing(redis, lambda: keyring)

    assert await sweep.walk() == Walked(3, 3, 1, 2)
    assert sweep.statistics()["slices_unopenable"] == 2
    assert len(await stored(redis, 5)) == 2


async def test_a_new_weeks_key_is_followed_soon(valkey: ValkeyServer, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    rings = [Keyring.create(folder, OLD)]
    redis = valkey.client
    await put(redis, 5, a_slice(5, key=rings[0].queue[OLD]))
    sweep = resealing(redis, lambda: rings[-1], grace=0.05, every=3600.0)
    running = asyncio.create_task(sweep.run())
    try:
        await _until(lambda: sweep.statistics()["reseal_walks"] == 1)
        assert sweep.statistics()["slices_resealed"] == 0
        ensure_week(folder, NEW)
        rings.append(Keyring.load(folder))
        await _until(lambda: sweep.statistics()["slices_resealed"] == 1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_walk_in_trouble_is_tried_again(valkey: ValkeyServer, keyring: Keyring) -> None:
    troubled = [True]
    sweep = Resealing(
        Sweeps(valkey.client, "walker"),
        lambda: keyring,
        is_busy=lambda: True,
        must_wait=lambda: troubled[0],
        grace=0.01,
    )
    with pytest.raises(ConnectionError):
        await sweep.walk()
    running = asyncio.create_task(sweep.run())
    try:
        troubled[0] = False
        await _until(lambda: sweep.statistics()["reseal_walks"] == 1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


# --- the writer's hour ----------------------------------------------------------------------------------------------


async def test_the_writer_makes_and_destroys_keys_and_says_so(world: PolicyWorld, tmp_path: Path) -> None:
    folder, week = tmp_path / "keys", world.keyring.queue_id  # its own hour has this week's key made meanwhile
    Keyring.create(folder, week)
    now = (week + 1) * WEEK_US + 15 * DAY_US

    assert await chores.turn_keys(world.writer.store, folder, now)
    assert sorted(Keyring.load(folder).queue) == [week + 3]
    rows = await world.writer.store.write(lambda conn: conn.execute(select(audit)).all())
    told = [(row.actor, row.action, row.object_ref, row.purpose) for row in rows if row.action == "key-destroyed"]
    assert told == [("policy", "key-destroyed", f"key/queue.{week}", "retention")]
    assert not await chores.turn_keys(world.writer.store, folder, now)


async def test_a_folder_that_is_somebody_elses_is_no_reason_to_stop(world: PolicyWorld, tmp_path: Path) -> None:
    assert not await chores.turn_keys(world.writer.store, tmp_path / "nowhere", world.clock())


# --- end to end -----------------------------------------------------------------------------------------------------


async def test_a_key_this_worker_does_not_have_yet_loses_nobody() -> None:
    async with courier_world() as world:
        made = world.job()
        younger = os.urandom(32)
        ring, week = world.keyring, world.keyring.queue_id + 1
        sealed_with = Keyring.load(world.folder / "keys")
        sealed_with.queue[week] = younger
        world.keyring = _named(sealed_with, week)
        await world.put(made, ["ada", "bob"])
        await world.until(lambda: world.courier.statistics()["settled"] == 0)
        released = await _released(world.server.client)
        assert released
        ring.queue[week] = younger  # what reading the folder again brings
        await world.until(lambda: len(world.arrived()) == 2)
        assert world.courier.statistics()["slices_lost"] == 0


async def test_slices_whose_key_is_gone_end_lost_with_one_alarm_a_job() -> None:
    async with mail_world() as mail:
        first = await mail.start_worker()
        await mail.policy.ask.halt_account("shop", "pause")
        await mail.submit(job("one"), rows(150, "a.accept.test") + rows(70, "b.accept.test"))
        await mail.submit(job("two"), rows(10, "c.accept.test"))
        await _until(lambda: _expanded(mail, "one") and _expanded(mail, "two"))
        assert await mail.drain(first) == 0
        folder, week = mail.policy.settings.keys_dir, mail.policy.keyring.queue_id
        ensure_week(folder, week + 1)
        assert destroy_old(folder, (week + 4) * WEEK_US) == [week]
        await mail.policy.ask.halt_account("shop", "resume")
        second = await mail.start_worker()
        one, two = await mail.finished("one"), await mail.finished("two")

        assert (one.counts, two.counts) == ({"lost": 220}, {"lost": 10})
        assert (one.waiting, two.waiting) == (0, 0)
        assert (await mail.sink_counts())["accept"]["accepted"] == 0
        log = (mail.folder / "worker-0.log").read_text()
        assert log.count("slices of a job are lost") == 2
        assert "key-destroyed" in log
        await _until(lambda: _vital(mail, "slices_lost") == 3 + 2 + 1)
        assert not await mail.policy.redis.keys("sp:{p*}:[sjwu]:*")
        assert await mail.drain(second) == 0


async def test_a_new_week_in_the_middle_of_a_campaign_is_not_noticed_outside() -> None:
    async with mail_world("slow:0:name=slow,delay=0.02", "greylist:0:name=grey,seconds=0.4") as mail:
        await mail.start_worker()
        await mail.submit(job("one"), rows(150, "a.slow.test") + rows(150, "g.grey.test"))
        async with asyncio.timeout(30):
            while (await mail.sink_counts())["slow"]["accepted"] < 20:
                await asyncio.sleep(0.02)
        folder, week = mail.policy.settings.keys_dir, mail.policy.keyring.queue_id
        ensure_week(folder, week + 1)
        ring = Keyring.load(folder)
        await resealing(mail.policy.redis, lambda: ring).walk()
        status = await mail.finished("one")

        assert status.counts["delivered"] == 300
        assert (await mail.sink_counts())["slow"]["unique"] == 150


def _named(ring: Keyring, week: int) -> Keyring:
    return Keyring(
        pepper=ring.pepper, token=ring.token, token_id=ring.token_id, return_path=ring.return_path,
        return_path_id=ring.return_path_id, queue=ring.queue, queue_id=week, kek=ring.kek, kek_id=ring.kek_id,
        service=ring.service, intake=ring.intake, lane=ring.lane,
    )  # fmt: skip


async def _released(redis: Redis) -> bool:
    """A slice has been leased and is waiting again."""
    async with asyncio.timeout(20):
        while True:
            held = await stored(redis, keyspace.partition_of("people.test"))
            leases = await redis.hlen(keyspace.leases(keyspace.partition_of("people.test")))
            headers = [slices.parse_header(data) for data in held.values()]
            if not leases and any(isinstance(header, Header) and header.token for header in headers):
                return True
            await asyncio.sleep(0.01)


def _expanded(mail: MailWorld, job_id: str) -> bool:
    status = mail.policy.reader.job_status(job_id, mail.policy.clock())
    return status is not None and status.rows_submitted is not None


def _vital(mail: MailWorld, name: str) -> object:
    signs = [sign for sign in read_all(mail.policy.settings.data_dir) if sign.role == "engine"]
    return signs[0].numbers.get(name) if signs else None


async def _until(is_so: Callable[[], bool | Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            told = is_so()
            if told if isinstance(told, bool) else await told:
                return
            await asyncio.sleep(0.01)
