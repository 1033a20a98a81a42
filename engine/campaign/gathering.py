"""Calls of many small jobs that come in the same turn of the loop, made as one.

The writer wakes the intake with the answers of a whole transaction, so dozens of jobs ask their next question in one
turn. A call costs 60 us here and 80 there (frame, task, savepoint), whatever it asks.

Law: everybody hears his own answer; when a call for several fails as a whole, each is asked for alone, so that nobody
fails by another's fault.

A `Muster` waits longer: for whoever has said that he may come (`coming`), because four thousand people at once share
most of the pages that the store would write for each of four calls.

Known limits: a question waits for the end of the turn it came in; in a `Muster` for the slowest of those who may come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


def hand_out(futures: Sequence[asyncio.Future[A]], answers: Sequence[A | Exception]) -> None:
    """Everybody hears his own; an answer that is an Exception is raised to who asked."""
    for future, answer in zip(futures, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


class Gathering(Generic[Q, A]):
    """send(questions): the answers, in order; an answer that is an Exception is raised to who asked. failures: of a
    call for several that are no word about the store as a whole."""

    def __init__(
        self, send: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]], failures: type[Exception]
    ) -> None:
        self._send = send
        self._failures = failures
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_due = False  # a task will take those who wait

    def __repr__(self) -> str:
        return f"<{type(self).__name__} waiting={len(self._waiting)} calls={len(self._tasks)}>"

    async def ask(self, question: Q) -> A:
        """Raises what `send` raised, or the exception that is the answer."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._look()
        return await future

    def _is_time(self) -> bool:
        return True

    def _look(self) -> None:
        if self._is_due or not self._waiting or not self._is_time():
            return
        self._is_due = True
        task = asyncio.create_task(self._go(), name="gathering")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _go(self) -> None:
        await asyncio.sleep(0)  # whoever else asks in this turn
        self._is_due = False
        if not self._is_time():
            return
        some, self._waiting = self._waiting, []
        try:
            answers = await self._answers([question for question, _ in some])
        except Exception as error:
            answers = [error] * len(some)
        except BaseException:
            for _, future in some:
                future.cancel()
            raise
        hand_out([future for _, future in some], answers)

    async def _answers(self, questions: list[Q]) -> Sequence[A | Exception]:
        try:
            return await self._send(questions)
        except self._failures:
            if len(questions) == 1:
                raise
        told: list[Any] = await asyncio.gather(*[self._send([one]) for one in questions], return_exceptions=True)
        for one in told:
            if isinstance(one, BaseException) and not isinstance(one, Exception):
                raise one
        return [one if isinstance(one, Exception) else one[0] for one in told]


class Muster(Gathering[Q, A]):
    """A `Gathering` that sets out when `enough` wait, or when nobody is left who said that he may come."""

    def __init__(
        self,
        send: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]],
        failures: type[Exception],
        enough: int,
    ) -> None:
        super().__init__(send, failures)
        self._enough = enough
        self._coming = 0

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Those who wait wait for this one too: until he has left, to ask in the same turn or not at all."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self._look()

    def _is_time(self) -> bool:
        return not self._coming or len(self._waiting) >= self._enough
