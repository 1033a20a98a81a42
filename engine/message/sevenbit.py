"""Sevenbit: a part that travels as its author wrote it, and its canonical form beside it (RFC 2045 2.7, 6376 3.4.4).

Quoted-printable makes 41 kB of 30 kB of HTML and costs every value a soft line break. A part whose static text is ASCII
in lines of at most 998 octets needs none of it: values go in as they are.

Law: what `SevenBit.pieces` answers is ASCII in lines of at most 998 octets ended by CRLF, no line begins with a dot or
with "From ", no boundary is in it, and the second form it answers is the first one's relaxed canonical form. A
recipient with a value that could break this (a line end, another letter in a text part, a dot where a line begins, a
value longer than its line has room) gets None, and the part takes its quoted-printable form: the slow path, for that
recipient and that part only.

Nothing an author wrote is changed: indentation and blanks at a line's end stay on the wire (<pre> and <textarea> would
show it). They are not their own canonical form, so that form is laid out here once, piece by piece, and joined with the
same values. A value has no blanks at its ends and no two in a row, so the form of the whole is the forms of the pieces;
what a block prints may have both, so a block takes the blanks around it along. Where empty values would let blanks
meet, the canonical form is made the long way, from what is sent (`relaxed_body`, 0.2 ms).

A boundary is "=_" and 26 hexadecimal digits. No value may hold "=_" or begin with "_", one with "_" behind it must not
end in "=", and static text has no such run of digits nor ends in the middle of one: so nothing has to be searched.

Octets are looked for with `find`: `in` takes its left side for a number first and throws a TypeError away (0.1 us a
question in CPython 3.11, of ten a message).

Which parts can: `lay` says None for static text with other letters (HTML has them as character references first), for
lines that begin with "." (style sheets like to) or "From ", and for longer lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from engine.message.bundles import static_lines
from engine.message.recall import Recall
from engine.message.slots import Frame, Key, Order, Pieces, Words, weave

LINE: Final = 998  # octets without CRLF, RFC 5322 2.1.1
_LEAST: Final = 120  # octets a slot must have on its line (a link takes 90), or quoted-printable is the better choice

_FITS = re.compile(rb"(?!_)(?:[!-~]++(?: [!-~]++)*+)?")
# what needs no escape: 0.2 us says that a value is fine, and character references do the rest
_WORD = r"[!#-%(-;?-~\u00a1-\u2027\u202a-\ud7ff]++"
_SIMPLE_HTML = re.compile(f"(?!_){_WORD}(?: {_WORD})*+")
_SIMPLE_TEXT = re.compile("(?!_)[!-<>-~]++(?: [!-<>-~]++)*+")
_BOUNDARY = re.compile("=_[0-9a-f]{26}|=_[0-9a-f]*\\Z")
_BLOCK_OCTETS = bytes((0x09, 0x0A, *range(0x20, 0x7F)))
_STATIC = re.compile(r"[\t\n -~]*")
_AT_START = (b".", b"From ")
_FROM_BEGUN = (b"F", b"Fr", b"Fro", b"From")

Read = Callable[[Frame], bytes | None]


def relaxed_body(body: bytes) -> bytes:
    """The relaxed canonical form of any body with CRLF line ends (RFC 6376 3.4.4)."""
    body = _relaxed(body)
    while body.endswith(b"\r\n\r\n"):
        body = body[:-2]
    return b"" if body == b"\r\n" else body


def _relaxed(data: bytes) -> bytes:
    """Runs of blanks to one, none before a line's end; a blank at the very end stays."""
    if b"\t" in data:
        data = data.replace(b"\t", b" ")
    while b"  " in data:  # a run of eight takes three rounds; a regular expression costs five times as much
        data = data.replace(b"  ", b" ")
    return data.replace(b" \r\n", b"\r\n")


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as the part sees it. words: its text; html: what is not ASCII becomes character references; field: the
    field it prints as it is, "" for any other; source: of a block, which may print lines, None for a single value;
    depends: the one value that the words are made of, "" when there are several or hardly two recipients share it."""

    words: Words
    html: bool
    field: str = ""
    source: str | None = None
    depends: str = ""


@dataclass(slots=True)
class _Use:
    """What all places of a slot ask of its value. room: octets; starts: a line may begin with it; solid: it must not
    be empty nor end a line, because a dot stands behind it; filled: if empty, the canonical form is made the long way;
    closed: it must not end in "=", because "_" stands behind it."""

    room: int = LINE
    starts: bool = False
    solid: bool = False
    filled: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class _Held:
    """A block in its place in the canonical form, with the blanks around it. number: among the values; bare: another
    slot is next to it, so it must have something other than blanks at both ends."""

    number: int
    before: bytes
    after: bytes
    ends: bool
    bare: bool


@dataclass(frozen=True, slots=True, eq=False)
class SevenBit:
    """One part, ready to be written. same: with any values that fit, the canonical form is the content itself."""

    reads: tuple[Read, ...]
    statics: tuple[bytes, ...]
    woven: Pieces
    pick: Order
    relaxed: Pieces
    relaxed_pick: Order
    held: tuple[_Held, ...]
    filled: tuple[int, ...]  # values that must not be empty
    same: bool

    def pieces(self, frame: Frame) -> tuple[Pieces, Pieces] | None:
        """The content and its canonical form (one object when they are the same), or None for this recipient."""
        found = [read(frame) for read in self.reads]
        if None in found:
            return None
        values = cast("list[bytes]", found)
        wire = self.woven.copy()
        wire[1::2] = self.pick(values)
        for number in self.filled:
            if not values[number]:
                return wire, [_part_relaxed(wire)]
        if self.same:
            return wire, wire
        for held in self.held:
            value = values[held.number]
            if held.bare and (not value or value[0] in b" \t\r" or value[-1] in b" \t\n"):
                return wire, [_part_relaxed(wire)]
            value = held.before + value + held.after
            if value.find(b"  ") >= 0 or value.find(b" \r\n") >= 0 or value.find(b"\t") >= 0:
                value = _relaxed(value)
            values.append(value.removesuffix(b" ") if held.ends else value)
        canonical = self.relaxed.copy()
        canonical[1::2] = self.relaxed_pick(values)
        return wire, canonical


def _part_relaxed(wire: Sequence[bytes]) -> bytes:
    return _relaxed(b"".join(wire) + b"\r\n")[:-2]  # the line end is the boundary's


def lay(head: bytes, pieces: Sequence[str | Key], slots: Mapping[Key, Slot], *, html: bool) -> SevenBit | None:
    """The part of this head and these pieces, which have LF line ends and are ASCII already; None when it cannot be."""
    uses = _uses(pieces, slots)
    if uses is None:
        return None
    reads: list[Read] = []
    for key, use in uses.items():
        slot = slots[key]
        if slot.source is not None and not _block_fits(slot.source, html):
            return None
        reads.append(_reader(slot, use))
    numbers = {key: number for number, key in enumerate(uses)}
    statics = [piece.replace("\n", "\r\n").encode("ascii") for piece in pieces if isinstance(piece, str)]
    relaxed_statics, held_places = _canonical(pieces, slots, numbers)
    held = list(dict.fromkeys(place for place in held_places if place is not None))
    order: list[int] = []
    relaxed_order: list[int] = []
    static = place = 0
    for piece in pieces:
        if isinstance(piece, str):
            order.append(static)
            relaxed_order.append(static)
            static += 1
        else:
            order.append(len(statics) + numbers[piece])
            at = held_places[place]
            relaxed_order.append(len(statics) + (numbers[piece] if at is None else len(numbers) + held.index(at)))
            place += 1
    for texts, places in ((statics, order), (relaxed_statics, relaxed_order)):
        if places and places[0] == 0 and len(texts) > 0:  # the part begins with text: the head goes in front of it
            texts[0] = head + texts[0]
        else:
            texts.insert(0, head)
            places[:] = [0, *(at + 1 for at in places)]
    return SevenBit(
        tuple(reads),
        tuple(statics),
        *weave(statics, order),
        *weave(relaxed_statics, relaxed_order),
        tuple(held),
        tuple(numbers[key] for key, use in uses.items() if use.filled),
        statics == relaxed_statics and not held,
    )


# ---- what the places ask for


def _uses(pieces: Sequence[str | Key], slots: Mapping[Key, Slot]) -> dict[Key, _Use] | None:
    """Every slot with what its places ask for; None when the static text alone cannot travel as 7-bit."""
    uses: dict[Key, _Use] = {}
    line: list[Key] = []  # the slots of the line at hand
    length = 0  # its static octets
    starting = True  # nothing but slots so far, which may be empty
    equals = False  # does the last static text end in "="?
    run: list[Key] = []  # the slots since the last static text

    def end_line() -> bool:
        if length > LINE:
            return False
        for key in line:
            use = uses[key]
            use.room = min(use.room, (LINE - length) // len(line))
            if use.room < _LEAST:
                return False
        return True

    for number, piece in enumerate(pieces):
        if not isinstance(piece, str):
            use = uses.setdefault(piece, _Use())
            # what a block prints may end in a line end: then the next one begins a line
            use.starts = use.starts or starting or any(slots[key].source is not None for key in run)
            use.filled = use.filled or (slots[piece].source is None and _blanks_meet(pieces, number))
            line.append(piece)
            run.append(piece)
            continue
        if not _STATIC.fullmatch(piece) or _BOUNDARY.search(piece):
            return None
        if piece.startswith("_"):
            for key in run:
                uses[key].closed = True
                uses[key].solid = uses[key].solid or equals
        equals = piece.endswith("=")
        rows = piece.split("\n")
        for row_number, row in enumerate(rows):
            if row_number:
                if not end_line():
                    return None
                line, length, starting = [], 0, True
            if row.startswith((".", "From ")):
                if starting and not line:
                    return None
                if starting or (not row_number and any(slots[key].source is not None for key in run)):
                    for key in run:
                        uses[key].solid = True
            length += len(row)
            starting = starting and not row
        run = []
    return uses if end_line() else None


def _blanks_meet(pieces: Sequence[str | Key], number: int) -> bool:
    """Would blanks meet each other or a line's end if this slot were empty? Yes also next to another slot."""
    before = pieces[number - 1] if number else "\n"
    after = pieces[number + 1] if number + 1 < len(pieces) else "\n"
    if not isinstance(before, str) or not isinstance(after, str):
        return True
    return before[-1] in " \t" and after[0] in " \t\n"


def _block_fits(source: str, html: bool) -> bool:
    """May what the author wrote inside a block travel as it stands? Else every recipient would take the slow path."""
    if not html and not source.isascii():
        return False
    return not any(len(line) > LINE or line.startswith((".", "From ")) for line in static_lines(source))


# ---- values


def _reader(slot: Slot, use: _Use) -> Read:
    if slot.source is not None:
        return _block_reader(slot, use)
    words, room, starts, solid, closed = slot.words, use.room, use.starts, use.solid, use.closed
    errors = "xmlcharrefreplace" if slot.html else "strict"

    def general(frame: Frame) -> bytes | None:
        try:
            data = words(frame).encode("ascii", errors)
        except UnicodeEncodeError:
            return None
        if len(data) > room or not _FITS.fullmatch(data) or data.find(b"=_") >= 0:
            return None
        if (solid and not data) or (closed and data.endswith(b"=")):
            return None
        return None if starts and (data.startswith(_AT_START) or data in _FROM_BEGUN) else data

    name = slot.field
    if not name or starts or closed:
        return _remembered(general, slot.depends)
    simple = (_SIMPLE_HTML if slot.html else _SIMPLE_TEXT).fullmatch

    def field(frame: Frame) -> bytes | None:
        value = frame.values.get(name)
        if type(value) is str and simple(value):
            data = value.encode("ascii", errors)
            return data if len(data) <= room else None
        return general(frame)

    return _remembered(field, slot.depends)


def _remembered(read: Read, depends: str) -> Read:
    """The same, by a look-up for values that came before. What does not fit is not kept: it is rare."""
    if not depends:
        return read
    recall: Recall[str | int, bytes] = Recall()
    known = recall.get

    def look(frame: Frame) -> bytes | None:
        value = frame.values.get(depends)
        if type(value) is not str and type(value) is not int:  # True and 1.0 are equal to 1, and print otherwise
            return read(frame)
        data = known(value)
        if data is None:
            data = read(frame)
            if data is not None:
                recall.keep(value, data)
        return data

    return look


def _block_reader(slot: Slot, use: _Use) -> Read:
    words, room, starts, solid, closed = slot.words, use.room, use.starts, use.solid, use.closed
    errors = "xmlcharrefreplace" if slot.html else "strict"

    def block(frame: Frame) -> bytes | None:
        try:
            data = words(frame).encode("ascii", errors)
        except UnicodeEncodeError:
            return None
        if data.translate(None, _BLOCK_OCTETS):
            return None  # a CR or another control
        if data.find(b"=_") >= 0 or data.startswith(b"_") or (solid and (not data or data.endswith(b"\n"))):
            return None
        if closed and data.endswith(b"="):
            return None
        if starts and (data.startswith(_AT_START) or data in _FROM_BEGUN):
            return None
        if data.find(b"\n") < 0:
            return data if len(data) <= room else None
        if data.find(b"\n.") >= 0 or data.find(b"\nFrom ") >= 0 or data[data.rindex(b"\n") + 1 :] in _FROM_BEGUN:
            return None
        if len(data) > room and max(map(len, data.split(b"\n"))) > room:
            return None
        return data.replace(b"\n", b"\r\n")

    return _remembered(block, slot.depends)


# ---- the canonical form


def _canonical(
    pieces: Sequence[str | Key], slots: Mapping[Key, Slot], numbers: Mapping[Key, int]
) -> tuple[list[bytes], list[_Held | None]]:
    """The canonical form of every static piece, and how every place of a slot is filled: None by the value itself."""
    forms: list[bytes] = []  # by piece; b"" for slots
    for number, piece in enumerate(pieces):
        form = b""
        if isinstance(piece, str):
            form = _relaxed(piece.replace("\n", "\r\n").encode("ascii"))
            if number + 1 == len(pieces):
                form = form.removesuffix(b" ")
        forms.append(form)
    held: list[_Held | None] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            continue
        if slots[piece].source is None:
            held.append(None)
            continue
        first, last = number == 0, number + 1 == len(pieces)
        bare = (not first and _slot_like(pieces[number - 1], forms[number - 1], number - 1, len(pieces))) or (
            not last and _slot_like(pieces[number + 1], forms[number + 1], number + 1, len(pieces))
        )
        before = after = b""
        if not bare and not first and forms[number - 1].endswith(b" "):
            before, forms[number - 1] = b" ", forms[number - 1][:-1]
        if not bare and not last and forms[number + 1].startswith(b" "):
            after, forms[number + 1] = b" ", forms[number + 1][1:]
        ends = not bare and not after and (last or not forms[number + 1] or forms[number + 1].startswith(b"\r\n"))
        held.append(_Held(numbers[piece], before, after, ends, bare))
    return [form for form, piece in zip(forms, pieces, strict=True) if isinstance(piece, str)], held


def _slot_like(piece: str | Key, form: bytes, number: int, count: int) -> bool:
    """A slot, or a single blank between two of them: no static text to tell the blanks of both sides apart."""
    return not isinstance(piece, str) or (form in (b" ", b"") and 0 < number < count - 1)
