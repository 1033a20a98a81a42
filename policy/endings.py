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
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

import structlog
from sqlalchemy import Connection, func, select

from policy import chores, jobs
from policy.crashpoints import reach
from policy.events import TERMINAL
from policy.schema import counter, job
from policy.store import Store
from policy.valkey import Client

log = structlog.get_logger()

_TERMINAL: Final = sorted(int(kind) for kind in TERMINAL)


class Progress:
    """Terminal rows against rows submitted, a job; in memory, rebuilt from the counters at start. Who is complete is
    kept as it comes, not looked for: a step costs the jobs it is about, however many are open."""

    def __init__(self) -> None:
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
        self._complete.clear()
        for number in self._submitted:
            self._look(number)

    def add(self, terminal: Mapping[int, int]) -> None:
        for number, n in terminal.items():
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

    def complete(self) -> list[int]:
        """Jobs whose last row is in the ledger, until they are forgotten."""
        return sorted(self._complete)

    def resumed(self, number: int, ended: int) -> None:
        """A job that was over goes on: so many of its rows have ended."""
        self._submitted.pop(number, None)
        self._complete.discard(number)
        self._terminal[number] = ended

    def forget(self, number: int) -> bool:
        """Whether it was known."""
        self._terminal.pop(number, None)
        self._complete.discard(number)
        return self._submitted.pop(number, None) is not None


class Endings:
    """One a writer. freeing: held while keys of jobs go; ended: how many jobs were done by this process."""

    def __init__(self, redis: Client, store: Store, clock: Callable[[], int]) -> None:
        self._redis = redis
        self._store = store
        self._clock = clock
        self._over: set[int] = set()
        self.progress = Progress()
        self.freeing = asyncio.Lock()
        self.ended = 0

    def __repr__(self) -> str:
        return f"<Endings ended={self.ended} to free={len(self._over)}>"

    async def load(self) -> None:
        await self._store.write(self.progress.load)
        self._over = set(await self._store.write(jobs.lately_over))  # their keys may still be there: a crash between

    async def submitted(self, number: int, rows: int) -> None:
        """A job's size is known. Whoever tells it waits for the end of this job only, where that has come."""
        if self.progress.submitted(number, rows):
            await self.finish()

    def over(self, number: int) -> None:
        """A job is over by another way than its last event."""
        self.progress.forget(number)
        self._over.add(number)

    def resumed(self, number: int, ended: int) -> None:
        """A job that was over goes on (policy.losses); `freeing` is held."""
        self._over.discard(number)
        self.progress.resumed(number, ended)

    async def finish(self) -> None:
        """End what has nobody left, free what has ended. Raises RedisError, the store's error."""
        if complete := self.progress.complete():  # told to the store at once, they share its transactions
            failed = await asyncio.gather(*map(self._finish, complete), return_exceptions=True)
            if error := next((one for one in failed if isinstance(one, BaseException)), None):
                raise error
        if not self._over:
            return
        async with self.freeing:
            over = sorted(self._over)
            await chores.free_jobs(self._redis, over)
            self._over.difference_update(over)

    async def _finish(self, number: int) -> None:
        reach("before-finish")
        state = await self._store.write(functools.partial(jobs.finish, number=number, now=self._clock()))
        reach("after-finish")
        if self.progress.forget(number):  # False: a call and a drain saw it at once
            self._over.add(number)
            self.ended += 1
            log.info("job over", job=number, state=state)
