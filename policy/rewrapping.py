"""Every subject's key wrapped anew each week, so that old wrapping keys can be destroyed (decision 13, P-36).

Law: a wrapping key is destroyed only when no subject is wrapped under it, asked in SQL in the transaction that destroys
it (`doomed`); what a copy of the database from before holds cannot be opened any more. A subject is wrapped under a key
that we hold at every instant: a row gets its new wrapping in one UPDATE, its own key and address stay as they are.

    1. `policy.chores.turn_keys`   makes ``kek.<week>``; new subjects are wrapped under it at once
    2. a day later `Rewrapping.round` walks the table by number, at most `ROWS` rows a transaction, and wraps anew what
       is not under the newest key. The place it has reached is committed with the rows, so a killed process goes on
       where it was; walking twice changes nothing
    3. 14 days after the end of its week `turn_keys` destroys the old key; two keys always stay

A walk goes along the primary key, so it needs no index of wrapping keys, which would cost each new subject a random
page. A subject made under the old key behind the walk (by a process that had not read the new one yet) is found by
`doomed`: the key stays for now and the table is walked again.

The day of waiting: every process has read the new key by then, and so has whoever copies keys to a safe place.

Cost, 300,000 subjects over SQLite on the build machine: 10 µs of CPU a row that is wrapped anew, 1.2 µs a row that
needs nothing; a transaction holds the writer's thread for 24 ms, then rests. `doomed` reads the table once (35 ms, from
memory), only when a key's time has come.

Known limits: a subject whose key does not open (a changed row, a wrapping key that was lost) is counted, told in the
log, and keeps the key it names from being destroyed: erase that subject. What is erased is not there to be wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from sqlalchemy import Connection, select

from policy import statements, vault
from policy.cursors import set_rows
from policy.keys import SUCCESSOR_AGE_US, Keyring
from policy.keysource import Source, born
from policy.schema import cursor, subject
from policy.store import Store

log = structlog.get_logger()

ROWS: Final = 2000  # a transaction: an opt-out that comes meanwhile waits for a fortieth of a second
_PLACE: Final = "rewrap"  # row of `cursor`: "<newest key>:<last number>", ":done" behind the last
_DONE: Final = "done"
_PAUSE_SECONDS: Final = 0.05
_HOUR_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Step:
    """One transaction of a walk. walked, wrapped, broken: rows looked at, wrapped anew, that do not open."""

    walked: int = 0
    wrapped: int = 0
    broken: int = 0
    finished: bool = False


def step(conn: Connection, keyring: Keyring, rows: int = ROWS) -> Step:
    """The next rows of the walk to this keyring's newest key; its place is kept in the same transaction."""
    place = _place(conn, keyring.kek_id)
    if place is None:
        return Step(finished=True)
    mine = select(subject.c.number, subject.c.account, subject.c.key, subject.c.kek_id)
    found = conn.execute(mine.where(subject.c.number > place).order_by(subject.c.number).limit(rows)).all()
    fresh: list[tuple[bytes, int, int, int]] = []
    broken = 0
    for number, account, wrapped, kek_id in found:
        if kek_id in (keyring.kek_id, vault.LOST):
            continue
        try:
            anew = vault.wrap_anew(keyring, account, number, wrapped, kek_id)
        except vault.VaultError:
            broken += 1
            continue
        fresh.append((anew, keyring.kek_id, number, kek_id))
    if fresh:
        one = statements.mark(conn.dialect.name)
        set_to = f"SET key = {one}, kek_id = {one} WHERE number = {one} AND kek_id = {one}"
        conn.exec_driver_sql(f"UPDATE subject {set_to}", fresh)
    finished = len(found) < rows
    set_rows(conn, {_PLACE: f"{keyring.kek_id}:{_DONE if finished else found[-1].number}"})
    return Step(len(found), len(fresh), broken, finished)


def again(conn: Connection) -> None:
    """Walk from the beginning: somebody was wrapped under an old key behind the walk."""
    set_rows(conn, {_PLACE: "0:0"})


def doomed(conn: Connection, weeks: Sequence[int]) -> list[int]:
    """Those of the wrapping keys under which nobody is wrapped any more. Where somebody is, the walk begins anew."""
    if not weeks:
        return []
    used = set(conn.execute(select(subject.c.kek_id).distinct()).scalars())
    if held := used.intersection(weeks):
        again(conn)
        log.warning("wrapping keys past their time are still in use: subjects are wrapped anew", weeks=sorted(held))
    return [week for week in weeks if week not in used]


def _place(conn: Connection, kek_id: int) -> int | None:
    """The number up to which everybody is wrapped under this key; None: all are."""
    told = conn.execute(select(cursor.c.last_id).where(cursor.c.stream == _PLACE)).scalar()
    week, _, place = str(told or "0:0").partition(":")
    if int(week) != kek_id:
        return 0
    return None if place == _DONE else int(place)


class Rewrapping:
    """The writer's walk. keyring and clock are asked at each use."""

    def __init__(
        self,
        store: Store,
        source: Source,
        keyring: Callable[[], Keyring],
        clock: Callable[[], int],
        *,
        rows: int = ROWS,
    ) -> None:
        self._store = store
        self._source = source
        self._keyring = keyring
        self._clock = clock
        self._rows = rows
        self._ripe = 0  # the newest key that is known to be old enough
        self.wrapped = 0
        self.broken = 0
        self._broken_now = 0

    def __repr__(self) -> str:
        return f"<Rewrapping wrapped={self.wrapped} broken={self.broken}>"

    async def round(self) -> float:
        """One transaction at most; seconds until the next."""
        keyring = self._keyring()
        if keyring.kek_id != self._ripe:
            if not await self._store.write(lambda conn: self._is_ripe(conn, keyring.kek_id)):
                return _HOUR_SECONDS
            self._ripe = keyring.kek_id
        done = await self._store.write(lambda conn: step(conn, keyring, self._rows))
        self.wrapped += done.wrapped
        self._broken_now += done.broken
        if not done.finished:
            return _PAUSE_SECONDS
        if done.walked or self._broken_now:
            self.broken, self._broken_now = self._broken_now, 0
            log.info("subjects are wrapped under the newest key", week=keyring.kek_id, wrapped=self.wrapped)
            if self.broken:
                log.error("subjects that no key opens", subjects=self.broken)
        return _HOUR_SECONDS

    def _is_ripe(self, conn: Connection, week: int) -> bool:
        ages = born(conn, "kek", self._source.weeks("kek"), self._clock())
        return week in ages and self._clock() >= ages[week] + SUCCESSOR_AGE_US

    def statistics(self) -> dict[str, int]:
        """For /metrics: wrapped anew since the start; of the last walk, rows that no key opens."""
        return {"rewrapped": self.wrapped, "rewrap_broken": self.broken}
