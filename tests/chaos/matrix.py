"""``make chaos-matrix``: what each way of syncing loses at each fault, measured; the last line is one line of JSON.

    python -m tests.chaos.matrix [--cells everysec/power,...] [--seed 1] [--keep]

{always, everysec} x {kill -9, disk full, restore of an older dump, power cut} (promises.md 3). A cell: a fresh world
with one worker; campaigns that hold and mail that is sent again when in doubt; beside them small jobs without end, a
list of numbers in Redis (acknowledged writes) and opt-outs; the fault in the middle of it; all up again, drained; what
is lost is counted, then submitted again under its ids; drained; checked (`checker`, and `broken_by` here).

    kill     Valkey, writer and worker get SIGKILL at once: pages stay, nothing may be lost
    full     the disk of Valkey's files is full for `FULL` s: nobody new is written to meanwhile, nothing may be lost
    dump     Valkey comes back as it was seconds ago (T12): lost is told, duplicates 0, opt-outs stay
    power    everything at once, unsynced bytes gone (`outage`): always loses no job; everysec 2 s of accepted jobs

Exit 0 only when no promise is broken. Known limits: one run of each cell is a sample, not a proof.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import redis.exceptions

from policy import keyspace
from policy.address import normalise, parse, tag_of
from policy.ledger import Reader
from policy.schema import open_store
from policy.suppression import Scope
from policy.valkey import EmbeddedServerError, call, connect
from policy.wire import SuppressionRecord, WireError, WriterUnavailable
from tests.chaos import checker, observe
from tests.chaos.checker import Broken, History, Limits, Told
from tests.chaos.load import Book, at, campaign, mail, people, submit
from tests.chaos.outage import Matrix, SmallDisk, power_cut, small_disk, traced, untraced
from tests.chaos.storm import Say, last_words
from tests.chaos.world import Place, World, chaos_world

ENGINE_0 = "engine-0"
SYNCS = ("always", "everysec")
FAULTS = ("kill", "full", "dump", "power")
PLACES = (
    Place("fast", "127.0.0.1", "dot.late.20ms", Limits(6)),
    Place("slow", "127.0.0.2", "dot.late.500ms", Limits(4)),
)
BEATS = "matrix:beats"
WARM = 150  # messages before the fault
FULL = 3.0  # s
DUMP_AGE = 2.0  # s
LOSABLE = 2.0  # s of accepted jobs that everysec may lose at a machine crash (T0)
CLOSED = 1.0  # s after the first refusal: a Permit lives half of that
DRAIN = 60.0
_AWAY = (redis.exceptions.RedisError, OSError, WriterUnavailable, WireError, TimeoutError)


@dataclass(slots=True)
class Row:
    """A line of the table. jobs_lost: acknowledged and nowhere, before they were submitted again; lost: recipients of
    jobs that said so; again: seconds from the end of the fault to the next RCPT."""

    cell: str
    recipients: int = 0
    delivered: int = 0
    twice_hold: int = 0
    twice_resend: int = 0
    unknown: int = 0
    lost: int = 0
    jobs: int = 0
    jobs_lost: int = 0
    writes: int = 0
    writes_lost: int = 0
    again: float = 0.0
    drained: float = 0.0
    cut: dict[str, int] = field(default_factory=dict)
    broken: int = 0


@dataclass(slots=True)
class Facts:
    """What the cell saw beside the history. fault, back: when it came, and when everything could begin again; refused:
    first write that was refused; missing, lost: job ids before they were submitted again; ended: kinds of those who had
    opted out, of a job for them alone."""

    sync: str
    kind: str
    fault: float = 0.0
    back: float = 0.0
    refused: float | None = None
    acked: dict[str, float] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)  # by job id: rows, terminal states told with LOST
    beats: set[int] = field(default_factory=set)
    beats_found: set[int] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)


# --- what is promised (pure) -----------------------------------------------------------------------------------------


def broken_by(facts: Facts, history: History) -> list[Broken]:
    """Every promise of this cell that does not hold."""
    laws = [
        checker.nothing_lost, checker.no_phantom, checker.duplicates, checker.suppression, checker.throttle,
        checker.accounting,
    ]  # fmt: skip
    if facts.kind != "power":
        laws.append(checker.unknowns)  # I3b excepts the power cut
    found = [broken for law in laws for broken in law(history)]
    found += [Broken("I7", name, f"not over {DRAIN:g} s after the fault") for name in facts.left]
    may_lose_jobs = facts.kind == "dump" or (facts.kind == "power" and facts.sync == "everysec")
    for name in sorted(facts.missing | set(facts.lost)):
        before = facts.fault - facts.acked[name]
        if not may_lose_jobs:
            found.append(Broken("T0", name, "an acknowledged job has lost people"))
        elif facts.kind == "power" and before > LOSABLE:
            found.append(Broken("T0", name, f"lost, and it had been acknowledged {before:.1f} s before the cut"))
    for name, (rows, told) in facts.lost.items():
        if rows != told:
            found.append(Broken("T12", name, f"lost, and {told} terminal states are told of {rows} rows"))
    gone = len(facts.beats - facts.beats_found)
    if gone and (facts.kind in ("kill", "full") or (facts.sync == "always" and facts.kind == "power")):
        found.append(Broken("T0", BEATS, f"{gone} acknowledged writes are gone"))
    if facts.ended.get("delivered") or facts.ended.get("unknown") or not facts.ended:
        found.append(Broken("T11", "opt-outs", f"of those who opted out: {dict(facts.ended)}"))
    if facts.kind == "full":
        found += _closed(facts, history)
    return found


def _closed(facts: Facts, history: History) -> list[Broken]:
    """A full disk: from the first refusal on nobody new is written to."""
    if facts.refused is None:
        return [Broken("T4", "disk", "it was full and no write was refused")]
    since, until = facts.refused + CLOSED, facts.back
    late = [entry.t_rcpt for entry in history.entries if since < entry.t_rcpt < until]
    return [Broken("T4", "disk", f"{len(late)} RCPTs while no write could be kept")] if late else []


def again(history: History, facts: Facts) -> float:
    """Seconds from the end of the fault to the end of the longest silence that began around it."""
    times = [entry.t_rcpt for entry in history.entries if entry.t_rcpt >= facts.fault - 1.0]
    pauses = [(after - before, after) for before, after in itertools.pairwise(times)]
    ends = max(pauses, default=(0.0, facts.back))[1]
    return max(0.0, ends - facts.back)


def twice(history: History) -> tuple[int, int]:
    """Copies beyond the first of anybody: of jobs that hold, and of those that send again when in doubt."""
    in_doubt = {job.number: job.in_doubt for job in history.jobs}
    copies = Counter((entry.job, entry.mref) for entry in history.entries if entry.stored)
    more = Counter[str]()
    for (number, _), count in copies.items():
        more[in_doubt.get(number, "hold")] += count - 1
    return more["hold"], more["resend"]


# --- the load --------------------------------------------------------------------------------------------------------


class Traffic:
    """Everything that goes in. jobs: what was acknowledged, to be submitted again."""

    def __init__(self, world: World, facts: Facts, seed: int) -> None:
        self.world, self.facts = world, facts
        self.ledger, self.shot_log = world.folder / "jobs.jsonl", world.folder / "shots.jsonl"
        self.jobs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self.shot: list[str] = []
        self._book, self._shots = Book(self.ledger), Book(self.shot_log)
        self._chance = random.Random(seed)
        self._far: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def submit(self, job: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Until it is acknowledged."""
        await submit(self.world.server.url, self._book, job, rows)
        self.facts.acked.setdefault(job["job_id"], time.monotonic())
        self.jobs[job["job_id"]] = job, rows

    async def begin(self) -> None:
        """The big ones; then small ones, writes and opt-outs until `end`."""
        for turn in range(2):
            rows = at("a.fast.test", range(turn * 500, turn * 500 + 500)) + at(
                "a.slow.test", range(turn * 25, turn * 25 + 25)
            )
            self._far += rows[400:500]
            await self.submit(campaign(f"big-{turn}"), people(rows))
        await self.submit(mail("mail"), people(at("b.fast.test", range(300))))
        self._tasks = [asyncio.create_task(each) for each in (self._small(), self._beat(), self._shoot())]

    async def end(self, beats: bool = False) -> None:
        """beats: only the writes that are counted."""
        some = self._tasks[1:2] if beats else self._tasks
        for task in some:
            task.cancel()
        for done in await asyncio.gather(*some, return_exceptions=True):
            if isinstance(done, Exception):
                raise done

    async def _small(self) -> None:
        turn = 0
        while True:
            turn += 1
            domain = self._chance.choice(("c.fast.test", "d.fast.test", "b.slow.test"))
            some = self._chance.sample(range(3000), 2 if "slow" in domain else 15)
            make = mail if turn % 3 == 0 else campaign
            await self.submit(make(f"small-{turn}"), people(at(domain, some)))
            await asyncio.sleep(0.15)

    async def _beat(self) -> None:
        client = connect(self.world.server.url, max_connections=2)
        number = 0
        try:
            while True:
                number += 1
                try:
                    await call(client, "RPUSH", BEATS, number)
                    self.facts.beats.add(number)
                except (redis.exceptions.RedisError, OSError):
                    if self.facts.refused is None:
                        self.facts.refused = time.monotonic()
                await asyncio.sleep(0.004)
        finally:
            await client.aclose()

    async def _shoot(self) -> None:
        """Opt-outs of people who wait."""
        pepper = self.world.keyring.pepper
        while self._far:
            address = self._far.pop(self._chance.randrange(len(self._far)))
            mailbox = parse(address)
            tag = tag_of(pepper, normalise(mailbox.local, mailbox.domain))
            entry = SuppressionRecord(
                tag, keyspace.partition_of(mailbox.domain), int(Scope.PLATFORM), 0, "manual", "matrix"
            )  # fmt: skip
            t_call, t_ack = time.monotonic(), None
            with contextlib.suppress(*_AWAY):
                await self.world.ask.suppress([entry])
                t_ack = time.monotonic()
                self.shot.append(address)
            self._shots.say(
                k="shot", address=address, scope="platform", list="0", aimed=False, t_call=t_call, t_ack=t_ack
            )  # fmt: skip
            await asyncio.sleep(0.25)


def delivered_so_far(world: World) -> int:
    try:
        return world.record.read_bytes().count(b'"k":"said"')
    except FileNotFoundError:
        return 0


async def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen within {seconds:g} s")
        await asyncio.sleep(0.03)


# --- the faults ------------------------------------------------------------------------------------------------------


async def start_again(world: World) -> None:
    """As the machine's supervisor would: all at once."""
    await asyncio.gather(*(world.start(name) for name in ("redis", "policy", ENGINE_0)))


async def kill(world: World, traffic: Traffic, facts: Facts) -> None:
    facts.fault = time.monotonic()
    await asyncio.gather(*(world.kill(name) for name in ("redis", "policy", ENGINE_0)))
    await traffic.end(beats=True)
    facts.back = time.monotonic()
    await start_again(world)


async def full(disk: SmallDisk, world: World, traffic: Traffic, facts: Facts) -> None:
    facts.fault = time.monotonic()
    await asyncio.to_thread(disk.fill)
    ended: list[bool] = []

    async def supervise() -> None:
        while True:
            if not world.server.running():
                ended.append(True)
                with contextlib.suppress(EmbeddedServerError):
                    await world.start_redis()
            await asyncio.sleep(0.3)

    watching = asyncio.create_task(supervise())
    await asyncio.sleep(FULL)
    await asyncio.to_thread(disk.empty)
    facts.back = time.monotonic()
    try:
        await until(lambda: len(facts.beats) > 0 and facts.refused is not None, 10.0, "a refused write")
        count = len(facts.beats)
        await until(lambda: len(facts.beats) > count + 5, 30.0, "a write that is taken again")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    if bool(ended) != (facts.sync == "always"):
        raise RuntimeError(f"Valkey with {facts.sync} {'ended' if ended else 'lived on'}: not what was measured before")


async def dump(world: World, traffic: Traffic, facts: Facts) -> None:
    copy = world.folder / "dump"
    await world.dump(copy)
    count = delivered_so_far(world)
    await asyncio.sleep(DUMP_AGE)
    await until(lambda: delivered_so_far(world) >= count + 50, 30.0, "50 more messages")
    facts.fault = time.monotonic()
    await traffic.end(beats=True)
    await world.restore(copy)
    facts.back = time.monotonic()


async def power(before: dict[str, int], world: World, traffic: Traffic, facts: Facts) -> None:
    world.reader.close()  # of the harness; a real machine takes its readers with it
    cut = await power_cut(world, before)
    facts.fault, facts.cut = cut.at, dict(cut.lost)
    await traffic.end(beats=True)
    untraced(world)
    facts.back = time.monotonic()
    await start_again(world)
    await world.until_writer()
    world.reader = Reader(open_store(world.settings.sql_address(), writer=False))


Fault = Callable[[World, Traffic, Facts], Awaitable[None]]


@contextlib.asynccontextmanager
async def prepared(kind: str, world: World) -> AsyncIterator[Fault]:
    """What must be there before anything is started."""
    assert isinstance(world.server, Matrix)
    if kind == "full":
        world.server.folder.mkdir(mode=0o700, exist_ok=True)
        async with small_disk(world.server.folder / "appendonlydir", 16 * 1024) as disk:
            world.server.around = disk.enter
            yield partial(full, disk)
    elif kind == "power":
        yield partial(power, traced(world))
    else:
        yield kill if kind == "kill" else dump


# --- a cell ----------------------------------------------------------------------------------------------------------


async def play(sync: str, kind: str, seed: int, folder: Path | None, say: Say) -> tuple[Row, list[Broken]]:
    facts = Facts(sync, kind)
    async with chaos_world(1, PLACES, folder=folder, embedded=partial(Matrix, sync=sync)) as world:
        async with prepared(kind, world) as fault:
            await world.start_all(tracker=False)
            traffic = Traffic(world, facts, seed)
            await traffic.begin()
            try:
                await until(lambda: delivered_so_far(world) >= WARM, 60.0, "the warm-up")
                say(f"{sync}/{kind}: the fault")
                await fault(world, traffic, facts)
                await asyncio.sleep(1.0)
            finally:
                await traffic.end()
            began = time.monotonic()
            await settle(world, traffic, facts)
            drained = time.monotonic() - began
            history = await observe.history(world, traffic.ledger, traffic.shot_log)
            found = broken_by(facts, history)
            if found:
                say(last_words(world, "policy", ENGINE_0))
            numbers = checker.figures(history)
            kinds = Counter(kind for told in history.told.values() for _, kind in told.messages)
            gone = len(facts.beats - facts.beats_found)
            row = Row(
                f"{sync}/{kind}", numbers.recipients, kinds["delivered"], *twice(history), numbers.unknowns,
                sum(rows for rows, _ in facts.lost.values()), len(facts.acked), len(facts.missing), len(facts.beats),
                gone, round(again(history, facts), 1), round(drained, 1), facts.cut, len(found),
            )  # fmt: skip
            return row, found


async def settle(world: World, traffic: Traffic, facts: Facts) -> None:
    """Drain; count what is lost and submit it again; drain; then a job for those who opted out."""
    url = world.settings.sql_address()
    facts.beats_found = {int(n) for n in await call(world.redis, "LRANGE", BEATS, "0", "-1")}
    facts.missing = await _missing(world, facts)
    waited = set(facts.acked) - facts.missing
    facts.left = await _over(url, waited)
    for name, (_, told) in (await asyncio.to_thread(observe.told_of, url)).items():
        if told.state == "lost":
            facts.lost[name] = _lost(told, traffic, name)
    for name in sorted(facts.missing | set(facts.lost)):
        await traffic.submit(*traffic.jobs[name])
    facts.left = facts.left or await _over(url, set(facts.acked))
    if traffic.shot and not facts.left:
        await traffic.submit(campaign("after"), people(traffic.shot))
        facts.left = await _over(url, set(facts.acked))
        _, told = (await asyncio.to_thread(observe.told_of, url))["after"]
        facts.ended = Counter(kind for _, kind in told.messages)


def _lost(told: Told, traffic: Traffic, name: str) -> tuple[int, int]:
    return len(traffic.jobs[name][1]), sum(told.counters.values())


async def _missing(world: World, facts: Facts) -> set[str]:
    """Acknowledged jobs that the ledger does not know although the intake has nothing left."""
    deadline = time.monotonic() + DRAIN
    quiet = 0
    while time.monotonic() < deadline:
        known = set(await asyncio.to_thread(observe.told_of, world.settings.sql_address()))
        missing = set(facts.acked) - known
        if not missing:
            return set()
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            quiet = quiet + 1 if not await world.redis.xlen(keyspace.INTAKE) else 0
        if quiet >= 3:
            return missing
        await asyncio.sleep(0.5)
    return missing


async def _over(url: str, names: set[str]) -> list[str]:
    """Wait until these are over; those that are not in time."""
    deadline = time.monotonic() + DRAIN
    while left := await asyncio.to_thread(observe._not_over, url, names):
        if time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)
    return []


# --- the table -------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("cell", "cell"), ("recipients", "recipients"), ("delivered", "delivered"), ("twice: hold", "twice_hold"),
    ("resend", "twice_resend"),
    ("unknown", "unknown"), ("lost", "lost"), ("jobs", "jobs"), ("jobs lost", "jobs_lost"), ("writes", "writes"),
    ("writes lost", "writes_lost"), ("again s", "again"), ("drained s", "drained"), ("broken", "broken"),
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [[title for title, _ in _COLUMNS]]
    lines += [[str(asdict(row)[name]) for _, name in _COLUMNS] for row in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


async def run(options: argparse.Namespace) -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f}] {text}", flush=True)

    every = [f"{sync}/{kind}" for sync in SYNCS for kind in FAULTS]
    wanted = options.cells.split(",") if options.cells else every
    rows: list[Row] = []
    all_broken: list[Broken] = []
    for name in (each for each in every if each in wanted):
        sync, _, kind = name.partition("/")
        folder = Path(tempfile.mkdtemp(prefix="matrix-", dir="/tmp")) if options.keep else None
        if folder is not None:
            say(f"{name}: folder {folder}")
        row, broken = await play(sync, kind, options.seed, folder, say)
        rows.append(row)
        all_broken += broken
        for one in broken[:20]:
            say(f"{name}: {one}")
        say(f"{name}: {json.dumps(asdict(row))}")
    print(table(rows))
    summary = {"matrix": [asdict(row) for row in rows], "broken": len(all_broken), "seed": options.seed}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
    return 1 if all_broken or len(rows) < len(wanted) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.matrix", description="what each cell loses")
    parser.add_argument("--cells", default="", help="only these, by comma: always/kill,everysec/power")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the folders of the worlds")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
