"""Jobs that are over: seen when they are, many together, and nothing of theirs stays in Redis."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from policy import keyspace
from policy.chores import free_jobs, free_places
from policy.endings import Progress
from policy.events import Batch, Event, Kind, encode_batch
from policy.wire import JobRecord
from policy.writer import clock_us
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


async def test_keys_go_from_the_partitions_that_are_known_and_from_no_other(redis: Redis) -> None:
    for number, buckets in ((1, 1), (2, 3), (7, 1)):
        for partition in (5, 9):
            await redis.hset(keyspace.job(partition, number), "nb", buckets)
            await redis.setbit(keyspace.chunks_put(partition, number), 0, 1)
            for bucket in range(buckets):
                await redis.hset(keyspace.duplicates(partition, number, bucket), "fingerprint", "0")
    await redis.hset(keyspace.duplicates(63, 2, 0), "fingerprint", "0")  # of a share that was never put
    await redis.xadd(keyspace.stream_of_chunks(2), {"c": b"sealed"})
    await free_places(redis, {1: 1 << 5, 2: 1 << 5 | 1 << 9 | 1 << 63, 3: 0})
    left = {key.decode() for key in [key async for key in redis.scan_iter()]}
    kept = [(9, 1), (5, 7), (9, 7)]
    assert left == {
        name
        for partition, number in kept
        for name in (
            keyspace.job(partition, number),
            keyspace.chunks_put(partition, number),
            keyspace.duplicates(partition, number, 0),
        )
    }
    await free_places(redis, {1: 1 << 5, 2: 1 << 5})  # a repeat, after a crash in between
    assert {key.decode() for key in [key async for key in redis.scan_iter()]} == left


@given(
    told=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 63), st.integers(1, 2)), max_size=20),
    resumed=st.sets(st.integers(1, 3)),
)
def test_places_are_those_of_every_end_or_unknown(told: list[tuple[int, int, int]], resumed: set[int]) -> None:
    progress = Progress()
    for number in resumed:  # ends that another process saw
        progress.resumed(number, 1)
    seen: dict[int, int] = {}
    for number, partition, n in told:
        progress.add({number: n}, {number: 1 << partition, 99: 1})
        seen[number] = seen.get(number, 0) | 1 << partition
    for number in (1, 2, 3):
        assert progress.places(number) == (None if number in resumed else seen.get(number, 0))
        progress.submitted(number, 1)
        progress.forget(number)
        assert progress.places(number) == 0


async def test_what_was_halted_or_is_older_than_the_writer_is_looked_for_everywhere(world: PolicyWorld) -> None:
    """A halt is in all partitions, and what an earlier process drained came from nobody knows where."""
    await world.ask.account_add("acme")

    async def made(job_id: str) -> int:
        record = JobRecord(
            account="acme", job_id=job_id, hash=b"h" * 32, kind="transactional", created_at=1, payload=b"p",
            job_key=b"k", legal_basis="contract", chunks_expected=1, entry_hash=b"c" * 32, entry_rows=1,
        )  # fmt: skip
        number = (await world.ask.accept_job(record)).number
        await world.ask.expanded(number, 1)
        await world.redis.hset(keyspace.job(40, number), "nb", 1)  # where no event will come from
        return number

    older, plain = await made("older"), await made("plain")
    await world.restart_writer()
    paused, cancelled, younger = await made("paused"), await made("cancelled"), await made("younger")
    await world.ask.job_state(paused, "paused")
    await world.ask.job_state(cancelled, "cancelled")
    for number in (older, plain, paused, cancelled, younger):
        batch = Batch(number, "b.example", [Event(Kind.DELIVERED, 1, 1, 5)])
        await world.redis.xadd(keyspace.events(3), {"b": encode_batch(batch)})
    await world.drain()
    for number in (older, plain, paused, cancelled):
        assert not await world.redis.exists(keyspace.job(40, number))
        assert not any([await world.redis.sismember(keyspace.halts(40), f"{letter}{number}") for letter in "jx"])
    assert await world.redis.exists(keyspace.job(40, younger))  # else this test would show nothing


async def test_jobs_are_looked_through_for_overdue_ones_only_when_one_may_be(world: PolicyWorld) -> None:
    await world.ask.account_add("acme")
    endings = world.writer.endings
    async with asyncio.timeout(10):
        while endings._look_at is not None:  # the first look of the chores
            await asyncio.sleep(0.01)
    ahead = clock_us() + 3_600_000_000
    for n, expires_at in enumerate((ahead + 5, ahead, ahead + 9)):
        record = JobRecord(
            account="acme", job_id=f"job-{n}", hash=b"h" * 32, kind="campaign", created_at=1, payload=b"p",
            job_key=b"k", legal_basis="contract", chunks_expected=2, expires_at=expires_at,
        )  # fmt: skip
        await world.ask.accept_job(record)
    assert endings._look_at == ahead
    before = world.writer.store.transactions
    assert await endings.overdue() == []
    assert world.writer.store.transactions == before
    await world.ask.job_state("job-1", "paused")  # it may be resumed after its time
    assert endings._look_at == 0
    assert await endings.overdue() == []
    assert endings._look_at == ahead + 5


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
