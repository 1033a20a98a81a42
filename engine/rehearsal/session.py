"""One SMTP session of the rehearsal's sink: bytes in, replies out, in order, whatever is pipelined.

Law: every command is answered once and in order, and any split of the peer's bytes into segments gives the same
replies; a message is in the record before its reply is written. RFC 5321 4.1 and 4.5.2, RFC 2920 (groups and chains),
RFC 3030 (BDAT), RFC 3207 (STARTTLS: what came in clear behind it is dropped, and everything said before is forgotten).

At 421 and QUIT the session closes its own direction and reads on for a moment: a plain close with unread input makes
the kernel send RST, which can eat the last reply on its way.

A message of 40 kB costs three system calls and 25 to 45 us of CPU (kernel's share included; more when each one wakes
us alone), where bytes objects and one expression a line needed 50 to 75, because the kernel writes into one
`Window` that all sessions share, a body that is not kept is never copied, its end is found in place, and a group
MAIL, RCPT, DATA to a provider that judges nothing is one match and one reply. What a cut leaves over (part of a
command, the last four octets of a body) waits in `_rest` and is put in front of the next segment.

Known limits: no AUTH; path syntax is looked at, not judged; a body is checked for bare CR and LF only when it is kept.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, cast

from engine.rehearsal.providers import Post
from engine.rehearsal.window import HEADROOM, Window

MAX_LINE: Final = 4096  # bytes; RFC 5321 4.5.3.1.4 asks for 512, extensions add
HEAD_BYTES: Final = 16_384  # of a message, in which its Message-ID is looked for
LINGER_SECONDS: Final = 2.0
HELD_BYTES: Final = 262_144  # of a peer that goes on while a slow provider thinks; above it we stop reading
_USUAL_ID: Final = b"\nMessage-ID: <"
_MESSAGE_ID: Final = re.compile(rb"(?im)^message-id:\s*<([^>\r\n]*)>")
_PATH: Final = re.compile(rb"(?i)(?:FROM|TO): ?<([^<>\r\n]*)>(.*)")
_SIZE: Final = re.compile(rb"(?i) SIZE=([0-9]{1,15})(?: |$)")
_GROUP: Final = re.compile(rb"MAIL FROM:<([^<>\r\n]*)>([^\r\n]*)\r\nRCPT TO:<([^<>\r\n]*)>[^\r\n]*\r\nDATA\r\n")
_MAIL_OK: Final = b"250 2.1.0 Ok\r\n"
_RCPT_OK: Final = b"250 2.1.5 Ok\r\n"
_GO_AHEAD: Final = b"354 End data with <CR><LF>.<CR><LF>\r\n"
_GROUP_OK: Final = _MAIL_OK + _RCPT_OK + _GO_AHEAD


class Keeper(Protocol):
    """What a session asks of its sink."""

    sessions: set[Session]
    tls: ssl.SSLContext | None
    size: int
    chunking: bool
    records: bool
    window: Window

    def clock(self) -> float: ...

    def wall(self) -> float: ...

    def start_task(self, work: Coroutine[Any, Any, None]) -> None: ...

    def wants_next(self, post: Post) -> bool: ...

    def keep(self, post: Post, number: int, wire: bytes) -> None: ...

    def record_line(self, post: Post, now: float, message_id: bytes, recipients: list[bytes], size: int) -> bytes: ...

    def write_record(self, lines: bytes) -> None: ...


class Session(asyncio.BufferedProtocol):
    """One connection. Input is taken apart as it comes; replies gather in `_out` and leave in one write."""

    def __init__(self, sink: Keeper, post: Post) -> None:
        self._sink = sink
        self._post = post
        self._counts = post.counts
        self._judge = post.judge
        self._transport: asyncio.Transport
        self._rest = b""
        self._window = sink.window
        self._judges = post.judge.judges_mail or post.judge.judges_recipients
        self._out: list[bytes] = []
        self._records: list[bytes] = []
        self._greeted = False
        self._said_hello = False
        self._is_tls = False
        self._paused = False  # a slow provider is thinking, or TLS is being made
        self._closing = False
        self._ended = False  # the peer says no more
        self._messages = 0
        self._reset()

    def _reset(self) -> None:
        self._sender: bytes | None = None
        self._recipients: list[bytes] = []
        self._data = False
        self._fresh = False  # no byte of the body was seen yet
        self._bdat = 0
        self._bdat_last = False
        self._in_chunks = False
        self._keeping = False  # decided when the body begins: the head alone is no message
        self._parts: list[bytes] = []  # of a message that is kept, or of a header that has not ended yet
        self._message_id: bytes | None = None  # not known yet
        self._size = 0

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        if self._greeted:  # the same session again, inside TLS
            return
        self._greeted = True
        counts = self._counts
        counts.connections += 1
        counts.open += 1
        counts.most_open = max(counts.most_open, counts.open)
        self._sink.sessions.add(self)
        refusal = self._judge.greet(counts.open)
        if refusal is not None:
            self._goodbye(refusal)
        else:
            self._out.append(self._post.greeting)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._sink.sessions:
            self._sink.sessions.discard(self)
            self._counts.open -= 1

    def eof_received(self) -> bool:
        self._ended = True
        return self._paused  # who still waits for an answer gets it

    def abort(self) -> None:
        self._transport.abort()

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._window.view

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            return
        window, rest = self._window, self._rest
        data, start, stop = window.octets, HEADROOM, HEADROOM + nbytes
        if self._paused:
            self._rest = rest + data[start:stop]
            if len(self._rest) > HELD_BYTES:
                self._transport.pause_reading()
            return
        if rest:
            self._rest = b""
            start -= len(rest)  # `rest` is no longer than a line may be: see _run
            data[start:HEADROOM] = rest
        self._run(data, start, stop)

    def _run(self, data: bytes | bytearray, at: int, stop: int) -> None:
        """Take apart data[at:stop] until it ends or something must be waited for; then speak."""
        goes_on = True
        while goes_on and at < stop and not self._paused and not self._closing:
            if self._data:
                at, goes_on = self._body(data, at, stop)
            elif self._bdat:
                at = self._chunk(data, at, stop)
            elif not self._judges and (group := _GROUP.match(data, at, stop)) and self._takes(group):
                at = group.end()
            else:
                end = data.find(b"\r\n", at, stop)
                if end >= 0:
                    self._command(bytes(data[at:end]))
                    at = end + 2
                    continue
                goes_on = False
                if stop - at > MAX_LINE:
                    self._counts.bad_commands += 1
                    self._goodbye(b"421 4.5.2 Line too long\r\n")
        if at < stop and not self._closing:
            self._rest = bytes(data[at:stop])
        self._flush()

    def _go_on(self) -> None:
        """What came while we waited is taken apart now."""
        rest, self._rest = self._rest, b""
        self._transport.resume_reading()
        self._run(rest, 0, len(rest))
        if self._ended and not self._paused and not self._transport.is_closing():
            self._transport.close()

    def _flush(self) -> None:
        if self._records:
            self._sink.write_record(b"".join(self._records))
            self._records.clear()
        if self._out:
            if not self._transport.is_closing():
                self._transport.write(b"".join(self._out))
            self._out.clear()
        if self._closing:
            self._close()

    def _goodbye(self, reply: bytes) -> None:
        self._out.append(reply)
        if reply.startswith(b"421"):
            self._counts.closed_421 += 1
        self._closing = True

    def _close(self) -> None:
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)
        else:
            self._transport.close()

    # ---- commands

    def _takes(self, group: re.Match[bytes]) -> bool:
        """A whole group at once, where each of its commands would be taken; False: one by one, which tells why not."""
        if not self._said_hello or self._sender is not None or self._in_chunks:
            return False
        sender, parameters, recipient = group.groups()
        size = _SIZE.search(parameters)
        if size is not None and int(size[1]) > self._sink.size:
            return False
        self._sender = bytes(sender)
        self._recipients.append(bytes(recipient))
        self._begin_data()
        self._out.append(_GROUP_OK)
        return True

    def _begin_data(self) -> None:
        self._data = self._fresh = True
        self._keeping = self._sink.wants_next(self._post)

    def _command(self, line: bytes) -> None:
        handler = _COMMANDS.get(line[:4].upper())
        if handler is None:
            self._counts.bad_commands += 1
            self._out.append(b"500 5.5.2 Command not recognised\r\n")
        else:
            handler(self, line)

    def _hello(self, line: bytes) -> None:
        self._reset()
        self._said_hello = True
        if line[:1] in b"Hh":
            self._out.append(b"250 rehearsal.test\r\n")
        else:
            self._out.append(self._post.ehlo.replace(b"250-STARTTLS\r\n", b"") if self._is_tls else self._post.ehlo)

    def _mail(self, line: bytes) -> None:
        path = _PATH.fullmatch(line, 5)
        if not self._said_hello or self._sender is not None or path is None:
            self._counts.bad_commands += 1
            self._out.append(b"501 5.5.4 Bad path\r\n" if path is None else b"503 5.5.1 Bad sequence\r\n")
            return
        size = _SIZE.search(path[2])
        if size is not None and int(size[1]) > self._sink.size:
            self._out.append(b"552 5.3.4 Message size exceeds fixed limit\r\n")
            return
        if self._judge.judges_mail:
            refusal = self._judge.mail(self._messages, self._sink.clock())
            if refusal is not None:
                if refusal.startswith(b"421"):
                    self._goodbye(refusal)
                else:
                    self._counts.too_fast += 1
                    self._out.append(refusal)
                return
        self._sender = path[1]
        self._out.append(_MAIL_OK)

    def _rcpt(self, line: bytes) -> None:
        path = _PATH.fullmatch(line, 5)
        if self._sender is None or path is None:
            self._counts.bad_commands += path is None
            self._out.append(b"501 5.5.4 Bad path\r\n" if path is None else b"503 5.5.1 Need MAIL first\r\n")
            return
        address = path[1]
        if self._judge.judges_recipients:
            refusal = self._judge.recipient(address, self._sink.clock())
            if refusal is not None:
                if refusal.startswith(b"5"):
                    self._counts.refused += 1
                else:
                    self._counts.deferred += 1
                self._out.append(refusal)
                return
        self._recipients.append(address)
        self._out.append(_RCPT_OK)

    def _data_(self, _line: bytes) -> None:
        if not self._recipients:
            self._out.append(
                b"554 5.5.1 No valid recipients\r\n" if self._sender is not None else b"503 5.5.1 Need MAIL\r\n"
            )
            return
        self._begin_data()
        self._out.append(_GO_AHEAD)

    def _bdat_(self, line: bytes) -> None:
        words = line.split()
        if not self._sink.chunking or len(words) not in (2, 3) or not words[1].isdigit():
            self._counts.bad_commands += 1
            self._goodbye(b"421 5.5.4 Bad BDAT\r\n")  # the bytes that follow could not be told from commands
            return
        if not self._in_chunks:
            self._in_chunks = True
            self._keeping = self._sink.wants_next(self._post)
        self._bdat = int(words[1])
        self._bdat_last = len(words) == 3 and words[2].upper() == b"LAST"
        if not self._bdat:
            self._chunk(b"", 0, 0)

    def _rset(self, _line: bytes) -> None:
        self._reset()
        self._out.append(b"250 2.0.0 Ok\r\n")

    def _noop(self, _line: bytes) -> None:
        self._out.append(b"250 2.0.0 Ok\r\n")

    def _vrfy(self, _line: bytes) -> None:
        self._out.append(b"252 2.5.2 Will try\r\n")

    def _quit(self, _line: bytes) -> None:
        self._goodbye(b"221 2.0.0 Bye\r\n")

    def _starttls(self, line: bytes) -> None:
        context = self._sink.tls
        if context is None or self._is_tls or line.upper() != b"STARTTLS":
            self._counts.bad_commands += 1
            self._out.append(b"503 5.5.1 TLS not available\r\n")
            return
        self._out.append(b"220 2.0.0 Go ahead\r\n")
        self._paused = True
        self._transport.pause_reading()  # nothing of the handshake may arrive as commands
        self._sink.start_task(self._upgrade(context))

    async def _upgrade(self, context: ssl.SSLContext) -> None:
        self._rest = b""  # what came in clear after STARTTLS is not a part of the session (RFC 3207 4.2)
        try:
            secured = await asyncio.get_running_loop().start_tls(self._transport, self, context, server_side=True)
        except (OSError, ssl.SSLError):
            self._transport.abort()
            return
        if secured is None:
            return
        self._transport = secured
        self._is_tls, self._said_hello, self._paused = True, False, False
        self._reset()
        if self._rest:
            self._go_on()

    # ---- bodies

    def _body(self, data: bytes | bytearray, at: int, stop: int) -> tuple[int, bool]:
        """Take body octets; how far, and whether the message ended there (else more input is needed)."""
        if self._fresh:
            # The CRLF that ended DATA belongs to the pattern too: ".\r\n" at once is an empty body.
            if data.startswith(b".\r\n", at, stop):
                self._finish()
                return at + 3, True
            if stop - at < 3:
                return at, False
            self._fresh = False
        end = self._window.end_of_data(data, at, stop)
        if end >= 0:
            self._take(data, at, end + 2)
            self._finish()
            return end + 5, True
        keep = max(at, stop - 4)  # the end may be cut by the segment's
        self._take(data, at, keep)
        return keep, False

    def _chunk(self, data: bytes | bytearray, at: int, stop: int) -> int:
        """Take octets of a BDAT chunk (RFC 3030); the position after what was taken."""
        end = min(stop, at + self._bdat)
        self._take(data, at, end)
        self._bdat -= end - at
        if self._bdat == 0:
            if not self._recipients:
                last = self._bdat_last
                self._parts.clear()
                self._bdat_last = False
                self._out.append(b"503 5.5.1 No valid recipients\r\n")
                if last:
                    self._reset()
            elif self._bdat_last:
                self._bdat_last = False
                self._finish()
            else:
                self._out.append(b"250 2.0.0 Chunk taken\r\n")
        return end

    def _take(self, data: bytes | bytearray, at: int, end: int) -> None:
        """Octets of a message: kept when all of it is, else looked at until its Message-ID is known."""
        self._size += end - at
        if self._keeping:
            self._parts.append(bytes(data[at:end]))
        elif self._message_id is None:
            if self._parts:
                data = b"".join([*self._parts, data[at:end]])
                at, end = 0, len(data)
            end = min(end, at + HEAD_BYTES)
            self._message_id = _found_id(data, at, end)
            if self._message_id is None:
                self._parts = [bytes(data[at:end])]
                if end - at == HEAD_BYTES:
                    self._message_id = message_id_of(self._parts[0])

    def _finish(self) -> None:
        """A whole message has come: count it, record it, answer it (a slow provider later)."""
        sink, counts = self._sink, self._counts
        if self._size > sink.size:
            self._out.append(b"552 5.3.4 Message size exceeds fixed limit\r\n")
            self._reset()
            return
        message_id, wire = self._message_id, b""
        if message_id is None:  # kept, or its header never ended
            wire = b"".join(self._parts)
            message_id = message_id_of(wire[:HEAD_BYTES])
        self._messages += 1
        now = sink.wall()
        number = counts.accepted
        counts.accepted += 1
        counts.recipients += len(self._recipients)
        counts.bytes += self._size
        counts.last_at = now
        if not number:
            counts.first_at = now
        seen = self._post.seen
        before = len(seen)
        for address in self._recipients:
            seen.add(hash((message_id, address)))  # 64 bits, keyed by the process
        counts.unique += len(seen) - before
        if self._keeping:
            sink.keep(self._post, number, wire if self._in_chunks else unstuff(wire))
        if sink.records:
            self._records.append(sink.record_line(self._post, now, message_id, self._recipients, self._size))
        self._reset()
        reply = b"250 2.0.0 Ok: queued as %d\r\n" % counts.accepted
        if self._judge.delay:
            self._flush()
            self._paused = True  # what comes meanwhile is held: stopping to read would be two system calls a message
            asyncio.get_running_loop().call_later(self._judge.delay, self._answer_late, reply)
        else:
            self._out.append(reply)

    def _answer_late(self, reply: bytes) -> None:
        if self._transport.is_closing():
            return
        self._paused = False
        self._out.append(reply)
        self._go_on()


_COMMANDS: Final[dict[bytes, Callable[[Session, bytes], None]]] = {
    b"EHLO": Session._hello,
    b"HELO": Session._hello,
    b"MAIL": Session._mail,
    b"RCPT": Session._rcpt,
    b"DATA": Session._data_,
    b"BDAT": Session._bdat_,
    b"RSET": Session._rset,
    b"NOOP": Session._noop,
    b"VRFY": Session._vrfy,
    b"QUIT": Session._quit,
    b"STAR": Session._starttls,
}


def _found_id(data: bytes | bytearray, at: int, end: int) -> bytes | None:
    """The Message-ID of a message that begins at `at`; None while its header section has not ended before `end`.

    The usual spelling is looked for first: 0.5 us, where the expression needs 25 us for two signatures of header.
    """
    header = data.find(b"\r\n\r\n", at, end)
    if header < 0:
        return None
    begin = data.find(_USUAL_ID, at, header)
    if begin >= 0:
        begin += len(_USUAL_ID)
        close = data.find(b">", begin, header)
        if close >= 0 and data.find(b"\r", begin, close) < 0:
            return bytes(data[begin:close])
    return _searched(bytes(data[at:header]))


def _searched(header: bytes) -> bytes:
    found = _MESSAGE_ID.search(header)
    return found[1] if found else b""


def message_id_of(wire: bytes) -> bytes:
    """What stands between the angle brackets of Message-ID, b"" when there is none in the header section."""
    found = _found_id(wire, 0, len(wire))
    return found if found is not None else _searched(wire)


def unstuff(wire: bytes) -> bytes:
    """RFC 5321 4.5.2: the first dot of a line goes."""
    if wire.startswith(b".."):
        wire = wire[1:]
    return wire.replace(b"\r\n..", b"\r\n.")
