"""``sales-push rights``: requests of the people concerned, from receipt to their end.

Promise: what a command says is committed, in force, and told to the person by letter. Lists name tickets, never people;
`show` shows one person's data, because the officer has to answer them.

Known limits: `show` prints an address on the terminal; who may run it is a matter of who may reach the writer's socket.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from policy.cli.asking import Config, Json, ask_writer, fail, keyring_of, settings_of, show, when
from policy.cli.readings import RIGHTS, Purpose, actor_here

rights = typer.Typer(no_args_is_help=True, help="Requests of the people concerned: open, prove, extend, refuse, close.")

Ticket = Annotated[str, typer.Argument(help="Number of the request, such as R-7KQ2MZ4XWB.")]


def _line(told: dict[str, Any]) -> str:
    late = "  OVERDUE" if told.get("overdue") else ""
    needs = f"  needs you: {told['needs']}" if told.get("needs") else ""
    end = f"closed {when(told['closed'])}" if told["closed"] else f"due {when(told['due'])}"
    return f"{told['ticket']}  {told['kind']:<13} {told['role']:<8} {told['state']:<12} {end}{late}{needs}"


def _act(config: Path | None, as_json: bool, op: str, **kwargs: Any) -> None:
    told = ask_writer(settings_of(config), op, **kwargs)
    show(told, as_json, [_line(told)])


@rights.command("open")
def rights_open(
    kind: Annotated[
        str,
        typer.Argument(
            help="access, rectification, erasure, restriction, portability, objection, withdrawal or minor."
        ),
    ],
    address: Annotated[str, typer.Argument(help="The person's address; an account holder's contact address.")],
    account: Annotated[str, typer.Option(help="Only this account; without it all, and the platform.")] = "",
    holder: Annotated[bool, typer.Option("--holder", help="The person is the holder of --account.")] = False,
    channel: Annotated[str, typer.Option(help="How it came: cli, api, mail, letter or page.")] = "cli",
    law: Annotated[str, typer.Option(help="gdpr, uk, pipeda, bc, ccpa or quebec; else as configured.")] = "",
    received: Annotated[str, typer.Option(help="When it came, RFC 3339: the clock starts there. Else now.")] = "",
    field: Annotated[str, typer.Option(help="Of a rectification: which field.")] = "",
    value: Annotated[str, typer.Option(help="Of a rectification: the right value.")] = "",
    contested: Annotated[str, typer.Option(help="Of a rectification: the note when we do not agree.")] = "",
    purpose: Annotated[str, typer.Option(help="Of a withdrawal: for which purpose only.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """A request has come in. What protects the person is in force when this returns."""
    at = 0
    if received:
        from policy.instants import parse_rfc3339

        try:
            at = parse_rfc3339(received)
        except ValueError as error:
            fail(f"--received: {error}", 2)
    details = {"field": field, "value": value, "contested": contested, "purpose": purpose}
    told = ask_writer(
        settings_of(config), "rights_open", kind=kind, address=address, account=account,
        role="holder" if holder else "contact", channel=channel, jurisdiction=law, received=at,
        details={name: text for name, text in details.items() if text},
    )  # fmt: skip
    again = [] if told["new"] else ["(this was asked before and is still open)"]
    show(told, as_json, [_line(told), *again])


@rights.command("list")
def rights_list(
    everything: Annotated[bool, typer.Option("--all", help="Closed ones too.")] = False,
    account: Annotated[str, typer.Option(help="Only what concerns this account.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 200,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """By due date. Exit code 1 when one is overdue."""
    told = ask_writer(
        settings_of(config), "rights_list", open_only=not everything, account=account, limit=limit
    )  # fmt: skip
    show(told, as_json, [_line(one) for one in told] or ["no open requests"])
    if any(one["overdue"] for one in told):
        raise typer.Exit(1)


@rights.command("show")
def rights_show(ticket: Ticket, purpose: Purpose = RIGHTS, as_json: Json = False, config: Config = None) -> None:
    """One request with its address, what was asked for and every step. That you looked is written down."""
    settings = settings_of(config)
    told = ask_writer(settings, "rights_show", ticket=ticket, actor=actor_here(keyring_of(settings)), purpose=purpose)
    lines = [_line(told), f"address: {told['address'] or 'forgotten'}", f"identity: {told['identity']}"]
    lines += [f"{name}: {text}" for name, text in told["details"].items()]
    lines += [f"outcome: {told['outcome']}"] if told["outcome"] else []
    lines += [f"ground: {told['ground']}"] if told["ground"] else []
    lines += [
        f"{one['seq']:>3}  {when(one['at'])}  {one['actor']:<9} {one['act']:<9} {one['state']}  {one['note']}".rstrip()
        for one in told["steps"]
    ]
    show(told, as_json, lines)


@rights.command("ask")
def rights_ask(ticket: Ticket, as_json: Json = False, config: Config = None) -> None:
    """Send another proof letter."""
    _act(config, as_json, "rights_ask", ticket=ticket)


@rights.command("prove")
def rights_prove(
    ticket: Ticket,
    note: Annotated[str, typer.Option(help="What you have seen; kept sealed.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Identity by hand: you have seen something better than a mailbox."""
    _act(config, as_json, "rights_prove", ticket=ticket, note=note)


@rights.command("details")
def rights_details(
    ticket: Ticket,
    field: Annotated[str, typer.Option(help="Which field is to be corrected.")],
    value: Annotated[str, typer.Option(help="The right value.")] = "",
    contested: Annotated[str, typer.Option(help="Instead of a value: the note when we do not agree.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """What exactly is to be corrected, as you read it out of the letter."""
    details = {name: text for name, text in (("field", field), ("value", value), ("contested", contested)) if text}
    _act(config, as_json, "rights_details", ticket=ticket, details=details)


@rights.command("note")
def rights_note(
    ticket: Ticket, note: Annotated[str, typer.Argument(help="Kept sealed.")], config: Config = None
) -> None:
    """Something to remember about a request."""
    ask_writer(settings_of(config), "rights_note", ticket=ticket, note=note)


@rights.command("extend")
def rights_extend(
    ticket: Ticket,
    reason: Annotated[str, typer.Option(help="Told to the person.")],
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Take the longer time the law allows, once, with a letter that says why."""
    _act(config, as_json, "rights_extend", ticket=ticket, reason=reason)


@rights.command("refuse")
def rights_refuse(
    ticket: Ticket,
    ground: Annotated[str, typer.Option(help="Told to the person, with where to complain; no personal data.")],
    as_json: Json = False,
    config: Config = None,
) -> None:
    """End a request without doing what it asks."""
    _act(config, as_json, "rights_refuse", ticket=ticket, ground=ground)


@rights.command("withdraw")
def rights_withdraw(ticket: Ticket, as_json: Json = False, config: Config = None) -> None:
    """The person took the request back."""
    _act(config, as_json, "rights_withdraw", ticket=ticket)


@rights.command("close")
def rights_close(
    ticket: Ticket,
    note: Annotated[str, typer.Option(help="Told to the person: what was done by hand.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Done by your own hand."""
    _act(config, as_json, "rights_close", ticket=ticket, note=note)


@rights.command("lift")
def rights_lift(
    ticket: Ticket,
    reason: Annotated[str, typer.Option(help="Told to the person three days before.")],
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Announce that a restriction ends."""
    _act(config, as_json, "rights_lift", ticket=ticket, reason=reason)


@rights.command("letters")
def rights_letters(
    sent: Annotated[str, typer.Option(help="Name of a letter you have sent by your own hand: it is removed.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Letters that did not leave yet: files of the outbox, ready for any mail program."""
    settings = settings_of(config)
    if sent:
        known = ask_writer(settings, "rights_letter_sent", name=sent)
        show({"removed": known}, as_json, ["removed" if known else "there is no such letter"])
        if not known:
            raise typer.Exit(1)
        return
    told = ask_writer(settings, "rights_letters")
    lines = [f"{when(one['at'])}  {'refused' if one['failed'] else 'waits':<8} {one['name']}" for one in told]
    show(told, as_json, lines or ["no letters wait"])
