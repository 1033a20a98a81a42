"""Graceful drain (issue 3, item 7; faults 3.4): SIGTERM leaves nobody behind, nobody twice and nothing in Redis.

The dead of every test are real processes; what they left is read from Redis (`left_in_redis`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from engine.queue import states
from engine.queue.lanes import Lanes, LeaseRequest
from policy import keyspace
from policy.valkey import call
from tests.world.courier import courier_world
from tests.world.mail import ROOT, MailWorld, job, mail_world, rows
from tests.world.queue_census import census

PATIENCE = 45.0  # seconds; only ever spent when something is broken


async def until(condition: Callable[[], Any]) -> None:
    """What another process does is polled for."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.02)


async def taken(mail: MailWorld, provider: str = "slow") -> int:
    return int((await mail.sink_counts())[provider]["accepted"])


async def progress(mail: MailWorld, more: int, provider: str = "slow") -> None:
    goal = await taken(mail, provider) + more

    async def reached() -> bool:
        return await taken(mail, provider) >= goal

    await until(reached)


async def left_in_redis(mail: MailWorld) -> dict[str, Any]:
    """What a worker that ended in order must have taken away: leases, heartbeats, permits, its entry, its claims."""
    redis = mail.policy.redis
    found: dict[str, Any] = {}
    for pattern in ("sp:{p*}:lease", "sp:{p*}:hold", "sp:{s:*}:c", keyspace.HOSTS):
        for key in await call(redis, "KEYS", pattern):
            found[key.decode()] = await call(redis, "TYPE", key)
    if await call(redis, "EXISTS", keyspace.INTAKE):
        for group in await call(redis, "XINFO", "GROUPS", keyspace.INTAKE):
            if group[b"pending"] or group[b"consumers"]:
                found["claims"] = group
    return found


async def stopped(worker: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(PATIENCE):
        return await worker.wait()


def configure(mail: MailWorld, **changes: str) -> None:
    """Replace lines of the configuration by name."""
    lines = mail.config.read_text().splitlines()
    for name, value in changes.items():
        assert any(line.startswith(f"{name} = ") for line in lines), name
        lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in lines]
    mail.config.write_text("\n".join(lines) + "\n")


@pytest.mark.timeout(300)
async def test_twenty_starts_and_stops_under_load_lose_nobody_and_repeat_nobody() -> None:
    async with mail_world("slow:0:name=slow,delay=0.05") as mail:
        people = rows(500, "a.slow.test") + rows(300, "b.slow.test") + rows(100, "c.slow.test")
        await mail.submit(job("often"), people)
        for cycle in range(20):
            worker = await mail.start_worker()
            await progress(mail, 7 + cycle % 5)
            worker.terminate()
            assert await stopped(worker) == 0, mail.log()
            assert await left_in_redis(mail) == {}
            for partition in range(keyspace.PARTITIONS):
                assert states.violations(await census(mail.policy.redis, partition)) == []
        assert await taken(mail) < 900, "the load lasted to the end"
        await mail.start_worker()
        status = await mail.finished("often")
        sink = (await mail.sink_counts())["slow"]

        assert status.counts == {"delivered": 900}
        assert sink["accepted"] == sink["unique"] == 900


async def test_what_is_behind_its_dot_is_waited_for() -> None:
    async with mail_world("slow:0:name=slow,delay=1.5") as mail:
        worker = await mail.start_worker()
        await mail.submit(job("dots"), rows(100, "a.slow.test"))
        await progress(mail, 1)
        await asyncio.sleep(0)
        worker.terminate()
        assert await stopped(worker) == 0
        assert await left_in_redis(mail) == {}
        sent = (await mail.sink_counts())["slow"]
        await mail.policy.drain()
        status = mail.policy.reader.job_status("dots", mail.policy.clock())
        assert status is not None
        assert status.counts == {"delivered": sent["accepted"]}, "every 250 of the last second is in the ledger"
        configure(mail, connections="30")
        await mail.start_worker()
        assert (await mail.finished("dots")).counts == {"delivered": 100}
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 100


async def test_a_second_signal_hurries_and_what_was_behind_its_dot_is_unknown() -> None:
    async with mail_world("slow:0:name=slow,delay=0.3", "slow:0:name=stuck,delay=3600") as mail:
        configure(mail, drain_seconds="3600")
        worker = await mail.start_worker()
        await mail.submit(job("hurry"), rows(40, "a.stuck.test") + rows(20, "b.slow.test"))
        await progress(mail, 20)

        async def is_stuck() -> bool:
            return int((await mail.sink_counts())["stuck"]["connections"]) > 0

        await until(is_stuck)
        worker.terminate()
        while "draining" not in await state_of(mail) and "ending" not in await state_of(mail):
            await asyncio.sleep(0.02)
        assert worker.returncode is None, "it waits for the dots"
        worker.terminate()
        assert await stopped(worker) == 0
        assert await left_in_redis(mail) == {}
        await mail.policy.drain()
        status = mail.policy.reader.job_status("hurry", mail.policy.clock())
        assert status is not None
        assert status.counts["delivered"] == 20
        assert 1 <= status.counts["unknown"] <= 16, "at most two on each of eight connections"
        assert status.terminal < 60, "the others wait for the next worker"


async def state_of(mail: MailWorld) -> str:
    stored = await call(mail.policy.redis, "HVALS", keyspace.HOSTS)
    return b" ".join(stored).decode()


async def test_a_peer_that_never_greets_does_not_hold_a_drain() -> None:
    async with silent_peer() as port, mail_world("slow:0:name=slow,delay=0.1", others={"mute": port}) as mail:
        configure(mail, drain_seconds="3600")
        worker = await mail.start_worker()
        await mail.submit(job("mute"), rows(20, "a.mute.test") + rows(200, "b.slow.test"))
        await progress(mail, 30)
        worker.terminate()
        assert await stopped(worker) == 0
        assert await left_in_redis(mail) == {}


@contextlib.asynccontextmanager
async def silent_peer() -> AsyncIterator[int]:
    writers: list[asyncio.StreamWriter] = []

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await server.wait_closed()


async def test_redis_away_and_back_during_the_drain() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        worker = await mail.start_worker()
        await mail.submit(job("back"), rows(300, "a.slow.test"))
        await progress(mail, 20)
        await mail.policy.server.stop()
        worker.terminate()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await worker.wait()
        await mail.policy.server.start()
        assert await stopped(worker) == 0
        assert await left_in_redis(mail) == {}
        await mail.start_worker()
        assert (await mail.finished("back")).counts == {"delivered": 300}
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 300


async def test_redis_away_to_the_end_leaves_it_to_the_journal_and_says_so() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        configure(mail, drain_seconds="3")
        worker = await mail.start_worker()
        await mail.submit(job("away"), rows(300, "a.slow.test"))
        await progress(mail, 20)
        await mail.policy.server.stop()
        worker.terminate()
        assert await stopped(worker) == 1
        assert "slices stay leased" in mail.log()
        mail.workers.clear()  # its code is what was asked for
        await mail.policy.server.start()
        await mail.start_worker()
        assert (await mail.finished("away")).counts == {"delivered": 300}, "every 250 was journalled"
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 300
        assert await mail.drain(mail.workers[0]) == 0
        assert await left_in_redis(mail) == {}


async def test_redis_hanging_to_the_end_does_not_hold_a_drain() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        configure(mail, drain_seconds="3")
        worker = await mail.start_worker()
        await mail.submit(job("hang"), rows(100, "a.slow.test"))
        await progress(mail, 10)
        with frozen(mail.policy.server.embedded.pid):
            worker.terminate()
            assert await stopped(worker) == 1
        mail.workers.clear()
        await mail.start_worker()
        assert (await mail.finished("hang")).counts == {"delivered": 100}
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 100


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_signal_while_redis_is_away_at_the_start() -> None:
    async with mail_world() as mail:
        await mail.policy.server.stop()
        worker = await mail.start_worker()

        async def waits() -> bool:
            return "waiting for Redis" in mail.log()

        await until(waits)
        worker.terminate()
        assert await stopped(worker) == 0
        await mail.policy.server.start()


HANGING_REPLAY = """
import asyncio, sys
from pathlib import Path
from engine import worker
from engine.delivery import replay

async def never(ask):
    print("replaying", flush=True)
    await asyncio.Event().wait()

replay.patiently = never
sys.exit(worker.run_worker(0, Path(sys.argv[1])))
"""


async def test_a_signal_during_the_replay_leaves_the_journal_to_the_next() -> None:
    async with mail_world("slow:0:name=slow,delay=0.1") as mail:
        worker = await mail.start_worker()
        await mail.submit(job("replay"), rows(200, "a.slow.test"))
        await progress(mail, 30)
        await mail.kill(worker)
        journals = sorted(path.name for path in (mail.folder / "journal" / "0").glob("*.journal"))
        assert journals
        second = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HANGING_REPLAY, str(mail.config), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        mail.workers.append(second)
        assert second.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while b"replaying" not in await second.stdout.readline():
                pass
        second.terminate()
        assert await stopped(second) == 0
        still = {path.name for path in (mail.folder / "journal" / "0").glob("*.journal")}
        assert set(journals) <= still
        await mail.start_worker()
        status = await mail.finished("replay")
        sink = (await mail.sink_counts())["slow"]
        assert status.terminal == 200
        assert sink["accepted"] == sink["unique"]
        assert status.counts.get("unknown", 0) <= 16


# --- one courier, looked into: the instants that a process test cannot choose -----------------------------------------


async def test_a_lease_call_under_way_is_waited_for_and_its_slices_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with courier_world() as world:
        entered, answer, job_ = asyncio.Event(), asyncio.Event(), world.job()
        real = Lanes.lease_many

        async def late(lanes: Lanes, requests: Any, ready_limit: int = 64) -> Any:
            entered.set()
            await answer.wait()  # it has left, and Redis has not heard it yet
            return await real(lanes, requests, ready_limit)

        monkeypatch.setattr(Lanes, "lease_many", late)
        await world.put(job_, ["ada", "bob", "cleo"])
        async with asyncio.timeout(PATIENCE):
            await entered.wait()
        world.courier.stop()
        draining = asyncio.create_task(world.courier.drain(30.0))
        await asyncio.sleep(0.2)  # long enough to be through, were the call not waited for
        assert not draining.done()
        answer.set()
        assert await draining
        assert [slice_.holder for slice_ in await world.waiting()] == [""]
        assert await world.lanes.all_holders() == {}
        assert world.arrived() == []


async def test_what_came_into_our_hands_without_our_knowing_goes_back_too() -> None:
    """The client repeats a call whose reply was lost: the first run's leases are known to Redis only."""
    async with courier_world() as world:
        job_ = world.job()
        job_.shut[0] = 3600.0
        partition = keyspace.partition_of("other.test")
        await world.courier.drain(30.0)
        await world.put(job_, ["ada"], domain="other.test")
        unheard = Lanes(world.server.client, world.courier.holder)
        [leased] = await unheard.lease_many([LeaseRequest(partition, [], 1)])
        assert len(leased.slices) == 1
        assert await world.courier.drain(30.0)
        assert await world.lanes.all_leases() == []
        assert await world.lanes.all_holders() == {}


async def test_a_host_rests_and_goes_on_again_and_again() -> None:
    async with courier_world(connections=2) as world:
        names = [f"n{number}" for number in range(120)]
        await world.put(world.job(), names)
        seen = 0
        while len(world.arrived()) < 120:
            goal = min(120, len(world.arrived()) + 15)
            await world.until(lambda goal=goal: len(world.arrived()) >= goal)  # type: ignore[misc]  # bound at once
            world.courier.rest(True)
            await world.until(lambda: world.courier.is_away)
            assert await world.lanes.all_leases() == []
            assert world.courier.hands == set()
            assert world.courier.statistics()["at_rest"] == 1
            before = len(world.arrived())
            await asyncio.sleep(0.3)  # a sweep of the lanes would lease within a quarter of a second
            assert len(world.arrived()) == before
            assert await world.lanes.all_leases() == []
            world.courier.rest(False)
            seen += 1
        assert seen >= 3
        assert sorted(world.names()) == sorted(names)


async def test_an_undo_while_it_finishes_is_heard() -> None:
    async with courier_world("dot.late.1", connections=2) as world:
        await world.put(world.job(), [f"n{number}" for number in range(6)])
        await world.until(lambda: bool(world.courier.statistics()["connections"]))
        world.courier.rest(True)
        await asyncio.sleep(0.1)
        world.courier.rest(False)
        await world.until(lambda: len(world.arrived()) == 6)
        assert len(set(world.names())) == 6
