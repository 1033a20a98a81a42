"""Which life of the store this is, and what a worker must ask the ledger because of it (promise T12).

A Redis that came back older holds slices whose people have had their mail. The writer counts such restores (`epoch`),
and once every journal has been told again and every event is in SQL it opens leasing for the new one (`lease`). From
then on a slice of a job accepted before the restore is compared with the ledger before anybody in it is written to.

    `follow`    META once a second: epoch, restored, ledgered, lease; and Redis TIME
    `opened`    until leasing is open for our epoch: nothing is leased, nothing put on lanes before
    `suspects`  is this job older than the last restore? One comparison; always no where nothing was ever restored
    `accounted` of a suspected job: is it over, and who of these has reached an end already?

Laws:
- where META is silent (emptied, or no writer has run yet) leasing is closed;
- a job is suspected by its number, which has no clock: hosts' clocks may be wrong by days.

Known limits: what a worker of another host that is down for more than the writer's patience has in its journal is told
late: whom it delivered to in the lost time may be written to once more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from policy import keyspace
from policy.fence import EPOCH, Fence, StoreOlder
from policy.ledger import Reader

log = logging.getLogger(__name__)

LEASE: Final = "lease"
RESTORED: Final = "restored"
LEDGERED: Final = "ledgered"
LOOK_SECONDS: Final = 1.0
_IMPATIENT: Final = 0.1


class Epoch:
    """One per worker. The fence is the one of this worker's client, and has let its first connection through."""

    def __init__(self, redis: Redis, fence: Fence, reader: Reader) -> None:
        self._redis = redis
        self._fence = fence
        self._reader = reader
        self._open = asyncio.Event()
        self._restored = 0
        self._newest = 0
        self._ahead = time.time_ns() // 1000 - _micros(time.monotonic())
        self.ledgered = 0
        self.is_synced = True  # every write of the store is on its disk before it is answered

    def __repr__(self) -> str:
        return f"<Epoch {self.number}{'' if self.is_open else ', closed'}, jobs up to {self._newest} suspected>"

    @property
    def number(self) -> int:
        return self._fence.epoch or 0

    @property
    def is_restored(self) -> bool:
        """Whether Redis ever came back older."""
        return self._restored > 0

    @property
    def is_open(self) -> bool:
        """Whether slices may be leased and put on lanes."""
        return self._open.is_set() and not self._fence.older

    @property
    def connections(self) -> int:
        """How many this process has made to Redis."""
        return self._fence.admitted

    def now_us(self) -> int:
        """Redis TIME, never behind it: as told last, as if the answer had taken no time."""
        return _micros(time.monotonic()) + self._ahead

    async def look(self) -> None:
        """Read META once. Raises RedisError, the store's error."""
        asked = _micros(time.monotonic())
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(keyspace.META, [EPOCH, RESTORED, LEDGERED, LEASE])
            pipe.time()
            (epoch, restored, ledgered, lease), (seconds, micros) = await pipe.execute()
        self._ahead = int(seconds) * 1_000_000 + int(micros) - asked
        self.ledgered = int(ledgered or 0)
        if epoch is not None:
            self._fence.meet(int(epoch))
        if int(restored or 0) != self._restored:
            self._newest = await asyncio.to_thread(self._reader.suspected)
            self._restored = int(restored or 0)
        if epoch is not None and lease is not None and int(lease) == self.number:
            self._open.set()
        else:
            self._open.clear()

    async def follow(self, told: Callable[[int], None] = lambda _ledgered: None) -> None:
        """Until cancelled. told(ledgered) after each look."""
        while True:
            try:
                await self.look()
                told(self.ledgered)
            except StoreOlder:
                self._open.clear()
            except (RedisError, OSError, SQLAlchemyError) as error:
                log.debug("the store's life is not known: %s", type(error).__name__)  # who needs it more says it louder
            await asyncio.sleep(LOOK_SECONDS if self.is_open else _IMPATIENT)

    async def opened(self) -> None:
        await self._open.wait()

    def suspects(self, job: int) -> bool:
        """Whether slices of this job may hold people who have had their mail."""
        return job <= self._newest

    async def accounted(self, job: int, mrefs: Sequence[int]) -> tuple[bool, set[int]]:
        """(whether the job is over, who of these has reached a terminal state), by the ledger, off the loop. Asked
        until it answers: nobody is written to without."""
        while True:
            try:
                return await asyncio.to_thread(self._reader.accounted, job, mrefs)
            except SQLAlchemyError as error:
                log.warning("the ledger does not answer", extra={"fault": type(error).__name__})
                await asyncio.sleep(LOOK_SECONDS)


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
