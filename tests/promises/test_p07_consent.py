"""P-07: consent is a ledger of evidence; nothing is tracked without it, and it ends when it is withdrawn or expires."""

from __future__ import annotations

from sqlalchemy import Connection

from policy import consent
from policy.consent import Evidence
from tests.promises.marks import promise

NOW = 1_800_000_000_000_000
DAY = 86_400_000_000


def _given(purpose: str, *, at: int, expires: int | None = None, basis: str = "express") -> Evidence:
    return Evidence(7, purpose, basis, "v3", "form", at, expires)


@promise("P-07", off={"policy.consent.holds": lambda acts, now: True})
def test_p07_consent_that_has_expired_is_none(conn: Connection) -> None:
    """CASL: implied consent ends; its end is exclusive."""
    consent.record(conn, [_given("open_tracking", at=NOW - 2 * DAY, expires=NOW, basis="implied")], NOW - DAY)
    assert consent.standing(conn, [7], "open_tracking", NOW - 1) == {7}
    assert consent.standing(conn, [7], "open_tracking", NOW) == set()


@promise("P-07", off={"policy.consent.is_evidence": lambda evidence, now: True})
def test_p07_evidence_without_a_source_is_none(conn: Connection) -> None:
    consent.record(conn, [Evidence(7, "mail_marketing", "express", "v3", "  ", NOW - DAY)], NOW)
    assert consent.standing(conn, [7], "mail_marketing", NOW) == set()
