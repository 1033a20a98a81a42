"""The questions expansion asks of SQL, by name. Read only; sync, over the reader's engine (decision 15).

Known limits: an answer is of the moment it was given; what must hold when mail leaves is asked at the gate.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from sqlalchemy import Connection, func, select

from policy import statements
from policy.drains import places_of
from policy.ledger import terminal_of
from policy.schema import account, history, job, job_chunk

_MANY = 500  # values an IN list
_SIZES = (1, 10, 100, _MANY)
_STANDING = (job.c.number, job.c.state, job.c.rows_submitted, job.c.chunks_expected, job.c.done_at)


@dataclass(frozen=True, slots=True)
class JobStanding:
    """Where a job stands. rows_submitted: None until every chunk is in the lanes; done_at: its last row has ended."""

    number: int
    state: str
    rows_submitted: int | None
    chunks_expected: int
    done_at: int | None

    @property
    def is_filled(self) -> bool:
        """Nothing of it need be expanded any more. A cancelled job knows its rows at once, and those of them that were
        registered and not expanded still need somebody who writes their end."""
        return self.rows_submitted is not None and (self.state != "cancelled" or self.done_at is not None)


def find_job(conn: Connection, account_name: str, job_id: str) -> JobStanding | None:
    """The job of that name; account_name "" takes the latest job of any account that is called so."""
    asked = select(*_STANDING).where(job.c.job_id == job_id)
    if account_name:
        asked = asked.join(account, account.c.number == job.c.account).where(account.c.name == account_name)
    row = conn.execute(asked.order_by(job.c.number.desc()).limit(1)).one_or_none()
    return None if row is None else JobStanding(*row)


def job_standing(conn: Connection, number: int) -> JobStanding | None:
    row = conn.execute(select(*_STANDING).where(job.c.number == number)).one_or_none()
    return None if row is None else JobStanding(*row)


def chunks_known(conn: Connection, number: int) -> tuple[int, int]:
    """(entries, rows in them) of the audience that were begun."""
    row = conn.execute(
        select(func.count(), func.coalesce(func.sum(job_chunk.c.rows), 0)).where(job_chunk.c.job == number)
    ).one()
    return int(row[0]), int(row[1])


def held_jobs(conn: Connection, until_us: int) -> list[int]:
    """Jobs whose start is no later than `until_us` and whose chunks are not all in the lanes; and scheduled jobs that
    were cancelled, whatever their start: their rows end now."""
    waiting = (
        job.c.state.in_(("accepted", "expanding", "paused"))
        & job.c.rows_submitted.is_(None)
        & (job.c.send_at <= until_us)
    )
    cancelled = (job.c.state == "cancelled") & job.c.done_at.is_(None)
    asked = select(job.c.number).where(job.c.send_at.is_not(None), waiting | cancelled)
    return [int(number) for number in conn.scalars(asked)]


def accounted(conn: Connection, number: int, chunk: int, mrefs: Sequence[int]) -> tuple[set[int], Counter[int]]:
    """What the ledger has of rows that are expanded anew, because Redis came back older (T12): references that
    reached a terminal state, and how many further rows of this chunk ended as repetitions of each."""
    known = terminal_of(conn, number, mrefs)
    repeated: Counter[int] = Counter()
    lowest, highest = places_of(chunk)
    for start in range(0, len(mrefs), _MANY):
        asked = (
            select(history.c.mref, func.count())
            .where(
                history.c.job == number,
                history.c.mref.in_(list(mrefs[start : start + _MANY])),
                history.c.attempt.between(lowest, highest),
            )
            .group_by(history.c.mref)
        )
        for mref, n in conn.execute(asked):
            repeated[mref] += int(n)
    return known, repeated


def consents(
    conn: Connection, account_number: int, tags: Iterable[bytes], now_us: int
) -> dict[tuple[bytes, str], tuple[int, int]]:
    """(given, withdrawn), the latest of each in microseconds or 0, by (suppression tag, purpose)."""
    found: dict[tuple[bytes, str], tuple[int, int]] = {}
    iterator, dialect = iter(tags), conn.dialect.name
    while some := list(itertools.islice(iterator, _MANY)):
        count = next(size for size in _SIZES if size >= len(some))
        asked = (account_number, *some, *some[-1:] * (count - len(some)), now_us)
        for tag, purpose, withdrawn, latest in conn.exec_driver_sql(_consents(dialect, count), asked):
            given, taken = found.get((tag, purpose), (0, 0))
            found[tag, purpose] = (given, int(latest)) if withdrawn else (int(latest), taken)
    return found


@cache
def _consents(dialect: str, count: int) -> str:
    """Of a fixed number of tags, so that the driver keeps the statement; and told to the driver itself, because
    SQLAlchemy takes a microsecond for each of a thousand parameters."""
    return (
        "SELECT subject.tag, consent.purpose, consent.withdrawn, max(consent.given_at)"
        " FROM consent JOIN subject ON subject.number = consent.subject"
        f" WHERE subject.account = {statements.mark(dialect)}"
        f" AND subject.tag IN ({statements.marks(dialect, count)})"
        f" AND (consent.expires_at IS NULL OR consent.expires_at > {statements.mark(dialect)})"
        " GROUP BY subject.tag, consent.purpose, consent.withdrawn"
    )
