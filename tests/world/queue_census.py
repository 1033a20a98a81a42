"""Looks at one partition of a real Redis and hands `engine.queue.states` what it sees; builds slices for tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

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
    return (await whole_census(redis, partition))[0]


async def whole_census(redis: Redis, partition: int) -> tuple[states.Snapshot, dict[str, bytes]]:
    """The census, and every slice as it is stored. Two round trips."""
    prefix = keyspace.prefix(partition)
    [keys] = await _ask(redis, [("KEYS", f"{prefix}*")])
    names = [raw.decode() for raw in keys]
    unknown = [name for name in names if keyspace.entry_of(name) is None]
    assert not unknown, f"{unknown} are not in the inventory"
    kinds = [(kind, rest) for kind, _, rest in (name.removeprefix(prefix).partition(":") for name in names)]
    asked = {(kind, rest): _HOW[kind](name) for name, (kind, rest) in zip(names, kinds, strict=True) if kind in _HOW}
    told = dict(zip(asked, await _ask(redis, list(asked.values())), strict=True))
    stored: dict[str, bytes] = {rest: data for (kind, rest), data in told.items() if kind == "s"}
    headers: dict[str, slices.Header] = {}
    for name, data in stored.items():
        header = slices.parse_header(data)
        assert isinstance(header, slices.Header)
        headers[name] = header
    leases = {}
    for slice_id, lease in _pairs(told.get(("lease", ""), {})).items():
        match = re.fullmatch(r"(\d+) (\S+)", lease)
        assert match is not None
        leases[slice_id] = (int(match[1]), match[2])
    seen = states.Snapshot(
        slices=headers,
        lanes={rest: _scores(members) for (kind, rest), members in told.items() if kind == "l"},
        sites=_pairs(told.get(("site", ""), {})),
        due={(kind, rest): _scores(members) for (kind, rest), members in told.items() if kind in ("d", "D")},
        index=_scores(told.get(("idx", ""), [])),
        leases=leases,
        holders={name: int(count) for name, count in _pairs(told.get(("hold", ""), {})).items()},
        tokens=int(_pairs(told.get(("n", ""), {})).get("tok", "0")),
        waiting={int(rest): int(count) for (kind, rest), count in told.items() if kind == "j"},
    )
    return seen, stored


async def assert_legal(redis: Redis, *partitions: int) -> None:
    for partition in partitions:
        assert states.violations(await census(redis, partition)) == []


def _sorted_set(name: str) -> tuple[str, ...]:
    return ("ZRANGE", name, "0", "-1", "WITHSCORES")


def _whole_hash(name: str) -> tuple[str, ...]:
    return ("HGETALL", name)


_HOW: Final[Mapping[str, Callable[[str], tuple[str, ...]]]] = {
    "s": lambda name: ("GET", name),
    "j": lambda name: ("HGET", name, "w"),
    **dict.fromkeys(("l", "d", "D", "idx"), _sorted_set),
    **dict.fromkeys(("site", "lease", "hold", "n"), _whole_hash),
}


def _scores(told: Any) -> dict[str, int]:
    return {member.decode(): int(score) for member, score in told}


def _pairs(told: Any) -> dict[str, str]:
    return {field.decode(): value.decode() for field, value in told.items()}


async def _ask(redis: Redis, commands: Sequence[tuple[str, ...]]) -> list[Any]:
    async with redis.pipeline(transaction=False) as pipe:  # the one typed way to send a command by its name
        for command in commands:
            pipe.execute_command(*command)
        return list(await pipe.execute())
