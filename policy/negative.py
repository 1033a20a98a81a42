"""The negative list: subject numbers whose visits are not remembered, from whatever mail was delivered long ago.

Law: a subject on the list leaves nothing behind within a second (decision 7, 12): SQL commit, then one entry of the
stream `keyspace.NEGATIVE`, which every tracker follows and holds in memory. SQL is the truth; a tracker that starts
reads `load` and then the stream.

Entries: ``s`` subject number, ``r`` cause, ``q`` seq, all decimal or plain text. Cause `LIFTED` takes the subject off
again; all others put it on.

Known limits: the list knows a person whole, so withdrawing from open tracking ends click tracking too (the strictest
reading). The stream keeps about 100,000 entries; a tracker that was away longer sees a gap in ``q`` and loads again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, insert, select

from policy import keyspace
from policy.schema import negative as table

if TYPE_CHECKING:
    from redis.asyncio import Redis

CAUSES = frozenset({"withdrawn", "restricted", "objected", "erased"})
LIFTED = "lifted"
STREAM_LENGTH = 100_000


def add(conn: Connection, subject: int, reason: str, since: int) -> int:
    """Put a subject on the list; the seq to `announce` after the commit."""
    if reason not in CAUSES:
        raise ValueError(f"unknown cause {reason!r}, one of {', '.join(sorted(CAUSES))}")
    return _append(conn, subject, reason, since)


def lift(conn: Connection, subject: int, since: int) -> int:
    """Take a subject off the list (consent given anew, restriction ended); the seq to `announce` after the commit."""
    return _append(conn, subject, LIFTED, since)


def _append(conn: Connection, subject: int, reason: str, since: int) -> int:
    result = conn.execute(insert(table).values(subject=subject, reason=reason, since=since))
    key = result.inserted_primary_key
    assert key is not None
    return int(key[0])


def standing(conn: Connection, subject: int) -> str | None:
    """Why a subject is on the list, or None: its last entry decides."""
    statement = select(table.c.reason).where(table.c.subject == subject).order_by(table.c.seq.desc()).limit(1)
    reason: str | None = conn.execute(statement).scalar()
    return None if reason == LIFTED else reason


def load(conn: Connection) -> tuple[set[int], int]:
    """Every subject on the list, and the seq up to which that is so (0: nothing ever happened)."""
    last = select(func.max(table.c.seq).label("seq")).group_by(table.c.subject).subquery()
    statement = select(table.c.subject, table.c.seq, table.c.reason).join(last, last.c.seq == table.c.seq)
    subjects: set[int] = set()
    seq = 0
    for row in conn.execute(statement):
        seq = max(seq, row.seq)
        if row.reason != LIFTED:
            subjects.add(row.subject)
    return subjects, seq


async def announce(redis: Redis, subject: int, reason: str, seq: int) -> None:
    """Tell every tracker, after the commit. Raises redis.RedisError: then nobody may be told that it is done."""
    await redis.xadd(keyspace.NEGATIVE, {"s": subject, "r": reason, "q": seq}, maxlen=STREAM_LENGTH, approximate=True)


async def rebuild(redis: Redis, conn: Connection) -> int:
    """Bring the stream up to SQL after Redis was lost or came back older; how many entries were missing.

    Entries are appended in order of seq, so whoever follows the stream by ``q`` misses nothing and repeats harmlessly.
    """
    newest = await redis.xrevrange(keyspace.NEGATIVE, count=1)
    known = int((newest[0][1] or {}).get(b"q", 0)) if newest else 0
    statement = select(table.c.subject, table.c.reason, table.c.seq).where(table.c.seq > known).order_by(table.c.seq)
    rows = conn.execute(statement).all()
    for row in rows[-STREAM_LENGTH:]:
        await announce(redis, row.subject, row.reason, row.seq)
    return len(rows)
