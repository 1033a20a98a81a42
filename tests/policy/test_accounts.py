"""Accounts, lists and topics: names become numbers, and a number never means anything else."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, delete

from policy import accounts, schema

NOW = 1_795_376_640_000_000


def test_an_account_is_added_found_frozen_and_thawed(conn: Connection) -> None:
    acme = accounts.add(
        conn,
        "acme",
        display_name="Acme Ltd",
        postal_address="1 Road, Town",
        website="https://acme.example",
        privacy_url="https://acme.example/privacy",
        opens_mode=2,
        clicks_mode=1,
        now=NOW,
    )
    assert accounts.get(conn, "acme") == accounts.by_number(conn, acme.number) == acme
    assert (acme.opens_mode, acme.clicks_mode, acme.created, acme.is_frozen) == (2, 1, NOW, False)
    assert accounts.freeze(conn, "acme")
    frozen = accounts.get(conn, "acme")
    assert frozen is not None
    assert frozen.is_frozen
    assert accounts.thaw(conn, "acme")
    assert accounts.get(conn, "acme") == acme
    assert not accounts.freeze(conn, "nobody")
    assert accounts.get(conn, "nobody") is None
    assert accounts.by_number(conn, 99) is None


def test_a_name_is_taken_once(conn: Connection) -> None:
    accounts.add(conn, "b", display_name="B", now=NOW)
    accounts.add(conn, "a", display_name="A", now=NOW)
    with pytest.raises(accounts.AccountError, match="exists already"):
        accounts.add(conn, "a", display_name="A", now=NOW)
    assert [account.name for account in accounts.every(conn)] == ["a", "b"]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "ä", "-a", "a-", "a..b", "x" * 65, "a\n", "<a>", "a/b"])
def test_what_could_not_stand_in_a_header_is_no_name(conn: Connection, name: str) -> None:
    with pytest.raises(accounts.AccountError):
        accounts.add(conn, name, display_name="A", now=NOW)
    number = accounts.add(conn, "a", display_name="A", now=NOW).number
    with pytest.raises(accounts.AccountError):
        accounts.list_number(conn, number, name)


def test_lists_and_topics_come_into_being_once_each(conn: Connection) -> None:
    one = accounts.add(conn, "one", display_name="One", now=NOW).number
    other = accounts.add(conn, "other", display_name="Other", now=NOW).number
    news = accounts.list_number(conn, one, "news", "The news")
    assert accounts.list_number(conn, one, "news") == news
    assert accounts.list_number(conn, other, "news") != news
    assert accounts.topic_number(conn, one, "news") == accounts.topic_number(conn, one, "news")


def test_the_number_of_a_list_that_went_away_is_not_given_again(conn: Connection) -> None:
    """Opt-out links of delivered mail hold it and never expire."""
    account = accounts.add(conn, "one", display_name="One", now=NOW).number
    gone = accounts.list_number(conn, account, "news")
    conn.execute(delete(schema.list_).where(schema.list_.c.number == gone))
    assert accounts.list_number(conn, account, "news") > gone
