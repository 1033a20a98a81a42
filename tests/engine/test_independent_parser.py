"""Our messages as Perl's MIME::Parser reads them: a second parser, written by others in another language.

The standard library's (test_message_compose.py) is what our writer was tried with; what both understand the same wrong
way shows here. Debian 12's MIME-tools 5.510.
"""

from __future__ import annotations

import html
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from engine.message import (
    Attachment,
    Campaign,
    OpenSSLSigner,
    Person,
    Program,
    compile_campaign,
    compose,
    sign_batch,
)
from policy.gate import Permit
from tests.world.mime_tools import Part, Read, parsed

pytestmark = pytest.mark.debian

SUBJECT = (
    "To {{ name }}: caf\u00e9, \u0416\u0438\u0437\u043d\u044c, \U0001f44b " + "sehr lange \u00dcberschriften " * 12
)
TEXT = "Dear {{ name }},\n\nread  this:\n{{ text }}\n\nGoodbye, {{ name }}."
PAGE = "<p>Dear {{ name }},</p>\n    <pre>\n  two  blanks\n{{ text }}</pre>\n  <p>Goodbye, {{ name }}</p>"
PLAIN = Campaign("Hello {{ name }}", "a@shop.example", html=PAGE, text=TEXT, bulk=False)
FILES = (
    Attachment("Rechnung f\u00fcr \u00c4gir \u2013 2026.pdf", "application/pdf", bytes(range(256)) * 40),
    Attachment("dots.txt", "text/plain", b".\r\n..\nFrom me\n--=_\n" + b"y" * 2_000),
    Attachment("logo.png", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(600), cid="logo"),
)
NAMES = ("Ada", "Zo\u00eb \U0001f44b O'Neill", "\U0001f468\u200d\U0001f469\u200d\U0001f467 " * 20, "=?utf-8?q?x?=")
# texts as a producer may send them
TEXTS = {
    "plain": "nothing to encode",
    "dots": ".\n..\n.dot\nend.\n.",
    "from": "From me\n>From you\nFrom",
    "a long word": "x" * 3_000,
    "a long line": "word, " * 400 + "end",
    "long emoji": "\U0001f44b" * 400,
    "boundaries": "--=_\n--\n=_0000000000000000\n=20=\n=3D",
    "blanks": "  two  \n\ttab\t end\n \n\nlast",
    "accents": "caf\u00e9 \u2014 \u201cquoted\u201d \u20ac 5",
}
SHAPES = {
    "text and html": PLAIN,
    "text only": replace(PLAIN, html=None),
    "quoted for its own letters": replace(PLAIN, text="Gr\u00fc\u00dfe. " + TEXT),
    "base64": replace(
        PLAIN, html=None, text="\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439\u0442\u0435, " * 20 + TEXT
    ),
    "attachments": replace(PLAIN, subject=SUBJECT, html=PAGE + '<img src="cid:logo" alt="">', attachments=FILES),
}
TREES = {
    "text and html": ["multipart/alternative"],
    "text only": [],
    "quoted for its own letters": ["multipart/alternative"],
    "base64": [],
    "attachments": ["multipart/mixed", "multipart/alternative", "multipart/related"],
}


@pytest.fixture(scope="module")
def signer() -> OpenSSLSigner:
    return OpenSSLSigner("shop.example", "s", rsa.generate_private_key(65537, 2048))


def read(campaign: Campaign, people: list[dict[str, str]], signer: OpenSSLSigner) -> list[Read]:
    program = compile_campaign(campaign)
    assert isinstance(program, Program), program
    unsigned = [
        compose(
            Permit(5, number, 0.0), program, Person(5, number, "joe@example.com", {**fields}), 1_790_000_000_000_000
        )
        for number, fields in enumerate(people)
    ]
    found = parsed([message.wire for message in sign_batch(unsigned, [signer])])
    assert [one.faults for one in found] == [[]] * len(people)
    return found


def filled(template: str, fields: dict[str, str]) -> str:
    return template.replace("{{ name }}", fields["name"]).replace("{{ text }}", fields["text"])


def words(part: Part) -> str:
    """A text part as a reader shows it."""
    assert part.charset == "utf-8"
    assert b"\r" not in part.body.replace(b"\r\n", b"")
    return part.body.decode("utf-8").replace("\r\n", "\n")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_as_it_was_meant(shape: str, signer: OpenSSLSigner) -> None:
    campaign = SHAPES[shape]
    people = [{"name": name, "text": text} for name in NAMES for text in TEXTS.values()]

    for fields, message in zip(people, read(campaign, people, signer), strict=True):
        assert message.subject == filled(campaign.subject, fields).strip(" ")
        assert message.tree == TREES[shape]
        text, *others = message.parts
        assert text.type == "text/plain"
        assert campaign.text is not None
        # a quoted body ends with a line end, a part and what base64 holds with what the author wrote
        last = "\n" if text.encoding == "quoted-printable" and not message.tree else ""
        assert words(text) == filled(campaign.text, fields) + last
        if campaign.html is not None:
            page, *others = others
            assert page.type == "text/html"
            assert html.unescape(words(page)) == filled(campaign.html, fields)
        files = {part.name: part for part in others}
        assert files.keys() == {file.filename for file in campaign.attachments}
        for file in campaign.attachments:
            part = files[file.filename]
            assert part.type == file.content_type
            assert part.body == file.content
            assert (part.disposition, part.cid) == (("inline", "<logo>") if file.cid else ("attachment", ""))


def test_both_encodings_were_among_them(signer: OpenSSLSigner) -> None:
    """What this file is for: parts as 7-bit, and the same parts quoted because of a value."""
    people = [{"name": "Ada", "text": TEXTS["plain"]}, {"name": "Ada", "text": TEXTS["dots"]}]
    plain, dots = read(PLAIN, people, signer)

    assert [part.encoding for part in plain.parts] == ["7bit", "7bit"]
    assert [part.encoding for part in dots.parts] == ["quoted-printable", "quoted-printable"]
    assert [part.encoding for part in read(SHAPES["base64"], people, signer)[0].parts] == ["base64"]


def test_the_parser_sees_a_fault() -> None:
    """It is no echo: a part that is not closed, a character that is not base64."""
    broken = b'Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n--b\r\n\r\nabc\r\n'
    [found] = parsed([broken])

    assert found.faults
