"""The negative list: SQL the truth, a stream the trackers follow."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection

from policy import keyspace, negative

NOW = 1_795_376_640_000_000
BIG = (1 << 63) - 1


async def entries(redis: Redis) -> list[dict[bytes, bytes]]:
    """The stream as the server holds it; redis-py's types say less than its answers."""
    answer: Any = await redis.xrange(keyspace.NEGATIVE)
    return [entry for _, entry in answer]


def test_the_last_entry_of_a_subject_decides(conn: Connection) -> None:
    assert negative.load(conn) == (set(), 0)
    first = negative.add(conn, 7, "withdrawn", NOW)
    negative.add(conn, BIG, "erased", NOW)
    lifted = negative.lift(conn, 7, NOW + 1)
    assert first < lifted
    assert negative.load(conn) == ({BIG}, lifted)
    assert (negative.standing(conn, 7), negative.standing(conn, BIG)) == (None, "erased")
    again = negative.add(conn, 7, "objected", NOW + 2)
    assert negative.load(conn) == ({7, BIG}, again)
    with pytest.raises(ValueError, match="unknown cause"):
        negative.add(conn, 8, "lifted", NOW)


async def test_announcements_carry_numbers_and_a_cause(conn: Connection, redis: Redis) -> None:
    seq = negative.add(conn, BIG, "withdrawn", NOW)
    await negative.announce(redis, BIG, "withdrawn", seq)
    [entry] = await entries(redis)
    assert entry == {b"s": str(BIG).encode(), b"r": b"withdrawn", b"q": str(seq).encode()}
    assert keyspace.entry_of(keyspace.NEGATIVE) is not None


async def test_a_redis_that_was_lost_or_came_back_older_is_brought_up_to_sql(conn: Connection, redis: Redis) -> None:
    for subject in range(1, 6):
        seq = negative.add(conn, subject, "withdrawn", NOW)
        if subject <= 2:
            await negative.announce(redis, subject, "withdrawn", seq)
    negative.lift(conn, 1, NOW)
    assert await negative.rebuild(redis, conn) == 4
    assert await negative.rebuild(redis, conn) == 0
    stream = await entries(redis)
    assert [int(entry[b"q"]) for entry in stream] == [1, 2, 3, 4, 5, 6]
    assert stream[-1][b"r"] == b"lifted"
    await redis.flushall()
    assert await negative.rebuild(redis, conn) == 6
