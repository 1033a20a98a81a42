"""From verdicts to what is remembered: journal first, then one settle a slice, at least every quarter of a second (T7).

Laws:
- nothing is settled in Redis before its outcome is on the disk (group commit of the journal);
- what Redis did not take stays here and is tried again, unchanged; meanwhile nothing new is started (`in_trouble`);
- a stale token ends a hand: somebody else has the slice, and everything written about it would be wrong. What was
  heard on the wire is told all the same, by itself: a 250 is never lost, and the ledger folds what it knows.

Path of one outcome: `terminal` or `retry` notes it in its hand and the journal · `flush` waits for the disk, builds one
request a hand (done bits, events, re-sealed retries) and sends them together · the hand is forgotten when it is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
from redis.exceptions import RedisError

from engine.delivery.hand import Hand
from engine.queue.journal import Journal
from engine.queue.lanes import Lanes, Retry, Settled, SettleRequest
from engine.queue.slices import retry_of
from policy.crashpoints import reach
from policy.events import Encoded, Event
from policy.keys import Keyring

log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode


def _batch(hand: Hand, events: list[msgspec.Raw]) -> bytes:
    return _encode(Encoded(hand.header.job, hand.contents.domain, events))


class Settling:
    """One per worker. keyring: asked each time, for queue keys change weekly; gone: told of each hand that ended;
    laid: of each retry that waits now, with its partition and delay in seconds."""

    def __init__(
        self,
        lanes: Lanes,
        journal: Journal,
        keyring: Callable[[], Keyring],
        gone: Callable[[Hand], None],
        *,
        interval: float = 0.2,
        laid: Callable[[int, float], None] = lambda partition, delay: None,
    ) -> None:
        self._lanes = lanes
        self._journal = journal
        self._keyring = keyring
        self._gone = gone
        self._interval = interval
        self._laid = laid
        self._dirty: dict[Hand, None] = {}
        self._flushing = asyncio.Lock()
        self._unanswered: list[tuple[Hand, SettleRequest]] = []
        self._untold: list[tuple[Hand, bytes]] = []
        self.in_trouble = False
        self.settled = 0
        self.stale = 0

    def terminal(self, hand: Hand, index: int, event: Event) -> None:
        """A recipient reached its end."""
        written = msgspec.Raw(_encode(event))
        self._record(hand, index, event.kind, written)
        hand.done.append(index)
        hand.events.append(written)
        self._dirty[hand] = None

    def retry(self, hand: Hand, index: int, delay: float, event: Event, *, in_doubt: bool = False) -> None:
        """A recipient moves to a new slice, due after `delay` seconds. in_doubt: a copy may be out already (T8).

        Such a one gets no outcome in the journal: its intent stays open, so that a crash before the settle finds it.
        """
        written = msgspec.Raw(_encode(event))
        if not in_doubt:
            self._record(hand, index, event.kind, written)
        hand.retries.setdefault((delay, in_doubt), []).append(index)
        hand.events.append(written)
        self._dirty[hand] = None

    def known(self, hand: Hand, indexes: list[int]) -> None:
        """The ledger has had an end of these already (T12): they are done, and nothing is said of it again."""
        hand.done += indexes
        self._dirty[hand] = None

    def give_up(self, hand: Hand) -> None:
        """The lease is not ours any more: nothing of it is settled, what is recorded of it is told by itself."""
        hand.dead = True
        if not hand.events and not hand.asked:
            self._forget(hand)
        self._gone(hand)

    def _forget(self, hand: Hand) -> None:
        self._journal.forget(hand.lease.partition, hand.lease.slice_id, hand.lease.token)

    def _record(self, hand: Hand, index: int, kind: int, written: msgspec.Raw) -> None:
        reach("before-outcome")
        self._journal.record_on(hand.page, index, kind, _batch(hand, [written]))
        reach("after-outcome")

    async def run(self) -> None:
        """Until cancelled. A broken journal ends the worker: JournalBroken goes through."""
        while True:
            await asyncio.sleep(self._interval)
            await self.flush()

    async def flush(self) -> None:
        """Settle all that is noted by now."""
        async with self._flushing:
            # What was asked and not answered may have been done: it is asked again to the letter, before anything new,
            # because a script that runs twice with the same request changes nothing, and with a larger one would.
            if (self._unanswered or self._untold) and not await self._send(self._unanswered):
                return
            hands = list(self._dirty)
            self._dirty.clear()
            if not hands:
                return
            # Taken before the wait for the disk: what is noted during it may not be durable yet.
            taken = [(hand, self._take(hand)) for hand in hands if not hand.dead]
            untold = [(hand, self._last_words(hand)) for hand in hands if hand.dead and hand.events]
            await self._journal.durable()
            self._untold += untold
            await self._send(taken)

    async def _send(self, taken: list[tuple[Hand, SettleRequest]]) -> bool:
        reach("before-settle")
        answers = await self._lanes.settle_many([request for _, request in taken])
        reach("after-settle")
        self._unanswered = []
        for (hand, request), answer in zip(taken, answers, strict=True):
            if answer is None:
                self._unanswered.append((hand, request))
            else:
                self._ended(hand, request, answer)
        await self._tell()
        self.in_trouble = bool(self._unanswered or self._untold)
        return not self.in_trouble

    async def _tell(self) -> None:
        """Events of hands that are not ours any more."""
        untold = self._untold
        if not untold:
            return
        try:
            await self._lanes.tell([(hand.lease.partition, events) for hand, events in untold])
        except (RedisError, OSError):
            return
        self._untold = []
        for hand, _ in untold:
            self._forget(hand)

    def _last_words(self, hand: Hand) -> bytes:
        batch = _batch(hand, hand.events)
        hand.done, hand.events, hand.retries = [], [], {}
        return batch

    def _take(self, hand: Hand) -> SettleRequest:
        done, events, retries = hand.done, hand.events, hand.retries
        hand.done, hand.events, hand.retries = [], [], {}
        hand.asked = True
        keyring = self._keyring()
        key, lease = keyring.queue[keyring.queue_id], hand.lease
        moved = []
        for (delay, in_doubt), rows in retries.items():
            doubt = rows if in_doubt else ()
            sealed = retry_of(key, keyring.queue_id, lease.partition, hand.header, hand.contents, rows, doubt=doubt)
            moved.append(Retry(delay, sealed, rows))
        batch = _batch(hand, events) if events else b""
        return SettleRequest(lease.partition, lease.slice_id, lease.token, done, (), batch, moved)

    def _ended(self, hand: Hand, request: SettleRequest, answer: Settled) -> None:
        hand.asked = False
        if answer is not Settled.STALE:
            for retry in request.retries:
                self._laid(request.partition, retry.delay)
        if answer is Settled.KEPT:
            self.settled += len(request.done)
            return
        if answer is Settled.STALE:
            self.stale += 1
            log.warning("a slice was settled after its lease had ended", extra={"partition": hand.lease.partition})
        else:
            self.settled += len(request.done)
        hand.dead = True
        if answer is Settled.STALE and request.events:
            self._untold.append((hand, request.events))
        else:
            self._forget(hand)
        self._gone(hand)

    async def release(self, hand: Hand, delay: float = 0.0) -> None:
        """Hand back a slice of which nothing is on its way. Raises redis errors."""
        hand.dead = True
        reach("before-release")
        await self._lanes.release(hand.lease.partition, hand.lease.slice_id, hand.lease.token, delay)
        reach("after-release")
        self._forget(hand)
        self._gone(hand)
