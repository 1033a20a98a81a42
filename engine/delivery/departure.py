"""How a worker lets go of what it holds: at its end (SIGTERM), and while its host is asked to rest (`host drain`).

Promise: nothing new is begun from the first instant; what is on the wire is finished and recorded; everything else is
due again at once; no lease, no permit and no heartbeat of ours is left. What Redis does not take until the deadline
stays leased and journalled: the next worker of this folder replays it, or `sales-push host forget` does.

    finish    1. every desk ends its connections, each after the message it is in; past the deadline they are dropped,
              and what is behind its dot is in doubt and recorded so
              2. the lease call that was under way has answered: its slices are ours and go back, too
              3. outcomes are settled, then *every* lease that Redis has under our name goes back, in one round trip:
                 also those whose reply we never saw
              4. the heartbeat counters of our name go
    follow    the same without an end: the worker waits, and goes on when its host may work again

Known limits: a message behind its dot is waited for as long as `drain_seconds` allow, not the 600 s of RFC 5321.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from engine.delivery.leasing import Leasing
from engine.delivery.settling import Settling
from engine.queue.lanes import Lanes
from policy import keyspace
from policy.crashpoints import reach
from policy.fence import StoreOlder

if TYPE_CHECKING:
    from engine.delivery.courier import Courier

log = logging.getLogger(__name__)

CANCEL_SECONDS = 0.5
AGAIN_SECONDS = 0.1  # between two tries to hand back while Redis is away
SETTLE_SHARE = 0.2  # of the time there is, at most SETTLE_SECONDS: kept for the settling after the wire
SETTLE_SECONDS = 5.0


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel until every one of them has ended. Once is not always enough: before Python 3.12 asyncio.wait_for can
    swallow a cancellation (gh-86296), and redis-py 8.1 uses it (13 of 40 instants of a connect with a timeout)."""
    every = list(tasks)
    left = set(every)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_SECONDS)
    await asyncio.gather(*every, return_exceptions=True)  # heard: nobody else asks for their errors


class Departure:
    """One per worker. is_away: the host rests, and nothing is left in our hands."""

    def __init__(self, courier: Courier, lanes: Lanes, settling: Settling, leasing: Leasing) -> None:
        self.is_away = False
        self._courier = courier
        self._lanes = lanes
        self._settling = settling
        self._leasing = leasing
        self._news = asyncio.Event()

    def heed(self) -> None:
        """The host is to rest, or may work again (`Courier.is_resting`)."""
        self._news.set()

    async def finish(self, seconds: float) -> bool:
        """Let go of everything within so many seconds; False when something had to stay. Raises JournalBroken."""
        deadline = time.monotonic() + seconds
        await self._leave_the_wire(seconds - min(SETTLE_SECONDS, seconds * SETTLE_SHARE))
        while True:
            try:
                async with asyncio.timeout(max(0.05, deadline - time.monotonic())):
                    if await self._let_go():
                        return True
            except StoreOlder:
                return False  # it has forgotten our leases: the successor tells it what the journal knows (T12)
            except (RedisError, OSError):  # TimeoutError is an OSError
                pass
            if time.monotonic() >= deadline or self._courier.is_hurried:
                left = len(self._courier.hands)
                log.error("slices stay leased: Redis did not take them back", extra={"slices": left})
                return False
            await asyncio.sleep(AGAIN_SECONDS)

    async def follow(self) -> None:
        """Until cancelled."""
        courier = self._courier
        while True:
            await self._news.wait()
            self._news.clear()
            while courier.is_resting and not courier.is_ending:
                await self._leave_the_wire(None)
                if not courier.is_resting:
                    break
                try:
                    self.is_away = await self._let_go()
                except (RedisError, OSError):
                    courier.in_trouble()
                if self.is_away:
                    log.info("this host rests")
                    break
                await asyncio.sleep(AGAIN_SECONDS)
            if not courier.is_resting:
                self.is_away = False
                for desk in list(courier.desks.values()):
                    desk.adjust()

    async def _leave_the_wire(self, seconds: float | None) -> None:
        closing = [asyncio.ensure_future(desk.close()) for desk in self._courier.desks.values()]
        if not closing:
            return
        _, late = await asyncio.wait(closing, timeout=seconds)
        if late:
            self._courier.abort()
            await asyncio.wait(late, timeout=1.0)
        for each in closing:
            each.cancel()
        await asyncio.gather(*closing, return_exceptions=True)

    async def _let_go(self) -> bool:
        """One try. True: nothing is ours any more. Raises RedisError, JournalBroken."""
        await self._settling.flush()
        async with self._leasing.asking:  # no lease call is under way
            ours = await self._lanes.our_leases()
        busy = {hand for hand in self._courier.hands if hand.has_news or hand.asked or hand.abroad}
        kept = {(hand.lease.partition, hand.lease.slice_id, hand.lease.token) for hand in busy}
        # Given up before Redis is told, without a wait between: should the host work again meanwhile, nobody of them
        # can be written to under a lease that is on its way back. What Redis does not take is found by the next try.
        for hand in self._courier.hands - busy:
            self._settling.give_up(hand)
        for desk in self._courier.desks.values():
            desk.stock.keep(lambda hand, _: not hand.dead)
        if back := [lease for lease in ours if lease not in kept]:
            reach("before-release")
            await self._lanes.release_many(back)
            reach("after-release")
        for desk in self._courier.desks.values():
            await desk.pay_back()
        if busy or self._settling.in_trouble:
            return False
        await self._lanes.leave(range(keyspace.PARTITIONS))  # wherever we ever leased: our name is of this life only
        return True
