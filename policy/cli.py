"""Commands of the ground floor: the writer's role, suppressions, figures, the story of a person, accounts.

Promise: what changes something goes through the writer's socket and is in force when the command returns; what only
looks reads SQL (``mode=ro``) and works while nothing runs. ``--json`` prints one document a command, instants in
microseconds. Exit codes: 0 done, 1 not found or failed, 2 wrong usage or configuration.

An address typed here goes into no log and no store: it becomes a keyed tag before anything is asked.
"""

from __future__ import annotations

import asyncio
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from policy.keys import Keyring
    from policy.ledger import JobStatus, Reader
    from policy.settings import PolicySettings
    from policy.wire import SuppressionRecord

commands = typer.Typer(no_args_is_help=True)
run = typer.Typer(no_args_is_help=True, help="One role alone, for systemd or containers.")
suppress = typer.Typer(no_args_is_help=True, help="To whom nothing is written, and why.")
jobs = typer.Typer(no_args_is_help=True, help="Jobs: list, stop, and what was rejected.")
account = typer.Typer(no_args_is_help=True, help="Accounts: whose campaigns these are.")
commands.add_typer(run, name="run")
commands.add_typer(suppress, name="suppress")
commands.add_typer(jobs, name="jobs")
commands.add_typer(account, name="account")

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file; else $SALES_PUSH_CONFIG, else ./sales-push.toml."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
Scope = Annotated[str, typer.Option("--scope", help="platform, account, list or topic.")]
Of = Annotated[str, typer.Option("--of", help="Which account (acme), list or topic (acme/news).")]

_BATCH = 1000  # entries a call: one transaction and one pipeline


def _settings(config: Path | None) -> PolicySettings:
    from policy import logs
    from policy.settings import PolicySettings, load

    settings = load(PolicySettings, config)
    logs.configure("cli", json=False, level="warning")
    return settings


def _keyring(settings: PolicySettings) -> Keyring:
    from policy.keys import Keyring

    return Keyring.load(settings.keys_dir)


def _reader(settings: PolicySettings) -> Reader:
    from policy.ledger import Reader
    from policy.schema import open_store

    if not settings.sql_url and not (settings.data_dir / "policy.db").exists():
        _fail(f"there is no database in {settings.data_dir}: run `sales-push init`, then `sales-push up`")
    return Reader(open_store(settings.sql_address(), writer=False))


def _ask(settings: PolicySettings, op: str, **kwargs: Any) -> Any:
    """One call to the writer; its refusal is one line and exit code 1."""
    from policy.wire import WireError, WriterUnavailable, ask

    try:
        return asyncio.run(ask(settings.writer_socket, op, **kwargs))
    except WireError as error:
        _fail(error.text)
    except WriterUnavailable:
        _fail("the policy process does not answer: is `sales-push up` running?")


def _fail(text: str, code: int = 1) -> NoReturn:
    print(text, file=sys.stderr)
    raise typer.Exit(code)


def _show(document: Any, as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        print(json.dumps(document, ensure_ascii=False))
    else:
        for line in lines:
            print(line)


def _when(at: int | None) -> str:
    from policy.instants import rfc3339

    return rfc3339(at)[:19] + "Z" if at else "-"


def _now() -> int:
    from policy.writer import clock_us

    return clock_us()


# --- the role -----------------------------------------------------------------------------------------------------


@commands.callback()
def _floor() -> None:
    """Typer makes a lone command the program itself; a callback keeps the group a group."""


@run.callback()
def _roles() -> None:
    """The same, one level down."""


@run.command("policy")
def run_policy(config: Config = None) -> None:
    """The policy process: the one SQL writer, on its unix socket. One a data folder."""
    import signal

    import uvloop

    from policy import logs
    from policy.settings import PolicySettings, load
    from policy.writer import WriterError, serve

    settings = load(PolicySettings, config)
    logs.configure("policy", settings.log_json, settings.log_level)

    async def until_told() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(settings, stop)

    try:
        uvloop.run(until_told())
    except WriterError as error:
        _fail(str(error))


# --- suppressions -------------------------------------------------------------------------------------------------


def _target(keyring: Keyring, text: str) -> tuple[bytes, int]:
    """(tag, partition) of an address, or of a whole domain written "@example.org". Raises AddressError."""
    from policy.address import domain_tag, normalise, parse, parse_domain, tag_of
    from policy.keyspace import partition_of

    if text.startswith("@"):
        domain = parse_domain(text[1:])
        return domain_tag(keyring.pepper, domain), partition_of(domain)
    mailbox = parse(text)
    return tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain)), partition_of(mailbox.domain)


def _one_target(keyring: Keyring, text: str) -> tuple[bytes, int]:
    from policy.address import AddressError

    try:
        return _target(keyring, text)
    except AddressError as error:
        _fail(f"that is not an address or @domain ({error.reason})", 2)


def _scope(settings: PolicySettings, scope: str, of: str) -> tuple[int, int]:
    """(scope, scope id) numbers."""
    from policy.suppression import Scope as Scopes

    if scope not in [known.name.lower() for known in Scopes]:
        _fail("--scope is platform, account, list or topic", 2)
    if scope != "platform" and not of:
        _fail(f"--scope {scope} needs --of {'acme' if scope == 'account' else 'acme/name'}", 2)
    reader = _reader(settings)
    try:
        number = reader.scope_number(scope, of)
    finally:
        reader.close()
    if number is None:
        _fail(f"there is no {scope} by that name")
    return int(Scopes[scope.upper()]), number


@suppress.command("add")
def suppress_add(
    address: Annotated[str, typer.Argument(help="An address, or @domain for everybody there.")],
    scope: Scope = "platform",
    of: Of = "",
    reason: Annotated[str, typer.Option(help="manual, opt-out, complaint, bounce, restriction or erasure.")] = "manual",
    source: Annotated[str, typer.Option(help="Where it comes from, in a word or two.")] = "cli",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Write to this address no more. In force at the gate when this returns."""
    from policy.wire import SuppressionRecord

    settings = _settings(config)
    tag, partition = _one_target(_keyring(settings), address)
    record = SuppressionRecord(tag, partition, *_scope(settings, scope, of), reason, source)
    changed = _ask(settings, "suppress", entries=[record])
    _show({"changed": changed}, as_json, ["suppressed" if changed else "was suppressed already"])


@suppress.command("remove")
def suppress_remove(
    address: Annotated[str, typer.Argument(help="An address, or @domain.")],
    scope: Scope = "platform",
    of: Of = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Take every reason of one scope back. An opt-out is the person's word: only they should undo it."""
    settings = _settings(config)
    tag, partition = _one_target(_keyring(settings), address)
    number, scope_id = _scope(settings, scope, of)
    removed = _ask(settings, "unsuppress", tag=tag, partition=partition, scope=number, scope_id=scope_id)
    _show({"removed": removed}, as_json, [f"removed {removed}" if removed else "nothing was suppressed there"])
    if not removed:
        raise typer.Exit(1)


@suppress.command("check")
def suppress_check(
    address: Annotated[str, typer.Argument(help="An address.")], as_json: Json = False, config: Config = None
) -> None:
    """Is anything against this address (or its domain)? Exit code 1 when nothing is."""
    settings = _settings(config)
    told = _why(settings, address)
    _show({"suppressed": told["standing"]}, as_json, [_standing_line(entry) for entry in told["standing"]])
    if not told["standing"]:
        if not as_json:
            print("nothing is known against it")
        raise typer.Exit(1)


@suppress.command("import")
def suppress_import(
    file: Annotated[
        Path,
        typer.Argument(
            help="Lines of addresses or @domains, CSV whose first column they are, or an "
            "export of ours; - reads standard input.",
            allow_dash=True,
        ),
    ],
    scope: Scope = "platform",
    of: Of = "",
    reason: Annotated[str, typer.Option(help="What each entry says.")] = "import",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Add many at once. Lines that are no address are named by number, never printed; the others are entered."""
    from policy.wire import SuppressionRecord, WireError, WriterClient, WriterUnavailable

    settings = _settings(config)
    keyring = _keyring(settings)
    where = _scope(settings, scope, of)
    bad: list[int] = []

    def records(lines: Iterable[str]) -> Iterator[SuppressionRecord]:
        from policy.address import AddressError

        for number, row in enumerate(csv.reader(lines), 1):
            first = row[0].strip().removeprefix("\ufeff") if row else ""
            if not first or (number == 1 and first.lower() in ("address", "email", "e-mail", "tag")):
                continue
            try:
                if len(row) >= 6 and len(first) == 24 and "@" not in first:
                    yield _exported(row)
                else:
                    yield SuppressionRecord(*_target(keyring, first), *where, reason, f"import {file.name}"[:64])
            except (AddressError, ValueError):
                bad.append(number)

    async def send(lines: Iterable[str]) -> int:
        changed = 0
        async with WriterClient(settings.writer_socket) as client:
            batch: list[SuppressionRecord] = []
            for record in records(lines):
                batch.append(record)
                if len(batch) == _BATCH:
                    changed += await client.suppress(batch)
                    batch = []
            return changed + (await client.suppress(batch) if batch else 0)

    try:
        if str(file) == "-":
            changed = asyncio.run(send(sys.stdin))
        else:
            with file.open(encoding="utf-8", newline="") as lines:
                changed = asyncio.run(send(lines))
    except WireError as error:
        _fail(error.text)
    except WriterUnavailable:
        _fail("the policy process does not answer: is `sales-push up` running?")
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"cannot read {file}: {type(error).__name__}", 2)
    _show(
        {"changed": changed, "bad_lines": bad},
        as_json,
        [f"{changed} new or changed", *(f"line {number}: no address" for number in bad)],
    )
    if bad:
        raise typer.Exit(1)


def _exported(row: list[str]) -> SuppressionRecord:
    """A line of our own export: tag, partition, scope, scope id, reason, source[, created, expires]."""
    from policy.suppression import Scope as Scopes
    from policy.wire import SuppressionRecord

    created, expires = (int(row[index]) if len(row) > index and row[index] else 0 for index in (6, 7))
    scope = int(Scopes[row[2].upper()]) if row[2].upper() in Scopes.__members__ else int(row[2])
    return SuppressionRecord(bytes.fromhex(row[0]), int(row[1]), scope, int(row[3]), row[4], row[5], created, expires)


@suppress.command("export")
def suppress_export(config: Config = None) -> None:
    """All entries as CSV: keyed tags, no addresses (there are none); `import` of the same installation reads it."""
    from policy.suppression import Scope as Scopes

    reader = _reader(_settings(config))
    try:
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(["tag", "partition", "scope", "scope_id", "reason", "source", "created", "expires"])
        for entry in reader.suppressions():
            scope = Scopes(entry.scope).name.lower()
            out.writerow([entry.tag.hex(), entry.partition, scope, entry.scope_id, entry.reason, entry.source,
                          entry.created, entry.expires or ""])  # fmt: skip
    finally:
        reader.close()


# --- why and how far ----------------------------------------------------------------------------------------------


def _why(settings: PolicySettings, address: str) -> dict[str, Any]:
    from policy.address import AddressError

    keyring = _keyring(settings)
    reader = _reader(settings)
    try:
        return reader.why(address, keyring).as_dict()
    except AddressError as error:
        _fail(f"that is not an address ({error.reason})", 2)
    finally:
        reader.close()


@commands.command("why")
def why(
    address: Annotated[str, typer.Argument(help="Whose mail.")], as_json: Json = False, config: Config = None
) -> None:
    """What happened to an address in every job still kept, and why nothing is sent to it. Exit code 1: not known."""
    told = _why(_settings(config), address)
    _show(told, as_json, _why_lines(told))
    if not told["standing"] and not told["stories"]:
        raise typer.Exit(1)


def _standing_line(entry: dict[str, Any]) -> str:
    scope = f"{entry['scope']} {entry['scope_name']}".strip()
    until = f" until {_when(entry['until'])}" if entry["until"] else ""
    source = f" ({entry['source']})" if entry["source"] else ""
    return f"suppressed: {entry['target']}, {scope}: {entry['reason']} since {_when(entry['since'])}{until}{source}"


def _why_lines(told: dict[str, Any]) -> Iterator[str]:
    yield from (_standing_line(entry) for entry in told["standing"])
    for story in told["stories"]:
        code = " ".join(str(part) for part in (story["code"] or "", story["enhanced"]) if part)
        reason = f" ({story['reason']})" if story["reason"] else ""
        yield f"job {story['account']}/{story['job_id']}: {story['kind']}{reason} {_when(story['at'])} {code}".rstrip()
        if story["reply"]:
            yield f"    {story['reply']}"
        for step in story["history"]:
            detail = " ".join(str(part) for part in (step["reason"], step["code"] or "", step["enhanced"]) if part)
            yield f"    {_when(step['at'])} {step['kind']} {detail}".rstrip()
            if step["reply"]:
                yield f"        {step['reply']}"
    if not told["standing"] and not told["stories"]:
        yield "nothing is known of this address"
    if told["unreadable"]:
        yield f"{told['unreadable']} jobs could not be asked: their keys do not open"


@commands.command("status")
def status(
    job: Annotated[str | None, typer.Argument(help="Number, job id or account/job_id; none: an overview.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """A job's figures, or an overview of the newest jobs."""
    reader = _reader(_settings(config))
    try:
        if job is None:
            _list(reader, as_json, 20, "")
            return
        found = _found(reader, job)
        _show(found.as_dict(), as_json, _status_lines(found))
    finally:
        reader.close()


def _found(reader: Reader, job: str) -> JobStatus:
    from policy.ledger import Ambiguous

    try:
        found = reader.job_status(job, _now())
    except Ambiguous as error:
        _fail(str(error), 2)
    if found is None:
        _fail("no such job")
    return found


def _status_lines(status: JobStatus) -> Iterator[str]:
    yield f"job {status.number} {status.account}/{status.job_id}: {status.state}" + (
        f" ({status.reason})" if status.reason else ""
    )
    yield f"  accepted {_when(status.accepted_at)}  done {_when(status.done_at)}  {status.rate:g}/s"
    rows = status.rows_submitted if status.rows_submitted is not None else f"? ({status.chunks} chunks so far)"
    waiting = status.waiting if status.waiting is not None else "?"
    yield f"  rows {rows}  ended {status.terminal}  waiting {waiting}  deferrals {status.deferrals}"
    for kind, n in sorted(status.counts.items(), key=lambda pair: -pair[1]):
        reasons = ", ".join(f"{reason} {m}" for reason, m in sorted(status.reasons.get(kind, {}).items()))
        yield f"  {kind:>12} {n:>10}" + (f"  ({reasons})" if reasons else "")
    if status.opens or status.clicks:
        yield f"  opens {status.opens}  clicks {status.clicks}"


# --- jobs ---------------------------------------------------------------------------------------------------------


def _list(reader: Reader, as_json: bool, limit: int, state: str) -> None:
    found = reader.jobs(_now(), limit, state)
    lines = [
        f"{one.number:>6}  {one.state:<10} {_when(one.accepted_at)}  "
        f"{one.terminal:>8}/{one.rows_submitted if one.rows_submitted is not None else '?':<8} "
        f"{one.account}/{one.job_id}"
        for one in found
    ]
    _show([one.as_dict() for one in found], as_json, lines or ["no jobs"])


@jobs.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    state: Annotated[str, typer.Option(help="Only jobs in this state.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """The newest jobs first."""
    reader = _reader(_settings(config))
    try:
        _list(reader, as_json, limit, state)
    finally:
        reader.close()


def _move(job: str, state: str, reason: str, as_json: bool, config: Path | None) -> None:
    settings = _settings(config)
    stored = _ask(settings, "job_state", job=job, state=state, reason=reason)
    _show({"job": job, "state": stored}, as_json, [f"{job}: {stored}"])


JobName = Annotated[str, typer.Argument(help="Number, job id or account/job_id.")]
Because = Annotated[str, typer.Option("--reason", help="For the record.")]


@jobs.command("pause")
def jobs_pause(job: JobName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Send nothing more of a job until it is resumed."""
    _move(job, "paused", reason, as_json, config)


@jobs.command("resume")
def jobs_resume(job: JobName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Go on with a paused job."""
    _move(job, "sending", reason, as_json, config)


@jobs.command("cancel")
def jobs_cancel(job: JobName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Stop a job for good; whoever still waits ends as cancelled."""
    _move(job, "cancelled", reason, as_json, config)


@jobs.command("rejected")
def jobs_rejected(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    dead: Annotated[
        bool, typer.Option("--dead", help="What nobody could finish, instead of what was refused.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Jobs that were refused, with every mistake in them; the newest first."""
    from policy import keyspace

    settings = _settings(config)
    stream, purpose = (keyspace.DEAD, b"dead") if dead else (keyspace.REJECTED, b"rejected")
    found = asyncio.run(_rejected(settings, _keyring(settings), stream, purpose, limit))
    lines: list[str] = []
    for one in found:
        lines.append(f"{_when(one['at'])}  {one['entry']} {one['account'] or '?'}/{one['job_id'] or '?'}")
        lines += [
            f"    {path}: {message}" + (f" ({suggestion})" if suggestion else "")
            for path, message, suggestion in one["problems"]
        ]
    _show(found, as_json, lines or ["nothing was rejected"])


async def _rejected(
    settings: PolicySettings, keyring: Keyring, stream: str, purpose: bytes, limit: int
) -> list[dict[str, Any]]:
    import msgspec

    from policy.keys import SealError, open_sealed
    from policy.valkey import connect

    client = connect(settings.redis_address())
    found: list[dict[str, Any]] = []
    try:
        for _, fields in await client.xrevrange(stream, count=limit):
            try:
                body = msgspec.msgpack.decode(open_sealed(keyring.service, fields[b"sealed"], purpose))
            except (SealError, KeyError, msgspec.DecodeError):
                continue  # under a key that is gone: nothing can be said about it
            body.pop("payload", None)  # it may hold addresses: not for a terminal
            found.append(body)
    finally:
        await client.aclose()
    return found


# --- accounts -----------------------------------------------------------------------------------------------------


@account.command("add")
def account_add(
    name: Annotated[str, typer.Argument(help="Letters, digits, dot, hyphen, underscore; 64 at most.")],
    display_name: Annotated[str, typer.Option(help="As recipients know the sender.")] = "",
    postal_address: Annotated[str, typer.Option(help="Shown in every campaign (CAN-SPAM, CASL).")] = "",
    website: Annotated[str, typer.Option()] = "",
    privacy_url: Annotated[str, typer.Option()] = "",
    opens: Annotated[
        str, typer.Option(help="Most that a campaign may ask for: off, aggregate, deliverability, individual.")
    ] = "individual",
    clicks: Annotated[str, typer.Option(help="The same, of clicks.")] = "individual",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """A new account."""
    from policy.gate import Mode

    modes: list[int] = []
    for mode in (opens, clicks):
        if mode.upper() not in Mode.__members__:
            _fail("a mode is off, aggregate, deliverability or individual", 2)
        modes.append(int(Mode[mode.upper()]))
    number = _ask(
        _settings(config), "account_add", name=name, display_name=display_name, postal_address=postal_address,
        website=website, privacy_url=privacy_url, opens_mode=modes[0], clicks_mode=modes[1],
    )  # fmt: skip
    _show({"number": number, "name": name}, as_json, [f"account {number}: {name}"])


@account.command("list")
def account_list(as_json: Json = False, config: Config = None) -> None:
    """All accounts."""
    from dataclasses import asdict

    reader = _reader(_settings(config))
    try:
        found = reader.accounts()
    finally:
        reader.close()
    lines = [f"{one.number:>5}  {one.state:<7} {one.name}  {one.display_name}" for one in found]
    _show([asdict(one) for one in found], as_json, lines or ["no accounts: sales-push account add NAME"])


@account.command("freeze")
def account_freeze(
    name: Annotated[str, typer.Argument()],
    thaw: Annotated[bool, typer.Option("--thaw", help="The opposite: let it send again.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Stop everything of an account, at once."""
    known = _ask(_settings(config), "account_freeze", name=name, frozen=not thaw)
    if not known:
        _fail("no such account")
    _show({"name": name, "frozen": not thaw}, as_json, [f"{name}: {'active' if thaw else 'frozen'}"])
