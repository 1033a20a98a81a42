"""P-48: whoever is reported to be a child is written to no more at once, and erased and suppressed within 72 hours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.campaign import expand
from engine.campaign.job import Recipient
from engine.message import Campaign, compile_campaign
from policy import audit, schema, vault
from policy.gate import Refusal
from policy.instants import DAY_US, HOUR_US
from policy.keys import Keyring
from tests.promises.floor import BOB, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


@promise("P-48", off={"policy.rights.states.MINOR_GRACE_US": 30 * DAY_US})
async def test_p48_a_child_reported_by_a_guardian_is_erased_within_72_hours_and_audited(floor: Floor) -> None:
    told = await floor.desk.op_rights_open("minor", BOB, channel="letter")
    assert told["due"] <= NOW + 72 * HOUR_US
    for _ in range(12):
        floor.house.now += 6 * HOUR_US
        await floor.desk.round()
    tag, _, _ = floor.house.row(BOB)
    assert await floor.write(lambda conn: vault.find(conn, floor.house.keyring, tag)) == []
    [row] = [row for row in await floor.rows(schema.erasure) if row.account]
    assert (row.cause, row.shredded <= NOW + 72 * HOUR_US) == ("minor", True)
    acts = [line.action for line in await floor.rows(schema.audit)]
    assert {"erasure-begun", "erasure-shredded", "rights-finish"} <= set(acts)
    assert await floor.write(audit.verify) is None


@promise("P-48", off={"policy.rights.protections.suppress_for_good": lambda *asked: None})
async def test_p48_nobody_writes_to_the_child_again(floor: Floor) -> None:
    await floor.asks("minor", BOB, channel="letter")
    floor.house.now += 2 * DAY_US
    await floor.desk.round()
    assert {("manual", "platform", 0), ("erasure", "platform", 0)} <= await floor.standing(BOB)


@promise("P-48", off={"policy.rights.casework.RESTRICTED_AT_ONCE": frozenset()})
async def test_p48_it_stops_with_the_report_while_the_officer_may_still_look(floor: Floor) -> None:
    await floor.desk.op_rights_open("minor", BOB, channel="mail")
    assert isinstance(await floor.gate(BOB), Refusal)
    tag, _, _ = floor.house.row(BOB)
    assert await floor.write(lambda conn: vault.number_of(conn, 1, tag)) is not None


PLAIN = Campaign(
    subject="Hello", from_address="news@shop.example", html="<p>{{ name }}: newborn clothes, wherever born</p>",
    list_id="weekly.shop.example", postal_address="1 Market Street", notice_url="https://t.example/n/x",
)  # fmt: skip


@promise("P-48", off={"engine.message.acceptance._of_birth": lambda path, source: []})
@pytest.mark.parametrize("field", ["birth_date", "dateOfBirth", "birthday", "dob", "born_on"])
def test_p48_birth_dates_are_not_taken_as_fields(keyring: Keyring, field: str) -> None:
    """A template that asks for one is refused; one that nobody asks for is dropped before anything is kept."""
    assert not isinstance(compile_campaign(PLAIN), list)
    told = compile_campaign(replace(PLAIN, html=f"<p>You are {{{{ {field} }}}}</p>"))
    assert isinstance(told, list)
    assert [problem.path for problem in told] == ["html"]
    assert "P-48" in told[0].message
    terms = expand.Terms(7, 1, 0, 0, bytes(32), expires_at=NOW * 2, columns=frozenset({"name"}))
    row = Recipient(BOB, fields={"name": "Bob", field: "2015-05-05"})
    prepared = expand.prepare(terms, keyring, 0, [row], 0, NOW)
    [person] = [one for people in prepared.people.values() for one in people]
    assert (person.columns, person.values) == (("name",), ["Bob"])
