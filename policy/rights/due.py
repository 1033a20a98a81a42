"""When a request is due, by the law that applies to it. Pure: calendar in, instant out.

The clock starts at receipt, not at proof of identity (P-14). Due is the end, exclusive: the first midnight after the
last day, in the zone of the officer.

    gdpr     1 month, +2 (GDPR 12(3)); counted by Regulation 1182/71: the day of the same number, else the last of the
             month (3(2)(c)); a last day that is no working day gives way to the next that is (3(4))
    uk       the same (UK GDPR 12A counts a month likewise)
    pipeda   30 days, +30 (PIPEDA Principle 9, s.8(3) and (4))
    bc       30 business days, +30 (BC PIPA s.29, s.31)
    ccpa     45 days, +45 (Cal. Civ. Code 1798.130(a)(2)); acknowledged within 10 business days (11 CCR 7021(a))
    quebec   30 days, no extension (P-39.1 s.32)

The day of receipt does not count. Where the law says days and not months, a last day on a weekend stays where it is:
being early is always lawful.

Known limits: holidays are configuration, there is no calendar of any country here. A zone decides which day it is; two
jurisdictions with two zones at one installation share the officer's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, tzinfo
from typing import Final

from policy.instants import SECOND_US, add_months

_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Rule:
    """first, further: how long, and how much longer with notice (0: no extension); unit: month, day or business;
    acknowledge: business days until receipt must be confirmed."""

    first: int
    further: int
    unit: str
    acknowledge: int = 0


RULES: Final[dict[str, Rule]] = {
    "gdpr": Rule(1, 2, "month"),
    "uk": Rule(1, 2, "month"),
    "pipeda": Rule(30, 30, "day"),
    "bc": Rule(30, 30, "business"),
    "ccpa": Rule(45, 45, "day", acknowledge=10),
    "quebec": Rule(30, 0, "day"),
}


class NoExtension(ValueError):
    """The law that applies knows no extension."""


@dataclass(frozen=True, slots=True)
class Calendar:
    """zone: where the officer works; holidays: besides Saturdays and Sundays."""

    zone: tzinfo
    holidays: Collection[date] = frozenset()

    def day_of(self, at_us: int) -> date:
        return datetime.fromtimestamp(at_us // SECOND_US, self.zone).date()

    def end_of(self, day: date) -> int:
        """The midnight after a day, exclusive end of it."""
        midnight = datetime.combine(day + _DAY, time.min, self.zone)
        return int(midnight.timestamp()) * SECOND_US

    def is_working(self, day: date) -> bool:
        return day.weekday() < 5 and day not in self.holidays

    def next_working(self, day: date) -> date:
        while not self.is_working(day):
            day += _DAY
        return day


def add_business(day: date, days: int, working: Calendar) -> date:
    """The n-th working day after a day."""
    while days:
        day += _DAY
        days -= working.is_working(day)
    return day


def last_day(jurisdiction: str, received: int, calendar_: Calendar, *, extended: bool = False) -> date:
    """The last day on which an answer is in time. Raises ValueError for a jurisdiction nobody knows, NoExtension."""
    rule = RULES.get(jurisdiction)
    if rule is None:
        raise ValueError(f"unknown jurisdiction, one of {', '.join(RULES)}")
    if extended and not rule.further:
        raise NoExtension("the law that applies knows no extension")
    length = rule.first + (rule.further if extended else 0)
    begin = calendar_.day_of(received)
    if rule.unit == "month":
        return calendar_.next_working(add_months(begin, length))
    if rule.unit == "business":
        return add_business(begin, length, calendar_)
    return begin + length * _DAY


def due(jurisdiction: str, received: int, calendar_: Calendar, *, extended: bool = False) -> int:
    """The instant by which an answer must have been given, exclusive."""
    return calendar_.end_of(last_day(jurisdiction, received, calendar_, extended=extended))


def acknowledge_by(jurisdiction: str, received: int, calendar_: Calendar) -> int | None:
    """The instant by which receipt must be confirmed; None where the law sets none."""
    days = RULES[jurisdiction].acknowledge
    return calendar_.end_of(add_business(calendar_.day_of(received), days, calendar_)) if days else None
