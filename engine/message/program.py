"""Program: a campaign compiled once, so that a recipient costs joins (decision 1).

    1 check        every fault of every template, header and attachment, all at once, with path and suggestion
    2 lay out      links numbered, contexts known, footer added where the law's lines are missing (P-52)
    3 cut          the top level into static text and slots; a {% block %} or a filtered expression is one slot
    4 encode       static text as quoted-printable that is its own canonical form; slots isolated by soft line breaks
    5 variants     with and without pixel, with and without tracked links: four bodies, each a list of byte strings
                   and slot numbers, made when first needed

Law: two recipients' messages differ only in slots, boundary and their own headers; the slots of one variant are
evaluated once each, however often they stand in the text. A part that is mostly not ASCII is one base64 slot, since
base64 cannot be spliced.

`compile_campaign` answers a Program or every Problem; the last 64 programs are kept by content.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from operator import itemgetter
from typing import Any, Final

from engine.message import derive, headers, mime, rewrite, template
from engine.message.mime import SOFT, Attachment
from engine.message.rewrite import Context, Expression, Layout, Link, Literal, Node, Pixel, Tag
from engine.message.template import MissingField, Renderer, RenderError, Token

MAX_ATTACHMENTS: Final = 20 * 1024 * 1024  # octets in all before base64; large providers refuse 25 MB on the wire
BOUNDARY_LENGTH: Final = 28
_BOUNDARY_MARK = "=_" + "B" * (BOUNDARY_LENGTH - 2)


@dataclass(frozen=True, slots=True)
class Campaign:
    """What is to be written, as plain values. Nothing here is trusted.

    fields: the names recipients have, or None when unknown; bulk: a campaign (list headers, footer) as against
    transactional mail; list_id: "weekly.shop.example" (RFC 2919, without brackets), "" for none;
    view_url, notice_url: the job's public pages, "" while the job has no number yet; feedback_id: at most four words.
    """

    subject: str
    from_address: str
    from_name: str = ""
    reply_to: str = ""
    html: str | None = None
    text: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    attachments: tuple[Attachment, ...] = ()
    fields: frozenset[str] | None = None
    bulk: bool = True
    list_id: str = ""
    list_label: str = ""
    feedback_id: tuple[str, ...] = ()
    account_name: str = ""
    postal_address: str = ""
    view_url: str = ""
    notice_url: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a campaign. path: "html", "headers[2]"; the message says where and what, never a recipient's data."""

    path: str
    message: str
    suggestion: str = ""


@dataclass(slots=True)
class Frame:
    """One recipient's values while its message is made. click: the base of tracked links; all URLs ASCII."""

    values: dict[str, Any]
    boundary: bytes
    click: str = ""
    pixel: str = ""


Source = Callable[[Frame], bytes]
Words = Callable[[Frame], str]
_Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One body. order picks static strings and slot values, in the order of the wire, from statics + values."""

    statics: tuple[bytes, ...]
    sources: tuple[Source, ...]
    order: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]

    def body(self, frame: Frame) -> bytes:
        return b"".join(self.order((*self.statics, *[source(frame) for source in self.sources])))


@dataclass(slots=True)
class _Part:
    """Static text and slots of one part; a slot is found again by its key."""

    _added: list[str | _Key] = field(default_factory=list)

    def add(self, piece: str | _Key) -> None:
        self._added.append(piece)

    @property
    def pieces(self) -> list[str | _Key]:
        """Neighbouring texts joined, empty ones gone."""
        pieces: list[str | _Key] = []
        for is_text, group in itertools.groupby(self._added, lambda piece: isinstance(piece, str)):
            if is_text:
                joined = "".join(map(str, group))
                pieces += [joined] if joined else []
            else:
                pieces += group
        return pieces


class Program:
    """A compiled campaign. `compose` is its one caller on the hot path.

    links: the link table, by number; view_html: the web version without any personal data or tracking;
    required: fields that a recipient must have (printed whatever the other values are);
    static_head, signed, head_hash: the headers that never change, the DKIM h= list, and SHA-256 over the canonical
    form of those headers so far.
    """

    def __init__(self, campaign: Campaign, page: Layout | None, text: Layout, subject: Layout) -> None:
        self.links: list[str] = page.links if page is not None else []
        self.listed = bool(campaign.list_id)
        self.domain = campaign.from_address.rpartition("@")[2]
        self._campaign = campaign
        self._constants = {
            "postal_address": campaign.postal_address,
            "view_url": campaign.view_url,
            "notice_url": campaign.notice_url,
        }
        self._page, self._text = page, text
        self._renderer = Renderer(rewrite.FILTERS)
        self._words: dict[_Key, Words] = {}
        self._sources: dict[_Key, Source] = {}
        self._variants: dict[tuple[bool, bool], Variant] = {}
        self._required: set[str] = set()
        self._subject = self._cut(subject.nodes, html_part=False, tracked=False, pixel=False).pieces
        self._variants[False, False] = self._variant(tracked=False, pixel=False)
        self._heads()
        self.required: frozenset[str] = frozenset(self._required)
        self.view_html = self._view() if page is not None else ""

    # ---- used by compose

    def variant(self, *, tracked: bool, pixel: bool) -> Variant:
        if self._page is None:
            tracked = pixel = False
        tracked = tracked and bool(self.links)
        variant = self._variants.get((tracked, pixel))
        if variant is None:
            variant = self._variants[tracked, pixel] = self._variant(tracked=tracked, pixel=pixel)
        return variant

    def subject(self, frame: Frame) -> bytes:
        """The Subject field of one recipient, b"" when it is among the static headers."""
        if not self._subject_varies:
            return b""
        words = [piece if isinstance(piece, str) else self._words[piece](frame) for piece in self._subject]
        return headers.unstructured("Subject", "".join(words))

    def content_type(self, boundary: bytes) -> bytes:
        """The Content-Type field, b"" when it is among the static headers (a single part)."""
        return self._type_before + boundary + self._type_after if self._type_before else b""

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        """The required fields that a recipient lacks: asked at expansion, so that nobody is refused only at the wire."""
        return [name for name in self.required if fields.get(name) is None]

    # ---- cutting

    def _cut(self, nodes: list[Node], *, html_part: bool, tracked: bool, pixel: bool) -> _Part:
        part = _Part()
        preamble, preamble_names = "", set[str]()
        at = 0
        while at < len(nodes):
            node = nodes[at]
            if isinstance(node, Tag):
                end = _block_end(nodes, at)
                source = "".join(_block_source(inner, tracked) for inner in nodes[at:end])
                at = end
                if template.keyword(node.source) == "set":
                    preamble += source
                    preamble_names |= template.assigned(node.source)
                    continue
                if template.names_used(source) & preamble_names:
                    source = preamble + source
                part.add(self._rendered(source, html_part=html_part, context=None))
                continue
            at += 1
            if isinstance(node, Literal):
                part.add(node.text)
            elif isinstance(node, Link):
                if tracked:
                    part.add(self._slot(("click",), lambda frame: frame.click, html_part))
                    part.add(f"/{node.number}")
                else:
                    part.add(node.original)
            elif isinstance(node, Pixel):
                if pixel:
                    part.add('<img src="')
                    part.add(self._slot(("pixel",), lambda frame: frame.pixel, html_part))
                    part.add('" width="1" height="1" alt="" style="display:block;border:0;width:1px;height:1px">')
            else:
                self._expression(part, node, html_part, preamble, preamble_names)
        return part

    def _expression(self, part: _Part, node: Expression, html_part: bool, preamble: str, set_names: set[str]) -> None:
        path = template.simple_path(node.source)
        if path is not None and path[0] not in set_names:
            if len(path) == 1 and path[0] in self._constants:
                constant = self._constants[path[0]]
                part.add(rewrite.escape_text(constant) if html_part else constant)
                return
            if path[0] not in rewrite.PROVIDED:
                self._required.add(path[0])
            part.add(self._direct(path, node.context, html_part))
            return
        source = "{{ " + node.source + " }}"
        if template.names_used(source) & set_names:
            source = preamble + source
        part.add(self._rendered(source, html_part=html_part, context=node.context))

    def _direct(self, path: tuple[str, ...], context: Context, html_part: bool) -> _Key:
        """A field printed as it is: no template runs."""
        name, provided = path[0], path[0] in rewrite.PROVIDED
        escape = _escape(Context.TEXT if provided and html_part else Context.PLAIN if provided else context, html_part)

        def one(frame: Frame) -> str:
            value = frame.values.get(name)
            if type(value) is not str:
                value = _printable(value, name)
            return escape(value)

        def deep(frame: Frame) -> str:
            value: Any = frame.values
            for step in path:
                value = value.get(step) if isinstance(value, dict) else None
            return escape(_printable(value, ".".join(path)))

        return self._slot(("field", path, context, html_part), one if len(path) == 1 else deep, html_part)

    def _rendered(self, source: str, *, html_part: bool, context: Context | None) -> _Key:
        """A block (context None) or an expression with filters, rendered by minijinja from its own source."""
        key = ("rendered", source, context, html_part)
        if key in self._words:
            return key
        escapes_itself = html_part and context in (None, Context.TEXT)
        name = self._renderer.add(source, html=escapes_itself)
        escape = str if context is None or escapes_itself else _escape(context, html_part)
        references = html_part and re.search(r"<style|<script", source, re.IGNORECASE) is None
        constants = self._constants

        def render(frame: Frame) -> str:
            context_values = {**frame.values, **constants, "sp_click": frame.click}
            return escape(self._renderer.render(name, context_values, html=escapes_itself))

        return self._slot(key, render, references)

    def _slot(self, key: _Key, words: Words, references: bool) -> _Key:
        """Keeps a slot as text (for headers and base64) and quoted-printable. references: what is not ASCII becomes
        character references, which HTML reads everywhere but in style and script."""
        if key not in self._words:
            self._words[key] = words
            if references:
                self._sources[key] = lambda frame: mime.quote_slot(words(frame).encode("ascii", "xmlcharrefreplace"))
            else:
                self._sources[key] = lambda frame: mime.quote_slot(words(frame).encode("utf-8", "replace"))
        return key

    def _keep(self, key: _Key, source: Source) -> _Key:
        self._sources.setdefault(key, source)
        return key

    # ---- encoding and structure

    def _variant(self, *, tracked: bool, pixel: bool) -> Variant:
        """The whole body as static byte strings and sources, in order, then packed for one join."""
        wire: list[bytes | Source] = []
        campaign = self._campaign
        text = self._cut(self._text.nodes, html_part=False, tracked=False, pixel=False)
        inline = [attachment for attachment in campaign.attachments if attachment.cid is not None]
        loose = [attachment for attachment in campaign.attachments if attachment.cid is None]
        if self._page is None and not campaign.attachments:
            self._encoding, body = self._text_part(text, alone=True)
            wire += body
        else:
            letters = iter("abc")
            outer = next(letters)
            parts = [mime.attachment_part(attachment) for attachment in loose]
            content: list[bytes | Source] = self._with_head(text)
            if self._page is not None:
                page = self._cut(self._page.nodes, html_part=True, tracked=tracked, pixel=pixel)
                alternative = next(letters) if loose else outer
                branch: list[bytes | Source] = [
                    mime.part_head("text/html", (("charset", "utf-8"),), "quoted-printable"),
                    *_quoted(page.pieces, self._sources),
                ]
                if inline:
                    related = next(letters)
                    branch = self._multi(related, [branch, *([mime.attachment_part(image)] for image in inline)])
                    branch.insert(0, self._inner_head("multipart/related", related, (("type", "text/html"),)))
                content = self._multi(alternative, [content, branch])
                if loose:
                    content.insert(0, self._inner_head("multipart/alternative", alternative, ()))
            elif inline:
                parts += [mime.attachment_part(image) for image in inline]
            wire += self._multi(outer, [content, *([part] for part in parts)]) if parts else content
            wire.append(b"\r\n")
        return _pack(wire)

    def _with_head(self, text: _Part) -> list[bytes | Source]:
        encoding, content = self._text_part(text, alone=False)
        return [mime.part_head("text/plain", (("charset", "utf-8"),), encoding), *content]

    def _inner_head(self, kind: str, letter: str, extra: tuple[tuple[str, str], ...]) -> Source:
        before, after = _boundary_field(kind, letter, extra)
        return self._sources[
            self._keep(("head", kind, letter), lambda frame: before + frame.boundary + after + b"\r\n")
        ]

    def _multi(self, letter: str, parts: list[list[bytes | Source]]) -> list[bytes | Source]:
        """Parts between boundaries; ends without a line end."""
        mark = self._sources[self._keep(("boundary",), lambda frame: frame.boundary)]
        tail = letter.encode("ascii")
        wire: list[bytes | Source] = []
        for number, part in enumerate(parts):
            wire += [b"\r\n--" if number else b"--", mark, tail + b"\r\n", *part]
        return [*wire, b"\r\n--", mark, tail + b"--"]

    def _text_part(self, part: _Part, *, alone: bool) -> tuple[str, list[bytes | Source]]:
        """Transfer encoding and content. alone: the part is the whole body, which must end with exactly one CRLF."""
        pieces = part.pieces
        if alone:
            if pieces and isinstance(pieces[-1], str):
                pieces[-1] = pieces[-1].rstrip("\n") or " "
            else:
                pieces.append(" ")  # an empty last slot would leave an empty last line, which is not canonical
        static = "".join(piece for piece in pieces if isinstance(piece, str)).encode("utf-8")
        if sum(1 for byte in static if byte > 126) * 6 > len(static):
            return "base64", self._base64(pieces, alone)
        return "quoted-printable", [*_quoted(pieces, self._sources), *([b"\r\n"] if alone else [])]

    def _base64(self, pieces: list[str | _Key], alone: bool) -> list[bytes | Source]:
        parts = [piece if isinstance(piece, str) else self._words[piece] for piece in pieces]

        def encode(frame: Frame) -> bytes:
            words = [part if isinstance(part, str) else part(frame) for part in parts]
            data = mime.unify_line_ends("".join(words)).replace("\n", "\r\n").encode("utf-8")
            lines = mime.base64_lines(data)
            return lines if alone else lines.removesuffix(b"\r\n")

        if all(isinstance(piece, str) for piece in pieces):
            return [encode(Frame({}, b""))]
        return [self._sources[self._keep(("base64", alone), encode)]]

    # ---- headers

    def _heads(self) -> None:
        campaign = self._campaign
        fixed = [headers.mailbox("From", [(campaign.from_name, campaign.from_address)])]
        if campaign.reply_to:
            fixed.append(headers.mailbox("Reply-To", [("", campaign.reply_to)]))
        self._subject_varies = any(not isinstance(piece, str) for piece in self._subject)
        if not self._subject_varies:
            fixed.append(headers.unstructured("Subject", "".join(map(str, self._subject))))
        fixed.append(headers.structured("MIME-Version", "1.0"))
        self._type_before = self._type_after = b""
        has_files = any(attachment.cid is None for attachment in campaign.attachments)
        if self._page is None and not campaign.attachments:
            fixed.append(headers.parameters("Content-Type", "text/plain", [("charset", "utf-8")]))
            fixed.append(headers.structured("Content-Transfer-Encoding", self._encoding))
        else:
            kind = "multipart/mixed" if has_files or self._page is None else "multipart/alternative"
            self._type_before, self._type_after = _boundary_field(kind, "a", ())
        if self.listed:
            fixed.append(headers.structured("List-Id", _list_id(campaign)))
            fixed.append(headers.structured("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"))
        if campaign.feedback_id:
            fixed.append(headers.structured("Feedback-ID", ":".join(campaign.feedback_id)))
        fixed.append(
            headers.structured("Precedence", "bulk")
            if campaign.bulk
            else headers.structured("Auto-Submitted", "auto-generated")
        )
        fixed += [headers.unstructured(name, value) for name, value in campaign.headers]
        self.static_head = b"".join(fixed)
        names = [one.partition(b":")[0].decode("ascii").lower() for one in fixed]
        names += ["subject"] if self._subject_varies else []
        names += ["date", "to", "message-id"]
        names += ["content-type"] if self._type_before else []
        names += ["list-unsubscribe"] if self.listed else []
        self.signed = ":".join([*names, *OVERSIGNED])
        self.head_hash = sha256(b"".join(headers.relaxed(one) for one in fixed))

    # ---- the web version

    def _view(self) -> str:
        """The page as anybody may see it: no fields, no links with a person in them, no tracking."""
        assert self._page is not None
        renderer = Renderer(rewrite.FILTERS, strict=False)
        context = {**self._constants, "unsubscribe_url": "#", "preferences_url": "#", "view_url": "#"}
        shown: list[str] = []
        nodes, at = self._page.nodes, 0
        preamble = ""
        while at < len(nodes):
            end = _block_end(nodes, at) if isinstance(nodes[at], Tag) else at + 1
            source = "".join(_block_source(node, tracked=False) for node in nodes[at:end])
            first = nodes[at]
            at = end
            if isinstance(first, Tag) and template.keyword(first.source) == "set":
                preamble += source
            elif isinstance(first, Literal | Link):
                shown.append(first.text if isinstance(first, Literal) else first.original)
            elif not isinstance(first, Pixel):
                try:
                    shown.append(renderer.render(renderer.add(preamble + source, html=True), context, html=True))
                except RenderError:
                    continue  # it cannot be shown without a recipient's values
        return "".join(shown)


# RFC 6376 5.4.2 and mail-standards.md 2.3: one instance more than there is, so that none can be added
OVERSIGNED: Final = (
    "from", "reply-to", "subject", "date", "to", "cc", "content-type", "mime-version",
    "list-unsubscribe", "list-unsubscribe-post",
)  # fmt: skip

# names that are ours, the transport's, or would forge what others say about the message (S-13)
RESERVED: Final = frozenset(
    "from sender reply-to to cc bcc subject date message-id mime-version return-path received delivered-to "
    "dkim-signature domainkey-signature authentication-results arc-seal arc-message-signature "
    "arc-authentication-results auto-submitted precedence feedback-id cfbl-address cfbl-feedback-id "
    "x-original-to x-envelope-to errors-to apparently-to disposition-notification-to return-receipt-to".split()
)
_RESERVED_PREFIXES = ("content-", "list-", "resent-", "arc-", "received-")


def reserved(name: str) -> bool:
    """Is this header not the producer's to set?"""
    return name.lower() in RESERVED or name.lower().startswith(_RESERVED_PREFIXES)


def compile_campaign(campaign: Campaign) -> Program | list[Problem]:
    """The compiled campaign, or everything that is wrong with it. Pure; the same campaign gives the same object."""
    result = _compile(campaign)
    return result if isinstance(result, Program) else list(result)


@functools.lru_cache(maxsize=64)
def _compile(campaign: Campaign) -> Program | list[Problem]:
    problems = [*_head_problems(campaign), *_attachment_problems(campaign)]
    known = None if campaign.fields is None else campaign.fields | set(rewrite.PROVIDED)
    sources: dict[str, list[Token]] = {}
    for path, source in (("subject", campaign.subject), ("html", campaign.html), ("text", campaign.text)):
        if source is None:
            continue
        if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", source):
            problems.append(Problem(path, "control characters or lone surrogates", "remove them"))
            continue
        source = mime.unify_line_ends(source)
        faults = template.check(source, known)
        problems += [_problem(path, fault) for fault in faults]
        if not faults:
            sources[path] = template.tokenise(source)
            problems += _listless(campaign, path, source)
    if campaign.html is None and campaign.text is None:
        problems.append(Problem("html", "there is neither html nor text", "give at least one"))
    for path in ("html", "text"):
        if (campaign.html if path == "html" else campaign.text) is not None and path in sources and not sources[path]:
            problems.append(Problem(path, "is empty", "leave it out, or write something"))
    page = _lay_out_page(campaign, sources, problems)
    text = _lay_out_text(campaign, sources, problems)
    subject = rewrite.lay_out_text(sources.get("subject", []))
    if any("\n" in node.text for node in subject.nodes if isinstance(node, Literal)):
        problems.append(Problem("subject", "has more than one line", "write it in one"))
    if problems or text is None:
        return problems
    try:
        return Program(campaign, page, text, subject)
    except (headers.HeaderError, template.TemplateFault) as error:
        return [Problem("", str(error))]


def _lay_out_page(campaign: Campaign, sources: dict[str, list[Token]], problems: list[Problem]) -> Layout | None:
    if "html" not in sources:
        return None
    footer = functools.partial(_html_footer, campaign) if campaign.bulk else None
    layout = rewrite.lay_out(sources["html"], footer=footer)
    problems += [_problem("html", fault) for fault in layout.faults]
    return layout


def _lay_out_text(campaign: Campaign, sources: dict[str, list[Token]], problems: list[Problem]) -> Layout | None:
    tokens = sources.get("text")
    if tokens is None and campaign.text is None and "html" in sources:
        tokens = derive.text_of(sources["html"])
        if tokens is None:
            problems.append(
                Problem("text", "cannot be derived: the HTML's blocks do not nest with its tags", "give a text part")
            )
    if tokens is None:
        return None
    layout = rewrite.lay_out_text(tokens)
    problems += [_problem("text", fault) for fault in layout.faults if campaign.text is not None]
    if campaign.bulk:
        addition = _text_footer(campaign, layout.visible)
        layout.nodes += rewrite.lay_out_text(template.tokenise(addition)).nodes
    return layout


def _problem(path: str, fault: template.Fault) -> Problem:
    return Problem(path, f"line {fault.line}: {fault.message}", fault.suggestion)


def _listless(campaign: Campaign, path: str, source: str) -> list[Problem]:
    if campaign.list_id:
        return []
    used = template.names_used(source) & {"unsubscribe_url", "preferences_url"}
    return [
        Problem(path, f"{name} is used, but the message has no list to leave", "name a list") for name in sorted(used)
    ]


_FEEDBACK_WORD = re.compile(r"[A-Za-z0-9._-]{1,63}")
_LIST_ID = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+")


def _head_problems(campaign: Campaign) -> list[Problem]:
    problems: list[Problem] = []

    def attempt(path: str, make: Callable[[], bytes]) -> None:
        try:
            make()
        except headers.HeaderError as error:
            problems.append(Problem(path, str(error)))

    attempt("from", lambda: headers.mailbox("From", [(campaign.from_name, campaign.from_address)]))
    if "@" not in campaign.from_address:
        problems.append(Problem("from.address", "is not an address"))
    if campaign.reply_to:
        attempt("reply_to", lambda: headers.mailbox("Reply-To", [("", campaign.reply_to)]))
    if campaign.bulk and not campaign.list_id:
        problems.append(Problem("list", "a campaign needs a list that people can leave", "name a list"))
    if campaign.bulk and not campaign.postal_address.strip():
        problems.append(Problem("postal_address", "a campaign needs the sender's postal address (P-52)", "add it"))
    if campaign.list_id and (not _LIST_ID.fullmatch(campaign.list_id) or len(campaign.list_id) > 255):
        problems.append(Problem("list", "its id is not a dotted name (RFC 2919)"))
    if len(campaign.feedback_id) > 4 or not all(_FEEDBACK_WORD.fullmatch(word) for word in campaign.feedback_id):
        problems.append(Problem("feedback_id", "has at most four words of letters, digits and ._-"))
    seen: set[str] = set()
    for number, (name, value) in enumerate(campaign.headers):
        path = f"headers[{number}]"
        if not headers.valid_name(name):
            problems.append(Problem(path, "is not a header name", "use letters, digits and hyphens"))
        elif reserved(name):
            problems.append(Problem(path, f"{name} is not the producer's to set", "remove it"))
        elif name.lower() in seen:
            problems.append(Problem(path, f"{name} is given twice", "keep one"))
        elif "{{" in value or "{%" in value:
            problems.append(Problem(path, f"{name}: templates are not available in headers", "use a fixed value"))
        else:
            attempt(path, functools.partial(headers.unstructured, name, value))
        seen.add(name.lower())
    return problems


def _attachment_problems(campaign: Campaign) -> list[Problem]:
    problems: list[Problem] = []
    cids: set[str] = set()
    for number, attachment in enumerate(campaign.attachments):
        fault = mime.attachment_fault(attachment)
        if fault is not None:
            problems.append(Problem(f"attachments[{number}]", fault))
        if attachment.cid is not None and attachment.cid in cids:
            problems.append(Problem(f"attachments[{number}].cid", "is used twice", "give each image its own"))
        cids.add(attachment.cid or "")
    if sum(len(attachment.content) for attachment in campaign.attachments) > MAX_ATTACHMENTS:
        problems.append(Problem("attachments", f"are longer than {MAX_ATTACHMENTS} octets together"))
    return problems


def _wanted(campaign: Campaign, visible: set[str], source: str | None) -> list[str]:
    """Which of the lines every campaign owes its readers (P-52; CASL 6(2); CAN-SPAM (a)(5)) are not in sight."""
    wanted = [
        name for name in ("postal_address", "unsubscribe_url", "preferences_url", "notice_url") if name not in visible
    ]
    if source is not None and " ".join(campaign.postal_address.split()) in " ".join(source.split()):
        wanted = [name for name in wanted if name != "postal_address"]
    return wanted


_WORDING: Final = {
    "unsubscribe_url": "Unsubscribe",
    "preferences_url": "Preferences and tracking choices",
    "notice_url": "Privacy notice",
}


def _html_footer(campaign: Campaign, visible: set[str]) -> str:
    wanted = _wanted(campaign, visible, campaign.html)
    if not wanted:
        return ""
    lines = [template.literal_source(html.escape(campaign.account_name))] if campaign.account_name else []
    lines += ["{{ postal_address }}"] if "postal_address" in wanted else []
    links = [
        f'<a href="{{{{ {name} }}}}" style="color:#666">{_WORDING[name]}</a>' for name in wanted if name in _WORDING
    ]
    content = (
        "<br>".join([" &middot; ".join(lines), " &middot; ".join(links)]) if lines and links else "".join(lines + links)
    )
    style = "margin:24px 0 0;padding:12px;font:12px/1.5 sans-serif;color:#666;text-align:center"
    return f'<div style="{style}">{content}</div>\n'


def _text_footer(campaign: Campaign, visible: set[str]) -> str:
    wanted = _wanted(campaign, visible, campaign.text)
    if not wanted:
        return ""
    lines = [template.literal_source(campaign.account_name)] if campaign.account_name else []
    lines += ["{{ postal_address }}"] if "postal_address" in wanted else []
    lines += [f"{_WORDING[name]}: {{{{ {name} }}}}" for name in wanted if name in _WORDING]
    return "\n\n--\n" + "\n".join(lines) + "\n"


def _list_id(campaign: Campaign) -> str:
    label = campaign.list_label.strip()
    if re.fullmatch(r"[A-Za-z0-9]+(?: [A-Za-z0-9]+)*", label) and len(label) <= 60:
        return f'"{label}" <{campaign.list_id}>'
    return (
        f"<{campaign.list_id}>"  # a label with other letters would have to be encoded, which many readers do not undo
    )


def _boundary_field(kind: str, letter: str, extra: tuple[tuple[str, str], ...]) -> tuple[bytes, bytes]:
    """A Content-Type field cut where the boundary's changing part stands."""
    whole = headers.parameters("Content-Type", kind, [("boundary", _BOUNDARY_MARK + letter), *extra])
    before, _, after = whole.partition(_BOUNDARY_MARK.encode("ascii"))
    return before, after


# ---- slots


def _block_end(nodes: list[Node], at: int) -> int:
    """One past the tag that closes the block opened at `at`; a {% set x = 1 %} is a block of its own."""
    depth = 0
    for index in range(at, len(nodes)):
        node = nodes[index]
        if not isinstance(node, Tag):
            continue
        word = template.keyword(node.source)
        if word in template.OPENING or template.is_block_set(node.source):
            depth += 1
        elif word in template.CLOSING:
            depth -= 1
        if depth == 0:
            return index + 1
    return len(nodes)


def _block_source(node: Node, tracked: bool) -> str:
    if isinstance(node, Literal):
        return template.literal_source(node.text)
    if isinstance(node, Expression):
        return rewrite.in_block(node)
    if isinstance(node, Tag):
        return "{% " + node.source + " %}"
    if isinstance(node, Link):
        return "{{ sp_click }}/" + str(node.number) if tracked else template.literal_source(node.original)
    return ""


def _printable(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise MissingField(f"the field {name!r} is missing")
    if isinstance(value, int | float):
        return str(value)
    raise RenderError(f"the field {name!r} is not a text or a number")


def _escape(context: Context, html_part: bool) -> Callable[[str], str]:
    """str to str for a context; inside HTML everything is escaped as text in the end."""
    address = rewrite.URL_ESCAPES.get(context)
    if address is None:
        return rewrite.escape_text if html_part else rewrite.clean_text
    if not html_part:
        return address

    def escape(value: str) -> str:
        return rewrite.escape_text(address(value))

    return escape


def _quoted(pieces: list[str | _Key], sources: Mapping[_Key, Source]) -> list[bytes | Source]:
    """Static text encoded, slots isolated by soft line breaks: a slot always stands at the start of a line."""
    wire: list[bytes | Source] = []
    line_start, after_slot = True, False
    for piece in pieces:
        if isinstance(piece, str):
            encoded = mime.quote_text(piece.encode("utf-8"))
            wire.append(SOFT + encoded if after_slot else encoded)
            line_start, after_slot = encoded.endswith(b"\r\n"), False
        else:
            if after_slot or not line_start:
                wire.append(SOFT)
            wire.append(sources[piece])
            line_start, after_slot = False, True
    return wire


def _pack(wire: list[bytes | Source]) -> Variant:
    """Merges neighbours and numbers what is left: statics first, then each source once."""
    merged: list[bytes | Source] = []
    for is_static, group in itertools.groupby(wire, lambda piece: isinstance(piece, bytes)):
        merged += [b"".join(piece for piece in group if isinstance(piece, bytes))] if is_static else group
    statics = [piece for piece in merged if isinstance(piece, bytes)]
    sources: list[Source] = []
    numbers: dict[int, int] = {}  # by identity: functions made here are not equal to one another
    positions: list[int] = []
    seen = 0
    for piece in merged:
        if isinstance(piece, bytes):
            positions.append(seen)
            seen += 1
            continue
        if id(piece) not in numbers:
            numbers[id(piece)] = len(sources)
            sources.append(piece)
        positions.append(len(statics) + numbers[id(piece)])
    if len(positions) == 1:
        return Variant(tuple(statics), tuple(sources), tuple)
    return Variant(tuple(statics), tuple(sources), itemgetter(*positions))
