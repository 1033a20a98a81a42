"""P-03, P-29, P-30: data are read for a declared purpose only, and for a new one only with consent given since."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select

from policy import accounts, audit, consent, purposes, readings, vault
from policy.consent import Evidence
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.purposes import Registry, Verdict
from policy.readings import LIMITS, Answer, Asked
from policy.schema import audit as chain
from tests.policy.people import row_of
from tests.promises.marks import promise

NOW = 20_780 * DAY_US + 3_600_000_000  # 2026-11-23
TODAY = "2026-11-23"
ADA = "ada@one.example"


def _yes(*_: object, **__: object) -> Verdict:
    return Verdict(True)


def _known(conn: Connection, keyring: Keyring, at: int) -> tuple[bytes, int]:
    """Tag and number of somebody whose data were collected then."""
    account = accounts.add(conn, "acme", display_name="Acme", now=at).number
    row = row_of(keyring.pepper, ADA)
    [(number, _)] = vault.resolve(conn, keyring, account, [row], week_of(at), at)
    return row[0], number


def _read(conn: Connection, asked: Asked, registry: Registry | None = None) -> Answer:
    return readings.enter(conn, asked, LIMITS, registry or purposes.registry(), NOW)


def _lines(conn: Connection) -> Sequence[str]:
    return conn.scalars(select(chain.c.result).where(chain.c.action == readings.DENIED).order_by(chain.c.seq)).all()


@promise("P-03", off={"policy.purposes.Registry.allows": _yes})
def test_p03_market_research_gets_no_addresses_and_the_try_is_on_record(conn: Connection, keyring: Keyring) -> None:
    tag, _ = _known(conn, keyring, NOW - DAY_US)
    asked = Asked("officer", "market_research", "contact list", field_class="C2", tag=tag)
    assert _read(conn, asked) == Answer("field-class")
    assert _read(conn, Asked("officer", "resale", "contact list", tag=tag)).denied == "unknown-purpose"
    assert _lines(conn) == ["field-class", "unknown-purpose"]
    assert audit.verify(conn) is None


@promise("P-03", off={"policy.purposes.Registry.allows_figure": _yes})
def test_p03_figures_are_told_of_many_people_only(conn: Connection) -> None:
    """k of market research is 20."""
    many = Asked("officer", "market_research", "audience figures", field_class="C0", count=20)
    few = Asked("officer", "market_research", "audience figures", field_class="C0", count=19)
    assert _read(conn, many) == Answer(rows=1)
    assert _read(conn, few) == Answer("too-few-people")
    assert _lines(conn) == ["too-few-people"]


@promise("P-29", off={"policy.purposes.Registry.allows": _yes})
def test_p29_improving_the_services_reads_sums_and_no_single_opens_or_clicks(conn: Connection) -> None:
    """What the platform wants to know for itself it gets as figures (C0): rows of people (C1) are denied, and so is
    whatever names them (C2)."""
    told = {
        field_class: _read(
            conn, Asked("officer", "market_research", "opens and clicks", field_class=field_class, count=5000)
        ).denied
        for field_class in purposes.CLASSES
    }
    assert told == {"C0": "", "C1": "field-class", "C2": "field-class", "C3": "field-class"}


@promise("P-30", off={"policy.purposes.Registry.allows": _yes})
def test_p30_a_purpose_of_today_reads_data_of_last_year_only_with_consent_since(
    conn: Connection, keyring: Keyring
) -> None:
    words = f'since = {TODAY}\nreads = ["C2"]\nwhat = "added today"'
    registry = purposes.parse(
        f'[doe]\nbasis = "consent"\nconsent = true\n{words}\n[newsletter_study]\nbasis = "legitimate-interest"\n{words}'
    )
    tag, number = _known(conn, keyring, NOW - 365 * DAY_US)

    def denied(purpose: str) -> str:
        return _read(conn, Asked("officer", purpose, "study", tag=tag), registry).denied

    assert denied("newsletter_study") == "older-than-purpose"
    assert denied("doe") == "no-consent"
    since = registry.purposes["doe"].since
    consent.record(conn, [Evidence(number, "doe", "express", "v1", "form", since - 1)], NOW)
    assert denied("doe") == "older-than-purpose", "yesterday's word was given to something else"
    consent.record(conn, [Evidence(number, "doe", "express", "v2", "form", since)], NOW)
    assert denied("doe") == ""
    assert denied("newsletter_study") == "older-than-purpose", "agreed to another purpose"
