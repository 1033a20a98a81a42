"""The SQL tables as places of personal data (design decision 14): what each holds of a person, in plain words.

Laws (policy.personal):
- an export says names, not our numbers, and instants as RFC 3339 in UTC; its words are those of `policy.bundle`;
- erasing takes out what is the person's own; suppressions, the negative list, proofs of requests, readings,
  disclosures and erasures stay for their class (P-22, GDPR 17(3)(b), (e)): they are keyed or numbers;
- a row of a job that goes on is emptied first and taken out when the job is over, or after `PATIENCE_US`: while events
  of that job may still be told twice, its identity (job, mref) keeps the counters exact (I6, policy.drains). Until then
  it is counted as left;
- what is under a hold was copied sealed before (`dockets.keep_held`, P-21), so it goes like everything else.

Tables that hold names or references but nothing of a person alone are covered by `Elsewhere`, with the reason; a test
fails when a column with personal data is covered by nobody.

Rooms: `places` (what they have in common), `dockets` (requests, readings, holds and other proofs), `plain` (words).

Known limits: a place reads in a transaction of the writer, some milliseconds a thousand rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from sqlalchemy import Connection, delete, func, or_, select, update

from policy import dockets, schema, suppression, vault
from policy.address import domain_tag, mref_bytes
from policy.events import Kind, Reason
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.personal import Erased, Person, PersonalStore, Premises, Record, Value
from policy.places import Place
from policy.plain import (
    TLS,
    accounts_by_number,
    by_job,
    event,
    job_words,
    messages,
    reply,
    scope_words,
    subscriptions,
    visitor,
    when,
)
from policy.stories import word

PATIENCE_US: Final = 7 * DAY_US  # a restored Redis is hours old, a lease minutes; requirements allow 30 days


class Profile(Place):
    name = "profile"
    covers = ("table:subject",)

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        names = accounts_by_number(conn)
        for known in person.known:
            one = vault.get(conn, self._premises.keyring(), known.subject) if known.subject else None
            if one is not None:
                values: dict[str, Value] = {"address": one.address, "created_at": rfc3339(one.created)}
                yield Record("profile", {"account": names.get(one.account, ""), **values})

    async def erase(self, person: Person) -> Erased:
        """`policy.erasure.shred` has done it by then; for whoever asks by another way."""
        statement = delete(schema.subject).where(schema.subject.c.number.in_(sorted(person.subjects)))
        return Erased(await self._premises.store.write(lambda conn: conn.execute(statement).rowcount))


class Consents(Place):
    name = "consents"
    covers = ("table:consent",)

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        names, table = accounts_by_number(conn), schema.consent
        for known in person.known:
            wanted = select(table).where(table.c.subject == known.subject)
            for row in conn.execute(wanted.order_by(table.c.given_at, table.c.withdrawn, table.c.purpose)):
                yield Record(
                    "consent",
                    {
                        "account": names.get(known.account, ""),
                        "purpose": row.purpose,
                        "basis": row.basis,
                        "wording": row.wording,
                        "source": row.source,
                        "given_at": rfc3339(row.given_at),
                        "recorded_at": rfc3339(row.recorded_at),
                        "withdrawn": bool(row.withdrawn),
                        "expires_at": when(row.expires_at),
                    },
                )

    async def erase(self, person: Person) -> Erased:
        return await self._delete(schema.consent, person.subjects)


class Ledger(Place):
    """Messages, their history, and the lists they were sent under."""

    name = "ledger"
    covers = ("table:message", "table:history")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        keyring, subscribed = self._premises.keyring(), dict[tuple[str, str, str], int]()
        for job, mrefs in by_job(person.references):
            of_job = job_words(conn, job)
            if of_job is None:
                continue
            both = {name: of_job[name] for name in ("account", "job")}
            for row in conn.execute(messages(job, mrefs)):
                key = (str(of_job["account"]), str(of_job["list"]), str(of_job["topic"]))
                if of_job["list"]:
                    subscribed[key] = min(subscribed.get(key, row.at), row.at)
                yield Record(
                    "message",
                    {
                        **of_job,
                        "reference": mref_bytes(row.mref).hex(),
                        "outcome": word(Kind, row.kind),
                        "reason": word(Reason, row.reason) if row.reason else "",
                        "at": rfc3339(row.at),
                        "domain": row.domain_name or "",
                        "attempts": max(row.attempts, 0),
                        **reply(keyring, row),
                        "tls": TLS.get(row.tls, ""),
                    },
                )
            table = schema.history
            steps = select(table).where(table.c.job == job, table.c.mref.in_(mrefs))
            for row in conn.execute(steps.order_by(table.c.at, table.c.mref, table.c.attempt, table.c.kind)):
                yield Record("event", {**both, **event(row, row.kind, rfc3339(row.at)), **reply(keyring, row),
                                       "reason": word(Reason, row.reason) if row.reason else "",
                                       "attempt": row.attempt})  # fmt: skip
        yield from subscriptions(conn, person, subscribed)

    async def erase(self, person: Person) -> Erased:
        done, now = Erased(), self._premises.clock()
        for job, mrefs in by_job(person.references):
            done += await self._premises.store.write(_taken_out(job, mrefs, now))
        return done


def _taken_out(number: int, mrefs: Sequence[int], now: int) -> Callable[[Connection], Erased]:
    def work(conn: Connection) -> Erased:
        row = conn.execute(select(schema.job.c.done_at).where(schema.job.c.number == number)).one_or_none()
        goes_on = row is not None and row.done_at is None
        records = left = 0
        for table in (schema.message, schema.history):
            mine = [table.c.job == number, table.c.mref.in_(mrefs)]
            ripe = [*mine, table.c.at < now - PATIENCE_US] if goes_on else mine
            records += conn.execute(delete(table).where(*ripe)).rowcount
            if not goes_on:
                continue
            kept = [table.c.note] if table is schema.history else [table.c.note, table.c.tag_sealed]
            values: dict[str, Any] = dict.fromkeys(column.name for column in kept)
            filled = or_(*(column.is_not(None) for column in kept))
            if table is schema.message:
                values["pseudonym"], filled = 0, or_(filled, table.c.pseudonym != 0)
            conn.execute(update(table).where(*mine, filled).values(**values))
            left += int(conn.execute(select(func.count()).select_from(table).where(*mine)).scalar_one())
        return Erased(records, left)

    return work


class Visits(Place):
    """Opens and clicks; the sums of a job (hit_counter) name nobody."""

    name = "visits"
    covers = ("table:hit", "table:last_open")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        for job, mrefs in by_job(person.references):
            of_job = job_words(conn, job)
            if of_job is None:
                continue
            both, table, link = {name: of_job[name] for name in ("account", "job")}, schema.hit, schema.link
            hits = select(table, link.c.url).outerjoin(
                link, (link.c.job == table.c.job) & (link.c.number == table.c.link)
            )
            mine = hits.where(table.c.job == job, table.c.mref.in_(mrefs)).order_by(table.c.hour, table.c.id)
            for row in conn.execute(mine):
                more: dict[str, Value] = {"link": row.url or "", "visitor": visitor(row.visitor)}
                yield Record("event", {**both, **event(row, row.kind, rfc3339(row.hour * HOUR_US)), **more})
            seen = schema.last_open
            days = select(seen).where(seen.c.job == job, seen.c.mref.in_(mrefs)).order_by(seen.c.day, seen.c.mref)
            for row in conn.execute(days):
                at = rfc3339(row.day * DAY_US)
                values: dict[str, Value] = {"what": "the mailbox is read", "value": "on that day or before", "at": at}
                yield Record("inferred", {**both, "reference": mref_bytes(row.mref).hex(), **values})

    async def erase(self, person: Person) -> Erased:
        done = Erased()
        for job, mrefs in by_job(person.references):
            done += await self._premises.store.write(functools.partial(_no_visits, job=job, mrefs=mrefs))
        return done


def _no_visits(conn: Connection, job: int, mrefs: Sequence[int]) -> Erased:
    both = (schema.hit, schema.last_open)
    gone = [conn.execute(delete(table).where(table.c.job == job, table.c.mref.in_(mrefs))).rowcount for table in both]
    return Erased(sum(gone))


class Suppressions(Place):
    """What stands against writing to somebody. Erasing leaves it: it is what keeps the erased unwritten (P-22)."""

    name = "suppressions"
    covers = ("table:suppression", "table:negative", "key:suppression", "key:negative list")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        targets = [("address", person.tag)]
        if person.domain:
            targets.append(("domain", domain_tag(self._premises.keyring().pepper, person.domain)))
        for target, tag in targets:
            for entry in suppression.check(conn, tag):
                account, name = scope_words(conn, entry)
                yield Record(
                    "suppression",
                    {
                        "target": target,
                        "scope": entry.scope.name.lower(),
                        "account": account,
                        "name": name,
                        "reason": entry.reason,
                        "source": entry.source,
                        "created_at": rfc3339(entry.created),
                        "expires_at": when(entry.expires),
                    },
                )
        names, table = accounts_by_number(conn), schema.negative
        for known in person.known:
            wanted = select(table).where(table.c.subject == known.subject, table.c.subject != 0).order_by(table.c.seq)
            for row in conn.execute(wanted):
                values: dict[str, Value] = {"reason": f"visits: {row.reason}", "created_at": rfc3339(row.since)}
                where: dict[str, Value] = {"scope": "account", "account": names.get(known.account, ""), "name": ""}
                yield Record("suppression", {"target": "address", **where, "source": "", **values, "expires_at": None})


_PLACES: Final[tuple[type[Place], ...]] = (
    Profile, Consents, Ledger, Visits, Suppressions, dockets.Requests, dockets.Readings, dockets.Disclosures,
    dockets.Rectifications, dockets.Holds, dockets.Erasures, dockets.Elsewhere,
)  # fmt: skip


def build(premises: Premises) -> list[PersonalStore]:
    """The places of this floor (entry point `sales_push.stores`)."""
    return [place(premises) for place in _PLACES]
