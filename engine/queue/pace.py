"""How many connections and messages a second one worker wants at one site (design decision 11).

Laws:
- What is wanted stays between the floor and the ceiling of profile and warm-up, whatever the site answers.
- An accepted message never lowers it; a complaint about our speed or reputation, or a dead connection, never raises it.
- Many complaints about one burst count as one: within `calm` seconds of a cut nothing is cut again.

The algorithm is Postfix's (SCHEDULER_README, "Preemptive scheduling and concurrency feedback"): one success adds
1/window to the concurrency, so a whole window of them adds one; a cut is multiplicative. After `dead_after` failures
without a success in between the site is left alone for a while that doubles each time.

Recipient failures (5xx, 4xx of one mailbox) say nothing about pace: they are NEUTRAL.

Known limits: latency is judged by one number (a slow answer counts as no growth, not as a cut): a site that is slow
for everybody is not thereby angry with us. Nothing is learnt across accounts here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class Tone(enum.IntEnum):
    """What an answer says about our pace, not about the message."""

    ACCEPTED = 0
    NEUTRAL = 1  # about a recipient or a message
    SLOWER = 2  # 421, 450, 451, 452 about rate or connections
    BLOCKED = 3  # our address or domain has a bad name there
    UNREACHABLE = 4  # no connection, or it died


@dataclass(frozen=True, slots=True)
class Profile:
    """What is fit for a provider. rate in messages a second, 0 for unlimited; the rest in seconds or factors."""

    start: float = 2.0
    floor: float = 1.0
    ceiling: float = 20.0  # Postfix default_destination_concurrency_limit
    rate: float = 0.0
    rate_floor: float = 0.1
    cut: float = 0.5
    calm: float = 5.0
    slow_answer: float = 10.0
    dead_after: int = 5
    back_off: float = 60.0
    back_off_cap: float = 3600.0
    block_back_off: float = 900.0

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.ceiling or not 0 < self.cut < 1 or self.rate < 0 or self.back_off < 0:
            raise ValueError("a profile has 0 < floor <= ceiling, 0 < cut < 1, rate and back_off not negative")


@dataclass(frozen=True, slots=True)
class Pace:
    """State of one (source, site) in one worker. window: connections wanted, a fraction on purpose; rate: messages a
    second, 0 for unlimited; failures in a row; dead: times in a row the site was left alone; instants in µs."""

    window: float
    rate: float
    failures: int = 0
    dead: int = 0
    cut_at: int = 0
    idle_until: int = 0

    @property
    def connections(self) -> int:
        """Whole connections to ask permits for."""
        return max(1, int(self.window))

    def is_idle(self, now_us: int) -> bool:
        """True while the site is to be left alone."""
        return now_us < self.idle_until


def begin(profile: Profile, *, warm_up: float | None = None) -> Pace:
    """The state of a site nobody has written to yet; warm_up: messages a second allowed to a young address."""
    return _within(Pace(profile.start, profile.rate), profile, warm_up)


def on_answer(
    pace: Pace, tone: Tone, now_us: int, profile: Profile, *, seconds: float = 0.0, warm_up: float | None = None
) -> Pace:
    """The state after one answer. seconds: how long the site took for it; now_us: any clock, the same every time."""
    if tone is Tone.NEUTRAL:
        return _within(replace(pace, failures=0), profile, warm_up)
    if tone is Tone.ACCEPTED:
        growth = 0.0 if seconds >= profile.slow_answer else 1.0
        return _within(
            replace(
                pace,
                window=pace.window + growth / pace.window,
                # a rate once cut climbs back by a hundredth of its ceiling a success
                rate=pace.rate + growth * _top(profile, warm_up) / 100,
                failures=0,
                dead=0,
            ),
            profile,
            warm_up,
        )
    failures = pace.failures + 1
    if tone is Tone.BLOCKED:
        return _left_alone(pace, now_us, profile, warm_up, profile.block_back_off)
    if failures >= profile.dead_after:
        return _left_alone(pace, now_us, profile, warm_up, profile.back_off)
    if now_us - pace.cut_at < profile.calm * 1_000_000 and pace.cut_at:
        return _within(replace(pace, failures=failures), profile, warm_up)
    # Each worker cuts its own share: what it knows is what it was told.
    rate = pace.rate * profile.cut if tone is Tone.SLOWER else pace.rate
    cut = replace(pace, window=pace.window * profile.cut, rate=rate, failures=failures, cut_at=now_us)
    return _within(cut, profile, warm_up)


def _left_alone(pace: Pace, now_us: int, profile: Profile, warm_up: float | None, base: float) -> Pace:
    wait = min(base * 2.0 ** min(pace.dead, 20), max(base, profile.back_off_cap))
    until = max(pace.idle_until, now_us + round(wait * 1_000_000))
    # Answers of connections still open when the first said "dead" are not further deaths.
    dead = pace.dead if pace.is_idle(now_us) else pace.dead + 1
    until = pace.idle_until if pace.is_idle(now_us) else until
    idle = replace(pace, window=profile.floor, failures=0, dead=dead, cut_at=now_us, idle_until=until)
    return _within(idle, profile, warm_up)


def _top(profile: Profile, warm_up: float | None) -> float:
    """The ceiling of the rate: the lower of profile and warm-up, 0 when neither limits."""
    return min((limit for limit in (profile.rate, warm_up) if limit), default=0.0)


def _within(pace: Pace, profile: Profile, warm_up: float | None) -> Pace:
    window = min(max(pace.window, profile.floor), profile.ceiling)
    top = _top(profile, warm_up)
    rate = min(max(pace.rate or top, min(profile.rate_floor, top)), top)
    return replace(pace, window=window, rate=rate)
