"""The gatekeeper: who waits at the same moment is asked about in one round trip, and a Permit is never too young."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast

import pytest

from engine.delivery.gatekeeper import Gatekeeper
from engine.queue.lanes import Answer, GateRequest, Lanes
from policy.gate import Standing


class SlowGate:
    """Lanes with one question: answers each slice with its token as the fact, when released."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.release = asyncio.Event()
        self.fault: Exception | None = None

    async def gate_many(self, requests: Sequence[GateRequest]) -> list[Answer | None]:
        self.batches.append([request.token for request in requests])
        await self.release.wait()
        if self.fault is not None:
            raise self.fault
        return [Answer(Standing.CLEAR, bytes([request.token])) for request in requests]


def ask(token: int) -> GateRequest:
    return GateRequest(0, "s", token, [b"t" * 12], b"d" * 12)


@pytest.mark.doubles
async def test_questions_that_come_while_one_is_on_its_way_leave_together() -> None:
    gate = SlowGate()
    keeper = Gatekeeper(cast(Lanes, gate), flights=1)
    first = asyncio.create_task(keeper.ask([ask(1)]))
    while not gate.batches:
        await asyncio.sleep(0)
    others = [asyncio.create_task(keeper.ask([ask(n), ask(n + 10)])) for n in (2, 3)]
    await asyncio.sleep(0)
    gate.release.set()
    told = await asyncio.gather(first, *others)

    assert gate.batches == [[1], [2, 12, 3, 13]]
    assert [[a.facts for a in t.answers if a is not None] for t in told] == [
        [b"\x01"],
        [b"\x02", b"\x0c"],
        [b"\x03", b"\x0d"],
    ]


@pytest.mark.doubles
async def test_asked_at_is_before_the_question_is_sent() -> None:
    gate = SlowGate()
    gate.release.set()
    before = time.monotonic()
    told = await Gatekeeper(cast(Lanes, gate)).ask([ask(1)])

    assert before <= told.asked_at <= time.monotonic()


@pytest.mark.doubles
async def test_an_error_of_ours_reaches_every_asker() -> None:
    gate = SlowGate()
    gate.fault = ValueError("ours")
    gate.release.set()
    keeper = Gatekeeper(cast(Lanes, gate))

    for _ in range(2):
        with pytest.raises(ValueError, match="ours"):
            await keeper.ask([ask(1)])


@pytest.mark.doubles
@pytest.mark.parametrize("flights", [1, 3])
async def test_who_asks_again_the_moment_he_is_answered_is_answered_again(flights: int) -> None:
    """They found the flights taken by those that had just ended, and waited until somebody else asked: for ever, where
    they were the last (14 of 20,000 recipients at 8,000 sites)."""
    gate = SlowGate()
    gate.release.set()
    keeper = Gatekeeper(cast(Lanes, gate), flights=flights)

    async def twice(token: int) -> None:
        for _ in range(2):
            await keeper.ask([ask(token)])

    async with asyncio.timeout(5):
        await asyncio.gather(*(twice(token) for token in range(flights)))
    assert sum(map(len, gate.batches)) == 2 * flights
