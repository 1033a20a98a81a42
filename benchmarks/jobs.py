"""Many small jobs, end to end: one recipient and the same 5 kB of HTML each, from XADD to delivered.

    python -m benchmarks.jobs [--jobs N] [--singles N] [--workers N] [--deadline SECONDS]

The product as `sales-push up` starts it, on the stage of the rehearsals, to one provider that accepts. The last line
is JSON:

- jobs_per_second: jobs over the time between the first XADD and the last message the provider accepted; a core's share
  of it in jobs_per_second_per_core; jobs_per_cpu_second is what a second of CPU time makes, all processes of
  `sales-push up` together, which other load on the machine does not change (much)
- cpu_us_per_job, cpu_us_by_part: as in `engine.rehearsal.bench`, over jobs; the provider's own is not in it
- single_p50_ms, single_p99_ms, single_most_ms: one transactional message at a time on an idle engine, from XADD to the
  provider's 250 behind the dot; the look for it costs a millisecond or two, which is in the figure. Those of a worker
  that has done nothing yet are apart, the slowest of them in single_first_ms

Exit code 1 when a job was not delivered, or came twice.

Known limits: CPU times are read from /proc, so they are Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from engine.rehearsal.bench import cpu_seconds, provider
from engine.rehearsal.setting import ACCOUNT, DOMAIN, SENDER, Setting
from engine.rehearsal.stage import Stage, StageError
from policy import keyspace
from policy.instants import rfc3339
from policy.valkey import Client, connect

HTML_BYTES = 5_000
AT_ONCE = 250  # jobs of one pipeline of XADD
WARM = 8  # single messages before those that count: each worker compiles, connects and imports at its first
PAUSE_SECONDS = 0.15  # between two single messages: whatever the last one left to do is done
_PARAGRAPH = "<p>Dear {{ name }}, your order {{ order }} has left our house and is on its way to you.</p>\n"


def job(number: int, run: str, domains: tuple[str, ...]) -> bytes:
    """A transactional job as any producer would write it."""
    head = f'<html><body><h1>Order</h1><a href="https://shop.{DOMAIN}/orders/{{{{ order }}}}">Your order</a>'
    html = head + _PARAGRAPH * ((HTML_BYTES - len(head)) // len(_PARAGRAPH)) + "</body></html>"
    address = f"reader{number}@{domains[number % len(domains)]}"
    body = {
        "v": 1,
        "job_id": f"{run}-{number}",
        "created_at": rfc3339(time.time_ns() // 1000),
        "account": ACCOUNT,
        "kind": "transactional",
        "from": {"address": f"orders@{DOMAIN}", "name": SENDER},
        "subject": "Your order {{ order }}, {{ name }}",
        "html": html,
        "recipients": [{"address": address, "fields": {"name": "Reader", "order": number}}],
    }
    return json.dumps(body).encode()


async def _accepted(stage: Stage) -> int:
    return int((await stage.counts())["accepted"])


async def _until(stage: Stage, wanted: int, deadline: float, pause: float) -> float:
    """When the provider had that many, monotonic seconds. Raises StageError."""
    while True:
        count, now = await _accepted(stage), time.monotonic()
        if count >= wanted:
            return now
        if now > deadline:
            raise StageError(f"{count} of {wanted} delivered in time\n{stage.last_words('up')}")
        stage.check_alive()
        await asyncio.sleep(pause)


async def many(stage: Stage, redis: Client, count: int, deadline: float) -> dict[str, Any]:
    """All jobs at once."""
    domains, before = provider().domains, await _accepted(stage)
    jobs = [job(number, "many", domains) for number in range(count)]
    used, began = cpu_seconds(stage.pids[0]), time.monotonic()
    for start in range(0, count, AT_ONCE):
        async with redis.pipeline(transaction=False) as pipe:
            for data in jobs[start : start + AT_ONCE]:
                pipe.xadd(keyspace.INTAKE, {"job": data})
            await pipe.execute()
    taken = await _until(stage, before + count, began + deadline, 0.1) - began
    after = cpu_seconds(stage.pids[0])
    spent = {part: seconds - used.get(part, 0.0) for part, seconds in after.items()}
    cores = os.cpu_count() or 1
    return {
        "jobs": count,
        "seconds": round(taken, 2),
        "jobs_per_second": round(count / taken, 1),
        "jobs_per_second_per_core": round(count / taken / cores, 1),
        "jobs_per_cpu_second": round(count / sum(spent.values()), 1) if sum(spent.values()) else 0.0,
        "cpu_us_per_job": round(sum(spent.values()) / count * 1e6, 1),
        "cpu_us_by_part": {part: round(seconds / count * 1e6, 1) for part, seconds in sorted(spent.items())},
    }


async def singles(stage: Stage, redis: Client, count: int) -> dict[str, Any]:
    """One after another."""
    domains, times = provider().domains, []
    for number in range(WARM + count):
        data, before = job(number, "single", domains), await _accepted(stage)
        began = time.monotonic()
        await redis.xadd(keyspace.INTAKE, {"job": data})
        times.append(await _until(stage, before + 1, began + 30.0, 0.001) - began)
        await asyncio.sleep(PAUSE_SECONDS + 0.01 * (number % 13))  # at no fixed step beside the loops of the engine
    first, waits = times[:WARM], sorted(times[WARM:])

    def at(share: float) -> float:
        return round(waits[min(count - 1, int(share * count))] * 1000, 1)

    return {
        "singles": count,
        "single_p50_ms": at(0.5),
        "single_p99_ms": at(0.99),
        "single_most_ms": at(1.0),
        "single_first_ms": round(max(first) * 1000, 1),
    }


async def measure(folder: Path, count: int, alone: int, workers: int, deadline: float) -> dict[str, Any]:
    """Both loads on one stage, the single ones first."""
    figures: dict[str, Any] = {"ok": False}
    async with Stage(folder, Setting(workers=workers, providers=(provider(),), keep=0)) as stage:
        redis = connect(stage.redis_url)
        try:
            if alone:
                figures |= await singles(stage, redis, alone)
            if count:
                figures |= await many(stage, redis, count, deadline)
            await asyncio.sleep(0.5)  # what came twice would come now
            counts = await stage.counts()
        finally:
            await redis.aclose()
        figures["workers"] = stage.workers
        figures["ok"] = int(counts["accepted"]) == int(counts["unique"]) == count + (alone + WARM if alone else 0)
    return figures


def main() -> int:
    """Exit code 1 when something was not delivered exactly once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--singles", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="0: one a core")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sp-jobs-"))
    try:
        figures = uvloop.run(measure(folder, chosen.jobs, chosen.singles, chosen.workers, chosen.deadline))
    except StageError as error:
        print(error, file=sys.stderr)
        figures = {"ok": False}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
