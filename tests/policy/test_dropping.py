"""A day of a large table over PostgreSQL is swept by dropping it: counted by a reader, gone in one short transaction.

Laws of `policy.bites.tally` and `drop`: what is dropped is what was tallied, its proof is that of SQLite's bites, and a
row that came, a hold that was placed or a job that is not over in between is not run over. The tests of sweeps in
test_sweeping.py run over PostgreSQL too, through the same.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, insert, text, update

from policy import bites, holds, partitions, schema
from policy.classes import RetentionSettings, gone_from
from policy.instants import DAY_US
from policy.keys import Keyring
from policy.retention import Sweep
from tests.policy.stores import only_postgresql, only_sqlite, url_of
from tests.policy.sweepers import D, Sweeper, sweeper

OVER = (D + 90) * DAY_US
MESSAGES = Sweep("message", D, 0, "R3")
PERIODS = RetentionSettings().periods()


@pytest.fixture
async def world(dialect: str, tmp_path: Path, keyring: Keyring, redis: Redis) -> AsyncIterator[Sweeper]:
    async with sweeper(tmp_path, keyring, redis) as made:
        await made.premises.store.write(lambda conn: partitions.prepare(conn, D))
        made.now = OVER
        yield made


async def messages(world: Sweeper, count: int, job: int = 1) -> bytes:
    """So many rows of the day, of a job that is over; the digest that their sweep must have."""
    account = await world.account(f"acme{job}")
    await world.job(account, job, D, payload=None, job_key=None, subject_sealed=None)
    rows = [
        {"job": job, "mref": mref, "kind": 1, "reason": 0, "domain": 0, "code": 0, "enhanced": "", "attempts": 1,
         "at": D * DAY_US, "day": D, "pseudonym": mref * 7, "tls": 0, "note": None}
        for mref in range(count)
    ]  # fmt: skip
    await world.premises.store.write(lambda conn: conn.execute(insert(schema.message), rows) and None)
    return bites.summed(bytes(32), "message", [(job, mref) for mref in range(count)])


async def tables(world: Sweeper) -> set[str]:
    sql = text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return set(await world.premises.store.write(lambda conn: conn.scalars(sql).all()))


async def tallied(world: Sweeper, one: Sweep = MESSAGES) -> bites.Tally:
    found = await world.premises.store.write(lambda conn: bites.tally(conn, world.keyring, one, world.now))
    assert found is not None
    return found


async def dropped(world: Sweeper, known: bites.Tally, one: Sweep = MESSAGES) -> bites.Bite | None:
    return await world.premises.store.write(lambda conn: bites.drop(conn, world.keyring, one, world.now, known))


@only_postgresql
async def test_a_day_goes_in_one_transaction_with_the_proof_that_bites_would_leave(
    world: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bites, "_STREAMED", 100)
    digest = await messages(world, 350)
    before = world.premises.store.transactions
    done = await world.sweeping(rows=7).sweep()
    assert [(one.place, one.day, one.rows) for one in done] == [("message", D, 350)]
    assert world.premises.store.transactions - before == 2, "the drop, and domains; not 50 bites"
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"], manifest["at"]) == (350, digest, world.now)
    assert await world.count("audit", action="swept") == 1
    left = await tables(world)
    assert f"message_d{D}" not in left
    assert f"message_d{D + 1}" in left


@only_sqlite
async def test_a_file_has_no_day_to_drop(world: Sweeper) -> None:
    await messages(world, 3)
    tally = await world.premises.store.write(lambda conn: bites.tally(conn, world.keyring, MESSAGES, world.now))
    assert tally is None


@only_postgresql
async def test_a_row_that_comes_after_the_count_is_not_lost_from_the_proof(world: Sweeper) -> None:
    await messages(world, 5)
    known = await tallied(world)
    await world.message(1, 99, D)
    assert await dropped(world, known) is None
    assert await world.count("message") == 6
    assert await world.rows("sweep") == [], "nothing was begun"
    assert await world.sweep() == {"message": 6}
    [manifest] = await world.rows("sweep")
    keys = [(1, mref) for mref in (0, 1, 2, 3, 4, 99)]
    assert (manifest["rows"], manifest["digest"]) == (6, bites.summed(bytes(32), "message", keys))


@only_postgresql
async def test_a_row_that_went_for_one_that_came_is_noticed(world: Sweeper) -> None:
    """An erasure took a row and a late event brought one: as many as before, others."""
    await messages(world, 5)
    known = await tallied(world)
    await world.premises.store.write(
        lambda conn: conn.execute(update(schema.message).where(schema.message.c.mref == 2).values(mref=77)) and None
    )
    assert await dropped(world, known) is None
    assert await world.count("message") == 5


@only_postgresql
async def test_who_is_held_after_the_count_is_copied_all_the_same(world: Sweeper) -> None:
    """P-21: no row of a held person leaves without its copy."""
    await messages(world, 5)
    ada = await world.person(await world.account(), "ada@example.org", created=D - 1)
    await world.message(1, 99, D, ada)
    known = await tallied(world)
    assert known.held == []

    def place(conn: Connection) -> int:
        return holds.place(conn, ada.number, "a claim", "court", "officer", 0, world.now)

    number = await world.premises.store.write(place)
    assert await dropped(world, known) is None
    known = await tallied(world)
    assert [row["mref"] for row in known.held] == [99]
    assert await dropped(world, known) == bites.Bite(6, True)
    kept = await world.premises.store.write(lambda conn: holds.copies(conn, world.keyring, number))
    assert [(copy.place, copy.row["mref"]) for copy in kept if copy.place == "message"] == [("message", 99)]


async def test_a_day_goes_around_jobs_that_are_not_over_and_in_the_end_as_a_whole(world: Sweeper) -> None:
    """On both stores alike: what a running job has on the day stays until it is over."""
    digest = await messages(world, 12)
    await world.job(await world.account("busy"), 2, None)
    for mref in range(3):
        await world.message(2, mref, D)
    swept = await world.sweep(rows=5)
    assert swept["message"] == 12
    assert await world.count("message") == await world.count("message", job=2) == 3
    [manifest] = [row for row in await world.rows("sweep") if row["place"] == "message"]
    assert (manifest["rows"], manifest["digest"]) == (12, digest)
    await world.premises.store.write(
        lambda conn: (
            conn.execute(update(schema.job).where(schema.job.c.number == 2).values(done_at=world.now - 1)) and None
        )
    )
    assert (await world.sweep(rows=5))["message"] == 3
    assert await world.count("message") == 0
    [manifest] = [row for row in await world.rows("sweep") if row["place"] == "message"]
    assert (manifest["rows"], manifest["digest"]) == (15, bites.summed(digest, "message", [(2, n) for n in range(3)]))


@only_postgresql
async def test_a_job_taken_up_again_after_the_count_keeps_its_rows(world: Sweeper) -> None:
    await messages(world, 5)
    known = await tallied(world)
    await world.premises.store.write(
        lambda conn: conn.execute(update(schema.job).where(schema.job.c.number == 1).values(done_at=None)) and None
    )
    assert await dropped(world, known) is None
    assert await world.count("message") == 5


async def test_visits_end_by_their_class_whatever_becomes_of_their_job(world: Sweeper) -> None:
    """R2 is of the day of the visit (P-12): a job that never ends keeps nobody's visits, and they are proved once."""
    await world.job(await world.account(), 1, None)
    for mref in range(4):
        await world.put("hit", job=1, mref=mref, day=D, hour=0)
    world.now = gone_from(D, PERIODS["R2"]) * DAY_US
    assert (await world.sweep())["hit"] == 4
    assert await world.count("hit") == 0
    assert await world.sweep() == {}
    [manifest] = [row for row in await world.rows("sweep") if row["place"] == "hit"]
    assert manifest["rows"] == 4


@only_postgresql
async def test_a_reader_that_stays_is_not_waited_for_and_the_sweep_comes_again_soon(
    world: Sweeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_LOCK_MS", 20)
    await messages(world, 5)
    sweeping = world.sweeping()
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as conn:
        assert conn.scalar(text("SELECT count(*) FROM message")) == 5
        assert await sweeping.round() == 60.0
        assert sweeping.failures == 1
        assert conn.scalar(text("SELECT count(*) FROM message")) == 5
    reader.dispose()
    assert await world.rows("sweep") == [], "neither dropped nor written down"
    assert await sweeping.round() > 60.0
    assert (sweeping.failures, sweeping.rows) == (1, 5)


@only_postgresql
async def test_what_is_written_all_the_time_is_taken_in_bites(world: Sweeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day that is never as it was tallied goes all the same."""
    digest = await messages(world, 30)

    def never(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(bites, "drop", never)
    assert await world.sweep(rows=7) == {"message": 30}
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"]) == (30, digest)


@only_postgresql
async def test_two_sweepers_drop_it_once(world: Sweeper) -> None:
    digest = await messages(world, 200)
    done = await asyncio.gather(world.sweeping().sweep(), world.sweeping().sweep())
    assert sum(told.rows for some in done for told in some) == 200
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"]) == (200, digest)
    assert await world.count("audit", action="swept") == 1


_KILLED = """
import os, signal, sys
from pathlib import Path
from policy import bites
from policy.keys import Keyring
from policy.retention import Sweep
from policy.schema import open_store
engine = open_store(sys.argv[1], writer=True)
keyring = Keyring.load(Path(sys.argv[2]))
one = Sweep("message", int(sys.argv[3]), 0, "R3")
with engine.begin() as conn:
    known = bites.tally(conn, keyring, one, 1)
with engine.begin() as conn:
    assert bites.drop(conn, keyring, one, 1, known).rows == 45
    os.kill(os.getpid(), signal.SIGKILL)
"""


@only_postgresql
async def test_killed_between_the_drop_and_its_commit_nothing_has_happened(world: Sweeper, tmp_path: Path) -> None:
    digest = await messages(world, 45)
    arguments = [url_of(tmp_path), str(tmp_path / "keys"), str(D)]
    ended = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", _KILLED, *arguments], cwd=Path.cwd(), env=dict(os.environ), check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert await world.count("message") == 45
    assert await world.rows("sweep") == []
    assert await world.sweep() == {"message": 45}
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"]) == (45, digest)
