"""The one console script: ``sales-push``.

Promise: every command of every floor in one tree, found by entry point ``sales_push.commands`` (each a typer app named
``commands``), so that no floor imports upward for it; groups of the same name grow together: ``run policy``,
``run tracker``, ``run engine`` and ``run ops`` come from three floors. It starts fast: rooms with commands import what
they need inside the command.

Exit codes, for every command: 0 done, 1 not found or failed, 2 wrong usage or configuration. What the operator can mend
is one clear line per mistake on stderr; a traceback is a bug of ours.

Rooms: `install` (init: folder, keys, database, first file), `records` (the DNS records to publish, pure), `reference`
(docs/configuration.md), `hosts` (list, let rest, declare dead).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

COMMANDS = "sales_push.commands"
SETTINGS = "sales_push.settings"
FLOORS = ("policy", "tracker", "engine")  # from the ground up: how files and help list them
_PARENT = "SALES_PUSH_PARENT"  # engine.supervisor.PARENT_VARIABLE, said again so that every --help need not import it

# What the operator can mend: module and class, the exit code, and what to add. Only modules already loaded can have
# raised, so asking costs no import.
_MENDABLE: dict[tuple[str, str], tuple[int, str]] = {
    ("policy.settings", "ConfigError"): (2, ""),
    ("policy.keys", "KeyringError"): (2, ""),
    ("policy.schema", "StoreError"): (2, ""),
    ("policy.writer", "WriterError"): (1, ""),
    ("policy.valkey", "ServerRefused"): (2, ""),
    ("policy.valkey", "EmbeddedServerError"): (1, ""),
    ("policy.wire", "WriterUnavailable"): (1, "the policy process does not answer: is `sales-push up` running?"),
    ("policy.wire", "WireError"): (1, ""),
    ("engine.settings", "KeyFileError"): (2, ""),
    ("engine.compiled", "CompileError"): (1, ""),
    ("engine.supervisor", "AlreadyRunning"): (1, ""),
    ("engine.cli.install", "InstallError"): (1, ""),
    ("policy.fence", "RunNotCleared"): (
        1,
        "Redis has not been compared with the database since it started: is `sales-push up` running?",
    ),
    ("redis.exceptions", "ConnectionError"): (1, "Redis does not answer: is `sales-push up` running?"),
}

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file; else $SALES_PUSH_CONFIG, else ./sales-push.toml."),
]

commands = typer.Typer(no_args_is_help=True)
run = typer.Typer(no_args_is_help=True, help="One role alone, for systemd or containers.")
commands.add_typer(run, name="run")


@commands.command()
def up(
    config: ConfigOption = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Engine workers instead of the setting.")] = None,
) -> None:
    """Run everything on this host: embedded Valkey (unless redis_url is set), policy, engine workers, tracker, ops."""
    import asyncio
    import logging

    from engine.settings import EngineSettings, dkim_files
    from engine.supervisor import Supervisor, roles_of
    from policy import logs
    from policy.keysource import source_of
    from policy.settings import CONFIG_VARIABLE, PolicySettings, config_file, load, load_all, table_of
    from policy.valkey import EmbeddedServer

    environment = dict(os.environ)
    if workers is not None:
        environment["SALES_PUSH_ENGINE_WORKERS"] = os.environ["SALES_PUSH_ENGINE_WORKERS"] = str(workers)
    if (file := config_file(config)) is not None:
        environment[CONFIG_VARIABLE] = str(file.absolute())
    models = settings_models()
    loaded = dict(zip(map(table_of, models), load_all(models, config), strict=True))  # every mistake of every floor now
    _check_outlets(config)
    policy, engine = load(PolicySettings, config), load(EngineSettings, config)
    trackers = int(getattr(loaded["tracker"], "workers", 1))  # the engine may not import the tracker's model
    source_of(policy).load()
    logs.configure("supervisor", policy.log_json, policy.log_level)
    if not dkim_files(engine, policy.keys_dir):
        log = logging.getLogger("sales_push.up")
        log.warning("no DKIM key yet: jobs are rejected until `sales-push init --domain …`")

    async def supervise() -> int:
        supervisor = Supervisor(
            engine.supervisor,
            policy.data_dir,
            roles_of(engine.worker_count, trackers),
            server=EmbeddedServer(policy.redis_socket.parent) if policy.embedded else None,
            writer_socket=policy.writer_socket,
            environment=environment,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
        return await supervisor.run()

    raise typer.Exit(asyncio.run(supervise()))


@commands.command("compile")
def compile_rooms(
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Translate the rooms on a message's way into machine code, for this interpreter: 5 % less CPU a message.

    Needs mypy (deploy/requirements-compile.txt), a C compiler and the interpreter's headers (Debian: gcc, python3-dev).
    What is compiled fits these very sources: after an update compile again. SALESPUSH_COMPILED=0 leaves it aside."""
    import json
    import time

    from rich.console import Console

    from engine import compiled

    began = time.monotonic()
    console = Console(stderr=True)
    with console.status("mypyc and the C compiler, about a minute"):
        where = compiled.build()
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        print(json.dumps({"ok": True, "folder": str(where), "rooms": len(compiled.ROOMS), "seconds": seconds}))
    else:
        print(f"{len(compiled.ROOMS)} rooms compiled in {seconds} s: {where}")


@run.command("engine")
def run_engine(
    index: Annotated[int, typer.Option(min=0, max=255, help="Number of this worker on its host, from 0.")] = 0,
    config: ConfigOption = None,
) -> None:
    """One engine worker: intake, queue, delivery."""
    from engine.worker import run_worker

    raise typer.Exit(run_worker(index, config))


@run.command("ops")
def run_ops(config: ConfigOption = None) -> None:
    """The metrics and health listener of this host."""
    from engine.ops.api import run_api

    raise typer.Exit(run_api(config))


def _check_outlets(config: Path | None) -> None:
    """Of all floors. Raises ConfigError when people's data would leave to somebody who is not declared (P-35, P-46)."""
    from engine.outlets import outlets, resolvers
    from engine.settings import EngineSettings
    from policy import subprocessors
    from policy.outlets import check, registry
    from policy.settings import PolicySettings, load

    policy, engine, today = load(PolicySettings, config), load(EngineSettings, config), datetime.now(UTC).date()
    check(policy, outlets(engine), today)
    for problem in subprocessors.undeclared(resolvers(engine), registry(policy), today):
        print(f"warning: {problem}", file=sys.stderr)


def _check_review(config: Path | None) -> None:
    """Of the policy's table. Raises ConfigError when the last review does not count any more (P-39)."""
    from policy import review
    from policy.settings import ConfigError, PolicySettings, Problem, load

    reviewed, today = load(PolicySettings, config).reviewed, datetime.now(UTC).date()
    if (told := review.words(reviewed, today)) is None:
        return
    problem = Problem(review.SETTING, *told)
    if review.standing(reviewed, today).is_wrong:
        raise ConfigError([problem])
    print(f"warning: {problem}", file=sys.stderr)


@commands.command()
def config(
    config: ConfigOption = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only say whether it is right, was reviewed and tells strangers nothing; exit code 2 if not.",
        ),
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference of all settings (make docs).")] = False,
) -> None:
    """Print the effective configuration as commented TOML: meaning, range and origin of every setting."""
    from policy.settings import annotate, config_file, load_all

    models = settings_models()
    if markdown:
        from engine.cli.reference import reference

        print(reference(models), end="")
        return
    load_all(models, config)
    if check:
        _check_outlets(config)
        _check_review(config)
        file = config_file(config)
        print(f"{file if file is not None else 'defaults and environment'}: no mistakes")
        return
    print(annotate(models, config), end="")


@commands.command()
def init(
    config: Annotated[Path, typer.Option("--config", help="The file to write; kept as it is if it exists.")] = Path(
        "sales-push.toml"
    ),
    data_dir: Annotated[str, typer.Option(help="Data folder, relative to the file.")] = "sales-push-data",
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="From domain to make DKIM keys for; may be repeated.")
    ] = None,
    selector: Annotated[str, typer.Option(help="DKIM selector; the Ed25519 key gets the same with -ed.")] = "",
    account: Annotated[str, typer.Option(help="Name of the first account.")] = "default",
    officer_name: Annotated[str, typer.Option(help="Privacy officer (P-04).")] = "",
    officer_address: Annotated[str, typer.Option(help="Role mailbox of the privacy officer (P-04).")] = "",
    public_url: Annotated[str, typer.Option(help="Base of pixel, click and opt-out pages; https in production.")] = "",
    bounce_domain: Annotated[str, typer.Option(help="Domain of return paths; default bounce.<first domain>.")] = "",
    hostname: Annotated[str, typer.Option(help="EHLO name of this host.")] = "",
    display_name: Annotated[str, typer.Option(help="Sender's name in footers and notices.")] = "",
    postal_address: Annotated[str, typer.Option(help="Postal address in footers (CAN-SPAM, CASL).")] = "",
) -> None:
    """Make what is missing: configuration, data folder, keys, DKIM keys, database, account; print the DNS records.

    Nothing that exists is changed, so it may be run again, for example for another --domain.
    """
    from engine.cli.install import Answers, install

    answers = Answers(
        config=config,
        data_dir=data_dir,
        domains=tuple(domain or ()),
        selector=selector,
        account=account,
        officer_name=officer_name,
        officer_address=officer_address,
        public_url=public_url,
        bounce_domain=bounce_domain,
        hostname=hostname,
        display_name=display_name,
        postal_address=postal_address,
    )
    for line in install(answers, settings_models()):
        print(line)


def settings_models() -> list[type[BaseSettings]]:
    """The settings model of every floor, ground floor first."""
    found = {entry.name: entry for entry in entry_points(group=SETTINGS)}
    return [found[name].load() for name in _ordered(found)]


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (FLOORS.index(name) if name in FLOORS else len(FLOORS), name))


def assembled() -> typer.Typer:
    """The whole tree: apps by entry point, and the engine's rooms that bring commands of their own."""
    from engine.campaign.commands import campaign_commands
    from engine.cli.hosts import host_commands
    from engine.rehearsal.commands import rehearsal_commands

    found = {entry.name: entry for entry in entry_points(group=COMMANDS)}
    if not found:
        raise SystemExit("sales-push is not installed, so its commands cannot be found: run `make .venv/dev`")
    apps = [found[name].load() for name in _ordered(found)]
    return merged([*apps, campaign_commands, rehearsal_commands, host_commands])


def merged(apps: Iterable[typer.Typer]) -> typer.Typer:
    """One app out of many. Groups of the same name become one; two commands of the same name are a mistake of ours."""
    whole = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # its frames show local variables when asked to: addresses, keys
        help="Send campaigns by SMTP, know what became of every recipient, keep the privacy policy by construction.",
    )
    _pour(apps, whole)
    return whole


def _pour(apps: Iterable[typer.Typer], into: typer.Typer) -> None:
    groups: dict[str, list[typer.Typer]] = {}
    helps: dict[str, str] = {}
    taken: set[str] = set()
    for app in apps:
        for command in app.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "").replace("_", "-")
            if name in taken:
                raise RuntimeError(f"two floors bring a command named {name!r}")
            taken.add(name)
            into.registered_commands.append(command)
        for group in app.registered_groups:
            if group.typer_instance is None or not isinstance(group.name, str):
                raise RuntimeError("a group of commands needs a name: add_typer(app, name=...)")
            groups.setdefault(group.name, []).append(group.typer_instance)
            said = group.help if isinstance(group.help, str) else group.typer_instance.info.help
            if isinstance(said, str) and group.name not in helps:
                helps[group.name] = said
    if clash := taken & groups.keys():
        raise RuntimeError(f"both a command and a group are named {sorted(clash)}")
    for name, members in groups.items():
        joined = typer.Typer(no_args_is_help=True, help=helps.get(name))
        _pour(members, joined)
        into.add_typer(joined, name=name)


def mendable(error: BaseException) -> tuple[int, list[str]] | None:
    """Exit code and lines for an error the operator can mend, None for a bug of ours."""
    for (module, name), (code, advice) in _MENDABLE.items():
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and isinstance(error, known):
            problems = getattr(error, "problems", None)
            lines = [str(problem) for problem in problems] if problems else [advice or str(error)]
            return code, lines
    store = sys.modules.get("sqlalchemy.exc")
    if store is not None and isinstance(error, store.OperationalError) and error.statement is None:  # no connection
        return 1, ["the database does not answer: is it up, and is [policy] sql_url right?"]
    return None


def main() -> None:
    """Entry point of the console script."""
    if _PARENT in os.environ:
        from engine.supervisor import die_with_parent

        die_with_parent(os.environ)
    try:
        assembled()()
    except Exception as error:
        told = mendable(error)
        if told is None:
            raise
        code, lines = told
        for line in lines:
            print(f"sales-push: {line}", file=sys.stderr)
        raise SystemExit(code) from None
