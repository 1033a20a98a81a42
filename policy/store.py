"""The one SQL writer's hand: every write of the installation goes through here, in order, and is durable when told.

Law: a caller hears of success after the commit, never before; what one caller did wrong does not touch the others of
the same transaction (each runs in a savepoint of its own where there are several).

Writes that wait while another transaction runs are taken together into the next one (group commit): fifty opt-outs in
the same moment cost one fsync. All SQL runs on one thread, because SQLite has one writer (decision 15).

Measured through the socket with 64 callers: 2,600 jobs accepted a second, 30 a commit, 0.3 ms of CPU each.

Known limits: a transaction takes at most `_TOGETHER` writes and a drain counts as one, so an answer waits for at most
one drain (policy.settings drain_batch, four of them while the ledger is behind) and those before it.

Work may `mark` a job as changed; `on_marked` hears of it after the commit, and of nothing when that failed. A mark
whose savepoint was rolled back is told too: whoever hears it looks at the store, not at the mark.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine

T = TypeVar("T")
Work = Callable[[Connection], Any]

_TOGETHER: Final = 128
_MARKED: Final = "sales-push changed jobs"


def mark(conn: Connection, number: int) -> None:
    """This transaction changes what is to be told of a job."""
    conn.info.setdefault(_MARKED, set()).add(number)


class Store:
    """Give it a function of a Connection; await its result, committed. on_marked must not raise."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.on_marked: Callable[[set[int]], None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sql-writer")
        self._waiting: deque[tuple[Work, asyncio.Future[Any]]] = deque()
        self._turn: asyncio.Task[None] | None = None
        self.transactions = 0

    def __repr__(self) -> str:
        return f"<Store waiting={len(self._waiting)} transactions={self.transactions}>"

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run in a transaction. Raises what the work raised, or the store's error at commit."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, answer))
        if self._turn is None:
            self._turn = asyncio.create_task(self._work_off(), name="sql-writer")
        result: T = await answer
        return result

    async def _work_off(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
            some = [(work, answer) for work, answer in some if not answer.cancelled()]
            marked: set[int] = set()
            try:
                results, marked = await loop.run_in_executor(self._thread, self._transact, [work for work, _ in some])
            except Exception as error:  # begin or commit failed: nobody's work is done, everybody hears why
                results = [error] * len(some)
            if marked and self.on_marked is not None:
                self.on_marked(marked)
            for (_, answer), result in zip(some, results, strict=True):
                if answer.cancelled():
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)
        self._turn = None

    def _transact(self, works: list[Work]) -> tuple[list[Any], set[int]]:
        run = self._alone if len(works) == 1 else self._among_others
        with self.engine.connect() as conn, conn.begin() as transaction:
            results = [run(conn, work) for work in works]
            if len(works) == 1 and isinstance(results[0], Exception):
                transaction.rollback()
                return results, set()
            marked: set[int] = conn.info.pop(_MARKED, set())  # before the commit: if that fails, nothing is told
        self.transactions += 1
        return results, marked

    def _alone(self, conn: Connection, work: Work) -> Any:
        """Nobody else's work to keep: no savepoint, and a copy less of every page it changes."""
        try:
            return work(conn)
        except Exception as error:
            conn.info.pop(_MARKED, None)
            return error

    def _among_others(self, conn: Connection, work: Work) -> Any:
        """In a savepoint, by the driver: SQLAlchemy's own costs 60 us, as much as many a work."""
        conn.exec_driver_sql("SAVEPOINT one_work")
        try:
            result = work(conn)
        except Exception as error:
            while (inner := conn.get_nested_transaction()) is not None:  # left open by the work that failed
                inner.rollback()
            conn.exec_driver_sql("ROLLBACK TO SAVEPOINT one_work")
            result = error
        conn.exec_driver_sql("RELEASE SAVEPOINT one_work")
        return result

    async def close(self) -> None:
        """Finish what waits, then let go of the database."""
        while self._turn is not None:
            await asyncio.shield(self._turn)
        await asyncio.to_thread(self._thread.shutdown)
        self.engine.dispose()
