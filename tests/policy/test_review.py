"""The yearly review: boundaries to the day, leap years included, and what is said."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import review
from policy.review import Standing
from policy.settings import PolicySettings, annotate, load


@pytest.mark.parametrize(
    ("reviewed", "today", "standing"),
    [
        (date(2026, 1, 31), date(2026, 1, 31), Standing.CURRENT),
        (date(2026, 1, 31), date(2026, 12, 31), Standing.CURRENT),
        (date(2026, 1, 31), date(2027, 1, 1), Standing.DUE),
        (date(2026, 1, 31), date(2027, 1, 31), Standing.DUE),
        (date(2026, 1, 31), date(2027, 2, 1), Standing.OVERDUE),
        (date(2024, 2, 29), date(2025, 2, 28), Standing.DUE),
        (date(2024, 2, 29), date(2025, 3, 1), Standing.OVERDUE),
        (date(2026, 2, 1), date(2026, 1, 31), Standing.AHEAD),
        (None, date(2026, 1, 31), Standing.NEVER),
    ],
)
def test_it_counts_for_twelve_months_and_is_told_in_the_last(
    reviewed: date | None, today: date, standing: Standing
) -> None:
    assert review.standing(reviewed, today) is standing
    assert (review.words(reviewed, today) is None) is (standing is Standing.CURRENT)
    assert standing.is_wrong is (standing in (Standing.OVERDUE, Standing.AHEAD))


@given(st.dates(date(2000, 1, 1), date(2400, 12, 31)), st.integers(-40, 800))
def test_who_was_overdue_stays_so_until_somebody_looks(reviewed: date, days: int) -> None:
    order = [Standing.AHEAD, Standing.CURRENT, Standing.DUE, Standing.OVERDUE]
    today, next_day = (review.standing(reviewed, reviewed + timedelta(days=days + n)) for n in (0, 1))
    assert order.index(today) <= order.index(next_day)


def test_a_day_is_a_day_of_toml_and_is_written_as_one(tmp_path: Path) -> None:
    config = tmp_path / "sales-push.toml"
    config.write_text('[policy]\nreviewed = 2026-11-22\n[policy.officer]\nname = "G"\naddress = "g@one.example"\n')
    assert load(PolicySettings, config).reviewed == date(2026, 11, 22)
    assert "\nreviewed = 2026-11-22\n" in annotate([PolicySettings], config)
