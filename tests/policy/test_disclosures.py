"""Disclosures: the recipient by name, under a law and a case, told to the person unless a gag lasts (P-33, P-43)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Connection, Engine, delete, insert, select

from policy import accounts, audit, disclosures, vault
from policy.disclosures import Disclosure, DisclosureOperations, Provider
from policy.doorway import handlers
from policy.events import Kind
from policy.instants import DAY_US, week_of
from policy.jobs import Refused
from policy.keys import Keyring
from policy.schema import audit as chain
from policy.schema import disclosure, domain, erasure, message
from policy.schema import subject as subject_table
from policy.store import Store
from tests.policy.people import row_of

NOW = 1_795_376_640_000_000
ADA = "ada@one.example"
BASIS = "PIPEDA 7(3)(c): order 26-118"
LINE = Disclosure(NOW, 7, 1, "Landeskriminalamt Steiermark", "authority", BASIS, "messages and events", 1, "officer")


def line(**changes: object) -> Disclosure:
    return Disclosure(**{name: getattr(LINE, name) for name in Disclosure.__dataclass_fields__} | changes)


def told(conn: Connection, accounts_of: dict[int, int], now: int = NOW) -> list[str]:
    return [one.recipient for one in disclosures.visible(conn, accounts_of, now)]


def test_p_33_the_person_is_told_the_recipient_and_the_date(conn: Connection) -> None:
    disclosures.record(conn, [LINE, line(subject=8, recipient="Court of Graz", purpose="court")], NOW)
    assert disclosures.visible(conn, {7: 1}, NOW) == [LINE]
    assert told(conn, {7: 1, 8: 1}) == ["Landeskriminalamt Steiermark", "Court of Graz"]
    assert told(conn, {9: 2}) == []
    said = conn.execute(select(chain.c.object_ref, chain.c.action, chain.c.purpose).order_by(chain.c.seq)).all()
    assert [tuple(row) for row in said] == [
        ("subject/7", "disclosed", "authority"),
        ("subject/8", "disclosed", "court"),
    ]
    assert audit.verify(conn) is None


def test_a_gag_hides_it_until_its_end(conn: Connection) -> None:
    disclosures.record(conn, [line(gag_until=NOW + DAY_US)], NOW)
    assert told(conn, {7: 1}, NOW + DAY_US - 1) == []
    assert told(conn, {7: 1}, NOW + DAY_US) == ["Landeskriminalamt Steiermark"]
    assert [one.recipient for one in disclosures.listed(conn)] == ["Landeskriminalamt Steiermark"]


def test_of_an_account_as_a_whole_everybody_is_told_whom_it_knew_by_then(conn: Connection, keyring: Keyring) -> None:
    account = accounts.add(conn, "acme", display_name="Acme", now=NOW).number
    rows = [row_of(keyring.pepper, ADA)]
    [(early, _)] = vault.resolve(conn, keyring, account, rows, week_of(NOW), NOW - 1)
    rows = [row_of(keyring.pepper, "bob@two.example")]
    [(late, _)] = vault.resolve(conn, keyring, account, rows, week_of(NOW), NOW + 1)
    disclosures.record(conn, [line(subject=0, account=account, recipient="Buyer Ltd", count=2)], NOW)
    disclosures.record(conn, [line(subject=0, account=0, recipient="Regulator", purpose="regulator", count=9)], NOW)
    assert told(conn, {early: account}) == ["Buyer Ltd", "Regulator"]
    assert told(conn, {late: account}) == []
    assert told(conn, {5: account + 1}) == ["Regulator"]


@pytest.mark.parametrize(
    "change",
    [
        {"recipient": " "}, {"recipient": "a\nb"}, {"purpose": "marketing"}, {"basis": ""}, {"basis": "they asked"},
        {"what": ""}, {"actor": "Ada Lovelace"}, {"count": -1}, {"at": 0},
    ],
)  # fmt: skip
def test_p_32_without_recipient_law_and_case_it_is_not_written(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        line(**change)


def test_p_43_the_providers_who_learned_of_messages(conn: Connection) -> None:
    conn.execute(insert(domain), [{"number": 1, "name": "one.example"}, {"number": 2, "name": "two.example"},
                                  {"number": 3, "name": "three.example"}])  # fmt: skip
    rows = [  # mref, kind, domain, code, at
        (11, Kind.DELIVERED, 1, 250, NOW), (12, Kind.DELIVERED, 1, 250, NOW + 5), (13, Kind.BOUNCED, 2, 550, NOW + 1),
        (14, Kind.BOUNCED, 3, 0, NOW), (15, Kind.REFUSED, 3, 0, NOW), (16, Kind.UNKNOWN, 2, 0, NOW + 3),
        (17, Kind.DELIVERED, 3, 250, NOW),
    ]  # fmt: skip
    conn.execute(
        insert(message),
        [
            {"job": 1, "mref": mref, "kind": int(kind), "reason": 0, "domain": number, "code": code, "enhanced": "",
             "attempts": 1, "at": at, "day": at // DAY_US, "pseudonym": 5, "tls": 0}
            for mref, kind, number, code, at in rows
        ],
    )  # fmt: skip
    mine = {(1, mref) for mref in range(11, 17)}
    assert disclosures.providers(conn, mine) == [
        Provider("one.example", ("one.example",), 2, NOW, NOW + 5),
        Provider("two.example", ("two.example",), 2, NOW + 1, NOW + 3),
    ]
    assert disclosures.providers(conn, mine, lambda name: "Mail Ltd") == [
        Provider("Mail Ltd", ("one.example", "two.example"), 4, NOW, NOW + 5)
    ]
    assert disclosures.providers(conn, []) == []


@pytest.fixture
async def hand(store: Engine) -> AsyncIterator[Store]:
    made = Store(store)
    yield made
    await made.close()


async def test_written_by_hand_at_every_account_that_knows_the_person(hand: Store, keyring: Keyring) -> None:
    tag = row_of(keyring.pepper, ADA)[0]

    def known(conn: Connection) -> dict[int, int]:
        found = {}
        for name in ("acme", "beta", "gamma"):
            account = accounts.add(conn, name, display_name=name, now=NOW).number
            if name != "gamma":
                [(number, _)] = vault.resolve(conn, keyring, account, [row_of(keyring.pepper, ADA)], week_of(NOW), NOW)
                found[number] = account
        return found

    people = await hand.write(known)
    operations = DisclosureOperations(hand, lambda: NOW)
    assert set(handlers(operations)) == {"disclose"}
    said = ("officer", "Court of Graz", "court", BASIS, "messages")
    assert await operations.op_disclose(*said, tag=tag) == 2
    assert await operations.op_disclose(*said, tag=tag, account="beta") == 1
    assert await operations.op_disclose(*said, account="gamma", count=40, at=NOW - 5, gag_until=NOW + 5) == 1
    for refused in ({"tag": bytes(12)}, {"tag": tag, "account": "gamma"}, {"account": "nobody"}):
        with pytest.raises(Refused):
            await operations.op_disclose(*said, **refused)
    with pytest.raises(ValueError, match="has happened"):
        await operations.op_disclose(*said, tag=tag, at=NOW + 1)
    told_ = await hand.write(lambda conn: disclosures.visible(conn, people, NOW))
    assert len(told_) == 3
    assert await hand.write(lambda conn: conn.execute(select(disclosure.c["count"])).scalars().all()) == [1, 1, 1, 40]


async def test_what_went_before_an_erasure_can_still_be_written_down(hand: Store, keyring: Keyring) -> None:
    """And what was written stays: the ledger outlasts the person's data (P-33)."""
    tag = row_of(keyring.pepper, ADA)[0]

    def erased(conn: Connection) -> int:
        account = accounts.add(conn, "acme", display_name="Acme", now=NOW).number
        [(number, _)] = vault.resolve(conn, keyring, account, [row_of(keyring.pepper, ADA)], week_of(NOW), NOW)
        conn.execute(delete(subject_table).where(subject_table.c.number == number))
        conn.execute(
            insert(erasure).values(subject=number, account=account, tag=tag, partition=1, lane="x", cause="request",
                                   state="purged", begun=NOW, records=0)
        )  # fmt: skip
        return int(number)

    number = await hand.write(erased)
    operations = DisclosureOperations(hand, lambda: NOW)
    assert await operations.op_disclose("officer", "Court of Graz", "court", BASIS, "messages", tag=tag) == 1
    assert len(await hand.write(lambda conn: disclosures.visible(conn, {number: 1}, NOW))) == 1
