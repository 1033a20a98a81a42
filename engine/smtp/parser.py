"""From bytes to replies, one at a time, on demand.

Law: any split of the same bytes gives the same replies; garbage ends in `Malformed`, never in an exception; memory is
bounded by MAX_BYTES and MAX_LINES whatever the peer sends.

Tolerated (Postel, and real servers): LF alone as line end, no text, no space before the text, blanks after it,
continuation lines whose code differs (the last line's counts: RFC 5321 4.2.1 tells clients to look at the last).
Refused: a line that does not start with three digits 200 to 599, or has a fourth digit or a letter behind them.
A server's answers to MAIL and DATA are the same words every time: lines once read are not read again (0.3 us, not 1.1).
"""

from __future__ import annotations

from engine.smtp.reply import Malformed, Reply, printable

MAX_BYTES = 64 * 1024  # of one reply; Postfix stops at 2 kB a line, the longest honest EHLO seen is below 2 kB
MAX_LINES = 128
KNOWN = 16  # one-line replies a parser remembers, none longer than `COMMON` octets
COMMON = 128


class ReplyParser:
    """feed() bytes, then next_reply() until it returns None. Once Malformed, for ever."""

    __slots__ = ("_at", "_buffer", "_known", "_lines", "_scanned", "_size", "_spoilt")

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0  # of the buffer, up to where replies have used it up
        self._lines: list[bytes] = []  # of the reply that is not complete
        self._size = 0  # octets of those lines
        self._scanned = 0  # of the buffer, up to where there is no line end
        self._spoilt: Malformed | None = None
        self._known: dict[bytes, Reply] = {}  # by whole lines, with their line end

    @property
    def pending(self) -> bool:
        """Whether anything was fed that no reply has used up."""
        return self._at < len(self._buffer) or bool(self._lines)

    def feed(self, data: bytes) -> None:
        if self._at < len(self._buffer):
            data = self._buffer[self._at :] + data
        self._scanned -= self._at
        self._buffer, self._at = data, 0

    def next_reply(self) -> Reply | Malformed | None:
        """The next complete reply, or None when more bytes are needed."""
        while True:
            if self._spoilt is not None:
                return self._spoilt
            buffer, at = self._buffer, self._at
            after = buffer.find(b"\n", self._scanned) + 1
            if not after:
                self._scanned = len(buffer)
                if len(buffer) - at + self._size > MAX_BYTES:
                    return self._spoil(buffer[at:], overflow=True)
                return None
            self._at = self._scanned = after
            whole = buffer[at:after]
            if (known := self._known.get(whole)) is not None and not self._lines:
                return known
            line = whole[:-2] if whole[-2:] == b"\r\n" else whole[:-1]
            head = line[:3]
            mark = line[3:4]
            if len(head) < 3 or not head.isdigit() or not b"200" <= head <= b"599" or mark.isalnum():
                return self._spoil(line, overflow=False)
            if mark != b"-" and not self._lines:  # nearly every reply is one line
                reply = Reply(int(head), (line[4:].rstrip(),))
                if len(whole) <= COMMON:
                    if len(self._known) >= KNOWN:  # what names the recipient or the message is new each time
                        self._known.clear()
                    self._known[whole] = reply
                return reply
            self._lines.append(line[4:].rstrip() if mark in b" -\t" else line[3:].rstrip())
            self._size += len(whole)
            if self._size > MAX_BYTES or len(self._lines) > MAX_LINES:
                return self._spoil(line, overflow=True)
            if mark != b"-":
                reply = Reply(int(head), tuple(self._lines))
                self._lines.clear()
                self._size = 0
                return reply

    def _spoil(self, line: bytes, *, overflow: bool) -> Malformed:
        self._spoilt = Malformed(overflow, printable(line[:80]))
        self._buffer, self._at, self._scanned = b"", 0, 0
        self._known.clear()
        self._lines.clear()
        return self._spoilt
