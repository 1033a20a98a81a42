"""Jobs that are over: when their last row is in the ledger they are done, and no key of theirs stays in Redis (T9).

Law: a job is done by its last event's commit, never before; its keys go after that, again at each start for those that
ended lately, so that a crash in between leaves nothing behind.

    `Progress`   terminal rows a job against rows submitted, in memory, rebuilt from the counters at start
    `Endings`    what follows when they meet

Known limits: `Progress` counts what the ledger counted; rows that a restored Redis lost are `policy.losses`' matter.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog
from sqlalchemy import Connection, func, select

from policy import chores, jobs, keyspace
from policy.crashpoints import reach
from policy.events import TERMINAL
from policy.schema import counter, job
from policy.store import Store
from policy.valkey import Client

log = structlog.get_logger()

_TERMINAL: Final = sorted(int(kind) for kind in TERMINAL)
_NOWHERE: Final[Mapping[int, int]] = {}


class Progress:
    """Terminal rows against rows submitted, a job; in memory, rebuilt from the counters at start. Who is complete is
    kept as it comes, not looked for: a step costs the jobs it is about, however many are open."""

    def __init__(self) -> None:
        self._places: dict[int, int | None] = {}
        self._terminal: dict[int, int] = defaultdict(int)
        self._submitted: dict[int, int] = {}
        self._complete: set[int] = set()

    def load(self, conn: Connection) -> None:
        """Every job that is not done."""
        open_jobs = select(job.c.number).where(job.c.done_at.is_(None))
        self._terminal.clear()
        self._submitted = {
            row.number: row.rows_submitted
            for row in conn.execute(
                select(job.c.number, job.c.rows_submitted).where(
                    job.c.done_at.is_(None), job.c.rows_submitted.is_not(None)
                )
            )
        }
        sums = (
            select(counter.c.job, func.sum(counter.c.n).label("n"))
            .where(counter.c.kind.in_(_TERMINAL), counter.c.job.in_(open_jobs))
            .group_by(counter.c.job)
        )
        for row in conn.execute(sums):
            self._terminal[row.job] = int(row.n)
        self._places = dict.fromkeys(conn.scalars(open_jobs))
        self._complete.clear()
        for number in self._submitted:
            self._look(number)

    def add(self, terminal: Mapping[int, int], places: Mapping[int, int] = _NOWHERE) -> None:
        """places: of the partitions that told it, one bit each."""
        for number, n in terminal.items():
            known = self._places.get(number, 0)
            self._places[number] = None if known is None else known | places.get(number, 0)
            self._terminal[number] += n
            self._look(number)

    def submitted(self, number: int, rows: int) -> bool:
        """Whether it is complete."""
        self._submitted[number] = rows
        return self._look(number)

    def _look(self, number: int) -> bool:
        rows = self._submitted.get(number)
        if rows is not None and self._terminal.get(number, 0) >= rows:
            self._complete.add(number)
            return True
        self._complete.discard(number)
        return False

    def __contains__(self, number: int) -> bool:
        """Whether it is complete."""
        return number in self._complete

    def complete(self) -> list[int]:
        """Jobs whose last row is in the ledger, until they are forgotten."""
        return sorted(self._complete)

    def resumed(self, number: int, ended: int) -> None:
        """A job that was over goes on: so many of its rows have ended."""
        self._submitted.pop(number, None)
        self._complete.discard(number)
        self._terminal[number] = ended
        self._places[number] = None

    def places(self, number: int) -> int | None:
        """The partitions where a job that is complete has keys, one bit each: whoever was asked about or put there had
        his end there. None: it is older than this process."""
        return self._places.get(number, 0)

    def forget(self, number: int) -> bool:
        """Whether it was known."""
        self._terminal.pop(number, None)
        self._places.pop(number, None)
        self._complete.discard(number)
        return self._submitted.pop(number, None) is not None


class Endings:
    """One a writer. freeing: held while keys of jobs go; ended: how many jobs were done by this process."""

    def __init__(self, redis: Client, store: Store, clock: Callable[[], int]) -> None:
        self._redis = redis
        self._store = store
        self._clock = clock
        self._over: dict[int, int | None] = {}  # as `Progress.places`
        self.progress = Progress()
        self.freeing = asyncio.Lock()
        self.ended = 0
        self._look_at: int | None = 0

    def __repr__(self) -> str:
        return f"<Endings ended={self.ended} to free={len(self._over)}>"

    async def load(self) -> None:
        await self._store.write(self.progress.load)
        lately = await self._store.write(jobs.lately_over)  # their keys may still be there: a crash between
        self._over = dict.fromkeys(lately)

    async def submitted(self, number: int, rows: int) -> None:
        """A job's size is known. Whoever tells it waits for the end of this job only, where that has come."""
        await self.sizes([(number, rows)])

    async def sizes(self, told: Sequence[tuple[int, int]]) -> None:
        """As `submitted`, of several jobs (number, rows)."""
        for number, rows in told:
            self.progress.submitted(number, rows)
        if any(number in self.progress for number, _ in told):
            await self.finish()

    def expires(self, at: int) -> None:
        """A job whose audience is not in yet ends at `at` (microseconds), or at once where that is past or 0."""
        self._look_at = at if self._look_at is None else min(self._look_at, at)

    async def overdue(self) -> list[tuple[int, int]]:
        """As `jobs.overdue`, asked only when somebody's time has come: it reads every job that is not expanded, and a
        burst has thousands."""
        now = self._clock()
        if self._look_at is None or now < self._look_at:
            return []
        self._look_at = None  # who comes from now on says so (`expires`)
        try:
            ended, following = await self._store.write(lambda conn: (jobs.overdue(conn, now), jobs.next_overdue(conn)))
        except BaseException:
            self.expires(0)
            raise
        if following is not None:
            self.expires(following)
        return ended

    def over(self, number: int) -> None:
        """A job is over by another way than its last event."""
        self.progress.forget(number)
        self._over[number] = None

    def resumed(self, number: int, ended: int) -> None:
        """A job that was over goes on (policy.losses); `freeing` is held."""
        self._over.pop(number, None)
        self.progress.resumed(number, ended)

    async def finish(self) -> None:
        """End what has nobody left, free what has ended. Raises RedisError, the store's error."""
        if complete := self.progress.complete():
            reach("before-finish")
            told = await self._store.write(functools.partial(jobs.finish, numbers=complete, now=self._clock()))
            reach("after-finish")
            ends = Counter(state for number in complete if (state := self._is_over(number, told.get(number))))
            if ends.total() == 1 == len(complete):
                log.info("job over", job=complete[0], state=next(iter(ends)))
            elif ends:  # one line, however many: a line a job of one recipient was a tenth of what it cost us
                log.info("jobs over", first=complete[0], last=complete[-1], **ends)
        if not self._over:
            return
        async with self.freeing:
            over = dict(self._over)
            if known := {number: bits for number, bits in over.items() if bits is not None}:
                await chores.free_places(self._redis, known)
            if unknown := sorted(over.keys() - known.keys()):
                await chores.free_jobs(self._redis, unknown)
            for number, bits in over.items():
                if self._over.get(number, -1) == bits:  # else: over again by another way meanwhile
                    del self._over[number]

    def _is_over(self, number: int, told: jobs.Finished | None) -> str:
        """Its state; "": a call and a drain saw it at once, and the other one was first."""
        places = self.progress.places(number)
        if not self.progress.forget(number):
            return ""
        if told is None or not told.was_free:
            places = None
        elif told.is_marked and places is not None:
            places |= 1 << number % keyspace.PARTITIONS
        self._over[number] = places
        self.ended += 1
        return told.state if told is not None else "gone"
