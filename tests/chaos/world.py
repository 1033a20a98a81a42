"""The world of the harness: every role a process of its own, ended one by one and started again as a supervisor would.

    async with chaos_world(folder, workers=2) as world:
        await world.start_all()
        await world.kill("engine-0")            the fault goes into world.faults; the role starts again by `world.start`
        async with world.paused("engine-1"): …  SIGSTOP, SIGCONT

Roles: redis (the embedded server), policy, engine-N, tracker, sink, and whatever else is named (producer, suppressor).
A worker says a name of its own in EHLO, so the sink's record tells whose connections a kill has cut.

Laws: only processes started here are ended, by pid; all of them are gone when the world is closed; a role that ends by
itself goes on record (`self_ended`) and is started again, as the supervisor would.

Known limits: Linux (/proc); a harness that is itself killed leaves the embedded server behind, as any supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engine.supervisor import PARENT_VARIABLE
from policy.crashpoints import VARIABLE
from policy.instants import week_of
from policy.keys import Keyring
from policy.ledger import Reader
from policy.schema import open_store
from policy.settings import Officer, PolicySettings
from policy.valkey import Client, EmbeddedServer, connect
from policy.wire import WireError, WriterClient, WriterUnavailable
from tests.chaos.checker import Fault, Limits
from tests.world.servers import short_folder

ROOT = Path(__file__).parents[2]
SENDER = "letter.example"
ACCOUNT = "shop"
LEASE_SECONDS = 10
_ROLE = "from tests.chaos.stacks import arm; arm(); from engine.cli import main; main()"
# Everything is imported, then it waits for a line: the start of a role costs a second of one core, mostly imports.
_HELD = (
    "import sys; from tests.chaos.stacks import arm; arm(); from engine.cli import main; import {room}; "
    "sys.stdin.readline(); main()"
)
_TIED = (
    "import os, sys; from engine.supervisor import die_with_parent; die_with_parent(os.environ); "
    "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_NOTICED = 0.2  # s within which the end of a process is seen
_AGAIN_SECONDS = 0.3  # before a role that ended by itself is started again
END_SECONDS = 30.0

_CONFIG = """
[policy]
data_dir = "{folder}"
public_url = "http://127.0.0.1:{tracker}"
log_json = false
[policy.officer]
name = "Privacy Officer"
address = "privacy@example.org"
[tracker]
port = {tracker}
[engine]
workers = {workers}
hostname = "mx.{sender}"
tls = "off"
lease_seconds = {lease}
min_free_bytes = 0
[engine.limits]
connections = 8
[engine.pace]
start = 4
calm = 0.1
back_off = 0.3
back_off_cap = 1
block_back_off = 0.3
[engine.retry]
schedule = [0.5, 0.7, 1]
[engine.supervisor]
drain_seconds = 20
[engine.routes]
{routes}
{shaping}
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A site of the sink: domains ``<anything>.<name>.test`` go there. words: its script; limits: what we may do."""

    name: str
    host: str
    words: str = ""
    limits: Limits = field(default_factory=lambda: Limits(8))

    @property
    def label(self) -> str:
        """Its name in the sink's record."""
        return f"{self.name}@{self.host}"


PLACES = (
    Place("fast", "127.0.0.1", "dot.late.20ms"),
    Place("slow", "127.0.0.2", "dot.late.2", Limits(6)),
    Place("tail", "127.0.0.3", "dot.late.150ms", Limits(4)),
    Place("paced", "127.0.0.4", "", Limits(6, rate=20.0, burst=10.0)),
    Place("odd", "127.0.0.5", "", Limits(6)),
)


# For crash points: a slow site that is slow enough to have people wait in a worker's hands, and no slower.
QUICK_PLACES = (Place("fast", "127.0.0.1", "dot.late.20ms"), Place("slow", "127.0.0.2", "dot.late.300ms", Limits(2)))


@dataclass(frozen=True, slots=True)
class SelfEnded:
    """A role that ended although nobody asked."""

    role: str
    code: int
    at: float


class Role:
    """One process and what we know of it. ours: how we ended it, "" while it should live."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, crash_at: str = "") -> None:
        self.name = name
        self.crash_at = crash_at
        self.process = process
        self.began = time.monotonic()
        self.ended = asyncio.Event()
        self.ours = ""
        self.stopped_since: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass
class World:
    """See the module. keyring, reader, ask: the harness's own eyes and hands."""

    folder: Path
    config: Path
    settings: PolicySettings
    keyring: Keyring
    server: EmbeddedServer
    redis: Client
    workers: int
    tracker_port: int
    places: Sequence[Place]
    ports: dict[str, int]
    roles: dict[str, Role] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    self_ended: list[SelfEnded] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    control: int = 0
    wrap: dict[str, Sequence[str]] = field(default_factory=dict)  # the program a role runs under, by name
    extra: dict[str, str] = field(default_factory=dict)  # more environment, for every role
    prelude: dict[str, str] = field(default_factory=dict)  # Python that runs first, by kind of role
    reader: Reader = field(init=False)
    ask: WriterClient = field(init=False)
    _watchers: set[asyncio.Task[None]] = field(default_factory=set)
    _closing: bool = False
    _held: dict[tuple[str, str, str], asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def sources(self) -> Path:
        """A copy of the tree as it was at the start: one run is one version, whoever edits meanwhile."""
        return self.folder / "src"

    @property
    def record(self) -> Path:
        return self.folder / "sink.jsonl"

    @property
    def engines(self) -> list[str]:
        return [f"engine-{number}" for number in range(self.workers)]

    @property
    def victims(self) -> list[str]:
        """Whom a fault may meet."""
        return ["redis", "policy", "sink", "tracker", *self.engines]

    # --- starting -------------------------------------------------------------------------------------------------

    async def start_all(self, *, engines: bool = True, tracker: bool = True) -> None:
        await self.start_redis()
        await self.start("policy")
        await self.until_writer()
        self.reader = Reader(open_store(self.settings.sql_address(), writer=False))
        self.ask = WriterClient(self.settings.writer_socket)
        await self.ask.account_add(
            ACCOUNT, display_name="The Shop", postal_address="1 High Street", opens_mode=3, clicks_mode=3
        )
        for name in ["sink", *(["tracker"] if tracker else []), *(self.engines if engines else [])]:
            await self.start(name)

    async def start_redis(self) -> None:
        """Also after a kill: the dead one is reaped first."""
        await self.server.stop()
        self.server.start()
        await self.server.wait_ready()

    async def start(self, name: str, *, crash_at: str = "", extra: Sequence[str] = (), before: str = "") -> Role | None:
        """Start a role (redis: None). crash_at: "before-settle:2"; before: Python that runs first."""
        if name == "redis":
            await self.start_redis()
            return None
        process = self._held.pop((name, crash_at, before), None)
        if process is None:
            process = await self._spawn(name, crash_at, self._command(name, extra, before))
        else:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.close()
        role = self.roles[name] = Role(name, process, crash_at)
        watcher = asyncio.create_task(self._watch(role), name=f"watch {name}")
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        if name == "sink":
            assert process.stdout is not None
            said = await asyncio.wait_for(process.stdout.readline(), END_SECONDS)
            if said:  # nothing: it was killed at birth
                self.control = int(json.loads(said)["control"])
        return role

    async def hold(self, name: str, *, crash_at: str = "", before: str = "") -> None:
        """Have a policy or engine process at hand that `start` with the same arguments lets go: it has imported all."""
        if (name, crash_at, before) not in self._held:
            command = self._command(name, (), before)
            room = "engine.worker" if name.startswith("engine") else "policy.writer"
            command[command.index("-c") + 1] = before + _HELD.format(room=room)
            self._held[name, crash_at, before] = await self._spawn(name, crash_at, command, held=True)

    async def _spawn(
        self, name: str, crash_at: str, command: Sequence[str], *, held: bool = False
    ) -> asyncio.subprocess.Process:
        log = (self.folder / "logs" / f"{name}.log").open("ab")
        try:
            return await asyncio.create_subprocess_exec(
                *self.wrap.get(name, ()), *command,
                cwd=self.sources, env=self._environment(name, crash_at), start_new_session=True,
                stdin=asyncio.subprocess.PIPE if held else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if name == "sink" else log, stderr=log,
            )  # fmt: skip
        finally:
            log.close()

    def _command(self, name: str, extra: Sequence[str], before: str = "") -> list[str]:
        kind, _, index = name.partition("-")
        if kind == "sink":
            ports = [f"{place.label}:{self.ports[place.name]}={place.words}" for place in self.places]
            words = [word for port in ports for word in ("--port", port)]
            return [sys.executable, "-c", _TIED, "tests.chaos.sink", *words, "--record", str(self.record)]
        if kind in ("policy", "engine", "tracker"):
            which = ["--index", index] if kind == "engine" else []
            code = self.prelude.get(kind, "") + before + _ROLE
            return [sys.executable, "-c", code, "run", kind, *which, "--config", str(self.config)]
        return [sys.executable, "-c", _TIED, f"tests.chaos.{kind}", str(self.config), *extra]

    def _environment(self, name: str, crash_at: str) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("SALES_PUSH_", "SALESPUSH_"))}
        ours[PARENT_VARIABLE] = str(os.getpid())
        if name.startswith("engine-"):
            ours["SALES_PUSH_ENGINE_HOSTNAME"] = hello_of(name)
        if crash_at:
            ours[VARIABLE] = crash_at
        return ours | self.extra

    async def until_writer(self, seconds: float = END_SECONDS) -> None:
        """Until the policy process answers: its socket is the last thing it opens."""
        async with asyncio.timeout(seconds), WriterClient(self.settings.writer_socket, timeout=2.0) as ask:
            while True:
                with contextlib.suppress(WriterUnavailable, WireError):
                    await ask.ping()
                    return
                await asyncio.sleep(0.02)

    async def _watch(self, role: Role) -> None:
        code = await role.process.wait()
        now = time.monotonic()
        role.ended.set()
        if role.ours or role.crash_at or self._closing or self.roles.get(role.name) is not role:
            return
        if code == 0 and not role.name.startswith(("engine", "policy", "tracker", "sink")):
            return  # a producer that is through
        self.self_ended.append(SelfEnded(role.name, code, now))
        self.faults.append(self._fault(role, now - _NOTICED, now))
        await asyncio.sleep(_AGAIN_SECONDS)
        if not self._closing and self.roles.get(role.name) is role:
            await self.start(role.name)

    # --- ending ---------------------------------------------------------------------------------------------------

    def _fault(self, role: Role, began: float, ended: float) -> Fault:
        hello = hello_of(role.name) if role.name.startswith("engine") else ""
        return Fault(role.name, began, ended, hello, role.stopped_since)

    def signal(self, name: str, number: signal.Signals) -> None:
        """To a process of ours, if it lives."""
        pid = self.server.pid if name == "redis" else self.roles[name].pid
        lives = self.server.running() if name == "redis" else not self.roles[name].ended.is_set()
        if lives and pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def kill(self, name: str) -> Fault:
        """SIGKILL; returns when it is gone."""
        began = time.monotonic()
        if name == "redis":
            self.signal(name, signal.SIGKILL)
            while self.server.running():
                await asyncio.sleep(0.005)
            fault = Fault("redis", began, time.monotonic())
        else:
            role = self.roles[name]
            role.ours = "kill"
            self._note_spent(role)
            self.signal(name, signal.SIGKILL)
            await role.ended.wait()
            fault = self._fault(role, began, time.monotonic())
        self.faults.append(fault)
        return fault

    async def stop(self, name: str, seconds: float = END_SECONDS) -> int:
        """SIGTERM; its exit code. A role that does not end in time is killed, and the code is -9."""
        role = self.roles[name]
        role.ours = "stop"
        self._note_spent(role)
        self.signal(name, signal.SIGTERM)
        try:
            await asyncio.wait_for(role.ended.wait(), seconds)
        except TimeoutError:
            self.signal(name, signal.SIGKILL)
            await role.ended.wait()
        return role.process.returncode or 0

    async def crashed(self, name: str, seconds: float) -> int | None:
        """Wait for a role to end by itself at its crash point: its exit code; None when it lives."""
        role = self.roles[name]
        lived = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                while not role.ended.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(role.ended.wait(), 0.1)
                    if not role.ended.is_set():
                        lived = time.monotonic()
        except TimeoutError:
            return None
        self.faults.append(self._fault(role, lived - 0.1, time.monotonic()))
        return role.process.returncode

    @contextlib.asynccontextmanager
    async def paused(self, name: str) -> AsyncIterator[None]:
        """SIGSTOP, and SIGCONT at the end."""
        role = self.roles.get(name)
        self.signal(name, signal.SIGSTOP)
        if role is not None:
            role.stopped_since = time.monotonic()
        try:
            yield
        finally:
            self.signal(name, signal.SIGCONT)
            if role is not None:
                role.stopped_since = None

    async def close(self) -> None:
        """Everything that still lives is ended, by pid."""
        self._closing = True
        for name, role in self.roles.items():
            if not role.ended.is_set():
                self.signal(name, signal.SIGCONT)
                self.signal(name, signal.SIGKILL)
        for process in self._held.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        for role in list(self.roles.values()):
            await role.process.wait()
            if role.process.stdout is not None:  # its transport closes in a later turn; ended before, it would warn
                while await role.process.stdout.read(65536):
                    pass
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if hasattr(self, "ask"):
            await self.ask.close()
            self.reader.close()
        await self.redis.aclose()
        self.signal("redis", signal.SIGCONT)
        self.signal("redis", signal.SIGKILL)
        await self.server.stop()

    # --- older data (T12) -----------------------------------------------------------------------------------------

    async def dump(self, to: Path) -> None:
        """A copy of what Redis has on disk now, as a backup would take it."""
        await asyncio.to_thread(shutil.copytree, self.server.folder / "appendonlydir", to)

    async def restore(self, dump: Path) -> None:
        """Redis is killed and comes back with an older dump."""
        await self.kill("redis")
        place = self.server.folder / "appendonlydir"
        await asyncio.to_thread(shutil.rmtree, place)
        await asyncio.to_thread(shutil.copytree, dump, place)
        await self.start_redis()

    # --- looking --------------------------------------------------------------------------------------------------

    def _note_spent(self, role: Role) -> None:
        self.spent[role.name] = self.spent.get(role.name, 0.0) + (cpu_seconds(role.pid) or 0.0)

    def log_bytes(self, name: str) -> bytes:
        try:
            return (self.folder / "logs" / f"{name}.log").read_bytes()
        except FileNotFoundError:
            return b""

    def pids(self) -> dict[str, int]:
        """Of what lives."""
        living = {name: role.pid for name, role in self.roles.items() if not role.ended.is_set()}
        return {"redis": self.server.pid, **living} if self.server.running() else living


def hello_of(name: str) -> str:
    """What a worker says in EHLO."""
    return f"w{name.rpartition('-')[2]}.{SENDER}"


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> tuple[int, int] | None:
    """(files and TCP connections, unix sockets) a process has open; None when it is gone."""
    try:
        names = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        table = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    except OSError:
        return None
    unix = {f"socket:[{line.split()[6]}]" for line in table}
    local = sum(name in unix for name in names)
    return len(names) - local, local


def _keys(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    made: dict[str, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey] = {
        f"{SENDER}.s1.rsa.pem": rsa.generate_private_key(65537, 2048),
        f"{SENDER}.s1e.ed25519.pem": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in made.items():
        path = folder / name
        path.touch(mode=0o600)
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def _free_ports(hosts: Sequence[str]) -> list[int]:
    """Free ports below the range the kernel gives to clients, or a killed sink's port could be anybody's meanwhile."""
    import socket

    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for host in hosts:
        while True:
            port = random.SystemRandom().randrange(10_000, max(low, 20_000))
            with socket.socket() as trial, contextlib.suppress(OSError):
                trial.bind((host, port))
                if port not in found:
                    found.append(port)
                    break
    return found


def configuration(folder: Path, workers: int, tracker: int, places: Sequence[Place], ports: Mapping[str, int]) -> str:
    """The file every role reads."""
    routes = "\n".join(f'"*.{place.name}.test" = "{place.host}:{ports[place.name]}"' for place in places)
    shaping = "\n".join(
        f'[engine.shaping."{place.host}"]\nconnections = {place.limits.connections}\n'
        + (f"rate = {place.limits.rate}\nburst = {place.limits.burst}\n" if place.limits.rate else "")
        for place in places
    )
    return _CONFIG.format(
        folder=folder, workers=workers, tracker=tracker, sender=SENDER, lease=LEASE_SECONDS, routes=routes,
        shaping=shaping,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def chaos_world(
    workers: int = 1,
    places: Sequence[Place] = PLACES,
    folder: Path | None = None,
    embedded: Callable[[Path], EmbeddedServer] = EmbeddedServer,
) -> AsyncIterator[World]:
    """Everything prepared, nothing started. folder: kept afterwards; default a temporary one that is not; embedded:
    makes the server of a folder."""
    async with contextlib.AsyncExitStack() as stack:
        place = folder if folder is not None else stack.enter_context(short_folder())
        (place / "logs").mkdir(parents=True, exist_ok=True)
        unwanted = shutil.ignore_patterns("__pycache__", "node_modules")
        for package in ("engine", "policy", "tracker", "tests"):
            await asyncio.to_thread(shutil.copytree, ROOT / package, place / "src" / package, ignore=unwanted)
        tracker, *opened = _free_ports(["127.0.0.1", *(each.host for each in places)])
        ports = {each.name: port for each, port in zip(places, opened, strict=True)}
        config = place / "sales-push.toml"
        config.write_text(configuration(place, workers, tracker, places, ports))
        settings = PolicySettings(
            data_dir=place,
            officer=Officer(name="Privacy Officer", address="privacy@example.org"),
            public_url=f"http://127.0.0.1:{tracker}",
            log_json=False,
        )
        keyring = Keyring.create(settings.keys_dir, week_of(time.time_ns() // 1000))
        _keys(settings.keys_dir / "dkim")
        server = embedded(settings.redis_socket.parent)
        world = World(
            place, config, settings, keyring, server, connect(server.url), workers, tracker, places, ports
        )  # fmt: skip
        stack.push_async_callback(world.close)
        yield world
