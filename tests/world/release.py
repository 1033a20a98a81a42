"""A queue as a release left it on disk and in Redis, as plain JSON: written once by it, loaded by every later one.

    .venv/bin/python -m tests.world.release tests/journeys/data/queue-<version>.json    with the release's own code
    await load(document, folder)                                                        before anything is started

What is in it: four jobs half done when their worker was killed: key files, the database as SQL, the worker's journal,
and every Redis key. All clocks of its making stood in the year 2095, so that nothing of it expires before then, and no
weekly key is old; the addresses are nobody's.

After mox's test-upgrade.sh (style 1.4): data of every past release is loaded by today's program.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from policy import keyspace
from policy.valkey import Client, EmbeddedServer, connect

SHIFT_NS = 69 * 365 * 86_400 * 1_000_000_000  # from 2026 to 2095
FILES = ("keys/**/*", "journal/**/*.journal")
LATER = "import time; real = time.time_ns; time.time_ns = lambda: real() + {shift}; "


async def make() -> dict[str, Any]:
    """With the code of the release that runs."""
    from tests.world.mail import job, mail_world, rows  # today's, or the old release's own

    real = time.time_ns
    time.time_ns = lambda: real() + SHIFT_NS
    try:
        async with mail_world("slow:0:name=slow,delay=0.3", others={"away": 1}) as mail:
            code = LATER.format(shift=SHIFT_NS) + (
                "import sys; from pathlib import Path; from engine.worker import run_worker; "
                "sys.exit(run_worker(0, Path(sys.argv[1])))"
            )
            worker = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(mail.config))
            mail.workers.append(worker)
            reader, clock = mail.policy.reader, mail.policy.clock
            await mail.submit(job("paused"), rows(30, "p.slow.test"))
            while (status := reader.job_status("paused", clock())) is None or status.terminal < 2:
                await asyncio.sleep(0.01)
            await mail.policy.ask.job_state("paused", "paused")
            while await mail.policy.redis.hlen(keyspace.leases(keyspace.partition_of("p.slow.test"))):
                await asyncio.sleep(0.01)
            await mail.submit(job("deferred"), rows(8, "b.away.test"))
            await mail.submit(job("under-way"), rows(300, "a.slow.test"))
            await mail.submit(job("letters", kind="transactional"), rows(20, "t.slow.test"))
            while (status := reader.job_status("under-way", clock())) is None or status.terminal < 9:
                await asyncio.sleep(0.01)
            worker.send_signal(signal.SIGKILL)
            await worker.wait()
            await mail.policy.drain()
            return await dump(mail.folder, mail.policy.server.client)
    finally:
        time.time_ns = real


async def dump(folder: Path, redis: Client) -> dict[str, Any]:
    """Everything a program needs to go on."""
    with contextlib.closing(sqlite3.connect(folder / "policy.db")) as conn:
        sql = list(conn.iterdump())
    files = {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for pattern in FILES
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    keys = {}
    for raw in sorted([key async for key in redis.scan_iter(count=1000)]):
        if not raw.startswith(b"sp:{s:"):  # permits, rates and back-offs are of the moment
            keys[raw.decode()] = await _dumped(redis, raw)
    return {"version": version("sales-push"), "files": files, "sql": sql, "redis": keys}


async def _dumped(redis: Any, key: bytes) -> dict[str, Any]:
    kind = (await redis.type(key)).decode()
    if kind == "string":
        return {"string": (await redis.get(key)).hex()}
    if kind == "hash":
        return {"hash": {name.hex(): value.hex() for name, value in (await redis.hgetall(key)).items()}}
    if kind == "set":
        return {"set": sorted(member.hex() for member in await redis.smembers(key))}
    if kind == "zset":
        return {"zset": {member.hex(): score for member, score in await redis.zrange(key, 0, -1, withscores=True)}}
    assert kind == "stream", kind
    info = await redis.xinfo_stream(key)
    last = info.get("last-generated-id", info.get(b"last-generated-id"))
    entries = [
        [entry.decode(), {name.hex(): value.hex() for name, value in fields.items()}]
        for entry, fields in await redis.xrange(key)
    ]
    groups = [(group["name"].decode(), group["last-delivered-id"].decode()) for group in await redis.xinfo_groups(key)]
    return {"stream": {"last": last.decode(), "entries": entries, "groups": groups}}


async def load(document: dict[str, Any], folder: Path) -> None:
    """Lay it out in an empty folder; Redis is started there, filled, and stopped again."""
    folder.chmod(0o700)
    for name, content in document["files"].items():
        path = folder / name
        for parent in reversed(path.relative_to(folder).parents[:-1]):
            (folder / parent).mkdir(mode=0o700, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(bytes.fromhex(content))
    with contextlib.closing(sqlite3.connect(folder / "policy.db")) as conn:
        conn.executescript("\n".join(document["sql"]))
    server = EmbeddedServer(folder / "valkey")
    server.start()
    await server.wait_ready()
    client = connect(server.url)
    try:
        for key, stored in document["redis"].items():
            [(kind, value)] = stored.items()
            await _LOADERS[kind](client, key, value)
    finally:
        await client.aclose()
        await server.stop()


async def _string(client: Any, key: str, value: str) -> None:
    await client.set(key, bytes.fromhex(value))


async def _hash(client: Any, key: str, value: dict[str, str]) -> None:
    await client.hset(key, mapping={bytes.fromhex(name): bytes.fromhex(each) for name, each in value.items()})


async def _set(client: Any, key: str, value: list[str]) -> None:
    await client.sadd(key, *map(bytes.fromhex, value))


async def _zset(client: Any, key: str, value: dict[str, float]) -> None:
    await client.zadd(key, {bytes.fromhex(member): score for member, score in value.items()})


async def _stream(client: Any, key: str, value: dict[str, Any]) -> None:
    for entry, fields in value["entries"]:
        await client.xadd(key, {bytes.fromhex(name): bytes.fromhex(each) for name, each in fields.items()}, id=entry)
    if value["last"] not in [entry for entry, _ in value["entries"]]:
        await client.xadd(key, {b"x": b"x"}, id=value["last"])
        await client.xdel(key, value["last"])
    for name, delivered in value["groups"]:
        await client.xgroup_create(key, name, id=delivered)


_LOADERS: dict[str, Callable[[Any, str, Any], Awaitable[None]]] = {
    "string": _string,
    "hash": _hash,
    "set": _set,
    "zset": _zset,
    "stream": _stream,
}


def _write(path: Path) -> None:
    document = asyncio.run(make())
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{path}: {len(document['redis'])} keys, {len(document['files'])} files")


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
