"""The courier: leases due slices for the sites that can take them, and carries them to their desks (steps 5 to 10).

Laws:
- a lease names only sites with room: a blocked site costs no lease calls, a free one never waits behind it;
- no new attempt starts while Redis or the journal is in trouble, or while our heartbeat is older than half a lease;
- `drain` leaves nothing leased: what was not sent is due again at once.

The loop: news (a wake-up from intake, a desk that got hungry, an instant that came, or a quarter of a second) · one
pipeline of leases over the partitions that have something · each slice opened, its domain resolved, its lane assigned
to the site found · handed to the site's `Desk`.

A site nobody here has met yet is probed with one slice, because only its contents name the domain.

Known limits: reclaiming the leases of another host's dead worker is done by hand (`sales-push host forget`, to come);
a dead worker of this host is replayed by `replay` at the start of the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.delivery import pool
from engine.delivery.campaigns import Campaigns, Loaded
from engine.delivery.connection import Outbound
from engine.delivery.desk import MOST, Desk, jitter
from engine.delivery.gatekeeper import Gatekeeper
from engine.delivery.hand import Hand, Letter
from engine.delivery.outcome import Outcome
from engine.delivery.press import Press
from engine.delivery.settling import Settling
from engine.delivery.site import NoSite, Resolver, Site
from engine.queue import pace, schedule
from engine.queue.journal import Journal
from engine.queue.lanes import Lanes, Lease, Leased, LeaseRequest
from engine.queue.permits import Permits
from engine.queue.slices import Contents, Header, Lost, Row, open_contents, parse_header
from engine.smtp.words import Step
from policy import keyspace
from policy.events import Event, Kind, Reason
from policy.gate import Permit, Standing
from policy.keys import Keyring, seal_note

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.25  # all partitions are looked at this often, whatever the news: for dues and lost wake-ups
BEAT_SECONDS = 4.0  # a third of a connection permit's life, and at most a third of a lease
PACE_SECONDS = 0.01  # between two rounds of leasing: news that come together are acted on together
UNRESOLVED_SLICES = 4  # of lanes without a site, a partition and round
STOCK_LIMIT = 20_000  # recipients in hand over all desks: memory stays bounded whatever the number of sites


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
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.holder = lanes.holder
        self.permits = permits
        self.journal = journal
        self.gatekeeper = Gatekeeper(lanes)
        self.press = Press(self)
        self.hello = hello
        self.patience = patience
        self.is_stopping = False
        self._redis = redis
        self._lanes = lanes
        self._campaigns = campaigns
        self._resolver = resolver
        self._keyring = keyring
        self._limits = limits
        self._retry = retry
        self._lease_seconds = lease_seconds
        self._lease_slices = lease_slices
        self._disk_floor = disk_floor
        self._settling = Settling(lanes, journal, keyring, self._gone, interval=settle_seconds)
        self._desks: dict[str, Desk] = {}
        self._hands: set[Hand] = set()
        self._ready: dict[int, dict[str, int]] = {}
        self._hot: set[int] = set(range(keyspace.PARTITIONS))
        self._assigned: dict[tuple[int, str], str] = {}
        self._news = asyncio.Event()
        self._clock_offset = time.time_ns() // 1000 - _micros(time.monotonic())
        self._beat_at = time.monotonic()
        self._trouble_until = 0.0
        self._disk_full = False
        self._failure: asyncio.Future[None] = self.loop.create_future()
        self._counts: dict[str, int] = {}
        self._full = False

    # --- what the worker says --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled or a failure that only a restart mends (a broken journal, an error of ours)."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._leasing(), name="leasing"),
                group.create_task(self.press.run(), name="press"),
                group.create_task(self._listening(), name="wake-ups"),
                group.create_task(self._beating(), name="heartbeat"),
                group.create_task(self._settling.run(), name="settling"),
                group.create_task(self._housekeeping(), name="housekeeping"),
            ]
            await self._failure
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """Lease nothing more and send nothing more than what is on the wire."""
        self.is_stopping = True
        self._news.set()

    async def drain(self, seconds: float) -> None:
        """After `stop`: finish what is on the wire, settle, hand the rest back. What takes longer is dropped: behind
        its dot it is in doubt and recorded so."""
        self.stop()
        closing = [asyncio.ensure_future(desk.close()) for desk in self._desks.values()]
        if closing:
            _, late = await asyncio.wait(closing, timeout=seconds)
            if late:
                self.abort()
                await asyncio.wait(late, timeout=5.0)
        await self._settling.flush()
        partitions = {hand.lease.partition for hand in self._hands}
        for hand in list(self._hands):
            if not hand.dead and not hand.has_news and not hand.asked:
                with contextlib.suppress(RedisError, OSError):
                    await self._settling.release(hand)
        with contextlib.suppress(RedisError, OSError):
            await self._lanes.leave(partitions)
        if not self._failure.done():
            self._failure.set_result(None)

    def abort(self) -> None:
        """Hurry: drop every connection now; what is behind its dot is in doubt and recorded so."""
        for desk in self._desks.values():
            desk.abort()

    def fail(self, error: BaseException) -> None:
        """Something of ours broke: the worker ends and is started again, the journal remembers."""
        log.error("the courier failed", exc_info=error)
        if not self._failure.done():
            self._failure.set_exception(error)

    def statistics(self) -> dict[str, int | float | dict[str, int | float]]:
        """Frozen figures for the metrics of this host."""
        return {
            "outcomes": dict(self._counts),
            "settled": self._settling.settled,
            "stale_settles": self._settling.stale,
            "slices_in_hand": len(self._hands),
            "recipients_in_stock": sum(len(desk.stock) for desk in self._desks.values()),
            "connections": sum(len(desk.lines) for desk in self._desks.values()),
            "sites": len(self._desks),
            "sites_backing_off": sum(desk.is_held for desk in self._desks.values()),
            "in_trouble": int(self.must_wait),
            "disk_full": int(self._disk_full),
            "events_full": int(self._full),
        }

    def now_us(self) -> int:
        """Redis TIME as last heard, carried on by our monotonic clock."""
        return _micros(time.monotonic()) + self._clock_offset

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

    def hungry(self, desk: Desk) -> None:
        if desk.appetite >= MOST:
            self._news.set()

    def put_back(self, letters: list[Letter]) -> None:
        """Letters taken and not sent go to the front of their desks' stock."""
        for letter in reversed(letters):
            if letter.hand.desk is not None:
                letter.hand.desk.put_back([letter])

    def compose(self, permitted: list[tuple[Permit, Letter]], void_at: float) -> list[Outbound]:
        """Render and sign a batch of messages of any jobs. A recipient that cannot be rendered is refused INVALID and
        does not stop the others."""
        messages: list[Outbound] = []
        self._counts["composed"] = self._counts.get("composed", 0) + len(permitted)
        by_job: dict[Loaded, list[tuple[Permit, Letter]]] = {}
        for permit, letter in permitted:
            by_job.setdefault(letter.hand.job, []).append((permit, letter))
        for job, pairs in by_job.items():
            composed, failed = job.compose(pairs)
            for letter in failed:
                letter.hand.abroad -= 1
                self.refuse(letter, Reason.INVALID)
            for letter, sender, recipient, wire in composed:
                messages.append(Outbound(letter, sender, recipient, wire, void_at, True))
        return messages

    def conclude(self, letter: Letter, outcome: Outcome, tls: int) -> None:
        """What an attempt came to: an end, or another attempt later."""
        hand = letter.hand
        delivered = outcome.kind is Kind.DELIVERED
        note = b"" if delivered else seal_note(self._keyring(), outcome.text)
        kind = outcome.kind
        delay: float | None = None
        if kind is Kind.DEFERRED:
            delay = self._next(hand, outcome.reason, in_doubt=outcome.resend)
            if delay is None:  # behind its dot it is not known to have expired
                kind = Kind.UNKNOWN if outcome.resend else Kind.EXPIRED
            else:
                delay = max(delay, min(outcome.wait, 3600.0))
        event = self._event(letter, kind, outcome.reason, outcome.code, outcome.enhanced, tls, note)
        if delay is not None:
            self._count("deferred")
            self._settling.retry(hand, letter.index, delay, event, in_doubt=outcome.resend)
        else:
            self._count(kind.name.lower())
            self._settling.terminal(hand, letter.index, event)

    def refuse(self, letter: Letter, reason: Reason) -> None:
        self._count("refused")
        self._settling.terminal(letter.hand, letter.index, self._event(letter, Kind.REFUSED, reason))

    def stand_down(self, hand: Hand, letters: list[Letter], standing: Standing) -> None:
        """The job or the lease as a whole may not go on. letters: of this hand, taken and not sent."""
        if standing in (Standing.CANCELLED, Standing.EXPIRED):
            kind = Kind.CANCELLED if standing is Standing.CANCELLED else Kind.EXPIRED
            for letter in letters:
                hand.abroad -= 1
                self._count(kind.name.lower())
                self._settling.terminal(hand, letter.index, self._event(letter, kind, Reason.NONE))
            return
        hand.abroad -= len(letters)
        if standing in (Standing.STALE, Standing.GONE):
            hand.dead = True
            self.journal.forget(hand.lease.partition, hand.lease.slice_id, hand.lease.token)
            self._gone(hand)
            return
        # paused or frozen: back to the lane as soon as nothing of it is on the wire; leasing passes it over there
        self._hold(hand)

    def expire(self, hand: Hand, indexes: list[int]) -> None:
        """Their time is over, and they were not on the wire."""
        self._end_all(hand, indexes, Kind.EXPIRED, Reason.NONE)

    def _hold(self, hand: Hand) -> None:
        if hand.desk is not None:
            hand.desk.drop(hand)
        hand.held = True

    async def hand_back(self, hand: Hand, delay: float) -> None:
        try:
            await self._settling.release(hand, delay)
        except (RedisError, OSError):
            self.in_trouble()  # the lease stays ours and ends with this process: replay hands it back

    async def announce_back_off(self, site: str, seconds: float) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self.permits.back_off(site, max(0.001, seconds))

    def _gone(self, hand: Hand) -> None:
        self._hands.discard(hand)
        if hand.desk is not None:
            hand.desk.forget(hand)

    def _count(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1

    def _next(self, hand: Hand, reason: Reason, *, in_doubt: bool = False) -> float | None:
        header = hand.header
        # One delay for what is deferred together keeps slices together: jitter is drawn a tenth of a second apart.
        return schedule.next_attempt(
            self._retry, header.attempt, reason, jitter(), now_us=self.now_us(), expires_at=header.expires_at,
            in_doubt=in_doubt,
        )  # fmt: skip

    def _event(
        self,
        letter: Letter,
        kind: Kind,
        reason: Reason,
        code: int = 0,
        enhanced: str = "",
        tls: int = 0,
        note: bytes = b"",
    ) -> Event:
        hand = letter.hand
        mref, tag = hand.reference(letter.index)
        return Event(
            int(kind), mref, hand.header.attempt + 1, self.now_us(), hand.row(letter.index).pseudonym, tag,
            int(reason), code, enhanced, tls, note,
        )  # fmt: skip

    # --- leasing ---------------------------------------------------------------------------------------------------

    async def _leasing(self) -> None:
        sweep_at = 0.0
        while not self.is_stopping:
            now = time.monotonic()
            if now >= sweep_at:
                self._hot.update(range(keyspace.PARTITIONS))
                # what waits is known from the last answers; while there is plenty to do, looking everywhere can wait
                sweep_at = now + (SWEEP_SECONDS * 4 if self._hands else SWEEP_SECONDS)
            if not self.must_wait:
                try:
                    await self._lease_round()
                except (RedisError, OSError):
                    self.in_trouble()
            timeout = max(0.0, min(sweep_at, self._next_due()) - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            self._news.clear()
            await asyncio.sleep(PACE_SECONDS)

    def _next_due(self) -> float:
        now_us, soonest = self.now_us(), float("inf")
        for sites in self._ready.values():
            for due in sites.values():
                if due > now_us:
                    soonest = min(soonest, due)
        return time.monotonic() + (soonest - now_us) / 1e6 if soonest != float("inf") else soonest

    async def _lease_round(self) -> None:
        requests = self._wanted()
        if not requests:
            return
        answers = await self._lanes.lease_many(requests)
        leases: list[Lease] = []
        for leased in answers:
            self._learn(leased)
            leases += leased.slices
        if leases:
            await asyncio.gather(*(self._carry(lease) for lease in leases))

    def _wanted(self) -> list[LeaseRequest]:
        stock = sum(len(desk.stock) for desk in self._desks.values())
        if stock >= STOCK_LIMIT:
            return []
        now_us = self.now_us()
        appetite = {ref: -(-desk.appetite // 64) for ref, desk in self._desks.items() if desk.appetite >= MOST}
        requests = []
        hot, self._hot = self._hot, set()
        for partition in hot | {p for p, sites in self._ready.items() if sites}:
            sites: list[tuple[str, int]] = []
            ready = self._ready.get(partition, {})
            for ref, due in ready.items():
                if due > now_us or ref == keyspace.UNRESOLVED:
                    continue
                if ref not in self._desks:
                    sites.append((ref, 1))
                elif (slices := min(appetite.get(ref, 0), self._lease_slices)) > 0:
                    sites.append((ref, slices))
                    appetite[ref] -= slices
            unresolved_due = ready.get(keyspace.UNRESOLVED)
            if sites or partition in hot or (unresolved_due is not None and unresolved_due <= now_us):
                requests.append(LeaseRequest(partition, sites, UNRESOLVED_SLICES))
        return requests

    def _learn(self, leased: Leased) -> None:
        self._clock_offset = leased.now_us - _micros(time.monotonic())
        self._full = leased.full
        ready = dict(leased.ready)
        if ready:
            self._ready[leased.partition] = ready
        else:
            self._ready.pop(leased.partition, None)

    async def _carry(self, lease: Lease) -> None:
        try:
            await self._carry_in(lease)
        except Exception as error:
            self.fail(error)

    async def _carry_in(self, lease: Lease) -> None:
        header = parse_header(lease.data)
        contents = (
            header
            if isinstance(header, Lost)
            else open_contents(self._keyring().queue, header, lease.partition, lease.data)
        )
        if isinstance(header, Lost):
            # Not a slice of ours at all: nothing in it can be counted, so it stays leased and is shown to the operator.
            log.critical("a slice is not readable", extra={"partition": lease.partition, "reason": header.reason})
            return
        job = await self._campaigns.get(header.job)
        if job is None or isinstance(contents, Lost):
            reason = contents.reason if isinstance(contents, Lost) else "job-unknown"
            log.critical("a slice is lost", extra={"partition": lease.partition, "job": header.job, "reason": reason})
            self._lose(lease, header)
            return
        hand = Hand(lease, header, contents, job, self._keyring().pepper)
        self._hands.add(hand)
        pending = header.pending()
        if header.expires_at <= self.now_us():
            self._end_all(hand, pending, Kind.EXPIRED, Reason.NONE)
            return
        site = await self._resolver.resolve(contents.domain)
        if isinstance(site, NoSite):
            self._no_site(hand, pending, site)
            return
        ref = keyspace.site_ref(site.name, self._keyring().lane)
        await self._assign(lease, ref)
        desk = self._desks.get(ref)
        if desk is None:
            limits, profile = self._limits(site)
            desk = self._desks[ref] = Desk(self, site, ref, limits, profile)
        desk.site = site  # the same MX set; its addresses may be newer
        if self.is_stopping:
            await self.hand_back(hand, 0.0)
            return
        if desk.is_held:
            self._hands.discard(hand)
            await self.hand_back(hand, max(0.05, desk.pace.idle_until / 1e6 - time.monotonic()))
            return
        desk.add(hand, pending)

    async def _assign(self, lease: Lease, ref: str) -> None:
        """Tell the partition where this lane goes, once, and again when its MX set has changed."""
        known = self._assigned.get((lease.partition, lease.lane))
        if lease.site == ref or (known == ref and lease.site == keyspace.UNRESOLVED):
            return
        try:
            await self._lanes.assign(lease.partition, lease.lane, ref)
        except (RedisError, OSError):
            self.in_trouble()
            return
        if len(self._assigned) > 100_000:
            self._assigned.clear()
        self._assigned[lease.partition, lease.lane] = ref
        self._hot.add(lease.partition)
        self._news.set()

    def _no_site(self, hand: Hand, pending: list[int], site: NoSite) -> None:
        if site.permanent:
            self._end_all(hand, pending, Kind.BOUNCED, site.reason, site.text)
            return
        delay = self._next(hand, Reason.DNS)
        if delay is None:
            self._end_all(hand, pending, Kind.EXPIRED, site.reason, site.text)
            return
        note = seal_note(self._keyring(), site.text)
        for index in pending:
            letter = Letter(hand, index, hand.reference(index)[0])
            event = self._event(letter, Kind.DEFERRED, site.reason, note=note)
            self._count("deferred")
            self._settling.retry(hand, index, delay, event)

    def _end_all(self, hand: Hand, pending: list[int], kind: Kind, reason: Reason, text: str = "") -> None:
        note = seal_note(self._keyring(), text)
        for index in pending:
            letter = Letter(hand, index, hand.reference(index)[0])
            self._count(kind.name.lower())
            self._settling.terminal(hand, index, self._event(letter, kind, reason, note=note))

    def _lose(self, lease: Lease, header: Header) -> None:
        """No key opens it, or its job is gone: every recipient ends LOST under a reference made of its place."""
        nobody = Contents("", [], [Row("", 0, 0, 0, 0, []) for _ in range(header.count)])
        hand = Hand(lease, header, nobody, self._campaigns.nothing, self._keyring().pepper)
        self._hands.add(hand)
        for index in header.pending():
            place = f"{lease.partition}/{lease.slice_id}/{index}".encode()
            mref = int.from_bytes(blake2b(place, digest_size=8, person=b"sp-lost").digest(), "big", signed=True)
            self._count("lost")
            event = Event(int(Kind.LOST), mref, header.attempt + 1, self.now_us())
            self._settling.terminal(hand, index, event)

    # --- loops -----------------------------------------------------------------------------------------------------

    async def _listening(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as listener:
                    await listener.subscribe(keyspace.WAKE)
                    async for message in listener.listen():
                        if message["type"] == "message" and message["data"].isdigit():
                            self._hot.add(int(message["data"]) % keyspace.PARTITIONS)
                            self._news.set()
            except (RedisError, OSError):
                await asyncio.sleep(0.5)  # the sweep goes on meanwhile

    async def _beating(self) -> None:
        while True:
            partitions = {hand.lease.partition for hand in self._hands}
            try:
                if partitions:
                    await self._lanes.heartbeat(partitions)
                self._beat_at = time.monotonic()
                for desk in list(self._desks.values()):
                    names = [line.permit for line in desk.lines.values()]
                    if names:
                        await self.permits.renew(desk.ref, names)
            except (RedisError, OSError):
                self.in_trouble()
                await asyncio.sleep(0.5)
                continue
            await asyncio.sleep(min(self._lease_seconds / 3, BEAT_SECONDS))

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            self._disk_full = not self.journal.has_room(self._disk_floor)
            for desk in list(self._desks.values()):
                desk.housekeeping(now)
            # hands that were held (paused, frozen) and have nothing on the wire any more go back to their lanes
            for hand in list(self._hands):
                if hand.held and not hand.dead and hand.is_at_rest:
                    await self.hand_back(hand, 0.0)


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
