"""A site's share of connections and messages per second, and its back-off, over all workers (promises.md 2).

Laws: live permits never exceed the cap asked for; in every window of s seconds at most rate * s + burst tokens are
granted; a worker that dies leaks its permits until they expire (under-use, never over-use). Redis TIME is the clock.

A worker takes tokens in blocks and spends them locally, and renews its permits at a third of their life. A connection
whose permit is gone at renewal is closed after the message it is in.

Whatever is asked while a question is on its way goes together in the next: ten thousand slices for ten thousand sites
open as many connections, and each asks twice. One question is on its way at a time, so what is asked later is done
later; in one round the plain commands go first (a permit that is given back can be taken in the same round), and what
nobody waits for any more is not sent.

Everything of a site lives under the site's own hash tag; a back-off is one number, however many domains hang on it.

Known limits: the cap and rate are the caller's at the moment of asking (its pace); two workers with different ideas of
a cap hold the lower one as soon as the higher asks no more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from engine.queue.scripts import Call, QueueError, Scripts
from policy import keyspace

AT_ONCE = 256  # questions a round trip: about 10 us of the server each
PERMIT_SECONDS = 30.0  # life of a permit without renewal: how long a killed worker's connections stay counted


@dataclass(frozen=True, slots=True)
class Tokens:
    """granted: how many messages may start now; wait: seconds until the next token, 0 when there is one."""

    granted: int
    wait: float


class Permits:
    """Names of permits are the caller's: unique over all workers (holder and a counter), without personal data."""

    def __init__(self, redis: Redis, *, life: float = PERMIT_SECONDS) -> None:
        if not life > 0:
            raise QueueError("a permit lives longer than nothing")
        self._scripts = Scripts(redis)
        self._life = round(life * 1_000_000)
        self._waiting: list[tuple[Call | list[tuple[str, ...]], asyncio.Future[Any]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def take(self, site: str, names: Sequence[str], cap: int) -> int:
        """How many of these connections may be open, from the front of names. A name that holds one keeps it."""
        return int(await self._ask("permit", keyspace.site_permits(site), (cap, self._life, "take", *names)))

    async def renew(self, site: str, names: Sequence[str]) -> list[bool]:
        """False for every name whose permit had expired: somebody else may have it."""
        told = await self._ask("permit", keyspace.site_permits(site), (0, self._life, "renew", *names))
        return [flag == 1 for flag in told]

    async def give_back(self, site: str, names: Sequence[str]) -> None:
        """The connections are closed."""
        if names:
            await self._queued([("ZREM", keyspace.site_permits(site), *names)])

    async def tokens(self, site: str, wanted: int, per_second: float, burst: int) -> Tokens:
        """Take up to `wanted` messages from the site's rate; burst: how many may go at once, at least 1."""
        if not (per_second > 0 and math.isfinite(per_second)) or burst < 1 or wanted < 1:
            raise QueueError("a rate is positive, burst and wanted at least 1")
        args = (wanted, format(1_000_000 / per_second, ".6f"), burst)
        granted, wait = await self._ask("rate", keyspace.site_rate(site), args)
        return Tokens(int(granted), wait / 1_000_000)

    async def back_off(self, site: str, seconds: float) -> None:
        """Nobody connects to the site for so long; a longer back-off in force stays."""
        key, life = keyspace.site_backoff(site), str(max(1, round(seconds * 1000)))
        # Two commands, no script: whichever worker comes second can only lengthen (PEXPIRE GT, Redis 7.0).
        await self._queued([("SET", key, "1", "PX", life, "NX"), ("PEXPIRE", key, life, "GT")])

    async def back_offs(self, sites: Sequence[str]) -> list[float]:
        """Seconds each site is still to be left alone, 0 for none."""
        told = await self._queued([("PTTL", keyspace.site_backoff(site)) for site in sites])
        return [max(0, int(left)) / 1000 for left in told]

    async def forgive(self, site: str) -> None:
        """End a back-off (operators, and the first success after one)."""
        await self._queued([("DEL", keyspace.site_backoff(site))])

    async def _ask(self, script: str, key: str, args: Sequence[bytes | str | int]) -> Any:
        return await self._queued(Call(script, key, args))

    async def _queued(self, question: Call | list[tuple[str, ...]]) -> Any:
        """The answer of a script, or those of plain commands. Raises what it raised."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all(), name="permits")
        return await answer

    async def _ask_all(self) -> None:
        try:
            await asyncio.sleep(0)  # whoever else is about to ask in this turn of the loop
            while self._waiting:
                some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                await self._ask_some([one for one in some if not one[1].done()])
        finally:
            self._asking = None
            for _, answer in self._waiting:
                answer.cancel()
            self._waiting = []

    async def _ask_some(self, some: Sequence[tuple[Call | list[tuple[str, ...]], asyncio.Future[Any]]]) -> None:
        commands = [(question, answer) for question, answer in some if isinstance(question, list)]
        calls = [(question, answer) for question, answer in some if isinstance(question, Call)]
        try:
            flat = await self._scripts.plain([command for question, _ in commands for command in question])
            place = 0
            for question, answer in commands:
                _tell(answer, flat[place : place + len(question)])
                place += len(question)
            calls = [each for each in calls if not each[1].done()]
            told = await self._scripts.run([question for question, _ in calls])
        except Exception as error:  # each of them hears of it, whatever it was
            for _, answer in some:
                _tell(answer, error)
            return
        except BaseException:  # cut short: nobody waits for ever
            for _, answer in some:
                answer.cancel()
            raise
        for (_, answer), one in zip(calls, told, strict=True):
            _tell(answer, one)


def _tell(answer: asyncio.Future[Any], told: Any) -> None:
    if answer.done():
        return
    if isinstance(told, Exception):
        answer.set_exception(told)
    else:
        answer.set_result(told)
