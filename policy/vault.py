"""The vault: one subject per (account, address), and the only place where an address is kept.

Laws:
- the address is sealed under a random key of its subject, that key wrapped by a weekly key-encryption key
  (decision 13): destroy the subject's key and nothing that was ever written about it leads back to anybody;
- a pseudonym is the same all week and another next week, and without the subject's key two weeks of one person
  cannot be told from two people;
- resolving is idempotent: the same tag at the same account is the same subject, whoever asks and how often.

What is written for a new subject: number (random, 1 to 2^63 - 1, never 0: that means nobody), tag, partition, address
sealed with AAD (account, number, field), key wrapped with AAD likewise and the id of the wrapping key.

Cost: 1,000 rows of which half are new take about 25 ms of CPU on the build machine (benchmarks/test_vault.py; the
promise is 60).

Known limits: a subject whose wrapping key is gone raises VaultError: keys are destroyed only after every living
subject is wrapped anew, so it means that a key was lost. Two spellings of one mailbox share a subject (the tag is of
the normalised address); the first spelling is the one kept.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, insert, select

from policy.keys import KEY_BYTES, Keyring, SealError, open_sealed, seal
from policy.schema import subject as table

_63_BITS = (1 << 63) - 1
_MANY = 500  # tags a SELECT


class VaultError(Exception):
    """A subject cannot be opened: its wrapping key is missing, or the row was changed. The text names the key."""


@dataclass(frozen=True, slots=True, repr=False)
class Subject:
    """A person at one account. key: the subject's own key, in memory only as long as this value lives."""

    number: int
    account: int
    address: str
    partition: int
    created: int
    key: bytes

    def pseudonym(self, week: int) -> int:
        """The 63 bits under which the ledger knows the person in that week."""
        return pseudonym_of(self.key, week)

    def __repr__(self) -> str:
        return f"Subject({self.number}, account={self.account})"


def pseudonym_of(subject_key: bytes, week: int) -> int:
    """63 bits of BLAKE2b of the week under the subject's key; never 0, which means nobody."""
    digest = blake2b(week.to_bytes(4, "big"), digest_size=8, key=subject_key, person=b"sp-pseudonym").digest()
    return int.from_bytes(digest, "big") & _63_BITS or 1


def resolve(
    conn: Connection, keyring: Keyring, account: int, rows: Sequence[tuple[bytes, int, str]], week: int, now: int
) -> list[tuple[int, int]]:
    """(subject, pseudonym) for each (tag, partition, wire address), in order; makes the missing subjects.

    Raises VaultError. The caller commits before anybody acts on the numbers.
    """
    known: dict[bytes, tuple[int, int]] = {}
    for row in _rows_of(conn, (tag for tag, _, _ in rows), account, _KEY_COLUMNS):
        known[row.tag] = (row.number, pseudonym_of(_unwrap(keyring, row), week))
    fresh: list[dict[str, object]] = []
    kek = keyring.kek[keyring.kek_id]
    for tag, partition, address in rows:
        if tag in known:
            continue
        number = (int.from_bytes(os.urandom(8), "big") & _63_BITS) or 1
        key = os.urandom(KEY_BYTES)
        fresh.append(
            {
                "number": number,
                "account": account,
                "tag": tag,
                "partition": partition,
                "address": seal(key, address.encode(), _aad(b"address", account, number)),
                "key": seal(kek, key, _aad(b"key", account, number)),
                "kek_id": keyring.kek_id,
                "created": now,
            }
        )
        known[tag] = (number, pseudonym_of(key, week))
    if fresh:
        conn.execute(insert(table), fresh)
    return [known[tag] for tag, _, _ in rows]


def find(conn: Connection, keyring: Keyring, tag: bytes) -> list[Subject]:
    """The subjects of one tag, at every account. Raises VaultError."""
    return [_opened(keyring, row) for row in _rows_of(conn, [tag], None, table.c)]


def get(conn: Connection, keyring: Keyring, number: int) -> Subject | None:
    """The subject of a number, or None when there is none (any more). Raises VaultError."""
    row = conn.execute(select(table).where(table.c.number == number)).one_or_none()
    return None if row is None else _opened(keyring, row)


def number_of(conn: Connection, account: int, tag: bytes) -> int | None:
    """The subject number alone: opens nothing, so it works with no keyring at hand."""
    statement = select(table.c.number).where(table.c.account == account, table.c.tag == tag)
    number: int | None = conn.execute(statement).scalar()
    return number


def pseudonyms(conn: Connection, keyring: Keyring, tag: bytes, weeks: Iterable[int]) -> set[int]:
    """Every pseudonym of a tag in these weeks, at all accounts: the way from a person into the ledger."""
    found = find(conn, keyring, tag)
    return {subject.pseudonym(week) for week in weeks for subject in found}


_KEY_COLUMNS = (table.c.number, table.c.account, table.c.tag, table.c.key, table.c.kek_id)


def _rows_of(
    conn: Connection, tags: Iterable[bytes], account: int | None, columns: Iterable[ColumnElement[Any]]
) -> Iterator[Row[Any]]:
    iterator = iter(dict.fromkeys(tags))
    while some := list(itertools.islice(iterator, _MANY)):
        statement = select(*columns).where(table.c.tag.in_(some))
        if account is not None:
            statement = statement.where(table.c.account == account)
        yield from conn.execute(statement)


def _opened(keyring: Keyring, row: Row[Any]) -> Subject:
    key = _unwrap(keyring, row)
    try:
        address = open_sealed(key, row.address, _aad(b"address", row.account, row.number)).decode()
    except SealError:
        raise VaultError(f"the address of subject {row.number} does not open: the row was changed") from None
    return Subject(row.number, row.account, address, row.partition, row.created, key)


def _unwrap(keyring: Keyring, row: Row[Any]) -> bytes:
    kek = keyring.kek.get(row.kek_id)
    if kek is None:
        raise VaultError(f"key file kek.{row.kek_id} is missing: restore it, subjects are wrapped under it")
    try:
        return open_sealed(kek, row.key, _aad(b"key", row.account, row.number))
    except SealError:
        raise VaultError(f"the key of subject {row.number} does not open under kek.{row.kek_id}") from None


def _aad(field: bytes, account: int, number: int) -> bytes:
    return b"sp-vault-1" + account.to_bytes(4, "big") + number.to_bytes(8, "big") + field
