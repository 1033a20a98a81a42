"""The ledger as a file, for figures made elsewhere: rows in JSON Lines or Parquet, streamed, naming nobody.

Promise: no address, no suppression tag and no reply text leaves here (a reply may quote the address, P-12). A person
is the pseudonym of that week, a message its reference: who has no key of ours cannot join two weeks of one person.

    record = message   the terminal state of a row: kind, reason, domain, code, enhanced, attempts, tls, pseudonym
    record = history   what came before and after: deferrals, complaints, late bounces, repeated rows
    record = hit       opens and clicks of those who agreed to it, to the hour; link is the number in the job's table

Order: by job, then message, history, hit, each by reference. Instants are RFC 3339 in UTC, references 16 hexadecimal
digits (unsigned). `read` holds no transaction open: it asks for the next few thousand rows behind the last one, over
the primary keys, so a writer's log does not grow behind a slow disk. Rows that arrive meanwhile behind the place
reached are in the next export, not in this one.

Known limits: ``since`` looks at every row of the jobs kept, there is no index by instant (5 million rows: some
seconds). Pseudonyms are personal data (GDPR recital 26): keep the file as you keep the database.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from sqlalchemy import Column, ColumnElement, Engine, Table, and_, func, or_, select

from policy.events import Kind, Reason
from policy.instants import HOUR_US, parse_rfc3339, rfc3339
from policy.schema import account, domain, history, hit, job, message
from policy.stories import word

PAGE: Final = 5000
FORMATS: Final = ("jsonl", "parquet")
FIELDS: Final = {
    "record": "text", "account": "text", "job": "text", "reference": "text", "pseudonym": "text", "at": "instant",
    "kind": "text", "reason": "text", "domain": "text", "code": "number", "enhanced": "text", "attempt": "number",
    "tls": "text", "link": "number", "visitor": "number",
}  # fmt: skip
_TLS: Final = {2: "TLS 1.2", 3: "TLS 1.3"}
_64_BITS: Final = (1 << 64) - 1
_DATE_LENGTH: Final = len("2026-11-22")

Row = dict[str, Any]


class ExportError(Exception):
    """This export cannot be made; the text says what to do about it."""


def since_of(text: str) -> int:
    """Microseconds of an RFC 3339 date-time, or of a date: its 00:00 UTC. Raises ValueError."""
    return parse_rfc3339(f"{text}T00:00:00Z" if len(text) == _DATE_LENGTH else text)


def count(engine: Engine, *, since: int | None = None, of: int | None = None) -> int:
    """How many rows `read` will give now: looks at all of them."""
    total = 0
    with engine.connect() as conn:
        for table in (message, history, hit):
            wanted = select(func.count()).select_from(table).where(*_wanted(table, since))
            total += conn.execute(wanted if of is None else wanted.where(table.c.job == of)).scalar_one()
    return total


def people(engine: Engine, *, since: int | None = None, of: int | None = None) -> int:
    """How many people `read` tells of at most: a person is counted anew in each week."""
    wanted = select(func.count(message.c.pseudonym.distinct())).where(
        *_wanted(message, since), message.c.pseudonym != 0
    )
    with engine.connect() as conn:
        return int(conn.execute(wanted if of is None else wanted.where(message.c.job == of)).scalar_one())


def account_of(engine: Engine, of: int) -> int:
    """Whose job it is: a reading of one job concerns the people of its account, and nobody else is told of it."""
    with engine.connect() as conn:
        return int(conn.execute(select(job.c.account).where(job.c.number == of)).scalar_one())


def read(engine: Engine, *, since: int | None = None, of: int | None = None, page: int = PAGE) -> Iterator[list[Row]]:
    """Rows a page. since: microseconds, inclusive (of a hit: of its hour); of: number of the only job wanted."""
    number = of if of is not None else _next_job(engine, None)
    domains: dict[int, str] = {0: ""}
    while number is not None:
        names = _names(engine, number)
        for table, keys, told in (
            (message, (message.c.mref,), _message),
            (history, (history.c.mref, history.c.attempt, history.c.kind), _history),
            (hit, (hit.c.mref, hit.c.id), _hit),
        ):
            for rows in _pages(engine, table, number, keys, since, page):
                if table is message:
                    _learn(engine, domains, {row.domain for row in rows})
                yield [told(row, domains) | names for row in rows]
        number = _next_job(engine, number) if of is None else None


def write(
    path: Path, pages: Iterable[Sequence[Row]], form: str = "jsonl", *, wrote: Callable[[int], None] | None = None
) -> int:
    """The rows into a file (0600) that appears whole or not at all; how many. wrote: told after each page.

    Raises ExportError without pyarrow, OSError."""
    draft = path.with_name(path.name + ".part")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            total = put(file, pages, form, wrote=wrote)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:  # also when somebody presses Ctrl-C: half an export is not left lying about
        draft.unlink(missing_ok=True)
        raise
    return total


def put(
    file: IO[bytes], pages: Iterable[Sequence[Row]], form: str = "jsonl", *, wrote: Callable[[int], None] | None = None
) -> int:
    """The rows into an open file. Raises ExportError."""
    if form not in FORMATS:
        raise ExportError(f"a format is {' or '.join(FORMATS)}")
    sink: _JsonLines | _Parquet = _Parquet(file) if form == "parquet" else _JsonLines(file)
    total = 0
    for rows in pages:
        sink.write(rows)
        total += len(rows)
        if wrote is not None:
            wrote(len(rows))
    sink.close()
    return total


class _JsonLines:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, rows: Sequence[Row]) -> None:
        """All fields that a row has, instants as text; what it has not is not there."""
        self._file.write(
            b"".join(
                json.dumps({name: _text(row, name) for name in FIELDS if name in row}, ensure_ascii=False).encode()
                + b"\n"
                for row in rows
            )
        )

    def close(self) -> None:
        pass


class _Parquet:
    """Instants as timestamps of microseconds in UTC, the rest as text and integers; what a row has not is null."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._arrow: Any = importlib.import_module("pyarrow")
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ExportError("Parquet needs pyarrow: pip install pyarrow, or choose --format jsonl") from None
        types = {
            "text": self._arrow.string(),
            "number": self._arrow.int64(),
            "instant": self._arrow.timestamp("us", tz="UTC"),
        }
        self._schema = self._arrow.schema([(name, types[kind]) for name, kind in FIELDS.items()])
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, rows: Sequence[Row]) -> None:
        columns = {name: [row.get(name) for row in rows] for name in FIELDS}
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _text(row: Row, name: str) -> Any:
    return rfc3339(row[name]) if FIELDS[name] == "instant" else row[name]


def _message(row: Any, domains: dict[int, str]) -> Row:
    return {
        "record": "message",
        "reference": _hex(row.mref),
        "pseudonym": _hex(row.pseudonym) if row.pseudonym else None,
        "at": row.at,
        "kind": word(Kind, row.kind),
        "reason": word(Reason, row.reason) if row.reason else None,
        "domain": domains.get(row.domain),
        "code": row.code or None,
        "enhanced": row.enhanced or None,
        "attempt": max(row.attempts, 0),  # below zero: a place in the audience, nothing was attempted (policy.drains)
        "tls": _TLS.get(row.tls),
    }


def _history(row: Any, _domains: dict[int, str]) -> Row:
    return {
        "record": "history",
        "reference": _hex(row.mref),
        "at": row.at,
        "kind": word(Kind, row.kind),
        "reason": word(Reason, row.reason) if row.reason else None,
        "code": row.code or None,
        "enhanced": row.enhanced or None,
        "attempt": row.attempt,
    }


def _hit(row: Any, _domains: dict[int, str]) -> Row:
    return {
        "record": "hit",
        "reference": _hex(row.mref),
        "at": row.hour * HOUR_US,
        "kind": word(Kind, row.kind),
        "link": row.link if row.link >= 0 else None,
        "visitor": row.visitor,
    }


def _hex(number: int) -> str:
    return f"{number & _64_BITS:016x}"


def _pages(
    engine: Engine, table: Table, number: int, keys: Sequence[Column[Any]], since: int | None, page: int
) -> Iterator[Sequence[Any]]:
    last: tuple[Any, ...] | None = None
    wanted = select(table).where(table.c.job == number, *_wanted(table, since)).order_by(*keys).limit(page)
    while True:
        with engine.connect() as conn:
            rows = conn.execute(wanted if last is None else wanted.where(_behind(keys, last))).all()
        if rows:
            yield rows
        if len(rows) < page:
            return
        last = tuple(getattr(rows[-1], key.name) for key in keys)


def _behind(keys: Sequence[Column[Any]], last: Sequence[Any]) -> ColumnElement[bool]:
    """(a, b, c) > last, with a >= last first: that part is what an index is entered by."""
    steps = [
        and_(*(key == value for key, value in zip(keys[:place], last, strict=False)), keys[place] > last[place])
        for place in range(len(keys))
    ]
    return and_(keys[0] >= last[0], or_(*steps))


def _wanted(table: Table, since: int | None) -> list[ColumnElement[bool]]:
    if since is None:
        return []
    if table is hit:
        return [table.c.hour >= since // HOUR_US]
    return [table.c.at >= since]


def _next_job(engine: Engine, last: int | None) -> int | None:
    """Of the rows, not of the jobs: a job's row may be gone before the last of its messages is."""
    found: list[int] = []
    with engine.connect() as conn:
        for table in (message, history, hit):
            wanted = select(func.min(table.c.job))
            number = conn.execute(wanted if last is None else wanted.where(table.c.job > last)).scalar()
            if number is not None:
                found.append(int(number))
    return min(found, default=None)


def _names(engine: Engine, number: int) -> Row:
    wanted = select(account.c.name, job.c.job_id).join(account, account.c.number == job.c.account)
    with engine.connect() as conn:
        row = conn.execute(wanted.where(job.c.number == number)).one_or_none()
    return {"account": None, "job": str(number)} if row is None else {"account": row.name, "job": row.job_id}


def _learn(engine: Engine, domains: dict[int, str], numbers: set[int]) -> None:
    fresh = sorted(numbers.difference(domains))
    with engine.connect() as conn:
        for start in range(0, len(fresh), 500):
            some = fresh[start : start + 500]
            for row in conn.execute(select(domain.c.number, domain.c.name).where(domain.c.number.in_(some))):
                domains[int(row.number)] = row.name
