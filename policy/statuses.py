"""A status a job, in Redis: what a producer far away may read of its job with nothing but Redis (T0).

Laws:
- it is a mirror: SQL is the truth (`sales-push status` reads that). A change is told after its commit; while Redis does
  not take it, it stays on the list here and nobody else waits for it or fails by it;
- state, reason, rows and counts are the ledger's, `problems` the intake's: a refusal never overwrites the state of a
  job that was accepted (the id is taken, an audience entry is broken), it only adds its problems;
- no recipient: the key names nobody (policy.keyspace), and a text in which an address could stand is left out.

    `Changes`    1. `Store` says which jobs a transaction changed (`policy.store.mark`, in policy.jobs)
                 2. one task reads them as they are now, a hundred at a time, and tells Redis in one command; the
                    first change at once, then as many as gather in `_GATHER` seconds: in a burst a job changes three
                    times in less, and is told once
    `refuse`     the intake's part: a command in the transaction that puts the refused entry away

Fields: state, reason, rows, done_at, updated_at (microseconds), ``count:<terminal state>`` when the last row has ended;
problems_total, problems (JSON, at most 100 of [path, message, suggestion]), refused_at.

Known limits: who may write to the intake may fill Redis with refusals, at most 32 KiB each, for 90 days. A Redis that
was lost gets all jobs back, but no refusals. What died with the process between commit and telling is told at the next
start, for jobs under way and the hundred that ended last. A payload that does not say who it is has no status.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import redis.exceptions
import structlog
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from policy import keyspace, statements
from policy.events import TERMINAL, Kind
from policy.instants import DAY_US
from policy.logs import without_addresses
from policy.schema import job
from policy.stories import word
from policy.valkey import Client, call

log = structlog.get_logger()

KEPT_US: Final = 90 * DAY_US  # as long as a job id means one payload (policy.jobs)
MOST_PROBLEMS: Final = 100
_MOST_BYTES: Final = 32 * 1024  # of problems; about all hundred, at the length they have
_MOST_TEXT: Final = 300
_LEFT_OUT: Final = "(an address may stand in this: `sales-push jobs rejected` shows it)"
_AT_ONCE: Final = 100
_KINDS: Final = ", ".join(str(int(kind)) for kind in sorted(TERMINAL))
_GATHER: Final = 0.2  # seconds from one round to the next

# ttl, then for each key accepted_at, updated_at, state, reason, rows, done_at, how many counts, and those by name. One
# command for all: they share a slot. A status that says so already keeps its time; problems older than the acceptance
# belong to a submission before it.
_TELL: Final = """
local ttl, at, told = ARGV[1], 2, 0
for _, key in ipairs(KEYS) do
  local accepted, state, reason, rows, over = ARGV[at], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local counts = tonumber(ARGV[at + 6])
  local old = redis.call('HMGET', key, 'state', 'reason', 'rows', 'done_at', 'refused_at')
  if not (old[1] == state and old[2] == reason and old[3] == rows and old[4] == over) then
    if old[5] and tonumber(old[5]) < tonumber(accepted) then
      redis.call('HDEL', key, 'problems', 'problems_total', 'refused_at')
    end
    if old[4] and old[4] ~= '' then  -- it was over before: only then are there counts
      for _, name in ipairs(redis.call('HKEYS', key)) do
        if string.sub(name, 1, 6) == 'count:' then redis.call('HDEL', key, name) end
      end
    end
    redis.call('HSET', key, 'updated_at', ARGV[at + 1], 'state', state, 'reason', reason, 'rows', rows, 'done_at', over)
    for i = at + 7, at + 5 + 2 * counts, 2 do redis.call('HSET', key, 'count:' .. ARGV[i], ARGV[i + 1]) end
    redis.call('PEXPIRE', key, ttl)
    told = told + 1
  end
  at = at + 7 + 2 * counts
end
return told
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
    """Texts for the driver: in a burst this is asked for every job two or three times."""
    some, dialect = tuple(numbers), conn.dialect.name
    if not some:
        return []
    among = statements.marks(dialect, len(some))
    found = conn.exec_driver_sql(
        "SELECT j.number, a.name, j.job_id, j.state, j.reason, j.rows_submitted, j.accepted_at, j.done_at"
        f" FROM job j JOIN account a ON a.number = j.account WHERE j.number IN ({among})",
        some,
    )
    rows: list[Any] = list(found)
    counts: dict[int, dict[str, int]] = {}
    if over := tuple(row.number for row in rows if row.done_at is not None):
        among = statements.marks(dialect, len(over))
        sums = f"SELECT job, kind, sum(n) FROM counter WHERE job IN ({among}) AND kind IN ({_KINDS}) GROUP BY job, kind"
        for number, kind, n in conn.exec_driver_sql(sums, over):
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
    waiting: dict[int, None] = field(default_factory=dict)  # in the order in which they changed
    failures: int = 0
    _reader: Engine | None = None
    _turn: asyncio.Task[None] | None = None
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    def changed(self, numbers: Iterable[int] = ()) -> None:
        self.waiting.update(dict.fromkeys(numbers))
        if self.waiting and self._turn is None:
            self._turn = asyncio.create_task(self._tell(), name="statuses")

    async def close(self) -> None:
        """What can be told is told."""
        self._closing.set()
        self.changed()
        while self._turn is not None:
            await asyncio.shield(self._turn)
        if self._reader is not None:
            self._reader.dispose()
            self._reader = None

    async def _tell(self) -> None:
        some: list[int] = []
        try:
            while self.waiting:
                for _ in range(-(-len(self.waiting) // _AT_ONCE)):
                    some = list(itertools.islice(self.waiting, _AT_ONCE))
                    for number in some:
                        del self.waiting[number]
                    await self._push(await asyncio.to_thread(self._read, some))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), _GATHER)
        except (redis.exceptions.RedisError, OSError, SQLAlchemyError) as error:
            self._failed(some, error)
        except Exception as error:  # a mistake of ours: a mirror must not end the truth
            self._failed(some, error)
            log.exception("telling a status failed")
        finally:
            self._turn = None

    def _failed(self, some: Sequence[int], error: Exception) -> None:
        self.waiting.update(dict.fromkeys(some))
        self.failures += 1
        log.warning("redis has not got every job's status", jobs=len(self.waiting), error=type(error).__name__)

    def _read(self, numbers: Sequence[int]) -> list[Standing]:
        if self._reader is None:
            self._reader = self.open_reader()
        with self._reader.connect() as conn:
            return standings(conn, numbers)

    async def _push(self, found: list[Standing]) -> None:
        if not found:
            return
        now = self.clock()
        arguments: list[str | int] = [KEPT_US // 1000]
        for one in found:
            arguments += (
                one.accepted_at, one.done_at or now, one.state, one.reason, "" if one.rows is None else one.rows,
                one.done_at or "", len(one.counts),
            )  # fmt: skip
            for name, n in sorted(one.counts.items()):
                arguments += (name, n)
        keys = [keyspace.job_status(one.account, one.job_id) for one in found]
        await call(self.redis, "EVAL", _TELL, len(keys), *keys, *arguments)
