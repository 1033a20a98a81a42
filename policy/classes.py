"""Retention classes R0 to R8 and RH: what may be kept, from when on it counts, for how long, and what happens then.

`RETENTION` is the table of requirements 4.3 in code, `RetentionSettings` ([policy.retention]) the operator's say. The
public table, the inventory and the sweeps read the same two (P-06): there is no other place for a period.

Laws:
- a period may be shortened, never lengthened: what could last longer than the default in any year is refused (P-10);
- nor shortened below what a law demands: R6 24 months (PIPEDA, Breach of Security Safeguards Regulations s. 6), R7 as
  long as R6 (the chain proves what was done there), R8 six years (Income Tax Act, Canada, s. 230(4));
- a record of day D goes at 00:00 UTC of the day `gone_from` says, exclusive: one second earlier it may still be there;
- calendar periods go by the calendar. Where the month is shorter, its last day counts (29 February and 12 months:
  28 February): never longer than the period. UTC has no daylight saving, so no hour is lost or gained.

R0 counts whole days too: what ended on day D is cleared at the next midnight, so at most 24 hours after its end.

Known limits: R4 begins when a relationship ends, see `policy.sweeping` for what is taken as its end. R5 and RH have no
period: they end by an act, and are looked at again yearly and half-yearly. R1 and R8 have no records on this floor yet.
"""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from datetime import date, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from policy.instants import DAY_US

_EPOCH: Final = date(1970, 1, 1).toordinal()
_MOST_MONTHS: Final = 1200
_WRITTEN: Final = re.compile(r"([1-9][0-9]{0,3}) (day|month|year)s?")


class Action(StrEnum):
    """What the end of a class means (P-10)."""

    DROP = "drop"
    SHRED = "shred"
    AGGREGATE = "aggregate"


@dataclass(frozen=True, slots=True)
class Period:
    """A number of days, months or years, by the calendar."""

    number: int
    unit: str

    def __str__(self) -> str:
        return f"{self.number} {self.unit}{'' if self.number == 1 else 's'}"

    @property
    def _months(self) -> int:
        return self.number * (12 if self.unit == "year" else 1)

    @property
    def shortest(self) -> int:
        """Days it lasts at least, from whatever day on."""
        return self.number if self.unit == "day" else _bounds(self._months)[0]

    @property
    def longest(self) -> int:
        """Days it lasts at most, from whatever day on."""
        return self.number if self.unit == "day" else _bounds(self._months)[1]

    def is_within(self, other: Period) -> bool:
        """Whether it never lasts longer than the other, whenever both begin."""
        if "day" not in (self.unit, other.unit):
            return self._months <= other._months
        return self.longest <= other.shortest


def period(text: str) -> Period:
    """Of "90 days", "13 months", "1 year". Raises ValueError."""
    found = _WRITTEN.fullmatch(text.strip())
    if found is None or (found[2] != "day" and int(found[1]) > _MOST_MONTHS):
        raise ValueError("not a period: a number of days, months or years, such as 90 days or 13 months")
    return Period(int(found[1]), found[2])


def gone_from(day: int, kept: Period) -> int:
    """The day (since the epoch, UTC) at whose first instant what is dated `day` must be gone."""
    if kept.unit == "day":
        return day + kept.number
    return _later(date.fromordinal(day + _EPOCH), kept._months).toordinal() - _EPOCH


def last_gone(today: int, kept: Period) -> int:
    """The newest day whose records must be gone today: the other way round, and exactly so (ends of months)."""
    if kept.unit == "day":
        return today - kept.number
    day = _later(date.fromordinal(today + _EPOCH), -kept._months).toordinal() - _EPOCH
    while gone_from(day, kept) > today:
        day -= 1
    while gone_from(day + 1, kept) <= today:
        day += 1
    return day


def today_of(now: int) -> int:
    return now // DAY_US


def _later(start: date, months: int) -> date:
    years, month = divmod(start.year * 12 + start.month - 1 + months, 12)
    last = calendar.monthrange(years, month + 1)[1]
    return date(years, month + 1, min(start.day, last))


@lru_cache
def _bounds(months: int) -> tuple[int, int]:
    """Fewest and most days that many months last. Looked for at both ends of every month of a century around 2100,
    which has no 29 February: calendar periods are shortest there."""
    starts = [date(2050 + n // 12, n % 12 + 1, 1) + timedelta(days=one) for n in range(1200) for one in (-1, 0)]
    lengths = {(_later(start, months) - start).days for start in starts}
    return min(lengths), max(lengths)


@dataclass(frozen=True, slots=True)
class RetentionClass:
    """One row of the table. default: None for classes that end by an act; least: what a law or we ourselves demand;
    shortens: an account may keep less; review: months after which somebody looks at it again, 0: nobody needs to."""

    name: str
    content: str
    trigger: str
    default: Period | None
    action: Action
    anchor: str
    least: Period | None = None
    shortens: bool = False
    review: int = 0
    end: str = ""


RETENTION: Final[dict[str, RetentionClass]] = {
    one.name: one
    for one in (
        RetentionClass(
            "R0", "rendered messages, queued payloads, streams", "when the job or entry has ended", Period(1, "day"),
            Action.DROP, "GDPR 5(1)(c)",
        ),
        RetentionClass(
            "R1", "sealed network address and agent of logins, API calls and abuse", "when it was recorded",
            Period(30, "day"), Action.SHRED, "CNIL: 6 to 12 months at most",
        ),
        RetentionClass(
            "R2", "opens and clicks of people who agreed to it, links and web views of their campaigns",
            "day of the visit; end of the job", Period(13, "month"), Action.AGGREGATE,
            "GDPR 5(1)(e); CNIL, audience figures", shortens=True,
        ),
        RetentionClass(
            "R3", "send log: replies of mail servers, bounces", "day of the event; end of the job", Period(90, "day"),
            Action.AGGREGATE, "GDPR 5(1)(e)", shortens=True,
        ),
        RetentionClass(
            "R4", "evidence of consent, objection and withdrawal", "end of the relationship", Period(3, "year"),
            Action.DROP, "CASL s. 13, limitation of three years", shortens=True,
        ),
        RetentionClass(
            "R5", "whom not to write to again, as keyed values", "", None, Action.DROP, "GDPR 21(3)", review=12,
            end="while somebody could write in that scope",
        ),
        RetentionClass(
            "R6", "rights requests, disclosures, consultations, incidents", "when the case is closed",
            Period(3, "year"), Action.DROP, "PIPEDA: 24 months at least", least=Period(24, "month"),
        ),
        RetentionClass(
            "R7", "audit chain and proofs of what was destroyed, without personal data", "when it was written",
            Period(7, "year"), Action.DROP, "GDPR 5(2)", least=Period(3, "year"),
        ),
        RetentionClass(
            "R8", "invoices", "end of the tax year", Period(6, "year"), Action.DROP,
            "Income Tax Act (Canada) s. 230(4): six years", least=Period(6, "year"),
        ),
        RetentionClass(
            "RH", "copies under a legal hold", "", None, Action.DROP, "GDPR 17(3)(b)(e)", review=6,
            end="when the hold is released",
        ),
    )
}  # fmt: skip

TIMED: Final = tuple(name for name, one in RETENTION.items() if one.default is not None)


def check(name: str, wanted: Period) -> Period:
    """What an operator wants for a class. Raises ValueError: longer than the default, or shorter than a law allows."""
    known = RETENTION[name]
    if known.default is None:
        raise ValueError(f"{name} has no period: it ends {known.end}")
    if not wanted.is_within(known.default):
        raise ValueError(f"{name} may be kept for {known.default} at most: shortened, never lengthened (P-10)")
    if known.least is not None and not known.least.is_within(wanted):
        raise ValueError(f"{name} must be kept for {known.least} at least ({known.anchor})")
    return wanted


def _of(name: str) -> AfterValidator:
    def validate(text: str) -> str:
        return str(check(name, period(text)))

    return AfterValidator(validate)


class RetentionSettings(BaseModel):
    """How long each class is kept; may be shortened, never lengthened beyond what stands here."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    r0: Annotated[str, _of("R0")] = Field(
        default="1 day", description="Payloads after the end of their job; goes at midnight UTC, so within 24 h."
    )
    r1: Annotated[str, _of("R1")] = Field(default="30 days", description="Security records (sealed addresses).")
    r2: Annotated[str, _of("R2")] = Field(default="13 months", description="Opens and clicks of single people.")
    r3: Annotated[str, _of("R3")] = Field(default="90 days", description="Send log; its sums are kept.")
    r4: Annotated[str, _of("R4")] = Field(default="3 years", description="Evidence of consent, after its use ended.")
    r6: Annotated[str, _of("R6")] = Field(default="3 years", description="Rights requests, disclosures, readings.")
    r7: Annotated[str, _of("R7")] = Field(default="7 years", description="Audit chain and proofs of destruction.")
    r8: Annotated[str, _of("R8")] = Field(default="6 years", description="Invoices: the law's own period.")

    def periods(self) -> dict[str, Period]:
        """Of every class that has one."""
        return {name: period(str(getattr(self, name.lower()))) for name in TIMED}
