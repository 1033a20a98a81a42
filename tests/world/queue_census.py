"""Looks at one partition of a real Redis and hands `engine.queue.states` what it sees; builds slices for tests."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from engine.queue import slices, states
from policy import keyspace

KEY = os.urandom(32)
KEYS = {2900: KEY}
FAR = 4_000_000_000_000_000  # an expiry in the year 2096, microseconds
SITE = "SSSSSSSSSSS"


def lane_named(letter: str) -> str:
    return letter * 11


def some_slice(
    job: int,
    partition: int,
    lane: str,
    count: int = 64,
    *,
    expires_at: int = FAR,
    flags: int = 0,
    values: Sequence[slices.Value] = ("Ada",),
) -> bytes:
    rows = [slices.Row(f"reader{index}", index + 1, index + 7, 0, 0, list(values)) for index in range(count)]
    contents = slices.Contents("example.test", ["name"], rows)
    return slices.build(KEY, 2900, job, partition, lane, contents, expires_at=expires_at, flags=flags)


async def census(redis: Redis, partition: int) -> states.Snapshot:
    """Everything of the queue under one hash tag. Only for tests: KEYS is slow, and nothing may run meanwhile."""
    prefix = keyspace.prefix(partition)
    keys: list[bytes] = await _ask(redis, "KEYS", f"{prefix}*")
    found: dict[str, Any] = {name: {} for name in ("slices", "lanes", "due", "waiting")}
    for raw in keys:
        name = raw.decode()
        assert keyspace.entry_of(name) is not None, f"{name} is not in the inventory"
        kind, _, rest = name.removeprefix(prefix).partition(":")
        if kind == "s":
            header = slices.parse_header(await _ask(redis, "GET", name))
            assert isinstance(header, slices.Header)
            found["slices"][rest] = header
        elif kind == "l":
            found["lanes"][rest] = await _scores(redis, name)
        elif kind in ("d", "D"):
            found["due"][kind, rest] = await _scores(redis, name)
        elif kind == "j":
            found["waiting"][int(rest)] = int(await _ask(redis, "HGET", name, "w"))
    leases = {}
    for slice_id, lease in (await _hash(redis, keyspace.leases(partition))).items():
        match = re.fullmatch(r"(\d+) (\S+)", lease)
        assert match is not None
        leases[slice_id] = (int(match[1]), match[2])
    counters = await _hash(redis, keyspace.counter(partition))
    holders = await _hash(redis, keyspace.holders(partition))
    return states.Snapshot(
        **found,
        sites=await _hash(redis, keyspace.lane_sites(partition)),
        index=await _scores(redis, keyspace.due_sites(partition)),
        leases=leases,
        holders={name: int(count) for name, count in holders.items()},
        tokens=int(counters.get("tok", "0")),
    )


async def assert_legal(redis: Redis, *partitions: int) -> None:
    for partition in partitions:
        assert states.violations(await census(redis, partition)) == []


async def _scores(redis: Redis, key: str) -> dict[str, int]:
    told = await _ask(redis, "ZRANGE", key, "0", "-1", "WITHSCORES")
    return {member.decode(): int(score) for member, score in told}


async def _hash(redis: Redis, key: str) -> dict[str, str]:
    return {field.decode(): value.decode() for field, value in (await _ask(redis, "HGETALL", key)).items()}


async def _ask(redis: Redis, *command: str) -> Any:
    async with redis.pipeline(transaction=False) as pipe:  # the one typed way to send a command by its name
        pipe.execute_command(*command)
        return (await pipe.execute())[0]
