"""P-43: the account of the use that was made, by purpose with counts and dates, recipients by name."""

from __future__ import annotations

from typing import Any

from policy.instants import DAY_US, HOUR_US, rfc3339
from tests.promises.floor import NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


@promise("P-43", off={"policy.bundle.contents.uses": lambda records: []})
async def test_p43_three_sends_one_view_one_disclosure_are_told_by_purpose_and_date(floor: Floor) -> None:
    """Computed from the send log, the log of reads and the ledger of disclosures."""
    used: dict[Any, Any] = {
        (one.values["purpose"], one.values["recipient"]): (
            one.values["count"], one.values["first"], one.values["last"]
        )
        for one in await floor.told()
        if one.kind == "use"
    }  # fmt: skip
    first, last = rfc3339(NOW - 40 * DAY_US + HOUR_US), rfc3339(NOW - 3 * DAY_US + HOUR_US)
    assert used.get(("to send you messages", "")) == (3, first, last)
    assert used.get(("consultation: support", "")) == (1, rfc3339(NOW), rfc3339(NOW))
    assert used.get(("disclosure: inquiry", "Police")) == (1, rfc3339(NOW), rfc3339(NOW))


@promise("P-43", off={"policy.bundle.contents.DELIVERING": "to send you messages, again"})
async def test_p43_the_provider_of_the_mailbox_is_named_as_a_recipient(floor: Floor) -> None:
    """Delivering a message discloses it to whoever runs the mailbox."""
    used = {one.values["purpose"]: one.values for one in await floor.told() if one.kind == "use"}
    told = used.get("to deliver messages to you", {})
    assert (told.get("recipient"), told.get("count")) == ("the mail provider of example.com", 2)
