"""The round that keeps every date: whatever is next for every open request, so that none waits to be remembered (P-51).

    await rounds.look(time.monotonic())     every second; a round when one is due or `wake` is set

A round: letters a crash left · each open request by `states.plan` (ask, carry, lapse) · restrictions whose notice is
over · old letters and tokens forgotten · letters sent.

Law: one request that cannot be carried out does not keep the others from it; it is tried again every quarter hour.

Known limits: what only the officer can do (`NeedsOfficer`) waits for him, counted in `statistics` with what is overdue.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from typing import Final

import redis.exceptions
import structlog
from sqlalchemy import Connection, select, update

from policy.enforcement import Effects, RedisBehind
from policy.instants import DAY_US, SECOND_US
from policy.rights import proof, protections, requests
from policy.rights.carrying import NeedsOfficer
from policy.rights.casework import Casework
from policy.rights.requests import Asked
from policy.rights.states import (
    LIFT_NOTICE_US,
    Act,
    Case,
    Kind,
    Next,
    State,
    plan,
)
from policy.schema import request as request_table
from policy.schema import request_step

log = structlog.get_logger()

_SLOWEST: Final = 60.0
_IMPATIENT: Final = 5.0
_SOON: Final = 3 * DAY_US
_UNIDENTIFIED: Final = (
    "we could not make sure that the mailbox is yours: nobody pressed the button on the page we wrote to it about."
)


class Rounds(Casework):
    """look() from a loop of the writer of its own: erasing and bundling take their time."""

    async def look(self, monotonic: float) -> None:
        """Every second, from a loop of its own: a round when one is due or something woke it."""
        if self.wake.is_set() or monotonic >= self._due:
            self._due = monotonic + _IMPATIENT  # if the round fails
            self._due = monotonic + await self.round()

    async def round(self) -> float:
        """Do what is next; seconds until something else is. Raises the store's or Redis's errors: call it again."""
        async with self._turn:
            self.wake.clear()
            now = self._now()
            await self._recover()
            going = await self._premises.store.write(lambda conn: list(requests.going(conn, self._keyring())))
            until = now + int(_SLOWEST * SECOND_US)
            for asked, case in going:
                until = min(until, await self._next(asked, case, now))
            await self._end_restrictions(now)
            await self._premises.store.write(lambda conn: proof.forget(conn, now))
            await self._letters_out(now)
            await self._count(now)
            return 0.0 if self.wake.is_set() else max(1.0, (until - self._now()) / SECOND_US)

    def statistics(self) -> dict[str, float]:
        """As of the last round: open, overdue, due within three days, waiting for the officer, letters, oldest age."""
        return dict(self._numbers)

    async def _next(self, asked: Asked, case: Case, now: int) -> int:
        """Do one request's next step; when to look at it again."""
        known = replace(case, tried=self._tried.get(asked.number, 0))
        todo = plan(known, now)
        if todo.step is Next.WAIT:
            return todo.at
        if todo.step is Next.CARRY:
            await self._carry(asked, now)
            return now + int(SECOND_US)

        def change(conn: Connection, effects: Effects, names: list[str]) -> None:
            current = requests.by_number(conn, self._keyring(), asked.number)
            if current is None or current.state is not asked.state:
                return  # somebody acted meanwhile: the next round sees
            if todo.step is Next.ASK:
                self._ask(conn, names, current, now)
            elif todo.step is Next.BEGIN:
                self._begin(conn, effects, names, current, now)
            else:
                self._refuse(conn, effects, names, current, now, "engine", _UNIDENTIFIED, unidentified=True)

        await self._apply(change)
        return now + int(SECOND_US)

    async def _carry(self, asked: Asked, now: int) -> None:
        try:
            result = await self._carrying.carry(asked, now)
        except NeedsOfficer as error:
            self._tried[asked.number] = now
            self._stuck[asked.number] = str(error)
            return
        except (redis.exceptions.RedisError, RedisBehind, OSError) as error:
            self._tried[asked.number] = now
            log.warning("a right waits for a store", request=asked.number, error=type(error).__name__)
            return
        except Exception as error:  # one request that cannot be carried out must not keep the others from it
            self._tried[asked.number] = now
            self._stuck[asked.number] = f"failed: {type(error).__name__}"
            log.error("a right could not be carried out", request=asked.number, error=type(error).__name__)
            return

        def change(conn: Connection, effects: Effects, names: list[str]) -> None:
            current = requests.by_number(conn, self._keyring(), asked.number)
            if current is not None and current.state is State.IN_PROGRESS:
                known = replace(current, address=asked.address)  # the erasure may have cleared it: one last letter
                self._finish(conn, effects, names, known, now, result, "engine")

        await self._apply(change)
        self._tried.pop(asked.number, None)
        self._stuck.pop(asked.number, None)

    async def _end_restrictions(self, now: int) -> None:
        """Those whose notice is over."""
        announced = (
            select(request_step.c.request)
            .join(request_table, request_table.c.number == request_step.c.request)
            .where(request_step.c.act == Act.LIFT.value, request_step.c.at <= now - LIFT_NOTICE_US)
            .where(request_table.c.kind == Kind.RESTRICTION.value, request_table.c.outcome != protections.LIFTED)
            .distinct()
        )
        for number in await self._premises.store.write(lambda conn: list(conn.scalars(announced))):
            await self._apply(functools.partial(self._end, number=number, now=now))

    def _end(self, conn: Connection, effects: Effects, names: list[str], *, number: int, now: int) -> None:
        asked = requests.by_number(conn, self._keyring(), number)
        if asked is None or asked.outcome == protections.LIFTED:
            return
        conn.execute(update(request_table).where(request_table.c.number == number).values(outcome=protections.LIFTED))
        protections.lift(conn, effects, asked, now)
        self._advance(conn, replace(asked, outcome=protections.LIFTED), Act.LIFTED, now, "engine")

    async def _recover(self) -> None:
        if not self.outbox.has_drafts:
            return

        def look(conn: Connection) -> int:
            return self.outbox.recover(lambda ticket, seq: requests.has_step(conn, ticket, seq))

        await self._premises.store.write(look)

    async def _letters_out(self, now: int) -> None:
        await asyncio.to_thread(self.outbox.forget, now, self._settings.outbox_days)
        if self._send is not None:
            try:
                await self.outbox.send(self._send)
            except OSError as error:
                log.warning("letters wait", error=type(error).__name__)

    async def _count(self, now: int) -> None:
        going = await self._premises.store.write(
            lambda conn: [asked for asked, _ in requests.going(conn, self._keyring())]
        )
        waiting = await asyncio.to_thread(self.outbox.waiting)
        numbers = {asked.number for asked in going}
        for gone in self._stuck.keys() - numbers:
            del self._stuck[gone]
            self._tried.pop(gone, None)
        self._numbers = {
            "rights_open": len(going),
            "rights_overdue": sum(is_late(asked, now) for asked in going),
            "rights_due_soon": sum(now < asked.due <= now + _SOON for asked in going),
            "rights_for_officer": len(self._stuck),
            "rights_oldest_seconds": max((now - asked.received for asked in going), default=0) / SECOND_US,
            "rights_letters_waiting": sum(not one.failed for one in waiting),
            "rights_letters_failed": sum(one.failed for one in waiting),
        }


def is_late(asked: Asked, now: int) -> bool:
    return not asked.is_closed and now >= asked.due
