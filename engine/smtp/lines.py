"""What is written: the one place where commands and bodies become bytes, and what EHLO's reply says may be written.

Law: whatever the arguments, what `commands` and `flight` return is command lines of printable characters, each at most
512 octets with its CRLF and nothing else between (S-07); `stuffed` never leaves a line that begins with one dot. Of a
``proven`` body only this is asked, that nothing in it ends the data before its end, without a copy: that no line begins
with a dot is the composer's law, and tests/laws/test_wire_laws.py asks it of both together.

Bodies are searched by the C library's strstr, which compares 16 octets at a time: 1.5 us for 35 kB and 0.5 to rule
out a NUL, where it would stop; `in` needs 4.4 (CPython 3.11). Without strstr `in` does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, cast

from engine.smtp.reply import Reply
from engine.smtp.words import Outbound, Trouble

MAX_LINE = 512  # RFC 5321 4.5.3.1.4, with CRLF; our longest MAIL is below 330 octets


class LocalError(Exception):
    """The caller broke the rules: a line that is none, a message nobody wants, a renewal nobody waits for."""


def commands(*lines: str) -> bytes:
    """Command lines as one piece of the wire. Raises LocalError for what is not a line."""
    for line in lines:
        if not line.isprintable():  # also refuses CR, LF, NUL, U+2028 and lone surrogates
            raise LocalError("a command has a character that cannot be printed")
    data = ("\r\n".join(lines) + "\r\n").encode("utf-8")
    if len(data) > MAX_LINE and any(len(line) > MAX_LINE - 2 for line in data.split(b"\r\n")):
        raise LocalError("a command is longer than RFC 5321 4.5.3.1.4 allows")
    return data


def flight(message: Outbound, extensions: dict[str, str]) -> bytes:
    """MAIL, RCPT and DATA as one piece of the wire: `commands` of the three in half its time (1.3 us)."""
    opening, recipient = mail(message, extensions), rcpt(message)
    if not (opening.isprintable() and recipient.isprintable()):
        raise LocalError("a command has a character that cannot be printed")
    data = f"{opening}\r\n{recipient}\r\nDATA\r\n".encode()
    return data if len(data) <= MAX_LINE else commands(opening, recipient, "DATA")


def mail(message: Outbound, extensions: dict[str, str]) -> str:
    """MAIL with the parameters the peer offered and this message needs."""
    line = f"MAIL FROM:<{message.sender}>"
    if "SIZE" in extensions:
        line = f"{line} SIZE={len(message.data)}"
    if message.eight_bit:
        line += " BODY=8BITMIME"
    if not (message.recipient.isascii() and message.sender.isascii()):
        line += " SMTPUTF8"
    return line


def rcpt(message: Outbound) -> str:
    return f"RCPT TO:<{message.recipient}>"


def misfit(message: Outbound, extensions: dict[str, str], max_size: int) -> Trouble | None:
    """Why a peer with these extensions cannot be offered this message at all, or None."""
    if max_size and len(message.data) > max_size:
        return Trouble.TOO_LARGE
    if not (message.recipient.isascii() and message.sender.isascii()) and "SMTPUTF8" not in extensions:
        return Trouble.NEEDS_SMTPUTF8
    if message.eight_bit and "8BITMIME" not in extensions:
        return Trouble.NEEDS_8BITMIME
    return None


def stuffed(data: bytes) -> bytes:
    """RFC 5321 4.5.2. Most bodies have no line that begins with a dot: then it is one search and no copy."""
    if _holds(data, b"\r\n."):
        data = data.replace(b"\r\n.", b"\r\n..")
    return b"." + data if data.startswith(b".") else data


def ends_early(data: bytes) -> bool:
    """Whether a peer would take a line of it for the end of the data (RFC 5321 4.1.1.4)."""
    return _holds(data, b"\r\n.\r\n") or data.startswith(b".\r\n")


def _holds(data: bytes, part: bytes) -> bool:
    if _STRSTR is None or data.find(b"\0") >= 0:
        return part in data
    return _STRSTR(data, part) is not None


def _strstr() -> Callable[[bytes, bytes], int | None] | None:
    try:
        found = ctypes.PyDLL(None).strstr  # PyDLL: a call this short does not let go of the interpreter's lock
    except (AttributeError, OSError):
        return None
    found.restype = ctypes.c_void_p
    found.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    return cast("Callable[[bytes, bytes], int | None]", found)


_STRSTR: Final = _strstr()


def extensions_of(reply: Reply) -> dict[str, str]:
    """EHLO keywords in upper case and their parameters (RFC 5321 4.1.1.1); the first of a kind counts."""
    found: dict[str, str] = {}
    for line in reply.lines[1:]:
        keyword, _, parameters = line.decode("ascii", "replace").partition(" ")
        found.setdefault(keyword.upper(), parameters.strip())
    return found


def size_limit(extensions: dict[str, str]) -> int:
    """Octets the peer takes; 0 is no limit, as is a limit that cannot be read (RFC 1870 4)."""
    size = extensions.get("SIZE", "")
    return int(size) if size.isdecimal() and size.isascii() and len(size) < 20 else 0
