"""What every command of this floor needs: its options, the settings, the writer, the ledger, one way to fail."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from policy.keys import Keyring
    from policy.ledger import Reader
    from policy.settings import PolicySettings

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file; else $SALES_PUSH_CONFIG, else ./sales-push.toml."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
Scope = Annotated[str, typer.Option("--scope", help="platform, account, list or topic.")]
Because = Annotated[str, typer.Option("--reason", help="For the record.")]
Of = Annotated[str, typer.Option("--of", help="Which account (acme), list or topic (acme/news).")]


def settings_of(config: Path | None) -> PolicySettings:
    from policy import logs
    from policy.settings import PolicySettings, load

    settings = load(PolicySettings, config)
    logs.configure("cli", json=False, level="warning")
    return settings


def keyring_of(settings: PolicySettings) -> Keyring:
    from policy.keysource import source_of

    return source_of(settings).load()


def reader_of(settings: PolicySettings) -> Reader:
    from policy.ledger import Reader
    from policy.schema import open_store

    if not settings.sql_url and not (settings.data_dir / "policy.db").exists():
        fail(f"there is no database in {settings.data_dir}: run `sales-push init`, then `sales-push up`")
    return Reader(open_store(settings.sql_address(), writer=False))


def ask_writer(settings: PolicySettings, op: str, **kwargs: Any) -> Any:
    """One call to the writer; its refusal is one line and exit code 1."""
    from policy.wire import WireError, WriterUnavailable, ask

    try:
        return asyncio.run(ask(settings.writer_socket, op, **kwargs))
    except WireError as error:
        fail(error.text)
    except WriterUnavailable:
        fail("the policy process does not answer: is `sales-push up` running?")


def fail(text: str, code: int = 1) -> NoReturn:
    print(text, file=sys.stderr)
    raise typer.Exit(code)


def show(document: Any, as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        print(json.dumps(document, ensure_ascii=False))
    else:
        for line in lines:
            print(line)


def when(at: int | None) -> str:
    from policy.instants import rfc3339

    return rfc3339(at)[:19] + "Z" if at else "-"


def now_us() -> int:
    from policy.writer import clock_us

    return clock_us()
