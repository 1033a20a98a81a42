"""The consent ledger: who agreed to what, when, on whose word, and who took it back. Append-only (P-07).

Laws:
- evidence without a time or a source is none (decision 19), and so is evidence from the future: it would outrank a
  withdrawal that is still to come;
- evidence never outranks a later withdrawal, whenever it is entered: what counts is when the act took place, and at
  the same instant the withdrawal wins;
- a withdrawal is in force from its commit on; with it the person is on the negative list (`policy.negative`).

Purposes are a closed vocabulary (P-30). Implied consent ends (CASL s.10: 24 or 6 months): `expires_at`, exclusive.

Known limits: one act a subject, purpose and instant; a second source for the same instant is not kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, select

from policy import negative, statements
from policy.instants import SECOND_US
from policy.schema import consent as table
from policy.wire import ConsentRow

PURPOSES = frozenset({"mail_marketing", "open_tracking", "click_tracking", "doe"})
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


def history(conn: Connection, subject: int) -> list[Act]:
    """Everything a subject agreed to and took back, by the time of the act."""
    statement = select(table).where(table.c.subject == subject).order_by(table.c.given_at, table.c.withdrawn)
    return [_act(row) for row in conn.execute(statement)]


def _acts_of(conn: Connection, subjects: Iterable[int], purpose: str) -> Iterator[tuple[int, list[Act]]]:
    iterator = iter(subjects)
    while some := list(itertools.islice(iterator, 500)):
        statement = (
            select(table)
            .where(table.c.subject.in_(some), table.c.purpose == purpose)
            .order_by(table.c.subject, table.c.given_at)
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
    end = row.expires_at if isinstance(row, Evidence) else None
    return row.subject, row.purpose, row.basis, row.wording, row.source, row.given_at, now, 0, end


def _enter(conn: Connection, lines: list[_Line]) -> None:
    if lines:
        # the same act again changes nothing
        conn.exec_driver_sql(statements.insert(conn.dialect.name, "consent", _COLUMNS, "DO NOTHING"), lines)
