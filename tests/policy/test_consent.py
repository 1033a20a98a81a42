"""The consent ledger: evidence counts when it is dated and sourced, and never against a later withdrawal."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine

from policy import consent, negative
from policy.consent import Act, Evidence
from policy.instants import parse_rfc3339
from policy.schema import consent as table
from policy.wire import ConsentRow

NOW = 1_795_376_640_000_000
DAY = 86_400_000_000
GIVEN = Evidence(7, "open_tracking", "express", "v1", "sign-up form", NOW - DAY)


def test_evidence_is_entered_once_and_holds(conn: Connection) -> None:
    assert consent.record(conn, [GIVEN, replace(GIVEN, subject=8)], NOW) == 2
    assert consent.record(conn, [GIVEN], NOW + 1) == 1  # every campaign repeats it
    assert consent.standing(conn, [7, 8, 9], "open_tracking", NOW) == {7, 8}
    assert consent.standing(conn, [7], "click_tracking", NOW) == set()
    [act] = consent.history(conn, 7)
    assert act == Act("open_tracking", "express", "v1", "sign-up form", NOW - DAY, NOW, False, None)


@pytest.mark.parametrize(
    "change",
    [
        {"given_at": 0},
        {"given_at": -1},
        {"source": ""},
        {"source": "  "},
        {"purpose": "resale"},
        {"basis": "because"},
        {"given_at": NOW + consent.FUTURE_ALLOWANCE_US + 1},
    ],
)
def test_without_time_source_or_a_known_word_it_counts_as_none(conn: Connection, change: dict[str, object]) -> None:
    evidence = replace(GIVEN, **change)  # type: ignore[arg-type]  # values of several types, by name
    assert not consent.is_evidence(evidence, NOW)
    assert consent.record(conn, [evidence], NOW) == 0
    assert consent.history(conn, 7) == []


def test_a_withdrawal_outranks_evidence_of_before_whenever_it_is_entered(conn: Connection) -> None:
    """Decision 19: a job that carries last year's sign-up does not undo last week's withdrawal."""
    seq = consent.withdraw(conn, 7, "open_tracking", "preferences page", NOW - 10)
    consent.record(conn, [GIVEN, replace(GIVEN, given_at=NOW - 10)], NOW)
    assert consent.standing(conn, [7], "open_tracking", NOW) == set()
    assert consent.withdrawn(conn, [7, 8], "open_tracking") == {7: NOW - 10}
    assert seq is not None
    assert negative.load(conn) == ({7}, seq)
    consent.record(conn, [replace(GIVEN, given_at=NOW - 9)], NOW)
    assert consent.standing(conn, [7], "open_tracking", NOW) == {7}


def test_withdrawing_from_mail_is_no_matter_of_the_trackers(conn: Connection) -> None:
    assert consent.withdraw(conn, 7, "mail_marketing", "page", NOW) is None
    assert negative.load(conn) == (set(), 0)
    with pytest.raises(ValueError, match="unknown purpose"):
        consent.withdraw(conn, 7, "mail", "page", NOW)


def test_implied_consent_ends_at_its_instant(conn: Connection) -> None:
    consent.record(conn, [replace(GIVEN, basis="implied", expires_at=NOW)], NOW - 5)
    assert consent.standing(conn, [7], "open_tracking", NOW - 1) == {7}
    assert consent.standing(conn, [7], "open_tracking", NOW) == set()


def test_standing_of_more_people_than_one_statement_takes(conn: Connection) -> None:
    consent.record(conn, [replace(GIVEN, subject=n) for n in range(0, 1300, 2)], NOW)
    assert consent.standing(conn, range(1300), "open_tracking", NOW) == set(range(0, 1300, 2))


acts = st.builds(
    Act,
    purpose=st.just("doe"),
    basis=st.just("express"),
    wording=st.just(""),
    source=st.just("s"),
    given_at=st.integers(1, 6),
    recorded_at=st.integers(1, 6),
    withdrawn=st.booleans(),
    expires_at=st.none() | st.integers(1, 8),
)


@given(st.lists(acts, max_size=6), st.randoms(), st.integers(1, 8))
def test_order_of_entry_does_not_matter_and_the_last_act_decides(ledger: list[Act], random: object, now: int) -> None:
    """Law: consent holds exactly when some act of giving that has not ended is later than every withdrawal."""
    expected = any(
        not act.withdrawn
        and (act.expires_at is None or now < act.expires_at)
        and all(act.given_at > other.given_at for other in ledger if other.withdrawn)
        for act in ledger
    )
    assert consent.holds(ledger, now) == expected
    assert consent.holds(reversed(ledger), now) == expected


@pytest.mark.parametrize(
    ("given_on", "months", "ends_on"),
    [
        ("2026-08-31T23:59:59.999999Z", 6, "2027-02-28T23:59:59.999999Z"),
        ("2027-08-31T12:00:00Z", 6, "2028-02-29T12:00:00Z"),
        ("2024-02-29T00:00:00Z", 24, "2026-02-28T00:00:00Z"),
        ("2026-12-31T00:00:00Z", 24, "2028-12-31T00:00:00Z"),
        ("2026-03-29T01:30:00Z", 6, "2026-09-29T01:30:00Z"),  # clocks in Europe change in the hour before
        ("2026-06-30T10:00:00Z", 6, "2026-12-30T10:00:00Z"),
    ],
)
def test_months_go_by_the_calendar(given_on: str, months: int, ends_on: str) -> None:
    assert consent.months_after(parse_rfc3339(given_on), months) == parse_rfc3339(ends_on)


@given(st.datetimes(datetime(1971, 1, 1), datetime(9900, 1, 1)), st.integers(0, 60))
def test_months_after_against_the_calendar_of_the_library(moment: datetime, months: int) -> None:
    """Law: so many months on in name, the day kept unless that month is shorter, the time of day kept."""
    moment = moment.replace(tzinfo=UTC)
    at = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    ended = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=consent.months_after(at, months))
    assert (ended.year - moment.year) * 12 + ended.month - moment.month == months
    assert ended.timetz() == moment.timetz()
    last = (ended + timedelta(days=1)).month != ended.month
    assert ended.day == moment.day or (last and ended.day < moment.day)


def test_implied_consent_ends_by_law_and_evidence_can_only_shorten_it() -> None:
    """CASL s.10(10): two years after a purchase, six months after an inquiry."""
    at = parse_rfc3339("2026-01-15T10:00:00Z")
    half, two = parse_rfc3339("2026-07-15T10:00:00Z"), parse_rfc3339("2028-01-15T10:00:00Z")
    assert consent.ends("implied", "purchase", at) == two
    assert consent.ends("implied", "inquiry", at) == half
    assert consent.ends("implied", "", at) == half, "the shorter one, where nobody says which"
    assert consent.ends("implied", "purchase", at, half) == half
    assert consent.ends("implied", "inquiry", at, two) == half
    assert consent.ends("express", "", at) is None
    assert consent.ends("express", "", at, two) == two


def test_nothing_implied_enters_the_ledger_without_an_end(conn: Connection) -> None:
    at = NOW - DAY
    rows = [
        ConsentRow(1, "mail_marketing", "implied", "", "shop", at),
        ConsentRow(2, "mail_marketing", "implied", "", "shop", at, consent.months_after(at, 24)),
        ConsentRow(3, "mail_marketing", "implied", "", "shop", at, consent.months_after(at, 99)),
        ConsentRow(4, "mail_marketing", "express", "", "shop", at),
        ConsentRow(5, "mail_marketing", "express", "", "shop", at, NOW + DAY),
    ]
    assert consent.record(conn, rows, NOW) == 5
    ends = [consent.history(conn, subject)[0].expires_at for subject in (1, 2, 3, 4, 5)]
    two = consent.months_after(at, 24)
    assert ends == [consent.months_after(at, 6), two, two, None, NOW + DAY]


def test_since_when_somebody_agrees(conn: Connection) -> None:
    """What the registry asks for data that are older than a purpose (P-30)."""
    consent.record(conn, [GIVEN, replace(GIVEN, given_at=NOW - 5, expires_at=NOW + 5)], NOW)
    assert consent.since(conn, 7, "open_tracking", NOW) == NOW - 5
    assert consent.since(conn, 7, "open_tracking", NOW + 5) == NOW - DAY, "the later one has ended"
    assert consent.since(conn, 7, "click_tracking", NOW) is None
    consent.withdraw(conn, 7, "open_tracking", "page", NOW)
    assert consent.since(conn, 7, "open_tracking", NOW) is None


def test_whose_consent_to_tracking_ended_by_itself(conn: Connection) -> None:
    ended = replace(GIVEN, expires_at=NOW)
    consent.record(conn, [ended, replace(ended, subject=8), replace(ended, subject=9, purpose="mail_marketing")], NOW)
    consent.record(conn, [replace(ended, subject=10, expires_at=NOW + 1), replace(GIVEN, subject=11)], NOW)
    consent.record(conn, [replace(GIVEN, subject=8, given_at=NOW - 9)], NOW)  # agreed anew
    assert consent.lapsed(conn, 0, NOW - 1) == (set(), NOW - 1)
    assert consent.lapsed(conn, 0, NOW) == ({7}, NOW)
    assert consent.lapsed(conn, NOW, NOW) == (set(), NOW)
    assert consent.lapsed(conn, NOW, NOW + 1) == ({10}, NOW + 1)


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 4))
def test_no_end_is_missed_however_few_are_looked_at(ends: list[int], most: int) -> None:
    engine = create_engine("sqlite://")
    table.create(engine)
    with engine.begin() as conn:
        rows = [Evidence(n, "open_tracking", "express", "", "s", NOW, NOW + end) for n, end in enumerate(ends)]
        consent.record(conn, rows, NOW)
        mark, found, looks = NOW, set[int](), 0
        while mark < NOW + 9:
            some, until = consent.lapsed(conn, mark, NOW + 9, most)
            assert until > mark
            mark, found, looks = until, found | some, looks + 1
        assert found == set(range(len(ends)))
        assert looks <= len(ends) + 1
    engine.dispose()


def test_whole_again_only_with_everything_ever_asked_about(conn: Connection) -> None:
    assert consent.is_whole(conn, 7, NOW)
    consent.record(conn, [GIVEN, replace(GIVEN, purpose="click_tracking", expires_at=NOW)], NOW)
    consent.record(conn, [replace(GIVEN, purpose="doe", expires_at=NOW)], NOW)
    assert consent.is_whole(conn, 7, NOW - 1)
    assert not consent.is_whole(conn, 7, NOW)
    consent.withdraw(conn, 7, "open_tracking", "page", NOW)
    consent.record(conn, [replace(GIVEN, purpose="click_tracking", given_at=NOW)], NOW)
    assert not consent.is_whole(conn, 7, NOW)
