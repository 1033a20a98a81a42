"""Commands of the ground floor: the writer's role, suppressions, figures, people and their rights, keys, copies.

Promise: what changes something goes through the writer's socket and is in force when the command returns; what shows
figures reads SQL (``mode=ro``) and works while nothing runs; what shows somebody's data names its purpose and is
written down by the writer first (`readings`, P-38). ``--json`` prints one document a command, instants in
microseconds. Exit codes: 0 done, 1 not found or failed, 2 wrong usage or configuration.

An address typed here goes into no log, and in clear into no store: it becomes a keyed tag, and only `rights open` and
`erase` hand it to the writer's socket, where it is sealed with the request or used and forgotten. Rooms import what
they run only when it runs: ``--help`` stays fast.

Rooms: `asking` (what every command needs), `readings` (who reads, why), `suppressions`, `figures` (status, why), `work`
(jobs), `holders` (accounts), `destinations` (domains written to), `erasing`, `rights`, `retention` (policy, hold),
`exporting` (ledger, bundle, report), `audit` (chain, disclosures, consent history, purposes), `keys`, `backup`.
"""

from __future__ import annotations

import asyncio

import typer

from policy.cli.asking import Config, fail
from policy.cli.audit import audit, consent, disclosure, purposes
from policy.cli.backup import backup, backups, restore
from policy.cli.destinations import domain
from policy.cli.erasing import erase, erasures
from policy.cli.exporting import bundle, ledger, report
from policy.cli.figures import status, why
from policy.cli.holders import account
from policy.cli.keys import keys
from policy.cli.retention import hold, policy
from policy.cli.rights import rights
from policy.cli.suppressions import suppress
from policy.cli.work import jobs

commands = typer.Typer(no_args_is_help=True)
run = typer.Typer(no_args_is_help=True, help="One role alone, for systemd or containers.")
commands.add_typer(run, name="run")
commands.add_typer(suppress, name="suppress")
commands.add_typer(jobs, name="jobs")
commands.add_typer(account, name="account")
commands.add_typer(domain, name="domain")
commands.add_typer(keys, name="keys")
commands.add_typer(audit, name="audit")
commands.add_typer(disclosure, name="disclosure")
commands.add_typer(consent, name="consent")
commands.command("purposes")(purposes)
commands.add_typer(policy, name="policy")
commands.add_typer(hold, name="hold")
commands.add_typer(rights, name="rights")
commands.add_typer(ledger, name="ledger")
commands.add_typer(bundle, name="bundle")
commands.command("report")(report)
commands.command("backup")(backup)
commands.command("backups")(backups)
commands.command("restore")(restore)
commands.command("erase")(erase)
commands.command("erasures")(erasures)
commands.command("status")(status)
commands.command("why")(why)


@commands.callback()
def _floor() -> None:
    """Typer makes a lone command the program itself; a callback keeps the group a group."""


@run.callback()
def _roles() -> None:
    """The same, one level down."""


@run.command("policy")
def run_policy(config: Config = None) -> None:
    """The policy process: the one SQL writer, on its unix socket. One a data folder."""
    import signal

    import uvloop

    from policy import logs
    from policy.settings import PolicySettings, load
    from policy.writer import WriterError, serve

    settings = load(PolicySettings, config)
    logs.configure("policy", settings.log_json, settings.log_level)

    async def until_told() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(settings, stop)

    try:
        uvloop.run(until_told())
    except WriterError as error:
        fail(str(error))
