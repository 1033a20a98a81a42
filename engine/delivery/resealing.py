"""Re-sealing: slices that still wait move to this week's queue key, so that old keys can be destroyed (decision 3).

Laws:
- only slices that wait, and only as they were read, are changed: compare and swap in reseal.lua; maps, date, token and
  due stay, so nobody can tell from outside but by the key id;
- two walks at once, on two hosts, do no harm: the later one finds nothing left or is refused;
- it gives way: as much rest as work on an idle worker, nine times as much beside deliveries, none done in trouble.

The path: an hour after the last walk, or `GRACE_SECONDS` after a new week's key came (by then every process of the host
seals with it) · a walk over all slices, a few hundred keys at a time · those under an older key are read, opened,
sealed anew and swapped, `BATCH` at a time. What is leased meanwhile is sealed anew when it is retried, or by the next
walk: a key lives for 14 days after its week (`policy.keys.destroy_old`), 336 walks.

Known limits: a slice that no key opens is counted and left: its recipients end `lost`, with an alarm, when it is due.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from redis.exceptions import RedisError

from engine.queue.slices import KEY_ID, Lost, resealed
from engine.queue.sweeps import Seen, Sweeps
from policy.crashpoints import reach
from policy.keys import Keyring

log = logging.getLogger(__name__)

EVERY_SECONDS = 3600.0
GRACE_SECONDS = 120.0
LOOK_SECONDS = 5.0
SCAN_KEYS = 200
BATCH = 16  # slices sealed between two turns of the loop: at most 512 KiB, half a millisecond
REST_IDLE, REST_BUSY = 1.0, 9.0  # rest for each second of work


@dataclass(frozen=True, slots=True)
class Walked:
    """One walk. old: slices under an older key; resealed: of those; unopenable: no key opens them."""

    slices: int = 0
    old: int = 0
    resealed: int = 0
    unopenable: int = 0


class Resealing:
    """One per host. keyring: asked each time; is_busy: deliveries are under way; must_wait: Redis is in trouble."""

    def __init__(
        self,
        sweeps: Sweeps,
        keyring: Callable[[], Keyring],
        *,
        is_busy: Callable[[], bool],
        must_wait: Callable[[], bool],
        every: float = EVERY_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._sweeps = sweeps
        self._keyring = keyring
        self._is_busy = is_busy
        self._must_wait = must_wait
        self._every = every
        self._grace = grace
        self._walks = 0
        self._resealed = 0
        self._unopenable = 0

    def statistics(self) -> dict[str, int]:
        return {
            "reseal_walks": self._walks,
            "slices_resealed": self._resealed,
            "slices_unopenable": self._unopenable,  # at the last walk
        }

    async def run(self) -> None:
        """Until cancelled."""
        key_id = self._keyring().queue_id
        at = time.monotonic() + self._grace
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, at - time.monotonic())))
            now = time.monotonic()
            if self._keyring().queue_id != key_id:
                key_id = self._keyring().queue_id
                at = now + self._grace
            if now < at:
                continue
            try:
                await self.walk()
                at = time.monotonic() + self._every
            except (RedisError, OSError) as error:
                log.info("re-sealing goes on later", extra={"fault": type(error).__name__})
                at = time.monotonic() + self._grace
            except Exception:  # a mistake of ours must not end it for the life of the worker
                log.exception("re-sealing failed, it is tried again in an hour")
                at = time.monotonic() + self._every

    async def walk(self) -> Walked:
        """All slices once. Raises RedisError or ConnectionError: what was swapped by then stays swapped."""
        place = 0
        slices = old = done = unopenable = 0
        while True:
            if self._must_wait():
                raise ConnectionError("Redis is in trouble")
            begun = time.monotonic()
            place, seen = await self._sweeps.scan(place, SCAN_KEYS)
            newest = self._keyring().queue_id
            stale = [one for one in seen if int.from_bytes(one.head[KEY_ID], "big") < newest]
            slices += len(seen)
            old += len(stale)
            await self._rest(begun)
            for start in range(0, len(stale), BATCH):
                begun = time.monotonic()
                swapped, failed = await self._move(stale[start : start + BATCH])
                done += swapped
                unopenable += failed
                self._resealed += swapped
                await self._rest(begun)
            if place == 0:
                break
        self._walks += 1
        self._unopenable = unopenable
        walked = Walked(slices, old, done, unopenable)
        if unopenable:
            log.error("slices are waiting that no key opens", extra={"slices": unopenable})
        if old:
            log.info("waiting slices were sealed anew", extra={"old": old, "resealed": done})
        return walked

    async def _move(self, some: list[Seen]) -> tuple[int, int]:
        keyring = self._keyring()
        changes: list[tuple[Seen, bytes]] = []
        failed = 0
        for one, data in zip(some, await self._sweeps.read(some), strict=True):
            if data is None or not data.startswith(one.head):
                continue  # gone, leased or settled in part since the walk met it
            moved = resealed(keyring.queue, keyring.queue_id, one.partition, data)
            if isinstance(moved, Lost):
                failed += 1
            else:
                changes.append((one, moved))
        if not changes:
            return 0, failed
        reach("before-reseal")
        swapped = await self._sweeps.reseal(changes)
        reach("after-reseal")
        return swapped, failed

    async def _rest(self, begun: float) -> None:
        await asyncio.sleep((time.monotonic() - begun) * (REST_BUSY if self._is_busy() else REST_IDLE))
