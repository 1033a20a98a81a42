"""The story of one person, told from what is kept without naming anybody: why (not), when, with what reply.

There is no index of persons. For each job still kept its key is opened, the reference that address would have had
(mref, design section 5) is made, and that one row is asked for. No key, no answer: destroying a job's key ends it.
Suppressions are asked by keyed tag, of the address and of its domain.

Known limits: about 30 µs a job kept (3 s for 100,000 jobs). Duplicates of a row stand in its history with an attempt
below zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from policy import suppression
from policy.address import domain_tag, mref_of, normalise, parse, tag_of
from policy.events import Kind, Reason
from policy.keys import Keyring, SealError, open_note, open_sealed
from policy.schema import account, domain, history, job, list_, message, topic
from policy.wire import job_aad


@dataclass(frozen=True, slots=True)
class Standing:
    """One reason not to write. target: address or domain; scope_name: of account, list or topic."""

    target: str
    scope: str
    scope_id: int
    scope_name: str
    reason: str
    source: str
    since: int
    until: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a message's history. attempt below zero: a row of the audience that repeated another."""

    kind: str
    reason: str
    at: int
    attempt: int
    code: int
    enhanced: str
    reply: str


@dataclass(frozen=True, slots=True)
class Story:
    """What became of one person in one job. kind "waiting": history, but no terminal state yet."""

    job: int
    account: str
    job_id: str
    kind: str
    reason: str
    at: int
    domain: str
    code: int
    enhanced: str
    attempts: int
    tls: int
    reply: str
    history: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Why:
    """Everything the ledger can say about an address; unreadable: jobs whose key does not open any more."""

    standing: list[Standing]
    stories: list[Story]
    unreadable: int

    @property
    def is_known(self) -> bool:
        return bool(self.standing or self.stories)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def why(conn: Connection, keyring: Keyring, address: str) -> Why:
    """Everything about an address. Raises AddressError."""
    mailbox = parse(address)
    normalised = normalise(mailbox.local, mailbox.domain)
    tags = (("address", tag_of(keyring.pepper, normalised)), ("domain", domain_tag(keyring.pepper, mailbox.domain)))
    standing = [_standing(conn, target, entry) for target, tag in tags for entry in suppression.check(conn, tag)]
    stories: list[Story] = []
    unreadable = 0
    kept = (
        select(job.c.number, job.c.job_id, job.c.job_key, account.c.name)
        .join(account, account.c.number == job.c.account)
        .where(job.c.job_key.is_not(None))
        .order_by(job.c.number)
    )
    for number, job_id, sealed, name in conn.execute(kept).all():
        try:
            job_key = open_sealed(keyring.service, sealed, job_aad("key", name, job_id))
        except SealError:
            unreadable += 1
            continue
        story = _story(conn, keyring, number, name, job_id, mref_of(job_key, normalised))
        if story is not None:
            stories.append(story)
    return Why(standing, stories, unreadable)


def word(names: type[Kind] | type[Reason], number: int) -> str:
    """An enum member as people read it: "user-unknown"."""
    try:
        return names(number).name.lower().replace("_", "-")
    except ValueError:
        return str(number)  # a newer version wrote it


def _standing(conn: Connection, target: str, entry: suppression.Entry) -> Standing:
    tables = {
        suppression.Scope.ACCOUNT: account,
        suppression.Scope.LIST: list_,
        suppression.Scope.TOPIC: topic,
    }
    table = tables.get(entry.scope)
    name = ""
    if table is not None:
        name = conn.execute(select(table.c.name).where(table.c.number == entry.scope_id)).scalar() or ""
    return Standing(
        target=target,
        scope=suppression.Scope(entry.scope).name.lower(),
        scope_id=entry.scope_id,
        scope_name=name,
        reason=entry.reason,
        source=entry.source,
        since=entry.created,
        until=entry.expires,
    )


def _story(conn: Connection, keyring: Keyring, number: int, name: str, job_id: str, mref: int) -> Story | None:
    row = conn.execute(
        select(message, domain.c.name.label("domain_name"))
        .outerjoin(domain, domain.c.number == message.c.domain)
        .where(message.c.job == number, message.c.mref == mref)
    ).one_or_none()
    steps = [
        Step(
            kind=word(Kind, line.kind),
            reason=word(Reason, line.reason) if line.reason else "",
            at=line.at,
            attempt=line.attempt,
            code=line.code,
            enhanced=line.enhanced,
            reply=_note(keyring, line.note),
        )
        for line in conn.execute(
            select(history)
            .where(history.c.job == number, history.c.mref == mref)
            .order_by(history.c.at, history.c.attempt, history.c.kind)
        )
    ]
    if row is None:
        if not steps:
            return None
        last = steps[-1]
        return Story(
            number, name, job_id, "waiting", last.reason, last.at, "", last.code, last.enhanced, last.attempt, 0,
            last.reply, steps,
        )  # fmt: skip
    return Story(
        job=number,
        account=name,
        job_id=job_id,
        kind=word(Kind, row.kind),
        reason=word(Reason, row.reason) if row.reason else "",
        at=row.at,
        domain=row.domain_name or "",
        code=row.code,
        enhanced=row.enhanced,
        attempts=max(row.attempts, 0),  # below zero: a place in the audience (policy.drains), nothing was attempted
        tls=row.tls,
        reply=_note(keyring, row.note),
        history=steps,
    )


def _note(keyring: Keyring, note: bytes | None) -> str:
    if not note:
        return ""
    try:
        return open_note(keyring, note)
    except SealError:
        return "(sealed under another key)"
