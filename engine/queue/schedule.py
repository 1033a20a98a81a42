"""When to try a recipient again, and when to give up (promise T7; the delays are seconds, scripts add them to TIME).

Laws:
- A delay is never negative, never above the cap plus its jitter, and grows with the attempts until the cap.
- Nobody is tried at or after the expiry; who would be is given up now, with `None`, so that the end is told early.
- After a greylisting answer the first retry comes 5 to 15 minutes later (most greylists wait 5, RFC 6647 5).
- Nobody is tried outside the delivery window of the job: what would be, is tried when it opens next.

The delay of attempt n is base * 2^n, capped, spread by a quarter to either side: a site that deferred ten thousand
slices in one minute must not meet them in one minute again. A schedule of explicit delays replaces the formula (the
demo compresses hours into seconds with it); its last entry repeats.

Known limits: the expiry is compared on the clock handed in (Redis TIME of the lease), so it is as wrong as that clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.queue.windows import Window, opens_in
from policy.events import Reason
from policy.instants import SECOND_US

SPREAD = 0.25  # of a delay, to either side: Exim and Postfix spread by their queue runs, we have none
_SLOW = frozenset({Reason.MAILBOX_FULL, Reason.DNS, Reason.AUTHENTICATION, Reason.SPAM_BLOCK})
_SLOW_FACTOR = 4.0  # a full mailbox or a broken DNS zone is not better in five minutes


@dataclass(frozen=True, slots=True)
class Retry:
    """How to be patient. All in seconds. schedule: delays for attempts 1, 2, … instead of the formula, () for none."""

    base: float = 300.0  # Postfix minimal_backoff_time
    cap: float = 14_400.0  # RFC 5321 4.5.4.1 asks for 30 minutes at least, later retries may be 2 to 3 hours
    schedule: tuple[float, ...] = ()
    greylist_low: float = 300.0
    greylist_high: float = 900.0
    in_doubt: float = 900.0  # RFC 1047: the peer may still be working on the first copy; 600 s is its longest wait

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.cap or not 0 <= self.greylist_low <= self.greylist_high or self.in_doubt < 0:
            raise ValueError("retry delays: 0 < base <= cap, 0 <= greylist_low <= greylist_high")
        if any(delay < 0 for delay in self.schedule):
            raise ValueError("retry delays of a schedule are not negative")


def delay(plan: Retry, attempt: int, reason: int, jitter: float, *, in_doubt: bool = False) -> float:
    """Seconds until the next attempt. attempt: how many were made before the one that failed, from 0;
    reason: policy.events.Reason of the failure; jitter: a random number in [0, 1) drawn by the caller."""
    if not 0.0 <= jitter < 1.0 or attempt < 0:
        raise ValueError("jitter is in [0, 1), attempt not negative")
    if plan.schedule:
        wait = plan.schedule[min(attempt, len(plan.schedule) - 1)]
        return wait * (1 - SPREAD + 2 * SPREAD * jitter)
    if in_doubt:
        return plan.in_doubt * (1 + SPREAD * jitter)
    if reason == Reason.GREYLISTED and attempt == 0:
        return plan.greylist_low + (plan.greylist_high - plan.greylist_low) * jitter
    # 2^40 seconds is beyond every cap: no overflow whatever the attempt
    wait = plan.base * 2.0 ** min(attempt, 40) * (_SLOW_FACTOR if reason in _SLOW else 1.0)
    return min(wait, plan.cap) * (1 - SPREAD + 2 * SPREAD * jitter)


def next_attempt(
    plan: Retry,
    attempt: int,
    reason: int,
    jitter: float,
    *,
    now_us: int,
    expires_at: int,
    in_doubt: bool = False,
    at_least: float = 0.0,
    window: Window | None = None,
) -> float | None:
    """`delay`, moved into the window, or None when that instant would not be before expires_at (microseconds): the
    recipient is expired. at_least: seconds the peer asked for."""
    wait = max(delay(plan, attempt, reason, jitter, in_doubt=in_doubt), at_least)
    wait += opens_in(now_us + round(wait * SECOND_US), window)
    return wait if now_us + wait * SECOND_US < expires_at else None
