"""Consent that ends by itself: from that instant on, hits of the person leave nothing behind (P-07, decision 12).

Expansion asks for the end when a message is made. A message lives on in its mailbox, though, and its links carry the
mode it was sent with; so whoever's consent to tracking ends goes onto the negative list, as after a withdrawal: every
tracker asks it when a hit arrives. Somebody who agrees anew comes off it (`policy.operations.op_consents`).

    1 `look`     ends of consent since the last look, a second ago; whoever agreed anew meanwhile is passed over
    2 Enforcement.apply: negative list in SQL, then the stream to the trackers, then the mark

Law: an end is noticed within about a second of its instant while the writer runs, and at its start for all that ended
while it did not; a crash between anything repeats, and a repeat adds nothing (who is on the list already stays as is).

The mark, up to which ends are known, is a row of the table cursor and moves when somebody was found; without one, an
older mark costs one longer look after a start.

Known limits: the negative list knows a person whole, so the end of one kind of tracking ends the other too. A look is a
range of ``consent.expires_at``; while that column has no index, looks take turns of rest 50 times as long as they took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, select

from policy import consent, cursors, negative
from policy.enforcement import Effects, Enforcement
from policy.schema import cursor
from policy.store import Store

MARK: Final = "lapsed"
CAUSE: Final = "withdrawn"  # of the negative list: consent is no longer there
CAUSES: Final = frozenset({CAUSE})  # those that consent given anew lifts
_SECONDS: Final = 1.0
_REST: Final = 50.0


class Lapsing:
    """The writer's hand for it."""

    def __init__(self, store: Store, enforcement: Enforcement, clock: Callable[[], int]) -> None:
        self._store = store
        self._enforcement = enforcement
        self._clock = clock
        self._mark: int | None = None
        self.lapsed = 0

    def __repr__(self) -> str:
        return f"<Lapsing lapsed={self.lapsed}>"

    async def look(self) -> float:
        """One look; seconds until the next. Raises RedisBehind (SQL has it), or the store's error."""
        began = time.perf_counter()
        if self._mark is None:
            self._mark = await self._store.write(_marked)
        after, now = self._mark, self._clock()
        found, until = await self._store.write(lambda conn: consent.lapsed(conn, after, now))
        took = time.perf_counter() - began
        if found:
            listed = await self._enforcement.apply(lambda conn, effects: lapse(conn, effects, found, until, now))
            self.lapsed += int(listed)
        self._mark = max(after, until)
        return 0.0 if until < now else max(_SECONDS, _REST * took)


def lapse(conn: Connection, effects: Effects, subjects: set[int], until: int, now: int) -> int:
    """Put onto the negative list those who are not on it; how many."""
    listed = 0
    for number in sorted(subjects):
        if negative.standing(conn, number) is None:
            effects.negative.append((number, CAUSE, negative.add(conn, number, CAUSE, now)))
            listed += 1
    cursors.set_rows(conn, {MARK: until})
    return listed


def _marked(conn: Connection) -> int:
    return int(conn.execute(select(cursor.c.last_id).where(cursor.c.stream == MARK)).scalar() or 0)
