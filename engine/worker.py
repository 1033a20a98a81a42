"""One engine worker: composition in one place (steps 1 to 10 of the journey, in one process).

Path: 1. settings, keys, stores; 2. Redis is waited for, the journals a dead worker of this host left are replayed, and
leasing is open, before anything is leased (`delivery.arrival`); 3. intake and courier run side by side until SIGTERM,
which drains, or until one of them fails, which ends the process with exit code 1: the supervisor starts another, and
the journal remembers.

Redis come back older (T12) ends the worker with exit code 3: its leases mean nothing any more. What is on the wire is
finished and journalled, and its last sign of life is left standing: the writer opens leasing when the successor has
replayed and says the new epoch in its statistics (-1 before).

SIGTERM: from that instant nothing new is leased; what is on the wire is finished, the rest goes back at once, exit
code 0. 1 when something had to stay leased, because Redis was away to the end: the journal or `host forget` has it.
A second SIGTERM drops the connections: what is behind its dot is in doubt and recorded so. Before anything was leased
(start, replay) SIGTERM ends at once: a replay that is cut short is begun again by the next worker.

Worker 0 also replays the journals of workers that are no longer started here (fewer workers than before).

Keys are read again within a second of a change of their folder, and every minute whatever its date says; DKIM keys
within a second of a change of their files (`SigningKeys`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import platform
import secrets
import signal
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from engine.campaign.claims import inherit
from engine.campaign.intake import Intake
from engine.campaign.intake import Limits as IntakeLimits
from engine.delivery import arrival, pool, sockets
from engine.delivery.campaigns import Campaigns, load_signers
from engine.delivery.conclusions import jitter
from engine.delivery.courier import Courier
from engine.delivery.departure import ended
from engine.delivery.hastening import cancelled
from engine.delivery.presence import Presence, home_of
from engine.delivery.reclaiming import Reclaiming
from engine.delivery.replay import Tools
from engine.delivery.site import Resolver, Site
from engine.message import Signer
from engine.message.multibuffer import Unavailable, open_library
from engine.outlets import outlets
from engine.queue import pace, schedule
from engine.queue.epoch import Epoch
from engine.queue.journal import JournalBroken
from engine.queue.lanes import Lanes
from engine.queue.permits import Permits
from engine.queue.slices import forget_keys
from engine.settings import EngineSettings, SiteLimits, dkim_files
from engine.smtp.words import PATIENCE, Step
from policy import logs, valkey
from policy.fence import Fence
from policy.keys import Keyring, KeyringError
from policy.keysource import source_of
from policy.ledger import Reader
from policy.outlets import check as check_outlets
from policy.schema import open_store
from policy.settings import ConfigError, PolicySettings, Problem, load
from policy.vitals import Vitals
from policy.wire import WriterClient

log = logging.getLogger(__name__)

STORE_OLDER = 3  # exit code
OLDER_SECONDS = 8.0  # for what is on the wire, when Redis came back older: the writer waits half a minute for all of us
KEYS_SECONDS, KEYS_LOOK_SECONDS = 60.0, 1.0
INTAKE_SECONDS = 5.0  # the intake finishes the chunk it has begun; cut short, somebody does it again
FIRST = asyncio.FIRST_COMPLETED
PERMIT_LIFE = 12.0  # seconds a killed worker's connections stay counted; renewed three times in that time


class Keys:
    """The keyring as it is now: weekly keys come, and are destroyed."""

    def __init__(self, settings: PolicySettings) -> None:
        self._folder = settings.keys_dir
        self._source = source_of(settings)
        self._seen = self._changed()
        self.current = self._source.load()

    def __call__(self) -> Keyring:
        return self.current

    async def follow(self) -> None:
        read_at = time.monotonic()
        while True:
            await asyncio.sleep(KEYS_LOOK_SECONDS)
            seen = self._changed()
            if seen == self._seen and time.monotonic() - read_at < KEYS_SECONDS:
                continue
            self._seen, read_at = seen, time.monotonic()
            try:
                fresh = await asyncio.to_thread(self._source.load)
            except (KeyringError, OSError):
                log.exception("the keys could not be read again; the ones in memory stay in use")
                continue
            if self.current.queue.keys() - fresh.queue.keys():
                forget_keys()  # destroyed: no cipher of it stays set up
            self.current = fresh

    def _changed(self) -> int:
        """When something was put into the folder or taken out of it."""
        try:
            return self._folder.stat().st_mtime_ns
        except OSError:
            return -1


class SigningKeys:
    """The DKIM keys of the settings, and whether they are others than last time: selectors are rotated by putting
    files into ``keys_dir/dkim`` (mail-standards 2.3), without a restart."""

    def __init__(self, settings: EngineSettings, keys_dir: Path) -> None:
        self._settings = settings
        self._keys_dir = keys_dir
        self._seen = self._state()

    def load(self) -> dict[str, list[Signer]]:
        """Blocking: 40 ms a key. Raises ValueError, OSError."""
        return load_signers(dkim_files(self._settings, self._keys_dir), self._settings.signing.implementation)

    async def follow(self, campaigns: Campaigns) -> None:
        """Until cancelled. What fails (a file that is half written) is tried again at the next look."""
        while True:
            await asyncio.sleep(KEYS_LOOK_SECONDS)
            seen = await asyncio.to_thread(self._state)
            if seen != self._seen and await campaigns.reload_signers(self.load):
                self._seen = seen
                log.info("DKIM keys were read again")

    def _state(self) -> list[tuple[str, int, int]]:
        """(name, time of change, size) of every key file."""
        configured = [
            Path(name) for key in self._settings.dkim.values() for name in (key.rsa_key, key.ed25519_key) if name
        ]
        found = []
        for path in [*sorted((self._keys_dir / "dkim").glob("*.pem")), *configured]:
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((str(path), status.st_mtime_ns, status.st_size))
        return found


def retry_plan(settings: EngineSettings) -> schedule.Retry:
    """The retry schedule of the settings, as the pure room wants it."""
    retry = settings.retry
    return schedule.Retry(
        base=retry.base,
        cap=max(retry.cap, retry.base),
        schedule=tuple(retry.schedule),
        greylist_low=retry.greylist * 0.5,
        greylist_high=retry.greylist * 1.5,
    )


def limits_of(settings: EngineSettings, site: Site) -> tuple[pool.Limits, pace.Profile]:
    """What a site may get: the longest matching pattern of [engine.shaping], else [engine.limits]."""
    chosen: SiteLimits = settings.limits
    best = -1
    for pattern, limits in settings.shaping.items():
        if len(pattern) > best and any(_matches(pattern, target.name) for target in site.hosts):
            chosen, best = limits, len(pattern)
    workers = settings.worker_count
    per_worker = max(1, -(-chosen.connections // workers))
    profile = pace.Profile(
        start=min(float(settings.pace.start), float(per_worker)),
        ceiling=float(per_worker),
        rate=chosen.rate,
        rate_floor=min(0.1, chosen.rate) if chosen.rate else 0.1,
        calm=settings.pace.calm,
        dead_after=settings.pace.dead_after,
        back_off=settings.pace.back_off,
        back_off_cap=settings.pace.back_off_cap,
        block_back_off=settings.pace.block_back_off,
    )
    allowed = pool.Limits(
        connections=chosen.connections,
        rate=chosen.rate,
        burst=chosen.burst,
        messages_per_connection=chosen.messages_per_connection,
    )
    return allowed, profile


def _matches(pattern: str, host: str) -> bool:
    return pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def run_worker(index: int, config: Path | None) -> int:
    """Exit code: 0 drained, 1 failed, 3 Redis came back older. Raises ConfigError, KeyringError before all that."""
    policy = load(PolicySettings, config)
    settings = load(EngineSettings, config)
    check_outlets(policy, outlets(settings), datetime.now(UTC).date())
    logs.configure(f"engine-{index}", json=policy.log_json, level=policy.log_level)
    if settings.signing.implementation == "multi-buffer":
        try:
            open_library()
        except Unavailable as error:
            said = f'"multi-buffer" cannot be had here: {error}'
            remedy = 'install the extra `fast`, or set "auto"'
            raise ConfigError([Problem("engine.signing.implementation", said, remedy)]) from None
    return uvloop.run(_work(index, policy, settings))


async def _work(index: int, policy: PolicySettings, settings: EngineSettings) -> int:
    stopped = asyncio.Event()
    hurry = asyncio.Event()
    begun = asyncio.Event()  # something may be leased: from here a signal drains
    loop = asyncio.get_running_loop()
    ourselves = asyncio.current_task()

    def on_signal() -> None:
        if stopped.is_set():
            hurry.set()
        elif not begun.is_set() and ourselves is not None:
            ourselves.cancel()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    keys = Keys(policy)
    fence = Fence()
    redis = valkey.connect(policy.redis_address(), fence)
    store = open_store(policy.sql_address(), writer=False)
    reader = Reader(store)
    writer = WriterClient(policy.writer_socket)
    # The holder names host, worker and journal (decision 6); the random part tells this life from the last one.
    holder = f"{platform.node() or 'host'}:{index}:{os.getpid()}-{secrets.token_hex(4)}"
    lanes = Lanes(redis, holder)
    journals = policy.data_dir / "journal"
    epoch = Epoch(redis, fence, reader)
    signs, vitals = arrival.Signs(epoch), Vitals(policy.data_dir, "engine", index)
    beat = asyncio.create_task(vitals.beat(signs, time.time), name="vitals")
    try:
        if not await arrival.unless_older(fence, arrival.reached(redis, epoch)):
            return STORE_OLDER
        signing = SigningKeys(settings, policy.keys_dir)
        signers = await asyncio.to_thread(signing.load)
        campaigns = Campaigns(reader, keys, signers, public_url=policy.public_url, bounce_domain=policy.bounce_domain)
        journal = await arrival.own_journal(journals / str(index), holder, epoch)
        following = asyncio.create_task(epoch.follow(journal.ledgered), name="epoch")
        home = home_of(policy.data_dir)
        presence = Presence(redis, holder, home)
        saying = asyncio.create_task(presence.run(), name="presence")
        rotating = asyncio.create_task(signing.follow(campaigns), name="signing keys")
        try:
            tools = Tools(redis, lanes, campaigns, keys(), retry_plan(settings), epoch.now_us(), jitter, epoch)
            heir = partial(inherit, redis, holder)
            replayed = arrival.replayed(journals, index, settings.worker_count, tools, journal, holder, heir)
            if not await arrival.unless_older(fence, replayed):
                return STORE_OLDER
            signs.is_ready = True
            with contextlib.suppress(OSError):
                vitals.publish(signs(), time.time())  # the writer may be waiting for this word
            if not await arrival.unless_older(fence, epoch.opened()):
                return STORE_OLDER
            await presence.succeed(lambda other: other == index or (index == 0 and other >= settings.worker_count))
            resolver = Resolver.from_settings(settings)
            courier = Courier(
                redis=redis,
                lanes=lanes,
                permits=Permits(redis, life=PERMIT_LIFE),
                journal=journal,
                campaigns=campaigns,
                resolver=resolver,
                keyring=keys,
                limits=lambda site: limits_of(settings, site),
                retry=retry_plan(settings),
                hello=settings.ehlo_name,
                patience={
                    step: seconds * settings.patience for step, seconds in PATIENCE.items() if step is not Step.IDLE
                },
                lease_seconds=settings.lease_seconds,
                lease_slices=settings.batch.lease_slices,
                disk_floor=settings.min_free_bytes,
                settle_seconds=min(0.2, settings.batch.settle_seconds),
                most_sockets=sockets.of_this_process(),
                epoch=epoch,
                cancelled=partial(cancelled, store) if index == 0 else None,
                reclaiming=Reclaiming(redis, lanes, journals, settings.lease_seconds, home=home),
            )
            intake = Intake(
                redis=redis,
                lanes=lanes,
                writer=writer,
                engine=store,
                keyring=keys,
                signing_domains=lambda: campaigns.signing_domains,
                consumer=holder,
                life={"campaign": settings.expiry.campaign, "transactional": settings.expiry.transactional},
                limits=IntakeLimits(
                    claim=settings.intake.claim,
                    deliveries=settings.intake.deliveries,
                    message_bytes=settings.intake.message_bytes,
                ),
                epoch=epoch,
                clock=epoch.now_us,  # what the scripts compare with; this host's own clock may be wrong by days
            )
            courier.hear_time(epoch.now_us())
            signs.sources += [courier.statistics, partial(_figures, intake)]
            # What is alive now stays: it need not be looked at again. Messages make no cycles, so the collector finds
            # nothing and costs 5 % of a worker at its usual threshold (py-spy, 12,000 recipients).
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 20)
            begun.set()
            return await _both(courier, intake, keys, presence, fence, stopped, hurry, settings)
        finally:
            await ended([saying, following, rotating])
            await presence.leave()
            with contextlib.suppress(JournalBroken):
                await journal.close()
    except asyncio.CancelledError:
        if begun.is_set() or not stopped.is_set():
            raise
        log.info("worker ends before it began")
        return 0
    finally:
        await ended([beat])
        if fence.older:
            with contextlib.suppress(OSError):
                vitals.publish(signs(), time.time())  # the writer waits for our successor
        await writer.close()
        reader.close()
        await redis.aclose()


def _figures(intake: Intake) -> dict[str, int]:
    return {f"intake_{name}": value for name, value in dataclasses.asdict(intake.counts).items()}


async def _both(
    courier: Courier,
    intake: Intake,
    keys: Keys,
    presence: Presence,
    fence: Fence,
    stopped: asyncio.Event,
    hurry: asyncio.Event,
    settings: EngineSettings,
) -> int:
    def present() -> tuple[str, int, int]:
        resting = "drained" if courier.is_away else "draining"
        state = "ending" if courier.is_ending else resting if courier.is_resting else "working"
        return state, len(courier.hands), sum(hand.waiting + hand.abroad for hand in courier.hands)

    def rest(is_wanted: bool) -> None:
        log.warning("this host is asked to rest" if is_wanted else "this host may work again")
        courier.rest(is_wanted)
        intake.rest(is_wanted)

    presence.look, presence.on_rest = present, rest
    if presence.is_asked_to_rest:
        rest(True)
    side = [
        asyncio.create_task(keys.follow(), name="keys"),
    ]
    work = [
        asyncio.create_task(courier.run(), name="courier"),
        asyncio.create_task(intake.run(stopped), name="intake"),
    ]
    stopping = asyncio.create_task(stopped.wait(), name="stop")
    older = asyncio.create_task(fence.wait_older(), name="older")
    code = 0
    await asyncio.wait([*work, stopping, older], return_when=asyncio.FIRST_COMPLETED)
    for task in work:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.error("a loop of this worker failed", exc_info=error, extra={"loop": task.get_name()})
            code = 1
    if not stopped.is_set() and code == 0:
        code = 1  # a loop that ends by itself has failed too
    if fence.older:
        log.warning("Redis came back older: this worker ends, its successor tells what the journal knows")
        code = STORE_OLDER
    stopped.set()
    courier.stop()  # before anything is waited for: from here nothing is leased and nothing begun
    patience = settings.supervisor.drain_seconds * 0.9  # the supervisor's SIGKILL comes at the end of it
    if fence.older:
        patience = min(patience, OLDER_SECONDS)
    intake_until = time.monotonic() + min(INTAKE_SECONDS, patience)
    drain = asyncio.create_task(courier.drain(patience), name="drain")
    hurried = asyncio.create_task(hurry.wait(), name="hurry")
    await asyncio.wait([drain, hurried], timeout=patience + 1.0, return_when=FIRST)
    if not drain.done():
        courier.hurry()
        await asyncio.wait([drain], timeout=settings.supervisor.hurry_seconds * 0.7)
    elif not hurry.is_set():
        await asyncio.wait([work[1], hurried], timeout=max(0.0, intake_until - time.monotonic()), return_when=FIRST)
    if code == 0 and not (drain.done() and drain.exception() is None and drain.result()):
        code = 1
    tasks: list[asyncio.Task[Any]] = [drain, hurried, stopping, older, *work, *side]
    await ended(tasks)
    await intake.leave()
    log.info("worker ends", extra={"outcomes": courier.statistics()["outcomes"]})
    return code
