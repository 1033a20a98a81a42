"""A status a job, in Redis: what a producer far away may read of its job with nothing but Redis (T0).

Laws:
- it is a mirror: SQL is the truth (`sales-push status` reads that). A change is told after its commit; while Redis does
  not take it, it stays on the list here and nobody else waits for it or fails by it;
- state, reason, rows and counts are the ledger's, `problems` the intake's: a refusal never overwrites the state of a
  job that was accepted (the id is taken, an audience entry is broken), it only adds its problems;
- no recipient: the key names nobody (policy.keyspace), and a text in which an address could stand is left out.

    `Changes`    1. `Store` says which jobs a transaction changed (`policy.store.mark`, in policy.jobs)
                 2. one task reads them as they are now, a hundred at a time, and tells Redis in one pipeline
    `refuse`     the intake's part: a command in the transaction that puts the refused entry away

Fields: state, reason, rows, done_at, updated_at (microseconds), ``count:<terminal state>`` when the last row has ended;
problems_total, problems (JSON, at most 100 of [path, message, suggestion]), refused_at.

Known limits: who may write to the intake may fill Redis with refusals, at most 32 KiB each, for 90 days. A Redis that
was lost gets all jobs back, but no refusals. What died with the process between commit and telling is told at the next
start, for jobs under way and the hundred that ended last. A payload that does not say who it is has no status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import redis.exceptions
import structlog
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from policy import keyspace
from policy.events import TERMINAL, Kind
from policy.instants import DAY_US
from policy.logs import without_addresses
from policy.schema import account, counter, job
from policy.stories import word
from policy.valkey import Client

log = structlog.get_logger()

KEPT_US: Final = 90 * DAY_US  # as long as a job id means one payload (policy.jobs)
MOST_PROBLEMS: Final = 100
_MOST_BYTES: Final = 32 * 1024  # of problems; about all hundred, at the length they have
_MOST_TEXT: Final = 300
_LEFT_OUT: Final = "(an address may stand in this: `sales-push jobs rejected` shows it)"
_AT_ONCE: Final = 100

# accepted_at, updated_at, state, reason, rows, done_at, then pairs of counts. A status that says so already keeps its
# time; problems older than the acceptance belong to a submission before it.
_TELL: Final = """
local ttl, accepted = ARGV[1], ARGV[2]
local old = redis.call('HMGET', KEYS[1], 'state', 'reason', 'rows', 'done_at', 'refused_at')
if old[1] == ARGV[4] and old[2] == ARGV[5] and old[3] == ARGV[6] and old[4] == ARGV[7] then return 0 end
if old[5] and tonumber(old[5]) < tonumber(accepted) then
  redis.call('HDEL', KEYS[1], 'problems', 'problems_total', 'refused_at')
end
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(name, 1, 6) == 'count:' then redis.call('HDEL', KEYS[1], name) end
end
redis.call('HSET', KEYS[1], 'updated_at', ARGV[3], 'state', ARGV[4], 'reason', ARGV[5], 'rows', ARGV[6],
  'done_at', ARGV[7])
for i = 8, #ARGV, 2 do redis.call('HSET', KEYS[1], 'count:' .. ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], ttl)
return 1
"""
_REFUSE: Final = """
local state = redis.call('HGET', KEYS[1], 'state')
redis.call('HSET', KEYS[1], 'refused_at', ARGV[2], 'problems_total', ARGV[4], 'problems', ARGV[5])
if not state or state == 'rejected' then
  redis.call('HSET', KEYS[1], 'updated_at', ARGV[2], 'state', 'rejected', 'reason', ARGV[3], 'rows', '', 'done_at', '')
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""

Problem = tuple[str, str, str]  # path, message, suggestion


def refuse(pipe: Any, account_name: str, job_id: str, problems: Sequence[Problem], now: int) -> None:
    """Queue on a pipeline (any: MULTI too) what is to be read of a refusal."""
    key = keyspace.job_status(account_name, job_id)
    told = [_told(problem) for problem in problems[:MOST_PROBLEMS]]
    packed = msgspec.json.encode(told)
    while len(packed) > _MOST_BYTES:
        told = told[: len(told) // 2]
        packed = msgspec.json.encode(told)
    pipe.eval(_REFUSE, 1, key, KEPT_US // 1000, now, _summary(told, len(problems)), len(problems), packed)


def _summary(told: Sequence[Problem], total: int) -> str:
    if not told:
        return "refused"
    path, message, _ = told[0]
    return f"{path}: {message}" + (f" (and {total - 1} more)" if total > 1 else "")


def _told(problem: Problem) -> Problem:
    path, message, suggestion = problem
    return _safe(path, "$"), _safe(message, _LEFT_OUT), _safe(suggestion, "")


def _safe(text: str, instead: str) -> str:
    """Problems quote no value, but names (of a header, of a field in a template) come from outside."""
    return instead if without_addresses(text) != text else text[:_MOST_TEXT]


@dataclass(frozen=True, slots=True)
class Standing:
    """A job as the ledger has it. counts: by terminal state, only when the last row has ended."""

    account: str
    job_id: str
    state: str
    reason: str
    rows: int | None
    accepted_at: int
    done_at: int | None
    counts: dict[str, int]


def standings(conn: Connection, numbers: Iterable[int]) -> list[Standing]:
    asked = select(
        job.c.number, job.c.job_id, job.c.state, job.c.reason, job.c.rows_submitted, job.c.accepted_at, job.c.done_at,
        account.c.name,
    )  # fmt: skip
    asked = asked.join(account, account.c.number == job.c.account).where(job.c.number.in_(list(numbers)))
    rows = conn.execute(asked).all()
    over = [row.number for row in rows if row.done_at is not None]
    counts: dict[int, dict[str, int]] = {}
    sums = (
        select(counter.c.job, counter.c.kind, func.sum(counter.c.n))
        .where(counter.c.job.in_(over), counter.c.kind.in_(sorted(TERMINAL)))
        .group_by(counter.c.job, counter.c.kind)
    )
    for number, kind, n in conn.execute(sums):
        counts.setdefault(number, {})[word(Kind, kind)] = int(n)
    return [
        Standing(
            row.name, row.job_id, row.state, _safe(row.reason or "", ""), row.rows_submitted, row.accepted_at,
            row.done_at, counts.get(row.number, {}),
        )
        for row in rows
    ]  # fmt: skip


def worth_telling(conn: Connection) -> list[int]:
    """At a start: every job under way, and the hundred that ended last."""
    under_way = conn.scalars(select(job.c.number).where(job.c.done_at.is_(None))).all()
    ended = select(job.c.number).where(job.c.done_at.is_not(None)).order_by(job.c.done_at.desc()).limit(100)
    return [*under_way, *conn.scalars(ended)]


def every_one(conn: Connection) -> list[int]:
    return list(conn.scalars(select(job.c.number)))


@dataclass(slots=True)
class Changes:
    """The writer's part. changed(numbers) returns at once and never raises; what Redis did not take is told at the
    next call (the writer's chores make one every second). open_reader: an engine to read with, opened when needed."""

    redis: Client
    open_reader: Callable[[], Engine]
    clock: Callable[[], int]
    waiting: set[int] = field(default_factory=set)
    failures: int = 0
    _reader: Engine | None = None
    _turn: asyncio.Task[None] | None = None

    def changed(self, numbers: Iterable[int] = ()) -> None:
        self.waiting.update(numbers)
        if self.waiting and self._turn is None:
            self._turn = asyncio.create_task(self._tell(), name="statuses")

    async def close(self) -> None:
        """What can be told is told."""
        self.changed()
        while self._turn is not None:
            await asyncio.shield(self._turn)
        if self._reader is not None:
            self._reader.dispose()
            self._reader = None

    async def _tell(self) -> None:
        some: set[int] = set()
        try:
            while self.waiting:
                some = set(sorted(self.waiting)[:_AT_ONCE])
                self.waiting -= some
                await self._push(await asyncio.to_thread(self._read, some))
        except (redis.exceptions.RedisError, OSError, SQLAlchemyError) as error:
            self._failed(some, error)
        except Exception as error:  # a mistake of ours: a mirror must not end the truth
            self._failed(some, error)
            log.exception("telling a status failed")
        finally:
            self._turn = None

    def _failed(self, some: set[int], error: Exception) -> None:
        self.waiting |= some
        self.failures += 1
        log.warning("redis has not got every job's status", jobs=len(self.waiting), error=type(error).__name__)

    def _read(self, numbers: set[int]) -> list[Standing]:
        if self._reader is None:
            self._reader = self.open_reader()
        with self._reader.connect() as conn:
            return standings(conn, numbers)

    async def _push(self, found: list[Standing]) -> None:
        now = self.clock()
        async with self.redis.pipeline(transaction=False) as pipe:
            for one in found:
                counts = [part for name, n in sorted(one.counts.items()) for part in (name, n)]
                pipe.eval(
                    _TELL, 1, keyspace.job_status(one.account, one.job_id), KEPT_US // 1000, one.accepted_at,
                    one.done_at or now, one.state, one.reason, "" if one.rows is None else one.rows,
                    one.done_at or "", *counts,
                )  # fmt: skip
            await pipe.execute()
