"""Commands of the rehearsal: ``sales-push demo`` and ``sales-push bench``. What they run is imported when it runs.

Both end with one line of JSON on standard output; with ``--json`` that is all there is, the rest goes to stderr. An
operator's environment does not reach a rehearsal: variables SALES_PUSH_* are put aside first.

Exit codes: 0 done and every equation holds, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

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
    recipients: Annotated[
        str, typer.Option(help="Messages to send: 20000, 100k, 1M; several with commas, one run after another.")
    ] = "20k",
    sink: Annotated[
        str, typer.Option(help="Who receives: own, postfix (its smtp-sink) or smtpd (a whole Postfix, discarding).")
    ] = "own",
    mix: Annotated[
        bool, typer.Option("--mix", help="The sink refuses 10 % and puts 5 % off, in providers' words.")
    ] = False,
    smart: Annotated[
        bool,
        typer.Option("--smart", help="The sink takes 50 ms a message, puts off 5 %, refuses 1 %; 1,000 connections."),
    ] = False,
    fast: Annotated[
        bool | None,
        typer.Option("--fast/--no-fast", help="Sign by multi-buffer RSA or by OpenSSL; default: as configured."),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="STARTTLS, with a certificate made for the run.")] = False,
    chunking: Annotated[bool, typer.Option("--chunking", help="Our sink offers CHUNKING (BDAT).")] = False,
    domains: Annotated[int, typer.Option(min=1, max=1_000_000, help="Recipient domains, all at one site.")] = 20,
    one_domain: Annotated[bool, typer.Option("--one-domain", help="The same as --domains 1.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Write a chart (SVG) of the last run to this file.")] = None,
    deadline: Annotated[
        float, typer.Option(min=0.0, max=86_400.0, help="Seconds a run may take; 0 is 300, and more above 60,000.")
    ] = 0.0,
    workers: Workers = 0,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """The newsletter to one provider, from the first XADD to the last ledger row: messages/s, CPU, memory, latency."""
    from engine.rehearsal import strangers
    from engine.rehearsal.bench import Plan, play

    counts = _counts(recipients)
    for wrong, text in (
        (sink not in ("own", *strangers.KINDS), f"--sink {sink}: one of own, {', '.join(strangers.KINDS)}"),
        (mix and smart, "--mix and --smart are two scenes: give one of them"),
        ((mix or smart) and sink == "postfix", "--mix, --smart: smtp-sink takes everything; use --sink smtpd or own"),
        (chunking and sink != "own", "--chunking is our sink's: leave --sink out"),
        (tls and sink == "postfix", "--tls: smtp-sink has no STARTTLS; use --sink smtpd, or our own"),
        (one_domain and domains not in (1, 20), "--one-domain and --domains contradict each other: give one of them"),
        (chart is not None and not chart.absolute().parent.is_dir(), f"--chart {chart}: there is no such folder"),
        (chart is not None and chart.is_dir(), f"--chart {chart} is a folder: name a file in it"),
    ):  # fmt: skip
        if wrong:
            _refuse(text)
    if sink != "own" and (lacking := strangers.missing(sink)):
        _refuse(f"--sink {sink}: {lacking}")
    plan = Plan(
        recipients=counts, deadline=deadline, workers=workers, wait=wait, sink=sink,
        scene="mix" if mix else "smart" if smart else "plain", domains=1 if one_domain else domains,
        fast=fast, tls=tls, chunking=chunking, chart=chart,
    )  # fmt: skip
    raise typer.Exit(_played(play(plan, _console(as_json), _machine)))


_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmM]?)")


def _counts(text: str) -> tuple[int, ...]:
    """``10k,100k,1M`` -> numbers; what is none ends with code 2."""
    found = []
    for word in text.replace("_", "").split(","):
        match = _COUNT.fullmatch(word.strip())
        count = round(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]) if match else 0
        if not 100 <= count <= 10_000_000:
            _refuse(f"--recipients {word.strip() or text!r}: a number from 100 to 10M, as 20000, 100k or 1M")
        found.append(count)
    return tuple(found)


def _refuse(text: str) -> NoReturn:
    print(f"sales-push bench: {text}", file=sys.stderr)
    raise typer.Exit(2)


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
