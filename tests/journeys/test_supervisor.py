"""`sales-push up` as promised by engine.supervisor: order, restart, drain, hurry, locks, no orphans. Real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.settings import Supervisor as SupervisorSettings
from engine.supervisor import AlreadyRunning, Lock, Phase, Role, Supervisor, pause
from policy.valkey import EmbeddedServer, connect
from policy.vitals import read_all

PATIENCE = 30.0  # seconds; only ever spent when something is broken
QUICK = SupervisorSettings(restart_base=0.01, restart_cap=0.05, drain_seconds=20.0, hurry_seconds=0.05)

# A role for the tests: says "<name> start <pid>" to the test's socket, then behaves as told.
CHILD = """
import os, signal, socket, sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
name, behaviour, watch = sys.argv[1:]
if behaviour == "bound":
    from engine.supervisor import die_with_parent
    die_with_parent(os.environ)
line = socket.socket(socket.AF_UNIX)
line.connect(watch)
def say(word):
    line.sendall(f"{name} {word} {os.getpid()}\\n".encode())
say("start")
if behaviour.startswith("exit"):
    sys.exit(int(behaviour[4:]))
while True:
    signal.sigwait({signal.SIGTERM})
    say("term")
    if behaviour != "stubborn":
        sys.exit(0)
"""


class Watch:
    """Hears what the children say, in the order they said it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[tuple[str, str, int]] = []
        self._news = asyncio.Condition()
        self._writers: list[asyncio.StreamWriter] = []

    async def close(self) -> None:
        """Every line a child opened: one left to the collector would warn in some later test."""
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        async for line in reader:
            name, word, pid = line.decode().split()
            async with self._news:
                self.heard.append((name, word, int(pid)))
                self._news.notify_all()
        writer.close()

    async def wait(self, name: str, word: str, times: int = 1) -> int:
        """The pid of the child that said it for the times-th time."""
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: len(self._said(name, word)) >= times)
            return self._said(name, word)[times - 1]

    def _said(self, name: str, word: str) -> list[int]:
        return [pid for heard, said, pid in self.heard if (heard, said) == (name, word)]

    def order(self, word: str) -> list[str]:
        return [name for name, said, _ in self.heard if said == word]

    def role(self, name: str, behaviour: str = "good", phase: Phase = Phase.WORK) -> Role:
        return Role(name, (sys.executable, "-c", CHILD, name, behaviour, str(self.path)), phase)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        yield Path(name)


@pytest.fixture
async def watch(folder: Path) -> AsyncIterator[Watch]:
    ear = Watch(folder / "watch.sock")
    server = await asyncio.start_unix_server(ear.hear, str(ear.path))
    yield ear
    server.close()
    await server.wait_closed()
    await ear.close()


def make(
    folder: Path,
    roles: Sequence[Role],
    settings: SupervisorSettings = QUICK,
    *,
    server: EmbeddedServer | None = None,
    writer_socket: Path | None = None,
    report: Callable[[str], None] = lambda _line: None,
) -> Supervisor:
    data_dir = folder / "data"
    return Supervisor(settings, data_dir, roles, server=server, writer_socket=writer_socket, report=report)


@contextlib.asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[asyncio.Task[int]]:
    task = asyncio.create_task(supervisor.run())
    try:
        yield task
    finally:
        if not task.done():
            supervisor.end()
            supervisor.end()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(task, return_exceptions=True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@given(st.integers(1, 10_000), st.floats(0.001, 60), st.floats(0.001, 3600))
def test_each_pause_is_at_least_the_one_before_and_at_most_the_cap(failures: int, base: float, cap: float) -> None:
    assert pause(failures, base, cap) <= pause(failures + 1, base, cap) <= cap
    assert pause(1, base, cap) == min(base, cap)


async def test_who_makes_work_stops_before_who_writes_it_down(folder: Path, watch: Watch) -> None:
    roles = [
        watch.role("policy", phase=Phase.RECORD),
        watch.role("engine-0"),
        watch.role("engine-1"),
        watch.role("tracker-0"),
        watch.role("ops", phase=Phase.RECORD),
    ]
    lines: list[str] = []
    supervisor = make(folder, roles, report=lines.append)
    async with running(supervisor) as task:
        for role in roles:
            await watch.wait(role.name, "start")
        supervisor.end()
        async with asyncio.timeout(PATIENCE):
            assert await task == 0

    stopped = watch.order("term")
    assert set(stopped[:3]) == {"engine-0", "engine-1", "tracker-0"}
    assert set(stopped[3:]) == {"policy", "ops"}
    assert "up: policy running · ops running · engine 2/2 · tracker 1/1" in lines
    assert lines[-1] == "draining: policy stopped · ops stopped · engine 0/2 · tracker 0/1"


async def test_the_others_start_once_the_writer_answers(folder: Path, watch: Watch) -> None:
    socket = folder / "policy.sock"
    roles = [watch.role("policy", phase=Phase.RECORD), watch.role("engine-0")]
    supervisor = make(folder, roles, writer_socket=socket)
    async with running(supervisor):
        await watch.wait("policy", "start")
        assert supervisor.children[1].state == "waiting"

        asked = asyncio.Event()

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.set()
            writer.close()

        server = await asyncio.start_unix_server(answer, str(socket))
        await watch.wait("engine-0", "start")
        assert asked.is_set()
        server.close()


async def test_a_killed_child_is_started_again(folder: Path, watch: Watch) -> None:
    supervisor = make(folder, [watch.role("engine-0"), watch.role("tracker-0")])
    async with running(supervisor):
        first = await watch.wait("engine-0", "start")
        os.kill(first, signal.SIGKILL)
        second = await watch.wait("engine-0", "start", times=2)
        assert second != first
        assert supervisor.children[0].restarts == 1
        assert supervisor.children[1].restarts == 0
        await watch.wait("tracker-0", "start")
        [sign] = read_all(folder / "data")
        assert sign.role == "supervisor"
        assert sign.numbers["restarts_total"] == {"engine-0": 1, "tracker-0": 0}


async def test_a_child_that_dies_again_and_again_waits_longer_each_time(folder: Path, watch: Watch) -> None:
    settings = SupervisorSettings(restart_base=0.001, restart_cap=3600.0, drain_seconds=5.0)
    supervisor = make(folder, [watch.role("engine-0", "exit3")], settings)
    async with running(supervisor):
        await watch.wait("engine-0", "start", times=5)
        assert supervisor.children[0].restarts >= 4
        assert supervisor.exit_code == 0


async def test_a_refused_configuration_ends_everything_with_2(folder: Path, watch: Watch) -> None:
    supervisor = make(folder, [watch.role("policy", phase=Phase.RECORD), watch.role("tracker-0", "exit2")])
    async with running(supervisor) as task:
        async with asyncio.timeout(PATIENCE):
            assert await task == 2
    assert watch.order("start").count("tracker-0") == 1


async def test_a_program_that_is_not_there_is_a_death_and_not_a_crash_of_ours(folder: Path, watch: Watch) -> None:
    supervisor = make(folder, [Role("engine-0", ("/nonexistent/sales-push",), Phase.WORK), watch.role("tracker-0")])
    async with running(supervisor) as task:
        await watch.wait("tracker-0", "start")
        supervisor.end()
        async with asyncio.timeout(PATIENCE):
            assert await task == 0


async def test_who_does_not_end_in_time_is_killed_and_that_is_an_error(folder: Path, watch: Watch) -> None:
    settings = SupervisorSettings(drain_seconds=0.2, hurry_seconds=0.1)
    supervisor = make(folder, [watch.role("engine-0", "stubborn")], settings)
    async with running(supervisor) as task:
        pid = await watch.wait("engine-0", "start")
        supervisor.end()
        async with asyncio.timeout(PATIENCE):
            assert await task == 1
    assert ("engine-0", "term", pid) in watch.heard
    assert not alive(pid)


async def test_the_writer_gets_its_time_though_an_engine_used_up_the_drain(folder: Path, watch: Watch) -> None:
    settings = SupervisorSettings(drain_seconds=0.0)
    supervisor = make(folder, [watch.role("policy", phase=Phase.RECORD), watch.role("engine-0", "stubborn")], settings)
    async with running(supervisor) as task:
        for name in ("policy", "engine-0"):
            await watch.wait(name, "start")
        supervisor.end()
        async with asyncio.timeout(PATIENCE):
            assert await task == 1
    policy, engine = supervisor.children
    assert (policy.killed, engine.killed) == (False, True)
    assert "policy" in watch.order("term")


async def test_a_second_signal_hurries(folder: Path, watch: Watch) -> None:
    settings = SupervisorSettings(drain_seconds=3600.0, hurry_seconds=0.05)
    supervisor = make(folder, [watch.role("engine-0", "stubborn")], settings)
    async with running(supervisor) as task:
        await watch.wait("engine-0", "start")
        supervisor.end()
        await watch.wait("engine-0", "term")
        supervisor.end()
        async with asyncio.timeout(PATIENCE):
            assert await task == 1


async def test_two_supervisors_never_share_a_data_folder(folder: Path, watch: Watch) -> None:
    async with running(make(folder, [watch.role("engine-0")])):
        await watch.wait("engine-0", "start")
        with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}"):
            await make(folder, [watch.role("engine-0")]).run()
    assert watch.order("start") == ["engine-0"]


def test_a_stale_lock_file_does_not_stand_in_the_way(folder: Path) -> None:
    lock = Lock(folder)
    lock.path.parent.mkdir()
    lock.path.write_text("1\n")  # a pid that lives: only the flock counts
    lock.take()
    assert lock.path.read_text() == f"{os.getpid()}\n"
    lock.release()


async def test_the_server_is_there_first_and_last_and_comes_back_with_its_data(folder: Path, watch: Watch) -> None:
    server = EmbeddedServer(folder / "valkey")
    lines: asyncio.Queue[str] = asyncio.Queue()
    supervisor = make(folder, [watch.role("engine-0")], server=server, report=lines.put_nowait)
    client = connect(server.url)
    async with running(supervisor) as task:
        await watch.wait("engine-0", "start")
        await client.set(b"salespush:{meta}", b"kept")  # the server answers before the first child runs
        assert "valkey running" in supervisor.status()
        first = server.pid
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            for state in ("valkey pausing", "valkey running"):
                while state not in await lines.get():
                    pass
        assert supervisor.statistics()["restarts_total"] == {"engine-0": 0, "valkey": 1}
        assert await client.get(b"salespush:{meta}") == b"kept"
        pid = server.pid
        supervisor.end()
        async with asyncio.timeout(PATIENCE):
            assert await task == 0
    await client.aclose()
    assert watch.order("start") == ["engine-0"]  # a child lives through a restart of the server
    assert not alive(pid)


DRIVER = """
import asyncio, sys
from pathlib import Path
from engine.settings import Supervisor as Settings
from engine.supervisor import Phase, Role, Supervisor

folder, watch, child = sys.argv[1:]
start = (sys.executable, "-c", child)
roles = [Role(name, (*start, name, "bound", watch), Phase.WORK) for name in ("engine-0", "tracker-0")]
sys.exit(asyncio.run(Supervisor(Settings(drain_seconds=10), Path(folder), roles).run()))
"""


def drive(folder: Path, watch: Watch) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(folder / "data"), str(watch.path), CHILD])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_drains_and_ends_with_0(folder: Path, watch: Watch, number: signal.Signals) -> None:
    with drive(folder, watch) as process:
        try:
            for name in ("engine-0", "tracker-0"):
                await watch.wait(name, "start")
            process.send_signal(number)
            assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        finally:
            process.kill()
    assert sorted(watch.order("term")) == ["engine-0", "tracker-0"]
    assert read_all(folder / "data") == []


async def test_no_child_outlives_a_killed_supervisor(folder: Path, watch: Watch) -> None:
    with drive(folder, watch) as process:
        try:
            for name in ("engine-0", "tracker-0"):
                await watch.wait(name, "start")
        finally:
            process.kill()
    for name in ("engine-0", "tracker-0"):
        await watch.wait(name, "term")  # the kernel's signal: the supervisor had no time to send one
