"""Consent that ends, at expansion: it counts until its instant and not a microsecond longer (P-07, CASL s.10)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.campaign import expand, validation
from engine.campaign.expand import Terms
from engine.campaign.job import Evidence, Recipient
from policy.events import Reason
from policy.gate import Mode
from policy.instants import parse_rfc3339, week_of
from policy.keys import Keyring
from policy.wire import ConsentRow, Resolved

GIVEN = "2026-02-28T10:00:00Z"
HALF, TWO = parse_rfc3339("2026-08-28T10:00:00Z"), parse_rfc3339("2028-02-28T10:00:00Z")


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    folder: Path = tmp_path_factory.mktemp("ends") / "keys"
    return Keyring.create(folder, week_of(HALF))


def expanded(
    keyring: Keyring, word: Evidence, now: int, *, of_job: bool = False
) -> tuple[list[Reason], list[ConsentRow]]:
    """(refusals, what the consent ledger is told) of one person in a campaign that needs consent."""
    terms = Terms(
        job=7, account=1, list_number=2, topic_number=0, job_key=b"k" * 32, expires_at=now + 10**9, needs_consent=True,
        consent={"mail_marketing": word} if of_job else {}, opens=Mode.INDIVIDUAL,
    )  # fmt: skip
    row = Recipient("ada@one.example", consent={} if of_job else {"mail_marketing": word, "open_tracking": word})
    prepared = expand.prepare(terms, keyring, 1, [row], 0, now)
    [question] = expand.questions(terms, keyring, prepared)
    permitted = expand.decide(terms, prepared, {question.partition: bytes([Reason.NONE])}, {}, 1.0)
    expand.number(permitted, [Resolved(100, 200)] * len(permitted))
    refused = [event.reason for events in prepared.events.values() for event in events]
    assert [person.opens for person in permitted] == [0 if of_job else Mode.INDIVIDUAL] * len(permitted)
    return [Reason(reason) for reason in refused], expand.evidence(permitted, {})


@pytest.mark.parametrize("of_job", [False, True])
@pytest.mark.parametrize(
    ("word", "end"),
    [
        (Evidence("shop", GIVEN, basis="implied", implied_by="purchase"), TWO),
        (Evidence("shop", GIVEN, basis="implied", implied_by="inquiry"), HALF),
        (Evidence("shop", GIVEN, basis="implied"), HALF),
        (Evidence("shop", GIVEN, basis="implied", implied_by="inquiry", expires="2028-02-28T10:00:00Z"), HALF),
        (Evidence("shop", GIVEN, basis="implied", implied_by="purchase", expires="2026-08-28T10:00:00Z"), HALF),
        (Evidence("form", GIVEN, expires="2026-08-28T12:00:00+02:00"), HALF),
        (Evidence("form", GIVEN, implied_by="inquiry", expires="2028-02-28T10:00:00Z"), TWO),
    ],
)
def test_it_counts_until_its_end(keyring: Keyring, word: Evidence, end: int, of_job: bool) -> None:
    refused, told = expanded(keyring, word, end - 1, of_job=of_job)
    assert refused == []
    assert {(row.purpose, row.basis, row.expires_at) for row in told} == (
        {("mail_marketing", word.basis, end)} | (set() if of_job else {("open_tracking", word.basis, end)})
    )
    assert expanded(keyring, word, end, of_job=of_job) == ([Reason.NO_CONSENT], [])


def test_without_an_end_it_stands(keyring: Keyring) -> None:
    refused, [row, _] = expanded(keyring, Evidence("form", GIVEN), TWO * 2)
    assert (refused, row.expires_at) == ([], 0)


def test_an_end_that_says_no_time_is_past(keyring: Keyring) -> None:
    assert expanded(keyring, Evidence("form", GIVEN, expires="next year"), HALF) == ([Reason.NO_CONSENT], [])


def test_rows_are_read_with_it_and_a_name_twice_is_still_found() -> None:
    word = Evidence("shop", GIVEN, "v1", "implied", "purchase", "2027-01-01T00:00:00Z")
    row = Recipient("ada@one.example", consent={"mail_marketing": word})
    line = msgspec.json.encode(row)
    read = validation.read_row(line)
    assert read is not None
    assert read.consent == {"mail_marketing": word}
    twice = line.replace(b'"implied_by":"purchase"', b'"implied_by":"purchase","implied_by":"inquiry"')
    assert twice != line
    assert validation.read_row(twice) is None
    assert validation.read_row(line.replace(b'"purchase"', b'"gift"')) is None
    problems = validation.row_problems(msgspec.to_builtins(row) | {"consent": {"doe": {"expires": "soon"}}}, "$")
    assert [problem.path for problem in problems] == ["$.consent.doe.expires"]
