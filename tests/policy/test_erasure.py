"""Erasure decided in SQL: suppressed before erased, found without an index of persons, counted when told too late."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, func, insert, select, update

from policy import accounts, audit, drains, erasure, keyspace, negative, remembering, schema, suppression, vault
from policy.address import AddressError, tag_of
from policy.dockets import keep_held
from policy.enforcement import Effects
from policy.events import Batch, Event, Hit, Kind, Reason
from policy.gate import Mode
from policy.instants import DAY_US, WEEK_US, week_of
from policy.keys import Keyring
from policy.latecomers import WATCH_US, Guard
from policy.tombstones import NAME, TombstoneError, Tombstones
from tests.policy.people import row_of

NOW = 2967 * WEEK_US + 3 * DAY_US
ADA, BOB = "ada@one.example", "bob@one.example"


@dataclass
class Town:
    """Two accounts with one job each, and people who were written to."""

    conn: Connection
    keyring: Keyring
    ledger: Tombstones
    acme: int
    other: int
    jobs: dict[int, int] = field(default_factory=dict)

    def row(self, address: str) -> tuple[bytes, int, str]:
        return row_of(self.keyring.pepper, address)

    def known(self, account: int, address: str, at: int = NOW) -> tuple[int, int]:
        return vault.resolve(self.conn, self.keyring, account, [self.row(address)], week_of(at), at)[0]

    def tell(self, book: drains.EventBook, account: int, *events: Event, domain: str = "one.example") -> None:
        stream = keyspace.events(keyspace.partition_of(domain))
        book.record(self.conn, [(stream, "1-1", Batch(self.jobs[account], domain, list(events)))])
        book.committed()

    def delivered(self, account: int, address: str, mref: int, at: int = NOW) -> Event:
        number, pseudonym = self.known(account, address, at)
        assert number
        return Event(int(Kind.DELIVERED), mref, 1, at, pseudonym, self.row(address)[0], 0, 250, "2.0.0", 3, b"note")

    def begin(self, account: int, address: str, **more: Any) -> tuple[erasure.Begun, Effects]:
        tag, partition, _ = self.row(address)
        values: dict[str, Any] = {"lane": "L" * 11, "cause": "request", "request": None, "now": NOW}
        effects = Effects()
        values |= {"ledger": self.ledger, **more}
        begun = erasure.begin(self.conn, effects, account=account, tag=tag, partition=partition, **values)
        return begun, effects

    def shred(self, number: int) -> erasure.Shredded:
        return erasure.shred(self.conn, self.keyring, number, NOW, keep_held)

    def purge(self, number: int) -> set[tuple[int, int]]:
        table = schema.purge
        rows = self.conn.execute(select(table.c.job, table.c.mref).where(table.c.erasure == number))
        return {(row.job, row.mref) for row in rows}

    def counts(self) -> int:
        return int(self.conn.execute(select(func.sum(schema.counter.c.n))).scalar() or 0)

    def messages(self) -> dict[int, Any]:
        return {row.mref: row for row in self.conn.execute(select(schema.message))}


def a_town(conn: Connection, keyring: Keyring, folder: Path) -> Town:
    numbers = [accounts.add(conn, name, display_name=name, now=NOW).number for name in ("acme", "other")]
    town = Town(conn, keyring, Tombstones(folder / "tombs" / NAME), numbers[0], numbers[1])
    for place, account in enumerate(numbers):
        values = {
            "account": account, "job_id": f"job-{place}", "hash": b"h", "state": "sending", "kind": "campaign",
            "legal_basis": "consent", "in_doubt": "hold", "priority": 0, "wait": 0, "opens_mode": 3, "clicks_mode": 3,
            "created_at": NOW - 400 * DAY_US, "accepted_at": NOW - 400 * DAY_US, "chunks_expected": 1,
        }  # fmt: skip
        made = conn.execute(insert(schema.job).values(**values)).inserted_primary_key
        assert made is not None
        town.jobs[account] = int(made[0])
    return town


@pytest.fixture
def town(conn: Connection, keyring: Keyring, tmp_path: Path) -> Iterator[Town]:
    town = a_town(conn, keyring, tmp_path)
    yield town
    town.ledger.close()


@pytest.fixture
def book(conn: Connection, keyring: Keyring) -> drains.EventBook:
    return drains.EventBook(conn.dialect.name, keyring.service)


# --- begin ----------------------------------------------------------------------------------------------------------


def test_begun_is_suppressed_listed_told_and_in_the_tombstones(town: Town) -> None:
    subject, _ = town.known(town.acme, ADA)
    begun, effects = town.begin(town.acme, ADA)
    tag, partition, _ = town.row(ADA)
    [entry] = suppression.check(town.conn, tag)
    assert (entry.scope, entry.scope_id, entry.reason, entry.expires) == (2, town.acme, "erasure", None)
    assert effects.tags == {(tag, partition)}
    assert [(number, cause) for number, cause, _ in effects.negative] == [(subject, "erased")]
    assert negative.standing(town.conn, subject) == "erased"
    [row] = town.conn.execute(select(schema.erasure)).all()
    assert (row.number, row.subject, row.account, row.state) == (begun.erasures[0], subject, town.acme, "suppressed")
    [line] = town.ledger.replay().lines
    assert (line.what, line.values["tag"], line.values["subjects"]) == ("erasure", tag.hex(), [subject])
    assert audit.verify(town.conn) is None


def test_asked_for_twice_is_one_erasure(town: Town) -> None:
    town.known(town.acme, ADA)
    first, _ = town.begin(town.acme, ADA)
    town.shred(first.erasures[0])
    again, effects = town.begin(town.acme, ADA)
    assert (again.erasures, again.is_new) == (first.erasures, False)
    assert effects.negative == []
    assert len(town.ledger.replay().lines) == 1


def test_somebody_nobody_knows_is_suppressed_and_gets_a_receipt(town: Town) -> None:
    begun, _ = town.begin(town.acme, ADA)
    assert (len(begun.erasures), begun.is_new) == (1, True)
    assert town.shred(begun.erasures[0]).listed == 0
    assert town.begin(town.acme, ADA)[0].is_new is False


def test_everywhere_is_each_account_and_the_platform(town: Town) -> None:
    mine, theirs = town.known(town.acme, ADA)[0], town.known(town.other, ADA)[0]
    begun, _ = town.begin(0, ADA)
    rows = town.conn.execute(select(schema.erasure).order_by(schema.erasure.c.number)).all()
    assert [(row.account, row.subject) for row in rows] == [(town.acme, mine), (town.other, theirs), (0, 0)]
    [entry] = suppression.check(town.conn, town.row(ADA)[0])
    assert entry.scope is suppression.Scope.PLATFORM
    for number in begun.erasures:
        town.shred(number)
    assert town.conn.execute(select(func.count()).select_from(schema.subject)).scalar() == 0


def test_a_tombstone_that_cannot_be_written_begins_nothing(town: Town, tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(b"")
    ledger = Tombstones(tmp_path / "a file" / NAME)
    with pytest.raises(TombstoneError), town.conn.begin_nested():
        town.begin(town.acme, ADA, ledger=ledger)
    assert suppression.check(town.conn, town.row(ADA)[0]) == []
    assert town.conn.execute(select(schema.erasure)).all() == []


def test_a_cause_is_of_the_vocabulary(town: Town) -> None:
    with pytest.raises(ValueError, match="unknown cause"):
        town.begin(town.acme, ADA, cause="ada@one.example wants it")


# --- shred ----------------------------------------------------------------------------------------------------------


def test_messages_of_every_week_are_listed_and_nobody_elses(town: Town, book: drains.EventBook) -> None:
    weeks = [NOW - 20 * WEEK_US, NOW - 9 * WEEK_US, NOW - WEEK_US, NOW]
    for place, at in enumerate(weeks):
        town.tell(book, town.acme, town.delivered(town.acme, ADA, 100 + place, at))
        town.tell(book, town.acme, town.delivered(town.acme, BOB, 200 + place, at))
        town.tell(book, town.other, town.delivered(town.other, ADA, 300 + place, at))
    begun, _ = town.begin(town.acme, ADA)
    [number] = begun.erasures
    assert town.shred(number).listed == 4
    assert town.purge(number) == {(town.jobs[town.acme], 100 + place) for place in range(4)}
    assert town.shred(number).listed == 0  # a repetition
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) is None
    assert vault.number_of(town.conn, town.other, town.row(ADA)[0]) is not None
    [row] = town.conn.execute(select(schema.erasure)).all()
    assert (row.state, row.shredded) == ("shredded", NOW)


def test_mail_that_went_out_weeks_after_its_expansion_is_found(town: Town, book: drains.EventBook) -> None:
    event = town.delivered(town.acme, ADA, 5, NOW - 30 * DAY_US)
    event.at = NOW  # it waited for its hour
    town.tell(book, town.acme, event)
    begun, _ = town.begin(town.acme, ADA)
    assert town.shred(begun.erasures[0]).listed == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None, derandomize=True)
@given(mail=st.lists(st.tuples(st.sampled_from([ADA, BOB]), st.integers(0, 90)), min_size=1, max_size=12))
def test_what_is_listed_is_exactly_the_persons(town: Town, book: drains.EventBook, mail: list[tuple[str, int]]) -> None:
    savepoint = town.conn.begin_nested()
    try:
        for mref, (address, ago) in enumerate(sorted(mail, key=lambda one: -one[1]), 1):
            town.tell(book, town.acme, town.delivered(town.acme, address, mref, NOW - ago * DAY_US))
        mine = {place for place, (who, _) in enumerate(sorted(mail, key=lambda one: -one[1]), 1) if who == ADA}
        begun, _ = town.begin(town.acme, ADA, ledger=None)
        town.shred(begun.erasures[0])
        assert {mref for _, mref in town.purge(begun.erasures[0])} == mine
    finally:
        savepoint.rollback()
        book._domains = {"": 0}


def test_a_lost_key_does_not_stop_an_erasure(town: Town) -> None:
    town.known(town.acme, ADA)
    begun, _ = town.begin(town.acme, ADA)
    town.conn.execute(update(schema.subject).values(kek_id=1))
    told = town.shred(begun.erasures[0])
    assert (told.listed, told.way) == (0, False)
    assert town.conn.execute(select(schema.subject)).all() == []


def test_an_erasure_there_is_not(town: Town) -> None:
    with pytest.raises(LookupError):
        town.shred(99)
    with pytest.raises(LookupError):
        erasure.erased_person(town.conn, 99)


def test_a_hold_keeps_copies_of_everything_else(town: Town, book: drains.EventBook) -> None:
    """P-21: the copy is kept, everything else goes."""
    subject, _ = town.known(town.acme, ADA)
    town.tell(book, town.acme, town.delivered(town.acme, ADA, 1), town.delivered(town.acme, BOB, 2))
    hold = {"subject": subject, "reason": "claim", "authority": "court", "actor": "officer", "placed": NOW,
            "review": NOW}  # fmt: skip
    town.conn.execute(insert(schema.hold).values(**hold))
    begun, _ = town.begin(town.acme, ADA)
    assert len(town.shred(begun.erasures[0]).held) == 1
    places = town.conn.execute(select(schema.held.c.place, func.count()).group_by(schema.held.c.place)).all()
    assert {row[0]: row[1] for row in places}.items() >= {"subject": 1, "message": 1}.items()
    copies = func.count(schema.held.c.id)
    before = town.conn.execute(select(copies)).scalar()
    town.shred(begun.erasures[0])
    assert town.conn.execute(select(copies)).scalar() == before
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) is None


# --- the person -----------------------------------------------------------------------------------------------------


def test_a_person_is_found_at_one_account_or_at_all(town: Town, book: drains.EventBook) -> None:
    town.tell(book, town.acme, town.delivered(town.acme, ADA, 1))
    town.tell(book, town.other, town.delivered(town.other, ADA, 2))
    tag, partition, _ = town.row(ADA)
    everywhere = erasure.person_of(town.conn, town.keyring, None, tag, ADA)
    assert everywhere.accounts == {town.acme, town.other}
    assert everywhere.references == ((town.jobs[town.acme], 1), (town.jobs[town.other], 2))
    one = erasure.person_of(town.conn, town.keyring, town.acme, tag)
    assert (one.address, one.domain, one.partition) == (ADA, "one.example", partition)
    assert one.references == ((town.jobs[town.acme], 1),)
    [known] = one.known
    assert known.pseudonyms[week_of(NOW)] == town.known(town.acme, ADA)[1]
    lately = erasure.person_of(town.conn, town.keyring, town.acme, tag, ADA, weeks=[week_of(NOW)])
    assert lately.known[0].pseudonyms == {week_of(NOW): town.known(town.acme, ADA)[1]}
    assert erasure.person_of(town.conn, town.keyring, town.acme, tag, ADA, weeks=[week_of(NOW) - 1]).references == ()
    with pytest.raises(AddressError):
        erasure.person_of(town.conn, town.keyring, None, tag, BOB)


def test_an_erased_person_has_neither_subject_nor_messages(town: Town, book: drains.EventBook) -> None:
    town.tell(book, town.acme, town.delivered(town.acme, ADA, 1))
    begun, _ = town.begin(town.acme, ADA)
    town.shred(begun.erasures[0])
    tag, partition, _ = town.row(ADA)
    gone = erasure.person_of(town.conn, town.keyring, None, tag)
    assert (gone.known, gone.references, gone.partition) == ((), (), partition)
    listed = erasure.erased_person(town.conn, begun.erasures[0])
    assert (listed.tag, listed.lane, listed.address) == (tag, "L" * 11, "")
    assert listed.references == ((town.jobs[town.acme], 1),)
    assert erasure.erased_person(town.conn, begun.erasures[0], after=(town.jobs[town.acme], 1)).references == ()
    assert "one.example" not in repr(listed)


def test_nobody_of_number_0_is_anybody(town: Town) -> None:
    """The platform's row stands for people no vault numbered; 0 must not match what belongs to nobody."""
    begun, _ = town.begin(0, ADA)
    person = erasure.erased_person(town.conn, begun.erasures[-1])
    assert person.accounts == {town.acme, town.other}
    assert person.subjects == frozenset()


def test_who_was_erased_may_not_become_a_subject_again(town: Town) -> None:
    tag, other = town.row(ADA)[0], town.row(BOB)[0]
    town.begin(town.acme, ADA)
    assert erasure.erased_among(town.conn, town.acme, [tag, other]) == {tag}
    assert erasure.erased_among(town.conn, town.other, [tag, other]) == set()
    town.begin(0, BOB)
    assert erasure.erased_among(town.conn, town.other, [tag, other]) == {other}
    many = [tag_of(b"p" * 32, f"{n}@x.example") for n in range(1200)]
    assert erasure.erased_among(town.conn, town.acme, [*many, tag]) == {tag}


def test_a_restored_system_erases_again(town: Town) -> None:
    """The backup knows the person still; the tombstones do not let them come back."""
    subject, _ = town.known(town.acme, ADA)
    savepoint = town.conn.begin_nested()
    begun, _ = town.begin(town.acme, ADA)
    town.shred(begun.erasures[0])
    savepoint.rollback()  # the backup, restored
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) == subject
    [line] = town.ledger.replay(since=NOW - DAY_US).lines
    effects = Effects()
    remembering.carry_out(town.conn, effects, line, NOW + DAY_US)
    for number in list(town.conn.scalars(select(schema.erasure.c.number))):
        town.shred(number)
    assert [cause for _, cause, _ in effects.negative] == ["erased"]
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) is None
    assert suppression.check(town.conn, town.row(ADA)[0])[0].reason == "erasure"
    assert negative.standing(town.conn, subject) == "erased"
    assert len(town.ledger.replay().lines) == 1  # nothing is told twice


# --- listed in portions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_in_portions_every_message_is_listed_once_and_nobody_elses(
    town: Town, book: drains.EventBook, most: int
) -> None:
    """Several days, several messages a day: no portion is larger than asked, the last one leaves nothing out."""
    moments = [NOW - day * DAY_US for day in (20, 20, 20, 9, 9, 1, 0, 0)]
    town.known(town.acme, ADA, NOW - 30 * DAY_US)
    events = [town.delivered(town.acme, ADA, mref, at) for mref, at in enumerate(moments, 1)]
    town.tell(book, town.acme, *events, town.delivered(town.acme, BOB, 99))
    begun, _ = town.begin(town.acme, ADA)
    [number] = begun.erasures
    since: int | None = 0
    sizes = [0]
    while since is not None:
        since = erasure.enlist(town.conn, town.keyring, number, since, most)
        sizes.append(len(town.purge(number)))
    assert all(later - earlier <= most for earlier, later in itertools.pairwise(sizes))
    assert town.purge(number) == {(town.jobs[town.acme], mref) for mref in range(1, 9)}
    assert erasure.enlist(town.conn, town.keyring, number) is None  # a repetition, from the beginning
    told = erasure.shred(town.conn, town.keyring, number, NOW, keep_held, is_listed=True)
    assert told.listed == 8
    assert erasure.enlist(town.conn, town.keyring, number) is None  # the key is gone: nothing to look for


def test_what_is_told_between_two_portions_joins_the_list(town: Town, book: drains.EventBook) -> None:
    """Of a day that was looked at already: the guard expects it, so the key may go without another look."""
    early = [town.delivered(town.acme, ADA, mref, NOW - 3 * DAY_US) for mref in (1, 2)]
    town.known(town.acme, ADA, NOW - 9 * DAY_US)
    town.tell(book, town.acme, *early, town.delivered(town.acme, ADA, 3))
    begun, _ = town.begin(town.acme, ADA)
    [number] = begun.erasures
    book.guard.expect(town.conn, number)
    since = erasure.enlist(town.conn, town.keyring, number, 0, 3)
    town.tell(book, town.acme, town.delivered(town.acme, ADA, 4, NOW - 5 * DAY_US))
    while since is not None:
        since = erasure.enlist(town.conn, town.keyring, number, since, 3)
    assert erasure.shred(town.conn, town.keyring, number, NOW, keep_held, is_listed=True).listed == 4
    assert {mref for _, mref in town.purge(number)} == {1, 2, 3, 4}
    assert town.messages()[4].pseudonym == 0


def test_an_erasure_without_its_key_is_listed_by_nobody_and_still_ends(town: Town) -> None:
    town.known(town.acme, ADA)
    begun, _ = town.begin(town.acme, ADA)
    [number] = begun.erasures
    town.conn.execute(update(schema.subject).values(kek_id=1))
    assert erasure.enlist(town.conn, town.keyring, number) is None
    assert town.shred(number).way is False
    with pytest.raises(LookupError):
        erasure.enlist(town.conn, town.keyring, 4711)


# --- what comes too late --------------------------------------------------------------------------------------------


def shredded(town: Town, book: drains.EventBook, account: int, address: str = ADA) -> int:
    begun, _ = town.begin(account, address)
    for number in begun.erasures:
        town.shred(number)
        book.guard.watch(town.conn, number)
    return begun.erasures[-1]


def test_an_event_told_too_late_counts_and_names_nobody(town: Town, book: drains.EventBook) -> None:
    late, bobs = town.delivered(town.acme, ADA, 1), town.delivered(town.acme, BOB, 2)
    number = shredded(town, book, town.acme)
    town.tell(book, town.acme, late, bobs, Event(int(Kind.DEFERRED), 1, 1, NOW, note=b"quotes ada"))
    town.tell(book, town.acme, late)  # told twice
    rows = town.messages()
    assert (rows[1].pseudonym, rows[1].tag_sealed, rows[1].note) == (0, None, None)
    assert rows[2].pseudonym == bobs.pseudonym
    assert rows[2].note == b"note"
    assert town.counts() == 3
    assert town.purge(number) == {(town.jobs[town.acme], 1)}
    assert book.guard.fresh == {number}
    # by its listed message alone, once that is known
    town.tell(book, town.acme, Event(int(Kind.DEFERRED), 1, 2, NOW, note=b"quotes ada"))
    history = schema.history
    assert town.conn.execute(select(history.c.note).where(history.c.attempt == 2)).scalar() is None


def test_an_account_that_did_not_erase_keeps_what_it_has(town: Town, book: drains.EventBook) -> None:
    theirs = town.delivered(town.other, ADA, 7)
    shredded(town, book, town.acme)
    town.tell(book, town.other, theirs)
    assert town.messages()[7].pseudonym == theirs.pseudonym


def test_a_visit_of_an_erased_person_is_not_kept(town: Town, book: drains.EventBook) -> None:
    town.tell(book, town.acme, town.delivered(town.acme, ADA, 1), town.delivered(town.acme, BOB, 2))
    shredded(town, book, town.acme)
    job = town.jobs[town.acme]
    hits = [Hit(int(Kind.OPENED), job, mref, NOW, mode, 32) for mref in (1, 2) for mode in (Mode.INDIVIDUAL, 2)]
    assert book.record_hits(town.conn, [(keyspace.HITS, "1-1", hits)]) == 4
    assert [row.mref for row in town.conn.execute(select(schema.hit))] == [2]
    assert [row.mref for row in town.conn.execute(select(schema.last_open))] == [2]
    assert book.guard.dropped == 2


def test_a_refusal_as_erased_keeps_no_tag(town: Town, book: drains.EventBook) -> None:
    """Re-imported long after: not even the sealed tag is stored, guard or not."""
    tag = town.row(ADA)[0]
    town.tell(book, town.acme, Event(int(Kind.REFUSED), 3, 0, NOW, 0, tag, int(Reason.ERASED)))
    town.tell(book, town.acme, Event(int(Kind.REFUSED), 4, 0, NOW, 0, tag, int(Reason.SUPPRESSED)))
    rows = town.messages()
    assert rows[3].tag_sealed is None
    assert rows[4].tag_sealed is not None


def test_who_was_taken_out_of_a_slice_is_taken_out_of_the_ledger_too(town: Town, book: drains.EventBook) -> None:
    """Their end is told by the message's reference and nothing else (engine.queue.erasing): it is listed, once."""
    left = Event(int(Kind.REFUSED), 3, 2, NOW, 0, b"", int(Reason.ERASED))
    town.tell(book, town.acme, left)  # nobody was erased here of late: a row like another
    number = shredded(town, book, town.acme)
    town.tell(book, town.acme, Event(int(Kind.REFUSED), 4, 2, NOW, 0, b"", int(Reason.ERASED)))
    town.tell(book, town.other, Event(int(Kind.REFUSED), 5, 2, NOW, 0, b"", int(Reason.ERASED)))
    town.tell(book, town.acme, Event(int(Kind.REFUSED), 6, 2, NOW, 0, b"", int(Reason.SUPPRESSED)))
    assert town.purge(number) == {(town.jobs[town.acme], 4)}
    assert book.guard.fresh == {number}
    assert town.counts() == 4
    everywhere = shredded(town, book, 0, BOB)
    town.tell(book, town.other, Event(int(Kind.REFUSED), 7, 2, NOW, 0, b"", int(Reason.ERASED)))
    assert (town.jobs[town.other], 7) in town.purge(everywhere)


def test_the_guard_is_filled_from_sql_and_forgets_after_a_day(town: Town, book: drains.EventBook) -> None:
    town.tell(book, town.acme, town.delivered(town.acme, ADA, 1))
    late = town.delivered(town.acme, ADA, 9)
    number = shredded(town, book, town.acme)
    guard = Guard()
    assert not guard
    guard.load(town.conn, NOW)
    assert guard.mrefs == {1}
    again = drains.EventBook(town.conn.dialect.name, town.keyring.service, guard)
    town.tell(again, town.acme, late)  # after a restart: the tag is enough
    assert town.messages()[9].pseudonym == 0
    guard.load(town.conn, NOW + 10 * DAY_US)
    assert guard  # not finished: not forgotten
    erasure.finish(town.conn, number, NOW)
    guard.load(town.conn, NOW + WATCH_US - 1)
    assert guard
    assert town.purge(number)
    guard.load(town.conn, NOW + WATCH_US)
    assert not guard
    assert town.purge(number) == set()  # the list goes with its use


def test_a_drain_that_fails_knows_them_again(store: Engine, keyring: Keyring, tmp_path: Path) -> None:
    with store.begin() as conn:
        town = a_town(conn, keyring, tmp_path)
        book = drains.EventBook(conn.dialect.name, keyring.service)
        late = town.delivered(town.acme, ADA, 1)
        shredded(town, book, town.acme)
    batch = [(keyspace.events(1), "1-1", Batch(town.jobs[town.acme], "one.example", [late]))]

    def failing() -> None:
        with store.begin() as conn:
            book.record(conn, batch)
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        failing()
    with store.begin() as conn:
        book.record(conn, batch)
        book.committed()
        assert conn.execute(select(schema.message.c.pseudonym)).scalar() == 0
        assert conn.execute(select(func.count()).select_from(schema.purge)).scalar() == 1


# --- the end --------------------------------------------------------------------------------------------------------


def test_the_receipt_is_in_the_row_and_in_the_chain(town: Town) -> None:
    begun, _ = town.begin(town.acme, ADA)
    [number] = begun.erasures
    erasure.finish(town.conn, number, NOW)  # not shredded yet: no receipt
    assert town.conn.execute(select(schema.erasure.c.state)).scalar() == "suppressed"
    town.shred(number)
    erasure.finish(town.conn, number, NOW + DAY_US)
    erasure.finish(town.conn, number, NOW + 2 * DAY_US)
    row = town.conn.execute(select(schema.erasure)).one()
    assert (row.state, row.purged) == ("purged", NOW + DAY_US)
    acts = town.conn.execute(select(schema.audit.c.action, schema.audit.c.object_ref)).all()
    assert [tuple(act) for act in acts] == [
        (f"erasure-{act}", f"erasure/{number}") for act in ("begun", "shredded", "purged")
    ]


def test_a_request_loses_its_address_when_it_is_closed(town: Town) -> None:
    tag, partition, _ = town.row(ADA)
    values = {"kind": "erasure", "role": "contact", "tag": tag, "partition": partition, "channel": "cli",
              "jurisdiction": "gdpr", "state": "done", "identity": "proved", "received": NOW, "due": NOW,
              "outcome": "", "ground": "", "address": b"sealed", "details": b"sealed"}  # fmt: skip
    shapes = [("a", town.acme, NOW), ("b", town.acme, None), ("c", town.other, NOW), ("d", None, NOW)]
    for ticket, account, closed in shapes:
        town.conn.execute(insert(schema.request).values(ticket=ticket, account=account, closed=closed, **values))
    assert erasure.forget_addresses(town.conn) == 0
    town.begin(town.acme, ADA)
    table = schema.request

    def left() -> list[str]:
        return sorted(town.conn.scalars(select(table.c.ticket).where(table.c.address.is_not(None))))

    assert (erasure.forget_addresses(town.conn), left()) == (1, ["b", "c", "d"])
    town.begin(0, ADA)
    assert (erasure.forget_addresses(town.conn), left()) == (2, ["b"])


def test_days_without_messages_are_no_days(town: Town) -> None:
    subject, _ = town.known(town.acme, ADA)
    one = vault.get(town.conn, town.keyring, subject)
    assert one is not None
    assert list(erasure._where(town.conn, one)) == []
