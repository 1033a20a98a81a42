"""The chain of what was done by hand or by right: who, what, to which object, when, with what result.

Laws:
- each line carries the hash of the line before, so a line changed, moved or taken out shows (`verify` names the first
  that does not fit). The hash is SHA-256 of the line in RFC 8785 form: anybody can check it, without us
  (`policy.verifier`, requirements 4.4);
- lines are written in the transaction of the act they tell of: no act without its line, no line without the act;
- no line says to whom: objects are numbers, names of accounts and jobs, or keyed references;
- numbers have no gaps: each line is the one before and one more, however many writers there are. They take turns at
  the row `HEAD` of the table cursor, which holds the number and the hash of the last line.

    {"action","actor_ref","object_ref","prev","purpose","result","seq","ts"}      what is hashed
    … and "hash"                                                                  a line of an export

Old lines go when their class ends (R7, `policy.sweeping`), always from the oldest on and up to a checkpoint that is
elsewhere (`droppable`): its signed hash then stands for what was before it, so the rest still proves itself to a
stranger. Here the sweep's own manifest, which holds the hash of the last line that went, is as good.

Known limits: whoever can write the database can write a whole new chain; checkpoints elsewhere tell
(`policy.checkpoints`). Lines written before this form (BLAKE2b, never released) do not verify.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Connection, Row, func, insert, select, update

from policy import canonical
from policy.instants import rfc3339
from policy.schema import audit, checkpoint, cursor, sweep

HEAD: Final = "audit"  # the row of the table cursor: "<seq> <hash>" of the last line
GENESIS: Final = bytes(32)
_MANY: Final = 1000


def append(conn: Connection, at: int, actor: str, action: str, object_ref: str, purpose: str, result: str) -> bytes:
    """Add one line; its hash. at: microseconds; actor: a role or a keyed reference."""
    last, prev = _take_turn(conn)
    seq = last + 1
    digest = sha256(canonical.encode(_entry(seq, at, actor, action, object_ref, purpose, result, prev))).digest()
    conn.execute(
        insert(audit).values(
            seq=seq, at=at, actor=actor, action=action, object_ref=object_ref, purpose=purpose, result=result,
            prev=prev, hash=digest,
        )
    )  # fmt: skip
    conn.execute(update(cursor).where(cursor.c.stream == HEAD).values(last_id=f"{seq} {digest.hex()}"))
    return digest


def head(conn: Connection) -> tuple[int, bytes]:
    """Number and hash of the last line there ever was; (0, GENESIS) before the first."""
    told: str | None = conn.execute(select(cursor.c.last_id).where(cursor.c.stream == HEAD)).scalar()
    if told is None:
        return _last(conn)
    seq, _, digest = told.partition(" ")
    return int(seq), bytes.fromhex(digest)


def verify(conn: Connection) -> int | None:
    """The number of the first line that does not fit the chain; None when all do. A tail that is missing is named by
    the first number that is not there."""
    seq, prev = beginning(conn)
    for row in _lines(conn, 1):
        if row.seq != seq + 1 or row.prev != prev or row.hash != sha256(canonical.encode(_told(row))).digest():
            return int(row.seq)
        seq, prev = row.seq, row.hash
    return None if (seq, prev) == head(conn) else seq + 1


def beginning(conn: Connection) -> tuple[int, bytes]:
    """What the first line there is has to follow: number and hash of the line before it. That is the genesis, unless a
    checkpoint or the manifest of a sweep stands for lines that have gone."""
    first = conn.execute(select(audit.c.seq, audit.c.prev).order_by(audit.c.seq).limit(1)).one_or_none()
    gone, digest = head(conn) if first is None else (first.seq - 1, bytes(first.prev))
    if not gone:
        return 0, GENESIS
    signed = select(checkpoint.c.hash).where(checkpoint.c.seq == gone, checkpoint.c.exported.is_not(None))
    swept = select(sweep.c.digest).where(sweep.c.place == audit.name, sweep.c.digest == digest).limit(1)
    told = {bytes(one) for one in (conn.execute(signed).scalar(), conn.execute(swept).scalar()) if one is not None}
    return (gone, digest) if digest in told else (0, GENESIS)


def export(conn: Connection, since: int = 1) -> Iterator[bytes]:
    """Lines from a number on, each in RFC 8785 form with its hash and a line end."""
    for row in _lines(conn, since):
        yield canonical.encode(_told(row) | {"hash": row.hash.hex()}) + b"\n"


def droppable(conn: Connection, before: int) -> int:
    """Up to which number lines may go whose class ended at that instant: the last checkpoint that was written
    elsewhere and covers only lines that are older. 0: none."""
    younger = conn.execute(select(func.min(audit.c.seq)).where(audit.c.at >= before)).scalar()
    covered = select(func.max(checkpoint.c.seq)).where(checkpoint.c.exported.is_not(None))
    if younger is not None:
        covered = covered.where(checkpoint.c.seq < younger)
    return int(conn.execute(covered).scalar() or 0)


def _take_turn(conn: Connection) -> tuple[int, bytes]:
    """Number and hash of the last line, with the turn to write the next: over PostgreSQL each host has a writer, and
    two of them must not follow the same line."""
    locked = update(cursor).where(cursor.c.stream == HEAD).values(last_id=cursor.c.last_id)
    if conn.execute(locked).rowcount == 0:
        seq, digest = _last(conn)
        conn.execute(insert(cursor).values(stream=HEAD, last_id=f"{seq} {digest.hex()}"))
        return seq, digest
    return head(conn)


def _last(conn: Connection) -> tuple[int, bytes]:
    row = conn.execute(select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).one_or_none()
    return (0, GENESIS) if row is None else (int(row.seq), bytes(row.hash))


def _lines(conn: Connection, since: int) -> Iterator[Row[Any]]:
    """A thousand at a time: the lines of seven years need no memory."""
    after = since - 1
    while rows := conn.execute(select(audit).where(audit.c.seq > after).order_by(audit.c.seq).limit(_MANY)).all():
        yield from rows
        after = rows[-1].seq


def _told(row: Row[Any]) -> dict[str, Any]:
    return _entry(row.seq, row.at, row.actor, row.action, row.object_ref, row.purpose, row.result, row.prev)


def _entry(
    seq: int, at: int, actor: str, action: str, object_ref: str, purpose: str, result: str, prev: bytes
) -> dict[str, Any]:
    return {
        "seq": seq, "ts": rfc3339(at), "actor_ref": actor, "action": action, "object_ref": object_ref,
        "purpose": purpose, "result": result, "prev": prev.hex(),
    }  # fmt: skip
