"""In-memory twins of what the tracker talks to: the writer, read-only SQL, Redis streams; and a tracker over them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import aiohttp

from policy.events import Hit, decode_hits
from policy.gate import Mode
from policy.keyspace import HITS, NEGATIVE
from policy.wire import SuppressionRecord, WriterUnavailable
from tracker.app import Tracker
from tracker.links import Links
from tracker.settings import TrackerSettings
from tracker.tables import Sender

KEY = bytes(range(32))
LINKS = Links({1: KEY}, 1, "https://mail.example")
JOB, LIST, PARTITION, TAG = 7, 3, 5, b"twelve-bytes"
SUBJECT, MREF = 4_711, -99
TARGETS = tuple(f"https://shop.example/item/{n}?ref=mail" for n in range(6))
SENDER = Sender(
    account=11,
    name="Ada's <Garden>",
    list_name="Weekly seeds",
    postal_address="1 Bed Lane\nKew",
    website="https://garden.example/",
    privacy_url="javascript:alert(1)",
    opens=Mode.INDIVIDUAL,
    clicks=Mode.AGGREGATE,
)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Let the loop turn until it is so; no clock is waited for."""
    async with asyncio.timeout(seconds):
        while not condition():  # the condition belongs to rooms that know nothing of events
            await asyncio.sleep(0)


class MemoryWriter:
    """Remembers deeds; `fail` makes it refuse, `hang` makes it never answer."""

    def __init__(self) -> None:
        self.deeds: list[tuple[Any, ...]] = []
        self.fail = False
        self.hang = False

    async def _do(self, *deed: Any) -> None:
        if self.hang:
            await asyncio.Event().wait()
        if self.fail:
            raise WriterUnavailable("away")
        self.deeds.append(deed)

    async def opt_out(self, list: int, partition: int, tag: bytes, source: str) -> None:
        await self._do("opt_out", list, partition, tag, source)

    async def suppress(self, entries: list[SuppressionRecord]) -> int:
        await self._do("suppress", *entries)
        return len(entries)

    async def withdraw(self, account: int, tag: bytes, purpose: str) -> bool:
        await self._do("withdraw", account, tag, purpose)
        return True

    async def close(self) -> None:
        return


class MemorySource:
    """Read-only SQL; `down` makes every question fail. `asked` counts questions."""

    def __init__(self) -> None:
        self.down = False
        self.asked = 0
        self.negative: set[int] = set()
        self.tables: dict[int, tuple[str, ...]] = {JOB: TARGETS}
        self.senders: dict[int, Sender] = {LIST: SENDER}
        self.views: dict[int, str] = {JOB: "<h1>Seeds</h1><script>alert(1)</script>"}

    def _ask(self) -> None:
        self.asked += 1
        if self.down:
            raise OSError("no SQL")

    def links(self, job: int) -> tuple[str, ...] | None:
        self._ask()
        return self.tables.get(job)

    def view(self, job: int) -> str | None:
        self._ask()
        return self.views.get(job)

    def sender_of_job(self, job: int) -> Sender | None:
        self._ask()
        return SENDER if job == JOB else None

    def sender_of_list(self, list_number: int) -> Sender | None:
        self._ask()
        return self.senders.get(list_number)

    def withdrawn(self) -> set[int]:
        self._ask()
        return set(self.negative)


class MemoryRedis:
    """Two streams; `down` makes every command fail. Only what the tracker uses of redis.asyncio.Redis."""

    def __init__(self) -> None:
        self.down = False
        self.refused = 0
        self.streams: dict[str, list[tuple[bytes, dict[bytes, bytes]]]] = {HITS: [], NEGATIVE: []}
        self._news = asyncio.Event()

    def _ask(self) -> None:
        if self.down:
            self.refused += 1
            raise ConnectionError("no Redis")

    async def xadd(self, key: str, fields: dict[Any, Any], maxlen: int = 0, approximate: bool = True) -> bytes:
        self._ask()
        stream = self.streams[key]
        identity = b"%d-0" % (len(stream) + 1)
        plain = {
            (k if isinstance(k, bytes) else k.encode()): (v if isinstance(v, bytes) else str(v).encode())
            for k, v in fields.items()
        }
        stream.append((identity, plain))
        self._news.set()
        self._news = asyncio.Event()
        return identity

    async def xrevrange(self, key: str, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        self._ask()
        return self.streams[key][-count:]

    async def xread(self, streams: dict[str, bytes], count: int, block: int) -> list[Any]:
        ((key, last),) = streams.items()
        known = int(last.split(b"-")[0])
        news = self._news
        self._ask()
        if len(self.streams[key]) <= known:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(block / 1000):
                    await news.wait()
        self._ask()
        fresh = self.streams[key][known:]
        return [[key.encode(), fresh]] if fresh else []

    async def aclose(self) -> None:
        return

    def hits(self) -> list[Hit]:
        return [hit for _, fields in self.streams[HITS] for hit in decode_hits(fields[b"b"])]


class House:
    """A tracker on a random port over the twins, and a client that follows no redirects."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1_700_000_000_000_000
        self.writer = MemoryWriter()
        self.source = MemorySource()
        self.redis = MemoryRedis()
        self.settings = TrackerSettings(**{"port": 0, "flush_seconds": 0.01, **settings})
        self.tracker = Tracker(
            self.settings,
            links=LINKS,
            source=self.source,
            redis=cast(Any, self.redis),
            writer=self.writer,
            officer=("Grace Officer", "privacy@platform.example"),
            clock=lambda: self.now,
        )
        self.port = 0
        self.client: aiohttp.ClientSession

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, **options: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        options.setdefault("allow_redirects", False)
        async with self.client.request(method, self.base + path, **options) as response:
            return response, await response.read()

    async def written(self) -> list[Hit]:
        """Every hit taken so far, as it went to Redis."""
        await until(self.tracker.withdrawn.is_fresh)
        assert await self.tracker.recorder.flush()
        return self.redis.hits()


@contextlib.asynccontextmanager
async def open_house(**settings: Any) -> AsyncIterator[House]:
    house = House(**settings)
    house.port = await house.tracker.start()
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client:
        house.client = client
        try:
            await until(house.tracker.withdrawn.is_loaded)
            yield house
        finally:
            await house.tracker.stop()


@contextlib.contextmanager
def house_in_thread(**settings: Any) -> Iterator[House]:
    """The same for synchronous tests (Hypothesis, the browser): its loop runs in a thread of its own."""
    ready: threading.Event = threading.Event()
    found: list[House] = []
    ends: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def live() -> None:
        async with open_house(**settings) as house:
            end = asyncio.Event()
            found.append(house)
            ends.append((asyncio.get_running_loop(), end))
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="house")
    thread.start()
    try:
        if not ready.wait(20):
            raise RuntimeError("the tracker did not start")
        yield found[0]
    finally:
        for loop, end in ends:
            loop.call_soon_threadsafe(end.set)
        thread.join(20)


def path_of(url: str) -> str:
    return url.removeprefix(LINKS.public_url)


PIXEL = path_of(LINKS.pixel_url(JOB, MREF, SUBJECT, Mode.INDIVIDUAL))
CLICK = path_of(LINKS.click_base(JOB, MREF, SUBJECT, Mode.INDIVIDUAL))
LEAVE = path_of(LINKS.optout_url(LIST, PARTITION, TAG))
CHOOSE = path_of(LINKS.preferences_url(LIST, PARTITION, TAG))
VIEW = path_of(LINKS.view_url(JOB))
NOTICE = path_of(LINKS.notice_url(JOB))
