"""One connection's conversation as a script: bytes in, events and bytes out.

Laws (tests/laws/test_smtp_laws.py carries the same sentences):
1. Every message taken is settled exactly once and there is exactly one `Closed`, whatever comes.
2. Any split of what the peer says between two things of ours gives the same events and the same bytes.
3. All that leaves is SMTP grammar: command lines of printable characters, at most 512 octets, ending in CRLF
   (`lines.commands` is the one place that makes them); bodies dot-stuffed, never a bare CR or LF.
4. A message is UNKNOWN only if its final dot was handed out, and ``on_commit`` was called before it was.
5. No RCPT is said for a message whose Permit is void: `deliver` puts it into the very next `outgoing`, and where
   MAIL's reply stands between the two the script asks ``is_void`` first.

Theory of operation. What is on the wire unanswered is all the state there is. Replies come in order, so the script
(a generator that yields the `Step` it waits on and is sent the `Reply`) reads in the order of RFC 5321; loss of the
connection, 421, timeout and nonsense are thrown into it as `_End`, and one place (`_end`) settles what was not.
With PIPELINING the commands of a message are said in one flight (RFC 2920 3.1: DATA ends a flight), and while a
body's reply is awaited one more flight may be *ahead*. Without, one command at a time.

RSET is said only when a transaction was left open (MAIL accepted, nobody to deliver to), together with the next
flight, never first (Postfix under stress counts it as junk; KumoMTA's war story). After the final dot, accepted or
refused, the server's buffers are empty (RFC 5321 4.1.1.4).
"""

from __future__ import annotations

import base64
import re
from collections import deque
from collections.abc import Callable, Generator

from engine.smtp.lines import LocalError, commands, extensions_of, mail, misfit, rcpt, size_limit, stuffed
from engine.smtp.reply import Malformed, Reply, ReplyParser
from engine.smtp.words import (
    FOREVER,
    Closed,
    Event,
    Fate,
    Outbound,
    Parked,
    Ready,
    Settled,
    Step,
    Tls,
    Trouble,
    Upgrade,
    Verdict,
)

SLICE = 64 * 1024  # octets of a body handed out at once; larger ones wait for the socket, so that the dot does too

_HELLO = re.compile(r"[A-Za-z0-9._-]{1,255}|\[[A-Za-z0-9.:]{1,64}\]")
Script = Generator[Step, Reply | None, None]


class _End(Exception):
    """Thrown through the script: the conversation is over."""

    def __init__(self, trouble: Trouble, step: Step, reply: Reply | None = None, detail: str = "") -> None:
        self.closed = Closed(trouble, step, reply, detail)


def _nothing(_: Outbound) -> None:
    return None


def _never(_: Outbound) -> bool:
    return False


class Dialogue:
    """receive(bytes), lost(trouble), deliver(message), quit() -> events; outgoing() -> what to write.

    hello: our EHLO name (S-08: a name that resolves to the sending address; the caller's business).
    on_commit(message) is called inside `outgoing`, just before the final dot of that message is handed out (T6);
    what it raises comes out of `outgoing` and that dot stays in.
    is_void(message) is asked before RCPT is said without PIPELINING, where a Permit can age between MAIL and RCPT.
    encrypted: TLS is there from the first byte (RFC 8314). login: name and password for AUTH PLAIN, never in clear.
    """

    def __init__(
        self,
        hello: str,
        tls: Tls = Tls.MAY,
        *,
        on_commit: Callable[[Outbound], None] = _nothing,
        is_void: Callable[[Outbound], bool] = _never,
        pipeline: bool = True,
        encrypted: bool = False,
        login: tuple[str, str] | None = None,
    ) -> None:
        self.waiting_for = Step.GREETING
        self.closed = False
        self.heard = 0  # replies and other turns of the script: what counts as progress against a deadline
        self.encrypted = encrypted
        self.extensions: dict[str, str] = {}
        self.pipelining = False
        self._may_pipeline = pipeline
        if not _HELLO.fullmatch(hello):
            raise LocalError("the EHLO name is neither a domain nor an address literal")
        self._hello = hello
        self._tls = tls
        self._login = login
        self._on_commit = on_commit
        self._is_void = is_void
        self._parser = ReplyParser()
        self._events: list[Event] = []
        self._out: deque[bytes | Outbound] = deque()  # a message stands for its own final dot
        self._committed: Outbound | None = None  # the last message whose dot was handed out
        self._next: Outbound | None = None  # taken while idle, nothing said yet
        self._ahead: Outbound | None = None  # its flight is behind the body that is awaited
        self._current: Outbound | None = None  # in transaction and not settled
        self._parked: Outbound | None = None
        self._first = True  # no transaction was answered on this connection yet
        self._takes_ahead = False
        self._left_open = False  # the server still holds a transaction: RSET before the next MAIL
        self._leaving = False
        self._max_size = 0
        self._script = self._run()
        next(self._script)

    # -- what the driver says ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer; never raises for what they are."""
        parser = self._parser
        parser.feed(data)
        while not self.closed:
            if self.waiting_for is Step.TLS:
                if parser.pending:  # also what arrives later in plain text, before the handshake
                    self._throw(Trouble.INJECTION)
                break
            reply = parser.next_reply()
            if reply is None:
                break
            if type(reply) is Reply:
                if reply.code == 421:
                    self._throw(Trouble.GOODBYE, reply)
                elif self._out and (self.waiting_for is not Step.BODY or self._current is None):
                    self._throw(Trouble.DESYNC, reply)  # it cannot answer what was not said yet; BODY sees for itself
                else:
                    self._send(reply)
            elif isinstance(reply, Malformed):
                self._throw(Trouble.OVERFLOW if reply.overflow else Trouble.MALFORMED, detail=reply.sample)
        return self._drain()

    def lost(self, trouble: Trouble, detail: str = "") -> list[Event]:
        """The connection is gone: LOST, TIMEOUT, ABORTED or TLS. Harmless when already closed."""
        if not self.closed:
            self._throw(trouble, detail=detail)
        return self._drain()

    def tls_started(self) -> list[Event]:
        """The handshake is done: forget all that was learnt in plain text and greet again (RFC 3207 4.2)."""
        if self.waiting_for is not Step.TLS or self.closed:
            raise LocalError("no handshake was asked for")
        self.encrypted = True
        self._send(None)
        return self._drain()

    @property
    def wants(self) -> bool:
        """Whether `deliver` may be called: idle, or a body is out and its flight has room behind it."""
        if self.waiting_for is Step.IDLE:
            return not (self._leaving or self.closed)
        return self._takes_ahead and not self._leaving

    @property
    def idle(self) -> bool:
        return self.waiting_for is Step.IDLE and not self.closed

    def deliver(self, message: Outbound) -> list[Event]:
        """Take a message. Its commands are in the very next `outgoing`, so its Permit must be good now."""
        if not self.wants:
            raise LocalError("no message is wanted now")
        reason = misfit(message, self.extensions, self._max_size)
        if reason is not None:
            self._events.append(Settled(message, Verdict(Fate.REJECTED, Step.MAIL, None, reason)))
        elif self.waiting_for is Step.IDLE:
            self._next = message
            self._send(None)
        else:
            self._takes_ahead = False
            self._ahead = message
            self._say_flight(message)
        return self._drain() if self._events else []

    def renew(self, message: Outbound) -> list[Event]:
        """The parked message may go on: its Permit is fresh."""
        return self._unpark(message, go_on=True)

    def withdraw(self, message: Outbound) -> list[Event]:
        """The parked message may not be sent; it is settled DEFERRED with VOID, and the caller knows better."""
        return self._unpark(message, go_on=False)

    def quit(self) -> list[Event]:
        """Say QUIT as soon as what is in flight is settled; no further message is wanted."""
        self._leaving = True
        if self.waiting_for is Step.IDLE and not self.closed:
            self._send(None)
        return self._drain()

    # -- what the driver writes -----------------------------------------------------------------------------------

    @property
    def speaking(self) -> bool:
        """Whether `outgoing` has something left."""
        return bool(self._out)

    def outgoing(self, limit: float = FOREVER) -> list[bytes]:
        """What to write now, in order, about `limit` octets at most; call again when the socket has room."""
        out: list[bytes] = []
        queue = self._out
        size = 0
        while queue and size < limit:
            item = queue[0]
            if type(item) is bytes:
                out.append(item)
                size += len(item)
            elif isinstance(item, Outbound):
                self._on_commit(item)
                if self.closed:  # the caller dropped the connection instead
                    return []
                self._committed = item
                out.append(b".\r\n")
            queue.popleft()
        return out

    # -- the script -----------------------------------------------------------------------------------------------

    def _run(self) -> Script:
        try:
            yield from self._open()
            while True:
                message = self._ahead or self._next
                if message is not None:
                    self._current = message
                    if self.pipelining:
                        yield from self._fly(message)
                    else:
                        yield from self._walk(message)
                elif self._leaving:
                    yield from self._leave()
                else:
                    yield from self._rest()
        except _End as end:
            self._end(end.closed)

    def _open(self) -> Script:
        """Greeting, EHLO (or HELO), and TLS as far as wanted and offered."""
        reply = yield from self._hear(Step.GREETING)
        if not reply.accepted:
            raise _End(Trouble.REFUSED, Step.GREETING, reply)
        yield from self._greet()
        if self._tls is not Tls.NEVER and not self.encrypted:
            if "STARTTLS" in self.extensions:
                yield from self._encrypt()
            if not self.encrypted and self._tls is not Tls.MAY:
                raise _End(Trouble.TLS, Step.STARTTLS, None, "required, and not offered or refused")
        if self._login is not None:
            yield from self._authenticate(*self._login)
        self.pipelining = self._may_pipeline and "PIPELINING" in self.extensions
        self._max_size = size_limit(self.extensions)
        self._events.append(Ready(self.extensions, self.encrypted))

    def _greet(self) -> Script:
        self._say(f"EHLO {self._hello}")
        reply = yield from self._hear(Step.EHLO)
        if reply.accepted:
            self.extensions = extensions_of(reply)
            return
        if reply.code < 500 or self.encrypted:  # S-08: HELO only after 5yz; whoever spoke TLS knows EHLO
            raise _End(Trouble.REFUSED, Step.EHLO, reply)
        self._say(f"HELO {self._hello}")
        reply = yield from self._hear(Step.HELO)
        if not reply.accepted:
            raise _End(Trouble.REFUSED, Step.HELO, reply)

    def _encrypt(self) -> Script:
        self._say("STARTTLS")
        reply = yield from self._hear(Step.STARTTLS)
        if not reply.accepted:  # 454 4.7.0, 502: go on in clear or not at all, as _open decides
            return
        self._events.append(Upgrade())
        yield Step.TLS
        self._parser = ReplyParser()
        self.extensions = {}
        yield from self._greet()

    def _authenticate(self, name: str, password: str) -> Script:
        """AUTH PLAIN with its initial response (RFC 4954, 4616), for smarthosts."""
        if not self.encrypted:
            raise _End(Trouble.TLS, Step.AUTH, None, "no password is said in clear")
        if "PLAIN" not in self.extensions.get("AUTH", "").upper().split():
            raise _End(Trouble.REFUSED, Step.AUTH, None, "AUTH PLAIN is not offered")
        secret = base64.b64encode(f"\0{name}\0{password}".encode()).decode("ascii")
        self._say(f"AUTH PLAIN {secret}")
        reply = yield from self._hear(Step.AUTH)
        if not reply.accepted:
            raise _End(Trouble.REFUSED, Step.AUTH, reply)

    def _rest(self) -> Script:
        """Nothing to do. Whatever the peer says now, nobody asked (421 was dealt with before)."""
        reply = yield Step.IDLE
        if reply is not None:
            raise _End(Trouble.DESYNC, Step.IDLE, reply)

    def _leave(self) -> Script:
        self._say("QUIT")
        try:
            reply = yield Step.QUIT
        except _End as end:  # a peer that hangs up, or says 421, on QUIT has understood
            if end.closed.trouble is Trouble.ABORTED:
                raise
            raise _End(Trouble.LEFT, Step.QUIT, end.closed.reply) from None
        raise _End(Trouble.LEFT, Step.QUIT, reply)

    def _fly(self, message: Outbound) -> Script:
        """MAIL, RCPT and DATA in one flight, said already or now; then hear all three, whatever the first said."""
        if self._ahead is message:
            self._ahead = None
        else:
            self._next = None
            reset = self._left_open
            self._say_flight(message)
            if reset:
                yield from self._hear_reset()
        reply = yield Step.MAIL
        opened = 200 <= _code(reply) <= 299 or self._refuse(Step.MAIL, reply)
        self._first = False
        reply = yield Step.RCPT
        if not 200 <= _code(reply) <= 299 and self._current is not None:
            self._refuse(Step.RCPT, reply)
        reply = yield Step.DATA
        if 300 <= _code(reply) <= 399:
            yield from self._say_body(message)
        else:
            if self._current is not None:
                self._refuse(Step.DATA, reply)
            elif _code(reply) < 400:
                raise _End(Trouble.DESYNC, Step.DATA, reply)
            self._left_open = opened

    def _walk(self, message: Outbound) -> Script:
        """The same one command at a time, for peers without PIPELINING; a refusal ends it where it stands."""
        self._next = None
        if self._left_open:
            self._say("RSET")
            yield from self._hear_reset()
        self._say(mail(message, self.extensions))
        reply = yield Step.MAIL
        if not 200 <= _code(reply) <= 299:
            self._refuse(Step.MAIL, reply)
            return
        self._first = False
        self._left_open = True
        while self._is_void(message):
            self._parked = message
            self._events.append(Parked(message))
            reply = yield Step.PERMIT
            if reply is not None:
                raise _End(Trouble.DESYNC, Step.PERMIT, reply)
            if self._parked is not None:  # withdrawn
                self._parked = None
                self._settle(Verdict(Fate.DEFERRED, Step.PERMIT, None, Trouble.VOID, tried=False))
                return
        self._say(rcpt(message))
        reply = yield Step.RCPT
        if not 200 <= _code(reply) <= 299:
            self._refuse(Step.RCPT, reply)
            return
        self._say("DATA")
        reply = yield Step.DATA
        if not 300 <= _code(reply) <= 399:
            self._refuse(Step.DATA, reply)
            return
        yield from self._say_body(message)

    def _say_body(self, message: Outbound) -> Script:
        """The body and its dot; or a lone dot when the peer wants data for a recipient it refused (RFC 2920 3.1)."""
        self._left_open = False
        if self._current is None:
            self._out.append(b".\r\n")
            self._takes_ahead = self.pipelining
            yield from self._hear(Step.BODY)  # 554 as a rule; nobody is delivered to, whatever it says
            self._takes_ahead = False
            return
        data = stuffed(message.data)
        if len(data) <= SLICE:
            self._out.append(data)
            self._takes_ahead = self.pipelining
        else:  # nothing is said ahead: its Permit would age while this body waits for the socket
            self._out.extend(data[at : at + SLICE] for at in range(0, len(data), SLICE))
        self._out.append(message)
        reply = yield Step.BODY
        self._takes_ahead = False
        early = self._committed is not message
        if 200 <= _code(reply) <= 299:
            if early:
                raise _End(Trouble.DESYNC, Step.BODY, reply)
            self._settle(Verdict(Fate.DELIVERED, Step.BODY, reply))
            return
        self._refuse(Step.BODY, reply)
        if early:  # refused in the middle: what is left of the body cannot be unsaid
            raise _End(Trouble.DESYNC, Step.BODY, reply)

    # -- its words ------------------------------------------------------------------------------------------------

    def _hear(self, step: Step) -> Generator[Step, Reply | None, Reply]:
        """Wait for one reply of class 2, 4 or 5."""
        reply = yield step
        if reply is None or 300 <= reply.code <= 399:
            raise _End(Trouble.MALFORMED, step, reply)
        return reply

    def _hear_reset(self) -> Script:
        reply = yield from self._hear(Step.RSET)
        if not reply.accepted:
            raise _End(Trouble.DESYNC, Step.RSET, reply)
        self._left_open = False

    def _refuse(self, step: Step, reply: Reply | None) -> bool:
        """Settle the current message by a refusal; anything else in this place ends the conversation. False."""
        code = _code(reply)
        if code < 400:
            raise _End(Trouble.DESYNC, step, reply)
        if code == 503:  # "bad sequence": about the conversation, never about the message; RFC 5321 4.3.2
            raise _End(Trouble.DESYNC, step, reply)
        self._settle(Verdict(Fate.DEFERRED if code < 500 else Fate.REJECTED, step, reply))
        return False

    def _settle(self, verdict: Verdict) -> None:
        if self._current is not None:
            self._events.append(Settled(self._current, verdict))
            self._current = self._committed = None

    def _end(self, closed: Closed) -> None:
        """The one place where the end of a connection settles messages (laws 1 and 4)."""
        step, reply, trouble = closed.step, closed.reply, closed.trouble
        current, ahead = self._current, self._ahead or self._next
        if current is not None:
            if step is Step.BODY and self._committed is current and trouble is not Trouble.GOODBYE:
                self._settle(Verdict(Fate.UNKNOWN, step, reply, trouble))
            else:
                # A connection that rested may have been closed long ago: its first loss is no attempt.
                stale = step is Step.MAIL and not self._first and reply is None
                tried = step in _ABOUT and trouble is not Trouble.ABORTED and not stale
                self._settle(Verdict(Fate.DEFERRED, step, reply, trouble, tried))
        if ahead is not None and ahead is not current:
            self._events.append(Settled(ahead, Verdict(Fate.DEFERRED, Step.MAIL, reply, trouble, tried=False)))
        self._ahead = self._next = self._parked = None
        self._takes_ahead = False
        self._out.clear()
        self.closed = True
        self._events.append(closed)

    def _say_flight(self, message: Outbound) -> None:
        flight = (mail(message, self.extensions), rcpt(message), "DATA")
        if self._left_open:
            self._say("RSET", *flight)
        else:
            self._say(*flight)

    def _say(self, *lines: str) -> None:
        self._out.append(commands(*lines))

    def _unpark(self, message: Outbound, *, go_on: bool) -> list[Event]:
        if self._parked is not message or self.closed:
            raise LocalError("this message is not parked")
        if go_on:
            self._parked = None
        self._send(None)
        return self._drain()

    # -- stepping -------------------------------------------------------------------------------------------------

    def _send(self, reply: Reply | None) -> None:
        self.heard += 1
        try:
            self.waiting_for = self._script.send(reply)
        except StopIteration:
            return  # _end was reached

    def _throw(self, trouble: Trouble, reply: Reply | None = None, detail: str = "") -> None:
        try:
            self.waiting_for = self._script.throw(_End(trouble, self.waiting_for, reply, detail))
        except StopIteration:
            return  # _end was reached

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


_ABOUT = frozenset({Step.MAIL, Step.RCPT, Step.DATA, Step.BODY})  # replies that speak of the message itself


def _code(reply: Reply | None) -> int:
    """The code of the reply that was waited for; no reply (a wake-up nobody sends here) is nonsense, code 0."""
    return 0 if reply is None else reply.code
