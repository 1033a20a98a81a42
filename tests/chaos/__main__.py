"""``make chaos``: the storm, then every crash point; the last line is one line of JSON; exit 0 only when nothing broke.

    python -m tests.chaos --kills 20 --seed 1 --workers 2

Known limits: see `storm` and `crash`. With --keep the folders of the worlds stay, for whoever wants to look.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from policy.transitions import POINTS
from tests.chaos.checker import Broken
from tests.chaos.crash import CrashOutcome, crash
from tests.chaos.mutants import MUTANTS, apply
from tests.chaos.older import older
from tests.chaos.storm import VICTIMS, Outcome, Plan, storm
from tests.chaos.world import QUICK_PLACES, chaos_world


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.chaos", description="kill everything, lose nobody")
    made.add_argument("--kills", type=int, default=20, help="SIGKILLs at random instants; 300 for a release")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--shots", type=int, default=0, help="suppressions; default 4 a kill, 100 to 600")
    made.add_argument("--scale", type=float, default=1.0, help="size of the jobs")
    made.add_argument("--no-storm", action="store_true", help="only the crash points")
    made.add_argument("--no-points", action="store_true", help="only the storm")
    made.add_argument("--points", default="", help="only these crash points, by comma")
    made.add_argument("--victims", default=",".join(VICTIMS), help="kinds of roles to kill, each as often as named")
    made.add_argument("--restore", action="store_true", help="instead of the storm, Redis comes back older (T12)")
    made.add_argument("--mutant", default="", choices=["", *MUTANTS], help="with a broken engine: 0 when it is found")
    made.add_argument("--keep", action="store_true", help="keep the folders of the worlds")
    return made


async def run(options: argparse.Namespace) -> int:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f}] {text}", flush=True)

    broken: list[Broken] = []
    outcome: Outcome | None = None
    if not options.no_storm:
        shots = options.shots or min(600, max(100, 4 * options.kills))
        plan = Plan(options.seed, options.kills, shots, options.scale, victims=tuple(options.victims.split(",")))
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp")) if options.keep else None
        async with chaos_world(options.workers, folder=folder) as world:
            if options.mutant:
                apply(options.mutant, world.sources)
            if folder is not None:
                say(f"folder {folder}")
            outcome = await (older if options.restore else storm)(world, plan, say)
        broken += outcome.broken
    crashes: CrashOutcome | None = None
    if not options.no_points:
        wanted = options.points.split(",") if options.points else [point.name for point in POINTS]
        points = [point for point in POINTS if point.name in wanted]
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp")) if options.keep else None
        async with chaos_world(1, QUICK_PLACES, folder=folder) as world:
            if options.mutant:
                apply(options.mutant, world.sources)
            if folder is not None:
                say(f"folder {folder}")
            crashes = await crash(world, points, options.seed, say)
        broken += crashes.broken
    for one in broken:
        print(one, flush=True)
    print(json.dumps(_summary(options, outcome, crashes, broken, time.monotonic() - began)), flush=True)
    if options.mutant:
        found = {one.law for one in broken} & MUTANTS[options.mutant].laws
        say(f"mutant {options.mutant}: {'found by ' + ', '.join(sorted(found)) if found else 'NOT found'}")
        return 0 if found else 1
    return 1 if broken else 0


def _summary(
    options: argparse.Namespace,
    outcome: Outcome | None,
    crashes: CrashOutcome | None,
    broken: list[Broken],
    seconds: float,
) -> dict[str, object]:
    told: dict[str, object] = {"kills": 0, "crash_points": len(crashes.passed) if crashes is not None else 0}
    if outcome is not None:
        figures = outcome.figures
        told |= {
            "kills": outcome.kills, "stops": outcome.stops, "messages": figures.messages,
            "recipients": figures.recipients, "duplicates": figures.duplicates, "unknowns": figures.unknowns,
            "unknown_bound": figures.unknown_bound, "shots": figures.shots, "aimed": figures.aimed,
            "suppression_epsilon_ms": dict(figures.epsilon_ms), "drain_seconds": outcome.drain_seconds,
            **outcome.extra,
        }  # fmt: skip
    return told | {
        "broken": len(broken), "seed": options.seed, "workers": options.workers, "seconds": round(seconds, 1)
    }  # fmt: skip


def main() -> int:
    return asyncio.run(run(parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
