"""The white box: every crash point of the state table, one after the other, in one long-lived world (promises.md 3).

For each of `policy.transitions.POINTS`: the role is started with SALESPUSH_CRASH_AT, small jobs drive it there, it must
die there by SIGKILL; it is started without, and everything that was acknowledged must drain. The laws are asked once
at the end over the whole history: jobs carry the name of their point, so a violation says where it came from.

What ordinary traffic never reaches gets the scenario that does:

    assign            a lane with more slices than it is worth the script for
    release           slices in stock at a slow site, then SIGTERM
    replay, reclaim   a worker killed with mail on the wire; the next one carries its journal out
    reseal            a job is paused, a new week's queue key appears
    drain to finish   events gather while no writer is there
    suppress, enforce somebody opts out until the writer is gone; then SQL and Redis must say the same
    shred to receipt  somebody without mail is erased; in the end they are gone and suppressed
    clear             Redis starts anew while no writer is there

Known limits: one worker, so that who dies is known; re-sealing is made impatient from outside (`Resealing` waits two
minutes by itself).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select

from engine.delivery.leasing import FEW
from policy import keyspace, suppression
from policy.address import normalise, parse, tag_of
from policy.instants import week_of
from policy.keys import KEY_BYTES
from policy.schema import erasure, open_store, subject
from policy.suppression import Scope
from policy.transitions import Point
from policy.valkey import call
from policy.wire import SuppressionRecord, WireError, WriterUnavailable
from tests.chaos import observe
from tests.chaos.checker import Broken, check
from tests.chaos.load import Book, at, campaign, mail, people, submit
from tests.chaos.sink_record import read_lines
from tests.chaos.storm import Say, ended_alone, last_words, settle_down
from tests.chaos.world import ACCOUNT, World

ENGINE = "engine-0"
DIES = 20.0  # s within which a role must have died at its point
DRAINS = 30.0  # s
TRIES = 5  # of a scenario that a quick writer may miss
# which time, where the first would not hit anything that matters
_TIMES = {
    "intent": 3, "dot": 3, "reply": 3, "outcome": 3, "gate": 2, "fsync": 2, "suppress": 2, "enforce": 2, "reclaim": 9,
}  # fmt: skip
_IMPATIENT = (
    "import engine.delivery.resealing as _r; _r.Resealing.__init__.__kwdefaults__.update(grace=0.2, every=1.0); "
)

Scenario = Callable[["Crashes", Point], Awaitable[int | None]]


@dataclass(frozen=True, slots=True)
class CrashOutcome:
    """passed: names of the points at which the role died and after which everything drained."""

    passed: list[str]
    broken: list[Broken]


async def crash(world: World, points: Sequence[Point], seed: int, say: Say, *, patient: bool = True) -> CrashOutcome:
    """Start the world, go through the points, ask every law. The world is prepared and not started; patient: as of
    `storm.settle_down`."""
    began = time.monotonic()
    await world.start_all()
    crashes = Crashes(world, say, seed)
    await crashes.calm()
    before = await observe.base(world)
    await crashes.run(points)
    crashes.close()
    say(f"{len(points)} points in {time.monotonic() - began:.1f} s")
    measures, orphans = await settle_down(world, before, say, patient=patient)
    told = await observe.history(world, crashes.ledger, crashes.shots, measures, orphans)
    return CrashOutcome(crashes.passed, crashes.broken + check(told) + ended_alone(world))


class Crashes:
    """One world, all points. broken has what went wrong."""

    def __init__(self, world: World, say: Say, seed: int = 1) -> None:
        self.world = world
        self.passed: list[str] = []
        self.broken: list[Broken] = []
        self.ledger = world.folder / "jobs.jsonl"
        self.shots = world.folder / "shots.jsonl"
        self._say = say
        self._seed = seed
        self._book = Book(self.ledger)
        self._shot_book = Book(self.shots)
        self._jobs = 0

    async def run(self, points: Sequence[Point]) -> None:
        """The world is started already, with one worker."""
        for place, point in enumerate(points):
            began = time.monotonic()
            following = points[place + 1] if place + 1 < len(points) else None
            await self._point(point, following)
            took = time.monotonic() - began
            self._say(f"point {place + 1}/{len(points)} {point.name} {point.promise}: {took:.1f} s")

    async def calm(self) -> None:
        warm = campaign(f"c{self._seed}-warm")
        await submit(self.world.server.url, self._book, warm, people(at("w.fast.test", range(5))))
        _, left = await observe.drained(self.world, self.ledger, 60.0)
        if left:
            raise RuntimeError(f"not even a quiet world drains: {left}\n{last_words(self.world)}")

    def close(self) -> None:
        self._book.close()
        self._shot_book.close()

    async def _point(self, point: Point, following: Point | None) -> None:
        role = role_of(point)
        await self.world.hold(role)
        code = await _scenario(point)(self, point)
        died = code == -signal.SIGKILL
        if not died:
            said = "was never reached" if code is None else f"the role ended with code {code} instead of dying there"
            self.broken.append(Broken("crash point", point.name, f"{said}\n{last_words(self.world, role)}"))
        await self._up(role)
        if following is not None:
            before = _IMPATIENT if "reseal" in following.name else ""
            await self.world.hold(role_of(following), crash_at=armed(following), before=before)
        if await self._drains(point) and died:
            self.passed.append(point.name)

    async def _up(self, role: str) -> None:
        """The role without the crash point."""
        living = self.world.roles[role]
        if not living.ended.is_set():
            if not living.crash_at:
                return
            await self.world.kill(role)
        await self.world.start(role)
        if role == "policy":
            await self.world.until_writer()

    async def _drains(self, point: Point) -> bool:
        seconds, left = await observe.drained(self.world, self.ledger, DRAINS)
        if left:
            text = f"after {seconds:.0f} s not over: {left}\n{last_words(self.world, 'engine-0', 'policy')}"
            self.broken.append(Broken("crash point", point.name, text))
        return not left

    # --- hands ----------------------------------------------------------------------------------------------------

    async def arm(self, point: Point, *, before: str = "") -> None:
        """The role of a point, started to die at it."""
        await self.world.start(role_of(point), crash_at=armed(point), before=before)

    async def hand_in(self, point: Point, place: str = "fast", count: int = 5, *, apart: bool = False) -> str:
        """A campaign that holds and mail that is sent again; the id of the campaign. apart: a slice each, because a
        slice holds 32 KiB."""
        self._jobs += 1
        name, domain = f"c{self._seed}-{self._jobs}-{point.name}", f"d{self._jobs}.{place}.test"
        url, first = self.world.server.url, 100 * self._jobs
        rows = people(at(domain, range(first, first + count)))
        for row in rows if apart else ():
            row["fields"]["number"] = "7" * 20_000
        await submit(url, self._book, campaign(name), rows)
        await submit(url, self._book, mail(f"{name}-mail"), people(at(domain, range(first + count, first + 2 * count))))
        return name

    async def heard(self) -> None:
        """Until the sink has heard of somebody of the jobs handed in last."""
        async with asyncio.timeout(DIES):
            while not any(f"@d{self._jobs}." in line.rcpt for line in read_lines(self.world.record)):
                await asyncio.sleep(0.05)

    async def opt_out(self, number: int) -> bool:
        """One suppression; whether it was acknowledged."""
        address = f"o{number}@opt.fast.test"
        mailbox = parse(address)
        tag = tag_of(self.world.keyring.pepper, normalise(mailbox.local, mailbox.domain))
        entry = SuppressionRecord(tag, keyspace.partition_of(mailbox.domain), int(Scope.PLATFORM), 0, "manual", "chaos")
        t_call, t_ack = time.monotonic(), None
        with contextlib.suppress(WriterUnavailable, WireError, TimeoutError):
            await asyncio.wait_for(self.world.ask.suppress([entry]), 10.0)
            t_ack = time.monotonic()
        self._shot_book.say(
            k="shot", address=address, scope="platform", how="crash", list="0", aimed=False, t_call=t_call, t_ack=t_ack
        )
        return t_ack is not None

    async def dead(self, point: Point) -> int | None:
        return await self.world.crashed(role_of(point), DIES)


def role_of(point: Point) -> str:
    return ENGINE if point.role == "engine" else "policy"


def armed(point: Point) -> str:
    """What SALESPUSH_CRASH_AT says."""
    return f"{point.name}:{_TIMES.get(_step(point), 1)}"


def _step(point: Point) -> str:
    return point.name.partition("-")[2]


# --- scenarios -------------------------------------------------------------------------------------------------------


async def _traffic(crashes: Crashes, point: Point) -> int | None:
    """Ordinary jobs drive an engine there."""
    await crashes.world.stop(ENGINE)
    await crashes.arm(point)
    await crashes.hand_in(point)
    return await crashes.dead(point)


async def _full_lane(crashes: Crashes, point: Point) -> int | None:
    """A lane of many slices learns its site; one of few is not worth the script."""
    await crashes.world.stop(ENGINE)
    await crashes.arm(point)
    await crashes.hand_in(point, count=FEW + 3, apart=True)
    return await crashes.dead(point)


async def _release(crashes: Crashes, point: Point) -> int | None:
    await crashes.world.stop(ENGINE)
    await crashes.arm(point)
    await crashes.hand_in(point, "slow", 4)
    await crashes.heard()
    crashes.world.signal(ENGINE, signal.SIGTERM)
    return await crashes.dead(point)


async def _left_behind(crashes: Crashes, point: Point) -> int | None:
    await crashes.hand_in(point, "slow", 2)
    await crashes.heard()
    await crashes.world.kill(ENGINE)
    await crashes.arm(point)
    return await crashes.dead(point)


async def _new_key(crashes: Crashes, point: Point) -> int | None:
    world = crashes.world
    name = await crashes.hand_in(point, "slow", 5)
    await crashes.heard()
    await world.ask.job_state(f"{ACCOUNT}/{name}", "paused", "chaos")
    await world.stop(ENGINE)
    folder = world.settings.keys_dir
    newest = max(int(path.suffix[1:]) for path in folder.glob("queue.*"))
    key = folder / f"queue.{newest + 1}"
    key.touch(mode=0o600)
    key.write_text(os.urandom(KEY_BYTES).hex() + "\n")
    await crashes.arm(point, before=_IMPATIENT)
    code = await crashes.dead(point)
    await world.ask.job_state(f"{ACCOUNT}/{name}", "sending", "chaos")
    return code


async def _gathered(crashes: Crashes, point: Point) -> int | None:
    """Events wait in the streams when the writer comes. It may have been quicker than our SIGKILL: then once more."""
    world = crashes.world
    for _ in range(TRIES):
        await crashes.hand_in(point)
        await crashes.heard()
        await world.kill("policy")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DIES / TRIES):
                while not await observe.waiting_events(world.redis):
                    await asyncio.sleep(0.02)
        if await observe.waiting_events(world.redis):
            await crashes.arm(point)
            return await crashes.dead(point)
        await world.start("policy")
        await world.until_writer()
    return None


async def _opt_outs(crashes: Crashes, point: Point) -> int | None:
    world = crashes.world
    await world.stop("policy")
    await crashes.arm(point)
    await world.until_writer()
    first = number = 1000 * len(crashes.passed)
    while not world.roles["policy"].ended.is_set() and number < first + 50:
        number += 1
        await crashes.opt_out(number)
    code = await crashes.dead(point)
    await world.start("policy")
    await world.until_writer()
    await crashes.opt_out(number)
    for place in await _apart(world):
        crashes.broken.append(Broken("T11", point.name, f"Redis and SQL differ about a suppression in {place}"))
    return code


async def _apart(world: World, seconds: float = 8.0) -> list[str]:
    """Buckets in which Redis does not hold what SQL says, once the writer has had its time to mend it."""
    engine = open_store(world.settings.sql_address(), writer=False)
    deadline = time.monotonic() + seconds
    try:
        while True:
            with engine.connect() as conn:
                entries = list(suppression.every(conn))
                now = time.time_ns() // 1000
                fields = suppression.fields(conn, {(entry.tag, entry.partition) for entry in entries}, now)
            apart = []
            for field in fields:
                key = keyspace.suppression(field.partition, field.tag)
                if await call(world.redis, "HGET", key, field.tag) != (field.value or None):
                    apart.append(key)
            if not apart or time.monotonic() > deadline:
                return apart
            await asyncio.sleep(0.1)
    finally:
        engine.dispose()


async def _erasure(crashes: Crashes, point: Point) -> int | None:
    """Somebody who was never written to, so that the history the laws are asked about stays whole."""
    world = crashes.world
    mailbox = parse(f"{point.name}@gone.fast.test")
    tag = tag_of(world.keyring.pepper, normalise(mailbox.local, mailbox.domain))
    where = keyspace.partition_of(mailbox.domain)
    await world.ask.resolve(1, week_of(time.time_ns() // 1000), [(tag, where, mailbox.wire)])
    await world.stop("policy")
    await crashes.arm(point)
    # it may die before it answers: an erasure of a moment ago is looked after once more at every start
    ready = asyncio.create_task(world.until_writer())
    gone = asyncio.create_task(world.roles["policy"].ended.wait())
    await asyncio.wait((ready, gone), return_when=asyncio.FIRST_COMPLETED)
    for task in (ready, gone):
        task.cancel()
    await asyncio.gather(ready, gone, return_exceptions=True)
    with contextlib.suppress(WriterUnavailable, WireError, TimeoutError):
        asked = world.ask.call("erase", account=1, tag=tag, partition=where, address=mailbox.wire)
        await asyncio.wait_for(asked, 10.0)
    code = await crashes.dead(point)
    await world.start("policy")
    await world.until_writer()
    await world.ask.call("erase", account=1, tag=tag, partition=where, address=mailbox.wire)  # a repeat does nothing
    if fault := await _still_there(world, tag):
        crashes.broken.append(Broken("T11", point.name, fault))
    return code


async def _still_there(world: World, tag: bytes, seconds: float = 20.0) -> str:
    """What is wrong with an erasure once the writer has had its time to end it; "" nothing."""
    engine = open_store(world.settings.sql_address(), writer=False)
    deadline = time.monotonic() + seconds
    try:
        while True:
            with engine.connect() as conn:
                known = conn.scalar(select(func.count()).where(subject.c.tag == tag))
                states = conn.scalars(select(erasure.c.state).where(erasure.c.tag == tag)).all()
                suppressed = any(entry.reason == "erasure" for entry in suppression.check(conn, tag))
            if not known and not suppressed:
                return "erased without being suppressed"
            if not known and states and set(states) == {"purged"}:
                return ""
            if time.monotonic() > deadline:
                return f"an erasure did not end: {states}"
            await asyncio.sleep(0.1)
    finally:
        engine.dispose()


async def _new_run(crashes: Crashes, point: Point) -> int | None:
    world = crashes.world
    await world.kill("policy")
    await world.kill("redis")
    await world.start_redis()
    await crashes.arm(point)
    return await crashes.dead(point)


_SCENARIOS: dict[str, Scenario] = {
    "assign": _full_lane,
    "release": _release,
    "replay": _left_behind,
    "reclaim": _left_behind,
    "reseal": _new_key,
    "drain": _gathered,
    "commit": _gathered,
    "trim": _gathered,
    "finish": _gathered,
    "suppress": _opt_outs,
    "enforce": _opt_outs,
    "shred": _erasure,
    "purge": _erasure,
    "receipt": _erasure,
    "clear": _new_run,
}


def _scenario(point: Point) -> Scenario:
    return _SCENARIOS.get(_step(point), _traffic)
