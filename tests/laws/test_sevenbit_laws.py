"""Laws of 7-bit parts: what an author wrote arrives unchanged, whatever the values; what is hashed is what is sent."""

from __future__ import annotations

import base64
import email
import email.policy
import html
import quopri
import re
import time
from collections.abc import Callable
from email.message import EmailMessage
from html.parser import HTMLParser

import dkim  # type: ignore[import-untyped]  # dkimpy has no types
import minijinja
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from dkim.canonicalization import Relaxed  # type: ignore[import-untyped]
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.message import (
    Attachment,
    Campaign,
    OpenSSLSigner,
    Program,
    compile_campaign,
    contexts,
    sevenbit,
    sign_batch,
    template,
)
from engine.message.renderer import Renderer, RenderError, all_plain, may_trust
from engine.message.slots import Section
from tests.laws.test_message_laws import as_sent, check_body, compiled, content, unsigned_of

LONG = "y" * 985
STATIC = st.sampled_from(
    [
        "a",
        "b c",
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\n  ",
        "\t",
        "\t\n",
        ".",
        "\n.",
        "\n..x",
        "From ",
        "\nFrom me",
        "\nrom ",
        "m ",
        "=",
        "_",
        "=_",
        "--=_",
        "0" * 26,
        "=3D",
        "é",
        "😀",
        "--",
        "}",
        "&amp;",
        LONG,
        "\n" + LONG + "\n",
    ]
)
SLOTS = st.sampled_from(
    [
        "{{ a }}",
        "{{ b }}",
        "{{ a }}{{ b }}",
        "{{ a|upper }}",
        "{{ b|default('d') }}",
        "{% if a %}\n  <i>{{ a }}</i> \n{% endif %}",
        "{% if b %}{{ b }}{% endif %}",
        "{% for i in c %}\n{{ i }}{% endfor %}",
        "{% for i in c %}\t{{ i }} \n{% endfor %}",
        "{% if a %}\n.x\n{% endif %}",
        "{% if missing %}x{% endif %}",
        "{{ '' }}",
    ]
)
SOURCES = st.lists(STATIC | SLOTS, min_size=1, max_size=14).map("".join)
VALUES = st.sampled_from(
    [
        "",
        " ",
        "x",
        "x y",
        "x  y",
        " x",
        "x ",
        ".",
        "..",
        "From ",
        "From",
        "Fro",
        "F",
        "=",
        "_",
        "=_",
        "=_" + "0" * 26,
        "--=_00000000000000070000000005",
        "=_00000000000000070000000005a",
        "\n",
        "\n.\n",
        "\r\n.\r\n",
        "a\rb",
        "x\ny",
        "\n.",
        "\t",
        "é",
        "Zoë",
        "😀",
        "z" * 998,
        "z" * 999,
        "w " * 700,
        "<b>&'\"",
        "\x00",
        "\x7f",
        "\u2028",
    ]
) | st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Cn"]), max_size=40
)  # a reference to \x80 or U+FFFE is read as another


def whole(source: str, values: dict[str, object], *, escape: bool) -> str:
    environment = minijinja.Environment(keep_trailing_newline=True, auto_escape_callback=lambda name: escape)
    return environment.render_str(source, "t", **values)


def shown(text: str) -> str:
    return html.unescape(as_sent(text))


DECODERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"7bit": bytes,
    b"quoted-printable": quopri.decodestring,
    b"base64": base64.b64decode,
}


def parts(head: bytes, body: bytes) -> dict[str, str]:
    """A second reader, by the letter of RFC 2046 5.1 and RFC 2045 6: type to text, nothing of the library's parser."""
    field = re.search(rb"(?im)^Content-Type: ([^;\r]+)(?:;\s*boundary=\"([^\"]+)\")?", head)
    assert field is not None
    kind, boundary = field[1].decode("ascii"), field[2]
    if not kind.startswith("multipart/"):
        encoding = re.search(rb"(?im)^Content-Transfer-Encoding: (\S+)", head)
        assert encoding is not None
        return {kind: DECODERS[encoding[1]](body).decode("utf-8", "replace").replace("\r\n", "\n")}
    assert boundary is not None
    pieces = re.split(rb"(?:\A|\r\n)--" + re.escape(boundary) + rb"(?:--)?(?=\r\n)", body)
    assert (pieces[0], pieces[-1]) == (b"", b"\r\n")
    found: dict[str, str] = {}
    for piece in pieces[1:-1]:
        inner, _, rest = piece.partition(b"\r\n\r\n")
        found |= parts(inner.removeprefix(b"\r\n") + b"\r\n", rest)
    return found


def both_parts(source: str) -> Program | None:
    """Compiled with the source as HTML and as text, None when it is refused."""
    program = compile_campaign(
        Campaign("Hi", "a@shop.example", html="<p>" + source + "</p>", text="t" + source, bulk=False)
    )
    return program if isinstance(program, Program) else None


@given(SOURCES, VALUES, VALUES, st.lists(VALUES, max_size=3))
@example("{{ a }}", "\u00e9 ", "", [])
@example("{{ a }}\n", "\r", "", [])
@example("\n{{ a }}.", "", "", [])
@example("\n{% if a %}x\n{% endif %}{{ b }}.", "x", "", [])
@example("x {{ a }} \n{{ a }}", "", "", [])
@example("{% for i in c %}{{ i }} {% endfor %} {{ b }}", "", "", ["q"])
@example("={{ a }}_00000000000000070000000005a\n", "", "", [])
@example("\n--{{ a }}00000000000000070000000005a\n", "=_", "", [])
@example("\n--{{ a }}{{ b }}00000000000000070000000005a\n", "=", "_", [])
@settings(max_examples=600)
def test_what_was_written_arrives_and_what_is_hashed_is_canonical(source: str, a: str, b: str, c: list[str]) -> None:
    program = both_parts(source)
    if program is None:
        return
    values: dict[str, object] = {"a": a, "b": b, "c": c}
    unsigned = unsigned_of(program, values)
    check_body(unsigned.body, unsigned.hashed, longest=998)
    message = email.message_from_bytes(unsigned.head + b"\r\n" + unsigned.body, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    one, two, *rest = [re.sub("\r\n|\r", "\n", value) for value in (a, b, *c)]  # one kind of line end
    lines: dict[str, object] = {"a": one, "b": two, "c": rest}
    text, page = content(message, "text/plain"), content(message, "text/html")

    assert parts(unsigned.head, unsigned.body) == {"text/plain": text, "text/html": page}
    assert as_sent(text) == as_sent(whole("t" + source, lines, escape=False))
    assert shown(page) == shown(whole("<p>" + source + "</p>", lines, escape=True))


@given(st.text(st.sampled_from(" \t\r\nab.="), max_size=60))
def test_the_long_way_is_dkimpys(text: str) -> None:
    body = re.sub("\r\n|\r|\n", "\r\n", text).encode("ascii") + b"x\r\n"
    assert sevenbit.relaxed_body(body) == Relaxed.canonicalize_body(body)


# ---- which parts travel so

LETTER = """<html><body>
  <p>Dear {{ name }},</p>
    <pre>  two
  spaces </pre>
  {% if vip %}
    <p>You are {{ name }}.</p>
  {% endif %}
  <p title="caf\u00e9">caf\u00e9 {{ city }}</p>
</body></html>
"""


def encodings(program: Program, **fields: object) -> dict[str, str]:
    unsigned = unsigned_of(program, fields)
    message = email.message_from_bytes(unsigned.head + b"\r\n" + unsigned.body, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return {part.get_content_type(): str(part["content-transfer-encoding"]) for part in message.iter_parts()}


def letter(html_source: str = LETTER, text: str = "Dear {{ name }} of {{ city }}") -> Program:
    return compiled(Campaign("Hi", "a@shop.example", html=html_source, text=text, bulk=False))


def test_only_the_part_that_does_not_fit_is_quoted() -> None:
    program = letter()
    plain, other = {"name": "Joe", "vip": True, "city": "X"}, "Zo\u00eb"

    assert encodings(program, **plain) == {"text/plain": "7bit", "text/html": "7bit"}
    assert encodings(program, **{**plain, "name": other}) == {"text/plain": "quoted-printable", "text/html": "7bit"}
    for hostile in ("a\nb", "a  b", " a", "\x01", "x" * 999, "=_a"):
        assert encodings(program, **{**plain, "name": hostile})["text/html"] == "quoted-printable", hostile


@pytest.mark.parametrize(
    ("source", "seven"),
    [
        ("<style>\n.a{}</style><p>x</p>", False),
        ("<style>\n .a{}</style><p>x</p>", True),
        ("<p>\nFrom here</p>", False),
        ("<p>" + "x" * 991 + "</p>", True),
        ("<p>" + "x" * 992 + "</p>", False),
        ("<p>" + "x" * 900 + "{{ name }}</p>", False),
        ("<p>=_" + "0" * 26 + "</p>", False),
        ("<style>a:after{content:'\u00e9'}</style>", False),
        ("<script>'\u00e9'</script>", False),
        ("<!-- \u00e9 --><p>x</p>", False),
        ("<!--[if mso]><p title='\u00e9'>\u00e9</p><![endif]-->", True),
        ("<!--[if mso]><style>\u00e9</style><![endif]-->", False),
        ("<p \u00e9=1>x</p>", False),
        ("<p title=\u00e9\u00e9>x</p>", True),
        ("<p>\x80</p>", False),
        ("<!DOCTYPE \u00e9><p>x</p>", False),
        ("<noscript>\u00e9</noscript>", False),
        ("<title>\u00e9</title><textarea>\u00e9</textarea>", True),
    ],
)
def test_which_html_travels_as_it_is(source: str, seven: bool) -> None:
    found = encodings(letter(source), name="Joe", city="X")

    assert found["text/html"] == ("7bit" if seven else "quoted-printable")


class Events(HTMLParser):
    """What a reader sees: tags, attributes, text and comments, with references resolved where HTML resolves them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[object] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.found.append(("text", data))

    def handle_comment(self, data: str) -> None:
        condition = data.startswith("[if")  # Outlook reads the inside as HTML
        self.found.append(("comment", Events(data.partition(">")[2]).found if condition else data))

    def handle_decl(self, decl: str) -> None:
        self.found.append(("declaration", decl))


MARKUP = st.lists(
    st.sampled_from(
        [
            "<p>",
            "</p>",
            "<p title='é &amp'>",
            '<a href="https://x.example/é?ü">',
            "<i é>",
            "<style>",
            "</style>",
            "<script>",
            "</script>",
            "<!--",
            "-->",
            "<!--[if mso]>",
            "<![endif]-->",
            "é",
            "😀",
            "&",
            "&#38",
            "&amp",
            ";",
            "<textarea>",
            "</textarea>",
            "<title>",
            "</title>",
            "\x85",
            "\xa0",
            "a",
            " ",
            "<b a=é\xa0é>",
            "<!x é>",
        ]
    ),
    min_size=1,
    max_size=10,
).map("".join)


@given(MARKUP)
@example("<![endif]-->&#38a<b a=\u00e9\u00a0\u00e9>")
@example("<!--[if mso]><!--[if mso]><b a=\u00e9\u00a0\u00e9>-->")
@settings(max_examples=500)
def test_a_reference_is_read_as_the_letter(source: str) -> None:
    program = both_parts(source)
    if program is None:
        return
    unsigned = unsigned_of(program, {})
    sent = parts(unsigned.head, unsigned.body)["text/html"]

    assert Events(sent).found == Events("<p>" + source + "</p>").found


def test_attachments_and_images_around_a_seven_bit_part() -> None:
    files = (Attachment("a.bin", "application/x-y", b"\r\n.\r\n"), Attachment("l.png", "image/png", b"\x89PNG", "logo"))
    program = compiled(Campaign("Hi", "a@shop.example", html=LETTER, text="{{ name }}", bulk=False, attachments=files))
    unsigned = unsigned_of(program, {"name": "Joe", "city": "Y", "vip": True})
    message = email.message_from_bytes(unsigned.head + b"\r\n" + unsigned.body, policy=email.policy.default)
    assert isinstance(message, EmailMessage)

    check_body(unsigned.body, unsigned.hashed, longest=998)
    assert unsigned.hashed is not None
    assert "    <pre>  two\n  spaces </pre>\n" in content(message, "text/html")
    assert [part.get_content() for part in message.walk() if part.get_filename() == "a.bin"] == [b"\r\n.\r\n"]
    assert sum(isinstance(segment, Section) for segment in program.variant(tracked=False, pixel=False).segments) == 2


# ---- signed

NOW = int(time.time() * 1_000_000)  # a verifier looks at the clock
SIGNER = OpenSSLSigner("shop.example", "s", rsa.generate_private_key(65537, 2048))


@given(VALUES, VALUES)
@settings(max_examples=60, deadline=None)
def test_dkimpy_verifies_whatever_the_values(name: str, city: str) -> None:
    unsigned = unsigned_of(letter(), {"name": name, "city": city, "vip": len(city) % 2 == 0}, date_us=NOW)
    [message] = sign_batch([unsigned], [SIGNER])

    def record(domain: bytes, timeout: int = 0) -> bytes:
        return SIGNER.public_record().encode("ascii")

    assert dkim.verify(message.wire, dnsfunc=record)
    altered = message.wire.replace(b"two", b"twp")
    assert not dkim.verify(altered, dnsfunc=record)


# ---- rendering without a look at every value

TRUSTED = st.lists(
    st.sampled_from(
        [
            "{{ a }}",
            "{{ b }}",
            "{{ c }}",
            "{{ n }}",
            "{{ missing }}",
            "{{ missing|default('d') }}",
            "{{ a|upper }}",
            "{{ c|first }}",
            "{% if missing %}x{% endif %}",
            "{% for i in c %}{{ i }},{% endfor %}",
            "{% for i in missing %}x{% endfor %}",
            "{{ a|title }}",
            "{{ c|length }}",
            "{{ a.b }}",
            "{{ none }}",
            "{{ a ~ missing }}",
            "{{ n + 1 }}",
            "{{ f }}",
            "{{ t }}",
            "x",
            "{{ a|e }}",
            "{{ c|last|trim }}",
            "{{ {'k': none}['k'] }}",
            "{{ missing|upper }}",
            "{{ 'x' if missing else a }}",
        ]
    ),
    max_size=5,
).map("".join)


@given(TRUSTED, st.text(max_size=8), st.lists(st.text(max_size=4) | st.none(), max_size=3), st.integers() | st.none())
def test_trusting_is_the_same_or_nothing(source: str, a: str, c: list[str | None], n: int | None) -> None:
    values: dict[str, object] = {"a": a, "b": "<&>", "c": c, "n": n, "f": -15, "t": True}
    if not may_trust(source) or not all_plain(values):
        return
    renderer = Renderer(contexts.FILTERS)
    name, trusting = renderer.add(source, html=True), renderer.add_trusting(source)
    found = renderer.render_trusting(trusting, values)
    if found is None:
        return
    try:
        wanted = renderer.render(name, values, html=True)
    except RenderError:
        wanted = "refused"
    assert found == wanted


def test_trust_is_not_given_away() -> None:
    assert may_trust("{% if a %}{{ a|upper }}{% endif %}")
    for source in ("{{ none }}", "{{ a|min }}", "{{ (a)|sp_url }}", "{% set x = Null %}"):
        assert not may_trust(source)
    assert all_plain({"a": "x", "b": [1, "y", True]})
    holding: list[object] = [None, [None], {}, [[1]], 5.0, [2.5]]  # floats: a finalizer gets 5.0 as 5
    for value in holding:
        assert not all_plain({"a": value})
    renderer = Renderer(contexts.FILTERS)
    assert renderer.render_trusting(renderer.add_trusting("a{{ missing }}"), {}) is None
    assert renderer.render_trusting(renderer.add_trusting("a{{ b }}"), {"b": "c"}) == "ac"
    assert "upper" in template.filters_used("{{ a | upper }}")
