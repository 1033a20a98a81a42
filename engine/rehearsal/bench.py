"""The benchmark of the whole journey: the demo's newsletter to one provider (`sales-push bench`).

The letter is a real one (`newsletter`: 25 links, three filters, two conditionals, one loop; 26 kB of HTML and
6 kB of text, 34 kB on the wire with its header), the audience is `audience.people` over 20 domains, all in one site;
everything works as in production: intake, both gates, personalisation, link tracking, DKIM (RSA-2048 and Ed25519),
pace, journal, settling, events, ledger.

1. `stage` sets up; a child (`machine.RsaClock`) says what one core signs;
2. the job is handed in; `seconds` begins just before its first XADD;
3. once a second `samples.look` at the sink's count, CPU, memory, lag; every 10 s 40 ms of RSA in the child;
4. until the ledger says the job is done: its last row is committed, `seconds` ends (asked every 0.1 s near the end);
5. table, chart, the line of JSON.

Figures, in the last line:
- messages_per_second: by the sink's own count, between its first and its last acceptance;
- journey_per_second: delivered over `seconds`: from the first XADD to the last ledger row;
- rsa_share: messages_per_second over (RSA-2048 signatures a second of one core x cores), OpenSSL's rate, the median of
  what was sampled during the run (of before and after, when it was too short). Machines differ and drift, this ratio
  less so: every message carries one RSA signature (decision 2), so without multi-buffer signing 1.0 cannot be passed;
  rsa_share_fast: the same number when the run was made with --fast, else null;
- cpu_us_per_message: user and system time of everything `sales-push up` started, between the first XADD and the last
  row, over the messages accepted (cpu_us_by_part: of which part);
  sink_cpu_us: the sink's, apart; the submitter's and the benchmark's own are not counted;
- cpu_per_rsa: the engine's part over the time of one RSA-2048 signature in the same run (rsa_us);
- tail_cpu_per_rsa: everything's CPU over the same, for the last 100,000 messages of the run; growth, of several runs:
  that of the largest over that of the one nearest 100,000;
- sink_count: what the sink says it accepted; it must be the number delivered, or the exit code is 1;
- p50_ms, p99_ms: XADD to 250 of the job's own messages, see `latency`;
- memory_peak_mb: by process; worker_memory_mb: of all workers together, ten samples from beginning to end;
- ledger_lag: the longest the ledger's writer was behind the event stream, in seconds, of the samples;
- postfix_ratio: null here; benchmarks/peers measures it.

Known limits: as `machine`. The submitter and the sink take their share of the same cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from engine.client import AsyncProducer
from engine.compiled import is_installed
from engine.rehearsal import campaigns, chart
from engine.rehearsal.audience import Provider
from engine.rehearsal.latency import Watch, percentile
from engine.rehearsal.machine import RsaClock, cpu_seconds, rsa_rate, use_of
from engine.rehearsal.samples import TAIL, Sample, Samples, keep_looking, look
from engine.rehearsal.screen import Screen
from engine.rehearsal.setting import ACCOUNT, SINK, Setting
from engine.rehearsal.stage import Stage, StageError
from engine.rehearsal.verdicts import table
from policy.ledger import JobStatus
from policy.schema import open_store

__all__ = ["Plan", "cpu_seconds", "figures", "play", "provider", "rsa_rate", "run"]

DOMAINS: Final = 20
# What the sink plays, ours or Postfix's smtpd. mix: an ordinary day of a large list; smart: far away, hardly a refusal.
SCENES: Final[Mapping[str, str]] = {
    "plain": "accept",
    "mix": "mixed:0:refused=0.1,deferred=0.05",
    "smart": "mixed:0:refused=0.01,deferred=0.05,delay=0.05",
}
_LONG, _SHORT = 1.0, 0.1  # seconds between two questions to the ledger, far from the end and near it
_NEAR = 0.97
_SAID_SECONDS = 5.0
_LATE_SECONDS = 5.0
_BESIDE_SECONDS = 0.25  # of RSA before and after a run


@dataclass(frozen=True, slots=True)
class Plan:
    """recipients: messages to send, a run each; deadline: seconds, 0 for 300 and more where there are many; workers:
    0 is one a core; wait: intake first, then delivery; sink: own, postfix or smtpd; scene: of SCENES; fast: signing by
    multi-buffer (True), OpenSSL (False) or as the engine likes; chart: SVG file;
    resolver: who says where the domains are, instead of routes."""

    recipients: tuple[int, ...] = (20_000,)
    deadline: float = 0.0
    workers: int = 0
    wait: bool = False
    sink: str = "own"
    scene: str = "plain"
    domains: int = DOMAINS
    fast: bool | None = None
    tls: bool = False
    chunking: bool = False
    chart: Path | None = None
    resolver: str = ""

    def seconds(self, recipients: int) -> float:
        """How long a run may take: 200 messages a second are too few for anybody."""
        return self.deadline or max(300.0, recipients / 200)

    @property
    def setting(self) -> Setting:
        behaviour = "accept"
        plain = Setting(
            workers=self.workers, providers=(provider(self.domains),), keep=0, tls=self.tls, chunking=self.chunking,
            sinks={**SINK, behaviour: f"{SCENES[self.scene]},name={behaviour}" if self.scene != "plain" else behaviour},
            sink=self.sink, signing={None: "", True: "multi-buffer", False: "openssl"}[self.fast],
            resolver=self.resolver,
        )  # fmt: skip
        # 50 ms of somebody else's time each: what one connection carries is 20 messages a second
        return replace(plain, connections=1000, start=200) if self.scene == "smart" else plain


def provider(domains: int = DOMAINS) -> Provider:
    """The one provider of a benchmark and its domains."""
    return Provider("accept", tuple(f"mail{n}.posthaus.test" for n in range(1, domains + 1)), 1.0)


@dataclass(slots=True)
class Run:
    """One run and what was seen of it."""

    recipients: int
    samples: Samples = field(default_factory=Samples)
    counts: dict[str, Any] = field(default_factory=dict)
    status: JobStatus | None = None
    seconds: float = 0.0
    delays: list[float] = field(default_factory=list)
    workers: int = 0


async def play(plan: Plan, console: Console, machine: Callable[[str], None]) -> int:
    """The benchmark; the exit code. machine: gets the last line, JSON. Cancelled, it takes everything down first."""
    screen = Screen(console)
    told: list[dict[str, Any]] = []
    last: Run | None = None
    try:
        for recipients in plan.recipients:
            last = await run(plan, recipients, screen)
            told.append(figures(plan, last))
        screen.console.print(table(told))
    except StageError as error:
        screen.trouble(str(error))
    whole: dict[str, Any] = {"recipients": plan.recipients[-1], "ok": False} | (told[-1] if told else {})
    if len(plan.recipients) > 1:
        whole["runs"] = told
        whole["growth"] = growth(told)
    whole["ok"] = len(told) == len(plan.recipients) and all(one["ok"] for one in told)
    if plan.chart is not None and last is not None and told:
        plan.chart.write_text(_drawn(plan, last, told[-1]), encoding="utf-8")
        screen.act(f"chart: {plan.chart.absolute()}")
    machine(json.dumps(whole))
    return 0 if whole["ok"] else 1


async def run(plan: Plan, recipients: int, screen: Screen) -> Run:
    """One run on a stage of its own. Raises StageError."""
    folder = Path(tempfile.mkdtemp(prefix="sales-push-bench-"))
    seen = Run(recipients)
    try:
        async with RsaClock() as clock, Stage(folder, plan.setting) as stage:
            await clock.sample(_BESIDE_SECONDS)
            seen.workers = stage.workers
            seen.samples.rsa = clock.samples
            beside = [asyncio.create_task(clock.keep_time()), asyncio.create_task(keep_looking(stage, seen.samples))]
            try:
                await _measure(stage, plan, seen, screen)
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
            await clock.sample(_BESIDE_SECONDS)
        return seen
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(stage: Stage, plan: Plan, run: Run, screen: Screen) -> None:
    audience = campaigns.Audience(run.recipients, providers=(provider(plan.domains),))
    up, sink_cpu = stage.pids[0], float((await stage.counts())["cpu_seconds"])

    def begin() -> None:
        run.samples.taken[:] = [Sample(time.monotonic(), 0, use_of(up), sink_cpu, 0.0)]

    watch = Watch(audience, run.recipients, ACCOUNT, begin)
    screen.act(f"{run.recipients:,} messages to {_who(plan)}, {stage.workers} workers")
    async with AsyncProducer(stage.redis_url, intake_key=stage.keyring.intake_public) as producer:
        letter = campaigns.first(f"bench-{secrets.token_hex(4)}", wait=plan.wait)
        job = await producer.submit(letter, watch.rows(), progress=watch.sent)
    began = run.samples.taken[0].at
    status = await _done(stage, job, run, screen, began + plan.seconds(run.recipients))
    run.seconds = time.monotonic() - began
    run.samples.taken.append(await look(stage))
    run.counts, run.status = await _counted(stage, status.counts.get("delivered", 0)), status
    store = open_store(stage.policy.sql_address(), writer=False)
    try:
        run.delays = watch.delays(store, stage.keyring, status.number)
    finally:
        store.dispose()


async def _done(stage: Stage, job: str, run: Run, screen: Screen, until: float) -> JobStatus:
    """Ask the ledger for the job until it is done: rarely, because each answer costs what a few messages do. What it
    says at the deadline, when it is not."""
    pause, said = _LONG, time.monotonic()
    while True:
        status = stage.reader.job_status(job, time.time_ns() // 1000)
        now = time.monotonic()
        if status is not None and status.state == "done":
            return status
        if now > until:
            if status is None:
                raise StageError(f"the job was not accepted in time\n{stage.last_words('up')}")
            screen.trouble(f"not done at the deadline: the job is {status.state}; --deadline gives it longer")
            return status
        if status is not None and status.terminal >= _NEAR * run.recipients:
            pause = _SHORT
        if now - said >= _SAID_SECONDS and run.samples.taken:
            said = now
            screen.act(f"{run.samples.taken[-1].accepted:,} of {run.recipients:,} accepted by the sink")
        stage.check_alive()
        await asyncio.sleep(pause if run.recipients > 2_000 else _SHORT)


async def _counted(stage: Stage, delivered: int) -> dict[str, Any]:
    """The sink's count. A stranger is counted by what it writes, which may come a moment later."""
    until = time.monotonic() + _LATE_SECONDS
    while True:
        counts = await stage.counts()
        if int(counts["accepted"]) >= delivered or time.monotonic() > until:
            return counts
        await asyncio.sleep(_SHORT)


def figures(plan: Plan, run: Run) -> dict[str, Any]:
    """One run's line."""
    assert run.status is not None
    samples, counts, status = run.samples, run.counts, run.status
    accepted, unique = int(counts["accepted"]), counts["unique"]
    first_at, last_at = _span(counts)
    rate = (accepted - 1) / (last_at - first_at) if last_at > first_at else 0.0
    began, ended = samples.taken[0], samples.taken[-1]
    during = samples.rsa_rate(began, ended)
    cores = os.cpu_count() or 1
    rsa_us = 1e6 / during
    parts = samples.between(began, ended)
    tail = samples.tail()
    tail_us = sum(samples.between(*tail).values())
    delivered = status.counts.get("delivered", 0)
    share = round(rate / (during * cores), 4)
    sink_us = round((ended.sink_cpu - began.sink_cpu) / max(1, accepted) * 1e6, 1)
    return {
        "recipients": run.recipients,
        "sink": plan.sink,
        "scene": plan.scene,
        "domains": plan.domains,
        "tls": plan.tls,
        "fast": plan.fast,
        "compiled": is_installed(),
        "workers": run.workers,
        "wait": plan.wait,
        "messages_per_second": round(rate, 1),
        "journey_per_second": round(delivered / run.seconds, 1),
        "rsa_share": share,
        "rsa_share_fast": share if plan.fast else None,
        "postfix_ratio": None,
        "cpu_us_per_message": round(sum(parts.values()), 1),
        "cpu_us_by_part": {part: round(value, 1) for part, value in parts.items()},
        "cpu_per_rsa": round(parts.get("engine", 0.0) / rsa_us, 3),
        "tail_cpu_per_rsa": round(tail_us * samples.rsa_rate(*tail) / 1e6, 3),
        "rsa_us": round(rsa_us, 1),
        "rsa_per_second_one_core": round(during, 1),
        "rsa_samples": len(samples.rsa),
        "cores": cores,
        "sink_count": accepted,
        "sink_cpu_us": sink_us,
        "sink_cpu_us_per_message": sink_us,
        "p50_ms": percentile(run.delays, 0.5),
        "p99_ms": percentile(run.delays, 0.99),
        "latency_of": len(run.delays),
        "memory_peak_mb": samples.peak(),
        "worker_memory_mb": samples.memory("engine"),
        "ledger_lag": round(max(sample.lag for sample in samples.taken), 2),
        "delivered": delivered,
        "refused": status.counts.get("refused", 0),
        "bounced": status.counts.get("bounced", 0),
        "deferrals": status.deferrals,
        "seconds": round(run.seconds, 2),
        "ok": status.state == "done" and delivered == accepted and unique in (None, accepted),
    }


def _span(counts: Mapping[str, Any]) -> tuple[float, float]:
    """First and last acceptance by the sink's clock, in seconds since the epoch."""
    if not counts["providers"]:
        return float(counts["first_at"]), float(counts["last_at"])
    ends = [(one["first_at"], one["last_at"]) for one in counts["providers"].values() if one["accepted"]]
    return (min(a for a, _ in ends), max(b for _, b in ends)) if ends else (0.0, 0.0)


def growth(runs: list[dict[str, Any]]) -> float | None:
    """What a message costs at the end of the largest run over what it costs in that nearest 100,000; None of one."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        largest = max(runs, key=lambda one: int(one["recipients"]))
        measure = min(runs, key=lambda one: abs(int(one["recipients"]) - TAIL))
        if largest is not measure:
            return round(float(largest["tail_cpu_per_rsa"]) / float(measure["tail_cpu_per_rsa"]), 3)
    return None


def _who(plan: Plan) -> str:
    scenes = {"plain": "accepts", "mix": "refuses 10 % and defers 5 %", "smart": "takes 50 ms, refuses 1 %, defers 5 %"}
    if plan.sink != "own":
        return {"postfix": "Postfix's smtp-sink", "smtpd": "Postfix's smtpd"}[plan.sink]
    return f"one provider that {scenes[plan.scene]}"


def _drawn(plan: Plan, run: Run, told: Mapping[str, Any]) -> str:
    title = f"{told['delivered']:,} messages to {_who(plan)}: {told['messages_per_second']:,.0f} a second"
    cpu = {**told["cpu_us_by_part"], "sink": told["sink_cpu_us"]}
    return chart.svg(title, run.samples, cpu, told["rsa_per_second_one_core"] * told["cores"])
