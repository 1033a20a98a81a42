"""The vault: one subject per account and address, found again by tag alone, shredded with its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, delete, event, func, select, update

from policy import accounts, vault
from policy.keys import Keyring, ensure_week
from policy.schema import open_store
from policy.schema import subject as table
from tests.policy.people import row_of, rows_of
from tests.policy.stores import only_sqlite, url_of
from tests.world.octets import octets

NOW = 1_795_376_640_000_000
WEEK = 2967


@pytest.fixture
def account(conn: Connection) -> int:
    return accounts.add(conn, "acme", display_name="Acme", now=NOW).number


def test_resolving_makes_whom_it_does_not_know_and_keeps_order(
    conn: Connection, keyring: Keyring, account: int
) -> None:
    rows = rows_of(keyring.pepper, 1200)
    first = vault.resolve(conn, keyring, account, rows[:700], WEEK, NOW)
    again = vault.resolve(conn, keyring, account, rows, WEEK, NOW + 1)
    assert again[:700] == first
    assert vault.resolve(conn, keyring, account, rows[::-1], WEEK, NOW + 2) == again[::-1]
    assert conn.execute(select(func.count()).select_from(table)).scalar() == 1200
    assert len({number for number, _ in again}) == len({pseudonym for _, pseudonym in again}) == 1200
    assert all(0 < value < 1 << 63 for pair in again for value in pair)


def test_one_address_twice_in_a_chunk_is_one_subject(conn: Connection, keyring: Keyring, account: int) -> None:
    rows = [row_of(keyring.pepper, text) for text in ("Bob@example.com", "eve@example.com", "bob@example.com")]
    one, other, same = vault.resolve(conn, keyring, account, rows, WEEK, NOW)
    assert one == same != other
    assert vault.find(conn, keyring, rows[0][0])[0].address == "Bob@example.com"


def test_accounts_do_not_share_people(conn: Connection, keyring: Keyring, account: int) -> None:
    other = accounts.add(conn, "other", display_name="Other", now=NOW).number
    row = row_of(keyring.pepper, "bob@example.com")
    mine = vault.resolve(conn, keyring, account, [row], WEEK, NOW)
    theirs = vault.resolve(conn, keyring, other, [row], WEEK, NOW)
    assert mine[0][0] != theirs[0][0]
    assert mine[0][1] != theirs[0][1]
    found = vault.find(conn, keyring, row[0])
    assert {(subject.account, subject.number) for subject in found} == {(account, mine[0][0]), (other, theirs[0][0])}
    assert vault.number_of(conn, account, row[0]) == mine[0][0]
    assert vault.number_of(conn, account, bytes(12)) is None


def test_a_pseudonym_holds_for_its_week_and_leads_back_only_with_the_key(
    conn: Connection, keyring: Keyring, account: int
) -> None:
    """Law: stable within a week, another in every other week, both found again from the tag."""
    row = row_of(keyring.pepper, "bob@example.com")
    [(number, this_week)] = vault.resolve(conn, keyring, account, [row], WEEK, NOW)
    [(same_number, next_week)] = vault.resolve(conn, keyring, account, [row], WEEK + 1, NOW)
    assert (number, this_week) == vault.resolve(conn, keyring, account, [row], WEEK, NOW + 9)[0]
    assert number == same_number
    assert this_week != next_week
    assert vault.pseudonyms(conn, keyring, row[0], [WEEK, WEEK + 1]) == {this_week, next_week}
    subject = vault.get(conn, keyring, number)
    assert subject is not None
    assert subject.pseudonym(WEEK) == this_week


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.integers(0, 10_000))
def test_pseudonyms_are_numbers_of_63_bits_that_share_nothing(key: bytes, other: bytes, week: int) -> None:
    """Law: 1 to 2^63 - 1; another week or another key is another number."""
    pseudonym = vault.pseudonym_of(key, week)
    assert 0 < pseudonym < 1 << 63
    assert pseudonym == vault.pseudonym_of(key, week)
    assert pseudonym != vault.pseudonym_of(key, week + 1)
    assert key == other or pseudonym != vault.pseudonym_of(other, week)


def test_a_week_later_old_subjects_open_under_their_old_wrapping_key(
    conn: Connection, keyring: Keyring, account: int
) -> None:
    assert keyring.folder is not None
    old = row_of(keyring.pepper, "bob@example.com")
    before = vault.resolve(conn, keyring, account, [old], WEEK, NOW)
    ensure_week(keyring.folder, WEEK + 1)
    later = Keyring.load(keyring.folder)
    new = row_of(keyring.pepper, "eve@example.com")
    assert vault.resolve(conn, later, account, [old, new], WEEK, NOW)[0] == before[0]
    assert conn.execute(select(table.c.kek_id).order_by(table.c.kek_id)).scalars().all() == [WEEK, WEEK + 1]
    without = dataclasses.replace(later, kek={WEEK + 1: later.kek[WEEK + 1]})
    with pytest.raises(vault.VaultError, match=rf"kek\.{WEEK} is missing") as caught:
        vault.resolve(conn, without, account, [old], WEEK, NOW)
    assert "bob" not in str(caught.value)


def test_a_row_moved_to_another_account_or_number_does_not_open(
    conn: Connection, keyring: Keyring, account: int
) -> None:
    """The seals are bound to account, number and field: nobody becomes somebody else by an UPDATE."""
    rows = [row_of(keyring.pepper, text) for text in ("bob@example.com", "eve@example.com")]
    [(bob, _), (eve, _)] = vault.resolve(conn, keyring, account, rows, WEEK, NOW)
    sealed = conn.execute(select(table.c.key, table.c.address).where(table.c.number == eve)).one()
    conn.execute(update(table).where(table.c.number == bob).values(address=sealed.address))
    with pytest.raises(vault.VaultError, match="address"):
        vault.find(conn, keyring, rows[0][0])
    conn.execute(update(table).where(table.c.number == bob).values(key=sealed.key))
    with pytest.raises(vault.VaultError, match="key"):
        vault.find(conn, keyring, rows[0][0])


def test_without_the_row_nothing_leads_back(conn: Connection, keyring: Keyring, account: int) -> None:
    row = row_of(keyring.pepper, "bob@example.com")
    [(number, pseudonym)] = vault.resolve(conn, keyring, account, [row], WEEK, NOW)
    conn.execute(delete(table).where(table.c.number == number))
    assert vault.find(conn, keyring, row[0]) == []
    assert vault.get(conn, keyring, number) is None
    [(new_number, new_pseudonym)] = vault.resolve(conn, keyring, account, [row], WEEK, NOW)
    assert new_number != number
    assert new_pseudonym != pseudonym


@only_sqlite
def test_no_address_lies_in_clear_on_the_disk(store: Engine, keyring: Keyring, tmp_path: Path) -> None:
    """Byte scan of database and log while both are warm: neither the addresses nor the subjects' keys."""
    rows = rows_of(keyring.pepper, 300)
    with store.begin() as connection:
        number = accounts.add(connection, "acme", display_name="Acme", now=NOW).number
        vault.resolve(connection, keyring, number, rows, WEEK, NOW)
    with store.connect() as connection:
        found = vault.find(connection, keyring, rows[7][0])
    assert [subject.address for subject in found] == [rows[7][2]]
    files = [octets(path) for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 3
    assert any(rows[7][0] in content for content in files)  # the scan sees what is there
    for content in files:
        assert b"person." not in content
        assert found[0].key not in content


def test_a_reader_finds_people_too(store: Engine, keyring: Keyring, tmp_path: Path) -> None:
    row = row_of(keyring.pepper, "bob@example.com")
    with store.begin() as connection:
        number = accounts.add(connection, "acme", display_name="Acme", now=NOW).number
        vault.resolve(connection, keyring, number, [row], WEEK, NOW)
    reader = open_store(url_of(tmp_path), writer=False)
    with reader.connect() as connection:
        [subject] = vault.find(connection, keyring, row[0])
    reader.dispose()
    assert subject.address == "bob@example.com"
    assert "bob" not in repr(subject)
    assert repr(subject.key) not in repr(subject)


def test_people_made_together_share_no_randomness(conn: Connection, keyring: Keyring, account: int) -> None:
    """Their randomness is drawn at once: no number, key or nonce may stand in two rows, nor in one row twice."""
    people = [(bytes([n]) * 12, n % 64, f"person.{n}@example.com") for n in range(50)]
    people += people[:10]  # twice in one audience: the same person
    answers = vault.resolve(conn, keyring, account, people, WEEK, NOW)
    assert answers[50:] == answers[:10]
    rows = conn.execute(select(table)).all()
    assert len(rows) == 50
    subjects = [vault.get(conn, keyring, row.number) for row in rows]
    assert {subject.address for subject in subjects if subject is not None} == {address for _, _, address in people}
    parts = [part for row in rows for part in (row.address[:12], row.key[:12], row.number.to_bytes(8, "big"))]
    parts += [subject.key[at : at + 8] for subject in subjects if subject is not None for at in range(0, 32, 8)]
    assert len(set(parts)) == len(parts) == 50 * 7


def test_a_person_is_found_at_every_account(conn: Connection, keyring: Keyring) -> None:
    numbers = [accounts.add(conn, f"shop-{n}", display_name="", now=NOW).number for n in range(3)]
    tag = b"t" * 12
    for number in numbers[::2]:
        vault.resolve(conn, keyring, number, [(tag, 1, "ada@one.example"), (b"u" * 12, 2, "b@two.example")], WEEK, NOW)
    asked: list[tuple[str, Any]] = []

    @event.listens_for(conn, "before_cursor_execute")
    def hear(_c: object, _k: object, statement: str, parameters: Any, _x: object, _m: object) -> None:
        asked.append((statement, parameters))

    found = vault.find(conn, keyring, tag)
    event.remove(conn, "before_cursor_execute", hear)
    assert [(subject.account, subject.address) for subject in found] == [
        (number, "ada@one.example") for number in numbers[::2]
    ]
    [(statement, parameters)] = asked
    if conn.dialect.name != "sqlite":
        return  # how it finds them is asked of a table large enough to plan for: tests/policy/test_postgres.py
    plan = [row[3] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    assert any("INDEX" in step and "(account=? AND tag=?)" in step for step in plan), plan  # no walk through a million
