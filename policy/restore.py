"""Redis came back older: found out, mended from SQL, and only then let in again (promise T12).

A restart with ``appendfsync always`` forgets nothing. A restored dump, a promoted replica or an emptied server forget
opt-outs, halts and deliveries without knowing it. So every run of the server (INFO ``run_id``) is compared with SQL
before anybody works on it; who connects is held at `policy.fence` until META names this run.

    `look`       each second and at the start: a run not compared yet is compared (`policy.evidence`)
                 not older  -> META run
                 older      -> epoch + 1 in SQL · suppressions, negative list, halts, job states (`Enforcement.mend`)
                               · tokens and ids jump · event streams past their cursors · META epoch, restored, run
    `open`       workers of this host have told their journals again, the streams are drained -> META lease
    `beat`       a counter in META that SQL remembers, so that a dump of an hour ago is told from the one of now
    `ledgered`   META ledgered: every event written before this instant of Redis TIME is in SQL

Laws:
- believed older too often rather than never: it costs seconds of rest, never a recipient;
- the epoch is in SQL before anything is mended, so a crash anywhere in between ends in another restore;
- run is written after all that it vouches for, lease after every journal; both are one command.

Numbers jump by 2**32 a restore: no token of a worker that lived through it can be given out again before 2**53 (the
largest whole number of Lua) is reached, after two million restores.

Known limits: workers of other hosts are fenced but not waited for. `FLUSHALL` is seen within a second, for it does not
end connections.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog
from sqlalchemy import Connection, func, select

from policy import cursors, keyspace
from policy.crashpoints import reach
from policy.enforcement import Enforcement
from policy.evidence import LEASE, PULSE, PUSHED, RESTORED, STREAMS, Known, evidence, number, remembered, see, text
from policy.fence import EPOCH, RUN, Fence
from policy.schema import job
from policy.store import Store
from policy.valkey import Client
from policy.vitals import read_all

log = structlog.get_logger()

LEDGERED: Final = "ledgered"
JUMP: Final = 1 << 32
PATIENCE: Final = 30.0  # seconds for workers to tell their journals
FRESH: Final = 10.0  # seconds after which a worker that says nothing is dead
_COUNTERS: Final = ("tok", "seq", "beat")
_BUSY: Final = 1.0
_TRAIL: Final = 5.0  # so long after the last work a beat a second goes on: what trails behind it is covered
_IDLE: Final = 30.0


class WriterFence(Fence):
    """The writer's own: it raises epochs, so none is another one to it."""

    def meet(self, epoch: int) -> None:
        self.epoch = epoch


class Restore:
    """One a writer. bare: a client without a fence, for this room only; drain: all that is in the streams into SQL."""

    def __init__(
        self,
        bare: Client,
        fenced: Client,
        store: Store,
        enforcement: Enforcement,
        data_dir: Path,
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        self._bare = bare
        self._fenced = fenced
        self._store = store
        self._enforcement = enforcement
        self._data_dir = data_dir
        self._drain = drain
        self._looking = asyncio.Lock()
        self._run = ""
        self._pulse = 0
        self._opening: _Opening | None = None
        self._beats = _Pace()
        self._ledgers = _Pace()
        self.epoch = 0
        self.until = 0  # jobs up to this number were accepted before the last restore
        self.is_open = False
        self.restores = 0

    def __repr__(self) -> str:
        return f"<Restore epoch={self.epoch} {'open' if self.is_open else 'closed'}>"

    # --- comparing ----------------------------------------------------------------------------------------------

    async def look(self) -> bool:
        """True when Redis was rebuilt from SQL. Raises RedisError, the store's error."""
        async with self._looking:
            async with self._bare.pipeline(transaction=False) as pipe:
                pipe.info("server")
                pipe.hmget(keyspace.META, [RUN, EPOCH, LEASE, PULSE])
                server, (cleared, epoch, lease, pulse) = await pipe.execute()
            run = str(server["run_id"])
            same = run == self._run == text(cleared) and number(epoch) == self.epoch
            if same and (number(pulse) or 0) >= self._pulse:
                self.is_open = number(lease) == self.epoch
                return False
            self._run, self.is_open, self._opening = "", False, None  # nothing is opened before this is done
            return await self._compare(run)

    async def _compare(self, run: str) -> bool:
        known = await self._store.write(remembered)
        known = replace(known, pushed=max(known.pushed, self._enforcement.pushed))  # since the last beat
        seen = await see(self._bare, run)
        found = evidence(seen, known)
        epoch = max(seen.epoch or 0, known.epoch)
        if found:
            return await self._restore(run, epoch + 1, found, known)
        mended = await self._enforcement.mend(self._bare)
        pulse = max(seen.pulse or 0, known.pulse)
        lease = epoch if seen.lease is None else seen.lease
        fields = {EPOCH: epoch, PULSE: pulse, LEASE: lease, RESTORED: seen.restored or 0}
        await self._let_in(run, fields)
        if known.run != run:
            log.info("redis let in", epoch=epoch, restarted=bool(known.run))
        return mended

    async def _let_in(self, run: str, meta: dict[str, int]) -> None:
        """The one command by which this run is let in; then SQL remembers it."""
        epoch, pulse = meta[EPOCH], meta[PULSE]
        reach("before-clear")
        await self._bare.hset(keyspace.META, mapping={RUN: run, **{name: str(value) for name, value in meta.items()}})
        reach("after-clear")
        rows: dict[str, str | int] = {RUN: run, EPOCH: epoch, PULSE: pulse, PUSHED: self._enforcement.pushed}
        until = await self._store.write(lambda conn: _remember(conn, rows))
        self._run, self.epoch, self._pulse, self.until = run, epoch, pulse, until
        self.is_open = meta.get(LEASE) == epoch

    # --- restoring ----------------------------------------------------------------------------------------------

    async def _restore(self, run: str, epoch: int, found: list[str], known: Known) -> bool:
        log.error("redis came back older: sending rests until it is mended from SQL", epoch=epoch, because=found)
        # the number first: whoever begins again after a crash sees that META does not have it
        await self._store.write(lambda conn: _remember(conn, {EPOCH: epoch}))
        await self._enforcement.mend(self._bare, whole=True)
        await self._jump()
        await self._pass_cursors(known.cursors)
        until = await self._store.write(_remember_jobs)
        now = await _now(self._bare)
        await self._let_in(run, {EPOCH: epoch, PULSE: known.pulse + 1, RESTORED: now})
        self.restores += 1
        log.warning("redis is mended and let in, leasing stays closed", epoch=epoch, jobs_suspected=until)
        return True

    async def _jump(self) -> None:
        """Past every token, id and heartbeat that anybody can have in hand. Twice is as good."""
        async with self._bare.pipeline(transaction=False) as pipe:
            for partition in range(keyspace.PARTITIONS):
                for name in _COUNTERS:
                    pipe.hincrby(keyspace.counter(partition), name, JUMP)
            await pipe.execute()

    async def _pass_cursors(self, passed: Mapping[str, str]) -> None:
        """No new event gets an id that its cursor has passed: it would never be read. What was read goes."""
        held = (await see(self._bare, "")).last
        async with self._bare.pipeline(transaction=False) as pipe:
            for stream in STREAMS:
                last = passed.get(stream)
                if not last:
                    continue
                if cursors.is_before(held.get(stream, "0-0"), last):
                    if stream not in held:  # XSETID wants a stream that is there: one entry makes it, the trim takes it
                        pipe.xadd(stream, {"b": b""}, id=last)
                    else:
                        pipe.execute_command("XSETID", stream, last)
                pipe.execute_command("XTRIM", stream, "MINID", cursors.after(last))
            await pipe.execute()

    # --- opening ------------------------------------------------------------------------------------------------

    async def open(self) -> bool:
        """Open leasing when every journal of this host has been told and is in the ledger. True when it is open."""
        if self.is_open or not self._run:
            return self.is_open
        if self._opening is None:
            self._opening = _Opening(self._data_dir, self.epoch)
        opening = self._opening
        if waiting := await asyncio.to_thread(opening.waiting):
            if not opening.is_late():
                return False
            log.error("leasing opens without some workers", workers=sorted(waiting), epoch=self.epoch)
        await self._drain()
        async with self._looking:
            if opening is not self._opening:
                return False  # it came back older once more, meanwhile
            await self._fenced.hset(keyspace.META, LEASE, str(self.epoch))
            self.is_open, self._opening = True, None
        log.warning("leasing is open again", epoch=self.epoch)
        return True

    # --- remembering --------------------------------------------------------------------------------------------

    def worked(self) -> None:
        """Something happened that a dump of now would hold and one of before would not."""
        now = time.monotonic()
        self._beats.active = self._ledgers.active = now

    async def beat(self) -> None:
        """Once a second while there is work, else every half minute. Raises RedisError, the store's error."""
        if not self._beats.due(time.monotonic()) or not self.is_open:
            return
        epoch, pulse = self.epoch, int(await self._fenced.hincrby(keyspace.META, PULSE, 1))
        rows = {PULSE: pulse, PUSHED: self._enforcement.pushed}
        async with self._looking:
            if epoch != self.epoch or pulse < self._pulse:
                return  # of a store that came back older right now: nothing to be remembered
            await self._store.write(lambda conn: _remember(conn, rows))
            self._pulse = pulse

    async def instant(self) -> int:
        """Redis TIME in microseconds when a word to the journals is due, else 0. Ask before the streams are read."""
        if not self._ledgers.due(time.monotonic(), take=False):
            return 0
        return await _now(self._fenced)

    async def ledgered(self, instant: int) -> None:
        """Every event of before this instant is in SQL."""
        self._ledgers.due(time.monotonic())
        await self._fenced.hset(keyspace.META, LEDGERED, str(instant))


@dataclass(slots=True)
class _Pace:
    """Busy, a turn a second and some more behind the last work; idle, one in half a minute."""

    active: float = field(default_factory=time.monotonic)
    last: float = float("-inf")

    def due(self, now: float, *, take: bool = True) -> bool:
        wait = _BUSY if self.last - self.active < _TRAIL else _IDLE
        if now - self.last < wait:
            return False
        if take:
            self.last = now
        return True


class _Opening:
    """Which workers of this host are waited for: those seen at work since the restore that have not said its epoch. One
    that was killed is waited for as long as it would be taken to live: its journal is told by its neighbours too."""

    def __init__(self, data_dir: Path, epoch: int) -> None:
        self._data_dir = data_dir
        self._epoch = epoch
        self._began = time.monotonic()

    def waiting(self) -> set[int]:
        """Indexes of workers."""
        patient = time.monotonic() - self._began < FRESH
        now = time.time()
        return {
            sign.index
            for sign in read_all(self._data_dir)
            if sign.role == "engine" and sign.numbers.get(EPOCH) != self._epoch and (patient or now - sign.at < FRESH)
        }

    def is_late(self) -> bool:
        return time.monotonic() - self._began >= PATIENCE


def _remember(conn: Connection, rows: Mapping[str, str | int]) -> int:
    """The number up to which jobs are suspected."""
    cursors.set_rows(conn, rows)
    return int(cursors.load(conn).get(RESTORED, 0))


def _remember_jobs(conn: Connection) -> int:
    newest = int(conn.execute(select(func.max(job.c.number))).scalar() or 0)
    return _remember(conn, {RESTORED: newest})


async def _now(redis: Client) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1_000_000 + int(micros)
