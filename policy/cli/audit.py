"""``sales-push audit``, ``disclosure``, ``consent`` and ``purposes``: the proofs of what was done, and their registry.

``audit export`` and the documents of ``audit checkpoints`` are what a stranger checks with
``python -m policy.verifier`` and the key of ``audit key``; ``audit verify`` asks the same questions here, where the
database is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy.cli.asking import Config, Json, ask_writer, fail, keyring_of, now_us, settings_of, show, when
from policy.cli.readings import SUPPORT, Law, Purpose, actor_here, ask_to_read

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from policy.settings import PolicySettings

audit = typer.Typer(no_args_is_help=True, help="The chain of what was done, and its checkpoints.")
disclosure = typer.Typer(no_args_is_help=True, help="To whom else data of people went.")
consent = typer.Typer(no_args_is_help=True, help="Who agreed to what.")

Out = Annotated[Path, typer.Argument(help="File to write; must not exist yet.")]


def _store(settings: PolicySettings) -> Engine:
    from policy.schema import open_store

    if not settings.sql_url and not (settings.data_dir / "policy.db").exists():
        fail(f"there is no database in {settings.data_dir}: run `sales-push init`, then `sales-push up`")
    return open_store(settings.sql_address(), writer=False)


@audit.command("verify")
def audit_verify(
    checkpoints: Annotated[
        list[Path] | None, typer.Option("--checkpoints", help="Folder or file of checkpoints kept elsewhere.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option("--key", help="Public key; the one in the keys folder else.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Whether the chain is whole, by the checkpoints kept here and those kept elsewhere. Exit code 1: it is not."""
    from policy import verifier
    from policy.audit import export
    from policy.checkpoints import AuditKeys, documents
    from policy.keys import KeyringError

    settings = settings_of(config)
    engine = _store(settings)
    try:
        with engine.connect() as conn:
            known = documents(conn)
            elsewhere = [*verifier.checkpoint_lines(checkpoints or ())]
            keys = verifier.public_keys(key or ())
            if (known or elsewhere) and not keys:
                keys = list(AuditKeys.load(settings.keys_dir).public.values())
            report = verifier.check(export(conn), [*known, *elsewhere], keys)
    except (OSError, ValueError, KeyringError) as error:
        fail(str(error), 2)
    finally:
        engine.dispose()
    told: dict[str, Any] = {**asdict(report), "whole": report.is_whole}
    show(told, as_json, verifier.told(report))
    if not report.is_whole:
        raise typer.Exit(1)


@audit.command("export")
def audit_export(
    out: Out,
    since: Annotated[int, typer.Option(help="Number of the first line.", min=1)] = 1,
    config: Config = None,
) -> None:
    """The chain as JSON Lines, for `python -m policy.verifier`. No line names anybody."""
    from policy.audit import export

    engine = _store(settings_of(config))
    count = 0
    try:
        with engine.connect() as conn, out.open("xb") as file:
            for line in export(conn, since):
                file.write(line)
                count += 1
    except OSError as error:
        fail(f"{out}: {error.strerror}", 2)
    finally:
        engine.dispose()
    print(f"{count} lines")


@audit.command("checkpoints")
def audit_checkpoints(out: Out, config: Config = None) -> None:
    """Every checkpoint still kept here, one a line."""
    from policy.checkpoints import documents

    engine = _store(settings_of(config))
    try:
        with engine.connect() as conn:
            found = documents(conn)
        with out.open("xb") as file:
            file.writelines(found)
    except OSError as error:
        fail(f"{out}: {error.strerror}", 2)
    finally:
        engine.dispose()
    print(f"{len(found)} checkpoints")


@audit.command("checkpoint")
def audit_checkpoint(as_json: Json = False, config: Config = None) -> None:
    """Sign the chain as it is now and take that elsewhere. Exit code 1: a place did not take it."""
    told = ask_writer(settings_of(config), "checkpoint")
    line = "signed" if told["made"] else "nothing new since the last one"
    show(told, as_json, [line, *([f"{told['waiting']} are not elsewhere yet"] if told["waiting"] else [])])
    if told["waiting"]:
        raise typer.Exit(1)


@audit.command("key")
def audit_key(config: Config = None) -> None:
    """The public keys that checkpoints are verified with: keep them where the checkpoints are."""
    from policy.checkpoints import AuditKeys
    from policy.keys import KeyringError

    try:
        keys = AuditKeys.load(settings_of(config).keys_dir).public
    except KeyringError as error:
        fail(str(error))
    for name, public in keys.items():
        print(f"{name} {public.hex()}")


@audit.command("bypasses")
def audit_bypasses(
    since: Annotated[str, typer.Option(help="Counted from, RFC 3339; all that is kept when absent.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """For the transparency report: how often consent was passed over, by law and case (P-32)."""
    from policy.instants import parse_rfc3339

    try:
        after = parse_rfc3339(since) if since else 0
    except ValueError as error:
        fail(str(error), 2)
    told = ask_writer(settings_of(config), "bypasses", since=after)
    show(told, as_json, [f"{count:>6}  {law}" for law, count in told.items()] or ["none"])


@disclosure.command("add")
def disclosure_add(
    recipient: Annotated[str, typer.Argument(help="Who got the data: the recipient itself, by name (C-154/21).")],
    basis: Annotated[str, typer.Option(help='Law and case: "PIPEDA 7(3)(c): order 26-118".')],
    what: Annotated[str, typer.Option(help="Which categories of data.")],
    purpose: Annotated[str, typer.Option(help="authority, court, regulator, business-transfer, instruction, …")],
    address: Annotated[str, typer.Option(help="Whose; none: everybody of the account.")] = "",
    account: Annotated[str, typer.Option(help="At which account; none: at every one.")] = "",
    count: Annotated[int, typer.Option(help="How many people, of an account.", min=0)] = 1,
    at: Annotated[str, typer.Option(help="When, RFC 3339; now when absent.")] = "",
    gag_until: Annotated[str, typer.Option(help="Not to be told before, RFC 3339.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Write down that data went to somebody: the people concerned are told when they ask (P-33)."""
    from policy.address import AddressError, normalise, parse, tag_of
    from policy.instants import parse_rfc3339

    settings = settings_of(config)
    keyring = keyring_of(settings)
    try:
        instants = [parse_rfc3339(text) if text else 0 for text in (at, gag_until)]
        mailbox = parse(address) if address else None
    except AddressError as error:
        fail(f"that is not an address ({error.reason})", 2)
    except ValueError as error:
        fail(str(error), 2)
    tag = tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain)) if mailbox is not None else b""
    lines = ask_writer(
        settings, "disclose", actor=actor_here(keyring), recipient=recipient, purpose=purpose, basis=basis,
        what=what, tag=tag, account=account, count=count, at=instants[0], gag_until=instants[1],
    )  # fmt: skip
    show({"lines": lines}, as_json, [f"{lines} lines"])


@disclosure.command("list")
def disclosure_list(
    most: Annotated[int, typer.Option(help="How many, the newest first.", min=1)] = 100,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """What was written down, gags included. People are numbers here."""
    from policy.disclosures import listed

    engine = _store(settings_of(config))
    try:
        with engine.connect() as conn:
            found = listed(conn, most=most)
    finally:
        engine.dispose()
    now = now_us()
    lines = [
        f"{when(one.at)}  {one.recipient}: {one.what}, {one.purpose} ({one.basis}), "
        + (f"subject {one.subject}" if one.subject else f"account {one.account}, {one.count} people")
        + (f"  not to be told before {when(one.gag_until)}" if one.gag_until and one.gag_until > now else "")
        for one in found
    ]
    show([asdict(one) for one in found], as_json, lines or ["nothing was written down"])


@consent.command("history")
def consent_history(
    address: Annotated[str, typer.Argument(help="Whose.")],
    purpose: Purpose = SUPPORT,
    law: Law = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Everything somebody agreed to and took back, at every account. Exit code 1: nothing is known. The reading is
    written down."""
    from policy.address import normalise, parse, tag_of
    from policy.consent import history
    from policy.schema import account, subject

    settings = settings_of(config)
    keyring = keyring_of(settings)
    ask_to_read(settings, keyring, purpose, "consent history", address=address, law=law)
    mailbox = parse(address)  # it is one: asked above
    tag = tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain))
    engine = _store(settings)
    found: list[dict[str, Any]] = []
    try:
        with engine.connect() as conn:
            for row in conn.execute(account.select().order_by(account.c.number)).all():
                mine = subject.select().where(subject.c.account == row.number, subject.c.tag == tag)
                for person in conn.execute(mine).all():
                    found += [{"account": row.name, **asdict(act)} for act in history(conn, person.number)]
    finally:
        engine.dispose()
    show(found, as_json, _acts(found))
    if not found:
        raise typer.Exit(1)


def _acts(found: list[dict[str, Any]]) -> Iterator[str]:
    for act in found:
        ends = f", ends {when(act['expires_at'])}" if act["expires_at"] else ""
        said = "withdrew" if act["withdrawn"] else f"agreed ({act['basis']}{ends})"
        line = f"{when(act['given_at'])}  {act['account']}  {act['purpose']}: {said}, {act['source']} {act['wording']}"
        yield line.rstrip()
    if not found:
        yield "nothing is known of this address"


def purposes(as_json: Json = False) -> None:
    """What data may be read for here, which fields, since when. Everything else is denied."""
    from policy.purposes import registry

    found = [{**asdict(one), "reads": sorted(one.reads)} for one in registry().purposes.values()]
    lines = []
    for one in found:
        reads = " ".join(one["reads"])
        lines.append(f"{one['name']:<16} {reads:<9} {one['basis']:<20} {when(one['since'])[:10]}  {one['what']}")
    show(found, as_json, lines)
