"""Requests and their steps in SQL: opened once, moved by acts, every step with its line in the audit chain.

Laws: a step, the state it leads to and its audit line are one transaction; the chain names the request by its number
and nobody by anything (P-45). Address, details and notes are sealed under the service key, bound to the ticket.

A ticket is random (50 bits, no letters that look alike), so that who guesses one in a letter to the officer guesses
nobody. The same question asked again while it is open is the same request: opening may be repeated.

Known limits: the service key seals every request, so these fields end by being cleared (`forget_address`), not by
destroying a key.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Row, func, insert, select, update

from policy import audit
from policy.keys import Keyring, SealError, open_sealed, seal
from policy.rights.states import CLOSED, OPEN, Act, Case, Identity, Kind, Role, State, move
from policy.schema import request as table
from policy.schema import request_step

_LETTERS: Final = "ABCDEFGHJKMNPQRSTVWXYZ23456789"
TICKET_LENGTH: Final = 12  # with "R-"
_DETAILS: Final = msgspec.msgpack.Decoder(dict[str, str])


@dataclass(frozen=True, slots=True, repr=False)
class Asked:
    """One request. account: 0 for every account and the platform; address "" once it is forgotten; extended, closed:
    0 for never."""

    number: int
    ticket: str
    kind: Kind
    role: Role
    account: int
    address: str
    tag: bytes
    partition: int
    channel: str
    jurisdiction: str
    state: State
    identity: Identity
    received: int
    due: int
    details: dict[str, str] = field(default_factory=dict)
    extended: int = 0
    closed: int = 0
    outcome: str = ""
    ground: str = ""

    def __repr__(self) -> str:
        return f"<Asked {self.number} {self.kind.value} {self.state.value}>"

    @property
    def is_closed(self) -> bool:
        return self.state in CLOSED


@dataclass(frozen=True, slots=True, repr=False)
class Step:
    seq: int
    at: int
    actor: str
    act: str
    state: str
    note: str


def new_ticket() -> str:
    return "R-" + "".join(secrets.choice(_LETTERS) for _ in range(TICKET_LENGTH - 2))


def open_(
    conn: Connection,
    keyring: Keyring,
    *,
    kind: Kind,
    role: Role,
    account: int,
    address: str,
    tag: bytes,
    partition: int,
    channel: str,
    jurisdiction: str,
    details: dict[str, str],
    received: int,
    due: int,
    actor: str,
    now: int,
) -> tuple[Asked, bool]:
    """The request, and whether it is new: who asks the same again while it is open is told the ticket he has."""
    for standing in of_tag(conn, keyring, tag):
        same = (standing.kind, standing.role, standing.account, standing.details) == (kind, role, account, details)
        if same and not standing.is_closed:
            return standing, False
    ticket = new_ticket()
    values: dict[str, Any] = {
        "ticket": ticket,
        "kind": kind.value,
        "role": role.value,
        "account": account or None,
        "address": _seal(keyring, "address", ticket, address.encode()),
        "tag": tag,
        "partition": partition,
        "channel": channel,
        "jurisdiction": jurisdiction,
        "state": State.RECEIVED.value,
        "identity": Identity.OPEN.value,
        "details": _seal(keyring, "details", ticket, msgspec.msgpack.encode(details)) if details else None,
        "received": received,
        "due": due,
        "outcome": "",
        "ground": "",
    }
    key = conn.execute(insert(table).values(**values)).inserted_primary_key
    assert key is not None
    asked = Asked(
        int(key[0]), ticket, kind, role, account, address, tag, partition, channel, jurisdiction, State.RECEIVED,
        Identity.OPEN, received, due, dict(details),
    )  # fmt: skip
    _step(conn, keyring, asked, Act.OPEN.value, actor, now, "")
    return asked, True


def advance(
    conn: Connection,
    keyring: Keyring,
    asked: Asked,
    act: Act,
    *,
    actor: str,
    now: int,
    note: str = "",
    identity: Identity | None = None,
    due: int | None = None,
    outcome: str = "",
    ground: str = "",
) -> tuple[Asked, int]:
    """The request after an act, and the number of the step. Raises states.NotPossible; nothing is written then."""
    state = move(asked.state, act)
    after = replace(asked, state=state, identity=identity or asked.identity)
    if due is not None:
        after = replace(after, due=due, extended=now)
    if state in CLOSED and not asked.is_closed:
        after = replace(after, closed=now, outcome=outcome or state.value, ground=ground)
    conn.execute(
        update(table)
        .where(table.c.number == asked.number)
        .values(
            state=after.state.value, identity=after.identity.value, due=after.due, extended=after.extended or None,
            closed=after.closed or None, outcome=after.outcome, ground=after.ground,
        )
    )  # fmt: skip
    return after, _step(conn, keyring, after, act.value, actor, now, note)


def change_details(conn: Connection, keyring: Keyring, asked: Asked, details: dict[str, str]) -> Asked:
    """What exactly is asked for, as the officer read it out of a letter."""
    sealed = _seal(keyring, "details", asked.ticket, msgspec.msgpack.encode(details)) if details else None
    conn.execute(update(table).where(table.c.number == asked.number).values(details=sealed))
    return replace(asked, details=dict(details))


def forget_address(conn: Connection, asked: Asked) -> None:
    """After an erasure: number, tag and dates stay as the proof of it, whom it was about does not."""
    conn.execute(update(table).where(table.c.number == asked.number).values(address=None, details=None))
    conn.execute(update(request_step).where(request_step.c.request == asked.number).values(note=None))


def by_ticket(conn: Connection, keyring: Keyring, ticket: str) -> Asked | None:
    row = conn.execute(select(table).where(table.c.ticket == ticket)).one_or_none()
    return None if row is None else _asked(keyring, row)


def by_number(conn: Connection, keyring: Keyring, number: int) -> Asked | None:
    row = conn.execute(select(table).where(table.c.number == number)).one_or_none()
    return None if row is None else _asked(keyring, row)


def of_tag(conn: Connection, keyring: Keyring, tag: bytes) -> list[Asked]:
    """Everything one person ever asked, the oldest first."""
    rows = conn.execute(select(table).where(table.c.tag == tag).order_by(table.c.number))
    return [_asked(keyring, row) for row in rows]


def listed(conn: Connection, keyring: Keyring, *, open_only: bool, account: int, limit: int) -> list[Asked]:
    """By due date. account 0: of all; else those that concern it, requests to every account among them."""
    statement = select(table).order_by(table.c.due, table.c.number).limit(limit)
    if open_only:
        statement = statement.where(table.c.state.in_([state.value for state in sorted(OPEN)]))
    if account:
        statement = statement.where((table.c.account == account) | table.c.account.is_(None))
    return [_asked(keyring, row) for row in conn.execute(statement)]


def going(conn: Connection, keyring: Keyring) -> Iterator[tuple[Asked, Case]]:
    """Every request that is not closed, with what decides its next step."""
    asks = (
        select(
            request_step.c.request,
            func.count().label("asks"),
            func.min(request_step.c.at).label("first"),
            func.max(request_step.c.at).label("last"),
        )
        .where(request_step.c.act == Act.ASK.value)
        .group_by(request_step.c.request)
        .subquery()
    )
    statement = (
        select(table, asks.c.asks, asks.c.first, asks.c.last)
        .outerjoin(asks, asks.c.request == table.c.number)
        .where(table.c.state.in_([state.value for state in sorted(OPEN)]))
        .order_by(table.c.due, table.c.number)
    )
    for row in conn.execute(statement).all():
        asked = _asked(keyring, row)
        yield asked, Case(
            asked.kind, asked.role, asked.state, asked.identity, asked.received, asked.due, row.asks or 0,
            row.first or 0, row.last or 0,
        )  # fmt: skip


def steps(conn: Connection, keyring: Keyring, asked: Asked) -> list[Step]:
    rows = conn.execute(select(request_step).where(request_step.c.request == asked.number).order_by(request_step.c.seq))
    return [
        Step(row.seq, row.at, row.actor, row.act, row.state, _open(keyring, "note", asked.ticket, row.note).decode())
        for row in rows
    ]


def has_step(conn: Connection, ticket: str, seq: int) -> bool:
    statement = (
        select(request_step.c.seq)
        .join(table, table.c.number == request_step.c.request)
        .where(table.c.ticket == ticket, request_step.c.seq == seq)
    )
    return conn.execute(statement).scalar() is not None


def opened_since(conn: Connection, channels: Sequence[str], since: int) -> int:
    """How many requests came in by these channels: what the limit for strangers counts."""
    statement = (
        select(func.count())
        .select_from(request_step.join(table, table.c.number == request_step.c.request))
        .where(request_step.c.act == Act.OPEN.value, request_step.c.at > since, table.c.channel.in_(channels))
    )
    return int(conn.execute(statement).scalar_one())


def _step(conn: Connection, keyring: Keyring, asked: Asked, act: str, actor: str, now: int, note: str) -> int:
    last = select(func.max(request_step.c.seq)).where(request_step.c.request == asked.number)
    seq = (conn.execute(last).scalar() or 0) + 1
    sealed = _seal(keyring, "note", asked.ticket, note.encode()) if note else None
    conn.execute(
        insert(request_step).values(
            request=asked.number, seq=seq, at=now, actor=actor, act=act, state=asked.state.value, note=sealed
        )
    )
    audit.append(conn, now, actor, f"rights-{act}", f"request/{asked.number}", asked.kind.value, asked.state.value)
    return seq


def _asked(keyring: Keyring, row: Row[Any]) -> Asked:
    details = _open(keyring, "details", row.ticket, row.details)
    return Asked(
        number=row.number,
        ticket=row.ticket,
        kind=Kind(row.kind),
        role=Role(row.role),
        account=row.account or 0,
        address=_open(keyring, "address", row.ticket, row.address).decode(),
        tag=row.tag,
        partition=row.partition,
        channel=row.channel,
        jurisdiction=row.jurisdiction,
        state=State(row.state),
        identity=Identity(row.identity),
        received=row.received,
        due=row.due,
        details=_DETAILS.decode(details) if details else {},
        extended=row.extended or 0,
        closed=row.closed or 0,
        outcome=row.outcome,
        ground=row.ground,
    )


def _aad(what: str, ticket: str) -> bytes:
    return f"sp-request/{what}/{ticket}".encode()


def _seal(keyring: Keyring, what: str, ticket: str, plain: bytes) -> bytes:
    return seal(keyring.service, plain, _aad(what, ticket))


def _open(keyring: Keyring, what: str, ticket: str, sealed: bytes | None) -> bytes:
    """b"" for what is gone. Raises ValueError, with the ticket: the row was changed, or the key is another."""
    if not sealed:
        return b""
    try:
        return open_sealed(keyring.service, sealed, _aad(what, ticket))
    except SealError:
        raise ValueError(f"the {what} of request {ticket} does not open under service.1") from None
