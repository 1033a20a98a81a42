"""P-54: an erased person is suppressed first, found by nobody ten seconds later, and gone in 30 days with a proof."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, func, select

from policy import audit, erasure, schema, vault
from policy.drains import EventBook
from policy.erasure import Shredded
from policy.events import Batch, Event, Kind, Reason
from policy.gate import Permit, Refusal
from policy.instants import DAY_US
from policy.personal import Erased, Person
from tests.promises.floor import BOB, EVE, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


def _kept(conn: Connection, keyring: Any, number: int, now: int, keep: Any, **how: Any) -> Shredded:
    return Shredded()


async def _records(floor: Floor, address: str) -> dict[str, int]:
    """What places tell of somebody that names them or is about them, proofs of the erasure itself apart."""
    person = await floor.person(address)
    proofs = {"suppressions", "requests", "erasures", "letters", "disclosures", "readings"}
    found = {place.name: await place.find(person) for place in floor.places if place.name not in proofs}
    return {name: n for name, n in found.items() if n}


@promise("P-54", off={"policy.erasure.shred": _kept})
async def test_p54_when_the_answer_comes_no_path_leads_to_the_person(floor: Floor) -> None:
    tag, _, _ = floor.house.row(EVE)
    neighbour = await _records(floor, BOB)
    assert {"profile", "ledger", "visits", "consents"} <= set(await _records(floor, EVE))
    await floor.erasures.op_erase(0, *floor.house.row(EVE)[:2], EVE, "request", 0)
    assert await floor.write(lambda conn: vault.find(conn, floor.house.keyring, tag)) == []
    person = await floor.person(EVE)
    assert (person.known, person.references) == ((), ())
    assert await _records(floor, EVE) == {}
    assert await _records(floor, BOB) == neighbour


@promise("P-54", off={"policy.suppression.add": lambda conn, entries: 0})
async def test_p54_suppression_is_written_first(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks after it: erased without being suppressed is nobody, ever."""

    def broken(*asked: Any, **how: Any) -> Shredded:
        raise OSError("the power went")

    monkeypatch.setattr(erasure, "shred", broken)
    with pytest.raises(OSError, match="power"):
        await floor.erasures.op_erase(0, *floor.house.row(BOB)[:2], BOB, "request", 0)
    assert ("erasure", "platform", 0) in await floor.standing(BOB)
    assert isinstance(await floor.gate(BOB), Refusal)
    assert await floor.write(lambda conn: vault.number_of(conn, 1, floor.house.row(BOB)[0])) is not None


@promise("P-54", off={"policy.suppression.add": lambda conn, entries: 0})
async def test_p54_imported_again_the_person_is_refused_and_nobody_new_is_made(floor: Floor) -> None:
    """The reason of the row is `erased`, a suppression that says why."""
    assert isinstance(await floor.gate(BOB), Permit)
    await floor.asks("erasure", BOB)
    told = await floor.gate(BOB)
    assert isinstance(told, Refusal)
    assert told.reason is Reason.ERASED
    tag, _, _ = floor.house.row(BOB)
    assert await floor.write(lambda conn: erasure.erased_among(conn, 1, [tag])) == {tag}


async def _left(place: Any, person: Person) -> Erased:
    return Erased()


@promise("P-54", off={"policy.records.Ledger.erase": _left})
async def test_p54_the_rows_are_gone_in_30_days_with_a_receipt_and_the_counters_stay(floor: Floor) -> None:
    before = {(row.job, row.kind): row.n for row in await floor.rows(schema.counter)}
    mine = set((await floor.person(EVE)).references)
    others = set((await floor.person(BOB)).references)
    assert len(mine) == 3
    await floor.asks("erasure")
    await floor.purged()
    rows = {(row.job, row.mref) for row in await floor.rows(schema.message)}
    assert rows & mine == set()
    assert others <= rows
    assert {(row.job, row.kind): row.n for row in await floor.rows(schema.counter)} == before
    receipts = await floor.rows(schema.erasure)
    assert {row.state for row in receipts} == {"purged"}
    assert all(row.purged - row.begun <= 30 * DAY_US for row in receipts)
    assert "erasure-purged" in {line.action for line in await floor.rows(schema.audit)}
    assert await floor.write(audit.verify) is None


@promise("P-54", off={"policy.latecomers.Guard.sift": lambda self, conn, items: (list(items), [])})
async def test_p54_events_in_flight_tell_nothing_of_the_person_any_more(floor: Floor) -> None:
    """For 24 hours: the message is counted, whose it was is not kept."""
    tag, _, _ = floor.house.row(BOB)
    [subject] = await floor.write(lambda conn: vault.find(conn, floor.house.keyring, tag))
    await floor.asks("erasure", BOB)
    event = Event(Kind.DELIVERED, 4_711, 1, NOW, subject.pseudonym(2968), tag, 0, 250, "2.0.0", 3, b"sealed words")

    def tell(conn: Connection) -> None:
        book = EventBook(conn.dialect.name, floor.house.keyring.service, floor.guard)
        book.record(conn, [("late", "1-0", Batch(1, "example.com", [event]))])

    counted = select(func.sum(schema.counter.c.n)).where(schema.counter.c.job == 1)
    before = await floor.write(lambda conn: conn.execute(counted).scalar())
    await floor.write(tell)
    [row] = [row for row in await floor.rows(schema.message) if row.mref == 4_711]
    assert (row.pseudonym, row.tag_sealed, row.note) == (0, None, None)
    assert await floor.write(lambda conn: conn.execute(counted).scalar()) == before + 1
