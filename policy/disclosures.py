"""To whom else somebody's data went: written down by hand where people decide, computed where mail does (P-33, P-43).

    by hand    authorities, courts, a buyer of the business, whoever an account holder names: who (the actual
               recipient, C-154/21 *Österreichische Post*), what, when, on which law and case, whether it must be kept
               silent and until when (a gag ends by itself: `gag_until`, exclusive)
    computed   delivering a message tells the recipient's own provider that it exists: `providers`, from the send log,
               by the organisation that takes a domain's mail

Laws:
- a disclosure names a law and a case (`policy.purposes.is_reference`) and its recipient, or it is not written; its
  line in the audit chain is of the same transaction;
- the person is told of all of it that is not under a gag, and of that too from its end on (`visible`);
- nothing here is erased with the person: a number is not a name, and the ledger must outlast the request (GDPR
  15(1)(c), 17(3)(b)); it goes with its class (R6).

Known limits: what went of an account as a whole is told to everybody whom that account knew by then, and, once the
subject's row is gone, to everybody who ever was at it. `providers` knows domains; which organisation stands behind a
domain's mail hosts is a question to DNS that the caller may bring an answer to. A provider that was asked and refused
was told the address as well, so refusals by the far side count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, func, insert, or_, select, tuple_

from policy import audit, purposes
from policy.events import Kind
from policy.instants import day_of
from policy.jobs import Refused
from policy.schema import account as account_table
from policy.schema import disclosure as table
from policy.schema import domain as domain_table
from policy.schema import erasure, message
from policy.schema import subject as subject_table
from policy.store import Store

PURPOSES: Final = frozenset({"authority", "court", "regulator", "business-transfer", "instruction", "claim", "vital"})
_TOLD: Final = (Kind.DELIVERED, Kind.UNKNOWN)  # the address crossed the wire; else a reply code says that it did
_ACTOR: Final = re.compile(r"[a-z]+(/[0-9a-f]{16})?")
_MANY: Final = 400


@dataclass(frozen=True, slots=True)
class Disclosure:
    """One line. subject 0: of an account as a whole (account 0: of everybody); gag_until: microseconds, exclusive."""

    at: int
    subject: int
    account: int
    recipient: str
    purpose: str
    basis: str
    what: str
    count: int
    actor: str
    gag_until: int | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.recipient.strip()) <= 200 or not self.recipient.isprintable():
            raise ValueError("a disclosure names its recipient, on one line of at most 200 characters")
        if self.purpose not in PURPOSES:
            raise ValueError(f"a disclosure is for one of {', '.join(sorted(PURPOSES))}")
        if not purposes.is_reference(self.basis):
            raise ValueError('a disclosure names a law and a case, as in "PIPEDA 7(3)(c): order 26-118"')
        if not 0 < len(self.what.strip()) <= 200 or not self.what.isprintable():
            raise ValueError("a disclosure says which categories of data went, on one line")
        if not _ACTOR.fullmatch(self.actor):
            raise ValueError("an actor is a role, or role/reference: never a name")
        if self.count < 0 or self.at <= 0:
            raise ValueError("a disclosure has an instant and a number of people")


@dataclass(frozen=True, slots=True)
class Provider:
    """Whoever takes a domain's mail was told of that many messages. recipient: organisation, or the domain."""

    recipient: str
    domains: tuple[str, ...]
    count: int
    first: int
    last: int


class DisclosureOperations:
    """What the writer does when asked: `sales-push disclosure add`."""

    def __init__(self, store: Store, clock: Callable[[], int]) -> None:
        self._store = store
        self._clock = clock

    async def op_disclose(
        self,
        actor: str,
        recipient: str,
        purpose: str,
        basis: str,
        what: str,
        tag: bytes = b"",
        account: str = "",
        count: int = 1,
        at: int = 0,
        gag_until: int = 0,
    ) -> int:
        """Lines written: of a person at every account that knows them (or at one), else one of an account as a whole.
        at 0: now. Raises Refused (nobody known, no such account), ValueError."""
        now = self._clock()
        if at > now:
            raise ValueError("a disclosure is written down when it has happened")

        def work(conn: Connection) -> int:
            number = _account_number(conn, account) if account else 0
            whose = _subjects(conn, tag, number) if tag else [(0, number)]
            if not whose:
                raise Refused("not-found", "no account knows that person")
            lines = [
                Disclosure(at or now, subject, of, recipient, purpose, basis, what, 1 if tag else count, actor,
                           gag_until or None)
                for subject, of in whose
            ]  # fmt: skip
            record(conn, lines, now)
            return len(lines)

        return await self._store.write(work)


def record(conn: Connection, lines: Sequence[Disclosure], now: int) -> None:
    """Write lines down, each with its line in the audit chain (which does not say to whom: that may be under a gag)."""
    for line in lines:
        conn.execute(
            insert(table).values(
                at=line.at, day=day_of(line.at), subject=line.subject, account=line.account, recipient=line.recipient,
                purpose=line.purpose, basis=line.basis, what=line.what, count=line.count, actor=line.actor,
                gag_until=line.gag_until,
            )
        )  # fmt: skip
        ref = f"subject/{line.subject}" if line.subject else f"account/{line.account}"
        audit.append(conn, now, line.actor, "disclosed", ref, line.purpose, "done")


def visible(conn: Connection, accounts_of: Mapping[int, int], now: int) -> list[Disclosure]:
    """What somebody is told, by subject number and their account there: lines of their own, and those of an account as
    a whole since they were known there; no gag that still lasts."""
    own = table.c.subject.in_(sorted(accounts_of))
    since = select(subject_table.c.number, subject_table.c.created).where(
        subject_table.c.number.in_(sorted(accounts_of))
    )
    known = {row.number: row.created for row in conn.execute(since)}
    whole = [
        and_(table.c.subject == 0, table.c.account.in_([0, account]), table.c.at >= known.get(subject, 0))
        for subject, account in accounts_of.items()
    ]
    told = or_(table.c.gag_until.is_(None), table.c.gag_until <= now)
    rows = conn.execute(select(table).where(or_(own, *whole), told).order_by(table.c.at, table.c.id))
    return [_line(row) for row in rows]


def listed(conn: Connection, since: int = 0, most: int = 100) -> list[Disclosure]:
    """All of them, gags included, the newest first: for the officer."""
    wanted = select(table).where(table.c.at >= since).order_by(table.c.at.desc(), table.c.id.desc()).limit(most)
    return [_line(row) for row in conn.execute(wanted)]


def providers(
    conn: Connection,
    references: Collection[tuple[int, int]],
    organisation: Callable[[str], str] = lambda domain: domain,
) -> list[Provider]:
    """Who learned of these messages (job, mref) by taking or refusing them. organisation: who takes a domain's mail."""
    found: dict[str, list[tuple[str, int, int, int]]] = defaultdict(list)
    ordered = sorted(references)
    for start in range(0, len(ordered), _MANY):
        asked = (
            select(domain_table.c.name, func.count(), func.min(message.c.at), func.max(message.c.at))
            .join(domain_table, domain_table.c.number == message.c.domain)
            .where(
                tuple_(message.c.job, message.c.mref).in_(ordered[start : start + _MANY]),
                or_(message.c.kind.in_([int(kind) for kind in _TOLD]), message.c.code != 0),
            )
            .group_by(domain_table.c.name)
        )
        for name, count, first, last in conn.execute(asked):
            found[organisation(name)].append((name, int(count), int(first), int(last)))
    return [_provider(recipient, parts) for recipient, parts in sorted(found.items())]


def _provider(recipient: str, parts: Iterable[tuple[str, int, int, int]]) -> Provider:
    names, counts, firsts, lasts = zip(*parts, strict=True)
    return Provider(recipient, tuple(sorted(set(names))), sum(counts), min(firsts), max(lasts))


def _account_number(conn: Connection, name: str) -> int:
    number = conn.execute(select(account_table.c.number).where(account_table.c.name == name)).scalar()
    if number is None:
        raise Refused("not-found", "no such account")
    return int(number)


def _subjects(conn: Connection, tag: bytes, account: int) -> list[tuple[int, int]]:
    at = [account] if account else list(conn.scalars(select(account_table.c.number)))
    living = select(subject_table.c.number, subject_table.c.account).where(
        subject_table.c.account.in_(at), subject_table.c.tag == tag
    )
    erased = select(erasure.c.subject, erasure.c.account).where(
        erasure.c.account.in_(at), erasure.c.tag == tag, erasure.c.subject != 0
    )  # what went before the erasure is still told of
    return sorted({(int(number), int(of)) for part in (living, erased) for number, of in conn.execute(part)})


def _line(row: Row[Any]) -> Disclosure:
    told = row._mapping
    return Disclosure(**{name: told[name] for name in Disclosure.__dataclass_fields__})
