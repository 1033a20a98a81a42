"""``sales-push erase`` and ``erasures``: a person taken out of everything, and how far that is.

The address typed here goes to the writer's socket, which keeps its tag only, and nowhere else.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from policy.cli.asking import Config, Json, ask_writer, fail, keyring_of, reader_of, settings_of, show, when


def erase(
    address: Annotated[str, typer.Argument(help="Who is to be erased.")],
    account: Annotated[str, typer.Option("--account", help="At this account only; else everywhere.")] = "",
    cause: Annotated[str, typer.Option(help="request or minor.")] = "request",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is meant.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Erase a person: suppressed first, then unlinkable when this returns; the rest follows, with a receipt."""
    from policy.address import AddressError, normalise, parse, tag_of
    from policy.keyspace import partition_of

    if cause not in ("request", "minor"):
        fail("--cause is request or minor", 2)
    settings = settings_of(config)
    number = 0
    if account:
        reader = reader_of(settings)
        try:
            number = reader.scope_number("account", account) or 0
        finally:
            reader.close()
        if not number:
            fail("there is no account by that name")
    try:
        mailbox = parse(address)
    except AddressError as error:
        fail(f"that is not an address ({error.reason})", 2)
    if not yes and not as_json and sys.stdin.isatty():
        typer.confirm("This cannot be undone. Erase this person?", abort=True)
    tag = tag_of(keyring_of(settings).pepper, normalise(mailbox.local, mailbox.domain))
    told = ask_writer(
        settings, "erase", account=number, tag=tag, partition=partition_of(mailbox.domain), address=mailbox.wire,
        cause=cause,
    )  # fmt: skip
    where = f"at {account}" if account else "everywhere"
    lines = [
        f"erased {where}" if told["new"] else f"was erased {where} before",
        f"{told['messages']} messages are being taken out; receipts: sales-push erasures",
    ]
    if told["held"]:
        lines.append(f"kept under hold: {told['held']} (GDPR 17(3)), the person is to be told so")
    show(told, as_json, lines)


def erasures(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, the newest first.")] = 50,
    open_only: Annotated[bool, typer.Option("--open", help="Only what is not purged yet.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """How far each erasure is: suppressed, shredded (nothing leads to the person), purged (receipt given)."""
    told = ask_writer(settings_of(config), "erasures", limit=limit, open_only=open_only)
    lines = [
        f"{row['number']:>6}  {row['state']:<10} begun {when(row['begun'])}  purged {when(row['purged'])}"
        f"  {row['records']} records  {row['cause']}"
        for row in told
    ]
    show({"erasures": told}, as_json, lines or ["no erasures"])
