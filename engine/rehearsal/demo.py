"""The demo: a campaign through every floor, watched, answered and proved (`sales-push demo`).

Path: `play` makes the folder and the stage and always takes them down again; `perform` is the play: 1. census and
submission, 2. delivery until everybody ended or the time is over, 3. the providers' own count, 4. readers, 5. the
second campaign, 6. proofs, 7. stories. `Outcome` holds what came of it, `checks` the equations, in words.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.client import AsyncProducer
from engine.rehearsal import campaigns, findings, proof
from engine.rehearsal.findings import Course, Tally
from engine.rehearsal.readers import Mail, Visits, read_mail, visit
from engine.rehearsal.screen import Screen
from engine.rehearsal.stage import Setting, Stage, StageError
from policy import keyspace
from policy.ledger import JobStatus, Report
from policy.schema import open_store
from policy.valkey import Client, call, connect

READERS = 100
REWRITE_SECONDS = 20.0
_LOOK_SECONDS = 0.25


class DemoError(Exception):
    """The play cannot go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for. folder: of the installation, None for a temporary one; results: where report and message go;
    deadline: seconds for everything that waits; lasting: leave it running; wait: intake first, then delivery."""

    recipients: int = 20_000
    folder: Path | None = None
    results: Path = Path("demo-data")
    deadline: float = 140.0
    lasting: bool = False
    workers: int = 0
    wait: bool = False


@dataclass(slots=True)
class Story:
    """One person's `why`, as the command printed it."""

    title: str
    command: str
    text: str


@dataclass(slots=True)
class Outcome:
    """What came of a rehearsal. figures: the last line; everything else is for the screen, the report and tests."""

    submitted: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    status: JobStatus | None = None
    report: Report | None = None
    tallies: dict[str, Tally] = field(default_factory=dict)
    course: Course = field(default_factory=Course)
    submitted_at: int = 0
    sink: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    visits: Visits = field(default_factory=Visits)
    readers: int = 0
    pixels: int = 0
    pixels_unasked: int = 0
    second_submitted: int = 0
    second_refused: int = 0
    second: Tally = field(default_factory=Tally)
    signed: Path | None = None
    signatures: list[proof.Signature] = field(default_factory=list)
    messages_verified: int = 0
    messages_checked: int = 0
    scan: proof.Scan | None = None
    stories: list[Story] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    workers: int = 0
    seconds: float = 0.0

    @property
    def whole(self) -> Tally:
        return findings.total(self.tallies)

    @property
    def waiting(self) -> int:
        """Recipients without an end."""
        return self.submitted - self.whole.ended

    @property
    def dkim_verified(self) -> bool:
        return proof.is_proven(self.signatures) and 0 < self.messages_checked == self.messages_verified

    def figures(self) -> dict[str, Any]:
        """The last line of the demo. deferred: recipients that have not ended; messages_per_second: findings' plate."""
        whole = self.whole
        return {
            "submitted": self.submitted,
            "delivered": whole["delivered"],
            "refused": whole["refused"],
            "bounced": whole["bounced"],
            "deferred": self.waiting,
            "expired": whole["expired"],
            "unknown": whole["unknown"],
            "sink_accepted": int(self.sink.get("accepted", 0)),
            "messages_per_second": round(self.rate, 1),
            "dkim_verified": self.dkim_verified,
            "opted_out": len(self.visits.opted_out),
            "second_refused": self.second_refused,
            "seconds": round(self.seconds, 1),
            "deferrals": whole.deferrals,
            "opened": self.visits.opened,
            "clicked": self.visits.clicked,
            "files_with_addresses": -1 if self.scan is None else len(self.scan.hits),
            "ok": all(good for _, good in self.checks()) and not self.troubles,
        }

    def checks(self) -> list[tuple[str, bool]]:
        """The equations a rehearsal stands for, each with whether it holds."""
        whole = self.whole
        ended = whole["delivered"] + whole["refused"] + whole["bounced"] + whole["expired"]
        accepted = int(self.sink.get("accepted", -1))
        opted = len(self.visits.opted_out)
        return [
            ("delivered + refused + bounced + expired = submitted", ended == self.submitted),
            ("nobody is left deferred", self.waiting == 0),
            ("nobody is in doubt", whole["unknown"] == 0),
            ("at least 80 % delivered", whole["delivered"] >= 0.8 * self.submitted),
            ("the sink counts as many accepted as we count delivered", accepted == whole["delivered"]),
            ("the sink counts no message twice", accepted == int(self.sink.get("unique", -1))),
            ("every line the sink kept ends in CRLF", self.bare_newlines == 0),
            ("dkimpy verifies RSA and Ed25519, one-click headers under both", self.dkim_verified),
            ("no pixel without consent", self.pixels_unasked == 0 and self.pixels > 0),
            ("the second campaign refused exactly those who opted out", 0 < opted == self.second_refused),
            ("no address in clear in any file of the data folder", self.scan is not None and not self.scan.hits),
        ]

    @property
    def bare_newlines(self) -> int:
        providers = self.sink.get("providers", {})
        return sum(int(counts["bare_newlines"]) for counts in providers.values())


# --- the play -----------------------------------------------------------------------------------------------------


async def perform(stage: Stage, plan: Plan, screen: Screen, outcome: Outcome) -> None:
    """Everything between curtain and curtain. Fills `outcome` as far as it comes. Raises StageError, DemoError."""
    until = time.monotonic() + plan.deadline
    audience = campaigns.Audience(plan.recipients)
    census = campaigns.census(audience)
    outcome.rows, outcome.submitted = dict(census.rows), census.submitted
    outcome.workers = stage.workers
    stamp = secrets.token_hex(3)
    screen.act(f"the newsletter to {audience.count:,} recipients is handed in through Redis, sealed")
    outcome.submitted_at = time.time_ns() // 1000
    async with AsyncProducer(stage.redis_url, intake_key=stage.keyring.intake_public) as producer:
        first = await producer.submit(campaigns.first(f"demo-{stamp}-1", wait=plan.wait), audience)
        screen.act(f"delivering with {stage.workers} workers")
        outcome.status = await _ended(stage, first, outcome, audience, screen, until)
        outcome.sink = await stage.counts()
        _course(stage, outcome, audience)
        screen.outcome(outcome.rows, outcome.tallies)
        screen.note(f"{outcome.rate:,.0f} messages/s to the provider that accepts, with everything else going on")
        mails = _mails(stage.kept, census)
        if not mails:
            raise DemoError("the providers kept no message: nobody can read, nothing can be proved")
        await _read(outcome, mails, census, screen)
        job = await producer.submit(campaigns.second(f"demo-{stamp}-2"), _second(outcome, mails, audience))
        await _second_ended(stage, job, outcome, screen, until)
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


def _mails(kept: Path, census: campaigns.Census) -> list[tuple[Path, Mail]]:
    """What the providers stored, taken in turns from each of them, people with and without consent alternating."""
    by_provider: dict[str, list[tuple[Path, Mail]]] = {}
    for path in sorted(kept.glob("*.eml")):
        mail = read_mail(path.read_bytes())
        by_provider.setdefault(path.name.partition("-")[0], []).append((path, mail))
    for found in by_provider.values():
        found[:] = _alternating(found, lambda pair: pair[1].recipient in census.tracked)
    queues = [iter(found) for found in by_provider.values()]
    mixed: list[tuple[Path, Mail]] = []
    while queues:
        for queue in list(queues):
            pair = next(queue, None)
            if pair is None:
                queues.remove(queue)
            else:
                mixed.append(pair)
    return mixed


def _alternating(
    pairs: Iterable[tuple[Path, Mail]], is_first: Callable[[tuple[Path, Mail]], bool]
) -> list[tuple[Path, Mail]]:
    yes: list[tuple[Path, Mail]] = []
    no: list[tuple[Path, Mail]] = []
    for pair in pairs:
        (yes if is_first(pair) else no).append(pair)
    longer = max(len(yes), len(no))
    return [pair for place in range(longer) for side in (yes, no) if place < len(side) for pair in (side[place],)]


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
    outcome.scan = await asyncio.to_thread(proof.scan, (stage.data, stage.logs), needles)
    screen.act(
        f"{len(needles)} addresses looked for in {outcome.scan.files} files ({outcome.scan.size / 1e6:.0f} MB) of the "
        f"data folder: in clear in {len(outcome.scan.hits)}"
    )


def sample(mails: list[tuple[Path, Mail]], visits: Visits, census: campaigns.Census) -> list[str]:
    """Somebody delivered, somebody who opted out, somebody refused."""
    gone = set(visits.opted_out)
    delivered = next((mail.recipient for _, mail in mails if mail.recipient not in gone), "")
    return [one for one in (delivered, *visits.opted_out[:1], *census.without_consent[:1]) if one]


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
