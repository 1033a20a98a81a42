"""Erasure of a person, the part that is decided in SQL: its order, the way into the ledger, and what comes too late.

Laws (requirements 4.4, P-17, P-22, P-54):
- nobody is ever erased without being suppressed: suppression and erasure row are one commit, the key goes in a later
  one, and only of a row that is there;
- every step may be repeated; an erasure asked for twice is one erasure;
- what is kept of the person is keyed or random: tag, number of the erasure, suppression, negative list;
- counters stay exact (I6): what is taken out of the ledger was counted when it was written and names nobody there.

    1 `begin`    suppression `erasure`, negative list `erased`, row (state suppressed), audit: one transaction, with the
                 tombstone line (`policy.tombstones`) on the disk before its commit
    2 `enlist`   the person's messages listed by their weekly pseudonyms, so many a transaction
      `shred`    key and identity deleted (state shredded), audit: one transaction. From here on nothing in ledger or
                 backup leads to anybody
    3 `finish`   when every place is empty (`policy.erasing` walks them): state purged, receipt in the audit chain

One row for each account that knows the person. Erased on the whole platform there is one more, of account 0, that
stands for places which hold somebody nobody resolved yet.

The way into the ledger: there is no index of persons. A subject's pseudonyms of all weeks since its making are worked
out of its key and looked for day by day in (day, pseudonym): 100 days times a year of weeks are 5,000 seeks, whatever
number of messages there are. With 2,000,000 messages on SQLite and 1,000 of
the person's an answer takes 0.21 s, 0.35 s at most (benchmarks/erasure.py).

What comes too late is the matter of `policy.latecomers`.

Known limits: listing takes 4 us of CPU a message of the person (200,000: 0.7 s), in transactions of at most 20,000;
only the last step, which hands the list to `policy.latecomers`, is one of 0.8 us a message. Erasures are looked for by
tag without an index. A subject whose wrapping key was lost is erased all the same, but its messages cannot be listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import Connection, and_, delete, exists, func, insert, literal, or_, select, update

from policy import audit, keyspace, negative, statements, suppression, vault
from policy.address import AddressError, normalise, parse, tag_of
from policy.instants import DAY_US, day_of, week_of
from policy.keys import Keyring
from policy.personal import Known, Person
from policy.schema import account as account_table
from policy.schema import erasure as table
from policy.schema import message, purge
from policy.schema import request as request_table
from policy.schema import subject as subject_table
from policy.schema import suppression as reasons
from policy.tombstones import Line, Tombstones

if TYPE_CHECKING:
    from policy.enforcement import Effects

log = structlog.get_logger()

SUPPRESSED, SHREDDED, PURGED = "suppressed", "shredded", "purged"
CAUSES: Final = frozenset({"request", "minor", "account", "replay"})
WATCH_US: Final = DAY_US  # requirements 4.4 step 2: events of an erased person are dropped for 24 hours
_MANY: Final = 500


@dataclass(frozen=True, slots=True)
class Begun:
    """erasures: numbers of the rows that carry this erasure out, old ones of a repetition included; is_new: there was
    something to begin."""

    erasures: tuple[int, ...]
    is_new: bool


@dataclass(frozen=True, slots=True)
class Shredded:
    """listed: messages found; way: whether the key could be opened to look for them; held: holds that copies were made
    for."""

    listed: int = 0
    way: bool = True
    held: tuple[int, ...] = ()


# copies what is under a hold: (conn, keyring, subject, erasure, now) -> numbers of the holds (policy.dockets.keep_held)
Keep = Callable[[Connection, Keyring, vault.Subject, int, int], Sequence[int]]


def begin(
    conn: Connection,
    effects: Effects,
    *,
    account: int,
    tag: bytes,
    partition: int,
    lane: str,
    cause: str,
    request: int | None,
    now: int,
    ledger: Tombstones | None,
) -> Begun:
    """Step 1, for one account or for all (0). ledger: written before this returns, None when it is being replayed.

    Raises ValueError, and tombstones.TombstoneError: then nothing is begun."""
    if cause not in CAUSES:
        raise ValueError(f"unknown cause of an erasure, one of {', '.join(sorted(CAUSES))}")
    scope = suppression.Scope.ACCOUNT if account else suppression.Scope.PLATFORM
    entry = suppression.Entry(tag, partition, scope, account, "erasure", now, f"erasure {cause}")
    suppression.add(conn, [entry])
    effects.tags.add((tag, partition))
    known = _living(conn, account, tag)
    before = _rows_of(conn, account, tag)
    wanted = known if account else [*known, (0, 0)]
    if not wanted and not before:
        wanted = [(account, 0)]
    fresh = [one for one in wanted if one not in before]
    numbers = []
    for holder, number in fresh:
        values = {
            "subject": number, "account": holder, "tag": tag, "partition": partition, "lane": lane, "cause": cause,
            "state": SUPPRESSED, "request": request, "begun": now, "records": 0,
        }  # fmt: skip
        made = conn.execute(insert(table).values(**values)).inserted_primary_key
        assert made is not None
        numbers.append(int(made[0]))
        audit.append(conn, now, "policy", "erasure-begun", f"erasure/{made[0]}", cause, SUPPRESSED)
        if number and negative.standing(conn, number) != "erased":
            effects.negative.append((number, "erased", negative.add(conn, number, "erased", now)))
    if fresh and ledger is not None:
        ledger.append([_tombstone(account, tag, partition, lane, cause, [number for _, number in fresh], now)])
    return Begun(tuple(sorted({*numbers, *before.values()})), bool(fresh))


def _tombstone(
    account: int, tag: bytes, partition: int, lane: str, cause: str, subjects: Sequence[int], now: int
) -> Line:
    values = {"account": account, "tag": tag.hex(), "partition": partition, "lane": lane, "cause": cause}
    return Line("erasure", now, {**values, "subjects": [number for number in subjects if number]})


def _living(conn: Connection, account: int, tag: bytes) -> list[tuple[int, int]]:
    """(account, subject) of a tag where the vault knows it."""
    everywhere = select(account_table.c.number)  # account by account over the index of (account, tag)
    wanted = select(subject_table.c.account, subject_table.c.number).where(
        subject_table.c.account.in_([account] if account else everywhere), subject_table.c.tag == tag
    )
    return [(row.account, row.number) for row in conn.execute(wanted.order_by(subject_table.c.account))]


def _rows_of(conn: Connection, account: int, tag: bytes) -> dict[tuple[int, int], int]:
    """Erasures there are already, by (account, subject). account 0: of all."""
    wanted = select(table.c.account, table.c.subject, table.c.number).where(table.c.tag == tag)
    if account:
        wanted = wanted.where(table.c.account == account)
    return {(row.account, row.subject): row.number for row in conn.execute(wanted)}


def enlist(conn: Connection, keyring: Keyring, number: int, since: int = 0, most: int = 1 << 62) -> int | None:
    """The first half of step 2: at most about so many messages of the person onto the list of the erasure, days from
    `since` on; the day to go on with, None when all are listed. A repetition does nothing. Raises LookupError.

    What is told of the person while this goes on is for `policy.latecomers` to list, which has to watch before."""
    row = conn.execute(select(table.c.subject, table.c.state).where(table.c.number == number)).one_or_none()
    if row is None:
        raise LookupError("there is no erasure of this number")
    if row.state != SUPPRESSED or not row.subject:
        return None
    try:
        known = vault.get(conn, keyring, row.subject)
    except vault.VaultError:  # `shred` says so
        return None
    listed = 0
    for day, pseudonyms in _where(conn, known) if known is not None else ():
        if day < since:
            continue
        if listed >= most:
            return day
        found = select(literal(number), message.c.job, message.c.mref).where(
            message.c.day == day, message.c.pseudonym.in_(pseudonyms)
        )
        there = (purge.c.erasure == number, purge.c.job == message.c.job, purge.c.mref == message.c.mref)
        new = found.where(~exists().where(*there)).limit(most - listed)
        enter = insert(purge).from_select(["erasure", "job", "mref"], new)
        # of an insert SQLAlchemy keeps no number unless it is asked to (over psycopg: -1)
        more = conn.execute(enter.execution_options(preserve_rowcount=True)).rowcount
        listed += more
        if more and listed >= most:
            return day  # perhaps there are more of the same day
    return None


def shred(
    conn: Connection, keyring: Keyring, number: int, now: int, keep: Keep, *, is_listed: bool = False
) -> Shredded:
    """Step 2. A repetition does nothing. is_listed: `enlist` has been through all days, and what came since was watched
    for. Raises LookupError when there is no such erasure."""
    row = conn.execute(select(table).where(table.c.number == number)).one_or_none()
    if row is None:
        raise LookupError("there is no erasure of this number")
    if row.state != SUPPRESSED:
        return Shredded()
    listed, way, held = 0, True, tuple[int, ...]()
    if row.subject:
        if not is_listed:
            enlist(conn, keyring, number)
        try:
            known = vault.get(conn, keyring, row.subject)
        except vault.VaultError:  # the name of the key is in the log of whoever finds it missing; here it must not stop
            log.error("an erased subject cannot be opened: its messages cannot be listed", erasure=number)
            known, way = None, False
        if known is not None:
            mine = select(func.count()).select_from(purge).where(purge.c.erasure == number)
            listed = int(conn.execute(mine).scalar_one())
            held = tuple(keep(conn, keyring, known, number, now))
        conn.execute(delete(subject_table).where(subject_table.c.number == row.subject))
    values = {"state": SHREDDED, "shredded": now}
    conn.execute(update(table).where(table.c.number == number).values(**values))
    result = SHREDDED if way else "shredded, key lost before"
    if held:
        result += f", {len(held)} holds keep copies"
    audit.append(conn, now, "policy", "erasure-shredded", f"erasure/{number}", row.cause, result)
    return Shredded(listed, way, held)


def _where(conn: Connection, known: vault.Subject) -> Iterator[tuple[int, list[int]]]:
    """Each day of the ledger on which a subject can have messages, with the pseudonyms it can have there."""
    # asked apart: of one column at a time SQLite takes the end of the index, of both it reads the table
    oldest = conn.execute(select(func.min(message.c.day))).scalar()
    newest = conn.execute(select(func.max(message.c.day))).scalar()
    if oldest is None or newest is None:
        return
    first = week_of(known.created)
    made = [known.pseudonym(week) for week in range(first, week_of((newest + 1) * DAY_US) + 1)]
    # a day early: the clock of the worker that sent may have been behind the writer's
    for day in range(max(oldest, day_of(known.created) - 1), newest + 1):
        yield day, made[: max(week_of((day + 1) * DAY_US) - first + 1, 1)]


def person_of(
    conn: Connection,
    keyring: Keyring,
    account: int | None,
    tag: bytes,
    address: str = "",
    weeks: Iterable[int] | None = None,
) -> Person:
    """Somebody as places are asked about: at one account or at all (None). weeks: of the pseudonyms; None: all that
    the ledger can hold, and the messages found by them. Whoever is erased has neither subject nor messages.

    Raises vault.VaultError and AddressError."""
    found = [one for one in vault.find(conn, keyring, tag) if account in (None, one.account)]
    spelled = address or next((one.address for one in found), "")
    domain, partition = "", _partition_of(conn, tag)
    if spelled:
        mailbox = parse(spelled)
        domain, partition = mailbox.domain, keyspace.partition_of(mailbox.domain)
        spelled = normalise(mailbox.local, mailbox.domain)
        if tag_of(keyring.pepper, spelled) != tag and address:
            raise AddressError("it is not the address of that tag")
    references: set[tuple[int, int]] = set()
    known = []
    chosen = None if weeks is None else list(weeks)
    for one in found:
        names: dict[int, int] = {week: one.pseudonym(week) for week in chosen or ()}
        for day, pseudonyms in _where(conn, one):
            first = week_of(one.created)
            if chosen is None:
                names.update((first + place, name) for place, name in enumerate(pseudonyms))
            asked = list(names.values()) if chosen is not None else pseudonyms
            wanted = select(message.c.job, message.c.mref).where(message.c.day == day, message.c.pseudonym.in_(asked))
            references.update((row.job, row.mref) for row in conn.execute(wanted))
        known.append(Known(one.number, one.account, one.key, names))
    lane = keyspace.lane_ref(domain, keyring.lane) if domain else ""
    return Person(tag, partition, lane, domain, spelled, tuple(known), tuple(sorted(references)))


def _partition_of(conn: Connection, tag: bytes) -> int:
    """Of somebody whose address nobody knows any more."""
    for column, owner in ((reasons.c.partition, reasons), (table.c.partition, table)):
        found = conn.execute(select(column).where(owner.c.tag == tag).limit(1)).scalar()
        if found is not None:
            return int(found)
    return 0


def erased_person(conn: Connection, number: int, after: tuple[int, int] | None = None, limit: int = 50_000) -> Person:
    """Whom an erasure is about, with so many of the messages listed for it, those behind `after` in order.

    Nothing but keyed and random values: the identity is gone. Raises LookupError."""
    row = conn.execute(select(table).where(table.c.number == number)).one_or_none()
    if row is None:
        raise LookupError("there is no erasure of this number")
    listed = select(purge.c.job, purge.c.mref).where(purge.c.erasure == number)
    if after is not None:
        listed = listed.where(or_(purge.c.job > after[0], and_(purge.c.job == after[0], purge.c.mref > after[1])))
    found = conn.execute(listed.order_by(purge.c.job, purge.c.mref).limit(limit))
    references = tuple((one.job, one.mref) for one in found)
    known: tuple[Known, ...]
    if row.account:
        known = (Known(row.subject, row.account),)
    else:  # everywhere: places may hold them by tag where no vault ever numbered them
        known = tuple(Known(0, holder) for holder in conn.scalars(select(account_table.c.number)).all())
    return Person(row.tag, row.partition, row.lane, known=known, references=references)


def finish(conn: Connection, number: int, now: int, note: str = "") -> None:
    """Step 3's end: every place is empty. The receipt is the row and its line in the audit chain."""
    row = conn.execute(select(table).where(table.c.number == number)).one()
    if row.state != SHREDDED:
        return
    conn.execute(update(table).where(table.c.number == number).values(state=PURGED, purged=now))
    result = f"purged, {row.records} records" + (f", {note}" if note else "")
    audit.append(conn, now, "policy", "erasure-purged", f"erasure/{number}", row.cause, result)


def forget_addresses(conn: Connection) -> int:
    """Requests of erased people that are closed lose the address they were made with; how many."""
    asked = request_table.c
    mine = and_(table.c.tag == asked.tag, or_(table.c.account == 0, table.c.account == asked.account))
    gone = and_(asked.closed.is_not(None), or_(asked.address.is_not(None), asked.details.is_not(None)))
    bare = update(request_table).where(gone, exists().where(mine)).values(address=None, details=None)
    return conn.execute(bare).rowcount


def erased_among(conn: Connection, account: int, tags: Iterable[bytes]) -> set[bytes]:
    """Those of the tags that were erased at an account or everywhere: no subject may be made of them again."""
    found: set[bytes] = set()
    # Asked for every chunk of an audience: 1 us a person where nobody was ever erased. Of the suppressions, because a
    # restored store can have them without one row about the erasure itself (policy.quarantine).
    if conn.exec_driver_sql(f"SELECT 1 FROM {reasons.name} WHERE reason = 'erasure' LIMIT 1").first() is None:
        return found
    wanted, dialect = list(tags), conn.dialect.name
    scopes = f"(scope = {int(suppression.Scope.PLATFORM)} OR (scope = {int(suppression.Scope.ACCOUNT)} AND scope_id = "
    for start in range(0, len(wanted), _MANY):
        some = wanted[start : start + _MANY]
        asked = (
            f"SELECT tag FROM {reasons.name} WHERE tag IN ({statements.marks(dialect, len(some))})"
            f" AND reason = 'erasure' AND {scopes}{statements.mark(dialect)}))"
        )
        found.update(bytes(tag) for (tag,) in conn.exec_driver_sql(asked, (*some, account)))
    return found
