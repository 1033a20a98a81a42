"""The engine over real stores: every right from receipt to its end, with its effects and its letters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert, select, update

from policy import audit, consent, halts, keyspace, negative, peppers, schema, suppression, vault
from policy.address import AddressError
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.jobs import Refused
from policy.keys import Keyring
from policy.lapsing import Lapsing
from policy.rights import carrying, requests
from policy.rights.states import ASKS, LIFT_NOTICE_US, NotPossible
from policy.schema import open_store
from policy.suppression import Scope
from tests.policy.rights.conftest import ADA, NOW, House
from tests.policy.stores import url_of

BEN = "ben@example.org"


async def standing(house: House, address: str = ADA) -> set[tuple[str, Scope, int]]:
    tag, _, _ = house.row(address)
    entries = await house.store.write(lambda conn: suppression.check(conn, tag))
    return {(one.reason, one.scope, one.scope_id) for one in entries}


async def listed(house: House, subject: int) -> str | None:
    return await house.store.write(lambda conn: negative.standing(conn, subject))


async def show(house: House, ticket: str) -> dict[str, Any]:
    return await house.desk.op_rights_show(ticket)


async def at_gate(house: House, address: str = ADA) -> bytes | None:
    tag, partition, _ = house.row(address)
    found: Any = await house.redis.hget(keyspace.suppression(partition, tag), tag)
    assert found is None or isinstance(found, bytes)
    return found


async def test_P14_receipt_restricts_acknowledges_and_starts_the_clock(house: House) -> None:
    subject = await house.knows(ADA)
    told = await house.desk.op_rights_open("erasure", ADA)
    assert (told["state"], told["identity"], told["new"]) == ("identifying", "asked", True)
    assert rfc3339(told["due"]) == "2026-12-23T00:00:00.000000Z"  # the end of 22 December, a Tuesday
    assert await standing(house) == {("restriction", Scope.PLATFORM, 0)}
    assert await at_gate(house) is not None
    assert await listed(house, subject) == "restricted"
    [receipt] = house.letters("acknowledged")
    assert f"To: {ADA}" in receipt
    assert told["ticket"] in receipt
    assert "by 2026-12-22 at the latest" in receipt
    assert "are not used" in receipt
    assert house.erased == []


async def test_P15_the_button_proves_once_and_the_worker_erases(house: House) -> None:
    await house.knows(ADA)
    told = await house.desk.op_rights_open("erasure", ADA)
    token = house.token()
    await house.desk.op_rights_confirm(token[:-1] + ("A" if token[-1] != "A" else "E"))
    assert (await show(house, told["ticket"]))["state"] == "identifying"
    await house.desk.op_rights_confirm(token)
    assert (await show(house, told["ticket"]))["identity"] == "proved"
    assert house.erased == []
    await house.desk.round()
    tag, partition, wire = house.row(ADA)
    number = await house.store.write(lambda conn: conn.execute(select(schema.request.c.number)).scalar_one())
    assert house.erased == [(0, tag, partition, wire, "request", number)]
    after = await show(house, told["ticket"])
    assert (after["state"], after["outcome"], after["address"]) == ("done", "erased", "")
    assert len(house.letters("done")) == 1
    assert await standing(house) == set()  # the restriction was ours; what stays is the erasure's own suppression
    await house.desk.op_rights_confirm(token)
    await house.desk.round()
    assert len(house.erased) == 1
    with pytest.raises(NotPossible):
        await house.desk.op_rights_refuse(told["ticket"], "too late")


async def test_only_the_hash_of_a_token_is_stored_and_it_ends_after_72_hours(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    token = house.token()
    [row] = await house.store.write(lambda conn: conn.execute(select(schema.proof)).all())
    assert len(row.hash) == 32
    assert row.expires == NOW + 72 * HOUR_US
    house.now += 72 * HOUR_US
    await house.desk.op_rights_confirm(token)
    assert (await show(house, told["ticket"]))["state"] == "identifying"


async def test_access_and_portability_hand_over_a_bundle_after_proof(house: House) -> None:
    for kind in ("access", "portability"):
        await house.desk.op_rights_open(kind, ADA)
        await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    assert house.bundled == [(ADA, False), (ADA, True)]
    assert all("Ask us for it." in text for text in house.letters("done"))
    assert await standing(house) == set()


async def test_P57_objection_is_in_force_at_once_and_erases_nothing(house: House) -> None:
    subject = await house.knows(ADA)
    told = await house.desk.op_rights_open("objection", ADA, account="acme", channel="mail")
    assert (told["state"], told["outcome"]) == ("done", "in force")
    assert await standing(house) == {("opt-out", Scope.ACCOUNT, 1)}
    assert await at_gate(house) is not None
    assert await listed(house, subject) == "objected"
    assert house.erased == []
    tag = house.row(ADA)[0]
    assert await house.store.write(lambda conn: vault.number_of(conn, 1, tag)) == subject
    [letter] = house.letters()
    assert "not used for marketing" in letter


async def test_withdrawal_of_one_purpose_leaves_the_others(house: House) -> None:
    subject = await house.knows(ADA)
    await house.desk.op_rights_open("withdrawal", ADA, details={"purpose": "open_tracking"})
    history = await house.store.write(lambda conn: consent.history(conn, subject))
    assert [(act.purpose, act.withdrawn) for act in history] == [("open_tracking", True)]
    assert await standing(house) == set()
    assert await listed(house, subject) == "withdrawn"
    await house.desk.op_rights_open("withdrawal", ADA)
    assert await standing(house) == {("opt-out", Scope.PLATFORM, 0)}
    with pytest.raises(Refused, match="unknown purpose"):
        await house.desk.op_rights_open("withdrawal", ADA, details={"purpose": "horoscopes"})


async def test_P55_a_restriction_ends_only_after_notice_and_leaves_what_stood_before(house: House) -> None:
    subject = await house.knows(ADA)
    await house.desk.op_rights_open("withdrawal", ADA, details={"purpose": "open_tracking"})
    told = await house.desk.op_rights_open("restriction", ADA)
    assert told["state"] == "done"
    assert await listed(house, subject) == "restricted"
    await house.desk.op_rights_lift(told["ticket"], "the claim is settled")
    [notice] = house.letters("lifting")
    assert "the claim is settled" in notice
    house.now += LIFT_NOTICE_US - 1
    await house.desk.round()
    assert ("restriction", Scope.PLATFORM, 0) in await standing(house)
    house.now += 1
    await house.desk.round()
    assert await standing(house) == set()
    assert await at_gate(house) is None
    assert await listed(house, subject) == "withdrawn"  # not tracked again: that was taken back long before
    before = len((await show(house, told["ticket"]))["steps"])
    await house.desk.round()
    assert len((await show(house, told["ticket"]))["steps"]) == before


async def test_lifting_brings_no_visits_back_to_whoever_does_not_agree_by_then(house: House) -> None:
    """Consent that ended while they were restricted: the list had them, so nobody added the end (policy.lapsing)."""
    ends = NOW + DAY_US
    subjects = {}
    for account, end in ((1, ends), (2, None)):
        number = subjects[account] = await house.knows(ADA, account)
        given = [consent.Evidence(number, "open_tracking", "express", "v1", "form", NOW - DAY_US, end)]
        await house.store.write(functools.partial(consent.record, rows=given, now=NOW))
    told = await house.desk.op_rights_open("restriction", ADA)
    lapsing = Lapsing(house.store, house.enforcement, lambda: house.now)
    house.now = ends
    await lapsing.look()
    assert await listed(house, subjects[1]) == "restricted"
    await house.desk.op_rights_lift(told["ticket"], "the claim is settled")
    house.now += LIFT_NOTICE_US
    await house.desk.round()
    assert await standing(house) == set()
    assert await listed(house, subjects[1]) == "withdrawn"
    assert await listed(house, subjects[2]) is None  # agrees still: nothing is kept back that need not be


async def test_a_request_opened_after_a_turn_of_the_pepper_is_under_the_chained_tag(
    house: House, store: Engine
) -> None:
    """Opened before or after, typed again or not: one person, one tag, one restriction (policy.peppers)."""
    number = await house.knows(ADA)
    before = await house.desk.op_rights_open("restriction", ADA)
    reader = open_store(url_of(house.folder), writer=False)
    assert house.keyring.folder is not None
    peppers.rotate(house.keyring.folder, store, reader, NOW)
    reader.dispose()
    house.keyring = Keyring.load(house.keyring.folder)
    assert house.keyring.pepper_id == 2
    tag = house.row(ADA)[0]
    told = await house.desk.op_rights_open("objection", ADA.upper())
    asked = select(schema.request.c.ticket, schema.request.c.tag)
    rows = await house.store.write(lambda conn: conn.execute(asked).all())
    assert {row.ticket: bytes(row.tag) for row in rows} == {before["ticket"]: tag, told["ticket"]: tag}
    assert await standing(house) == {("opt-out", Scope.PLATFORM, 0), ("restriction", Scope.PLATFORM, 0)}
    assert await listed(house, number) == "objected"
    await house.desk.op_rights_lift(before["ticket"], "the claim is settled")
    house.now += LIFT_NOTICE_US
    await house.desk.round()
    assert await standing(house) == {("opt-out", Scope.PLATFORM, 0)}


async def test_a_restriction_another_request_needs_is_not_taken_back(house: House) -> None:
    erasure = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_open("restriction", ADA)
    await house.desk.op_rights_withdraw(erasure["ticket"])
    assert await standing(house) == {("restriction", Scope.PLATFORM, 0)}


async def test_taking_back_lifts_what_the_request_brought_and_nothing_else(house: House) -> None:
    subject = await house.knows(ADA)
    tag, partition, _ = house.row(ADA)
    entry = suppression.Entry(tag, partition, Scope.PLATFORM, 0, "opt-out", NOW)
    await house.store.write(lambda conn: suppression.add(conn, [entry]))
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_withdraw(told["ticket"])
    assert await standing(house) == {("opt-out", Scope.PLATFORM, 0)}
    assert await listed(house, subject) is None
    assert len(house.letters("withdrawn")) == 1


async def test_a_restriction_from_before_survives_the_end_of_a_request(house: House) -> None:
    tag, partition, _ = house.row(ADA)
    entry = suppression.Entry(tag, partition, Scope.PLATFORM, 0, "restriction", NOW)
    await house.store.write(lambda conn: suppression.add(conn, [entry]))
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_refuse(told["ticket"], "a court forbids it")
    assert await standing(house) == {("restriction", Scope.PLATFORM, 0)}


async def test_P48_a_reported_child_is_silent_at_once_and_erased_within_72_hours(house: House) -> None:
    told = await house.desk.op_rights_open("minor", ADA, channel="letter")
    assert told["due"] == NOW + 72 * HOUR_US
    assert await standing(house) == {("restriction", Scope.PLATFORM, 0)}
    await house.desk.round()
    assert house.erased == []  # a day for the officer to look
    await house.days(1.25)
    assert [deed[4] for deed in house.erased] == ["minor"]
    assert (await show(house, told["ticket"]))["closed"] < told["due"]
    assert ("manual", Scope.PLATFORM, 0) in await standing(house)


async def test_P48_the_officer_can_have_it_done_at_once(house: House) -> None:
    told = await house.desk.op_rights_open("minor", ADA)
    await house.desk.op_rights_prove(told["ticket"], "school called")
    await house.desk.round()
    assert len(house.erased) == 1


async def test_P44_a_correction_reaches_every_place_and_is_kept_as_a_version(house: House) -> None:
    subject = await house.knows(ADA)
    told = await house.desk.op_rights_open("rectification", ADA, details={"field": "name", "value": "Ada King"})
    await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    assert house.field.amended == [("name", "Ada King")]

    def versions(conn: Connection) -> list[tuple[int, str, str, str]]:
        [person] = vault.find(conn, house.keyring, house.row(ADA)[0])
        rows = conn.execute(select(schema.rectification))
        return [
            (row.subject, row.field, row.state, carrying.open_rectified(person, row.field, row.value)) for row in rows
        ]

    assert await house.store.write(versions) == [(subject, "name", "corrected", "Ada King")]
    assert (await show(house, told["ticket"]))["outcome"] == "corrected"


async def test_P41_a_new_address_inherits_neither_consent_nor_silence(house: House) -> None:
    old = await house.knows(ADA)
    act = consent.Evidence(old, "mail_marketing", "express", "yes", "form", NOW - DAY_US)
    await house.store.write(lambda conn: consent.record(conn, [act], NOW))
    tag, partition, _ = house.row(ADA)
    entry = suppression.Entry(tag, partition, Scope.ACCOUNT, 1, "opt-out", NOW)
    await house.store.write(lambda conn: suppression.add(conn, [entry]))
    await house.desk.op_rights_open("rectification", ADA, details={"field": "address", "value": BEN})
    await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    new = await house.store.write(lambda conn: vault.number_of(conn, 1, house.row(BEN)[0]))
    assert new is not None
    assert new != old
    assert await house.store.write(lambda conn: consent.history(conn, new)) == []
    assert await standing(house, BEN) == set()
    assert await standing(house) == {("opt-out", Scope.ACCOUNT, 1), ("manual", Scope.ACCOUNT, 1)}
    assert await house.store.write(lambda conn: vault.number_of(conn, 2, house.row(BEN)[0])) is None


async def test_a_contested_fact_keeps_its_value_and_gets_a_note(house: House) -> None:
    await house.knows(ADA)
    details = {"field": "name", "contested": "says her name is Ada"}
    told = await house.desk.op_rights_open("rectification", ADA, details=details)
    await house.desk.op_rights_prove(told["ticket"])
    await house.desk.round()
    rows = await house.store.write(lambda conn: conn.execute(select(schema.rectification.c.state)).scalars().all())
    assert list(rows) == ["contested"]
    assert house.field.amended == []
    assert "put your note beside them" in house.letters("done")[0]


async def test_what_only_the_officer_can_tell_waits_for_him(house: House) -> None:
    told = await house.desk.op_rights_open("rectification", ADA, channel="letter")
    await house.desk.op_rights_prove(told["ticket"], "passport seen")
    await house.desk.round()
    assert "which field" in (await show(house, told["ticket"]))["needs"]
    assert house.desk.statistics()["rights_for_officer"] == 1
    await house.desk.op_rights_details(told["ticket"], {"field": "name", "value": "Ada"})
    await house.desk.round()
    assert (await show(house, told["ticket"]))["state"] == "done"
    await house.desk.round()
    assert house.desk.statistics()["rights_for_officer"] == 0


async def test_P21_a_hold_is_told_with_its_authority_and_the_rest_goes(house: House) -> None:
    subject = await house.knows(ADA)
    held = {"subject": subject, "reason": "claim", "authority": "Civil Code 195", "actor": "officer"}
    await house.store.write(
        lambda conn: conn.execute(insert(schema.hold).values(**held, placed=NOW, review=NOW + DAY_US))
    )
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    after = await show(house, told["ticket"])
    assert (after["outcome"], after["ground"]) == ("erased except what is held", "Civil Code 195")
    [letter] = house.letters("done")
    assert "Civil Code 195" in letter
    assert "17(3)" in letter
    assert "authority" in letter  # where to complain
    assert len(house.erased) == 1


async def test_P51_who_does_not_answer_is_asked_three_times_then_refused_before_the_due_date(house: House) -> None:
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.days(31)
    after = await show(house, told["ticket"])
    assert (after["state"], after["outcome"]) == ("refused", "not identified")
    assert after["closed"] < told["due"]
    acts = [one["act"] for one in after["steps"]]
    assert acts.count("ask") == ASKS
    assert await standing(house) == set()  # somebody else's joke does not silence anybody for ever
    assert house.erased == []


async def test_a_refusal_has_a_ground_and_says_where_to_complain(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    with pytest.raises(Refused, match="ground"):
        await house.desk.op_rights_refuse(told["ticket"], "  ")
    after = await house.desk.op_rights_refuse(told["ticket"], "manifestly excessive, the tenth this week")
    assert (after["state"], after["ground"]) == ("refused", "manifestly excessive, the tenth this week")
    [letter] = house.letters("refused")
    assert "manifestly excessive" in letter
    assert "data protection authority" in letter
    await house.desk.op_rights_confirm(house.token())
    assert (await show(house, told["ticket"]))["state"] == "refused"


async def test_P45_an_extension_comes_once_before_the_due_date_with_a_letter(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    await house.desk.op_rights_prove(told["ticket"])
    after = await house.desk.op_rights_extend(told["ticket"], "many requests at once")
    assert rfc3339(after["due"]) == "2027-02-23T00:00:00.000000Z"
    assert "many requests at once" in house.letters("extended")[0]
    with pytest.raises(Refused, match="once"):
        await house.desk.op_rights_extend(told["ticket"], "again")
    quebec = await house.desk.op_rights_open("access", BEN, jurisdiction="quebec")
    with pytest.raises(ValueError, match="no extension"):
        await house.desk.op_rights_extend(quebec["ticket"], "please")
    late = await house.desk.op_rights_open("portability", BEN)
    house.now = late["due"]
    with pytest.raises(Refused, match="over"):
        await house.desk.op_rights_extend(late["ticket"], "forgot")


async def test_the_clock_of_a_letter_starts_when_it_came(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA, channel="letter", received=NOW - 10 * DAY_US)
    assert rfc3339(told["due"]) == "2026-12-15T00:00:00.000000Z"  # 12 December is a Saturday, so Monday's end
    with pytest.raises(Refused, match="future"):
        await house.desk.op_rights_open("access", BEN, received=NOW + 1)


async def test_the_same_question_is_the_same_request_while_it_is_open(house: House) -> None:
    first = await house.desk.op_rights_open("access", ADA, channel="page")
    again = await house.desk.op_rights_open("access", "  ADA@EXAMPLE.org ", channel="mail")
    assert (again["ticket"], again["new"]) == (first["ticket"], False)
    assert len(house.letters("proof")) == 1
    await house.desk.op_rights_withdraw(first["ticket"])
    assert (await house.desk.op_rights_open("access", ADA))["new"]


async def test_strangers_can_open_only_so_many_an_hour(house: House) -> None:
    desk = house.make(strangers_per_hour=2)
    await desk.op_rights_open("access", "one@example.org", channel="page")
    await desk.op_rights_open("access", "two@example.org", channel="mail")
    with pytest.raises(Refused, match="too many"):
        await desk.op_rights_open("access", "three@example.org", channel="page")
    await desk.op_rights_open("access", "three@example.org", channel="cli")
    house.now += HOUR_US
    await desk.op_rights_open("access", "four@example.org", channel="page")


async def test_what_cannot_be_carried_out_now_is_tried_again_and_the_others_go_on(house: House) -> None:
    one = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_prove(one["ticket"])
    house.broken = RuntimeError("a mistake of ours")
    two = await house.desk.op_rights_open("rectification", BEN, details={"field": "name", "value": "Ben"})
    await house.desk.op_rights_prove(two["ticket"])
    await house.desk.round()
    assert (await show(house, one["ticket"]))["needs"] == "failed: RuntimeError"
    assert (await show(house, two["ticket"]))["state"] == "done"
    house.broken = None
    await house.desk.round()
    assert (await show(house, one["ticket"]))["state"] == "in progress"  # not at once again
    house.now += HOUR_US
    await house.desk.round()
    assert (await show(house, one["ticket"]))["state"] == "done"


async def test_a_crash_between_erasing_and_closing_is_mended_by_the_next_round(house: House) -> None:
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_prove(told["ticket"])
    asked = (await house.store.write(lambda conn: list(requests.going(conn, house.keyring))))[0][0]
    await house.desk._carrying.carry(asked, house.now)  # and then the process is gone
    assert (await show(house, told["ticket"]))["state"] == "in progress"
    house.make()
    await house.desk.round()
    assert (await show(house, told["ticket"]))["state"] == "done"
    assert len(house.letters("done")) == 1
    assert house.erased[0] == house.erased[1]  # the seam is told the same, and is idempotent by request


async def test_an_account_holder_proves_then_the_account_rests_then_it_ends(house: House) -> None:
    told = await house.desk.op_rights_open("erasure", ADA, role="holder", account="acme", channel="mail")
    assert not await house.store.write(lambda conn: halts.is_account_halted(conn, 1))  # a stranger's word pauses nobody
    await house.desk.op_rights_confirm(house.token())
    assert await house.store.write(lambda conn: halts.is_account_halted(conn, 1))
    assert not await house.store.write(lambda conn: halts.is_account_halted(conn, 2))
    await house.desk.round()
    assert (house.ended, house.erased[0][4]) == ([1], "account")
    assert (await show(house, told["ticket"]))["state"] == "done"
    with pytest.raises(Refused, match="names the account"):
        await house.desk.op_rights_open("erasure", ADA, role="holder")


async def test_an_operators_word_rests_the_account_at_receipt_and_taking_back_wakes_it(house: House) -> None:
    told = await house.desk.op_rights_open("erasure", ADA, role="holder", account="acme")
    assert await house.store.write(lambda conn: halts.is_account_halted(conn, 1))
    await house.desk.op_rights_withdraw(told["ticket"])
    assert not await house.store.write(lambda conn: halts.is_account_halted(conn, 1))


async def test_a_holders_correction_changes_the_account(house: House) -> None:
    told = await house.desk.op_rights_open(
        "rectification", ADA, role="holder", account="acme", details={"field": "postal_address", "value": "1 Main St"}
    )
    await house.desk.op_rights_prove(told["ticket"])
    await house.desk.round()
    stored = await house.store.write(
        lambda conn: conn.execute(select(schema.account.c.postal_address).where(schema.account.c.number == 1)).scalar()
    )
    assert stored == "1 Main St"


async def test_every_step_has_its_audit_line_and_none_says_who(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    await house.desk.op_rights_confirm(house.token())
    await house.desk.op_rights_note(told["ticket"], f"wrote again from {ADA}")
    await house.desk.round()
    rows = await house.store.write(lambda conn: conn.execute(select(schema.audit)).all())
    acts = [row.action for row in rows if row.action.startswith("rights-")]
    steps = (await show(house, told["ticket"]))["steps"]
    assert acts == [f"rights-{one['act']}" for one in steps]
    assert [one["act"] for one in steps] == ["open", "ask", "prove", "note", "finish"]
    assert {row.object_ref for row in rows if row.action in acts} == {"request/1"}
    assert not any("ada" in str(value).lower() for row in rows for value in row)
    assert await house.store.write(audit.verify) is None


async def test_no_list_and_no_file_name_says_who_and_the_database_is_sealed(house: House) -> None:
    await house.desk.op_rights_open("rectification", ADA, details={"field": "name", "value": "Ada"})
    assert "ada" not in str(await house.desk.op_rights_list()).lower()
    assert "ada" not in str(await house.desk.op_rights_letters()).lower()
    assert "ada" not in str(house.desk.statistics()).lower()
    rows = await house.store.write(
        lambda conn: [*conn.execute(select(schema.request)), *conn.execute(select(schema.request_step))]
    )
    assert not any(b"ada" in value.lower() for row in rows for value in row if isinstance(value, bytes))
    [row] = await house.store.write(lambda conn: conn.execute(select(schema.request)).all())

    def swap(conn: Connection) -> None:
        conn.execute(update(schema.request).values(ticket="R-2222222222"))

    await house.store.write(swap)
    with pytest.raises(ValueError, match="does not open"):  # bound to its ticket
        await house.desk.op_rights_show("R-2222222222")
    assert row.address


async def test_what_is_wrong_is_refused_and_leaves_nothing(house: House) -> None:
    with pytest.raises(Refused, match="unknown kind"):
        await house.desk.op_rights_open("revenge", ADA)
    with pytest.raises(AddressError):
        await house.desk.op_rights_open("access", "nobody")
    with pytest.raises(Refused, match="no such account"):
        await house.desk.op_rights_open("access", ADA, account="nowhere")
    with pytest.raises(Refused, match="no request"):
        await house.desk.op_rights_show("R-AAAAAAAAAA")
    assert await house.desk.op_rights_list(open_only=False) == []
    assert house.letters() == []
    assert not house.desk.outbox.has_drafts


async def test_numbers_for_the_operator(house: House) -> None:
    await house.desk.op_rights_open("access", ADA, jurisdiction="ccpa")
    late = await house.desk.op_rights_open("portability", ADA, channel="letter", received=NOW - 60 * DAY_US)
    await house.desk.round()
    numbers = house.desk.statistics()
    assert (numbers["rights_open"], numbers["rights_overdue"], numbers["rights_letters_waiting"]) == (2, 1, 4)
    assert numbers["rights_oldest_seconds"] == 60 * 86_400
    told = {one["ticket"]: one["overdue"] for one in await house.desk.op_rights_list()}
    assert told[late["ticket"]]
    assert sum(told.values()) == 1
