"""Leasing: due slices for the sites that can take them (step 5).

Laws: a lease names only sites with room, so a blocked site costs no lease calls and a free one never waits behind it;
a site nobody here has met is probed with one slice, because only its contents name the domain.

The loop: news (a wake-up from intake, a desk that got hungry, an instant that came, or a quarter of a second) · one
pipeline of leases over the partitions that have something · each slice opened, its domain resolved, its lane assigned
to the site found · handed to the site's `Desk`.

Known limits: a lease whose reply was lost is ours without our knowing; `reconcile` finds and returns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.delivery import pool
from engine.delivery.campaigns import Campaigns
from engine.delivery.conclusions import Conclusions
from engine.delivery.desk import MOST, Desk
from engine.delivery.hand import Hand
from engine.delivery.site import NoSite, Resolver, Site
from engine.queue import pace
from engine.queue.lanes import Lanes, Lease, Leased, LeaseRequest
from engine.queue.slices import Lost, open_contents, parse_header
from policy import keyspace
from policy.events import Kind, Reason
from policy.keys import Keyring

if TYPE_CHECKING:
    from engine.delivery.courier import Courier

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.25  # all partitions are looked at this often, whatever the news: for dues and lost wake-ups
PACE_SECONDS = 0.01  # between two rounds of leasing: news that come together are acted on together
UNRESOLVED_SLICES = 4  # of lanes without a site, a partition and round
STOCK_LIMIT = 20_000  # recipients in hand over all desks: memory stays bounded whatever the number of sites
RECONCILE_SECONDS = 30.0


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
    ) -> None:
        self.full = False
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
        self._assigned: dict[tuple[int, str], str] = {}
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Something may be had, or may be wanted."""
        self._news.set()

    async def run(self) -> None:
        sweep_at = 0.0
        while not self._courier.is_stopping:
            now = time.monotonic()
            if now >= sweep_at:
                self._hot.update(range(keyspace.PARTITIONS))
                # what waits is known from the last answers; while there is plenty to do, looking everywhere can wait
                sweep_at = now + (SWEEP_SECONDS * 4 if self._courier.hands else SWEEP_SECONDS)
            if not self._courier.must_wait:
                try:
                    await self._lease_round()
                except (RedisError, OSError):
                    self._courier.in_trouble()
            timeout = max(0.0, min(sweep_at, self._next_due()) - time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            self._news.clear()
            await asyncio.sleep(PACE_SECONDS)

    def _next_due(self) -> float:
        now_us, soonest = self._courier.now_us(), float("inf")
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
        stock = sum(len(desk.stock) for desk in self._courier.desks.values())
        if stock >= STOCK_LIMIT:
            return []
        now_us = self._courier.now_us()
        appetite = {ref: -(-desk.appetite // 64) for ref, desk in self._courier.desks.items() if desk.appetite >= MOST}
        requests = []
        hot, self._hot = self._hot, set()
        for partition in hot | {p for p, sites in self._ready.items() if sites}:
            sites: list[tuple[str, int]] = []
            ready = self._ready.get(partition, {})
            for ref, due in ready.items():
                if due > now_us or ref == keyspace.UNRESOLVED:
                    continue
                if ref not in self._courier.desks:
                    sites.append((ref, 1))
                elif (slices := min(appetite.get(ref, 0), self._lease_slices)) > 0:
                    sites.append((ref, slices))
                    appetite[ref] -= slices
            unresolved_due = ready.get(keyspace.UNRESOLVED)
            if sites or partition in hot or (unresolved_due is not None and unresolved_due <= now_us):
                requests.append(LeaseRequest(partition, sites, UNRESOLVED_SLICES))
        return requests

    def _learn(self, leased: Leased) -> None:
        self._courier.hear_time(leased.now_us)
        self.full = leased.full
        ready = dict(leased.ready)
        if ready:
            self._ready[leased.partition] = ready
        else:
            self._ready.pop(leased.partition, None)

    async def _carry(self, lease: Lease) -> None:
        try:
            await self._carry_in(lease)
        except Exception as error:
            self._courier.fail(error)

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
            self._courier.hands.add(self._conclusions.lose(lease, header))
            return
        hand = Hand(lease, header, contents, job, self._keyring().pepper)
        self._courier.hands.add(hand)
        pending = header.pending()
        if header.expires_at <= self._courier.now_us():
            self._conclusions.end_all(hand, pending, Kind.EXPIRED, Reason.NONE)
            return
        site = await self._resolver.resolve(contents.domain)
        if isinstance(site, NoSite):
            self._conclusions.no_site(hand, pending, site)
            return
        ref = keyspace.site_ref(site.name, self._keyring().lane)
        await self._assign(lease, ref)
        desk = self._courier.desks.get(ref)
        if desk is None:
            limits, profile = self._limits(site)
            desk = self._courier.desks[ref] = Desk(self._courier, site, ref, limits, profile)
        desk.site = site  # the same MX set; its addresses may be newer
        if self._courier.is_stopping:
            await self._courier.hand_back(hand, 0.0)
            return
        if desk.is_held:
            self._courier.hands.discard(hand)
            await self._courier.hand_back(hand, max(0.05, desk.pace.idle_until / 1e6 - time.monotonic()))
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
            self._courier.in_trouble()
            return
        if len(self._assigned) > 100_000:
            self._assigned.clear()
        self._assigned[lease.partition, lease.lane] = ref
        self._hot.add(lease.partition)
        self._news.set()

    async def listen(self) -> None:
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

    async def reconcile(self) -> None:
        """The client repeats a call whose reply was lost, so a lease may be ours that we never heard of: one that is
        unknown at two looks in a row goes back."""
        unknown: set[tuple[int, str, int]] = set()
        while True:
            await asyncio.sleep(RECONCILE_SECONDS)
            known = {(h.lease.partition, h.lease.slice_id, h.lease.token) for h in self._courier.hands}
            try:
                strays = set()
                for partition in range(keyspace.PARTITIONS):
                    leases = await self._lanes.holder_leases(partition, self._courier.holder)
                    strays |= {(partition, slice_id, token) for slice_id, token in leases} - known
                for stray in strays & unknown:
                    await self._lanes.release(*stray)
                unknown = strays - unknown
            except (RedisError, OSError):
                self._courier.in_trouble()
