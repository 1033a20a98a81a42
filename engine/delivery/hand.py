"""A leased slice in our hands: who of it still waits, who is on the wire, and what is not settled yet.

Laws: a recipient is in exactly one place (waiting in a desk's stock, composed or on the wire, or recorded); what is
recorded is written by `settling` and only then forgotten; a hand whose token went stale is dead and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from engine.delivery.campaigns import Loaded
from engine.queue.journal import Page
from engine.queue.lanes import Lease
from engine.queue.slices import Contents, Header, Row
from policy.address import References, domain_tag, normalise
from policy.gate import Permit

if TYPE_CHECKING:
    from engine.delivery.desk import Desk


@dataclass(slots=True, eq=False)
class Hand:
    """One slice. abroad: recipients handed to a line (composed or on the wire) without verdict; done, events, retries:
    recorded, not settled yet: events as the journal has them, retries by (delay in seconds, whether in doubt)."""

    lease: Lease
    header: Header
    contents: Contents
    job: Loaded
    pepper: bytes
    waiting: int = 0
    abroad: int = 0
    done: list[int] = field(default_factory=list)
    events: list[msgspec.Raw] = field(default_factory=list)
    retries: dict[tuple[float, bool], list[int]] = field(default_factory=dict)
    dead: bool = False
    held: bool = False  # paused or frozen: goes back to its lane when nothing of it is on the way
    desk: Desk | None = None
    asked: bool = False  # a settle request is on its way or unanswered
    _tags: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    _domain_tag: bytes = b""
    _page: Page | None = None
    _references: References | None = None

    @property
    def page(self) -> Page:
        """Where the journal writes about it."""
        if self._page is None:
            lease, header = self.lease, self.header
            self._page = Page(header.job, header.attempt, (lease.partition, lease.slice_id, lease.token))
        return self._page

    @property
    def domain_tag(self) -> bytes:
        if not self._domain_tag:
            self._domain_tag = domain_tag(self.pepper, self.contents.domain)
        return self._domain_tag

    def row(self, index: int) -> Row:
        return self.contents.rows[index]

    def reference(self, index: int) -> tuple[int, bytes]:
        """(mref, suppression tag) of a recipient; worked out once, both are keyed hashes of the same address."""
        known = self._tags.get(index)
        if known is None:
            if self._references is None:
                self._references = References(self.job.job_key, self.pepper)
            known = self._references.of(normalise(self.contents.rows[index].local, self.contents.domain))
            self._tags[index] = known
        return known

    @property
    def has_news(self) -> bool:
        return bool(self.done or self.retries)

    @property
    def is_at_rest(self) -> bool:
        """Nothing of it is on the way anywhere in this process."""
        return not (self.waiting or self.abroad or self.has_news or self.asked)

    def __repr__(self) -> str:
        return (
            f"<Hand p{self.lease.partition:02d} {self.lease.slice_id} of job {self.header.job}: "
            f"{self.waiting} waiting, {self.abroad} abroad, {len(self.done)} done>"
        )


@dataclass(slots=True, eq=False)
class Letter:
    """One recipient on the way: the key of its Outbound. permit: what the gate gave, none before it was asked."""

    hand: Hand
    index: int
    mref: int
    permit: Permit | None = None
