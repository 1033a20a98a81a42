"""Hastening: what was cancelled ends now, what was paused stops now, what was resumed goes on now.

Laws:
- a recipient of a cancelled job or domain ends CANCELLED within about ten seconds, also when it was deferred for hours
  or its site takes no connection: that end needs neither site nor connection;
- while nothing is cancelled nothing is walked over; what a walk finds ends through `Conclusions`, like anything else.

The writer says `keyspace.WAKE_HALTS` on the wake channel. Every worker then asks the gate about what it holds in stock.
Worker 0 of a host also looks into SQL (after each word, and every ten seconds for words that were lost) and
- takes the slices of cancelled domains out of their lanes, and of cancelled jobs out of a walk over all slices, as
  leases (hasten.lua), and ends their recipients; again, ever more rarely, until nobody of the job waits any more;
- brings forward what lease.lua had put aside while it was paused (unpark.lua).

Known limits: messages ready on a line that is busy with another end when the line is free. Two hosts walk at once, to
no harm. A slice that waits for one more attempt in doubt ends CANCELLED, although a copy of it may have arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from engine.delivery.press import question
from engine.queue.lanes import Lanes
from engine.queue.sweeps import Seen, Sweeps
from policy import halts
from policy.crashpoints import reach
from policy.gate import Standing

if TYPE_CHECKING:
    from engine.delivery.courier import Courier
    from engine.delivery.leasing import Leasing

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
AGAIN_SECONDS, AGAIN_MOST = 3.0, 60.0  # between two walks for a job: what was leased at the first may be back
SCAN_KEYS = 500  # 0.2 ms of the server
REST = 0.25  # for each second of a walk
LANE_SLICES = 256
MOST_ENDING = 512  # slices leased and not yet settled: at most 16 MiB, and a settle takes them in two flushes


@dataclass(frozen=True, slots=True)
class Cancelled:
    """jobs: numbers of those with recipients who have not ended; lanes: (partition, reference)."""

    jobs: frozenset[int]
    lanes: list[tuple[int, str]]


def cancelled(engine: Engine) -> Cancelled:
    """What SQL says is cancelled. engine: read-only."""
    with engine.connect() as conn:
        return Cancelled(frozenset(halts.unfinished(conn)), halts.cancelled_lanes(conn))


class Hastening:
    """One per worker. ask: None where another worker of this host walks."""

    def __init__(
        self,
        courier: Courier,
        leasing: Leasing,
        sweeps: Sweeps,
        lanes: Lanes,
        flush: Callable[[], Awaitable[None]],
        ask: Callable[[], Cancelled] | None,
    ) -> None:
        self._courier = courier
        self._leasing = leasing
        self._sweeps = sweeps
        self._lanes = lanes
        self._flush = flush
        self._ask = ask
        self._news = asyncio.Event()
        self._next: dict[
            int, tuple[float, float]
        ] = {}  # job: (monotonic time of its next walk, seconds to the one after)
        self.ended = 0
        self.walks = 0

    def hear(self) -> None:
        """Something was halted, resumed or cancelled, or may have been."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            timeout = LOOK_SECONDS
            if self._next:
                timeout = min(timeout, max(0.0, min(at for at, _ in self._next.values()) - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            heard = self._news.is_set()
            self._news.clear()
            try:
                await self._look(heard)
            except (RedisError, OSError, SQLAlchemyError) as error:
                log.info("halts are looked at again later", extra={"fault": type(error).__name__})
                self._news.set()
                await asyncio.sleep(1.0)

    async def _look(self, heard: bool) -> None:
        if heard:
            await self._reconsider()
            if self._ask is not None:
                await self._sweeps.unpark()
            self._leasing.look_everywhere()
        if self._ask is None:
            return
        found = await asyncio.to_thread(self._ask)
        for partition, lane in found.lanes:
            await self._end_lane(partition, lane)
        await self._end_jobs(found.jobs)

    async def _reconsider(self) -> None:
        """What waits in our stock is asked about at once: a slow site would ask about it one by one."""
        hands = [hand for hand in self._courier.hands if hand.desk is not None and hand.waiting and not hand.held]
        told = await self._courier.gatekeeper.ask([question(hand, []) for hand in hands])
        for hand, answer in zip(hands, told.answers, strict=True):
            if answer is None or hand.dead or hand.held or hand.desk is None:
                continue
            if answer.standing is Standing.CANCELLED:
                indexes = hand.desk.withdraw(hand)
                self.ended += bool(indexes)
                self._courier.cancel(hand, indexes)
            elif answer.standing is not Standing.CLEAR:
                self._courier.stand_down(hand, [], answer.standing)

    # --- cancelled --------------------------------------------------------------------------------------------------

    async def _end_lane(self, partition: int, lane: str) -> None:
        """Whoever waits at a cancelled domain."""
        first = 0
        while ids := await self._sweeps.lane(partition, lane, first, LANE_SLICES):
            if not await self._end(partition, ids):
                return
            first += len(ids)

    async def _end_jobs(self, jobs: frozenset[int]) -> None:
        now = time.monotonic()
        self._next = {job: when for job, when in self._next.items() if job in jobs}
        due = [job for job in sorted(jobs) if self._next.get(job, (0.0, 0.0))[0] <= now]
        if not due:
            return
        waiting = {job for job in due if await self._lanes.waiting(job)}
        if waiting:
            await self._walk(waiting)
        now = time.monotonic()
        for job in due:
            # nobody waits: its last events are on their way, or chunks of it are still being put
            pause = min(2 * self._next.get(job, (0.0, AGAIN_SECONDS / 2))[1], AGAIN_MOST)
            self._next[job] = (now + pause, pause)

    async def _walk(self, jobs: set[int]) -> None:
        """All slices once, a few hundred keys at a time: 20 us a slice, ten seconds for 400,000."""
        self.walks += 1
        place = 0
        while True:
            begun = time.monotonic()
            place, seen = await self._sweeps.scan(place, SCAN_KEYS)
            by_partition: dict[int, list[str]] = {}
            for one in seen:
                if _job_of(one) in jobs:
                    by_partition.setdefault(one.partition, []).append(one.slice_id)
            for partition, ids in by_partition.items():
                if not await self._end(partition, ids):
                    return
            if place == 0:
                return
            await asyncio.sleep((time.monotonic() - begun) * REST)

    async def _end(self, partition: int, ids: list[str]) -> bool:
        """False: not now; the next look goes on."""
        async with self._leasing.asking:
            if self._courier.is_stopping or not self._leasing.is_open:
                return False
            reach("before-lease")
        hastened = await self._sweeps.hasten(partition, ids)
        if hastened.leases:
            reach("after-lease")
        await asyncio.gather(*map(self._leasing.end, hastened.leases))
        self.ended += len(hastened.leases)
        if self._unsettled() > MOST_ENDING:
            await self._flush()
        return not hastened.full

    def _unsettled(self) -> int:
        """Hands that go to no site: ending or lost."""
        return sum(hand.desk is None for hand in self._courier.hands)


def _job_of(seen: Seen) -> int:
    return int.from_bytes(seen.head[1:6], "big")
