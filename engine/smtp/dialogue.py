"""One connection's conversation as a script: bytes in, events and bytes out.

Laws (tests/laws/test_smtp_laws.py carries the same sentences):
1. Every message taken is settled exactly once and there is exactly one `Closed`, whatever comes.
2. Any split of what the peer says between two things of ours gives the same events and the same bytes.
3. All that leaves is SMTP grammar: command lines of printable characters, at most 512 octets, ending in CRLF
   (`lines.commands` is the one place that makes them); bodies dot-stuffed, never a bare CR or LF.
4. A message is UNKNOWN only if its final dot was handed out, and ``on_commit`` was called before it was.
5. No RCPT is said for a message whose Permit is void: `deliver` puts it into the very next `outgoing`, and where
   MAIL's reply stands between the two the script asks ``is_void`` first.

How the conversation goes is in `engine.smtp.script`; here is what a driver calls, and in which order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from engine.smtp.lines import LocalError, misfit
from engine.smtp.opening import End
from engine.smtp.parser import ReplyParser
from engine.smtp.reply import Malformed, Reply
from engine.smtp.script import SLICE, Conversation
from engine.smtp.words import FOREVER, Event, Fate, Outbound, Settled, Step, Tls, Trouble, Upgrade, Verdict

__all__ = ["SLICE", "Dialogue"]

# A member is held by a name where it is asked for with every message: by its class it costs 0.1 us, because EnumType of
# CPython 3.11 has a __getattr__.
_TLS: Final = Step.TLS
_BODY: Final = Step.BODY
_IDLE: Final = Step.IDLE
_HELLO = re.compile(r"[A-Za-z0-9._-]{1,255}|\[[A-Za-z0-9.:]{1,64}\]")


def _nothing(_: Outbound) -> None:
    return None


def _never(_: Outbound) -> bool:
    return False


class Dialogue(Conversation):
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
        if not _HELLO.fullmatch(hello):
            raise LocalError("the EHLO name is neither a domain nor an address literal")
        super().__init__(hello, tls, is_void=is_void, pipeline=pipeline, encrypted=encrypted, login=login)
        self.waiting_for = Step.GREETING
        self.heard = 0  # replies and other turns of the script: what counts as progress against a deadline
        self._on_commit = on_commit
        self._upgrading = False
        self._parser = ReplyParser()
        self._script = self._run()
        next(self._script)

    # -- what the driver says ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer; never raises for what they are."""
        parser, script = self._parser, self._script
        parser.feed(data)
        while not self.closed:
            waiting = self.waiting_for
            if waiting is _TLS:
                if parser.pending:  # also what arrives later in plain text, before the handshake
                    self._throw(Trouble.INJECTION)
                elif not self._upgrading:
                    self._upgrading = True
                    self._events.append(Upgrade())
                break
            reply = parser.next_reply()
            if reply is None:
                break
            if type(reply) is Reply:
                if reply.code == 421:
                    self._throw(Trouble.GOODBYE, reply)
                elif self._out and (waiting is not _BODY or self._current is None):
                    self._throw(Trouble.DESYNC, reply)  # it cannot answer what was not said yet; BODY sees for itself
                else:  # `_send`, as it stands below: four times a message
                    self.heard += 1
                    try:
                        self.waiting_for = script.send(reply)
                    except StopIteration:
                        break  # _end was reached
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
        self._parser = ReplyParser()
        self._send(None)
        return self._drain()

    @property
    def wants(self) -> bool:
        """Whether `deliver` may be called: idle, or a body is out and its flight has room behind it."""
        if self.waiting_for is _IDLE:
            return not (self._leaving or self.closed)
        return self._takes_ahead and not self._leaving

    @property
    def idle(self) -> bool:
        return self.waiting_for is _IDLE and not self.closed

    def deliver(self, message: Outbound) -> list[Event]:
        """Take a message. Its commands are in the very next `outgoing`, so its Permit must be good now."""
        if not self.wants:
            raise LocalError("no message is wanted now")
        reason = misfit(message, self.extensions, self._max_size)
        if reason is not None:
            self._events.append(Settled(message, Verdict(Fate.REJECTED, Step.MAIL, None, reason)))
        elif self.waiting_for is _IDLE:
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
            self.waiting_for = self._script.throw(End(trouble, self.waiting_for, reply, detail))
        except StopIteration:
            return  # _end was reached

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events
