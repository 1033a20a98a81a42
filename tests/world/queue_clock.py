"""Redis TIME in a test's own hands: the scripts of the queue read a key instead, so that days pass as a test wants.

    with clock_of_our_own():            the fragment clock.lua is another one meanwhile
        await set_clock(redis, now_us)

Only the fragment is replaced: every script but those of sites (permit.lua, rate.lua) takes its `now` from it. The key
lies outside of the queue's hash tags, and one server is asked, so the scripts may read it although it is not declared.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from unittest import mock

from redis.asyncio import Redis

from engine.queue import scripts

KEY = "test:now"
_TIME = re.compile(r"local time = redis\.call\('TIME'\)\nlocal now = [^\n]+")


@contextlib.contextmanager
def clock_of_our_own() -> Iterator[None]:
    """For the scripts loaded meanwhile; those of before come back afterwards."""
    read = scripts._read

    def replaced(name: str) -> str:
        text = read(name)
        if name != "clock":
            return text
        ours, count = _TIME.subn(f"local now = tonumber(redis.call('GET', '{KEY}'))", text)
        assert count == 1, "clock.lua reads another way: this test would run on the real clock"
        return ours

    scripts.script.cache_clear()
    try:
        with mock.patch.object(scripts, "_read", replaced):
            yield
    finally:
        scripts.script.cache_clear()


async def set_clock(redis: Redis, now_us: int) -> None:
    await redis.set(KEY, str(now_us))
