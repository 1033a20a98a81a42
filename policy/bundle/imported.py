"""Rows of a ledger from another house, under a job of the same name that this house never sent (`entering`).

Laws:
- a job that was sent from here is never added to; only one that an import made takes rows, and it is over before it
  begins: nothing can be leased, sent or offered under its name again;
- counters and the job's size come from the rows that were really entered (I6): repeated, nothing changes;
- references are this house's own: the person's under the job's key made here, pseudonyms of their key here. None of the
  other house's keyed values are taken over.

Known limits: links get numbers of their own, replies are sealed anew. A visit has no identity: of equal ones as many
are entered as are missing. Which kind of visitor it was is not taken over (0, unknown).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Table, insert, select, update

from policy import accounts, vault
from policy.address import mref_of
from policy.events import TERMINAL, Kind, Reason
from policy.gate import Mode
from policy.instants import day_of, hour_of, parse_rfc3339, week_of
from policy.keys import KEY_BYTES, Keyring, open_sealed, seal, seal_note
from policy.personal import Value
from policy.schema import counter, domain, history, hit, hit_counter, job, link, message
from policy.store import mark
from policy.wire import job_aad

IMPORTED: Final = "imported"
_HITS: Final = {Kind.OPENED, Kind.CLICKED}
_TLS: Final = {"TLS 1.2": 2, "TLS 1.3": 3}

T = TypeVar("T")


class EnteringError(ValueError):
    """This bundle cannot be entered here. The text names accounts and fields, never content."""


@dataclass(slots=True, repr=False)
class Book:
    """One imported job, while rows of one person are entered under it."""

    conn: Connection
    keyring: Keyring
    number: int
    mref: int
    subject: vault.Subject
    domain: int
    references: dict[str, int] = field(default_factory=dict)
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    hits: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    rows: int = 0
    terminal: int = 0

    @classmethod
    def of(
        cls, conn: Connection, keyring: Keyring, subject: vault.Subject, normalised: str, name: str, job_id: str,
        messages: list[dict[str, Value]], events: list[dict[str, Value]],
    ) -> Book | None:  # fmt: skip
        """name: of the subject's account. None: a job of this name was sent from here."""
        account = subject.account
        row = conn.execute(
            select(job.c.number, job.c.reason, job.c.job_key).where(job.c.account == account, job.c.job_id == job_id)
        ).one_or_none()
        aad = job_aad("key", name, job_id)
        if row is None:
            key = os.urandom(KEY_BYTES)
            number = _enter_job(conn, account, job_id, seal(keyring.service, key, aad), messages, events)
        elif row.reason != IMPORTED or row.job_key is None:
            return None
        else:
            number, key = int(row.number), open_sealed(keyring.service, row.job_key, aad)
        domain_name = normalised.rpartition("@")[2]
        return cls(
            conn, keyring, number, mref_of(key, normalised), subject,
            _numbered(conn, domain, {"name": domain_name}, {}),
        )  # fmt: skip

    def messages(self, lines: list[dict[str, Value]]) -> int:
        """How many are in the ledger now. One job has one message to one person; a second is a row of its history."""
        taken = 0
        for values in sorted(lines, key=lambda values: str(values["at"])):
            kind = _word(Kind, values["outcome"])
            if kind is None or kind not in TERMINAL:
                continue  # "waiting": its events say as much
            at = instant(values, "at")
            taken += 1
            if self._there(message, {}):
                continue
            row = {
                **self._line(values, kind, at),
                "domain": self.domain,
                "attempts": _integer(values, "attempts"),
                "pseudonym": self.subject.pseudonym(week_of(at)),
                "tag_sealed": None,  # for bounces and complaints that come late: none will come to this house
                "tls": _TLS.get(str(values.get("tls")), 0),
            }
            self.conn.execute(insert(message).values(row))
            self._count(kind, row["reason"])
            self.terminal += 1
        return taken

    def events(self, lines: list[dict[str, Value]]) -> int:
        taken = 0
        visits: Counter[tuple[int, int, int]] = Counter()
        for values in lines:
            kind = _word(Kind, values["event"])
            if kind is None:
                continue
            at, taken = instant(values, "at"), taken + 1
            if kind in _HITS:
                visits[int(kind), self._link(values), at] += 1
                continue
            attempt = _integer(values, "attempt")
            if self._there(history, {"attempt": attempt, "kind": int(kind)}):
                continue
            row = {**self._line(values, kind, at), "attempt": attempt}
            self.conn.execute(insert(history).values(row))
            self._count(kind, row["reason"])
        for (number, place, at), n in visits.items():
            self._visit(number, place, at, n)
        return taken

    def close(self) -> int:
        """Counters and the job's size, from what was really entered. The rows."""
        for (kind, reason), n in self.counts.items():
            _add(self.conn, counter, {"job": self.number, "domain": self.domain, "kind": kind, "reason": reason}, n)
        for (kind, place, visitor), n in self.hits.items():
            _add(self.conn, hit_counter, {"job": self.number, "link": place, "kind": kind, "visitor": visitor}, n)
        if self.terminal:
            more = update(job).where(job.c.number == self.number)
            self.conn.execute(more.values(rows_submitted=job.c.rows_submitted + self.terminal))
            mark(self.conn, self.number)
        return self.rows

    def _line(self, values: dict[str, Value], kind: Kind, at: int) -> dict[str, Any]:
        return {
            "job": self.number,
            "mref": self.mref,
            "kind": int(kind),
            "at": at,
            "day": day_of(at),
            "reason": int(_word(Reason, values.get("reason") or "none") or Reason.NONE),
            "code": _integer(values, "code"),
            "enhanced": str(values.get("enhanced") or ""),
            "note": seal_note(self.keyring, str(values.get("reply") or "")) or None,
        }

    def _count(self, kind: Kind, reason: int) -> None:
        self.counts[int(kind), reason] += 1
        self.rows += 1

    def _there(self, table: Table, where: dict[str, int]) -> bool:
        wanted = {"job": self.number, "mref": self.mref, **where}
        asked = select(table.c.job).where(*(table.c[name] == value for name, value in wanted.items()))
        return self.conn.execute(asked).first() is not None

    def _link(self, values: dict[str, Value]) -> int:
        url = values.get("link")
        if not url:
            return -1
        numbers = self.conn.execute(select(link.c.url, link.c.number).where(link.c.job == self.number)).all()
        known = {row.url: int(row.number) for row in numbers}
        if url not in known:
            known[url] = max(known.values(), default=-1) + 1
            self.conn.execute(insert(link).values(job=self.number, number=known[url], url=url))
        return known[str(url)]

    def _visit(self, kind: int, place: int, at: int, wanted: int) -> None:
        """Hits have no identity of their own: those that are missing are entered."""
        row = {
            "job": self.number, "mref": self.mref, "kind": kind, "link": place, "hour": hour_of(at),
            "day": day_of(at), "visitor": 0, "mode": int(Mode.INDIVIDUAL),
        }  # fmt: skip
        there = self.conn.execute(select(hit.c.id).where(*(hit.c[name] == value for name, value in row.items()))).all()
        for _ in range(wanted - len(there)):
            self.conn.execute(insert(hit).values(row))
            self.hits[kind, place, 0] += 1
            self.rows += 1


def _enter_job(
    conn: Connection, account: int, job_id: str, sealed: bytes,
    messages: Iterable[dict[str, Value]], events: Iterable[dict[str, Value]],
) -> int:  # fmt: skip
    lines = [*messages, *events]
    moments = [instant(values, "at") for values in lines]
    said = next((values for values in messages if values.get("list")), {})
    names = next((values for values in messages if values.get("topic")), {})
    kinds = {values.get("kind") for values in messages}
    values = {
        "account": account,
        "job_id": job_id,
        # of no payload there is: whoever offers a job of this name meets a conflict
        "hash": sha256(f"{IMPORTED} {account}/{job_id}".encode()).digest(),
        "state": "done",
        "kind": "transactional" if kinds == {"transactional"} else "campaign",
        "list": accounts.list_number(conn, account, str(said.get("list") or "default")),
        "topic": accounts.topic_number(conn, account, str(names["topic"])) if names else None,
        "legal_basis": IMPORTED,
        "in_doubt": "hold",
        "priority": 0,
        "wait": 0,
        "opens_mode": int(Mode.OFF),
        "clicks_mode": int(Mode.OFF),
        "job_key": sealed,
        "created_at": min(moments),
        "accepted_at": min(moments),
        "chunks_expected": 0,
        "rows_submitted": 0,
        "done_at": max(moments),
        "reason": IMPORTED,
    }
    made = conn.execute(insert(job).values(values)).inserted_primary_key
    assert made is not None
    return int(made[0])


def _numbered(conn: Connection, table: Table, where: dict[str, Any], more: dict[str, Any]) -> int:
    asked = select(table.c.number).where(*(table.c[name] == value for name, value in where.items()))
    number = conn.execute(asked).scalar()
    if number is None:
        made = conn.execute(insert(table).values(**where, **more)).inserted_primary_key
        assert made is not None
        number = made[0]
    return int(number)


def _add(conn: Connection, table: Table, where: dict[str, int], n: int) -> None:
    more = update(table).where(*(table.c[name] == value for name, value in where.items())).values(n=table.c.n + n)
    if conn.execute(more).rowcount == 0:
        conn.execute(insert(table).values(**where, n=n))


def _word(names: type[T], word: Value) -> T | None:
    """The member that `policy.stories.word` writes so; None for a word of another version."""
    members: dict[str, T] = names.__members__  # type: ignore[attr-defined]  # enums only
    return members.get(str(word).upper().replace("-", "_"))


def instant(values: dict[str, Value], name: str) -> int:
    """A field that is an instant. Raises KeyError, EnteringError."""
    try:
        return parse_rfc3339(str(values[name]))
    except ValueError:
        raise EnteringError(f"a field {name} is not an instant") from None


def _integer(values: dict[str, Value], name: str) -> int:
    return int(values.get(name) or 0)
