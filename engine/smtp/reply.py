"""A server's reply as a value: code, lines, enhanced code (RFC 3463), text.

Law: the text is bytes of a stranger, decoded with every control character replaced, so no log or page can be written
with it. `engine.smtp.parser` makes replies out of bytes.
"""

from __future__ import annotations

import re

import msgspec

SHOWN = 2048  # characters of text kept of a reply, as Postfix's line_length_limit

_ENHANCED = re.compile(rb"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?=[ \t]|$)")
_STATUS = {b"2.0.0 ": "2.0.0", b"2.6.0 ": "2.6.0", b"2.1.5 ": "2.1.5"}  # of nearly every delivery (1.5 us saved)
_UNSHOWN = re.compile(r"[^\x20-\x7e\xa1-\u200a\u2010-\u2027\u2030-\u205f\u2070-\ud7ff\uf900-\ufefe\uff00-\uffef]")


class Reply(msgspec.Struct, frozen=True):
    """One reply: basic code and its lines without code. The text is made only when somebody asks for it."""

    code: int
    lines: tuple[bytes, ...]

    @property
    def accepted(self) -> bool:
        return 200 <= self.code <= 299

    @property
    def enhanced(self) -> str:
        """The enhanced code (RFC 3463) of the first line that has one of the basic code's class, or of any, or "".

        Exactly three numbers: "5.7 text" is none (CVE-2026-43964 was a reader that ran on).
        """
        if (status := _STATUS.get(self.lines[0][:6])) is not None and self.code // 100 == 2:
            return status
        other = ""
        for line in self.lines:
            if found := _ENHANCED.match(line.lstrip(b" #")):
                status = found[1].decode("ascii")
                if status[0] == str(self.code)[0]:
                    return status
                other = other or status
        return other

    @property
    def text(self) -> str:
        """Without code and enhanced codes, lines joined by blanks, printable, at most 2,048 characters."""
        words = []
        for line in self.lines:
            found = _ENHANCED.match(line)
            words.append((line[found.end() :] if found else line).strip())
        return printable(b" ".join(word for word in words if word))

    def __str__(self) -> str:
        return " ".join(part for part in (str(self.code), self.enhanced, self.text) if part)


class Malformed(msgspec.Struct, frozen=True):
    """What came is no reply. overflow: it was cut off at the caps."""

    overflow: bool
    sample: str


def printable(text: bytes) -> str:
    """Anything as one line that can do nothing to a terminal, a log or a page of text; not HTML-escaped."""
    return _UNSHOWN.sub("\N{REPLACEMENT CHARACTER}", text[: SHOWN * 4].decode("utf-8", "replace"))[:SHOWN]
