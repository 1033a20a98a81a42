"""``sales-push ledger export``, ``report`` and ``bundle``: figures for elsewhere, and a person's bundle opened."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy.cli.asking import Config, Json, ask_writer, fail, keyring_of, now_us, reader_of, settings_of, show, when
from policy.cli.readings import FIGURES, OFFICER, RIGHTS, Purpose, Role, ask_to_read

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from policy.bundle.reading import Opened
    from policy.exporting import Row
    from policy.ledger import Report
    from policy.settings import PolicySettings

ledger = typer.Typer(no_args_is_help=True, help="The ledger as a file.")
bundle = typer.Typer(no_args_is_help=True, help="A person's bundle (access, portability): check, open, take in.")

_JOB_NOT_FOUND = "no such job"


@ledger.callback()
def _ledger() -> None:
    """Typer makes a lone command the group itself."""


@ledger.command("export")
def ledger_export(
    out: Annotated[Path, typer.Argument(help="File to write (0600); - for standard output.")],
    since: Annotated[str, typer.Option(help="Only what happened from then on: 2026-11-01, or RFC 3339.")] = "",
    job: Annotated[str, typer.Option(help="Only this job: number, job id or account/job_id.")] = "",
    form: Annotated[str, typer.Option("--format", help="jsonl or parquet; by default what OUT ends with.")] = "",
    purpose: Purpose = FIGURES,
    role: Role = OFFICER,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Every row of the ledger without names: pseudonyms, references and domains. Still personal data: keep it so."""
    from policy import exporting
    from policy.schema import open_store

    settings = settings_of(config)
    to_stdout = str(out) == "-"
    wanted = form or ("parquet" if out.suffix == ".parquet" else "jsonl")
    if wanted not in exporting.FORMATS:
        fail(f"a format is {' or '.join(exporting.FORMATS)}", 2)
    try:
        at = exporting.since_of(since) if since else None
    except ValueError:
        fail("--since is a date (2026-11-01) or an RFC 3339 date-time with its offset", 2)
    of = _number(config, job) if job else None
    reader_of(settings).close()  # says so when there is no database yet
    engine = open_store(settings.sql_address(), writer=False)
    try:
        people = exporting.people(engine, since=at, of=of)
        account = 0 if of is None else exporting.account_of(engine, of)  # whom else it is of is told it
        ask_to_read(
            settings, keyring_of(settings), purpose, "ledger export", account=account, count=people, field_class="C1",
            role=role, query=(since, job),
        )  # fmt: skip
        pages = exporting.read(engine, since=at, of=of)
        if not quiet and sys.stderr.isatty():
            pages = _with_bar(pages, engine, at, of)
        if to_stdout:
            total = exporting.put(sys.stdout.buffer, pages, wanted)
        else:
            total = exporting.write(out, pages, wanted)
    except exporting.ExportError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}")
    finally:
        engine.dispose()
    if not to_stdout:
        show({"rows": total, "format": wanted, "file": str(out)}, as_json, [f"{total} rows in {out}"])


def _with_bar(pages: Iterable[Sequence[Row]], engine: Engine, since: int | None, of: int | None) -> Iterator[list[Row]]:
    from rich.console import Console
    from rich.progress import Progress

    from policy import exporting

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("ledger", total=exporting.count(engine, since=since, of=of))
        for rows in pages:
            yield list(rows)
            progress.advance(task, len(rows))


def _number(config: Path | None, job: str) -> int:
    from policy.ledger import Ambiguous

    reader = reader_of(settings_of(config))
    try:
        number = reader.number(job)
    except Ambiguous as error:
        fail(str(error), 2)
    finally:
        reader.close()
    if number is None:
        fail(_JOB_NOT_FOUND)
    return number


def report(
    job: Annotated[str, typer.Argument(help="Number, job id or account/job_id.")],
    top: Annotated[int, typer.Option(help="How many lines of domains; 0: all.", min=0)] = 20,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """A job in rows: outcomes by domain, opens and clicks by link. Exit code 1: no such job."""
    from policy.ledger import Ambiguous

    reader = reader_of(settings_of(config))
    try:
        found = reader.report(job, now_us())
    except Ambiguous as error:
        fail(str(error), 2)
    finally:
        reader.close()
    if found is None:
        fail(_JOB_NOT_FOUND)
    show(_report_document(found), as_json, _report_lines(found, top))


def _report_document(found: Report) -> dict[str, Any]:
    return {
        "status": found.status.as_dict(),
        "domains": [
            dict(zip(("domain", "kind", "reason", "n"), row, strict=True)) for row in found.domains
        ],
        "links": [
            dict(zip(("link", "url", "kind", "visitor", "n"), row, strict=True)) for row in found.links
        ],
    }  # fmt: skip


def _report_lines(found: Report, top: int) -> Iterator[str]:
    status = found.status
    yield f"job {status.number} {status.account}/{status.job_id}: {status.state}"
    yield f"  accepted {when(status.accepted_at)}  done {when(status.done_at)}  rows {status.rows_submitted}"
    for name, kind, reason, n in found.domains[: top or None]:
        yield f"  {n:>10}  {kind:<12} {reason:<18} {name or '-'}"
    if top and len(found.domains) > top:
        yield f"  … {len(found.domains) - top} more: --top 0"
    for number, url, kind, visitor, n in found.links:
        target = url or "-" if number >= 0 else "(the mail itself)"
        yield f"  {n:>10}  {kind:<12} visitor {visitor:<10} {target}"


BundleFile = Annotated[Path, typer.Argument(help="export-<ticket>.zip.")]
Passphrase = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File with the passphrase (first line); none: you are asked for it."),
]


def _opened(path: Path, passphrase_file: Path | None) -> tuple[Opened, str]:
    from policy.bundle import reading, zips

    try:
        data = path.read_bytes()
        secret = passphrase_file.read_text("utf-8").split("\n", 1)[0].strip() if passphrase_file else ""
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}")
    try:
        if zips.is_sealed(data) and not secret:
            secret = str(typer.prompt("passphrase", hide_input=True, err=True)).strip()
        return reading.open_bundle(data, secret), secret
    except ValueError as error:
        fail(str(error))


@bundle.command("verify")
def bundle_verify(
    file: BundleFile, passphrase_file: Passphrase = None, as_json: Json = False
) -> None:  # fmt: skip
    """Whether every file is as the manifest says; how many records there are. Exit code 1: it is not."""
    opened, _ = _opened(file, passphrase_file)
    manifest = opened.manifest
    records = {
        name.removeprefix("data/").removesuffix(".jsonl"): said.records
        for name, said in manifest.files.items() if name.startswith("data/")
    }  # fmt: skip
    told = {"ticket": manifest.ticket, "right": manifest.right, "made_at": manifest.made_at, "records": records}
    lines = [f"{file}: {manifest.right}, {manifest.made_at}, every file as its manifest says"]
    show(told, as_json, lines + [f"  {n:>8}  {name}" for name, n in records.items()])


@bundle.command("open")
def bundle_open(
    file: BundleFile,
    out: Annotated[Path, typer.Argument(help="Folder to write the files to; must not exist.")],
    passphrase_file: Passphrase = None,
    purpose: Purpose = RIGHTS,
    config: Config = None,
) -> None:
    """Unpack a bundle after checking it; that it was read is written down. The person does the same with any zip
    program that knows AES."""
    import os

    settings = settings_of(config)
    opened, _ = _opened(file, passphrase_file)
    _ask_about(settings, opened, purpose)
    try:
        out.mkdir(mode=0o700, parents=True)
        for name, content in opened.files.items():
            path = out / name  # a name is data/…, csv/…, schema/… or at the top: `reading` knows no other
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
                target.write(content)
    except OSError as error:
        fail(f"{error.filename} cannot be written: {error.strerror}")
    print(f"{len(opened.files)} files in {out}")


def _ask_about(settings: PolicySettings, opened: Opened, purpose: str) -> None:
    """Before anything of a bundle is shown: whose it is, is read by name. Of somebody it has no address of (erased, or
    never known) nobody can be told."""
    profiles = [one.values for one in opened.records if one.kind == "profile"]
    addresses = {str(values["address"]) for values in profiles if values.get("address")}
    keyring, what = keyring_of(settings), "bundle"
    for address in sorted(addresses):
        ask_to_read(settings, keyring, purpose, what, address=address)
    if not addresses:
        ask_to_read(settings, keyring, purpose, what, count=0, query=(opened.manifest.ticket,))


@bundle.command("import")
def bundle_import(
    file: BundleFile,
    passphrase_file: Passphrase = None,
    make_accounts: Annotated[
        bool, typer.Option("--make-accounts", help="Make the accounts it names when they are not here.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Take a person's bundle in: identity, consent, suppressions, history. What is not taken is counted."""
    _, secret = _opened(file, passphrase_file)
    told = ask_writer(
        settings_of(config), "bundle_import", file=str(file.absolute()), passphrase=secret, make_accounts=make_accounts
    )
    lines = [f"  {n:>8}  {kind}" for kind, n in sorted(told["taken"].items())]
    left = [f"  {n:>8}  {kind} (not taken)" for kind, n in sorted(told["left"].items())]
    show(told, as_json, [f"{file}: taken in, {told['rows']} new rows in the ledger", *lines, *left])
