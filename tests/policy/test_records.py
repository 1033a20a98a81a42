"""The SQL tables as places of personal data: what they tell, give up and keep, and that none is left out."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine, Table, func, insert, select, update

from policy import drains, erasure, records, schema, suppression
from policy.events import Event, Hit, Kind
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US, parse_rfc3339, rfc3339
from policy.keys import Keyring, seal, seal_note
from policy.personal import Erased, Person, PersonalStore, Premises
from policy.places import Place
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.test_erasure import ADA, BOB, NOW, Town, a_town

DAY = rfc3339(NOW)


class Clock:
    now = NOW

    def __call__(self) -> int:
        return self.now


class House:
    """One store with people in it, and its places."""

    def __init__(self, premises: Premises, town: Town, clock: Clock) -> None:
        self.town = town
        self.clock = clock
        self.premises = premises
        self.places: dict[str, PersonalStore] = {place.name: place for place in records.build(premises)}

    async def person(self, address: str = ADA, account: int | None = None) -> Person:
        tag, _, _ = self.town.row(address)
        keyring = self.premises.keyring()
        return await self.premises.store.write(lambda conn: erasure.person_of(conn, keyring, account, tag))

    async def told(self, place: str, person: Person) -> list[dict[str, Any]]:
        return [{"kind of record": one.kind, **one.values} for one in await self.places[place].export(person)]

    async def everything(self, person: Person) -> dict[str, list[Any]]:
        return {name: await self.told(name, person) for name in self.places}

    async def rows(self, table: Any) -> list[Any]:
        return await self.premises.store.write(lambda conn: list(conn.execute(select(table))))


@pytest.fixture
async def house(store: Engine, keyring: Keyring, redis: Redis, tmp_path: Path) -> AsyncIterator[House]:
    clock = Clock()
    settings = PolicySettings(data_dir=tmp_path, officer=Officer(name="O", address="privacy@example.org"))
    writer = Store(store)
    town = await writer.write(lambda conn: _seeded(conn, keyring, tmp_path))
    premises = Premises(settings, writer, redis, lambda: keyring, clock)
    yield House(premises, town, clock)
    town.ledger.close()
    await writer.close()


def _seeded(conn: Connection, keyring: Keyring, folder: Path) -> Town:
    """Ada and Bob: each one message with a deferral, one visit of each mode and one consent at acme; Ada at the other
    account too. Ada is suppressed there, has asked for a copy, and was looked at."""
    town = a_town(conn, keyring, folder)
    book = drains.EventBook(conn.dialect.name, keyring.service)
    listed = conn.execute(insert(schema.list_).values(account=town.acme, name="news", display_name="News"))
    assert listed.inserted_primary_key is not None
    mine = schema.job.c.number == town.jobs[town.acme]
    conn.execute(update(schema.job).where(mine).values(list=listed.inserted_primary_key[0], done_at=NOW))
    for mref, address in ((1, ADA), (2, BOB)):
        job = town.jobs[town.acme]
        event = town.delivered(town.acme, address, mref)
        event.note = seal_note(keyring, f"kept for {address}")
        town.tell(book, town.acme, Event(int(Kind.DEFERRED), mref, 1, NOW - HOUR_US, reason=41, code=450), event)
        book.record_hits(
            conn, [("h", "1-1", [Hit(int(Kind.OPENED), job, mref, NOW, mode, 33) for mode in (Mode.INDIVIDUAL, 2)])]
        )
        subject, _ = town.known(town.acme, address)
        conn.execute(
            insert(schema.consent).values(
                subject=subject, purpose="open_tracking", basis="express", wording="v1", source="form",
                given_at=NOW - DAY_US, recorded_at=NOW, withdrawn=0,
            )
        )  # fmt: skip
        looked = {"at": NOW, "day": NOW // DAY_US, "actor": "officer", "purpose": "support", "what": "why"}
        conn.execute(insert(schema.reading).values(subject=subject, account=town.acme, count=3, query=b"q", **looked))
        aad = b"sp-rectification/" + subject.to_bytes(8, "big") + b"name"
        person = erasure.person_of(conn, keyring, town.acme, town.row(address)[0])
        value = seal(person.known[0].key, b"Ada L.", aad)
        conn.execute(
            insert(schema.rectification).values(subject=subject, field="name", state="corrected", value=value, at=NOW)
        )
    town.tell(book, town.other, town.delivered(town.other, ADA, 3))
    tag, partition, _ = town.row(ADA)
    scope = suppression.Scope.ACCOUNT
    suppression.add(conn, [suppression.Entry(tag, partition, scope, town.other, "opt-out", NOW, "page")])
    gag = {"at": NOW, "day": NOW // DAY_US, "account": town.acme, "purpose": "law", "basis": "order", "what": "mail",
           "count": 1, "actor": "officer", "subject": town.known(town.acme, ADA)[0]}  # fmt: skip
    conn.execute(insert(schema.disclosure).values(recipient="court", gag_until=NOW + DAY_US, **gag))
    conn.execute(insert(schema.disclosure).values(recipient="one.example", **gag))
    return town


# --- the census -----------------------------------------------------------------------------------------------------


def test_every_table_with_personal_data_is_covered_by_one_place() -> None:
    personal = {item.column.partition(".")[0] for item in schema.inventory() if item.personal != schema.NONE}
    covered = [name for place in records._PLACES for name in place.covers if name.startswith("table:")]
    assert sorted(covered) == sorted(set(covered))
    assert {name.removeprefix("table:") for name in covered} == personal


async def test_places_that_have_no_words_cannot_be_asked(house: House) -> None:
    with pytest.raises(NotImplementedError):
        await Place(house.premises).export(await house.person())


# --- what is told ---------------------------------------------------------------------------------------------------


async def test_everything_of_a_person_is_told_in_plain_words(house: House) -> None:
    person = await house.person(account=house.town.acme)
    told = await house.everything(person)
    reference = "0000000000000001"
    assert told["profile"] == [
        {"kind of record": "profile", "account": "acme", "address": ADA, "created_at": DAY},
    ]
    [consent] = told["consents"]
    assert (consent["purpose"], consent["given_at"], consent["withdrawn"]) == (
        "open_tracking", rfc3339(NOW - DAY_US), False,
    )  # fmt: skip
    message, event, subscription = told["ledger"]
    assert message == {
        "kind of record": "message", "account": "acme", "job": "job-0", "kind": "campaign", "list": "news", "topic": "",
        "reference": reference, "outcome": "delivered", "reason": "", "at": DAY, "domain": "one.example",
        "attempts": 1, "code": 250, "enhanced": "2.0.0", "reply": f"kept for {ADA}", "tls": "TLS 1.3",
    }  # fmt: skip
    assert (event["event"], event["reason"], event["code"], event["attempt"]) == ("deferred", "policy", 450, 1)
    assert subscription == {
        "kind of record": "subscription", "account": "acme", "list": "news", "topic": "", "state": "subscribed",
        "since": DAY,
    }  # fmt: skip
    opened, inferred = told["visits"]
    assert (opened["event"], opened["visitor"], opened["reference"]) == ("opened", "a person", reference)
    assert inferred["kind of record"] == "inferred"
    [entry] = told["suppressions"]
    assert (entry["scope"], entry["account"], entry["reason"]) == ("account", "other", "opt-out")
    [reading] = told["readings"]
    assert (reading["purpose"], reading["count"]) == ("support", 3)
    [disclosure] = told["disclosures"]
    assert disclosure["recipient"] == "one.example"  # the other is under a gag
    house.clock.now += DAY_US
    assert len(await house.told("disclosures", person)) == 2
    [rectification] = told["rectifications"]
    assert (rectification["field"], rectification["value"]) == ("name", "Ada L.")


def put(conn: Connection, table: Table, values: dict[str, Any]) -> None:
    conn.execute(insert(table).values(**values))


async def test_who_looked_is_not_told_but_what_for_and_in_which_crowd(house: House) -> None:
    """C-579/21: the person is told when and why, not which of our people it was; a look at many was at them too."""
    other, town = house.town.other, house.town
    row = {"at": NOW + 1, "day": NOW // DAY_US, "actor": "support/0011223344556677", "purpose": "reporting",
           "what": "ledger export", "query": b"q", "subject": 0}  # fmt: skip
    for account, count in ((town.acme, 40), (other, 7), (0, 300), (town.acme, 0)):
        values = row | {"account": account, "count": count}
        await house.premises.store.write(functools.partial(put, table=schema.reading, values=values))
    told = await house.told("readings", await house.person(account=town.acme))
    assert [(one["purpose"], one["account"], one["count"]) for one in told] == [
        ("support", "acme", 3), ("reporting", "acme", 40), ("reporting", "", 300),
    ]  # fmt: skip
    assert not any("actor" in one for one in told)


async def test_what_went_of_an_account_as_a_whole_is_told_to_whom_it_knew_by_then(house: House) -> None:
    person = await house.person(account=house.town.acme)
    [profile] = await house.told("profile", person)
    since = parse_rfc3339(str(profile["created_at"]))
    row = {"day": NOW // DAY_US, "subject": 0, "purpose": "business-transfer", "basis": "law: case", "what": "list",
           "count": 9, "actor": "officer"}  # fmt: skip
    lines = [("too early", since - 1, house.town.acme), ("a buyer", since, house.town.acme),
             ("another's", since, house.town.other), ("of everybody", since, 0)]  # fmt: skip
    for recipient, at, account in lines:
        values = row | {"recipient": recipient, "at": at, "account": account}
        await house.premises.store.write(functools.partial(put, table=schema.disclosure, values=values))
    told = await house.told("disclosures", person)
    assert {one["recipient"] for one in told} == {"one.example", "a buyer", "of everybody"}


async def test_each_account_is_told_of_its_own_only(house: House) -> None:
    everywhere = await house.everything(await house.person())
    assert [one["account"] for one in everywhere["profile"]] == ["acme", "other"]
    assert [one["job"] for one in everywhere["ledger"] if one["kind of record"] == "message"] == ["job-0", "job-1"]
    others = await house.everything(await house.person(account=house.town.other))
    assert [one["job"] for one in others["ledger"]] == ["job-1"]
    assert others["consents"] == others["visits"] == others["readings"] == []


async def test_an_opt_out_ends_a_subscription(house: House) -> None:
    tag, partition, _ = house.town.row(ADA)
    entry = suppression.Entry(tag, partition, suppression.Scope.LIST, 1, "opt-out", NOW + 5, "page")
    await house.premises.store.write(lambda conn: suppression.add(conn, [entry]))
    [subscription] = [one for one in await house.told("ledger", await house.person(account=house.town.acme))
                      if one["kind of record"] == "subscription"]  # fmt: skip
    assert (subscription["state"], subscription["since"]) == ("unsubscribed", rfc3339(NOW + 5))


async def test_find_counts_what_export_tells(house: House) -> None:
    person = await house.person()
    for place in house.places.values():
        assert await place.find(person) == len(await place.export(person))


# --- what is given up -----------------------------------------------------------------------------------------------


async def _erase(house: House, person: Person) -> Erased:
    done = Erased()
    for place in house.places.values():
        done += await place.erase(person)
    return done


async def test_erasing_takes_out_a_person_and_nobody_else(house: House) -> None:
    bobs = await house.everything(await house.person(BOB))
    counted = await house.rows(schema.counter)
    ada = await house.person()
    # at the other account the job goes on: its message is left, and holds nothing that leads to her
    done = await _erase(house, ada)
    assert done.left == 1
    [left] = [row for row in await house.rows(schema.message) if row.mref == 3]
    assert (left.pseudonym, left.tag_sealed, left.note) == (0, None, None)
    assert await _erase(house, ada) == Erased(0, 1)
    await house.premises.store.write(lambda conn: conn.execute(update(schema.job).values(done_at=NOW)))
    assert await _erase(house, ada) == Erased(1, 0)
    assert await _erase(house, ada) == Erased(0, 0)
    told = await house.everything(ada)
    kept = {name for name, lines in told.items() if lines}
    assert kept == {"suppressions", "readings", "disclosures"}
    assert await house.everything(await house.person(BOB)) == bobs
    assert await house.rows(schema.counter) == counted


async def test_a_job_that_never_ends_keeps_a_message_for_a_week_at_most(house: House) -> None:
    ada = await house.person(account=house.town.other)
    assert (await _erase(house, ada)).left == 1
    house.clock.now = NOW + records.PATIENCE_US
    assert (await _erase(house, ada)).left == 1
    house.clock.now += 1
    assert await _erase(house, ada) == Erased(1, 0)


async def test_an_erased_person_leaves_a_suppression_and_a_reference(house: House) -> None:
    """Requirements 4.5, 6: the export of an erased subject is its suppression record and the ledger reference."""
    town = house.town

    def erase(conn: Connection) -> list[int]:
        town.conn = conn
        begun, _ = town.begin(0, ADA)
        for number in begun.erasures:
            town.shred(number)
            erasure.finish(conn, number, NOW)
        return list(begun.erasures)

    for number in await house.premises.store.write(erase):
        find = functools.partial(erasure.erased_person, number=number)
        await _erase(house, await house.premises.store.write(find))
    told = await house.everything(await house.person())
    assert {name for name, lines in told.items() if lines} == {"suppressions", "erasures"}
    assert {one["state"] for one in told["erasures"]} == {"purged"}
    assert {one["reason"] for one in told["suppressions"]} == {"erasure", "opt-out"}
    assert ADA not in repr(told)
    count = select(func.count()).select_from(schema.subject)
    assert await house.premises.store.write(lambda conn: conn.execute(count).scalar()) == 1


async def test_what_has_no_fields_waiting_corrects_none(house: House) -> None:
    person = await house.person()
    assert [await place.amend(person, "name", "x") for place in house.places.values()] == [0] * len(house.places)
