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
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from engine.delivery import pool
from engine.delivery.connection import Closed, Connection, Outbound, Terms, Verdict
from engine.delivery.hand import Hand, Letter
from engine.delivery.outcome import Outcome, Scope, judge, judge_connection
from engine.delivery.press import ask_again
from engine.delivery.site import Site
from engine.queue import pace
from engine.queue.journal import Intent
from engine.smtp.words import Trouble

if TYPE_CHECKING:
    from engine.delivery.courier import Courier

log = logging.getLogger(__name__)

TARGETS = 4  # addresses tried in a row before a failure to connect counts against the site (S-09: two at least)
MOST = 8  # recipients written for one line at a time
HOLD_SECONDS = 5.0  # a site left alone for longer gives its slices back; for less they wait here
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
        self.stock: deque[tuple[Hand, int]] = deque()
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
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Desk {self.ref}: {len(self.stock)} waiting, {len(self.lines)} lines, pace {self.pace.window:.1f}>"

    # --- stock ---------------------------------------------------------------------------------------------------

    def add(self, hand: Hand, indexes: list[int]) -> None:
        hand.waiting += len(indexes)
        hand.desk = self
        self.hands[hand] = None
        self.stock.extend((hand, index) for index in indexes)
        self.adjust()

    def forget(self, hand: Hand) -> None:
        self.hands.pop(hand, None)

    def drop(self, hand: Hand) -> None:
        """Nothing more of this hand is to be sent: its recipients in the stock are left to its lane."""
        self.stock = deque(pair for pair in self.stock if pair[0] is not hand)
        self.forget(hand)
        hand.waiting = 0

    @property
    def appetite(self) -> int:
        """How many more recipients it could use at the moment."""
        if self.is_held:
            return 0
        lines = max(1, min(self.limits.connections, self.pace.connections))
        return max(0, lines * MOST * 4 - len(self.stock))

    @property
    def is_held(self) -> bool:
        return self.pace.is_idle(_micros(time.monotonic()))

    def put_back(self, letters: list[Letter]) -> None:
        """Letters that were not sent go to the front of the stock."""
        for letter in reversed(letters):
            letter.hand.abroad -= 1
            if not letter.hand.dead:
                letter.hand.waiting += 1
                self.stock.appendleft((letter.hand, letter.index))

    # --- connections ---------------------------------------------------------------------------------------------

    def adjust(self) -> None:
        """Open and close connections as planned now."""
        now = time.monotonic()
        idle = [connection for connection, line in self.lines.items() if line.idle_since and not line.ordered]
        plan = pool.plan(
            stock=len(self.stock),
            connected=len(self.lines),
            opening=self.opening,
            idle=len(idle),
            ceiling=self.pace.connections,
            limits=self.limits,
            failing=self.pace.failures > 0,
            held=self.is_held or self._courier.is_stopping or now < self._connect_after,
        )
        for _ in range(plan.open):
            self.opening += 1
            self._spawn(self._open(), "open")
        closing = idle[: plan.close] if not now < self._connect_after else []
        for connection in closing:
            connection.quit()
        if self.stock:
            for connection in idle[len(closing) :]:
                connection.wake()

    async def _open(self) -> None:
        self._names += 1
        name = f"{self._courier.holder}:{self._names}"
        granted = 0
        try:
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
                self._later(max(0.05, self._connect_after - time.monotonic()))

    async def _dial(self) -> Connection | None:
        """The best address that answers. What all of them said last is what the site is judged by."""
        messages = self.limits.messages_per_connection
        terms = Terms(self._courier.hello, self.site.tls, messages, patience=self._courier.patience)
        self._turn += 1
        for failures in range(min(TARGETS, len(self.site.hosts))):
            opened = await Connection.open(self.site.target(self._turn, failures), self, terms)
            if isinstance(opened, Connection):
                return opened
            last = opened
        self._feel(judge_connection(last))
        return None

    async def _give_back(self, name: str) -> None:
        try:
            await self._courier.permits.give_back(self.ref, [name])
        except (RedisError, OSError):
            log.debug("a permit was not given back; it expires by itself")

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

    def _expire(self, hand: Hand) -> None:
        """Those of a hand who wait here for a site that does not take them end; the gate says it of the others."""
        indexes = [index for other, index in self.stock if other is hand]
        self.stock = deque(pair for pair in self.stock if pair[0] is not hand)
        hand.waiting -= len(indexes)
        if not hand.dead:
            self._courier.expire(hand, indexes)

    def _hand_back(self, delay: float) -> None:
        keep: deque[tuple[Hand, int]] = deque()
        returned: set[Hand] = set()
        for hand, index in self.stock:
            if hand.abroad or hand.has_news or hand.dead:
                if not hand.dead:
                    keep.append((hand, index))
            else:
                hand.waiting -= 1
                returned.add(hand)
        self.stock = keep
        for hand in returned:
            self.forget(hand)
            self._spawn(self._courier.hand_back(hand, delay), "hand back")

    async def close(self) -> None:
        """Drain: nothing new is started; returns when the last message has its verdict and all connections are gone."""
        for connection, line in list(self.lines.items()):
            self.put_back([_letter(message) for message in line.ready])
            line.ready.clear()
            connection.quit()
        while self.lines or self._tasks:
            waiting = [asyncio.ensure_future(connection.wait_closed()) for connection in self.lines]
            waiting += list(self._tasks)
            if not waiting:
                break
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

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
        intents = []
        for message in messages:
            letter = _letter(message)
            lease = letter.hand.lease
            header = letter.hand.header
            intents.append(
                Intent(
                    header.job, letter.mref, header.attempt, lease.partition, lease.slice_id, lease.token, letter.index
                )
            )
        self._courier.journal.intend(intents)

    def on_verdict(self, connection: Connection, message: Outbound, verdict: Verdict) -> None:
        letter = _letter(message)
        header = letter.hand.header
        resend = header.resend and not header.in_doubt(letter.index)
        outcome = judge(verdict, resend=resend)
        if not outcome.recorded or verdict.trouble is Trouble.VOID:
            self.put_back([letter])  # the peer was never asked about this one
            return
        self._feel(outcome)
        if outcome.scope is Scope.SITE and verdict.trouble is Trouble.GOODBYE and connection.delivered:
            # 421 on a connection that has delivered is the site's limit of messages a connection (or a moment's): the
            # pace eases, the connection ends, and this recipient was not refused. Without a delivery before it, it is
            # an attempt like any other, so that nobody goes round for ever.
            self.put_back([letter])
            return
        letter.hand.abroad -= 1
        if not letter.hand.dead:
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
            outcome.tone is pace.Tone.ACCEPTED
            and state.window >= self._profile.ceiling
            and state.rate >= self._profile.rate
            and not (state.failures or state.dead)
        ):
            return  # nothing left to climb: most messages of a campaign
        held = self.is_held
        self.pace = pace.on_answer(self.pace, outcome.tone, _micros(time.monotonic()), self._profile)
        if self.is_held and not held:
            left = self.pace.idle_until / 1e6 - time.monotonic()
            self._spawn(self._courier.announce_back_off(self.ref, left), "back off")
            self._later(left)

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
        if line.ordered or not self.stock or self.is_held or self._courier.must_wait:
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

    def take(self, count: int) -> list[tuple[Hand, int]]:
        """Recipients from the front of the stock."""
        taken: list[tuple[Hand, int]] = []
        while self.stock and len(taken) < count:
            hand, index = self.stock.popleft()
            if hand.dead:
                continue
            hand.waiting -= 1
            hand.abroad += 1
            taken.append((hand, index))
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


def _letter(message: Outbound) -> Letter:
    assert isinstance(message.key, Letter)
    return message.key


def _micros(seconds: float) -> int:
    return round(seconds * 1_000_000)
