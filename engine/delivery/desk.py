"""One site in one worker: the recipients waiting for it, its connections, its pace (decisions 4, 7 and 11).

Laws:
- a recipient is in the stock, on one line, or recorded: never in two places (`Hand.waiting` and `Hand.abroad` count);
- every message on a line was composed under a Permit; one that aged on the line goes back to the stock unsent, and
  RCPT for one that aged on the wire waits for a fresh Permit or is withdrawn;
- who opens or closes connections is decided by `pool.plan` and `pace`, without a wait between looking and changing.

The path of a recipient: `add` (leased) · `press` (gate asked, composed, signed in
batches, put on a line) ·
`next_message` (pulled by the connection) · `on_intent` (journalled) · `on_verdict` · settling.

A line starts with small batches and doubles them while they are used up in time, so that a site that takes two
seconds a message does not have eight signed messages grow old on every line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from redis.exceptions import RedisError

from engine.delivery import pool
from engine.delivery.connection import Closed, Connection, Outbound, Target, Terms, Verdict
from engine.delivery.hand import Hand, Letter
from engine.delivery.outcome import Outcome, Scope, judge, judge_connection
from engine.delivery.press import ask_again
from engine.delivery.site import Site
from engine.delivery.stock import Stock
from engine.queue import pace
from engine.smtp.words import Trouble
from policy.crashpoints import reach

if TYPE_CHECKING:
    from engine.delivery.courier import Courier

log = logging.getLogger(__name__)

TARGETS = 4  # addresses tried in a row before a failure to connect counts against the site (S-09: two at least)
MOST = 8  # recipients written for one line at a time
_OPENING = "open"
_VOID: Final = Trouble.VOID  # by a name of their own: see engine.smtp.dialogue
_SITE: Final = Scope.SITE
_ACCEPTED: Final = pace.Tone.ACCEPTED
HOLD_SECONDS = 5.0  # a site left alone for longer gives its slices back; for less they wait here
CROWDED_SECONDS = 0.25  # before asking again for a connection when the process has all it may have
IDLE_SECONDS = 10.0  # a connection without work is kept this long: the next slice is often near


@dataclass(slots=True, eq=False)
class Line:
    """A connection and what is ready for it. batch: how many recipients to ready next."""

    permit: str
    ready: deque[Outbound] = field(default_factory=deque)
    batch: int = 2
    ordered: bool = False
    idle_since: float = 0.0
    aged: bool = False


class Desk:
    """`Owner` of all connections to one site."""

    def __init__(self, courier: Courier, site: Site, ref: str, limits: pool.Limits, profile: pace.Profile) -> None:
        self.site = site
        self.ref = ref
        self.limits = limits
        self.stock = Stock()
        self.lines: dict[Connection, Line] = {}
        self.hands: dict[Hand, None] = {}
        self.opening = 0
        self._courier = courier
        self._profile = profile
        self.pace = pace.begin(profile)
        self._tokens = 0
        self._tokens_after = 0.0
        self._connect_after = 0.0
        self._names = 0
        self._why = ""  # why the last dial failed, host by host; "" when it did not
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._owed: list[str] = []

    def __repr__(self) -> str:
        return f"<Desk {self.ref}: {len(self.stock)} waiting, {len(self.lines)} lines, pace {self.pace.window:.1f}>"

    # --- stock ---------------------------------------------------------------------------------------------------

    def add(self, hand: Hand, indexes: list[int]) -> None:
        hand.waiting += len(indexes)
        hand.desk = self
        self.hands[hand] = None
        self.stock.add(hand, indexes)
        self.adjust()

    def forget(self, hand: Hand) -> None:
        self.hands.pop(hand, None)

    def drop(self, hand: Hand) -> None:
        """Nothing more of this hand is to be sent: its recipients in the stock are left to its lane."""
        self.stock.drop(hand)
        self.forget(hand)
        hand.waiting = 0

    @property
    def appetite(self) -> int:
        """How many more recipients it could use at the moment."""
        if self.is_held:
            return 0
        return max(0, self._room - len(self.stock))

    @property
    def is_hungry(self) -> bool:
        """Whether so much is missing that slices are to be leased. Not for every slice: a call costs the store and us
        as much as leasing five slices more does."""
        return self.appetite >= max(MOST, self._room // 4)

    @property
    def _room(self) -> int:
        return self._width * MOST * 4

    def lacks(self) -> Literal["urgent", "plain", ""]:
        """What it would take although it is full: transactional mail beside campaigns, or campaigns beside that."""
        least = self._width * MOST
        if self.is_held or self.stock.urgent >= least <= self.stock.plain:
            return ""
        return "urgent" if self.stock.urgent < least else "plain"

    @property
    def _width(self) -> int:
        return max(1, min(self.limits.connections, self.pace.connections))

    @property
    def is_held(self) -> bool:
        return self.pace.is_idle(_micros(time.monotonic()))

    def put_back(self, letters: list[Letter]) -> None:
        """Letters that were not sent go to the front of the stock."""
        for letter in reversed(letters):
            letter.hand.abroad -= 1
            if not letter.hand.dead:
                letter.hand.waiting += 1
                self.stock.put_back(letter.hand, letter.index)

    # --- connections ---------------------------------------------------------------------------------------------

    def adjust(self) -> None:
        """Open and close connections as planned now."""
        now = time.monotonic()
        waits = now < self._connect_after or self._courier.must_wait
        idle = [connection for connection, line in self.lines.items() if line.idle_since and not line.ordered]
        plan = pool.plan(
            stock=len(self.stock),
            connected=len(self.lines),
            opening=self.opening,
            idle=len(idle),
            ceiling=self.pace.connections,
            limits=self.limits,
            failing=self.pace.failures > 0,
            held=self.is_held or self._courier.is_stopping or waits,
        )
        for _ in range(plan.open):
            if not self._courier.may_connect():
                self._connect_after = now + CROWDED_SECONDS
                self._later(CROWDED_SECONDS)
                break
            self.opening += 1
            self._spawn(self._open(), _OPENING)
        closing = idle[: plan.close] if not waits else []
        for connection in closing:
            connection.quit()
        if self.stock:
            for connection in idle[len(closing) :]:
                connection.wake()

    async def _open(self) -> None:
        self._names += 1
        name = f"{self._courier.holder}:{self._names}"
        granted = 1  # until Redis says no: a reply that is lost, or not waited for, may have been a yes
        try:
            [left] = await self._courier.permits.back_offs([self.ref])
            if left > 0:  # another worker was told to leave the site alone, or an earlier life of this one
                granted = 0
                self._leave_alone(left)
                return
            granted = await self._courier.permits.take(self.ref, [name], self.limits.connections)
            if not granted:
                # all permits of the site are with other workers: look again when some may have expired
                self._connect_after = time.monotonic() + 1.0
                return
            opened = await self._dial()
            if opened is None:
                return
            granted = 0  # from here the line owns the permit
            self.lines[opened] = Line(name)
        except (RedisError, OSError):
            self._connect_after = time.monotonic() + 0.5
        finally:
            self.opening -= 1
            if granted:
                await self._give_back(name)
            if opened_line := next((c for c, line in self.lines.items() if line.permit == name), None):
                opened_line.wake()
            else:
                self._courier.sockets.give()
                self._later(max(0.05, self._connect_after - time.monotonic()))

    async def _dial(self) -> Connection | None:
        """The best address that answers. What the last of them said is what the site is judged by; why none of them
        took us is kept, host by host, for the log and for those who expire here."""
        messages = self.limits.messages_per_connection
        terms = Terms(self._courier.hello, self.site.tls, messages, patience=self._courier.patience)
        self._turn += 1
        why: list[str] = []
        for failures in range(min(TARGETS, len(self.site.hosts))):
            target = self.site.target(self._turn, failures)
            opened = await Connection.open(target, self, terms)
            if isinstance(opened, Connection):
                self._why = ""
                return opened
            last = opened
            why.append(_why(target, opened))
        self._why = "; ".join(why)
        if last.trouble is Trouble.ABORTED:  # the system gave us no socket: not this site's doing, and not now
            self._connect_after = time.monotonic() + 1.0
        self._feel(judge_connection(last))
        return None

    async def _give_back(self, name: str) -> None:
        try:
            await self._courier.permits.give_back(self.ref, [name])
        except (RedisError, OSError):
            self._owed.append(name)  # tried again at the end; else it expires by itself

    async def pay_back(self) -> None:
        """Permits that Redis did not take back when their connections ended. Raises RedisError."""
        if self._owed:
            await self._courier.permits.give_back(self.ref, self._owed)
            self._owed = []

    def housekeeping(self, now: float) -> None:
        """Once a second: end what has been idle for long, hand back what a long back-off would keep here."""
        for connection, line in list(self.lines.items()):
            if line.idle_since and now - line.idle_since > IDLE_SECONDS and not line.ordered:
                connection.quit()
        now_us = self._courier.now_us()
        for hand in [hand for hand in self.hands if hand.header.expires_at <= now_us]:
            self._expire(hand)
        left = self.pace.idle_until / 1e6 - now
        if left > HOLD_SECONDS:
            self._hand_back(left)
        self.adjust()

    def make_room(self) -> None:
        """Connections that rest here are wanted elsewhere."""
        if not self.stock:
            for connection, line in list(self.lines.items()):
                if line.idle_since and not line.ordered:
                    connection.quit()

    def _expire(self, hand: Hand) -> None:
        """Those of a hand who wait here for a site that does not take them end; the gate says it of the others."""
        indexes = self.withdraw(hand)
        if not hand.dead:
            self._courier.expire(hand, indexes, self._why)

    def withdraw(self, hand: Hand) -> list[int]:
        """Those of a hand who wait here, taken out of the stock."""
        indexes = self.stock.drop(hand)
        hand.waiting -= len(indexes)
        return indexes

    def _hand_back(self, delay: float) -> None:
        # in the order of the stock, so that the lanes get them back in that order, too
        returned = {hand: None for hand, _ in self.stock if not (hand.abroad or hand.has_news or hand.dead)}
        self.stock.keep(lambda hand, _: not hand.dead and hand not in returned)
        for hand in returned:
            hand.waiting = 0
            self.forget(hand)
            self._spawn(self._courier.hand_back(hand, delay, self.ref), "hand back")

    async def close(self) -> None:
        """Drain: nothing new is started; returns when the last message has its verdict and all connections are gone, or
        when the courier starts new ones again."""
        for task in self._tasks:
            if task.get_name().endswith(_OPENING):  # nothing is on its wire: no reason to wait for a peer that is slow
                task.cancel()
        while self._courier.is_stopping and (self.lines or self._tasks):
            for connection, line in list(self.lines.items()):
                self.put_back([_letter(message) for message in line.ready])
                line.ready.clear()
                connection.quit()
            leaving = [asyncio.ensure_future(connection.wait_closed()) for connection in self.lines]
            if waiting := [*leaving, *self._tasks]:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in leaving:
                each.cancel()

    def abort(self) -> None:
        for connection in list(self.lines):
            connection.abort()

    # --- Owner ---------------------------------------------------------------------------------------------------

    def next_message(self, connection: Connection) -> Outbound | None:
        line = self.lines.get(connection)
        if line is None or self._courier.is_stopping:
            return None
        now = time.monotonic()
        while line.ready:
            message = line.ready.popleft()
            if message.void_at > now:
                line.idle_since = 0.0
                if len(line.ready) <= line.batch // 2:
                    self._want(connection, line)
                return message
            line.aged = True
            self.put_back([_letter(message)])
        self._want(connection, line)
        return None

    def on_intent(self, connection: Connection, messages: list[Outbound]) -> None:
        letters = [_letter(message) for message in messages]
        reach("before-intent")
        self._courier.journal.intend_on([(letter.hand.page, letter.index, letter.mref) for letter in letters])
        reach("after-intent")

    def on_verdict(self, connection: Connection, message: Outbound, verdict: Verdict) -> None:
        reach("before-reply")
        letter = _letter(message)
        header = letter.hand.header
        resend = header.resend and not header.in_doubt(letter.index)
        outcome = judge(verdict, resend=resend)
        reach("after-reply")
        if not outcome.recorded or verdict.trouble is _VOID:
            self.put_back([letter])  # the peer was never asked about this one
            return
        self._feel(outcome)
        if outcome.scope is _SITE and verdict.trouble is Trouble.GOODBYE and connection.delivered:
            # 421 on a connection that has delivered is the site's limit of messages a connection (or a moment's): the
            # pace eases, the connection ends, and this recipient was not refused. Without a delivery before it, it is
            # an attempt like any other, so that nobody goes round for ever.
            self.put_back([letter])
            return
        letter.hand.abroad -= 1
        self._courier.conclude(letter, outcome, connection.tls_version)

    def on_void(self, connection: Connection, message: Outbound) -> None:
        self._spawn(ask_again(self._courier, connection, message, _letter(message)), "renew")

    def on_idle(self, connection: Connection) -> None:
        line = self.lines.get(connection)
        if line is not None and not line.idle_since:
            line.idle_since = time.monotonic()

    def on_closed(self, connection: Connection, closed: Closed) -> None:
        line = self.lines.pop(connection, None)
        if line is not None:
            self._courier.sockets.give()
            self.put_back([_letter(message) for message in line.ready])
            line.ready.clear()
            self._spawn(self._give_back(line.permit), "give back")
        if closed.trouble is not Trouble.LEFT and not connection.delivered:
            # A connection that brought nothing and ended by itself says something about the site; one that
            # delivered and then was closed on us is a limit of messages a connection, which reconnecting obeys.
            self._feel(judge_connection(closed))
        self._courier.loop.call_soon(self.adjust)

    # --- inside --------------------------------------------------------------------------------------------------

    def _feel(self, outcome: Outcome) -> None:
        state = self.pace
        if (
            outcome.tone is _ACCEPTED
            and state.window >= self._profile.ceiling
            and state.rate >= self._profile.rate
            and not (state.failures or state.dead)
        ):
            return  # nothing left to climb: most messages of a campaign
        held = self.is_held
        self.pace = pace.on_answer(self.pace, outcome.tone, _micros(time.monotonic()), self._profile)
        if self.is_held and not held:
            left = self.pace.idle_until / 1e6 - time.monotonic()
            if self.pace.dead == 1:  # once until it takes something again: 10,000 dead domains are not news each time
                extra = {"site": self.site.name, "seconds": round(left, 1), "why": self._why or outcome.rule}
                log.info("a site is left alone", extra=extra)
            self._spawn(self._courier.announce_back_off(self.ref, left), "back off")
            self._later(left)

    def _leave_alone(self, seconds: float) -> None:
        until = _micros(time.monotonic() + seconds)
        self.pace = dataclasses.replace(self.pace, idle_until=max(self.pace.idle_until, until))
        self._later(seconds)

    def _later(self, delay: float) -> None:
        self._courier.loop.call_later(delay + 0.01, self.adjust)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work)
        task.set_name(f"desk {self.ref} {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._courier.fail(error)

    def _want(self, connection: Connection, line: Line) -> None:
        if line.ordered or not self.stock or self.is_held or self._courier.must_wait or self._courier.is_stopping:
            return
        if time.monotonic() < self._tokens_after:
            return  # the rate wakes us
        if line.aged:
            line.batch, line.aged = max(1, line.batch // 2), False
        elif line.batch < MOST:
            line.batch *= 2
        line.ordered = True
        self._courier.press.order(self, connection, line)

    # --- what the press says --------------------------------------------------------------------------------------

    def take(self, count: int) -> list[Letter]:
        """Recipients whose turn it is."""
        taken: list[Letter] = []
        stock = self.stock
        while len(taken) < count and stock:
            hand, index = stock.pop()
            if hand.dead:
                continue
            hand.waiting -= 1
            hand.abroad += 1
            taken.append(Letter(hand, index, hand.reference(index)[0]))
        return taken

    def served(self, connection: Connection, line: Line, messages: list[Outbound]) -> None:
        """What a line ordered is ready, or there was nothing."""
        line.ordered = False
        if connection.closed is not None:
            self.put_back([_letter(message) for message in messages])
        elif messages:
            line.ready.extend(messages)
            connection.wake()
        self._courier.hungry(self)

    async def allowed(self, wanted: int) -> int:
        """How many messages the site's rate lets us start now."""
        rate = self.pace.rate
        if not rate:
            return wanted
        if not self._tokens:
            now = time.monotonic()
            if now < self._tokens_after:
                return 0
            block = max(wanted, min(MOST * 4, int(rate / 10) or 1))
            burst = max(1, int(min(rate, self.limits.burst)))
            try:
                tokens = await self._courier.permits.tokens(self.ref, block, rate, burst)
            except (RedisError, OSError):
                self._courier.in_trouble()
                return 0
            self._tokens += tokens.granted
            if not self._tokens:
                self._tokens_after = now + tokens.wait
                self._courier.loop.call_later(tokens.wait + 0.001, self.adjust)
                return 0
        count = min(wanted, self._tokens)
        self._tokens -= count
        return count


def _why(target: Target, closed: Closed) -> str:
    """Why there is no connection: words of ours and of the system, never the peer's, which may quote an address."""
    said = closed.detail if closed.reply is None else str(closed.reply.code)
    return f"{target.name} [{target.ip}]: {closed.step.value}: {closed.trouble.value}" + (f", {said}" if said else "")


def _letter(message: Outbound) -> Letter:
    assert isinstance(message.key, Letter)
    return message.key


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
