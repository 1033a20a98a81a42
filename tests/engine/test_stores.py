"""What the engine's places know of a person without an address: rows, texts and payloads that name them, no others."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.campaign import expand, naming
from engine.campaign.naming import BLANK_LINE, Naming
from engine.campaign.unexpanded import shown
from engine.campaign.validation import read_row
from engine.stores import Queue
from policy import files, keyspace
from policy.address import normalise, parse, tag_of
from policy.events import Kind, Reason
from policy.keys import Keyring
from policy.personal import PersonalStore
from tracker.stores import Hits

PEPPER, LANE_KEY = b"p" * 32, b"l" * 32
ADA = "Ada.Lovelace@Engines.example"


def naming_of(address: str, *, lane: bool = True) -> Naming:
    mailbox = parse(address)
    tag = tag_of(PEPPER, normalise(mailbox.local, mailbox.domain))
    lane_ref = keyspace.lane_ref(mailbox.domain, LANE_KEY) if lane else ""
    return Naming(tag, keyspace.partition_of(mailbox.domain), lane_ref, PEPPER, LANE_KEY)


@pytest.mark.parametrize("lane", [True, False])
def test_an_address_is_known_in_every_spelling_of_one_tag(lane: bool) -> None:
    test = naming_of(ADA, lane=lane)
    for same in (ADA, ADA.lower(), ADA.upper(), '"ada.lovelace"@engines.example'):
        mailbox = parse(same)
        assert tag_of(PEPPER, normalise(mailbox.local, mailbox.domain)) == test._tag
        assert test.is_theirs(same), same
    for other in (
        "ada@engines.example",
        "ada.lovelace@engine.example",
        "",
        "@",
        "ada.lovelace",
        "x" * 400 + "@engines.example",
    ):
        assert not test.is_theirs(other), other


def test_an_international_domain_is_one_domain() -> None:
    test = naming_of("zoë@bücher.example")
    assert test.is_theirs("zoë@xn--bcher-kva.example")
    assert not test.is_theirs("zoe@bücher.example")


@pytest.mark.parametrize(
    "text",
    [
        "write to ada.lovelace@engines.example, please", "<ada.lovelace@engines.example>",
        "mailto:ADA.LOVELACE@engines.example?x=1",
        "to=ada.lovelace@engines.example", "a@b.example;ada.lovelace@engines.example",
        "see ada.lovelace@engines.example.",
        "@@ada.lovelace@engines.example",
    ],
)  # fmt: skip
def test_an_address_is_found_in_a_text(text: str) -> None:
    assert naming_of(ADA).in_text(text)
    assert not naming_of("bob@engines.example").in_text(text)


def test_a_payload_of_megabytes_without_an_address_costs_no_more_than_reading_it() -> None:
    """Four million letters that could all begin an address: looked for from the sign, not from each letter."""
    text = "a" * 4_000_000
    assert not naming_of(ADA).in_text(text)
    assert naming_of(ADA).in_text(text + " ada.lovelace@engines.example")


@pytest.mark.parametrize(
    "payload",
    [
        {"recipients": [{"address": ADA}]},
        {"recipients": [{"address": "x@y.example", "fields": {"friend": [{"mail": ADA}]}}]},
        {ADA: 1},
        {"html": f"<p>written by {ADA}</p>"},
    ],
)
def test_a_payload_names_somebody_wherever_it_does(payload: dict[str, Any]) -> None:
    data = json.dumps(payload).encode()
    assert naming_of(ADA).in_json(data)
    assert naming_of(ADA).in_json(data + b"}")  # broken: read as text
    assert naming_of(ADA).in_json(json.dumps(payload).replace("@", "\\u0040").encode())
    assert not naming_of("eve@engines.example").in_json(data)


ROW = st.fixed_dictionaries(
    {"address": st.sampled_from([ADA, ADA.lower(), "bob@engines.example", "eve@other.example", "nobody"])},
    optional={
        "name": st.text(max_size=8),
        "fields": st.dictionaries(st.sampled_from(["town", "friend"]), st.sampled_from([ADA, "York", 7]), max_size=2),
    },
)
LINE = st.one_of(
    ROW.map(lambda row: json.dumps(row).encode()), st.sampled_from([b"", b"  ", b"{", b'"x"', b'{"address": 3}'])
)


@given(st.lists(LINE, max_size=20))
def test_blanking_touches_the_persons_rows_alone(lines: list[bytes]) -> None:
    """Same number of lines, the others byte for byte; nothing left to find; again changes nothing."""
    data = b"\n".join(lines)
    theirs = naming.places(data, naming_of(ADA))

    after = naming.blanked(data, theirs)

    wanted = {
        at
        for at, line in enumerate(lines)
        if (row := naming.fields_of(line)) and str(row["address"]).lower() == ADA.lower()
    }
    assert set(theirs) == wanted
    assert after.split(b"\n") == [BLANK_LINE if at in wanted else line for at, line in enumerate(lines or [b""])]
    assert naming.places(after, naming_of(ADA)) == []


@given(st.lists(LINE, max_size=20), st.sampled_from(["town", "name", "street"]))
def test_correcting_touches_one_field_of_the_persons_rows(lines: list[bytes], field: str) -> None:
    data = b"\n".join(lines)
    theirs = naming.places(data, naming_of(ADA))

    after, changed = naming.corrected(data, theirs, field, "Paris")

    assert naming.corrected(after, theirs, field, "Paris") == (after, 0)
    touched = 0
    for at, (old, new) in enumerate(zip(lines or [b""], after.split(b"\n"), strict=True)):
        row, now = naming.fields_of(old), naming.fields_of(new)
        has = at in theirs and (field in row.get("fields", {}) or (field == "name" and "name" in row))
        if not has:
            assert old == new
            continue
        touched += 1
        assert now == (
            {**row, "name": "Paris"} if field == "name" else {**row, "fields": {**row["fields"], field: "Paris"}}
        )
    assert changed == touched


def test_a_corrected_row_is_not_longer_than_a_row_may_be() -> None:
    line = json.dumps({"address": ADA, "fields": {"town": "York"}}).encode()
    with pytest.raises(ValueError, match="longer"):
        naming.corrected(line, [0], "town", "x" * 30_000)


def test_a_row_that_cannot_be_read_is_theirs_all_the_same() -> None:
    twice = b'{"address": "x@y.example", "address": "ada.lovelace@engines.example"}'
    cut = b'{"address": "ada.lovelace@engines.example", '
    unknown = b'{"address": "ada.lovelace@engines.example", "age": 36}'
    assert naming.places(b"\n".join([twice, cut, unknown, b"{}"]), naming_of(ADA)) == [0, 1, 2]


def test_expansion_refuses_a_blank_row_as_erased_and_asks_nobody(tmp_path: Any) -> None:
    keyring = Keyring.create(tmp_path / "keys", 2967)
    terms = expand.Terms(1, 2, 0, 0, b"k" * 32, expires_at=10)
    blank = read_row(BLANK_LINE)
    assert blank is not None
    rows = [read_row(b'{"address": "bob@engines.example"}'), blank, None]

    prepared = expand.prepare(terms, keyring, 3, rows, 0, 5)

    assert [person.local for people in prepared.people.values() for person in people] == ["bob"]
    [events] = prepared.events.values()
    assert [(event.kind, event.reason, event.tag) for event in events] == [
        (Kind.REFUSED, Reason.ERASED, b""), (Kind.REFUSED, Reason.INVALID, b""),
    ]  # fmt: skip
    assert len({event.mref for event in events}) == 2


def test_an_export_shows_plain_values() -> None:
    row = {"address": ADA, "name": "Ada", "fields": {"points": 3, "tags": ["a"], "none": None, "on": True}}
    assert shown(row) == {
        "address": ADA, "name": "Ada", "fields.points": 3, "fields.tags": '["a"]', "fields.none": None,
        "fields.on": True,
    }  # fmt: skip


# --- the census -----------------------------------------------------------------------------------------------------


def covered(*places: type[PersonalStore]) -> list[str]:
    return [name for place in places for name in place.covers]


def test_every_key_and_file_of_these_floors_that_may_hold_a_person_has_one_place() -> None:
    """Keys and files of the engine and the tracker whose inventory says "personal" are covered once."""
    of_ours = re.compile(r"engine\b|tracker\b")
    holding = [f"key:{one.name}" for one in keyspace.CATALOGUE if one.personal != "none" and of_ours.match(one.owner)]
    holding += [f"file:{one.name}" for one in files.CATALOGUE if one.personal != "none" and of_ours.match(one.owner)]
    assert sorted(covered(Queue, Hits)) == sorted(holding)


def test_what_is_covered_is_in_the_inventory() -> None:
    known = {f"key:{one.name}" for one in keyspace.CATALOGUE} | {f"file:{one.name}" for one in files.CATALOGUE}
    assert set(covered(Queue, Hits)) <= known
