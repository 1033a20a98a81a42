"""Instants: text and number are the same moment, and what has no offset is refused."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.instants import DAY_US, HOUR_US, WEEK_US, day_of, hour_of, parse_rfc3339, rfc3339, week_of

FIRST = -62_135_596_800_000_000  # 0001-01-01T00:00:00Z
LAST = 253_402_300_799_999_999  # 9999-12-31T23:59:59.999999Z


@given(st.integers(FIRST, LAST))
def test_text_and_number_are_the_same_moment(at_us: int) -> None:
    """Law: parse_rfc3339(rfc3339(t)) == t for every instant of the years 1 to 9999."""
    assert parse_rfc3339(rfc3339(at_us)) == at_us


@given(st.integers(FIRST, LAST), st.integers(FIRST, LAST))
def test_texts_sort_like_their_numbers(one: int, other: int) -> None:
    assert (rfc3339(one) < rfc3339(other)) == (one < other)


@given(st.text(max_size=40) | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}.{0,14}"))
def test_any_text_is_a_moment_or_a_value_error(text: str) -> None:
    """Law: no text raises anything but ValueError."""
    try:
        at_us = parse_rfc3339(text)
    except ValueError:
        return
    assert FIRST <= at_us <= LAST


@pytest.mark.parametrize(
    ("text", "at_us"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00.5z", 500_000),
        ("1970-01-01 02:00:00+02:00", 0),
        ("1969-12-31T23:59:59.999999-00:00", -1),
        ("2026-11-22T19:44:00.123456789Z", 1_795_376_640_123_456),
    ],
)
def test_forms_of_rfc3339(text: str, at_us: int) -> None:
    assert parse_rfc3339(text) == at_us


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T19:44:00",  # whose midnight?
        "2026-11-22",
        "2026-11-22T25:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-11-22T19:44Z",
        "2026-W47-7T00:00:00Z",
        "20261122T194400Z",
        "2026-11-22T19:44:00Z\n",
        "２０２６-11-22T19:44:00Z",
        "0001-01-01T00:00:00+01:00",
        "",
    ],
)
def test_what_is_not_a_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_rfc3339(text)


def test_hours_days_and_weeks_begin_on_the_hour_at_midnight_and_on_thursday() -> None:
    at_us = parse_rfc3339("2026-11-19T00:00:00Z")
    assert datetime.fromtimestamp(at_us / 1e6, UTC).strftime("%A") == "Thursday"
    assert week_of(at_us) == week_of(at_us - 1) + 1 == week_of(at_us + WEEK_US - 1)
    assert day_of(at_us) == day_of(at_us - 1) + 1 == day_of(at_us + DAY_US - 1)
    assert hour_of(at_us) == hour_of(at_us - 1) + 1 == hour_of(at_us + HOUR_US - 1)
