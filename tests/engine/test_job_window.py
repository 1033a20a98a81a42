"""The delivery window from a producer's words to lanes and delivery: refused with a way out, or carried whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.campaign import acceptance, expand
from engine.campaign.job import Recipient, schema
from engine.campaign.problems import Problem
from engine.campaign.validation import Reading, read
from engine.queue.slices import Lost, parse_header
from engine.queue.windows import Timing, Window
from policy.accounts import Account
from policy.instants import DAY_US, HOUR_US, SECOND_US, parse_rfc3339, rfc3339, week_of
from policy.keys import Keyring, open_sealed
from policy.wire import JobRecord, Resolved, job_aad
from tests.engine.test_expand import terms
from tests.engine.test_job import good

NIGHT = parse_rfc3339("2026-11-20T22:00:00Z")  # a Friday, 23:00 in Berlin
OFFICE = {"from": "08:00", "to": "20:00", "zone": "Europe/Berlin"}
WEEKDAYS = {**OFFICE, "days": ["mon", "tue", "wed", "thu", "fri"]}
MONDAY = parse_rfc3339("2026-11-23T07:00:00Z")


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    folder: Path = tmp_path_factory.mktemp("window") / "keys"
    return Keyring.create(folder, week_of(NIGHT))


def reading(window: Any, now: int = NIGHT, **changes: Any) -> Reading:
    job = good(created_at=rfc3339(now), window=window, postal_address="1 Road, Town", **changes)
    return read(json.dumps(job).encode(), now)


def problems(window: Any, **changes: Any) -> list[Problem]:
    return reading(window, **changes).problems


def recorded(keyring: Keyring, window: Any, **changes: Any) -> JobRecord:
    account = Account(1, "acme", "Acme", "1 Road, Town", "", "", "active", 0, 0, 0)
    review = acceptance.review(reading(window, **changes), account, {"acme.example"})
    assert review.problems == []
    return acceptance.record(review, keyring, NIGHT, {}, "1-1")


@pytest.mark.parametrize(
    "window",
    [
        None, OFFICE, WEEKDAYS, {**OFFICE, "from": "22:00", "to": "06:00"}, {**OFFICE, "to": "24:00"},
        {**OFFICE, "from": "00:00", "to": "24:00", "zone": "America/Argentina/Ushuaia"}, {**OFFICE, "zone": "UTC"},
    ],
)  # fmt: skip
def test_windows_that_are_taken(window: Any) -> None:
    assert problems(window) == []


@pytest.mark.parametrize(
    ("change", "place", "said", "suggested"),
    [
        ({"zone": "Europe/Berlim"}, "$.window.zone", "not a time zone", "'Europe/Berlin'"),
        ({"zone": "europe/berlin"}, "$.window.zone", "not a time zone", "'Europe/Berlin'"),
        ({"zone": "Berlin"}, "$.window.zone", "not a time zone", "'Europe/Berlin'"),
        ({"zone": "new york"}, "$.window.zone", "not a time zone", "'America/New_York'"),
        ({"zone": "Middle Earth"}, "$.window.zone", "not a time zone", "an IANA name"),
        ({"zone": "../../etc/localtime"}, "$.window.zone", "not a time zone", ""),
        ({"zone": "posix/Europe/Berlin"}, "$.window.zone", "not a time zone", "'Europe/Berlin'"),
        ({"zone": ""}, "$.window.zone", "empty", ""),
        ({"zone": None}, "$.window.zone", "expected text", ""),
        ({"from": "8:00"}, "$.window.from", "too short", ""),
        ({"from": "24:00"}, "$.window.from", "not allowed", "must match"),
        ({"to": "20:60"}, "$.window.to", "not allowed", "must match"),
        ({"to": "24:01"}, "$.window.to", "not allowed", "must match"),
        ({"to": "20:00\n"}, "$.window.to", "too long", ""),
        ({"from": 8}, "$.window.from", "expected text", "quotes"),
        ({"to": "08:00"}, "$.window.to", "always, or never", "24:00"),
        ({"days": []}, "$.window.days", "too few", ""),
        ({"days": ["monday"]}, "$.window.days[0]", "not one of", "'mon'"),
        ({"days": ["mon", "mon"]}, "$.window.days", "twice", "keep one"),
        ({"days": "mon"}, "$.window.days", "expected a list", ""),
        ({"untill": "20:00"}, "$.window.untill", "no such field", ""),
    ],
)  # fmt: skip
def test_windows_that_are_none_are_refused_with_a_way_out(
    change: dict[str, Any], place: str, said: str, suggested: str
) -> None:
    [found] = problems({**OFFICE, **change})

    assert found.path == place
    assert said in found.message
    assert suggested in found.suggestion


def test_every_mistake_of_a_window_is_told_at_once() -> None:
    found = problems({"from": "25:00", "to": 9, "zone": "Atlantis", "days": ["sunday", "x"]})

    assert {problem.path for problem in found} == {
        "$.window.from", "$.window.to", "$.window.zone", "$.window.days[0]", "$.window.days[1]",
    }  # fmt: skip


def test_a_window_that_opens_too_late_is_refused_before_anything_is_queued() -> None:
    [found] = problems(WEEKDAYS, expires_at=rfc3339(NIGHT + DAY_US))

    assert (found.path, "does not open before" in found.message) == ("$.window", True)
    assert problems(WEEKDAYS, expires_at=rfc3339(MONDAY + 1)) == []
    assert problems(OFFICE, expires_at=rfc3339(NIGHT + DAY_US)) == []


def test_the_schema_says_what_a_window_is() -> None:
    described = schema()["$defs"]

    assert set(described["Hours"]["required"]) == {"from", "to", "zone"}
    assert described["Hours"]["additionalProperties"] is False
    assert described["Hours"]["properties"]["days"]["items"]["enum"] == sorted(
        ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    )
    assert "window" in described["Job"]["properties"]


def test_another_window_is_another_job() -> None:
    assert len({reading(window).hash for window in (None, OFFICE, WEEKDAYS)}) == 3
    assert reading(OFFICE).hash == reading(dict(reversed(OFFICE.items()))).hash


def test_what_is_accepted_is_what_expansion_and_delivery_read(keyring: Keyring) -> None:
    kept = recorded(keyring, WEEKDAYS, send_at=rfc3339(NIGHT + HOUR_US))
    payload = open_sealed(keyring.service, kept.payload, job_aad("payload", "acme", "letter-47"))
    window = Window(8 * 60, 20 * 60, "Europe/Berlin", 0b0011111)

    assert acceptance.opened(payload)[1].window == window
    assert msgspec.msgpack.decode(payload, type=Timing) == Timing(window)
    assert kept.send_at == NIGHT + HOUR_US  # what the producer said stays as it is


@pytest.mark.parametrize(("kind", "days"), [("campaign", 3), ("transactional", 5)])
def test_the_default_life_counts_from_the_first_opening(keyring: Keyring, kind: str, days: int) -> None:
    assert recorded(keyring, None, kind=kind).expires_at == NIGHT + days * DAY_US
    assert recorded(keyring, WEEKDAYS, kind=kind).expires_at == MONDAY + days * DAY_US
    later = rfc3339(MONDAY + DAY_US)
    assert recorded(keyring, WEEKDAYS, kind=kind, expires_at=later).expires_at == MONDAY + DAY_US


def test_a_payload_of_before_there_were_windows_has_none(keyring: Keyring) -> None:
    kept = recorded(keyring, OFFICE)
    payload = open_sealed(keyring.service, kept.payload, job_aad("payload", "acme", "letter-47"))
    plain = msgspec.msgpack.decode(payload)
    plain["expansion"] = plain["expansion"][:-1]
    del plain["window"]
    older = msgspec.msgpack.encode(plain)

    assert acceptance.opened(older)[1].window is None
    assert msgspec.msgpack.decode(older, type=Timing).window is None


def dues(keyring: Keyring, given: expand.Terms, count: int = 1) -> list[int]:
    """When the first attempt of each of so many people is due, in the order of rows."""
    rows = [Recipient(f"p{n}@one.example") for n in range(count)]
    prepared = expand.prepare(given, keyring, 0, rows, 0, NIGHT)
    facts = {question.partition: bytes(len(question.rows)) for question in expand.questions(given, keyring, prepared)}
    permitted = expand.decide(given, prepared, facts, {}, 1.0)
    expand.number(permitted, [Resolved(n + 1, n + 1) for n in range(count)])
    made = []
    for share in expand.shares(given, keyring, prepared):
        for due, data in share.slices:
            header = parse_header(data)
            assert not isinstance(header, Lost)
            made += [due] * header.count
    return sorted(made)


WINDOW = Window(8 * 60, 20 * 60, "Europe/Berlin", 0b0011111)


def test_the_first_attempt_is_due_when_the_window_opens(keyring: Keyring) -> None:
    closed, shut = terms(window=WINDOW, expires_at=NIGHT + 7 * DAY_US), [MONDAY]

    assert dues(keyring, closed) == shut
    assert dues(keyring, replace(closed, due=NIGHT + DAY_US)) == shut  # send_at on a Saturday
    assert dues(keyring, replace(closed, due=MONDAY + HOUR_US)) == [MONDAY + HOUR_US]
    assert dues(keyring, replace(closed, window=Window(0, 1440, "UTC"))) == [0]  # open now: at once
    assert dues(keyring, replace(closed, window=None)) == [0]


def test_a_rate_does_not_pile_up_what_the_night_has_held_back(keyring: Keyring) -> None:
    start = parse_rfc3339("2026-11-20T18:59:50Z")  # ten seconds before it closes
    made = dues(keyring, terms(window=WINDOW, rate=1.0, due=start, expires_at=NIGHT + 7 * DAY_US), 30)

    assert made == [start + n * SECOND_US for n in range(10)] + [MONDAY + n * SECOND_US for n in range(20)]


def test_what_would_begin_after_its_expiry_is_due_at_its_expiry(keyring: Keyring) -> None:
    """Without a rate the lanes bound a due instant by the expiry (`lay`); a rate is not worked out any further."""
    made = dues(keyring, terms(window=WINDOW, rate=0.001, due=NIGHT, expires_at=MONDAY + HOUR_US), 50)

    assert made[0] == MONDAY
    assert max(made) == MONDAY + HOUR_US
