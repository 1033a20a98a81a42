"""The vault: one subject per (account, address), and the only place where an address is kept.

Laws:
- the address is sealed under a random key of its subject, that key wrapped by a weekly key-encryption key
  (decision 13): destroy the subject's key and nothing that was ever written about it leads back to anybody;
- a pseudonym is the same all week and another next week, and without the subject's key two weeks of one person
  cannot be told from two people;
- resolving is idempotent: the same tag at the same account is the same subject, whoever asks and how often.

What is written for a new subject: number (random, 1 to 2^63 - 1, never 0: that means nobody), tag, partition, address
sealed with AAD (account, number, field), key wrapped with AAD likewise and the id of the wrapping key.

Cost: 1,000 rows of which half are new take 12 to 17 ms of CPU on the build machine (benchmarks/test_vault.py), a new
subject 14 to 17 us: two AES-GCM, a BLAKE2b, a random page of the table and one of its index.

Wrapping keys change weekly and old ones are destroyed: `policy.rewrapping`. A backup restored after that holds people
whom nobody can open (kek_id `LOST`, `policy.quarantine`): resolving them makes a new key under their number.

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
from operator import itemgetter
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, Row, select, update

from policy import statements
from policy.address import DOTLESS, normalise, parse, provider_canonical, tag_of
from policy.keys import KEY_BYTES, NONCE_BYTES, Keyring, SealError, open_sealed, seal
from policy.keyspace import partition_of
from policy.schema import account as account_table
from policy.schema import subject as table

LOST = 0  # kek_id of a subject whose key and address are gone: weeks in use are 2,900 and more
_63_BITS = (1 << 63) - 1
_MANY = 500  # tags a SELECT
_FILED_ELSEWHERE = frozenset(partition_of(domain) for domain in DOTLESS)
_RANDOM_BYTES = 8 + KEY_BYTES + 2 * NONCE_BYTES  # a subject: number, key, nonces of the address and of the key
_COLUMNS = "number, account, tag, partition, address, key, kek_id, created"


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
    lost: dict[bytes, int] = {}
    for number, tag, wrapped, kek_id in _keys_of(conn, account, dict.fromkeys(tag for tag, _, _ in rows)):
        if kek_id == LOST:
            lost[tag] = number
        else:
            known[tag] = (number, pseudonym_of(_unwrap(keyring, kek_id, wrapped, account, number), week))
    if lost:
        _bring_back(conn, keyring, account, rows, lost, week, known)
    if len(known) < len(rows):  # at most as many: two rows may name one person
        _enter(conn, keyring, account, [row for row in rows if row[0] not in known], week, now, known)
    return [known[tag] for tag, _, _ in rows]


def _enter(
    conn: Connection,
    keyring: Keyring,
    account: int,
    rows: Sequence[tuple[bytes, int, str]],
    week: int,
    now: int,
    known: dict[bytes, tuple[int, int]],
) -> None:
    """Make subjects of people nobody knew, and tell `known`. One draw of randomness for all: the system call costs
    1.2 us each time, and a subject needs four values. Each row's bytes are used for that row only."""
    kek, kek_id = AESGCM(keyring.kek[keyring.kek_id]), keyring.kek_id
    random = os.urandom(_RANDOM_BYTES * len(rows))
    fresh: list[tuple[int, int, bytes, int, bytes, bytes, int, int]] = []
    at = 0
    for tag, partition, address in rows:
        if tag in known:
            continue
        number = (int.from_bytes(random[at : at + 8], "big") & _63_BITS) or 1
        key = random[at + 8 : at + 40]
        nonce, wrapping = random[at + 40 : at + 52], random[at + 52 : at + 64]
        at += _RANDOM_BYTES
        fresh.append(
            (
                number,
                account,
                tag,
                partition,
                nonce + AESGCM(key).encrypt(nonce, address.encode(), _aad(b"address", account, number)),
                wrapping + kek.encrypt(wrapping, key, _aad(b"key", account, number)),
                kek_id,
                now,
            )
        )
        known[tag] = (number, pseudonym_of(key, week))
    if fresh:
        fresh.sort(key=itemgetter(0))  # numbers are the table's own order: neighbours are written together
        conn.exec_driver_sql(statements.insert(conn.dialect.name, "subject", _COLUMNS), fresh)


def _bring_back(
    conn: Connection,
    keyring: Keyring,
    account: int,
    rows: Sequence[tuple[bytes, int, str]],
    lost: dict[bytes, int],
    week: int,
    known: dict[bytes, tuple[int, int]],
) -> None:
    """People whose key was lost to a restored backup, imported anew: their old number, so that consent and negative
    list stay theirs, a new key and the address as it comes."""
    kek = keyring.kek[keyring.kek_id]
    for tag, _, address in rows:
        if tag not in lost or tag in known:
            continue
        number, key = lost[tag], os.urandom(KEY_BYTES)
        sealed = seal(key, address.encode(), _aad(b"address", account, number))
        wrapped = seal(kek, key, _aad(b"key", account, number))
        mine = update(table).where(table.c.number == number, table.c.kek_id == LOST)
        conn.execute(mine.values(address=sealed, key=wrapped, kek_id=keyring.kek_id))
        known[tag] = (number, pseudonym_of(key, week))


def find(conn: Connection, keyring: Keyring, tag: bytes) -> list[Subject]:
    """The subjects of one tag, at every account. Raises VaultError."""
    # account by account over the index of (account, tag): an index of tags alone would serve this rare question only,
    # and cost every new subject a random page
    each = select(table).where(table.c.account.in_(select(account_table.c.number)), table.c.tag == tag)
    return [_opened(keyring, row) for row in conn.execute(each.order_by(table.c.account))]


def get(conn: Connection, keyring: Keyring, number: int) -> Subject | None:
    """The subject of a number, or None when there is none (any more). Raises VaultError."""
    row = conn.execute(select(table).where(table.c.number == number)).one_or_none()
    return None if row is None else _opened(keyring, row)


def number_of(conn: Connection, account: int, tag: bytes) -> int | None:
    """The subject number alone: opens nothing, so it works with no keyring at hand."""
    statement = select(table.c.number).where(table.c.account == account, table.c.tag == tag)
    number: int | None = conn.execute(statement).scalar()
    return number


def canonical_tag(conn: Connection, keyring: Keyring, tag: bytes, partition: int) -> bytes | None:
    """The tag under which a person's provider files their address, where it is another than theirs and we know them.

    For opt-outs and complaints, which come by tag alone: only partitions of such providers open anything. Somebody whom
    no key opens has none: their opt-out must not fail for it."""
    if partition not in _FILED_ELSEWHERE:
        return None
    try:
        found = find(conn, keyring, tag)
    except VaultError:
        return None
    for subject in found[:1]:
        mailbox = parse(subject.address)
        spelled = normalise(mailbox.local, mailbox.domain)
        filed = provider_canonical(spelled)
        return None if filed == spelled else tag_of(keyring.pepper, filed)
    return None


def wrap_anew(keyring: Keyring, account: int, number: int, wrapped: bytes, kek_id: int) -> bytes:
    """A subject's wrapped key, wrapped under the newest key instead. Raises VaultError."""
    key = _unwrap(keyring, kek_id, wrapped, account, number)
    return seal(keyring.kek[keyring.kek_id], key, _aad(b"key", account, number))


def pseudonyms(conn: Connection, keyring: Keyring, tag: bytes, weeks: Iterable[int]) -> set[int]:
    """Every pseudonym of a tag in these weeks, at all accounts: the way from a person into the ledger."""
    found = find(conn, keyring, tag)
    return {subject.pseudonym(week) for week in weeks for subject in found}


def _keys_of(conn: Connection, account: int, tags: Iterable[bytes]) -> Iterator[tuple[Any, ...]]:
    """(number, tag, wrapped key, id of the wrapping key) of those tags that an account knows."""
    iterator, dialect = iter(tags), conn.dialect.name
    one = statements.mark(dialect)
    while some := list(itertools.islice(iterator, _MANY)):
        asked = f"account = {one} AND tag IN ({statements.marks(dialect, len(some))})"
        found = conn.exec_driver_sql(f"SELECT number, tag, key, kek_id FROM subject WHERE {asked}", (account, *some))
        yield from map(tuple, found)


def _opened(keyring: Keyring, row: Row[Any]) -> Subject:
    key = _unwrap(keyring, row.kek_id, row.key, row.account, row.number)
    try:
        address = open_sealed(key, row.address, _aad(b"address", row.account, row.number)).decode()
    except SealError:
        raise VaultError(f"the address of subject {row.number} does not open: the row was changed") from None
    return Subject(row.number, row.account, address, row.partition, row.created, key)


def _unwrap(keyring: Keyring, kek_id: int, wrapped: bytes, account: int, number: int) -> bytes:
    kek = keyring.kek.get(kek_id)
    if kek_id == LOST:
        raise VaultError(f"subject {number} lost its key to a restored backup: importing the person brings it back")
    if kek is None:
        raise VaultError(f"key file kek.{kek_id} is missing: restore it, subjects are wrapped under it")
    try:
        return open_sealed(kek, wrapped, _aad(b"key", account, number))
    except SealError:
        raise VaultError(f"the key of subject {number} does not open under kek.{kek_id}") from None


def _aad(field: bytes, account: int, number: int) -> bytes:
    return b"sp-vault-1" + account.to_bytes(4, "big") + number.to_bytes(8, "big") + field
