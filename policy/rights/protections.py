"""What protects a person at once: restriction, objection, withdrawal; in SQL, for the change that `Enforcement` tells.

Laws: each is one transaction with the step that says so, and is in force at gate and trackers before anybody is told;
each may be repeated. One does not undo another: lifting a restriction leaves opt-outs, objections and withdrawals as
they stand, and is refused while another request of the same person needs it (P-55, P-57). Nor does it bring visits
back to a person who does not agree to all of their tracking at that instant (`consent.is_whole`).

Scope: a request to one account reaches that account; one to nobody in particular (account 0) reaches the platform.

Known limits: the negative list knows a person whole, so a restricted person's visits are not remembered for any
purpose. An account holder's restriction pauses the account; it does not touch the account's contacts.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, select

from policy import consent, halts, keyspace, negative, suppression
from policy.enforcement import Effects
from policy.rights.requests import Asked
from policy.rights.states import RESTRICTED_AT_ONCE, Kind, Role, State
from policy.schema import account as account_table
from policy.schema import negative as negative_table
from policy.schema import request as request_table
from policy.schema import subject as subject_table

LIFTED: Final = "lifted"  # outcome of a restriction that has ended
PURPOSES: Final = tuple(sorted(consent.PURPOSES))
_MARKETING: Final = ("mail_marketing", "doe")  # what an objection to marketing ends; profiling is part of it (21(2))


def subjects_of(conn: Connection, tag: bytes, account: int = 0) -> list[tuple[int, int]]:
    """(subject, account) of a tag, at one account or at all, by account."""
    known = select(subject_table.c.number, subject_table.c.account).where(subject_table.c.tag == tag)
    if account:
        known = known.where(subject_table.c.account == account)
    else:
        known = known.where(subject_table.c.account.in_(select(account_table.c.number)))
    return [(row.number, row.account) for row in conn.execute(known.order_by(subject_table.c.account))]


def restrict(conn: Connection, effects: Effects, asked: Asked, now: int) -> bool:
    """False: it was restricted already, by an earlier request or by hand."""
    if asked.role is Role.HOLDER:
        paused = halts.pause_account(conn, asked.account, f"request {asked.number}", now)
        _say_halt(conn, effects, asked.account)
        return paused
    fresh = not _has(conn, asked, "restriction")
    _suppress(conn, effects, asked, "restriction", now)
    for number, _ in subjects_of(conn, asked.tag, asked.account):
        if negative.standing(conn, number) not in ("restricted", "erased"):
            effects.negative.append((number, "restricted", negative.add(conn, number, "restricted", now)))
    return fresh


def is_needed(conn: Connection, asked: Asked) -> bool:
    """Whether another request keeps the restriction up: one that asked for it, or one that is still looked at."""
    others = conn.execute(
        select(request_table.c.kind, request_table.c.state, request_table.c.account, request_table.c.outcome)
        .where(request_table.c.tag == asked.tag, request_table.c.number != asked.number)
        .where(request_table.c.role == asked.role.value)
    )  # fmt: skip
    for row in others:
        if (row.account or 0) != asked.account or row.kind not in RESTRICTED_AT_ONCE:
            continue
        if row.state in (State.RECEIVED, State.IDENTIFYING, State.IN_PROGRESS):
            return True
        if row.kind == Kind.RESTRICTION and row.state == State.DONE and row.outcome != LIFTED:
            return True
    return False


def lift(conn: Connection, effects: Effects, asked: Asked, now: int) -> bool:
    """False: another request needs it, or nothing was restricted."""
    if is_needed(conn, asked):
        return False
    if asked.role is Role.HOLDER:
        resumed = halts.resume_account(conn, asked.account)
        _say_halt(conn, effects, asked.account)
        return resumed
    scope, scope_id = _scope(asked.account)
    removed = suppression.remove(conn, asked.tag, scope, scope_id, "restriction")
    effects.tags.add((asked.tag, asked.partition))
    if removed:
        effects.lifted.add(asked.tag)
    still = {(one.scope, one.scope_id) for one in suppression.check(conn, asked.tag) if one.reason == "restriction"}
    for number, account in subjects_of(conn, asked.tag, asked.account):
        before, restricted = _since_lifted(conn, number)
        if not restricted or still & {_scope(0), _scope(account)}:  # the other scope, platform or account, holds on
            continue
        if not before and not consent.is_whole(conn, number, now):
            before = "withdrawn"  # taken back or ended meanwhile, when the list had them already (policy.lapsing)
        if before:  # what stood before the restriction stands again
            effects.negative.append((number, before, negative.add(conn, number, before, now)))
        else:
            effects.negative.append((number, negative.LIFTED, negative.lift(conn, number, now)))
    return bool(removed)


def object_to_marketing(conn: Connection, effects: Effects, asked: Asked, now: int) -> None:
    """GDPR 21(3): absolute and at once. It suppresses and does not erase (P-57)."""
    _suppress(conn, effects, asked, "opt-out", now)
    for number, _ in subjects_of(conn, asked.tag, asked.account):
        for purpose in _MARKETING:
            consent.withdraw(conn, number, purpose, _source(asked), now)
        if negative.standing(conn, number) not in ("objected", "erased"):
            effects.negative.append((number, "objected", negative.add(conn, number, "objected", now)))


def withdraw(conn: Connection, effects: Effects, asked: Asked, now: int) -> None:
    """Consent taken back: of the purpose in the details, else of all."""
    wanted = asked.details.get("purpose", "")
    purposes = (wanted,) if wanted else PURPOSES
    if "mail_marketing" in purposes:  # the gate asks suppressions, not consent: put it where it looks (T4)
        _suppress(conn, effects, asked, "opt-out", now)
    for number, _ in subjects_of(conn, asked.tag, asked.account):
        for purpose in purposes:
            seq = consent.withdraw(conn, number, purpose, _source(asked), now)
            if seq is not None:
                effects.negative.append((number, "withdrawn", seq))


def suppress_for_good(conn: Connection, effects: Effects, asked: Asked, now: int, source: str = "") -> None:
    """Nobody writes to this address again (a child's, P-48; an address that was given up, P-41)."""
    _suppress(conn, effects, asked, "manual", now, source)


def _suppress(conn: Connection, effects: Effects, asked: Asked, reason: str, now: int, source: str = "") -> None:
    scope, scope_id = _scope(asked.account)
    entry = suppression.Entry(
        asked.tag, asked.partition, scope, scope_id, reason, now, source or _source(asked)
    )  # fmt: skip
    suppression.add(conn, [entry])
    effects.tags.add((asked.tag, asked.partition))


def _has(conn: Connection, asked: Asked, reason: str) -> bool:
    place = _scope(asked.account)
    return any(
        (one.scope, one.scope_id) == place and one.reason == reason for one in suppression.check(conn, asked.tag)
    )


def _since_lifted(conn: Connection, number: int) -> tuple[str, bool]:
    """(what else stands on the negative list under a restriction, whether there is one)."""
    statement = select(negative_table.c.reason).where(negative_table.c.subject == number)
    standing: list[str] = []
    for reason in conn.scalars(statement.order_by(negative_table.c.seq)):
        standing = [] if reason == negative.LIFTED else [*standing, reason]
    others = [reason for reason in standing if reason != "restricted"]
    return (others[-1] if others else ""), bool(standing) and standing[-1] == "restricted"


def _scope(account: int) -> tuple[suppression.Scope, int]:
    return (suppression.Scope.ACCOUNT, account) if account else (suppression.Scope.PLATFORM, 0)


def _source(asked: Asked) -> str:
    return f"request {asked.number}"


def _say_halt(conn: Connection, effects: Effects, account: int) -> None:
    where = range(keyspace.PARTITIONS)
    effects.words[f"a{account}", where] = halts.is_account_halted(conn, account)
