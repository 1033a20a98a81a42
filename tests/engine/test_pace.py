"""Pace by example and by law: it climbs by one a window, falls by half a burst, and never leaves its bounds."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.queue.pace import Pace, Profile, Tone, begin, on_answer

SECOND = 1_000_000
PROFILE = Profile(start=4, ceiling=10, rate=100)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(Tone), st.integers(0, 30 * SECOND), st.floats(0, 60), st.sampled_from([None, 5.0, 500.0])
    ),
    max_size=60,
)


def after(*tones: Tone, pace: Pace | None = None, profile: Profile = PROFILE) -> Pace:
    pace = pace or begin(profile)
    for moment, tone in enumerate(tones, 1):
        pace = on_answer(pace, tone, moment * 10 * SECOND, profile)
    return pace


def test_a_window_of_successes_adds_about_one() -> None:
    assert begin(PROFILE).connections == 4
    assert after(*[Tone.ACCEPTED] * 4).window == pytest.approx(4.9, abs=0.1)
    assert after(*[Tone.ACCEPTED] * 200).window == 10


def test_a_complaint_halves_window_and_rate() -> None:
    pace = after(Tone.SLOWER)

    assert (pace.window, pace.rate) == (2, 50)


def test_many_complaints_about_one_burst_are_one() -> None:
    pace = begin(PROFILE)
    for moment in range(4):
        pace = on_answer(pace, Tone.SLOWER, 20 * SECOND + moment, PROFILE)

    assert pace.window == 2


def test_a_rate_once_cut_climbs_back() -> None:
    assert after(Tone.SLOWER, *[Tone.ACCEPTED] * 20).rate == 70
    warmed = Profile(rate=0)
    pace = on_answer(begin(warmed, warm_up=10.0), Tone.SLOWER, SECOND, warmed, warm_up=10.0)
    assert pace.rate == 5
    assert on_answer(pace, Tone.ACCEPTED, SECOND, warmed, warm_up=10.0).rate == pytest.approx(5.1)


def test_a_dead_site_is_left_alone_for_twice_as_long_each_time() -> None:
    profile = Profile(dead_after=2, back_off=60)
    waits = []
    pace, now = begin(profile), 0
    for _ in range(3):
        for _ in range(2):
            pace = on_answer(pace, Tone.UNREACHABLE, now, profile)
        waits.append((pace.idle_until - now) // SECOND)
        assert pace.is_idle(now)
        now = pace.idle_until
        assert not pace.is_idle(now)

    assert waits == [60, 120, 240]
    assert on_answer(pace, Tone.ACCEPTED, now, profile).dead == 0


def test_answers_of_dying_connections_are_not_further_deaths() -> None:
    profile = Profile(dead_after=1, back_off=60)
    pace = on_answer(begin(profile), Tone.UNREACHABLE, 0, profile)
    again = on_answer(pace, Tone.UNREACHABLE, SECOND, profile)

    assert (again.dead, again.idle_until) == (1, pace.idle_until)


def test_a_block_stops_at_once() -> None:
    pace = after(Tone.BLOCKED)

    assert pace.idle_until == (10 + 900) * SECOND
    assert pace.connections == 1


def test_recipients_failures_say_nothing_about_pace() -> None:
    assert after(Tone.NEUTRAL) == begin(PROFILE)


def test_a_slow_answer_does_not_raise() -> None:
    assert on_answer(begin(PROFILE), Tone.ACCEPTED, 0, PROFILE, seconds=30).window == 4


def test_warm_up_is_a_ceiling() -> None:
    assert begin(PROFILE, warm_up=3).rate == 3
    assert begin(Profile(), warm_up=3).rate == 3
    assert begin(Profile()).rate == 0


@given(STEPS)
def test_the_pace_stays_within_its_bounds(steps: list[tuple[Tone, int, float, float | None]]) -> None:
    """Between floor and ceiling of profile and warm-up, whatever the site answers."""
    pace, now = begin(PROFILE), 0
    for tone, passed, seconds, warm_up in steps:
        now += passed
        pace = on_answer(pace, tone, now, PROFILE, seconds=seconds, warm_up=warm_up)
        assert PROFILE.floor <= pace.window <= PROFILE.ceiling
        assert 0 < pace.rate <= min(PROFILE.rate, warm_up or PROFILE.rate)
        assert pace.connections >= 1


@given(STEPS)
def test_acceptance_never_lowers_and_complaints_never_raise(
    steps: list[tuple[Tone, int, float, float | None]],
) -> None:
    """An accepted message never lowers the pace; a complaint or a dead connection never raises it."""
    states, now = [begin(PROFILE)], 0
    for tone, passed, seconds, _ in steps:
        now += passed
        states.append(on_answer(states[-1], tone, now, PROFILE, seconds=seconds))
    for (before, later), (tone, *_) in zip(pairwise(states), steps, strict=True):
        if tone is Tone.ACCEPTED:
            assert (later.window, later.rate) >= (before.window, before.rate)
        elif tone is not Tone.NEUTRAL:
            assert later.window <= before.window
            assert later.rate <= before.rate


def test_an_impossible_profile_is_refused() -> None:
    with pytest.raises(ValueError):
        Profile(floor=3, ceiling=2)
