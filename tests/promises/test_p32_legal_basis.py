"""P-32: consent is passed over only where the law says so: with the law and the case named, and counted."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import Connection, select

from policy import purposes, readings, schema
from policy.disclosures import Disclosure
from policy.readings import Asked
from tests.promises.marks import promise

NOW = 1_800_000_000_000_000
REFERENCE = "PIPEDA 7(3)(c): order 26-118"
ANYTHING = re.compile(r".*")


def _denied(conn: Connection, reference: str) -> str:
    """Why a read of somebody who agreed to nothing is denied, "" when it is not."""
    asked = Asked("officer", "mail_marketing", "contacts", subject=7, account=1, legal_basis_ref=reference)
    return readings.enter(conn, asked, {"officer": 0}, purposes.registry(), NOW).denied


@promise("P-32", off={"policy.purposes._REFERENCE": ANYTHING})
def test_p32_a_bypass_without_law_and_case_is_rejected(conn: Connection) -> None:
    assert _denied(conn, "") == "no-consent"
    assert _denied(conn, "because we want to") == "no-consent"
    assert conn.execute(select(schema.reading)).all() == []
    assert _denied(conn, REFERENCE) == ""


@promise("P-32", off={"policy.readings.audit.append": lambda *line: 0})
def test_p32_bypasses_are_counted_by_law_and_case_for_the_transparency_report(conn: Connection) -> None:
    for _ in range(2):
        assert _denied(conn, REFERENCE) == ""
    assert _denied(conn, "") == "no-consent"
    assert readings.bypasses(conn) == {REFERENCE: 2}


@promise("P-32", off={"policy.purposes._REFERENCE": ANYTHING})
def test_p32_nothing_is_disclosed_without_law_and_case() -> None:
    with pytest.raises(ValueError, match="law and a case"):
        Disclosure(NOW, 7, 1, "Police of Graz", "authority", "they asked", "messages", 1, "officer")
