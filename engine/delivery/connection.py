"""The one file that knows both the SMTP dialogue and the socket: an asyncio protocol that drives one by the other.

Promise: everything a peer or the network does comes back as a value (`Verdict` for each message, one `Closed`);
every message pulled gets exactly one verdict; the owner hears `on_intent` before the final dot is written (T6).

1. `Connection.open` dials a checked address, hears greeting and EHLO, takes STARTTLS when offered, and returns the
   connection ready, or `Closed`. A failed handshake is dialled again in clear, once, under `Tls.MAY` only.
2. The owner calls `wake` when it has messages; `Owner.next_message` is then pulled whenever the dialogue can take one,
   so that body n and MAIL, RCPT, DATA of n+1 leave in one write.
3. `Owner.on_verdict` for each message, `on_idle` when nothing is in flight and nothing was pulled, `on_closed` last.

All owner calls are synchronous and come from the event loop; they may call `wake`, `quit`, `abort`, `renew` and
`withdraw`. An owner that raises loses the connection: the error goes to the loop's exception handler.

Deadlines are for whole replies (S-01; faults 3.1 slow-loris), by `Step`; one timer a connection, moved only when it
would ring too late. Bodies above 64 KiB are handed to the socket piece by piece as it drains, each piece within
`Step.BLOCK`, so a peer that stops reading is found before the dot is out and the message is a safe retry. Reading
never waits for writing (RFC 2920 3.1: else both sides can block on full windows).

Why aiosmtplib does not open the connection (decision 9): handing its transport over means reaching into private
fields, giving up the deadline per reply, and translating its exceptions back into verdicts, to save the sixty lines
of `engine.smtp.opening`, which the golden dialogues need anyway. It is not faster either: both take about 0.35 ms on
loopback (benchmarks/test_dialogue.py).

No delayed acknowledgement (40 ms) holds a conversation up: uvloop and asyncio set TCP_NODELAY, and what we say next
acknowledges what the peer said (python -m benchmarks.stalls prints the histogram against Postfix's smtpd).

Known limits: what the kernel took counts as written; a Permit is checked when RCPT is handed to the socket.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from engine.delivery import tls
from engine.delivery.sockets import OURS
from engine.smtp.dialogue import SLICE, Dialogue
from engine.smtp.words import (
    FOREVER,
    PATIENCE,
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
from policy.crashpoints import reach

__all__ = ["Closed", "Connection", "Outbound", "Owner", "Target", "Terms", "Verdict"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where to dial. name: the MX host, for TLS and logs. ip: the address that was checked (faults 3.2: pinned).

    preference: of the MX, smallest first. implicit: TLS from the first byte (RFC 8314). login: for AUTH PLAIN.
    """

    name: str
    ip: str
    port: int = 25
    preference: int = 0
    implicit: bool = False
    login: tuple[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """How to behave on a connection. hello: our EHLO name. messages: pulled at most, then QUIT; 0 is no limit.

    patience: seconds by step, overriding words.PATIENCE. source: our local address, "" for the system's choice.
    """

    hello: str
    tls: Tls = Tls.MAY
    messages: int = 0
    source: str = ""
    patience: Mapping[Step, float] = field(default_factory=dict)
    pipeline: bool = True


class Owner(Protocol):
    """What a connection asks and tells. Every call is synchronous and must not block."""

    def next_message(self, connection: Connection) -> Outbound | None:
        """The next message, its Permit good now, or None: the connection rests until `Connection.wake`."""

    def on_intent(self, connection: Connection, messages: list[Outbound]) -> None:
        """The final dots of these messages are about to be written: journal it. Raising keeps the dots in."""

    def on_verdict(self, connection: Connection, message: Outbound, verdict: Verdict) -> None:
        """Exactly once for each message pulled."""

    def on_void(self, connection: Connection, message: Outbound) -> None:
        """MAIL was accepted, but the Permit ran out before RCPT: ask again, then `renew` or `withdraw`."""

    def on_idle(self, connection: Connection) -> None:
        """Nothing in flight and next_message returned None."""

    def on_closed(self, connection: Connection, closed: Closed) -> None:
        """Last call, exactly once for each connection that `open` returned."""


class Connection(asyncio.Protocol):
    """One SMTP connection. Made by `open` only; statistics are plain attributes: pulled, delivered, opened_at."""

    def __init__(self, target: Target, owner: Owner, terms: Terms) -> None:
        self.target = target
        self.terms = terms
        self.closed: Closed | None = None
        self.tls_version = 0
        self.pulled = 0
        self.delivered = 0
        self.opened_at = 0.0
        self._owner = owner
        self._patience = {**PATIENCE, **terms.patience}
        self._dialogue = Dialogue(
            terms.hello,
            terms.tls,
            on_commit=self._commit,
            is_void=lambda message: message.void_at <= time.monotonic(),
            pipeline=terms.pipeline,
            encrypted=target.implicit,
            login=target.login,
        )
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._opened: asyncio.Future[Closed | None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._upgrade: asyncio.Task[None] | None = None
        self._pending: deque[Event] = deque()
        self._paused = False  # the socket takes nothing more for now
        self._busy = False  # inside _go: owner calls come back into it
        self._handed = False  # `open` has returned it
        self._progress = 0  # pieces written
        self._dotted = False  # what is written next holds a final dot
        self._marked = -1  # progress at which the deadline was set
        self._leaving = False
        self._deadline = FOREVER
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = FOREVER

    # -- what the owner says ---------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, target: Target, owner: Owner, terms: Terms) -> Connection | Closed:
        """A ready connection, or why there is none. Cancelling closes what was begun."""
        result = await cls._open_once(target, owner, terms)
        if isinstance(result, Closed) and terms.tls is Tls.MAY and _failed_handshake(result):
            result = await cls._open_once(target, owner, dataclasses.replace(terms, tls=Tls.NEVER))
        return result

    @property
    def idle(self) -> bool:
        return self._dialogue.idle

    @property
    def extensions(self) -> Mapping[str, str]:
        return self._dialogue.extensions

    def wake(self) -> None:
        """There may be messages now."""
        if self.closed is None:
            self._go([])

    def quit(self) -> None:
        """Take no further message; QUIT when what is in flight is settled."""
        if self.closed is None and not self._leaving:
            self._leaving = True
            self._go([])

    def abort(self) -> None:
        """Drop it now: what is in flight is settled DEFERRED, or UNKNOWN behind its dot. For messages, prefer quit."""
        self._lose(Trouble.ABORTED)

    def renew(self, message: Outbound, void_at: float) -> None:
        """The Permit of a parked message is fresh until void_at. Harmless when it is parked no longer."""
        message.void_at = void_at
        if self._dialogue.waiting_for is Step.PERMIT and not self._dialogue.closed:
            self._go(self._dialogue.renew(message))

    def withdraw(self, message: Outbound) -> None:
        """The parked message may not be sent: its verdict comes DEFERRED with VOID, untried. Harmless when late."""
        if self._dialogue.waiting_for is Step.PERMIT and not self._dialogue.closed:
            self._go(self._dialogue.withdraw(message))

    async def wait_closed(self) -> None:
        """Until the socket is gone."""
        await asyncio.shield(self._gone)

    def __repr__(self) -> str:
        state = self.closed.trouble.value if self.closed is not None else self._dialogue.waiting_for.value
        return f"<Connection {self.target.name} [{state}] pulled {self.pulled} delivered {self.delivered}>"

    # -- what the loop says ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by duck only
        self._transport.set_write_buffer_limits(high=SLICE)
        self.tls_version = tls.version(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        self._go(self._dialogue.receive(data))

    def eof_received(self) -> None:
        self._lose(Trouble.LOST)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(Trouble.LOST, _words(exc))
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._go([])

    # -- inside ----------------------------------------------------------------------------------------------------

    @classmethod
    async def _open_once(cls, target: Target, owner: Owner, terms: Terms) -> Connection | Closed:
        self = cls(target, owner, terms)
        try:
            async with asyncio.timeout(self._patience[Step.CONNECT]):
                await self._dial()
        except TimeoutError:
            return self._stillborn(Trouble.TIMEOUT, "")
        except ssl.SSLError as error:
            return self._stillborn(Trouble.TLS, _words(error))
        except OSError as error:
            return self._stillborn(Trouble.ABORTED if error.errno in OURS else Trouble.UNREACHABLE, _words(error))
        try:
            closed = await self._opened
        except asyncio.CancelledError:
            self.abort()
            raise
        if closed is None:
            closed = self.closed  # it may have ended between Ready and here
        if closed is not None:
            return closed
        self.opened_at = time.monotonic()
        self._handed = True
        return self

    async def _dial(self) -> None:
        target = self.target
        local = (self.terms.source, 0) if self.terms.source else None
        if target.implicit:
            await self._loop.create_connection(
                lambda: self,
                target.ip,
                target.port,
                local_addr=local,
                ssl=tls.context(Tls.VERIFIED if self.terms.tls is Tls.VERIFIED else Tls.MUST),
                server_hostname=target.name,
                ssl_shutdown_timeout=self._patience[Step.QUIT],
            )
        else:
            await self._loop.create_connection(lambda: self, target.ip, target.port, local_addr=local)

    def _stillborn(self, trouble: Trouble, detail: str) -> Closed:
        self.closed = Closed(trouble, Step.CONNECT, None, detail)
        return self.closed

    def _go(self, events: list[Event]) -> None:
        """Act on events, pull what may be pulled, write, and set the deadline. Owner calls come back here: queued."""
        self._pending.extend(events)
        if self._busy:
            return
        self._busy = True
        try:
            self._turn()
        except Exception as error:  # the owner's: whatever it was, no message may be left without its verdict
            self._fail(error)
        finally:
            self._busy = False

    def _turn(self) -> None:
        dialogue, pending = self._dialogue, self._pending
        told_idle = False
        while True:
            while pending:
                self._act(pending.popleft())
            if self.closed is not None:
                return
            if self._leaving or self._paused or not dialogue.wants or not self._opened.done():
                break
            if self.terms.messages and self.pulled >= self.terms.messages:
                self._leaving = True
                break
            message = self._owner.next_message(self)
            if message is not None:
                self.pulled += 1
                if message.void_at <= time.monotonic():
                    pending.append(Settled(message, _VOID))
                else:
                    pending.extend(dialogue.deliver(message))
            elif dialogue.idle and not told_idle:
                told_idle = True
                self._owner.on_idle(self)
            else:
                break
        if self._leaving:
            pending.extend(dialogue.quit())
        self._write()
        if pending:  # an owner that aborted while we wrote
            self._turn()
        else:
            self._set_deadline()

    def _act(self, event: Event) -> None:
        if isinstance(event, Settled):
            if event.verdict.fate is _DELIVERED:
                self.delivered += 1
            self._owner.on_verdict(self, event.message, event.verdict)
        elif isinstance(event, Closed):
            self._close(event)
        elif isinstance(event, Parked):
            self._owner.on_void(self, event.message)
        elif isinstance(event, Upgrade):
            self._upgrade = self._loop.create_task(self._handshake())
        elif isinstance(event, Ready) and not self._opened.done():
            self._opened.set_result(None)

    def _close(self, closed: Closed) -> None:
        self.closed = closed
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            if closed.trouble is Trouble.LEFT and not self._transport.get_write_buffer_size():
                self._transport.close()
            else:  # whatever is still in the buffer has no reader: closing would wait for one
                self._transport.abort()
        if not self._opened.done():
            self._opened.set_result(closed)
        elif self._handed:
            self._owner.on_closed(self, closed)

    def _write(self) -> None:
        """Hand out what is to be said, as long as the socket takes it; `_commit` is called on the way."""
        dialogue, transport = self._dialogue, self._transport
        while transport is not None and dialogue.speaking and not self._paused:
            chunks = dialogue.outgoing(2 * SLICE)
            if chunks:
                # One write, not writelines: asyncio's own of Python 3.12 and 3.13.0 never pauses the protocol after
                # writelines, so a peer that stops reading would be sent the dot all the same. A copy costs 2 us.
                if self._dotted:
                    reach("before-dot")
                transport.write(b"".join(chunks))
                self._progress += 1
                if self._dotted:
                    self._dotted = False
                    reach("after-dot")

    def _commit(self, message: Outbound) -> None:
        self._owner.on_intent(self, [message])
        self._dotted = True

    async def _handshake(self) -> None:
        transport = self._transport
        assert transport is not None
        try:
            upgraded = await self._loop.start_tls(
                transport,
                self,
                tls.context(self.terms.tls),
                server_hostname=self.target.name,
                ssl_handshake_timeout=self._patience[Step.TLS],
                ssl_shutdown_timeout=self._patience[Step.QUIT],
            )
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; ValueError: a name TLS cannot take
            self._lose(Trouble.TLS, _words(error))
            transport.abort()
            return
        if upgraded is None or self.closed is not None:
            transport.abort()
            return
        self._transport = upgraded
        upgraded.set_write_buffer_limits(high=SLICE)
        self.tls_version = tls.version(upgraded)
        self._go(self._dialogue.tls_started())

    def _lose(self, trouble: Trouble, detail: str = "") -> None:
        if self.closed is None:
            self._go(self._dialogue.lost(trouble, detail))

    def _fail(self, error: Exception) -> None:
        """An owner raised: report it, drop the connection, and still give every message its verdict."""
        self._report(error)
        self._pending.extend(self._dialogue.lost(Trouble.ABORTED, type(error).__name__))
        while self._pending:
            try:
                self._act(self._pending.popleft())
            except Exception as another:
                self._report(another)

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": "the owner of an SMTP connection raised", "exception": error, "protocol": self}
        )

    # -- deadlines -------------------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        """A deadline moves only with progress: a reply heard or a piece written, not a byte read."""
        dialogue = self._dialogue
        progress = dialogue.heard + self._progress
        if progress == self._marked:
            return
        self._marked = progress
        patience = self._patience[_BLOCK if dialogue.speaking else dialogue.waiting_for]
        self._deadline = self._loop.time() + patience
        if self._deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._ring)
            self._timer_at = self._deadline

    def _ring(self) -> None:
        self._timer, self._timer_at = None, FOREVER
        if self.closed is not None or self._deadline == FOREVER:
            return
        if self._deadline - self._loop.time() > CLOCK_GRAIN:
            self._timer = self._loop.call_at(self._deadline, self._ring)
            self._timer_at = self._deadline
        elif self._dialogue.waiting_for is Step.PERMIT:
            self._lose(Trouble.VOID, "the gate did not answer")
        elif self._dialogue.idle:
            self.quit()
        else:
            self._lose(Trouble.TIMEOUT)


_BLOCK: Final = Step.BLOCK  # by a name of their own: see engine.smtp.dialogue
_DELIVERED: Final = Fate.DELIVERED
CLOCK_GRAIN = 0.005  # seconds; uvloop's clock is cached and in milliseconds, so a timer can ring a little early
_VOID = Verdict(Fate.DEFERRED, Step.MAIL, None, Trouble.VOID, tried=False)


def _failed_handshake(closed: Closed) -> bool:
    return closed.step is Step.TLS and closed.trouble in (Trouble.TLS, Trouble.LOST, Trouble.TIMEOUT)


def _words(error: BaseException | None) -> str:
    """What the system or TLS said, for the log."""
    if error is None:
        return ""
    if isinstance(error, ssl.SSLError):
        return error.reason or type(error).__name__
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
