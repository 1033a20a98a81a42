"""P-07, rendered: who agreed to mail alone gets no pixel and links without a token, whatever the campaign asks for."""

from __future__ import annotations

import re
from typing import Any

from engine.campaign import expand, people
from engine.campaign.expand import Terms
from engine.campaign.job import Evidence, Purpose, Recipient
from engine.message import Person
from policy.events import Reason
from policy.gate import Mode
from policy.instants import SECOND_US
from policy.keys import Keyring
from policy.wire import Resolved
from tests.engine.newsletter import campaign
from tests.engine.test_message_compose import compiled, page, read, somebody
from tests.promises.marks import promise

NOW = 1_795_000_000 * SECOND_US
WORD = Evidence(source="form", time="2026-03-01T10:00:00Z", wording="v2")


def _expanded(keyring: Keyring, *purposes: Purpose) -> list[people.Person]:
    """Somebody with these consents, in a campaign that needs consent and asks for individual tracking."""
    terms = Terms(
        job=5, account=1, list_number=3, topic_number=0, job_key=b"k" * 32, expires_at=NOW + 3600 * SECOND_US,
        needs_consent=True, opens=Mode.INDIVIDUAL, clicks=Mode.INDIVIDUAL,
    )  # fmt: skip
    row = Recipient("joe@example.com", consent=dict.fromkeys(purposes, WORD))
    prepared = expand.prepare(terms, keyring, 1, [row], 0, NOW)
    facts = {question.partition: bytes([Reason.NONE]) for question in expand.questions(terms, keyring, prepared)}
    permitted = expand.decide(terms, prepared, facts, {}, 1.0)
    expand.number(permitted, [Resolved(99, 200)] * len(permitted))
    return permitted


def _rendered(one: people.Person) -> str:
    program = compiled(campaign())
    who: Person = somebody(program, Mode(one.opens), Mode(one.clicks))
    return page(read(program, who))


def _agreed(person: Any, purpose: str, standing: Any) -> bool:
    return True


@promise("P-07", off={"engine.campaign.expand._agreed": _agreed})
def test_p07_consent_to_mail_alone_renders_no_pixel_and_plain_links(keyring: Keyring) -> None:
    [one] = _expanded(keyring, "mail_marketing")
    source = _rendered(one)
    assert re.findall(r"https://track\.shop\.example/[oc]/", source) == []
    assert source.count('"https://shop.example/') == 25
    [other] = _expanded(keyring, "mail_marketing", "open_tracking")
    assert len(re.findall(r"https://track\.shop\.example/o/", _rendered(other))) == 1
    assert "/c/" not in _rendered(other), "two purposes, two consents"


@promise("P-07", off={"engine.campaign.expand._agreed": _agreed})
def test_p07_without_consent_to_mail_there_is_no_message(keyring: Keyring) -> None:
    assert _expanded(keyring, "open_tracking", "click_tracking") == []
