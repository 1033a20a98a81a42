"""Presence: this worker in the registry of hosts, and what the registry asks of it (`policy.hosts`).

Path: `run` says every few seconds that we live, in which state and with how much in our hands, and hears in the same
round trip whether our host is asked to rest · `succeed`, once our journal folder is ours alone: whoever called himself
by our place before is dead, and his entry goes · `leave` at the orderly end.

Law: Redis being away costs the entry its age, never the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from policy import hosts, keyspace

SAY_SECONDS = 2.0  # an operator who asks a host to rest sees it begin within that


class Presence:
    """One per worker. look: (a word of `hosts.STATES`, slices and recipients in hand), set by whoever knows better."""

    def __init__(self, redis: Redis, holder: str, home: str) -> None:
        self.is_asked_to_rest = False
        self.look: Callable[[], tuple[str, int, int]] = lambda: ("starting", 0, 0)
        self.on_rest: Callable[[bool], None] = lambda wanted: None
        self._redis = redis
        self._worker = hosts.Worker(
            holder=holder,
            pid=os.getpid(),
            version=hosts.program_version(),
            schema=keyspace.SCHEMA_VERSION,
            state="starting",
            home=home,
        )

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(RedisError, OSError):
                await self.say()
            await asyncio.sleep(SAY_SECONDS)

    async def say(self) -> None:
        """Once. Raises RedisError."""
        state, slices, recipients = self.look()
        entry = msgspec.structs.replace(self._worker, state=state, slices=slices, recipients=recipients)
        wanted = await hosts.say(self._redis, entry)
        if wanted != self.is_asked_to_rest:
            self.is_asked_to_rest = wanted
            self.on_rest(wanted)

    async def succeed(self, is_ours: Callable[[int], bool]) -> None:
        """Entries of this data folder at places we answer for are of the dead."""
        with contextlib.suppress(RedisError, OSError):
            await self._bury(is_ours)

    async def _bury(self, is_ours: Callable[[int], bool]) -> None:
        known = await hosts.read(self._redis)
        gone = [
            worker.holder
            for worker in known.of(self._worker.host)
            if worker.home == self._worker.home and is_ours(worker.index) and worker.holder != self._worker.holder
        ]
        await hosts.withdraw(self._redis, gone)

    async def leave(self) -> None:
        """An orderly end. What Redis does not hear now grows old there, until our successor or `host forget`."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await hosts.withdraw(self._redis, [self._worker.holder])


def home_of(data_dir: Path) -> str:
    """Twelve hexadecimal digits that tell this data folder from any other, on this host or another of the same name."""
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = b""
    place = os.stat(data_dir)
    named = machine + os.fsencode(data_dir.resolve()) + f":{place.st_dev}:{place.st_ino}".encode()
    return blake2b(named, digest_size=6, person=b"sp-home").hexdigest()
