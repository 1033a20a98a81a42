"""The recorder: hits wait a moment in memory and go to Redis in batches (promises.md T10).

Law: `record` never blocks and never fails: when the buffer is full the event is dropped and counted, the response is
not. A hit reaches Redis within `flush_seconds` and a round trip. The negative list is asked at the moment of writing,
not only when the hit came; while the list has no news, hits wait (fails closed). What leaves this room is already cut
down to what its mode may keep (tracking.md 3.1):

    AGGREGATE       no mref; the day; counted once per token and link within 24 to 48 h
    DELIVERABILITY  mref and the day of an open, nothing else (clicks too: they prove the mailbox is read)
    INDIVIDUAL      mref, the hour, link, visitor

Known limits: a batch whose answer was lost is written again, so an outage of Redis can count a few hits twice. The
memory of anonymous tokens is per process and dies with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from policy import keyspace
from policy.events import Hit, Kind, encode_hits
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

FIELD: Final = b"b"  # of a stream entry, as in the partitions' event streams
_BATCH: Final = 500  # hits an entry: about 12 kB
_RETRY_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot. dropped: no room; withheld: the negative list said no at the moment of writing."""

    recorded: int
    written: int
    dropped: int
    withheld: int
    replayed: int
    waiting: int


def cut(hit: Hit) -> Hit:
    """The hit with only what its mode may keep. Raises ValueError on OFF: no such token is ever made."""
    if hit.mode == Mode.INDIVIDUAL:
        return Hit(hit.kind, hit.job, hit.mref, hit.at - hit.at % HOUR_US, hit.mode, hit.visitor, hit.link)
    day = hit.at - hit.at % DAY_US
    if hit.mode == Mode.DELIVERABILITY:
        return Hit(Kind.OPENED, hit.job, hit.mref, day, hit.mode, 0)
    if hit.mode == Mode.AGGREGATE:
        return Hit(hit.kind, hit.job, 0, day, hit.mode, hit.visitor, hit.link)
    raise ValueError("no hit is recorded with tracking off")


class Replays:
    """Was this anonymous token seen within the last 24 to 48 h? Two Bloom filters, the older forgotten every day.

    Law: a second sight within 24 h is always known (no false "new"); a first sight is taken for a replay at most
    once in about 3,000 at a million tokens a day. Keyed at start, so nothing here can be tested later; and each day has
    a key of its own, made one way out of the day before's, so that the marks of two days have nothing in common and a
    key that is gone stays gone (P-13: a salt a day, none older than 48 hours). The second look costs 6 us.
    """

    _BITS: Final = 1 << 25  # 4 MiB each: 33 bits a token at a million
    _PROBES: Final = 4

    def __init__(self, key: bytes) -> None:
        self._key = self._key_before = key
        self._day = 0
        self._now = bytearray(self._BITS >> 3)
        self._before = bytearray(self._BITS >> 3)

    def seen(self, hit: Hit) -> bool:
        """Asks and remembers. Days are those of hit.at."""
        day = hit.at // DAY_US
        if day > self._day:
            self._turn(day)
        places = self._places(hit, self._key)
        known = _has(self._now, places) or _has(self._before, self._places(hit, self._key_before))
        for place in places:
            self._now[place >> 3] |= 1 << (place & 7)
        return known

    def _turn(self, day: int) -> None:
        """Another day: its key and its filter; of the days before only yesterday's are kept."""
        is_next = day == self._day + 1
        self._before = self._now if is_next else bytearray(self._BITS >> 3)
        self._now = bytearray(self._BITS >> 3)
        self._day = day
        self._key_before, self._key = self._key, blake2b(b"next day", digest_size=16, key=self._key).digest()
        if not is_next:
            self._key_before = self._key  # nothing of it is known: its own key may go

    def _places(self, hit: Hit, key: bytes) -> list[int]:
        digest = blake2b(b"%d.%d.%d.%d" % (hit.kind, hit.job, hit.mref, hit.link), digest_size=16, key=key).digest()
        return [int.from_bytes(digest[i : i + 4], "big") % self._BITS for i in range(0, 4 * self._PROBES, 4)]


def _has(bits: bytearray, places: Sequence[int]) -> bool:
    return all(bits[place >> 3] & 1 << (place & 7) for place in places)


class Recorder:
    """Holds at most `capacity` hits. `run` writes them until cancelled; `close` writes what is left."""

    def __init__(
        self,
        redis: Redis,
        *,
        is_withdrawn: Callable[[int], bool],
        may_write: Callable[[], bool],
        replays: Replays,
        capacity: int,
        flush_seconds: float,
        stream_hits: int,
    ) -> None:
        self._redis = redis
        self._is_withdrawn = is_withdrawn
        self._may_write = may_write
        self._replays = replays
        self._capacity = capacity
        self._flush_seconds = flush_seconds
        self._stream_hits = stream_hits
        self._waiting: deque[tuple[int, Hit]] = deque()  # subject (0: anonymous), hit
        self._wake = asyncio.Event()
        self._recorded = self._written = self._dropped = self._withheld = self._replayed = 0

    def statistics(self) -> Statistics:
        return Statistics(
            self._recorded, self._written, self._dropped, self._withheld, self._replayed, len(self._waiting)
        )

    def record(self, subject: int, hit: Hit) -> bool:
        """Take a hit, uncut. False when nothing will be stored: withdrawn, replayed, or no room."""
        if subject and self._is_withdrawn(subject):
            self._withheld += 1
            return False
        if len(self._waiting) >= self._capacity:
            self._dropped += 1
            return False
        if hit.mode == Mode.AGGREGATE:
            if self._replays.seen(hit):
                self._replayed += 1
                return False
            subject = 0
        self._recorded += 1
        self._waiting.append((subject, cut(hit)))
        self._wake.set()
        return True

    async def run(self) -> None:
        """Write for ever: after the first hit wait `flush_seconds` for company, then one round trip."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._flush_seconds)
            self._wake.clear()
            if not await self.flush():
                self._wake.set()
                await asyncio.sleep(_RETRY_SECONDS)

    async def close(self, seconds: float = 2.0) -> None:
        """Write what waits, once; what cannot be written in time is lost (T10 allows the last second)."""
        try:
            async with asyncio.timeout(seconds):
                await self.flush()
        except TimeoutError:
            log.warning("hits lost at stop: %d", len(self._waiting))

    async def flush(self) -> bool:
        """Write everything that waits. False: not possible now, the rest is kept."""
        while self._waiting:
            if not self._may_write():
                return False
            taken = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            kept = [pair for pair in taken if not (pair[0] and self._is_withdrawn(pair[0]))]
            self._withheld += len(taken) - len(kept)
            if not kept:
                continue
            entry = encode_hits([hit for _, hit in kept])
            try:
                await self._redis.xadd(keyspace.HITS, {FIELD: entry}, maxlen=self._stream_hits, approximate=True)
            except Exception as error:
                self._waiting.extendleft(reversed(kept))
                log.warning("hits wait, Redis does not take them: %s", type(error).__name__)
                return False
            except asyncio.CancelledError:
                self._waiting.extendleft(reversed(kept))
                raise
            self._written += len(kept)
        return True
