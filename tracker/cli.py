"""Commands of this floor: ``sales-push run tracker``. Imports what it runs only when it runs: ``--help`` stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer(no_args_is_help=True)
run = typer.Typer(no_args_is_help=True, help="One role alone, for systemd or containers.")
commands.add_typer(run, name="run")


@commands.callback()
def _floor() -> None:
    """Typer makes a lone command the program itself; a callback keeps the group a group."""


@run.callback()
def _roles() -> None:
    """The same, one level down."""


@run.command("tracker")
def run_tracker(
    index: Annotated[int, typer.Option(min=0, max=63, help="Number of this process on its host, from 0.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Configuration file; else $SALES_PUSH_CONFIG, else ./sales-push.toml."),
    ] = None,
) -> None:
    """The tracker: pixel, clicks, opt-out and preference pages. Start `workers` of them to share one port."""
    from datetime import UTC, datetime

    import uvloop

    from policy import logs, outlets
    from policy.settings import PolicySettings, load
    from tracker.settings import TrackerSettings

    settings, policy = load(TrackerSettings, config), load(PolicySettings, config)
    outlets.check(policy, (), datetime.now(UTC).date())  # visits go to Redis: this floor hands nothing to others itself
    logs.configure(f"tracker-{index}", policy.log_json, level=policy.log_level)
    uvloop.run(_serve(settings, policy, index))


async def _serve(settings: object, policy: object, index: int) -> None:
    """Until SIGTERM or SIGINT; a second one does not wait for anything."""
    import asyncio
    import contextlib
    import logging
    import signal
    import time

    from policy.settings import PolicySettings
    from policy.vitals import Vitals
    from tracker.app import build
    from tracker.settings import TrackerSettings

    assert isinstance(settings, TrackerSettings)
    assert isinstance(policy, PolicySettings)
    tracker, engine = build(settings, policy)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    try:
        port = await tracker.start()
        logging.getLogger("tracker").info("listening on port %d", port)
        beating = asyncio.create_task(Vitals(policy.data_dir, "tracker", index).beat(tracker.statistics, time.time))
        await ended.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
    finally:
        await tracker.stop()
        engine.dispose()
