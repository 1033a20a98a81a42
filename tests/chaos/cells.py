"""A cell of the matrix: a fresh world, its load, its fault, up again, drained, counted, checked.

    row, broken = await play("everysec", "power", seed, None, print)

What is lost is counted, then submitted again under its ids, and drained: at the end everybody has exactly one end.

Known limits: the embedded server only; `policy.losses` is more impatient than in earnest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import redis.exceptions

from policy import keyspace
from policy.ledger import Reader
from policy.schema import open_store
from policy.valkey import EmbeddedServerError, call
from tests.chaos import checker, observe
from tests.chaos.cell_laws import BEATS, DRAIN, Facts, again, broken_by, twice
from tests.chaos.cell_load import Traffic
from tests.chaos.checker import Broken, Limits, Told
from tests.chaos.load import at, campaign, people
from tests.chaos.outage import Matrix, SmallDisk, power_cut, small_disk, traced, untraced
from tests.chaos.storm import Say, last_words
from tests.chaos.world import Place, World, chaos_world

ENGINE_0 = "engine-0"
PLACES = (
    Place("fast", "127.0.0.1", "dot.late.20ms", Limits(6)),
    Place("slow", "127.0.0.2", "dot.late.500ms", Limits(4)),
    Place("aimed", "127.0.0.3", "dot.late.2", Limits(4)),
)
WARM = 150  # messages before the fault
FULL = 3.0  # s
DUMP_AGE = 2.0  # s
QUIET = 10.0  # s without a further entry until a job whose audience broke off is lost; 120 in earnest


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


def delivered_so_far(world: World) -> int:
    try:
        return world.record.read_bytes().count(b'"k":"said"')
    except FileNotFoundError:
        return 0


def _lines_of(world: World, port: bytes) -> list[bytes]:
    """The newest lines of the sink's record that tell of a site."""
    with world.record.open("rb") as file:
        file.seek(max(0, world.record.stat().st_size - 32_768))
        return [line for line in file.read().splitlines() if port in line]


async def until(true: Callable[[], bool], seconds: float, what: str, pause: float = 0.03) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen within {seconds:g} s")
        await asyncio.sleep(pause)


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
    await traffic.submit(campaign("aimed"), people(at("x.aimed.test", range(4))))
    await until(lambda: b'"k":"mail"' in b"".join(_lines_of(world, b"aimed@")), 30.0, "a dot", pause=0.002)
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
        world.server.place = world.server.folder / "disk"
        async with small_disk(world.server.place, 16 * 1024) as disk:
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
        world.prelude["policy"] = f"import policy.losses as _losses; _losses.QUIET = {QUIET}; "
        async with prepared(kind, world) as fault:
            await world.start_all(tracker=False)
            traffic = Traffic(world, facts, seed)
            await traffic.begin()
            try:
                await until(lambda: delivered_so_far(world) >= WARM, 60.0, "the warm-up")
                say(f"{sync}/{kind}: the fault")
                await fault(world, traffic, facts)
                await asyncio.sleep(1.0)
                await traffic.end()
            finally:
                traffic.cancel()
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
                sum(gone for _, _, gone in facts.lost.values()), len(facts.acked), len(facts.missing), len(facts.beats),
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
            facts.lost[name] = _lost(told, len(traffic.jobs[name][1]))
    for name in sorted(facts.missing | set(facts.lost)):
        await traffic.submit(*traffic.jobs[name])
    facts.left = facts.left or await _over(url, set(facts.acked))
    if traffic.shot and not facts.left:
        await traffic.submit(campaign("after"), people(traffic.shot))
        facts.left = await _over(url, set(facts.acked))
        _, told = (await asyncio.to_thread(observe.told_of, url))["after"]
        facts.ended = Counter(kind for _, kind in told.messages)


def _lost(told: Told, rows: int) -> tuple[int, int, int]:
    """What the ledger counts as submitted, what it tells of, and how many people are lost. Of an audience that broke
    off it knows no more than came."""
    ended = sum(told.counters.values())
    return told.rows or 0, ended, rows - ended + told.counters.get("lost", 0)


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
