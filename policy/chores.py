"""What the writer does by the clock: clearing addresses out of the append-only file, weekly keys, ends of things.

Law (decision 18): an address that a producer wrote in clear leaves Redis's append-only file within ten minutes of its
acceptance. Deleting the entry is not enough, the log of writes still holds it; so the file is rewritten when a burst of
intake has ended, and at the latest every `clear_seconds` while it goes on. `IntakeClearing.age` is the metric.

    `IntakeClearing.look`   every second: watch the intake stream, ask for BGREWRITEAOF, check that it succeeded
    `turn_keys`             every hour: this week's keys made, slice and wrapping keys past their time destroyed
    `free_jobs`             jobs that are over leave no key in any partition; `free_places`: where they have some

Known limits: a server that refuses BGREWRITEAOF (some managed ones) is reported by the metric growing and one log line.
What the file system keeps of the old file's blocks is the disk's business (encrypt it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import redis.exceptions
import structlog
from sqlalchemy import Connection

from policy import audit, keyspace, rewrapping
from policy.instants import week_of
from policy.keys import KeyringError, due
from policy.keysource import Folder, Source, born
from policy.store import Store
from policy.valkey import Client

log = structlog.get_logger()

_QUIET_SECONDS: Final = 3.0  # no new entry for so long: the burst is over
_META_FIELD: Final = "cleared"  # last intake id that a finished rewrite has left behind
_FREED_AT_ONCE: Final = 128  # jobs a round: a transactional burst ends hundreds a second
_KEYS_AT_ONCE: Final = 1024  # keys an UNLINK, under a millisecond of the server's time
_KEPT: Final = {"queue": 1, "kek": 2}  # weekly keys that stay however old they are (decisions 3 and 13)
_MARGIN: Final = 0.8  # begin early enough for the rewrite itself: 10 min allowed, asked for after 8


class IntakeClearing:
    """Watches the intake stream and keeps the append-only file free of what was deleted from it."""

    def __init__(self, redis_client: Client, clear_seconds: float) -> None:
        self._redis = redis_client
        self._limit = clear_seconds * _MARGIN
        self._seen = ""
        self._changed_at = 0.0
        self._dirty_since: float | None = None
        self._rewriting: tuple[str, float, bool] | None = (
            None  # id at its start, dirty since, whether entries were left
        )
        self._started = False
        self.rewrites = 0
        self.failures = 0

    def age(self, now: float) -> float:
        """Seconds the oldest uncleared entry has been in the file; 0 when there is none. now: monotonic."""
        since = [at for at in (self._dirty_since, self._rewriting[1] if self._rewriting else None) if at is not None]
        return max(0.0, now - min(since)) if since else 0.0

    async def look(self, now: float) -> None:
        """One look; now: monotonic seconds. Raises RedisError while Redis is away."""
        last, waiting = await self._intake()
        if not self._started:
            held: Any = await self._redis.hget(keyspace.META, _META_FIELD)
            self._seen = held.decode("ascii") if held else ""
            self._started = True
        if last and last != self._seen:
            self._seen, self._changed_at = last, now
            if self._dirty_since is None:
                self._dirty_since = now
        if self._rewriting is not None:
            await self._follow(now)
        if self._dirty_since is None or self._rewriting is not None:
            return
        ended = waiting == 0 and now - self._changed_at >= _QUIET_SECONDS
        if ended or now - self._dirty_since >= self._limit:
            await self._rewrite(now, waiting)

    async def _intake(self) -> tuple[str, int]:
        try:
            info: Any = await self._redis.xinfo_stream(keyspace.INTAKE)
        except redis.exceptions.ResponseError:  # no such key: nobody has submitted anything yet
            return "", 0
        told = {_text(key): value for key, value in dict(info).items()}
        return _text(told["last-generated-id"]), int(told["length"])

    async def _rewrite(self, now: float, waiting: int) -> None:
        told = await self._redis.info("persistence")
        if not told.get("aof_enabled"):
            self._dirty_since = None  # nothing is kept on disk
            return
        if told.get("aof_rewrite_in_progress") or told.get("aof_rewrite_scheduled"):
            return  # one that began before the entries were deleted does not help: ask again when it is over
        assert self._dirty_since is not None
        try:
            await self._redis.bgrewriteaof()
        except redis.exceptions.ResponseError:
            self.failures += 1
            if self.failures == 1:
                log.error("the server refuses BGREWRITEAOF: addresses from the intake stay in its append-only file")
            self._changed_at = now
            return
        self._rewriting = (self._seen, self._dirty_since, waiting > 0)
        self._dirty_since = None

    async def _follow(self, now: float) -> None:
        assert self._rewriting is not None
        told = await self._redis.info("persistence")
        if told.get("aof_rewrite_in_progress") or told.get("aof_rewrite_scheduled"):
            return
        seen, since, left = self._rewriting
        self._rewriting = None
        if told.get("aof_last_bgrewrite_status") != "ok":
            self.failures += 1
            self._dirty_since = since
            log.error("rewriting the append-only file failed, trying again")
            return
        self.rewrites += 1
        if left:  # entries that waited at its start are in the new file too
            self._dirty_since = now if self._dirty_since is None else self._dirty_since
        else:
            await self._redis.hset(keyspace.META, _META_FIELD, seen)


async def turn_keys(store: Store, source: Source | Path, now_us: int) -> bool:
    """Make what is missing for this week, destroy slice and wrapping keys past their time; True: load keys again.

    A source that cannot be written is somebody else's to turn: an error in the log, every hour, and nothing changes.
    """
    keys = Folder(source) if isinstance(source, Path) else source
    week = week_of(now_us)

    def destroy(conn: Connection) -> dict[str, list[int]]:
        gone: dict[str, list[int]] = {}
        for name, keep in _KEPT.items():
            weeks = due(born(conn, name, keys.weeks(name), now_us), now_us, keep)
            gone[name] = rewrapping.doomed(conn, weeks) if name == "kek" else weeks
            keys.destroy(name, gone[name])  # a key destroyed without its line is possible (the commit may fail), and is
            for old in gone[name]:  # told by the log; a line without its act would be a lie
                audit.append(conn, now_us, "policy", "key-destroyed", f"key/{name}.{old}", "retention", "done")
        return gone

    made = False
    try:
        made = await asyncio.to_thread(keys.ensure_week, week)
        destroyed = await store.write(destroy)
    except (OSError, KeyringError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        log.error("keys cannot be made or destroyed: is their folder read-only?", week=week, error=why)
        return made
    if made:
        log.info("keys of a new week made", week=week)
    for name, weeks in destroyed.items():
        if weeks:
            log.info("keys destroyed", name=name, weeks=weeks)
    return made or any(destroyed.values())


async def free_job(redis_client: Client, number: int) -> None:
    """Delete every key of a job that is over, in all partitions."""
    await free_jobs(redis_client, [number])


# the number of buckets of each job as this partition knows it
_BUCKETS: Final = """
local found = {}
for i, key in ipairs(KEYS) do found[i] = redis.call('HGET', key, 'nb') or '0' end
return found
"""


async def free_jobs(redis_client: Client, numbers: Sequence[int]) -> None:
    """Delete every key of jobs that are over, in all partitions: three commands a partition however many jobs it are
    (10,000 jobs of one recipient, each for itself, were four minutes of CPU). Repeats do nothing."""
    partitions = range(keyspace.PARTITIONS)
    for start in range(0, len(numbers), _FREED_AT_ONCE):
        some = numbers[start : start + _FREED_AT_ONCE]
        async with redis_client.pipeline(transaction=False) as pipe:
            for partition in partitions:
                pipe.eval(_BUCKETS, len(some), *[keyspace.job(partition, number) for number in some])
            told = await pipe.execute()
        # fingerprints come before the share that brings the number: what one partition says holds for all
        buckets = [max(map(int, of_job)) for of_job in zip(*told, strict=True)]
        words = [f"{letter}{number}" for number in some for letter in "jx"]
        async with redis_client.pipeline(transaction=False) as pipe:
            for partition in partitions:
                keys: list[str] = []
                for number, most in zip(some, buckets, strict=True):
                    keys += (keyspace.job(partition, number), keyspace.chunks_put(partition, number))
                    keys += [keyspace.duplicates(partition, number, bucket) for bucket in range(most)]
                for first in range(0, len(keys), _KEYS_AT_ONCE):
                    pipe.unlink(*keys[first : first + _KEYS_AT_ONCE])
                pipe.execute_command("SREM", keyspace.halts(partition), *words)
            pipe.unlink(*[keyspace.stream_of_chunks(number) for number in some])
            await pipe.execute()


# what a partition holds of jobs: fingerprints in as many buckets as its share said, marks, state
_FREE: Final = """
for _, number in ipairs(ARGV) do
  local state = KEYS[1] .. 'j:' .. number
  local keys = {state, KEYS[1] .. 'w:' .. number}
  for bucket = 0, tonumber(redis.call('HGET', state, 'nb') or '1') - 1 do
    keys[#keys + 1] = KEYS[1] .. 'u:' .. number .. ':' .. bucket
  end
  redis.call('UNLINK', unpack(keys))
end
return #ARGV
"""


async def free_places(redis_client: Client, places: Mapping[int, int]) -> None:
    """Delete every key of jobs that are over and never were halted, where it is known in which partitions they have
    keys. places: by job, one bit a partition. A job of one recipient has one; to look into all 64 took 700 us of our
    CPU and 200 us of the server's. Repeats do nothing."""
    numbers = list(places)
    for start in range(0, len(numbers), _FREED_AT_ONCE):
        some = numbers[start : start + _FREED_AT_ONCE]
        here: dict[int, list[int]] = {}
        for number in some:
            mask = places[number]
            while mask:
                here.setdefault((mask & -mask).bit_length() - 1, []).append(number)
                mask &= mask - 1
        async with redis_client.pipeline(transaction=False) as pipe:
            for partition, held in here.items():
                pipe.eval(_FREE, 1, keyspace.prefix(partition), *held)
            pipe.unlink(*[keyspace.stream_of_chunks(number) for number in some])
            await pipe.execute()


def _text(value: Any) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
