"""People taken out of slices that wait, and their fields put right there; nobody else's row is touched (P-44, P-54).

Laws:
- a person is looked for in one lane, by subject number: the identity may be gone by then (decision 13);
- whoever leaves was not done: marked done, told as REFUSED, ERASED, the row blank, all in one script, so that rows
  submitted stay the sum of the terminal states (I6) and nobody ends twice. Who was done before leaves no bytes either;
- all others of the slice keep row, place, maps, due, date and doubt;
- compare and swap (erase.lua): what was leased or re-sealed since it was read stays as it is and is counted in `left`.
  The gate refuses an erased person at the wire meanwhile, and the slice is met again when it is asked again.

The path: ids of the lane · slices read and searched, `BATCH` at a time · those that name the person rewritten and
swapped · the ids once more, until there are none that were not looked at (a retry lays a younger slice).

The event names no person: pseudonym 0, no tag. Its reference is that of the job and address, as everywhere, so that a
store that comes back older is compared with the ledger as usual (T12); without the job's key it is made of the place.

Known limits: a lane is read whole, 25 us a full slice: half a second for a million people of one domain, in the
writer's process, with as much rest as work. A slice of a newer layout, or under a key that this process has not read
yet, is counted as left. A field of a row that is leased is not corrected: it is being sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final

from redis.asyncio import Redis

from engine.queue.lanes import EVENT_CAP
from engine.queue.scripts import Call, Scripts
from engine.queue.slices import (
    HEADER_BYTES,
    NONCE_BYTES,
    Contents,
    Header,
    Lost,
    Row,
    Value,
    blank,
    contents_with,
    parse_header,
    rewritten,
)
from policy import keyspace
from policy.address import mref_of, normalise
from policy.events import Batch, Event, Kind, Reason, encode_batch
from policy.keys import Keyring
from policy.personal import Erased

BATCH: Final = 16  # slices read and searched between two turns of the loop: at most 512 KiB
LANE_IDS: Final = 500  # ids a ZSCAN, 0.2 ms of the server
REST: Final = 1.0  # rest for each second of work
_HEAD: Final = HEADER_BYTES + NONCE_BYTES

_STRANGE: Final = Header(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, lane="")

JobKey = Callable[[int], Awaitable[bytes | None]]
Fitting = Callable[[int], Awaitable[Value]]


@dataclass(frozen=True, slots=True, repr=False)
class Found:
    """A slice that names the person. rows: indexes of the person's; contents: None where they cannot be read here, but
    may be elsewhere; holder: "" when nobody has leased it; due: microseconds, of its last waiting."""

    slice_id: str
    data: bytes
    header: Header
    contents: Contents | None
    rows: tuple[int, ...] = ()
    holder: str = ""
    due: int = 0

    @property
    def fresh(self) -> list[int]:
        """The person's rows that have not ended."""
        return [index for index in self.header.pending() if index in self.rows]


@dataclass(frozen=True, slots=True)
class _Change:
    found: Found
    data: bytes
    leaving: int = 0
    events: bytes = b""
    records: int = 0


class Erasing:
    """One per process. job_key: 32 bytes, None when they are destroyed; clock: microseconds; redis: binary-safe."""

    def __init__(
        self,
        redis: Redis,
        keyring: Callable[[], Keyring],
        job_key: JobKey,
        clock: Callable[[], int],
        *,
        event_cap: int = EVENT_CAP,
    ) -> None:
        self._scripts = Scripts(redis)
        self._keyring = keyring
        self._job_key = job_key
        self._clock = clock
        self._event_cap = event_cap

    async def find(self, partition: int, lane: str, subjects: Iterable[int]) -> list[Found]:
        """Every slice of the lane with rows of these people that can be read, by job and id. Raises RedisError."""
        found = [one async for some in self._walk(partition, lane, frozenset(subjects)) for one in some]
        return sorted(
            (one for one in found if one.contents is not None), key=lambda one: (one.header.job, one.slice_id)
        )

    async def erase(self, partition: int, lane: str, subjects: Iterable[int]) -> Erased:
        """Take them out of what waits. Raises RedisError: what was taken out by then stays so; ask again."""
        told = Erased()
        async for some in self._walk(partition, lane, frozenset(subjects)):
            free = [one for one in some if one.contents is not None and not one.holder]
            told += Erased(left=len(some) - len(free))
            told += await self._swap(partition, [await self._without(partition, one) for one in free])
        return told

    async def amend(self, partition: int, lane: str, subjects: Iterable[int], field: str, value: Fitting) -> int:
        """Another value, by job, for a field of theirs wherever it waits. How many rows. Raises RedisError."""
        told = Erased()
        async for some in self._walk(partition, lane, frozenset(subjects)):
            changes = [await self._corrected(partition, one, field, value) for one in some if not one.holder]
            told += await self._swap(partition, [change for change in changes if change is not None])
        return told.records

    async def lanes(self, partition: int) -> list[str]:
        """References of all lanes of a partition: where it is not known any more which one is theirs."""
        found: set[str] = set()
        place = "0"
        while True:
            command = ("SCAN", place, "MATCH", keyspace.lane(partition, "*"), "COUNT", str(LANE_IDS), "TYPE", "zset")
            [(following, keys)] = await self._scripts.plain([command])
            found.update(key.decode("ascii").rpartition(":")[2] for key in keys)
            place = str(int(following))
            if place == "0":
                return sorted(found)

    # --- the walk --------------------------------------------------------------------------------------------------

    async def _walk(self, partition: int, lane: str, subjects: frozenset[int]) -> AsyncIterator[list[Found]]:
        seen: set[str] = set()
        subjects -= {0}  # nobody's number: blank rows have it
        while subjects and (fresh := sorted(await self._ids(partition, lane) - seen)):
            seen.update(fresh)
            for start in range(0, len(fresh), BATCH):
                begun = time.monotonic()
                found = await self._look(partition, lane, fresh[start : start + BATCH], subjects)
                if found:
                    yield found
                await asyncio.sleep((time.monotonic() - begun) * REST)

    async def _ids(self, partition: int, lane: str) -> set[str]:
        """ZSCAN meets whatever is there from its beginning to its end, and holds the server for no time."""
        ids: set[str] = set()
        place = "0"
        while True:
            command = ("ZSCAN", keyspace.lane(partition, lane), place, "COUNT", str(LANE_IDS))
            [(following, members)] = await self._scripts.plain([command])
            ids.update(member.decode("ascii") for member, _ in members)
            place = str(int(following))
            if place == "0":
                return ids

    async def _look(self, partition: int, lane: str, ids: Sequence[str], subjects: frozenset[int]) -> list[Found]:
        [stored] = await self._scripts.plain([("MGET", *[keyspace.slice_key(partition, name) for name in ids])])
        found = []
        for name, data in zip(ids, stored, strict=True):
            one = self._searched(partition, name, data, subjects) if data is not None else None
            if one is not None:
                asked = ("HGET", keyspace.leases(partition), name), ("ZSCORE", keyspace.lane(partition, lane), name)
                lease, due = await self._scripts.plain(asked)
                holder = (lease or b"").decode("ascii").partition(" ")[2]
                found.append(replace(one, holder=holder, due=int(float(due or 0))))
        return found

    def _searched(self, partition: int, name: str, data: bytes, subjects: frozenset[int]) -> Found | None:
        header = parse_header(data)
        if isinstance(header, Lost):
            return Found(name, data, _STRANGE, None)  # a newer program's: somebody else reads it
        keys = self._keyring().queue
        contents = contents_with(keys, header, partition, data, subjects)
        if isinstance(contents, Lost):
            # younger than ours: others have its key. Older, or broken: nobody opens it any more
            return Found(name, data, header, None) if header.key_id > max(keys) else None
        if contents is None:
            return None
        rows = tuple(index for index, row in enumerate(contents.rows) if row.subject in subjects)
        return Found(name, data, header, contents, rows)

    # --- the change ------------------------------------------------------------------------------------------------

    async def _without(self, partition: int, one: Found) -> _Change:
        contents, header = one.contents, one.header
        assert contents is not None
        fresh = one.fresh
        events = b""
        if fresh:
            key, now = await self._job_key(header.job), self._clock()
            told = [
                Event(
                    int(Kind.REFUSED),
                    self._reference(key, partition, one, index),
                    header.attempt + 1,
                    now,
                    reason=int(Reason.ERASED),
                )
                for index in fresh
            ]
            events = encode_batch(Batch(header.job, contents.domain, told))
        data = b""
        if set(header.pending()) - set(fresh):  # else nobody is left in it
            rows = [blank() if index in one.rows else row for index, row in enumerate(contents.rows)]
            data = self._sealed(partition, one, Contents(contents.domain, contents.columns, rows), one.rows)
        return _Change(one, data, len(fresh), events, len(one.rows))

    def _reference(self, key: bytes | None, partition: int, one: Found, index: int) -> int:
        assert one.contents is not None
        if key is not None:
            return mref_of(key, normalise(one.contents.rows[index].local, one.contents.domain))
        place = f"{partition}/{one.slice_id}/{index}".encode()
        return int.from_bytes(blake2b(place, digest_size=8, person=b"sp-erased").digest(), "big", signed=True)

    async def _corrected(self, partition: int, one: Found, field: str, fitting: Fitting) -> _Change | None:
        contents = one.contents
        if contents is None or field not in contents.columns:
            return None
        place = contents.columns.index(field)
        rows: list[Row] = list(contents.rows)
        changed = 0
        for index in one.fresh:
            row = rows[index]
            value = await fitting(one.header.job)
            if value == row.values[place]:
                continue
            values = [*row.values[:place], value, *row.values[place + 1 :]]
            rows[index] = Row(row.local, row.subject, row.pseudonym, row.mode_opens, row.mode_clicks, values)
            changed += 1
        if not changed:
            return None
        return _Change(
            one, self._sealed(partition, one, Contents(contents.domain, contents.columns, rows)), records=changed
        )

    def _sealed(self, partition: int, one: Found, contents: Contents, gone: Iterable[int] = ()) -> bytes:
        keyring = self._keyring()
        return rewritten(keyring.queue, keyring.queue_id, partition, one.data, contents, gone)

    async def _swap(self, partition: int, changes: Sequence[_Change]) -> Erased:
        if not changes:
            return Erased()
        args: list[bytes | str | int] = [self._event_cap]
        for change in changes:
            args += (change.found.slice_id, change.found.data[:_HEAD], change.data, change.leaving, change.events)
        [answer] = await self._scripts.run([Call("erase", keyspace.prefix(partition), args)])
        swapped: list[Any] = _value(answer)
        done = [change.records for change, told in zip(changes, swapped, strict=True) if told == 1]
        return Erased(sum(done), len(changes) - len(done))


def _value(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
