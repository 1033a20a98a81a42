"""The black box: a random role is killed at random instants under load, workers are stopped for seconds, then all is
quiet and everything is checked (promises.md 3).

    1 calm     every role up, one small job through all of it, the base of memory and descriptors is taken
    2 storm    producer and suppressor at work; kills at uniform random instants, each role up again after a moment
    3 quiet    no more faults; everything that was acknowledged drains within `DRAIN` seconds
    4 rest     nothing spins, also while Redis or the writer is away; workers end in order; nothing is left
    5 check    `observe.history`, `checker.check`

The seed gives the instants, the victims, the pauses, the jobs and the shots; what the processes make of it is theirs.

Known limits: a victim that is down already is passed over for another; the tracker's hits are not counted (T10).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import observe, stacks
from tests.chaos.checker import Broken, Figures, Measure, check, figures
from tests.chaos.load import Book, campaign, people, submit
from tests.chaos.world import World

GAP = 2.0  # s between two kills, on average
DOWN = (0.05, 0.8)  # s a killed role is gone
STOP = (1.0, 4.0)  # s a worker is stopped
STOPS = 0.2  # of so many kills, one stop
DRAIN = 60.0  # s, the T of I7
AWAY = 2.0  # s of the two outages in which nobody may spin
CALM = 25.0  # s for the sink's connections to end and permits to expire
SETTLED = 8.0  # s after a fault of Redis in which a role that was being started may end by itself

VICTIMS = ("redis", "policy", "sink", "tracker", "engine", "engine")  # one of these, each as often as it stands here

Say = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    figures: Figures
    broken: list[Broken]
    kills: int = 0
    stops: int = 0
    drain_seconds: float = 0.0
    seconds: float = 0.0
    extra: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """kills: how many; shots: acknowledged suppressions wanted; scale: size of jobs; drain: the T of I7; victims: kinds
    of roles; patient: with the outages and the rest that show whether anybody spins."""

    seed: int
    kills: int
    shots: int
    scale: float = 1.0
    drain: float = DRAIN
    victims: tuple[str, ...] = VICTIMS
    patient: bool = True
    render: bool = True


async def storm(world: World, plan: Plan, say: Say) -> Outcome:
    """All five steps. The world is prepared and not started."""
    began = time.monotonic()
    ledger, shot_log = world.folder / "jobs.jsonl", world.folder / "shots.jsonl"
    await world.start_all()
    before = await calm(world, ledger, plan)
    say(f"calm after {time.monotonic() - began:.1f} s, memory {before.memory} bytes")
    span = plan.kills * GAP
    await world.start(
        "load", extra=[str(ledger), "--seed", str(plan.seed), "--seconds", "100000", "--scale", str(plan.scale)]
    )
    pause = max(0.05, span / max(1, plan.shots) * 0.5)
    await world.start(
        "suppressor",
        extra=[
            str(ledger), str(shot_log), "--seed", str(plan.seed), "--shots", str(plan.shots), "--pause", f"{pause:.3f}",
        ],
    )  # fmt: skip
    stops = await faults(world, plan, span, say)
    await _until_shot(world, shot_log, plan, say)
    for name in ("load", "suppressor"):
        await world.stop(name)
    left, measured = await quiet(world, ledger, plan, say)
    for name in ("redis", "policy") if plan.patient else ():
        measured += await outage(world, name)
    rest, orphans = await settle_down(world, before, say, patient=plan.patient)
    told = await observe.history(world, ledger, shot_log, [*measured, *rest], orphans, render=plan.render)
    numbers = figures(told)
    traffic = observe.in_traffic(world, told.lines, plan.kills, numbers.messages)
    told.measures = [*told.measures, *traffic]
    broken = check(told) + ended_alone(world)
    numbers = figures(told)
    return Outcome(
        numbers, broken, kills=plan.kills, stops=stops, drain_seconds=round(left, 1),
        seconds=round(time.monotonic() - began, 1),
        extra={"self_ended": [f"{one.role} {one.code}" for one in world.self_ended]},
    )  # fmt: skip


async def calm(world: World, ledger: Path, plan: Plan) -> observe.Base:
    """One small job through everything, so that what is made once is made."""
    book = Book(ledger)
    rows = [
        f"w{number}@a.{place.name}.test" for place in world.places for number in range(1 if place.name == "slow" else 4)
    ]
    await submit(world.server.url, book, campaign(f"s{plan.seed}-warm"), people(rows))
    book.close()
    _, left = await observe.drained(world, ledger, 60.0)
    if left:
        told = "\n".join(await observe.stuck(world, left))
        await stacks.asked(world)
        raise RuntimeError(f"not even a quiet world drains: {left}\n{told}\n{last_words(world, lines=200)}")
    return await observe.base(world)


async def faults(world: World, plan: Plan, span: float, say: Say) -> int:
    """Kill and stop; how many stops there were. Every role is up again at the end."""
    chance = random.Random(plan.seed)
    instants = sorted(chance.uniform(0.0, span) for _ in range(plan.kills))
    began = time.monotonic()
    again: set[asyncio.Task[None]] = set()
    down: set[str] = set()
    stops = 0
    for number, instant in enumerate(instants, start=1):
        await asyncio.sleep(max(0.0, began + instant - time.monotonic()))
        if chance.random() < STOPS:
            stops += 1
            engine, seconds = chance.choice(world.engines), chance.uniform(*STOP)
            if engine not in down:
                down.add(engine)
                again.add(asyncio.create_task(_pause(world, engine, seconds, down)))
        kinds = list(plan.victims)
        chance.shuffle(kinds)
        names = [chance.choice(world.engines) if kind == "engine" else kind for kind in kinds]
        while not (free := [name for name in names if name not in down]):
            await asyncio.sleep(0.02)
        name = free[0]
        down.add(name)
        await world.kill(name)
        if number % 10 == 0 or plan.kills <= 20:
            say(f"kill {number}/{plan.kills} at {time.monotonic() - began:.1f} s: {name}")
        again.add(asyncio.create_task(_revive(world, name, chance.uniform(*DOWN), down)))
        again = {task for task in again if not (task.done() and task.result() is None)}
    await asyncio.gather(*again)
    return stops


async def _revive(world: World, name: str, seconds: float, down: set[str]) -> None:
    await asyncio.sleep(seconds)
    await world.start(name)
    down.discard(name)


async def _pause(world: World, name: str, seconds: float, down: set[str]) -> None:
    async with world.paused(name):
        await asyncio.sleep(seconds)
    down.discard(name)


async def _until_shot(world: World, shot_log: Path, plan: Plan, say: Say) -> None:
    """The rest of the shots, if the faults were over sooner."""
    deadline = time.monotonic() + max(20.0, plan.shots * 0.3)
    while time.monotonic() < deadline:
        done = sum(shot.t_ack is not None for shot in observe.shots(shot_log))
        if done >= plan.shots:
            return
        await asyncio.sleep(0.25)
    say(f"only {done} of {plan.shots} shots were acknowledged in time")


async def quiet(world: World, ledger: Path, plan: Plan, say: Say) -> tuple[float, list[Measure]]:
    seconds, left = await observe.drained(world, ledger, plan.drain)
    say(f"drained in {seconds:.1f} s" if not left else f"NOT drained in {seconds:.1f} s: {left[:5]}")
    for line in await observe.stuck(world, left) if left else ():
        say(f"    {line}")
    found = [Measure("I7", "all jobs", "seconds to drain after the last fault", round(seconds, 1), plan.drain)]
    found += [Measure("I7", f"job {name}", "not over in time", 1, 0) for name in left]
    return seconds, found


async def outage(world: World, name: str) -> list[Measure]:
    """Nothing spins while somebody is away and there is nothing to do; then he is back."""
    await world.kill(name)
    found = await observe.busy(world, AWAY, f"CPU while {name} is away, cores")
    await world.start(name)
    await world.until_writer()
    return found


async def settle_down(
    world: World, before: observe.Base, say: Say, *, patient: bool = True
) -> tuple[list[Measure], dict[str, str]]:
    """Nothing spins, nothing is left, and workers end in order. patient: idle connections are waited for (ten seconds),
    so that descriptors can be counted and rest is rest."""
    deadline = time.monotonic() + CALM
    found: list[Measure] = []
    descriptors: dict[str, tuple[int, int]] = {}
    if patient:
        while await _live(world) and time.monotonic() < deadline:
            await asyncio.sleep(0.25)
        found = await observe.spinning(world, 2.0)
        descriptors = observe.descriptors_of(world)
    for name in world.engines:
        code = await world.stop(name)
        found.append(Measure("I8", name, "exit code after SIGTERM", abs(code), 0))
    orphans = await observe.leftovers(world)
    while any(key.startswith("sp:{s:") for key in orphans) and time.monotonic() < deadline + 15.0:
        await asyncio.sleep(0.5)  # permits of the killed run out by themselves
        orphans = await observe.leftovers(world)
    found += await observe.hygiene(world, before, descriptors)
    say(f"at rest, {len(orphans)} keys left over")
    return found, orphans


async def _live(world: World) -> int:
    """Connections the sink has open."""
    with contextlib.suppress(OSError, ValueError):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.control)
        try:
            writer.write(b"counts\n")
            counts: dict[str, dict[str, int]] = json.loads(await reader.readline())
            return sum(count["live"] for count in counts.values())
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return 0


def ended_alone(world: World) -> list[Broken]:
    """Roles that ended although nobody asked. Code 3 is a worker that met an older store (T12); one that was started
    into an outage may end, as its supervisor expects."""
    outages = [fault for fault in world.faults if fault.role in ("redis", "policy")]
    return [
        Broken("I7", one.role, f"ended by itself with code {one.code}\n{last_words(world, one.role)}")
        for one in world.self_ended
        if one.code != 3 and not any(0.0 <= one.at - fault.began <= SETTLED for fault in outages)
    ]


def last_words(world: World, *names: str, lines: int = 15) -> str:
    """The ends of logs."""
    chosen: Sequence[str] = names or tuple(world.roles)
    texts = []
    for name in chosen:
        tail = world.log_bytes(name).decode("utf-8", "replace").splitlines()[-lines:]
        texts.append(f"--- {name}\n" + "\n".join(tail))
    return "\n".join(texts)
