"""Delivery windows by example and by law: the clock on the wall decides, also in the nights in which it is changed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.queue import windows
from engine.queue.windows import UNKNOWN_ZONE, Window, after, closes_in, opens_in
from policy.instants import DAY_US, HOUR_US, SECOND_US, parse_rfc3339

BERLIN = "Europe/Berlin"
OFFICE = Window(8 * 60, 20 * 60, BERLIN)
WORKDAYS = 0b0011111
# Half an hour of summer time, a date line that moved, clocks changed at midnight, a quarter of an hour off UTC, a
# country that stops its summer time for Ramadan.
ZONES = (
    BERLIN, "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "America/Havana", "Asia/Beirut",
    "Asia/Kathmandu", "Pacific/Apia", "America/St_Johns", "UTC",
)  # fmt: skip


def at(text: str) -> int:
    return parse_rfc3339(text)


def wall(at_us: int, zone: str) -> datetime:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us)).astimezone(ZoneInfo(zone))


def reads_open(at_us: int, window: Window) -> bool:
    """The law once more, from what a person sees on the wall."""
    clock = wall(at_us, window.zone)
    minute = clock.hour * 60 + clock.minute
    today, yesterday = clock.weekday(), (clock.weekday() - 1) % 7
    if window.opens < window.closes:
        return bool(window.days >> today & 1) and window.opens <= minute < window.closes
    late = bool(window.days >> today & 1) and minute >= window.opens
    return late or (bool(window.days >> yesterday & 1) and minute < window.closes)


@pytest.mark.parametrize(
    ("now", "window", "seconds"),
    [
        ("2026-11-22T07:00:00Z", OFFICE, 0),  # 08:00 sharp
        ("2026-11-22T06:59:59Z", OFFICE, 1),
        ("2026-11-22T18:59:59Z", OFFICE, 0),
        ("2026-11-22T19:00:00Z", OFFICE, 12 * 3600),  # 20:00 is closed
        ("2026-07-01T06:00:00Z", OFFICE, 0),  # summer: an hour earlier by UTC
        ("2026-03-28T19:00:00Z", OFFICE, 11 * 3600),  # the night in which an hour is missing
        ("2026-10-24T18:00:00Z", OFFICE, 13 * 3600),  # and the one that has it twice
        ("2026-11-20T19:00:00Z", Window(480, 1200, BERLIN, WORKDAYS), 60 * 3600),  # from Friday to Monday
        ("2026-11-22T22:30:00Z", Window(1320, 360, BERLIN), 0),  # over midnight
        ("2026-11-23T04:59:00Z", Window(1320, 360, BERLIN), 0),
        ("2026-11-23T05:00:00Z", Window(1320, 360, BERLIN), 16 * 3600),
        ("2026-11-28T04:00:00Z", Window(1320, 360, BERLIN, WORKDAYS), 0),  # Friday's window, on Saturday morning
        ("2026-11-23T04:00:00Z", Window(1320, 360, BERLIN, WORKDAYS), 17 * 3600),  # Sunday's would be closed
        ("2026-03-29T00:30:00Z", Window(150, 240, BERLIN), 30 * 60),  # 2:30 is jumped over: it opens when it is 3:00
        ("2026-10-25T00:30:00Z", Window(135, 165, BERLIN), 0),  # 2:30, the first time
        ("2026-10-25T00:45:00Z", Window(135, 165, BERLIN), 30 * 60),  # and again
        ("2011-12-30T09:00:00Z", Window(480, 1200, "Pacific/Apia", 1 << 4), 6 * 86400 + 9 * 3600),  # no Friday there
        ("2026-11-22T12:00:00Z", Window(0, 1440, "UTC", 1 << 6), 0),
        ("2026-11-23T00:00:00Z", Window(0, 1440, "UTC", 1 << 6), 6 * 86400),
        ("2026-11-23T00:00:00Z", Window(0, 1440, "UTC"), 0),
    ],
)  # fmt: skip
def test_the_clock_on_the_wall_decides(now: str, window: Window, seconds: int) -> None:
    assert opens_in(at(now), window) == seconds


def test_a_job_without_a_window_is_always_open() -> None:
    assert opens_in(5, None) == 0.0
    assert closes_in(5, None) == float("inf")
    assert after(5, 2.0, None, 10 * SECOND_US) == 5 + 2 * SECOND_US


def test_a_window_of_all_days_never_closes() -> None:
    assert closes_in(at("2026-11-22T12:00:00Z"), Window(0, 1440, BERLIN)) == float("inf")


def test_a_zone_nobody_knows_is_closed_and_asked_again() -> None:
    for name in ("Europe/Atlantis", "Europe", "../../etc/passwd", "", "a\0b"):
        assert opens_in(0, Window(0, 1440, name)) == UNKNOWN_ZONE
        assert closes_in(0, Window(0, 1440, name)) == 0.0
        assert after(0, 50.0, Window(0, 1440, name), DAY_US) == UNKNOWN_ZONE * SECOND_US


def test_zones_are_places() -> None:
    assert {BERLIN, "America/Argentina/Ushuaia", "UTC"} <= windows.zones()
    assert not {"Factory", "localtime", "posixrules", "right/UTC"} & windows.zones()


def test_a_rate_counts_open_hours_only() -> None:
    start = at("2026-11-20T18:30:00Z")  # Friday, half an hour before it closes
    weekdays = Window(480, 1200, BERLIN, WORKDAYS)
    far = start + 30 * DAY_US

    assert after(start, 600.0, weekdays, far) == start + 600 * SECOND_US
    assert after(start, 3600.0, weekdays, far) == at("2026-11-23T07:30:00Z")
    assert after(start, 3600.0 * 12.5, weekdays, far) == at("2026-11-24T07:00:00Z")
    assert after(start, 3600.0 * 1000, weekdays, start + DAY_US) == start + DAY_US
    assert after(at("2026-11-21T10:00:00Z"), 0.0, weekdays, far) == at("2026-11-23T07:00:00Z")


minutes = st.integers(0, 1439)
some_windows = st.builds(
    Window, minutes, st.integers(0, 1440), st.sampled_from(ZONES), st.integers(1, 127)
).filter(lambda window: window.opens != window.closes)  # fmt: skip
# Around a change of some of these clocks, and anywhere in the years in which this runs.
instants = st.one_of(
    st.integers(at("2026-01-01T00:00:00Z"), at("2040-01-01T00:00:00Z")),
    st.builds(
        lambda day, shift: at(day) + shift,
        st.sampled_from([
            "2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z", "2026-03-08T07:00:00Z", "2026-11-01T06:00:00Z",
            "2026-04-04T15:00:00Z", "2026-10-03T15:30:00Z", "2026-03-28T22:00:00Z", "2026-10-24T21:00:00Z",
            "2026-02-15T02:00:00Z", "2026-03-22T02:00:00Z", "2011-12-30T10:00:00Z",
        ]),
        st.integers(-2 * DAY_US, 2 * DAY_US),
    ),
)  # fmt: skip


@given(instants, some_windows)
@example(at("2026-03-29T00:59:59.999999Z"), Window(150, 151, BERLIN))  # a minute that does not exist that night
def test_it_opens_at_the_first_instant_at_which_the_wall_says_so(now: int, window: Window) -> None:
    """Open exactly when the clock on the wall reads a time of the window; else the next such instant is told."""
    wait = opens_in(now, window)
    then = now + round(wait * SECOND_US)

    assert (wait == 0) == reads_open(now, window)
    assert reads_open(then, window)
    if wait:
        assert not reads_open(then - 1, window)
        step = max(1, (then - now) // 200)
        assert not any(reads_open(between, window) for between in range(now, then, step))
        assert wait <= 15 * 86_400


@given(instants, some_windows)
def test_it_closes_at_the_first_instant_at_which_the_wall_says_so(now: int, window: Window) -> None:
    wait = closes_in(now, window)

    assert (wait == 0) == (not reads_open(now, window))
    if wait == float("inf"):
        assert all(reads_open(now + hour * HOUR_US, window) for hour in range(24 * 8))
    elif wait:
        then = now + round(wait * SECOND_US)
        step = max(1, (then - now) // 200)
        assert not reads_open(then, window)
        assert reads_open(then - 1, window)
        assert all(reads_open(between, window) for between in range(now, then, step))


@given(instants, some_windows, st.floats(0, 1500), st.floats(0, 1500))
def test_a_rate_goes_on_and_lands_in_the_window(now: int, window: Window, one: float, more: float) -> None:
    far = now + 400 * DAY_US
    first, second = after(now, one, window, far), after(now, one + more, window, far)

    assert now <= first <= second
    assert reads_open(first, window)
    assert second - first >= round(more * SECOND_US) - 1  # closed hours only add to it
