"""Redis comes back older, emptied or only restarted: what the writer does (promise T12, policy side).

A real Valkey is stopped and started again on an earlier copy of its append-only files.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, update

from policy import cursors, keyspace, losses, restore
from policy import schema as tables
from policy.events import Batch, Event, Kind, Reason, encode_batch
from policy.evidence import STREAMS, Known, Seen, evidence
from policy.fence import Fence, RunNotCleared
from policy.instants import week_of
from policy.keys import seal
from policy.ledger import JobStatus
from policy.losses import Losses
from policy.valkey import connect
from policy.vitals import Vitals
from policy.wire import JobRecord, SuppressionRecord, WireError, job_aad
from tests.world.mail import MailWorld, job, mail_world, rows
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]

AT = 1_800_000_000_000_000
TAG = b"t" * 12
PLACE = 5  # the partition everything here lies in


# --- an older Redis -----------------------------------------------------------------------------------------------


def live_files(world: PolicyWorld) -> Path:
    return world.server.embedded.folder / "appendonlydir"


def copied(world: PolicyWorld, name: str = "early") -> Path:
    """A copy of the append-only files as they are now; with `always` whatever was answered is in them."""
    return Path(shutil.copytree(live_files(world), world.settings.data_dir / name))


async def come_back(world: PolicyWorld, copy: Path | None) -> None:
    """The server is killed and starts again: on the copy, on nothing (a path that is not there) or on its own files."""
    os.kill(world.server.embedded.pid, signal.SIGKILL)
    await world.server.stop()
    if copy is not None:
        shutil.rmtree(live_files(world))
        if copy.exists():
            shutil.copytree(copy, live_files(world))
    await world.server.start()


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.01)


async def meta(world: PolicyWorld) -> dict[str, str]:
    held: dict[Any, Any] = await world.redis.hgetall(keyspace.META)
    return {name.decode(): value.decode() for name, value in held.items()}


async def run_id(world: PolicyWorld) -> str:
    return str((await world.redis.info("server"))["run_id"])


async def let_in(world: PolicyWorld, epoch: int) -> dict[str, str]:
    """META once the run that answers now is let in, in this epoch, with leasing open."""

    async def is_in() -> bool:
        held = await meta(world)
        return (held.get("run"), held.get("epoch"), held.get("lease")) == (await run_id(world), str(epoch), str(epoch))

    await until(is_in)
    return await meta(world)


async def beaten(world: PolicyWorld) -> None:
    """Until SQL remembers a beat that Redis has now."""
    before = int((await meta(world))["pulse"])

    async def is_remembered() -> bool:
        await world.ask.ping()  # work: a beat is due
        rows = await world.writer.store.write(cursors.load)
        return int(rows.get("pulse", 0)) > before

    await until(is_remembered)


# --- a job, as the engine would leave it --------------------------------------------------------------------------


def record(world: PolicyWorld, job_id: str = "spring", **changes: object) -> JobRecord:
    service = world.keyring.service
    made = JobRecord(
        account="acme",
        job_id=job_id,
        hash=b"h" * 32,
        kind="campaign",
        created_at=AT,
        payload=seal(service, b"{}", job_aad("payload", "acme", job_id)),
        job_key=seal(service, b"k" * 32, job_aad("key", "acme", job_id)),
        legal_basis="consent",
        list="news",
        chunks_expected=1,
    )
    return msgspec.structs.replace(made, **changes)


async def accepted(world: PolicyWorld, job_id: str = "spring", **changes: object) -> int:
    if world.reader.account("acme") is None:
        await world.ask.account_add("acme")
    return (await world.ask.accept_job(record(world, job_id, **changes))).number


async def put(world: PolicyWorld, number: int, waiting: int, *, entry: int = 0, marked: bool = True) -> None:
    """What a put and the mark of an entry leave, without the slices."""
    home = number % keyspace.PARTITIONS
    for partition in {PLACE, home}:
        fields = {"ac": 1, "li": 1, "to": 0, "nb": 1, "st": "sending"}
        await world.redis.hset(keyspace.job(partition, number), mapping=fields)  # type: ignore[arg-type]
    await world.redis.hincrby(keyspace.job(PLACE, number), "w", waiting)
    await world.redis.hset(keyspace.duplicates(PLACE, number, 0), "fingerprint", "0")
    await world.redis.setbit(keyspace.chunks_put(PLACE, number), entry * 64, 1)
    if marked:
        await world.redis.setbit(keyspace.chunks_put(home, number), entry * 64 + 63, 1)


async def sending(world: PolicyWorld, rows: int, job_id: str = "spring", **changes: object) -> int:
    """A job whose audience is all on the lanes."""
    number = await accepted(world, job_id, **changes)
    await world.ask.chunk(number, 0, b"a" * 32, rows)
    await put(world, number, rows)
    await world.ask.expanded(number, rows)
    return number


def ended(*mrefs: int, attempt: int = 1, kind: Kind = Kind.DELIVERED, reason: int = 0) -> list[Event]:
    return [Event(kind, mref, attempt, AT, 7, TAG, reason, 250, "2.0.0", 3) for mref in mrefs]


async def settle(world: PolicyWorld, number: int, *events: Event, chunk: int = -1) -> None:
    """Rows that ended: off the lanes, into the event stream."""
    await world.redis.xadd(
        keyspace.events(PLACE), {"b": encode_batch(Batch(number, "one.example", list(events), chunk))}
    )
    if chunk < 0:
        await world.redis.hincrby(keyspace.job(PLACE, number), "w", -len(events))


def status(world: PolicyWorld, number: int) -> JobStatus:
    told = world.reader.job_status(number, AT)
    assert told is not None
    return told


async def over(world: PolicyWorld, number: int, state: str) -> JobStatus:
    async def is_over() -> bool:
        told = status(world, number)
        return told.state == state and told.done_at is not None

    await until(is_over, 30.0)
    return status(world, number)


async def keys_of(world: PolicyWorld, number: int) -> list[bytes]:
    return [key async for key in world.redis.scan_iter(match=keyspace.JOB_KEYS) if f":{number}" in key.decode()]


# --- what counts as older -------------------------------------------------------------------------------------------

KNOWN = Known("r1", epoch=3, pulse=10, pushed=20, commit=21, jobs=4, cursors={STREAMS[0]: "5-1"})
SAME = Seen("r1", "r1", epoch=3, pulse=10, commit=20, last={STREAMS[0]: "5-1"})
NEXT = replace(SAME, run="r2")


@pytest.mark.parametrize(
    ("seen", "known", "older"),
    [
        (SAME, KNOWN, False),
        (NEXT, KNOWN, False),
        (replace(NEXT, pulse=11, commit=25, last={STREAMS[0]: "5-2"}), KNOWN, False),  # SQL had no time to remember
        (replace(NEXT, cleared="r0"), KNOWN, True),
        (replace(NEXT, cleared=None), KNOWN, True),
        (replace(NEXT, epoch=2), KNOWN, True),
        (replace(NEXT, pulse=9), KNOWN, True),
        (replace(NEXT, pulse=None), KNOWN, True),
        (replace(NEXT, commit=19), KNOWN, True),
        (replace(NEXT, last={STREAMS[0]: "5-0"}), KNOWN, True),
        (replace(NEXT, last={STREAMS[0]: "10-0"}), KNOWN, False),  # ids are numbers, not texts
        (replace(NEXT, last={}), KNOWN, True),
        (replace(NEXT, synced=False), KNOWN, True),
        (replace(NEXT, promoted=True), KNOWN, True),
        (replace(SAME, synced=False, promoted=True, commit=1), KNOWN, False),  # the very process that was let in
        (replace(SAME, pulse=9), KNOWN, True),  # and yet: other data were loaded into it
        (Seen("r1"), KNOWN, True),
        (Seen("r2"), KNOWN, True),
        (Seen("r2"), Known(), False),
        (Seen("r2"), Known("r1", epoch=1, pulse=5), False),  # nothing has happened that could be forgotten
        (Seen("r2", synced=False), Known(), False),
        (Seen("r2", commit=9, last={STREAMS[0]: "5-1"}), replace(KNOWN, run="", epoch=0, pulse=0, pushed=0), False),
    ],
)
def test_what_tells_a_loss_from_a_restart(seen: Seen, known: Known, older: bool) -> None:
    assert bool(evidence(seen, known)) is older


# --- the run of Redis -------------------------------------------------------------------------------------------------


async def test_a_first_start_opens_leasing_before_the_socket_answers(world: PolicyWorld) -> None:
    held = await meta(world)
    assert (held["run"], held["epoch"], held["lease"], held["restored"]) == (await run_id(world), "0", "0", "0")
    await world.restart_writer()
    assert (await meta(world))["epoch"] == "0"
    assert world.writer.statistics()["redis_restores"] == 0


async def test_a_restart_raises_no_epoch_and_keeps_everything(world: PolicyWorld) -> None:
    number = await sending(world, 3)
    await world.ask.opt_out(1, PLACE, TAG, "page")
    await settle(world, number, *ended(1))
    await world.drain()
    await beaten(world)
    for _ in range(2):
        fence = Fence()
        client = connect(world.server.url, fence)
        began = time.monotonic()
        await come_back(world, None)
        held = await let_in(world, 0)
        assert time.monotonic() - began < 15, "a bound for a hanging machine; it takes a fifth of a second"
        assert held["restored"] == "0"
        assert await client.ping()
        assert fence.epoch == 0
        await client.aclose()
        await settle(world, number, *ended(2))
        await world.drain()
    assert world.writer.restore.restores == 0
    assert status(world, number).counts == {"delivered": 2}
    assert await world.redis.hget(keyspace.job(PLACE, number), "w") == b"0"


async def test_a_restart_while_no_writer_runs_raises_no_epoch_either(world: PolicyWorld) -> None:
    await world.ask.account_add("acme")
    await world.ask.opt_out(1, PLACE, TAG, "page")
    await world.writer.stop()
    await come_back(world, None)
    client = connect(world.server.url, Fence())
    with pytest.raises(RunNotCleared):
        await client.ping()
    await world.restart_writer()
    assert await client.ping()
    assert (await meta(world))["epoch"] == "0"
    await client.aclose()


async def test_an_older_redis_is_mended_before_anybody_is_let_in(world: PolicyWorld) -> None:
    """Suppressions, the negative list, halts and job states come back; numbers jump; streams go on."""
    paused, freed = await sending(world, 2, "paused"), await sending(world, 2, "freed")
    await world.ask.job_state(freed, "paused")
    cancelled = await sending(world, 2, "cancelled")
    await world.ask.account_add("other")
    await world.redis.hset(keyspace.counter(PLACE), mapping={"tok": 7, "seq": 9, "beat": 3})
    await world.ask.opt_out(1, PLACE, b"before opt.o", "page")
    await world.ask.suppress([SuppressionRecord(b"taken back..", PLACE, 1, 0, "manual")])
    copy = copied(world)
    await world.ask.opt_out(1, PLACE, TAG, "page")
    assert await world.ask.unsuppress(b"taken back..", PLACE, 1, 0) == 1
    [person] = await world.ask.resolve(1, week_of(AT), [(TAG, PLACE, "ada@one.example")])
    assert await world.ask.withdraw(1, TAG, "open_tracking")
    await world.ask.job_state(paused, "paused")
    await world.ask.job_state(freed, "sending")
    await world.ask.job_state(cancelled, "cancelled")
    await world.ask.account_freeze("other", True)
    await come_back(world, copy)
    held = await let_in(world, 1)
    bucket = keyspace.suppression(PLACE, TAG)
    assert await world.redis.hexists(bucket, TAG)
    assert await world.redis.hexists(keyspace.suppression(PLACE, b"before opt.o"), b"before opt.o")
    assert not await world.redis.hexists(keyspace.suppression(PLACE, b"taken back.."), b"taken back..")
    announced: Any = await world.redis.xrange(keyspace.NEGATIVE)
    assert [int(fields[b"s"]) for _, fields in announced] == [person.subject]
    words: Any = await world.redis.smembers(keyspace.halts(63))
    assert words == {f"j{paused}".encode(), f"x{cancelled}".encode(), b"a2"}
    states = [await world.redis.hget(keyspace.job(PLACE, number), "st") for number in (paused, freed, cancelled)]
    assert states == [b"paused", b"sending", b"cancelled"]
    numbers: Any = await world.redis.hgetall(keyspace.counter(PLACE))
    jump = restore.JUMP
    assert {name: int(value) - jump for name, value in numbers.items()} == {b"tok": 7, b"seq": 9, b"beat": 3}
    seconds, micros = await world.redis.time()
    assert 0 < int(held["restored"]) <= seconds * 1_000_000 + micros
    assert held["commit"] == str((await world.ask.ping())["commit"])
    assert world.writer.restore.until == cancelled


@pytest.mark.parametrize("emptied", [False, True])
async def test_streams_never_stall(world: PolicyWorld, emptied: bool) -> None:
    """A clock behind the ledger's cursors: a new event would get an id that has been passed, and never be read."""
    number = await accepted(world)
    stream = keyspace.events(PLACE)
    copy = copied(world)
    if emptied:
        copy = copy / "nothing"
    ahead = int(time.time() * 1000) + 86_400_000
    entry = encode_batch(Batch(number, "one.example", ended(1)))
    await world.redis.xadd(stream, {"b": entry}, id=f"{ahead}-5")
    await world.drain()
    assert status(world, number).counts == {"delivered": 1}
    await come_back(world, copy)
    await let_in(world, 1)
    assert await world.redis.xlen(stream) == 0
    await settle(world, number, *ended(2))
    await world.drain()
    assert status(world, number).counts == {"delivered": 2}


async def test_events_that_come_back_with_an_older_redis_are_not_told_twice(world: PolicyWorld) -> None:
    number = await sending(world, 4)
    await settle(world, number, *ended(1, 2))
    copy = copied(world)
    await world.drain()
    await settle(world, number, *ended(3))
    await world.drain()
    await come_back(world, copy)
    await let_in(world, 1)
    assert await world.redis.xlen(keyspace.events(PLACE)) == 0
    await world.drain()
    assert status(world, number).counts == {"delivered": 3}


async def test_leasing_opens_when_the_workers_have_told_their_journals(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = await sending(world, 2)
    worker, old = Vitals(world.settings.data_dir, "engine", 0), Vitals(world.settings.data_dir, "engine", 1)
    worker.publish({"epoch": 0}, time.time())
    old.publish({"epoch": 0}, time.time())
    Vitals(world.settings.data_dir, "tracker", 0).publish({"pages": 1}, time.time())
    copy = copied(world)
    await world.ask.opt_out(1, PLACE, TAG, "page")
    await beaten(world)
    await come_back(world, copy)

    async def is_let_in() -> bool:
        return (await meta(world)).get("run") == await run_id(world)

    await until(is_let_in)
    assert (await meta(world))["lease"] == "0"
    assert not await world.writer.restore.open()
    worker.publish({"epoch": -1}, time.time())  # it has begun anew and tells its journal
    assert not await world.writer.restore.open()
    worker.publish({"epoch": 1}, time.time())
    assert not await world.writer.restore.open()
    await settle(world, number, *ended(1))  # what the journals tell
    old.withdraw()  # ended in order: nothing of its own is left to tell
    await let_in(world, 1)
    assert status(world, number).counts == {"delivered": 1}, "all that was told is in the ledger when leasing opens"


async def test_leasing_opens_without_a_worker_that_never_comes(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "FRESH", 0.3)
    await sending(world, 2)
    Vitals(world.settings.data_dir, "engine", 0).publish({"epoch": 0}, time.time() - 100)  # it died long ago
    await world.redis.flushall()
    await let_in(world, 1)
    monkeypatch.setattr(restore, "FRESH", 100.0)
    monkeypatch.setattr(restore, "PATIENCE", 0.3)
    Vitals(world.settings.data_dir, "engine", 0).publish({"epoch": 1}, time.time())  # it lives and hangs
    await world.redis.flushall()
    await let_in(world, 2)


async def test_opening_goes_on_after_a_crash_of_the_writer(world: PolicyWorld) -> None:
    await sending(world, 2)
    await world.redis.flushall()
    await let_in(world, 1)
    await world.writer.stop()
    await world.redis.hset(keyspace.META, "lease", "0")  # it died between run and lease
    await world.restart_writer()
    held = await let_in(world, 1)
    assert held["epoch"] == "1"
    await world.writer.stop()
    await world.redis.hset(keyspace.META, "epoch", "0")  # it died between SQL's epoch and META's
    await world.restart_writer()
    await let_in(world, 2)


async def test_a_redis_emptied_under_a_running_writer(world: PolicyWorld) -> None:
    await accepted(world)
    await world.ask.opt_out(1, PLACE, TAG, "page")
    await world.redis.flushall()
    await let_in(world, 1)
    assert await world.redis.hexists(keyspace.suppression(PLACE, TAG), TAG)
    assert await world.redis.hget(keyspace.job_status("acme", "spring"), "state") == b"accepted"
    assert (await accepted(world, "summer")) == 2


async def test_an_installation_without_a_past_may_lose_its_redis(world: PolicyWorld) -> None:
    await world.writer.stop()
    await world.redis.flushall()
    for path in world.settings.data_dir.glob("policy.db*"):
        path.unlink()
    await world.restart_writer()
    held = await meta(world)
    assert (held["epoch"], held["lease"], held["run"]) == ("0", "0", await run_id(world))


async def test_a_new_database_keeps_the_epoch_of_its_redis(world: PolicyWorld) -> None:
    await accepted(world)
    await world.redis.flushall()
    await let_in(world, 1)
    await world.writer.stop()
    for path in world.settings.data_dir.glob("policy.db*"):
        path.unlink()
    await world.restart_writer()
    await let_in(world, 1)


async def test_an_upgraded_installation_is_not_taken_for_a_loss(world: PolicyWorld) -> None:
    """A program before this room wrote neither run nor epoch."""
    number = await sending(world, 2)
    await settle(world, number, *ended(1))
    await world.drain()
    await world.writer.stop()
    await world.redis.hdel(keyspace.META, "run", "epoch", "lease", "restored", "pulse", "ledgered")
    with contextlib.closing(sqlite3.connect(world.settings.data_dir / "policy.db")) as database:
        database.execute("delete from cursor where stream in ('run', 'epoch', 'pulse', 'pushed', 'restored')")
        database.commit()
    await world.restart_writer()
    held = await meta(world)
    assert (held["epoch"], held["lease"]) == ("0", "0")


# --- ledgered, beats ----------------------------------------------------------------------------------------------


async def redis_now(world: PolicyWorld) -> int:
    seconds, micros = await world.redis.time()
    return int(seconds) * 1_000_000 + int(micros)


async def test_ledgered_passes_the_last_event_also_when_nothing_follows(world: PolicyWorld) -> None:
    number = await sending(world, 2)
    await settle(world, number, *ended(1))
    told = await redis_now(world)

    async def is_passed() -> bool:
        return int((await meta(world)).get("ledgered", 0)) > told

    await until(is_passed)
    assert status(world, number).counts == {"delivered": 1}


async def test_ledgered_stands_while_sql_does_not_take_events(world: PolicyWorld) -> None:
    number = await sending(world, 2)
    async with world.writer._draining:
        held = int((await meta(world)).get("ledgered", 0))
        await settle(world, number, *ended(1))
        told = await redis_now(world)
        await beaten(world)
        await beaten(world)
        assert int((await meta(world)).get("ledgered", 0)) == held < told


async def test_an_idle_writer_writes_next_to_nothing(world: PolicyWorld) -> None:
    """appendfsync is always: each write is a sync of the disk."""
    pace = restore._Pace(active=0.0)
    turns = [second for second in range(200) if pace.due(float(second))]
    assert turns == [0, 1, 2, 3, 4, 5, 35, 65, 95, 125, 155, 185]
    pace.active = 199.5
    assert [second for second in range(200, 203) if pace.due(float(second))] == [200, 201, 202]


# --- lost jobs ----------------------------------------------------------------------------------------------------


async def test_what_redis_lost_of_a_job_is_counted_and_it_comes_back_when_submitted_again(world: PolicyWorld) -> None:
    number = await sending(world, 6)
    await settle(world, number, *ended(1, 2), *ended(3, kind=Kind.BOUNCED, reason=Reason.USER_UNKNOWN))
    await world.drain()
    first = world.reader.job_payload(number)
    await come_back(world, world.settings.data_dir / "nothing")
    await let_in(world, 1)
    told = await over(world, number, "lost")
    assert told.counts == {"delivered": 2, "bounced": 1, "lost": 3}
    assert (told.rows_submitted, told.terminal, told.waiting) == (6, 6, 0)
    assert "3 of its recipients" in told.reason

    async def is_counted() -> bool:
        return world.writer.statistics()["recipients_lost"] == 3

    await until(is_counted)

    async def is_told() -> bool:
        held: Any = await world.redis.hgetall(keyspace.job_status("acme", "spring"))
        return (held.get(b"state"), held.get(b"count:lost")) == (b"lost", b"3")

    await until(is_told)
    conflict = await world.ask.accept_job(record(world, hash=b"x" * 32))
    assert conflict.status == "conflict"
    again = await world.ask.accept_job(record(world, payload=b"another sealing", job_key=b"another"))
    assert (again.status, again.number, again.state) == ("new", number, "accepted")
    assert first is not None
    assert (again.payload, again.job_key) == (first.payload, first.job_key)
    told = status(world, number)
    assert (told.counts, told.rows_submitted, told.done_at, told.reason) == (
        {"delivered": 2, "bounced": 1},
        None,
        None,
        "",
    )
    assert (await world.ask.accept_job(record(world))).status == "same"
    assert await world.ask.chunk(number, 0, b"a" * 32, 6) == "same"
    assert status(world, number).state == "expanding"
    await put(world, number, 3)
    await world.ask.expanded(number, 6)
    await settle(world, number, *ended(4, 5, 6))
    told = await over(world, number, "done")
    assert told.counts == {"delivered": 5, "bounced": 1}
    await world.drain()
    assert await keys_of(world, number) == []


async def test_what_expansion_had_decided_is_decided_anew(world: PolicyWorld) -> None:
    """Refusals and repetitions of the first life go, deliveries stay: the sums come out whoever is refused now."""
    number = await sending(world, 8)
    repeated = Event(Kind.REFUSED, 1, 0, AT, 0, b"", Reason.DUPLICATE)
    refused = ended(3, attempt=0, kind=Kind.REFUSED, reason=Reason.SUPPRESSED)
    await settle(world, number, repeated, *refused, chunk=0)
    await world.redis.hincrby(keyspace.job(PLACE, number), "w", -2)
    await settle(
        world, number, *ended(1), *ended(2, kind=Kind.UNKNOWN), *ended(4, kind=Kind.REFUSED, reason=Reason.ERASED)
    )
    await settle(world, number, *ended(1, kind=Kind.DEFERRED, reason=Reason.GREYLISTED))
    await world.drain()
    await world.redis.flushall()
    await let_in(world, 1)
    told = await over(world, number, "lost")
    assert told.counts == {"delivered": 1, "unknown": 1, "refused": 3, "lost": 3, "deferred": 1}
    again = await world.ask.accept_job(record(world))
    assert again.status == "new"
    told = status(world, number)
    assert told.counts == {"delivered": 1, "unknown": 1, "refused": 1, "deferred": 1}
    assert told.reasons["refused"] == {"erased": 1}
    await world.ask.chunk(number, 0, b"a" * 32, 8)
    await put(world, number, 3)
    await settle(world, number, repeated, *ended(5, attempt=0, kind=Kind.REFUSED, reason=Reason.SUPPRESSED), chunk=0)
    await settle(world, number, *ended(3, 6, 7))
    await world.ask.expanded(number, 8)
    told = await over(world, number, "done")
    assert told.counts == {"delivered": 4, "unknown": 1, "refused": 3, "deferred": 1}
    assert told.terminal == told.rows_submitted == 8


async def test_a_row_that_was_lost_and_tells_its_end_after_all_is_counted_once(world: PolicyWorld) -> None:
    """The worker of a host that was away tells its journal when the job has been given up."""
    number = await sending(world, 5)
    await settle(world, number, *ended(1))
    await world.drain()
    await world.redis.flushall()
    await let_in(world, 1)
    assert (await over(world, number, "lost")).counts == {"delivered": 1, "lost": 4}
    late = [ended(1, 2), ended(3)]
    for events in late:
        await settle(world, number, *events)
    await world.drain()
    assert status(world, number).counts == {"delivered": 3, "lost": 2}
    await world.restart_writer()
    await settle(world, number, *ended(3, 4, 5))
    await world.drain()
    told = status(world, number)
    assert (told.counts, told.terminal) == ({"delivered": 5}, 5)


async def test_a_job_whose_rows_wait_is_not_lost(world: PolicyWorld) -> None:
    """Nothing is given up that is on the lanes, held for its time, or still in the intake."""
    waiting, held, inside = [await sending(world, 2, job_id) for job_id in ("waiting", "held", "inside")]
    for number in (held, inside):
        await settle(world, number, *ended(1, 2))
    await world.drain()
    whole = await sending(world, 3, "whole")
    await settle(world, whole, *ended(1, 2, 3))
    for number in (held, inside):  # of these, more rows are known than ended
        await over(world, number, "done")
        more = update(tables.job).where(tables.job.c.number == number)
        more = more.values(done_at=None, state="sending", rows_submitted=3)
        await world.writer.store.write(functools.partial(Connection.execute, statement=more))
    await world.redis.xadd(keyspace.stream_of_chunks(held), {"n": 1})
    entry = await world.redis.xadd(keyspace.INTAKE, {"job": "{}"})
    copy = copied(world)
    await world.ask.opt_out(1, PLACE, TAG, "page")
    await beaten(world)
    await come_back(world, copy)
    await let_in(world, 1)
    looks = 0
    look = Losses._is_settled

    async def counted(self: Losses, number: int, suspect: Any) -> bool:
        nonlocal looks
        looks += number == inside
        return await look(self, number, suspect)

    Losses._is_settled = counted  # type: ignore[method-assign]
    try:

        async def looked() -> bool:
            return looks >= 4

        await until(looked)
    finally:
        Losses._is_settled = look  # type: ignore[method-assign]
    assert [status(world, number).state for number in (waiting, held, inside)] == ["sending"] * 3
    await world.redis.xdel(keyspace.INTAKE, entry)
    assert (await over(world, inside, "lost")).counts == {"delivered": 2, "lost": 1}
    assert status(world, held).state == status(world, waiting).state == "sending"
    await world.redis.delete(keyspace.stream_of_chunks(held))
    await over(world, held, "lost")
    assert (await over(world, whole, "done")).counts == {"delivered": 3}


async def test_without_a_restore_no_job_is_ever_suspected(world: PolicyWorld) -> None:
    number = await sending(world, 3)
    await world.redis.delete(keyspace.job(PLACE, number))
    for _ in range(3):
        await world.writer.losses.round()
    assert world.writer.losses.suspects == 0
    assert status(world, number).state == "sending"


async def test_a_cancelled_job_stays_cancelled_whatever_was_lost(world: PolicyWorld) -> None:
    number = await sending(world, 3)
    await world.ask.job_state(number, "cancelled", "wrong list")
    await settle(world, number, *ended(1, kind=Kind.CANCELLED))
    await world.drain()
    await world.redis.flushall()
    await let_in(world, 1)
    told = await over(world, number, "cancelled")
    assert (told.counts, told.reason) == ({"cancelled": 1, "lost": 2}, "wrong list")
    assert (await world.ask.accept_job(record(world))).status == "same"


async def test_a_frozen_account_takes_up_nothing(world: PolicyWorld) -> None:
    number = await sending(world, 3)
    await world.redis.flushall()
    await let_in(world, 1)
    await over(world, number, "lost")
    await world.ask.account_freeze("acme", True)
    assert (await world.ask.accept_job(record(world))).status == "frozen"
    assert status(world, number).state == "lost"


async def test_a_job_in_the_middle_of_its_expansion(world: PolicyWorld) -> None:
    """Three entries: one is whole in the copy, one was put after it, one never came."""
    number = await accepted(world, chunks_expected=3)
    await world.ask.chunk(number, 0, b"a" * 32, 2)
    await put(world, number, 2)
    copy = copied(world)
    await world.ask.chunk(number, 1, b"b" * 32, 3)
    await put(world, number, 3, entry=1)
    await settle(world, number, *ended(1, 3))
    await world.drain()
    await beaten(world)
    await come_back(world, copy)
    await let_in(world, 1)
    await settle(world, number, *ended(2))  # what is on the lanes is sent; 1 was, so it is settled without an event
    await world.redis.hincrby(keyspace.job(PLACE, number), "w", -1)
    told = await over(world, number, "lost")
    assert told.counts == {"delivered": 3, "lost": 2}
    assert (told.rows_submitted, told.chunks) == (5, 2)
    assert (await world.ask.accept_job(record(world, chunks_expected=3))).status == "new"
    assert await world.ask.chunk(number, 0, b"a" * 32, 2) == "same"
    assert await world.ask.chunk(number, 1, b"b" * 32, 3) == "same"
    assert await world.ask.chunk(number, 2, b"c" * 32, 1) == "new"
    for entry, waiting in ((0, 0), (1, 2), (2, 1)):
        await put(world, number, waiting, entry=entry)
    await settle(world, number, *ended(4, 5, 6))
    await world.ask.expanded(number, 6)
    assert (await over(world, number, "done")).counts == {"delivered": 6}


async def test_a_job_that_waits_for_its_whole_audience_is_not_held_for_ever(world: PolicyWorld) -> None:
    number = await accepted(world, chunks_expected=2, wait=True)
    await world.ask.chunk(number, 0, b"a" * 32, 2)
    await put(world, number, 2)
    copy = copied(world)
    await world.ask.chunk(number, 1, b"b" * 32, 1)
    await beaten(world)
    await come_back(world, copy)
    await let_in(world, 1)

    async def is_given_up() -> bool:
        return await world.redis.hget(keyspace.job(PLACE, number), "st") == b"cancelled"

    await until(is_given_up)
    told = status(world, number)
    assert (told.state, told.done_at, told.rows_submitted) == ("lost", None, 3)
    assert await world.redis.smembers(keyspace.halts(PLACE)) == {f"x{number}".encode()}
    with pytest.raises(WireError) as error:
        await world.ask.accept_job(record(world, chunks_expected=2, wait=True))
    assert error.value.kind == "redis"  # the intake asks again
    await settle(world, number, *ended(1, 2, attempt=0, kind=Kind.CANCELLED))  # as workers end what is cancelled
    told = await over(world, number, "lost")
    assert told.counts == {"cancelled": 2, "lost": 1}
    await world.drain()
    assert (await world.ask.accept_job(record(world, chunks_expected=2, wait=True))).status == "new"
    assert status(world, number).counts == {}
    assert await keys_of(world, number) == []


async def test_an_audience_that_goes_on_after_a_restore_is_not_given_up(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer in the middle of its entries, and a restore that lost nothing of them."""
    number = await accepted(world, chunks_expected=3)
    await world.ask.chunk(number, 0, b"a" * 32, 1)
    await put(world, number, 1)
    await settle(world, number, *ended(1))
    await beaten(world)
    copy = copied(world)
    await world.ask.opt_out(1, PLACE, TAG, "page")
    await beaten(world)
    await come_back(world, copy)
    await let_in(world, 1)
    ahead = [0]
    finder = world.writer.losses
    finder._monotonic = lambda: time.monotonic() + ahead[0]

    async def pass_seconds(count: int) -> None:
        for _ in range(count):
            ahead[0] += 1
            await finder.round()

    most = int(losses.QUIET) - 20
    await pass_seconds(most)
    assert status(world, number).state == "expanding"
    await world.ask.chunk(number, 1, b"b" * 32, 1)
    await put(world, number, 0, entry=1)
    await pass_seconds(most)
    assert status(world, number).state == "expanding", "an entry came meanwhile"
    await pass_seconds(most)
    assert (await over(world, number, "lost")).counts == {"delivered": 1, "lost": 1}


async def test_keys_of_jobs_that_were_over_go_again(world: PolicyWorld) -> None:
    """The copy is of before a job ended: its keys come back with it, and go when its slices have."""
    number = await sending(world, 3)
    await settle(world, number, *ended(1))
    await world.drain()
    copy = copied(world)
    await settle(world, number, *ended(2, 3))
    await over(world, number, "done")
    await beaten(world)
    await come_back(world, copy)
    await let_in(world, 1)

    async def is_swept() -> bool:
        return sorted(await keys_of(world, number)) == sorted(
            {keyspace.job(partition, number).encode() for partition in (PLACE, number % keyspace.PARTITIONS)}
        )

    await until(is_swept)
    await world.redis.hincrby(keyspace.job(PLACE, number), "w", -2)  # a worker settles the slices whole

    async def is_free() -> bool:
        return await keys_of(world, number) == []

    await until(is_free)
    assert status(world, number).state == "done"


async def test_two_offers_of_a_lost_job_take_it_up_once(world: PolicyWorld) -> None:
    number = await sending(world, 3)
    await world.redis.flushall()
    await let_in(world, 1)
    await over(world, number, "lost")
    told = await asyncio.gather(*[world.ask.accept_job(record(world)) for _ in range(6)])
    assert sorted(one.status for one in told) == ["new"] + ["same"] * 5


# --- with an engine -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[MailWorld]:
    async with mail_world("slow:0:name=slow,delay=0.1") as mail:

        async def keep() -> None:
            while True:
                worker = await mail.start_worker()
                code = await worker.wait()
                mail.workers.remove(worker)
                assert code in (3, -signal.SIGKILL), mail.log()

        keeping = asyncio.create_task(keep())
        try:
            yield mail
            assert not keeping.done()
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


async def test_a_campaign_whose_redis_was_emptied_is_lost_and_sent_to_the_end_when_submitted_again() -> None:
    async with engine() as mail:
        people = [*rows(120, "a.slow.test"), *rows(3, "a.slow.test"), {"address": "none", "fields": {"name": "x"}}]
        campaign = job("emptied")
        await mail.submit(campaign, people)

        async def half_is_sent() -> bool:
            return bool((await mail.sink_counts())["slow"]["accepted"] >= 40)

        await until(half_is_sent, 60.0)
        await come_back(mail.policy, mail.folder / "nothing")
        told = await over(mail.policy, 1, "lost")
        assert told.counts["lost"] > 0
        assert told.terminal == told.rows_submitted == len(people)
        await mail.submit(campaign, people)
        told = await over(mail.policy, 1, "done")
        assert told.counts == {"delivered": 120, "refused": 4}
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 120
        await mail.policy.drain()
        assert await keys_of(mail.policy, 1) == []


async def test_a_campaign_submitted_after_the_copy_is_lost_and_comes_back() -> None:
    """Redis knows nothing of it at all, SQL and the journal do."""
    async with engine() as mail:
        copy = copied(mail.policy)
        campaign = job("younger")
        await mail.submit(campaign, rows(300, "a.slow.test"))

        async def some_are_sent() -> bool:
            return bool((await mail.sink_counts())["slow"]["accepted"] >= 20)

        await until(some_are_sent, 60.0)
        await come_back(mail.policy, copy)
        await over(mail.policy, 1, "lost")
        await mail.submit(campaign, rows(300, "a.slow.test"))
        told = await over(mail.policy, 1, "done")
        assert told.counts == {"delivered": 300}
        assert (await mail.sink_counts())["slow"]["accepted"] == 300
