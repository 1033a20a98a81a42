"""Mailboxes that do not exist are marked, so that nobody writes to them again (P-41; GDPR 5(1)(d), accuracy).

Promise: when the recipient's own server has said for good that there is no such mailbox, the account that wrote to it
has a suppression `bounce` for it: in SQL and at the gate before the event that says so counts as read. The address is
not deleted, history and consent stay; an officer's word takes the mark away (`unsuppress`), and so does its end, where
the operator wants one (`days`).

    1 `found`         of the batches of one portion of the drains: who was marked so, by account
    2 `Invalid.mark`  entries through `policy.enforcement`, all of a portion in one transaction and one pipeline
    3 the drain goes on and commits rows and cursors

Laws:
- marked first, then read past: a crash in between repeats 2, and a repetition changes nothing. No bounce is lost;
- only what the far side said counts: a permanent reply (5yz) of a class that is about the mailbox itself (`HARD`). Our
  own conclusions (DNS, an answer that never came) mark nobody: a resolver gone wrong would mark a whole list for good;
- one account's bounce is no other account's business: the scope is the account (GDPR 5(1)(c));
- who was erased is not marked again: the erasure says more, and stands for good.

A portion without such an event costs one look at kind and reason of each event.

Known limits: events that are told once more after Redis came back older mark once more, also where an officer had taken
the mark away in between. What a relay says later by mail (LATE_BOUNCE) counts where its event carries the tag.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
from sqlalchemy import Connection, select

from policy import keyspace, suppression
from policy.enforcement import Effects, Enforcement, RedisBehind
from policy.events import Batch, Event, Kind, Reason
from policy.instants import DAY_US
from policy.schema import job
from policy.store import Store

log = structlog.get_logger()

REASON: Final = "bounce"
# X.1.1, X.1.2, X.1.6, X.2.1 (RFC 3463 sections 3.2 and 3.3) and X.1.10 (RFC 7505), as engine.bounce sorts replies;
# RECIPIENT_REJECTED is not among them: the reply does not say that the mailbox is dead
HARD: Final = frozenset(
    int(reason) for reason in (Reason.USER_UNKNOWN, Reason.BAD_DOMAIN, Reason.INACTIVE_MAILBOX, Reason.NULL_MX)
)
_KINDS: Final = frozenset({int(Kind.BOUNCED), int(Kind.LATE_BOUNCE)})
_MANY: Final = 500
_KEPT: Final = 100_000  # accounts of jobs that are remembered


@dataclass(frozen=True, slots=True)
class Dead:
    """One mailbox that one job found dead. at: microseconds, when the far side said so; source: the slug of why."""

    job: int
    tag: bytes
    partition: int
    at: int
    source: str


def is_hard(event: Event) -> bool:
    """Whether the far side has said for good that there is no such mailbox."""
    return event.kind in _KINDS and event.reason in HARD and 500 <= event.code <= 599


def found(batches: Iterable[Batch], erased: Container[bytes] = frozenset()) -> list[Dead]:
    """Those to be marked, each once a job. erased: tags of people who were erased of late (policy.latecomers). Pure."""
    dead: dict[tuple[int, bytes], Dead] = {}
    for batch in batches:
        for event in batch.events:
            if event.reason not in HARD or not event.tag or not batch.domain or not is_hard(event):
                continue
            if event.tag in erased:
                continue
            source = Reason(event.reason).name.lower().replace("_", "-")
            one = Dead(batch.job, event.tag, keyspace.partition_of(batch.domain), event.at, source)
            dead.setdefault((batch.job, event.tag), one)
    return list(dead.values())


class Invalid:
    """One a writer. days: how long a mark stands, 0 for good (`[policy] bounce_days`); erased: asked at each use."""

    def __init__(
        self, store: Store, enforcement: Enforcement, *, days: int = 0, erased: Callable[[], Container[bytes]]
    ) -> None:
        self._store = store
        self._enforcement = enforcement
        self._days = days
        self._erased = erased
        self._accounts: dict[int, int] = {}
        self.marked = 0

    def __repr__(self) -> str:
        return f"<Invalid marked={self.marked}>"

    async def mark(self, items: Sequence[tuple[str, str, Batch]]) -> int:
        """Before a portion of events is written down: whoever it says is dead. How many marks are new or were extended.

        Raises the store's error: nothing of the portion may be read past then. That Redis did not take it is no reason
        to stop: SQL has it, and `Enforcement.mend` brings it."""
        dead = found((batch for _, _, batch in items), self._erased())
        if not dead:
            return 0
        missing = sorted({one.job for one in dead} - self._accounts.keys())
        if missing:
            if len(self._accounts) > _KEPT:
                self._accounts.clear()
                missing = sorted({one.job for one in dead})
            self._accounts.update(await self._store.write(lambda conn: _accounts_of(conn, missing)))
        entries = [self._entry(one, account) for one in dead if (account := self._accounts.get(one.job))]

        def change(conn: Connection, effects: Effects) -> int:
            effects.tags.update((entry.tag, entry.partition) for entry in entries)
            return suppression.add(conn, entries)

        try:
            changed = int(await self._enforcement.apply(change)) if entries else 0
        except RedisBehind:
            log.warning("mailboxes that do not exist are marked, redis is told later", mailboxes=len(entries))
            return 0
        self.marked += changed
        return changed

    def _entry(self, one: Dead, account: int) -> suppression.Entry:
        expires = one.at + self._days * DAY_US if self._days else None
        scope = suppression.Scope.ACCOUNT
        return suppression.Entry(one.tag, one.partition, scope, account, REASON, one.at, one.source, expires)


def _accounts_of(conn: Connection, numbers: Sequence[int]) -> dict[int, int]:
    """A job that is not there (its row went with its class) has no account: its bounces mark nobody."""
    holders: dict[int, int] = {}
    for start in range(0, len(numbers), _MANY):
        wanted = select(job.c.number, job.c.account).where(job.c.number.in_(numbers[start : start + _MANY]))
        holders.update((int(row.number), int(row.account)) for row in conn.execute(wanted))
    return holders
