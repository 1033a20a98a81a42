"""Asks the gate for everybody who waits at this moment, in one round trip (decision 7).

While `FLIGHTS` questions are on their way, those who come wait and are asked about together in the next: under load the
batches grow by themselves, on an idle engine a question leaves at once.

Law: `asked_at` is read before the question is written, so a Permit is never younger than it says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.queue.lanes import Answer, GateRequest, Lanes
from policy.crashpoints import reach

FLIGHTS = 3  # a store that syncs every write answers in 5 to 20 ms, a round of messages is written in 16
MOST = 256  # slices asked about at once: one script holds the server for about 20 µs, so 5 ms


@dataclass(frozen=True, slots=True)
class Told:
    """asked_at: monotonic seconds; answers in the order of the requests, None where the store did not answer."""

    asked_at: float
    answers: list[Answer | None]


class Gatekeeper:
    """One per worker."""

    def __init__(self, lanes: Lanes, flights: int = FLIGHTS) -> None:
        self._lanes = lanes
        self._flights = flights
        self._waiting: list[tuple[list[GateRequest], asyncio.Future[Told]]] = []
        self._asking: set[asyncio.Task[None]] = set()

    async def ask(self, requests: Sequence[GateRequest]) -> Told:
        future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(requests), future))
        if len(self._asking) < self._flights:
            task = asyncio.create_task(self._fly(), name="gatekeeper")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return await future

    async def _fly(self) -> None:
        await self._ask_all()
        # Before anybody else's turn, not when the loop comes to the callback: who asks again the moment he is answered
        # would find every flight taken by one that has ended, and wait until somebody else asked.
        if (task := asyncio.current_task()) is not None:
            self._asking.discard(task)

    async def _ask_all(self) -> None:
        while self._waiting:
            batch: list[tuple[list[GateRequest], asyncio.Future[Told]]] = []
            size = 0
            while self._waiting and (not batch or size + len(self._waiting[0][0]) <= MOST):
                batch.append(self._waiting.pop(0))
                size += len(batch[-1][0])
            flat = [request for requests, _ in batch for request in requests]
            asked_at = time.monotonic()
            try:
                reach("before-gate")
                answers = await self._lanes.gate_many(flat)
                reach("after-gate")
            except Exception as error:  # our own mistake, not the store's: every asker must hear of it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            place = 0
            for requests, future in batch:
                if not future.done():
                    future.set_result(Told(asked_at, answers[place : place + len(requests)]))
                place += len(requests)
