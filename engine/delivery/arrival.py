"""How a worker begins: before it may lease anything, in this order (T6, T8, T12).

    reached     Redis answers, the writer has cleared this run of it (`policy.fence`), and it keeps our promises
    journal     a file of our own, in a folder that is ours alone
    replayed    what a dead worker of our place held of the intake is ours, its journal is carried out; after a restore
                of Redis, what the journals of our neighbours know is told again, too: they may come back later than
                leasing opens
    open        the epoch is open for leasing (`engine.queue.epoch`); until `Signs` says our epoch the writer waits

Laws: a worker waits for Redis as long as it takes, and says so; being told to stop, or Redis coming back older, ends
each of these steps at once, and the next worker begins it again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

from redis.exceptions import RedisError

from engine.delivery.departure import ended
from engine.delivery.replay import Tools, patiently, replay, tell_of_neighbours
from engine.queue.epoch import Epoch
from engine.queue.journal import Journal, JournalBroken, adopt, boot_id
from engine.queue.replay import paths, read_head
from policy import valkey
from policy.fence import Fence
from policy.vitals import Statistics

log = logging.getLogger(__name__)

UNREADY: Final = -1  # the epoch of a worker that has not replayed yet
SAID_SECONDS: Final = 10.0
JOURNAL_SECONDS: Final = 5.0


class Signs:
    """What this worker says about itself, from its first instant on. sources: more of it, as they come to be."""

    def __init__(self, epoch: Epoch) -> None:
        self.is_ready = False
        self.sources: list[Callable[[], Statistics]] = []
        self._epoch = epoch

    def __call__(self) -> Statistics:
        told: dict[str, int | float | Mapping[str, int | float]] = {}
        for source in self.sources:
            told.update(source())
        told["epoch"] = self._epoch.number if self.is_ready else UNREADY
        return told


async def reached(redis: valkey.Client, epoch: Epoch) -> None:
    """Until Redis answers and the writer has cleared it. Raises ServerRefused."""
    said_at = -math.inf
    while True:
        try:
            await epoch.look()
            for warning in await valkey.check_server(redis):
                log.warning("redis: %s", warning)
            epoch.is_synced = await valkey.is_synced(redis)
            return
        except (RedisError, OSError) as error:
            now = time.monotonic()
            if now - said_at > SAID_SECONDS:
                log.warning("waiting for Redis", extra={"fault": type(error).__name__})
                said_at = now
        await asyncio.sleep(0.1)


async def own_journal(folder: Path, holder: str, epoch: Epoch) -> Journal:
    """Ours to write. A neighbour may be reading what is in it (`tell_of_neighbours`): that takes a moment."""
    deadline = time.monotonic() + JOURNAL_SECONDS
    while True:
        try:
            return Journal.open(folder, holder, boot_id(), epoch=epoch.number, clock=epoch.now_us)
        except JournalBroken:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.1)


Inherit: TypeAlias = Callable[[Sequence[str]], Awaitable[None]]


async def replayed(
    root: Path, index: int, workers: int, tools: Tools, journal: Journal, holder: str, inherit: Inherit
) -> None:
    """root: data_dir/journal. Worker 0 also answers for places that are no longer filled; whoever was started there by
    hand lives and answers for himself. inherit: gets the holders of the dead, before their files go."""
    mine = [root / str(index)]
    if index == 0:
        mine += [path for path in _folders(root) if int(path.name) >= workers]
    await patiently(partial(inherit, holders_in(mine[0], holder)))
    await replay(mine[0], tools, ours=holder, retain=journal.retain)
    for folder in mine[1:]:
        try:
            with adopt(folder):
                await patiently(partial(inherit, holders_in(folder, holder)))
                await replay(folder, tools, ours=holder, retain=journal.retain)
        except JournalBroken:
            log.info("place %s is filled by a living worker", folder.name)
    if tools.epoch is not None and tools.epoch.is_restored:
        await tell_of_neighbours([path for path in _folders(root) if path not in mine], tools)


def holders_in(folder: Path, ours: str) -> list[str]:
    """Who wrote the journals of a folder that is ours, or adopted: its owner is dead."""
    return sorted({read_head(path).holder for path in paths(folder)} - {"", ours})


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.isdigit()) if root.is_dir() else []


async def unless_older(fence: Fence, work: Coroutine[Any, Any, Any]) -> bool:
    """Do this unless Redis comes back older meanwhile; whether it was done. Raises what it raises."""
    doing, older = asyncio.create_task(work), asyncio.create_task(fence.wait_older())
    try:
        await asyncio.wait([doing, older], return_when=asyncio.FIRST_COMPLETED)
        if fence.older:
            return False
        await doing
        return True
    finally:
        await ended([doing, older])
