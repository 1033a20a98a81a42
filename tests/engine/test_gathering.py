"""Calls that come in one turn of the loop are one call; nobody hears or suffers another's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from engine.campaign.gathering import Gathering


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
