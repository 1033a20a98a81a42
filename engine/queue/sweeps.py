"""Walks over the whole queue, a few keys at a time: for new keys (decision 3), for what was cancelled, after a resume.

Laws:
- a walk looks at no more than it was asked to look at a time, so that no call holds the server for a millisecond;
- nothing found on a walk is believed: each script looks again and changes only what still is as it was seen. So two
  walks at once, on two hosts, do no harm.

    scan     the next few slices and their headers          read     the whole of some
    reseal   some under another key, compare and swap       hasten   some that were cancelled, as leases
    unpark   what was passed over while it was paused is due now

Known limits: SCAN is of one server; a Redis Cluster needs a walk a node. It goes over all keys, so a walk costs by
everything that is stored, about a microsecond a key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from engine.queue.lanes import EVENT_CAP, UNPARK
from engine.queue.questions import Lease
from engine.queue.scripts import Call, Scripts
from engine.queue.slices import HEADER_BYTES, NONCE_BYTES
from policy import keyspace

SEEN_BYTES: Final = HEADER_BYTES + NONCE_BYTES
_SLICE: Final = re.compile(rb"sp:\{p(\d\d)\}:s:([0-9a-z]+)")
_EVERY_SLICE: Final = "sp:{p??}:s:*"


@dataclass(frozen=True, slots=True)
class Seen:
    """A slice as a walk met it. head: its header and nonce."""

    partition: int
    slice_id: str
    head: bytes


@dataclass(frozen=True, slots=True)
class Hastened:
    """full: the event stream of the partition is at its cap and nothing was leased."""

    leases: list[Lease]
    full: bool


class Sweeps:
    """One per worker; holder and event_cap as of `Lanes`. Every method raises RedisError."""

    def __init__(self, redis: Redis, holder: str, *, event_cap: int = EVENT_CAP) -> None:
        self._scripts = Scripts(redis)
        self._holder = holder
        self._event_cap = event_cap

    async def scan(self, place: int, count: int) -> tuple[int, list[Seen]]:
        """Slices among about the next `count` keys, and where to go on: from 0, until 0 comes back."""
        command = ("SCAN", str(place), "MATCH", _EVERY_SLICE, "COUNT", str(count), "TYPE", "string")
        [(following, keys)] = await self._scripts.plain([command])
        found = [match for key in keys if (match := _SLICE.fullmatch(key)) is not None]
        asked = [("GETRANGE", match[0].decode("ascii"), "0", str(SEEN_BYTES - 1)) for match in found]
        heads: list[bytes] = await self._scripts.plain(asked)
        seen = [
            Seen(int(match[1]), match[2].decode("ascii"), head)
            for match, head in zip(found, heads, strict=True)
            if len(head) == SEEN_BYTES  # settled between the two questions
        ]
        return int(following), seen

    async def read(self, some: Sequence[Seen]) -> list[bytes | None]:
        """The slices as they are now; None: gone."""
        return await self._scripts.plain([("GET", keyspace.slice_key(one.partition, one.slice_id)) for one in some])

    async def reseal(self, changes: Sequence[tuple[Seen, bytes]]) -> int:
        """Slices under their new key, where they wait unchanged; how many did."""
        by_partition: dict[int, list[bytes | str | int]] = {}
        for seen, data in changes:
            by_partition.setdefault(seen.partition, []).extend((seen.slice_id, seen.head, data))
        calls = [Call("reseal", keyspace.prefix(partition), args) for partition, args in by_partition.items()]
        return sum(int(_value(answer)) for answer in await self._scripts.run(calls))

    async def hasten(self, partition: int, slice_ids: Sequence[str]) -> Hastened:
        """Lease those that wait and whose job or domain is cancelled; the others stay as they are."""
        call = Call("hasten", keyspace.prefix(partition), (self._holder, self._event_cap, *slice_ids))
        full, taken = _value((await self._scripts.run([call]))[0])
        leases = []
        for at in range(0, len(taken), 5):
            slice_id, site, lane = (part.decode("ascii") for part in taken[at : at + 3])
            leases.append(Lease(partition, slice_id, site, lane, taken[at + 3], taken[at + 4]))
        return Hastened(leases, bool(full))

    async def lane(self, partition: int, lane: str, first: int, count: int) -> list[str]:
        """Ids of slices of a lane by their place in it, leased or not."""
        key = keyspace.lane(partition, lane)
        [ids] = await self._scripts.plain([("ZRANGE", key, str(first), str(first + count - 1))])
        return [slice_id.decode("ascii") for slice_id in ids]

    async def unpark(self, partitions: Sequence[int] = range(keyspace.PARTITIONS)) -> int:
        """What lease passed over because it was paused is due now; how many slices."""
        calls = [Call("unpark", keyspace.prefix(p), UNPARK) for p in partitions]
        return sum(int(_value(answer)) for answer in await self._scripts.run(calls))


def _value(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
