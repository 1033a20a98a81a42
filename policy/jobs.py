"""Jobs in SQL: acceptance, chunks, states (T1, T2); sync functions of the writer's transaction.

Laws:
- a job id means one payload: the same hash again is the same job, another hash is a conflict (idempotency for as long
  as the row is kept, 90 days);
- a chunk number means one content; other bytes under a known number stop the job with its reason;
- a state that ends a job (done, cancelled, expired, lost, rejected) is left by nobody, but for the next line;
- every change that a producer may read is marked (`policy.store.mark`), so that its status in Redis follows.

A job that a restored Redis has lost recipients of ends `lost` (T12); offered again with the same contents it is taken
up again under its number and key: who had an end by delivery keeps it, the rest is expanded anew.

Known limits: while something of a lost job is still on the lanes it cannot be taken up: the caller asks again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, or_, select, update

from policy import accounts, audit, statements
from policy.events import TERMINAL, Kind
from policy.gate import Mode
from policy.ledger import number_of
from policy.schema import counter, history, job, job_chunk, message
from policy.store import mark
from policy.transitions import JOB_ENDED, JOB_MOVES
from policy.wire import Accepted, JobRecord

ENDED: Final = JOB_ENDED
LOST: Final = "lost"
_TERMINAL: Final = sorted(int(kind) for kind in TERMINAL)
_MANY: Final = 256  # jobs a statement


# A transactional burst is thousands of small jobs, and putting a statement together costs more than SQLite needs to run
# it (50 to 100 us each). So they are built once, and those of every job are texts for the driver (policy.statements).
_ROW: Final = select(job).where(job.c.number == bindparam("of"))
_CHUNK: Final = select(job_chunk.c.hash).where(
    job_chunk.c.job == bindparam("of"), job_chunk.c.number == bindparam("place")
)
_ENTER_CHUNK: Final = insert(job_chunk)
_TO_STATE: Final = update(job).where(job.c.number == bindparam("of")).values(state=bindparam("state"))
_TO_STATE_BECAUSE: Final = _TO_STATE.values(reason=bindparam("reason"))


class Refused(Exception):
    """The ledger's answer is no; kind is a slug for the wire."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def accept(conn: Connection, record: JobRecord, now: int) -> Accepted:
    """Enter a job once. Everything in it is committed together: row, links, view, its only entry. Answers the status
    LOST where `reopen` may take it up again."""
    holder = accounts.get(conn, record.account)
    if holder is None:
        return Accepted("unknown-account")
    known = _offered(conn, holder.number, record.job_id)
    if known is not None and known.hash != record.hash:
        return _accepted("conflict", known, holder)
    if known is not None and known.state != LOST:
        return _accepted("same", known, holder)
    if holder.is_frozen:
        return Accepted("frozen", account=holder.number)
    if known is not None:
        if known.done_at is None:
            raise Refused("redis", "what is left of this lost job is being cleared away, offer it again in a while")
        return _accepted(LOST, known, holder)
    state = "expanding" if record.entry_hash else "accepted"  # as `chunk` would leave it
    values: dict[str, Any] = {
        "account": holder.number,
        "job_id": record.job_id,
        "hash": record.hash,
        "state": state,
        "kind": record.kind,
        "list": accounts.list_number(
            conn, holder.number, record.list or "default"
        ),  # an opt-out names a list, so there is one
        "topic": accounts.topic_number(conn, holder.number, record.topic) if record.topic else None,
        "legal_basis": record.legal_basis,
        "in_doubt": record.in_doubt,
        "priority": int(record.priority),
        "wait": int(record.wait),
        "opens_mode": min(record.opens_mode, holder.opens_mode, Mode.INDIVIDUAL),
        "clicks_mode": min(record.clicks_mode, holder.clicks_mode, Mode.INDIVIDUAL),
        "subject_sealed": record.subject or None,
        "payload": record.payload,
        "job_key": record.job_key,
        "created_at": record.created_at,
        "accepted_at": record.accepted_at or now,
        "send_at": record.send_at or None,
        "expires_at": record.expires_at or None,
        "chunks_expected": record.chunks_expected,
    }
    enter = functools.partial(statements.insert, conn.dialect.name)
    made = conn.exec_driver_sql(f"{enter('job', ', '.join(values))} RETURNING number", tuple(values.values()))
    number = int(made.scalar_one())
    mark(conn, number)
    if record.links:
        conn.exec_driver_sql(
            enter("link", "job, number, url"), [(number, place, url) for place, url in enumerate(record.links)]
        )
    if record.entry_hash:
        entry = number, 0, record.entry_hash, record.entry_rows
        conn.exec_driver_sql(enter("job_chunk", "job, number, hash, rows"), entry)
    if record.view:
        conn.exec_driver_sql(enter("job_view", "job, html"), (number, record.view))
    return Accepted(
        status="new",
        number=number,
        account=holder.number,
        list=values["list"],
        topic=values["topic"] or 0,
        opens_mode=holder.opens_mode,
        clicks_mode=holder.clicks_mode,
        state=state,
        has_entry=bool(record.entry_hash),
    )


def _offered(conn: Connection, holder: int, job_id: str) -> Row[tuple[object, ...]] | None:
    one = statements.mark(conn.dialect.name)
    asked = f"SELECT number FROM job WHERE account = {one} AND job_id = {one}"
    number = conn.exec_driver_sql(asked, (holder, job_id)).scalar()
    return None if number is None else _row(conn, int(number))


def _accepted(status: str, row: Row[tuple[object, ...]], holder: accounts.Account) -> Accepted:
    return Accepted(
        status=status,
        number=row.number,
        account=holder.number,
        list=row.list or 0,
        topic=row.topic or 0,
        opens_mode=holder.opens_mode,
        clicks_mode=holder.clicks_mode,
        state=row.state,
        job_key=row.job_key or b"",
        payload=row.payload or b"",
    )


def chunk(conn: Connection, number: int, index: int, digest: bytes, rows: int) -> str:
    """new | same | conflict; the first chunk moves the job to expanding."""
    row = _row(conn, number)
    known = conn.execute(_CHUNK, {"of": number, "place": index}).one_or_none()
    if known is not None:
        if row.state == "accepted" and known.hash == digest:  # of a job taken up again
            _set(conn, number, "expanding")
        return "same" if known.hash == digest else "conflict"
    if row.state in ENDED:
        raise Refused("ended", f"the job is {row.state}")
    conn.execute(_ENTER_CHUNK, {"job": number, "number": index, "hash": digest, "rows": rows})
    if row.state == "accepted":
        _set(conn, number, "expanding")
    return "new"


def expanded(conn: Connection, number: int, rows_submitted: int, now: int) -> None:
    """Every chunk is in the lanes. Repeats change nothing; another total is refused."""
    one = statements.mark(conn.dialect.name)
    changed = (
        f"UPDATE job SET rows_submitted = {one},"
        " state = CASE WHEN state IN ('accepted', 'expanding') THEN 'sending' ELSE state END"
        f" WHERE number = {one} AND rows_submitted IS NULL"
    )
    if conn.exec_driver_sql(changed, (rows_submitted, number)).rowcount == 0:
        if _row(conn, number).rows_submitted != rows_submitted:
            raise Refused("conflict", "the job was expanded with another number of rows")
        return
    mark(conn, number)
    entries = f"UPDATE job_chunk SET expanded_at = {one} WHERE job = {one} AND expanded_at IS NULL"
    conn.exec_driver_sql(entries, (now, number))


@dataclass(frozen=True, slots=True)
class Moved:
    """state: as stored; waits: the job is held until its last chunk is in, and that is not; rows: what it was found to
    hold when it was cancelled before its last chunk had come (None: known before, or still open)."""

    number: int
    state: str
    waits: bool
    rows: int | None = None


def move(conn: Connection, name: int | str, state: str, reason: str, now: int, *, remark: str = "operation") -> Moved:
    """Change a job's state by somebody's will. Leaves a line in the audit chain: with the remark, never with the
    reason, which somebody may have written by hand (`policy.remarks`)."""
    if state not in JOB_MOVES:
        raise Refused("refused", f"nobody can put a job into the state {state[:20]}")
    number = number_of(conn, name)
    if number is None:
        raise Refused("not-found", "no such job")
    row = _row(conn, number)
    waits = bool(row.wait) and row.rows_submitted is None
    if row.state == state or (state == "sending" and row.state == "expanding"):
        return Moved(number, row.state, waits)
    if row.state not in JOB_MOVES[state]:
        raise Refused("refused", f"the job is {row.state}: it cannot become {state}")
    stored = state
    if state == "sending" and row.rows_submitted is None:
        stored = "expanding"
    _set(conn, number, stored, reason)
    audit.append(conn, now, "operator", f"job-{stored}", f"job/{number}", remark, "done")
    rows = None
    if stored == "cancelled" and row.rows_submitted is None:
        rows = _close(conn, number)
    return Moved(number, stored, waits, rows)


def _close(conn: Connection, number: int) -> int:
    """No further chunk is taken (`chunk` refuses ended jobs), so what is known now is all there will be: without a
    number of rows the job could never be over."""
    rows = int(conn.execute(select(func.sum(job_chunk.c.rows)).where(job_chunk.c.job == number)).scalar() or 0)
    conn.execute(update(job).where(job.c.number == number).values(rows_submitted=rows))
    return rows


@dataclass(frozen=True, slots=True)
class Finished:
    """state: as it is now. was_free: as far as the ledger knows no word of it stands in a halt set (policy.halts): it
    did not wait for its audience, and was neither paused nor ended by anybody. is_marked: its entries were marked in
    its home partition; who has a single one needs no mark (engine.campaign.filling)."""

    state: str
    was_free: bool
    is_marked: bool


def finish(conn: Connection, numbers: Sequence[int], now: int) -> dict[int, Finished]:
    """Their last row is in the ledger: done, unless they ended otherwise. Who is not told of is not kept."""
    dialect = conn.dialect.name
    found: dict[int, Finished] = {}
    for start in range(0, len(numbers), _MANY):
        some = tuple(numbers[start : start + _MANY])
        among = statements.marks(dialect, len(some))
        asked = f"SELECT number, state, wait, chunks_expected FROM job WHERE number IN ({among})"
        for number, state, waits, chunks in conn.exec_driver_sql(asked, some):
            after = state if state in ENDED else "done"
            found[number] = Finished(after, state == "sending" and not waits, chunks != 1)
    if found:
        one = statements.mark(dialect)
        changed = f"UPDATE job SET state = {one}, done_at = coalesce(done_at, {one}) WHERE number = {one}"
        conn.exec_driver_sql(changed, [(told.state, now, number) for number, told in found.items()])
    for number in found:
        mark(conn, number)
    return found


def ended_rows(conn: Connection, number: int) -> int:
    """How many rows of a job have ended, by the ledger."""
    total = select(func.sum(counter.c.n)).where(counter.c.job == number, counter.c.kind.in_(_TERMINAL))
    return int(conn.execute(total).scalar() or 0)


def give_up(conn: Connection, number: int, now: int) -> int:
    """A part of its audience is lost: no more of it is taken, what is on the lanes ends. The rows it has."""
    row = _row(conn, number)
    rows = int(row.rows_submitted) if row.rows_submitted is not None else _close(conn, number)
    if row.state not in ENDED:
        _set(conn, number, LOST, "Redis came back older and lost a part of the audience: submit it again")
        audit.append(conn, now, "policy", "job-lost", f"job/{number}", "restore", "done")
    return rows


def lose(conn: Connection, number: int, now: int) -> int | None:
    """What has not ended is lost: the job is over, how many rows that were. None: it is over already, or nothing is."""
    row = _row(conn, number)
    missing = -1 if row.rows_submitted is None else int(row.rows_submitted) - ended_rows(conn, number)
    if row.done_at is not None or missing == 0 or (missing < 0 and row.rows_submitted is not None):
        return None
    if row.rows_submitted is None:
        missing = max(_close(conn, number) - ended_rows(conn, number), 0)
    if missing:
        mine = counter.c.job == number, counter.c.domain == 0, counter.c.kind == int(Kind.LOST), counter.c.reason == 0
        if conn.execute(update(counter).where(*mine).values(n=counter.c.n + missing)).rowcount == 0:
            conn.execute(insert(counter).values(job=number, domain=0, kind=int(Kind.LOST), reason=0, n=missing))
    conn.execute(update(job).where(job.c.number == number).values(done_at=now))
    mark(conn, number)
    if row.state not in ENDED:
        _set(conn, number, LOST, f"Redis came back older without {missing} of its recipients: submit it again")
        audit.append(conn, now, "policy", "job-lost", f"job/{number}", "restore", "done")
    return missing


def reopen(conn: Connection, record: JobRecord, now: int) -> tuple[Accepted, int]:
    """Take up a lost job again; how many of its rows have ended. What was decided at expansion is decided anew."""
    offered = accept(conn, record, now)
    if offered.status != LOST:
        return offered, 0
    number = offered.number
    never_sent = message.c.attempts < 0, message.c.kind.in_((int(Kind.LOST), int(Kind.CANCELLED)))
    conn.execute(delete(message).where(message.c.job == number, or_(*never_sent)))
    conn.execute(delete(history).where(history.c.job == number, history.c.attempt < 0))
    conn.execute(delete(counter).where(counter.c.job == number, counter.c.kind.in_(_TERMINAL)))
    kept = select(message.c.job, message.c.domain, message.c.kind, message.c.reason, func.count())
    grouped = kept.where(message.c.job == number).group_by(*kept.selected_columns[:4])
    conn.execute(insert(counter).from_select(["job", "domain", "kind", "reason", "n"], grouped))
    conn.execute(update(job_chunk).where(job_chunk.c.job == number).values(expanded_at=None))
    values = {"state": "accepted", "reason": None, "rows_submitted": None, "done_at": None}
    conn.execute(
        update(job).where(job.c.number == number).values(**values, expires_at=record.expires_at or job.c.expires_at)
    )
    mark(conn, number)
    audit.append(conn, now, "intake", "job-taken-up", f"job/{number}", "restore", "done")
    row, holder = _row(conn, number), accounts.get(conn, record.account)
    assert holder is not None  # `accept` has just seen it
    return _accepted("new", row, holder), ended_rows(conn, number)


def with_lost_rows(conn: Connection) -> set[int]:
    """Jobs of which rows are lost that nobody can name."""
    named = select(counter.c.job).where(counter.c.domain == 0, counter.c.kind == int(Kind.LOST), counter.c.n > 0)
    return set(conn.scalars(named))


def unended(conn: Connection, holder: int) -> list[int]:
    """Jobs of an account that can still be cancelled."""
    able = sorted(JOB_MOVES["cancelled"])
    found = select(job.c.number).where(job.c.account == holder, job.c.state.in_(able)).order_by(job.c.number)
    return [int(number) for number in conn.scalars(found)]


def lately_over(conn: Connection) -> list[int]:
    """The hundred jobs that ended last."""
    ended = select(job.c.number).where(job.c.done_at.is_not(None)).order_by(job.c.done_at.desc()).limit(100)
    return list(conn.scalars(ended))


def overdue(conn: Connection, now: int) -> list[tuple[int, int]]:
    """End jobs whose chunks did not all come before expires_at (section 5); (number, rows submitted) of each. What is
    in the lanes expires there; rows submitted are those whose chunk is known."""
    ended: list[tuple[int, int]] = []
    late = conn.scalars(
        select(job.c.number).where(
            job.c.state.in_(("accepted", "expanding")), job.c.rows_submitted.is_(None), job.c.expires_at <= now
        )
    ).all()
    for number in late:
        rows = conn.execute(select(func.sum(job_chunk.c.rows)).where(job_chunk.c.job == number)).scalar() or 0
        conn.execute(
            update(job)
            .where(job.c.number == number)
            .values(state="expired", reason="not all chunks came in time", rows_submitted=int(rows))
        )
        mark(conn, number)
        ended.append((number, int(rows)))
    return ended


def next_overdue(conn: Connection) -> int | None:
    """When `overdue` can find somebody next, as far as is known now; None: never."""
    first: int | None = conn.execute(
        select(func.min(job.c.expires_at)).where(
            job.c.state.in_(("accepted", "expanding")), job.c.rows_submitted.is_(None)
        )
    ).scalar()
    return first


def _row(conn: Connection, number: int) -> Row[tuple[object, ...]]:
    row = conn.execute(_ROW, {"of": number}).one_or_none()
    if row is None:
        raise Refused("not-found", "no such job")
    return row


def _set(conn: Connection, number: int, state: str, reason: str = "") -> None:
    if reason:
        conn.execute(_TO_STATE_BECAUSE, {"of": number, "state": state, "reason": reason[:200]})
    else:
        conn.execute(_TO_STATE, {"of": number, "state": state})
    mark(conn, number)
