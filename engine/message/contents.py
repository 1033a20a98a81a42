"""Contents: subject, texts and attachments compiled once, for every job that has the same ones.

    1 lay out      links numbered, contexts known, footer added where the law's lines are missing (P-52)
    2 cut          the top level into static text and slots; a {% block %} or a filtered expression is one slot
    3 encode       each part as 7-bit where it can be (engine.message.sevenbit), and as quoted-printable that is its own
                   canonical form; slots isolated by soft line breaks
    4 variants     with and without pixel, with and without tracked links: four bodies, each a list of byte strings
                   and slot numbers, made when first needed

Law: two recipients' messages differ only in slots, boundary and their own headers; the slots of one part are evaluated
once each, however often they stand in the text; what a word or number becomes is looked up when it came before
(engine.message.recall: only what at least two messages had in common is kept, in memory, as long as the contents). A
part that is mostly not ASCII is one base64 slot, since base64 cannot
be spliced. Nothing here is of one job: what a job has of its own (its public pages, its headers) comes in by the frame
or is `engine.message.program`'s.

Slow path: a recipient whose values do not fit a 7-bit part gets that part in quoted-printable (15 to 40 us more).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import minijinja

from engine.message import bundles, contexts, headers, mime, sevenbit, template
from engine.message.attachment import Attachment
from engine.message.contexts import Context
from engine.message.recall import Recall
from engine.message.renderer import Renderer, all_plain, may_trust
from engine.message.rewrite import Expression, Layout, Link, Literal, Node, Pixel, Tag
from engine.message.slots import (
    Frame,
    Key,
    Part,
    Section,
    Source,
    Variant,
    Wire,
    Words,
    block_end,
    block_source,
    escape_for,
    pack,
    printable,
    quoted,
    segments,
)

if TYPE_CHECKING:
    from engine.message.program import Campaign

BOUNDARY_LENGTH: Final = 28
BOUNDARY_MARK: Final = "=_" + "B" * (BOUNDARY_LENGTH - 2)
Quoted = list[bytes | Source]
JOBS_OWN: Final = ("view_url", "notice_url")  # provided variables that every job has its own of


class Contents:
    """The compiled contents. links: the link table, by number; required: fields that a recipient must have (printed
    whatever the other values are); encoding: of a message that is one part, "" for multipart."""

    def __init__(self, campaign: Campaign, page: Layout | None, text: Layout, subject: Layout) -> None:
        self.page = page
        self.links: list[str] = page.links if page is not None else []
        self.attachments = campaign.attachments
        self.postal_address = campaign.postal_address
        self.encoding = ""
        self._text = text
        self._renderer = Renderer(contexts.FILTERS)
        self._words: dict[Key, Words] = {}
        self._sources: dict[Key, Source] = {}
        self._slots: dict[Key, sevenbit.Slot] = {}
        self._files: dict[Attachment, bytes] = {}
        self._blocks: dict[Key, bundles.Block] = {}
        self._variants: dict[tuple[bool, bool], Variant] = {}
        self._required: set[str] = set()
        self.subject = self._cut(subject.nodes, html_part=False, tracked=False, pixel=False).pieces
        self._subject: list[str | Words] = [p if isinstance(p, str) else self._words[p] for p in self.subject]
        self._variants[False, False] = self._variant(tracked=False, pixel=False)
        self.required: frozenset[str] = frozenset(self._required)

    def variant(self, *, tracked: bool, pixel: bool) -> Variant:
        if self.page is None:
            tracked = pixel = False
        tracked = tracked and bool(self.links)
        variant = self._variants.get((tracked, pixel))
        if variant is None:
            variant = self._variants[tracked, pixel] = self._variant(tracked=tracked, pixel=pixel)
        return variant

    def subject_text(self, frame: Frame) -> str:
        return "".join([piece if isinstance(piece, str) else piece(frame) for piece in self._subject])

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
                    part.add(self._slot(("click",), lambda frame: frame.click, html_part, field="sp_click"))
                    part.add(f"/{node.number}")
                else:
                    part.add(node.original)
            elif isinstance(node, Pixel):
                if pixel:
                    part.add('<img src="')
                    part.add(self._slot(("pixel",), lambda frame: frame.pixel, html_part, field="sp_pixel"))
                    part.add('" width="1" height="1" alt="" style="display:block;border:0;width:1px;height:1px">')
            else:
                self._expression(part, node, html_part, preamble, preamble_names)
        return part

    def _expression(self, part: Part, node: Expression, html_part: bool, preamble: str, set_names: set[str]) -> None:
        path = template.simple_path(node.source)
        if path is not None and path[0] not in set_names:
            if path == ("postal_address",):
                part.add(contexts.escape_text(self.postal_address) if html_part else self.postal_address)
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
        if path in contexts.PROVIDED_PATHS and name not in JOBS_OWN:  # of our own making: nothing in them to escape
            return self._slot(
                ("provided", name), lambda frame: printable(frame.values.get(name), name), False, field=name
            )
        if name in JOBS_OWN:
            context = Context.TEXT if html_part else Context.PLAIN  # a whole address, and "" while there is none
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

        # escaping changes nothing of plain text: only there the value itself may stand for its words
        plain = len(path) == 1 and context not in contexts.URL_ESCAPES
        return self._slot(
            ("field", path, context, html_part),
            one if len(path) == 1 else deep,
            html_part,
            field=name if plain else "",
            depends=name if len(path) == 1 else "",
        )

    def _rendered(self, source: str, *, html_part: bool, context: Context | None) -> Key:
        """A block (context None) or an expression with filters, rendered by minijinja from its own source."""
        key = ("rendered", source, context, html_part)
        if key in self._words:
            return key
        depends = _one_word(source)
        escapes_itself = html_part and context in (None, Context.TEXT)
        name = self._renderer.add(source, html=escapes_itself)
        escape = str if context is None or escapes_itself else escape_for(context, html_part)
        references = html_part and re.search(r"<style|<script", source, re.IGNORECASE) is None

        def render(frame: Frame) -> str:
            ready = frame.ready.get(name)
            return escape(
                ready if ready is not None else self._renderer.render(name, self._context(frame), html=escapes_itself)
            )

        trusting = self._renderer.add_trusting(bundles.told(source, escapes_itself)) if may_trust(source) else ""

        def render_one(frame: Frame) -> str:
            value = frame.values.get(depends)
            values = {} if value is None else {depends: value}  # nothing else can be in what is kept by this value
            text = self._renderer.render_trusting(trusting, values) if trusting and all_plain(values) else None
            return escape(self._renderer.render(name, values, html=escapes_itself) if text is None else text)

        self._slot(
            key,
            render_one if depends else render,
            references,
            source=source if context is None else None,
            depends=depends,
        )
        if bundles.may_join(source) and not depends:
            self._blocks[key] = bundles.Block(name, source, escapes_itself)
        return key

    def _context(self, frame: Frame) -> dict[str, Any]:
        """What minijinja sees."""
        if frame.context is None:
            click = minijinja.safe(frame.click)
            frame.context = {**frame.values, "postal_address": self.postal_address, "sp_click": click}
        return frame.context

    def _slot(
        self,
        key: Key,
        words: Words,
        references: bool,
        *,
        field: str = "",
        source: str | None = None,
        depends: str = "",
    ) -> Key:
        """Keeps a slot as text (for headers and base64), for 7-bit parts and quoted-printable. references: what is not
        ASCII becomes character references, which HTML reads everywhere but in style and script. field: the value that
        stands for the words where nothing in it needs an escape. source: of a block, whose whole lines that no tag
        touches are the same for everybody. depends: the one value the words are made of, when recipients may share
        it."""
        if key not in self._words:
            self._words[key] = words
            self._slots[key] = sevenbit.Slot(words, references, field, source, depends)
            static = bundles.literals(source) if source is not None else ()
            self._sources[key] = _quoted_source(words, references, field, static, depends)
        return key

    def _keep(self, key: Key, source: Source) -> Key:
        self._sources.setdefault(key, source)
        return key

    # ---- encoding and structure

    def _variant(self, *, tracked: bool, pixel: bool) -> Variant:
        """The whole body as static byte strings and sources, in order, then packed for one join."""
        wire: Wire = []
        text = self._cut(self._text.nodes, html_part=False, tracked=False, pixel=False)
        used = [*self.subject, *text.pieces]
        inline = [attachment for attachment in self.attachments if attachment.cid is not None]
        loose = [attachment for attachment in self.attachments if attachment.cid is None]
        if self.page is None and not self.attachments:
            self.encoding, body = self._text_part(text, alone=True)
            wire += body
        else:
            letters = iter("abc")
            outer = next(letters)
            parts = [self._file(attachment) for attachment in loose]
            content = self._with_head(text)
            if self.page is not None:
                page = self._cut(self.page.nodes, html_part=True, tracked=tracked, pixel=pixel)
                used += page.pieces
                alternative = next(letters) if loose else outer
                branch = self._page_part(page.pieces, self.page.referable)
                if inline:
                    related = next(letters)
                    images: list[Wire] = [[self._file(image)] for image in inline]
                    branch = self._multi(related, [branch, *images])
                    branch.insert(0, self._inner_head("multipart/related", related, (("type", "text/html"),)))
                content = self._multi(alternative, [content, branch])
                if loose:
                    content.insert(0, self._inner_head("multipart/alternative", alternative, ()))
            elif inline:
                parts += [self._file(image) for image in inline]
            files: list[Wire] = [[part] for part in parts]
            wire += self._multi(outer, [content, *files]) if files else content
            wire.append(b"\r\n")
        blocks = [self._blocks[key] for key in dict.fromkeys(used) if not isinstance(key, str) and key in self._blocks]
        return Variant(
            segments(wire), bundles.together(blocks, self._renderer, {"postal_address": self.postal_address})
        )

    def _file(self, attachment: Attachment) -> bytes:
        """Encoded once, shared by all variants."""
        if attachment not in self._files:
            self._files[attachment] = mime.attachment_part(attachment)
        return self._files[attachment]

    def _page_part(self, pieces: list[str | Key], referable: bool) -> Wire:
        """The HTML part: 7-bit when its static text is ASCII or can be made so."""
        head = (("charset", "utf-8"),)
        spelled = quoted(pieces, self._sources)
        full = [mime.part_head("text/html", head, "quoted-printable"), *spelled]
        if not referable:
            return [*full]
        ascii_pieces = [
            piece.encode("ascii", "xmlcharrefreplace").decode("ascii") if isinstance(piece, str) else piece
            for piece in pieces
        ]
        return self._either(mime.part_head("text/html", head, "7bit"), ascii_pieces, full, html=True)

    def _either(self, head: bytes, pieces: list[str | Key], full: Quoted, *, html: bool) -> Wire:
        """The part as 7-bit with its quoted form beside it; the quoted one alone when there is no other."""
        seven = sevenbit.lay(head, pieces, self._slots, html=html)
        if seven is None:
            return [*full]
        return [Section(seven, pack(full))]

    def _with_head(self, text: Part) -> Wire:
        encoding, content = self._text_part(text, alone=False)
        head = (("charset", "utf-8"),)
        full = [mime.part_head("text/plain", head, encoding), *content]
        if encoding == "base64":
            return [*full]
        return self._either(mime.part_head("text/plain", head, "7bit"), text.pieces, full, html=False)

    def _inner_head(self, kind: str, letter: str, extra: tuple[tuple[str, str], ...]) -> Source:
        before, after = boundary_field(kind, letter, extra)
        return self._sources[
            self._keep(("head", kind, letter), lambda frame: before + frame.boundary + after + b"\r\n")
        ]

    def _multi(self, letter: str, parts: list[Wire]) -> Wire:
        """Parts between boundaries; ends without a line end."""
        mark = self._sources[self._keep(("boundary",), lambda frame: frame.boundary)]
        tail = letter.encode("ascii")
        wire: Wire = []
        for number, part in enumerate(parts):
            wire += [b"\r\n--" if number else b"--", mark, tail + b"\r\n", *part]
        return [*wire, b"\r\n--", mark, tail + b"--"]

    def _text_part(self, part: Part, *, alone: bool) -> tuple[str, Quoted]:
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

    def _base64(self, pieces: list[str | Key], alone: bool) -> Quoted:
        parts = [piece if isinstance(piece, str) else self._words[piece] for piece in pieces]

        def encode(frame: Frame) -> bytes:
            words = [part if isinstance(part, str) else part(frame) for part in parts]
            data = mime.unify_line_ends("".join(words)).replace("\n", "\r\n").encode("utf-8")
            lines = mime.base64_lines(data)
            return lines if alone else lines.removesuffix(b"\r\n")

        if all(isinstance(piece, str) for piece in pieces):
            return [encode(Frame({}, b""))]
        return [self._sources[self._keep(("base64", alone), encode)]]


_DECLARING: Final = re.compile(r"\b(?:for|set|with)\b")
_OF_A_WORD: Final = frozenset(
    "abs capitalize d default e escape float int lower replace round string title trim truncate upper urlencode".split()
)


def _one_word(source: str) -> str:
    """The one value that a rendered source is made of, "" when there are several, or it looks like a list: recipients
    share words and small numbers."""
    names = template.names_used(source)
    if len(names) != 1 or _DECLARING.search(source) or not template.filters_used(source) <= _OF_A_WORD:
        return ""
    name = names.pop()
    return "" if name.startswith("sp_") or name in contexts.PROVIDED else name


def _quoted_source(words: Words, references: bool, field: str, static: Iterable[str], depends: str) -> Source:
    """A slot in quoted-printable: by a look-up when the value came before, by one look when it is short and plain, else
    by its words."""
    code, errors = ("ascii", "xmlcharrefreplace") if references else ("utf-8", "replace")
    known = mime.QuotedLines(line.encode(code, errors) for line in static)

    def general(frame: Frame) -> bytes:
        return mime.quote_slot(words(frame).encode(code, errors), known)

    make = _direct_source(field, general) if field else general
    if not depends:
        return make
    recall: Recall[str | int, bytes] = Recall()
    look = recall.get

    def remembered(frame: Frame) -> bytes:
        value = frame.values.get(depends)
        if type(value) is not str and type(value) is not int:  # True and 1.0 are equal to 1, and print otherwise
            return make(frame)
        form = look(value)
        return recall.keep(value, make(frame)) if form is None else form

    return remembered


def _direct_source(field: str, general: Source) -> Source:
    simple = mime.AS_IT_STANDS.fullmatch

    def direct(frame: Frame) -> bytes:
        value = frame.values.get(field)
        if type(value) is str and simple(value):
            short = mime.cut_plain(value.encode("ascii"))
            if short is not None:
                return short
        return general(frame)

    return direct


def boundary_field(kind: str, letter: str, extra: tuple[tuple[str, str], ...]) -> tuple[bytes, bytes]:
    """A Content-Type field cut where the boundary's changing part stands."""
    whole = headers.parameters("Content-Type", kind, [("boundary", BOUNDARY_MARK + letter), *extra])
    before, _, after = whole.partition(BOUNDARY_MARK.encode("ascii"))
    return before, after
