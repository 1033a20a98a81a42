"""Legal holds: what must be kept of one person beyond its class, for a claim, a law or a decision about them (P-21).

A hold is of one subject, never of a day or a place: whoever shares a day with a held person is swept as always. What
the sweeps (`policy.sweeping`) or an erasure would take of a held person is copied first, in the same transaction,
sealed into `held`, and then goes where it was. So a hold keeps a copy, it does not keep the person in use.

Laws:
- no row of a held subject leaves a place of `policy.retention` without its copy, whatever becomes of the transaction;
- `keep_all` before an erasure, as often as it likes: a copy is made once a hold;
- a released hold goes with its copies at the next sweep, and only then; every act leaves a line in the audit chain.

How a person's rows are found: by subject number or tag where they stand, in the send log by the pseudonyms of the weeks
before the row's day, in what goes by reference through the send log, or through the copies once that is swept.

Known limits: what was swept before the hold was placed is gone, and visits older than the send log of that time cannot
be told to be somebody's. Copies are sealed under the installation's service key: destroying the subject's own key is
what an erasure does. A hold whose review is due stays in force: it is counted until somebody looks at it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Table, and_, insert, or_, select, update

from policy import audit, purposes, readings, schema, vault
from policy.classes import RETENTION, Period, gone_from, today_of
from policy.instants import DAY_US, week_of
from policy.jobs import Refused
from policy.keys import Keyring, SealError, open_sealed, seal
from policy.personal import Premises
from policy.retention import PLACES, Place
from policy.schema import held, hold, message, subject

_WEEKS_BACK: Final = 60  # a pseudonym is of the week its slice was made in: a row may be that much younger
_DAYS_AFTER: Final = 21  # and is looked for so many days after the week's first
_IDENTITY: Final = "subject"
_MANY: Final = 400
_UNBOUND: Final = b"sp-held"


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold. Instants in microseconds; released: None while it stands."""

    number: int
    subject: int
    reason: str
    authority: str
    actor: str
    placed: int
    review: int
    released: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Copy:
    """One record that is kept under a hold. place: of `policy.retention`, or "subject" for the identity."""

    place: str
    day: int
    row: dict[str, Any]


def place(conn: Connection, of: int, reason: str, authority: str, actor: str, review: int, now: int) -> int:
    """Its number. Raises Refused: no reason, no authority, or a review later than the class allows."""
    if not reason.strip() or not authority.strip():
        raise Refused("refused", "a hold needs a reason and an authority: who demands it, on what ground")
    latest = gone_from(today_of(now), Period(RETENTION["RH"].review, "month")) * DAY_US
    review = review or latest
    if not now < review <= latest:
        raise Refused("refused", f"a hold is looked at again within {RETENTION['RH'].review} months")
    row = {"reason": reason.strip()[:500], "authority": authority.strip()[:200], "actor": actor[:64]}
    made = conn.execute(insert(hold).values(subject=of, placed=now, review=review, **row))
    key = made.inserted_primary_key
    assert key is not None
    audit.append(conn, now, "officer", "hold-placed", f"hold/{key[0]}", "legal-hold", "done")
    return int(key[0])


def release(conn: Connection, number: int, now: int) -> bool:
    """False: there is no such hold standing. Its copies go with the next sweep."""
    mine = hold.c.number == number, hold.c.released.is_(None)
    if conn.execute(update(hold).where(*mine).values(released=now)).rowcount == 0:
        return False
    audit.append(conn, now, "officer", "hold-released", f"hold/{number}", "legal-hold", "done")
    return True


def standing(conn: Connection, of: int | None = None) -> list[Hold]:
    """All that stand, or those of one subject, oldest first."""
    wanted = select(hold).where(hold.c.released.is_(None)).order_by(hold.c.number)
    if of is not None:
        wanted = wanted.where(hold.c.subject == of)
    return [Hold(**row._mapping) for row in conn.execute(wanted)]


class Protected:
    """Whose rows must be copied before they go, as the tables stand in this transaction."""

    def __init__(self, conn: Connection, keyring: Keyring, now: int, of: int | None = None) -> None:
        self._conn = conn
        self._keyring = keyring
        self._now = now
        self.holds: dict[int, list[int]] = {}
        for one in standing(conn, of):
            self.holds.setdefault(one.subject, []).append(one.number)
        self._tags: dict[bytes, int] = {}
        self._pseudonyms: dict[int, int] = {}
        self._references: dict[tuple[int, int], int] = {}
        self._keys: dict[int, vault.Subject] = {}
        for number in self.holds:
            if (person := vault.get(conn, keyring, number)) is not None:
                self._keys[number] = person
        rows = select(subject.c.number, subject.c.tag).where(subject.c.number.in_(self.holds))
        self._tags = {row.tag: row.number for row in conn.execute(rows)} if self.holds else {}
        for number, numbers in self.holds.items():
            for which in numbers:
                for copy in copies(conn, keyring, which):
                    if {"job", "mref"} <= copy.row.keys():
                        self._references[copy.row["job"], copy.row["mref"]] = number

    def __bool__(self) -> bool:
        return bool(self.holds)

    def refer(self, of: int, references: Iterable[tuple[int, int]]) -> None:
        """These messages (job, mref) are theirs."""
        self._references.update(dict.fromkeys(references, of))

    def owners(self, where: Place, day: int, keys: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """By place in the sequence, the held subject a row belongs to. keys: columns that name a row or its person."""
        if not where.person or not self.holds:
            return {}
        if where.person == "subject":
            found = [key["subject"] for key in keys]
        elif where.person == "tag":
            found = [self._tags.get(key["tag"]) for key in keys]
        else:
            week = week_of(day * DAY_US)
            for person in self._keys.values():
                weeks = range(max(week - _WEEKS_BACK, 0), week + 2)
                self._pseudonyms.update((person.pseudonym(one), person.number) for one in weeks)
            if where.person == "pseudonym":
                found = [self._pseudonyms.get(key["pseudonym"]) for key in keys]
            else:
                named = self._named({(key["job"], key["mref"]) for key in keys})
                found = [named.get((key["job"], key["mref"])) for key in keys]
        return {index: number for index, number in enumerate(found) if number in self.holds}

    def _named(self, references: Collection[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """Whose a message is, by the send log and by the copies."""
        found = {one: self._references[one] for one in references if one in self._references}
        jobs = sorted({job for job, _ in references})
        wanted = sorted(self._pseudonyms)
        for start in range(0, len(jobs), _MANY):
            mine = message.c.job.in_(jobs[start : start + _MANY])
            for first in range(0, len(wanted), _MANY):
                among = message.c.pseudonym.in_(wanted[first : first + _MANY])
                rows = select(message.c.job, message.c.mref, message.c.pseudonym).where(mine, among)
                for row in self._conn.execute(rows):
                    found[row.job, row.mref] = self._pseudonyms[row.pseudonym]
        return found

    def copy(self, where: Place, table: Table, day: int, keys: Sequence[Mapping[str, Any]]) -> int:
        """Copy those of the rows that are somebody's who is held; how many rows that were."""
        owners = self.owners(where, day, keys)
        for index, number in owners.items():
            named = and_(*[column == keys[index][column.name] for column in table.primary_key.columns])
            for row in self._conn.execute(select(table).where(named)):
                self._enter(where.name, day, number, dict(row._mapping))
        return len(owners)

    def _enter(self, name: str, day: int, number: int, row: dict[str, Any]) -> None:
        person = self._keys.get(number)
        if name == "rectification" and row["value"] and person is not None:  # sealed under a key that may go
            with contextlib.suppress(SealError):
                row["value"] = open_sealed(person.key, row["value"], correction_aad(number, row["field"]))
        for one in self.holds[number]:
            sealed = seal(self._keyring.service, msgspec.msgpack.encode(row), _aad(one, name))
            self._conn.execute(insert(held).values(hold=one, place=name, day=day, record=sealed, at=self._now))

    def person(self, number: int) -> vault.Subject | None:
        return self._keys.get(number)


def keep_all(
    conn: Connection, keyring: Keyring, of: int, now: int, references: Collection[tuple[int, int]] = ()
) -> int:
    """Before an erasure: copy everything that is kept of a held subject; how many records. 0 when no hold stands.

    references: their messages (job, mref) as far as the caller knows them already."""
    protected = Protected(conn, keyring, now, of)
    if not protected:
        return 0
    known = {
        (copy.place, _key_of(copy.place, copy.row))
        for one in protected.holds[of]
        for copy in copies(conn, keyring, one)
    }
    person = protected.person(of)
    mine: set[tuple[int, int]] = set(references)
    copied = 0
    if person is not None:
        mine |= _references(conn, person, now)
        tag = conn.execute(select(subject.c.tag).where(subject.c.number == of)).scalar_one()
        row = {
            "number": of,
            "account": person.account,
            "address": person.address,
            "tag": tag,
            "created": person.created,
        }
        if (_IDENTITY, (of,)) not in known:
            protected._enter(_IDENTITY, person.created // DAY_US, of, row)
            copied += 1
    protected.refer(of, mine)
    for where in PLACES:
        if not where.person:
            continue
        table = schema.metadata.tables[where.table]
        for found in _rows(conn, where, table, of, mine, protected):
            if (where.name, _key_of(where.name, found)) in known:
                continue
            day = found[where.dated] if where.dated == "day" else (found[where.dated] or now) // DAY_US
            protected._enter(where.name, day, of, found)
            copied += 1
    return copied


def copies(conn: Connection, keyring: Keyring, number: int) -> list[Copy]:
    """What is kept under a hold. Raises SealError."""
    rows = conn.execute(select(held).where(held.c.hold == number).order_by(held.c.id))
    return [Copy(row.place, row.day, _opened(keyring, number, row.place, row.record)) for row in rows]


def _opened(keyring: Keyring, number: int, name: str, record: bytes) -> dict[str, Any]:
    try:
        plain = open_sealed(keyring.service, record, _aad(number, name))
    except SealError:  # `policy.dockets.keep_held` seals without naming hold and place
        plain = open_sealed(keyring.service, record, _UNBOUND)
    row: dict[str, Any] = msgspec.msgpack.decode(plain)
    return row


def _rows(
    conn: Connection, where: Place, table: Table, of: int, mine: set[tuple[int, int]], protected: Protected
) -> list[dict[str, Any]]:
    if where.person == "subject":
        wanted = [select(table).where(table.c.subject == of)]
    elif where.person == "tag":
        wanted = [select(table).where(table.c.tag.in_([tag for tag, one in protected._tags.items() if one == of]))]
    else:
        pairs = sorted(mine)
        wanted = [
            select(table).where(or_(*[and_(table.c.job == job, table.c.mref == mref) for job, mref in some]))
            for some in (pairs[start : start + 100] for start in range(0, len(pairs), 100))
        ]
    return [dict(row._mapping) for one in wanted for row in conn.execute(one)]


def _references(conn: Connection, person: vault.Subject, now: int) -> set[tuple[int, int]]:
    """Their messages, by the pseudonyms of the weeks that the send log can hold: seeks in its index."""
    found: set[tuple[int, int]] = set()
    this = week_of(now)
    for week in range(max(week_of(person.created), this - _WEEKS_BACK), this + 1):
        days = list(range(week * 7, week * 7 + _DAYS_AFTER))
        rows = select(message.c.job, message.c.mref).where(
            message.c.day.in_(days), message.c.pseudonym == person.pseudonym(week)
        )
        found.update((row.job, row.mref) for row in conn.execute(rows))
    return found


def _key_of(name: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    if name == _IDENTITY:
        return (row.get("number"),)
    return tuple(row[column.name] for column in schema.metadata.tables[name].primary_key.columns)


def correction_aad(number: int, field: str) -> bytes:
    """What a corrected value is sealed with, under its subject's key (as `policy.dockets` opens it)."""
    return b"sp-rectification/" + number.to_bytes(8, "big") + field.encode()


def _aad(number: int, name: str) -> bytes:
    return b"sp-held-1" + number.to_bytes(8, "big") + name.encode()


class HoldOperations:
    """What the officer does with holds, over the writer's socket."""

    def __init__(self, premises: Premises) -> None:
        self._premises = premises

    async def op_hold_place(
        self, account: str, tag: bytes, reason: str, authority: str, actor: str = "officer", review: int = 0
    ) -> list[int]:
        """Holds on one person at an account, or ("") at every account that knows them. review: when to look again."""
        now = self._premises.clock()

        def work(conn: Connection) -> list[int]:
            wanted = select(subject.c.number).join(schema.account, schema.account.c.number == subject.c.account)
            wanted = wanted.where(subject.c.tag == tag).order_by(subject.c.account)
            if account:
                wanted = wanted.where(schema.account.c.name == account)
            found = conn.scalars(wanted).all()
            if not found:
                raise Refused("not-found", "the vault knows nobody by that address there")
            return [place(conn, of, reason, authority, actor, review, now) for of in found]

        return await self._premises.store.write(work)

    async def op_hold_release(self, number: int) -> bool:
        now = self._premises.clock()
        return await self._premises.store.write(lambda conn: release(conn, number, now))

    async def op_hold_list(self, actor: str = "officer", purpose: str = "rights") -> list[dict[str, Any]]:
        """Standing holds, in the officer's words; due: its review is over. Whoever is held is told that their hold was
        looked at (P-38). Raises readings.ReadDenied."""
        now = self._premises.clock()
        limits = self._premises.settings.reading_limits

        def look(conn: Connection) -> tuple[list[Hold], str]:
            found = standing(conn)
            people = {one.subject: readings.Asked(actor, purpose, "hold list", subject=one.subject) for one in found}
            return found, readings.enter_each(conn, list(people.values()), limits, purposes.registry(), now).denied

        found, denied = await self._premises.store.write(look)
        if denied:
            raise readings.ReadDenied(denied)
        return [asdict(one) | {"due": one.review <= now} for one in found]
