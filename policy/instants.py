"""Instants: integer microseconds since the epoch, UTC, everywhere (design decision 5).

Pure: the clock is read elsewhere and passed in. A week is the number of whole weeks since the epoch (they begin on
Thursday, 00:00 UTC); it names keys and pseudonyms, nobody reads it.

Known limits: leap seconds do not exist here, as in POSIX time. The text form is RFC 3339 with six digits of fraction,
so that it sorts like the number.
"""

from __future__ import annotations

import calendar
import re
from datetime import UTC, date, datetime, timedelta

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US
WEEK_US = 7 * DAY_US

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST_US = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST_US = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
# RFC 3339 5.6. datetime.fromisoformat alone takes more ("2026-W01-1T00", no offset), so the shape is asked first.
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def week_of(at_us: int) -> int:
    """Whole weeks since the epoch."""
    return at_us // WEEK_US


def day_of(at_us: int) -> int:
    """Whole days since the epoch, UTC: what ``day`` columns hold for the sweeps."""
    return at_us // DAY_US


def hour_of(at_us: int) -> int:
    """Whole hours since the epoch, UTC: as fine as a consented hit is kept."""
    return at_us // HOUR_US


def rfc3339(at_us: int) -> str:
    """``2026-11-22T19:44:00.000000Z``. Raises OverflowError outside the years 1 to 9999."""
    # not strftime: its %Y writes the year 999 with three digits on Linux
    return (_EPOCH + timedelta(microseconds=at_us)).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_rfc3339(text: str) -> int:
    """Microseconds since the epoch of an RFC 3339 date-time with its offset; finer fractions are cut.

    Raises ValueError on anything else, on a time without an offset above all: whose midnight would it be?
    """
    if not isinstance(text, str) or not _RFC3339.fullmatch(text):
        raise ValueError("not an RFC 3339 date-time with an offset, such as 2026-11-22T19:44:00Z")
    head, dot, tail = text.partition(".")
    if dot:  # fromisoformat of 3.11 refuses some lengths of fraction; nine digits are cut to six
        digits = re.match(r"[0-9]+", tail)
        assert digits is not None
        text = f"{head}.{digits[0][:6]:0<6}{tail[digits.end() :]}"
    at_us = (datetime.fromisoformat(text.upper()) - _EPOCH) // _MICROSECOND
    if not _FIRST_US <= at_us <= _LAST_US:  # 0001-01-01T00:00:00+01:00
        raise ValueError("a date-time outside the years 1 to 9999")
    return at_us


def add_months(day: date, months: int) -> date:
    """The same number in a later month, or that month's last day (Regulation 1182/71, 3(2)(c))."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
