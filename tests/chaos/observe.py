"""What a run left, gathered for the checker: the producer's ledger, the sink's record, SQL, Redis, the processes.

    await drained(world, seconds)       every acknowledged job is over and the streams are empty; seconds it took
    await spinning(world, seconds)      I7 at rest: CPU, connects, lease calls, log lines of an idle minute, scaled
    await leftovers(world)              I8: keys that should be gone, once the workers have ended in order
    await history(world, ...)           everything, as `checker.History`

Known limits: memory is compared as Redis counts what it holds for data (used_memory_dataset); what the run must leave
(statuses of jobs for 90 days, suppressions, counters) is measured key by key and taken off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis.exceptions
from sqlalchemy import Row, select

from engine.queue.slices import Header, parse_header
from policy import keyspace
from policy.address import AddressError, mref_of, normalise, parse
from policy.events import TERMINAL, Kind
from policy.keys import Keyring, open_sealed
from policy.ledger import Reader
from policy.schema import account, counter, message, open_store
from policy.schema import history as history_table
from policy.schema import job as job_table
from policy.stories import word
from policy.valkey import Client, call
from policy.wire import job_aad
from tests.chaos.checker import History, Job, Measure, Shot, Told
from tests.chaos.reference import Renders
from tests.chaos.sink_record import Line, entries, read_lines
from tests.chaos.world import World, cpu_seconds, descriptors

OVER = frozenset({"done", "cancelled", "expired", "lost", "rejected"})
# What may be there when nothing is on its way: see policy.keyspace for why each stays.
_STAYS = frozenset({"meta", "hosts", "counters", "suppression", "job status", "hits", "negative list"})
_EMPTY = frozenset({"intake", "events"})  # streams whose name stays
_TERMINAL = {int(kind) for kind in TERMINAL}


@dataclass(slots=True)
class Submitted:
    """The producer's ledger: what was begun, by job id, with its rows; ids of what was acknowledged."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    in_doubt: dict[str, str] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)


def submitted(path: Path) -> Submitted:
    found = Submitted()
    for line in _json_lines(path):
        if line["k"] == "job":
            found.jobs[line["job_id"]] = line["job"]
            found.rows[line["job_id"]] = line["rows"]
            found.in_doubt[line["job_id"]] = line["in_doubt"]
        else:
            found.acknowledged.add(line["job_id"])
    return found


def shots(path: Path) -> list[Shot]:
    return [
        Shot(line["address"], line["scope"], line["list"], line["t_call"], line["t_ack"], line["aimed"])
        for line in _json_lines(path)
    ]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


# --- the ledger ------------------------------------------------------------------------------------------------------


def told_of(reader_url: str) -> dict[str, tuple[Row[Any], Told]]:
    """Every job of SQL by its id, with its row."""
    engine = open_store(reader_url, writer=False)
    found: dict[str, tuple[Row[Any], Told]] = {}
    try:
        with engine.connect() as conn:
            rows = conn.execute(
                select(job_table, account.c.name.label("account_name")).join(
                    account, account.c.number == job_table.c.account
                )
            ).all()
            for row in rows:
                messages = [
                    (line.mref, word(Kind, line.kind))
                    for line in conn.execute(select(message.c.mref, message.c.kind).where(message.c.job == row.number))
                ]
                others = Counter(
                    word(Kind, line.kind)
                    for line in conn.execute(
                        select(history_table.c.kind).where(
                            history_table.c.job == row.number, history_table.c.kind.in_(_TERMINAL)
                        )
                    )
                )
                counters: Counter[str] = Counter()
                for line in conn.execute(select(counter.c.kind, counter.c.n).where(counter.c.job == row.number)):
                    if line.kind in _TERMINAL:
                        counters[word(Kind, line.kind)] += int(line.n)
                told = Told(row.number, row.state, row.rows_submitted, messages, others, counters)
                found[row.job_id] = row, told
    finally:
        engine.dispose()
    return found


def people_of(keyring: Keyring, row: Row[Any], rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """mref -> address, for each distinct address of the producer's rows that is one."""
    key = open_sealed(keyring.service, row.job_key, job_aad("key", row.account_name, row.job_id))
    found: dict[int, str] = {}
    for one in rows:
        with contextlib.suppress(AddressError):
            mailbox = parse(one["address"])
            found.setdefault(mref_of(key, normalise(mailbox.local, mailbox.domain)), mailbox.wire)
    return found


# --- waiting ---------------------------------------------------------------------------------------------------------


async def drained(world: World, ledger: Path, seconds: float) -> tuple[float, list[str]]:
    """Wait until every acknowledged job is over and no event waits: (seconds it took, job ids that are not over)."""
    began = time.monotonic()
    left: list[str] = []
    while True:
        acknowledged = submitted(ledger).acknowledged
        left = await asyncio.to_thread(_not_over, world.settings.sql_address(), acknowledged)
        if not left:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                if not await waiting_events(world.redis):
                    return time.monotonic() - began, []
        if time.monotonic() - began > seconds:
            return time.monotonic() - began, left or ["events wait in the streams"]
        await asyncio.sleep(0.2)


def _not_over(url: str, acknowledged: set[str]) -> list[str]:
    engine = open_store(url, writer=False)
    try:
        with engine.connect() as conn:
            over = set(conn.scalars(select(job_table.c.job_id).where(job_table.c.done_at.is_not(None))))
    finally:
        engine.dispose()
    return sorted(acknowledged - over)


async def stuck(world: World, left: Sequence[str]) -> list[str]:
    """Where the recipients of jobs that do not end are: the ledger, the lanes, the leases, the intake."""
    lines: list[str] = []
    known = await asyncio.to_thread(told_of, world.settings.sql_address())
    numbers = set()
    for name in left:
        if name in known:
            said = known[name][1]
            numbers.add(said.number)
            lines.append(f"{name}: job {said.number} {said.state}, rows {said.rows}, ended {dict(said.counters)}")
        else:
            lines.append(f"{name}: the ledger does not know it")
    for partition in range(keyspace.PARTITIONS):
        prefix = keyspace.prefix(partition)
        leases: Any = await world.redis.hgetall(keyspace.leases(partition))
        async for key in world.redis.scan_iter(match=f"{prefix.replace('{', '?').replace('}', '?')}s:*", count=1000):
            header = parse_header(await call(world.redis, "GET", key) or b"")
            if isinstance(header, Header) and header.job in numbers:
                name = key.decode().rpartition(":")[2]
                where = leases.get(name.encode(), b"waiting").decode()
                count = len(header.pending())
                lines.append(f"p{partition:02d} slice {name} of job {header.job}: {count} pending, {where}")
        holders: Any = await world.redis.hgetall(keyspace.holders(partition))
        lines += [f"p{partition:02d} holder {name.decode()} {beat.decode()}" for name, beat in holders.items()]
    with contextlib.suppress(redis.exceptions.ResponseError):
        pending: Any = await world.redis.xpending_range(keyspace.INTAKE, keyspace.INTAKE_GROUP, "-", "+", 20)
        lines += [f"intake: {entry}" for entry in pending]
    workers: Any = await world.redis.hgetall(keyspace.HOSTS)
    return lines + [f"registered: {name.decode()}" for name in workers]


async def waiting_events(client: Client) -> int:
    async with client.pipeline(transaction=False) as pipe:
        for partition in range(keyspace.PARTITIONS):
            pipe.xlen(keyspace.events(partition))
        pipe.xlen(keyspace.HITS)
        return sum(await pipe.execute())


# --- I7: at rest nothing spins ---------------------------------------------------------------------------------------

CPU_AT_REST = 0.35  # of one core, a process: a worker looks at 64 partitions four times a second
LOG_LINES_A_SECOND = 20.0
SCRIPTS_A_SECOND = 700.0  # a worker at rest: 64 partitions every quarter of a second, and its heartbeat


async def spinning(world: World, seconds: float) -> list[Measure]:
    """Watch everybody for a while in which nothing is to be done."""
    pids = world.pids()
    scripts, lines = await _scripts(world.redis), {name: world.log_bytes(name).count(b"\n") for name in pids}
    opened = _connects(world)
    found = await busy(world, seconds, "CPU at rest, cores")
    for name in pids:
        said = (world.log_bytes(name).count(b"\n") - lines[name]) / seconds
        found.append(Measure("I7", name, "log lines a second at rest", said, LOG_LINES_A_SECOND))
    asked = (await _scripts(world.redis) - scripts) / seconds
    found.append(Measure("I7", "redis", "scripts a second at rest", asked, SCRIPTS_A_SECOND * world.workers))
    found.append(Measure("I7", "sink", "connections opened at rest", _connects(world) - opened, 0))
    return found


async def busy(world: World, seconds: float, what: str) -> list[Measure]:
    """The CPU everybody who lives takes meanwhile."""
    before = {name: cpu_seconds(pid) for name, pid in world.pids().items()}
    await asyncio.sleep(seconds)
    found = []
    for name, pid in world.pids().items():
        now, then = cpu_seconds(pid), before.get(name)
        if now is not None and then is not None:
            found.append(Measure("I7", name, what, round((now - then) / seconds, 3), CPU_AT_REST))
    return found


async def _scripts(client: Client) -> int:
    told: Any = await client.info("commandstats")
    return sum(int(told[name]["calls"]) for name in ("cmdstat_evalsha", "cmdstat_eval") if name in told)


def _connects(world: World) -> int:
    return sum(line.k == "open" for line in read_lines(world.record))


def in_traffic(world: World, lines: Sequence[Line], kills: int, messages: int) -> list[Measure]:
    """Bounds over a whole run: connections for messages and faults; log lines for faults and jobs."""
    opened = sum(line.k == "open" for line in lines)
    found = [Measure("I7", "sink", "connections opened", opened, messages + 200 * (kills + 1))]
    for name in world.roles:
        said = world.log_bytes(name).count(b"\n")
        found.append(Measure("I7", name, "log lines", said, 2000 + 400 * (kills + 1) + messages))
    return found


# --- I8: nothing is left ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Base:
    """Before the load. memory: bytes Redis holds for data; descriptors: by role."""

    memory: int
    descriptors: Mapping[str, tuple[int, int]]


async def base(world: World) -> Base:
    return Base(await _memory(world.redis), descriptors_of(world))


async def _memory(client: Client) -> int:
    """Bytes of data, without what a key that stays takes."""
    with contextlib.suppress(redis.exceptions.ResponseError):
        await call(client, "MEMORY", "PURGE")
    total = int((await client.info("memory"))["used_memory_dataset"])
    keys = [key async for key in client.scan_iter(count=1000)]
    async with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.execute_command("MEMORY", "USAGE", key, "SAMPLES", "0")
        return total - sum(int(size or 0) for size in await pipe.execute())


async def leftovers(world: World) -> dict[str, str]:
    """Keys that nothing on its way explains, with what they hold. Workers have ended in order by now."""
    found: dict[str, str] = {}
    async for raw in world.redis.scan_iter(count=1000):
        key = raw.decode()
        entry = keyspace.entry_of(key)
        if entry is None:
            found[key] = "is in no inventory"
        elif entry.name in _EMPTY:
            length = int(await world.redis.xlen(key))
            if length:
                found[key] = f"{entry.name} still holds {length} entries"
        elif entry.name in ("rejected", "dead"):
            found[key] = f"{await world.redis.xlen(key)} entries were {entry.name}"
        elif entry.name not in _STAYS:
            kind: Any = await world.redis.type(key)
            found[key] = f"a key of {entry.name} is left ({kind.decode()}): {await _contents(world.redis, key, kind)}"
    with contextlib.suppress(redis.exceptions.ResponseError):
        pending: Any = await world.redis.xpending(keyspace.INTAKE, keyspace.INTAKE_GROUP)
        if pending["pending"]:
            found["intake"] = f"{pending['pending']} entries are pending"
        consumers: Any = await world.redis.xinfo_consumers(keyspace.INTAKE, keyspace.INTAKE_GROUP)
        if consumers:
            found["intake group"] = f"{len(consumers)} consumers that are gone are remembered"
    workers: Any = await world.redis.hgetall(keyspace.HOSTS)
    for name in workers:
        found[f"hosts {name.decode()}"] = "a worker that ended is still registered"
    return found


async def _contents(client: Client, key: str, kind: bytes) -> str:
    words = {b"hash": ("HGETALL", key), b"zset": ("ZRANGE", key, "0", "5", "WITHSCORES"), b"set": ("SMEMBERS", key)}
    command = words.get(kind)
    if command is None:
        return f"{await call(client, 'MEMORY', 'USAGE', key)} bytes"
    return str(await call(client, *command))[:300]


POOL = 64  # connections to Redis a client may keep for life (policy.valkey); redis-py never shrinks its pool
FILES = 20  # SQLAlchemy keeps five connections, each three files of SQLite; journals wait for the ledger


async def hygiene(world: World, before: Base, now: Mapping[str, tuple[int, int]]) -> list[Measure]:
    """Memory and descriptors against the base. now: `descriptors_of` while everybody was still up and at rest."""
    limit = before.memory * 1.1 + 512 * 1024
    found = [Measure("I8", "redis", "bytes of memory beside its keys", await _memory(world.redis), limit)]
    for name, (others, local) in now.items():
        if name in before.descriptors:
            others_before, local_before = before.descriptors[name]
            clients = len(world.engines) + 4 if name == "redis" else 1
            found.append(Measure("I8", name, "files and TCP connections", others, others_before + FILES))
            found.append(Measure("I8", name, "unix sockets", local, local_before + POOL * clients))
    return found


def descriptors_of(world: World) -> dict[str, tuple[int, int]]:
    found = {name: descriptors(pid) for name, pid in world.pids().items()}
    return {name: counts for name, counts in found.items() if counts is not None}


# --- all of it -------------------------------------------------------------------------------------------------------


async def history(
    world: World,
    ledger: Path,
    shot_log: Path,
    measures: Sequence[Measure] = (),
    orphans: Mapping[str, str] | None = None,
    *,
    render: bool = True,
) -> History:
    """Read everything that was written down."""
    url = world.settings.sql_address()
    known = await asyncio.to_thread(told_of, url)
    handed_in = submitted(ledger)
    lines = await asyncio.to_thread(read_lines, world.record)
    heard = list(entries(lines))
    jobs: list[Job] = []
    told: dict[int, Told] = {}
    for job_id, (row, said) in known.items():
        told[said.number] = said
        if job_id in handed_in.acknowledged:
            people = people_of(world.keyring, row, handed_in.rows[job_id])
            rows = len(handed_in.rows[job_id])
            jobs.append(Job(said.number, job_id, handed_in.in_doubt[job_id], str(row.list or 0), rows, people))
    missing = handed_in.acknowledged - known.keys()
    # no number, because the ledger never gave one: I1 tells
    jobs += [Job(-place, name, "hold", "", 0, {}) for place, name in enumerate(sorted(missing), start=1)]
    renders = None
    if render:
        reader = Reader(open_store(url, writer=False))
        try:
            accepted = {said.number: row.accepted_at // 1_000_000 for row, said in known.values()}
            real = [one for one in jobs if one.number > 0]
            renders = await Renders(world, reader).all(real, handed_in.rows, heard, accepted, int(time.time()))
        finally:
            reader.close()
    return History(
        jobs=jobs,
        told=told,
        entries=heard,
        lines=lines,
        faults=list(world.faults),
        shots=shots(shot_log),
        limits={place.label: place.limits for place in world.places},
        renders=renders,
        measures=list(measures),
        orphans=dict(orphans or {}),
        hellos=_hellos(lines),
        unacknowledged=sorted(set(handed_in.rows) - handed_in.acknowledged),
    )


def _hellos(lines: Sequence[Line]) -> dict[tuple[int, int], str]:
    run, found = -1, {}
    for line in lines:
        if line.k == "start":
            run += 1
        elif line.k == "hello":
            found[max(run, 0), line.c] = line.word
    return found
