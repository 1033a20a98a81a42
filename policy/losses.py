"""Jobs of which a restored Redis has lost something: found, ended as `lost`, and taken up again (promise T12).

SQL knows how many rows a job has and which of them ended; Redis knows how many still wait (``w`` of every partition),
which entries of the audience are whole (their marks) and which are still in the intake. Where nothing of a job is
anywhere any more and its sum does not come out, the rest is gone: nobody was written to, nobody is told otherwise.

    `round`     suspects are the open jobs of before the last restore; where there was none, nothing is ever asked
    `sweep`     what a restored Redis holds of jobs that are over: freed when the workers have settled its slices
    `take_up`   the same job again under its id: its keys are freed, its lost rows forgotten, it expands anew

A job is lost when, at two looks with everything the intake held at the first one finished in between,
    no row waits, no chunk is held, the streams are drained, and
    expanded:      fewer rows ended than were submitted
    not expanded:  an entry that SQL knows has no mark, or for `QUIET` seconds no further entry has come

Laws:
- what is under way is waited for: a look that finds work, a call of the intake for the job, another restore: the looks
  begin anew;
- rows that are lost are a number (counter kind LOST, domain 0), never rows: which ones they were, nobody knows. One
  whose event comes after all is taken off that number (policy.drains);
- a job is taken up again only when nothing of its first life is on the lanes.

Known limits: a job that waits for its whole audience (`wait`) and lost an entry is ended by force: what is on the lanes
ends first. A producer that pauses longer than `QUIET` in the middle of an audience, right after a restore, has to
submit it again.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import redis.exceptions
import structlog
from sqlalchemy import Connection, select

from policy import chores, cursors, jobs, keyspace
from policy.endings import Endings
from policy.enforcement import Enforcement
from policy.restore import Restore
from policy.schema import job, job_chunk
from policy.store import Store
from policy.valkey import Client
from policy.wire import Accepted, JobRecord

log = structlog.get_logger()

QUIET: Final = 120.0  # seconds without a new entry after which the rest of an audience does not come any more
_SOON: Final = 1.0
_LATEST: Final = 30.0
_MARK: Final = 64  # bits an entry in `chunks_put`; the last one is set when it is whole (engine.campaign.expand)
_PAGE: Final = 1000


@dataclass(slots=True)
class _Suspect:
    """intake: the last id of the intake at the first of two looks that found nothing, None: no such look yet."""

    due: float = 0.0
    pause: float = _SOON
    intake: str | None = None
    chunks: int = -1
    quiet_since: float = field(default_factory=time.monotonic)

    def begin_anew(self, now: float) -> None:
        self.intake = None
        self.due = now + self.pause
        self.pause = min(2 * self.pause, _LATEST)


@dataclass(frozen=True, slots=True)
class _Standing:
    rows_submitted: int | None
    is_over: bool
    waits: bool
    chunks_expected: int
    entries: tuple[int, ...]  # numbers of those SQL knows


class Losses:
    """One a writer. drain: all that is in the streams into the ledger; draining: held by each drain; lost: jobs whose
    number of lost rows the drains correct; monotonic: seconds, for tests."""

    def __init__(
        self,
        redis_client: Client,
        store: Store,
        clock: Callable[[], int],
        *,
        restore: Restore,
        endings: Endings,
        enforcement: Enforcement,
        drain: Callable[[], Awaitable[None]],
        draining: asyncio.Lock,
        lost: set[int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis_client
        self._store = store
        self._clock = clock
        self._restore = restore
        self._endings = endings
        self._enforcement = enforcement
        self._drain = drain
        self._draining = draining
        self._lost = lost
        self._monotonic = monotonic
        self._suspects: dict[int, _Suspect] = {}
        self._remains: set[int] = set()
        self._epoch = -1
        self.lost_jobs = 0
        self.lost_rows = 0

    def __repr__(self) -> str:
        return f"<Losses suspects={len(self._suspects)} remains={len(self._remains)}>"

    @property
    def suspects(self) -> int:
        return len(self._suspects)

    def touch(self, number: int) -> None:
        """The intake works on this job."""
        if (suspect := self._suspects.get(number)) is not None:
            suspect.begin_anew(self._monotonic())

    async def round(self) -> None:
        """One look at each suspect that is due. Raises RedisError, the store's error."""
        until = self._restore.until
        if not until or not self._restore.is_open:
            return
        if self._epoch != self._restore.epoch:  # this process has begun, or Redis has come back older
            epoch = self._restore.epoch
            self._suspects = {number: _Suspect() for number in await self._store.write(lambda c: _open_jobs(c, until))}
            await self.sweep()
            self._epoch = epoch
        now = self._monotonic()
        for number, suspect in list(self._suspects.items()):
            if suspect.due <= now and await self._is_settled(number, suspect):
                self._suspects.pop(number, None)
        for number in list(self._remains):
            if await self.waiting(number) == 0:
                self._remains.discard(number)
                self._endings.over(number)

    async def waiting(self, number: int) -> int:
        """Rows of a job on the lanes."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for partition in range(keyspace.PARTITIONS):
                pipe.hget(keyspace.job(partition, number), "w")
            return sum(int(held or 0) for held in await pipe.execute())

    # --- a suspect ----------------------------------------------------------------------------------------------

    async def _is_settled(self, number: int, suspect: _Suspect) -> bool:
        """Whether this job need not be looked at any more."""
        now, epoch = self._monotonic(), self._restore.epoch
        standing = await self._store.write(lambda conn: _standing(conn, number))
        if standing is None or standing.is_over:
            return True
        waiting = await self.waiting(number)
        forced = standing.waits and standing.rows_submitted is None  # held back: these rows wait for the whole audience
        if (waiting and not forced) or await self._redis.xlen(keyspace.stream_of_chunks(number)):
            suspect.begin_anew(now)
            return False
        first, last = await self._intake()
        if suspect.intake is None:
            suspect.intake, suspect.due = last, now + _SOON
            return False
        if first and not cursors.is_before(suspect.intake, first):
            suspect.due = now + _SOON
            return False  # something the intake held then is not finished
        if standing.rows_submitted is None and not await self._is_torn(number, standing, suspect, now):
            suspect.due = now + _SOON
            return False
        await self._drain()
        await self._restore.look()
        if self._restore.epoch != epoch or not self._restore.is_open or suspect.intake is None:
            return False  # it came back older again, or the job was offered again, right now
        if waiting:
            await self._give_up(number)
            suspect.begin_anew(now)
            return False
        suspect.begin_anew(now)
        return await self._lose(number)

    async def _intake(self) -> tuple[str, str]:
        """(id of the oldest entry or "", last id there ever was)."""
        try:
            told: Any = await self._redis.xinfo_stream(keyspace.INTAKE)
        except redis.exceptions.ResponseError:  # nobody has submitted anything
            return "", "0-0"
        info = {_text(name): value for name, value in dict(told).items()}
        oldest = info.get("first-entry")
        return _text(oldest[0]) if oldest else "", _text(info["last-generated-id"])

    async def _is_torn(self, number: int, standing: _Standing, suspect: _Suspect, now: float) -> bool:
        """Of a job that is not expanded: whether what is missing does not come any more."""
        home = keyspace.chunks_put(number % keyspace.PARTITIONS, number)
        async with self._redis.pipeline(transaction=False) as pipe:
            for entry in standing.entries:
                pipe.getbit(home, entry * _MARK + _MARK - 1)
            if not all(await pipe.execute()):
                return True
        if suspect.chunks != len(standing.entries):
            suspect.chunks, suspect.quiet_since = len(standing.entries), now
        return len(standing.entries) >= standing.chunks_expected or now - suspect.quiet_since >= QUIET

    async def _give_up(self, number: int) -> None:
        rows = await self._store.write(lambda conn: jobs.give_up(conn, number, self._clock()))
        log.error("a job has lost a part of its audience: what waits for it ends", job=number)
        await self._enforcement.show_job(number, "lost")
        await self._endings.submitted(number, rows)

    async def _lose(self, number: int) -> bool:
        async with self._draining, self._endings.freeing:  # in this order, as a drain takes them
            missing = await self._store.write(lambda conn: jobs.lose(conn, number, self._clock()))
            if missing is None:
                return False  # the last events came, its end is told as any other
            self._lost.add(number)
            self._endings.over(number)
        self.lost_jobs += 1
        self.lost_rows += missing
        log.error("a job has lost recipients: redis came back without them", job=number, recipients=missing)
        return True

    # --- what is left -------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Keys of jobs that are over: fingerprints and marks go now, the rest when nothing of the job is on lanes."""
        over: dict[int, bool] = {}
        place: Any = 0
        while True:
            place, keys = await self._redis.scan(place, match=keyspace.JOB_KEYS, count=_PAGE)
            places = [(name, *keyspace.job_key_of(_text(name))) for name in keys]
            unknown = sorted({number for _, _, number in places if number not in over})
            ended = set(await self._store.write(functools.partial(_over_of, numbers=unknown)))
            over.update((number, number in ended) for number in unknown)
            async with self._redis.pipeline(transaction=False) as pipe:
                for name, letter, number in places:
                    if over[number] and letter == "j":
                        pipe.hset(name, "st", "cancelled")  # whatever it was then, nothing of it is held back
                        self._remains.add(number)
                    elif over[number]:
                        pipe.unlink(name)
                await pipe.execute()
            if not place:
                return

    # --- again ----------------------------------------------------------------------------------------------------

    async def take_up(self, record: JobRecord) -> Accepted:
        """A lost job, offered again. Raises Refused while something of it is on the lanes, RedisError."""
        async with self._draining, self._endings.freeing:
            offered = await self._store.write(lambda conn: jobs.accept(conn, record, self._clock()))
            if offered.status != jobs.LOST:
                return offered  # somebody else's offer was first
            number = offered.number
            if await self.waiting(number):
                raise jobs.Refused("redis", "what is left of this lost job is being cleared away, offer it again")
            await chores.free_job(self._redis, number)
            accepted, ended = await self._store.write(lambda conn: jobs.reopen(conn, record, self._clock()))
            self._remains.discard(number)
            self._suspects[number] = _Suspect()
            self._lost.discard(number)
            self._endings.resumed(number, ended)
        log.warning("a lost job is taken up again", job=number, rows_ended=ended)
        return accepted


def _open_jobs(conn: Connection, until: int) -> list[int]:
    return list(conn.scalars(select(job.c.number).where(job.c.done_at.is_(None), job.c.number <= until)))


def _over_of(conn: Connection, numbers: list[int]) -> list[int]:
    found: list[int] = []
    for start in range(0, len(numbers), 500):
        some = numbers[start : start + 500]
        found += conn.scalars(select(job.c.number).where(job.c.done_at.is_not(None), job.c.number.in_(some)))
    return found


def _standing(conn: Connection, number: int) -> _Standing | None:
    row = conn.execute(select(job).where(job.c.number == number)).one_or_none()
    if row is None:
        return None
    entries = conn.scalars(select(job_chunk.c.number).where(job_chunk.c.job == number)).all()
    return _Standing(
        rows_submitted=row.rows_submitted,
        is_over=row.done_at is not None,
        waits=bool(row.wait),
        chunks_expected=row.chunks_expected,
        entries=tuple(entries),
    )


def _text(raw: Any) -> str:
    return raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)
