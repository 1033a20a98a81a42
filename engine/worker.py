"""One engine worker: composition in one place (steps 1 to 10 of the journey, in one process).

Path: 1. settings, keys, stores; 2. the journals a dead worker of this host left are replayed before anything is
leased; 3. intake and courier run side by side until SIGTERM, which drains, or until one of them fails, which ends the
process with exit code 1: the supervisor starts another, and the journal remembers.

Worker 0 also replays the journals of workers that are no longer started here (fewer workers than before).

Known limits: keys are read at start and again every minute, so a new week's queue key is used within a minute.
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
from pathlib import Path
from typing import Any

import uvloop

from engine.campaign.intake import Intake
from engine.campaign.intake import Limits as IntakeLimits
from engine.delivery import pool
from engine.delivery.campaigns import Campaigns, load_signers
from engine.delivery.conclusions import jitter
from engine.delivery.courier import Courier
from engine.delivery.replay import replay
from engine.delivery.site import Resolver, Site
from engine.queue import pace, schedule
from engine.queue.journal import Journal, JournalBroken, boot_id
from engine.queue.lanes import Lanes
from engine.queue.permits import Permits
from engine.settings import EngineSettings, SiteLimits, dkim_files
from engine.smtp.words import PATIENCE, Step
from policy import logs, valkey
from policy.keys import Keyring, KeyringError
from policy.ledger import Reader
from policy.schema import open_store
from policy.settings import PolicySettings, load
from policy.vitals import Vitals
from policy.wire import WriterClient

log = logging.getLogger(__name__)

KEYS_SECONDS = 60.0
PERMIT_LIFE = 12.0  # seconds a killed worker's connections stay counted; renewed three times in that time


class Keys:
    """The keyring as it is now: read again every minute, because weekly keys come and go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.current = Keyring.load(folder)

    def __call__(self) -> Keyring:
        return self.current

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(KEYS_SECONDS)
            try:
                self.current = await asyncio.to_thread(Keyring.load, self._folder)
            except (KeyringError, OSError):
                log.exception("the keys could not be read again; the ones in memory stay in use")


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
    """Exit code: 0 drained, 1 failed. Raises ConfigError, KeyringError before anything is started."""
    policy = load(PolicySettings, config)
    settings = load(EngineSettings, config)
    logs.configure(f"engine-{index}", json=policy.log_json, level=policy.log_level)
    return uvloop.run(_work(index, policy, settings))


async def _work(index: int, policy: PolicySettings, settings: EngineSettings) -> int:
    stopped = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopped.is_set():
            hurry.set()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    keys = Keys(policy.keys_dir)
    redis = valkey.connect(policy.redis_address())
    store = open_store(policy.sql_address(), writer=False)
    reader = Reader(store)
    writer = WriterClient(policy.writer_socket)
    # The holder names host, worker and journal (decision 6); the random part tells this life from the last one.
    holder = f"{platform.node() or 'host'}:{index}:{os.getpid()}-{secrets.token_hex(4)}"
    lanes = Lanes(redis, holder)
    folder = policy.data_dir / "journal" / str(index)
    try:
        await valkey.check_server(redis)
        signers = await asyncio.to_thread(load_signers, dkim_files(settings, policy.keys_dir))
        campaigns = Campaigns(reader, keys, signers, public_url=policy.public_url, bounce_domain=policy.bounce_domain)
        journal = Journal.open(folder, holder, boot_id())
        try:
            for left in _left_behind(policy.data_dir / "journal", index, settings.worker_count):
                await replay(
                    left,
                    redis=redis,
                    lanes=lanes,
                    campaigns=campaigns,
                    keyring=keys(),
                    retry=retry_plan(settings),
                    now_us=time.time_ns() // 1000,
                    jitter=jitter,
                    ours=holder,
                )
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
            )
            intake = Intake(
                redis=redis,
                lanes=lanes,
                writer=writer,
                engine=store,
                keyring=keys,
                signing_domains=lambda: signers.keys(),
                consumer=holder,
                life={"campaign": settings.expiry.campaign, "transactional": settings.expiry.transactional},
                limits=IntakeLimits(
                    claim=settings.intake.claim,
                    deliveries=settings.intake.deliveries,
                    message_bytes=settings.intake.message_bytes,
                ),
            )
            # What is alive now stays: it need not be looked at again. Messages make no cycles, so the collector finds
            # nothing and costs 5 % of a worker at its usual threshold (py-spy, 12,000 recipients).
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 20)
            return await _both(courier, intake, keys, stopped, hurry, settings, policy, index)
        finally:
            with contextlib.suppress(JournalBroken):
                await journal.close()
    finally:
        await writer.close()
        reader.close()
        await redis.aclose()


def _left_behind(root: Path, index: int, workers: int) -> list[Path]:
    folders = [root / str(index)]
    if index == 0 and root.is_dir():
        folders += [path for path in root.iterdir() if path.name.isdigit() and int(path.name) >= workers]
    return folders


async def _both(
    courier: Courier,
    intake: Intake,
    keys: Keys,
    stopped: asyncio.Event,
    hurry: asyncio.Event,
    settings: EngineSettings,
    policy: PolicySettings,
    index: int,
) -> int:
    vitals = Vitals(policy.data_dir, "engine", index)

    def statistics() -> dict[str, int | float | dict[str, int | float]]:
        return {**courier.statistics(), **{f"intake_{k}": v for k, v in dataclasses.asdict(intake.counts).items()}}

    side = [
        asyncio.create_task(keys.follow(), name="keys"),
        asyncio.create_task(vitals.beat(statistics, time.time), name="vitals"),
    ]
    work = [
        asyncio.create_task(courier.run(), name="courier"),
        asyncio.create_task(intake.run(stopped), name="intake"),
    ]
    stopping = asyncio.create_task(stopped.wait(), name="stop")
    code = 0
    await asyncio.wait([*work, stopping], return_when=asyncio.FIRST_COMPLETED)
    for task in work:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.error("a loop of this worker failed", exc_info=error, extra={"loop": task.get_name()})
            code = 1
    if not stopped.is_set() and code == 0:
        code = 1  # a loop that ends by itself has failed too
    stopped.set()
    await asyncio.wait([work[1]], timeout=5.0)  # intake finishes the chunk it has begun; cut short, it is done again
    courier.stop()
    drain = asyncio.create_task(courier.drain(settings.supervisor.drain_seconds * 0.8), name="drain")
    hurried = asyncio.create_task(hurry.wait(), name="hurry")
    await asyncio.wait([drain, hurried], return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        courier.abort()
        await asyncio.wait([drain], timeout=settings.supervisor.hurry_seconds)
    tasks: list[asyncio.Task[Any]] = [drain, hurried, stopping, *work, *side]
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    log.info("worker ends", extra={"outcomes": courier.statistics()["outcomes"]})
    return code
