"""The press: what is written and signed together, and that every line that asked is answered once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.delivery.campaigns import Loaded
from engine.delivery.connection import Outbound
from engine.delivery.courier import Courier
from engine.delivery.gatekeeper import Told
from engine.delivery.hand import Hand, Letter
from engine.delivery.press import LEAST, ROUND, TURN, Press
from engine.queue.lanes import Answer, GateRequest, Lease
from engine.queue.slices import Contents, Header, Row
from policy.events import Reason
from policy.gate import Permit, Standing

ROWS = 2 * ROUND


class _Courier:
    """What a press asks of its courier. against: mrefs the gate refuses; asked_ago: how old its answers are."""

    foresees = False

    def __init__(self) -> None:
        self.gatekeeper = self
        self.against: set[int] = set()
        self.asked_ago = 0.0
        self.written: list[list[int]] = []
        self.refused: list[int] = []
        self.returned: list[int] = []
        self.hand = _hand()

    async def ask(self, requests: list[GateRequest]) -> Told:
        tags = {self.hand.reference(index)[1]: index for index in range(ROWS)}
        facts = [
            bytes(int(Reason.SUPPRESSED) if tags[tag] in self.against else 0 for tag in request.tags)
            for request in requests
        ]
        return Told(time.monotonic() - self.asked_ago, [Answer(Standing.CLEAR, fact) for fact in facts])

    def now_us(self) -> int:
        return 0

    def compose(self, pairs: list[tuple[Permit, Letter]], void_at: float) -> list[Outbound]:
        assert all(permit.mref == letter.mref for permit, letter in pairs)
        self.written.append([letter.index for _, letter in pairs])
        return [Outbound(letter, "", "x@them", b"\r\n", void_at) for _, letter in pairs]

    def refuse(self, letter: Letter, reason: Reason) -> None:
        self.refused.append(letter.index)

    def put_back(self, letters: list[Letter]) -> None:
        self.returned += [letter.index for letter in letters]


class _Desk:
    """Gives the next recipients of the courier's hand to whoever asks."""

    def __init__(self, courier: _Courier) -> None:
        self._courier = courier
        self._next = iter(range(ROWS))
        self.served_lines: list[tuple[str, list[int]]] = []

    async def allowed(self, wanted: int) -> int:
        return wanted

    def take(self, count: int) -> list[Letter]:
        hand = self._courier.hand
        return [
            Letter(hand, index, hand.reference(index)[0]) for _, index in zip(range(count), self._next, strict=False)
        ]

    def served(self, connection: Any, line: Any, messages: list[Outbound]) -> None:
        self.served_lines.append((line.name, [cast(Letter, message.key).index for message in messages]))


def _hand() -> Hand:
    header = Header(7, 1, ROWS, 0, 0, 0, 0, 1, 5, 2, "L" * 11)
    contents = Contents("them.example", [], [Row(f"x{number}", 0, 0, 0, 0, []) for number in range(ROWS)])
    job = cast(Loaded, SimpleNamespace(job_key=bytes(32), opens_in=lambda now_us: 0.0))
    return Hand(Lease(3, "c1", "S" * 11, "L" * 11, 5, b""), header, contents, job, bytes(32))


async def _press(courier: _Courier, batches: list[int], clock: Callable[[], float] = time.monotonic) -> list[Any]:
    """Lines named by their place that want so many each; what each was served, in order."""
    desk = _Desk(courier)
    press = Press(cast(Courier, courier), clock)
    for number, batch in enumerate(batches):
        connection = SimpleNamespace(closed=None)
        press.order(cast(Any, desk), cast(Any, connection), cast(Any, SimpleNamespace(name=str(number), batch=batch)))
    running = asyncio.create_task(press.run())
    async with asyncio.timeout(10):
        while len(desk.served_lines) < len(batches):
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    return desk.served_lines


@pytest.mark.doubles
async def test_small_lines_are_written_together_and_each_gets_its_own() -> None:
    courier = _Courier()
    served = await _press(courier, [4, 4, 4, 2, 2, 1, 1])

    assert [len(written) for written in courier.written] == [18]
    assert [(line, len(own)) for line, own in served] == [
        ("0", 4), ("1", 4), ("2", 4), ("3", 2), ("4", 2), ("5", 1), ("6", 1),
    ]  # fmt: skip
    assert [letter for _, own in served for letter in own] == list(range(18))


@pytest.mark.doubles
async def test_a_round_ends_when_it_is_full() -> None:
    courier = _Courier()
    await _press(courier, [ROUND, ROUND])

    assert courier.written == [list(range(ROUND)), list(range(ROUND, 2 * ROUND))]


@pytest.mark.doubles
async def test_the_loop_has_its_turn_after_fewer_messages_where_they_take_long() -> None:
    """Each takes a sixteenth of a turn, from the third time on two turns."""
    courier = _Courier()
    real, now, each = courier.compose, [0.0], [TURN / 16]

    def compose(pairs: list[tuple[Permit, Letter]], void_at: float) -> list[Outbound]:
        now[0] += each[0] * len(pairs)
        each[0] = TURN / 16 if not courier.written else 2 * TURN
        return real(pairs, void_at)

    courier.compose = compose  # type: ignore[method-assign]
    await _press(courier, [8] * 16, lambda: now[0])

    sizes = [len(written) for written in courier.written]
    assert sizes == [ROUND, 16, 16, *[LEAST] * 4], "the first is a whole round: nothing is known yet"


@pytest.mark.doubles
async def test_the_refused_are_recorded_and_the_others_do_not_notice() -> None:
    courier = _Courier()
    courier.against = {1, 2, 3}
    served = await _press(courier, [2, 2, 3])

    assert courier.refused == [1, 2, 3]
    assert served == [("0", [0]), ("1", []), ("2", [4, 5, 6])]
    assert courier.hand.abroad == -3, "nobody counts as on the way who was refused"


@pytest.mark.doubles
async def test_a_line_that_died_meanwhile_gives_its_recipients_back() -> None:
    courier = _Courier()
    real = courier.ask
    lost: list[Any] = []

    async def ask(requests: list[GateRequest]) -> Told:
        lost[0].closed = "lost"
        return await real(requests)

    courier.ask = ask  # type: ignore[method-assign]
    desk, press = _Desk(courier), Press(cast(Courier, courier))
    for name in ("0", "1"):
        lost.append(SimpleNamespace(closed=None))
        press.order(cast(Any, desk), cast(Any, lost[-1]), cast(Any, SimpleNamespace(name=name, batch=2)))
    running = asyncio.create_task(press.run())
    async with asyncio.timeout(10):
        while len(desk.served_lines) < 2:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])

    assert courier.returned == [0, 1]
    assert courier.written == [[2, 3]]
    assert desk.served_lines == [("0", []), ("1", [2, 3])]


@pytest.mark.doubles
async def test_nothing_is_written_under_a_permit_that_is_void() -> None:
    courier = _Courier()
    courier.asked_ago = 1.0
    served = await _press(courier, [2, 2])

    assert courier.written == []
    assert courier.returned == [0, 1, 2, 3]
    assert served == [("0", []), ("1", [])]
