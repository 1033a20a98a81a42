"""``sales-push account``: whose campaigns these are, and whether they may go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from policy.cli.asking import Because, Config, Json, ask_writer, fail, reader_of, settings_of, show

account = typer.Typer(no_args_is_help=True, help="Accounts: whose campaigns these are.")


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
            fail("a mode is off, aggregate, deliverability or individual", 2)
        modes.append(int(Mode[mode.upper()]))
    number = ask_writer(
        settings_of(config), "account_add", name=name, display_name=display_name, postal_address=postal_address,
        website=website, privacy_url=privacy_url, opens_mode=modes[0], clicks_mode=modes[1],
    )  # fmt: skip
    show({"number": number, "name": name}, as_json, [f"account {number}: {name}"])


@account.command("list")
def account_list(as_json: Json = False, config: Config = None) -> None:
    """All accounts."""
    from dataclasses import asdict

    reader = reader_of(settings_of(config))
    try:
        found = reader.accounts()
        paused = {halt.account for halt in reader.halts()}
    finally:
        reader.close()
    told = [{**asdict(one), "paused": one.number in paused} for one in found]
    lines = [
        f"{one.number:>5}  {'paused' if one.number in paused and not one.is_frozen else one.state:<7} {one.name}"
        f"  {one.display_name}"
        for one in found
    ]
    show(told, as_json, lines or ["no accounts: sales-push account add NAME"])


@account.command("freeze")
def account_freeze(
    name: Annotated[str, typer.Argument()],
    thaw: Annotated[bool, typer.Option("--thaw", help="The opposite: let it send again.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Stop everything of an account, at once."""
    known = ask_writer(settings_of(config), "account_freeze", name=name, frozen=not thaw)
    if not known:
        fail("no such account")
    show({"name": name, "frozen": not thaw}, as_json, [f"{name}: {'active' if thaw else 'frozen'}"])


def _halt(name: str, act: str, reason: str, as_json: bool, config: Path | None) -> None:
    told = ask_writer(settings_of(config), "halt_account", name=name, act=act, reason=reason)
    jobs = f", {len(told['jobs'])} jobs cancelled" if act == "cancel" else ""
    show({"name": name, **told}, as_json, [f"{name}: {told['state']}{jobs}"])


AccountName = Annotated[str, typer.Argument(help="Name of the account.")]


@account.command("pause")
def account_pause(name: AccountName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Send nothing of an account until it is resumed; new jobs are still accepted (unlike `freeze`)."""
    _halt(name, "pause", reason, as_json, config)


@account.command("resume")
def account_resume(name: AccountName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Go on with a paused account. One that is frozen stays frozen."""
    _halt(name, "resume", reason, as_json, config)


@account.command("cancel")
def account_cancel(name: AccountName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Cancel every open job of an account for good; new jobs are still accepted."""
    _halt(name, "cancel", reason, as_json, config)
