"""Asks SQL for everybody who has a question at this moment, in one transaction of one thread.

A job of one recipient asks four small things, each of which costs 20 us of SQLite and 150 us of connection, transaction
and thread. While `FLIGHTS` transactions run, those who come wait and are answered together in the next.

Law: a question is answered from a snapshot that was begun after it was asked; one that fails fails alone.

Known limits: a question waits for those that share its transaction, a thousand consents among them (2 ms).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine

from engine.campaign.gathering import hand_out

FLIGHTS: Final = 2  # one at SQLite while the other is being put together
MOST: Final = 64  # questions of a transaction

T = TypeVar("T")
Question = Callable[[Connection], Any]


class Asking:
    """One per intake. engine: read-only (policy.schema.open_store)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[tuple[Question, asyncio.Future[Any]]] = deque()
        self._flights: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Asking waiting={len(self._waiting)} flights={len(self._flights)}>"

    async def ask(self, question: Callable[[Connection], T]) -> T:
        """Off the loop: a busy store must not hold up mail under way. Raises what the question raised."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if len(self._flights) < FLIGHTS:
            task = asyncio.create_task(self._fly(), name="asking")
            self._flights.add(task)
            task.add_done_callback(self._flights.discard)
        return await future

    async def _fly(self) -> None:
        await self._answer_all()
        # at once, not when the loop comes to the callback: who asks again the moment he is answered would find every
        # flight taken by one that has ended
        if (task := asyncio.current_task()) is not None:
            self._flights.discard(task)

    async def _answer_all(self) -> None:
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
            answers: list[Any]
            try:
                answers = await asyncio.to_thread(self._answer, [question for question, _ in some])
            except Exception as error:  # no connection, no transaction: everybody hears why
                answers = [error] * len(some)
            except BaseException:
                for _, future in some:
                    future.cancel()
                raise
            hand_out([future for _, future in some], answers)

    def _answer(self, questions: list[Question]) -> list[Any]:
        answers: list[Any] = []
        with self._engine.connect() as conn:
            for question in questions:
                try:
                    answers.append(question(conn))
                except Exception as error:
                    answers.append(error)
        return answers
