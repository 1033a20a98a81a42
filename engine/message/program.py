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

`engine.message.acceptance` makes programs and says what is wrong with a campaign.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import minijinja

from engine.message import bundles, contexts, headers, mime, template, webview
from engine.message.contexts import Context
from engine.message.mime import Attachment
from engine.message.renderer import Renderer
from engine.message.rewrite import Expression, Layout, Link, Literal, Node, Pixel, Tag
from engine.message.slots import (
    Frame,
    Key,
    Part,
    Source,
    Variant,
    Words,
    block_end,
    block_source,
    escape_for,
    pack,
    printable,
    quoted,
)

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
        self._renderer = Renderer(contexts.FILTERS)
        self._words: dict[Key, Words] = {}
        self._sources: dict[Key, Source] = {}
        self._files: dict[Attachment, bytes] = {}
        self._blocks: dict[Source, bundles.Block] = {}
        self._variants: dict[tuple[bool, bool], Variant] = {}
        self._required: set[str] = set()
        self._subject = self._cut(subject.nodes, html_part=False, tracked=False, pixel=False).pieces
        self._variants[False, False] = self._variant(tracked=False, pixel=False)
        self._heads()
        self.required: frozenset[str] = frozenset(self._required)
        self.view_html = webview.show(page, self._constants) if page is not None else ""

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
        """The required fields that a recipient lacks: asked at expansion, not at the wire."""
        return [name for name in self.required if fields.get(name) is None]

    # ---- cutting

    def _cut(self, nodes: list[Node], *, html_part: bool, tracked: bool, pixel: bool) -> Part:
        part = Part()
        preamble, preamble_names = "", set[str]()
        at = 0
        while at < len(nodes):
            node = nodes[at]
            if isinstance(node, Tag):
                end = block_end(nodes, at)
                source = "".join(block_source(inner, tracked) for inner in nodes[at:end])
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

    def _expression(self, part: Part, node: Expression, html_part: bool, preamble: str, set_names: set[str]) -> None:
        path = template.simple_path(node.source)
        if path is not None and path[0] not in set_names:
            if len(path) == 1 and path[0] in self._constants:
                constant = self._constants[path[0]]
                part.add(contexts.escape_text(constant) if html_part else constant)
                return
            if path[0] not in contexts.PROVIDED:
                self._required.add(path[0])
            part.add(self._direct(path, node.context, html_part))
            return
        source = "{{ " + node.source + " }}"
        if template.names_used(source) & set_names:
            source = preamble + source
        part.add(self._rendered(source, html_part=html_part, context=node.context))

    def _direct(self, path: tuple[str, ...], context: Context, html_part: bool) -> Key:
        """A field printed as it is: no template runs."""
        name = path[0]
        if path in contexts.PROVIDED_PATHS:  # addresses of our own making: nothing in them to escape
            return self._slot(("provided", name), lambda frame: printable(frame.values.get(name), name), False)
        escape = escape_for(context, html_part)

        def one(frame: Frame) -> str:
            value = frame.values.get(name)
            if type(value) is not str:
                value = printable(value, name)
            return escape(value)

        def deep(frame: Frame) -> str:
            value: Any = frame.values
            for step in path:
                value = value.get(step) if isinstance(value, dict) else None
            return escape(printable(value, ".".join(path)))

        return self._slot(("field", path, context, html_part), one if len(path) == 1 else deep, html_part)

    def _rendered(self, source: str, *, html_part: bool, context: Context | None) -> Key:
        """A block (context None) or an expression with filters, rendered by minijinja from its own source."""
        key = ("rendered", source, context, html_part)
        if key in self._words:
            return key
        escapes_itself = html_part and context in (None, Context.TEXT)
        name = self._renderer.add(source, html=escapes_itself)
        escape = str if context is None or escapes_itself else escape_for(context, html_part)
        references = html_part and re.search(r"<style|<script", source, re.IGNORECASE) is None

        def render(frame: Frame) -> str:
            ready = frame.ready.get(name)
            return escape(ready if ready is not None else self._one(name, frame, escapes_itself))

        self._slot(key, render, references, bundles.static_lines(source))
        if bundles.may_join(source):
            self._blocks[self._sources[key]] = bundles.Block(name, source, escapes_itself)
        return key

    def _add(self, source: str, html: bool) -> str:
        return self._renderer.add(source, html=html)

    def _one(self, name: str, frame: Frame, html: bool) -> str:
        if frame.context is None:
            frame.context = {**frame.values, **self._constants, "sp_click": minijinja.safe(frame.click)}
        return self._renderer.render(name, frame.context, html=html)

    def _slot(self, key: Key, words: Words, references: bool, static: Iterable[str] = ()) -> Key:
        """Keeps a slot as text (for headers and base64) and quoted-printable. references: what is not ASCII becomes
        character references, which HTML reads everywhere but in style and script. static: lines that are the same for
        everybody."""
        if key not in self._words:
            self._words[key] = words
            code, errors = ("ascii", "xmlcharrefreplace") if references else ("utf-8", "replace")
            known = mime.quoted_lines(line.encode(code, errors) for line in static)
            self._sources[key] = lambda frame: mime.quote_slot(words(frame).encode(code, errors), known)
        return key

    def _keep(self, key: Key, source: Source) -> Key:
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
            parts = [self._file(attachment) for attachment in loose]
            content: list[bytes | Source] = self._with_head(text)
            if self._page is not None:
                page = self._cut(self._page.nodes, html_part=True, tracked=tracked, pixel=pixel)
                alternative = next(letters) if loose else outer
                branch: list[bytes | Source] = [
                    mime.part_head("text/html", (("charset", "utf-8"),), "quoted-printable"),
                    *quoted(page.pieces, self._sources),
                ]
                if inline:
                    related = next(letters)
                    images: list[list[bytes | Source]] = [[self._file(image)] for image in inline]
                    branch = self._multi(related, [branch, *images])
                    branch.insert(0, self._inner_head("multipart/related", related, (("type", "text/html"),)))
                content = self._multi(alternative, [content, branch])
                if loose:
                    content.insert(0, self._inner_head("multipart/alternative", alternative, ()))
            elif inline:
                parts += [self._file(image) for image in inline]
            files: list[list[bytes | Source]] = [[part] for part in parts]
            wire += self._multi(outer, [content, *files]) if files else content
            wire.append(b"\r\n")
        return bundles.together(pack(wire), self._blocks, self._add, self._one)

    def _file(self, attachment: Attachment) -> bytes:
        """Encoded once, shared by all variants."""
        if attachment not in self._files:
            self._files[attachment] = mime.attachment_part(attachment)
        return self._files[attachment]

    def _with_head(self, text: Part) -> list[bytes | Source]:
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

    def _text_part(self, part: Part, *, alone: bool) -> tuple[str, list[bytes | Source]]:
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
        return "quoted-printable", [*quoted(pieces, self._sources), *([b"\r\n"] if alone else [])]

    def _base64(self, pieces: list[str | Key], alone: bool) -> list[bytes | Source]:
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


# RFC 6376 5.4.2 and mail-standards.md 2.3: one instance more than there is, so that none can be added
OVERSIGNED: Final = (
    "from", "reply-to", "subject", "date", "to", "cc", "content-type", "mime-version",
    "list-unsubscribe", "list-unsubscribe-post",
)  # fmt: skip


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
