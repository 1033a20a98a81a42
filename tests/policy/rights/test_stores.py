"""Letters and unsorted mail as places of personal data: found, told, erased, and nobody else's touched."""

from __future__ import annotations

from policy.personal import Erased, Person, Premises
from policy.rights.mailbox import UNSORTED, MailIntake
from policy.rights.stores import build
from tests.policy.rights.conftest import ADA, NOW, House


def somebody(house: House, address: str) -> Person:
    tag, partition, _ = house.row(address)
    return Person(tag, partition, "lane", address=address)


async def test_letters_count_as_left_until_they_are_gone(house: House) -> None:
    premises = Premises(house.settings, house.store, house.redis, lambda: house.keyring, lambda: house.now)
    letters, _ = build(premises)
    told = await house.desk.op_rights_open("access", ADA)
    await house.desk.op_rights_open("objection", "ben@example.org")
    ada = somebody(house, ADA)
    assert await letters.find(ada) == 2
    records = await letters.export(ada)
    assert {(one.kind, one.values["ticket"]) for one in records} == {("letter", told["ticket"])}
    assert await letters.erase(ada) == Erased(0, 2)
    for waiting in house.desk.outbox.waiting():
        assert await house.desk.op_rights_letter_sent(waiting.name)
        assert not await house.desk.op_rights_letter_sent(waiting.name)
    assert await letters.erase(ada) == Erased()
    assert not await house.desk.op_rights_letter_sent("../policy.db")


async def test_unsorted_mail_of_a_person_goes_and_others_stay(house: House) -> None:
    premises = Premises(house.settings, house.store, house.redis, lambda: house.keyring, lambda: house.now)
    _, mail = build(premises)
    intake = MailIntake(house.desk, [], house.folder / UNSORTED, lambda: house.now)
    for sender in (ADA, ADA.upper(), "ben@example.org", "not an address"):
        raw = f"From: {sender}\r\nSubject: hello\r\n\r\nhow are you?\r\n".encode()
        assert await intake.take(raw, NOW) == "unsorted"
    ada, ben = somebody(house, ADA), somebody(house, "ben@example.org")
    assert (await mail.find(ada), await mail.find(ben)) == (2, 1)
    assert [one.values["text"] for one in await mail.export(ben)] == ["how are you?"]
    assert await mail.erase(ada) == Erased(2)
    assert await mail.erase(ada) == Erased()
    assert (await mail.find(ben), len(list((house.folder / UNSORTED).glob("*.eml")))) == (1, 2)
