"""Claims: which entries of the intake stream are in our hands, and how they leave them.

Laws:
- an entry is acknowledged and deleted in one transaction, together with its copy in another stream where it has one;
- what waits here ("parked") stays ours without counting as a delivery; what a silent worker held is taken over;
- who has many parked entries takes no new ones: another worker may be able to do them.

    `take`      parked ones whose time has come, those of the dead (XAUTOCLAIM), new ones (XREADGROUP)
    `park`      later: twice as late each time, five seconds at most
    `inherit`   what dead workers of our place held is ours at once
    `finish`    done · `put_away`: done, with a copy elsewhere · `drop_claim`: left to be claimed again

Known limits: an entry held for longer than `claim_idle` is claimed by a second worker, who does the same again to no
effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from redis.exceptions import ResponseError

from engine.campaign.problems import Problem
from engine.campaign.validation import Reading
from engine.queue.scripts import Call, Scripts
from policy import keyspace
from policy.crashpoints import reach
from policy.valkey import Client

MOST_PARKED: Final = 256
LOOK_SECONDS: Final = 2.0
CLAIM_IDLE: Final = 60.0  # s; a worker that is known to be dead is not waited for (`inherit`)
BURY: Final = 10  # times claim_idle
_LONGEST_PAUSE: Final = 5.0
MOST_SMALL: Final = 64  # entries read at a time where they are small
SMALL: Final = 32 * 1024  # bytes of an entry on average: 64 of them are no more than two chunks of an audience


class Later(Exception):
    """Not now: the entry is parked and tried again."""


class Refused(Exception):
    """The entry ends in the rejected stream."""

    def __init__(self, *problems: Problem, reading: Reading | None = None) -> None:
        super().__init__("rejected")
        self.problems = list(problems)
        self.reading = reading or Reading()


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the intake stream. id as Redis writes it; deliveries: how often it was handed to a worker."""

    id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1

    @property
    def order(self) -> tuple[int, int]:
        return order_of(self.id)


def order_of(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


@dataclass(slots=True)
class Counts:
    """What one intake did since its start."""

    accepted: int = 0
    rejected: int = 0
    dead: int = 0
    entries: int = 0
    rows: int = 0
    refused: int = 0
    held: int = 0
    dropped: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """claim: entries read at a time; together: chunks under way at a time (the vault and Redis work meanwhile);
    deliveries: before an entry is dead; claim_idle: seconds after which a silent worker's entries are taken over;
    message_bytes: the largest message, encoded."""

    claim: int = 8
    together: int = 8
    deliveries: int = 5
    claim_idle: float = CLAIM_IDLE
    message_bytes: int = 10 * 1024 * 1024


@dataclass(slots=True)
class _Parked:
    at: float
    pause: float


@dataclass(slots=True)
class Claims:
    """One consumer of the group."""

    redis: Client
    consumer: str
    limits: Limits
    monotonic: Callable[[], float]
    parked: dict[str, _Parked] = field(default_factory=dict)
    _cursor: str = "0-0"
    _next_claim: float = 0.0
    _next_look: float = 0.0
    _dropped: set[str] = field(default_factory=set)
    _at_once: int = 0  # entries of the next read
    _leaving: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)
    _leave_task: asyncio.Task[None] | None = None
    _scripts: Scripts = field(init=False)

    def __post_init__(self) -> None:
        self._scripts = Scripts(self.redis)

    async def prepare(self) -> None:
        """The consumer group; there already is as good as made."""
        try:
            await self.redis.xgroup_create(keyspace.INTAKE, keyspace.INTAKE_GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def leave(self) -> None:
        """A clean goodbye, also on behalf of the dead. What is still ours is old at once, so that the next who looks
        takes it over; with nothing left the group forgets our name (and would forget what it was just given)."""
        try:
            pending = await self.redis.xpending_range(
                keyspace.INTAKE, keyspace.INTAKE_GROUP, min="-", max="+", count=10_000, consumername=self.consumer
            )
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return  # nobody has ever read here
        if pending:
            await self.redis.xclaim(
                keyspace.INTAKE, keyspace.INTAKE_GROUP, self.consumer, 0, [entry["message_id"] for entry in pending],
                idle=round(self.limits.claim_idle * 1000), justid=True,
            )  # fmt: skip
        else:
            await self.redis.xgroup_delconsumer(keyspace.INTAKE, keyspace.INTAKE_GROUP, self.consumer)

    async def take(self, block: float) -> list[Entry]:
        """At most `limits.claim` entries, where those of the last read were small up to `MOST_SMALL`: what a step waits
        for, commits and synced writes, is shared by all in it. block: seconds to wait for new ones when there are no
        others."""
        entries = await self.strays() or await self.due()
        entries += await self.of_the_silent(self.limits.claim - len(entries))
        room = max(self._at_once, self.limits.claim) - len(entries)
        if room > 0 and len(self.parked) < MOST_PARKED:
            entries += await self.new(room, 0.0 if entries or self._cursor != "0-0" else self._patience(block))
        return entries

    async def strays(self) -> list[Entry]:
        """Entries that were given to us in a reply that was lost (the client repeats the call, and is given others).
        Between two steps nothing is in our hands but what is parked, so whatever else is pending under our name is one
        of them, unless it failed and is left to fall silent."""
        now = self.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + LOOK_SECONDS
        pending = await self.redis.xpending_range(
            keyspace.INTAKE, keyspace.INTAKE_GROUP, min="-", max="+", count=MOST_PARKED + self.limits.claim,
            consumername=self.consumer,
        )  # fmt: skip
        known = self.parked.keys() | self._dropped
        idle = self.limits.claim_idle * 1000  # as old as that: inherited, and `of_the_silent` counts a delivery for it
        ours = {
            str(_text(cast(bytes, one["message_id"]))): int(one["times_delivered"])
            for one in pending
            if int(one["time_since_delivered"]) < idle
        }
        self._dropped &= ours.keys()
        entries: list[Entry] = []
        for name in [name for name in ours if name not in known][: self.limits.claim]:
            found = await self.redis.xrange(keyspace.INTAKE, min=name, max=name)
            if found:
                entries.append(Entry(name, cast(dict[bytes, bytes], found[0][1]), ours[name]))
            else:  # deleted by somebody who did it, too
                await self.redis.xack(keyspace.INTAKE, keyspace.INTAKE_GROUP, name)
        return entries

    def _patience(self, block: float) -> float:
        if not self.parked:
            return block
        return max(0.0, min(block, min(parked.at for parked in self.parked.values()) - self.monotonic()))

    async def new(self, count: int, block: float) -> list[Entry]:
        told = await self.redis.xreadgroup(
            keyspace.INTAKE_GROUP, self.consumer, {keyspace.INTAKE: ">"}, count=count,
            block=max(1, round(block * 1000)) if block > 0 else None,
        )  # fmt: skip
        read = [Entry(_text(entry_id), fields) for _, entries in _streams(told) for entry_id, fields in entries]
        size = sum(len(value) for entry in read for value in entry.fields.values())
        if len(read) == count:
            self._at_once = min(2 * count, MOST_SMALL) if size <= SMALL * count else 0
        return read

    async def of_the_silent(self, room: int) -> list[Entry]:
        """Entries of workers that fell silent. The cursor is followed to its end before the next pass begins."""
        now = self.monotonic()
        if room <= 0 or now < self._next_claim:
            return []
        await self.keep_parked()
        idle = round(self.limits.claim_idle * 1000)
        args = (keyspace.INTAKE_GROUP, self.consumer, idle, self._cursor, room)
        cursor, entries = await self._ask("claim", args)
        self._cursor = _text(cursor)
        if self._cursor == "0-0":
            self._next_claim = now + self.limits.claim_idle / 4
            await self.bury()
        claimed: list[Entry] = []
        for entry_id, flat in entries:
            name = _text(entry_id)
            self._dropped.discard(name)
            if name not in self.parked:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                claimed.append(Entry(name, fields, await self._deliveries(name)))
        return claimed

    async def bury(self) -> None:
        """Every life of a worker reads under a name of its own: those of the dead that hold nothing are forgotten."""
        idle = round(BURY * self.limits.claim_idle * 1000)
        await self._ask("bury", (keyspace.INTAKE_GROUP, idle))

    async def _ask(self, script: str, args: Sequence[bytes | str | int]) -> Any:
        [told] = await self._scripts.run([Call(script, keyspace.INTAKE, args)])
        if isinstance(told, Exception):
            raise told
        return told

    async def _deliveries(self, entry_id: str) -> int:
        pending = await self.redis.xpending_range(
            keyspace.INTAKE, keyspace.INTAKE_GROUP, min=entry_id, max=entry_id, count=1
        )
        return int(pending[0]["times_delivered"]) if pending else 1

    async def due(self) -> list[Entry]:
        now = self.monotonic()
        names = [name for name, parked in self.parked.items() if parked.at <= now][: self.limits.claim]
        entries: list[Entry] = []
        for name in names:
            found = await self.redis.xrange(keyspace.INTAKE, min=name, max=name)
            if found:
                entries.append(Entry(name, cast(dict[bytes, bytes], found[0][1])))
            else:
                del self.parked[name]
        return entries

    async def keep_parked(self) -> None:
        """What is parked here stays ours, without counting as a delivery (JUSTID)."""
        if self.parked:
            await self.redis.xclaim(
                keyspace.INTAKE, keyspace.INTAKE_GROUP, self.consumer, 0, list(self.parked), justid=True
            )

    def park(self, entry: Entry, pause: float) -> None:
        """Not now. pause: seconds until the first time it is tried again."""
        now = self.monotonic()
        parked = self.parked.get(entry.id)
        if parked is None:
            self.parked[entry.id] = _Parked(now + pause, pause)
        else:
            parked.pause = min(2 * parked.pause, _LONGEST_PAUSE)
            parked.at = now + parked.pause

    def drop_claim(self, entry: Entry) -> None:
        """Neither done nor waiting: it falls silent here and is delivered again, which counts."""
        self.parked.pop(entry.id, None)
        self._dropped.add(entry.id)

    async def finish(self, entry: Entry) -> None:
        """Done: out of the intake, in one transaction with whatever else is done by now."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaving.append((entry.id, future))
        if self._leave_task is None:
            self._leave_task = asyncio.create_task(self._leave_together(), name="acknowledge")
        await future
        self.parked.pop(entry.id, None)

    async def _leave_together(self) -> None:
        try:
            await asyncio.sleep(0)  # whoever else is done in this turn of the loop
            while self._leaving:
                some, self._leaving = self._leaving, []
                try:
                    await self._acknowledge([name for name, _ in some])
                except Exception as error:  # each of them hears of it, and is tried again
                    for _, future in some:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for _, future in some:
                    if not future.done():
                        future.set_result(None)
        finally:
            self._leave_task = None
            for _, future in self._leaving:
                future.cancel()
            self._leaving = []

    async def _acknowledge(self, names: Sequence[str], more: Callable[[Any], None] = lambda pipe: None) -> None:
        """Acknowledged and deleted in one transaction. more(pipe) adds commands before."""
        async with self.redis.pipeline(transaction=True) as pipe:
            more(pipe)
            pipe.xack(keyspace.INTAKE, keyspace.INTAKE_GROUP, *names)
            pipe.xdel(keyspace.INTAKE, *names)
            reach("before-acknowledge")
            await pipe.execute()
            reach("after-acknowledge")

    async def put_away(
        self, entry: Entry, stream: str, fields: dict[Any, Any], kept: int, tell: Callable[[Any], None]
    ) -> None:
        """Out of the intake and into another stream, which keeps about `kept` entries. tell(pipe) adds commands."""

        def copy(pipe: Any) -> None:
            tell(pipe)
            pipe.xadd(stream, fields, maxlen=kept, approximate=True)

        await self._acknowledge([entry.id], copy)
        self.parked.pop(entry.id, None)


async def inherit(redis: Client, heir: str, dead: Sequence[str], idle: float = CLAIM_IDLE) -> None:
    """What workers that are known to be dead held in the intake is the heir's at once: nobody waits `claim_idle` for
    it, and the group forgets their names. Raises RedisError."""
    arguments = [(keyspace.INTAKE_GROUP, name, heir, round(idle * 1000)) for name in dead]
    for answer in await Scripts(redis).run([Call("inherit", keyspace.INTAKE, words) for words in arguments]):
        if isinstance(answer, Exception) and "NOGROUP" not in str(answer):
            raise answer


def _streams(told: Any) -> Any:
    if isinstance(told, dict):  # RESP3
        return [(name, [pair for part in parts for pair in part]) for name, parts in told.items()]
    return told or []


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode("ascii")
