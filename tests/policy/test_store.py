"""Group commit: what waits together is committed together, and nobody pays for another's mistake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select

from policy.schema import cursor, open_store
from policy.store import Store, mark
from policy.wire import Accepted, JobRecord
from tests.policy.stores import policy_store, url_of
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]


@contextlib.asynccontextmanager
async def writing(folder: Path) -> AsyncIterator[Store]:
    with policy_store(folder):
        pass
    store = Store(open_store(url_of(folder), writer=True))
    try:
        yield store
    finally:
        await store.close()


def enter(conn: Connection, name: str) -> str:
    conn.execute(insert(cursor).values(stream=name, last_id="1-1"))
    return name


def fail(conn: Connection, name: str) -> str:
    """Writes, goes wrong inside a savepoint of its own, and leaves that open."""
    enter(conn, f"{name}-before")
    conn.begin_nested()
    enter(conn, f"{name}-inside")
    raise ValueError(name)


def names(conn: Connection) -> set[str]:
    return set(conn.scalars(select(cursor.c.stream)))


async def test_writes_that_wait_share_a_transaction(tmp_path: Path) -> None:
    async with writing(tmp_path) as store:
        wanted = [f"s{n}" for n in range(200)]
        answers = await asyncio.gather(*(store.write(partial(enter, name=name)) for name in wanted))
        assert answers == wanted
        assert store.transactions == 2  # 128 and the rest
        assert await store.write(names) == set(wanted)


async def test_a_failure_touches_nobody_else_in_its_transaction(tmp_path: Path) -> None:
    """Law of `policy.store`: also when the work that failed had a savepoint open."""
    async with writing(tmp_path) as store:
        works = [fail if n % 3 == 1 else enter for n in range(9)]
        answers = await asyncio.gather(
            *(store.write(partial(work, name=f"s{n}")) for n, work in enumerate(works)),
            return_exceptions=True,
        )
        assert store.transactions == 1
        assert [str(answer) for answer in answers] == [f"s{n}" for n in range(9)]
        assert [isinstance(answer, ValueError) for answer in answers] == [work is fail for work in works]
        assert await store.write(names) == {f"s{n}" for n in range(9) if n % 3 != 1}


async def test_a_failure_alone_writes_nothing_and_tells_nothing(tmp_path: Path) -> None:
    async with writing(tmp_path) as store:
        told: list[set[int]] = []
        store.on_marked = told.append

        def wrong(conn: Connection) -> None:
            mark(conn, 7)
            fail(conn, "alone")

        with pytest.raises(ValueError, match="alone"):
            await store.write(wrong)

        def right(conn: Connection) -> None:
            mark(conn, 8)

        await store.write(right)
        assert await store.write(names) == set()
        assert told == [{8}]


async def test_many_jobs_at_once_take_few_commits(world: PolicyWorld) -> None:
    """Each caller gets its own answer; a conflict and an unknown account among them are theirs alone."""
    await world.ask.account_add("acme")

    def record(job_id: str, *, account: str = "acme", digest: bytes = b"h" * 32) -> JobRecord:
        return JobRecord(
            account=account, job_id=job_id, hash=digest, kind="transactional", created_at=1, payload=b"p",
            job_key=b"k", legal_basis="contract", links=("https://a.example/",), chunks_expected=1,
        )  # fmt: skip

    first = await world.ask.accept_job(record("first"))
    before = world.writer.store.transactions
    offers = [record(f"job-{n}") for n in range(200)]
    offers += [record("first", digest=b"x" * 32), record("job", account="nobody"), record("first")]
    answers: list[Accepted] = await asyncio.gather(*map(world.ask.accept_job, offers))
    spent = world.writer.store.transactions - before
    assert [answer.status for answer in answers[:200]] == ["new"] * 200
    assert [answer.status for answer in answers[200:]] == ["conflict", "unknown-account", "same"]
    assert len({answer.number for answer in answers[:200]}) == 200
    assert answers[-1].number == first.number
    for answer, offer in zip(answers[:200], offers, strict=False):
        stored = world.reader.job_payload(answer.number)
        assert stored is not None
        assert (stored.job_id, stored.state) == (offer.job_id, "accepted")
        assert world.reader.link_table(answer.number) == ["https://a.example/"]
    # the chores and drains of the writer, which runs meanwhile, have theirs among them
    assert spent <= 203 // 4
