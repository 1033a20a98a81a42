"""Leasing: due slices for the sites that can take them (step 5).

Laws: a lease names only sites with room, so a blocked site costs no lease calls and a free one never waits behind it;
a site nobody here has met is probed with one slice, because only its contents name the domain; transactional mail is
leased beside a stock full of campaigns, and campaigns beside that; what is outside its delivery window goes back until
that opens.

The loop: news (a wake-up from intake, a desk that got hungry, an instant that came; two partitions each quarter of a
second in any case) · one pipeline of leases over the partitions that have something · each slice opened (of a job of
before a restore of Redis: compared with the ledger, T12), its domain resolved, its lane assigned to the site found
where that pays · handed to the site's `Desk`.

Known limits: a lease whose reply was lost is ours without our knowing; `reconcile` finds and returns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.delivery import pool
from engine.delivery.campaigns import Campaigns
from engine.delivery.conclusions import Conclusions
from engine.delivery.desk import Desk
from engine.delivery.hand import Hand
from engine.delivery.press import question
from engine.delivery.site import NoSite, Resolver, Site
from engine.queue import pace
from engine.queue.epoch import Epoch
from engine.queue.lanes import Lanes, Lease, Leased, LeaseRequest
from engine.queue.slices import Lost, open_contents, parse_header
from policy import keyspace
from policy.crashpoints import reach
from policy.events import Kind, Reason
from policy.gate import Standing
from policy.keys import Keyring

if TYPE_CHECKING:
    from engine.delivery.courier import Courier

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.25  # some partitions are looked at this often, whatever the news: for dues and lost wake-ups
SWEEP_PARTITIONS = 2  # so many: all of them in eight seconds, and 8 calls a second where nothing is to be had
SOON = 60.0  # seconds: retries due within them are looked for at their instant, later ones wait for the sweep
GRAIN = 0.05  # seconds: retries of a partition that are due together are looked for together
PACE_SECONDS = 0.01  # between two rounds of leasing: news that come together are acted on together
FEW = 8  # slices of a lane that are leased one by one sooner than assigning it pays (assign costs as much as five)
UNRESOLVED_SLICES = 4  # of lanes without a site, a partition and round
STOCK_LIMIT = 20_000  # recipients in hand over all desks: memory stays bounded whatever the number of sites
RECONCILE_SECONDS, RECONCILE_LOOK = 30.0, 1.0
CARRY_SECONDS = 0.05  # what is known where it goes is on its desk in a few milliseconds
MOST_CARRIED = 256  # slices whose domain is being looked up at a time
DNS_SAID_SECONDS = 60.0
STRANGE_SECONDS = 60.0
NEW_KEY_SECONDS = 2.0  # workers read their keys again within a second of a change
ALARMS_KEPT = 10_000
_ENDS = {Standing.CANCELLED: Kind.CANCELLED, Standing.EXPIRED: Kind.EXPIRED}


class Leasing:
    """One per worker."""

    def __init__(
        self,
        courier: Courier,
        *,
        redis: Redis,
        lanes: Lanes,
        campaigns: Campaigns,
        resolver: Resolver,
        keyring: Callable[[], Keyring],
        limits: Callable[[Site], tuple[pool.Limits, pace.Profile]],
        conclusions: Conclusions,
        most_slices: int,
        epoch: Epoch | None = None,
    ) -> None:
        self.full = False
        self.strangers = 0  # how often a slice of a newer layout was met
        self._strange_after = 0.0
        self.asking = asyncio.Lock()  # held while leases may come into being that nobody here knows of yet
        self._epoch = epoch
        self._courier = courier
        self._redis = redis
        self._lanes = lanes
        self._campaigns = campaigns
        self._resolver = resolver
        self._keyring = keyring
        self._limits = limits
        self._conclusions = conclusions
        self._lease_slices = most_slices
        self._ready: dict[int, dict[str, int]] = {}
        self._hot: set[int] = set(range(keyspace.PARTITIONS))
        self._sweep = 0  # the partition that is looked at next
        self._expected: list[tuple[int, int]] = []  # a heap of (monotonic in GRAIN, partition)
        self._expecting: set[tuple[int, int]] = set()
        self.calls = self.empty_calls = 0
        self._news = asyncio.Event()
        self._alarmed: set[tuple[str, int]] = set()
        self._carrying: dict[asyncio.Task[None], str] = {}  # slices on their way to a desk, and the site they came from
        self._doubtful = False  # a lease call failed: some of it may have been done
        self._dns_said_at = -DNS_SAID_SECONDS

    def wake(self) -> None:
        """Something may be had, or may be wanted."""
        self._news.set()

    def expect(self, partition: int, delay: float) -> None:
        """A slice was laid there that is due in so many seconds."""
        if delay <= SOON:
            place = (math.ceil((time.monotonic() + delay) / GRAIN), partition)
            if place not in self._expecting:
                self._expecting.add(place)
                heapq.heappush(self._expected, place)
                self._news.set()

    @property
    def is_open(self) -> bool:
        """Whether anything may be leased now."""
        return not self._courier.must_wait and (self._epoch is None or self._epoch.is_open)

    def look_everywhere(self) -> None:
        """What waits may be due earlier than the last answers said."""
        self._hot.update(range(keyspace.PARTITIONS))
        self._news.set()

    async def run(self) -> None:
        try:
            await self._lease_on()
        finally:
            for task in list(self._carrying):
                task.cancel()  # what they carried is ours, and goes back with all that is

    async def _lease_on(self) -> None:
        sweep_at = 0.0
        while not self._courier.is_ending:
            now = time.monotonic()
            if now >= sweep_at:
                self._hot.update((self._sweep + place) % keyspace.PARTITIONS for place in range(SWEEP_PARTITIONS))
                self._sweep = (self._sweep + SWEEP_PARTITIONS) % keyspace.PARTITIONS
                sweep_at = now + SWEEP_SECONDS
            while self._expected and self._expected[0][0] * GRAIN <= now:
                self._expecting.discard(self._expected[0])
                self._hot.add(heapq.heappop(self._expected)[1])
            if self._may_lease:
                try:
                    await self._lease_round()
                except (RedisError, OSError):
                    self._doubtful = True
                    self._courier.in_trouble()
            paced = time.monotonic() + PACE_SECONDS  # news on an idle engine are acted on at once
            timeout = max(0.0, min(sweep_at, self._next_due()) - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            self._news.clear()
            await asyncio.sleep(paced - time.monotonic())

    @property
    def _may_lease(self) -> bool:
        courier = self._courier
        return not (courier.is_stopping or courier.must_wait) and (self._epoch is None or self._epoch.is_open)

    def _next_due(self) -> float:
        now_us = self._courier.now_us()
        soonest = math.inf
        expected = self._expected[0][0] * GRAIN if self._expected else soonest
        for sites in self._ready.values():
            for due in sites.values():
                if due > now_us:
                    soonest = min(soonest, due)
        return min(expected, time.monotonic() + (soonest - now_us) / 1e6)

    async def _lease_round(self) -> None:
        requests = self._wanted()
        if not requests:
            return
        reach("before-lease")
        async with self.asking:
            if self._courier.is_stopping:
                return
            answers = await self._lanes.lease_many(requests)
        if any(leased.slices for leased in answers):
            reach("after-lease")
        leases: list[Lease] = []
        self.calls += len(answers)
        self.empty_calls += sum(not leased.slices for leased in answers)
        for leased in answers:
            self._learn(leased)
            leases += leased.slices
        if leases:
            # A name server that does not answer takes ten seconds over one domain: the others do not wait for it.
            await asyncio.wait([self._begin(lease) for lease in leases], timeout=CARRY_SECONDS)

    def _begin(self, lease: Lease) -> asyncio.Task[None]:
        task = asyncio.create_task(self._carry(lease), name="carry")
        self._carrying[task] = lease.site
        task.add_done_callback(lambda task: self._carrying.pop(task, None))
        return task

    def _wanted(self) -> list[LeaseRequest]:
        stock = sum(len(desk.stock) for desk in self._courier.desks.values())
        if stock >= 2 * STOCK_LIMIT:
            return []
        is_full = stock >= STOCK_LIMIT  # of campaigns: transactional mail goes before them, so it is taken all the same
        now_us = self._courier.now_us()
        carried = Counter(self._carrying.values())
        appetite = {
            ref: max(0, -(-desk.appetite // 64) - carried[ref])
            for ref, desk in self._courier.desks.items()
            if desk.is_hungry and not is_full
        }
        unresolved = 0 if is_full or len(self._carrying) >= MOST_CARRIED else UNRESOLVED_SLICES
        requests = []
        hot, self._hot = self._hot, set()
        for partition in hot | {p for p, sites in self._ready.items() if sites}:
            sites: list[tuple[str, int]] = []
            urgent: list[tuple[str, int]] = []
            plain: list[tuple[str, int]] = []
            ready = self._ready.get(partition, {})
            for ref, due in ready.items():
                if due > now_us or ref == keyspace.UNRESOLVED:
                    continue
                desk = self._courier.desks.get(ref)
                if desk is None:
                    if not carried[ref]:
                        (urgent if is_full else sites).append((ref, 1))
                elif (slices := min(appetite.get(ref, 0), self._lease_slices)) > 0:
                    sites.append((ref, slices))
                    appetite[ref] -= slices
                elif partition in hot and (kind := desk.lacks()):
                    # full of the one kind: the other is looked for when there is news, and once a sweep
                    (urgent if kind == "urgent" else plain).append((ref, 1))
            unresolved_due = ready.get(keyspace.UNRESOLVED)
            if sites or partition in hot or (unresolved_due is not None and unresolved_due <= now_us):
                requests.append(LeaseRequest(partition, sites, unresolved, urgent, plain))
        return requests

    def _learn(self, leased: Leased) -> None:
        self._courier.hear_time(leased.now_us)
        self.full = leased.full
        if leased.strangers:
            self._stranger(leased)
        ready = dict(leased.ready)
        if self._is_news(leased, ready):
            self._news.set()
        if ready:
            self._ready[leased.partition] = ready
        else:
            self._ready.pop(leased.partition, None)

    def _is_news(self, leased: Leased, ready: dict[str, int]) -> bool:
        """Whether the next round shall follow this one at once: a site of which nobody knew that it has something, or
        lanes without a site of which more are due than a round takes. Everything else has its own waker."""
        known, now = self._ready.get(leased.partition, {}), leased.now_us
        if any(
            due <= now and known.get(ref, now + 1) > now for ref, due in ready.items() if ref != keyspace.UNRESOLVED
        ):
            return True
        had = any(lease.site == keyspace.UNRESOLVED for lease in leased.slices)
        return had and ready.get(keyspace.UNRESOLVED, now + 1) <= now

    def _stranger(self, leased: Leased) -> None:
        """A newer program's slices wait for it; we neither lease nor lose them, and say so once a minute."""
        self.strangers += leased.strangers
        now = time.monotonic()
        if now >= self._strange_after:
            self._strange_after = now + STRANGE_SECONDS
            log.critical(
                "slices of a newer layout are left alone: is this the old program of a rolling restart?",
                extra={"partition": leased.partition, "slices": leased.strangers},
            )

    async def _carry(self, lease: Lease) -> None:
        try:
            await self._carry_in(lease)
        except Exception as error:
            self._courier.fail(error)

    async def end(self, lease: Lease) -> None:
        """A lease of what was cancelled: its recipients end, wherever they would have gone."""
        try:
            opened = await self._open(lease)
            if opened is not None:
                self._conclusions.end_all(*opened, Kind.CANCELLED, Reason.NONE)
        except Exception as error:
            self._courier.fail(error)

    async def _open(self, lease: Lease) -> tuple[Hand, list[int]] | None:
        """The slice in our hands and who of it is left, or None: it does not open, and what follows is done."""
        header = parse_header(lease.data)
        contents = (
            header
            if isinstance(header, Lost)
            else open_contents(self._keyring().queue, header, lease.partition, lease.data)
        )
        if isinstance(header, Lost):
            # Not a slice of ours at all: nothing in it can be counted, so it stays leased and is shown to the operator.
            log.critical("a slice is not readable", extra={"partition": lease.partition, "reason": header.reason})
            return None
        is_young = isinstance(contents, Lost) and header.key_id > self._keyring().queue_id
        if is_young and header.expires_at > self._courier.now_us():
            await self._wait_for_key(lease, header.key_id)
            return None
        suspected = self._epoch if self._epoch is not None and self._epoch.suspects(header.job) else None
        job = await self._campaigns.get(header.job)
        if job is None or isinstance(contents, Lost):
            if suspected is not None and (await suspected.accounted(header.job, ()))[0]:
                self._courier.hands.add(self._conclusions.bury(lease, header))
                return None
            self._alarm(header.job, contents.reason if isinstance(contents, Lost) else "job-unknown")
            self._courier.hands.add(self._conclusions.lose(lease, header))
            return None
        hand = Hand(lease, header, contents, job, self._keyring().pepper)
        self._courier.hands.add(hand)
        return hand, header.pending() if suspected is None else await self._left_of(hand, suspected)

    async def _wait_for_key(self, lease: Lease, key_id: int) -> None:
        """Sealed under a key younger than ours: another process has read this week's key before us, or this host was
        not given it. Nobody is lost by that; the slice goes back for a moment."""
        if ("", key_id) not in self._alarmed:
            self._alarmed.add(("", key_id))
            log.warning("slices are sealed with a newer queue key than this worker has", extra={"week": key_id})
        with contextlib.suppress(RedisError, OSError):  # a lease nobody knows of: `reconcile` returns it
            await self._lanes.release(lease.partition, lease.slice_id, lease.token, NEW_KEY_SECONDS)

    def _alarm(self, job: int, reason: str) -> None:
        """Once for each job and reason: a job of a million has many slices."""
        if (reason, job) not in self._alarmed:
            if len(self._alarmed) > ALARMS_KEPT:
                self._alarmed.clear()
            self._alarmed.add((reason, job))
            log.critical("slices of a job are lost", extra={"job": job, "reason": reason})

    async def _carry_in(self, lease: Lease) -> None:
        opened = await self._open(lease)
        if opened is None:
            return
        hand, pending = opened
        if not pending:
            return
        header, contents, job = hand.header, hand.contents, hand.job
        if header.expires_at <= self._courier.now_us():
            self._conclusions.end_all(hand, pending, Kind.EXPIRED, Reason.NONE)
            return
        if shut := job.opens_in(self._courier.now_us()):
            await self._wait_outside(hand, pending, shut)
            return
        site = await self._resolver.resolve(contents.domain)
        if hand.dead:
            return  # we let go of it while DNS was thinking
        if isinstance(site, NoSite):
            if wait := self._resolver.wait(contents.domain):
                await self._wait_for_dns(hand, wait)
            else:
                self._conclusions.no_site(hand, pending, site)
            return
        ref = keyspace.site_ref(site.name, self._keyring().lane)
        desk = self._courier.desks.get(ref)
        if desk is None:
            limits, profile = self._limits(site)
            desk = self._courier.desks[ref] = Desk(self._courier, site, ref, limits, profile)
        desk.site = site  # the same MX set; its addresses may be newer
        await self._assign(lease, ref, desk.is_held)
        if self._courier.is_stopping:
            await self._courier.hand_back(hand, 0.0)
            return
        if desk.is_held:
            self._courier.hands.discard(hand)
            await self._courier.hand_back(hand, max(0.05, desk.pace.idle_until / 1e6 - time.monotonic()))
            return
        desk.add(hand, pending)

    async def _wait_outside(self, hand: Hand, pending: list[int], delay: float) -> None:
        """The delivery window of its job is closed: back until it opens, unless the job has ended meanwhile."""
        [answer] = (await self._courier.gatekeeper.ask([question(hand, pending[:1])])).answers
        if answer is not None and answer.standing in _ENDS:
            self._conclusions.end_all(hand, pending, _ENDS[answer.standing], Reason.NONE)
            return
        self._courier.hands.discard(hand)
        await self._courier.hand_back(hand, delay)

    async def _wait_for_dns(self, hand: Hand, delay: float) -> None:
        """DNS cannot say where its domain is, which is no attempt at anybody: all of the lane waits a little."""
        now = time.monotonic()
        if now - self._dns_said_at >= DNS_SAID_SECONDS:
            self._dns_said_at = now
            log.warning("DNS is in trouble", extra={"domains": self._resolver.statistics()["in_trouble"]})
        self._conclusions.count("waiting_for_dns", len(hand.header.pending()))
        self._courier.hands.discard(hand)
        await self._courier.hand_back(hand, delay)
        try:
            await self._lanes.postpone(hand.lease.partition, hand.lease.lane, delay)
        except (RedisError, OSError):
            self._courier.in_trouble()

    async def _left_of(self, hand: Hand, epoch: Epoch) -> list[int]:
        """Who of a slice is still to be written to, where the store may have forgotten who was (T12)."""
        pending = hand.header.pending()
        over, ended = await epoch.accounted(hand.header.job, [hand.reference(index)[0] for index in pending])
        known = [index for index in pending if over or hand.reference(index)[0] in ended]
        if known:
            self._conclusions.count("known", len(known))
            self._conclusions.settling.known(hand, known)
        return [index for index in pending if index not in known]

    async def _assign(self, lease: Lease, ref: str, is_held: bool) -> None:
        """Tell the partition where this lane goes, and again when its MX set has changed. A lane of few
        slices is not worth the script, unless they go back to wait for a site that is held: then they wait there, and
        not among those whose site nobody knows."""
        is_new = lease.site == keyspace.UNRESOLVED
        if lease.site == ref or (is_new and lease.others < FEW and not is_held):
            return
        reach("before-assign")
        try:
            await self._lanes.assign(lease.partition, lease.lane, ref)
        except (RedisError, OSError):
            self._courier.in_trouble()
            return
        reach("after-assign")
        self._hot.add(lease.partition)
        self._news.set()

    async def listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as listener:
                    await listener.subscribe(keyspace.WAKE)
                    self._courier.hear_of_halts()  # what was said before we listened, too
                    async for message in listener.listen():
                        if message["type"] != "message":
                            continue
                        if message["data"].isdigit():
                            self._hot.add(int(message["data"]) % keyspace.PARTITIONS)
                            self._news.set()
                        elif message["data"] == keyspace.WAKE_HALTS.encode():
                            self._courier.hear_of_halts()
            except (RedisError, OSError):
                await asyncio.sleep(0.5)  # the sweep goes on meanwhile

    async def reconcile(self) -> None:
        """The client repeats a call whose reply was lost, so a lease may be ours that we never heard of: one that is
        unknown at two looks in a row goes back. Looked for when a connection was made anew, and now and then."""
        unknown: set[tuple[int, str, int]] = set()
        looked_at, lines = time.monotonic(), self._lines
        while True:
            await asyncio.sleep(RECONCILE_LOOK)
            is_time = time.monotonic() - looked_at >= RECONCILE_SECONDS
            if not (is_time or unknown or self._doubtful or lines != self._lines):
                continue
            looked_at, lines, self._doubtful = time.monotonic(), self._lines, False
            known = {(h.lease.partition, h.lease.slice_id, h.lease.token) for h in self._courier.hands}
            try:
                strays = set(await self._lanes.our_leases()) - known
                for stray in strays & unknown:
                    await self._lanes.release(*stray)
                unknown = strays - unknown
            except (RedisError, OSError):
                self._doubtful = True
                self._courier.in_trouble()

    @property
    def _lines(self) -> int:
        """How many connections to Redis there have been: a new one may be in the place of one that lost a reply."""
        return self._epoch.connections if self._epoch is not None else 0
