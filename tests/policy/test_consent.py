"""The consent ledger: evidence counts when it is dated and sourced, and never against a later withdrawal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection

from policy import consent, negative
from policy.consent import Act, Evidence

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
