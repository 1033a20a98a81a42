"""Retention classes: exact to the day, leap days included; shortened yes, lengthened never."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policy import classes
from policy.classes import RETENTION, Period, RetentionSettings, gone_from, last_gone, period
from policy.instants import DAY_US, parse_rfc3339

EPOCH = date(1970, 1, 1)


def day(text: str) -> int:
    return (date.fromisoformat(text) - EPOCH).days


PERIODS = st.one_of(
    st.builds(Period, st.integers(1, 3000), st.just("day")),
    st.builds(Period, st.integers(1, 100), st.just("month")),
    st.builds(Period, st.integers(1, 9), st.just("year")),
)
DAYS = st.integers(day("1995-01-01"), day("2150-01-01"))


@pytest.mark.parametrize(
    ("start", "kept", "gone"),
    [
        ("2026-11-23", "90 days", "2027-02-21"),
        ("2026-11-23", "13 months", "2027-12-23"),
        ("2028-02-29", "12 months", "2029-02-28"),  # no such day: the one before, never the one after
        ("2028-02-29", "1 year", "2029-02-28"),
        ("2027-02-28", "1 year", "2028-02-28"),
        ("2027-01-31", "13 months", "2028-02-29"),
        ("2026-01-31", "13 months", "2027-02-28"),
        ("2024-02-29", "4 years", "2028-02-29"),
        ("2027-12-31", "1 day", "2028-01-01"),
        ("2026-03-28", "1 day", "2026-03-29"),  # summer time begins in Europe: a day is a day
    ],
)
def test_a_record_goes_on_the_day_of_the_calendar(start: str, kept: str, gone: str) -> None:
    assert gone_from(day(start), period(kept)) == day(gone)
    assert last_gone(day(gone), period(kept)) >= day(start)
    assert last_gone(day(gone) - 1, period(kept)) < day(start)


@given(DAYS, PERIODS, st.integers(-40, 40))
def test_what_is_gone_today_is_exactly_what_has_reached_its_day(start: int, kept: Period, offset: int) -> None:
    """The sweep's question (which days?) and the record's (when?) are one answer, at the ends of months too."""
    today = gone_from(start, kept) + offset
    assert (start <= last_gone(today, kept)) == (offset >= 0)


@given(DAYS, st.integers(0, 400), PERIODS)
def test_who_is_older_never_goes_later(start: int, younger: int, kept: Period) -> None:
    assert gone_from(start, kept) <= gone_from(start + younger, kept)


@given(DAYS, PERIODS)
def test_a_period_lasts_between_its_shortest_and_its_longest(start: int, kept: Period) -> None:
    assert kept.shortest <= gone_from(start, kept) - start <= kept.longest


@given(DAYS, PERIODS, PERIODS)
def test_within_means_never_longer_from_any_day_on(start: int, one: Period, other: Period) -> None:
    if one.is_within(other):
        assert gone_from(start, one) <= gone_from(start, other)


@given(DAYS, st.integers(1, 100))
def test_months_are_never_longer_than_the_standard_library_says(start: int, months: int) -> None:
    """Against datetime: the same day of the month, or an earlier one where there is none."""
    before = EPOCH + timedelta(days=start)
    after = EPOCH + timedelta(days=gone_from(start, Period(months, "month")))
    assert (after.year * 12 + after.month) - (before.year * 12 + before.month) == months
    assert after.day == before.day or (after.day < before.day and (after + timedelta(days=1)).day == 1)


@pytest.mark.parametrize("zone_change", ["2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z", "2026-11-01T06:00:00Z"])
def test_a_change_of_summer_time_moves_nothing(zone_change: str) -> None:
    at = parse_rfc3339(zone_change)
    assert classes.today_of(at - 1) == classes.today_of(at) == (datetime.fromisoformat(zone_change).date() - EPOCH).days
    midnight = classes.today_of(at) * DAY_US
    assert datetime.fromtimestamp(midnight / 1e6, UTC).hour == 0


@pytest.mark.parametrize("text", ["", "90", "0 days", "-1 days", "90 hours", "1.5 years", "13months", "10000 days"])
def test_what_is_no_period_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a period"):
        period(text)


def test_the_defaults_are_those_of_the_requirements() -> None:
    assert {name: str(kept) for name, kept in RetentionSettings().periods().items()} == {
        "R0": "1 day", "R1": "30 days", "R2": "13 months", "R3": "90 days", "R4": "3 years", "R6": "3 years",
        "R7": "7 years", "R8": "6 years",
    }  # fmt: skip
    assert RetentionSettings().periods() == {
        name: one.default for name, one in RETENTION.items() if one.default is not None
    }
    assert set(RETENTION) == {f"R{number}" for number in range(9)} | {"RH"}
    assert all(one.anchor and one.content and (one.trigger or one.end) for one in RETENTION.values())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r2", "14 months"), ("r2", "394 days"), ("r2", "2 years"), ("r3", "91 days"), ("r3", "3 months"),
        ("r0", "2 days"), ("r7", "8 years"), ("r8", "7 years"),
    ],
)  # fmt: skip
def test_p10_no_class_is_lengthened(name: str, text: str) -> None:
    """13 months can be 393 days (from 1 February on), 3 months 92: what could last longer in any year is refused."""
    with pytest.raises(ValidationError, match="never lengthened"):
        RetentionSettings.model_validate({name: text})


@pytest.mark.parametrize(("name", "text"), [("r6", "23 months"), ("r7", "2 years"), ("r8", "5 years")])
def test_no_class_is_shortened_below_what_a_law_demands(name: str, text: str) -> None:
    with pytest.raises(ValidationError, match="at least"):
        RetentionSettings.model_validate({name: text})


@pytest.mark.parametrize(
    ("name", "text"), [("r2", "12 months"), ("r2", "393 days"), ("r3", "2 months"), ("r6", "2 years")]
)
def test_shorter_is_taken_as_said(name: str, text: str) -> None:
    assert str(RetentionSettings.model_validate({name: text}).periods()[name.upper()]) == text


@given(st.sampled_from(classes.TIMED), PERIODS)
def test_whatever_is_accepted_stays_within_the_bounds(name: str, wanted: Period) -> None:
    known = RETENTION[name]
    try:
        classes.check(name, wanted)
    except ValueError:
        return
    assert known.default is not None
    for start in range(day("2027-12-25"), day("2028-03-05")):
        assert gone_from(start, wanted) <= gone_from(start, known.default)
        assert known.least is None or gone_from(start, wanted) >= gone_from(start, known.least)


def test_classes_without_a_period_cannot_be_given_one() -> None:
    for name in ("R5", "RH"):
        with pytest.raises(ValueError, match="has no period"):
            classes.check(name, Period(1, "day"))
        with pytest.raises(ValidationError):
            RetentionSettings.model_validate({name.lower(): "1 day"})
        assert RETENTION[name].review > 0
