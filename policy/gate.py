"""The gate: may we write to this person, for this job, now?

Law: nothing is composed or written to a recipient without a `Permit`, and a Permit is void 0.5 s after the question
was *sent* (design decision 7). What the store does not answer, or answers in words this room does not know, is a
refusal: the gate fails closed.

The facts are gathered by one script of the recipient's partition (``facts.lua`` at expansion, ``gate.lua`` on a ready
connection): one small number a recipient, 0 for "nothing known against it", else a `Reason`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from policy.events import Reason

PERMIT_SECONDS = 0.5  # design decision 7: promise is 1 s, half of it is for the way to the wire


class Mode(enum.IntEnum):
    """How much a hit may remember, strictest first: the least of account, campaign and recipient wins (decision 12)."""

    OFF = 0
    AGGREGATE = 1
    DELIVERABILITY = 2
    INDIVIDUAL = 3


class Standing(enum.IntEnum):
    """What the store said about the job and the lease as a whole, before any recipient was looked at."""

    CLEAR = 0
    STALE = 1  # the lease token is no longer current: drop the slice, somebody else has it
    PAUSED = 2
    CANCELLED = 3
    EXPIRED = 4
    FROZEN = 5  # the account
    GONE = 6  # the job is not known in this partition


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to write to one recipient of one job. asked_at: monotonic seconds at which the question was sent."""

    job: int
    mref: int
    asked_at: float

    def is_void(self, now: float) -> bool:
        """True once the answer is too old to act on; also when the clock reads before the question (never trust it)."""
        return not 0.0 <= now - self.asked_at <= PERMIT_SECONDS


@dataclass(frozen=True, slots=True)
class Refusal:
    """No leave, and why: the reason is terminal and recorded."""

    job: int
    mref: int
    reason: Reason


_REFUSALS = {int(reason): reason for reason in Reason if 0 < reason < 16}


def decide(fact: int, job: int, mref: int, asked_at: float) -> Permit | Refusal:
    """Turn one fact into leave or refusal. Unknown facts refuse as RESTRICTED: fails closed."""
    if fact == 0:
        return Permit(job, mref, asked_at)
    return Refusal(job, mref, _REFUSALS.get(fact, Reason.RESTRICTED))


def decide_entry(
    fact: int, job: int, mref: int, asked_at: float, *, needs_consent: bool, has_consent: bool
) -> Permit | Refusal:
    """The same question at expansion, where the legal basis is looked at too (P-07, decision 19).

    needs_consent: the campaign's legal basis is consent; has_consent: evidence with source and time is at hand.
    """
    verdict = decide(fact, job, mref, asked_at)
    if isinstance(verdict, Permit) and needs_consent and not has_consent:
        return Refusal(job, mref, Reason.NO_CONSENT)
    return verdict


def strictest(*modes: Mode) -> Mode:
    """The mode that wins where several have a say (decision 12). No say at all is OFF."""
    return min(modes, default=Mode.OFF)
