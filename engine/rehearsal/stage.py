"""The stage: an installation of its own in one folder, the simulated providers, and everything stopped afterwards.

Promise: nothing outside the folder is read or written, no environment variable of an operator bleeds in, and what was
started is stopped by its own pid, in order first and by force if it must be: SIGTERM to `sales-push up` (which drains),
once more, SIGKILL, then the embedded server by its pid file. A rehearsal that is itself killed takes everything with
it on Linux (PR_SET_PDEATHSIG), unless it is `lasting`, which means: left running on purpose.

    folder/sales-push.toml     routes to the sink's ports, compressed times
    folder/data/               the data folder of the installation: the part that must hold no address in clear
    folder/sink/               messages the providers kept, as a mailbox would: in clear
    folder/logs/               what every process said

Path: 1. the sink, which chooses its ports; 2. `setting.configuration`, written; 3. `sales-push init`; 4. `sales-push
up`; 5. ready when every worker has spoken, /readyz says so and the tracker answers.

Known limits: a port chosen here is free for a moment only; a second program may take it before `up` does, then the
start fails and says so. The folder must be short: the server's Unix socket lies in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import aiohttp

from engine.rehearsal.providers import Judge, parse
from engine.rehearsal.setting import ACCOUNT, DOMAIN, DRAIN_SECONDS, POSTAL, SENDER, Setting, configuration
from engine.rehearsal.strangers import LOOK_SECONDS, Stranger, missing
from policy.keys import Keyring
from policy.ledger import Reader
from policy.schema import open_store
from policy.settings import SOCKET_PATH_LIMIT, PolicySettings, load
from policy.vitals import read_all

START_SECONDS: Final = 40.0
_POLL: Final = 0.02
# -c instead of -m: the sink shall not outlive a killed rehearsal. 1 is PR_SET_PDEATHSIG, 15 SIGTERM (linux/prctl.h).
_TIED: Final = (
    "import ctypes, runpy; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "runpy.run_module('engine.rehearsal.server', run_name='__main__', alter_sys=True)"
)


class StageError(Exception):
    """The rehearsal cannot be set up or lost a part; the text says which, with the last lines of its log."""


def program() -> list[str]:
    """The command line of this installation: the console script beside the interpreter, else the same by import."""
    script = shutil.which("sales-push", path=str(Path(sys.executable).parent))
    return [sys.executable, script] if script else [sys.executable, "-c", "from engine.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stage:
    """Use: ``async with Stage(folder, Setting()) as stage``. After start: urls, redis_url, reader, keyring, counts."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder = folder.absolute()
        self.setting = setting
        self.config = self.folder / "sales-push.toml"
        self.data = self.folder / "data"
        self.kept = self.folder / "sink"
        self.logs = self.folder / "logs"
        self.workers = setting.worker_count
        self.tracker_url = ""
        self.ops_url = ""
        self.redis_url = ""
        self.policy: PolicySettings
        self.keyring: Keyring
        self.reader: Reader
        self.left: list[int] = []  # pids of what was left running
        self._ports: dict[str, int] = {}
        self._control = 0
        self._up: subprocess.Popen[bytes] | None = None
        self._sink: subprocess.Popen[bytes] | None = None
        self._stranger: Stranger | None = None
        self._watch: asyncio.Task[None] | None = None
        self._reads = False

    def __repr__(self) -> str:
        return f"<Stage {self.folder} up={self.pids}>"

    async def __aenter__(self) -> Stage:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if self.setting.lasting and kind is None:
            self.leave()
        else:
            await self.stop()

    @property
    def pids(self) -> list[int]:
        """Of what runs now: `sales-push up` and the sink."""
        return [process.pid for process in (self._up, self._sink) if process is not None and process.poll() is None]

    # --- start ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises StageError, or OSError when the folder cannot be written."""
        for folder in (self.folder, self.logs, self.kept):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(os.fsencode(self.data / "valkey" / "valkey.sock")) > SOCKET_PATH_LIMIT:
            raise StageError(f"{self.folder} is too long: a Unix socket in it may have {SOCKET_PATH_LIMIT} bytes")
        await (self._start_sink() if self.setting.sink == "own" else self._start_stranger())
        await asyncio.to_thread(self._install)
        self._up = self._spawn("up", [*program(), "up"])
        self.policy = load(PolicySettings, self.config)
        self.redis_url = self.policy.redis_address()
        await self._wait_ready()
        self.keyring = Keyring.load(self.policy.keys_dir)
        self.reader = Reader(open_store(self.policy.sql_address(), writer=False))
        self._reads = True

    def _install(self) -> None:
        tracker, ops = free_port(), free_port()
        self.tracker_url, self.ops_url = f"http://127.0.0.1:{tracker}", f"http://127.0.0.1:{ops}"
        self.config.write_text(configuration(self.setting, self._ports, tracker, ops), encoding="utf-8")
        self.command(
            "init", "--config", str(self.config), "--domain", DOMAIN, "--account", ACCOUNT,
            "--display-name", SENDER, "--postal-address", POSTAL,
        )  # fmt: skip

    async def _start_sink(self) -> None:
        sinks = [self.setting.sinks[provider.behaviour] for provider in self.setting.providers]
        tied = sys.platform.startswith("linux") and not self.setting.lasting
        self._sink = self._spawn(
            "sink",
            [
                *([sys.executable, "-c", _TIED] if tied else [sys.executable, "-m", "engine.rehearsal.server"]),
                *(word for spec in sinks for word in ("--provider", spec)),
                "--keep", str(self.setting.keep), "--keep-every", str(self.setting.keep_every),
                "--keep-dir", str(self.kept),
                *(["--starttls"] if self.setting.tls else []),
                *(["--chunking"] if self.setting.chunking else []),
            ],
        )  # fmt: skip
        said = self.logs / "sink.out"
        deadline = time.monotonic() + START_SECONDS
        while not (line := said.read_bytes().split(b"\n")[0]).endswith(b"}"):
            self._check(deadline, "the sink")
            await asyncio.sleep(_POLL)
        told = json.loads(line)
        self._ports, self._control = dict(told["ports"]), int(told["control"])

    async def _start_stranger(self) -> None:
        lacking = missing(self.setting.sink)
        if lacking:
            raise StageError(f"--sink {self.setting.sink}: {lacking}")
        played = parse(self.setting.sinks[self.setting.providers[0].behaviour])
        judge = Judge(played) if played.behaviour != "accept" else None
        stranger = Stranger(
            self.setting.sink, self.folder / "stranger", free_port(), starttls=self.setting.tls, judge=judge
        )  # fmt: skip
        self._stranger = stranger
        self._sink = stranger.start()
        await stranger.answer()
        self._ports = {provider.behaviour: stranger.port for provider in self.setting.providers}
        deadline = time.monotonic() + START_SECONDS
        while not await _answers(stranger.port):
            self._check(deadline, f"the sink {stranger.kind}")
            await asyncio.sleep(5 * _POLL)
        self._watch = asyncio.create_task(_looking(stranger))

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while not await self._is_ready(session):
                self._check(deadline, "sales-push up")
                await asyncio.sleep(5 * _POLL)

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        """/readyz is content, every worker has spoken for itself (a child that was just started may die yet), and the
        tracker answers."""
        spoken = {f"{sign.role}-{sign.index}" for sign in await asyncio.to_thread(read_all, self.data)}
        if not spoken >= {"tracker-0", *(f"engine-{n}" for n in range(self.workers))}:
            return False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(f"{self.ops_url}/readyz") as answer:
                ready = answer.status == 200
            async with session.get(f"{self.tracker_url}/healthz") as answer:
                return ready and answer.status == 200
        return False

    def _check(self, deadline: float, what: str) -> None:
        """Raises StageError when a part ended or the time is over."""
        for name, process in (("sink", self._sink), ("up", self._up)):
            if process is not None and process.poll() is not None:
                raise StageError(f"{name} ended with code {process.returncode}\n{self.last_words(name)}")
        if time.monotonic() > deadline:
            raise StageError(f"{what} was not ready after {START_SECONDS:g} s\n{self.last_words('up')}")

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._log(name, "out") as out, self._log(name, "err") as err:
            # A session of its own: Ctrl-C reaches the rehearsal first, which then stops the others in order.
            return subprocess.Popen(
                command, cwd=self.folder, env=self._environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip

    def _log(self, name: str, kind: str) -> IO[bytes]:
        return (self.logs / f"{name}.{kind}").open("ab")

    def _environment(self, tied: bool = True) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.upper().startswith("SALES_PUSH_")}
        ours["SALES_PUSH_CONFIG"] = str(self.config)
        # The children run what this process runs, installed or not: their working folder is another one.
        roots = [str(Path(__file__).resolve().parents[2]), ours.get("PYTHONPATH", "")]
        ours["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
        if tied and not self.setting.lasting:
            ours["SALES_PUSH_PARENT"] = str(os.getpid())  # engine.supervisor.die_with_parent
        return ours

    # --- while it runs --------------------------------------------------------------------------------------------

    def command(self, *arguments: str, codes: Sequence[int] = (0,)) -> str:
        """What a `sales-push` command prints, as an operator would run it here. Raises StageError for other codes."""
        done = subprocess.run(
            [*program(), *arguments], cwd=self.folder, env=self._environment(tied=False), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode not in codes:
            raise StageError(f"sales-push {arguments[0]} ended with code {done.returncode}\n{done.stderr[-2000:]}")
        return done.stdout

    @property
    def sink_pid(self) -> int:
        return self._sink.pid if self._sink is not None else 0

    async def counts(self) -> dict[str, Any]:
        """The providers' own count (engine.rehearsal.server.Counts by name), asked over the control port."""
        if self._stranger is not None:
            return self._stranger.counts()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._control)
        try:
            writer.write(b"counts\n")
            counts: dict[str, Any] = json.loads(await asyncio.wait_for(reader.readline(), 10.0))
            return counts
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def check_alive(self) -> None:
        """Call it in every loop that waits: raises StageError when `up` or the sink has ended, CancelledError when
        somebody asked this task to stop. redis-py can lose that: it waits by asyncio.wait_for, which before Python
        3.12 swallows a cancellation that comes together with the answer (gh-86296)."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        self._check(time.monotonic() + 1.0, "")

    def last_words(self, name: str, lines: int = 12) -> str:
        """The end of a log; logs hold no address (policy.logs), so it may be shown."""
        try:
            text = (self.logs / f"{name}.err").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    # --- the end --------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Let go of everything without stopping it."""
        self.left = self.pids
        for process in (self._up, self._sink):
            if process is not None and process.poll() is None:
                process.returncode = 0  # no ResourceWarning for children we mean to leave
        self._up = self._sink = None
        self._close_reader()

    async def stop(self) -> None:
        """Stop everything that was started, and be sure of it. Safe to call twice."""
        self._close_reader()
        up, self._up = self._up, None
        if up is not None:
            for number, patience in (
                (signal.SIGTERM, 2 * DRAIN_SECONDS),
                (signal.SIGTERM, 10.0),
                (signal.SIGKILL, 5.0),
            ):
                if await _ended(up, number, patience):
                    break
            await asyncio.to_thread(self._end_server)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        sink, self._sink = self._sink, None
        if sink is not None and not await _ended(sink, signal.SIGTERM, 5.0):
            await _ended(sink, signal.SIGKILL, 5.0)
        if self._stranger is not None:
            await self._stranger.fall_silent()

    def _close_reader(self) -> None:
        if self._reads:
            self._reads = False
            self.reader.close()

    def _end_server(self) -> None:
        """The embedded server survives a killed supervisor on purpose (policy.valkey); a rehearsal's must not."""
        try:
            pid = int((self.data / "valkey" / "valkey.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if os.fsencode(self.folder) not in command:
            return  # somebody else's: the number was given again
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + 5.0
            while time.monotonic() < deadline:
                if not Path(f"/proc/{pid}").exists():
                    return
                time.sleep(_POLL)


async def _answers(port: int) -> bool:
    """Does an SMTP server greet there?"""
    with contextlib.suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            greeting = await asyncio.wait_for(reader.readline(), 5.0)
            writer.write(b"QUIT\r\n")
            return greeting.startswith(b"220")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return False


async def _looking(stranger: Stranger) -> None:
    while True:
        stranger.look()
        await asyncio.sleep(LOOK_SECONDS)


async def _ended(process: subprocess.Popen[bytes], number: signal.Signals, patience: float) -> bool:
    """Send a signal to one process of ours and wait; True when it is gone."""
    if process.poll() is None:
        process.send_signal(number)
    deadline = time.monotonic() + patience
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL)
    return True
