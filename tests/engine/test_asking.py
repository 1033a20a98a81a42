"""Questions of SQL that are asked at the same moment share a transaction, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError

from engine.campaign.asking import FLIGHTS, MOST, Asking


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    made = create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with made.begin() as conn:
        conn.execute(text("create table t (n integer)"))
    yield made
    made.dispose()


def _begun(engine: Engine) -> list[object]:
    begun: list[object] = []
    event.listen(engine, "begin", begun.append)
    return begun


async def test_questions_of_a_moment_share_a_transaction_and_each_gets_its_own_answer(engine: Engine) -> None:
    begun = _begun(engine)

    def question(value: int, conn: Connection) -> int:
        return int(conn.execute(text("select :n"), {"n": value}).scalar_one())

    asking = Asking(engine)
    answers = await asyncio.gather(*[asking.ask(lambda conn, n=n: question(n, conn)) for n in range(3 * MOST)])  # type: ignore[misc]

    assert answers == list(range(3 * MOST))
    assert len(begun) <= FLIGHTS + 3


async def test_a_question_that_fails_fails_alone(engine: Engine) -> None:
    asking = Asking(engine)

    def wrong(conn: Connection) -> int:
        raise LookupError("not that one")

    told = await asyncio.gather(
        asking.ask(lambda conn: 1), asking.ask(wrong), asking.ask(lambda conn: 2), return_exceptions=True
    )
    assert told[0] == 1
    assert isinstance(told[1], LookupError)
    assert told[2] == 2


async def test_a_store_that_is_away_is_everybodys_error_and_the_next_question_tries_again(tmp_path: Path) -> None:
    folder = tmp_path / "not yet"
    away = create_engine(f"sqlite:///{folder / 'x.db'}")
    asking = Asking(away)

    def one(conn: Connection) -> int:
        return int(conn.execute(text("select 1")).scalar_one())

    told = await asyncio.gather(asking.ask(one), asking.ask(one), return_exceptions=True)
    assert [type(error) for error in told] == [OperationalError, OperationalError]
    folder.mkdir()
    assert await asking.ask(one) == 1
    away.dispose()


async def test_what_is_asked_after_a_commit_sees_it(engine: Engine) -> None:
    """The snapshot of an answer was begun after the question was asked, whatever else is being asked meanwhile."""
    asking = Asking(engine)

    def count(conn: Connection) -> int:
        return int(conn.execute(text("select count(*) from t")).scalar_one())

    others = [asyncio.create_task(asking.ask(count)) for _ in range(10)]
    await asyncio.sleep(0)
    for n in range(1, 6):
        with engine.begin() as conn:
            conn.execute(text("insert into t values (1)"))
        assert await asking.ask(count) == n
    await asyncio.gather(*others)


async def test_who_no_longer_waits_is_passed_over(engine: Engine) -> None:
    asking = Asking(engine)
    impatient = asyncio.create_task(asking.ask(lambda conn: 1))
    patient = asyncio.create_task(asking.ask(lambda conn: 2))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient == 2
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_who_asks_again_the_moment_he_is_answered_is_answered_again(engine: Engine) -> None:
    """They would find the flights taken by those that have just ended, and wait until somebody else asked."""
    asking = Asking(engine)

    async def often() -> None:
        for _ in range(20):
            await asking.ask(lambda conn: 1)

    async with asyncio.timeout(10):
        await asyncio.gather(*[often() for _ in range(FLIGHTS)])
