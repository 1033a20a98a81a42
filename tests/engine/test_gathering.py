"""Calls that come in one turn of the loop are one call; nobody hears or suffers another's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from engine.campaign.gathering import Gathering, Muster


class Broken(Exception):
    """The call failed as a whole."""


class Away(Exception):
    """There was no answer."""


async def test_who_asks_in_one_turn_is_asked_for_together() -> None:
    calls: list[list[int]] = []

    async def send(numbers: Sequence[int]) -> list[str | Exception]:
        calls.append(list(numbers))
        await asyncio.sleep(0)
        return [ValueError(str(number)) if number % 4 == 3 else f"answer {number}" for number in numbers]

    gathering: Gathering[int, str] = Gathering(send, Broken)
    told = await asyncio.gather(*[gathering.ask(number) for number in range(8)], return_exceptions=True)
    assert calls == [list(range(8))]
    assert [str(one) for one in told] == [str(n) if n % 4 == 3 else f"answer {n}" for n in range(8)]
    assert [isinstance(one, ValueError) for one in told] == [n % 4 == 3 for n in range(8)]
    assert await gathering.ask(9) == "answer 9"
    assert calls[1:] == [[9]]


async def test_what_fails_together_is_asked_for_one_by_one() -> None:
    calls: list[list[int]] = []

    async def send(numbers: Sequence[int]) -> list[int | Exception]:
        calls.append(list(numbers))
        if 2 in numbers:
            raise Broken
        return list(numbers)

    gathering: Gathering[int, int] = Gathering(send, Broken)
    told = await asyncio.gather(*[gathering.ask(number) for number in range(4)], return_exceptions=True)
    assert [one if isinstance(one, int) else type(one) for one in told] == [0, 1, Broken, 3]
    assert calls == [[0, 1, 2, 3], [0], [1], [2], [3]]
    with pytest.raises(Broken):
        await gathering.ask(2)
    assert calls[5:] == [[2]]  # alone, it is not asked for twice


async def test_a_store_that_is_away_is_not_asked_again_for_each() -> None:
    calls = 0

    async def send(numbers: Sequence[int]) -> list[int | Exception]:
        nonlocal calls
        calls += 1
        raise Away

    gathering: Gathering[int, int] = Gathering(send, Broken)
    told = await asyncio.gather(*[gathering.ask(number) for number in range(4)], return_exceptions=True)
    assert [type(one) for one in told] == [Away] * 4
    assert calls == 1


async def test_who_no_longer_waits_changes_nothing_for_the_others() -> None:
    async def send(numbers: Sequence[int]) -> list[int | Exception]:
        await asyncio.sleep(0)
        return list(numbers)

    gathering: Gathering[int, int] = Gathering(send, Broken)
    one, two = asyncio.create_task(gathering.ask(1)), asyncio.create_task(gathering.ask(2))
    await asyncio.sleep(0)
    one.cancel()
    assert await two == 2
    assert one.cancelled() or isinstance((await asyncio.gather(one, return_exceptions=True))[0], BaseException)


class Calls:
    """A store that answers every number with itself and remembers how they came."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []

    async def send(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.made.append(list(numbers))
        await asyncio.sleep(0)
        return list(numbers)


async def ask_after(muster: Muster[int, int], number: int, until: asyncio.Event) -> int:
    with muster.coming():
        await until.wait()
    return await muster.ask(number)


async def test_a_muster_waits_for_those_who_may_still_come() -> None:
    calls, early, late = Calls(), asyncio.Event(), asyncio.Event()
    muster = Muster(calls.send, Broken, 9)
    asking = [asyncio.create_task(ask_after(muster, number, late if number == 2 else early)) for number in range(3)]
    early.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert calls.made == []
    assert repr(muster) == "<Muster waiting=2 calls=0>"
    late.set()
    assert await asyncio.gather(*asking) == [0, 1, 2]
    assert calls.made == [[0, 1, 2]]


async def test_a_muster_sets_out_when_enough_are_there() -> None:
    calls, early, never = Calls(), asyncio.Event(), asyncio.Event()
    muster = Muster(calls.send, Broken, 2)
    slow = asyncio.create_task(ask_after(muster, 9, never))
    early.set()
    asking = [asyncio.create_task(ask_after(muster, number, early)) for number in range(3)]
    assert await asyncio.gather(*asking) == [0, 1, 2]
    assert calls.made == [[0, 1, 2]]  # the third came while the two set out
    never.set()
    assert await slow == 9
    assert calls.made[1:] == [[9]]


@pytest.mark.parametrize("leaves", ["without asking", "by an error", "cancelled"])
async def test_nobody_waits_for_one_who_left(leaves: str) -> None:
    calls, gone = Calls(), asyncio.Event()
    muster = Muster(calls.send, Broken, 9)

    async def leave() -> None:
        with muster.coming():
            await gone.wait()
            if leaves == "by an error":
                raise Away

    leaving = asyncio.create_task(leave())
    here = asyncio.Event()
    here.set()
    asking = asyncio.create_task(ask_after(muster, 1, here))
    for _ in range(20):
        await asyncio.sleep(0)
    assert calls.made == []
    if leaves == "cancelled":
        leaving.cancel()
    gone.set()
    assert await asking == 1
    assert calls.made == [[1]]
    await asyncio.gather(leaving, return_exceptions=True)


async def test_those_who_wait_for_an_answer_hold_nobody_up() -> None:
    """In the call they are not coming any more: who comes meanwhile sets out alone."""
    answered = asyncio.Event()
    made: list[list[int]] = []

    async def send(numbers: Sequence[int]) -> list[int | Exception]:
        made.append(list(numbers))
        if 1 in numbers:
            await answered.wait()
        return list(numbers)

    muster = Muster(send, Broken, 9)
    here = asyncio.Event()
    here.set()
    first = asyncio.create_task(ask_after(muster, 1, here))
    while not made:
        await asyncio.sleep(0)
    assert await ask_after(muster, 2, here) == 2
    answered.set()
    assert await first == 1
    assert made == [[1], [2]]
