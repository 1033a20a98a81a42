"""Expansion: every row in one place, the same chunk always alike, no more tracked or queued than agreed and needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.campaign import expand
from engine.campaign.expand import Prepared, Standing, Terms
from engine.campaign.job import Evidence, Recipient
from engine.campaign.people import Person
from engine.queue.lanes import PutRequest
from engine.queue.slices import Contents, Header, Lost, open_slice
from policy import keyspace
from policy.address import mref_of, normalise, parse, tag_of
from policy.drains import places_of
from policy.events import Event, Kind, Reason, decode_batch
from policy.gate import Mode
from policy.instants import SECOND_US, week_of
from policy.keys import Keyring
from policy.wire import Resolved

NOW = 1_795_000_000 * SECOND_US
LATER = "2026-03-01T10:00:00Z"
YES = Evidence(source="form", time=LATER, wording="v2")
GIVEN = 1_772_359_200 * SECOND_US  # LATER


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    folder: Path = tmp_path_factory.mktemp("expand") / "keys"
    return Keyring.create(folder, week_of(NOW))


def terms(**changes: Any) -> Terms:
    base = Terms(job=7, account=1, list_number=2, topic_number=0, job_key=b"k" * 32, expires_at=NOW + 3600 * SECOND_US)
    return replace(base, **changes)


def through(
    given_terms: Terms,
    keyring: Keyring,
    rows: Sequence[Recipient | None],
    *,
    facts: dict[str, Reason] | None = None,
    standing: Standing | None = None,
    chunk: int = 64,
) -> tuple[Prepared, list[Person], list[PutRequest]]:
    """The pure path whole; facts by address."""
    prepared = expand.prepare(given_terms, keyring, chunk, rows, 0, NOW)
    told = {
        question.partition: bytes(
            (facts or {}).get(person.wire, Reason.NONE) for person in prepared.people[question.partition]
        )
        for question in expand.questions(given_terms, keyring, prepared)
    }
    permitted = expand.decide(given_terms, prepared, told, standing or {}, 1.0)
    expand.number(permitted, [Resolved(n + 100, n + 200) for n in range(len(permitted))])
    return prepared, permitted, expand.shares(given_terms, keyring, prepared)


def slices_of(keyring: Keyring, shares: list[PutRequest]) -> list[tuple[int, int, Header, Contents]]:
    found = []
    for share in shares:
        for due, data in share.slices:
            opened = open_slice(keyring.queue, share.partition, data)
            assert not isinstance(opened, Lost), opened
            found.append((share.partition, due, *opened))
    return found


def events_of(shares: list[PutRequest]) -> list[Event]:
    return [event for share in shares for batch in share.events for event in decode_batch(batch).events]


def test_rows_become_slices_of_their_domains(keyring: Keyring) -> None:
    rows: list[Recipient | None] = [
        Recipient("Ada@One.example", name="Ada", fields={"city": "Graz", "secret": "unused"}),
        Recipient("bob@two.example", fields={"city": "Porto", "offers": ["tea", {"k": 1}], "name": "Bob"}),
        Recipient("carl@one.example", fields={"city": "Lyon", "name": "Carl"}),
    ]
    given_terms = terms(columns=frozenset({"name", "city", "offers"}), required=frozenset({"name", "city"}))
    _, permitted, shares = through(given_terms, keyring, rows)
    by_domain = {contents.domain: (part, header, contents) for part, _, header, contents in slices_of(keyring, shares)}
    assert set(by_domain) == {"one.example", "two.example"}
    part, header, contents = by_domain["one.example"]
    assert part == keyspace.partition_of("one.example")
    assert header.lane == keyspace.lane_ref("one.example", keyring.lane)
    assert (header.job, header.count, header.key_id) == (7, 2, keyring.queue_id)
    assert contents.columns == ["city", "name"]
    assert [(row.local, row.values) for row in contents.rows] == [("Ada", ["Graz", "Ada"]), ("carl", ["Lyon", "Carl"])]
    assert by_domain["two.example"][2].rows[0].values == ["Porto", "Bob", ["tea", {"k": 1}]]
    assert permitted[0].mref == mref_of(b"k" * 32, normalise("Ada", "one.example"))
    assert permitted[0].tag == tag_of(keyring.pepper, normalise("Ada", "one.example"))
    assert events_of(shares) == []


def test_slices_hold_at_most_sixty_four(keyring: Keyring) -> None:
    rows: list[Recipient | None] = [Recipient(f"p{n}@one.example") for n in range(150)]
    _, _, shares = through(terms(), keyring, rows)
    assert [header.count for _, _, header, _ in slices_of(keyring, shares)] == [64, 64, 22]


def test_what_is_no_address_is_refused_alone(keyring: Keyring) -> None:
    rows = [
        Recipient("nobody"),
        None,
        Recipient("a@b@c"),
        Recipient("a\r\nRCPT TO:<x>@b.example"),
        Recipient("ok@one.example"),
    ]
    _, permitted, shares = through(terms(), keyring, rows)
    assert len(permitted) == 1
    refused = events_of(shares)
    assert [(event.kind, event.reason) for event in refused] == [(Kind.REFUSED, Reason.INVALID)] * 4
    assert len({event.mref for event in refused}) == 4  # each row is its own: none may fold into another
    assert all(event.tag == b"" and event.pseudonym == 0 for event in refused)
    batches = [decode_batch(batch) for share in shares for batch in share.events]
    assert [(batch.domain, batch.chunk, batch.job) for batch in batches] == [("", 64, 7)]


def test_a_row_without_a_printed_field_is_refused(keyring: Keyring) -> None:
    rows: list[Recipient | None] = [
        Recipient("a@one.example", fields={"city": None}),
        Recipient("b@one.example"),
        Recipient("c@one.example", fields={"city": ""}),
        Recipient("d@one.example", fields={"city": "a\r\nBcc: x@y.example"}),
    ]
    given_terms = terms(columns=frozenset({"city"}), required=frozenset({"city"}), one_line=frozenset({"city"}))
    _, permitted, shares = through(given_terms, keyring, rows)
    assert [person.local for person in permitted] == ["c"]
    assert Counter(event.reason for event in events_of(shares)) == {Reason.INVALID: 3}


def test_facts_refuse_and_are_recorded_without_an_address(keyring: Keyring) -> None:
    rows: list[Recipient | None] = [Recipient(f"{name}@one.example") for name in ("a", "b", "c", "d")]
    facts = {"a@one.example": Reason.SUPPRESSED, "b@one.example": Reason.DUPLICATE, "c@one.example": Reason.ERASED}
    _, permitted, shares = through(terms(), keyring, rows, facts=facts)
    assert [person.local for person in permitted] == ["d"]
    assert [event.reason for event in events_of(shares)] == [Reason.SUPPRESSED, Reason.DUPLICATE, Reason.ERASED]
    assert events_of(shares)[0].tag == tag_of(keyring.pepper, "a@one.example")
    assert not any(b"one.example\x00" in batch or b"@one" in batch for share in shares for batch in share.events)


def test_a_fact_nobody_knows_refuses(keyring: Keyring) -> None:
    rows: list[Recipient | None] = [Recipient("a@one.example")]
    prepared = expand.prepare(terms(), keyring, 0, rows, 0, NOW)
    partition = keyspace.partition_of("one.example")
    assert expand.decide(terms(), prepared, {partition: b"\xfe"}, {}, 1.0) == []
    assert prepared.events[partition, "one.example"][0].reason == Reason.RESTRICTED


TAG = "a@one.example"


@pytest.mark.parametrize(
    ("own", "default", "given", "withdrawn", "agreed"),
    [
        (YES, None, 0, 0, True),
        (None, YES, 0, 0, True),
        (None, None, 0, 0, False),
        (None, None, GIVEN, 0, True),  # the ledger knows
        (None, None, GIVEN, GIVEN, False),  # at the same instant the withdrawal wins
        (YES, None, 0, GIVEN + 1, False),  # evidence never outranks a later withdrawal
        (YES, None, 0, GIVEN - 1, True),
        (Evidence(source="form"), None, 0, 0, False),  # without time
        (Evidence(time=LATER), None, 0, 0, False),  # without source
        (Evidence(source="  ", time=LATER), None, 0, 0, False),
        (Evidence(source="form", time="2027-01-01T00:00:00Z"), None, 0, 0, False),  # not yet
        (Evidence(source="form", time="soon"), None, 0, 0, False),
        (Evidence(source="form"), YES, 0, 0, False),  # the row's own word stands over the job's
    ],
)
def test_consent_is_the_latest_word(
    keyring: Keyring, own: Evidence | None, default: Evidence | None, given: int, withdrawn: int, agreed: bool
) -> None:
    purposes: tuple[Any, ...] = ("mail_marketing", "open_tracking", "click_tracking")
    row = Recipient(TAG, consent={} if own is None else dict.fromkeys(purposes, own))
    given_terms = terms(
        consent={} if default is None else dict.fromkeys(purposes, default),
        opens=Mode.INDIVIDUAL, clicks=Mode.AGGREGATE,
    )  # fmt: skip
    tag = tag_of(keyring.pepper, TAG)
    standing = {(tag, purpose): (given, withdrawn) for purpose in purposes}
    _, permitted, _ = through(given_terms, keyring, [row], standing=standing)
    assert (permitted[0].opens, permitted[0].clicks) == ((Mode.INDIVIDUAL, Mode.AGGREGATE) if agreed else (0, 0))
    _, permitted, shares = through(replace(given_terms, needs_consent=True), keyring, [row], standing=standing)
    assert len(permitted) == int(agreed)
    assert [event.reason for event in events_of(shares)] == ([] if agreed else [Reason.NO_CONSENT])


def test_nobody_is_tracked_more_than_the_job_asks(keyring: Keyring) -> None:
    row = Recipient(TAG, consent={"open_tracking": YES, "click_tracking": YES})
    _, permitted, shares = through(terms(), keyring, [row])
    assert (permitted[0].opens, permitted[0].clicks) == (Mode.OFF, Mode.OFF)
    _, _, _, contents = slices_of(keyring, shares)[0]
    assert (contents.rows[0].mode_opens, contents.rows[0].mode_clicks) == (0, 0)


def test_evidence_goes_to_the_ledger_once(keyring: Keyring) -> None:
    row = Recipient(TAG, consent={"mail_marketing": YES, "open_tracking": Evidence(source="form")})
    _, permitted, _ = through(terms(), keyring, [row])
    lines = expand.evidence(permitted, {})
    assert [(line.subject, line.purpose, line.basis, line.source, line.given_at) for line in lines] == [
        (100, "mail_marketing", "express", "form", GIVEN)
    ]
    known = {(tag_of(keyring.pepper, TAG), "mail_marketing"): (GIVEN, 0)}
    assert expand.evidence(permitted, known) == []


@pytest.mark.parametrize("fate", [Kind.CANCELLED, Kind.EXPIRED])
def test_rows_of_a_stopped_job_end_with_it(keyring: Keyring, fate: Kind) -> None:
    rows = [Recipient("a@one.example"), Recipient("nobody"), Recipient("b@two.example")]
    _, permitted, shares = through(terms(fate=fate), keyring, rows)
    assert permitted == []
    assert Counter(event.kind for event in events_of(shares)) == {fate: 2, Kind.REFUSED: 1}
    assert slices_of(keyring, shares) == []


def test_a_rate_spreads_what_is_due(keyring: Keyring) -> None:
    rows: list[Recipient | None] = [Recipient(f"p{n}@d{n % 4}.example") for n in range(100)]
    _, _, shares = through(terms(rate=10.0, due=NOW), keyring, rows)
    dues = sorted(due for _, due, _, _ in slices_of(keyring, shares))
    assert dues[0] == NOW
    assert all(NOW <= due <= NOW + 10 * SECOND_US for due in dues)
    assert len(dues) >= 10  # not four lumps of 25: slices of a slow job hold what is due together


addresses = st.one_of(
    st.sampled_from(["a@one.example", "A@one.example", "b@two.example", "c@three.example", "nobody", "x@", ""]),
    st.builds("{}@{}.example".format, st.text('abcé"\r\n ', min_size=1, max_size=4), st.sampled_from("pqr")),
)
recipients = st.one_of(
    st.none(),
    st.builds(
        Recipient,
        addresses,
        fields=st.dictionaries(st.sampled_from(["x", "y"]), st.none() | st.integers(0, 5) | st.text(max_size=3)),
        consent=st.dictionaries(st.just("mail_marketing"), st.sampled_from([YES, Evidence(source="s")])),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(recipients, max_size=40), st.booleans(), st.data())
def test_every_row_ends_in_exactly_one_place(
    keyring: Keyring, rows: list[Recipient | None], needs_consent: bool, data: st.DataObject
) -> None:
    """Law: every row ends in exactly one place, a slice or one refusal event; done twice, the same."""
    given_terms = terms(
        columns=frozenset({"x", "y"}), required=frozenset({"x"}), one_line=frozenset({"y"}), needs_consent=needs_consent
    )
    wires = {parse(row.address).wire for row in rows if row is not None and _is_address(row.address)}
    facts = {
        wire: data.draw(st.sampled_from([Reason.NONE, Reason.SUPPRESSED, Reason.DUPLICATE])) for wire in sorted(wires)
    }
    _, permitted, shares = through(given_terms, keyring, rows, facts=facts)
    queued = sum(header.count for _, _, header, _ in slices_of(keyring, shares))
    assert queued == len(permitted)
    assert queued + len(events_of(shares)) == len(rows)
    assert len({share.partition for share in shares}) == len(shares)
    _, _, again = through(given_terms, keyring, rows, facts=facts)
    assert [share.events for share in again] == [share.events for share in shares]
    assert [contents for *_, contents in slices_of(keyring, again)] == [
        contents for *_, contents in slices_of(keyring, shares)
    ]


def _is_address(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def test_a_chunk_expanded_anew_spares_whom_the_ledger_has(keyring: Keyring) -> None:
    """Redis came back older (T12): who has reached an end is neither put nor refused again, whatever is known now."""
    names = ["sent", "late", "barred", "new", "barred-now"]
    rows: list[Recipient | None] = [Recipient(f"{name}@one.example") for name in names]
    rows += [Recipient("late@one.example"), Recipient("late@one.example"), None]
    by_name = {name: mref_of(b"k" * 32, f"{name}@one.example") for name in names}
    prepared = expand.prepare(terms(), keyring, 64, rows, 0, NOW)
    people = prepared.people[keyspace.partition_of("one.example")]
    dup, no = Reason.DUPLICATE, Reason.SUPPRESSED
    facts = {people[0].partition: bytes([0, 0, no, 0, no, dup, dup])}
    permitted = expand.decide(terms(), prepared, facts, {}, 1.0)
    invalid = prepared.events[expand.INVALID_PARTITION, ""][0].mref
    ended = {by_name["sent"], by_name["barred"], by_name["barred-now"], invalid}

    left = expand.spare(prepared, permitted, ended, {by_name["late"]: 1})
    assert [person.local for person in left] == ["late", "new"]
    assert [person.local for some in prepared.people.values() for person in some] == ["late", "new"]
    told = [(event.mref, event.reason) for events in prepared.events.values() for event in events]
    assert told == [(by_name["late"], dup)], "of two repetitions the ledger has one"
    expand.number(left, [Resolved(1, 2), Resolved(3, 4)])
    shares = expand.shares(terms(), keyring, prepared)
    assert sum(header.count for _, _, header, _ in slices_of(keyring, shares)) == 2
    assert len(events_of(shares)) == 1


def test_the_places_of_a_chunk_are_its_own() -> None:
    ranges = [places_of(chunk) for chunk in (0, 1, 63, 64)]
    assert all(low <= high < 0 for low, high in ranges)
    assert len({n for low, high in ranges for n in (low, high)}) == 8
    assert ranges[1][1] == ranges[0][0] - 1
