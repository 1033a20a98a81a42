"""Rows in plain words, as somebody reads them who was never here: names for our numbers, RFC 3339 for our instants.

Law: a word here is a word of the bundle (`policy.bundle`, requirements 4.6); an unknown number is shown as it is, never
guessed; what no key opens any more says so.

Known limits: who fetched a picture is told by the ranges of `tracker.visitors` alone, this floor may not import it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Select, select

from policy import schema, suppression
from policy.address import mref_bytes
from policy.events import Kind
from policy.instants import rfc3339
from policy.keys import Keyring, SealError, open_note, open_sealed
from policy.personal import Person, Record, Value
from policy.stories import word

AT_ONCE: Final = 500  # rows a statement, and a transaction of erasing: opt-outs wait for one
TLS: Final = {0: "", 2: "TLS 1.2", 3: "TLS 1.3"}


def by_job(references: Iterable[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """Messages by job, so many at once."""
    for job, pairs in itertools.groupby(sorted(references), key=lambda pair: pair[0]):
        while some := [mref for _, mref in itertools.islice(pairs, AT_ONCE)]:
            yield job, some


def accounts_by_number(conn: Connection) -> dict[int | None, str]:
    table = schema.account
    return {row.number: row.name for row in conn.execute(select(table.c.number, table.c.name))}


def job_words(conn: Connection, number: int) -> dict[str, Value] | None:
    job, account, list_, topic = schema.job, schema.account, schema.list_, schema.topic
    row = conn.execute(
        select(job.c.job_id, job.c.kind, account.c.name, list_.c.name.label("of_list"), topic.c.name.label("of_topic"))
        .join(account, account.c.number == job.c.account)
        .outerjoin(list_, list_.c.number == job.c.list)
        .outerjoin(topic, topic.c.number == job.c.topic)
        .where(job.c.number == number)
    ).one_or_none()
    if row is None:
        return None
    return {"account": row.name, "job": row.job_id, "kind": row.kind, "list": row.of_list or "",
            "topic": row.of_topic or ""}  # fmt: skip


def messages(job: int, mrefs: Sequence[int]) -> Select[Any]:
    table, names = schema.message, schema.domain
    wanted = select(table, names.c.name.label("domain_name")).outerjoin(names, names.c.number == table.c.domain)
    return wanted.where(table.c.job == job, table.c.mref.in_(mrefs)).order_by(table.c.at, table.c.mref)


def event(row: Any, kind: int, at: str) -> dict[str, Value]:
    return {"reference": mref_bytes(row.mref).hex(), "event": word(Kind, kind), "at": at}


def reply(keyring: Keyring, row: Any) -> dict[str, Value]:
    try:
        text = open_note(keyring, row.note) if row.note else ""
    except SealError:
        text = "(sealed under another key)"
    return {"code": row.code, "enhanced": row.enhanced, "reply": text}


def subscriptions(conn: Connection, person: Person, subscribed: dict[tuple[str, str, str], int]) -> Iterator[Record]:
    """Lists that were written to, and whether they still may."""
    entries = [(entry, *scope_words(conn, entry)) for entry in suppression.check(conn, person.tag)]
    for (account, list_, topic), first in sorted(subscribed.items()):
        against = [
            entry.created
            for entry, holder, name in entries
            if entry.scope is suppression.Scope.PLATFORM
            or (holder == account and (entry.scope is suppression.Scope.ACCOUNT or name in (list_, topic)))
        ]
        state: dict[str, Value] = {"state": "unsubscribed", "since": rfc3339(min(against))} if against else {
            "state": "subscribed", "since": rfc3339(first)
        }  # fmt: skip
        yield Record("subscription", {"account": account, "list": list_, "topic": topic, **state})


def scope_words(conn: Connection, entry: suppression.Entry) -> tuple[str, str]:
    """(account, name of list or topic) of a suppression."""
    if entry.scope is suppression.Scope.PLATFORM:
        return "", ""
    if entry.scope is suppression.Scope.ACCOUNT:
        return accounts_by_number(conn).get(entry.scope_id, ""), ""
    table = schema.list_ if entry.scope is suppression.Scope.LIST else schema.topic
    holder = select(table.c.name, schema.account.c.name.label("holder")).join(schema.account)
    row = conn.execute(holder.where(table.c.number == entry.scope_id)).one_or_none()
    return ("", "") if row is None else (row.holder, row.name)


def visitor(number: int) -> str:
    """The ranges of tracker.visitors, which this floor may not import."""
    if number == 0:
        return "unknown"
    return "a mail service" if number < 16 else "a program" if number < 32 else "a person"


def opened(key: bytes, sealed: bytes | None, aad: bytes) -> str | None:
    if not sealed or not key:
        return None
    try:
        return open_sealed(key, sealed, aad).decode()
    except SealError:
        return "(sealed under another key)"


def when(at: int | None) -> str | None:
    return None if at is None else rfc3339(at)
