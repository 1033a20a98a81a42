"""Tokens: one request, one use, 72 hours; and the settings that say where letters and mail go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import Connection, insert, select

from policy.rights import proof
from policy.rights.settings import RightsSettings
from policy.rights.states import PROOF_US
from policy.schema import proof as table
from policy.schema import request

NOW = 1_795_376_640_000_000


def a_request(conn: Connection, ticket: str) -> int:
    values = {
        "ticket": ticket, "kind": "access", "role": "contact", "tag": bytes(12), "partition": 0, "channel": "cli",
        "jurisdiction": "gdpr", "state": "received", "identity": "open", "received": NOW, "due": NOW, "outcome": "",
        "ground": "",
    }  # fmt: skip
    key = conn.execute(insert(request).values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def test_a_token_works_once_and_takes_its_siblings_with_it(conn: Connection) -> None:
    mine, other = a_request(conn, "R-1"), a_request(conn, "R-2")
    first, second, theirs = (proof.issue(conn, number, NOW) for number in (mine, mine, other))
    assert len({first, second, theirs}) == 3
    assert {len(token) for token in (first, second, theirs)} == {proof.TOKEN_CHARACTERS}
    assert proof.redeem(conn, second, NOW + 1) == mine
    assert proof.redeem(conn, second, NOW + 2) is None
    assert proof.redeem(conn, first, NOW + 2) is None
    assert proof.redeem(conn, theirs, NOW + 2) == other


def test_the_end_of_72_hours_is_exclusive_and_what_is_over_is_forgotten(conn: Connection) -> None:
    number = a_request(conn, "R-1")
    token, late = proof.issue(conn, number, NOW), proof.issue(conn, number, NOW)
    assert proof.redeem(conn, late, NOW + PROOF_US) is None
    assert proof.redeem(conn, token, NOW + PROOF_US - 1) == number
    assert proof.forget(conn, NOW + PROOF_US - 1) == 0
    assert proof.forget(conn, NOW + PROOF_US) == 2
    assert conn.execute(select(table)).all() == []


def test_the_database_does_not_hold_what_the_mailbox_was_sent(conn: Connection) -> None:
    token = proof.issue(conn, a_request(conn, "R-1"), NOW)
    [row] = conn.execute(select(table)).all()
    assert token.encode() not in bytes(row.hash)
    assert proof.redeem(conn, bytes(row.hash).hex(), NOW) is None


@given(st.text(max_size=60))
def test_no_text_is_a_token_by_accident(text: str) -> None:
    digest = proof._digest(text)
    assert digest is None or len(text) == proof.TOKEN_CHARACTERS


@pytest.mark.parametrize(
    "wrong",
    [
        {"jurisdiction": "atlantis"},
        {"zone": "Mars/Olympus"},
        {"smarthost": "no port"},
        {"outbox_days": 29},
        {"appeal": "no"},
        {"strange": 1},
        {"listen": "2525"},
    ],
)
def test_settings_refuse_what_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RightsSettings.model_validate(wrong)


def test_settings_need_nothing() -> None:
    settings = RightsSettings()
    assert (settings.smarthost, settings.listen, settings.drop_dir) == ("", "", None)
    assert settings.calendar().is_working(settings.calendar().day_of(NOW)) is False  # a Sunday
