"""Reads of personal data: asked first, written down without saying what was read, denied over the limit (P-38)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Connection, Engine, select

from policy import accounts, audit, consent, purposes, readings, vault
from policy.consent import Evidence
from policy.doorway import handlers
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.readings import Answer, Asked, Consultation, ReadDenied, ReadingOperations
from policy.schema import audit as chain
from policy.schema import reading
from policy.store import Store
from tests.policy.people import row_of

NOW = 1_795_376_640_000_000
ADA = "Ada.Lovelace@one.example"
LIMITS = {"support": 5, "officer": 0}
REF = "PIPEDA 7(3)(c): order 26-118"


def ask(**changes: object) -> Asked:
    return Asked(**{"actor": "support/00ff00ff00ff00ff", "purpose": "support", "what": "story"} | changes)  # type: ignore[arg-type]


@pytest.fixture
def people(conn: Connection, keyring: Keyring) -> dict[int, int]:
    """Ada, as two accounts know her: subject number by account."""
    found = {}
    for name in ("acme", "beta"):
        account = accounts.add(conn, name, display_name=name, now=NOW - 9 * DAY_US).number
        rows = [row_of(keyring.pepper, ADA)]
        [(number, _)] = vault.resolve(conn, keyring, account, rows, week_of(NOW), NOW - 9 * DAY_US)
        found[account] = number
    return found


def enter(conn: Connection, asked: Asked, now: int = NOW) -> Answer:
    return readings.enter(conn, asked, LIMITS, purposes.registry(), now)


def lines(conn: Connection) -> list[tuple[str, ...]]:
    columns = (chain.c.action, chain.c.object_ref, chain.c.purpose, chain.c.result)
    return [tuple(row) for row in conn.execute(select(*columns).order_by(chain.c.seq))]


def test_a_read_of_one_person_is_a_row_at_each_account(
    conn: Connection, keyring: Keyring, people: dict[int, int]
) -> None:
    tag = row_of(keyring.pepper, ADA)[0]
    query = readings.query_hash(keyring, "story", ADA)
    assert enter(conn, ask(tag=tag, query=query)) == Answer(rows=2)
    rows = conn.execute(select(reading).order_by(reading.c.account)).all()
    assert {row.account: row.subject for row in rows} == people
    assert {(row.purpose, row.what, row.day, row.query) for row in rows} == {("support", "story", NOW // DAY_US, query)}
    [account, _] = people
    assert enter(conn, ask(tag=tag, account=account)) == Answer(rows=1)
    assert lines(conn) == []


def test_the_person_is_told_when_and_for_what_but_not_by_whom(
    conn: Connection, keyring: Keyring, people: dict[int, int]
) -> None:
    """C-579/21 Pankki S. Reads of a whole account are told too, as one of so many."""
    [acme, beta] = people
    enter(conn, ask(tag=row_of(keyring.pepper, ADA)[0]))
    enter(conn, ask(actor="officer", purpose="delivery", what="ledger export", account=acme, count=300), NOW + 1)
    enter(conn, ask(actor="officer", subject=people[beta] ^ 1, account=beta), NOW + 2)
    assert readings.consultations(conn, {people[acme]: acme}) == [
        Consultation(NOW, acme, "support", "story", 1),
        Consultation(NOW + 1, acme, "delivery", "ledger export", 300),
    ]
    assert len(readings.consultations(conn, {number: account for account, number in people.items()})) == 3


def test_p_38_over_the_limit_of_a_role_it_is_denied_and_the_line_names_nobody(
    conn: Connection, keyring: Keyring, people: dict[int, int]
) -> None:
    assert enter(conn, ask(what="contact export", account=1, count=10_000)) == Answer("over-limit")
    assert lines(conn) == [("read-denied", "reading/contact export", "support", "over-limit")]
    tag = row_of(keyring.pepper, ADA)[0]
    assert enter(conn, ask(tag=tag)).rows == 2
    assert enter(conn, ask(tag=tag)).rows == 2
    assert enter(conn, ask(tag=tag)).denied == "over-limit", "four of five today, and she is known at two"
    assert enter(conn, ask(subject=7)).rows == 1
    assert enter(conn, ask(subject=7)).denied == "over-limit"
    assert enter(conn, ask(subject=7, actor="support/11ff00ff00ff00ff")).rows == 1, "another actor"
    assert enter(conn, ask(subject=7), NOW + DAY_US).rows == 1, "another day"
    assert enter(conn, ask(actor="officer", count=10_000)).rows == 1
    assert enter(conn, ask(actor="intern")).denied == "over-limit", "a role that nobody gave a limit reads nothing"
    rows = [repr(tuple(row)) for table in (reading, chain) for row in conn.execute(select(table))]
    assert not [row for row in rows if "ada" in row.lower() or "one.example" in row]
    assert audit.verify(conn) is None


def test_p_03_a_purpose_decides(conn: Connection, keyring: Keyring, people: dict[int, int]) -> None:
    tag = row_of(keyring.pepper, ADA)[0]
    assert enter(conn, ask(purpose="market_research", tag=tag)).denied == "field-class"
    assert enter(conn, ask(purpose="market_research", field_class="C0", actor="officer", count=500)).rows == 1
    assert enter(conn, ask(purpose="for ada.lovelace@one.example", tag=tag)).denied == "unknown-purpose"
    assert enter(conn, ask(purpose="rights", field_class="C3", tag=tag)).denied == "field-class"
    assert [line[2:] for line in lines(conn)] == [
        ("market_research", "field-class"), ("unknown", "unknown-purpose"), ("rights", "field-class"),
    ]  # fmt: skip


def test_p_30_data_of_before_a_purpose_need_consent_since(
    conn: Connection, keyring: Keyring, people: dict[int, int]
) -> None:
    day = "2026-11-23"
    registry = purposes.parse(
        f'[scoring]\nsince = {day}\nbasis = "consent"\nconsent = true\nreads = ["C2"]\nwhat = "added today"\n'
        f'[audits]\nsince = {day}\nbasis = "contract"\nreads = ["C2"]\nwhat = "added today"'
    )
    since = registry.purposes["audits"].since
    [number, _] = people.values()

    def denied(purpose: str, ref: str = "") -> str:
        asked = ask(purpose=purpose, subject=number, actor="officer", legal_basis_ref=ref)
        return readings.enter(conn, asked, LIMITS, registry, since + 1).denied

    assert denied("audits") == "older-than-purpose"
    assert denied("scoring") == "no-consent"
    assert denied("scoring", "because") == "no-consent"
    assert denied("scoring", REF) == ""
    assert readings.bypasses(conn) == {REF: 1}
    assert readings.bypasses(conn, since + 2) == {}
    assert lines(conn)[-1] == ("consent-bypass", f"law/{REF}", "scoring", "done")


def test_a_purpose_people_agree_to_is_denied_for_who_does_not(
    conn: Connection, keyring: Keyring, people: dict[int, int]
) -> None:
    tag = row_of(keyring.pepper, ADA)[0]
    [one, other] = people.values()
    for number in (one, other):
        assert enter(conn, ask(purpose="mail_marketing", tag=tag)).denied == "no-consent"
        consent.record(conn, [Evidence(number, "mail_marketing", "express", "v1", "form", NOW - 5)], NOW)
    assert enter(conn, ask(purpose="mail_marketing", tag=tag)).rows == 2
    consent.withdraw(conn, other, "mail_marketing", "page", NOW)
    assert enter(conn, ask(purpose="mail_marketing", tag=tag)).denied == "no-consent"


def test_somebody_nobody_knows_is_a_row_of_nobody(conn: Connection) -> None:
    assert enter(conn, ask(tag=bytes(12))) == Answer(rows=1)
    [row] = conn.execute(select(reading)).all()
    assert (row.subject, row.account, row._mapping["count"]) == (0, 0, 0)
    assert readings.consultations(conn, {7: 1}) == []
    assert enter(conn, ask(tag=bytes(12), purpose="doe", field_class="C1")).denied == "no-consent"


@pytest.mark.parametrize(
    "change",
    [
        {"actor": "ada@one.example"}, {"actor": ""}, {"what": "story of ada@one.example"}, {"field_class": "C7"},
        {"count": -1}, {"query": b"ada@one.example"}, {"tag": bytes(12), "subject": 7},
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(conn: Connection, change: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        enter(conn, ask(**change))
    assert "ada" not in str(error.value)
    assert lines(conn) == []


def test_references_are_keyed(keyring: Keyring) -> None:
    actor = readings.actor_of(keyring, "operator", "ada")
    assert actor == readings.actor_of(keyring, "operator", "ada")
    assert actor != readings.actor_of(keyring, "operator", "bob")
    assert actor.startswith("operator/")
    assert "ada" not in actor
    assert len(readings.query_hash(keyring, "story", ADA)) == 16
    assert readings.query_hash(keyring, "a", "b") != readings.query_hash(keyring, "a\0b", "")[:15]


@pytest.fixture
async def hand(store: Engine) -> AsyncIterator[Store]:
    made = Store(store)
    yield made
    await made.close()


async def test_a_denied_read_has_its_line_before_the_answer(hand: Store) -> None:
    operations = ReadingOperations(hand, lambda: NOW, limits=LIMITS)
    assert set(handlers(operations)) == {"read_log", "bypasses"}
    assert await operations.op_read_log("support", "support", "story", count=5) == 1
    with pytest.raises(ReadDenied, match="limit of people") as error:
        await operations.op_read_log("support", "support", "story", subject=7)
    assert error.value.kind == "denied"
    assert operations.denied == 1
    assert [line[0] for line in await hand.write(lines)] == ["read-denied"]
    assert await operations.op_bypasses() == {}


def test_several_people_with_one_question_are_all_written_down_or_none(
    conn: Connection, keyring: Keyring, people: dict[int, int]
) -> None:
    """What was not shown must not stand in anybody's account of use."""

    def several(count: int) -> list[Asked]:
        return [ask(what="hold list", purpose="rights", subject=number) for number in range(1, count + 1)]

    def each(asked: list[Asked]) -> Answer:
        return readings.enter_each(conn, asked, LIMITS, purposes.registry(), NOW)

    assert each(several(3)) == Answer(rows=3)
    assert each(several(3)) == Answer("over-limit"), "three of five today, and the third of these is too many"
    assert len(conn.execute(select(reading)).all()) == 3
    assert lines(conn) == [("read-denied", "reading/hold list", "rights", "over-limit")]
    assert each(several(2)) == Answer(rows=2)
    assert each([]) == Answer()
