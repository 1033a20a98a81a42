"""Redis in trouble, each way of faults.md 3.3, with a real worker and a real Valkey (promises T4, T7; I7).

Each time the same promise: nobody new is written to while the store is in trouble, what is on the wire finishes and is
journalled, the worker neither spins nor ends, and when the fault is over everybody is delivered exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import pytest_asyncio
from redis.exceptions import BusyLoadingError, RedisError, ResponseError

from engine.campaign.claims import Claims, Entry, Limits
from policy import keyspace, valkey
from policy.gate import PERMIT_SECONDS
from policy.valkey import call
from tests.chaos.proxy import FaultProxy
from tests.world.mail import job, rows
from tests.world.servers import short_folder, valkey_server
from tests.world.trouble import Ward, troubled, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

Fault = Callable[[Ward], contextlib.AbstractAsyncContextManager[None]]
ENDLESS = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture(scope="module")
def arguments() -> Iterator[Path]:
    """The server is started by a script: SIGXFSZ ignored, as Python has it, and with the arguments in this file."""
    with tempfile.TemporaryDirectory() as name:
        script, extra = Path(name, "server"), Path(name, "arguments")
        extra.write_text("")
        script.write_text(f'#!/bin/sh\ntrap "" XFSZ\nexec {valkey.find_binary()} "$@" $(cat {extra})\n')
        script.chmod(stat.S_IRWXU)
        with mock.patch.object(valkey, "find_binary", return_value=script):
            yield extra


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ward(arguments: Path) -> AsyncIterator[Ward]:
    """One world for all faults that leave it as they found it: that they do is the promise."""
    async with troubled(settings=[("lease_seconds = 10", "lease_seconds = 4")]) as made:
        yield made


# --- ways to be in trouble; each lasts as long as its block --------------------------------------------------------


@contextlib.asynccontextmanager
async def read_only(ward: Ward) -> AsyncIterator[None]:
    """A failover made a replica of it; reads go on (the trap to fail closed in)."""
    redis = ward.mail.policy.redis
    await call(redis, "REPLICAOF", "127.0.0.1", "1")
    try:
        yield
    finally:
        await call(redis, "REPLICAOF", "NO", "ONE")


@contextlib.asynccontextmanager
async def out_of_memory(ward: Ward) -> AsyncIterator[None]:
    """noeviction at its limit: XACK and reads still work."""
    redis = ward.mail.policy.redis
    await redis.config_set("maxmemory", "1mb")
    try:
        yield
    finally:
        await redis.config_set("maxmemory", "0")


@contextlib.asynccontextmanager
async def busy_script(ward: Ward) -> AsyncIterator[None]:
    """A script that does not end: everybody else is told BUSY after the time limit."""
    redis = ward.mail.policy.redis
    await redis.config_set("lua-time-limit", "100")
    spinning = asyncio.create_task(call(redis, "EVAL", "while true do end", "0"))
    try:
        await asyncio.sleep(0.3)
        yield
    finally:
        await call(redis, "SCRIPT", "KILL")
        with contextlib.suppress(RedisError):
            await spinning
        await redis.config_set("lua-time-limit", "5000")


@contextlib.asynccontextmanager
async def misconf(ward: Ward) -> AsyncIterator[None]:
    """The disk of the append-only file is full, appendfsync everysec: reads work, writes get MISCONF."""
    redis, server = ward.mail.policy.redis, ward.mail.policy.server.embedded
    await redis.config_set("appendfsync", "everysec")
    _fill_disk_of(server)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(ResponseError, match="MISCONF"):
                while True:
                    await redis.set("test:fill", "x" * 1000)
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, ENDLESS)
        await _writes_again(ward)
        await redis.config_set("appendfsync", "always")


@contextlib.asynccontextmanager
async def disk_full_and_gone(ward: Ward) -> AsyncIterator[None]:
    """The same with appendfsync always: the server exits at its next write; somebody starts it when there is room."""
    server = ward.mail.policy.server
    _fill_disk_of(server.embedded)
    with contextlib.suppress(RedisError):
        await ward.mail.policy.redis.set("test:fill", "x" * 100_000)
    await until(lambda: not server.embedded.running())
    try:
        yield
    finally:
        await server.restart()


@contextlib.asynccontextmanager
async def stopped(ward: Ward) -> AsyncIterator[None]:
    """It hangs (SIGSTOP): nothing answers, nothing is closed."""
    pid = ward.mail.policy.server.embedded.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def away_for_a_moment(ward: Ward) -> AsyncIterator[None]:
    await ward.mail.policy.server.stop()
    try:
        yield
    finally:
        await ward.mail.policy.server.start()


@contextlib.asynccontextmanager
async def away_for_longer_than_a_lease(ward: Ward) -> AsyncIterator[None]:
    await ward.mail.policy.server.stop()
    try:
        yield
        await asyncio.sleep(2.0)  # with what went before, longer than lease_seconds of this world
        await ward.says("in_trouble", 1)
        ward.nothing_spins()
    finally:
        await ward.mail.policy.server.start()


@contextlib.asynccontextmanager
async def loading(ward: Ward) -> AsyncIterator[None]:
    """Restarted with a large append-only file: LOADING to everything for a while."""
    redis, server = ward.mail.policy.redis, ward.mail.policy.server
    extra = Path(valkey.find_binary()).with_name("arguments")
    async with redis.pipeline(transaction=False) as pipe:
        for number in range(50_000):
            pipe.set(f"test:{number}", number)
        await pipe.execute()
    await server.stop()
    await asyncio.sleep(2 * PERMIT_SECONDS)  # what was permitted while the keys were written is asked for by now
    ward.begin()
    extra.write_text("--key-load-delay 50 --loading-process-events-interval-bytes 1024")  # µs a key: some 5 s
    server.embedded.start()
    ready = asyncio.create_task(server.embedded.wait_ready())
    try:
        while True:
            try:
                await call(redis, "PING")
            except BusyLoadingError:
                break
            except (RedisError, OSError):
                pass
            assert not ready.done(), "it never said LOADING"
            await asyncio.sleep(0.02)
        yield
        assert not ready.done(), "it was loading all the time"
    finally:
        async with asyncio.timeout(20):
            while not ready.done():
                with contextlib.suppress(RedisError, OSError):
                    await redis.config_set("key-load-delay", "0")
        await ready
        extra.write_text("")
        await redis.unlink(*[f"test:{number}" for number in range(50_000)])


def _fill_disk_of(server: valkey.EmbeddedServer) -> None:
    """No file of it grows beyond what its append-only file has now."""
    size = max(path.stat().st_size for path in server.folder.rglob("*.incr.aof"))
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def _writes_again(ward: Ward) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(RedisError):
                await ward.mail.policy.redis.set("test:fill", "x")
                return
            await asyncio.sleep(0.05)


TOLD = [read_only, out_of_memory, busy_script, misconf, disk_full_and_gone, away_for_a_moment]


@pytest.mark.parametrize("fault", TOLD, ids=lambda fault: fault.__name__)
async def test_trouble_that_is_told(ward: Ward, fault: Fault) -> None:
    async with ward.campaign(fault.__name__):
        async with fault(ward):
            await ward.wire_finishes()
            await ward.until(lambda: "Redis is in trouble" in ward.news)
            await ward.nothing_new()
        await ward.until(lambda: "over: Redis is in trouble" in ward.news)


@pytest.mark.parametrize("fault", [stopped, loading, away_for_longer_than_a_lease], ids=lambda fault: fault.__name__)
async def test_trouble_that_is_silence(ward: Ward, fault: Fault) -> None:
    async with ward.campaign(fault.__name__):
        async with fault(ward):
            await ward.wire_finishes()
            await ward.nothing_new()


async def test_forgotten_scripts_are_sent_again(ward: Ward) -> None:
    redis = ward.mail.policy.redis
    async with ward.campaign("forgotten"):
        forget = True

        async def forgetting() -> None:
            while forget:
                await call(redis, "SCRIPT", "FLUSH")
                await asyncio.sleep(0.02)

        task = asyncio.create_task(forgetting())
        ward.sink.release()
        await ward.mail.finished("forgotten")
        forget = False
        await task


# --- a bad line to Redis -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def on_a_line() -> AsyncIterator[tuple[Ward, FaultProxy]]:
    """A world whose worker reaches Redis over a line that can be bad; everybody else has it to themselves."""
    with short_folder() as folder:
        async with troubled(policy=f'redis_url = "unix://{folder}/line"\n', start=False) as ward:
            server = ward.mail.policy.server.embedded.socket
            async with FaultProxy(f"unix:{server}", f"unix:{folder}/line") as line:
                try:
                    await ward.mail.start_worker()
                    yield ward, line
                finally:
                    for worker in ward.mail.workers:
                        if worker.returncode is None:
                            await ward.mail.kill(worker)


async def test_a_slow_line_slows_and_breaks_nothing() -> None:
    async with on_a_line() as (ward, line):
        async with ward.campaign("slow"):
            line.down.delay = 0.2


@pytest.mark.parametrize(("what", "every"), [("reset_commands", 50), ("reset_bytes", 12_000)])
async def test_a_line_that_breaks_all_the_time(what: str, every: int) -> None:
    """In the middle of pipelines and of replies: leases nobody heard of, settles that are asked again."""
    async with on_a_line() as (ward, line):
        async with ward.campaign("cut", 1000):  # 400 broke it 16 times once, and then nothing was left to do
            setattr(line, what, every)
            ward.sink.release()
            await until(lambda: line.resets >= 20, say=lambda: (line.counts(), ward.log[-3000:]))
            ward.nothing_spins()
            setattr(line, what, 0)


async def test_a_storm_of_cancelled_calls_gives_nobody_the_reply_of_another(ward: Ward) -> None:
    """CVE-2023-28858: a cancelled await must not leave its reply on a connection of the pool."""
    choose = random.Random(7)
    client = valkey.connect(ward.mail.policy.server.url, max_connections=16)

    async def ask(number: int) -> None:
        if number % 2:
            async with client.pipeline(transaction=False) as pipe:
                for part in range(3):
                    pipe.execute_command("ECHO", f"{number}/{part}")
                assert await pipe.execute() == [f"{number}/{part}".encode() for part in range(3)]
        else:
            assert await call(client, "ECHO", str(number)) == str(number).encode()

    kept = cancelled = 0
    for storm in range(100):
        tasks = [asyncio.create_task(ask(1000 * storm + number)) for number in range(16)]
        for victim in choose.sample(tasks, 10):
            for _ in range(choose.randrange(3)):
                await asyncio.sleep(0)
            victim.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            cancelled += isinstance(result, asyncio.CancelledError)
            kept += result is None
            assert result is None or isinstance(result, asyncio.CancelledError), result
    assert cancelled >= 100
    assert kept >= 100
    await asyncio.gather(*(ask(number) for number in range(16)))  # none of the sixteen is lost to the pool
    await client.aclose()


# --- passwords and rights ------------------------------------------------------------------------------------------


async def test_a_changed_password_and_missing_rights() -> None:
    async with troubled(policy="", start=False) as ward:
        redis, folder = ward.mail.policy.redis, ward.mail.folder
        (folder / "password").write_text("one")
        (folder / "password").chmod(0o600)
        rights = ("on", "~*", "&*", "+@all", ">one")
        await call(redis, "ACL", "SETUSER", "worker", *rights)
        text = ward.mail.config.read_text()
        url = f'redis_url = "unix://worker@{ward.mail.policy.server.embedded.socket}"\n'
        ward.mail.config.write_text(
            text.replace("[policy]\n", f'[policy]\n{url}redis_password_file = "{folder}/password"\n', 1)
        )
        await ward.mail.start_worker()
        async with ward.campaign("password"):
            await call(redis, "ACL", "SETUSER", "worker", "resetpass", ">another")
            await call(redis, "CLIENT", "KILL", "USER", "worker")
            await ward.wire_finishes()
            await ward.says("in_trouble", 1)
            await ward.nothing_new()
            await call(redis, "ACL", "SETUSER", "worker", *rights)
        # One right that only the settle needs: the gate cannot know, so what is permitted until the first settle fails
        # still goes. Then it stops, and no event is lost because its done bit was written and it was not.
        async with ward.campaign("lacking-xadd", 400):
            await call(redis, "ACL", "SETUSER", "worker", "-xadd")
            await ward.wire_finishes()
            await ward.says("in_trouble", 1)
            await ward.until(lambda: not ward.sink.busy)
            ward.begin()
            await asyncio.sleep(1)
            assert sum(ward.sink.asked.values()) == ward.asked_before
            ward.nothing_spins()
            await call(redis, "ACL", "SETUSER", "worker", *rights)


# --- what a worker asks at its start -------------------------------------------------------------------------------


async def _run_engine(config: Path) -> tuple[int, str]:
    """The command line's own way; ended by us when it lives."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from engine.cli import main; main()", "run", "engine", "--config", str(config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_store_that_may_evict_is_refused_with_the_way_out() -> None:
    async with troubled(start=False) as ward:
        redis = ward.mail.policy.redis
        for policy in ("allkeys-lru", "volatile-ttl"):
            await redis.config_set("maxmemory-policy", policy)
            code, said = await _run_engine(ward.mail.config)
            assert code == 2
            assert "noeviction" in said
            assert policy in said


async def test_a_store_that_may_forget_is_warned_about_in_the_log() -> None:
    async with troubled(start=False) as ward:
        redis = ward.mail.policy.redis
        for setting, value, words in (
            ("appendfsync", "everysec", "appendfsync is everysec"),
            ("appendonly", "no", "appendonly is off"),
        ):
            await redis.config_set(setting, value)
            worker = await ward.mail.start_worker()
            await ward.until(lambda words=words: words in ward.log)  # type: ignore[misc]  # bound now
            await ward.mail.kill(worker)


# --- the intake stream ---------------------------------------------------------------------------------------------

STREAM, GROUP = keyspace.INTAKE, keyspace.INTAKE_GROUP

# entries of a consumer that died long ago: so many that were trimmed since, and behind them one that is still there
_LEFT = """
local old, real = tonumber(ARGV[2]), ARGV[3]
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
for n = 1, old do
  redis.call('XADD', KEYS[1], n .. '-1', 'job', '{}')
end
redis.call('XADD', KEYS[1], '*', 'job', real)
redis.call('XREADGROUP', 'GROUP', ARGV[1], 'dead', 'COUNT', old + 1, 'STREAMS', KEYS[1], '>')
local ids = {}
for n = 1, old do
  ids[#ids + 1] = n .. '-1'
  if #ids == 1000 or n == old then
    local claim = {'XCLAIM', KEYS[1], ARGV[1], 'dead', 0}
    for at = 1, #ids do
      claim[#claim + 1] = ids[at]
    end
    claim[#claim + 1], claim[#claim + 2], claim[#claim + 3] = 'IDLE', 3600000, 'JUSTID'
    redis.call(unpack(claim))
    ids = {}
  end
end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1]
redis.call('XCLAIM', KEYS[1], ARGV[1], 'dead', 0, last, 'IDLE', 3600000, 'JUSTID')
redis.call('XTRIM', KEYS[1], 'MINID', last)
return redis.call('XPENDING', KEYS[1], ARGV[1])[1]
"""


async def test_a_hundred_thousand_pending_entries_hide_nobody() -> None:
    """XAUTOCLAIM looks at a few at a time and answers nothing where there is more: its cursor is followed."""
    async with troubled(start=False) as ward:
        redis = ward.mail.policy.redis
        await redis.config_set("appendfsync", "no")  # 12,500 calls that would each wait for the disk
        people = rows(20, "pending.held.test")
        entry = json.dumps({**job("pending"), "recipients": people})
        assert await call(redis, "EVAL", _LEFT, "1", STREAM, GROUP, "100000", entry) == 100_001
        await ward.mail.start_worker()
        status = await ward.mail.finished("pending")
        assert status.counts == {"delivered": 20}
        pending = await redis.xpending(STREAM, GROUP)
        assert pending["pending"] == 0


async def test_a_trimmed_and_a_deleted_stream_cost_what_was_in_them_and_no_more(ward: Ward) -> None:
    redis = ward.mail.policy.redis
    async with ward.campaign("trimmed"):
        ward.sink.release()
        await call(redis, "XTRIM", STREAM, "MAXLEN", "0")
        await call(redis, "XADD", STREAM, "*", "job", json.dumps({**job("half"), "audience": {"chunks": 2}}))
        await ward.until(lambda: ward.mail.policy.reader.job_status("half", ward.mail.policy.clock()) is not None)
        # its second half never comes; a piece of it is being waited for when somebody deletes the stream and its group
        await call(redis, "XADD", STREAM, "*", "audience", "unheard-of", "account", "shop", "n", "0", "data", "{}")
        await asyncio.sleep(0.5)
        await redis.delete(STREAM)
    async with ward.campaign("after"):
        pass


async def test_names_of_dead_workers_are_forgotten_and_their_entries_are_not() -> None:
    async with valkey_server() as server:
        redis = server.client
        limits = Limits(claim_idle=0.1)
        claims = [Claims(redis, f"host:{life}", limits, time.monotonic) for life in range(30)]
        await claims[0].prepare()
        entry = await redis.xadd(STREAM, {"job": "{}"})
        for each in claims[1:]:
            await each.take(0.0)  # the first of them has the entry, and all of them die here
        assert len(await redis.xinfo_consumers(STREAM, GROUP)) == 29
        found: list[Entry] = []
        async with asyncio.timeout(20):
            while len(await redis.xinfo_consumers(STREAM, GROUP)) > 1 or not found:
                found += await claims[0].take(0.05)
        assert found[0].id.encode() == entry
        assert [consumer["name"] for consumer in await redis.xinfo_consumers(STREAM, GROUP)] == [b"host:0"]
        # a name that comes back is as good as new
        await redis.xadd(STREAM, {"job": "{}"})
        assert len(await claims[5].take(0.0)) >= 1


# --- the clock of the store ----------------------------------------------------------------------------------------


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Path]:
    """Servers are started under libfaketime: their clock is wrong by what this file says, such as +1d."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), *Path("/usr/lib").glob("faketime/libfaketimeMT*")]
    assert found, "faketime is missing: .ci/run installs it"
    script, file = tmp_path / "server", tmp_path / "clock"
    file.write_text("+0\n")
    script.write_text(
        f"#!/bin/sh\nexport LD_PRELOAD={found[0]} FAKETIME_TIMESTAMP_FILE={file} FAKETIME_NO_CACHE=1 "
        f'FAKETIME_DONT_FAKE_MONOTONIC=1\nexec {valkey.find_binary()} "$@"\n'
    )
    script.chmod(stat.S_IRWXU)
    with mock.patch.object(valkey, "find_binary", return_value=script):
        yield file


@pytest.mark.debian
@pytest.mark.parametrize("step", ["+1d", "-1d"])
async def test_a_store_whose_clock_steps_by_a_day_while_slices_wait_and_are_leased(clock: Path, step: str) -> None:
    """Ahead, what waits comes early; back, what was due stays due. Nobody is lost, nobody gets it twice."""
    settings = [("[engine.limits]\nconnections = 8", "[engine.limits]\nconnections = 8\nrate = 200.0\nburst = 10.0")]
    async with troubled(settings=settings) as ward:
        async with ward.campaign("stepped", 600, seconds=40):
            clock.write_text(f"{step}\n")
            seconds, _ = await ward.mail.policy.redis.time()
            assert abs(abs(seconds - time.time()) - 86_400) < 60
        async with ward.campaign("after", 60):
            pass
