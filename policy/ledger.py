"""What happened, read: figures of a job, the story of a person, what workers and trackers need of a job.

Promise: reads only (``mode=ro``), so any process may hold a `Reader`; answers are of one snapshot a call. Rows are
written elsewhere, by the one writer (`policy.drains`, `policy.jobs`); every row submitted is in exactly one terminal
state once its job is done (I6).

`why` (in `policy.stories`) finds a person without an index of persons.

Known limits: rates are of the ledger, so they trail the
wire by up to one drain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Engine, func, select

from policy import accounts, halts, statements, stories, suppression
from policy.events import TERMINAL, Kind, Reason
from policy.keys import Keyring
from policy.schema import account, counter, cursor, domain, hit_counter, job, job_chunk, job_view, link, list_, message
from policy.schema import topic as topic_table
from policy.stories import Why, word

_TERMINAL = {int(kind) for kind in TERMINAL}
_MANY = 500  # values an IN list


class Ambiguous(Exception):
    """A job id that several accounts use: say account/job_id."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job's figures. counts, reasons: by name; waiting: rows not terminal yet, None until all chunks are in;
    rate: terminal rows a second from acceptance to now or its end. Instants in microseconds."""

    number: int
    account: str
    job_id: str
    state: str
    kind: str
    reason: str
    created_at: int
    accepted_at: int
    send_at: int | None
    expires_at: int | None
    done_at: int | None
    chunks_expected: int
    chunks: int
    rows_submitted: int | None
    counts: dict[str, int]
    reasons: dict[str, dict[str, int]]
    terminal: int
    waiting: int | None
    deferrals: int
    rate: float
    opens: int
    clicks: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class JobPayload:
    """A job as a worker needs it. payload, job_key: sealed (policy.wire.job_aad); None: destroyed with the job."""

    number: int
    account_number: int
    account: str
    job_id: str
    state: str
    kind: str
    list_number: int
    list_name: str
    topic_number: int
    topic_name: str
    in_doubt: str
    priority: bool
    wait: bool
    opens_mode: int
    clicks_mode: int
    created_at: int
    send_at: int | None
    expires_at: int | None
    chunks_expected: int
    payload: bytes | None
    job_key: bytes | None


@dataclass(frozen=True, slots=True)
class Report:
    """A job in rows: (domain, kind, reason, n) by n, and (link number, url, kind, visitor, n)."""

    status: JobStatus
    domains: list[tuple[str, str, str, int]]
    links: list[tuple[int, str, str, int, int]]


_PAYLOAD_COLUMNS: Final = tuple(JobPayload.__dataclass_fields__)


@cache
def _payload_query(dialect: str) -> str:
    named = {
        "account_number": "j.account", "account": "a.name", "list_number": "coalesce(j.list, 0)",
        "list_name": "coalesce(l.name, '')", "topic_number": "coalesce(j.topic, 0)",
        "topic_name": "coalesce(t.name, '')",
    }  # fmt: skip
    columns = ", ".join(named.get(column, f"j.{column}") for column in _PAYLOAD_COLUMNS)
    return (
        f"SELECT {columns} FROM job j JOIN account a ON a.number = j.account LEFT JOIN list l ON l.number = j.list"
        f" LEFT JOIN topic t ON t.number = j.topic WHERE j.number = {statements.mark(dialect)}"
    )


class Reader:
    """Questions to the ledger. engine: policy.schema.open_store(url, writer=False)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        self._engine.dispose()

    # --- jobs ---------------------------------------------------------------------------------------------------

    def number(self, name: int | str) -> int | None:
        """Of a number, a job id or account/job_id. Raises Ambiguous."""
        with self._engine.connect() as conn:
            return number_of(conn, name)

    def job_status(self, name: int | str, now: int) -> JobStatus | None:
        with self._engine.connect() as conn:
            number = number_of(conn, name)
            return None if number is None else self._status(conn, number, now)

    def jobs(self, now: int, limit: int = 50, state: str = "") -> list[JobStatus]:
        """The newest first."""
        wanted = select(job.c.number).order_by(job.c.number.desc()).limit(limit)
        if state:
            wanted = wanted.where(job.c.state == state)
        with self._engine.connect() as conn:
            found = [self._status(conn, number, now) for number in conn.scalars(wanted).all()]
        return [status for status in found if status is not None]

    def _status(self, conn: Connection, number: int, now: int) -> JobStatus | None:
        row = conn.execute(
            select(job, account.c.name.label("account_name"))
            .join(account, account.c.number == job.c.account)
            .where(job.c.number == number)
        ).one_or_none()
        if row is None:
            return None
        counts: dict[str, int] = {}
        reasons: dict[str, dict[str, int]] = {}
        terminal = deferrals = 0
        sums = (
            select(counter.c.kind, counter.c.reason, func.sum(counter.c.n).label("n"))
            .where(counter.c.job == number)
            .group_by(counter.c.kind, counter.c.reason)
        )
        for kind, reason, n in conn.execute(sums):
            n = int(n)
            if kind == Kind.DEFERRED:
                deferrals += n
            if kind in _TERMINAL:
                terminal += n
            name = word(Kind, kind)
            counts[name] = counts.get(name, 0) + n
            if reason:
                reasons.setdefault(name, {})[word(Reason, reason)] = n
        chunks = conn.execute(select(func.count()).select_from(job_chunk).where(job_chunk.c.job == number)).scalar_one()
        hits = {
            kind: int(n)
            for kind, n in conn.execute(
                select(hit_counter.c.kind, func.sum(hit_counter.c.n))
                .where(hit_counter.c.job == number)
                .group_by(hit_counter.c.kind)
            )
        }
        seconds = max(((row.done_at or now) - row.accepted_at) / 1e6, 1e-3)
        return JobStatus(
            number=number,
            account=row.account_name,
            job_id=row.job_id,
            state=row.state,
            kind=row.kind,
            reason=row.reason or "",
            created_at=row.created_at,
            accepted_at=row.accepted_at,
            send_at=row.send_at,
            expires_at=row.expires_at,
            done_at=row.done_at,
            chunks_expected=row.chunks_expected,
            chunks=int(chunks),
            rows_submitted=row.rows_submitted,
            counts=counts,
            reasons=reasons,
            terminal=terminal,
            waiting=None if row.rows_submitted is None else max(row.rows_submitted - terminal, 0),
            deferrals=deferrals,
            rate=round(terminal / seconds, 2),
            opens=hits.get(int(Kind.OPENED), 0),
            clicks=hits.get(int(Kind.CLICKED), 0),
        )

    def report(self, name: int | str, now: int) -> Report | None:
        with self._engine.connect() as conn:
            number = number_of(conn, name)
            status = None if number is None else self._status(conn, number, now)
            if status is None:
                return None
            by_domain = (
                select(domain.c.name, counter.c.kind, counter.c.reason, counter.c.n)
                .select_from(counter)
                .outerjoin(domain, domain.c.number == counter.c.domain)
                .where(counter.c.job == number)
                .order_by(counter.c.n.desc(), counter.c.domain, counter.c.kind, counter.c.reason)
            )
            by_link = (
                select(hit_counter.c.link, link.c.url, hit_counter.c.kind, hit_counter.c.visitor, hit_counter.c.n)
                .select_from(hit_counter)
                .outerjoin(link, (link.c.job == hit_counter.c.job) & (link.c.number == hit_counter.c.link))
                .where(hit_counter.c.job == number)
                .order_by(hit_counter.c.link, hit_counter.c.n.desc(), hit_counter.c.kind, hit_counter.c.visitor)
            )
            domains = [
                (name or "", word(Kind, kind), word(Reason, reason) if reason else "", int(n))
                for name, kind, reason, n in conn.execute(by_domain)
            ]
            links = [
                (number, url or "", word(Kind, kind), visitor, int(n))
                for number, url, kind, visitor, n in conn.execute(by_link)
            ]
        return Report(status, domains, links)

    def job_payload(self, number: int) -> JobPayload | None:
        """None: no such job."""
        # once a job and worker, however few recipients it has: a text for the driver, built once
        with self._engine.connect() as conn:
            row = conn.exec_driver_sql(_payload_query(conn.dialect.name), (number,)).one_or_none()
        if row is None:
            return None
        values = dict(zip(_PAYLOAD_COLUMNS, row, strict=True))
        values["priority"], values["wait"] = bool(values["priority"]), bool(values["wait"])
        return JobPayload(**values)

    def accounted(self, number: int, mrefs: Sequence[int]) -> tuple[bool, set[int]]:
        """(whether the job is over, those of these references that reached a terminal state): what a worker asks
        before it sends for a slice of a restored Redis (T12). A job nobody knows is not over."""
        with self._engine.connect() as conn:
            over = conn.execute(select(job.c.done_at).where(job.c.number == number)).scalar() is not None
            return over, terminal_of(conn, number, mrefs)

    def suspected(self) -> int:
        """The highest number of a job that a restored Redis may have forgotten the ends of (T12); 0: none was restored.
        Written by `policy.restore` before it lets anybody in."""
        with self._engine.connect() as conn:
            return int(conn.execute(select(cursor.c.last_id).where(cursor.c.stream == "restored")).scalar() or 0)

    def link_table(self, number: int) -> list[str]:
        """Destinations by link number; empty when the job tracks no links or is not known."""
        wanted = select(link.c.url).where(link.c.job == number).order_by(link.c.number)
        with self._engine.connect() as conn:
            return list(conn.scalars(wanted))

    def view(self, number: int) -> str | None:
        """The web version, or None."""
        with self._engine.connect() as conn:
            html: str | None = conn.execute(select(job_view.c.html).where(job_view.c.job == number)).scalar()
        return html

    def account(self, name: int | str) -> accounts.Account | None:
        """By number or name."""
        with self._engine.connect() as conn:
            return accounts.by_number(conn, name) if isinstance(name, int) else accounts.get(conn, name)

    def accounts(self) -> list[accounts.Account]:
        with self._engine.connect() as conn:
            return accounts.every(conn)

    def halts(self) -> list[halts.Halt]:
        """Accounts and domains that an operator has halted."""
        with self._engine.connect() as conn:
            return halts.standing(conn)

    # --- a person -----------------------------------------------------------------------------------------------

    def why(self, address: str, keyring: Keyring) -> Why:
        """Everything about an address (`policy.stories`). Raises AddressError."""
        with self._engine.connect() as conn:
            return stories.why(conn, keyring, address)

    def scope_number(self, scope: str, name: str) -> int | None:
        """Of "acme" (account), "acme/news" (list, topic); 0 for the platform; None when there is none such."""
        if scope == "platform":
            return 0
        holder, _, part = name.partition("/")
        with self._engine.connect() as conn:
            found = accounts.get(conn, holder)
            if found is None or scope == "account":
                return None if found is None else found.number
            table = list_ if scope == "list" else topic_table
            wanted = select(table.c.number).where(table.c.account == found.number, table.c.name == part)
            number: int | None = conn.execute(wanted).scalar()
        return number

    def suppressed(self) -> int:
        """How many entries that are: what an export asks leave for."""
        with self._engine.connect() as conn:
            return suppression.count(conn)

    def suppressions(self) -> Iterator[suppression.Entry]:
        """All of them, read as they are asked for: an export of a million needs no memory for them."""
        with self._engine.connect() as conn:
            yield from suppression.every(conn)


def terminal_of(conn: Connection, number: int, mrefs: Sequence[int]) -> set[int]:
    """Those of these references of a job that reached a terminal state."""
    found: set[int] = set()
    for start in range(0, len(mrefs), _MANY):
        some = list(mrefs[start : start + _MANY])
        found.update(conn.scalars(select(message.c.mref).where(message.c.job == number, message.c.mref.in_(some))))
    return found


def number_of(conn: Connection, name: int | str) -> int | None:
    """The job meant by a number, "account/job_id" or a job id only one account uses. Raises Ambiguous."""
    if isinstance(name, int):
        return conn.execute(select(job.c.number).where(job.c.number == name)).scalar()
    holder, slash, job_id = name.partition("/")
    if slash:
        exact = select(job.c.number).join(account, account.c.number == job.c.account)
        number = conn.execute(exact.where(account.c.name == holder, job.c.job_id == job_id)).scalar()
        if number is not None:
            return int(number)
    found = conn.scalars(select(job.c.number).where(job.c.job_id == name).limit(2)).all()
    if len(found) > 1:
        raise Ambiguous("several accounts use this job id: write account/job_id")
    if not found and name.isascii() and name.isdigit() and len(name) < 19:
        return number_of(conn, int(name))
    return found[0] if found else None
