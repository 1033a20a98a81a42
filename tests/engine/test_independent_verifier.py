"""Signatures as Perl's Mail::DKIM sees them: a second verifier, written by others in another language.

dkimpy (test_message_dkim.py) and our signer are both Python and were read side by side; what both got wrong the same
way shows here. Debian 12's Mail::DKIM verifies RSA; for Ed25519 see tests/world/verify_dkim.pl.
"""

from __future__ import annotations

import email
import email.policy
import re
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engine.message import (
    Attachment,
    Campaign,
    OpenSSLSigner,
    Program,
    compile_campaign,
    compose,
    person,
    sign_batch,
)
from policy.gate import Mode, Permit
from tests.engine.newsletter import campaign, recipient
from tests.world.mail_dkim import all_pass, opinions
from tracker.links import Links

pytestmark = pytest.mark.debian

NOW = int(time.time() * 1_000_000)  # a verifier looks at the clock: x= must lie ahead
BOTH = ["ed25519-sha256", "rsa-sha256"]
LINKS = Links({1: bytes(range(32))}, 1, "https://track.shop.example")
FIELDS = {"name": "Ægir Þórsson 👋 O'Neill", "text": "line one  \n.dot\nFrom there\n\ttab  end "}

_PLAIN = Campaign(
    subject="Your order",
    from_address="orders@shop.example",
    text="Dear {{ name }},\n\n.a dot begins this line\n{{ text }}\ntrailing spaces   \n\n\n",
    bulk=False,
)
_FULL = Campaign(
    subject="Grüße an {{ name }}: Жизнь, 生活, " + "sehr lange Überschriften " * 12,
    from_address="news@shop.example",
    from_name="Läden & Söhne “GmbH”, der lange Name eines Absenders " * 3,
    reply_to="hallo@shop.example",
    html='<p style="color:red">Grüße {{ name }} — <a href="https://shop.example/ä?a=1&amp;b=2">öffnen</a> '
    '<img src="cid:logo" alt="Logo">{{ text }} {{ postal_address }} <a href="{{ unsubscribe_url }}">ab</a></p>',
    attachments=(
        Attachment("Rechnung für Ägir – 2026.pdf", "application/pdf", bytes(range(256)) * 40),
        Attachment("ein.txt", "text/plain", b"\n"),
        Attachment("logo.png", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(600), cid="logo"),
    ),
    headers=(("X-Long", "word " * 180), ("X-Greek", "Ωμέγα " * 30)),
    list_id="die-sehr-lange-liste-der-freunde-unseres-hauses." + "unterliste." * 10 + "shop.example",
    list_label="Freunde",
    feedback_id=("1234567890", "shop", "campaign", "salespush"),
    account_name="Läden & Söhne",
    postal_address="Straße 1, Köln",
    view_url="https://track.shop.example/v/abcdef",
    notice_url="https://track.shop.example/n/abcdef",
)
_CYRILLIC = Campaign(
    subject="Новости",
    from_address="news@shop.example",
    from_name="Магазин",
    text="Здравствуйте, {{ name }}!\n\n{{ text }}\n\nОтписаться: {{ unsubscribe_url }}\n{{ postal_address }}\n",
    list_id="novosti.shop.example",
    account_name="Магазин",
    postal_address="Улица 1",
)
SHAPES = {
    "plain text, no list": (_PLAIN, Mode.OFF),
    "all of MIME, untracked": (_FULL, Mode.OFF),
    "all of MIME, tracked": (_FULL, Mode.INDIVIDUAL),
    "base64 text": (_CYRILLIC, Mode.OFF),
    "newsletter, untracked": (campaign(), Mode.OFF),
    "newsletter, tracked": (campaign(), Mode.AGGREGATE),
}
# ASCII; a quoted local part; one that only SMTPUTF8 can carry, whose To field is raw UTF-8 (RFC 6532)
ADDRESSES = ["ada@example.com", '"a b"@xn--bcher-kva.example', "пётр@example.org"]


@pytest.fixture(scope="module")
def signers() -> list[OpenSSLSigner]:
    return [
        OpenSSLSigner("shop.example", "s2026", rsa.generate_private_key(65537, 2048)),
        OpenSSLSigner("shop.example", "e2026", ed25519.Ed25519PrivateKey.generate()),
    ]


@pytest.fixture(scope="module")
def records(signers: list[OpenSSLSigner]) -> dict[str, str]:
    return {f"{one.selector}._domainkey.{one.domain}": one.public_record() for one in signers}


def written(shape: str, signers: list[OpenSSLSigner]) -> list[bytes]:
    """The shape as three people get it."""
    letter, mode = SHAPES[shape]
    program = compile_campaign(letter)
    assert isinstance(program, Program), program
    people = [
        person(
            LINKS, program, job=1 << 33, mref=number - 2, subject=number + 1, address=address,
            fields={**recipient(number), **FIELDS}, name=FIELDS["name"] if number else "", list_number=7, partition=3,
            tag=b"t" * 12, optout_domain="bounce.shop.example", mode_opens=mode, mode_clicks=mode,
        )
        for number, address in enumerate(ADDRESSES)
    ]  # fmt: skip
    unsigned = [compose(Permit(one.job, one.mref, 0.0), program, one, NOW) for one in people]
    return [message.wire for message in sign_batch(unsigned, signers)]


def test_the_verifier_agrees_with_rfc_8463() -> None:
    """The RFC's message verifies under the RFC's keys (A.2), both of them, and not when altered: it can be trusted."""
    wire = (Path(__file__).parent / "rfc8463.eml").read_bytes()
    keys = {
        "brisbane._domainkey.football.example.com": "v=DKIM1; k=ed25519; "
        "p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=",
        "test._domainkey.football.example.com": "v=DKIM1; k=rsa; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDkHlOQoBTzWR"
        "iGs5V6NpP3idY6Wk08a5qhdR6wy5bdOKb2jLQiY/J16JYi0Qvx/byYzCNb3W91y3FutACDfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqMKrM3rG4"
        "hstT5QjvHO9PzoxZyVYLzBfO2EeC3Ip3G+2kryOTIKT+l/K4w3QIDAQAB",
    }
    all_pass([wire], keys, BOTH)
    altered = [wire.replace(b"hungry", b"hungrx"), wire.replace(b"Suzie Q", b"Suzie R")]
    assert {one.result for each in opinions(altered, keys) for one in each} == {"fail"}
    assert {one.result for one in opinions([wire], {})[0]} == {"invalid"}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_verifies(shape: str, signers: list[OpenSSLSigner], records: dict[str, str]) -> None:
    wires = written(shape, signers)
    _, mode = SHAPES[shape]

    all_pass(wires, records, BOTH)
    for wire in wires:
        message = email.message_from_bytes(wire, policy=email.policy.default)
        assert message.defects == []
        text = "".join(part.get_content() for part in message.walk() if part.get_content_maintype() == "text")
        assert ("/o/" in text and "/c/" in text) == (mode is not Mode.OFF)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_flipped_bit_fails(shape: str, signers: list[OpenSSLSigner], records: dict[str, str]) -> None:
    wire = written(shape, signers)[1]
    body = wire.index(b"\r\n\r\n") + 4
    places = range(body, len(wire), max(1, (len(wire) - body) // 64))
    flipped = [_flip(wire, place, number % 8) for number, place in enumerate(places)]
    assert len(flipped) >= 64
    for found in opinions(flipped, records):
        assert {one.result for one in found} == {"fail"}
        assert {one.detail for one in found} == {"fail (body has been altered)"}

    fields = [
        (found.start(), found[0]) for found in re.finditer(rb"(?m)^\S[^:]*:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*", wire[:body])
    ]
    own = [(at, field) for at, field in fields if field.startswith(b"DKIM-Signature:")]
    others = [(at, field) for at, field in fields if (at, field) not in own]
    assert len(own) == 2
    assert len(others) >= 8
    # every field but the signatures themselves is under both signatures: nothing we write can be altered
    altered = opinions([_flip(wire, at + _letter(field), 0) for at, field in others], records)
    assert {one.result for found in altered for one in found} == {"fail"}
    for number, (at, field) in enumerate(own):
        tag = at + field.index(b" b=") + 20
        found = opinions([_flip(wire, tag, 0)], records)[0]
        assert [one.result for one in found] == (["fail", "pass"] if number == 0 else ["pass", "fail"])


def _flip(wire: bytes, place: int, bit: int) -> bytes:
    return wire[:place] + bytes([wire[place] ^ 1 << bit]) + wire[place + 1 :]


def _letter(field: bytes) -> int:
    """Where the last letter or digit of a field's value stands."""
    return max(found.start() for found in re.finditer(rb"[A-Za-z0-9]", field))
