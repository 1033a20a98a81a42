"""Laws of bodies and of compilation: canonical by construction, valid for any input, nothing but the slots changes."""

from __future__ import annotations

import email
import email.policy
import html
import quopri
import re
from collections.abc import Sequence
from email.message import EmailMessage

import minijinja
from dkim.canonicalization import Relaxed  # type: ignore[import-untyped]  # dkimpy has no types
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.message import (
    Attachment,
    Campaign,
    Person,
    Program,
    Unsigned,
    compile_campaign,
    compose,
    mime,
    rewrite,
    template,
)
from engine.message.rewrite import Expression, Link, Literal, Pixel, Tag
from engine.message.slots import Strip
from policy.gate import Mode, Permit

WILD = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" .\t\n\r=-\u2028\x00"), max_size=300)
LINES = st.lists(
    st.sampled_from(
        ["", ".", "..", " ", "\t", "From me", "--", "a  b", "=", "=3D", "x" * 200, "é" * 60, ".\r", "\r\r\n", "a "]
    )
    | st.text(max_size=90),
    max_size=12,
).map("\n".join)
SMUGGLING = [
    "\n.\n",
    "\r.\r",
    "\r.\n",
    "\n.\r",
    "\n.\r\n",
    "\r\n.\n",
    "\r.\r\n",
    "\r\n.\r",
    "\r\n\0.\r\n",
    "\r\n.\0\r\n",
]


def check_body(body: bytes, hashed: bytes | None = None, *, longest: int = 76) -> None:
    """The law of engine.message.mime, and of engine.message.sevenbit (longest=998), by an independent canonicaliser."""
    assert body.isascii()
    assert body.endswith(b"\r\n")
    assert not body.endswith(b"\r\n\r\n")
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", body)
    assert b"\r\n." not in body
    assert not body.startswith(b".")
    assert b"\r\nFrom " not in body
    assert max(len(line) for line in body.split(b"\r\n")) <= longest
    assert Relaxed.canonicalize_body(body) == (body if hashed is None else hashed)


def compiled(campaign: Campaign) -> Program:
    program = compile_campaign(campaign)
    assert isinstance(program, Program), program
    return program


def written(program: Program, fields: dict[str, object], *, tracked: bool = False) -> tuple[bytes, EmailMessage]:
    """The body and the message as the standard library reads it; its laws are checked on the way."""
    unsigned = unsigned_of(program, fields, tracked=tracked)
    check_body(unsigned.body, unsigned.hashed, longest=998)
    message = email.message_from_bytes(unsigned.head + b"\r\n" + unsigned.body, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return unsigned.body, message


def unsigned_of(
    program: Program, fields: dict[str, object], *, tracked: bool = False, date_us: int = 1_790_000_000_000_000
) -> Unsigned:
    person = Person(5, 7, "joe@example.com", fields)
    if tracked:
        person.mode_opens = person.mode_clicks = Mode.INDIVIDUAL
        person.click_base, person.pixel_url = "https://t.example/c/TOKEN", "https://t.example/o/TOKEN.gif"
    return compose(Permit(5, 7, 0.0), program, person, date_us)


def content(message: EmailMessage, kind: str) -> str:
    for part in message.walk():
        assert not part.defects
        if part.get_content_type() == kind:
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            return payload.decode("utf-8").replace("\r\n", "\n")
    raise AssertionError(kind)


def plain(text: str | None, html_source: str | None = None, *attachments: Attachment) -> Campaign:
    return Campaign("Hello", "a@shop.example", html=html_source, text=text, bulk=False, attachments=attachments)


def as_sent(value: str) -> str:
    """What a reader finds of a value: one kind of line end, no controls."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "\ufffd", re.sub("\r\n|\r", "\n", value))


@given(WILD | LINES | st.sampled_from(SMUGGLING))
def test_any_value_leaves_a_canonical_text_body(value: str) -> None:
    body, message = written(compiled(plain("Dear {{ a }}, {{ a }}{{ a }}\n{{ a }}")), {"a": value})

    check_body(body)
    shown = as_sent(value)
    assert content(message, "text/plain") == f"Dear {shown}, {shown}{shown}\n{shown} \n"


@given(WILD | LINES | st.sampled_from(SMUGGLING))
def test_any_value_leaves_a_canonical_html_body(value: str) -> None:
    program = compiled(plain("x", '<p title="{{ a }}">{{ a }}</p>{% if a %}{{ a }}{% endif %}'))
    _, message = written(program, {"a": value}, tracked=True)

    page = content(message, "text/html")
    inside = re.search(r'<p title="(.*?)">(.*?)</p>', page, re.DOTALL)
    assert inside is not None
    assert inside.group(1) == inside.group(2)
    assert not re.search(r"[<>\"']", inside.group(1))
    # html.unescape turns some references of control characters into others, as browsers do: compare the printable
    assert html.unescape(inside.group(1)) == as_sent(value) or not value.isprintable()


@given(LINES)
def test_any_static_text_is_canonical_and_read_back(text: str) -> None:
    text = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "", text).replace("{", "")
    if not text.strip():
        return
    for campaign in (plain(text), plain(text, "<p>x</p>"), plain(text, None, Attachment("a.bin", "x/y", b"\r\n.\r\n"))):
        body, message = written(compiled(campaign), {})
        if b"Content-Transfer-Encoding: 7bit" not in body:
            check_body(body)
        assert content(message, "text/plain").rstrip("\n") == re.sub("\r\n|\r", "\n", text).rstrip("\n")


@given(
    st.binary(min_size=1, max_size=500),
    st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=60),
)
def test_any_attachment_arrives(data: bytes, name: str) -> None:
    name = name.replace("/", "_").replace("\\", "_").strip() or "x"
    _, message = written(compiled(plain("x {{ a }}", None, Attachment(name, "application/pdf", data))), {"a": "y"})

    [attachment] = message.iter_attachments()
    assert attachment.get_content() == data
    assert attachment.get_filename() == name


@given(WILD | LINES)
def test_a_slot_decodes_to_its_value(text: str) -> None:
    data = text.encode("utf-8")
    quoted = mime.quote_slot(data)

    assert quopri.decodestring(b"=\n" + quoted + b"=\n").replace(b"\r\n", b"\n") == re.sub(b"\r\n|\r", b"\n", data)
    check_body(b"x=\r\n" + quoted + b"=\r\nx\r\n")


# ---- compilation

TEXTS = ["a", " b ", "\n", "<p>", "</p>", ".", "é", "}", "'", '"', "<b>&amp;</b>", "  ", "\t", "%}", "}}"]
CONSTRUCTS = """{{ name }}
{{name|upper}}
{{ n }}
{{ who.city }}
{{- name -}}
{{ absent|default('d') }}
{# c #}
{#- c -#}
{{ '}}' }}
{{ name if n else '' }}
{% set s = name %}{{ s }}
{{ items|join('-') }}
{% raw %}{{ x }}{% endraw %}
{{ n + 1 }}
{{ {'a': name}['a'] }}""".splitlines()
PIECES = st.recursive(
    st.sampled_from(TEXTS + CONSTRUCTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        inner.map(lambda body: "{% if n %}" + body + "{% else %}no{% endif %}"),
        inner.map(lambda body: "{%- if missing -%}" + body + "{%- endif -%}"),
        inner.map(lambda body: "{% for i in items %}" + body + "{{ i }}{{ loop.index }}{% endfor %}"),
        inner.map(lambda body: "{% with w = name %}" + body + "{{ w }}{% endwith %}"),
    ),
    max_leaves=12,
)
FIELDS: dict[str, object] = {"name": "Zoë <b>&", "n": 3, "who": {"city": "X.Y"}, "items": ["p", ".q"]}


def whole(source: str, *, escape: bool) -> str:
    environment = minijinja.Environment(keep_trailing_newline=True, auto_escape_callback=lambda name: escape)
    return environment.render_str(source, "t", **FIELDS)


@given(PIECES)
def test_the_pieces_are_what_minijinja_makes_of_the_whole(source: str) -> None:
    source = "x" + source + "\nend"
    _, message = written(compiled(plain(source)), FIELDS)

    assert content(message, "text/plain").rstrip(" \n") == whole(source, escape=False).rstrip(" \n")


@given(PIECES)
def test_the_pieces_of_html_too(source: str) -> None:
    source = "<div>" + source.replace('"', "").replace("'>", ">") + "</div>"
    campaign = plain("x", source)
    _, message = written(compiled(campaign), FIELDS)

    assert html.unescape(content(message, "text/html")) == html.unescape(whole(source, escape=True))


FRAGMENTS = """<a href="https://x.example/?a=1&amp;b=2">
<a href='http://y.example/'>
<a href=https://z.example>
</a>
<A HREF = "https://x.example/?a=1&amp;b=2" >
<!--[if mso]>
<![endif]-->
<v:rect href="https://v.example/" />
<!-- c -->
<![if !mso]>
<![endif]>
<table>
<tr>
</body>
</html>
<p
>
&nbsp;
text
{{ n }}
<a href="{{ name }}">
<a href="mailto:a@b.example">
<a href="#x">
<style>a{}</style>
é
<area href="https://x.example/area">
{% if n %}
{% endif %}
<br/>
--!>
<!-->
<title>
</title>""".splitlines()
MARKUP = st.lists(st.sampled_from([*FRAGMENTS, "\n", "<a\nhref\n=\n'https://nl.example'\n>"]), max_size=14).map("".join)


def rebuilt(nodes: list[rewrite.Node], links: list[str] | None) -> str:
    pieces = []
    for node in nodes:
        if isinstance(node, Literal):
            pieces.append(node.text)
        elif isinstance(node, Link):
            pieces.append(node.original if links is None else "@")
        elif isinstance(node, Expression):
            pieces.append("{{ " + node.source + " }}")
        elif isinstance(node, Tag):
            pieces.append("{% " + node.source + " %}")
        else:
            assert isinstance(node, Pixel)
    return "".join(pieces)


@given(MARKUP)
@settings(max_examples=400)
def test_every_byte_outside_links_is_unchanged(source: str) -> None:
    layout = rewrite.lay_out(template.tokenise(source))
    if layout.faults and not layout.nodes:
        return  # ends inside a tag: refused
    assert rebuilt(layout.nodes, None) == source
    assert sum(isinstance(node, Pixel) for node in layout.nodes) == 1
    assert len(set(layout.links)) == len(layout.links)
    for node in layout.nodes:
        if isinstance(node, Link):
            assert layout.links[node.number] == html.unescape(node.original).strip()
            assert layout.links[node.number].startswith(("http://", "https://"))


@given(WILD, WILD)
def test_two_recipients_differ_in_slots_and_boundary_only(one: str, two: str) -> None:
    program = compiled(plain("Dear {{ a }}, bye", "<p>Dear {{ a }}, bye</p>"))
    first, _ = written(program, {"a": one})
    second, _ = written(program, {"a": two})
    variant = program.variant(tracked=False, pixel=False)

    for body in (first, second):
        at = 0
        for segment in variant.segments:
            if isinstance(segment, Strip):
                forms = [segment.statics]
            else:
                forms = [segment.seven.statics, segment.quoted.statics]
            ends = [end for form in forms if (end := _after(body, at, form)) is not None]
            assert len(ends) == 1  # one of the encodings, whole
            at = ends[0]


def _after(body: bytes, at: int, statics: Sequence[bytes]) -> int | None:
    for static in statics:
        found = body.find(static, at)
        if found == -1:
            return None
        at = found + len(static)
    return at
