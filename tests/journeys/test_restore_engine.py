"""Redis comes back older, or only comes back: what workers do (promise T12, engine side).

A real Valkey is killed and started again on an earlier copy of its append-only files, in the middle of a campaign.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.delivery.campaigns import Loaded
from engine.delivery.hand import Hand
from engine.delivery.settling import Settling
from engine.queue.epoch import Epoch
from engine.queue.journal import Journal, boot_id
from engine.queue.lanes import JobState, Lanes, PutRequest
from engine.queue.replay import MAGIC, encode_head, frame, read_head
from engine.queue.slices import Header, open_slice
from policy import keyspace
from policy.events import Event, Kind
from policy.fence import Fence, RunNotCleared, StoreOlder
from policy.instants import week_of
from policy.keys import Keyring
from policy.ledger import JobStatus, Reader
from policy.schema import open_store, upgrade
from policy.streams import read_events
from policy.valkey import call, connect
from policy.vitals import read_all
from tests.world.mail import MailWorld, job, mail_world, rows
from tests.world.queue_census import FAR, KEYS, SITE, lane_named, some_slice
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]

SLOW = "slow:0:name=slow,delay=0.05"
ROWS = 240


async def run_id(server: ValkeyServer) -> str:
    return str((await server.client.info("server"))["run_id"])


async def meta(server: ValkeyServer, **fields: object) -> None:
    await server.client.hset(keyspace.META, mapping={name: str(value) for name, value in fields.items()})


# --- the fence --------------------------------------------------------------------------------------------------------


async def test_no_command_reaches_a_run_that_is_not_cleared(valkey: ValkeyServer) -> None:
    await meta(valkey, run="f" * 40, epoch=3, secret=1)
    fence = Fence()
    client = connect(valkey.url, fence)
    try:
        with pytest.raises(RunNotCleared):
            await client.hget(keyspace.META, "secret")
        with pytest.raises(RunNotCleared):
            await client.pubsub().subscribe("x")
        async with client.pipeline(transaction=False) as pipe:
            pipe.set(keyspace.META, "x")
            with pytest.raises(RunNotCleared):
                await pipe.execute()
        assert fence.epoch is None
        await meta(valkey, run=await run_id(valkey))
        assert await client.hget(keyspace.META, "secret") == b"1"
        assert fence.epoch == 3
    finally:
        await client.aclose()


async def test_a_store_that_was_emptied_is_not_cleared(valkey: ValkeyServer) -> None:
    await meta(valkey, run=await run_id(valkey), epoch=0)
    fence = Fence()
    client = connect(valkey.url, fence)
    try:
        assert await client.ping()
        await valkey.client.flushall()
        await client.connection_pool.disconnect()
        with pytest.raises(RunNotCleared):
            await client.ping()
    finally:
        await client.aclose()


async def test_another_epoch_is_older_for_good(valkey: ValkeyServer) -> None:
    await meta(valkey, run=await run_id(valkey), epoch=1)
    fence = Fence()
    client = connect(valkey.url, fence)
    try:
        assert await client.ping()
        await meta(valkey, epoch=2)
        assert await client.ping()  # this connection is of before
        await client.connection_pool.disconnect()
        with pytest.raises(StoreOlder):
            await client.ping()
        assert fence.older
        await asyncio.wait_for(fence.wait_older(), 1)
        await meta(valkey, epoch=1)
        with pytest.raises(StoreOlder):
            await client.ping()
    finally:
        await client.aclose()


async def test_a_connection_whose_question_was_cut_short_is_not_kept(valkey: ValkeyServer) -> None:
    """redis-py keeps a connection whose connect callback was cancelled: ours must not become an unfenced one."""
    await meta(valkey, run="f" * 40)
    client = connect(valkey.url, Fence())
    try:
        for turns in range(1, 24):
            asking = asyncio.create_task(call(client, "PING"))
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises((asyncio.CancelledError, RunNotCleared)):
                await asking
            with pytest.raises(RunNotCleared):
                await client.ping()
    finally:
        await client.aclose()


# --- META, once a second ----------------------------------------------------------------------------------------------


async def test_leasing_is_open_for_our_epoch_only_and_closed_where_meta_is_silent(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    server = valkey
    store = open_store(f"sqlite:///{tmp_path}/policy.db", writer=True)
    upgrade(store)
    await meta(server, run=await run_id(server), epoch=2, lease=1, restored=0, ledgered=5)
    fence = Fence()
    client = connect(server.url, fence)
    epoch = Epoch(client, fence, Reader(store))
    try:
        await epoch.look()
        assert (epoch.number, epoch.is_open, epoch.ledgered, epoch.suspects(1)) == (2, False, 5, False)
        await meta(server, lease=2)
        await epoch.look()
        assert epoch.is_open
        seconds, micros = await server.client.time()
        assert epoch.now_us() >= int(seconds) * 1_000_000 + int(micros)
        await server.client.hdel(keyspace.META, "lease", "epoch")
        await epoch.look()
        assert not epoch.is_open
        await meta(server, epoch=3, lease=3)
        with pytest.raises(StoreOlder):
            await epoch.look()
        assert not epoch.is_open
    finally:
        await client.aclose()
        store.dispose()


# --- a 250 is never lost ----------------------------------------------------------------------------------------------


async def test_outcomes_of_a_lease_that_is_not_ours_any_more_are_told_by_themselves(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    keyring = Keyring.create(tmp_path / "keys", week_of(time.time_ns() // 1000))
    redis_client = valkey.client
    lanes = Lanes(redis_client, "host:0:1")
    lane = lane_named("a")
    state = JobState(1, 2, 0, False, FAR, False, 1)
    await lanes.put([PutRequest(7, 9, 0, state, [(0, some_slice(9, 7, lane, 3))])])
    (lease,) = (await lanes.lease(7, [(SITE, 1)], unresolved=1)).slices
    opened = open_slice(KEYS, 7, lease.data)
    assert isinstance(opened, tuple)
    header, contents = opened
    assert isinstance(header, Header)
    await lanes.reclaim(7, "host:0:1", (await lanes.holders(7))["host:0:1"])
    ended: list[Hand] = []
    book = Journal.open(tmp_path / "journal", "host:0:1", boot_id())
    settling = Settling(lanes, book, lambda: keyring, ended.append)
    hand = Hand(lease, header, contents, Loaded(9, b"k" * 32, 0, None, (), None, None), b"p" * 32)
    settling.terminal(hand, 0, Event(int(Kind.DELIVERED), 100, 1, 5))
    await settling.flush()
    settling.terminal(hand, 1, Event(int(Kind.DELIVERED), 101, 1, 5))  # it was on the wire
    await settling.flush()
    told = [event for _, _, batch in (await read_events(redis_client, {})).items for event in batch.events]
    assert [event.mref for event in told] == [100, 101]
    assert (settling.stale, hand.dead, ended[0]) == (1, True, hand)
    assert await lanes.waiting(9) == 3, "the slice is somebody else's"
    await book.close()
    assert list((tmp_path / "journal").glob("*.journal")) == []


# --- journeys ---------------------------------------------------------------------------------------------------------


class Keeper:
    """What the supervisor does for a worker: when it ends, another begins."""

    def __init__(self, mail: MailWorld) -> None:
        self._mail = mail
        self.codes: list[int] = []
        self.worker: asyncio.subprocess.Process | None = None

    async def keep(self) -> None:
        while True:
            self.worker = await self._mail.start_worker()
            code = await self.worker.wait()
            self._mail.workers.remove(self.worker)
            self.codes.append(code)
            assert code in (3, -signal.SIGKILL), self._mail.log()


@contextlib.asynccontextmanager
async def kept_worker(mail: MailWorld) -> AsyncIterator[Keeper]:
    keeper = Keeper(mail)
    keeping = asyncio.create_task(keeper.keep())
    try:
        yield keeper
        assert not keeping.done(), keeper.codes
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


def live_files(mail: MailWorld) -> Path:
    return mail.policy.server.embedded.folder / "appendonlydir"


def copied(mail: MailWorld, name: str) -> Path:
    """A copy of the append-only files as they are now, as a snapshot of the disk would be."""
    target = mail.folder / name
    while True:
        manifest = next(live_files(mail).glob("*.manifest"))
        before = manifest.read_bytes()
        with contextlib.suppress(OSError):  # a rewrite took a file away: once more
            shutil.copytree(live_files(mail), target)
            if manifest.read_bytes() == before:
                return target
        shutil.rmtree(target, ignore_errors=True)


async def kill_redis(mail: MailWorld) -> None:
    os.kill(mail.policy.server.embedded.pid, signal.SIGKILL)
    await mail.policy.server.stop()


async def start_older(mail: MailWorld, copy: Path) -> None:
    shutil.rmtree(live_files(mail))
    shutil.copytree(copy, live_files(mail))
    await mail.policy.server.start()


async def sent(mail: MailWorld, count: int) -> None:
    async with asyncio.timeout(60):
        while (await mail.sink_counts())["slow"]["accepted"] < count:
            await asyncio.sleep(0.02)


async def over(mail: MailWorld, job_id: str, seconds: float = 90.0) -> JobStatus:
    """The status when every row is accounted for."""
    status: JobStatus | None = None
    deadline = time.monotonic() + seconds
    while status is None or status.waiting != 0 or status.state not in ("done", "lost"):
        assert time.monotonic() < deadline, (status, mail.log())
        await asyncio.sleep(0.05)
        status = mail.policy.reader.job_status(job_id, mail.policy.clock())
    return status


async def nobody_twice(mail: MailWorld, job_id: str, unknown: int) -> JobStatus:
    status = await over(mail, job_id)
    sink = (await mail.sink_counts())["slow"]
    assert sink["accepted"] == sink["unique"], "hold never repeats anybody"
    counts = status.counts
    ends = {kind: counts.get(kind, 0) for kind in ("delivered", "unknown", "lost")}
    assert sum(ends.values()) == status.terminal == ROWS, counts
    assert ends["unknown"] <= unknown
    assert ends["delivered"] <= sink["unique"] <= ends["delivered"] + ends["unknown"] + ends["lost"]
    return status


async def test_a_campaign_goes_on_when_redis_comes_back_older() -> None:
    async with mail_world(SLOW) as mail, kept_worker(mail) as keeper:
        await mail.submit(job("older"), rows(ROWS - 60, "a.slow.test") + rows(60, "b.slow.test"))
        await sent(mail, 20)
        copy = copied(mail, "early")
        await sent(mail, ROWS // 2)
        await kill_redis(mail)
        await start_older(mail, copy)
        status = await nobody_twice(mail, "older", unknown=0)
        assert keeper.codes == [3]
        assert status.counts == {"delivered": ROWS}
        assert [sign.numbers["epoch"] for sign in read_all(mail.folder) if sign.role == "engine"] == [1.0]


async def test_a_campaign_goes_on_when_redis_comes_back_older_and_its_worker_died_as_well() -> None:
    async with mail_world(SLOW) as mail, kept_worker(mail) as keeper:
        await mail.submit(job("both"), rows(ROWS - 60, "a.slow.test") + rows(60, "b.slow.test"))
        await sent(mail, 20)
        copy = copied(mail, "early")
        await sent(mail, ROWS // 2)
        assert keeper.worker is not None
        keeper.worker.kill()
        await kill_redis(mail)
        await start_older(mail, copy)
        await nobody_twice(mail, "both", unknown=16)
        assert keeper.codes[0] == -signal.SIGKILL


@pytest.mark.parametrize(("doubt", "most"), [("hold", 0), ("resend", 16)])
async def test_who_was_in_doubt_when_redis_came_back_older(
    doubt: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies right behind a dot. `hold`: nobody gets a second copy, also by the older slice that still has
    them; `resend`: they get one more, from that slice."""
    async with mail_world(SLOW) as mail:
        with monkeypatch.context() as patch:
            patch.setenv("SALESPUSH_CRASH_AT", "after-dot:60")
            worker = await mail.start_worker()
        await mail.submit(job("doubt", in_doubt=doubt), rows(ROWS, "a.slow.test"))
        await sent(mail, 20)
        copy = copied(mail, "early")
        assert await worker.wait() == -signal.SIGKILL
        mail.workers.remove(worker)
        await kill_redis(mail)
        await start_older(mail, copy)
        await mail.start_worker()
        status = await over(mail, "doubt")
        sink = (await mail.sink_counts())["slow"]
        assert status.terminal == ROWS
        assert sink["accepted"] - sink["unique"] <= most
        if doubt == "hold":
            assert 1 <= status.counts["unknown"] <= 16
            assert status.counts["delivered"] + status.counts["unknown"] == ROWS
        else:
            assert status.counts["delivered"] == ROWS == sink["unique"]


def another_boot(mail: MailWorld) -> None:
    """As if the machine had gone down: the journals are of another boot, so their tails may be missing."""
    for path in (mail.folder / "journal").glob("*/*.journal"):
        data = path.read_bytes()
        log = read_head(path)
        other = "x" * len(log.boot)
        old = frame(encode_head(log.boot, log.holder, log.epoch))
        assert data.startswith(MAGIC + old)
        path.write_bytes(MAGIC + frame(encode_head(other, log.holder, log.epoch)) + data[len(MAGIC) + len(old) :])


@pytest.mark.parametrize("older", [False, True])
async def test_after_a_power_cut_whoever_was_leased_without_outcome_is_in_doubt(
    older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Redis lost its last seconds in it: whom the copy shows in the dead worker's hands is not sent to."""
    async with mail_world(SLOW) as mail:
        with monkeypatch.context() as patch:
            patch.setenv("SALESPUSH_CRASH_AT", "after-dot:60")
            worker = await mail.start_worker()
        await mail.submit(job("cut"), [row for n in range(8) for row in rows(ROWS // 8, f"d{n}.slow.test")])
        await sent(mail, 30)
        copy = copied(mail, "early")
        assert await worker.wait() == -signal.SIGKILL
        mail.workers.remove(worker)
        await kill_redis(mail)
        another_boot(mail)
        await (start_older(mail, copy) if older else mail.policy.server.start())
        await mail.start_worker()
        status = await nobody_twice(mail, "cut", unknown=ROWS)
        assert status.counts["unknown"] > 16, "more than what was behind its dot: they were only leased"


async def test_the_journal_of_a_neighbour_who_comes_back_late_is_told() -> None:
    async with mail_world(SLOW, workers=2) as mail:
        await mail.submit(job("two"), [row for n in range(8) for row in rows(ROWS // 8, f"d{n}.slow.test")])
        copy = copied(mail, "early")  # nobody has leased anything yet
        first, second = await asyncio.gather(mail.start_worker(0), mail.start_worker(1))
        await sent(mail, ROWS // 2)
        await mail.policy.writer.stop()  # what is settled from here on is in no ledger
        await sent(mail, ROWS // 2 + 30)
        for worker in (first, second):
            await mail.kill(worker)
            mail.workers.remove(worker)
        await kill_redis(mail)
        await start_older(mail, copy)
        await mail.policy.restart_writer()
        await mail.start_worker(0)
        async with asyncio.timeout(60):
            while await mail.policy.redis.hget(keyspace.META, "lease") != b"1":
                await asyncio.sleep(0.05)
        assert "journals of neighbours" in mail.log()
        await mail.start_worker(1)  # comes to a store that has been open for a while
        await nobody_twice(mail, "two", unknown=32)


async def test_what_was_expanded_after_the_copy_is_expanded_again() -> None:
    """The copy is of before anything was put on lanes: the entry is still in the intake stream of it."""
    async with mail_world(SLOW) as mail:
        await mail.submit(job("early"), rows(ROWS, "a.slow.test") + rows(2, "a.slow.test"))
        copy = copied(mail, "early")
        async with kept_worker(mail) as keeper:
            await sent(mail, ROWS // 2)
            await kill_redis(mail)
            await start_older(mail, copy)
            status = await over(mail, "early")
            sink = (await mail.sink_counts())["slow"]
            assert keeper.codes == [3]
            assert sink["accepted"] == sink["unique"] == ROWS
            assert status.counts == {"delivered": ROWS, "refused": 2}


@pytest.mark.parametrize("how", ["in order", "killed"])
async def test_a_restart_of_redis_loses_and_repeats_nobody_and_ends_no_worker(how: str) -> None:
    async with mail_world(SLOW) as mail:
        worker = await mail.start_worker()
        await mail.submit(job("restart"), rows(ROWS, "a.slow.test"))
        await sent(mail, 60)
        await (kill_redis(mail) if how == "killed" else mail.policy.server.stop())
        await mail.policy.server.start()
        status = await nobody_twice(mail, "restart", unknown=0)
        assert status.counts == {"delivered": ROWS}
        assert worker.returncode is None


async def test_a_worker_waits_for_the_writer_to_clear_redis() -> None:
    async with mail_world() as mail:
        await mail.policy.writer.stop()
        await mail.policy.server.restart()
        worker = await mail.start_worker()
        await mail.submit(job("patient"), rows(20, "a.accept.test"))
        async with asyncio.timeout(30):
            while "waiting for Redis" not in mail.log():
                await asyncio.sleep(0.05)
        client = mail.policy.redis
        holders = [await call(client, "EXISTS", keyspace.holders(partition)) for partition in range(64)]
        assert not any(holders)
        assert worker.returncode is None
        await mail.policy.restart_writer()
        status = await mail.finished("patient")
        assert status.counts == {"delivered": 20}


async def test_a_worker_that_waits_ends_when_it_is_told_to() -> None:
    async with mail_world() as mail:
        await mail.policy.writer.stop()
        await mail.policy.server.restart()
        worker = await mail.start_worker()
        async with asyncio.timeout(30):
            while "waiting for Redis" not in mail.log():
                await asyncio.sleep(0.05)
        assert await mail.drain(worker) == 0
        await mail.policy.restart_writer()
