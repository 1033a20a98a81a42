"""P-57: an objection to marketing is absolute, at once, within its sender; it suppresses and erases nothing."""

from __future__ import annotations

from policy import consent, negative, vault
from policy.consent import Evidence
from policy.gate import Permit, Refusal
from policy.instants import DAY_US
from tests.promises.floor import BOB, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


@promise("P-57", off={"policy.rights.protections.object_to_marketing": lambda *asked: None})
async def test_p57_no_mail_after_an_objection_and_other_senders_are_untouched(floor: Floor) -> None:
    assert isinstance(await floor.gate(BOB, account=1), Permit)
    told = await floor.desk.op_rights_open("objection", BOB, account="acme", channel="mail")
    assert told["state"] == "done", "nobody is asked to prove anything"
    assert isinstance(await floor.gate(BOB, account=1), Refusal)
    assert isinstance(await floor.gate(BOB, account=2), Permit)


@promise("P-57", off={"policy.rights.protections._MARKETING": ()})
async def test_p57_consent_to_marketing_and_to_profiling_ends_with_it(floor: Floor) -> None:
    """GDPR 21(2): profiling for marketing is part of it; the Delivery Optimization Engine is asked for consent too."""
    tag, _, _ = floor.house.row(BOB)
    number = await floor.write(lambda conn: vault.number_of(conn, 1, tag))
    given = Evidence(number, "doe", "express", "yes", "form", NOW - DAY_US)
    await floor.write(lambda conn: consent.record(conn, [given], NOW))
    await floor.asks("objection", BOB)
    for purpose in ("mail_marketing", "doe"):
        held = await floor.write(lambda conn, of=purpose: consent.standing(conn, [number], of, NOW + 1))
        assert held == set(), purpose
    assert await floor.write(lambda conn: negative.standing(conn, number)) == "objected"


@promise("P-57", off={"policy.rights.states.PROTECTIVE": frozenset()})
async def test_p57_it_suppresses_and_deletes_nothing(floor: Floor) -> None:
    before = await floor.person(BOB)
    told = await floor.desk.op_rights_open("objection", BOB)
    await floor.desk.round()
    assert (told["state"], told["outcome"]) == ("done", "in force")
    after = await floor.person(BOB)
    assert after.references == before.references
    assert after.subjects == before.subjects
    assert ("opt-out", "platform", 0) in await floor.standing(BOB)
