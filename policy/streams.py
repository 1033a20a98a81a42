"""The event streams as the writer reads them: one look at everything that is new, and how far behind it is.

    1. `look`       XREAD from the cursors, all partitions and the hits in one round trip, decoded
    2. `portions`   cut into transactions (policy.drains)
    3. `trim`       XTRIM MINID: only what is committed leaves Redis

`Lag` is what operators see of it: ``ledger_lag_seconds``.

Known limits: an entry that does not decode is counted, logged and passed: its recipients never reach a terminal state
and the job stays "sending". XREAD names all partitions in one command, which a Redis Cluster would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import structlog

from policy import cursors, keyspace
from policy.events import Batch, decode_batch, decode_hits
from policy.valkey import Client, call

log = structlog.get_logger()

ENTRIES: Final = 64  # stream entries a partition and look; an entry carries at most 64 recipients

EVENT_STREAMS: Final = tuple(keyspace.events(partition) for partition in range(keyspace.PARTITIONS))
STREAMS: Final = frozenset({*EVENT_STREAMS, keyspace.HITS})


@dataclass(slots=True)
class Read:
    """What one XREAD brought: decoded items with their stream and id, how many did not decode, last id a stream."""

    items: list[tuple[str, str, Any]] = field(default_factory=list)
    poison: int = 0
    last: dict[str, str] = field(default_factory=dict)
    full: bool = False  # some stream may have more to give
    first: dict[str, int] = field(default_factory=dict)  # milliseconds of each stream's oldest entry
    left: dict[str, int] = field(default_factory=dict)  # of streams that may have more: nothing left is older


@dataclass(slots=True)
class Look:
    """Everything that is new at one instant. now: Redis TIME in microseconds, the clock that the ids were made by."""

    events: Read
    hits: Read
    now: int

    @property
    def is_empty(self) -> bool:
        return not self.events.last and not self.hits.last

    @property
    def is_full(self) -> bool:
        return self.events.full or self.hits.full

    @property
    def oldest(self) -> int | None:
        """Milliseconds of the oldest entry; None: there is none."""
        return min((at for read in (self.events, self.hits) for at in read.first.values()), default=None)

    @property
    def left(self) -> int | None:
        """The oldest that an entry not read can be; None: all were read."""
        return min((at for read in (self.events, self.hits) for at in read.left.values()), default=None)


class Lag:
    """How old the oldest event is that is not in the ledger: of the last look, and growing while that look's events are
    not committed (metric `ledger_lag_seconds`). Costs no command: the ids that were read hold the time."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._ahead = 0  # Redis's clock before ours, microseconds
        self._seen = 0.0
        self._oldest: int | None = None

    def looked(self, look: Look) -> None:
        self._ahead = look.now - self._clock()
        self._oldest = look.oldest
        self._seen = self._age()

    def committed(self, look: Look) -> None:
        """Everything that was read is in the ledger."""
        self._oldest = look.left

    def seconds(self) -> float:
        return max(self._seen, self._age())

    def _age(self) -> float:
        if self._oldest is None:
            return 0.0
        return max(0.0, (self._clock() + self._ahead) / 1e6 - self._oldest / 1e3)


async def look(redis: Client, after: Mapping[str, str], count: int = ENTRIES) -> Look:
    """What lies behind these cursors, in one round trip. count: entries a partition; of hits four times as many."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.execute_command(*_xread(after, EVENT_STREAMS, count))
        pipe.execute_command(*_xread(after, (keyspace.HITS,), 4 * count))
        pipe.time()
        events, hits, (seconds, micros) = await pipe.execute()
    now = int(seconds) * 1_000_000 + int(micros)
    return Look(_decoded(events, count, decode_batch), _decoded(hits, 4 * count, decode_hits), now)


async def read_events(redis: Client, after: Mapping[str, str], count: int = ENTRIES) -> Read:
    """Batches after the cursors of all partitions."""
    return _decoded(await call(redis, *_xread(after, EVENT_STREAMS, count)), count, decode_batch)


def _xread(after: Mapping[str, str], streams: Sequence[str], count: int) -> tuple[str, ...]:
    return "XREAD", "COUNT", str(count), "STREAMS", *streams, *(after.get(stream, "0-0") for stream in streams)


def _decoded(raw: Any, count: int, decode: Callable[[bytes], Any]) -> Read:
    read = Read()
    streams = raw.items() if isinstance(raw, dict) else raw or ()
    for name, entries in streams:
        stream = name.decode("ascii")
        if isinstance(raw, dict):
            entries = [entry for part in entries for entry in part]
        text = "0-0"
        for identity, fields in entries:
            text = identity.decode("ascii")
            # one field an entry; whatever its name, its value is the body
            values = list(fields.values()) if isinstance(fields, dict) else fields[1::2]
            try:
                read.items.append((stream, text, decode(values[0])))
            except (msgspec.DecodeError, IndexError):
                read.poison += 1
                log.error("undecodable entry passed", stream=stream, id=text)
        if entries:
            read.last[stream] = text
            read.first[stream] = _milliseconds(entries[0][0])
        if len(entries) >= count:
            read.full = True
            read.left[stream] = _milliseconds(entries[-1][0])
    return read


def _milliseconds(identity: bytes) -> int:
    return int(identity.partition(b"-")[0])


async def trim(redis: Client, committed: Mapping[str, str]) -> None:
    """Let go of everything up to and including the committed ids."""
    async with redis.pipeline(transaction=False) as pipe:
        for stream, last in committed.items():
            pipe.execute_command("XTRIM", stream, "MINID", cursors.after(last))
        await pipe.execute()


def portions(items: Sequence[tuple[str, str, Any]], most: int) -> Iterator[list[tuple[str, str, Any]]]:
    """Cut into transactions of about `most` events, whole entries each, so that answers never wait long."""
    part: list[tuple[str, str, Any]] = []
    size = 0
    for item in items:
        part.append(item)
        size += len(item[2].events) if isinstance(item[2], Batch) else len(item[2])
        if size >= most:
            yield part
            part, size = [], 0
    if part:
        yield part
