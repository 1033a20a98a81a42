"""Slots: where static text ends and a recipient's value begins, down to the bytes of one join.

Law: a slot stands at the start of a line and ends in a soft line break, so neither its value nor the text around it
can change the other's encoding; each slot of a variant is evaluated once, however often it stands in the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Variant:
    """One body. order picks static strings and slot values, in the order of the wire, from statics + values."""

    statics: tuple[bytes, ...]
    sources: tuple[Source, ...]
    order: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]
    prepare: Callable[[Frame], None] | None = None  # renders all blocks at once, when there are several

    def body(self, frame: Frame) -> bytes:
        if self.prepare is not None:
            self.prepare(frame)
        return b"".join(self.order((*self.statics, *[source(frame) for source in self.sources])))


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
    return wire


_LARGE = 65_536


def pack(wire: list[bytes | Source]) -> Variant:
    """Merges neighbours and numbers what is left: statics first, then each source once."""
    merged: list[bytes | Source] = []
    # attachments stay the one object that all variants share
    for is_static, group in itertools.groupby(wire, lambda piece: isinstance(piece, bytes) and len(piece) < _LARGE):
        pieces = list(group)
        merged += [b"".join(piece for piece in pieces if isinstance(piece, bytes))] if is_static else pieces
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
