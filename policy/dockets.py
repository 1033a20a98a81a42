"""Places that hold what was done about a person: requests, readings, disclosures, corrections, holds, erasures.

Laws: these are proofs for their class (R6, R7, RH), so they outlive an erasure without naming anybody: keyed tags and
numbers (GDPR 17(3)(b), (e)). What in them is the person's own goes: corrected values, and the address of a request once
it is closed. What is under a hold was copied, sealed, before its rows went (`keep_held`, P-21).

Known limits: notes of officers to the steps of a request are not exported, they may speak of others.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, and_, func, or_, select

from policy import erasure, holds, readings, schema, vault
from policy.instants import rfc3339
from policy.keys import Keyring
from policy.personal import Erased, Person, Record, Value
from policy.places import Place
from policy.plain import accounts_by_number, opened, when


class Requests(Place):
    """Requests and their steps are proof for their class (R6); the address goes when the request is closed."""

    name = "requests"
    covers = ("table:request", "table:request_step")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        names, table = accounts_by_number(conn), schema.request
        for row in conn.execute(select(table).where(table.c.tag == person.tag).order_by(table.c.number)):
            yield Record(
                "request",
                {
                    "ticket": row.ticket,
                    "kind": row.kind,
                    "account": names.get(row.account, ""),
                    "channel": row.channel,
                    "jurisdiction": row.jurisdiction,
                    "state": row.state,
                    "outcome": row.outcome,
                    "ground": row.ground,
                    "received_at": rfc3339(row.received),
                    "due_at": rfc3339(row.due),
                    "closed_at": when(row.closed),
                },
            )

    async def erase(self, person: Person) -> Erased:
        return Erased(await self._premises.store.write(erasure.forget_addresses))


class Readings(Place):
    """When and what for somebody's data was looked at (C-579/21 *Pankki S*: not by whom, who looked acts for the house
    and has rights too). Stays (R6): it accounts for what was done before the erasure."""

    name = "readings"
    covers = ("table:reading",)

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        names = accounts_by_number(conn)
        for one in readings.consultations(conn, _accounts_of(person)):
            yield Record("consultation", {"at": rfc3339(one.at), "purpose": one.purpose, "what": one.what,
                                          "account": names.get(one.account, ""), "count": one.count})  # fmt: skip


class Disclosures(Place):
    """To whom data went: of the person, or of an account as a whole since it knew them. Stays (R6); a gag hides a line
    until its end. That a delivery tells the mailbox's provider is worked out from the messages (policy.bundle)."""

    name = "disclosures"
    covers = ("table:disclosure",)

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        """As `policy.disclosures.visible`, but a line that today's rules would not let in is told as well."""
        names, table, people = accounts_by_number(conn), schema.disclosure, schema.subject
        known = select(people.c.account, people.c.created).where(people.c.number.in_(sorted(person.subjects)))
        whole = [
            and_(table.c.subject == 0, table.c.account.in_([0, row.account]), table.c.at >= row.created)
            for row in conn.execute(known)
        ]
        mine = select(table).where(or_(table.c.subject.in_(sorted(person.subjects)), *whole))
        now = self._premises.clock()
        for row in conn.execute(mine.order_by(table.c.at, table.c.id)):
            if row.gag_until is None or row.gag_until <= now:
                account = names.get(row.account, "")
                yield Record("disclosure", {"at": rfc3339(row.at), "recipient": row.recipient, "purpose": row.purpose,
                                            "basis": row.basis, "what": row.what, "account": account,
                                            "count": row._mapping["count"]})  # fmt: skip


def _accounts_of(person: Person) -> dict[int, int]:
    return {known.subject: known.account for known in person.known if known.subject}


class Rectifications(Place):
    name = "rectifications"
    covers = ("table:rectification",)

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        names, table = accounts_by_number(conn), schema.rectification
        for known in person.known:
            for row in conn.execute(select(table).where(table.c.subject == known.subject).order_by(table.c.id)):
                aad = b"sp-rectification/" + known.subject.to_bytes(8, "big") + row.field.encode()  # policy.rights
                values: dict[str, Value] = {"field": row.field, "state": row.state, "at": rfc3339(row.at)}
                yield Record("rectification", {"account": names.get(known.account, ""), **values,
                                               "value": opened(known.key, row.value, aad)})  # fmt: skip

    async def erase(self, person: Person) -> Erased:
        return await self._delete(schema.rectification, person.subjects)


class Holds(Place):
    """What a claim or a law keeps of somebody (P-21). Stays until it is released; the person is told that it does."""

    name = "holds"
    covers = ("table:hold", "table:held")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        table, copies = schema.hold, schema.held
        mine = select(table).where(table.c.subject.in_(sorted(person.subjects))).order_by(table.c.number)
        for row in conn.execute(mine).all():
            count = conn.execute(select(func.count()).select_from(copies).where(copies.c.hold == row.number)).scalar()
            yield Record("hold", {"number": row.number, "reason": row.reason, "authority": row.authority,
                                  "placed_at": rfc3339(row.placed), "review_at": rfc3339(row.review),
                                  "released_at": when(row.released), "records": int(count or 0)})  # fmt: skip


class Erasures(Place):
    """What is left of an erasure: number, instants and keyed references. The list of messages goes with its end."""

    name = "erasures"
    covers = ("table:erasure", "table:purge")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        names, table = accounts_by_number(conn), schema.erasure
        for row in conn.execute(select(table).where(table.c.tag == person.tag).order_by(table.c.number)):
            yield Record("erasure", {"number": row.number, "account": names.get(row.account, ""), "cause": row.cause,
                                     "state": row.state, "begun_at": rfc3339(row.begun),
                                     "shredded_at": when(row.shredded), "purged_at": when(row.purged),
                                     "records": row.records})  # fmt: skip


class Elsewhere(Place):
    """Tables and keys with names or references in them and no record of one person. why: the reason, for the inventory.

    account, halt: of account holders and operators, whose rights are carried out on the account; domain: a word that
    many share, it goes when nobody refers to it; job: its key makes references of addresses and goes with the job,
    recipients are not in it; audit: keyed references and numbers only; halts: keyed references of domains."""

    name = "elsewhere"
    covers = ("table:account", "table:halt", "table:domain", "table:job", "table:audit", "key:halts")

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        yield from ()


def keep_held(conn: Connection, keyring: Keyring, one: vault.Subject, number: int, now: int) -> list[int]:
    """Before an erasure takes them away, copies of everything for the holds on a subject; their numbers (P-21).

    number: of the erasure, whose messages are listed. In the transaction that deletes the key, before it does."""
    found = [hold.number for hold in holds.standing(conn, one.number)]
    if found:  # rare: only then is the list read
        listed = select(schema.purge.c.job, schema.purge.c.mref).where(schema.purge.c.erasure == number)
        references = {(row.job, row.mref) for row in conn.execute(listed)}
        holds.keep_all(conn, keyring, one.number, now, references)
    return found
