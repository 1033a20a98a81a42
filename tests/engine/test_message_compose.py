"""One message: with leave, the same on every attempt, tracked only where agreed, and readable."""

from __future__ import annotations

import email
import email.policy
import re
from dataclasses import replace
from email.message import EmailMessage

import pytest

from engine.message import (
    Attachment,
    Campaign,
    PermitMismatch,
    Person,
    Program,
    Unwritable,
    compile_campaign,
    compose,
    person,
)
from policy.gate import Mode, Permit
from tests.engine.newsletter import campaign, recipient
from tracker.links import HitToken, Links, OptOut

DATE = 1_790_000_000_000_000
LINKS = Links({1: bytes(range(32))}, 1, "https://track.shop.example")
TAG = b"t" * 12
SERVICE = Campaign("Hi {{ name }}", "a@shop.example", html="<p>Hello {{ name }}</p>", bulk=False)


def compiled(of: Campaign) -> Program:
    program = compile_campaign(of)
    assert isinstance(program, Program), program
    return program


def somebody(program: Program, opens: Mode = Mode.OFF, clicks: Mode = Mode.OFF, mref: int = 7) -> Person:
    return person(
        LINKS, program, job=5, mref=mref, subject=99, address="joe@example.com", fields=recipient(3), list_number=3,
        partition=2, tag=TAG, optout_domain="bounce.example", mode_opens=opens, mode_clicks=clicks,
    )  # fmt: skip


def read(program: Program, who: Person) -> EmailMessage:
    unsigned = compose(Permit(who.job, who.mref, 0.0), program, who, DATE)
    message = email.message_from_bytes(unsigned.head + b"\r\n" + unsigned.body, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def page(message: EmailMessage) -> str:
    part = message.get_body(("html",))
    assert part is not None
    return str(part.get_content())


def simple(**fields: object) -> Person:
    return Person(5, 7, "joe@example.com", fields)


def test_nothing_without_leave() -> None:
    program = compiled(campaign())
    with pytest.raises(PermitMismatch):
        compose(Permit(5, 8, 0.0), program, somebody(program), DATE)
    with pytest.raises(PermitMismatch):
        compose(Permit(6, 7, 0.0), program, somebody(program), DATE)


def test_a_second_attempt_is_the_same_message() -> None:
    program = compiled(campaign())
    one = compose(Permit(5, 7, 0.0), program, somebody(program, Mode.INDIVIDUAL, Mode.AGGREGATE), DATE)
    two = compose(Permit(5, 7, 9.0), program, somebody(program, Mode.INDIVIDUAL, Mode.AGGREGATE), DATE)

    assert (one.head, one.body, one.signed, one.at) == (two.head, two.body, two.signed, two.at)
    assert one.head_hash.digest() == two.head_hash.digest()


def test_the_headers() -> None:
    program = compiled(campaign())
    message = read(program, somebody(program))
    raw = compose(Permit(5, 7, 0.0), program, somebody(program), DATE).head

    assert message["subject"] == "Person3, eleven offers for Exampleton"
    assert message["from"] == "Shop of Examples <news@shop.example>"
    assert message["to"] == "joe@example.com"
    assert message["date"] == "Mon, 21 Sep 2026 14:13:20 +0000"
    assert message["message-id"] == "<5.0000000000000007@shop.example>"
    assert message["list-id"] == '"Weekly" <weekly.shop.example>'
    assert message["list-unsubscribe-post"] == "List-Unsubscribe=One-Click"
    assert message["feedback-id"] == "1:shop:campaign:salespush"
    assert message["precedence"] == "bulk"
    token = LINKS.optout_token(3, 2, TAG)
    assert LINKS.open_optout(token) == OptOut(3, 2, TAG)
    # on the wire: one https, then mailto, folded at the comma only, never encoded (RFC 8058, mail-standards.md 2.4)
    wanted = f"List-Unsubscribe: <https://track.shop.example/u/{token}>,\r\n <mailto:u+{token}@bounce.example>\r\n"
    assert wanted.encode() in raw
    assert b"=?" not in raw
    names = [line.partition(b":")[0].lower() for line in raw.split(b"\r\n") if line and not line.startswith(b" ")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("opens", [Mode.OFF, Mode.AGGREGATE, Mode.INDIVIDUAL])
@pytest.mark.parametrize("clicks", [Mode.OFF, Mode.DELIVERABILITY, Mode.INDIVIDUAL])
def test_tracking_follows_the_modes(opens: Mode, clicks: Mode) -> None:
    """P-07: no pixel and untokened links without consent; each mode its own token (decision 12)."""
    program = compiled(campaign())
    source = page(read(program, somebody(program, opens, clicks)))
    pixels = re.findall(r"https://track\.shop\.example/o/([\w-]+)\.gif", source)
    tokens = re.findall(r"https://track\.shop\.example/c/([\w-]+)/(\d+)", source)

    assert len(pixels) == (0 if opens is Mode.OFF else 1)
    assert len(tokens) == (0 if clicks is Mode.OFF else 25)
    assert source.count('"https://shop.example/') == (25 if clicks is Mode.OFF else 0)
    for pixel in pixels:
        hit = LINKS.open_hit("open", pixel)
        assert hit is not None
        assert hit.mode is opens
        assert (hit.subject, hit.mref) == (99, 7) or opens is Mode.AGGREGATE
    for token, number in tokens:
        assert LINKS.open_hit("click", token) == HitToken(5, 7, 99, clicks)
        assert int(number) < len(program.links)
    assert "/u/" in source
    assert "/c/" not in source.partition("Unsubscribe")[0].rpartition("<a ")[2]  # opt-out links are never tracked


def test_a_mode_that_is_off_wins_over_a_token_at_hand() -> None:
    program = compiled(campaign())
    who = somebody(program, Mode.INDIVIDUAL, Mode.INDIVIDUAL)
    who.mode_opens = who.mode_clicks = Mode.OFF
    source = page(read(program, who))

    assert "/c/" not in source
    assert "/o/" not in source


def test_link_numbers_point_into_the_table() -> None:
    program = compiled(
        replace(SERVICE, html='<a href="https://a.example/?x=1&amp;y=2">1</a><a href="https://b.example/">2</a>'
                '{% if name %}<a href="https://c.example/">3</a>{% endif %}<a href="https://b.example/">4</a>')
    )  # fmt: skip
    who = simple(name="Joe")
    who.mode_clicks, who.click_base = Mode.INDIVIDUAL, "https://t.example/c/TOKEN"

    assert program.links == ["https://a.example/?x=1&y=2", "https://b.example/", "https://c.example/"]
    assert re.findall(r"TOKEN/(\d)", page(read(program, who))) == ["0", "1", "2", "1"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "name"),
        ({"name": None}, "name"),
        ({"name": "a\r\nBcc: x@y.example"}, "Subject"),
        ({"name": "a\x00"}, "Subject"),
        ({"name": "\ud800"}, "Subject"),
        ({"name": ["a"]}, "name"),
        ({"name": {"a": 1}}, "name"),
    ],
)
def test_values_that_do_not_fit(fields: dict[str, object], words: str) -> None:
    program = compiled(SERVICE)
    with pytest.raises(Unwritable, match=words) as caught:
        compose(Permit(5, 7, 0.0), program, simple(**fields), DATE)
    assert "Bcc" not in str(caught.value)


def test_a_null_is_absent_and_may_be_asked_for() -> None:
    source = '<p>{{ name|default("friend") }}{% if name %}!{% else %}?{% endif %}</p>'
    program = compiled(replace(SERVICE, subject="x", html=source))

    assert "<p>friend?</p>" in page(read(program, simple(name=None)))
    assert "<p>friend?</p>" in page(read(program, simple()))
    assert "<p>Zo&#235;!</p>" in page(read(program, simple(name="Zoë")))


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ('{{ name|replace("a", "b") }}', {}),
        ('{{ name|replace("a", "b")|upper }}', {"name": None}),
        ('{% if city %}{{ name|replace("a", "b") }}{% endif %}', {"city": "Graz"}),
        ('{{ offers|first|replace("a", "b") }}', {"offers": [None]}),
        ('{{ offers|join(", ") }}', {"offers": ["tea", None]}),
    ],
)
def test_what_is_absent_is_not_printed_by_a_filter_either(source: str, fields: dict[str, object]) -> None:
    """Two filters are ours, and said "None"."""
    program = compiled(replace(SERVICE, subject="x", html=f"<p>{source}</p>"))
    with pytest.raises(Unwritable, match="missing"):
        compose(Permit(5, 7, 0.0), program, simple(**fields), DATE)


def test_a_default_in_front_of_a_filter_is_what_it_gets() -> None:
    program = compiled(replace(SERVICE, subject="x", html='<p>{{ name|default("friend")|replace("f", "F") }}</p>'))

    assert "<p>Friend</p>" in page(read(program, simple()))


@pytest.mark.parametrize("value", [5.0, -0.0, 2.5, 1e22, float(2**62), 7, True])
def test_a_block_prints_the_same_number_alone_and_in_company(value: float) -> None:
    """By a block alone, by blocks rendered together, and by those when another value rules out the short way."""
    block, two = "{% if name %}{{ price }}{% endif %}", "{% if price %}{% endif %}{% if name %}!{% endif %}"
    shown = {
        page(read(compiled(replace(SERVICE, subject="x", html=f"<p>{source}</p>")), simple(price=value, **fields)))
        .replace("!", "")
        .rstrip()
        for source, fields in (
            (block, {"name": "Joe"}),
            (block + two, {"name": "Joe"}),
            (block + two, {"name": {"first": "Joe"}}),
        )
    }
    assert len(shown) == 1


def test_an_error_holds_no_value() -> None:
    program = compiled(
        replace(SERVICE, subject="x", html="{% if secret > 3 %}{{ secret|round }}{% endif %}{{ secret|int }}")
    )
    with pytest.raises(Unwritable) as caught:
        compose(Permit(5, 7, 0.0), program, simple(secret="joe@private.example"), DATE)

    assert "private" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://ok.example/a?b=c", True),
        ("HTTP://ok.example", True),
        ("mailto:a@b.example", True),
        ("javascript:alert(1)", False),
        (" javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("//evil.example", False),
        ("/relative", False),
        ("https://x.example/\r\n", False),
        ("java\tscript:x", False),
        ("vbscript:x", False),
    ],
)
def test_a_whole_destination_is_web_or_mail(url: str, good: bool) -> None:
    for source in ('<a href="{{ link }}">x</a>', '{% if link %}<a href="{{ link }}">x</a>{% endif %}'):
        program = compiled(replace(SERVICE, subject="x", html=source))
        if good:
            assert url.strip().lower()[:7] in page(read(program, simple(link=url))).lower().replace("&#x2f;", "/")
        else:
            with pytest.raises(Unwritable):
                compose(Permit(5, 7, 0.0), program, simple(link=url), DATE)


EVIL = "\"'><script>&/../?x=1#y z\\é"


def test_a_part_of_a_destination_stays_a_part() -> None:
    program = compiled(
        replace(SERVICE, subject="x", text="x", html='<a href="https://x.example/{{ p }}?q={{ p }}">x</a>')
    )
    source = page(read(program, simple(p=EVIL)))
    [href] = re.findall(r'href="([^"]*)"', source)

    assert re.fullmatch(r"https://x\.example/[\w%./~-]*\?q=[\w%.~-]*", href)
    with pytest.raises(Unwritable):
        who = simple(h="evil.example/")
        compose(
            Permit(5, 7, 0.0),
            compiled(replace(SERVICE, subject="x", html='<a href="https://{{ h }}.x.example">x</a>')),
            who,
            DATE,
        )


def test_values_cannot_leave_their_place() -> None:
    sources = [
        '<p title="{{ v }}">{{ v }}</p>',
        "{% if v %}<p title='{{ v }}'>{{ v }}</p>{% endif %}",
        "<b>{{ v|title }}</b>",
        "<!-- {{ v }} --><i>x</i>",
        "<title>{{ v }}</title>",
    ]
    for source in sources:
        program = compiled(replace(SERVICE, subject="x", html=source))
        made = page(read(program, simple(v=EVIL + "-->")))
        assert "<script>" not in made.lower()
        assert made.count("<") == len(re.findall("<[^%]", source))
        assert made.count(">") == source.count(">")


def test_every_shape_of_message() -> None:
    image = Attachment("logo.png", "image/png", b"\x89PNG" * 30, "logo")
    paper = Attachment("Ünïcode  paper.pdf", "application/pdf", b"%PDF" * 50)
    shapes = {
        ("text",): "text/plain",
        ("html",): "multipart/alternative",
        ("html", "text"): "multipart/alternative",
        ("text", "paper"): "multipart/mixed",
        ("html", "image"): "multipart/alternative",
        ("html", "paper"): "multipart/mixed",
        ("html", "image", "paper"): "multipart/mixed",
        ("text", "image"): "multipart/mixed",
    }
    for parts, kind in shapes.items():
        files = tuple(one for name, one in (("image", image), ("paper", paper)) if name in parts)
        of = Campaign("Hi", "a@shop.example", bulk=False, attachments=files)
        if "html" in parts:
            of = replace(of, html='<p>Hé {{ n }}<img src="cid:logo"></p>')
        if "text" in parts:
            of = replace(of, text="Hé {{ n }}")
        message = read(compiled(of), simple(n="Zoë"))
        assert message.get_content_type() == kind
        assert not message.defects
        body = message.get_body(("plain",))
        assert body is not None
        assert body.get_content().strip() == "Hé Zoë"
        if "html" in parts:
            assert "Zo&#235;" in page(message)
        names = {part.get_filename(): part.get_content() for part in message.walk() if part.get_filename()}
        assert names == {one.filename: one.content for one in files}
        for part in message.walk():
            assert not part.defects


def test_mostly_other_letters_travel_as_base64() -> None:
    text = "Здравствуйте, {{ n }}, это длинное письмо на русском языке.\n" * 5
    program = compiled(Campaign("Привет {{ n }}", "a@shop.example", from_name="Магазин", text=text, bulk=False))
    message = read(program, simple(n="Зоя"))

    assert message["content-transfer-encoding"] == "base64"
    assert message.get_content().replace("\r\n", "\n") == text.replace("{{ n }}", "Зоя").rstrip("\n")
    assert message["subject"] == "Привет Зоя"
    assert str(message["from"]) == "Магазин <a@shop.example>"


def test_a_service_message_says_so() -> None:
    message = read(compiled(SERVICE), simple(name="Joe"))

    assert message["auto-submitted"] == "auto-generated"
    assert message["precedence"] is None
    assert message["list-unsubscribe"] is None
    assert "nsubscribe" not in page(message)


def test_the_producers_own_headers() -> None:
    program = compiled(replace(SERVICE, headers=(("X-Campaign", "Frühling"), ("In-Reply-To", "<a@b.example>"))))
    message = read(program, simple(name="Joe"))

    assert message["x-campaign"] == "Frühling"
    assert message["in-reply-to"] == "<a@b.example>"
    assert "x-campaign" in program.signed.split(":")


def test_an_address_with_other_letters() -> None:
    """SMTPUTF8: an address has no ASCII form, so the header is UTF-8 there and only there (RFC 6532)."""
    who = simple(name="Joe")
    who.address, who.name = "jöe@xn--exmple-cua.example", "Jöe"
    raw = compose(Permit(5, 7, 0.0), compiled(SERVICE), who, DATE).head

    assert "To: =?utf-8?q?J=C3=B6e?= <jöe@xn--exmple-cua.example>\r\n".encode() in raw


def test_the_newsletter_is_the_size_we_say() -> None:
    program = compiled(campaign())
    unsigned = compose(Permit(5, 7, 0.0), program, somebody(program, Mode.INDIVIDUAL, Mode.INDIVIDUAL), DATE)

    assert 30_000 < len(unsigned.head) + len(unsigned.body) < 36_000
