"""Jobs in SQL: acceptance, chunks, states (T1, T2); sync functions of the writer's transaction.

Laws:
- a job id means one payload: the same hash again is the same job, another hash is a conflict (idempotency for as long
  as the row is kept, 90 days);
- a chunk number means one content; other bytes under a known number stop the job with its reason;
- a state that ends a job (done, cancelled, expired, lost, rejected) is left by nobody;
- every change that a producer may read is marked (`policy.store.mark`), so that its status in Redis follows.

Known limits: a job that was `lost` is not taken up again under its own id (T12 comes with the queue's issue).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Row, func, insert, select, update

from policy import accounts, audit
from policy.gate import Mode
from policy.ledger import number_of
from policy.schema import job, job_chunk, job_view, link
from policy.store import mark
from policy.wire import Accepted, JobRecord

ENDED: Final = frozenset({"done", "cancelled", "expired", "lost", "rejected"})
# what may be asked for from outside -> states it may be asked in
_MOVES: Final = {
    "paused": frozenset({"accepted", "expanding", "sending"}),
    "sending": frozenset({"paused"}),
    "cancelled": frozenset({"accepted", "expanding", "sending", "paused"}),
    "expired": frozenset({"accepted", "expanding", "sending", "paused"}),
    "lost": frozenset({"accepted", "expanding", "sending", "paused"}),
}


class Refused(Exception):
    """The ledger's answer is no; kind is a slug for the wire."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def accept(conn: Connection, record: JobRecord, now: int) -> Accepted:
    """Enter a job once. Everything in it is committed together: row, links, view."""
    holder = accounts.get(conn, record.account)
    if holder is None:
        return Accepted("unknown-account")
    known = conn.execute(select(job).where(job.c.account == holder.number, job.c.job_id == record.job_id)).one_or_none()
    if known is not None:
        status = "same" if known.hash == record.hash else "conflict"
        return _accepted(status, known, holder)
    if holder.is_frozen:
        return Accepted("frozen", account=holder.number)
    values = {
        "account": holder.number,
        "job_id": record.job_id,
        "hash": record.hash,
        "state": "accepted",
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
    made = conn.execute(insert(job).values(values)).inserted_primary_key
    assert made is not None
    number = int(made[0])
    mark(conn, number)
    if record.links:
        conn.execute(insert(link), [{"job": number, "number": n, "url": url} for n, url in enumerate(record.links)])
    if record.view:
        conn.execute(insert(job_view).values(job=number, html=record.view))
    row = conn.execute(select(job).where(job.c.number == number)).one()
    return _accepted("new", row, holder)


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
    known = conn.execute(
        select(job_chunk.c.hash).where(job_chunk.c.job == number, job_chunk.c.number == index)
    ).one_or_none()
    if known is not None:
        return "same" if known.hash == digest else "conflict"
    if row.state in ENDED:
        raise Refused("ended", f"the job is {row.state}")
    conn.execute(insert(job_chunk).values(job=number, number=index, hash=digest, rows=rows))
    if row.state == "accepted":
        _set(conn, number, "expanding")
    return "new"


def expanded(conn: Connection, number: int, rows_submitted: int, now: int) -> None:
    """Every chunk is in the lanes. Repeats change nothing; another total is refused."""
    row = _row(conn, number)
    if row.rows_submitted is not None:
        if row.rows_submitted != rows_submitted:
            raise Refused("conflict", "the job was expanded with another number of rows")
        return
    conn.execute(update(job).where(job.c.number == number).values(rows_submitted=rows_submitted))
    mark(conn, number)
    conn.execute(
        update(job_chunk).where(job_chunk.c.job == number, job_chunk.c.expanded_at.is_(None)).values(expanded_at=now)
    )
    if row.state in ("accepted", "expanding"):
        _set(conn, number, "sending")


@dataclass(frozen=True, slots=True)
class Moved:
    """state: as stored; waits: the job is held until its last chunk is in, and that is not."""

    number: int
    state: str
    waits: bool


def move(conn: Connection, name: int | str, state: str, reason: str, now: int) -> Moved:
    """Change a job's state by somebody's will. Leaves a line in the audit chain."""
    if state not in _MOVES:
        raise Refused("refused", f"nobody can put a job into the state {state[:20]}")
    number = number_of(conn, name)
    if number is None:
        raise Refused("not-found", "no such job")
    row = _row(conn, number)
    waits = bool(row.wait) and row.rows_submitted is None
    if row.state == state or (state == "sending" and row.state == "expanding"):
        return Moved(number, row.state, waits)
    if row.state not in _MOVES[state]:
        raise Refused("refused", f"the job is {row.state}: it cannot become {state}")
    stored = state
    if state == "sending" and row.rows_submitted is None:
        stored = "expanding"
    _set(conn, number, stored, reason)
    audit.append(conn, now, "operator", f"job-{stored}", f"job/{number}", reason or "operation", "done")
    return Moved(number, stored, waits)


def finish(conn: Connection, number: int, now: int) -> str:
    """The last row is in the ledger: done, unless it ended otherwise; the state it has now."""
    row = _row(conn, number)
    conn.execute(update(job).where(job.c.number == number, job.c.done_at.is_(None)).values(done_at=now))
    mark(conn, number)
    if row.state in ENDED:
        return str(row.state)
    _set(conn, number, "done")
    return "done"


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


def _row(conn: Connection, number: int) -> Row[tuple[object, ...]]:
    row = conn.execute(select(job).where(job.c.number == number)).one_or_none()
    if row is None:
        raise Refused("not-found", "no such job")
    return row


def _set(conn: Connection, number: int, state: str, reason: str = "") -> None:
    values: dict[str, object] = {"state": state}
    if reason:
        values["reason"] = reason[:200]
    conn.execute(update(job).where(job.c.number == number).values(values))
    mark(conn, number)
