"""The benchmark of the whole journey: the demo's newsletter to one provider that accepts (`sales-push bench`).

Figures, in the last line:
- messages_per_second: as in `findings`, from the ledger; the whole system works meanwhile, intake included unless the
  job waits for its last audience entry (--wait);
- cpu_us_per_message: user and system time of everything `sales-push up` started, between submission and the last
  settle, over the messages (cpu_us_by_part: of which process); the sink's share is apart (sink_cpu_us_per_message),
  the submitter's is not counted;
- rsa_share: messages_per_second over (RSA-2048 signatures a second of one core x cores), both of this run. Machines
  differ and drift, this ratio less so: every message carries one RSA signature (decision 2), so 1.0 cannot be passed;
- sink_count: what the sink says it accepted; it must be the number delivered, or the exit code is 1.

Known limits: CPU times are read from /proc, so they are Linux only (0 elsewhere); a child that ends and is started
again within the run takes its time with it. The rate of one core is measured alone, before and after: with all cores
busy a machine may clock lower.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from rich.console import Console

from engine.client import AsyncProducer
from engine.rehearsal import campaigns, findings
from engine.rehearsal.audience import PROVIDERS, Provider
from engine.rehearsal.screen import Screen
from engine.rehearsal.setting import Setting
from engine.rehearsal.stage import Stage, StageError
from policy.schema import open_store

_SAMPLE_SECONDS = 1.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """recipients: messages to send; deadline: seconds; workers: 0 is one a core; wait: intake first, then delivery."""

    recipients: int = 20_000
    deadline: float = 300.0
    workers: int = 0
    wait: bool = False


def provider() -> Provider:
    """The one provider of a benchmark: all domains of the rehearsed one that accepts."""
    accepting = next(one for one in PROVIDERS if one.behaviour == "accept")
    return Provider("accept", accepting.domains, 1.0)


def rsa_rate(seconds: float = _SAMPLE_SECONDS) -> float:
    """RSA-2048 signatures a second of one core, through the library the engine signs with."""
    key = rsa.generate_private_key(65537, 2048)
    digest, prehashed, scheme = os.urandom(32), utils.Prehashed(hashes.SHA256()), padding.PKCS1v15()
    began = time.perf_counter()
    count = 0
    while (taken := time.perf_counter() - began) < seconds:
        for _ in range(20):
            key.sign(digest, scheme, prehashed)
        count += 20
    return count / taken


def cpu_seconds(root: int) -> dict[str, float]:
    """User and system time by part, of a process and all that descend from it now, with the children they reaped.

    A part is the role in the command line (``run engine``), else the name of the program.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.parent.name)
        parents[pid] = int(fields[1])  # proc(5): state, ppid, …; utime, stime, cutime, cstime are fields 14 to 17
        used[pid] = sum(int(field) for field in fields[11:15])
    parts: dict[str, float] = {}
    level = {root} & used.keys()
    while level:
        for pid in level:
            part = _part(pid)
            parts[part] = parts.get(part, 0.0) + used[pid] / ticks
        level = {pid for pid, parent in parents.items() if parent in level}
    return parts


def _part(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return "gone"
    if "run" in words[:-1]:
        return words[words.index("run") + 1]
    return "valkey" if "server" in words[0] else "supervisor"


async def play(plan: Plan, console: Console, machine: Callable[[str], None]) -> int:
    """The benchmark; the exit code. machine: gets the last line, JSON. Cancelled, it takes everything down first."""
    screen = Screen(console)
    folder = Path(tempfile.mkdtemp(prefix="sales-push-bench-"))
    figures: dict[str, Any] = {"recipients": plan.recipients, "ok": False}
    try:
        screen.act("measuring what one core signs")
        before = rsa_rate()
        async with Stage(folder, Setting(workers=plan.workers, providers=(provider(),), keep=0)) as stage:
            figures |= await _measure(stage, plan, screen)
        one_core = (before + rsa_rate()) / 2
        cores = os.cpu_count() or 1
        figures |= {"rsa_per_second_one_core": round(one_core, 1), "cores": cores}
        figures["rsa_share"] = round(figures["messages_per_second"] / (one_core * cores), 4)
    except StageError as error:
        screen.trouble(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine(json.dumps(figures))
    return 0 if figures["ok"] else 1


async def _measure(stage: Stage, plan: Plan, screen: Screen) -> dict[str, Any]:
    audience = campaigns.Audience(plan.recipients, providers=(provider(),))
    census = campaigns.census(audience)
    until = time.monotonic() + plan.deadline
    up = stage.pids[0]
    began, used = time.monotonic(), cpu_seconds(up)
    sink_used = float((await stage.counts())["cpu_seconds"])
    screen.act(f"{plan.recipients:,} messages to one provider that accepts, {stage.workers} workers")
    async with AsyncProducer(stage.redis_url, intake_key=stage.keyring.intake_public) as producer:
        job = await producer.submit(campaigns.first(f"bench-{secrets.token_hex(4)}", wait=plan.wait), audience)
    status = None
    with screen.progress(dict(census.rows)) as progress:
        while time.monotonic() < until:
            report = stage.reader.report(job, time.time_ns() // 1000)
            if report is not None:
                status = report.status
                progress.show(findings.tallies(report, audience.homes))
                if status.state == "done":
                    break
            stage.check_alive()
            await asyncio.sleep(_LOOK_SECONDS)
    taken, after = time.monotonic() - began, cpu_seconds(up)
    spent = {part: seconds - used.get(part, 0.0) for part, seconds in after.items()}
    counts = await stage.counts()
    if status is None:
        raise StageError(f"the job was not accepted in time\n{stage.last_words('up')}")
    store = open_store(stage.policy.sql_address(), writer=False)
    try:
        course = findings.course(store, status.number, audience.homes)
    finally:
        store.dispose()
    delivered = status.counts.get("delivered", 0)
    messages = max(1, delivered)
    sink_cpu = float(counts["cpu_seconds"]) - sink_used
    screen.act(f"{delivered:,} delivered in {taken:.1f} s, {course.rate('accept'):,.0f} messages/s")
    return {
        "workers": stage.workers,
        "wait": plan.wait,
        "messages_per_second": round(course.rate("accept"), 1),
        "cpu_us_per_message": round(sum(spent.values()) / messages * 1e6, 1),
        "cpu_us_by_part": {part: round(seconds / messages * 1e6, 1) for part, seconds in sorted(spent.items())},
        "sink_cpu_us_per_message": round(sink_cpu / messages * 1e6, 1),
        "sink_count": int(counts["accepted"]),
        "delivered": delivered,
        "refused": status.counts.get("refused", 0),
        "seconds": round(taken, 2),
        "ok": status.state == "done" and delivered == int(counts["accepted"]) == int(counts["unique"]),
    }
