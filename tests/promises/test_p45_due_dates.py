"""P-45: a request has a ticket, a due date by the law that applies, and one extension at most, told before it."""

from __future__ import annotations

import calendar
from datetime import UTC, date, datetime, timedelta

import pytest

from policy.instants import DAY_US, rfc3339
from policy.jobs import Refused
from policy.rights import due as dates
from policy.rights.due import Calendar, last_day
from tests.promises.floor import EVE, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


def noon(day: date) -> int:
    return calendar.timegm((day.year, day.month, day.day, 12, 0, 0)) * 1_000_000


def _thirty_one_days(day: date, months: int) -> date:
    return day + timedelta(days=31 * months)


@promise("P-45", off={"policy.rights.due.add_months": _thirty_one_days})
@pytest.mark.parametrize(
    ("received", "last"),
    [(date(2025, 1, 31), date(2025, 2, 28)), (date(2024, 1, 31), date(2024, 2, 29))],
)
def test_p45_a_request_of_31_january_is_due_at_the_end_of_february(received: date, last: date) -> None:
    """Regulation 1182/71 3(2)(c): no such day, so the last of the month."""
    assert last_day("gdpr", noon(received), Calendar(UTC)) == last


@promise("P-45", off={"policy.rights.due.RULES": dict.fromkeys(dates.RULES, dates.RULES["gdpr"])})
@pytest.mark.parametrize(("law", "days"), [("pipeda", 30), ("ccpa", 45), ("bc", 42), ("quebec", 30)])
def test_p45_every_law_counts_its_own_time(law: str, days: int) -> None:
    """30 days, 45 days, 30 business days of weeks without holidays."""
    received = date(2026, 2, 2)
    assert last_day(law, noon(received), Calendar(UTC)) == received + timedelta(days=days)


def _some_day(law: str, received: int, calendar_: Calendar, *, extended: bool = False) -> int:
    return received + 400 * DAY_US


@promise("P-45", off={"policy.rights.due.due": _some_day})
async def test_p45_an_extension_has_its_letter_before_the_due_date_and_comes_once(floor: Floor) -> None:
    told = await floor.desk.op_rights_open("access", EVE, channel="letter")
    assert told["ticket"].startswith("R-")
    assert rfc3339(told["due"]) == "2026-12-23T00:00:00.000000Z"  # asked on 22 November
    extended = await floor.desk.op_rights_extend(told["ticket"], "many requests at once")
    assert datetime.fromtimestamp(extended["due"] / 1e6, UTC).date() == date(2027, 2, 23)
    [letter] = floor.house.letters("extended")
    assert "many requests at once" in letter
    with pytest.raises(Refused, match="once"):
        await floor.desk.op_rights_extend(told["ticket"], "again")
    late = await floor.desk.op_rights_open("portability", EVE, channel="letter")
    floor.house.now = late["due"]
    with pytest.raises(Refused, match="over"):
        await floor.desk.op_rights_extend(late["ticket"], "forgot")
    assert len(floor.house.letters("extended")) == 1


@promise("P-45", off={"policy.rights.requests._step": lambda *asked: 0})
async def test_p45_whatever_the_channel_it_is_on_record_with_receipt_and_steps(floor: Floor) -> None:
    for channel in ("api", "cli", "mail", "letter", "page"):
        told = await floor.desk.op_rights_open("access", f"{channel}@example.com", channel=channel)
        steps = (await floor.desk.op_rights_show(told["ticket"]))["steps"]
        assert steps[:1] != []
        assert steps[0]["act"] == "open"
    assert len(floor.house.letters("acknowledged")) == 5
