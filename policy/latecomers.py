"""What is told of somebody after they were erased: its count is kept, whom it is about is not.

A slice may be leased and an event in a stream while its person is erased. For a day (requirements 4.4 step 2), and as
long as the erasure is not finished, `Guard` knows the tags erased and the messages listed; `policy.drains` asks it.

Laws:
- such an event counts as it always would (I6) and loses what identifies: pseudonym, tag, reply text. Its message joins
  the list of the erasure and is taken out with it. A visit is not kept at all;
- who was taken out of a waiting slice is told as refused, ERASED, without pseudonym or tag, by the reference of the
  message that never was (engine.queue.erasing). That row joins the list of the account's youngest erasure: whose it is
  nobody can tell any more, and a list only says what is to go;
- events of anybody else, and of the same person at an account that did not erase them, are untouched;
- nobody erased of late: one truth value asked a transaction.

Known by tag and not by pseudonym: the key that made the pseudonyms is gone, so after a restart nobody could work them
out again, while every event of delivery carries the tag.

Known limits: 90 bytes of memory a listed message, for a day. Somebody erased long ago and imported again is refused
with a tag: that row is of the new job, and goes with its class (R3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from sqlalchemy import Connection, delete, or_, select

from policy import statements
from policy.events import Batch, Event, Reason
from policy.instants import DAY_US
from policy.schema import erasure as table
from policy.schema import job, purge

WATCH_US: Final = DAY_US
_FINISHED: Final = "purged"
_ERASED: Final = int(Reason.ERASED)


@dataclass(slots=True)
class Guard:
    """Who was erased of late, for events that come too late. Empty in the normal case. Lives on the writer's SQL
    thread: asked in the transactions of the drains, filled in those of the erasures."""

    tags: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)  # (account, erasure)
    mrefs: set[int] = field(default_factory=set)  # of any job: they are random, two alike are one in 2^64
    fresh: set[int] = field(default_factory=set)  # erasures whose list has grown
    dropped: int = 0
    _accounts: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tags or self.mrefs)

    def load(self, conn: Connection, now: int) -> None:
        """What is to be watched now; everything else is forgotten, its list with it."""
        young = or_(table.c.state != _FINISHED, table.c.begun > now - WATCH_US)
        watched: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        for row in conn.execute(select(table.c.tag, table.c.account, table.c.number).where(young)):
            watched[row.tag].append((row.account, row.number))
        over = select(table.c.number).where(table.c.state == _FINISHED, table.c.begun <= now - WATCH_US)
        conn.execute(delete(purge).where(purge.c.erasure.in_(over)))
        self.tags = dict(watched)
        self.mrefs = set(conn.scalars(select(purge.c.mref)))
        self._accounts.clear()

    def expect(self, conn: Connection, number: int) -> None:
        """One erasure more, whose list is still being made: what is told of its person from now on joins it."""
        row = conn.execute(select(table.c.tag, table.c.account).where(table.c.number == number)).one()
        places = self.tags.setdefault(row.tag, [])
        if (row.account, number) not in places:
            places.append((row.account, number))

    def watch(self, conn: Connection, number: int) -> None:
        """One erasure more, with its list as it is now."""
        self.expect(conn, number)
        self.mrefs.update(conn.scalars(select(purge.c.mref).where(purge.c.erasure == number)))

    def sift(
        self, conn: Connection, items: Sequence[tuple[str, str, Batch]]
    ) -> tuple[list[tuple[str, str, Batch]], list[tuple[int, int, int]]]:
        """The same batches, place by place, without what identifies somebody erased; and (erasure, job, mref) of
        messages that nobody has listed yet."""
        late: list[tuple[int, int, int]] = []
        sifted = []
        for stream, identity, batch in items:
            if any(
                event.tag in self.tags or event.mref in self.mrefs or event.reason == _ERASED for event in batch.events
            ):
                batch = Batch(batch.job, batch.domain, [self._bare(conn, batch.job, e, late) for e in batch.events],
                              batch.chunk)  # fmt: skip
            sifted.append((stream, identity, batch))
        return sifted, late

    def _bare(self, conn: Connection, number: int, event: Event, late: list[tuple[int, int, int]]) -> Event:
        erasure = self._erasure_of(conn, number, event.tag)
        if erasure is None and event.reason == _ERASED and not event.tag and event.mref not in self.mrefs:
            erasure = self._last_at(self._account_of(conn, number))
        if erasure is None and event.mref not in self.mrefs:
            return event
        if erasure is not None:
            late.append((erasure, number, event.mref))
        self.dropped += 1
        # a copy: the batch is read again when its transaction fails, and must then be known again by its tag
        return msgspec.structs.replace(event, pseudonym=0, tag=b"", note=b"")

    def _erasure_of(self, conn: Connection, number: int, tag: bytes) -> int | None:
        places = self.tags.get(tag)
        if places is None:
            return None
        mine = self._account_of(conn, number)
        known = {account: erasure for account, erasure in places if account in (0, mine)}
        return known.get(mine, known.get(0))

    def _account_of(self, conn: Connection, number: int) -> int:
        if number not in self._accounts:
            holder = conn.execute(select(job.c.account).where(job.c.number == number)).scalar()
            self._accounts[number] = int(holder or 0)
        return self._accounts[number]

    def _last_at(self, account: int) -> int | None:
        """The youngest erasure at an account, or everywhere: whichever it was that took somebody out of a slice."""
        every = (one for places in self.tags.values() for one in places)
        return max((erasure for holder, erasure in every if holder in (0, account)), default=None)

    def enlist(self, conn: Connection, late: Sequence[tuple[int, int, int]]) -> None:
        """Messages of erased people that came too late, onto their lists."""
        if not late:
            return
        sql = statements.insert(conn.dialect.name, "purge", "erasure, job, mref", "DO NOTHING")
        conn.exec_driver_sql(sql, sorted(set(late)))
        self.mrefs.update(mref for _, _, mref in late)
        self.fresh.update(erasure for erasure, _, _ in late)
