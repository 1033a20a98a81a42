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
import enum
import html
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any, Final
from urllib.parse import quote, urlsplit

from engine.message import template
from engine.message.template import Fault, RenderError, Sort, Token


class Context(enum.Enum):
    """Where a field stands, so how it is escaped. PLAIN is the text part and the subject: not at all."""

    TEXT = "text"
    URL = "url"
    HOST = "host"
    PATH = "path"
    QUERY = "query"
    PLAIN = "plain"


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


@dataclass(slots=True)
class Layout:
    """The outcome: nodes in order, the link table, faults, and which opt-out and notice links a reader can see."""

    nodes: list[Node] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    visible: set[str] = field(default_factory=set)
    """Provided variables that stand in the open: at the top level, not in a comment, not hidden."""


PROVIDED: Final = ("unsubscribe_url", "preferences_url", "notice_url", "view_url", "postal_address")
_PROVIDED_URLS = frozenset(PROVIDED[:4])

_ADDRESS_FIELD = re.compile(
    r"(?:^|[_.\d])(?:e_?mails?|e?mail_?addr(?:ess)?(?:es)?|addr(?:ess)?(?:es)?|recipients?|rcpt|to)(?:$|[_.\d])",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def looks_like_address(name: str) -> bool:
    """{{ email }}, {{ customer.emailAddress }}, {{ addr2 }}: a field that may hold an address (P-47)."""
    return _ADDRESS_FIELD.search(_CAMEL.sub("_", name)) is not None


# ---- escapes: str in, str out; RenderError when a value cannot stand there


def escape_text(value: str) -> str:
    return html.escape(clean_text(value), quote=True)


_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_BAD_IN_URL = re.compile("[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def clean_text(value: str) -> str:
    """Controls and lone surrogates have no form in HTML or UTF-8: the replacement character says that something was."""
    return value if value.isprintable() else _CONTROLS.sub("\ufffd", value)


def _url(value: str) -> str:
    """A whole destination, or the part that begins it: http, https or mailto, nothing that could be another scheme."""
    value = value.strip(" ")
    if not value.lower().startswith(("https://", "http://", "mailto:")) or _BAD_IN_URL.search(value):
        raise RenderError("a field that begins a link is not an http, https or mailto address")
    return quote(value, safe="%/:?#[]@!$&()*+,;=~-._")


def _component(safe: str) -> Callable[[str], str]:
    def escape(value: str) -> str:
        if _CONTROLS.search(value):
            raise RenderError("a field inside a link holds control characters")
        return quote(value, safe=safe)

    return escape


_path, _query = _component("/"), _component("")


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]*", value):
        raise RenderError("a field in the host part of a link has other than letters, digits, dots and hyphens")
    return value


URL_ESCAPES: Final[dict[Context, Callable[[str], str]]] = {
    Context.URL: _url,
    Context.HOST: _host,
    Context.PATH: _path,
    Context.QUERY: _query,
}
_FILTER_NAMES: Final = {context: f"sp_{context.value}" for context in URL_ESCAPES}


def _as_filter(escape: Callable[[str], str]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        return None if value is None else escape(str(value))

    return apply


FILTERS: Final = {_FILTER_NAMES[context]: _as_filter(escape) for context, escape in URL_ESCAPES.items()}


def in_block(expression: Expression) -> str:
    """The expression's source inside a block that minijinja renders (which escapes text by itself)."""
    name = _FILTER_NAMES.get(expression.context)
    if name is None or template.simple_path(expression.source) in _PROVIDED_PATHS:
        return "{{ " + expression.source + " }}"
    return "{{ (" + expression.source + ")|" + name + " }}"


_PROVIDED_PATHS: Final[frozenset[tuple[str, ...] | None]] = frozenset((name,) for name in PROVIDED)


# ---- the walk over the markup

_ATTRIBUTE = re.compile(
    r"""[\s/]*(?P<name>[^\s/>=][^\s/>=]*)(?:\s*=\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s>"'][^\s>]*)))?"""
)
_TAG_NAME = re.compile(r"<\s*[A-Za-z][^\s/>]*")
_URL_ATTRIBUTES = frozenset(
    ("href", "src", "action", "formaction", "background", "cite", "poster", "data", "xlink:href", "longdesc", "lowsrc")
)
_NO_FIELDS = frozenset(("style", "srcdoc", "srcset", "ping", "content"))
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden|mso-hide\s*:\s*all|font-size\s*:\s*0", re.IGNORECASE)
_CONDITION = re.compile(r"\[if [^\]>]*\]>", re.IGNORECASE)
_CONDITION_END = re.compile(r"<!\[endif\]\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Value:
    """One attribute value's span in the masked source."""

    start: int
    end: int
    tag: str
    name: str
    quoted: bool
    shown: bool
    text: str


class _Walk(HTMLParser):
    """Spans of tags, attribute values and raw elements. base: where this piece begins in the whole."""

    def __init__(self, masked: str, base: int = 0, *, comment: bool = False) -> None:
        super().__init__(convert_charrefs=False)
        self.base = base
        self.comment = comment
        self.tags: list[tuple[int, int, str]] = []
        self.values: list[_Value] = []
        self.raws: list[tuple[int, int]] = []
        self.comments: list[tuple[int, int]] = []
        self.body_end: int | None = None
        self.html_end: int | None = None
        self.hidden: list[tuple[int, int]] = []
        self._hidden_tag = ""
        self._hidden_depth = 0
        self._hidden_from = 0
        self._raw_from: int | None = None
        self._lines = [0]
        self._lines += [found.end() for found in re.finditer("\n", masked)]
        self.unclosed = False
        self.feed(masked)
        if (self.rawdata.startswith("<") and self.rawdata[1:2].isalpha()) or self.rawdata.startswith("<!--"):
            self.unclosed = True
        if self._raw_from is not None:
            self.unclosed = True
        if self._hidden_tag:
            self.hidden.append((self._hidden_from, base + len(masked)))
        self.close()

    def _at(self) -> int:
        line, offset = self.getpos()
        return self.base + self._lines[line - 1] + offset

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source, start = self.get_starttag_text() or "", self._at()
        self.tags.append((start, start + len(source), tag))
        hides = self._attributes(tag, source, start)
        if tag in ("style", "script"):
            self._raw_from = start + len(source)
        if self._hidden_tag:
            if tag == self._hidden_tag:
                self._hidden_depth += 1
        elif hides and tag not in _VOID:
            self._hidden_tag, self._hidden_depth, self._hidden_from = tag, 1, start

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source, start = self.get_starttag_text() or "", self._at()
        self.tags.append((start, start + len(source), tag))
        self._attributes(tag, source, start)

    def handle_endtag(self, tag: str) -> None:
        at = self._at()
        if tag in ("style", "script") and self._raw_from is not None:
            self.raws.append((self._raw_from, at))
            self._raw_from = None
        if tag == "body":
            self.body_end = at
        elif tag == "html":
            self.html_end = at
        if tag == self._hidden_tag:
            self._hidden_depth -= 1
            if not self._hidden_depth:
                self.hidden.append((self._hidden_from, at))
                self._hidden_tag = ""

    def handle_comment(self, data: str) -> None:
        start = self._at()
        self.comments.append((start, start + len(data) + 7))
        condition = _CONDITION.match(data)
        if condition is not None and not self.comment:
            inner = _CONDITION_END.sub("", data[condition.end() :])
            walk = _Walk(inner, start + 4 + condition.end(), comment=True)
            self.tags += walk.tags
            self.values += walk.values
            self.raws += walk.raws

    def _attributes(self, tag: str, source: str, start: int) -> bool:
        """Notes the values; True when the element hides itself."""
        name_end = _TAG_NAME.match(source)
        at = name_end.end() if name_end else 1
        hides = False
        while True:
            found = _ATTRIBUTE.match(source, at)
            if found is None or found.end() == at:
                return hides
            at = found.end()
            name = found.group("name").lower()
            hides = hides or name == "hidden"
            for group in ("double", "single", "bare"):
                if found.group(group) is not None:
                    value = found.group(group)
                    hides = hides or (name == "style" and _HIDDEN.search(value) is not None)
                    span = found.span(group)
                    shown = not self.comment and not self._hidden_tag
                    self.values.append(
                        _Value(start + span[0], start + span[1], tag, name, group != "bare", shown and not hides, value)
                    )


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


def lay_out(tokens: list[Token], *, footer: Callable[[set[str]], str] | None = None) -> Layout:
    """Reads the HTML. footer: given the provided variables a reader can see, answers the source to put before the
    body's end ("" for none); it is laid out like the rest."""
    masked, spans = _mask(tokens)
    walk = _Walk(masked)
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
    _nodes(spans, walk, layout, len(masked))
    return layout


def _insertion(spans: list[_Span], walk: _Walk, end: int) -> int:
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


class _Places:
    """Spans that do not overlap, asked for the one that holds a place: a hostile template has thousands of both."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._spans = sorted(spans)
        self._starts = [start for start, _ in self._spans]

    def find(self, at: int) -> int | None:
        """Where the span begins that holds `at`."""
        index = bisect.bisect_right(self._starts, at) - 1
        return self._starts[index] if index >= 0 and at < self._spans[index][1] else None


class _Values:
    """The attribute value that holds a place."""

    def __init__(self, values: list[_Value]) -> None:
        self._places = _Places((value.start, value.end) for value in values)
        self._values = {value.start: value for value in values}

    def at(self, place: int) -> _Value | None:
        start = self._places.find(place)
        return None if start is None else self._values[start]


def _contexts(spans: list[_Span], walk: _Walk, layout: Layout) -> None:
    """Faults, and which of the provided variables a reader can see."""
    tainted = _address_like(spans)
    values, raws = _Values(walk.values), _Places(walk.raws)
    tags = _Places((start, end) for start, end, _ in walk.tags)
    comments, hidden = _Places(walk.comments), _Places(walk.hidden)
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
        if path is not None and path[0] in PROVIDED and span.depth == 0 and not in_raw and not in_tag:
            if (value is not None and value.shown and value.tag == "a" and value.name == "href") or (
                value is None and comments.find(span.start) is None and hidden.find(span.start) is None
            ):
                layout.visible.add(path[0])


def _fault(span: _Span, value: _Value | None, in_tag: bool, in_raw: bool, tainted: Collection[str]) -> Fault | None:
    line = span.token.line
    if in_raw:
        return Fault(line, "a field cannot stand in a style or script element", "put it into the text")
    if in_tag:
        return Fault(line, "a field cannot stand inside a tag outside a quoted attribute value", "quote the value")
    if value is None:
        return None
    if not value.quoted:
        return Fault(line, f"a field stands in the unquoted attribute {value.name!r}", "put quotes around the value")
    if value.name in _NO_FIELDS or value.name.startswith("on"):
        return Fault(line, f"a field cannot stand in the attribute {value.name!r}", "put it into the text")
    if value.name in _URL_ATTRIBUTES:
        return _destination_fault(span, value.text[: span.start - value.start], tainted)
    return None


def _destination_fault(span: _Span, before: str, tainted: Collection[str]) -> Fault | None:
    line = span.token.line
    before = html.unescape(before).strip().lower()
    scheme = re.match(r"[a-z][a-z0-9+.-]*:", before)
    if scheme is not None and scheme.group() not in ("http:", "https:", "mailto:", "tel:", "cid:", "sms:"):
        return Fault(line, f"a field cannot stand in a {scheme.group()} destination", "use http or https")
    if template.simple_path(span.token.text) in _PROVIDED_PATHS:
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


def _context(span: _Span, values: _Values) -> Context:
    value = values.at(span.start)
    if value is None or value.name not in _URL_ATTRIBUTES:
        return Context.TEXT
    return destination_context(html.unescape(value.text[: span.start - value.start]))


def destination_context(before: str) -> Context:
    """Which part of a destination begins where `before` ends."""
    before = before.lstrip()
    if not before:
        return Context.URL
    if "?" in before or "#" in before:
        return Context.QUERY
    authority = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//", before)
    if authority is not None and "/" not in before[authority.end() :]:
        return Context.HOST
    return Context.PATH


def trackable(value: str) -> str | None:
    """The destination of a static http or https link, as a browser would read the attribute; None for all others."""
    destination = html.unescape(value).strip()
    if not destination.lower().startswith(("http://", "https://")) or _BAD_IN_URL.search(destination):
        return None
    try:
        parts = urlsplit(destination)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return None
    return destination if host and "\\" not in destination and len(destination) <= 2_000 else None


def _nodes(spans: list[_Span], walk: _Walk, layout: Layout, end: int) -> None:
    """The tokens cut at links and at the pixel's place."""
    numbers: dict[str, int] = {}
    values = _Values(walk.values)
    texts = _Places((span.start, span.end) for span in spans if span.token.sort is Sort.TEXT)
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


# ---- the text part

_IN_TEXT_URL = re.compile(r"(?:https?://|mailto:)[^\s<>\"]*$", re.IGNORECASE)


def lay_out_text(tokens: list[Token]) -> Layout:
    """The text part or a subject: fields as they are, but percent-encoded inside a visible http address (P-47 too)."""
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
            if path is not None and path[0] in _PROVIDED_URLS | {"postal_address"} and span.depth == 0:
                layout.visible.add(path[0])
    return layout
