"""Purposes: nothing is read for what nobody declared (P-03), and old data not for a new purpose (P-30)."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.campaign import job
from policy import consent
from policy.instants import DAY_US, parse_rfc3339
from policy.purposes import CLASSES, PurposeError, Registry, Verdict, allows, is_reference, parse, registry

NOW = parse_rfc3339("2026-11-23T12:00:00Z")
TODAY = parse_rfc3339("2026-11-23T00:00:00Z")
LAST_YEAR = parse_rfc3339("2025-11-23T00:00:00Z")
REF = "PIPEDA 7(3)(c.1): production order 26-118"

NEW = parse(
    """
[scoring]
since = 2026-11-23
basis = "consent"
consent = true
reads = ["C1", "C2"]
least = 5
what = "a purpose added today"

[billing]
since = 2026-11-23
basis = "contract"
reads = ["C1"]
what = "another one, that nobody is asked for"
"""
)


def test_p_03_market_research_is_told_figures_of_many_and_no_address() -> None:
    for field_class in ("C1", "C2", "C3"):
        assert allows("market_research", field_class, NOW, consent=NOW) == Verdict(False, "field-class")
    assert registry().allows_figure("market_research", 20, NOW)
    assert registry().allows_figure("market_research", 19, NOW) == Verdict(False, "too-few-people")
    assert registry().allows_figure("doe_research", 10**6, NOW) == Verdict(False, "unknown-purpose")


def test_p_30_a_purpose_added_today_is_denied_the_data_of_last_year_until_there_is_consent_since() -> None:
    def asked(agreed: int | None, collected: int = LAST_YEAR) -> Verdict:
        return NEW.allows("scoring", "C2", NOW, collected=collected, consent=agreed)

    assert asked(None) == Verdict(False, "no-consent")
    assert asked(LAST_YEAR) == Verdict(False, "older-than-purpose")
    assert asked(TODAY - 1) == Verdict(False, "older-than-purpose")
    assert asked(TODAY)
    assert asked(TODAY - 1, collected=TODAY), "data collected under the purpose need no newer consent"
    assert not asked(None, collected=TODAY)
    assert NEW.allows("billing", "C1", NOW, collected=TODAY)
    assert NEW.allows("billing", "C1", NOW, collected=TODAY - 1) == Verdict(False, "older-than-purpose")
    assert NEW.allows("billing", "C1", TODAY - 1) == Verdict(False, "not-yet")


def test_p_32_consent_is_passed_over_only_with_a_law_and_a_case() -> None:
    def asked(ref: str, field_class: str = "C2") -> Verdict:
        return NEW.allows("scoring", field_class, NOW, collected=LAST_YEAR, legal_basis_ref=ref)

    assert asked(REF) == Verdict(True, "bypass")
    for ref in ("", " ", "because", "GDPR 6(1)(c)", "GDPR 6(1)(c):", ": order 1", "a: b\nc: d"):
        assert asked(ref) == Verdict(False, "no-consent")
        assert not is_reference(ref)
    assert asked(REF, "C3") == Verdict(False, "field-class"), "the law may pass over consent, not over the matrix"
    assert NEW.allows("resale", "C1", NOW, legal_basis_ref=REF) == Verdict(False, "unknown-purpose")
    assert NEW.allows("scoring", "C2", NOW, collected=NOW, consent=NOW, legal_basis_ref=REF) == Verdict(True)


purposes = st.sampled_from([*registry().purposes, "resale", ""])
instants = st.none() | st.integers(0, NOW)


@given(purposes, st.sampled_from([*CLASSES, "C9"]), instants, instants, st.sampled_from(["", REF]))
def test_default_is_no(purpose: str, field_class: str, collected: int | None, agreed: int | None, ref: str) -> None:
    """Law: a yes has a declared purpose that reads the class; of those that people agree to, consent or a law too."""
    verdict = allows(purpose, field_class, NOW, collected=collected, consent=agreed, legal_basis_ref=ref)
    if verdict:
        known = registry().purposes[purpose]
        assert field_class in known.reads
        assert field_class != "C3"
        assert not known.consent or field_class == "C0" or agreed is not None or verdict.reason == "bypass"
    assert (verdict.reason == "bypass") <= bool(ref)
    assert bool(verdict.reason) == (not verdict or verdict.reason == "bypass")


def test_the_vocabulary_of_consent_is_that_of_the_registry_and_of_jobs() -> None:
    assert consent.PURPOSES == registry().consented == set(get_args(job.Purpose))


@pytest.mark.parametrize(
    "said",
    [
        "[Bad]\nsince = 2026-01-01",
        "top = 1",
        '[x]\nbasis = "contract"\nwhat = "y"',
        '[x]\nsince = "2026"\nbasis = "contract"\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "because"\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "consent"\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "contract"\nconsent = true\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "contract"\nreads = ["C3"]\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "contract"\nreads = ["C7"]\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "contract"\nleast = -1\nwhat = "y"',
        '[x]\nsince = 2026-01-01\nbasis = "contract"',
        '[x]\nsince = 2026-01-01\nbasis = "contract"\nwhat = "y"\nread = ["C0"]',
    ],
)
def test_a_registry_that_says_what_it_may_not_is_refused(said: str) -> None:
    with pytest.raises(PurposeError):
        parse(said)


def test_a_day_begins_at_midnight_utc() -> None:
    assert isinstance(NEW, Registry)
    assert NEW.purposes["scoring"].since == TODAY
    assert TODAY % DAY_US == 0
