"""Tables: what the tracker knows without asking anybody, so that a hit needs no database (design decision 12).

Law: a click is answered from memory once its job's table was read, with Redis and SQL both down; a subject whose
withdrawal was announced is in `Withdrawn` within the freshness limit, and when no news came for that long, `is_fresh`
says so and hits wait instead of being stored.

    Shelf      job -> link table, job or list -> names for the pages: read once from read-only SQL (single flight),
               kept for a while, served stale when SQL fails
    Withdrawn  the negative list: read from SQL, then followed in Redis. The stream's last entry is noted *before* SQL
               is read: what was announced by then is committed, what comes later is followed.
    SqlSource  the questions to read-only SQL behind both, by name

Known limits: a negative list of a million numbers costs about 100 MB here, twice that while it is read anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from sqlalchemy import Engine, select

from policy import keyspace, negative, schema
from policy.gate import Mode, strictest

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")
Clock = Callable[[], float]

_UNKNOWN_SECONDS = 1.0  # how long "no such job" is believed: a valid token for one is a race or a deleted job
_BLOCK_MS = 250  # XREAD waits so long; a quarter of the freshness limit
_BLOCK_READING_MS = 10  # while SQL is being read: look often whether it is done
_RETRY_SECONDS = 0.5
_LIFTED = negative.LIFTED.encode()


@dataclass(frozen=True, slots=True)
class Sender:
    """Who wrote, for the pages. Plain public text of the account holder, never of the person written to."""

    account: int
    name: str
    list_name: str = ""
    postal_address: str = ""
    website: str = ""
    privacy_url: str = ""
    opens: Mode = Mode.OFF
    clicks: Mode = Mode.OFF


class Source(Protocol):
    """Questions to read-only SQL; each may block and may raise. None: there is no such thing (any more)."""

    def links(self, job: int) -> tuple[str, ...] | None: ...

    def sender_of_job(self, job: int) -> Sender | None: ...

    def sender_of_list(self, list_number: int) -> Sender | None: ...

    def view(self, job: int) -> str | None: ...

    def withdrawn(self) -> set[int]: ...


class Unavailable(Exception):
    """The store could not be asked, and nothing in memory answers: say 503, try again later."""


class Shelf(Generic[K, V]):
    """Values read by `read` in a thread, kept `seconds`, at most `capacity`, the least recently used goes first."""

    def __init__(
        self,
        read: Callable[[K], V | None],
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        *,
        capacity: int,
        seconds: float,
        clock: Clock,
    ) -> None:
        self._read = read
        self._in_thread = in_thread
        self._capacity = capacity
        self._seconds = seconds
        self._clock = clock
        self._kept: OrderedDict[K, tuple[float, V | None]] = OrderedDict()  # until when, value
        self._asked: dict[K, asyncio.Task[V | None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: K) -> V | None:
        """The value or None. Raises `Unavailable` when it was never read and cannot be read now."""
        kept = self._kept.get(key)
        if kept is not None and self._clock() < kept[0]:
            self._kept.move_to_end(key)
            return kept[1]
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.get_running_loop().create_task(self._fetch(key))
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        # shielded: one impatient visitor must not spoil the answer for the others waiting
        return await asyncio.shield(task)

    async def _fetch(self, key: K) -> V | None:
        try:
            value = await self._in_thread(lambda: self._read(key))
        except Exception as error:
            kept = self._kept.get(key)
            log.warning("read-only SQL does not answer: %s", type(error).__name__)
            if kept is not None:
                return kept[1]  # links in delivered mail must keep working
            raise Unavailable from error
        self._kept[key] = (self._clock() + (_UNKNOWN_SECONDS if value is None else self._seconds), value)
        self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return value  # type: ignore[no-any-return]  # in_thread hands through what read() returned


class Withdrawn:
    """Subject numbers that must leave nothing behind. `run` follows the news until cancelled; asking never blocks."""

    def __init__(
        self,
        load: Callable[[], set[int]],
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        redis: Redis,
        *,
        stale_seconds: float,
        reload_seconds: float,
        clock: Clock,
    ) -> None:
        self._load = load
        self._in_thread = in_thread
        self._redis = redis
        self._stale_seconds = stale_seconds
        self._reload_seconds = reload_seconds
        self._clock = clock
        self._numbers: set[int] = set()
        self._news: dict[int, bool] = {}  # heard while SQL is being read: on the list or lifted
        self._heard_at: float | None = None
        self._loaded_at: float | None = None

    def __contains__(self, subject: int) -> bool:
        return subject in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def is_loaded(self) -> bool:
        return self._loaded_at is not None

    def is_fresh(self) -> bool:
        """True while the list is known to be complete up to `stale_seconds` ago."""
        heard = self._heard_at
        return self._loaded_at is not None and heard is not None and self._clock() - heard <= self._stale_seconds

    async def run(self) -> None:
        """Follow for ever. Redis or SQL away: not fresh, tried again, and everything is read anew."""
        while True:
            try:
                await self._follow()
            except Exception as error:
                log.warning("the negative list is not being followed: %s", type(error).__name__)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _follow(self) -> None:
        """One unbroken stretch of following; reads SQL at its beginning and every `reload_seconds`."""
        newest = await self._redis.xrevrange(keyspace.NEGATIVE, count=1)
        last: Any = newest[0][0] if newest else b"0-0"
        self._news.clear()
        reading: asyncio.Future[set[int]] | None = asyncio.ensure_future(self._read())
        try:
            while True:
                patience = _BLOCK_MS if reading is None else _BLOCK_READING_MS
                answer = await self._redis.xread({keyspace.NEGATIVE: last}, count=10_000, block=patience)
                for _, entries in _streams(answer):
                    for identity, fields in entries:
                        last = identity
                        self._hear(int(fields[b"s"]), fields.get(b"r") != _LIFTED)
                self._heard_at = self._clock()
                if reading is not None and reading.done():
                    self._numbers, news = reading.result(), self._news
                    self._news = {}
                    for subject, is_on in news.items():
                        self._hear(subject, is_on)
                    self._loaded_at = self._clock()
                    reading = None
                elif (
                    reading is None
                    and self._loaded_at is not None
                    and self._clock() - self._loaded_at >= self._reload_seconds
                ):
                    self._news.clear()
                    reading = asyncio.ensure_future(self._read())
        finally:
            if reading is not None:
                reading.cancel()

    def _hear(self, subject: int, is_on: bool) -> None:
        if is_on:
            self._numbers.add(subject)
        else:
            self._numbers.discard(subject)
        self._news[subject] = is_on

    async def _read(self) -> set[int]:
        return set(await self._in_thread(self._load))


def _streams(answer: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """XREAD's answer in RESP2 (list of pairs) or RESP3 (dict) form, None when nothing came."""
    if not answer:
        return []
    return [(name, entries) for name, entries in (answer.items() if isinstance(answer, dict) else answer)]


class SqlSource:
    """The tracker's questions to read-only SQL, by name. Blocking: run in a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def links(self, job: int) -> tuple[str, ...] | None:
        """Targets by number as they were accepted, "" where one is missing; None when the job has none."""
        link = schema.link
        statement = select(link.c.number, link.c.url).where(link.c.job == job)
        with self._engine.connect() as connection:
            found = {row.number: row.url for row in connection.execute(statement)}
        return tuple(found.get(number, "") for number in range(max(found) + 1)) if found else None

    def view(self, job: int) -> str | None:
        statement = select(schema.job_view.c.html).where(schema.job_view.c.job == job)
        with self._engine.connect() as connection:
            html: str | None = connection.execute(statement).scalar()
            return html

    def sender_of_job(self, job: int) -> Sender | None:
        account, jobs, lists = schema.account, schema.job, schema.list_
        statement = (
            select(account, lists.c.display_name.label("list_name"), lists.c.name.label("list_slug"))
            .add_columns(jobs.c.opens_mode.label("job_opens"), jobs.c.clicks_mode.label("job_clicks"))
            .select_from(jobs.join(account, account.c.number == jobs.c.account))
            .outerjoin(lists, lists.c.number == jobs.c.list)
            .where(jobs.c.number == job)
        )
        with self._engine.connect() as connection:
            row = connection.execute(statement).first()
        if row is None:
            return None
        opens = strictest(Mode(row.opens_mode), Mode(row.job_opens))
        clicks = strictest(Mode(row.clicks_mode), Mode(row.job_clicks))
        return _sender(row, opens, clicks)

    def sender_of_list(self, list_number: int) -> Sender | None:
        account, lists = schema.account, schema.list_
        statement = (
            select(account, lists.c.display_name.label("list_name"), lists.c.name.label("list_slug"))
            .select_from(lists.join(account, account.c.number == lists.c.account))
            .where(lists.c.number == list_number)
        )
        with self._engine.connect() as connection:
            row = connection.execute(statement).first()
        return None if row is None else _sender(row, Mode.OFF, Mode.OFF)

    def withdrawn(self) -> set[int]:
        with self._engine.connect() as connection:
            return negative.load(connection)[0]


def _sender(row: Any, opens: Mode, clicks: Mode) -> Sender:
    return Sender(
        account=row.number,
        name=row.display_name or row.name,
        list_name=row.list_name or row.list_slug or "",
        postal_address=row.postal_address,
        website=row.website,
        privacy_url=row.privacy_url,
        opens=opens,
        clicks=clicks,
    )
