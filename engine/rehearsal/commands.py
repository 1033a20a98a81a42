"""Commands of the rehearsal: ``sales-push demo`` and ``sales-push bench``. What they run is imported when it runs.

Both end with one line of JSON on standard output; with ``--json`` that is all there is, the rest goes to stderr. An
operator's environment does not reach a rehearsal: variables SALES_PUSH_* are put aside first.

Exit codes: 0 done and every equation holds, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

rehearsal_commands = typer.Typer(no_args_is_help=True)

Wait = Annotated[
    bool,
    typer.Option("--wait/--no-wait", help="Send nothing before the last audience entry is expanded (job field wait)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Only the line of JSON on standard output.")]
Workers = Annotated[int, typer.Option(min=0, max=64, help="Engine workers; 0 is one per core.")]


@rehearsal_commands.command()
def demo(
    recipients: Annotated[int, typer.Option(min=100, max=1_000_000, help="Size of the audience.")] = 20_000,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running and print the URLs.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="New folder for everything; default: a temporary one.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=5.0, max=3600.0, help="Seconds everything may wait, at most.")] = 140.0,
    workers: Workers = 0,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """A real campaign through every floor on this machine, with simulated providers and readers, proved at the end."""
    from engine.rehearsal.demo import play
    from engine.rehearsal.outcome import Plan

    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"sales-push demo: {folder} is not an empty folder", file=sys.stderr)
        raise typer.Exit(2)
    plan = Plan(recipients=recipients, folder=folder, deadline=deadline, lasting=keep, workers=workers, wait=wait)
    raise typer.Exit(_played(play(plan, _console(as_json), _machine)))


@rehearsal_commands.command()
def bench(
    recipients: Annotated[int, typer.Option(min=100, max=10_000_000, help="Messages to send.")] = 20_000,
    deadline: Annotated[float, typer.Option(min=5.0, max=86_400.0, help="Seconds it may take, at most.")] = 300.0,
    workers: Workers = 0,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """The same newsletter to one provider that accepts everything: messages per second, CPU per message."""
    from engine.rehearsal.bench import Plan, play

    plan = Plan(recipients=recipients, deadline=deadline, workers=workers, wait=wait)
    raise typer.Exit(_played(play(plan, _console(as_json), _machine)))


def _console(as_json: bool) -> Console:
    from rich.console import Console

    # Not a terminal: lines are as long as they are, a table has room.
    console = Console(stderr=as_json, highlight=False)
    return console if console.is_terminal else Console(stderr=as_json, highlight=False, width=140)


def _machine(line: str) -> None:
    print(line, flush=True)


def _played(play: Coroutine[Any, Any, int]) -> int:
    """Run it without an operator's variables. SIGTERM ends it like Ctrl-C: the stage is taken down in order."""
    import asyncio
    import signal

    async def watched() -> int:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await play

    for name in [name for name in os.environ if name.upper().startswith("SALES_PUSH_")]:
        del os.environ[name]
    try:
        return asyncio.run(watched())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        return 130
