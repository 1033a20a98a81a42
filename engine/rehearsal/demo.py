"""The demo: a campaign through every floor, watched, answered and proved (`sales-push demo`).

Path: `play` makes the folder and the stage and always takes them down again; `perform` is the play: 1. census and
submission, 2. delivery until everybody ended or the time is over, 3. the providers' own count, 4. readers, 5. the
second campaign, 6. proofs, 7. stories. `outcome` holds what came of it and the equations.

Law: the demo claims nothing it has not counted twice, and every wait has an end: at the deadline it reports what it
sees, says which equations do not hold, and ends with exit code 1.

Known limits: the deadline bounds the waits; starting, stopping and the scan add some seconds of their own.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.client import AsyncProducer
from engine.rehearsal import campaigns, findings, proof
from engine.rehearsal.kept import mails_of, sample
from engine.rehearsal.outcome import Outcome, Plan, Story
from engine.rehearsal.readers import Mail, visit
from engine.rehearsal.screen import Screen
from engine.rehearsal.setting import Setting
from engine.rehearsal.stage import Stage, StageError
from policy import keyspace
from policy.ledger import JobStatus
from policy.schema import open_store
from policy.valkey import Client, call, connect

READERS = 100
REWRITE_SECONDS = 20.0
SECOND_SECONDS = 15.0  # the second campaign gets at least this, however late it is
_LOOK_SECONDS = 0.25


class DemoError(Exception):
    """The play cannot go on; the text says why."""


# --- the play -----------------------------------------------------------------------------------------------------


async def perform(stage: Stage, plan: Plan, screen: Screen, outcome: Outcome) -> None:
    """Everything between curtain and curtain. Fills `outcome` as far as it comes. Raises StageError, DemoError."""
    until = time.monotonic() + plan.deadline - screen.seconds
    audience = campaigns.Audience(plan.recipients)
    census = campaigns.census(audience)
    outcome.rows, outcome.submitted = dict(census.rows), census.submitted
    outcome.workers = stage.workers
    stamp = secrets.token_hex(3)
    screen.act(f"the newsletter to {audience.count:,} recipients is handed in through Redis, sealed")
    outcome.submitted_at = time.time_ns() // 1000
    async with AsyncProducer(stage.redis_url, intake_key=stage.keyring.intake_public) as producer:
        first = await producer.submit(campaigns.first(f"demo-{stamp}-1", wait=plan.wait), audience)
        screen.act(f"delivering with {stage.workers} worker{'s' * (stage.workers != 1)}")
        outcome.status = await _ended(stage, first, outcome, audience, screen, until)
        outcome.sink = await stage.counts()
        _course(stage, outcome, audience)
        screen.outcome(outcome.rows, outcome.tallies)
        screen.note(_sink_says(outcome.sink))
        screen.note(f"{outcome.rate:,.0f} messages/s to the provider that accepts, with everything else going on")
        mails = mails_of(stage.kept, census)
        if not mails:
            raise DemoError("the providers kept no message: nobody can read, nothing can be proved")
        await _read(outcome, mails, census, screen)
        job = await producer.submit(campaigns.second(f"demo-{stamp}-2"), _second(outcome, mails, audience))
        await _second_ended(stage, job, outcome, screen, max(until, time.monotonic() + SECOND_SECONDS))
    await _hits(stage, first, outcome)
    _prove(stage, outcome, mails, plan, screen)
    await _scan(stage, outcome, mails, census, screen)
    await _tell(stage, outcome, mails, census, screen)


async def _ended(
    stage: Stage, job: str, outcome: Outcome, audience: campaigns.Audience, screen: Screen, until: float
) -> JobStatus:
    """Watch the ledger until the job is done. At the deadline: what it says now, and a trouble."""
    homes = audience.homes
    store = connect(stage.redis_url, max_connections=1)
    try:
        with screen.progress(outcome.rows) as progress:
            while True:
                report = stage.reader.report(job, time.time_ns() // 1000)
                if report is not None:
                    outcome.report, outcome.tallies = report, findings.tallies(report, homes)
                    progress.show(outcome.tallies)
                    if report.status.state == "done":
                        return report.status
                elif await store.xlen(keyspace.REJECTED):
                    raise DemoError(f"the job was rejected\n{stage.command('jobs', 'rejected')}")
                stage.check_alive()
                if time.monotonic() > until:
                    if report is None:
                        raise DemoError(f"the job was not accepted in time\n{stage.last_words('up')}")
                    outcome.troubles.append(f"not done at the deadline: the job is {report.status.state}")
                    return report.status
                await asyncio.sleep(_LOOK_SECONDS)
    finally:
        await store.aclose()


def _course(stage: Stage, outcome: Outcome, audience: campaigns.Audience) -> None:
    assert outcome.status is not None
    store = open_store(stage.policy.sql_address(), writer=False)
    try:
        outcome.course = findings.course(store, outcome.status.number, audience.homes)
    finally:
        store.dispose()
    outcome.rate = outcome.course.rate("accept")


def _sink_says(sink: dict[str, Any]) -> str:
    providers: dict[str, dict[str, Any]] = sink["providers"]
    sums = {name: sum(int(counts[name]) for counts in providers.values()) for name in findings.SINK_FIGURES}
    return "the providers' own count: " + ", ".join(
        f"{n:,} {findings.SINK_FIGURES[name]}" for name, n in sums.items() if name != "most_open"
    )


async def _read(outcome: Outcome, mails: list[tuple[Path, Mail]], census: campaigns.Census, screen: Screen) -> None:
    chosen = [mail for _, mail in mails[:READERS]]
    outcome.readers = len(chosen)
    outcome.pixels = sum(bool(mail.pixel) for mail in chosen)
    outcome.pixels_unasked = sum(
        bool(mail.pixel or mail.clicks) and mail.recipient not in census.tracked for mail in chosen
    )
    screen.act(f"{len(chosen)} readers open their mail ({outcome.pixels} of them agreed to be tracked)")
    outcome.visits = await visit(chosen, opt_outs=max(1, len(chosen) // 5))
    visits = outcome.visits
    screen.note(
        f"{visits.opened} opened with a pixel, {visits.clicked} clicked, {len(visits.opted_out)} opted out; answers: "
        + ", ".join(f"{name} x {n}" for name, n in sorted(visits.statuses.items()))
    )


def _second(outcome: Outcome, mails: list[tuple[Path, Mail]], audience: campaigns.Audience) -> list[dict[str, Any]]:
    """The rows of those who opted out and of as many again, and more, who did not."""
    gone = set(outcome.visits.opted_out)
    others = [mail.recipient for _, mail in mails if mail.recipient not in gone]
    wanted = gone | set(others[: 2 * len(gone) + 10])
    rows = {row["address"]: row for row in audience if row["address"] in wanted and row["consent"]}
    outcome.second_submitted = len(rows)
    return list(rows.values())


async def _second_ended(stage: Stage, job: str, outcome: Outcome, screen: Screen, until: float) -> None:
    screen.act(f"a second campaign, to {outcome.second_submitted} of them, those who opted out among them")
    while True:
        report = stage.reader.report(job, time.time_ns() // 1000)
        if report is not None:
            outcome.second = findings.total(findings.tallies(report, {}))
            outcome.second_refused = outcome.second.reasons["refused", "suppressed"]
            if report.status.state == "done":
                break
        stage.check_alive()
        if time.monotonic() > until:
            outcome.troubles.append("the second campaign was not done at the deadline")
            break
        await asyncio.sleep(_LOOK_SECONDS)
    screen.note(f"{outcome.second['delivered']} delivered, {outcome.second_refused} refused as suppressed")


async def _hits(stage: Stage, job: str, outcome: Outcome) -> None:
    """Hits are folded in batches: wait a moment until the ledger has them, then read the report once more."""
    deadline = time.monotonic() + 3.0
    while True:
        report = stage.reader.report(job, time.time_ns() // 1000)
        if report is not None:
            outcome.report = report
            seen = report.status.opens + report.status.clicks
            if seen >= outcome.visits.opened + outcome.visits.clicked:
                return
        if time.monotonic() > deadline:
            return  # the tracker may fold two looks into one; the report shows what the ledger has
        stage.check_alive()
        await asyncio.sleep(_LOOK_SECONDS)


def _prove(stage: Stage, outcome: Outcome, mails: list[tuple[Path, Mail]], plan: Plan, screen: Screen) -> None:
    keys = proof.records(stage.policy.keys_dir / "dkim")
    chosen = mails[:: max(1, len(mails) // 20)]
    for path, _ in chosen:
        signatures = proof.verify(path.read_bytes(), keys)
        outcome.messages_checked += 1
        outcome.messages_verified += proof.is_proven(signatures)
        if not outcome.signatures:
            outcome.signatures = signatures
            outcome.signed = plan.results / "message.eml"
            outcome.signed.write_bytes(path.read_bytes())
    screen.act(f"dkimpy verifies {outcome.messages_verified} of {outcome.messages_checked} stored messages")
    if outcome.signed is not None:
        said = ", ".join(f"{s.algorithm} {'good' if s.is_good else 'BAD'}" for s in outcome.signatures)
        screen.note(f"one of them is {outcome.signed}: {said}")


async def _scan(
    stage: Stage, outcome: Outcome, mails: list[tuple[Path, Mail]], census: campaigns.Census, screen: Screen
) -> None:
    """Three people's addresses, looked for in every byte of the data folder and the logs after a rewrite of the
    append-only file (decision 18)."""
    store = connect(stage.redis_url, max_connections=1)
    try:
        await rewrite(store)
    finally:
        await store.aclose()
    needles = sample(mails, outcome.visits, census)
    outcome.scan = await asyncio.to_thread(proof.scan_aside, (stage.data, stage.logs), needles)
    screen.act(
        f"{len(needles)} addresses looked for in {outcome.scan.files} files ({outcome.scan.size / 1e6:.0f} MB) of the "
        f"data folder: in clear in {len(outcome.scan.hits)}"
    )


async def rewrite(store: Client) -> None:
    """Rewrite the append-only file and wait until it is done. Raises DemoError when it is not in time."""
    deadline = time.monotonic() + REWRITE_SECONDS
    asked = False
    while True:
        info = await store.info("persistence")
        busy = bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])
        if not busy and asked:
            return
        if not busy:
            await call(store, "BGREWRITEAOF")
            asked = True
        elif time.monotonic() > deadline:
            raise DemoError(f"the append-only file was not rewritten within {REWRITE_SECONDS:g} s")
        await asyncio.sleep(0.05)


async def _tell(
    stage: Stage, outcome: Outcome, mails: list[tuple[Path, Mail]], census: campaigns.Census, screen: Screen
) -> None:
    chosen = list(_people(stage, outcome, mails, census))
    # exit code 1: nothing is known, which the text says; side by side, because each pays for a start of Python
    told = await asyncio.gather(
        *[asyncio.to_thread(stage.command, "why", address, codes=(0, 1)) for _, address in chosen]
    )
    for (title, address), text in zip(chosen, told, strict=True):
        outcome.stories.append(Story(title, f"sales-push why {address}", text.rstrip()))
        screen.act(title)
        screen.verbatim(f"$ sales-push why {address}\n{text}")


def _people(
    stage: Stage, outcome: Outcome, mails: list[tuple[Path, Mail]], census: campaigns.Census
) -> Iterator[tuple[str, str]]:
    gone = set(outcome.visits.opted_out)
    delivered = [mail.recipient for path, mail in mails if mail.recipient not in gone]
    greylisted = [
        mail.recipient for path, mail in mails if path.name.startswith("greylist") and mail.recipient not in gone
    ]
    for address in (*greylisted[:1], *delivered[:1])[:1]:
        yield "why somebody got it", address
    for address in _bounced(stage, census):
        yield "why somebody's provider refused it", address
    for address in census.without_consent[:1]:
        yield "why we refused to write to somebody", address
    for address in outcome.visits.opted_out[:1]:
        yield "why somebody who opted out gets nothing more", address


def _bounced(stage: Stage, census: campaigns.Census) -> list[str]:
    """The first person the simulated provider does not know."""
    for address in census.at.get("unknown", []):
        told = stage.reader.why(address, stage.keyring)
        if any(story.kind == "bounced" for story in told.stories):
            return [address]
    return []


# --- around it ----------------------------------------------------------------------------------------------------


async def play(plan: Plan, console: Console, machine: Callable[[str], None]) -> int:
    """The whole demo; the exit code. machine: gets the last line, JSON. Cancelled, it takes everything down first."""
    screen = Screen(console)
    outcome = Outcome()
    results = _results(plan)
    plan = replace(plan, results=results)
    temporary = plan.folder is None
    # A short folder: a Unix socket lies in it (104 bytes at most)
    folder = plan.folder or Path(tempfile.mkdtemp(prefix="sales-push-demo-"))
    share = max(1, plan.recipients // 150)  # of each provider's messages one in so many is kept: enough for readers
    setting = Setting(workers=plan.workers, keep=120, keep_every=share, lasting=plan.lasting)
    stage = Stage(folder, setting)
    try:
        screen.act(f"setting up in {folder}: keys, database, embedded Valkey, five simulated providers")
        async with stage:
            screen.note(f"tracker {stage.tracker_url}, metrics {stage.ops_url}/metrics")
            try:
                await perform(stage, plan, screen, outcome)
            except (DemoError, StageError) as error:
                outcome.troubles.append(str(error))
    except StageError as error:
        outcome.troubles.append(str(error))
    finally:
        if temporary and not stage.left:
            shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = screen.seconds
    return _close(plan, stage, screen, outcome, machine)


def _close(plan: Plan, stage: Stage, screen: Screen, outcome: Outcome, machine: Callable[[str], None]) -> int:
    from engine.rehearsal.report import html  # 300 lines of page that only this moment needs

    page = plan.results / "report.html"
    page.write_text(html(outcome), encoding="utf-8")
    screen.act("the equations")
    for text, good in outcome.checks():
        (screen.note if good else screen.trouble)(f"{'holds' if good else 'FAILS'}  {text}")
    for trouble in outcome.troubles:
        screen.trouble(trouble)
    screen.act(f"report: {page.absolute()}")
    if stage.left:
        screen.act("left running, as asked")
        screen.note(f"tracker  {stage.tracker_url}   opt-out and click links of the stored messages in {stage.kept}")
        screen.note(f"ops      {stage.ops_url}/readyz   {stage.ops_url}/metrics")
        screen.note(f"look     sales-push status --config {stage.config}")
        screen.note(f"stop     kill {' '.join(map(str, stage.left))}   then remove {stage.folder}")
    figures = outcome.figures()
    machine(json.dumps(figures))
    return 0 if figures["ok"] else 1


def _results(plan: Plan) -> Path:
    """Where report and message go: the folder asked for, the installation's own, else a new temporary one."""
    wanted = plan.folder or plan.results
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sales-push-report-"))
    return wanted
