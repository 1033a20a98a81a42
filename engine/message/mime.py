"""MIME: parts in quoted-printable or base64, 7-bit on the wire, whose DKIM relaxed canonical form is themselves.

Law: for any text or bytes, what is made here (a) decodes to the input by any MIME reader, (b) is ASCII in lines of at
most 76 characters ended by CRLF, no bare CR or LF, no line that begins with a dot (so dot-stuffing never touches it),
(c) equals its own relaxed canonical form (RFC 6376 3.4.4): no space at a line's end, no run of spaces, no tab, and a
finished body ends with exactly one CRLF. Canonicalising a body costs 300 us with the usual two substitutions
(performance.md E5), so it is paid once here, at compile time.

Quoted-printable makes it possible: the second space of a run is =20, a tab =09, a leading dot =2E, and "From " at a
line's start =46rom (relays that write mbox files would change it). A slot is isolated by soft line breaks, so that
neither its value nor the text around it can change the other's encoding.

Line ends of the source (CRLF, CR or LF) all become CRLF. A boundary contains "=_", which neither quoted-printable nor
base64 can produce, so it cannot collide with content.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Mapping
from typing import Final

from engine.message import headers
from engine.message.attachment import Attachment
from engine.message.recall import Recall

SOFT: Final = b"=\r\n"
_LIMIT: Final = 75  # and the "=" of the soft break: 76, RFC 2045 6.7

_PLAIN = re.compile(rb"(?!\.|From )(?: ?[!-<>-~]++(?: [!-<>-~]++)*+ ?)?")
_PLAIN_LINE = re.compile(rb"(?!\.|From )(?: ?[!-<>-~]++(?: [!-<>-~]++)*+)?")
# text that needs no escape, in HTML neither, and as quoted-printable at most soft line breaks (`cut_plain`)
AS_IT_STANDS: Final = re.compile(r"(?!\.|From )[!#-%(-;?-~]++(?: [!#-%(-;?-~]++)*+")
_PRINTABLE = re.compile(rb"[ -~]*")
_ENDS = re.compile(r"\r\n|\r|\n")


def quote_slot(data: bytes, known: Mapping[bytes, bytes] | None = None) -> bytes:
    """The quoted-printable form of a slot's value, which stands at the start of a line and is followed by a soft break.

    Most values are short plain ASCII and are their own form: one regular expression, 0.3 us. known: lines with their
    form (`QuotedLines`), 0.1 us each; the others cost 1.5 us.
    """
    if data.find(b"\n") < 0 and _PLAIN.fullmatch(data):  # see engine.message.sevenbit on `in`
        short = cut_plain(data)
        if short is not None:
            return short
    if data.find(b"\r") >= 0:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = data.split(b"\n")
    return b"\r\n".join([_quote_line(line) for line in lines] if known is None else map(known.__getitem__, lines))


class QuotedLines(dict[bytes, bytes]):
    """The quoted-printable form of the lines that a block prints, for `quote_slot`: static ones from the start, others
    when they came before (engine.message.recall)."""

    __slots__ = ("_recall",)

    def __init__(self, lines: Iterable[bytes]) -> None:
        super().__init__({line: _quote_line(line) for line in lines})
        self._recall: Recall[bytes, bytes] = Recall()

    def __missing__(self, line: bytes) -> bytes:
        form = self._recall.get(line)
        return self._recall.keep(line, _quote_line(line)) if form is None else form


def quote_text(data: bytes) -> bytes:
    """Quoted-printable of text with LF line ends that begins at the start of a line. It ends without a break."""
    return b"\r\n".join([_quote_line(line) for line in data.split(b"\n")])


def cut_plain(data: bytes) -> bytes | None:
    """Plain text in pieces of a line's length, None when one would begin with what may not begin a line."""
    length = len(data)
    if length <= _LIMIT:
        return data
    if length <= 2 * _LIMIT:  # an opt-out link has 80 to 120
        rest = data[_LIMIT:]
        return None if rest.startswith((b".", b"From ")) else data[:_LIMIT] + SOFT + rest
    cut = SOFT.join([data[at : at + _LIMIT] for at in range(0, len(data), _LIMIT)])
    return cut if b"\n." not in cut and b"\nFrom " not in cut else None


def _quote_line(line: bytes) -> bytes:
    if _PLAIN_LINE.fullmatch(line):
        short = cut_plain(line)
        if short is not None:
            return short
    if _PRINTABLE.fullmatch(line):
        quoted = line.replace(b"=", b"=3D")
    else:  # the library's own line breaks out again: it is C, a table by byte costs ten times as much
        quoted = binascii.b2a_qp(line).replace(b"=\n", b"").replace(b"\t", b"=09").replace(b"\r", b"=0D")
    quoted = quoted.replace(b"  ", b" =20").replace(b"  ", b" =20")
    if quoted.endswith(b" "):
        quoted = quoted[:-1] + b"=20"
    pieces: list[bytes] = []
    while True:
        if quoted.startswith(b"."):
            quoted = b"=2E" + quoted[1:]
        elif quoted.startswith(b"From "):
            quoted = b"=46rom " + quoted[5:]
        if len(quoted) <= _LIMIT:
            pieces.append(quoted)
            return b"=\r\n".join(pieces)
        cut = _LIMIT
        if quoted[cut - 1] == 0x3D:
            cut -= 1
        elif quoted[cut - 2] == 0x3D:
            cut -= 2
        pieces.append(quoted[:cut])
        quoted = quoted[cut:]


def base64_lines(data: bytes) -> bytes:
    """Base64 in lines of 76, the last one ended too. Empty data gives one empty line's worth: b""."""
    encoded = binascii.b2a_base64(data, newline=False)
    return b"".join([encoded[at : at + 76] + b"\r\n" for at in range(0, len(encoded), 76)])


def unify_line_ends(text: str) -> str:
    """CRLF, CR and LF all become LF, the form everything here takes in."""
    return _ENDS.sub("\n", text) if "\r" in text else text


def part_head(content_type: str, pairs: tuple[tuple[str, str], ...], encoding: str, extra: bytes = b"") -> bytes:
    """The header of one body part and the empty line behind it."""
    return (
        headers.parameters("Content-Type", content_type, pairs)
        + headers.structured("Content-Transfer-Encoding", encoding)
        + extra
        + b"\r\n"
    )


def attachment_part(attachment: Attachment) -> bytes:
    """Head and base64 content, without the last line end (it belongs to the boundary, RFC 2046 5.1.1)."""
    inline = attachment.cid is not None
    pairs = [("filename", attachment.filename)]
    extra = headers.parameters("Content-Disposition", "inline" if inline else "attachment", pairs)
    if inline:
        extra += headers.structured("Content-ID", f"<{attachment.cid}>")
    head = part_head(attachment.content_type, (("name", attachment.filename),), "base64", extra)
    return head + base64_lines(attachment.content).removesuffix(b"\r\n")


_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,60}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,60}")
_CID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}")


def attachment_fault(attachment: Attachment) -> str | None:
    """Why this attachment cannot travel, or None."""
    if not _TYPE.fullmatch(attachment.content_type):
        return "the content type must look like image/png, without parameters"
    if attachment.content_type.lower().split("/")[0] in ("multipart", "message"):
        return "multipart and message types cannot be attached (they may not be base64, RFC 2046 5.2.1)"
    if not 0 < len(attachment.filename) <= 150 or attachment.filename.strip() != attachment.filename:
        return "the file name must have 1 to 150 characters and no spaces around it"
    if "/" in attachment.filename or "\\" in attachment.filename:
        return "the file name must not be a path"
    if attachment.cid is not None and not _CID.fullmatch(attachment.cid):
        return "a cid has letters, digits and ._@+- only"
    try:
        headers.refuse_controls("filename", attachment.filename)
    except headers.HeaderError as error:
        return str(error)
    return None if attachment.content else "the content is empty"
