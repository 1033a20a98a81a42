"""The script of a conversation: what is said when, and what each reply settles. `engine.smtp.dialogue` drives it.

Theory of operation. What is on the wire unanswered is all the state there is. Replies come in order, so the script
(a generator that yields the `Step` it waits on and is sent the `Reply`) reads in the order of RFC 5321; loss of the
connection, 421, timeout and nonsense are thrown into it as `End`, and one place (`_end`) settles what was not.
With PIPELINING the commands of a message are said in one flight (RFC 2920 3.1: DATA ends a flight), and while a
body's reply is awaited one more flight may be *ahead*. Without, one command at a time.

RSET is said only when a transaction was left open (MAIL accepted, nobody to deliver to), together with the next
flight, never first (Postfix under stress counts it as junk; KumoMTA's war story). After the final dot, accepted or
refused, the server's buffers are empty (RFC 5321 4.1.1.4).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from engine.smtp.lines import commands, ends_early, flight, mail, rcpt, size_limit, stuffed
from engine.smtp.opening import End, Opening, Script, hear
from engine.smtp.reply import Reply
from engine.smtp.words import Closed, Event, Fate, Outbound, Parked, Ready, Settled, Step, Tls, Trouble, Verdict

SLICE = 64 * 1024  # octets of a body handed out at once; larger ones wait for the socket, so that the dot does too


_IDLE: Final = Step.IDLE  # by a name of their own: see engine.smtp.dialogue
_MAIL: Final = Step.MAIL
_RCPT: Final = Step.RCPT
_DATA: Final = Step.DATA
_BODY: Final = Step.BODY
_DELIVERED: Final = Fate.DELIVERED


class Conversation:
    """State and script of one connection; `Dialogue` adds what its driver calls."""

    def __init__(
        self,
        hello: str,
        tls: Tls,
        *,
        is_void: Callable[[Outbound], bool],
        pipeline: bool,
        encrypted: bool,
        login: tuple[str, str] | None,
    ) -> None:
        self.closed = False
        self.extensions: dict[str, str] = {}
        self.pipelining = False
        self._may_pipeline = pipeline
        self._opening = Opening(hello, tls, self._say, encrypted=encrypted, login=login)
        self._is_void = is_void
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

    @property
    def encrypted(self) -> bool:
        return self._opening.encrypted

    # -- the script -----------------------------------------------------------------------------------------------

    def _run(self) -> Script:
        try:
            yield from self._opening.run()
            self._opened()
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
        except End as end:
            self._end(end.closed)

    def _opened(self) -> None:
        extensions = self._opening.extensions
        self.extensions = extensions
        self.pipelining = self._may_pipeline and "PIPELINING" in extensions
        self._max_size = size_limit(extensions)
        self._events.append(Ready(extensions, self.encrypted))

    def _rest(self) -> Script:
        """Nothing to do. Whatever the peer says now, nobody asked (421 was dealt with before)."""
        reply = yield _IDLE
        if reply is not None:
            raise End(Trouble.DESYNC, _IDLE, reply)

    def _leave(self) -> Script:
        self._say("QUIT")
        try:
            reply = yield Step.QUIT
        except End as end:  # a peer that hangs up, or says 421, on QUIT has understood
            if end.closed.trouble is Trouble.ABORTED:
                raise
            raise End(Trouble.LEFT, Step.QUIT, end.closed.reply) from None
        raise End(Trouble.LEFT, Step.QUIT, reply)

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
        reply = yield _MAIL
        opened = 200 <= _code(reply) <= 299 or self._refuse(_MAIL, reply)
        self._first = False
        reply = yield _RCPT
        if not 200 <= _code(reply) <= 299 and self._current is not None:
            self._refuse(_RCPT, reply)
        reply = yield _DATA
        if 300 <= _code(reply) <= 399:
            yield from self._say_body(message)
        else:
            if self._current is not None:
                self._refuse(_DATA, reply)
            elif _code(reply) < 400:
                raise End(Trouble.DESYNC, _DATA, reply)
            self._left_open = opened

    def _walk(self, message: Outbound) -> Script:
        """The same one command at a time, for peers without PIPELINING; a refusal ends it where it stands."""
        self._next = None
        if self._left_open:
            self._say("RSET")
            yield from self._hear_reset()
        self._say(mail(message, self.extensions))
        reply = yield _MAIL
        if not 200 <= _code(reply) <= 299:
            self._refuse(_MAIL, reply)
            return
        self._first = False
        self._left_open = True
        while self._is_void(message):
            self._parked = message
            self._events.append(Parked(message))
            reply = yield Step.PERMIT
            if reply is not None:
                raise End(Trouble.DESYNC, Step.PERMIT, reply)
            if self._parked is not None:  # withdrawn
                self._parked = None
                self._settle(Verdict(Fate.DEFERRED, Step.PERMIT, None, Trouble.VOID, tried=False))
                return
        self._say(rcpt(message))
        reply = yield _RCPT
        if not 200 <= _code(reply) <= 299:
            self._refuse(_RCPT, reply)
            return
        self._say("DATA")
        reply = yield _DATA
        if not 300 <= _code(reply) <= 399:
            self._refuse(_DATA, reply)
            return
        yield from self._say_body(message)

    def _say_body(self, message: Outbound) -> Script:
        """The body and its dot; or a lone dot when the peer wants data for a recipient it refused (RFC 2920 3.1)."""
        self._left_open = False
        if self._current is None:
            self._out.append(b".\r\n")
            self._takes_ahead = self.pipelining
            yield from hear(_BODY)  # 554 as a rule; nobody is delivered to, whatever it says
            self._takes_ahead = False
            return
        data = message.data
        if not message.proven or ends_early(data):
            data = stuffed(data)
        if len(data) <= SLICE:
            self._out.append(data)
            self._takes_ahead = self.pipelining
        else:  # nothing is said ahead: its Permit would age while this body waits for the socket
            self._out.extend(data[at : at + SLICE] for at in range(0, len(data), SLICE))
        self._out.append(message)
        reply = yield _BODY
        self._takes_ahead = False
        early = self._committed is not message
        if 200 <= _code(reply) <= 299:
            if early:
                raise End(Trouble.DESYNC, _BODY, reply)
            self._settle(Verdict(_DELIVERED, _BODY, reply))
            return
        self._refuse(_BODY, reply)
        if early:  # refused in the middle: what is left of the body cannot be unsaid
            raise End(Trouble.DESYNC, _BODY, reply)

    # -- its words ------------------------------------------------------------------------------------------------

    def _hear_reset(self) -> Script:
        reply = yield from hear(Step.RSET)
        if not reply.accepted:
            raise End(Trouble.DESYNC, Step.RSET, reply)
        self._left_open = False

    def _refuse(self, step: Step, reply: Reply | None) -> bool:
        """Settle the current message by a refusal; anything else in this place ends the conversation. False."""
        code = _code(reply)
        if code < 400:
            raise End(Trouble.DESYNC, step, reply)
        if code == 503:  # "bad sequence": about the conversation, never about the message; RFC 5321 4.3.2
            raise End(Trouble.DESYNC, step, reply)
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
        said = flight(message, self.extensions)
        self._out.append(commands("RSET") + said if self._left_open else said)

    def _say(self, *lines: str) -> None:
        self._out.append(commands(*lines))


_ABOUT = frozenset({Step.MAIL, Step.RCPT, Step.DATA, Step.BODY})  # replies that speak of the message itself


def _code(reply: Reply | None) -> int:
    """The code of the reply that was waited for; no reply (a wake-up nobody sends here) is nonsense, code 0."""
    return 0 if reply is None else reply.code
