"""A site's share of connections and messages per second, and its back-off, over all workers (promises.md 2).

Laws: live permits never exceed the cap asked for; in every window of s seconds at most rate * s + burst tokens are
granted; a worker that dies leaks its permits until they expire (under-use, never over-use). Redis TIME is the clock.

A worker takes tokens in blocks and spends them locally, and renews its permits at a third of their life. A connection
whose permit is gone at renewal is closed after the message it is in.

Everything of a site lives under the site's own hash tag; a back-off is one number, however many domains hang on it.

Known limits: the cap and rate are the caller's at the moment of asking (its pace); two workers with different ideas of
a cap hold the lower one as soon as the higher asks no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from engine.queue.scripts import Call, QueueError, Scripts
from policy import keyspace

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
            await self._scripts.plain([("ZREM", keyspace.site_permits(site), *names)])

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
        await self._scripts.plain([("SET", key, "1", "PX", life, "NX"), ("PEXPIRE", key, life, "GT")])

    async def back_offs(self, sites: Sequence[str]) -> list[float]:
        """Seconds each site is still to be left alone, 0 for none."""
        told = await self._scripts.plain([("PTTL", keyspace.site_backoff(site)) for site in sites])
        return [max(0, int(left)) / 1000 for left in told]

    async def forgive(self, site: str) -> None:
        """End a back-off (operators, and the first success after one)."""
        await self._scripts.plain([("DEL", keyspace.site_backoff(site))])

    async def _ask(self, script: str, key: str, args: Sequence[bytes | str | int]) -> Any:
        told = (await self._scripts.run([Call(script, key, args)]))[0]
        if isinstance(told, Exception):
            raise told
        return told
