"""Opt-outs, suppressions and withdrawals: in SQL, then in Redis, then the answer (T11).

Laws:
- whoever is told "done" is told after the SQL commit *and* after Redis took it; when Redis does not, he is told so (the
  tracker answers 503) although SQL keeps it, and `mend` brings it to Redis as soon as that answers;
- changes reach Redis in the order of their commits, so an older state of a tag never overwrites a newer one;
- a Redis that was lost or came back older is noticed by its commit number and rebuilt from SQL (T12, this part of it).

Changes that arrive while one round is under way make up the next: one transaction, one pipeline, one fsync for all.

The commit number lives in SQL (table cursor, stream `commit`) and, once everything up to it is pushed, in META.

Known limits: the number is compared every few seconds and after every failure, not at every command. That nobody works
on a Redis that came back older before it is mended is the matter of `policy.restore` and `policy.fence`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import redis.exceptions
import structlog
from sqlalchemy import Connection, Engine, insert, select, update

from policy import halts, keyspace, negative, remembering, suppression
from policy.crashpoints import reach
from policy.schema import cursor, job
from policy.store import Store
from policy.tombstones import Line, Tombstones
from policy.valkey import Client

log = structlog.get_logger()

COMMIT: Final = "commit"
_META_FIELD: Final = "commit"
_AT_ONCE: Final = 256


class RedisBehind(Exception):
    """SQL has it, Redis did not take it: not in force at the gate yet. Ask again."""


@dataclass(slots=True)
class Effects:
    """What a change wants told to Redis: suppression tags to recompute, negative entries (subject, cause, seq),
    words of the halt sets by (text, partitions) and whether they stand, jobs by number: (state, whether it waits for
    its last chunk); lifted: tags of which a reason was taken back."""

    tags: set[tuple[bytes, int]] = field(default_factory=set)
    lifted: set[bytes] = field(default_factory=set)
    negative: list[tuple[int, str, int]] = field(default_factory=list)
    words: dict[tuple[str, Sequence[int]], bool] = field(default_factory=dict)
    jobs: dict[int, tuple[str, bool]] = field(default_factory=dict)


Change = Callable[[Connection, Effects], Any]


class Enforcement:
    """One a writer. apply(change) runs change(conn, effects) in a transaction and returns its result when enforced."""

    def __init__(
        self, store: Store, redis_client: Client, clock: Callable[[], int], open_reader: Callable[[], Engine]
    ) -> None:
        self._store = store
        self._open_reader = open_reader
        self._redis = redis_client
        self._clock = clock
        self._waiting: deque[tuple[Change, asyncio.Future[Any]]] = deque()
        self._turn: asyncio.Task[None] | None = None
        self._gate = asyncio.Lock()  # one round, or one rebuild, at a time: the order of pushes is the order of commits
        # Told of what must outlive a backup: before the commit, and of what is taken back after it. A line without its
        # commit must never make a restored system write to somebody.
        self.tombstones: Tombstones | None = None
        self.behind = False
        self.pushed = 0  # the commit number that Redis took last
        self.enforced = 0
        self.failures = 0
        self.rebuilds = 0

    async def apply(self, change: Change) -> Any:
        """Raises what the change raised, RedisBehind, or the store's error."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, answer))
        if self._turn is None:
            self._turn = asyncio.create_task(self._rounds(), name="enforcement")
        return await answer

    async def close(self) -> None:
        while self._turn is not None:
            await asyncio.shield(self._turn)

    async def _rounds(self) -> None:
        try:
            while self._waiting:
                some = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
                async with self._gate:
                    await self._round(some)
        finally:
            self._turn = None

    async def _round(self, some: list[tuple[Change, asyncio.Future[Any]]]) -> None:
        changes = [change for change, _ in some]
        reach("before-suppress")
        try:
            results, fields, effects, commit, lifted = await self._store.write(lambda conn: self._commit(conn, changes))
        except Exception as error:
            for _, answer in some:
                if not answer.done():
                    answer.set_exception(error)
            return
        reach("after-suppress")
        await self._remember(lifted)
        behind: Exception | None = None
        try:
            reach("before-enforce")
            await self._tell(fields, effects)
            reach("after-enforce")
            if not self.behind:
                await self._redis.hset(keyspace.META, _META_FIELD, str(commit))
                self.pushed = commit
        except (redis.exceptions.RedisError, OSError) as error:
            self.behind = True
            self.failures += 1
            behind = RedisBehind("the change is kept, but Redis did not take it yet")
            log.error("redis did not take a change", error=type(error).__name__)
        for (_, answer), result in zip(some, results, strict=True):
            if answer.done():
                continue
            if isinstance(result, Exception):
                answer.set_exception(result)
            elif behind is not None:
                answer.set_exception(behind)
            else:
                self.enforced += 1
                answer.set_result(result)

    def _commit(
        self, conn: Connection, changes: list[Change]
    ) -> tuple[list[Any], list[suppression.Field], Effects, int, list[Line]]:
        total = Effects()
        results: list[Any] = []
        for change in changes:
            effects = Effects()
            savepoint = conn.begin_nested()
            try:
                results.append(change(conn, effects))
                savepoint.commit()
            except Exception as error:
                savepoint.rollback()
                results.append(error)
                continue
            total.tags |= effects.tags
            total.lifted |= effects.lifted
            total.negative += effects.negative
            total.words |= effects.words
            total.jobs |= effects.jobs
        lifted: list[Line] = []
        if self.tombstones is not None:
            told, lifted = remembering.lines_of(conn, total, self._clock())
            self.tombstones.append(told)
        commit = commit_number(conn) + 1
        _set_commit_number(conn, commit)
        return results, suppression.fields(conn, total.tags, self._clock()), total, commit, lifted

    async def _remember(self, lifted: list[Line]) -> None:
        """Lines of what was taken back, in the store's thread like all others. Without them a restored system keeps
        what stood before: strict, so no reason to fail what is committed."""
        if lifted and self.tombstones is not None:
            tombstones = self.tombstones
            try:
                await self._store.write(lambda conn: tombstones.append(lifted))
            except Exception as error:
                log.error("the tombstones were not told of what was taken back", error=type(error).__name__)

    async def _tell(self, fields: list[suppression.Field], effects: Effects) -> None:
        await suppression.push(self._redis, fields)
        for subject, cause, seq in effects.negative:
            await negative.announce(self._redis, subject, cause, seq)
        await halts.tell(self._redis, [(text, stands, where) for (text, where), stands in effects.words.items()])
        for number, (state, waits) in effects.jobs.items():
            await self.show_job(number, state, waits=waits)
        if effects.words or effects.jobs:
            await self._redis.publish(keyspace.WAKE, keyspace.WAKE_HALTS)

    async def show_job(
        self, number: int, state: str, *, waits: bool = False, redis_client: Client | None = None
    ) -> None:
        """Tell every partition a job's state. A halt goes first: a chunk put meanwhile would not carry the word yet.

        waits: the job asked to be held until all its chunks are in (the intake's halt): resuming does not lift that.
        lost: what is left of it on the lanes ends there, as of a cancelled one."""
        client = redis_client or self._redis
        if state == "lost":
            state = halts.CANCELLED
        everywhere = range(keyspace.PARTITIONS)
        held = state == "paused" or (waits and state == "sending")
        await halts.tell(
            client,
            [(f"j{number}", held, everywhere), (f"x{number}", state == halts.CANCELLED, everywhere)],
        )
        keys = [keyspace.job(partition, number) for partition in range(keyspace.PARTITIONS)]
        async with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.exists(key)
            there = await pipe.execute()
        async with client.pipeline(transaction=False) as pipe:
            for key, known in zip(keys, there, strict=True):
                if known:
                    pipe.hset(key, "st", state)
            await pipe.execute()

    async def mend(self, redis_client: Client | None = None, *, whole: bool = False) -> bool:
        """Compare commit numbers; rebuild Redis from SQL when they differ, or (whole) in any case. True when it was
        rebuilt. redis_client: to reach a Redis that is not let in yet (policy.restore).

        Raises RedisError while Redis is away."""
        client = redis_client or self._redis
        async with self._gate:
            held: Any = await client.hget(keyspace.META, _META_FIELD)
            truth = await self._store.write(commit_number)
            ahead = int(held) if held is not None else 0
            if not self.behind and not whole and ahead == truth:
                if held is None:  # a new installation on an empty Redis: nothing to bring
                    await client.hset(keyspace.META, _META_FIELD, "0")
                self.pushed = truth
                return False
            older_sql = ahead > truth
            log.warning("rebuilding suppressions in redis", held=ahead, truth=truth)
            if older_sql:
                # SQL came back older than Redis: what only Redis knows stays in force (fails closed, never forgets)
                log.error("the database is older than redis: restored from a backup? nothing is taken out of redis")
                truth = ahead + 1
                await self._store.write(lambda conn: _set_commit_number(conn, truth))
            await self._rebuild(client, add_only=older_sql)
            await client.hset(keyspace.META, _META_FIELD, str(truth))
            self.pushed = truth
            self.behind = False
            self.rebuilds += 1
            return True

    async def _rebuild(self, client: Client, *, add_only: bool) -> None:
        # a connection of its own, for reading: the writer's must not wait for Redis (a second *writing* one would be a
        # risk over SQLite, decision 15)
        engine = self._open_reader()
        try:
            with engine.connect() as conn:
                if add_only:
                    await self._push_all(client, conn)
                else:
                    await suppression.rebuild(client, conn, self._clock())
                await negative.rebuild(client, conn)
                await halts.rebuild(client, conn, add_only=add_only)
                going = select(job.c.number, job.c.state, job.c.wait, job.c.rows_submitted)
                states = conn.execute(going.where(job.c.done_at.is_(None))).all()
        finally:
            engine.dispose()
        for row in states:
            if row.state in ("paused", "cancelled", "lost"):
                await self.show_job(row.number, row.state, redis_client=client)
            elif not add_only:  # resumed while Redis was away: an older SQL would not know that it was cancelled since
                waits = bool(row.wait) and row.rows_submitted is None
                await self.show_job(row.number, "sending", waits=waits, redis_client=client)

    async def _push_all(self, client: Client, conn: Connection) -> None:
        some: set[tuple[bytes, int]] = set()
        for entry in suppression.every(conn):
            some.add((entry.tag, entry.partition))
            if len(some) >= 500:
                await suppression.push(client, suppression.fields(conn, some, self._clock()))
                some.clear()
        await suppression.push(client, suppression.fields(conn, some, self._clock()))


def commit_number(conn: Connection) -> int:
    return int(conn.execute(select(cursor.c.last_id).where(cursor.c.stream == COMMIT)).scalar() or 0)


def _set_commit_number(conn: Connection, number: int) -> None:
    if conn.execute(update(cursor).where(cursor.c.stream == COMMIT).values(last_id=str(number))).rowcount == 0:
        conn.execute(insert(cursor).values(stream=COMMIT, last_id=str(number)))
