"""The data inventory and the public retention table, generated from what stores and sweeps (P-01, P-06).

Promise: nothing here is written by hand twice. Columns come from `policy.schema`, Redis keys from `policy.keyspace`,
files from `policy.files`, periods from the settings that the sweeper goes by, ends from `policy.retention`. Change a
period, and the table that people read and the sweep say the same on the same day.

    `lines`      every column, key family and file family: what of a person, why, class, owner, end
    `missing`    what is stored and not described: a test fails on it, by name
    `table`      the classes as anybody may read them: content, from when on, how long, what then
    pages        both as Markdown, docs/inventory.md and docs/retention.md; `as_html` for an operator's own page

Known limits: purposes of key and file families are those of the room that owns them. The words are English; notices in
other languages are texts of the operator (docs/privacy.md).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Table

from policy import files, keyspace, schema, subprocessors
from policy.classes import RETENTION, Action, Period
from policy.retention import BY_ACT, ENDLESS, PLACES, TRIMMED, Place

# The room that writes each table; its plate says how.
OWNERS: Final[dict[str, str]] = {
    "account": "policy.accounts", "list": "policy.accounts", "topic": "policy.accounts", "domain": "policy.drains",
    "halt": "policy.halts", "job": "policy.jobs", "job_chunk": "policy.jobs", "link": "policy.jobs",
    "job_view": "policy.jobs", "counter": "policy.drains", "subject": "policy.vault", "consent": "policy.consent",
    "negative": "policy.negative", "suppression": "policy.suppression", "message": "policy.drains",
    "history": "policy.drains", "hit": "policy.drains", "hit_counter": "policy.drains", "last_open": "policy.drains",
    "cursor": "policy.cursors", "audit": "policy.audit", "erasure": "policy.erasure", "purge": "policy.erasure",
    "hold": "policy.holds", "held": "policy.holds", "sweep": "policy.bites", "shortening": "policy.sweeping",
    "request": "policy.rights", "request_step": "policy.rights", "proof": "policy.rights",
    "rectification": "policy.rights", "reading": "policy.readings", "disclosure": "policy.disclosures",
    "checkpoint": "policy.checkpoints", "backup": "policy.backup",
}  # fmt: skip
_WHY: Final[dict[str, str]] = {
    "engine.campaign": "to take in jobs and their audiences",
    "engine.queue": "to send each message once",
    "engine.delivery": "to keep the pace that a destination allows",
    "engine.message": "to sign what is sent",
    "tracker": "to take in visits until the ledger has them",
    "policy.suppression": "not to write to somebody again",
    "policy.negative": "not to remember whose visits must not be",
    "policy.halts": "to stop at once what an operator stops",
    "policy.statuses": "to tell producers how far their jobs are",
    "policy.keys": "to seal and to pseudonymise",
    "policy": "to run the installation",
}
_INVENTORY_HEAD: Final = """\
# Data inventory

Every column of SQL, every family of keys in Redis and every kind of file: what of a person it holds, what for, in which
class it is kept ([retention.md](retention.md)), which room of the program writes it, and when it ends (P-01). With the
settings as shipped; of your own: `sales-push policy inventory`.

This page is made by `make docs` from schema, key catalogue and file catalogue; do not edit it.
"""
_RETENTION_HEAD: Final = """\
# How long what is kept

The classes of retention as they are shipped; [privacy.md](privacy.md) says what they are for. An operator may shorten
most of them (`[policy.retention]`), an account may shorten R2, R3 and R4 for itself, nobody can lengthen one. Your own
table, for your own page: `sales-push policy retention --html`. What sweeps reads the same settings (P-06).

This page is made by `make docs` from the retention classes; do not edit it.
"""
_ACTIONS: Final = {
    Action.DROP: "destroyed",
    Action.SHRED: "key and record destroyed",
    Action.AGGREGATE: "destroyed; sums without people are kept",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that is kept. kind: column, key or file; personal: what of a person it holds, "none"."""

    kind: str
    name: str
    personal: str
    purpose: str
    retention: str
    owner: str
    end: str


@dataclass(frozen=True, slots=True)
class Row:
    """One class of the public table."""

    name: str
    content: str
    trigger: str
    period: str
    action: str
    anchor: str


Documented = Line | Row | subprocessors.Row


def lines(periods: Mapping[str, Period]) -> list[Line]:
    """Everything there is, in the order of the sources."""
    found = [
        Line("column", item.column, item.personal, item.purpose, item.retention, OWNERS[table], end)
        for item in schema.inventory()
        for table, _, column in [item.column.partition(".")]
        for end in [_end_of_column(table, column, periods)]
    ]
    for entry in keyspace.CATALOGUE:
        days = TRIMMED.get(entry.name)
        end = f"{days} days after it came; {entry.end}" if days else BY_ACT.get(f"key:{entry.name}", entry.end)
        found.append(Line("key", entry.name, entry.personal, _why(entry.owner), entry.retention, entry.owner, end))
    for family in files.CATALOGUE:
        why = _why(family.owner)
        found.append(Line("file", family.name, family.personal, why, family.retention, family.owner, family.end))
    return found


def missing(tables: Iterable[Table]) -> list[str]:
    """Columns without purpose, class or word about people, and tables without an owner or an end."""
    found: list[str] = []
    for table in tables:
        if table.name not in OWNERS or not _ends(table.name):
            found.append(table.name)
        for column in table.columns:
            info = column.info
            if not all(info.get(name) for name in ("personal", "purpose", "retention")) or (
                info["retention"] not in RETENTION
            ):
                found.append(f"{table.name}.{column.name}")
    return found


def table(periods: Mapping[str, Period]) -> list[Row]:
    """The retention table, by class."""
    return [
        Row(
            one.name,
            one.content,
            one.trigger or one.end,
            str(periods[one.name]) if one.name in periods else _reviewed(one.review),
            _ACTIONS[one.action],
            one.anchor,
        )
        for one in RETENTION.values()
    ]


def as_documents(what: Sequence[Documented]) -> list[dict[str, Any]]:
    return [asdict(one) for one in what]


def as_markdown(what: Sequence[Documented]) -> Iterator[str]:
    """A table; a vertical bar in a text stays one."""
    documents = as_documents(what)
    yield "| " + " | ".join(documents[0]) + " |"
    yield "|" + " --- |" * len(documents[0])
    for document in documents:
        yield "| " + " | ".join(str(value).replace("|", "\\|") for value in document.values()) + " |"


def inventory_page(what: Sequence[Line]) -> Iterator[str]:
    """docs/inventory.md, line by line."""
    yield _INVENTORY_HEAD
    yield from as_markdown(what)


def retention_page(what: Sequence[Row]) -> Iterator[str]:
    """docs/retention.md, line by line."""
    yield _RETENTION_HEAD
    yield from as_markdown(what)


def as_html(what: Sequence[Documented]) -> str:
    """A table of its own to paste into a privacy page: no style, no script."""
    documents = as_documents(what)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in documents[0])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in document.values()) + "</tr>"
        for document in documents
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _reviewed(months: int) -> str:
    return f"no fixed period; reviewed every {months} months"


def _why(owner: str) -> str:
    for name in (one.strip() for one in owner.split(",")):
        while name:
            if name in _WHY:
                return _WHY[name]
            name = name.rpartition(".")[0]
    raise LookupError(owner)


def _ends(name: str) -> bool:
    named = any(place.table == name or name in dict(place.with_rows) for place in PLACES)
    return named or f"table:{name}" in BY_ACT or f"table:{name}" in ENDLESS


def _end_of_column(table_name: str, column: str, periods: Mapping[str, Period]) -> str:
    for place in PLACES:  # a column of its own, a row that goes along, the row itself
        if place.table == table_name and column in place.clears:
            return _told(place, periods)
    for place in PLACES:
        if place.name == table_name:
            return _told(place, periods)
    for place in PLACES:
        if table_name in dict(place.with_rows):
            return _told(place, periods)
    named = f"table:{table_name}"
    return BY_ACT[named] if named in BY_ACT else f"none: {ENDLESS[named]}"


def _told(place: Place, periods: Mapping[str, Period]) -> str:
    kept = periods.get(place.retention)
    if kept is None or not place.dated:
        return place.when
    return f"{kept} from: {place.when}"
