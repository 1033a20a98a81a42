"""Rewrite: what a template's HTML is, place by place, without ever writing it anew (decision 1).

The template's constructs are masked, the standard library's html.parser walks over the rest, and everything found is
a span of the source: links, the context of each field, the place for pixel and footer. Splicing at those spans leaves
every other byte as it was (a law): every parser that re-serialises breaks template tags or Outlook markup, HTML5 ones
throw {% for %} out of tables (ecosystem.md c).

    links      href of any element but link and base, also inside <!--[if mso]> comments (VML): http and https without
               template constructs are tracked and numbered, one number per destination; mailto, tel, #, cid and
               destinations with fields stay as they are
    contexts   TEXT (also a quoted attribute), URL (a field that begins a destination: http, https, mailto only),
               HOST, PATH, QUERY (percent-encoded); elsewhere a field is refused: style, script, event handlers,
               attribute names, unquoted attributes, javascript: and other schemes
    P-47       a destination with a field that looks like an address ({{ email }}) is refused: it would tell third
               parties who clicked

Known limits: a tag split over the branches of a block is read as if all branches were there; the text part's links
are not tracked (a reader of plain text sees what they are).
"""

from __future__ import annotations

import bisect
import html
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from engine.message import contexts, template
from engine.message.contexts import (
    PROVIDED,
    PROVIDED_PATHS,
    Context,
    destination_context,
    looks_like_address,
    trackable,
)
from engine.message.markup import NO_FIELDS, URL_ATTRIBUTES, Places, Value, Values, Walk
from engine.message.template import Fault, Sort, Token


@dataclass(frozen=True, slots=True)
class Literal:
    text: str


@dataclass(frozen=True, slots=True)
class Expression:
    source: str
    context: Context


@dataclass(frozen=True, slots=True)
class Tag:
    source: str


@dataclass(frozen=True, slots=True)
class Link:
    """A tracked destination: number in the link table, original as it stands in the source."""

    number: int
    original: str


@dataclass(frozen=True, slots=True)
class Pixel:
    """Where the pixel goes, in the variants that have one."""


Node = Literal | Expression | Tag | Link | Pixel


def in_block(expression: Expression) -> str:
    """The expression's source inside a block that minijinja renders (which escapes text by itself)."""
    name = contexts.FILTER_NAMES.get(expression.context)
    if name is None or template.simple_path(expression.source) in contexts.PROVIDED_PATHS:
        return "{{ " + expression.source + " }}"
    return "{{ (" + expression.source + ")|" + name + " }}"


@dataclass(slots=True)
class Layout:
    """The outcome: nodes in order, the link table, faults, and which opt-out and notice links a reader can see."""

    nodes: list[Node] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    referable: bool = True
    """Character references can stand for every letter of the HTML that is not ASCII."""
    visible: set[str] = field(default_factory=set)
    """Provided variables that stand in the open: at the top level, not in a comment, not hidden."""


@dataclass(frozen=True, slots=True)
class _Span:
    token: Token
    start: int
    end: int
    depth: int


def _mask(tokens: list[Token]) -> tuple[str, list[_Span]]:
    """The markup with every expression as letters and every tag as a space, and where each token lies in it."""
    pieces: list[str] = []
    spans: list[_Span] = []
    at = depth = 0
    for token in tokens:
        if token.sort is Sort.TEXT:
            piece = token.text
        elif token.sort is Sort.EXPRESSION:
            piece = "xxxxxx"
        else:
            word = template.keyword(token.text)
            if word in template.CLOSING:
                depth -= 1
            piece = " "
        spans.append(_Span(token, at, at + len(piece), depth))
        if token.sort is Sort.TAG and (word in template.OPENING or template.is_block_set(token.text)):
            depth += 1
        pieces.append(piece)
        at += len(piece)
    return "".join(pieces), spans


# html.parser gives up here: it takes all that follows for text, so links and contexts behind it would go unseen.
_BROKEN_REFERENCE = re.compile(r"&#(?!(?:[0-9]+|[xX][0-9a-fA-F]+)[^0-9a-fA-F])")


def _line_at(spans: Sequence[_Span], place: int) -> int:
    """The line of the source in which this place of the masked markup lies."""
    span = next(span for span in spans if span.start <= place < span.end)
    return span.token.line + span.token.text.count("\n", 0, place - span.start)


def lay_out(tokens: list[Token], *, footer: Callable[[set[str]], str] | None = None) -> Layout:
    """Reads the HTML. footer: given the provided variables a reader can see, answers the source to put before the
    body's end ("" for none); it is laid out like the rest."""
    masked, spans = _mask(tokens)
    broken = [found.start() for found in _BROKEN_REFERENCE.finditer(masked)]
    if broken:
        message = "a character reference (&#) without its number and semicolon"
        lines = dict.fromkeys(_line_at(spans, at) for at in broken)
        return Layout(faults=[Fault(line, message, "end it with a semicolon, or write &amp;#") for line in lines])
    walk = Walk(masked)
    layout = Layout()
    if walk.unclosed:
        layout.faults.append(Fault(1, "the HTML ends inside a tag, a comment, a style or a script", "close it"))
        return layout
    _contexts(spans, walk, layout)
    if footer is not None:
        addition = footer(layout.visible)
        if addition:
            at = _insertion(spans, walk, len(masked))
            return lay_out(_insert(spans, at, template.tokenise(addition)))
    layout.referable = walk.referable(masked)
    _nodes(spans, walk, layout, len(masked))
    return layout


def _insertion(spans: list[_Span], walk: Walk, end: int) -> int:
    """Before </body>, else </html>, when that stands at the top level; else at the very end."""
    for at in (walk.body_end, walk.html_end):
        if at is not None and any(s.start <= at < s.end and s.depth == 0 and s.token.sort is Sort.TEXT for s in spans):
            return at
    return end


def _insert(spans: list[_Span], at: int, addition: list[Token]) -> list[Token]:
    tokens: list[Token] = []
    done = False
    for span in spans:
        if not done and span.start <= at < span.end:
            cut = at - span.start
            tokens += [Token(Sort.TEXT, span.token.text[:cut], span.token.line), *addition]
            tokens.append(Token(Sort.TEXT, span.token.text[cut:], span.token.line))
            done = True
        else:
            tokens.append(span.token)
    return tokens if done else [*tokens, *addition]


def _contexts(spans: list[_Span], walk: Walk, layout: Layout) -> None:
    """Faults, and which of the provided variables a reader can see."""
    tainted = _address_like(spans)
    values, raws = Values(walk.values), Places(walk.raws)
    tags = Places((start, end) for start, end, _ in walk.tags)
    comments, hidden = Places(walk.comments), Places(walk.hidden)
    for span in spans:
        if span.token.sort is Sort.TEXT:
            continue
        value = values.at(span.start)
        in_tag = value is None and tags.find(span.start) is not None
        in_raw = raws.find(span.start) is not None
        if span.token.sort is Sort.TAG:
            if in_raw and value is None and template.keyword(span.token.text) not in ("if", "elif", "else", "endif"):
                layout.faults.append(Fault(span.token.line, "only {% if %} may stand in a style or script element"))
            continue
        fault = _fault(span, value, in_tag, in_raw, tainted)
        if fault is not None:
            layout.faults.append(fault)
        path = template.simple_path(span.token.text)
        if path is None or path[0] not in PROVIDED or span.depth or in_raw or in_tag:
            continue
        if value is not None:
            seen = value.shown and value.tag == "a" and value.name == "href"
        else:
            seen = comments.find(span.start) is None and hidden.find(span.start) is None
        if seen:
            layout.visible.add(path[0])


def _fault(span: _Span, value: Value | None, in_tag: bool, in_raw: bool, tainted: Collection[str]) -> Fault | None:
    line = span.token.line
    if in_raw:
        return Fault(line, "a field cannot stand in a style or script element", "put it into the text")
    if in_tag:
        return Fault(line, "a field cannot stand inside a tag outside a quoted attribute value", "quote the value")
    if value is None:
        return None
    if not value.quoted:
        return Fault(line, f"a field stands in the unquoted attribute {value.name!r}", "put quotes around the value")
    if value.name in NO_FIELDS or value.name.startswith("on"):
        return Fault(line, f"a field cannot stand in the attribute {value.name!r}", "put it into the text")
    if value.name in URL_ATTRIBUTES:
        return _destination_fault(span, value.text[: span.start - value.start], tainted)
    return None


def _destination_fault(span: _Span, before: str, tainted: Collection[str]) -> Fault | None:
    line = span.token.line
    before = html.unescape(before).strip().lower()
    scheme = re.match(r"[a-z][a-z0-9+.-]*:", before)
    if scheme is not None and scheme.group() not in ("http:", "https:", "mailto:", "tel:", "cid:", "sms:"):
        return Fault(line, f"a field cannot stand in a {scheme.group()} destination", "use http or https")
    if template.simple_path(span.token.text) in PROVIDED_PATHS:
        return None
    if scheme is None or scheme.group() in ("http:", "https:"):
        for name in _names(span.token.text):
            if name in tainted or looks_like_address(name):
                return Fault(
                    line,
                    f"a link's destination holds the field {name!r}, which looks like an address",
                    "a destination must not tell third parties who clicked (P-47); send an opaque code instead",
                )
    return None


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")


def _names(source: str) -> list[str]:
    """Every name and dotted path of an expression, strings left out, subscripts by string kept as names."""
    subscripts = re.sub(r"\[\s*(['\"])([A-Za-z_][A-Za-z0-9_]*)\1\s*\]", r".\2", source)
    return _NAME.findall(re.sub(r"\"[^\"]*\"|'[^']*'", "", subscripts))


def _address_like(spans: list[_Span]) -> set[str]:
    """Names that {% set %}, {% for %} or {% with %} gave to something that looks like an address."""
    tainted: set[str] = set()
    for span in spans:
        if span.token.sort is not Sort.TAG or template.keyword(span.token.text) not in ("set", "for", "with"):
            continue
        names = _names(span.token.text)[1:]
        if any(looks_like_address(name) or name in tainted for name in names):
            tainted.update(names)
    return tainted - {"in", "if", "else"} - set(PROVIDED)


def _context(span: _Span, values: Values) -> Context:
    value = values.at(span.start)
    if value is None or value.name not in URL_ATTRIBUTES:
        return Context.TEXT
    return destination_context(html.unescape(value.text[: span.start - value.start]))


def _nodes(spans: list[_Span], walk: Walk, layout: Layout, end: int) -> None:
    """The tokens cut at links and at the pixel's place."""
    numbers: dict[str, int] = {}
    values = Values(walk.values)
    texts = Places((span.start, span.end) for span in spans if span.token.sort is Sort.TEXT)
    ends = {span.start: span.end for span in spans}
    cuts: dict[int, tuple[int, Link]] = {}
    for value in sorted(walk.values, key=lambda value: value.start):
        if value.name != "href" or value.tag in ("link", "base"):
            continue
        home = texts.find(value.start)
        if home is None or value.end > ends[home]:
            continue  # a construct of the template is part of the destination
        destination = trackable(value.text)
        if destination is not None:
            number = numbers.setdefault(destination, len(numbers))
            cuts[value.start] = (value.end, Link(number, value.text))
    layout.links = list(numbers)
    pixel = _insertion(spans, walk, end)
    starts = list(cuts)
    for span in spans:
        token = span.token
        if token.sort is Sort.EXPRESSION:
            layout.nodes.append(Expression(token.text, _context(span, values)))
        elif token.sort is Sort.TAG:
            layout.nodes.append(Tag(token.text))
        else:
            at = span.start
            for start in starts[bisect.bisect_left(starts, span.start) : bisect.bisect_left(starts, span.end)]:
                _literal(layout, token.text, at, start, span.start, pixel)
                at, link = cuts[start]
                layout.nodes.append(link)
            _literal(layout, token.text, at, span.end, span.start, pixel)
    if pixel >= end:
        layout.nodes.append(Pixel())


def _literal(layout: Layout, text: str, start: int, end: int, base: int, pixel: int) -> None:
    """text[start:end) as literals, with the pixel between them when its place is inside."""
    if start <= pixel < end:
        if pixel > start:
            layout.nodes.append(Literal(text[start - base : pixel - base]))
        layout.nodes.append(Pixel())
        start = pixel
    if end > start:
        layout.nodes.append(Literal(text[start - base : end - base]))


# ---- the subject and the text part


def lay_out_header(tokens: list[Token]) -> Layout:
    """A subject: fields as they are, for the writer of headers to judge."""
    layout = Layout()
    for token in tokens:
        if token.sort is Sort.TEXT:
            layout.nodes.append(Literal(token.text))
        elif token.sort is Sort.TAG:
            layout.nodes.append(Tag(token.text))
        else:
            layout.nodes.append(Expression(token.text, Context.HEADER))
    return layout


_IN_TEXT_URL = re.compile(r"(?:https?://|mailto:)[^\s<>\"]*$", re.IGNORECASE)


def lay_out_text(tokens: list[Token]) -> Layout:
    """The text part: fields as they are, but percent-encoded inside a visible http address (P-47 too)."""
    layout = Layout()
    masked, spans = _mask(tokens)
    tainted = _address_like(spans)
    for span in spans:
        token = span.token
        if token.sort is Sort.TEXT:
            layout.nodes.append(Literal(token.text))
        elif token.sort is Sort.TAG:
            layout.nodes.append(Tag(token.text))
        else:
            url = _IN_TEXT_URL.search(masked, max(0, span.start - 2_000), span.start)
            context = Context.PLAIN
            if url is not None:
                fault = _destination_fault(span, url.group(), tainted)
                if fault is not None:
                    layout.faults.append(fault)
                context = destination_context(url.group())
            layout.nodes.append(Expression(token.text, context))
            path = template.simple_path(token.text)
            if path is not None and path[0] in PROVIDED and span.depth == 0:
                layout.visible.add(path[0])
    return layout
