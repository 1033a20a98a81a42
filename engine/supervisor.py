"""`sales-push up`: one process that starts the roles of this host, keeps them alive and ends them in order.

Laws, each with its test in tests/journeys/test_supervisor.py:
- a data folder has at most one supervisor: the lock is an flock, so a stale pid file never stands in the way;
- a child that dies is started again, later each time (`pause`), sooner again once it has lived `stable_seconds`;
- SIGTERM loses nothing: who makes work stops before who writes it down, and the server stops last;
- no child outlives its supervisor, however that dies; the embedded server does (the queue survives, the next start
  adopts it, see `policy.valkey`).

Path: 1. lock ``data_dir/run/up.lock`` (pid inside); 2. embedded Valkey unless ``redis_url`` is set, wait until it
answers; 3. the policy process, wait until its socket answers; 4. engine workers, tracker, ops; 5. watch; 6. on SIGTERM
or SIGINT: SIGTERM to engine and tracker, SIGKILL after ``drain_seconds``; then the same to policy and ops, which get
what is left of it and at least `RECORD_SECONDS`; 7. the server, in order; 8. unlock. A second signal hurries: what
still runs gets ``hurry_seconds``.

Exit codes: 0 ended in order; 1 could not start, or something had to be killed; 2 the configuration is refused (a
child that exits 2 at its first start says the same: starting it again would not help).

Known limits: children are restarted blindly, a role that hangs without dying is seen by /readyz and not killed (under
systemd, WatchdogSec is the tool). Linux only for the death signal; elsewhere orphans end at their next failed write.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from engine.settings import Supervisor as SupervisorSettings
from policy.valkey import EmbeddedServer, EmbeddedServerError
from policy.vitals import Number, Vitals, run_dir

PARENT_VARIABLE = "SALES_PUSH_PARENT"  # pid of the supervisor, for `die_with_parent` in the child
EXIT_CONFIG = 2
EXIT_OLDER = 3
SOCKET_SECONDS = 60.0  # the first start migrates the database; after that the others may as well start and wait
RECORD_SECONDS = 15.0  # the writer folds what the engine settled last; killed, it would do so at the next start
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.2

log = logging.getLogger("sales_push.supervisor")


class AlreadyRunning(Exception):
    """Another supervisor owns the data folder."""


class Phase(Enum):
    """When a role is stopped: those that make work first, those that write it down after them."""

    WORK = 0
    RECORD = 1


@dataclass(frozen=True, slots=True)
class Role:
    """One child: its name in the status, its command line, when it stops."""

    name: str
    argv: tuple[str, ...]
    phase: Phase


def program() -> list[str]:
    """How to start ourselves again: the console script beside this interpreter, else the module it would call."""
    script = shutil.which("sales-push", path=str(Path(sys.executable).parent))
    return [sys.executable, script] if script else [sys.executable, "-c", "from engine.cli import main; main()"]


def roles_of(engines: int, trackers: int = 1) -> list[Role]:
    """The roles of one host in the order they start; policy first, because the others read what it prepares."""
    run = [*program(), "run"]

    def several(name: str, count: int) -> list[Role]:
        return [Role(f"{name}-{n}", (*run, name, "--index", str(n)), Phase.WORK) for n in range(count)]

    return [
        Role("policy", (*run, "policy"), Phase.RECORD),
        *several("engine", engines),
        *several("tracker", trackers),
        Role("ops", (*run, "ops"), Phase.RECORD),
    ]


def pause(failures: int, base: float, cap: float) -> float:
    """Seconds before the restart after the n-th death in a row (n from 1): base, doubled each time, at most cap."""
    return min(cap, base * 2.0 ** min(failures - 1, 30))


def die_with_parent(environment: Mapping[str, str]) -> None:
    """In a child, first thing: ask the kernel for SIGTERM when the supervisor dies; exit at once if it already did."""
    parent = environment.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes  # 5 ms that only supervised children pay

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # it died between our fork and the line above
        raise SystemExit(0)


class Lock:
    """The right to supervise one data folder; the file holds the owner's pid for people to read."""

    def __init__(self, data_dir: Path) -> None:
        self.path = run_dir(data_dir) / "up.lock"
        self._handle: int | None = None

    def take(self) -> None:
        """Raises AlreadyRunning with the owner's pid."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise AlreadyRunning(
                f"sales-push up already runs on {self.path.parent.parent} (pid {owner}); "
                "stop it first, or name another data_dir"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._handle = handle

    def release(self) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


class Child:
    """One role and what becomes of it. state: waiting | running | pausing | stopped."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = "waiting"
        self.restarts = 0
        self.killed = False
        self.stop = asyncio.Event()
        self._failures = 0
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<Child {self.role.name} {self.state} pid={self.pid} restarts={self.restarts}>"

    @property
    def pid(self) -> int:
        """0 while no process runs."""
        return self._process.pid if self._process else 0

    async def keep(
        self, settings: SupervisorSettings, environment: Mapping[str, str], changed: Callable[[Child, int | None], None]
    ) -> None:
        """Run the role until `stop` is set. changed(child, exit code or None) is told of every start and end."""
        while not self.stop.is_set():
            began = time.monotonic()
            code = await self._once(environment, changed)
            if self.stop.is_set():
                break
            lived = time.monotonic() - began
            if code == EXIT_OLDER:
                self._failures = 1  # Redis came back older, and everybody waits for this worker's next life (T12)
            else:
                self._failures = 1 if lived >= settings.stable_seconds else self._failures + 1
            self.restarts += 1
            self.state = "pausing"
            changed(self, code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause(self._failures, settings.restart_base, settings.restart_cap)):
                    await self.stop.wait()
        self.state = "stopped"

    async def _once(self, environment: Mapping[str, str], changed: Callable[[Child, int | None], None]) -> int:
        try:
            # A session of its own: Ctrl-C reaches the supervisor only, which then drains instead of everybody dying.
            self._process = await asyncio.create_subprocess_exec(
                *self.role.argv, env=dict(environment), stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            log.error("cannot start %s: %s", self.role.name, error.strerror)
            return 127
        self.state = "running"
        changed(self, None)
        if self.stop.is_set():  # asked to stop while it was being born: nobody else will tell it
            self.terminate()
        try:
            return await self._process.wait()
        finally:
            self._process = None

    def terminate(self) -> None:
        """SIGTERM: finish what is on the wire and go."""
        self.stop.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the role and whatever it started (its session)."""
        if self._process is not None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Supervisor:
    """Use: ``raise SystemExit(await Supervisor(...).run())``. server None: somebody else's Redis.

    report gets the one-line status at every change. Everything happens in one event loop and one thread.
    """

    def __init__(
        self,
        settings: SupervisorSettings,
        data_dir: Path,
        roles: Sequence[Role],
        *,
        server: EmbeddedServer | None = None,
        writer_socket: Path | None = None,
        environment: Mapping[str, str] | None = None,
        report: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.settings = settings
        self.server = server
        self.children = [Child(role) for role in roles]
        self.exit_code = 0
        self._writer_socket = writer_socket
        self._environment = {**(os.environ if environment is None else environment), PARENT_VARIABLE: str(os.getpid())}
        self._report = report
        self._lock = Lock(data_dir)
        self._vitals = Vitals(data_dir, "supervisor")
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()
        self._server_state = "none" if server is None else "waiting"
        self._server_restarts = 0
        self._last_line = ""

    # --- what it says ---------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Number | dict[str, Number]]:
        """Numbers for /metrics and /readyz: up 1 or 0 and restarts, by child."""
        up: dict[str, Number] = {child.role.name: int(child.state == "running") for child in self.children}
        restarts: dict[str, Number] = {child.role.name: child.restarts for child in self.children}
        if self.server is not None:
            up["valkey"] = int(self._server_state == "running")
            restarts["valkey"] = self._server_restarts
        return {"up": up, "restarts_total": restarts, "draining": int(self._ending.is_set())}

    def status(self) -> str:
        """One line: every part and its state, those of which there may be several as running/wanted."""
        parts = [] if self.server is None else [f"valkey {self._server_state}"]
        several: dict[str, list[Child]] = {}
        for child in self.children:
            name, dash, _ = child.role.name.partition("-")
            if dash:
                several.setdefault(name, []).append(child)
            else:
                parts.append(f"{name} {child.state}")
        for name, same in several.items():
            parts.append(f"{name} {sum(child.state == 'running' for child in same)}/{len(same)}")
        return f"{'draining' if self._ending.is_set() else 'up'}: {' · '.join(parts)}"

    def _say(self) -> None:
        line = self.status()
        if line != self._last_line:
            self._last_line = line
            self._report(line)
            with contextlib.suppress(OSError):  # a full disk costs figures, never the host
                self._vitals.publish(self.statistics(), time.time())

    def _changed(self, child: Child, code: int | None) -> None:
        if code is not None:
            log.warning("%s ended with code %s, restart %s", child.role.name, code, child.restarts)
            if code == EXIT_CONFIG and child.restarts == 1:
                self.exit_code = EXIT_CONFIG
                self._ending.set()
        self._say()

    # --- what it does ---------------------------------------------------------------------------------------------

    def end(self) -> None:
        """First call: drain. Second: hurry. Safe from a signal handler of the loop."""
        (self._hurry if self._ending.is_set() else self._ending).set()

    async def run(self) -> int:
        """Until told to end; returns the exit code. Raises AlreadyRunning, EmbeddedServerError: no child ran."""
        self._lock.take()
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self.end)
        try:
            for stale in run_dir(self._vitals.path.parent.parent).glob("*-*.json"):
                stale.unlink(missing_ok=True)
            if self.server is not None:
                await self._start_server(self.server)
            await self._supervise()
        finally:
            if self.server is not None:
                await self.server.stop()
                self._server_state = "stopped"
            for number in signals:
                loop.remove_signal_handler(number)
            self._vitals.withdraw()
            self._lock.release()
        return self.exit_code

    async def _supervise(self) -> None:
        tasks: dict[Child, asyncio.Task[None]] = {}
        watchers = [asyncio.create_task(self._vitals.beat(self.statistics, time.time))]
        if self.server is not None:
            watchers.append(asyncio.create_task(self._watch_server(self.server)))
        try:
            for child in self.children:
                if self._ending.is_set():
                    break
                tasks[child] = asyncio.create_task(child.keep(self.settings, self._environment, self._changed))
                if child.role.name == "policy" and self._writer_socket is not None:
                    await self._wait_for_socket(self._writer_socket)
            await self._ending.wait()
            self._say()
            deadline = time.monotonic() + self.settings.drain_seconds
            for phase in Phase:
                if phase is Phase.RECORD:
                    deadline = max(deadline, time.monotonic() + RECORD_SECONDS)
                await self._drain({c: t for c, t in tasks.items() if c.role.phase is phase}, deadline)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            for child in tasks:
                child.stop.set()
                child.kill()
            await asyncio.gather(*tasks.values())
        if any(child.killed for child in self.children) and not self.exit_code:
            self.exit_code = 1

    async def _drain(self, tasks: Mapping[Child, asyncio.Task[None]], deadline: float) -> None:
        """SIGTERM, wait until the deadline or shortly after somebody hurries, SIGKILL."""
        for child in tasks:
            child.terminate()
        everybody: asyncio.Future[object] = asyncio.ensure_future(asyncio.gather(*tasks.values()))
        hurry: asyncio.Future[object] = asyncio.ensure_future(self._hurry.wait())
        left = max(0.0, deadline - time.monotonic())
        await asyncio.wait({everybody, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not everybody.done() and self._hurry.is_set():
            for child in tasks:
                child.terminate()
            left = max(0.0, min(self.settings.hurry_seconds, deadline - time.monotonic()))
            await asyncio.wait({everybody}, timeout=left)
        if not everybody.done():
            for child in tasks:
                if child.pid:
                    log.error("%s did not end in time and is killed", child.role.name)
                    child.kill()
        await everybody
        self._say()

    async def _start_server(self, server: EmbeddedServer) -> None:
        server.start()
        await server.wait_ready()
        self._server_state = "running"
        self._say()

    async def _watch_server(self, server: EmbeddedServer) -> None:
        """Start a dead server again: its append-only file holds everything that was acknowledged."""
        failures = 0
        began = time.monotonic()
        while True:
            await asyncio.sleep(_POLL_SECONDS)  # an adopted server is not our child: nothing else tells
            if server.running():
                continue
            failures = 1 if time.monotonic() - began >= self.settings.stable_seconds else failures + 1
            self._server_restarts += 1
            self._server_state = "pausing"
            log.error("valkey ended, restart %s", self._server_restarts)
            self._say()
            await asyncio.sleep(pause(failures, self.settings.restart_base, self.settings.restart_cap))
            began = time.monotonic()
            await server.stop()
            try:
                await self._start_server(server)
            except EmbeddedServerError as error:
                log.error("valkey does not start: %s", error)

    async def _wait_for_socket(self, path: Path) -> None:
        """Until the writer answers, the host is told to end, or SOCKET_SECONDS went by."""
        deadline = time.monotonic() + SOCKET_SECONDS
        while not self._ending.is_set() and time.monotonic() < deadline:
            try:
                _, writer = await asyncio.open_unix_connection(str(path))
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return
