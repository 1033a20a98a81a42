"""What a campaign may hold: every fault named with path, line and remedy, all at once."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from engine.message import Attachment, Campaign, Problem, Program, compile_campaign, reserved
from tests.engine.newsletter import campaign

GOOD = Campaign(
    subject="Hello {{ name }}",
    from_address="news@shop.example",
    html="<html><body><p>Hello {{ name }}</p></body></html>",
    fields=frozenset({"name", "code", "email", "vip"}),
    list_id="weekly.shop.example",
    account_name="Shop & Co",
    postal_address="1 Market Street\nExampleton",
    notice_url="https://t.example/n/x",
)


def problems(**changes: object) -> list[Problem]:
    result = compile_campaign(replace(GOOD, **changes))  # type: ignore[arg-type]  # the names are checked at run time
    return result if isinstance(result, list) else []


def page(source: str) -> list[str]:
    return [problem.message for problem in problems(html=source)]


def test_a_good_campaign_is_a_program_and_the_same_again() -> None:
    program = compile_campaign(GOOD)

    assert isinstance(program, Program)
    assert compile_campaign(replace(GOOD)) is program
    assert program.required == {"name"}
    assert program.missing({"name": None, "code": "x"}) == ["name"]
    assert program.missing({"name": ""}) == []


def test_everything_wrong_is_said_at_once() -> None:
    found = problems(
        subject="{{ nmae }}",
        html="<p>{{ name|safe }}</p>\n<p {{ name }}>{% include 'x' %}{{ name.upper() }}</p>",
        text="{{ 'x' * 100000000 }}",
        headers=(("Bcc", "x"), ("X A", "y"), ("X-A", "a\r\nb"), ("X-B", "1"), ("x-b", "2"), ("X-C", "{{ name }}")),
        attachments=(Attachment("../x", "application/pdf", b"x"), Attachment("x", "message/rfc822", b"x")),
        from_address="nobody",
        from_name="a\nb",
        reply_to="a b@c",
        list_id="not dotted",
        postal_address=" ",
        feedback_id=("a b",),
    )
    paths = [problem.path for problem in found]

    for path in ("subject", "html", "text", "headers[0]", "headers[1]", "headers[2]", "headers[4]", "headers[5]"):
        assert path in paths
    for path in ("attachments[0]", "attachments[1]", "from", "from.address", "reply_to", "list", "postal_address"):
        assert path in paths
    assert "feedback_id" in paths
    assert len(found) >= 18
    [typo] = [problem for problem in found if problem.path == "subject"]
    assert typo.message == "line 1: the field 'nmae' is used, but recipients do not have it"
    assert typo.suggestion == "did you mean 'name'?"
    assert any("line 2" in problem.message and "include" in problem.message for problem in found)


def test_undeclared_fields_are_not_asked_for_when_fields_are_unknown() -> None:
    assert problems(html="<p>{{ whatever }}</p>", fields=None) == []
    assert len(problems(html="<p>{{ whatever }}</p>")) == 1


@pytest.mark.parametrize(
    "source",
    [
        '<a href="https://x.example/?u={{ email }}">x</a>',
        '<a href="https://x.example/{{ email|lower }}">x</a>',
        '<a href="{{ email }}">x</a>',
        '<a href="/x?{{ contact.emailAddress }}">x</a>',
        "<a href=\"https://x.example/?u={{ contact['e_mail'] }}\">x</a>",
        '<img src="https://x.example/p.gif?a={{ address }}">',
        '{% set code = email %}<a href="https://x.example/?u={{ code }}">x</a>',
        '{% for e in emails %}<a href="https://x.example/?u={{ e }}">x</a>{% endfor %}',
        '<!--[if mso]><v:rect href="https://x.example/?u={{ email }}"></v:rect><![endif]-->',
        '{% if vip %}<a href="https://x.example/?u={{ email }}">x</a>{% endif %}',
    ],
)
def test_a_destination_that_would_tell_who_clicked(source: str) -> None:
    """P-47: a link must not carry the reader's address to a third party."""
    found = compile_campaign(replace(GOOD, html=source, fields=None))

    assert isinstance(found, list)
    assert len(found) == 1
    assert "looks like an address" in found[0].message
    assert "P-47" in found[0].suggestion


def test_the_text_part_is_looked_at_too() -> None:
    found = problems(text="See https://x.example/?u={{ email }}")

    assert [problem.path for problem in found] == ["text"]
    assert problems(text="Your address is {{ email }}, see https://x.example/?c={{ code }}") == []
    assert problems(html="<p>Your address is {{ email }}</p>") == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("<style>a{color:{{ code }}}</style>", "style or script"),
        ("<script>var a='{{ code }}'</script>", "style or script"),
        ('<p style="color:{{ code }}">x</p>', "attribute 'style'"),
        ('<p onclick="f({{ code }})">x</p>', "attribute 'onclick'"),
        ("<p {{ code }}>x</p>", "quoted attribute value"),
        ("<p {{ code }}='x'>x</p>", "quoted attribute value"),
        ("<p title={{ code }}>x</p>", "unquoted"),
        ("<a href={{ code }}>x</a>", "unquoted"),
        ('<a href="javascript:{{ code }}">x</a>', "javascript:"),
        ('<a href="data:text/html,{{ code }}">x</a>', "data:"),
        ('<a href=" java&#115;cript:{{ code }}">x</a>', "javascript:"),
        # what stands behind these would be taken for text, whatever it is
        ('<p>a&#38a</p>\n<a href="javascript:{{ code }}">x</a>', "line 1: a character reference"),
        ('<p>a</p>\n<p>R&#D</p><script>var a="{{ code }}"</script>', "line 2: a character reference"),
        ("<p>&#{{ code }};</p>", "a character reference"),
        ("<p>&#xg;</p>", "a character reference"),
        ('<p>x</p><a href="https://x.example', "inside a tag"),
        ("<p>x</p><!-- never closed", "inside a tag"),
        ("<style>a{}", "inside a tag"),
        ("{% autoescape false %}{{ code }}{% endautoescape %}", "not available"),
        ("{% macro f() %}{% endmacro %}", "not available"),
        ("{{ code|tojson }}", "filter"),
        ("{{ debug() }}", "debug"),
        ("{{ 'VIP' if vip }}", "else"),
        ("{% for i in range(9) %}" + "x" * 40_000 + "{% endfor %}", "loop"),
        ("{{ code", "not closed"),
        ("{% if vip %}x", "syntax error"),
        ("", "empty"),
    ],
)
def test_what_html_may_not_hold(source: str, words: str) -> None:
    messages = page(source)

    assert any(words in message for message in messages), messages


def test_what_html_may_hold() -> None:
    assert (
        page(
            '<a href="https://x.example/{{ code }}?c={{ code }}#{{ code }}" title="{{ name }}">{{ name|title }}</a>'
            '<a href="mailto:{{ code }}@shop.example">m</a><a href="{{ unsubscribe_url }}">u</a>'
            "<style>{% if vip %}a{color:red}{% endif %}</style><!-- {{ name }} -->&#38;&#x26;&#38 &amp;#"
            '<td {% if vip %}class="a"{% endif %}>{% for i in range(3) %}{{ loop.index }}{% endfor %}</td>'
        )
        == []
    )


def test_control_characters_in_a_source() -> None:
    assert [p.path for p in problems(html="a\x00b", text="a\ud800b", subject="a\x1bb")] == ["subject", "html", "text"]


def test_a_subject_has_one_line() -> None:
    assert [problem.path for problem in problems(subject="a\nb")] == ["subject"]
    assert [problem.path for problem in problems(subject="")] != []


def test_a_service_message_has_no_list_to_leave() -> None:
    found = problems(bulk=False, list_id="", html='<a href="{{ unsubscribe_url }}">leave</a>')

    assert [problem.path for problem in found] == ["html"]
    assert "no list" in found[0].message
    assert problems(bulk=False, list_id="", postal_address="") == []


@pytest.mark.parametrize(
    "name", ["From", "bcc", "DKIM-Signature", "List-Unsubscribe", "Content-Type", "Return-Path", "ARC-Seal"]
)
def test_headers_that_are_ours(name: str) -> None:
    assert reserved(name)
    assert [problem.path for problem in problems(headers=((name, "x"),))] == ["headers[0]"]
    assert not reserved("X-Campaign")


def test_images_have_names_of_their_own() -> None:
    image = Attachment("a.png", "image/png", b"x", "logo")

    assert [problem.path for problem in problems(attachments=(image, image))] == ["attachments[1].cid"]
    assert problems(attachments=(Attachment("a", "image/png; x=y", b"x"),)) != []
    assert problems(attachments=(Attachment("a", "image/png", b"x", "a b"),)) != []
    assert problems(attachments=(Attachment("a", "image/png", b""),)) != []
    assert problems(attachments=(Attachment("a\r\nb", "image/png", b"x"),)) != []


def test_the_footer_says_what_is_not_said() -> None:
    """P-52: identity, postal address, opt-out, tracking choices and notice, in HTML and text, before the body's end."""
    program = compile_campaign(GOOD)
    assert isinstance(program, Program)

    for words in ("Shop &amp; Co", "1 Market Street", "Unsubscribe", "tracking choices", "https://t.example/n/x"):
        assert words in program.view_html.replace("&#x2f;", "/")
    assert program.view_html.index("Unsubscribe") < program.view_html.index("</body>")


@pytest.mark.parametrize(
    "hidden",
    [
        '<!-- <a href="{{ unsubscribe_url }}">x</a> -->',
        '<div style="display:none"><div></div><a href="{{ unsubscribe_url }}">x</a></div>',
        '<a style="display: none" href="{{ unsubscribe_url }}">x</a>',
        '{% if vip %}<a href="{{ unsubscribe_url }}">x</a>{% endif %}',
        '<img src="{{ unsubscribe_url }}">',
        '<!--[if mso]><a href="{{ unsubscribe_url }}">x</a><![endif]-->',
    ],
)
def test_a_hidden_opt_out_does_not_count(hidden: str) -> None:
    program = compile_campaign(replace(GOOD, html=f"<body>{hidden}</body>"))

    assert isinstance(program, Program)
    assert ">Unsubscribe</a>" in program.view_html


def test_a_visible_opt_out_is_enough() -> None:
    program = compile_campaign(campaign())

    assert isinstance(program, Program)
    assert program.view_html.count(">Unsubscribe</a>") == 1


def test_the_web_version_knows_nobody() -> None:
    program = compile_campaign(
        replace(
            GOOD,
            html="<p>Dear {{ name }}{% if vip %} VIP {{ name }}{% else %}, hello{% endif %} {{ code|round }}"
            '<a href="https://x.example/?c={{ code }}">x</a><a href="https://y.example/">y</a></p>',
        )
    )
    assert isinstance(program, Program)

    assert program.view_html.startswith(
        '<p>Dear , hello <a href="https://x.example/?c=">x</a><a href="https://y.example/">'
    )
    assert "{{" not in program.view_html
    assert program.links == ["https://y.example/"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ a }}" * 20_000,
        '<a href="https://x.example/1">' * 20_000,
        "<p title='" * 20_000,
        "<" * 100_000,
        "<!--" * 50_000,
        "{% if a %}" * 5_000,
        "{" * 100_000,
        "{{ " + "(" * 5_000 + ")" * 5_000 + " }}",
        "<div style='display:none'>" * 20_000,
        "{% set a = 1 %}" * 5_000 + "{{ a }}" * 2_000,
        "{#" * 50_000,
    ],
    ids=range(11),
)
def test_hostile_sources_end_soon(source: str) -> None:
    """Acceptance is not where a worker can be held: seconds here would be minutes for the others."""
    started = time.perf_counter()
    compile_campaign(replace(GOOD, html=source, text="x", fields=None))

    assert time.perf_counter() - started < 5.0
