"""The account of use, and what stands where."""

from __future__ import annotations

from policy.bundle.contents import ACCESS, KINDS, sort, uses
from policy.personal import Record, Value


def _message(at: str, outcome: str = "delivered") -> Record:
    return Record("message", {"account": "acme", "job": "j", "outcome": outcome, "at": at, "domain": "example.com"})


def test_p43_three_sends_one_look_one_disclosure_are_told_as_such() -> None:
    records = [
        _message("2026-03-02T00:00:00.000000Z"),
        _message("2026-01-01T00:00:00.000000Z"),
        _message("2026-02-01T00:00:00.000000Z", "bounced"),
        _message("2026-04-01T00:00:00.000000Z", "refused"),
        Record("consultation", {"at": "2026-05-01T00:00:00.000000Z", "purpose": "support", "actor": "support"}),
        Record(
            "disclosure",
            {"at": "2026-06-01T00:00:00.000000Z", "purpose": "criminal inquiry", "recipient": "Police of Oslo"},
        ),
        Record("event", {"event": "opened", "at": "2026-03-02T01:00:00.000000Z"}),
        Record("event", {"event": "deferred", "at": "2026-03-02T00:00:00.000000Z"}),
    ]
    told = {
        (use.values["purpose"], use.values["recipient"]): (use.values["count"], use.values["first"], use.values["last"])
        for use in uses(records)
    }

    def span(first: str, last: str = "") -> tuple[str, str]:
        return f"2026-{first}:00:00.000000Z", f"2026-{last or first}:00:00.000000Z"

    assert told == {
        ("to send you messages", ""): (3, *span("01-01T00", "03-02T00")),
        ("to deliver messages to you", "the mail provider of example.com"): (2, *span("01-01T00", "03-02T00")),
        ("not to write to you any more", ""): (1, *span("04-01T00")),
        ("consultation: support", ""): (1, *span("05-01T00")),
        ("disclosure: criminal inquiry", "Police of Oslo"): (1, *span("06-01T00")),
        ("to know whether messages are read", ""): (1, *span("03-02T01")),
    }


def test_a_use_without_a_date_is_counted_all_the_same() -> None:
    [use] = uses([Record("consultation", {"purpose": "support"})])
    assert use.values == {"purpose": "consultation: support", "recipient": "", "count": 1, "first": None, "last": None}


def test_mixed_and_missing_values_have_a_place_too() -> None:
    odd: list[dict[str, Value]] = [{"at": 5}, {"at": None}, {"at": "x"}, {}, {"at": True}]
    one = sort([Record("consultation", dict(values)) for values in odd], ACCESS)["consultation"]
    other = sort([Record("consultation", dict(values)) for values in reversed(odd)], ACCESS)["consultation"]
    assert one == other
    assert len(one) == 5


def test_files_and_kinds_are_one_to_one() -> None:
    assert len({kind.file for kind in KINDS.values()}) == len(KINDS)
    for kind in KINDS.values():
        names = [field.name for field in kind.fields]
        assert len(set(names)) == len(names)
        assert set(kind.order) <= set(names)
