"""``make chaos-matrix``: what each way of syncing loses at each fault, measured; the last line is one line of JSON.

    python -m tests.chaos.matrix [--cells everysec/power,...] [--seed 1] [--keep]

{always, everysec} x {kill -9, disk full, restore of an older dump, power cut} (promises.md 3). A cell: a fresh world
with one worker; campaigns that hold and mail that is sent again when in doubt; beside them small jobs without end, a
list of numbers in Redis (acknowledged writes) and opt-outs; the fault in the middle of it; all up again, drained; what
is lost is counted, then submitted again under its ids; drained; checked (`checker`, `cell_laws`).

    kill     Valkey, writer and worker get SIGKILL at once: pages stay, nothing may be lost
    full     the disk of Valkey's files is full for `FULL` s: nobody new is written to meanwhile, nothing may be lost
    dump     Valkey comes back as it was seconds ago (T12): lost is told, duplicates 0, opt-outs stay
    power    everything at once, unsynced bytes gone (`outage`): always loses no job; everysec 2 s of accepted jobs

In a power cut a last small campaign is aimed at: the cut comes milliseconds after the first of its dots.

Exit 0 only when no promise is broken. Known limits: one run of each cell is a sample, not a proof; `policy.losses` is
more impatient than in earnest; copies of a store that forgets may differ in their Date.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.chaos.cells import Row, play
from tests.chaos.checker import Broken

SYNCS = ("always", "everysec")
FAULTS = ("kill", "full", "dump", "power")

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
