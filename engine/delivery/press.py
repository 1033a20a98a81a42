"""The press: asks the gate for recipients and writes their messages, just before they are wanted (steps 6 and 7).

Laws:
- where the store may forget a lease at a power cut, everybody of a round is in the journal before one is composed;
- a message is composed under a Permit that was asked for in this very round, and never more of them than the lines
  can send before it is void: work done early is work done twice;
- nothing is composed after the delivery window of its job has closed: what was, is on the wire within half a second;
- lines are served in the order they asked, whatever site they belong to: a slow site does not hold a fast one back.

One round: lines that want messages, up to `ROUND` recipients in all · one question to the gate for all of them ·
refusals recorded · the others composed and signed together, whatever job and site they are of, as many at a time as
`TURN` allows, and put on their lines. Several rounds run at a time, so that one composes while the others' questions
are on their way.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.delivery.connection import Connection, Outbound
from engine.delivery.hand import Hand, Letter
from engine.queue.journal import Intent
from engine.queue.lanes import GateRequest
from policy.events import Reason
from policy.gate import PERMIT_SECONDS, Permit, Refusal, Standing, decide

if TYPE_CHECKING:
    from engine.delivery.courier import Courier
    from engine.delivery.desk import Desk, Line

# Recipients asked about, composed and signed together: 3 to 7 % less CPU of a worker than sixteen (pairs of workers in
# one run), which took 3 % less than eight: each step finds its code in the caches. 128 brought no more.
ROUND = 64
ROUNDS = 3
TURN = 0.03  # seconds of composing before the loop has its turn: a round of 34 kB by OpenSSL takes 23 ms
LEAST = 8  # composed together however long they take: one call of multi-buffer RSA

Order = tuple["Desk", Connection, "Line"]
Taken = tuple[Order, list[Letter]]


class Press:
    """One per worker."""

    def __init__(self, courier: Courier, clock: Callable[[], float] = time.monotonic) -> None:
        self._courier = courier
        self._clock = clock
        self._orders: deque[Order] = deque()
        self._news = asyncio.Event()
        self._together = ROUND  # composed at a time, by how long the last ones took

    def order(self, desk: Desk, connection: Connection, line: Line) -> None:
        """This line wants messages."""
        self._orders.append((desk, connection, line))
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(ROUNDS):
                group.create_task(self._rounds())

    async def _rounds(self) -> None:
        while True:
            while not self._orders:
                self._news.clear()
                await self._news.wait()
            await self._round(await self._gather())

    async def _gather(self) -> list[Taken]:
        taken: list[Taken] = []
        size = 0
        while self._orders and size < ROUND:
            desk, connection, line = order = self._orders.popleft()
            count = await desk.allowed(min(line.batch, ROUND - size)) if connection.closed is None else 0
            letters = desk.take(count)
            if letters:
                taken.append((order, letters))
                size += len(letters)
            else:
                desk.served(connection, line, [])
        return taken

    async def _round(self, taken: list[Taken]) -> None:
        if not taken:
            return
        courier = self._courier
        by_hand: dict[Hand, list[Letter]] = {}
        for _, letters in taken:
            for letter in letters:
                by_hand.setdefault(letter.hand, []).append(letter)
        if courier.foresees:
            courier.journal.foresee(_intent(letter) for _, letters in taken for letter in letters)
        told = await courier.gatekeeper.ask(
            [question(hand, [letter.index for letter in letters]) for hand, letters in by_hand.items()]
        )
        if courier.foresees:
            await courier.journal.durable()
        for (hand, letters), answer in zip(by_hand.items(), told.answers, strict=True):
            if answer is None:  # the store did not answer: nobody is written to (fails closed)
                courier.in_trouble()
                courier.put_back(letters)
            elif answer.standing is not Standing.CLEAR:
                courier.stand_down(hand, letters, answer.standing)
            elif hand.job.opens_in(courier.now_us()):
                courier.shut(hand, letters)
            else:
                job = hand.header.job
                for letter, fact in zip(letters, answer.facts, strict=True):
                    verdict = decide(fact, job, letter.mref, told.asked_at)
                    if isinstance(verdict, Refusal):
                        hand.abroad -= 1
                        courier.refuse(letter, verdict.reason)
                    else:
                        letter.permit = verdict
        void_at = told.asked_at + PERMIT_SECONDS
        group: list[Taken] = []
        size = 0
        for order, letters in taken:
            permitted = [letter for letter in letters if letter.permit is not None]
            group.append((order, permitted))
            size += len(permitted)
            if size >= self._together:
                self._serve(group, void_at)
                group, size = [], 0
                await asyncio.sleep(0)  # what is ready goes out while the next is written
        self._serve(group, void_at)

    def _serve(self, group: list[Taken], void_at: float) -> None:
        """Compose for these lines together, and give each what is its own."""
        courier = self._courier
        pairs: list[tuple[Permit, Letter]] = []
        for (_, connection, _), letters in group:
            if connection.closed is not None or time.monotonic() >= void_at:
                courier.put_back(letters)
            else:
                pairs += [(letter.permit, letter) for letter in letters if letter.permit is not None]
        made: dict[object, Outbound] = {}
        if pairs:
            began = self._clock()
            made = {message.key: message for message in courier.compose(pairs, void_at)}
            took = self._clock() - began
            self._together = max(LEAST, min(ROUND, int(TURN * len(pairs) / took))) if took > 0.0 else ROUND
        for (desk, connection, line), letters in group:
            desk.served(connection, line, [made[letter] for letter in letters if letter in made])


def _intent(letter: Letter) -> Intent:
    lease, header = letter.hand.lease, letter.hand.header
    return Intent(
        header.job, letter.mref, header.attempt, lease.partition, lease.slice_id, lease.token, letter.index
    )  # fmt: skip


def question(hand: Hand, indexes: list[int]) -> GateRequest:
    """The gate's question about recipients of one slice."""
    lease = hand.lease
    tags = [hand.reference(index)[1] for index in indexes]
    return GateRequest(lease.partition, lease.slice_id, lease.token, tags, hand.domain_tag)


async def ask_again(courier: Courier, connection: Connection, message: Outbound, letter: Letter) -> None:
    """RCPT waits, because the Permit aged on the way: a fresh one, or the message comes back unsent."""
    told = await courier.gatekeeper.ask([question(letter.hand, [letter.index])])
    answer = told.answers[0]
    clear = answer is not None and answer.standing is Standing.CLEAR
    fact = answer.facts[0] if answer is not None and clear else int(Reason.RESTRICTED)
    is_open = not letter.hand.job.opens_in(courier.now_us())
    if is_open and isinstance(decide(fact, letter.hand.header.job, letter.mref, told.asked_at), Permit):
        connection.renew(message, told.asked_at + PERMIT_SECONDS)
    else:
        connection.withdraw(message)  # back to the stock, and the gate says why when it is asked there
