"""The sweeper: what `policy.retention` plans is carried out by the writer, in small bites, all day long (P-10).

    1. `look`     on a connection for reading: which days each place holds, whose class is over
    2. days       sweep by sweep, `policy.bites`: one transaction a bite, so that opt-outs never wait for more; over
                  PostgreSQL a large table's day is tallied by a reader and dropped as a whole
    3. people     `policy.silence`: evidence, subjects and domains that nobody refers to any more, some a round
    4. Redis      streams of refused and dead entries are trimmed by age
    5. the disk   write-ahead log truncated, free pages given back where the database can (`tidy`)

Law: every step may be repeated and ended anywhere; what one round did not do, the next one does. A sweep that fails
(a held person's key does not open, readers do not let go of a partition) is counted and logged, the others go on.

auto_vacuum: an existing database has none, and to switch it on needs VACUUM, which writes the whole file anew while
nobody else can write; a new one would pay 5 to 14 % of every insert (328,000 rows, 8.5 against 9.1 to 9.6 us). So we do
neither: freed pages are zeroed (secure_delete) and taken by the next day's rows, so the file stops growing once the
longest class is full. Where an operator made it incremental, pages are given back, 16 MiB a round.

Measured with 300,000 rows of `message`: 29,000 rows swept a second, 17 us of CPU each, digest and audit line included.

Known limits: a reader that holds an old snapshot keeps the write-ahead log from being truncated (nobody waits for it:
`tidy` tells False, the next round tries again); until then the log holds what was destroyed. Days of `job` are found by
reading its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Engine, delete, func, insert, select
from sqlalchemy.exc import OperationalError

from policy import accounts, audit, bites, keyspace, partitions, schema, silence
from policy.classes import RETENTION, Period, RetentionSettings, today_of
from policy.instants import DAY_US, SECOND_US
from policy.jobs import Refused
from policy.keys import SealError
from policy.personal import Premises
from policy.retention import PLACES, TRIMMED, Place, Sweep, limits, place_of, plan
from policy.schema import hold, open_store, shortening, suppression
from policy.silence import Page
from policy.vault import VaultError

log = structlog.get_logger()

_HOUR: Final = 3600.0
_MINUTE: Final = 60.0
_TALLIES: Final = 3
_PEOPLE_A_ROUND: Final = 20_000
_PAGES: Final = 4_096  # given back at once, 16 MiB
_BUSY_MS: Final = 200  # a checkpoint waits so long for readers: while it does, nobody can write
_STREAMS: Final = {"rejected": keyspace.REJECTED, "dead": keyspace.DEAD}
_WALKED: Final = ("consent", "subject")  # people, not days: policy.silence
_YEAR_US: Final = 365 * DAY_US


@dataclass(frozen=True, slots=True)
class Look:
    """What is over, the oldest day kept of each class, and what somebody has to look at again."""

    sweeps: list[Sweep]
    oldest: dict[str, int]
    shortenings: dict[tuple[int, str], int]
    holds_due: int = 0
    suppressions_old: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """One sweep of a round."""

    retention: str
    place: str
    day: int
    account: int
    rows: int


@dataclass(slots=True)
class _Walk:
    """How far the people are walked; day: of the last walk that came to its end."""

    after: int = 0
    day: int = -1


def look(conn: Connection, periods: Mapping[str, Period], now: int) -> Look:
    """Read-only."""
    kept = {(row.account, row.retention): int(row.days) for row in conn.execute(select(shortening))}
    newest: dict[str, int] = {}
    for (name, _), day in limits(now, periods, kept).items():
        newest[name] = max(newest.get(name, day), day)
    dated = [place for place in PLACES if place.dated and place.name not in _WALKED]
    oldest: dict[str, int] = {}
    for place in dated:
        if (first := _oldest(conn, place)) is not None:
            oldest[place.retention] = min(oldest.get(place.retention, first), first)
    holdings = {place.name: _days(conn, place, newest[place.name]) for place in dated}
    due = select(func.count()).select_from(hold).where(hold.c.released.is_(None), hold.c.review <= now)
    old = select(func.count()).select_from(suppression).where(suppression.c.created < now - _YEAR_US)
    return Look(
        plan(now, periods, kept, holdings), oldest, kept, conn.execute(due).scalar_one(), conn.execute(old).scalar_one()
    )


def _oldest(conn: Connection, place: Place) -> int | None:
    """Asked every hour of everything: what would need a look at each job is told by its neighbours of the class."""
    if place.name in ("job.keys", "link", "job_view"):
        return None
    column = schema.metadata.tables[place.table].c[place.dated]
    more = [] if place.name == "job" else bites.over(place)
    first: int | None = conn.execute(select(func.min(column)).where(*more)).scalar()
    return first if first is None or place.dated == "day" else first // DAY_US


def _days(conn: Connection, place: Place, newest: int) -> list[int]:
    """Days up to the newest that have rows which are over."""
    column, more = schema.metadata.tables[place.table].c[place.dated], bites.over(place)
    if partitions.is_partitioned(conn, place.table):
        return [day for day in partitions.days(conn, place.table) if day <= newest]
    if place.dated == "day":  # one step along the index a day
        found: list[int] = []
        day = conn.execute(select(func.min(column)).where(*more)).scalar()
        while day is not None and day <= newest:
            found.append(int(day))
            day = conn.execute(select(func.min(column)).where(column > day, *more)).scalar()
        return found
    days = (column // DAY_US).label("day")
    wanted = select(days).where(column < (newest + 1) * DAY_US, *more).distinct()
    return sorted(int(row.day) for row in conn.execute(wanted))


def tidy(engine: Engine) -> bool:
    """SQLite: empty the write-ahead log into the database, give back free pages; False: a reader was in the way.
    Outside of any transaction, on the writer's own connection: whoever writes waits for it."""
    if engine.dialect.name != "sqlite":
        return True
    emptied = True
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        [(patience,)] = cursor.execute("PRAGMA busy_timeout").fetchall()
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}").fetchall()
        try:
            [(mode,)] = cursor.execute("PRAGMA auto_vacuum").fetchall()
            if mode == 2:
                # a page a step, and `execute` takes one step of what has no columns; a script goes on to its end
                cursor.executescript(f"PRAGMA incremental_vacuum({_PAGES})")
            [(busy, _, _)] = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            emptied = not busy
        finally:
            cursor.execute(f"PRAGMA busy_timeout={patience}").fetchall()
            cursor.close()
    finally:
        connection.close()
    return emptied


class Sweeping:
    """One a writer. forget_domains: told names of domains whose rows go (policy.drains.EventBook remembers numbers);
    without it domains stay."""

    def __init__(
        self,
        premises: Premises,
        retention: RetentionSettings,
        *,
        forget_domains: silence.Forget | None = None,
        rows: int = bites.ROWS,
    ) -> None:
        self._premises = premises
        self._periods = retention.periods()
        self._forget = forget_domains
        self._rows = rows
        self._one_at_a_time = asyncio.Lock()
        self._last: Look | None = None
        self._consents = _Walk()
        self._subjects = _Walk()
        self._untidy = False
        self._refused = False  # readers did not let go of what was to be dropped
        self.sweeps = 0
        self.rows = 0
        self.failures = 0

    def __repr__(self) -> str:
        return f"<Sweeping sweeps={self.sweeps} rows={self.rows}>"

    async def round(self) -> float:
        """Seconds until the next: an hour, or what is left of the day (UTC), or less while there is more to do."""
        await self.sweep()
        now = self._premises.clock()
        if self._untidy or self._refused or self._is_walking(now):
            return _MINUTE
        return min(_HOUR, (DAY_US - now % DAY_US) / SECOND_US + 1.0)

    def _is_walking(self, now: int) -> bool:
        return any(walk.day != today_of(now) for walk in (self._consents, self._subjects))

    async def sweep(self) -> list[Done]:
        """Everything that is over now. Raises RedisError, the store's error."""
        async with self._one_at_a_time:
            now = self._premises.clock()
            self._refused = False
            done: list[Done] = []
            for _ in PLACES:  # what goes may be what something else waited for: a job's key for its last row
                found: Look = await self._read(lambda conn: look(conn, self._periods, now))
                self._last = found
                gone = [told for one in found.sweeps if (told := await self._day(one)).rows]
                done += gone
                if not gone:
                    break
            keys, kept, less = self._premises.keyring(), self._periods, found.shortenings
            done += await self._walk(
                self._consents,
                now,
                lambda conn, after: silence.consents(conn, keys, kept, less, after, now),
                lambda conn, one, some: silence.drop_consents(conn, keys, one, some, now),
            )
            done += await self._walk(
                self._subjects,
                now,
                lambda conn, after: silence.subjects(conn, keys, kept, after, now),
                lambda conn, one, some: silence.drop_subjects(conn, one, kept, some, now),
            )
            done += await self._domains(now)
            for name, days in TRIMMED.items():
                oldest = max(now - days * DAY_US, 0) // 1000
                await self._premises.redis.xtrim(_STREAMS[name], minid=oldest, approximate=False)
            self.sweeps += len(done)
            self.rows += sum(one.rows for one in done)
            if done or self._untidy:
                self._untidy = not await asyncio.to_thread(tidy, self._premises.store.engine)
            if done:
                log.info("swept", sweeps=len(done), rows=sum(one.rows for one in done))
            return done

    async def _read(self, ask: Callable[[Connection], Any]) -> Any:
        def work() -> Any:
            engine = open_store(self._premises.settings.sql_address(), writer=False)
            try:
                with engine.connect() as conn:
                    return ask(conn)
            finally:
                engine.dispose()

        return await asyncio.to_thread(work)

    async def _day(self, one: Sweep) -> Done:
        told = Done(one.retention, one.place, one.day, one.account, 0)
        keyring, now = self._premises.keyring(), self._premises.clock()
        work = functools.partial(bites.bite, keyring=keyring, one=one, now=now, rows=self._rows)
        with self._counted_failure(told):
            if rows := await self._whole(one):
                return replace(told, rows=rows)
            while True:
                bite: bites.Bite = await self._premises.store.write(work)
                told = replace(told, rows=told.rows + bite.rows)
                if bite.is_last:
                    break
        return told

    async def _whole(self, one: Sweep) -> int:
        """Rows of a day that was dropped as a whole; 0: it is not to be, or somebody writes to it all the time."""
        keyring, now = self._premises.keyring(), self._premises.clock()
        for _ in range(_TALLIES):
            known = await self._read(lambda conn: bites.tally(conn, keyring, one, now))
            if known is None:
                break
            work = functools.partial(bites.drop, keyring=keyring, one=one, now=now, known=known)
            dropped: bites.Bite | None = await self._premises.store.write(work)
            if dropped is not None:
                return dropped.rows
        return 0

    @contextlib.contextmanager
    def _counted_failure(self, told: Done) -> Iterator[None]:
        try:
            yield
        except (VaultError, SealError, OperationalError) as error:
            self.failures += 1
            self._refused |= isinstance(error, OperationalError)
            log.error("a sweep failed, it comes again", place=told.place, day=told.day, error=type(error).__name__)

    async def _walk(
        self,
        walk: _Walk,
        now: int,
        ask: Callable[[Connection, int], Page],
        drop: Callable[[Connection, Sweep, Sequence[int]], int],
    ) -> list[Done]:
        """Once a day through everybody, so many a round."""
        if walk.day == today_of(now):
            return []
        done: list[Done] = []
        looked = 0
        while looked < _PEOPLE_A_ROUND:
            after = walk.after
            page: Page = await self._read(lambda conn, after=after: ask(conn, after))  # type: ignore[misc]
            looked += page.looked
            for one, numbers in page.found.items():
                told = Done(one.retention, one.place, one.day, one.account, 0)
                with self._counted_failure(told):
                    work = functools.partial(_dropped, drop=drop, one=one, some=numbers)
                    told = replace(told, rows=await self._premises.store.write(work))
                done += [told] if told.rows else []
            walk.after = page.after or 0
            if page.after is None:
                walk.day = today_of(now)
                break
        return done

    async def _domains(self, now: int) -> list[Done]:
        forget, one = self._forget, Sweep("domain", today_of(now), 0, "R3")
        if forget is None:
            return []
        numbers = await self._read(silence.domains)
        rows = await self._premises.store.write(lambda conn: silence.drop_domains(conn, one, numbers, forget, now))
        return [Done(one.retention, one.place, one.day, 0, rows)] if rows else []

    def statistics(self) -> dict[str, float | dict[str, float]]:
        """Numbers for /metrics. oldest_record_age: seconds, by class, as of the last look."""
        told: dict[str, float | dict[str, float]] = {
            "sweeps": float(self.sweeps),
            "swept_rows": float(self.rows),
            "sweep_failures": float(self.failures),
        }
        if (last := self._last) is not None:
            now = self._premises.clock()
            told["oldest_record_age"] = {
                name: max(now - day * DAY_US, 0) / SECOND_US for name, day in sorted(last.oldest.items())
            }
            told["holds_due"] = float(last.holds_due)
            told["suppressions_for_review"] = float(last.suppressions_old)
        return told

    # --- operations ---------------------------------------------------------------------------------------------

    async def op_sweep(self, dry_run: bool = False) -> list[dict[str, Any]]:
        """What was swept, or (dry_run) what would be by day; rows are then those there are now."""
        if not dry_run:
            return [asdict(one) for one in await self.sweep()]
        now = self._premises.clock()
        found: list[Done] = await self._read(lambda conn: _counted(conn, look(conn, self._periods, now).sweeps))
        return [asdict(one) for one in found if one.rows]

    async def op_shorten(self, account: str, retention: str, days: int) -> int:
        """An account keeps a class for so many days only, from now on. Lengthening is refused (P-10), its own too."""
        now = self._premises.clock()
        return await self._premises.store.write(
            lambda conn: shorten(conn, self._periods, account, retention, days, now)
        )


def shorten(conn: Connection, periods: Mapping[str, Period], account: str, retention: str, days: int, now: int) -> int:
    """The days it keeps from now on. Raises Refused."""
    known = RETENTION.get(retention)
    if known is None or not known.shortens:
        able = ", ".join(name for name, one in RETENTION.items() if one.shortens)
        raise Refused("refused", f"an account may shorten {able}; the others are the law's or the platform's")
    holder = accounts.get(conn, account)
    if holder is None:
        raise Refused("not-found", "no such account")
    mine = shortening.c.account == holder.number, shortening.c.retention == retention
    own = conn.execute(select(shortening.c.days).where(*mine)).scalar()
    most = periods[retention].shortest if own is None else int(own)
    if not 0 <= days <= most:
        raise Refused("refused", f"{retention} is kept for {most} days there: it may be shortened, never lengthened")
    conn.execute(delete(shortening).where(*mine))
    conn.execute(insert(shortening).values(account=holder.number, retention=retention, days=days, since=now))
    audit.append(
        conn, now, "operator", "retention-shortened", f"account/{holder.number}", f"{retention} {days} days", "done"
    )
    return days


def _dropped(
    conn: Connection, drop: Callable[[Connection, Sweep, Sequence[int]], int], one: Sweep, some: Sequence[int]
) -> int:
    return drop(conn, one, some)


def _counted(conn: Connection, sweeps: Sequence[Sweep]) -> list[Done]:
    told = []
    for one in sweeps:
        place = place_of(one.place)
        mine = [bites.of_day(place, one.day), *bites.over(place), *bites.of_account(place, one.account)]
        count = select(func.count()).select_from(schema.metadata.tables[place.table]).where(*mine)
        told.append(Done(one.retention, one.place, one.day, one.account, conn.execute(count).scalar_one()))
    return told
