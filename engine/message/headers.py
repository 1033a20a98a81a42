"""Headers: the one place where a header line of ours is made (a choke point; laws in tests/laws/test_header_laws.py).

Law: whatever text comes in, what comes out is exactly one header field in ASCII (UTF-8 only inside an address that has
no other spelling, RFC 6532), every line at most 998 octets, CRLF only where the field folds, and a reader gets the
same text back. What cannot be written so is refused with `HeaderError`, never stripped: CR, LF, NUL and every other
control, U+2028, U+2029, lone surrogates. It is checked before encoding and again on the finished bytes
(mail-standards.md 2.6; CPython's CVE-2024-6923 and CVE-2026-1299 are why we do not lend this to the library, and its
serialiser encodes a long List-Unsubscribe into uselessness, 2.4).

    unstructured   Subject and the producer's own: RFC 2047 words where needed (75 characters each, lines at most 76)
    mailbox        From, To, Reply-To: display name as atoms, quoted string or encoded words
    structured     ASCII grammar that must never be encoded: Message-ID, List-Id, Feedback-ID
    uri_list       List-Unsubscribe: <https...>, <mailto...>, folded only at the comma (RFC 2369, RFC 8058)
    parameters     Content-Type and Content-Disposition, long or non-ASCII values by RFC 2231

    Prepared       the fields of every recipient in two forms, as written and canonical, by one look when plain

`relaxed` gives the DKIM canonical form of a finished field (RFC 6376 3.4.2).

Known limit: an ASCII word longer than 900 octets in an unstructured field is written as encoded words, since it cannot
be folded; readers put it together again.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import quote

LINE = 76  # RFC 5322 asks for 78, RFC 2047 limits a line with an encoded word to 76
HARD_LINE = 998  # RFC 5322 2.1.1
MAX_FIELD = 16_384  # octets of one field; longer ones are refused by large providers anyway

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,75}")
_FINISHED = re.compile(
    rb"[A-Za-z][A-Za-z0-9-]*: [^\x00-\x20\x7f][^\x00-\x1f\x7f]*(?:\r\n +[^\x00-\x20\x7f][^\x00-\x1f\x7f]*)*\r\n"
)
_LONG_LINE = re.compile(rb"[^\n]{999,}")  # 998 and the CR
_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_TOKEN = re.compile(r"[A-Za-z0-9!#$&+^_.-]+")
_URI = re.compile(r"[!#-+\--;=?-\[\]-~]+")  # visible ASCII but quotes, comma, backslash and angle brackets
_BARE_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9.-]+")
_STRUCTURED = re.compile(r"[!-~]+(?: [!-~]+)*")
_SPACES = re.compile(rb"[ \t]+")
_PLAIN_FILENAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?: [A-Za-z0-9._-]+)*")


class HeaderError(ValueError):
    """The text cannot be a header. The message names the field and the rule, never the text (it may be personal)."""


def refuse_controls(name: str, text: str) -> str:
    """text itself, or HeaderError when it holds anything that could end, split or hide a line."""
    if _FORBIDDEN.search(text):
        raise HeaderError(f"{name}: line breaks, control characters and lone surrogates cannot be in a header")
    return text


def unstructured(name: str, text: str) -> bytes:
    """A field whose value is free text; outer spaces go, an empty value is refused."""
    text = refuse_controls(name, text).strip(" ")
    if text.isascii() and len(name) + len(text) + 2 <= LINE and "=?" not in text and text:
        return finished(name, f"{name}: {text}\r\n".encode("ascii"))
    if not text:
        raise HeaderError(f"{name}: the value is empty")
    if text.isascii() and "=?" not in text:
        folded = _fold_words(f"{name}: {text}")
        if max(map(len, folded)) <= 900:
            return finished(name, "\r\n".join(folded).encode("ascii") + b"\r\n")
    return finished(name, _lines(name, _encoded_words(text)))


def mailbox(name: str, entries: Sequence[tuple[str, str]]) -> bytes:
    """From, To, Reply-To: (display name or "", wire address) each. policy.address has validated the address."""
    if len(entries) == 1 and not entries[0][0] and _BARE_ADDRESS.fullmatch(entries[0][1]):
        return finished(name, f"{name}: {entries[0][1]}\r\n".encode("ascii"))
    written: list[str] = []
    for display, address in entries:
        if not address or (any(character in address for character in "<>\r\n\t ,") and not address.startswith('"')):
            raise HeaderError(f"{name}: not an address")
        if "<" in address or ">" in address:
            raise HeaderError(f"{name}: not an address")
        refuse_controls(name, address)
        if refuse_controls(name, display).strip(" "):
            written.extend(_phrase(name, display))
            written.append(f"<{address}>")
        else:
            written.append(address)
        written[-1] += ","
    if not written:
        raise HeaderError(f"{name}: no address")
    written[-1] = written[-1][:-1]
    return finished(name, _lines(name, written))


def structured(name: str, value: str, *, fold: bool = True) -> bytes:
    """A field with a grammar of its own, ASCII, never encoded; folded at spaces only (not at all with fold=False)."""
    if not _STRUCTURED.fullmatch(value):
        raise HeaderError(f"{name}: must be ASCII with single spaces")
    line = f"{name}: {value}"
    lines = _fold_words(line) if fold and len(line) > LINE else [line]
    return finished(name, "\r\n".join(lines).encode("ascii") + b"\r\n")


def uri_list(name: str, uris: Sequence[str]) -> bytes:
    """List-Unsubscribe and its kin: <uri>, <uri>, one a line, broken nowhere else (mail-standards.md 2.4)."""
    for uri in uris:
        if not _URI.fullmatch(uri):
            raise HeaderError(f"{name}: a URI must be ASCII without spaces, commas and angle brackets")
    if not uris:
        raise HeaderError(f"{name}: no URI")
    listed = ",\r\n ".join(f"<{uri}>" for uri in uris)
    return finished(name, f"{name}: {listed}\r\n".encode("ascii"))


def parameters(name: str, value: str, pairs: Iterable[tuple[str, str]]) -> bytes:
    """Content-Type or Content-Disposition: value; then one parameter a line where the line would be too long.

    Values that are not plain tokens or simple quoted names are written by RFC 2231 in pieces of at most 60 octets:
    inside a body a run of spaces would not be its own canonical form (RFC 6376 3.4.4).
    """
    refuse_controls(name, value)
    if not all(_TOKEN.fullmatch(piece) for piece in value.split("/")):
        raise HeaderError(f"{name}: not a valid value")
    words = [value]
    for key, text in pairs:
        refuse_controls(name, text)
        words[-1] += ";"
        if _TOKEN.fullmatch(text) and len(text) <= 60:
            words.append(f"{key}={text}")
        elif (_PLAIN_FILENAME.fullmatch(text) or key in ("boundary", "type")) and len(text) <= 60:
            words.append(f'{key}="{text}"')
        else:
            words.extend(_extended(key, text))
    return finished(name, _lines(name, words))


Both = tuple[bytes, bytes]  # a field as written, and its canonical form


class Prepared:
    """One field that is written for every recipient. What one look shows to be plain goes out at once, in both forms
    (0.6 us); everything else takes the writers above and gets their answer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lead = f"{name}: ".encode("ascii")
        self._low = f"{name.lower()}:".encode("ascii")

    def text(self, text: str) -> Both:
        """As `unstructured`."""
        if len(text) <= LINE - len(self._lead) and _STRUCTURED.fullmatch(text) and "=?" not in text:
            return self._both(text.encode("ascii"))
        return self._written(unstructured(self._name, text))

    def address(self, display: str, address: str) -> Both:
        """As `mailbox` with one entry."""
        if not display and len(address) <= 320 and _BARE_ADDRESS.fullmatch(address):
            return self._both(address.encode("ascii"))
        return self._written(mailbox(self._name, ((display, address),)))

    def uris(self, uris: Sequence[str]) -> Both:
        """As `uri_list`."""
        for uri in uris:
            if len(uri) > 900 or not _URI.fullmatch(uri):
                break
        else:
            if 0 < len(uris) <= 4:
                listed = ">,\r\n <".join(uris).encode("ascii")
                low = listed.replace(b"\r\n", b"") if len(uris) > 1 else listed
                return self._lead + b"<" + listed + b">\r\n", self._low + b"<" + low + b">\r\n"
        return self._written(uri_list(self._name, uris))

    def _both(self, value: bytes) -> Both:
        return self._lead + value + b"\r\n", self._low + value + b"\r\n"

    @staticmethod
    def _written(field: bytes) -> Both:
        return field, relaxed(field)


def id_end(domain: str) -> bytes:
    """What ends every Message-ID of a domain; HeaderError when it cannot."""
    structured("Message-ID", f"<{'f' * 40}.{'f' * 40}@{domain}>", fold=False)
    return f"@{domain}>\r\n".encode("ascii")


def relaxed(field: bytes) -> bytes:
    """The DKIM relaxed canonical form of one finished field, with its CRLF (RFC 6376 3.4.2)."""
    name, _, value = field.partition(b":")
    value = value.replace(b"\r\n", b"")
    if b"  " not in value and b"\t" not in value and value[-1:] != b" ":
        return name.lower() + b":" + value[1:] + b"\r\n"  # as most fields of ours are
    return name.strip().lower() + b":" + _SPACES.sub(b" ", value).strip(b" \t") + b"\r\n"


def valid_name(name: str) -> bool:
    """May this be the name of a header of the producer's own? (Whether it is reserved is the campaign's question.)"""
    return _NAME.fullmatch(name) is not None


def finished(name: str, field: bytes) -> bytes:
    """The second look, at the finished bytes: exactly one field, no control, no line over the limit."""
    if not _FINISHED.fullmatch(field) or not _NAME.fullmatch(name):
        raise HeaderError(f"{name}: cannot be written as a header")
    if len(field) > MAX_FIELD:
        raise HeaderError(f"{name}: longer than {MAX_FIELD} octets")
    if len(field) > HARD_LINE and _LONG_LINE.search(field):
        raise HeaderError(f"{name}: a line would be longer than {HARD_LINE} octets")
    return field


def _lines(name: str, words: Sequence[str]) -> bytes:
    """Words joined by spaces, folded where the line would pass 76; a word is never broken."""
    lines = [f"{name}:"]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > LINE and lines[-1] != f"{name}:":
            lines.append("")
        lines[-1] += " " + word
    return "\r\n".join(lines).encode("utf-8") + b"\r\n"


def _fold_words(line: str) -> list[str]:
    """Folds before a run of spaces so that no line passes 76 where a space allows it; unfolding gives line back."""
    lines: list[str] = []
    start = line.index(": ") + 2  # never between name and the first word: an empty first line confuses some readers
    while len(line) > LINE:
        cut = line.rfind(" ", start, LINE + 1)
        if cut == -1:
            cut = line.find(" ", LINE + 1)
        if cut == -1:
            break
        while line[cut - 1] == " " and cut > start:
            cut -= 1
        if cut <= start:
            cut = line.find(" ", start + len(line[start:]) - len(line[start:].lstrip(" ")))
            if cut == -1:
                break
        lines.append(line[:cut])
        line = line[cut:]
        start = len(line) - len(line.lstrip(" "))
    lines.append(line)
    return lines


def _phrase(name: str, display: str) -> list[str]:
    """A display name as words that may be folded between."""
    display = refuse_controls(name, display).strip(" ")
    if display.isascii() and "=?" not in display:
        if len(display) <= 60 and _ATOMS.fullmatch(display):
            return [display]
        quoted = display.replace("\\", "\\\\").replace('"', '\\"')
        if len(quoted) <= 60:
            return [f'"{quoted}"']
    return _encoded_words(display)


_Q_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_Q = {
    byte: "_" if byte == 0x20 else chr(byte) if byte in _Q_SAFE else f"={byte:02X}" for byte in range(256)
}  # one byte's form in a Q word
_ROOM = 60 - len("=?utf-8?q??=")


class _QForms(dict[str, str]):
    """One character's form in a Q word, kept once asked for."""

    def __missing__(self, character: str) -> str:
        form = "".join([_Q[byte] for byte in character.encode("utf-8")])
        if len(self) < 4096:
            self[character] = form
        return form


_Q_FORMS = _QForms()


def _encoded_words(text: str) -> list[str]:
    """RFC 2047: words of at most 60 characters, whole characters in each; Q or B, whichever is shorter.

    60 and not 75: a word begins anywhere on its line, also right behind a field name (76 a line, RFC 2047 2).
    """
    forms = [_Q_FORMS[character] for character in text]
    quoted = "".join(forms)
    data = text.encode("utf-8")
    if len(quoted) > (len(data) + 2) // 3 * 4:
        pieces = _packed(text, lambda character: len(character.encode("utf-8")), _ROOM // 4 * 3)
        return [f"=?utf-8?b?{base64.b64encode(piece.encode('utf-8')).decode('ascii')}?=" for piece in pieces]
    if len(quoted) <= _ROOM:
        return [f"=?utf-8?q?{quoted}?="]
    words: list[str] = []
    start = used = 0
    for place, form in enumerate(forms):
        used += len(form)
        if used > _ROOM:  # no form is longer than 12
            words.append("=?utf-8?q?" + "".join(forms[start:place]) + "?=")
            start, used = place, len(form)
    words.append("=?utf-8?q?" + "".join(forms[start:]) + "?=")
    return words


def _packed(text: str, size: Callable[[str], int], room: int) -> list[str]:
    """Whole characters in as few pieces as there must be, none of them over the room."""
    pieces: list[str] = []
    start = used = 0
    for place, character in enumerate(text):
        length = size(character)
        if place > start and used + length > room:
            pieces.append(text[start:place])
            start, used = place, 0
        used += length
    pieces.append(text[start:])
    return pieces


def _extended(key: str, text: str) -> list[str]:
    """RFC 2231: key*=utf-8''... or, when long, key*0*=, key*1*= ...; a percent triple is never broken."""
    encoded = quote(text, safe="", encoding="utf-8")
    if len(encoded) <= 50:
        return [f"{key}*=utf-8''{encoded}"]
    pieces = re.findall(r"(?:%[0-9A-F]{2}|[^%]){1,16}", encoded)
    pieces[0] = "utf-8''" + pieces[0]
    words = [f"{key}*{number}*={piece};" for number, piece in enumerate(pieces)]
    words[-1] = words[-1][:-1]
    return words
