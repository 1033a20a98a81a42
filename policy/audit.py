"""The chain of what was done by hand or by right: who, what, to which object, when, with what result.

Law: each line carries the hash of the line before, so a line changed or taken out shows (`verify` names the first that
does not fit). Lines are written in the transaction of the act they tell of: no act without its line, no line without
the act. No line says to whom: objects are numbers, names of accounts and jobs, or keyed references.

Known limits: whoever can write the database can write a whole new chain; publish the last hash elsewhere to prevent it.
"""

from __future__ import annotations

from hashlib import blake2b

from sqlalchemy import Connection, insert, select

from policy.schema import audit

_GENESIS = bytes(32)


def append(conn: Connection, at: int, actor: str, action: str, object_ref: str, purpose: str, result: str) -> bytes:
    """Add one line; its hash. at: microseconds; actor: a role or a keyed reference."""
    prev = conn.execute(select(audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).scalar() or _GENESIS
    digest = _digest(prev, at, actor, action, object_ref, purpose, result)
    conn.execute(
        insert(audit).values(
            at=at, actor=actor, action=action, object_ref=object_ref, purpose=purpose, result=result,
            prev=prev, hash=digest,
        )
    )  # fmt: skip
    return digest


def verify(conn: Connection) -> int | None:
    """The sequence number of the first line that does not fit the chain; None when all do."""
    prev = _GENESIS
    for row in conn.execute(select(audit).order_by(audit.c.seq)):
        expected = _digest(prev, row.at, row.actor, row.action, row.object_ref, row.purpose, row.result)
        if row.prev != prev or row.hash != expected:
            return int(row.seq)
        prev = row.hash
    return None


def _digest(prev: bytes, at: int, *fields: str) -> bytes:
    digest = blake2b(prev, digest_size=32, person=b"sp-audit")
    digest.update(at.to_bytes(8, "big", signed=True))
    for text in fields:
        raw = text.encode()
        digest.update(len(raw).to_bytes(4, "big") + raw)  # lengths: no two field lists make the same bytes
    return digest.digest()
