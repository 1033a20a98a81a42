"""Jobs that are over: seen when they are, many together, and nothing of theirs stays in Redis."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from policy import keyspace
from policy.chores import free_jobs
from policy.endings import Progress
from policy.events import Batch, Event, Kind, encode_batch
from policy.wire import JobRecord
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 4), st.integers(1, 3)),
        st.tuples(st.just("submitted"), st.integers(1, 4), st.integers(0, 4)),
        st.tuples(st.just("forget"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("resumed"), st.integers(1, 4), st.integers(0, 4)),
    ),
    max_size=30,
)


@given(steps=STEPS)
def test_complete_is_who_has_as_many_ends_as_rows(steps: list[tuple[str, int, int]]) -> None:
    """However it came about: kept step by step it is what looking through all jobs would find."""
    progress = Progress()
    ended: dict[int, int] = {}
    rows: dict[int, int] = {}
    for step, number, n in steps:
        if step == "add":
            progress.add({number: n})
            ended[number] = ended.get(number, 0) + n
        elif step == "submitted":
            rows[number] = n
            assert progress.submitted(number, n) == (ended.get(number, 0) >= n)
        elif step == "forget":
            assert progress.forget(number) == (number in rows)
            ended.pop(number, None)
            rows.pop(number, None)
        else:
            progress.resumed(number, n)
            rows.pop(number, None)
            ended[number] = n
        assert progress.complete() == sorted(number for number, n in rows.items() if ended.get(number, 0) >= n)


async def test_keys_of_many_jobs_go_at_once_and_those_of_others_stay(redis: Redis) -> None:
    """The number of buckets is known to the partition that has the job's key; fingerprints may be in others."""
    over, other = list(range(1, 301)), 1000
    for number in (*over, other):
        await redis.hset(keyspace.job(number % 64, number), "nb", number % 3)
        await redis.set(keyspace.chunks_put(number % 64, number), b"\x01")
        for bucket in range(number % 3):
            await redis.sadd(keyspace.duplicates((number + 1) % 64, number, bucket), b"fingerprint")
        await redis.sadd(keyspace.halts(5), f"j{number}", f"x{number}")
        await redis.xadd(keyspace.stream_of_chunks(number), {"c": b"sealed"})
    before = await redis.info("commandstats")
    await free_jobs(redis, over)
    after = await redis.info("commandstats")
    left = {key async for key in redis.scan_iter()}
    assert left == {
        name.encode()
        for name in (
            keyspace.job(other % 64, other),
            keyspace.chunks_put(other % 64, other),
            keyspace.duplicates((other + 1) % 64, other, 0),
            keyspace.halts(5),
            keyspace.stream_of_chunks(other),
        )
    }
    assert await redis.smembers(keyspace.halts(5)) == {b"j1000", b"x1000"}
    unlinks = after["cmdstat_unlink"]["calls"] - before.get("cmdstat_unlink", {"calls": 0})["calls"]
    assert unlinks <= len(over)  # one by one it would be 65 a job
    await free_jobs(redis, over)  # a repeat, after a crash in between
    assert {key async for key in redis.scan_iter()} == left


async def test_a_burst_of_small_jobs_ends_in_few_commits(world: PolicyWorld) -> None:
    await world.ask.account_add("acme")

    async def one(n: int) -> int:
        record = JobRecord(
            account="acme", job_id=f"job-{n}", hash=b"h" * 32, kind="transactional", created_at=1, payload=b"p",
            job_key=b"k", legal_basis="contract", chunks_expected=1,
        )  # fmt: skip
        accepted = await world.ask.accept_job(record)
        assert await world.ask.chunk(accepted.number, 0, b"c" * 32, 1) == "new"
        await world.ask.expanded(accepted.number, 1)
        return accepted.number

    numbers = await asyncio.gather(*map(one, range(100)))
    before = world.writer.store.transactions
    async with world.redis.pipeline() as pipe:
        for number in numbers:
            await world.redis.hset(keyspace.job(3, number), "nb", 1)
            batch = Batch(number, "b.example", [Event(Kind.DELIVERED, 1, 1, 5)])
            pipe.xadd(keyspace.events(3), {"b": encode_batch(batch)})
        await pipe.execute()
    await world.drain()
    for number in numbers:
        status = world.reader.job_status(number, 10)
        assert status is not None
        assert (status.state, status.done_at is not None) == ("done", True)
        assert not await world.redis.exists(keyspace.job(3, number))
    assert world.writer.store.transactions - before < 100 // 2
