"""``sales-push domain``: domains written to, halted by hand while something is wrong there.

Known limits: a halt is of one domain by its name, whatever hosts take its mail; a site as a whole backs off by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from policy.cli.asking import Because, Config, Json, ask_writer, reader_of, settings_of, show, when

domain = typer.Typer(no_args_is_help=True, help="Domains written to: pause, resume, cancel.")
DomainName = Annotated[str, typer.Argument(help="The domain, as in addresses: example.org.")]


def _halt(name: str, act: str, reason: str, as_json: bool, config: Path | None) -> None:
    told = ask_writer(settings_of(config), "halt_domain", domain=name, act=act, reason=reason)
    show({"domain": name, "state": told["state"], "changed": told["changed"]}, as_json, [f"{name}: {told['state']}"])


@domain.command("pause")
def domain_pause(name: DomainName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Send nothing to a domain until it is resumed; who waits too long expires as always."""
    _halt(name, "pause", reason, as_json, config)


@domain.command("resume")
def domain_resume(name: DomainName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Write to a paused or cancelled domain again."""
    _halt(name, "resume", reason, as_json, config)


@domain.command("cancel")
def domain_cancel(name: DomainName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Whoever waits at a domain ends as cancelled, and whoever comes, until it is resumed."""
    _halt(name, "cancel", reason, as_json, config)


@domain.command("list")
def domain_list(as_json: Json = False, config: Config = None) -> None:
    """Domains that are paused or cancelled."""
    reader = reader_of(settings_of(config))
    try:
        found = [halt for halt in reader.halts() if halt.domain]
    finally:
        reader.close()
    told = [{"domain": one.domain, "state": one.state, "reason": one.reason, "since": one.since} for one in found]
    lines = [f"{one.state:<9} {when(one.since)}  {one.domain}  {one.reason}".rstrip() for one in found]
    show(told, as_json, lines or ["no domain is halted"])
