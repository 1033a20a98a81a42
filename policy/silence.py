"""People and domains that nobody refers to any more: evidence of consent after R4, subjects, names of domains.

Whether somebody is still written to cannot be asked of a column: the send log knows weekly pseudonyms only. So people
are walked by number, a few thousand a round, on a connection for reading; who is silent is told to the writer, which
asks again what can be asked in SQL before it takes anything.

    `consents`   last act longer ago than R4, and nothing about them in the send log
    `subjects`   older than R2, no job open at the account, referred to by no table that names subjects, nothing in the
                 send log
    `domains`    neither sums nor, with them, messages name it

Laws:
- a withdrawal is never dropped: evidence of before, offered again by a job, would be believed (decision 19). It stays,
  as a suppression does (GDPR 21(3)), and with it the subject it names;
- who cannot be asked about (a key that does not open) is not silent;
- what is taken is in a manifest like everything else (`policy.bites`), what is held is copied before (`policy.holds`).

Known limits: the send log goes back 90 days (R3), so a relationship's end is the last act known once it is silent. A
subject whose account always has a job open stays. A message written to a domain in the instant between the walk and the
writer's transaction, of a job that ended long before, loses the domain's name in its report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, and_, delete, exists, func, or_, select
from sqlalchemy.sql import ColumnElement

from policy import schema, vault
from policy.bites import close_manifest, open_manifest, summed
from policy.classes import Period, last_gone, today_of
from policy.holds import Protected
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.retention import Sweep, limits, place_of
from policy.schema import consent, counter, domain, job, message, subject

AT_ONCE: Final = 500
_DAYS_AFTER: Final = 21  # a row may be so much younger than the week of its pseudonym
_RECENTLY_US: Final = DAY_US
_NAMED_IN: Final = ("consent", "negative", "hold", "rectification", "reading", "disclosure", "erasure")

Forget = Callable[[Sequence[str]], None]


@dataclass(frozen=True, slots=True)
class Page:
    """found: subject numbers by sweep; after: where the walk goes on, None at its end; looked: people asked about."""

    found: dict[Sweep, list[int]]
    after: int | None
    looked: int


def heard_of(
    conn: Connection, keyring: Keyring, numbers: Sequence[int], periods: Mapping[str, Period], now: int
) -> set[int]:
    """Those of the subjects that the send log has a row about, or that nobody can ask about."""
    found: set[int] = set()
    people: list[vault.Subject] = []
    for number in numbers:
        try:
            person = vault.get(conn, keyring, number)
        except vault.VaultError:
            found.add(number)
            continue
        if person is not None:
            people.append(person)
    today = today_of(now)
    first = conn.execute(select(func.min(message.c.day))).scalar()
    if first is None or not people:
        return found
    oldest = max(int(first), last_gone(today, periods["R3"])) - _DAYS_AFTER
    for week in range(week_of(oldest * DAY_US), week_of(now) + 1):
        named = {person.pseudonym(week): person.number for person in people}
        days = range(week * 7, min(week * 7 + _DAYS_AFTER, today + 1) + 1)
        rows = select(message.c.pseudonym).where(message.c.day.in_(days), message.c.pseudonym.in_(named))
        found.update(named[pseudonym] for pseudonym in conn.scalars(rows.distinct()))
    return found


def consents(
    conn: Connection,
    keyring: Keyring,
    periods: Mapping[str, Period],
    shortenings: Mapping[tuple[int, str], int],
    after: int,
    now: int,
) -> Page:
    """The next people whose evidence may be over. Read-only."""
    over = {account: day for (name, account), day in limits(now, periods, shortenings).items() if name == "consent"}
    newest = func.max(consent.c.recorded_at)
    rows = conn.execute(
        select(consent.c.subject, newest.label("at"), subject.c.account)
        .outerjoin(subject, subject.c.number == consent.c.subject)
        .where(consent.c.subject > after)
        .group_by(consent.c.subject, subject.c.account)
        .having(newest < (max(over.values()) + 1) * DAY_US, func.min(consent.c.withdrawn) == 0)
        .order_by(consent.c.subject)
        .limit(AT_ONCE)
    ).all()
    heard = heard_of(conn, keyring, [row.subject for row in rows], periods, now)
    found: dict[Sweep, list[int]] = {}
    for row in rows:
        day, own = row.at // DAY_US, over.get(row.account, over[0])
        if row.subject not in heard and day <= max(own, over[0]):
            account = 0 if day <= over[0] else int(row.account)
            found.setdefault(Sweep("consent", day, account, "R4"), []).append(row.subject)
    return Page(found, rows[-1].subject if len(rows) == AT_ONCE else None, len(rows))


def drop_consents(conn: Connection, keyring: Keyring, one: Sweep, numbers: Sequence[int], now: int) -> int:
    """How many lines of evidence went. Who acted since stays."""
    place = place_of("consent")
    acted = select(consent.c.subject).where(consent.c.recorded_at >= (one.day + 1) * DAY_US)
    mine = consent.c.subject.in_(numbers), consent.c.withdrawn == 0, consent.c.subject.not_in(acted)
    found = [dict(row._mapping) for row in conn.execute(select(consent.c.id, consent.c.subject).where(*mine))]
    if not found:
        return 0
    manifest = open_manifest(conn, one)
    Protected(conn, keyring, now).copy(place, consent, one.day, found)
    conn.execute(delete(consent).where(consent.c.id.in_([row["id"] for row in found])))
    digest = summed(manifest.digest, "consent", [(row["id"],) for row in found])
    close_manifest(conn, one, manifest.rows + len(found), digest, now)
    return len(found)


def _unnamed(newest: int) -> ColumnElement[bool]:
    """Subjects made up to that day whom no table names, at accounts that have nothing under way."""
    open_here = exists().where(job.c.account == subject.c.account, job.c.done_at.is_(None))
    named = [
        exists().where(schema.metadata.tables[name].c.subject == subject.c.number) for name in _NAMED_IN
    ]  # fmt: skip
    asked = exists().where(schema.request.c.tag == subject.c.tag)
    return and_(subject.c.created < (newest + 1) * DAY_US, ~or_(open_here, asked, *named))


def subjects(conn: Connection, keyring: Keyring, periods: Mapping[str, Period], after: int, now: int) -> Page:
    """The next people whom nobody may refer to. Read-only."""
    newest = last_gone(today_of(now), periods["R2"])
    wanted = select(subject.c.number).where(subject.c.number > after, _unnamed(newest))
    numbers = list(conn.scalars(wanted.order_by(subject.c.number).limit(AT_ONCE)))
    heard = heard_of(conn, keyring, numbers, periods, now)
    silent = [number for number in numbers if number not in heard]
    found = {Sweep("subject", today_of(now), 0, "R2"): silent} if silent else {}
    return Page(found, numbers[-1] if len(numbers) == AT_ONCE else None, len(numbers))


def drop_subjects(conn: Connection, one: Sweep, periods: Mapping[str, Period], numbers: Sequence[int], now: int) -> int:
    """How many identities went, with their keys: what named them before leads to nobody."""
    mine = subject.c.number.in_(numbers), _unnamed(last_gone(today_of(now), periods["R2"]))
    found = list(conn.scalars(select(subject.c.number).where(*mine)))
    if not found:
        return 0
    manifest = open_manifest(conn, one)
    conn.execute(delete(subject).where(subject.c.number.in_(found)))
    digest = summed(manifest.digest, "subject", [(number,) for number in found])
    close_manifest(conn, one, manifest.rows + len(found), digest, now)
    return len(found)


def domains(conn: Connection, most: int = AT_ONCE) -> list[int]:
    """Numbers of domains that no sum names. Every message counts in a sum that stands as long as it does."""
    wanted = select(domain.c.number).where(domain.c.number.not_in(select(counter.c.domain)))
    return list(conn.scalars(wanted.order_by(domain.c.number).limit(most)))


def drop_domains(conn: Connection, one: Sweep, numbers: Sequence[int], forget: Forget, now: int) -> int:
    """forget(names): whoever keeps numbers of domains in memory lets go of these, before anybody else may write."""
    lately = select(job.c.number).where(or_(job.c.done_at.is_(None), job.c.done_at > now - _RECENTLY_US))
    used = select(counter.c.domain).where(counter.c.job.in_(lately), counter.c.domain.in_(numbers))
    gone = domain.c.number.in_(numbers), domain.c.number.not_in(used)
    found = conn.execute(select(domain.c.number, domain.c.name).where(*gone)).all()
    if not found:
        return 0
    manifest = open_manifest(conn, one)
    forget([row.name for row in found])
    conn.execute(delete(domain).where(domain.c.number.in_([row.number for row in found])))
    digest = summed(manifest.digest, "domain", [(row.number,) for row in found])
    close_manifest(conn, one, manifest.rows + len(found), digest, now)
    return len(found)
