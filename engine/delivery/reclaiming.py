"""Reclaiming: leases of dead holders of this host go back to the lanes (decision 6, promise T3).

Laws; only a holder of whom all of this is true is reclaimed:
- its heartbeat counter stood still for a full lease by *our* monotonic clock, over looks that came in time: were we
  stopped, or Redis away, the others may have been, too, and the watch begins anew;
- it is of this host, and no journal file in our data folder names it: a file means that it lives (SIGSTOP included) or
  that its journal is still to be replayed, which comes first (promises.md 1). Another host's dead are declared by hand;
- the registry (`policy.hosts`) does not know it as a living one, nor as one of another data folder of this host.
And `reclaim.lua` compares the counter again: a heartbeat between our look and the script wins.

How such a holder comes to be: its worker ended in order while Redis was away and could not hand back; its journal was
lost or unreadable; its folder was replayed and taken away while a lease call of it was still on its way to Redis.

Cost: one pipeline of 64 HGETALL of tiny hashes and one of the registry, every third of a lease.

Known limits: a registry entry of another data folder of this host that died is left to that folder or to `host forget`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.queue.lanes import Lanes
from engine.queue.replay import paths, read_head
from policy import hosts
from policy.crashpoints import reach

log = logging.getLogger(__name__)

LOOKS = 3  # a lease: one more and the watch costs more, one less and a dead worker's slices wait two leases


class Reclaiming:
    """One per worker; any number of them agree, because the counter is compared in the script.

    journals: data_dir/journal, one folder a worker of this host; home: of our registry entries; lease: seconds.
    """

    def __init__(
        self,
        redis: Redis,
        lanes: Lanes,
        journals: Path,
        lease: float,
        *,
        home: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reclaimed = 0
        self._redis = redis
        self._lanes = lanes
        self._journals = journals
        self._lease = lease
        self._home = home
        self._clock = clock
        self._host = hosts.host_of(lanes.holder)
        self._counters: dict[tuple[int, str], tuple[int, float]] = {}  # (partition, holder): where it stands, since
        self._signs: dict[str, tuple[int, float]] = {}  # holder: what the registry says, since
        self._looked = float("-inf")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._lease / LOOKS)
            try:
                await self.look()
            except (RedisError, OSError) as error:
                self._counters.clear()
                self._signs.clear()
                log.info("the dead are looked for again later", extra={"fault": type(error).__name__})

    async def look(self) -> int:
        """One look; how many slices went back. Raises RedisError, OSError."""
        counters = {place: count for place, count in (await self._lanes.all_holders()).items() if self._is_ours(place)}
        registry = await hosts.read(self._redis)
        now = self._clock()
        if now - self._looked > 2 * self._lease / LOOKS:
            self._counters.clear()
            self._signs.clear()
        self._looked = now
        self._counters = _watched(self._counters, counters, now)
        signs = {worker.holder: worker.at for worker in registry.of(self._host)}
        self._signs = _watched(self._signs, signs, now)
        elsewhere = {worker.holder for worker in registry.of(self._host) if worker.home and worker.home != self._home}
        still = {
            (partition, holder): count
            for (partition, holder), (count, since) in self._counters.items()
            if now - since >= self._lease and holder not in elsewhere and not self._has_moved(holder, now)
        }
        if not still:
            return 0
        named = await asyncio.to_thread(names, self._journals)
        back = 0
        for (partition, holder), count in still.items():
            if holder not in named:
                back += await self._reclaim(partition, holder, count)
        return back

    def _is_ours(self, place: tuple[int, str]) -> bool:
        """Of this host, and not this very worker."""
        _, holder = place
        return hosts.host_of(holder) == self._host and holder != self._lanes.holder

    def _has_moved(self, holder: str, now: float) -> bool:
        """Whether the registry heard of it within a lease."""
        return holder in self._signs and now - self._signs[holder][1] < self._lease

    async def _reclaim(self, partition: int, holder: str, count: int) -> int:
        reach("before-reclaim")
        taken = await self._lanes.reclaim(partition, holder, count)
        reach("after-reclaim")
        self._counters.pop((partition, holder), None)
        if not taken:
            return 0  # it moved after all, or left a counter and no lease
        self.reclaimed += taken
        log.warning("slices of a dead worker go back", extra={"partition": partition, "slices": taken})
        return taken


def names(journals: Path) -> set[str]:
    """Every holder that a journal file of this host names, replayed or not. Raises OSError."""
    found: set[str] = set()
    if journals.is_dir():
        for folder in journals.iterdir():
            for path in paths(folder):
                try:
                    found.add(read_head(path).holder)
                except FileNotFoundError:  # carried out in this moment: its leases went back before
                    continue
    return found


T = TypeVar("T")


def _watched(before: Mapping[T, tuple[int, float]], seen: Mapping[T, int], now: float) -> dict[T, tuple[int, float]]:
    """For each thing where it stands and since when. What has gone is forgotten."""
    return {
        what: (count, before[what][1] if what in before and before[what][0] == count else now)
        for what, count in seen.items()
    }
