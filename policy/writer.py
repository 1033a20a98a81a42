"""The policy process: the one SQL writer (design decision 15), behind a unix socket and in front of the event streams.

Promise: an answer on the socket means committed, and where Redis has a part (T11), in force there too. Every event that
Redis holds reaches the ledger exactly once (`policy.drains`); a job is done when its last event is committed (T9).

    start   nothing may leave to strangers (`policy.outlets`) · lock · out of quarantine (`policy.quarantine`) · open
            and upgrade SQL · check Redis · cursors and progress · mend Redis from SQL · socket · loops
    loops   events and hits every `drain_interval` (at once while there is more) · chores every second · erasures,
            rights, sweeps, wrapping keys, checkpoints, backups, consents that end: none waits for another
    stop    no new calls · finish what was begun · last drain · let go

A job's status in Redis, which producers read, follows every commit that changes it (`policy.statuses`).

Losing Redis does not end this process: calls that need only SQL go on, drains wait. What is asked over the socket is
in `policy.operations` and the ``…Operations`` of the other rooms, how in `policy.doorway`.

Known limits: the lock is of this host's data folder. Over PostgreSQL writers of several hosts take turns, a transaction
each (policy.schema), but each keeps cursors and progress in memory as if it were alone: run one. Reconciling the queue
itself after Redis came back older (T12) is not done here yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import gc
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

import redis.exceptions
import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from policy import (
    chores,
    cursors,
    drains,
    jobs,
    outlets,
    partitions,
    quarantine,
    review,
    statuses,
    streams,
    suppression,
    tombstones,
)
from policy.backup import BackupOperations
from policy.bundle.operations import BundleOperations, Bundles
from policy.checkpoints import AuditKeys, CheckpointOperations, Checkpoints, Elsewhere
from policy.crashpoints import reach
from policy.disclosures import DisclosureOperations
from policy.doorway import Doorway, handlers
from policy.endings import Endings
from policy.enforcement import Effects, Enforcement, RedisBehind
from policy.erasing import Erasing, ErasureOperations
from policy.holds import HoldOperations
from policy.instants import DAY_US, SECOND_US
from policy.invalid import Invalid
from policy.keys import Keyring, KeyringError
from policy.keysource import source_of
from policy.lapsing import Lapsing
from policy.losses import Losses
from policy.operations import Operations
from policy.peppers import check as check_peppers
from policy.personal import Premises, every
from policy.readings import ReadingOperations
from policy.restore import Restore, WriterFence
from policy.rewrapping import Rewrapping
from policy.rights.joining import seams
from policy.rights.mailbox import MailIntake
from policy.rights.operations import RightsOperations
from policy.schema import open_store, upgrade
from policy.settings import PolicySettings
from policy.store import Store
from policy.sweeping import Sweeping
from policy.tombstones import Tombstones
from policy.valkey import Client, check_server, connect, raise_schema
from policy.vitals import Vitals

log = structlog.get_logger()

_CHORE_SECONDS: Final = 1.0
_IMPATIENT: Final = 0.1
_MEND_SECONDS: Final = 5.0
_HOURLY: Final = 3600.0
_RETRY_SECONDS: Final = 1.0
_MANY: Final = 500  # events a drain from which on the next one may wait and find more
_BEHIND: Final = 1.0  # seconds of lag from which on looks and transactions grow: a page is written once for more rows
_ENTRIES_BEHIND: Final = 256
_BATCHES_BEHIND: Final = 4  # an answer on the socket then waits for 32,768 events, a third of a second
_GATHER: Final = 8  # times drain_interval: 0.8 s; a page of the ledger is then written once for more rows


class WriterError(Exception):
    """The writer cannot start: another one holds the folder or the socket."""


def clock_us() -> int:
    return time.time_ns() // 1000


class Writer:
    """One a host. start() returns when the socket answers; stop() when everything begun is committed."""

    def __init__(self, settings: PolicySettings, keyring: Keyring, *, clock: Callable[[], int] = clock_us) -> None:
        self._settings = settings
        self.keyring = keyring
        self._source = source_of(settings)
        self._clock = clock
        self._lock: int | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._draining = asyncio.Lock()
        self._cursors: dict[str, str] = {}
        self._untrimmed: dict[str, str] = {}  # committed, perhaps still in Redis: a crash or an outage lay between
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._lag = streams.Lag(clock)
        self.redis: Client
        self.store: Store
        self.enforcement: Enforcement

    def __repr__(self) -> str:
        return f"<Writer {'stopping' if self._stopping.is_set() else 'up'} {dict(self._counts)}>"

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises ConfigError, WriterError, valkey.ServerRefused, RedisError or the store's error."""
        settings = self._settings
        outlets.check(settings, (), self._today())
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock(settings.data_dir / "policy.lock")
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(self._release_lock)
            try:
                await quarantine.leave(settings, self.keyring, self._clock)
            except quarantine.QuarantineError as error:
                raise WriterError(str(error)) from None
            engine = open_store(settings.sql_address(), writer=True)
            self.store = Store(engine)
            undo.push_async_callback(self.store.close)
            await asyncio.to_thread(upgrade, engine)
            await self.store.write(lambda conn: check_peppers(conn, self.keyring))
            self.rewrapping = Rewrapping(self.store, self._source, lambda: self.keyring, self._clock)
            await self._prepare_days()
            bare = connect(settings.redis_address(), max_connections=4)
            undo.push_async_callback(bare.aclose)
            for warning in await check_server(bare):
                log.warning("redis", warning=warning)
            self.redis = connect(settings.redis_address(), WriterFence())
            undo.push_async_callback(self.redis.aclose)
            self.statuses = statuses.Changes(
                self.redis, lambda: open_store(settings.sql_address(), writer=False), self._clock
            )
            undo.push_async_callback(self.statuses.close)
            self.store.on_marked = self.statuses.changed
            self._book = drains.EventBook(engine.dialect.name, self.keyring.service)
            self._book.lost |= await self.store.write(jobs.with_lost_rows)
            self._cursors = await self.store.write(cursors.load)
            self._untrimmed = {name: last for name, last in self._cursors.items() if name in streams.STREAMS}
            self.endings = Endings(self.redis, self.store, self._clock)
            await self.endings.load()
            self.enforcement = Enforcement(
                self.store, self.redis, self._clock, lambda: open_store(settings.sql_address(), writer=False)
            )
            self._clearing = chores.IntakeClearing(self.redis, settings.clear_seconds)
            self.restore = Restore(bare, self.redis, self.store, self.enforcement, settings.data_dir, self.drain)
            self.losses = Losses(
                self.redis, self.store, self._clock, restore=self.restore, endings=self.endings,
                enforcement=self.enforcement, drain=self.drain, draining=self._draining, lost=self._book.lost,
            )  # fmt: skip
            self.invalid = Invalid(
                self.store, self.enforcement, days=settings.bounce_days, erased=lambda: self._book.guard.tags
            )
            mended = await self.restore.look()
            await self.restore.open()
            mended = await self.enforcement.mend() or mended
            self.statuses.changed(await self.store.write(statuses.every_one if mended else statuses.worth_telling))
            operations = Operations(
                self.store,
                self.enforcement,
                self._clock,
                keyring=lambda: self.keyring,
                sizes=self.endings.sizes,
                expires=self.endings.expires,
                statistics=self.statistics,
                losses=self.losses,
            )
            self.checkpoints = Checkpoints(
                self.store, lambda: AuditKeys.ensure(settings.keys_dir), self._clock,
                Elsewhere(settings.checkpoints_dir, settings.checkpoints_command),
            )  # fmt: skip
            self.lapsing = Lapsing(self.store, self.enforcement, self._clock)
            premises = Premises(settings, self.store, self.redis, lambda: self.keyring, self._clock)
            places = every(premises)
            self.tombstones = Tombstones(settings.tombstones_dir / tombstones.NAME)
            undo.callback(self.tombstones.close)
            self.enforcement.tombstones = self.tombstones
            self.erasing = Erasing(premises, self.enforcement, self.tombstones, self._book.guard, lambda: places)
            await self.erasing.load()
            erasures = ErasureOperations(self.erasing, premises)
            self.sweeping = Sweeping(premises, settings.retention, forget_domains=self._book.forget)
            self.bundles = bundles = Bundles(premises, places)
            self.rights = RightsOperations(
                premises, self.enforcement, settings.rights, seams(premises, erasures, bundles, places)
            )
            self.rights_mail = MailIntake.of(self.rights, premises, settings.rights)
            self.readings = ReadingOperations(self.store, self._clock, limits=settings.reading_limits)
            self.backups = BackupOperations(self.store, self._clock, settings.data_dir)
            self.operations = handlers(
                operations,
                self.backups,
                self.readings,
                DisclosureOperations(self.store, self._clock),
                CheckpointOperations(self.checkpoints),
                erasures,
                self.sweeping,
                HoldOperations(premises),
                BundleOperations(premises, self.enforcement),
                self.rights,
            )
            self._doorway = Doorway(settings.writer_socket, self.operations)
            await self._doorway.open()
            undo.push_async_callback(self._doorway.close)
            await self.rights_mail.start()
            self._bare = bare
            undo.pop_all()
        self._loops = [
            asyncio.create_task(self._forever(self._watch), name="watch"),
            asyncio.create_task(self._forever(self._find_losses), name="losses"),
            asyncio.create_task(self._forever(self._rewrap), name="rewrapping"),
            asyncio.create_task(self._forever(self._drain), name="drain"),
            asyncio.create_task(self._forever(self._chores), name="chores"),
            asyncio.create_task(self._forever(self.lapsing.look), name="lapsing"),
            asyncio.create_task(self._forever(self.checkpoints.round), name="checkpoints"),
            asyncio.create_task(self._forever(self.erasing.round), name="erasing"),
            asyncio.create_task(self._forever(self.backups.round), name="backups"),
            asyncio.create_task(self._forever(self.sweeping.round), name="sweeping"),
            asyncio.create_task(self._forever(self._rights), name="rights"),
        ]
        log.info("policy writer ready")
        self._remind()

    def _remind(self) -> None:
        """Of the yearly review (P-39): where no day is set, `config --check` says so."""
        reviewed, today = self._settings.reviewed, self._today()
        of = review.standing(reviewed, today)
        if of.is_wrong:
            log.error("the configuration wants its review", setting=review.SETTING, standing=of.value)
        elif of is review.Standing.DUE:
            log.warning("the configuration wants its review soon", setting=review.SETTING, standing=of.value)

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock() / SECOND_US, UTC).date()

    async def stop(self) -> None:
        """Once; a repeat does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        await self.rights_mail.stop()
        await self._doorway.close()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self.enforcement.close()
        with contextlib.suppress(redis.exceptions.RedisError, OSError, SQLAlchemyError):
            await self._drain()
            await self.checkpoints.round()
        await self.statuses.close()
        await self.store.close()
        self.tombstones.close()
        await self.redis.aclose()
        await self._bare.aclose()
        self._release_lock()

    def _take_lock(self, path: Path) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise WriterError(f"another policy writer holds {path}") from None
        self._lock = handle

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _forever(self, work: Callable[[], Awaitable[float]]) -> None:
        """work returns the seconds until its next turn."""
        while not self._stopping.is_set():
            try:
                wait = await work()
            except (redis.exceptions.RedisError, OSError, RedisBehind) as error:
                self._counts["redis_errors"] += 1
                log.warning("redis is away", error=type(error).__name__)
                wait = _RETRY_SECONDS
            except SQLAlchemyError as error:
                self._counts["sql_errors"] += 1
                log.error("the store refused", error=type(error).__name__)
                wait = _RETRY_SECONDS
            except Exception:  # a mistake of ours must not end the drains: it is seen in the log and the metric
                self._counts["loop_errors"] += 1
                log.exception("a loop of the writer failed, it goes on")
                wait = _RETRY_SECONDS
            if wait:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), wait)

    # --- the run of Redis ---------------------------------------------------------------------------------------

    async def _watch(self) -> float:
        """A run that nobody has compared yet is compared within a tenth of a second after it answers."""
        try:
            if await self.restore.look():
                self.statuses.changed(await self.store.write(statuses.every_one))
            is_open = await self.restore.open()
        except (redis.exceptions.RedisError, OSError):  # the drains say it, once a second
            return _IMPATIENT
        return _CHORE_SECONDS if is_open else _IMPATIENT

    async def _rewrap(self) -> float:
        """Subjects under the newest wrapping key; a source of keys that does not answer is asked again in an hour."""
        try:
            return await self.rewrapping.round()
        except KeyringError as error:
            log.error("subjects cannot be wrapped anew", error=str(error))
            return _HOURLY

    async def _rights(self) -> float:
        await self.rights_mail.look()
        await self.rights.look(time.monotonic())
        return _CHORE_SECONDS

    async def _find_losses(self) -> float:
        await self.losses.round()
        return _CHORE_SECONDS

    # --- drains -------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Everything that is in the streams now, into the ledger (tests; the loop does it by itself)."""
        while not await self._drain():
            pass

    async def _drain(self) -> float:
        """0: there is more."""
        async with self._draining:
            return await self._drain_once()

    async def _drain_once(self) -> float:
        before = self._counts["events"]
        instant = await self.restore.instant()
        reach("before-drain")
        behind = self._lag.seconds() >= _BEHIND
        look = await streams.look(self.redis, self._cursors, _ENTRIES_BEHIND if behind else streams.ENTRIES)
        events, hits = look.events, look.hits
        self._lag.looked(look)
        if look.is_empty:
            await self._trim()
            if instant:
                await self.restore.ledgered(instant)
            return self._settings.drain_interval
        self.restore.worked()
        reach("after-drain")
        for part in streams.portions(events.items, self._settings.drain_batch * (_BATCHES_BEHIND if behind else 1)):
            await self.invalid.mark(part)
            reach("before-commit")
            recorded = await self.store.write(functools.partial(self._book.record, items=part))
            reach("after-commit")
            self._book.committed()
            self.endings.progress.add(recorded.terminal, recorded.places)
            self._cursors.update((stream, identity) for stream, identity, _ in part)
            self._counts["events"] += recorded.events
            self._counts["events_folded"] += recorded.folded
        if hits.items:
            self._counts["hits"] += await self.store.write(lambda conn: self._book.record_hits(conn, hits.items))
        last = events.last | hits.last
        if poison := events.poison + hits.poison:
            self._counts["poison"] += poison
            await self.store.write(lambda conn: self._book.pass_over(conn, last))
        self._cursors.update(last)
        self._lag.committed(look)
        self._untrimmed.update(last)
        await self._trim()
        await self.endings.finish()
        if look.is_full:
            return 0.0
        if instant:
            await self.restore.ledgered(instant)
        many = self._counts["events"] - before >= _MANY
        return self._settings.drain_interval * (_GATHER if many else 1)

    async def _trim(self) -> None:
        if self._untrimmed:
            reach("before-trim")
            await streams.trim(self.redis, self._untrimmed)
            reach("after-trim")
            self._untrimmed.clear()

    # --- chores -------------------------------------------------------------------------------------------------

    _asked = 0
    _mended = 0.0
    _hourly = 0.0

    async def _chores(self) -> float:
        now = time.monotonic()
        await self._clearing.look(now)
        if (asked := sum(self._doorway.calls.values())) != self._asked:
            self._asked = asked
            self.restore.worked()
        await self.restore.beat()
        await self.endings.finish()
        if self.enforcement.behind or now - self._mended >= _MEND_SECONDS:
            self._mended = now
            if await self.enforcement.mend():
                self.statuses.changed(await self.store.write(statuses.every_one))
            if behind := await raise_schema(self.redis):
                log.info("the schema of redis is older than ours and stays so", older_programs=len(behind))
        self.statuses.changed()  # what Redis did not take before
        for number, rows in await self.endings.overdue():
            await self.enforcement.show_job(number, "expired")
            await self.endings.submitted(number, rows)
        if now - self._hourly >= _HOURLY or self._hourly == 0.0:
            self._hourly = now
            await self._prepare_days()
            await self.bundles.expire()
            await self.enforcement.apply(self._expire)
            if await chores.turn_keys(self.store, self._source, self._clock()):
                self.keyring = await asyncio.to_thread(self._source.load)
        return _CHORE_SECONDS

    async def _prepare_days(self) -> None:
        """Where the store is divided by day: the days to come. What came for a day nobody had prepared is no loss, but
        a clock is wrong, or this writer was away for a week."""
        today = self._clock() // DAY_US
        prepared = await self.store.write(lambda conn: partitions.prepare(conn, today))
        if prepared.adopted:
            self._counts["rows_adopted"] += prepared.adopted
            log.error("rows came for days without a partition", rows=prepared.adopted)
        if prepared.refused:
            log.warning("readers held up the days to come", tables=prepared.refused)

    def _expire(self, conn: Connection, effects: Effects) -> int:
        ended = suppression.expire(conn, self._clock())
        effects.tags.update(ended)
        return len(ended)

    def statistics(self) -> dict[str, float | dict[str, float]]:
        """Numbers for /metrics (policy.vitals.Statistics)."""
        told: dict[str, float | dict[str, float]] = {
            name: float(self._counts[name])
            for name in (
                "events",
                "events_folded",
                "rows_adopted",
                "hits",
                "poison",
                "redis_errors",
                "sql_errors",
                "loop_errors",
            )
        }
        for room in (self.backups, self.checkpoints, self.erasing, self.sweeping, self.rights):
            told.update(room.statistics())
        told["readings_denied"] = float(self.readings.denied)
        told["mailboxes_invalid"] = float(self.invalid.marked)
        told["consents_lapsed"] = float(self.lapsing.lapsed)
        told["jobs_done"] = float(self.endings.ended)
        told["transactions"] = float(self.store.transactions)
        told["enforced"] = float(self.enforcement.enforced)
        told["enforcement_failures"] = float(self.enforcement.failures)
        told["redis_rebuilds"] = float(self.enforcement.rebuilds)
        told["redis_behind"] = float(self.enforcement.behind)
        told["redis_restores"] = float(self.restore.restores)
        told["epoch"] = float(self.restore.epoch)
        told["leasing_open"] = float(self.restore.is_open)
        told["jobs_suspected"] = float(self.losses.suspects)
        told["jobs_lost"] = float(self.losses.lost_jobs)
        told["recipients_lost"] = float(self.losses.lost_rows)
        told.update({name: float(n) for name, n in self.rewrapping.statistics().items()})
        told["statuses_behind"] = float(len(self.statuses.waiting))
        told["ledger_lag_seconds"] = self._lag.seconds()
        told["intake_clear_age_seconds"] = self._clearing.age(time.monotonic())
        told["aof_rewrites"] = float(self._clearing.rewrites)
        told["aof_rewrite_failures"] = float(self._clearing.failures)
        told["connections"] = float(self._doorway.connections)
        told["calls"] = {name: float(n) for name, n in self._doorway.calls.items()}
        return told


async def serve(settings: PolicySettings, stop: asyncio.Event) -> None:
    """Run the writer until `stop` is set: what `sales-push run policy` does."""
    keyring = await asyncio.to_thread(source_of(settings).load)
    writer = Writer(settings, keyring)
    await writer.start()
    # Collections in the middle of thousands of rows, nearly all of which live as long as their transaction, were a
    # sixth of this process's time; what was there at the start is not walked again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    # Work here comes in portions, and who asks waits for milliseconds anyway: throwing an engine worker off its core
    # for each costs both their caches (1 % of all CPU a message, in pairs). Linux only; a container may forbid it.
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    beat = asyncio.create_task(Vitals(settings.data_dir, "policy").beat(writer.statistics, time.time))
    try:
        await stop.wait()
    finally:
        beat.cancel()
        await asyncio.gather(beat, return_exceptions=True)
        await writer.stop()
