"""The consent ledger: who agreed to what, when, on whose word, and who took it back. Append-only (P-07).

Laws:
- evidence without a time or a source is none (decision 19), and so is evidence from the future: it would outrank a
  withdrawal that is still to come;
- evidence never outranks a later withdrawal, whenever it is entered: what counts is when the act took place, and at
  the same instant the withdrawal wins;
- a withdrawal is in force from its commit on; with it the person is on the negative list (`policy.negative`);
- consent that ended is none from that instant on, at expansion and, by `policy.lapsing`, when a hit arrives.

Purposes are a closed vocabulary, that of the registry (P-30, `policy.purposes`). Implied consent always ends (CASL
s.10(10)): by the calendar in UTC, 24 months after a purchase, 6 after an inquiry, and 6 where nobody says which
(`ends`). It is entered with that end however it comes; an end of its own that evidence names can only be earlier.
`expires_at` is exclusive.

Known limits: one act a subject, purpose and instant; a second source for the same instant is not kept, nor is another
end of the same act: the first telling counts.
"""

from __future__ import annotations

import itertools
from calendar import monthrange
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, select

from policy import negative, purposes, statements
from policy.instants import SECOND_US
from policy.schema import consent as table
from policy.wire import ConsentRow

PURPOSES = purposes.registry().consented
IMPLIED_MONTHS: Final = {"purchase": 24, "inquiry": 6}  # CASL s.10(10)
SHORTEST_IMPLIED: Final = "inquiry"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
BASES = frozenset({"express", "implied", "contract", "legitimate_interest"})
TRACKING = frozenset({"open_tracking", "click_tracking"})
FUTURE_ALLOWANCE_US = 300 * SECOND_US  # clocks of producers run ahead; five minutes is what mail and TOTP forgive too


@dataclass(frozen=True, slots=True)
class Evidence:
    """One act of agreeing. given_at: microseconds, when the person did it; wording: text shown, or its version."""

    subject: int
    purpose: str
    basis: str
    wording: str
    source: str
    given_at: int
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class Act:
    """One line of the ledger, as an export shows it."""

    purpose: str
    basis: str
    wording: str
    source: str
    given_at: int
    recorded_at: int
    withdrawn: bool
    expires_at: int | None


def is_evidence(evidence: Evidence | ConsentRow, now: int) -> bool:
    """Whether it counts at all (decision 19): known purpose and basis, a source, a time that is past."""
    return (
        evidence.purpose in PURPOSES
        and evidence.basis in BASES
        and bool(evidence.source.strip())
        and 0 < evidence.given_at <= now + FUTURE_ALLOWANCE_US
    )


def ends(basis: str, implied_by: str, given_at: int, named: int | None = None) -> int | None:
    """When consent given at that instant ends, None for never. implied_by: purchase | inquiry, "" where nobody says;
    named: the end that the evidence names. Pure."""
    if basis != "implied":
        return named
    by_law = months_after(given_at, IMPLIED_MONTHS.get(implied_by, IMPLIED_MONTHS[SHORTEST_IMPLIED]))
    return by_law if named is None else min(named, by_law)


def months_after(at: int, months: int) -> int:
    """The same day and time of day so many months on, in UTC; the last day of a month that has no such day."""
    moment = _EPOCH + timedelta(microseconds=at)
    year, month = divmod(moment.year * 12 + moment.month - 1 + months, 12)
    day = min(moment.day, monthrange(year, month + 1)[1])
    return (moment.replace(year=year, month=month + 1, day=day) - _EPOCH) // timedelta(microseconds=1)


def record(conn: Connection, rows: Iterable[Evidence | ConsentRow], now: int) -> int:
    """Enter what counts as evidence, once; how many lines of it were offered that count. The rows of a call over the
    socket are taken as they are: each recipient has two of them or three."""
    lines = [_line(row, now) for row in rows if is_evidence(row, now)]
    _enter(conn, lines)
    return len(lines)


def withdraw(conn: Connection, subject: int, purpose: str, source: str, now: int) -> int | None:
    """Take consent back. Tracking: the subject is on the negative list too; the seq to announce after the commit."""
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}, one of {', '.join(sorted(PURPOSES))}")
    _enter(conn, [(subject, purpose, "express", "", source, now, now, 1, None)])
    return negative.add(conn, subject, "withdrawn", now) if purpose in TRACKING else None


def standing(conn: Connection, subjects: Iterable[int], purpose: str, now: int) -> set[int]:
    """Those of the subjects whose consent to the purpose holds now."""
    return {subject for subject, acts in _acts_of(conn, subjects, purpose) if holds(acts, now)}


def withdrawn(conn: Connection, subjects: Iterable[int], purpose: str) -> dict[int, int]:
    """When those who did so last withdrew from the purpose: what evidence in a job is measured against."""
    last: dict[int, int] = {}
    for subject, acts in _acts_of(conn, subjects, purpose):
        moments = [act.given_at for act in acts if act.withdrawn]
        if moments:
            last[subject] = max(moments)
    return last


def holds(acts: Iterable[Act], now: int) -> bool:
    """Whether acts of one subject and purpose, in any order, amount to consent now. Pure."""
    taken_back = given = 0
    for act in acts:
        if act.withdrawn:
            taken_back = max(taken_back, act.given_at)
        elif act.expires_at is None or act.expires_at > now:
            given = max(given, act.given_at)
    return given > taken_back


def since(conn: Connection, subject: int, purpose: str, now: int) -> int | None:
    """When a subject agreed to a purpose last, if that holds now, else None: what `policy.purposes` asks (P-30)."""
    acts = [act for _, acts in _acts_of(conn, [subject], purpose) for act in acts]
    if not holds(acts, now):
        return None
    return max(act.given_at for act in acts if not act.withdrawn and (act.expires_at is None or act.expires_at > now))


def lapsed(conn: Connection, after: int, now: int, most: int = 500) -> tuple[set[int], int]:
    """Whose consent to tracking ended by itself in (after, now] and was not given anew, and the instant up to which
    that is known: below now, when there are more than `most` ends."""
    ended = (
        select(table.c.subject, table.c.purpose, table.c.expires_at)
        .where(table.c.expires_at > after, table.c.expires_at <= now, table.c.withdrawn == 0)
        .order_by(table.c.expires_at)
    )
    rows = conn.execute(ended.limit(most + 1)).all()
    until = now
    if len(rows) > most:  # of an instant all or none, and at least one instant
        until = max(rows[-1].expires_at - 1, rows[0].expires_at)
        rows = conn.execute(ended.where(table.c.expires_at <= until)).all()
    found: set[int] = set()
    for purpose in TRACKING:
        subjects = {int(row.subject) for row in rows if row.purpose == purpose}
        found |= subjects - standing(conn, sorted(subjects), purpose, now)
    return found, until


def is_whole(conn: Connection, subject: int, now: int) -> bool:
    """Whether somebody agrees now to every kind of tracking they ever were asked about: only then may hits of mail
    delivered long ago be stored again, for nobody knows which word each of them was sent under."""
    of: dict[str, list[Act]] = {}
    for act in history(conn, subject):
        if act.purpose in TRACKING:
            of.setdefault(act.purpose, []).append(act)
    return all(holds(acts, now) for acts in of.values())


def history(conn: Connection, subject: int) -> list[Act]:
    """Everything a subject agreed to and took back, by the time of the act."""
    by = table.c.given_at, table.c.withdrawn, table.c.purpose
    statement = select(table).where(table.c.subject == subject).order_by(*by)
    return [_act(row) for row in conn.execute(statement)]


def _acts_of(conn: Connection, subjects: Iterable[int], purpose: str) -> Iterator[tuple[int, list[Act]]]:
    iterator = iter(subjects)
    while some := list(itertools.islice(iterator, 500)):
        statement = (
            select(table)
            .where(table.c.subject.in_(some), table.c.purpose == purpose)
            .order_by(table.c.subject, table.c.given_at, table.c.withdrawn)
        )
        for subject, rows in itertools.groupby(conn.execute(statement), key=lambda row: int(row.subject)):
            yield subject, [_act(row) for row in rows]


def _act(row: Row[Any]) -> Act:
    return Act(
        purpose=row.purpose,
        basis=row.basis,
        wording=row.wording,
        source=row.source,
        given_at=row.given_at,
        recorded_at=row.recorded_at,
        withdrawn=bool(row.withdrawn),
        expires_at=row.expires_at,
    )


_COLUMNS = "subject, purpose, basis, wording, source, given_at, recorded_at, withdrawn, expires_at"
_Line = tuple[int, str, str, str, str, int, int, int, int | None]


def _line(row: Evidence | ConsentRow, now: int) -> _Line:
    end = row.expires_at or None
    if row.basis == "implied":
        # by what it is implied, whoever entered it has asked (`ends`); nothing stands longer than the longest there is
        longest = months_after(row.given_at, max(IMPLIED_MONTHS.values()))
        end = ends(row.basis, "", row.given_at) if end is None else min(end, longest)
    return row.subject, row.purpose, row.basis, row.wording, row.source, row.given_at, now, 0, end


def _enter(conn: Connection, lines: list[_Line]) -> None:
    if lines:
        # the same act again changes nothing
        conn.exec_driver_sql(statements.insert(conn.dialect.name, "consent", _COLUMNS, "DO NOTHING"), lines)
