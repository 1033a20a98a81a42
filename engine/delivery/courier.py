"""The courier: one worker's delivery, put together (steps 5 to 10 of the journey).

    leasing      due slices for the sites that can take them          desk         a site's stock, connections, pace
    press        gate asked, messages composed and signed             conclusions  what it came to
    settling     journal, then Redis

Laws:
- no new attempt starts while Redis or the journal is in trouble, or while our heartbeat is older than half a lease;
- `drain` leaves nothing leased: what was not sent is due again at once.

Known limits: reclaiming the leases of another host's dead worker is done by hand (`sales-push host forget`);
a dead worker of this host is replayed by `replay` at the start of the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.delivery import pool
from engine.delivery.campaigns import Campaigns, compose_together
from engine.delivery.conclusions import Conclusions
from engine.delivery.connection import Outbound
from engine.delivery.departure import Departure
from engine.delivery.desk import CROWDED_SECONDS, Desk
from engine.delivery.gatekeeper import Gatekeeper
from engine.delivery.hand import Hand, Letter
from engine.delivery.hastening import Cancelled, Hastening
from engine.delivery.leasing import Leasing
from engine.delivery.outcome import Outcome
from engine.delivery.press import Press
from engine.delivery.reclaiming import Reclaiming
from engine.delivery.resealing import Resealing
from engine.delivery.settling import Settling
from engine.delivery.site import Resolver, Site
from engine.delivery.sockets import MOST as MOST_SOCKETS
from engine.delivery.sockets import Sockets
from engine.queue import pace, schedule
from engine.queue.epoch import Epoch
from engine.queue.journal import Journal
from engine.queue.lanes import Lanes
from engine.queue.permits import Permits
from engine.queue.sweeps import Sweeps
from engine.smtp.words import Step
from policy import keyspace
from policy.events import TERMINAL, Kind, Reason
from policy.gate import Permit, Standing
from policy.keys import Keyring

log = logging.getLogger(__name__)

BEAT_SECONDS = 4.0  # a third of a connection permit's life, and at most a third of a lease


class Courier:
    """One per worker. Everything it needs is handed in; `run` works until `drain` or a failure."""

    def __init__(
        self,
        *,
        redis: Redis,
        lanes: Lanes,
        permits: Permits,
        journal: Journal,
        campaigns: Campaigns,
        resolver: Resolver,
        keyring: Callable[[], Keyring],
        limits: Callable[[Site], tuple[pool.Limits, pace.Profile]],
        retry: schedule.Retry,
        hello: str,
        patience: Mapping[Step, float],
        lease_seconds: float,
        lease_slices: int = 16,
        disk_floor: int = 0,
        settle_seconds: float = 0.2,
        most_sockets: int = MOST_SOCKETS,
        cancelled: Callable[[], Cancelled] | None = None,
        epoch: Epoch | None = None,
        reclaiming: Reclaiming | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.holder = lanes.holder
        self.permits = permits
        self.journal = journal
        self.gatekeeper = Gatekeeper(lanes)
        # A store that does not sync every write forgets leases at a power cut: who is about to be written to is
        # journalled, too (T6, T8).
        self.foresees = epoch is not None and not epoch.is_synced
        self.press = Press(self)
        self.hello = hello
        self.patience = patience
        self.is_ending = False
        self.is_resting = False
        self.is_hurried = False
        self._lanes = lanes
        self._lease_seconds = lease_seconds
        self._disk_floor = disk_floor
        self._settling = Settling(
            lanes, journal, keyring, self._gone, interval=settle_seconds,
            laid=lambda partition, delay: self._leasing.expect(partition, delay),
        )  # fmt: skip
        self.desks: dict[str, Desk] = {}
        self.hands: set[Hand] = set()
        self._unreturned: list[Hand] = []
        self._clock_offset = time.time_ns() // 1000 - _micros(time.monotonic())
        self._beat_at = time.monotonic()
        self._trouble_until = 0.0
        self._disk_full = False
        self._failure: asyncio.Future[None] = self.loop.create_future()
        journal.on_broken = self.fail  # at once, whoever was writing: an intent that cannot be written stops the line
        self._said: dict[str, bool] = {}
        self.sockets = Sockets(most_sockets)
        self._crowded_at = 0.0
        self._conclusions = Conclusions(self._settling, keyring, retry, campaigns.nothing, self.now_us)
        self._leasing = Leasing(
            self,
            redis=redis,
            lanes=lanes,
            campaigns=campaigns,
            resolver=resolver,
            keyring=keyring,
            limits=limits,
            conclusions=self._conclusions,
            most_slices=lease_slices,
            epoch=epoch,
        )
        self._departure = Departure(self, lanes, self._settling, self._leasing)
        self._reclaiming = reclaiming
        self._walks = cancelled is not None  # one worker of a host goes over the whole queue
        sweeps = Sweeps(redis, lanes.holder)
        self._hastening = Hastening(self, self._leasing, sweeps, lanes, self._settling.flush, cancelled)
        self._resealing = Resealing(
            sweeps, keyring, is_busy=lambda: bool(self.hands), must_wait=lambda: not self._leasing.is_open
        )

    # --- what the worker says --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled or a failure that only a restart mends (a broken journal, an error of ours)."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._leasing.run(), name="leasing"),
                group.create_task(self._leasing.reconcile(), name="reconcile"),
                group.create_task(self.press.run(), name="press"),
                group.create_task(self._leasing.listen(), name="wake-ups"),
                group.create_task(self._hastening.run(), name="hastening"),
                *([group.create_task(self._resealing.run(), name="resealing")] if self._walks else []),
                group.create_task(self._beating(), name="heartbeat"),
                group.create_task(self._settling.run(), name="settling"),
                group.create_task(self._housekeeping(), name="housekeeping"),
                group.create_task(self._departure.follow(), name="resting"),
            ]
            if self._reclaiming is not None:
                tasks.append(group.create_task(self._reclaiming.run(), name="reclaiming"))
            await self._failure
            for task in tasks:
                task.cancel()

    @property
    def is_stopping(self) -> bool:
        """Nothing new is leased, connected to or sent."""
        return self.is_ending or self.is_resting

    @property
    def is_away(self) -> bool:
        """Its host rests, and nothing is in our hands."""
        return self.is_resting and self._departure.is_away

    def stop(self) -> None:
        """Lease nothing more and send nothing more than what is on the wire."""
        self.is_ending = True
        self._leasing.wake()

    def rest(self, is_wanted: bool) -> None:
        """The host is asked to rest: as `stop` and `drain`, until it may work again."""
        if self.is_resting != is_wanted:
            self.is_resting = is_wanted
            self._departure.heed()

    async def drain(self, seconds: float) -> bool:
        """After `stop`: finish what is on the wire, settle, hand the rest back. What takes longer is dropped: behind
        its dot it is in doubt and recorded so. False when something had to stay leased. Raises JournalBroken."""
        self.stop()
        clean = await self._departure.finish(seconds)
        if not self._failure.done():
            self._failure.set_result(None)
        return clean

    def hurry(self) -> None:
        """Drain no longer than it takes to write down what is known."""
        self.is_hurried = True
        self.abort()

    def abort(self) -> None:
        """Drop every connection now; what is behind its dot is in doubt and recorded so."""
        for desk in self.desks.values():
            desk.abort()

    def fail(self, error: BaseException) -> None:
        """Something of ours broke: the worker ends and is started again, the journal remembers."""
        log.error("the courier failed", exc_info=error)
        if not self._failure.done():
            self._failure.set_exception(error)

    def statistics(self) -> dict[str, int | float | dict[str, int | float]]:
        """Frozen figures for the metrics of this host."""
        return {
            "outcomes": dict(self._conclusions.counts),
            "settled": self._settling.settled,
            "stale_settles": self._settling.stale,
            "slices_in_hand": len(self.hands),
            "recipients_in_stock": sum(len(desk.stock) for desk in self.desks.values()),
            "connections": sum(len(desk.lines) for desk in self.desks.values()),
            "messages_ready": sum(len(line.ready) for desk in self.desks.values() for line in desk.lines.values()),
            "lines_waiting": sum(line.ordered for desk in self.desks.values() for line in desk.lines.values()),
            "sites": len(self.desks),
            "sites_backing_off": sum(desk.is_held for desk in self.desks.values()),
            "resting": int(self.is_resting),
            "at_rest": int(self.is_away),
            "slices_reclaimed": self._reclaiming.reclaimed if self._reclaiming is not None else 0,
            "in_trouble": int(self.must_wait),
            "disk_full": int(self._disk_full),
            "events_full": int(self._leasing.full),
            "lease_calls": self._leasing.calls,
            "lease_calls_empty": self._leasing.empty_calls,
            "slices_not_understood": self._leasing.strangers,
            "slices_lost": self._conclusions.slices_lost,
            "slices_hastened": self._hastening.ended,
            **(self._resealing.statistics() if self._walks else {}),
        }

    def now_us(self) -> int:
        """Redis TIME as last heard, carried on by our monotonic clock."""
        return _micros(time.monotonic()) + self._clock_offset

    def hear_time(self, now_us: int) -> None:
        """Redis TIME as a script just told it."""
        self._clock_offset = now_us - _micros(time.monotonic())

    # --- what desks say --------------------------------------------------------------------------------------------

    @property
    def must_wait(self) -> bool:
        """No new attempt now: trouble with Redis, a full disk, or a heartbeat that could not be sent for too long."""
        now = time.monotonic()
        return (
            self._settling.in_trouble
            or now < self._trouble_until
            or self._disk_full
            or now - self._beat_at > self._lease_seconds / 2
        )

    def in_trouble(self) -> None:
        """Redis did not answer: wait a moment before anything new is begun."""
        self._trouble_until = time.monotonic() + 0.5

    def may_connect(self) -> bool:
        """Room for one more connection is taken, or others that rest are asked to make some."""
        if self.sockets.take():
            return True
        now = time.monotonic()
        if now - self._crowded_at > CROWDED_SECONDS:
            self._crowded_at = now
            for desk in list(self.desks.values()):
                desk.make_room()
        return False

    def hungry(self, desk: Desk) -> None:
        if desk.is_hungry:
            self._leasing.wake()

    def put_back(self, letters: list[Letter]) -> None:
        """Letters taken and not sent go to the front of their desks' stock."""
        for letter in reversed(letters):
            if letter.hand.desk is not None:
                letter.hand.desk.put_back([letter])

    def compose(self, permitted: list[tuple[Permit, Letter]], void_at: float) -> list[Outbound]:
        """Render and sign a batch of messages of any jobs. A recipient that cannot be rendered is refused INVALID and
        does not stop the others."""
        messages: list[Outbound] = []
        self._conclusions.count("composed", len(permitted))
        composed, failed = compose_together(permitted)
        for letter, sender, recipient, wire in composed:
            try:
                messages.append(Outbound(letter, sender, recipient, wire, void_at, True))
            except ValueError:  # the wire refuses the address: its end, never the worker's (one message kills none)
                failed.append(letter)
        for letter in failed:
            letter.hand.abroad -= 1
            self.refuse(letter, Reason.INVALID)
        return messages

    def conclude(self, letter: Letter, outcome: Outcome, tls: int) -> None:
        """An attempt has its verdict. Of a slice that is not ours any more only an end is told: whoever has it tries
        again as he sees fit, but a 250 is never lost."""
        if not letter.hand.dead or outcome.kind in TERMINAL:
            self._conclusions.conclude(letter, outcome, tls)

    def refuse(self, letter: Letter, reason: Reason) -> None:
        """The gate said no, or the message cannot be written."""
        if not letter.hand.dead:
            self._conclusions.refuse(letter, reason)

    def expire(self, hand: Hand, indexes: list[int], why: str = "") -> None:
        """Their time is over, and they are not on the wire. why: what kept their site from taking them."""
        self._conclusions.end_all(hand, indexes, Kind.EXPIRED, Reason.NETWORK if why else Reason.NONE, why)

    def stand_down(self, hand: Hand, letters: list[Letter], standing: Standing) -> None:
        """The job or the lease as a whole may not go on. letters: of this hand, taken and not sent."""
        if hand.dead:
            hand.abroad -= len(letters)
            return
        if standing in (Standing.CANCELLED, Standing.EXPIRED):
            kind = Kind.CANCELLED if standing is Standing.CANCELLED else Kind.EXPIRED
            hand.abroad -= len(letters)
            self._conclusions.end_all(hand, [letter.index for letter in letters], kind, Reason.NONE)
            return
        hand.abroad -= len(letters)
        if standing in (Standing.STALE, Standing.GONE):
            self._settling.give_up(hand)
            return
        # paused or frozen: back to the lane as soon as nothing of it is on the wire; leasing passes it over there
        self._hold(hand)

    def shut(self, hand: Hand, letters: list[Letter]) -> None:
        """The window of the job has closed over letters that were taken: all of the hand waits until it opens."""
        hand.abroad -= len(letters)
        self._hold(hand)

    def hear_of_halts(self) -> None:
        """Something was paused, resumed or cancelled."""
        self._hastening.hear()

    def cancel(self, hand: Hand, indexes: list[int]) -> None:
        """Their job or domain is cancelled, and they are not on the wire."""
        self._conclusions.end_all(hand, indexes, Kind.CANCELLED, Reason.NONE)

    def _hold(self, hand: Hand) -> None:
        if hand.desk is not None:
            hand.desk.drop(hand)
        hand.held = True

    async def hand_back(self, hand: Hand, delay: float, site: str = "") -> None:
        """site: where its lane goes, when it goes back because that site is held: it waits there from now on, and not
        among those whose site nobody knows."""
        try:
            if site and hand.lease.site == keyspace.UNRESOLVED:
                await self._lanes.assign(hand.lease.partition, hand.lease.lane, site)
            await self._settling.release(hand, delay)
        except (RedisError, OSError):
            self.in_trouble()
            self._unreturned.append(hand)  # tried again every second; should we end before, replay hands it back

    async def announce_back_off(self, site: str, seconds: float) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self.permits.back_off(site, max(0.001, seconds))

    def _gone(self, hand: Hand) -> None:
        self.hands.discard(hand)
        if hand.desk is not None:
            hand.desk.forget(hand)

    # --- loops -----------------------------------------------------------------------------------------------------

    async def _beating(self) -> None:
        while True:
            partitions = {hand.lease.partition for hand in self.hands}
            try:
                if partitions:
                    await self._lanes.heartbeat(partitions)
                self._beat_at = time.monotonic()
                # Together: one by one, those of 8,000 sites took longer than a heartbeat may
                await asyncio.gather(*[self._renew(desk) for desk in self.desks.values() if desk.lines])
            except (RedisError, OSError):
                self.in_trouble()
                await asyncio.sleep(0.5)
                continue
            await asyncio.sleep(min(self._lease_seconds / 3, BEAT_SECONDS))

    async def _renew(self, desk: Desk) -> None:
        lines = list(desk.lines.items())
        kept = await self.permits.renew(desk.ref, [line.permit for _, line in lines])
        for (connection, _), is_ours in zip(lines, kept, strict=True):
            if not is_ours:  # it had run out, and another worker may have it: end after this message
                connection.quit()

    def _say(self, what: str, is_so: bool) -> None:
        """One line when it begins and one when it is over."""
        if self._said.get(what, False) != is_so:
            self._said[what] = is_so
            log.log(logging.WARNING if is_so else logging.INFO, what if is_so else f"over: {what}")

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            self._disk_full = not self.journal.has_room(self._disk_floor)
            self._say("the disk of the journal is below its floor: no new attempts", self._disk_full)
            in_trouble = self.must_wait or now < self._trouble_until + 2.0  # it comes and goes between two tries
            self._say("Redis is in trouble: no new attempts", in_trouble and not self._disk_full)
            for desk in list(self.desks.values()):
                desk.housekeeping(now)
            # hands that were held (paused, frozen, outside their window) and have nothing on the wire any more go back
            for hand in list(self.hands):
                if hand.held and not hand.dead and hand.is_at_rest:
                    await self.hand_back(hand, hand.job.opens_in(self.now_us()))
            unreturned, self._unreturned = self._unreturned, []
            for hand in unreturned:
                await self.hand_back(hand, 0.0)


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
