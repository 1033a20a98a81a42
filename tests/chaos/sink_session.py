"""One connection of the sink: commands in, what the script says out, every recipient on record before its answer.

Law: input is taken apart only while no answer is being waited for, so answers leave in the order of the commands; what
an answer of 2xx promises is on record (os.write) before its first byte is written. Instants are those at which bytes
came out of the socket, not at which they were looked at: RCPT behind a slow dot has its own time.

Two rooms of the product know the same protocol (engine.rehearsal.session and engine.smtp): this one shares nothing
with them but `unstuff` and `message_id_of`, so that the harness does not agree with a mistake of theirs.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from typing import TYPE_CHECKING, Final, cast

from engine.rehearsal.session import message_id_of, unstuff
from tests.chaos.sink_record import Line, bare_line_ends, digests, encode, reference_of
from tests.chaos.sink_script import GREYLISTED, PLAIN, Act, canned
from tests.chaos.sink_voice import SEGMENT_SECONDS, End, Voice

if TYPE_CHECKING:
    from tests.chaos.sink import Post, Sink

MAX_LINE: Final = 4096
IDLE_SECONDS: Final = 0.2  # of silence after a message, before an ``idle`` word is played
_END: Final = b"\r\n.\r\n"
_PATH: Final = re.compile(rb"(?i)(?:FROM|TO):\s?<([^<>\r\n]*)>(.*)", re.DOTALL)
_NEXT_RCPT: Final = re.compile(rb"(?i)RCPT TO:\s?<([^<>\r\n]*)>")


class Session(asyncio.Protocol):
    def __init__(self, sink: Sink, post: Post) -> None:
        self._sink = sink
        self._post = post
        self._transport: asyncio.Transport
        self.number = 0
        self._how = "peer"
        self._buffer = bytearray()
        self._scanned = 0
        self._taken = 0  # bytes of the stream used up
        self._arrived: deque[tuple[int, float]] = deque()  # (end in the stream, when)
        self._received = 0
        self._idle: asyncio.TimerHandle | None = None
        self._live = False
        self._voice = Voice(sink.write, self._said, self._run, self._uncount)
        self._hello = False
        self._is_tls = False
        self._messages = 0
        self._port_script = PLAIN
        self._who = PLAIN  # the script of the recipient at hand
        self._whose = ""
        self._n = 0  # of the last MAIL, also behind its end
        self._reset()

    def _reset(self) -> None:
        self._sender: str | None = None
        self._opened = False  # MAIL was said, accepted or not
        self._refused = False
        self._recipients: list[str] = []
        self._in_body = False
        self._fresh = False
        self._fault_at_body = False
        self._parts: list[bytes] = []

    # -- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._voice.transport = cast(asyncio.Transport, transport)  # uvloop's is one by duck only
        if self.number:  # the same session inside TLS
            return
        sink, post = self._sink, self._post
        self.number = sink.next_connection()
        self._live = True
        post.live += 1
        post.connections += 1
        sink.sessions.add(self)
        script = post.script
        if (not script.first or post.connections <= script.first) and not (
            script.every and post.connections % script.every
        ):
            self._port_script = script
        sink.write(encode(Line(k="open", t=sink.clock(), c=self.number, port=post.name, live=post.live)))
        if self._port_script.refuse:
            self._fault("connect", "refuse")
            self._how = "script"
            self._voice.end(End.RST)
        else:
            self._answer("greet", post.greeting)
        self._voice.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._voice.silence()
        if self._idle is not None:
            self._idle.cancel()
        self._uncount()
        self._sink.sessions.discard(self)

    def _uncount(self) -> None:
        """It is live no longer: its end was read, or QUIT, or we end it."""
        if self._live:
            self._live = False
            self._post.live -= 1
            self._voice.note(
                encode(
                    Line(
                        k="close", t=self._sink.clock(), c=self.number, port=self._post.name, live=self._post.live,
                        how=self._how,
                    )
                )
            )  # fmt: skip
            if self._voice.is_over:
                self._voice.silence()

    def _said(self, n: int) -> bytes:
        return encode(Line(k="said", t=self._sink.clock(), c=self.number, n=n))

    def eof_received(self) -> bool:
        return False

    def stop(self) -> None:
        self._how = "stop"
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._voice.is_over:
            return
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._received += len(data)
        self._arrived.append((self._received, self._sink.clock()))
        self._buffer += data
        if not self._voice.is_waiting:
            self._run()

    def _run(self) -> None:
        """Take apart what is there, answer, and go on as long as nothing must be waited for."""
        voice = self._voice
        while not voice.is_over:
            while not voice.is_waiting and self._next():
                pass
            answered = voice.is_waiting
            voice.flush()
            if voice.is_waiting or not answered:
                break

    def _next(self) -> bool:
        """One command or the rest of a body; False when more bytes are needed."""
        if self._in_body:
            return self._body()
        end = self._buffer.find(b"\r\n", self._scanned)
        if end < 0:
            self._scanned = max(0, len(self._buffer) - 1)
            if len(self._buffer) > MAX_LINE:
                self._bad("a line too long")
                self._goodbye(b"421 4.5.2 Line too long\r\n")
            return False
        line = bytes(self._buffer[:end])
        self._command(line, self._use(end + 2))
        return True

    def _goodbye(self, answer: bytes) -> None:
        self._how = "421"
        self._voice.say(answer)
        self._voice.end(End.CLOSE)

    def _use(self, count: int) -> float:
        """Take bytes from the buffer; when the last of them arrived."""
        del self._buffer[:count]
        self._scanned = 0
        self._taken += count
        arrived = self._arrived
        while len(arrived) > 1 and arrived[0][0] < self._taken:
            arrived.popleft()
        return arrived[0][1]

    # -- saying ------------------------------------------------------------------------------------------------------

    def _act(self, step: str) -> Act | None:
        """The word that is to be played here: the recipient's before the port's."""
        act = self._who.acts.get(step)
        if act is None:
            act = self._port_script.acts.get(step)
            if act is not None and self._messages < self._port_script.after:
                return None
        return act

    def _answer(self, step: str, usual: bytes, n: int = 0) -> None:
        """Answer a step as scripted, or as usual; n: of the transaction, when this answers its dot."""
        voice = self._voice
        tarpit = max(self._port_script.tarpit, self._who.tarpit)
        if tarpit:
            voice.wait(tarpit)
        act = self._act(step)
        if act is None:
            voice.say(usual)
            if n:
                voice.mark(n)
            return
        self._fault(step, act.word)
        answer = act.reply(step, usual)
        if act.code == 421:
            self._how = "421"
        elif act.close or act.rst or act.cut >= 0:
            self._how = "script"
        voice.play(act, answer, n if answer and act.cut < 0 else 0)

    # -- records -----------------------------------------------------------------------------------------------------

    def _note(self, line: Line) -> None:
        line.c, line.port = self.number, self._post.name
        self._voice.note(encode(line))

    def _fault(self, step: str, word: str) -> None:
        self._post.faults += 1
        self._note(Line(k="fault", t=self._sink.clock(), n=self._n, step=step, word=word, rcpt=self._whose))

    def _bad(self, word: str) -> None:
        self._post.bad += 1
        self._note(Line(k="bad", t=self._sink.clock(), word=word))

    # -- commands ----------------------------------------------------------------------------------------------------

    def _command(self, line: bytes, when: float) -> None:
        match line[:4].upper():
            case b"MAIL":
                self._mail(line)
            case b"RCPT":
                self._rcpt(line, when)
            case b"DATA":
                self._data()
            case b"RSET":
                self._reset()
                self._answer("rset", b"250 2.0.0 Ok\r\n")
            case b"EHLO":
                self._reset()
                self._hello = True
                self._note(Line(k="hello", t=when, word=line[5:].decode("ascii", "replace")))
                self._answer("ehlo", self._post.ehlo(self._is_tls))
            case b"HELO":
                self._reset()
                self._hello = True
                self._answer("helo", b"250 sink.test\r\n")
            case b"NOOP":
                self._voice.say(b"250 2.0.0 Ok\r\n")
            case b"QUIT":
                self._how = "quit"
                self._answer("quit", b"221 2.0.0 Bye\r\n")
                self._voice.end(End.CLOSE)
                self._uncount()
            case b"STAR":
                self._starttls()
            case _:
                self._bad(line[:60].decode("ascii", "replace"))
                self._voice.say(b"500 5.5.2 Command not recognised\r\n")

    def _mail(self, line: bytes) -> None:
        path = _PATH.fullmatch(line, 5)
        if not self._hello or self._sender is not None or path is None:
            self._bad("MAIL out of place" if path else "a path that is none")
            self._voice.say(b"503 5.5.1 Bad sequence\r\n" if path else b"501 5.5.4 Bad path\r\n")
            return
        self._reset()
        self._n = self._sink.next_transaction()
        self._opened = True
        self._who, self._whose = PLAIN, ""
        ahead = _NEXT_RCPT.match(self._buffer)
        if ahead is not None:
            address = ahead[1].decode("utf-8", "replace")
            self._look_up(address, count=False)
            if (named := self._who.acts.get("mail")) is not None and named.code >= 300:
                self._look_up(address, count=True)  # RCPT will not come to it
        script = self._port_script
        if script.most and self._messages >= script.most:
            self._fault("mail", f"max.{script.most}")
            if script.most_close:
                self._how = "script"
                self._voice.end(End.CLOSE)
            else:
                self._goodbye(canned("mail", 421))
            return
        size = re.search(rb"(?i) SIZE=([0-9]{1,15})(?: |$)", path[2])
        if script.size and size is not None and int(size[1]) > script.size:
            self._refused = True
            self._voice.say(b"552 5.3.4 Message size exceeds fixed limit\r\n")
            return
        act = self._act("mail")
        if act is None or not act.code or act.code < 300:
            self._sender = path[1].decode("utf-8", "replace")
        else:
            self._refused = True
        self._answer("mail", b"250 2.1.0 Ok\r\n")

    def _look_up(self, address: str, *, count: bool) -> None:
        """From here on this recipient's script is played."""
        script = self._sink.script_of(address)
        if script.first:
            seen = self._sink.tries(address, count=count)
            if seen > script.first:
                script = PLAIN
        self._who, self._whose = script, address

    def _rcpt(self, line: bytes, when: float) -> None:
        path = _PATH.fullmatch(line, 5)
        if self._sender is None or path is None:
            if not self._opened or path is None:
                self._bad("RCPT out of place")
            self._voice.say(b"503 5.5.1 Need MAIL first\r\n")
            if self._opened and path is not None:
                self._heard(path[1], when, "503")
            return
        address = path[1].decode("utf-8", "replace")
        self._look_up(address, count=True)
        act = self._act("rcpt")
        usual = b"250 2.1.5 Ok\r\n"
        patience = max(self._who.greylist, self._port_script.greylist)
        if patience >= 0 and not self._sink.is_old(address, patience):
            usual = GREYLISTED
            self._fault("rcpt", "greylist")
        reply = usual if act is None else act.reply("rcpt", usual)
        self._heard(path[1], when, reply[:3].decode("ascii", "replace"))
        if reply.startswith(b"2") or not reply:
            self._recipients.append(address)
        self._answer("rcpt", usual)

    def _heard(self, address: bytes, when: float, code: str) -> None:
        self._post.rcpts += 1
        sender = self._sender or ""
        job, mref = reference_of(sender)
        rcpt = address.decode("utf-8", "replace")
        self._note(Line(k="rcpt", t=when, n=self._n, sender=sender, rcpt=rcpt, job=job, mref=mref, reply=code))

    def _data(self) -> None:
        act = self._act("data")
        granted = act is not None and 300 <= act.code <= 399
        if not self._recipients and not granted:
            if not self._opened:
                self._bad("DATA out of place")
            self._voice.say(
                b"554 5.5.1 No valid recipients\r\n" if self._sender is not None else b"503 5.5.1 Need MAIL\r\n"
            )
            return
        reply = b"354 End data with <CR><LF>.<CR><LF>\r\n" if act is None else act.reply("data", b"354 Go on\r\n")
        self._in_body = self._fresh = reply.startswith(b"3")
        self._fault_at_body = self._in_body and self._act("body") is not None
        self._answer("data", b"354 End data with <CR><LF>.<CR><LF>\r\n")

    def _starttls(self) -> None:
        kind = self._port_script.tls
        if self._is_tls or "STARTTLS" not in self._post.offers:
            self._bad("STARTTLS not offered")
            self._voice.say(b"503 5.5.1 TLS not available\r\n")
            return
        if not kind or self._act("starttls") is not None:
            self._answer("starttls", b"454 4.7.0 TLS not available now\r\n")
            return
        self._fault("tls", kind)
        voice = self._voice
        voice.say(b"220 2.0.0 Go ahead\r\n" + (b"250-evil\r\n250 STARTTLS\r\n" if kind == "inject" else b""))
        if kind == "close":
            self._how = "script"
            voice.end(End.CLOSE)
        elif kind == "garbage":
            voice.wait(SEGMENT_SECONDS)
            voice.say(b"\x15\x03\x01garbage" * 20)
            voice.hold()
        else:
            self._transport.pause_reading()
            voice.call(self._begin_tls)
            voice.hold()

    def _begin_tls(self) -> None:
        self._sink.start_task(self._upgrade(self._sink.context(self._port_script.tls)))

    async def _upgrade(self, context: ssl.SSLContext) -> None:
        self._buffer.clear()
        self._arrived.clear()
        self._received = self._taken
        try:
            secured = await asyncio.get_running_loop().start_tls(self._transport, self, context, server_side=True)
        except (OSError, ssl.SSLError):
            self._transport.abort()
            return
        if secured is None:
            return
        self._transport = secured
        self._is_tls, self._hello = True, False
        self._voice.transport = secured
        self._voice.begin_again()
        self._reset()
        self._run()

    # -- bodies ------------------------------------------------------------------------------------------------------

    def _body(self) -> bool:
        """Take body bytes; False when more are needed."""
        buffer = self._buffer
        if not buffer:
            return False
        if self._fault_at_body:
            self._fault_at_body = False
            self._answer("body", b"")
            return True
        if self._fresh:
            if len(buffer) < 3:
                return False
            self._fresh = False
            if buffer.startswith(b".\r\n"):  # the CRLF that ended DATA belongs to the pattern
                self._dot(self._use(3))
                return True
        end = buffer.find(_END, max(0, self._scanned - 4))
        if end < 0:
            self._scanned = len(buffer)
            if len(buffer) > 1 << 18:
                keep = len(buffer) - 4
                self._parts.append(bytes(buffer[:keep]))
                self._use(keep)
                self._scanned = 4
            return False
        self._parts.append(bytes(buffer[: end + 2]))
        self._dot(self._use(end + 5))
        return True

    def _dot(self, when: float) -> None:
        """A whole message has come: on record with its fate, then answered."""
        wire = b"".join(self._parts)
        recipients, n, sender = self._recipients, self._n, self._sender or ""
        act = self._act("dot")
        usual = b"250 2.0.0 Ok: queued as %d\r\n" % n if recipients else b"554 5.5.1 No valid recipients\r\n"
        reply = usual if act is None else act.reply("dot", usual)
        last = reply.rstrip(b"\r\n").rpartition(b"\n")[2]
        stored = bool(recipients) and ((act is not None and act.stored) or last.startswith(b"2"))
        if recipients:
            message = unstuff(wire)
            sha, plain = digests(message)
            mid = message_id_of(message).decode("ascii", "replace")
            job, mref = reference_of(sender, mid)
            self._note(
                Line(
                    k="mail", t=when, n=n, rcpts=recipients, mid=mid, job=job, mref=mref,
                    reply=reply.decode("ascii", "replace").rstrip(), stored=stored, size=len(message), sha=sha,
                    plain=plain, bare=bare_line_ends(wire),
                )
            )  # fmt: skip
            self._post.stored += stored
            self._sink.keep(self._post, n, message)
        self._messages += stored
        self._reset()
        self._answer("dot", usual, n if recipients else 0)
        idle = self._act("idle")
        if idle is not None:
            self._idle = asyncio.get_running_loop().call_later(idle.late or IDLE_SECONDS, self._while_idle)

    def _while_idle(self) -> None:
        self._idle = None
        if not (self._voice.is_over or self._voice.is_waiting):
            self._answer("idle", b"250 2.0.0 hello?\r\n")
            self._voice.flush()
