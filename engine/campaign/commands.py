"""Commands of producers and of those who write campaigns: schema, submit, render. Merged into the tree by engine.cli.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, configuration or input. Results go to stdout, progress and
mistakes to stderr, so that ``sales-push submit … | …`` sees the job id alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from engine.campaign.audience import AudienceFile
    from engine.campaign.problems import Problem
    from policy.ledger import JobStatus, Reader
    from policy.settings import PolicySettings

campaign_commands = typer.Typer(no_args_is_help=True)

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file; else $SALES_PUSH_CONFIG, else ./sales-push.toml."),
]
JobFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The job as JSON (sales-push schema).")]
Recipients = Annotated[
    Path | None,
    typer.Option("--recipients", exists=True, dir_okay=False, help="CSV (.csv, .tsv) or NDJSON file of recipients."),
]
MOST_SHOWN = 50  # mistakes of rows on a terminal; the sum is told


@campaign_commands.callback()
def _floor() -> None:
    """Typer makes a lone command the program itself; a callback keeps the group a group."""


def _fail(lines: Iterable[object], code: int) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    raise typer.Exit(code)


def _now() -> int:
    return time.time_ns() // 1000


@campaign_commands.command("schema")
def schema() -> None:
    """Print the JSON Schema of jobs (and of recipient rows: $defs/Recipient)."""
    from engine.campaign.job import schema as described

    print(json.dumps(described(), indent=2, ensure_ascii=False))


@campaign_commands.command("submit")
def submit(
    job: JobFile,
    recipients: Recipients = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job until it has ended.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    redis: Annotated[str, typer.Option(help="Redis URL, for producers without a configuration here.")] = "",
    intake_key: Annotated[str, typer.Option(help="Public key to seal to, 64 hexadecimal digits.")] = "",
    config: Config = None,
) -> None:
    """Hand in a job, with its recipients from a file; prints the job id. created_at may be left out: it is now."""
    from redis import Redis

    from engine.campaign.audience import AudienceFile
    from engine.client import CHUNK_ROWS, Producer, SubmitError
    from policy import outlets

    settings = None if redis and not wait else _settings(config)
    if settings is not None:
        outlets.check(settings, (), datetime.now(UTC).date())
    document = _document(job)
    people = AudienceFile(recipients) if recipients is not None else None
    rows = _checked(people, skip_bad) if people is not None else 0
    tree = {**document, "audience": {"chunks": -(-rows // CHUNK_ROWS) or 1}} if people is not None else document
    _judge(tree)
    client = Redis.from_url(redis or (settings.redis_address() if settings is not None else ""))
    since = _now() // 1000
    try:
        with Producer(client, intake_key=intake_key or None) as producer:
            job_id = _sent(producer, document, people, rows)
    except SubmitError as error:
        _fail([error], 2)
    finally:
        client.close()
    print(job_id)
    if wait and settings is not None:
        raise typer.Exit(_follow(settings, str(document["account"]), job_id, since))


def _settings(config: Path | None) -> PolicySettings:
    from policy.settings import PolicySettings, load

    return load(PolicySettings, config)


def _document(path: Path) -> dict[str, Any]:
    from engine.campaign.job import MOST_BYTES
    from engine.campaign.strict import parse
    from policy.instants import rfc3339

    parsed = parse(path.read_bytes(), MOST_BYTES)
    if parsed.problems or not isinstance(parsed.value, dict):
        _fail(parsed.problems or [f"{path}: expected one JSON object"], 2)
    return {"created_at": rfc3339(_now()), **parsed.value}


def _judge(tree: dict[str, Any]) -> None:
    """What can be said without the service; the rest comes back from it."""
    from engine.campaign.validation import read

    found = read(json.dumps(tree).encode(), _now()).problems
    if found:
        _fail(found, 2)


def _checked(people: AudienceFile, skip_bad: bool) -> int:
    """Read the file once before anything is sent; how many rows can be read."""
    from rich.console import Console
    from rich.progress import Progress

    rows = bad = undeliverable = 0
    shown: list[Problem | str] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=people.size)
        for line in people.lines():
            if line.recipient is not None:
                rows += 1
            bad += line.recipient is None
            undeliverable += bool(line.undeliverable)
            if len(shown) < MOST_SHOWN:
                shown += line.problems
                if line.undeliverable:
                    shown.append(f"line {line.number}: not an address mail can be sent to ({line.undeliverable})")
            if line.number % 500 == 0:
                progress.update(task, completed=people.at)
    if bad or undeliverable:
        shown.append(
            f"{people.path.name}: {rows} rows, {bad} cannot be read, {undeliverable} would be refused as invalid"
        )
    for text in shown:
        print(text, file=sys.stderr)
    if (bad and not skip_bad) or not rows:
        _fail(["nothing was sent" + (": mend the file, or leave bad rows out with --skip-bad" if bad else "")], 2)
    return rows


def _sent(producer: Any, document: dict[str, Any], people: AudienceFile | None, rows: int) -> str:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("submitting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("submitting", total=rows or 1)
        job_id: str = producer.submit(document, people, progress=lambda sent, _: progress.update(task, completed=sent))
    return job_id


def _follow(settings: PolicySettings, account: str, job_id: str, since_ms: int) -> int:
    """Show the job until it ends; 0 when it is done."""
    from rich.console import Console

    from policy.ledger import Reader
    from policy.schema import open_store

    reader = Reader(open_store(settings.sql_address(), writer=False))
    console = Console(stderr=True)
    try:
        with console.status("waiting for the intake") as line:
            while True:
                found = reader.job_status(f"{account}/{job_id}", _now())
                if found is not None:
                    line.update(_line(found))
                    if found.state in ("done", "cancelled", "expired", "lost") and found.done_at:
                        break
                elif problems := _rejection(settings, account, job_id, since_ms):
                    for problem in problems:
                        print(problem, file=sys.stderr)
                    return 1
                time.sleep(0.5)
        print(_line(found), file=sys.stderr)
        return 0 if found.state == "done" else 1
    finally:
        reader.close()


def _line(found: JobStatus) -> str:
    counts = ", ".join(f"{kind} {n:,}" for kind, n in sorted(found.counts.items()))
    total = f"{found.rows_submitted:,}" if found.rows_submitted is not None else "?"
    return f"{found.job_id}: {found.state}, {found.terminal:,} of {total}" + (f" ({counts})" if counts else "")


def _rejection(settings: PolicySettings, account: str, job_id: str, since_ms: int) -> list[str]:
    """The mistakes for which the job was rejected after this submission, [] when it was not."""
    import msgspec
    from redis import Redis

    from policy import keyspace
    from policy.keys import SealError, open_sealed
    from policy.keysource import source_of

    keyring = source_of(settings).load()
    client = Redis.from_url(settings.redis_address())
    try:
        entries: Any = client.xrange(keyspace.REJECTED, min=str(since_ms - 1000))
    finally:
        client.close()
    for _, fields in reversed(entries):
        try:
            body = msgspec.msgpack.decode(open_sealed(keyring.service, fields[b"sealed"], b"rejected"))
        except (SealError, KeyError, msgspec.DecodeError):
            continue
        if (body["account"], body["job_id"], body["entry"]) == (account, job_id, "job"):
            return [f"{path}: {said}" + (f" ({hint})" if hint else "") for path, said, hint in body["problems"]]
    return []


@campaign_commands.command("render")
def render(
    job: JobFile,
    recipient: Annotated[int, typer.Option("--recipient", min=0, help="Which row, from 0.")] = 0,
    recipients: Recipients = None,
    send_test: Annotated[str, typer.Option("--send-test", help="Send it to this address, over the route.")] = "",
    output: Annotated[Path | None, typer.Option("--output", help="Write it to this file (.eml).")] = None,
    config: Config = None,
) -> None:
    """Show the exact message one recipient would get: headers, parts, tokens, signature."""
    from engine.campaign.audience import AudienceFile
    from engine.campaign.preview import CannotShow, preview, send
    from engine.campaign.validation import read
    from engine.message import load_signer
    from engine.outlets import outlets as engine_outlets
    from engine.settings import EngineSettings, dkim_files
    from policy import outlets
    from policy.keysource import source_of
    from policy.settings import load

    settings, engine = _settings(config), load(EngineSettings, config)
    document = _document(job)
    rows = document.get("recipients")
    if recipients is not None:
        row = AudienceFile(recipients).row(recipient)
        document = {**{k: v for k, v in document.items() if k != "recipients"}, "audience": {"chunks": 1}}
    else:
        row = rows[recipient] if isinstance(rows, list) and recipient < len(rows) else None
    if row is None:
        _fail([f"there is no recipient {recipient}: count from 0, name a file with --recipients"], 2)
    reading = read(json.dumps(document).encode(), _now())
    signers = {
        domain: [
            load_signer(domain, keys.rsa_selector, keys.rsa.read_bytes()),
            *(
                [load_signer(domain, keys.ed25519_selector or "", keys.ed25519.read_bytes())]
                if keys.ed25519 is not None
                else []
            ),
        ]
        for domain, keys in dkim_files(engine, settings.keys_dir).items()
    }
    reader = _reader(settings)
    try:
        account = reader.account(reading.account) if reading.account else None
    finally:
        reader.close()
    try:
        made = preview(
            reading, row, account, source_of(settings).load(), signers, public_url=settings.public_url,
            bounce_domain=settings.bounce_domain, now_us=_now(), to=send_test,
        )  # fmt: skip
    except CannotShow as error:
        _fail(error.problems, 1)
    if output is not None:
        output.write_bytes(made.wire)
    elif not send_test:
        sys.stdout.buffer.write(made.wire)
        sys.stdout.buffer.flush()
    if send_test:
        import aiosmtplib
        import dns.exception

        outlets.check(settings, engine_outlets(engine), datetime.now(UTC).date())
        try:
            where = asyncio.run(send(made, engine))
        except (aiosmtplib.SMTPException, OSError, dns.exception.DNSException) as error:
            _fail([f"not sent: {type(error).__name__}: {error}"], 1)
        print(f"sent through {where}", file=sys.stderr)


def _reader(settings: PolicySettings) -> Reader:
    from policy.ledger import Reader
    from policy.schema import open_store

    if not settings.sql_url and not (settings.data_dir / "policy.db").exists():
        _fail([f"there is no database in {settings.data_dir}: run `sales-push init`"], 1)
    return Reader(open_store(settings.sql_address(), writer=False))
