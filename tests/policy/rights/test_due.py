"""Due dates by jurisdiction, against dates worked out by hand and laws that hold for every day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.instants import SECOND_US, add_months
from policy.rights import due as dates
from policy.rights.due import Calendar, NoExtension, acknowledge_by, due, last_day

PLAIN = Calendar(UTC)


def noon(day: date, zone: ZoneInfo | None = None) -> int:
    return int(datetime(day.year, day.month, day.day, 12, tzinfo=zone or UTC).timestamp()) * SECOND_US


@pytest.mark.parametrize(
    ("law", "received", "extended", "last"),
    [
        # Regulation 1182/71 3(2)(c): no 31st, no 30th in February; then 3(4) where it is a weekend
        ("gdpr", date(2025, 1, 31), False, date(2025, 2, 28)),  # a Friday
        ("gdpr", date(2024, 1, 31), False, date(2024, 2, 29)),  # leap year, a Thursday
        ("gdpr", date(2027, 1, 31), False, date(2027, 3, 1)),  # 28 February is a Sunday
        ("gdpr", date(2026, 3, 5), False, date(2026, 4, 7)),  # 5 April a Sunday, 6 April Easter Monday
        ("gdpr", date(2026, 8, 31), False, date(2026, 9, 30)),
        ("gdpr", date(2026, 11, 30), True, date(2027, 3, 1)),  # 28 February 2027 is a Sunday
        ("gdpr", date(2025, 11, 25), False, date(2025, 12, 29)),  # 25 and 26 are holidays, then a weekend
        ("uk", date(2026, 5, 5), False, date(2026, 6, 5)),
        ("pipeda", date(2026, 1, 31), False, date(2026, 3, 2)),
        ("pipeda", date(2026, 1, 31), True, date(2026, 4, 1)),
        ("quebec", date(2026, 6, 1), False, date(2026, 7, 1)),
        ("ccpa", date(2026, 1, 1), False, date(2026, 2, 15)),  # a Sunday, and stays one: early is lawful
        ("ccpa", date(2026, 1, 1), True, date(2026, 4, 1)),
        ("bc", date(2026, 6, 1), False, date(2026, 7, 13)),  # six weeks of five working days
    ],
)
def test_by_hand(law: str, received: date, extended: bool, last: date) -> None:
    calendar = Calendar(UTC, {date(2026, 4, 6), date(2025, 12, 25), date(2025, 12, 26)})
    assert last_day(law, noon(received), calendar, extended=extended) == last
    end = due(law, noon(received), calendar, extended=extended)
    assert end == noon(last) + 12 * 3600 * SECOND_US  # the end of that day


def test_a_holiday_is_no_business_day() -> None:
    assert last_day("bc", noon(date(2026, 6, 1)), Calendar(UTC, {date(2026, 7, 1)})) == date(2026, 7, 14)


def test_the_zone_says_which_day_it_is() -> None:
    late = int(datetime(2026, 1, 30, 23, 30, tzinfo=UTC).timestamp()) * SECOND_US
    berlin = Calendar(ZoneInfo("Europe/Berlin"))
    assert last_day("quebec", late, PLAIN) == date(2026, 3, 1)
    assert last_day("quebec", late, berlin) == date(2026, 3, 2)
    # the day the clocks go forward ends an hour earlier on UTC's clock
    assert berlin.end_of(date(2026, 3, 28)) - berlin.end_of(date(2026, 3, 27)) == 24 * 3600 * SECOND_US
    assert berlin.end_of(date(2026, 3, 29)) - berlin.end_of(date(2026, 3, 28)) == 23 * 3600 * SECOND_US


def test_quebec_knows_no_extension_and_nobody_knows_atlantis() -> None:
    with pytest.raises(NoExtension):
        due("quebec", noon(date(2026, 1, 1)), PLAIN, extended=True)
    with pytest.raises(ValueError, match="unknown jurisdiction"):
        due("atlantis", noon(date(2026, 1, 1)), PLAIN)


def test_california_wants_a_word_within_ten_business_days() -> None:
    assert acknowledge_by("ccpa", noon(date(2026, 6, 1)), PLAIN) == PLAIN.end_of(date(2026, 6, 15))
    assert acknowledge_by("gdpr", noon(date(2026, 6, 1)), PLAIN) is None


days = st.dates(date(2020, 1, 1), date(2060, 1, 1))


@given(days, st.sets(days, max_size=20))
def test_a_month_ends_on_a_working_day_and_never_before_28_days(received: date, holidays: set[date]) -> None:
    calendar = Calendar(UTC, holidays)
    last = last_day("gdpr", noon(received), calendar)
    assert calendar.is_working(last)
    nominal = add_months(received, 1)
    assert 28 <= (nominal - received).days <= 31
    assert not any(calendar.is_working(nominal + timedelta(n)) for n in range((last - nominal).days))
    assert last_day("gdpr", noon(received), calendar, extended=True) > last


@given(days, st.integers(1, 60))
def test_business_days_are_counted_as_one_counts_them(begin: date, count: int) -> None:
    last = dates.add_business(begin, count, PLAIN)
    counted = [begin + timedelta(n + 1) for n in range((last - begin).days)]
    assert sum(day.weekday() < 5 for day in counted) == count
    assert counted[-1].weekday() < 5


@given(days, st.sampled_from(sorted(dates.RULES)), st.integers(0, 86_399))
def test_the_hour_of_receipt_does_not_matter(day: date, law: str, second: int) -> None:
    midnight = noon(day) - 12 * 3600 * SECOND_US
    assert due(law, midnight + second * SECOND_US, PLAIN) == due(law, midnight, PLAIN)
