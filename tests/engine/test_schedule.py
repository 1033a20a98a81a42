"""Retry delays by example and by law."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.campaign.job import DEFAULT_LIFE_DAYS
from engine.queue.schedule import SPREAD, Retry, delay, next_attempt
from engine.queue.windows import Window, opens_in
from engine.settings import EngineSettings
from engine.worker import retry_plan
from policy.events import Reason
from policy.instants import DAY_US, HOUR_US, SECOND_US, parse_rfc3339
from policy.settings import load

PLAN = Retry()
OFFICE = Window(8 * 60, 20 * 60, "Europe/Berlin")
EVENING = parse_rfc3339("2026-11-22T18:50:00Z")  # ten minutes before it closes
MORNING = parse_rfc3339("2026-11-23T07:00:00Z")
FAR = EVENING + 30 * DAY_US
jitters = st.floats(0, 1, exclude_max=True)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    """The settings of somebody who sets nothing."""
    config = tmp_path_factory.mktemp("shipped") / "sales-push.toml"
    config.write_text("")
    return load(EngineSettings, config)


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


def test_a_campaign_is_tried_for_72_hours_and_a_transactional_message_for_five_days(shipped: EngineSettings) -> None:
    assert (shipped.expiry.campaign, shipped.expiry.transactional) == (72 * 3600, 5 * 24 * 3600)
    assert DEFAULT_LIFE_DAYS == {"campaign": 3, "transactional": 5}  # where nobody hands in settings


@given(jitters)
def test_as_shipped_a_greylist_is_met_between_5_and_15_minutes(shipped: EngineSettings, jitter: float) -> None:
    plan = retry_plan(shipped)

    assert 300 <= delay(plan, 0, Reason.GREYLISTED, jitter) <= 900
    assert 300 <= delay(PLAN, 0, Reason.GREYLISTED, jitter) <= 900


@given(jitters)
def test_as_shipped_the_second_attempt_comes_after_about_half_an_hour(shipped: EngineSettings, jitter: float) -> None:
    """RFC 5321 4.5.4.1 says 30 minutes; a quarter to either side keeps what was deferred together from coming back
    together."""
    assert 1350 <= delay(retry_plan(shipped), 0, Reason.RATE_LIMITED, jitter) <= 2250


def test_what_was_deferred_together_does_not_come_back_together() -> None:
    dues = {delay(PLAN, 1, Reason.RATE_LIMITED, place / 100) for place in range(100)}

    assert len(dues) == 100
    assert max(dues) - min(dues) > PLAN.base * 2 * 2 * SPREAD * 0.98


def test_what_the_peer_asked_for_is_waited_for() -> None:
    assert next_attempt(PLAN, 0, 0, 0.5, now_us=0, expires_at=FAR, at_least=1000.0) == 1000
    assert next_attempt(PLAN, 0, 0, 0.5, now_us=0, expires_at=FAR, at_least=10.0) == 300
    assert next_attempt(PLAN, 0, 0, 0.5, now_us=0, expires_at=900 * SECOND_US, at_least=1000.0) is None


def test_a_retry_that_would_come_at_night_comes_in_the_morning() -> None:
    wait = next_attempt(PLAN, 0, Reason.GREYLISTED, 0.99, now_us=EVENING, expires_at=FAR, window=OFFICE)
    soon = next_attempt(PLAN, 0, Reason.GREYLISTED, 0.0, now_us=EVENING, expires_at=FAR, window=OFFICE)

    assert wait is not None
    assert EVENING + round(wait * SECOND_US) == MORNING
    assert soon == 300  # within the ten minutes that are left
    asked = next_attempt(PLAN, 0, 0, 0.0, now_us=EVENING, expires_at=FAR, window=OFFICE, at_least=3600.0)
    assert asked == wait


def test_what_expires_before_the_window_opens_ends_now() -> None:
    def late(expires_at: int) -> float | None:
        return next_attempt(PLAN, 2, 0, 0.5, now_us=EVENING, expires_at=expires_at, window=OFFICE)

    assert late(MORNING) is None
    assert late(MORNING + 1) is not None
    assert late(MORNING - HOUR_US) is None


@given(
    st.integers(0, 10), st.sampled_from(Reason), jitters, st.integers(EVENING, EVENING + 400 * DAY_US),
    st.floats(0, 7200), st.integers(0, 14 * DAY_US), st.booleans(),
)  # fmt: skip
def test_every_retry_is_due_in_the_window_and_before_the_expiry(
    attempt: int, reason: Reason, jitter: float, now: int, asked: float, life: int, in_doubt: bool
) -> None:
    """Law: what is tried again is due while the window is open, not sooner than without one, and before it expires."""
    plain = max(delay(PLAN, attempt, reason, jitter, in_doubt=in_doubt), asked)
    wait = next_attempt(
        PLAN, attempt, reason, jitter, now_us=now, expires_at=now + life, in_doubt=in_doubt, at_least=asked,
        window=OFFICE,
    )  # fmt: skip

    if wait is None:
        assert now + round((plain + opens_in(now + round(plain * SECOND_US), OFFICE)) * SECOND_US) >= now + life - 1
    else:
        assert wait >= plain
        assert now + wait * SECOND_US < now + life
        # a delay is a float: what is due a microsecond early is handed back by the lease and due again
        assert opens_in(now + round(wait * SECOND_US) + 1, OFFICE) == 0
