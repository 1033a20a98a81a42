"""What is asked of the queue and what it answers: plain values, one for each question of `lanes`.

Law: delays are float seconds, instants integer microseconds, tags 12 raw bytes, lane and site references 11 characters.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from policy.gate import Standing


@dataclass(frozen=True, slots=True)
class FactsRequest:
    """The question of expansion about rows of one chunk that live in one partition. All rows of that (chunk,
    partition) must be in one request: duplicates inside a chunk are seen only side by side.

    buckets: how many small hashes hold the job's fingerprints in this partition (the same number for the whole job,
    about one for every 64 recipients a partition gets; 0 counts as 1). rows: (mref, 12-byte suppression tag);
    domain_tags: for each row the tag of its domain. A row may ask about another tag of a recipient (the canonical
    spelling of their provider): with an mref of its own, never used elsewhere. list_number, topic_number: 0 for none.
    """

    partition: int
    job: int
    chunk: int
    buckets: int
    account: int
    list_number: int
    topic_number: int
    rows: Sequence[tuple[int, bytes]]
    domain_tags: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class JobState:
    """What a partition must know of a job; written by its first put, `state` afterwards only by the writer.

    expires_at in microseconds; state: a word of `states.JOB_STATES` ("sending", "paused", "cancelled").
    """

    account: int
    list_number: int
    topic_number: int
    priority: bool
    expires_at: int
    resend_in_doubt: bool
    buckets: int
    state: str = "sending"


@dataclass(frozen=True, slots=True)
class PutRequest:
    """One chunk's share of one partition. slices: (due in microseconds or 0 for now, bytes of slices.build);
    events: encoded policy.events.Batch of the refusals. A share without slices is put too: it raises the watermark."""

    partition: int
    job: int
    chunk: int
    state: JobState
    slices: Sequence[tuple[int, bytes]]
    events: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """sites: (site reference, at most so many slices); unresolved: at most so many slices of lanes without a site,
    each of another lane; urgent, plain: as sites, but transactional slices alone, or those of campaigns alone."""

    partition: int
    sites: Sequence[tuple[str, int]]
    unresolved: int = 0
    urgent: Sequence[tuple[str, int]] = ()
    plain: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A slice in our hands. site is keyspace.UNRESOLVED for a lane nobody has assigned; data: slices.open_slice;
    others: for such a lane, how many more slices it has."""

    partition: int
    slice_id: str
    site: str
    lane: str
    token: int
    data: bytes
    others: int = 0


@dataclass(frozen=True, slots=True)
class Leased:
    """now_us: Redis TIME. ready: sites of this partition with their earliest due (µs, may be ahead), the earliest
    first and, where there are more than asked for, a random choice of the others behind them.
    full: the event stream is at its cap and nothing was leased. strangers: due slices of a newer layout, left alone."""

    partition: int
    now_us: int
    slices: list[Lease]
    ready: list[tuple[str, int]]
    full: bool
    strangers: int = 0


@dataclass(frozen=True, slots=True)
class GateRequest:
    """tags: suppression tags of the recipients asked about, in their order; domain_tag: the tag of "@domain"."""

    partition: int
    slice_id: str
    token: int
    tags: Sequence[bytes]
    domain_tag: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """facts: one byte for each tag asked about, for policy.gate.decide; empty unless standing is CLEAR."""

    standing: Standing
    facts: bytes


@dataclass(frozen=True, slots=True)
class Retry:
    """Recipients that move to a new slice: delay in seconds from now, data of slices.retry_of, and the indexes they
    have in the old one (they are marked done there)."""

    delay: float
    data: bytes
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class SettleRequest:
    """done: indexes that reached a terminal state; doubt: indexes that stay, allowed one more attempt (T8);
    events: one encoded policy.events.Batch or b""; retries: see Retry (their rows need not be in done)."""

    partition: int
    slice_id: str
    token: int
    done: Sequence[int]
    doubt: Sequence[int] = ()
    events: bytes = b""
    retries: Sequence[Retry] = ()


class Settled(enum.IntEnum):
    """What came of a settle or a release."""

    STALE = 0  # the token is not current: nothing was written; somebody else has the slice, or it is gone
    KEPT = 1  # written; recipients are left in the slice
    GONE = 2  # written; it was the last of the slice, which is deleted


@dataclass(frozen=True, slots=True)
class Waiting:
    """A slice of a lane, for `why` and erasure. due in microseconds (of its last waiting);
    holder "" when not leased."""

    partition: int
    slice_id: str
    due: int
    holder: str
    data: bytes
