"""Each right carried out, through the seams of the rooms that can do it.

Laws: carrying out may be repeated after a crash at any point (every seam is idempotent by request); whoever calls
(`operations`) closes the request only after this returned. What only a person can do says so (`NeedsOfficer`).

    access, portability   the bundle (policy.bundle); portability without what we inferred (WP 242)
    rectification         every place that keeps the field, then the version in table rectification (P-44); an address
                          is changed by a new subject: the old one keeps its suppressions and is written to no more,
                          the new one inherits neither consent nor history (P-41)
    erasure               policy.erasing; what a hold keeps is told with its authority (17(3), P-21)
    minor                 suppressed for good, then erased (P-48)
    restriction, objection, withdrawal    were in force before (`protections`)

Account holders: access and portability are those of their address; rectification changes the account; erasure and the
report of a child ask `erase_account`, which an installation may not have yet.

Known limits: recipients of data other than the accounts themselves are not told of a correction (Art. 19): there are
no webhooks yet. Without `erase_account` the officer ends an account by hand and closes the request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from sqlalchemy import Connection, insert, select, update

from policy import vault
from policy.address import AddressError, normalise, parse, tag_of
from policy.enforcement import Effects, Enforcement
from policy.instants import week_of
from policy.keys import Keyring, open_sealed, seal
from policy.keyspace import partition_of
from policy.personal import Person, PersonalStore
from policy.rights import protections
from policy.rights.requests import Asked
from policy.rights.states import Kind, Role
from policy.schema import account as account_table
from policy.schema import erasure as erasure_table
from policy.schema import hold, rectification
from policy.store import Store

HOLDER_FIELDS: Final = ("display_name", "postal_address", "website", "privacy_url")


class NeedsOfficer(Exception):
    """Only a person can go on. The text says with what, and nothing about whom."""


@dataclass(frozen=True, slots=True, repr=False)
class Handed:
    """A bundle that lies ready. how: what the letter says about getting and opening it."""

    path: str
    how: str


class Erase(Protocol):
    """policy.erasing.ErasureOperations.op_erase: returns when the person cannot be found any more."""

    async def __call__(
        self, account: int, tag: bytes, partition: int, address: str, cause: str, request: int
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Seams:
    """What other rooms do. bundle(asked, portable); person(asked) finds them everywhere; places: `personal.every`."""

    erase: Erase
    bundle: Callable[[Asked, bool], Awaitable[Handed]]
    person: Callable[[Asked], Awaitable[Person]]
    places: Callable[[], Sequence[PersonalStore]]
    erase_account: Callable[[int, int], Awaitable[Any]] | None = None  # account, request


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """outcome: a slug for the record; ground: what the law made us keep; values: for the letter; forget: the address
    of the request is to go, its erasure is done."""

    outcome: str
    ground: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    forget: bool = False


class Carrying:
    """carry(asked, now) -> Result. Raises NeedsOfficer, or what a seam raised: try again."""

    def __init__(self, seams: Seams, store: Store, enforcement: Enforcement, keyring: Callable[[], Keyring]) -> None:
        self._seams = seams
        self._store = store
        self._enforcement = enforcement
        self._keyring = keyring

    async def carry(self, asked: Asked, now: int) -> Result:
        if asked.kind in (Kind.ACCESS, Kind.PORTABILITY):
            handed = await self._seams.bundle(asked, asked.kind is Kind.PORTABILITY)
            return Result("handed over", values={"handed": handed.how})
        if asked.kind is Kind.RECTIFICATION:
            return await self._rectify(asked, now)
        if asked.kind in (Kind.ERASURE, Kind.MINOR):
            return await self._erase(asked, now)
        return Result("in force")

    async def _erase(self, asked: Asked, now: int) -> Result:
        if asked.role is Role.HOLDER and self._seams.erase_account is None:
            raise NeedsOfficer("the account has to be ended by hand, then close the request")
        if not asked.address:
            raise NeedsOfficer("the address of this request is gone: erase by hand, then close the request")
        if asked.kind is Kind.MINOR:
            await self._enforcement.apply(
                lambda conn, effects: protections.suppress_for_good(conn, effects, asked, now, "minor")
            )
        kept = await self._store.write(lambda conn: _holds(conn, asked))
        cause = "minor" if asked.kind is Kind.MINOR else "account" if asked.role is Role.HOLDER else "request"
        await self._seams.erase(asked.account, asked.tag, asked.partition, asked.address, cause, asked.number)
        if asked.role is Role.HOLDER and self._seams.erase_account is not None:
            await self._seams.erase_account(asked.account, asked.number)
        ground = "; ".join(kept)
        return Result("erased except what is held" if kept else "erased", ground, {"kept": ground}, forget=True)

    async def _rectify(self, asked: Asked, now: int) -> Result:
        name, value = asked.details.get("field", ""), asked.details.get("value", "")
        contested = asked.details.get("contested", "")
        if not name or not (value or contested):
            raise NeedsOfficer("which field is to be corrected, and to what? (sales-push rights details)")
        if contested:
            await self._store.write(lambda conn: self._note(conn, asked, name, contested, "contested", now))
            return Result("contested", values={"contested": True})
        if asked.role is Role.HOLDER:
            await self._store.write(lambda conn: _correct_account(conn, asked, name, value))
        elif name == "address":
            await self._enforcement.apply(lambda conn, effects: self._move(conn, effects, asked, value, now))
        else:
            person = await self._seams.person(asked)
            for place in self._seams.places():
                await place.amend(person, name, value)
            await self._store.write(lambda conn: self._note(conn, asked, name, value, "corrected", now))
        return Result("corrected", values={"contested": False})

    def _note(self, conn: Connection, asked: Asked, name: str, value: str, state: str, now: int) -> None:
        """A version a subject, sealed under the subject's own key: it ends with them. Once a request."""
        entered = select(rectification.c.subject).where(rectification.c.request == asked.number)
        there = set(conn.scalars(entered))
        for subject in vault.find(conn, self._keyring(), asked.tag):
            if subject.number in there or (asked.account and subject.account != asked.account):
                continue
            sealed = seal(subject.key, value.encode(), rectification_aad(subject.number, name))
            conn.execute(
                insert(rectification).values(
                    subject=subject.number, field=name, state=state, value=sealed, request=asked.number, at=now
                )
            )

    def _move(self, conn: Connection, effects: Effects, asked: Asked, text: str, now: int) -> None:
        """Another address for the same person: a subject of its own at each account that knew the old one."""
        try:
            mailbox = parse(text)
        except AddressError as error:
            raise NeedsOfficer(f"the corrected address is none ({error.reason})") from None
        keyring = self._keyring()
        tag = tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain))
        if tag == asked.tag:
            return
        row = (tag, partition_of(mailbox.domain), mailbox.wire)
        for _, account in protections.subjects_of(conn, asked.tag, asked.account):
            vault.resolve(conn, keyring, account, [row], week_of(now), now)
            left = replace(asked, account=account)
            protections.suppress_for_good(conn, effects, left, now, "address given up")
        self._note(conn, asked, "address", mailbox.wire, "corrected", now)


def rectification_aad(subject: int, name: str) -> bytes:
    return b"sp-rectification/" + subject.to_bytes(8, "big") + name.encode()


def open_rectified(subject: vault.Subject, name: str, sealed: bytes) -> str:
    """A version from table rectification, for an export. Raises policy.keys.SealError."""
    return open_sealed(subject.key, sealed, rectification_aad(subject.number, name)).decode()


def _holds(conn: Connection, asked: Asked) -> list[str]:
    """Why some of it must be kept; also when the identity is gone already (a second try after a crash)."""
    numbers = {number for number, _ in protections.subjects_of(conn, asked.tag, asked.account)}
    erased = select(erasure_table.c.subject).where(erasure_table.c.request == asked.number)
    numbers |= set(conn.scalars(erased))
    if not numbers:
        return []
    standing = select(hold.c.authority).where(hold.c.subject.in_(sorted(numbers)), hold.c.released.is_(None)).distinct()
    return sorted(conn.scalars(standing))


def _correct_account(conn: Connection, asked: Asked, name: str, value: str) -> None:
    if name not in HOLDER_FIELDS:
        raise NeedsOfficer(f"of an account these can be corrected: {', '.join(HOLDER_FIELDS)}")
    conn.execute(update(account_table).where(account_table.c.number == asked.account).values({name: value}))
