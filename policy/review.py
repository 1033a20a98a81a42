"""The dated review of the configuration: what an installation promises is what somebody set, so somebody looks (P-39).

Laws: older than `MONTHS` is a mistake where a configuration is checked (`sales-push config --check`, which a deployment
asks before it rolls out), and an error in the log of every start of the policy; in the month before it is a warning.
Mail is not stopped by a calendar. A day to come is a mistake: nobody has looked then.

    standing     of the day that `policy.reviewed` names, on a day
    words        what is wrong and what to do, for a person
"""

from __future__ import annotations

from datetime import date
from enum import Enum
from typing import Final

from policy.instants import add_months

MONTHS: Final = 12
NOTICE_MONTHS: Final = 1
SETTING: Final = "policy.reviewed"
_DO: Final = "go through the configuration with the privacy officer and write the day there"


class Standing(Enum):
    """CURRENT: nothing to do. DUE: within NOTICE_MONTHS. The others: no review that counts."""

    CURRENT = "current"
    DUE = "due"
    OVERDUE = "overdue"
    AHEAD = "ahead"
    NEVER = "never"

    @property
    def is_wrong(self) -> bool:
        """Whether a check of the configuration fails. One that never had a day is warned of: it may be a rehearsal."""
        return self in (Standing.OVERDUE, Standing.AHEAD)


def until(reviewed: date) -> date:
    """The last day on which that review counts."""
    return add_months(reviewed, MONTHS)


def standing(reviewed: date | None, today: date) -> Standing:
    if reviewed is None:
        return Standing.NEVER
    if reviewed > today:
        return Standing.AHEAD
    if today > until(reviewed):
        return Standing.OVERDUE
    return Standing.DUE if add_months(today, NOTICE_MONTHS) > until(reviewed) else Standing.CURRENT


def words(reviewed: date | None, today: date) -> tuple[str, str] | None:
    """(what is the matter, what to do); None where nothing is."""
    if reviewed is None:
        return "nobody is reminded of the yearly review (P-39)", _DO
    told = {
        Standing.AHEAD: f"{reviewed} is a day to come",
        Standing.OVERDUE: f"the last review was on {reviewed}, more than {MONTHS} months ago (P-39)",
        Standing.DUE: f"the review of {reviewed} counts until {until(reviewed)} (P-39)",
    }.get(standing(reviewed, today))
    return (told, _DO) if told is not None else None
