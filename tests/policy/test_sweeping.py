"""Sweeps under a clock of our own: each class at its boundary, once, with its proof; nothing of what is under way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, delete, insert, select, update

from policy import audit, bites, keyspace, partitions, schema
from policy.classes import RetentionSettings, gone_from
from policy.instants import DAY_US
from policy.jobs import Refused
from policy.keys import Keyring, seal_note
from policy.retention import PLACES, Sweep, place_of
from policy.sweeping import Sweeping, tidy
from tests.policy.stores import only_postgresql, only_sqlite, url_of
from tests.policy.sweepers import D, Sweeper, put, sweeper
from tests.world.octets import octets

PERIODS = RetentionSettings().periods()
LATE = DAY_US - 1  # the last microsecond of a day


@pytest.fixture
async def world(dialect: str, tmp_path: Path, keyring: Keyring, redis: Redis) -> AsyncIterator[Sweeper]:
    async with sweeper(tmp_path, keyring, redis) as made:
        yield made


# What makes a row of each dated place that is over by its date alone; day: of the row, always at its last microsecond.
ROWS: dict[str, dict[str, Any]] = {
    "hit": {"day": 0, "job": 1, "mref": 5, "hour": 0},
    "last_open": {"day": 0, "job": 1, "mref": 5},
    "history": {"day": 0, "job": 1, "mref": 5},
    "message": {"day": 0, "job": 1, "mref": 5},
    "reading": {"day": 0},
    "disclosure": {"day": 0},
    "rectification": {"state": "corrected", "subject": 9},
    "request": {"ticket": "t", "kind": "access", "role": "contact", "channel": "cli", "identity": "proved"},
    "erasure": {"cause": "request", "state": "purged"},
    "backup": {},
    "checkpoint": {"seq": -1},  # of lines that are no longer there
    "hold": {},
}


DAYS = (20_541, 20_751, D, 21_243)  # two changes of summer time of 2026, its 23 November, 29 February 2028


@pytest.mark.parametrize("name", ROWS)
async def test_p10_each_class_goes_at_its_boundary(world: Sweeper, name: str) -> None:
    place = place_of(name)
    kept = PERIODS.get(place.retention)
    for day in DAYS:
        dated = day if place.dated == "day" else day * DAY_US + LATE
        await world.put(name, **(ROWS[name] | {place.dated: dated}))
        boundary = (gone_from(day, kept) if kept else day) * DAY_US
        if kept:
            world.now = boundary - 1
            assert await world.sweep() == {}
            assert await world.count(name) == 1
        world.now = boundary
        assert await world.sweep() == {name: 1}
        assert await world.count(name) == 0
        [manifest] = [row for row in await world.rows("sweep") if (row["place"], row["day"]) == (name, day)]
        told = (manifest["retention"], manifest["account"], manifest["rows"], manifest["at"])
        assert told == (place.retention, 0, 1, boundary)
        line = (await world.rows("audit"))[-1]
        assert line["object_ref"] == f"sweep/{place.retention}/{name}/{day}/0"
        assert line["result"] == f"1 {manifest['digest'].hex()}"
        assert await world.sweep() == {}, "once"


def test_every_place_has_its_boundary_tested() -> None:
    """Those of jobs, people and the chain have tests of their own below."""
    others = {"job.payload", "job.keys", "link", "job_view", "job", "consent", "subject", "domain", "audit", "sweep"}
    assert {place.name for place in PLACES} == set(ROWS) | others


async def test_a_job_gives_up_its_payload_its_key_its_links_and_its_row_one_after_the_other(world: Sweeper) -> None:
    """R0 the next midnight, R3 with the last row of the send log, R2 after 13 months, R4 with the sums."""
    account = await world.account()
    await world.job(account, 1, D)
    await world.put("link", job=1, number=0, url="https://example.org/")
    await world.put("job_view", job=1, html="<p>hello</p>")
    await world.put("counter", job=1, domain=0, kind=1, n=3)
    await world.message(1, 5, D)

    world.now = (D + 1) * DAY_US - 1
    assert await world.sweep() == {}
    world.now = (D + 1) * DAY_US
    assert await world.sweep() == {"job.payload": 1}
    [row] = await world.rows("job")
    assert (row["payload"], row["job_key"], row["subject_sealed"]) == (None, b"key", b"subject")

    world.now = (D + 90) * DAY_US - 1
    assert await world.sweep() == {}
    world.now = (D + 90) * DAY_US
    assert await world.sweep() == {"message": 1, "job.keys": 1}
    [row] = await world.rows("job")
    assert (row["payload"], row["job_key"], row["subject_sealed"]) == (None, None, None)

    world.now = gone_from(D, PERIODS["R2"]) * DAY_US - 1
    assert await world.sweep() == {}
    world.now += 1
    assert await world.sweep() == {"link": 1, "job_view": 1}
    assert await world.count("job") == 1

    world.now = gone_from(D, PERIODS["R4"]) * DAY_US
    assert await world.sweep() == {"job": 2}
    assert await world.count("job") == await world.count("counter") == 0


async def test_nothing_is_taken_of_a_job_that_is_not_over_nor_the_payload_of_a_lost_one(world: Sweeper) -> None:
    account = await world.account()
    await world.job(account, 1, None)
    await world.job(account, 2, D, state="lost")
    for number in (1, 2):
        await world.message(number, 5, D)
        await world.put("history", job=number, mref=5, day=D)
    world.now = (D + 2) * DAY_US
    assert await world.sweep() == {}, "a lost job may be offered again"
    world.now = (D + 4000) * DAY_US
    assert await world.sweep() == {"message": 1, "history": 1, "job.keys": 1, "job": 1}
    assert await world.count("message", job=1) == await world.count("history", job=1) == 1
    [row] = await world.rows("job")
    assert (row["number"], row["payload"], row["job_key"]) == (1, b"payload", b"key")


async def test_a_job_keeps_its_key_while_the_send_log_has_rows_of_it(world: Sweeper) -> None:
    """A late bounce, noted a month after the end, is still found by its person (T10)."""
    await world.job(await world.account(), 1, D)
    await world.put("history", job=1, mref=5, day=D + 30)
    world.now = (D + 119) * DAY_US
    assert await world.sweep() == {"job.payload": 1}
    world.now = (D + 120) * DAY_US
    assert await world.sweep() == {"history": 1, "job.keys": 1}


async def test_sums_of_few_recipients_lose_their_domain_and_nothing_is_lost_from_the_total(world: Sweeper) -> None:
    await world.job(await world.account(), 1, D)
    for number, name in ((1, "ada-lovelace.example"), (2, "large.example"), (3, "bob.example")):
        await world.put("domain", number=number, name=name)
    for values in ((1, 1, 2), (1, 2, 2), (2, 1, 5), (3, 1, 1), (0, 1, 7)):
        await world.put("counter", job=1, **dict(zip(("domain", "kind", "n"), values, strict=True)))
    world.now = (D + 90) * DAY_US
    told = await world.sweep()
    sums = {(row["domain"], row["kind"]): row["n"] for row in await world.rows("counter")}
    assert sums == {(0, 1): 7 + 2 + 1, (0, 2): 2, (2, 1): 5}
    assert told["domain"] == 2
    assert [row["name"] for row in await world.rows("domain")] == ["large.example"]
    assert sorted(world.forgotten) == ["ada-lovelace.example", "bob.example"]


async def test_a_domain_in_use_stays(world: Sweeper) -> None:
    await world.job(await world.account(), 1, None)
    await world.put("domain", number=1, name="used.example")
    await world.put("counter", job=1, domain=1, kind=1, n=1)
    assert await world.sweep() == {}
    assert world.forgotten == []


async def test_an_account_that_keeps_less_is_swept_earlier_and_alone(world: Sweeper) -> None:
    short, other = await world.account("short"), await world.account("other")
    for number, account in ((1, short), (2, other)):
        await world.job(account, number, D, payload=None)
        await world.message(number, 5, D)
    assert await world.sweeping().op_shorten("short", "R3", 10) == 10
    world.now = (D + 10) * DAY_US
    assert await world.sweep() == {"message": 1, "job.keys": 1}
    assert [row["job"] for row in await world.rows("message")] == [2]
    assert [(row["place"], row["account"]) for row in await world.rows("sweep")] == [
        ("job.keys", short), ("message", short),
    ]  # fmt: skip
    world.now = (D + 90) * DAY_US
    assert await world.sweep() == {"message": 1, "job.keys": 1}


@pytest.mark.parametrize(
    ("retention", "days"), [("R3", 91), ("R3", -1), ("R2", 394), ("R6", 10), ("R5", 1), ("RH", 1), ("R9", 1)]
)
async def test_p10_an_account_cannot_lengthen_nor_shorten_what_is_the_laws(
    world: Sweeper, retention: str, days: int
) -> None:
    await world.account()
    with pytest.raises(Refused):
        await world.sweeping().op_shorten("acme", retention, days)
    assert await world.rows("shortening") == []


async def test_a_shortening_is_not_taken_back(world: Sweeper) -> None:
    await world.account()
    sweeping = world.sweeping()
    await sweeping.op_shorten("acme", "R3", 30)
    with pytest.raises(Refused, match="never lengthened"):
        await sweeping.op_shorten("acme", "R3", 31)
    assert await sweeping.op_shorten("acme", "R3", 7) == 7
    assert [row["days"] for row in await world.rows("shortening")] == [7]
    assert [row["action"] for row in await world.rows("audit")] == ["retention-shortened"] * 2
    with pytest.raises(Refused, match="no such account"):
        await sweeping.op_shorten("nobody", "R3", 7)


async def _messages(world: Sweeper, count: int, day: int = D) -> bytes:
    """So many rows of a day; the digest that their sweep must have."""
    await world.job(await world.account(), 1, day, payload=None, job_key=None, subject_sealed=None)
    rows = [
        {"job": 1, "mref": mref, "kind": 1, "reason": 0, "domain": 0, "code": 0, "enhanced": "", "attempts": 1,
         "at": day * DAY_US, "day": day, "pseudonym": mref * 7, "tls": 0, "note": None}
        for mref in range(count)
    ]  # fmt: skip
    await world.premises.store.write(lambda conn: conn.execute(insert(schema.message), rows) and None)
    total = sum(int.from_bytes(bites.digest_of("message", (1, mref)), "big") for mref in range(count))
    return (total % (1 << 256)).to_bytes(32, "big")


@only_sqlite
@pytest.mark.parametrize("rows", [1, 10, 35, 36, 5_000])
async def test_a_day_goes_in_bites_and_its_proof_does_not_depend_on_them(world: Sweeper, rows: int) -> None:
    digest = await _messages(world, 35)
    world.now = (D + 90) * DAY_US
    before = world.premises.store.transactions
    assert await world.sweep(rows=rows) == {"message": 35}
    assert world.premises.store.transactions - before >= 35 // rows, "others write in between"
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"], manifest["at"]) == (35, digest, world.now)
    assert await world.count("audit") == 1


@only_sqlite
async def test_two_sweepers_at_once_do_it_once(world: Sweeper) -> None:
    digest = await _messages(world, 500)
    world.now = (D + 90) * DAY_US
    one, other = world.sweeping(rows=7), world.sweeping(rows=11)
    done = await asyncio.gather(one.sweep(), other.sweep())
    taken = [sum(told.rows for told in some) for some in done]
    assert sum(taken) == 500
    assert min(taken) > 0, "both were at it"
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"]) == (500, digest)
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
for turn in range(4):
    with engine.begin() as conn:
        bites.bite(conn, keyring, Sweep("message", int(sys.argv[3]), 0, "R3"), 1, rows=10)
        if turn == 3:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@only_sqlite
async def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(world: Sweeper, tmp_path: Path) -> None:
    """kill -9 inside the fourth transaction: three are there, the fourth never was, the proof is of all rows, once."""
    digest = await _messages(world, 45)
    arguments = [url_of(tmp_path), str(tmp_path / "keys"), str(D)]
    ended = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", _KILLED, *arguments], cwd=Path.cwd(), env=dict(os.environ), check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert await world.count("message") == 15
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["at"]) == (30, 0), "begun, not ended"
    world.now = (D + 90) * DAY_US
    assert await world.sweep() == {"message": 15}
    [manifest] = await world.rows("sweep")
    assert (manifest["rows"], manifest["digest"], manifest["at"]) == (45, digest, world.now)


async def test_rows_that_come_for_a_swept_day_are_swept_again(world: Sweeper) -> None:
    await _messages(world, 3)
    world.now = (D + 90) * DAY_US
    await world.sweep()
    await world.message(1, 99, D)
    assert await world.sweep() == {"message": 1}
    [manifest] = await world.rows("sweep")
    assert manifest["rows"] == 4
    assert await world.count("audit", action="swept") == 2


@only_sqlite
async def test_what_was_swept_is_not_on_the_disk_any_more(world: Sweeper, tmp_path: Path) -> None:
    """P-10: gone on disk. The bytes of a sealed reply are there before, and nowhere after: neither file nor log."""
    await world.job(await world.account(), 1, D, payload=None, job_key=None, subject_sealed=None)
    note = seal_note(world.keyring, "550 <ada@example.org> unknown")
    for mref in range(200):
        await world.put("message", job=1, mref=mref, day=D, at=D * DAY_US, note=note)

    def there() -> bool:
        return any(note in octets(path) for path in tmp_path.glob("policy.db*"))

    assert there()
    world.now = (D + 90) * DAY_US
    assert await world.sweep() == {"message": 200}
    assert not there()


@only_sqlite
async def test_a_reader_with_an_old_snapshot_delays_the_log_and_nobody_else(world: Sweeper, tmp_path: Path) -> None:
    await _messages(world, 20)
    world.now = (D + 90) * DAY_US
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as conn:
        assert conn.execute(select(schema.message.c.mref).limit(1)).first() is not None
        sweeping = world.sweeping()
        assert await sweeping.round() == 60.0, "comes again soon"
    reader.dispose()
    await sweeping.round()
    assert tidy(world.premises.store.engine)
    assert (tmp_path / "policy.db-wal").stat().st_size == 0


def test_free_pages_are_given_back_where_the_database_can(tmp_path: Path) -> None:
    path = tmp_path / "small.db"
    with contextlib.closing(sqlite3.connect(path)) as made:
        made.execute("PRAGMA auto_vacuum=INCREMENTAL")
        made.execute("CREATE TABLE t (x BLOB)")
        made.executemany("INSERT INTO t VALUES (?)", [(b"x" * 4000,)] * 500)
        made.commit()
    engine = schema.open_store(f"sqlite:///{path}", writer=True)
    with engine.begin() as conn:
        conn.exec_driver_sql("DELETE FROM t")
    before = path.stat().st_size
    assert tidy(engine)
    engine.dispose()
    assert path.stat().st_size < before / 10


async def test_evidence_goes_three_years_after_the_last_act_of_those_who_are_silent(world: Sweeper) -> None:
    account = await world.account()
    silent = await world.person(account, "silent@example.org")
    written_to = await world.person(account, "written@example.org")
    acted = await world.person(account, "acted@example.org")
    withdrew = await world.person(account, "withdrew@example.org")
    for person in (silent, written_to, acted, withdrew):
        await world.put("consent", subject=person.number, purpose="doe", recorded_at=D * DAY_US + LATE, given_at=1)
    await world.put("consent", subject=acted.number, purpose="doe", recorded_at=(D + 1) * DAY_US, given_at=2)
    await world.put("consent", subject=withdrew.number, purpose="doe", recorded_at=D * DAY_US, given_at=2, withdrawn=1)
    end = gone_from(D, PERIODS["R4"])
    await world.job(account, 1, end - 20, payload=None)
    await world.message(1, 5, end - 80, written_to)

    world.now = end * DAY_US - 1
    assert await world.sweep() == {}
    world.now = end * DAY_US
    assert await world.sweep() == {"consent": 2, "subject": 1}
    left = {(row["subject"], row["withdrawn"]) for row in await world.rows("consent")}
    assert left == {(written_to.number, 0), (acted.number, 0), (withdrew.number, 1)}
    world.now = (end + 1) * DAY_US
    assert await world.sweep() == {"consent": 2, "subject": 1}, "who acted a day later goes a day later"


async def test_who_is_named_nowhere_any_more_is_forgotten(world: Sweeper) -> None:
    account, busy = await world.account(), await world.account("busy")
    people = {name: await world.person(account, f"{name}@example.org") for name in ("a", "b", "c", "d", "e", "f")}
    elsewhere = await world.person(busy, "g@example.org")
    await world.job(busy, 1, None)
    await world.put("consent", subject=people["b"].number, purpose="doe", given_at=1, withdrawn=1)
    await world.put("negative", subject=people["c"].number)
    await world.put("hold", subject=people["d"].number)
    end = gone_from(D, PERIODS["R2"])
    await world.job(account, 2, end - 1, payload=None)
    await world.message(2, 5, end - 60, people["e"])
    world.now = end * DAY_US - 1
    assert "subject" not in await world.sweep()
    world.now = end * DAY_US
    assert (await world.sweep())["subject"] == 2
    left = {row["number"] for row in await world.rows("subject")}
    assert left == {people[name].number for name in "bcde"} | {elsewhere.number}


async def test_the_walk_through_the_people_comes_to_its_end_and_misses_nobody(
    world: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policy.silence.AT_ONCE", 4)
    monkeypatch.setattr("policy.sweeping._PEOPLE_A_ROUND", 8)
    account = await world.account()
    for number in range(21):
        await world.person(account, f"person.{number}@example.org")
    world.now = gone_from(D, PERIODS["R2"]) * DAY_US
    sweeping = world.sweeping()
    waits = [await sweeping.round() for _ in range(4)]
    assert await world.count("subject") == 0
    assert waits[0] == 60.0
    assert waits[-1] > 60.0
    assert (await world.rows("sweep"))[0]["rows"] == 21


async def test_the_chain_is_verified_from_where_it_was_cut(world: Sweeper) -> None:
    """R7: old lines go from the front; the oldest one left carries a hash that a manifest vouches for."""

    def write(conn: Connection) -> None:
        for day in (D, D, D + 1, D + 400):
            audit.append(conn, day * DAY_US, "operator", "act", f"job/{day}", "operation", "done")

    await world.premises.store.write(write)
    lines = await world.rows("audit")
    end = gone_from(D, PERIODS["R7"])
    world.now = end * DAY_US - 1
    assert await world.sweep() == {}
    world.now = end * DAY_US
    assert await world.sweep() == {"audit": 2}
    left = await world.rows("audit")
    assert [line["seq"] for line in left[:2]] == [3, 4]
    assert left[0]["prev"] == lines[1]["hash"]
    assert await world.premises.store.write(audit.verify) is None
    assert all(after["prev"] == before["hash"] for before, after in itertools.pairwise(left))
    world.now = (end + 2000) * DAY_US
    await world.sweep()
    assert await world.count("audit") >= 1, "the last line carries the chain on"


async def test_where_checkpoints_are_elsewhere_the_chain_is_cut_at_one_of_them(world: Sweeper) -> None:
    def write(conn: Connection) -> None:
        for day in (D, D, D, D + 4000):
            audit.append(conn, day * DAY_US, "operator", "act", f"job/{day}", "operation", "done")

    await world.premises.store.write(write)
    lines = await world.rows("audit")
    for seq, exported in ((2, 1), (3, None), (4, 1)):
        await world.put("checkpoint", seq=seq, hash=lines[seq - 1]["hash"], at=(D + 4000) * DAY_US, exported=exported)
    world.now = gone_from(D, PERIODS["R7"]) * DAY_US
    assert await world.sweep() == {"audit": 2}
    assert (await world.rows("audit"))[0]["seq"] == 3
    assert await world.premises.store.write(audit.verify) is None


async def test_lines_and_their_checkpoints_go_together_and_the_chain_proves_itself_all_the_time(
    world: Sweeper,
) -> None:
    """Both are R7, so on one day both are over: a checkpoint that went first would leave its lines for ever."""

    def write(conn: Connection) -> None:
        for day in range(D, D + 4):
            for _ in range(2):
                audit.append(conn, day * DAY_US, "operator", "act", f"job/{day}", "operation", "done")

    await world.premises.store.write(write)
    lines = await world.rows("audit")
    for seq in (2, 4, 6):
        at = lines[seq - 1]["at"]
        await world.put("checkpoint", seq=seq, hash=lines[seq - 1]["hash"], at=at, exported=at)
    left = []
    for day in range(D, D + 4):
        world.now = gone_from(day, PERIODS["R7"]) * DAY_US
        await world.sweep()
        signed = [row["seq"] for row in await world.rows("checkpoint")]
        left.append(((await world.rows("audit"))[0]["seq"], signed))
        assert await world.premises.store.write(audit.verify) is None
        await world.premises.store.write(lambda conn: conn.execute(delete(schema.sweep)))  # the checkpoint alone is it
        assert await world.premises.store.write(audit.verify) is None
    # the checkpoint in front of the oldest line stays; the lines of the last day have none behind them yet
    assert left == [(3, [2, 4, 6]), (5, [4, 6]), (7, [6]), (7, [6])]


@only_postgresql
async def test_a_day_is_dropped_with_its_partition_and_has_the_same_proof(world: Sweeper, dialect: str) -> None:
    digest = await _messages(world, 35)
    await world.job(1, 2, None)
    await world.message(2, 5, D)
    await world.premises.store.write(lambda conn: partitions.prepare(conn, D))
    world.now = (D + 90) * DAY_US
    assert await world.sweep() == {"message": 35}
    [manifest] = [row for row in await world.rows("sweep") if row["place"] == "message"]
    assert (manifest["rows"], manifest["digest"]) == (35, digest)
    assert [row["job"] for row in await world.rows("message")] == [2], "a job that is not over keeps its rows"
    assert await world.sweep() == {}
    await world.premises.store.write(lambda conn: conn.execute(update(schema.job).values(done_at=1)) and None)
    assert (await world.sweep())["message"] == 1


async def test_manifests_go_with_their_class_and_never_while_a_sweep_is_open(world: Sweeper) -> None:
    await world.put("sweep", retention="R3", place="message", day=D, at=0)
    await world.put("sweep", retention="R3", place="message", day=D + 1, at=D * DAY_US)
    world.now = gone_from(D, PERIODS["R7"]) * DAY_US
    assert await world.sweep() == {"sweep": 1}
    assert {(row["place"], row["day"]) for row in await world.rows("sweep")} == {("message", D), ("sweep", D)}


async def test_refused_and_dead_entries_go_after_thirty_days(world: Sweeper) -> None:
    now = (D + 30) * DAY_US
    for stream in (keyspace.REJECTED, keyspace.DEAD):
        for at in (D * DAY_US - 1, D * DAY_US, now):
            await world.premises.redis.xadd(stream, {"payload": b"sealed"}, id=f"{at // 1000}-0")
    world.now = now
    await world.sweep()
    for stream in (keyspace.REJECTED, keyspace.DEAD):
        left: Any = await world.premises.redis.xrange(stream)
        assert [int(identity.split(b"-")[0]) for identity, _ in left] == [D * DAY_US // 1000, now // 1000]


async def test_the_plan_is_shown_without_touching_anything(world: Sweeper) -> None:
    await _messages(world, 12)
    world.now = (D + 90) * DAY_US
    told = await world.sweeping().op_sweep(dry_run=True)
    assert told == [{"retention": "R3", "place": "message", "day": D, "account": 0, "rows": 12}]
    assert await world.count("message") == 12
    assert await world.count("sweep") == 0
    assert await world.sweeping().op_sweep() == told


async def test_the_oldest_record_of_each_class_is_a_metric(world: Sweeper) -> None:
    sweeping = world.sweeping()
    assert "oldest_record_age" not in sweeping.statistics()
    await _messages(world, 2)
    await world.put("hit", day=D + 3, job=1, mref=1)
    world.now = (D + 5) * DAY_US
    await sweeping.round()
    ages = sweeping.statistics()["oldest_record_age"]
    assert isinstance(ages, dict)
    assert ages["R3"] == 5 * 86_400
    assert ages["R2"] == 2 * 86_400


async def test_the_next_round_is_at_midnight_at_the_latest(world: Sweeper) -> None:
    world.now = D * DAY_US + DAY_US - 90 * 1_000_000
    assert await world.sweeping().round() == 91.0
    world.now = D * DAY_US + DAY_US // 2
    assert await world.sweeping().round() == 3600.0


async def test_a_sweep_that_fails_is_counted_and_the_others_go_on(world: Sweeper) -> None:
    """A held person's key is lost: nobody can say which rows of the send log are theirs, so none is taken."""
    account = await world.account()
    person = await world.person(account, "held@example.org")
    await world.put("hold", subject=person.number)
    await world.job(account, 1, D, payload=None)
    await world.message(1, 5, D, person)
    await world.put("backup", destroyed=1)
    world.keyring.kek.clear()
    world.now = (D + 3000) * DAY_US
    sweeping: Sweeping = world.sweeping()
    done = await sweeping.sweep()
    assert "backup" in {one.place for one in done}
    assert sweeping.statistics()["sweep_failures"] != 0
    assert await world.count("message") == 1


async def test_a_bite_of_nothing_leaves_no_manifest(world: Sweeper) -> None:
    def work(conn: Connection) -> bites.Bite:
        put(conn, "reading", day=D)
        return bites.bite(conn, world.keyring, Sweep("reading", D + 1, 0, "R6"), world.now)

    assert await world.premises.store.write(work) == bites.Bite(0, True)
    assert await world.count("sweep") == 0
