"""Redis comes back older in the middle of everything (T12): load, a dump, more load and opt-outs, then the dump again.

    1 load and suppressor at work · 2 a copy of what Redis has on disk · 3 on with both
    4 Redis is killed and comes back with the copy · 5 on with both, then quiet
    6 the producer reconciles, as T0 asks of it: what is lost, or what nobody knows, is handed in again under its id
    7 everything drains, and every law is asked: nobody who opted out is written to, no job that holds repeats anybody

Known limits: the copy is taken while Redis writes, so its tail may be torn, as that of a copied disk; a rewrite of the
append-only file meanwhile makes it begin anew.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from sqlalchemy import select

from policy.schema import job as job_table
from policy.schema import open_store
from tests.chaos import observe
from tests.chaos.checker import check, figures
from tests.chaos.load import Book, at, campaign, mail, people, submit
from tests.chaos.storm import Outcome, Plan, Say, calm, ended_alone, quiet, settle_down
from tests.chaos.world import World

BEFORE, BETWEEN, AFTER = 6.0, 8.0, 6.0  # s of load
STARTED = 1.5  # s in which the last jobs before the restore begin


async def older(world: World, plan: Plan, say: Say) -> Outcome:
    """All seven steps. The world is prepared and not started."""
    began = time.monotonic()
    ledger, shot_log = world.folder / "jobs.jsonl", world.folder / "shots.jsonl"
    await world.start_all()
    before = await calm(world, ledger, plan)
    await world.start("load", extra=[str(ledger), "--seed", str(plan.seed), "--seconds", "100000"])
    await world.start(
        "suppressor",
        extra=[str(ledger), str(shot_log), "--seed", str(plan.seed), "--shots", str(plan.shots), "--pause", "0.2"],
    )
    await asyncio.sleep(BEFORE)
    dump = await _dump(world)
    say("a dump was taken")
    await asyncio.sleep(BETWEEN)
    await _begin(world, ledger, plan)
    await world.restore(dump)
    say("Redis came back older")
    await asyncio.sleep(AFTER)
    for name in ("load", "suppressor"):
        await world.stop(name)
    again = await reconcile(world, ledger, plan)
    say(f"{len(again)} jobs were handed in again")
    left, measured = await quiet(world, ledger, plan, say)
    rest, orphans = await settle_down(world, before, say)
    told = await observe.history(world, ledger, shot_log, [*measured, *rest], orphans, render=plan.render)
    broken = check(told) + ended_alone(world)
    return Outcome(
        figures(told), broken, kills=1, drain_seconds=round(left, 1), seconds=round(time.monotonic() - began, 1),
        extra={"resubmitted": len(again), "self_ended": [f"{one.role} {one.code}" for one in world.self_ended]},
    )  # fmt: skip


async def _begin(world: World, ledger: Path, plan: Plan) -> None:
    """Jobs that the dump does not know and that are far from done when it comes back: they can only be lost."""
    book = Book(ledger)
    name, url = f"s{plan.seed}-late", world.server.url
    await submit(url, book, campaign(f"{name}-paced"), people(at("late.paced.test", range(150))))
    await submit(url, book, campaign(f"{name}-slow"), people(at("late.slow.test", range(12))))
    await submit(url, book, mail(f"{name}-mail"), people(at("late.slow.test", range(20, 26))))
    book.close()
    await asyncio.sleep(STARTED)


async def _dump(world: World) -> Path:
    """A copy whose files belong together."""
    place = world.folder / "dump"
    manifest = world.server.folder / "appendonlydir" / "appendonly.aof.manifest"
    while True:
        before = manifest.read_bytes()
        await world.dump(place)
        if manifest.read_bytes() == before:
            return place
        await asyncio.to_thread(shutil.rmtree, place)


async def reconcile(world: World, ledger: Path, plan: Plan) -> set[str]:
    """Hand in again what the ledger lost or never had, until it is over; the job ids that were."""
    again: set[str] = set()
    deadline = time.monotonic() + plan.drain
    book = Book(ledger)
    try:
        while time.monotonic() < deadline:
            handed_in = observe.submitted(ledger)
            states = await asyncio.to_thread(_states, world.settings.sql_address())
            open_ = [name for name in handed_in.acknowledged if states.get(name) != "done"]
            if not open_:
                return again
            for name in open_:
                state = states.get(name)
                if state == "lost" or (state is None and await world.redis.xlen("salespush:{in}:jobs") == 0):
                    await submit(world.server.url, book, handed_in.jobs[name], handed_in.rows[name])
                    again.add(name)
            await asyncio.sleep(1.0)
    finally:
        book.close()
    return again


def _states(url: str) -> dict[str, str]:
    engine = open_store(url, writer=False)
    try:
        with engine.connect() as conn:
            return {row.job_id: row.state for row in conn.execute(select(job_table.c.job_id, job_table.c.state))}
    finally:
        engine.dispose()
