"""``sales-push policy`` and ``hold``: what is kept and for how long, who gets of it, sweeping, shortening, legal holds.

Inventory and table are printed from the configuration alone: they work while nothing runs. An address typed here
becomes a keyed tag before anything is asked; nothing of it is kept or logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from policy.cli.asking import Config, Json, ask_writer, fail, keyring_of, settings_of, show, when
from policy.cli.readings import RIGHTS, Purpose, actor_here

if TYPE_CHECKING:
    from pathlib import Path

    from policy.classes import RetentionSettings

policy = typer.Typer(no_args_is_help=True, help="What is kept, why and for how long, who works with it; sweeping.")
hold = typer.Typer(no_args_is_help=True, help="Legal holds: what must be kept of one person.")
Markdown = Annotated[bool, typer.Option("--markdown", help="A page in Markdown.")]


Shipped = Annotated[bool, typer.Option("--shipped", help="As it is shipped, whatever is configured here.")]


def _retention(config: Path | None, shipped: bool) -> RetentionSettings:
    from policy.classes import RetentionSettings

    return RetentionSettings() if shipped else settings_of(config).retention


@policy.command("inventory")
def policy_inventory(
    as_json: Json = False, markdown: Markdown = False, shipped: Shipped = False, config: Config = None
) -> None:
    """Every column, Redis key and file: what of a person is in it, why, for how long, whose it is."""
    from policy import inventory

    found = inventory.lines(_retention(config, shipped).periods())
    if markdown:
        show(None, False, inventory.inventory_page(found))
        return
    lines = [f"{one.kind:<6} {one.name:<28} {one.retention}  {one.personal}; {one.end}" for one in found]
    show(inventory.as_documents(found), as_json, lines)


@policy.command("retention")
def policy_retention(
    as_json: Json = False,
    markdown: Markdown = False,
    as_html: Annotated[bool, typer.Option("--html", help="A table to paste into a page.")] = False,
    shipped: Shipped = False,
    config: Config = None,
) -> None:
    """The retention table, from the configuration that the sweeper goes by."""
    from policy import inventory

    found = inventory.table(_retention(config, shipped).periods())
    if as_html or markdown:
        show(None, False, [inventory.as_html(found)] if as_html else inventory.retention_page(found))
        return
    lines = [f"{one.name}  {one.period:<44} {one.content}; from: {one.trigger}; then {one.action}" for one in found]
    show(inventory.as_documents(found), as_json, lines)


@policy.command("subprocessors")
def policy_subprocessors(
    as_json: Json = False,
    markdown: Markdown = False,
    as_html: Annotated[bool, typer.Option("--html", help="A table to paste into a page.")] = False,
    config: Config = None,
) -> None:
    """Who works for you with people's data: the list to publish (GDPR 28; agreements and hosts are not in it)."""
    from policy import inventory, subprocessors

    found = subprocessors.table(settings_of(config).subprocessors)
    if not found:
        show([], as_json, ["nobody is declared: what is sent goes to the recipients' own mail servers only"])
    elif as_html or markdown:
        show(None, False, [inventory.as_html(found)] if as_html else inventory.as_markdown(found))
    else:
        lines = [
            f"{one.name} ({one.country})  since {one.since}  {one.data}: {one.purpose}"
            + (f"; {one.safeguard}" if one.safeguard else "")
            for one in found
        ]
        show(inventory.as_documents(found), as_json, lines)


@policy.command("sweep")
def policy_sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Sweep now what is over; the policy process does so by itself every hour."""
    told = ask_writer(settings_of(config), "sweep", dry_run=dry_run)
    lines = [
        f"{one['retention']}  {_day(one['day'])}  {one['rows']:>9}  {one['place']}"
        + (f"  account {one['account']}" if one["account"] else "")
        for one in told
    ]
    show(told, as_json, lines or ["nothing is over"])


@policy.command("shorten")
def policy_shorten(
    account: Annotated[str, typer.Argument(help="Which account.")],
    retention: Annotated[str, typer.Argument(help="Which class: R2, R3 or R4.")],
    days: Annotated[int, typer.Argument(help="Days it is kept from now on; never more than before.")],
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Let an account keep a class for fewer days. Cannot be taken back."""
    kept = ask_writer(settings_of(config), "shorten", account=account, retention=retention, days=days)
    show(
        {"account": account, "retention": retention, "days": kept},
        as_json,
        [f"{account}: {retention} is kept for {kept} days"],
    )


@hold.command("place")
def hold_place(
    address: Annotated[str, typer.Argument(help="Whose data must be kept.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; in the officer's words.")],
    authority: Annotated[str, typer.Option("--authority", help="Who demands it: a court, a law, a claim.")],
    account: Annotated[str, typer.Option("--account", help="At which account; none: at all that know them.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Keep copies of what sweeps and erasure take of one person, until released. Reviewed within six months."""
    from policy.address import AddressError, normalise, parse, tag_of

    settings = settings_of(config)
    try:
        mailbox = parse(address)
    except AddressError as error:
        fail(f"that is not an address ({error.reason})", 2)
    tag = tag_of(keyring_of(settings).pepper, normalise(mailbox.local, mailbox.domain))
    numbers = ask_writer(settings, "hold_place", account=account, tag=tag, reason=reason, authority=authority)
    show({"holds": numbers}, as_json, [f"hold {number} stands" for number in numbers])


@hold.command("release")
def hold_release(
    number: Annotated[int, typer.Argument(help="Its number.")], as_json: Json = False, config: Config = None
) -> None:
    """End a hold; its copies go with the next sweep."""
    if not ask_writer(settings_of(config), "hold_release", number=number):
        fail("no such hold stands")
    show({"hold": number, "released": True}, as_json, [f"hold {number} is released"])


@hold.command("list")
def hold_list(purpose: Purpose = RIGHTS, as_json: Json = False, config: Config = None) -> None:
    """Holds that stand, by number; those whose review is due are marked. That you looked is written down."""
    settings = settings_of(config)
    told = ask_writer(settings, "hold_list", actor=actor_here(keyring_of(settings)), purpose=purpose)
    lines = [
        f"{one['number']:>5}  since {when(one['placed'])}  review {when(one['review'])}{'  DUE' if one['due'] else ''}"
        f"  {one['authority']}: {one['reason']}"
        for one in told
    ]
    show(told, as_json, lines or ["no hold stands"])


def _day(day: int) -> str:
    from policy.instants import DAY_US, rfc3339

    return rfc3339(day * DAY_US)[:10]
