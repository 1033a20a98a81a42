"""``sales-push suppress``: to whom nothing is written. The stores hold keyed tags, so an export has no address."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy.cli.asking import Config, Json, Of, Scope, ask_writer, fail, keyring_of, reader_of, settings_of, show

if TYPE_CHECKING:
    from policy.keys import Keyring
    from policy.settings import PolicySettings
    from policy.wire import SuppressionRecord

from policy.cli.figures import standing_line, story_of
from policy.cli.readings import OFFICER, PROOF, SUPPORT, Law, Purpose, Role, ask_to_read

suppress = typer.Typer(no_args_is_help=True, help="To whom nothing is written, and why.")
_BATCH = 1000  # entries a call: one transaction and one pipeline


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
        fail(f"that is not an address or @domain ({error.reason})", 2)


def _scope(settings: PolicySettings, scope: str, of: str) -> tuple[int, int]:
    """(scope, scope id) numbers."""
    from policy.suppression import Scope as Scopes

    if scope not in [known.name.lower() for known in Scopes]:
        fail("--scope is platform, account, list or topic", 2)
    if scope != "platform" and not of:
        fail(f"--scope {scope} needs --of {'acme' if scope == 'account' else 'acme/name'}", 2)
    reader = reader_of(settings)
    try:
        number = reader.scope_number(scope, of)
    finally:
        reader.close()
    if number is None:
        fail(f"there is no {scope} by that name")
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

    settings = settings_of(config)
    tag, partition = _one_target(keyring_of(settings), address)
    record = SuppressionRecord(tag, partition, *_scope(settings, scope, of), reason, source)
    changed = ask_writer(settings, "suppress", entries=[record])
    show({"changed": changed}, as_json, ["suppressed" if changed else "was suppressed already"])


@suppress.command("remove")
def suppress_remove(
    address: Annotated[str, typer.Argument(help="An address, or @domain.")],
    scope: Scope = "platform",
    of: Of = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Take every reason of one scope back. An opt-out is the person's word: only they should undo it."""
    settings = settings_of(config)
    tag, partition = _one_target(keyring_of(settings), address)
    number, scope_id = _scope(settings, scope, of)
    removed = ask_writer(settings, "unsuppress", tag=tag, partition=partition, scope=number, scope_id=scope_id)
    show({"removed": removed}, as_json, [f"removed {removed}" if removed else "nothing was suppressed there"])
    if not removed:
        raise typer.Exit(1)


@suppress.command("check")
def suppress_check(
    address: Annotated[str, typer.Argument(help="An address.")],
    purpose: Purpose = SUPPORT,
    law: Law = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Is anything against this address (or its domain)? Exit code 1 when nothing is. The reading is written down."""
    told = story_of(settings_of(config), address, purpose, law, what="suppression check")
    show({"suppressed": told["standing"]}, as_json, [standing_line(entry) for entry in told["standing"]])
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

    settings = settings_of(config)
    keyring = keyring_of(settings)
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
        fail(error.text)
    except WriterUnavailable:
        fail("the policy process does not answer: is `sales-push up` running?")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {file}: {type(error).__name__}", 2)
    show(
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
def suppress_export(purpose: Purpose = PROOF, role: Role = OFFICER, config: Config = None) -> None:
    """All entries as CSV: keyed tags, no addresses (there are none); `import` of the same installation reads it. That
    they were taken out, and how many, is written down."""
    from policy.suppression import Scope as Scopes

    settings = settings_of(config)
    reader = reader_of(settings)
    try:
        people = reader.suppressed()
        what = "suppression export"
        ask_to_read(settings, keyring_of(settings), purpose, what, count=people, field_class="C1", role=role)
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerow(["tag", "partition", "scope", "scope_id", "reason", "source", "created", "expires"])
        for entry in reader.suppressions():
            scope = Scopes(entry.scope).name.lower()
            out.writerow([entry.tag.hex(), entry.partition, scope, entry.scope_id, entry.reason, entry.source,
                          entry.created, entry.expires or ""])  # fmt: skip
    finally:
        reader.close()
