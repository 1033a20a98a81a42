"""Retry delays by example and by law."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.queue.schedule import SPREAD, Retry, delay, next_attempt
from policy.events import Reason

PLAN = Retry()


def test_delays_double_until_the_cap() -> None:
    assert [delay(PLAN, attempt, Reason.RATE_LIMITED, 0.5) for attempt in range(7)] == [
        300, 600, 1200, 2400, 4800, 9600, 14_400,
    ]  # fmt: skip


def test_a_greylist_is_met_between_5_and_15_minutes_then_as_usual() -> None:
    assert delay(PLAN, 0, Reason.GREYLISTED, 0.0) == 300
    assert delay(PLAN, 0, Reason.GREYLISTED, 0.5) == 600
    assert delay(PLAN, 0, Reason.GREYLISTED, 0.999999) == pytest.approx(900, abs=0.01)
    assert delay(PLAN, 1, Reason.GREYLISTED, 0.5) == 600


def test_what_is_slow_to_heal_waits_longer() -> None:
    assert delay(PLAN, 0, Reason.MAILBOX_FULL, 0.5) == 1200


def test_a_message_in_doubt_waits_for_the_first_copy() -> None:
    assert delay(PLAN, 0, Reason.NETWORK, 0.0, in_doubt=True) == 900


def test_a_compressed_schedule_replaces_the_formula_and_repeats_its_end() -> None:
    plan = Retry(schedule=(1.0, 3.0))

    assert [delay(plan, attempt, Reason.GREYLISTED, 0.5) for attempt in range(4)] == [1.0, 3.0, 3.0, 3.0]


def test_expiry_is_told_now_when_the_next_attempt_would_come_too_late() -> None:
    assert next_attempt(PLAN, 0, 0, 0.5, now_us=0, expires_at=300_000_001) == 300
    assert next_attempt(PLAN, 0, 0, 0.5, now_us=0, expires_at=300_000_000) is None


@given(st.integers(0, 10_000), st.sampled_from(Reason), st.floats(0, 1, exclude_max=True), st.booleans())
def test_no_delay_is_negative_or_above_the_cap_and_its_spread(
    attempt: int, reason: Reason, jitter: float, in_doubt: bool
) -> None:
    """Never negative, never above the cap plus its jitter, whatever failed how often."""
    assert 0 <= delay(PLAN, attempt, reason, jitter, in_doubt=in_doubt) <= PLAN.cap * (1 + SPREAD)


@given(st.integers(0, 60), st.sampled_from(Reason), st.floats(0, 1, exclude_max=True))
def test_delays_grow_with_the_attempts(attempt: int, reason: Reason, jitter: float) -> None:
    """With the same luck a later attempt never comes sooner (after the first, which greylisting rules)."""
    assert delay(PLAN, attempt + 1, reason, jitter) <= delay(PLAN, attempt + 2, reason, jitter)


@pytest.mark.parametrize(
    "wrong",
    [{"base": 0.0}, {"base": 9.0, "cap": 1.0}, {"greylist_low": 9.0, "greylist_high": 1.0}, {"schedule": (-1.0,)}],
)
def test_an_impossible_plan_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Retry(**wrong)  # type: ignore[arg-type]  # the point of the test: wrong values, and a tuple among floats


def test_jitter_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError):
        delay(PLAN, 0, 0, 1.0)
