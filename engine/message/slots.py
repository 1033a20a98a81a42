"""Slots: where static text ends and a recipient's value begins, down to the bytes of one join.

Law: in quoted-printable a slot stands at the start of a line and ends in a soft line break, so neither its value nor
the text around it can change the other's encoding; each slot of a part is evaluated once, however often it stands in
the text. A part that can travel as 7-bit is a `Section` (engine.message.sevenbit) with its quoted form beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol

from engine.message import contexts, mime, rewrite, template
from engine.message.contexts import Context
from engine.message.mime import SOFT
from engine.message.renderer import MissingField, RenderError
from engine.message.rewrite import Expression, Link, Literal, Node, Tag


@dataclass(slots=True)
class Frame:
    """One recipient's values while its message is made. click: the base of tracked links; all URLs ASCII."""

    values: dict[str, Any]
    boundary: bytes
    click: str = ""
    pixel: str = ""
    context: dict[str, Any] | None = None  # what minijinja sees, made at the first block and kept
    ready: dict[str, str] = field(default_factory=dict)  # blocks already rendered, by name


Source = Callable[[Frame], bytes]
Words = Callable[[Frame], str]
Key = tuple[object, ...]


Order = Callable[[Sequence[bytes]], tuple[bytes, ...]]
Pieces = list[bytes]


def chosen(positions: Sequence[int]) -> Order:
    """itemgetter that answers a tuple however many positions there are."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda pieces: tuple(pieces[position] for position in positions)


def weave(statics: Sequence[bytes], positions: Sequence[int]) -> tuple[Pieces, Order]:
    """Places with text and value in turn: a list to copy whose every second item is to be filled, and what picks the
    values for it (copying a list and filling every second place costs half of picking everything). positions: below
    len(statics) a static string, from there on a value; two statics never follow each other."""
    woven: Pieces = []
    picked: list[int] = []
    for position in positions:
        if position < len(statics):
            assert len(woven) % 2 == 0, "two static strings in a row"
            woven.append(statics[position])
        else:
            woven += [b""] * (2 - len(woven) % 2)
            picked.append(position - len(statics))
    return woven, chosen(picked)


@dataclass(frozen=True, slots=True)
class Strip:
    """Static strings and values in the order of the wire (`weave`)."""

    statics: tuple[bytes, ...]
    sources: tuple[Source, ...]
    woven: Pieces
    pick: Order

    def pieces(self, frame: Frame) -> Pieces:
        made = self.woven.copy()
        made[1::2] = self.pick([source(frame) for source in self.sources])
        return made


class Seven(Protocol):
    """What engine.message.sevenbit makes of a part."""

    @property
    def statics(self) -> tuple[bytes, ...]: ...

    def pieces(self, frame: Frame) -> tuple[Pieces, Pieces] | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A part in both encodings: seven as long as a recipient's values fit it, else quoted."""

    seven: Seven
    quoted: Strip


@dataclass(frozen=True, slots=True)
class Variant:
    """One body: strips and sections in the order of the wire, joined once."""

    segments: tuple[Strip | Section, ...]
    prepare: Callable[[Frame], None] | None = None  # renders all blocks at once, when there are several

    def body(self, frame: Frame) -> tuple[bytes, bytes | None]:
        """The body, and its canonical form when that is another."""
        if self.prepare is not None:
            self.prepare(frame)
        wire: Pieces = []
        canonical: Pieces = []
        differs = False
        for segment in self.segments:
            if isinstance(segment, Section):
                made = segment.seven.pieces(frame)
                if made is not None:
                    wire += made[0]
                    canonical += made[1]
                    differs = differs or made[0] is not made[1]
                    continue
                segment = segment.quoted
            pieces = segment.pieces(frame)
            wire += pieces
            canonical += pieces
        body = b"".join(wire)
        if not differs:
            return body, None
        form = b"".join(canonical)
        return body, None if form == body else form


@dataclass(slots=True)
class Part:
    """Static text and slots of one part; a slot is found again by its key."""

    _added: list[str | Key] = field(default_factory=list)

    def add(self, piece: str | Key) -> None:
        self._added.append(piece)

    @property
    def pieces(self) -> list[str | Key]:
        """Neighbouring texts joined, empty ones gone."""
        pieces: list[str | Key] = []
        for is_text, group in itertools.groupby(self._added, lambda piece: isinstance(piece, str)):
            if is_text:
                joined = "".join(map(str, group))
                pieces += [joined] if joined else []
            else:
                pieces += group
        return pieces


def block_end(nodes: list[Node], at: int) -> int:
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


def block_source(node: Node, tracked: bool) -> str:
    if isinstance(node, Literal):
        return template.literal_source(node.text)
    if isinstance(node, Expression):
        return rewrite.in_block(node)
    if isinstance(node, Tag):
        return "{% " + node.source + " %}"
    if isinstance(node, Link):
        return "{{ sp_click }}/" + str(node.number) if tracked else template.literal_source(node.original)
    return ""


def printable(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise MissingField(f"the field {name!r} is missing")
    if isinstance(value, int | float):
        return str(value)
    raise RenderError(f"the field {name!r} is not a text or a number")


def escape_for(context: Context, html_part: bool) -> Callable[[str], str]:
    """str to str for a context; inside HTML everything is escaped as text in the end."""
    address = contexts.URL_ESCAPES.get(context)
    if context is Context.HEADER:
        return str  # the header's writer refuses what cannot be there; it must see it
    if address is None:
        return contexts.escape_text if html_part else contexts.clean_text
    if not html_part:
        return address

    def escape(value: str) -> str:
        return contexts.escape_text(address(value))

    return escape


def quoted(pieces: list[str | Key], sources: Mapping[Key, Source]) -> list[bytes | Source]:
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
    return [*wire, SOFT] if after_slot else wire  # a value may end in a blank, and a line may not


_LARGE = 65_536
Wire = list[bytes | Source | Section]


def segments(wire: Wire) -> tuple[Strip | Section, ...]:
    """Sections as they are, and what is between them packed."""
    found: list[Strip | Section] = []
    for is_section, group in itertools.groupby(wire, lambda piece: isinstance(piece, Section)):
        pieces = list(group)
        if is_section:
            found += [piece for piece in pieces if isinstance(piece, Section)]
        else:
            found.append(pack([piece for piece in pieces if not isinstance(piece, Section)]))
    return tuple(found)


def pack(wire: list[bytes | Source]) -> Strip:
    """Merges neighbours and numbers what is left: statics first, then each source once."""
    merged: list[bytes | Source] = []
    for is_static, group in itertools.groupby(wire, lambda piece: isinstance(piece, bytes) and len(piece) < _LARGE):
        pieces = list(group)
        if is_static:
            merged.append(b"".join(piece for piece in pieces if isinstance(piece, bytes)))
        else:  # attachments stay the one object that all variants share
            merged += [_always(piece) if isinstance(piece, bytes) else piece for piece in pieces]
    statics = [piece for piece in merged if isinstance(piece, bytes)]
    sources: dict[int, Source] = {}  # by identity: functions made here are not equal to one another
    for piece in merged:
        if not isinstance(piece, bytes):
            sources.setdefault(id(piece), piece)
    numbers = {name: number for number, name in enumerate(sources)}
    positions: list[int] = []
    passed = 0
    for piece in merged:
        if isinstance(piece, bytes):
            positions.append(passed)
            passed += 1
        else:
            positions.append(len(statics) + numbers[id(piece)])
    return Strip(tuple(statics), tuple(sources.values()), *weave(statics, positions))


def _always(data: bytes) -> Source:
    return lambda frame: data
