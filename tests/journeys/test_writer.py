"""The one SQL writer, on a real Valkey and a real SQLite, over its real socket (T1, T9 to T12)."""

from __future__ import annotations

import asyncio
import itertools
import stat
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from policy import audit, keyspace, suppression
from policy.address import mref_of, normalise, parse, tag_of
from policy.chores import IntakeClearing
from policy.events import Batch, Event, Hit, Kind, Reason, encode_batch, encode_hits
from policy.gate import Mode
from policy.instants import DAY_US, add_months, week_of
from policy.keys import seal, seal_note
from policy.keyspace import partition_of
from policy.ledger import Ambiguous
from policy.schema import open_store
from policy.statuses import KEPT_US, refuse
from policy.wire import (
    Accepted,
    ConsentRow,
    JobRecord,
    SuppressionRecord,
    WireError,
    WriterClient,
    WriterUnavailable,
    job_aad,
)
from policy.writer import Writer, WriterError
from tests.world.servers import PolicyWorld, policy_world, world

__all__ = ["world"]

AT = 1_800_000_000_000_000
JOB_KEY = b"k" * 32
ADA = "ada@one.example"


def record(world: PolicyWorld, job_id: str = "spring", **changes: object) -> JobRecord:
    service = world.keyring.service
    made = JobRecord(
        account="acme",
        job_id=job_id,
        hash=b"h" * 32,
        kind="campaign",
        created_at=AT,
        payload=seal(service, b"{}", job_aad("payload", "acme", job_id)),
        job_key=seal(service, JOB_KEY, job_aad("key", "acme", job_id)),
        legal_basis="consent",
        list="news",
        chunks_expected=1,
        links=("https://a.example/", "https://b.example/"),
        view="<p>web version</p>",
    )
    return msgspec.structs.replace(made, **changes)


async def accept(world: PolicyWorld, job_id: str = "spring", **changes: object) -> Accepted:
    if world.reader.account("acme") is None:
        await world.ask.account_add("acme", display_name="Acme")
    return await world.ask.accept_job(record(world, job_id, **changes))


def tag(world: PolicyWorld, address: str = ADA) -> tuple[bytes, int]:
    mailbox = parse(address)
    return tag_of(world.keyring.pepper, normalise(mailbox.local, mailbox.domain)), partition_of(mailbox.domain)


def mref(address: str) -> int:
    mailbox = parse(address)
    return mref_of(JOB_KEY, normalise(mailbox.local, mailbox.domain))


async def tell(world: PolicyWorld, *batches: Batch) -> None:
    for batch in batches:
        key = keyspace.events(partition_of(batch.domain or "invalid"))
        await world.redis.xadd(key, {"b": encode_batch(batch)})


def delivered(*mrefs: int, attempt: int = 1, kind: Kind = Kind.DELIVERED, reason: int = 0) -> list[Event]:
    return [Event(kind, m, attempt, AT, 7, b"t" * 12, reason, 250, "2.0.0", 3) for m in mrefs]


async def announced(world: PolicyWorld) -> list[tuple[int, str]]:
    """The negative list's stream: (subject, cause)."""
    entries: Any = await world.redis.xrange(keyspace.NEGATIVE)
    return [(int(fields[b"s"]), fields[b"r"].decode()) for _, fields in entries]


async def done(world: PolicyWorld, job: int | str) -> None:
    """Until the job is over: its last event drained, its keys freed."""
    async with asyncio.timeout(10):
        while True:
            status = world.reader.job_status(job, AT)
            assert status is not None
            if status.done_at is not None:
                break
            await asyncio.sleep(0.01)
        await world.drain()  # its keys are freed in the same turn, right after the commit


# --- acceptance -----------------------------------------------------------------------------------------------------


async def test_a_job_is_accepted_once(world: PolicyWorld) -> None:
    """T1: idempotent by job id and hash; another hash is a conflict; nobody else's account."""
    first = await accept(world, opens_mode=Mode.INDIVIDUAL)
    assert (first.status, first.state, first.account, first.list) == ("new", "accepted", 1, 1)
    same = await world.ask.accept_job(record(world, payload=b"another sealing", job_key=b"another"))
    assert (same.status, same.number) == ("same", first.number)
    kept = world.reader.job_payload(first.number)
    assert kept is not None
    assert (same.payload, same.job_key) == (kept.payload, kept.job_key)  # the first offer's
    assert len({same.payload, b"another sealing", b""}) == 3
    assert (first.payload, first.job_key) == (b"", b"")  # who offered them has them
    assert (await world.ask.accept_job(record(world, hash=b"x" * 32))).status == "conflict"
    assert (await world.ask.accept_job(record(world, account="nobody"))).status == "unknown-account"
    stored = world.reader.job_payload(first.number)
    assert stored is not None
    assert (stored.account, stored.list_name, stored.opens_mode) == ("acme", "news", Mode.INDIVIDUAL)
    assert world.reader.link_table(first.number) == ["https://a.example/", "https://b.example/"]
    assert world.reader.view(first.number) == "<p>web version</p>"


async def test_many_workers_offer_the_same_job_at_once(world: PolicyWorld) -> None:
    await world.ask.account_add("acme")
    clients = [WriterClient(world.settings.writer_socket) for _ in range(8)]
    try:
        told = await asyncio.gather(*[client.accept_job(record(world)) for client in clients])
    finally:
        await asyncio.gather(*[client.close() for client in clients])
    assert sorted(one.status for one in told) == ["new"] + ["same"] * 7
    assert len({one.number for one in told}) == 1


async def test_the_accounts_ceiling_holds(world: PolicyWorld) -> None:
    await world.ask.account_add("acme", opens_mode=Mode.AGGREGATE, clicks_mode=Mode.OFF)
    told = await accept(world, opens_mode=Mode.INDIVIDUAL, clicks_mode=Mode.INDIVIDUAL)
    stored = world.reader.job_payload(told.number)
    assert stored is not None
    assert (stored.opens_mode, stored.clicks_mode) == (Mode.AGGREGATE, Mode.OFF)


async def test_a_frozen_account_gets_nothing_in_and_everything_halted(world: PolicyWorld) -> None:
    await world.ask.account_add("acme")
    assert await world.ask.account_freeze("acme", True)
    assert (await accept(world)).status == "frozen"
    assert all([await world.redis.sismember(keyspace.halts(p), "a1") for p in (0, 31, 63)])
    assert await world.ask.account_freeze("acme", False)
    assert (await accept(world)).status == "new"
    assert not await world.redis.exists(keyspace.halts(0))
    assert not await world.ask.account_freeze("nobody", True)


async def test_chunks_once_and_a_conflict_stops_the_job(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    assert await world.ask.chunk(number, 0, b"a" * 32, 10) == "new"
    assert await world.ask.chunk(number, 0, b"a" * 32, 10) == "same"
    assert _state(world, number) == "expanding"
    assert await world.ask.chunk(number, 0, b"b" * 32, 10) == "conflict"
    assert _state(world, number) == "cancelled"
    with pytest.raises(WireError) as error:
        await world.ask.chunk(number, 1, b"a" * 32, 10)
    assert error.value.kind == "ended"


async def test_a_job_brings_its_only_entry(world: PolicyWorld) -> None:
    """In one transaction with the job; asked for again it is the same entry, with other bytes a conflict."""
    first = await accept(world, entry_hash=b"a" * 32, entry_rows=7)
    assert (first.status, first.state, first.has_entry) == ("new", "expanding", True)
    assert _state(world, first.number) == "expanding"
    again = await accept(world, entry_hash=b"a" * 32, entry_rows=7)
    assert (again.status, again.number, again.has_entry) == ("same", first.number, False)
    assert await world.ask.chunk(first.number, 0, b"a" * 32, 7) == "same"
    await world.ask.job_state(first.number, "cancelled")
    status = world.reader.job_status(first.number, AT)
    assert status is not None
    assert (status.rows_submitted, status.chunks) == (7, 1)  # what is known when it is cancelled
    other = await accept(world, "other", entry_hash=b"a" * 32, entry_rows=7)
    assert await world.ask.chunk(other.number, 0, b"b" * 32, 7) == "conflict"
    assert _state(world, other.number) == "cancelled"


async def test_sizes_told_together_are_taken_each_for_itself(world: PolicyWorld) -> None:
    one, two = (await accept(world, job_id="one")).number, (await accept(world, job_id="two")).number
    await world.ask.expanded(one, 3)
    told = await world.ask.expanded_all([(one, 4), (two, 2), (999, 1), (one, 3)])
    assert [refused.partition(":")[0] for refused in told] == ["conflict", "", "not-found", ""]
    assert (_state(world, one), _state(world, two)) == ("sending", "sending")
    with pytest.raises(WireError) as error:
        await world.ask.expanded(999, 1)
    assert error.value.kind == "not-found"
    await tell(world, Batch(two, "one.example", delivered(1, 2)))
    await done(world, two)


def _state(world: PolicyWorld, number: int) -> str:
    status = world.reader.job_status(number, AT)
    assert status is not None
    return status.state


# --- ledger ---------------------------------------------------------------------------------------------------------


async def test_every_row_ends_once_and_the_job_is_done(world: PolicyWorld) -> None:
    """I6: rows submitted = the sum of the terminal states; T9: done only with the last event; its keys go."""
    number = (await accept(world, chunks_expected=2)).number
    everywhere = number % keyspace.PARTITIONS, *map(partition_of, ("one.example", "two.example", "invalid"))
    for partition in everywhere:  # where its marks are, and where somebody was asked about or put
        await world.redis.hset(keyspace.job(partition, number), mapping={"nb": 2, "st": "sending"})
        await world.redis.setbit(keyspace.chunks_put(partition, number), 0, 1)
        await world.redis.hset(keyspace.duplicates(partition, number, 1), "fingerprint", "0")
    await world.ask.chunk(number, 0, b"a" * 32, 8)
    twice = Event(Kind.REFUSED, 1, 0, AT, 0, b"", Reason.DUPLICATE)
    await tell(
        world,
        # expansion: two rows that repeat mref 1, one suppressed, one invalid
        Batch(number, "one.example", [twice, twice, *delivered(3, attempt=0, kind=Kind.REFUSED, reason=1)], 0),
        Batch(number, "", [Event(Kind.REFUSED, 99, 0, AT, 0, b"", Reason.INVALID)], 0),
        Batch(number, "one.example", delivered(1, 2, attempt=1, kind=Kind.DEFERRED, reason=Reason.GREYLISTED)),
        Batch(number, "one.example", delivered(1, 2, attempt=2)),
        Batch(number, "two.example", delivered(4, kind=Kind.BOUNCED, reason=Reason.USER_UNKNOWN)),
    )
    await world.drain()
    assert _state(world, number) == "expanding"  # nobody has said yet how many there are
    await world.ask.expanded(number, 8)
    await world.ask.expanded(number, 8)
    await world.drain()
    assert _state(world, number) == "sending"
    await tell(world, Batch(number, "two.example", delivered(5, kind=Kind.UNKNOWN)))
    await done(world, number)
    status = world.reader.job_status("acme/spring", AT)
    assert status is not None
    assert status.state == "done"
    assert status.counts == {"refused": 4, "delivered": 2, "bounced": 1, "unknown": 1, "deferred": 2}
    assert status.reasons["refused"] == {"duplicate": 2, "suppressed": 1, "invalid": 1}
    assert (status.terminal, status.waiting, status.deferrals) == (8, 0, 2)
    report = world.reader.report(number, AT)
    assert report is not None
    assert ("two.example", "bounced", "user-unknown", 1) in report.domains
    left = [key async for key in world.redis.scan_iter(f"*:{number}*") if keyspace.entry_of(key.decode())]
    assert left == []
    for partition in range(keyspace.PARTITIONS):
        assert not await world.redis.xlen(keyspace.events(partition))  # what is committed left Redis
    with pytest.raises(WireError, match="another number"):
        await world.ask.expanded(number, 9)


async def test_events_read_twice_count_once(world: PolicyWorld) -> None:
    """T9: folded by (job, mref, attempt, kind), whether one transaction or another writer saw them first."""
    number = (await accept(world)).number
    batches = [
        Batch(number, "one.example", delivered(*range(100, 140))),
        Batch(number, "one.example", delivered(*range(100, 120), attempt=1, kind=Kind.DEFERRED, reason=Reason.NETWORK)),
        Batch(number, "two.example", delivered(*range(139, 150))),  # 139 again, elsewhere: the first word stands
    ]
    await tell(world, *batches, *batches)
    await world.drain()
    await tell(world, *batches)
    await world.restart_writer()
    await world.drain()
    status = world.reader.job_status(number, AT)
    assert status is not None
    assert status.counts == {"delivered": 50, "deferred": 20}
    await world.ask.expanded(number, 50)
    await done(world, number)


async def test_rows_of_one_address_all_count_and_told_again_count_once(world: PolicyWorld) -> None:
    """An address in four rows: one refused for its fields, one delivered, one cancelled, one duplicate; in any order,
    and after Redis came back older told once more (T12)."""
    for order, job_id in enumerate(("first", "second", "third")):
        number = (await accept(world, job_id)).number
        batches = [
            Batch(number, "one.example", delivered(1, attempt=0, kind=Kind.REFUSED, reason=Reason.INVALID), 0),
            Batch(number, "one.example", delivered(1, attempt=2)),
            Batch(number, "one.example", delivered(1, attempt=0, kind=Kind.CANCELLED), 1),
            Batch(number, "one.example", delivered(1, attempt=0, kind=Kind.REFUSED, reason=Reason.DUPLICATE), 2),
        ]
        batches = batches[order:] + batches[:order]
        await tell(world, *batches)
        await world.drain()
        for batch in batches:
            await tell(world, batch)
            await world.drain()
        status = world.reader.job_status(number, AT)
        assert status is not None
        assert status.counts == {"refused": 2, "delivered": 1, "cancelled": 1}
        await world.ask.expanded(number, 4)
        await done(world, number)


async def test_the_cursor_and_the_rows_are_one(world: PolicyWorld) -> None:
    """A writer that dies after the commit and before the trim: the next one passes what is committed."""
    number = (await accept(world)).number
    key = keyspace.events(partition_of("one.example"))
    await tell(world, Batch(number, "one.example", delivered(1, 2)))
    await world.drain()
    entry: Any = await world.redis.xadd(key, {"b": encode_batch(Batch(number, "one.example", delivered(3)))})
    await world.drain()
    with open_store(world.settings.sql_address(), writer=False).connect() as conn:
        stored = conn.exec_driver_sql("select last_id from cursor where stream = ?", (key,)).scalar()
        engine = conn.engine
    engine.dispose()
    assert stored == entry.decode()
    assert world.writer.statistics()["events"] == 3


async def test_poison_is_passed_and_counted(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    key = keyspace.events(partition_of("one.example"))
    await world.redis.xadd(key, {"b": b"\xc1 not msgpack"})
    await tell(world, Batch(number, "one.example", delivered(1)))
    await world.redis.xadd(key, {"b": b""})
    await world.redis.xadd(keyspace.HITS, {"h": b"?"})
    await world.drain()
    status = world.reader.job_status(number, AT)
    assert status is not None
    assert status.counts == {"delivered": 1}
    assert await world.redis.xlen(key) == 0
    assert await world.redis.xlen(keyspace.HITS) == 0
    assert world.writer.statistics()["poison"] == 3


async def test_a_hit_keeps_what_its_mode_allows(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    day = AT // DAY_US
    hits = [
        Hit(Kind.OPENED, number, 0, AT, Mode.AGGREGATE, 1),
        Hit(Kind.CLICKED, number, 5, AT + DAY_US, Mode.DELIVERABILITY, 1, 0),
        Hit(Kind.OPENED, number, 5, AT, Mode.DELIVERABILITY, 1),
        Hit(Kind.CLICKED, number, 6, AT, Mode.INDIVIDUAL, 1, 1),
        Hit(Kind.OPENED, number, 7, AT, Mode.OFF, 1),
    ]
    await world.redis.xadd(keyspace.HITS, {"h": encode_hits(hits)})
    await world.drain()
    engine = open_store(world.settings.sql_address(), writer=False)
    with engine.connect() as conn:
        rows = conn.exec_driver_sql("select mref, kind, link, hour, day from hit").all()
        assert [tuple(row) for row in rows] == [(6, Kind.CLICKED, 1, AT // 3_600_000_000, day)]
        assert [tuple(row) for row in conn.exec_driver_sql("select mref, day from last_open").all()] == [(5, day + 1)]
    engine.dispose()
    status = world.reader.job_status(number, AT)
    assert status is not None
    assert (status.opens, status.clicks) == (1, 1)  # of the deliverability mode only the day is kept


async def test_why_tells_the_story_of_a_person(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    await accept(world, "winter")
    note = seal_note(world.keyring, "550 no such user ada@one.example")
    await tell(
        world,
        Batch(number, "one.example", delivered(mref(ADA), attempt=1, kind=Kind.DEFERRED, reason=Reason.GREYLISTED)),
        Batch(number, "one.example", [Event(Kind.BOUNCED, mref(ADA), 2, AT, 7, b"", 32, 550, "5.1.1", 3, note)]),
    )
    await world.drain()
    where = tag(world)
    await world.ask.suppress([SuppressionRecord(*where, suppression.Scope.ACCOUNT, 1, "bounce", "test")])
    told = world.reader.why("Ada@ONE.example", world.keyring)
    assert [(story.job_id, story.kind, story.reason, story.attempts) for story in told.stories] == [
        ("spring", "bounced", "user-unknown", 2)
    ]
    assert told.stories[0].reply == "550 no such user ada@one.example"
    assert [(step.kind, step.reason) for step in told.stories[0].history] == [("deferred", "greylisted")]
    assert [(entry.scope, entry.scope_name, entry.reason) for entry in told.standing] == [("account", "acme", "bounce")]
    assert not world.reader.why("nobody@one.example", world.keyring).is_known


# --- job states -----------------------------------------------------------------------------------------------------


async def test_pause_resume_cancel_reach_every_partition(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    key = keyspace.job(3, number)
    await world.redis.hset(key, mapping={"st": "sending", "nb": 1})
    assert await world.ask.job_state("spring", "paused", "asked") == "paused"
    assert await world.redis.hget(key, "st") == b"paused"
    assert await world.redis.sismember(keyspace.halts(9), f"j{number}")
    assert not await world.redis.exists(keyspace.job(4, number))  # a partition without the job learns nothing
    assert await world.ask.job_state(str(number), "sending") == "expanding"
    assert await world.redis.hget(key, "st") == b"sending"
    assert not await world.redis.exists(keyspace.halts(9))
    await world.ask.chunk(number, 0, b"a" * 32, 1)
    assert await world.ask.job_state("acme/spring", "cancelled") == "cancelled"
    assert await world.redis.hget(key, "st") == b"cancelled"
    assert await world.redis.sismember(keyspace.halts(9), f"x{number}")  # for shares that are put from now on
    with pytest.raises(WireError, match="is cancelled"):
        await world.ask.job_state(number, "sending")
    with pytest.raises(WireError) as error:
        await world.ask.job_state("nobody", "paused")
    assert error.value.kind == "not-found"


async def test_resuming_does_not_start_a_job_that_waits_for_its_audience(world: PolicyWorld) -> None:
    number = (await accept(world, wait=True)).number
    await world.ask.job_state(number, "paused")
    await world.ask.job_state(number, "sending")
    assert await world.redis.sismember(keyspace.halts(9), f"j{number}")
    await world.ask.job_state(number, "cancelled")
    assert not await world.redis.sismember(keyspace.halts(9), f"j{number}")


async def test_a_cancelled_job_ends_cancelled_when_its_last_row_has(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    await world.ask.chunk(number, 0, b"a" * 32, 2)
    await world.ask.expanded(number, 2)
    await world.ask.job_state(number, "cancelled")
    await tell(world, Batch(number, "one.example", delivered(1) + delivered(2, kind=Kind.CANCELLED)))
    await done(world, number)
    assert _state(world, number) == "cancelled"


async def test_a_job_without_all_its_chunks_expires() -> None:
    now = itertools.count(AT, 1)
    late = [0]
    async with policy_world(clock=lambda: next(now) + late[0]) as world:
        number = (await accept(world, chunks_expected=2, expires_at=AT + DAY_US)).number
        await world.ask.chunk(number, 0, b"a" * 32, 1)
        late[0] = 2 * DAY_US
        await tell(world, Batch(number, "one.example", delivered(1, kind=Kind.EXPIRED)))
        await done(world, number)
        status = world.reader.job_status(number, AT)
        assert status is not None
        assert (status.state, status.rows_submitted, status.reason) == ("expired", 1, "not all chunks came in time")


async def test_an_id_of_two_accounts_is_ambiguous(world: PolicyWorld) -> None:
    await accept(world)
    await world.ask.account_add("other")
    await world.ask.accept_job(record(world, account="other"))
    with pytest.raises(Ambiguous):
        world.reader.job_status("spring", AT)
    with pytest.raises(WireError) as error:
        await world.ask.job_state("spring", "paused")
    assert error.value.kind == "ambiguous"
    assert world.reader.number("other/spring") == 2


# --- the status that producers read -----------------------------------------------------------------------------------


async def told(world: PolicyWorld, state: str, job_id: str = "spring") -> dict[str, str]:
    """The fields of a job's status once it says that state; problems only as how many bytes there are."""
    async with asyncio.timeout(10):
        while True:
            found: Any = await world.redis.hgetall(keyspace.job_status("acme", job_id))
            if found.get(b"state", b"").decode() == state:
                found[b"problems"] = str(len(found.get(b"problems", b""))).encode()
                return {name.decode(): value.decode() for name, value in found.items()}
            await asyncio.sleep(0.01)


async def test_a_producer_reads_every_step_of_its_job(world: PolicyWorld) -> None:
    """T0: a status a job in Redis, from acceptance to the sum of its rows; SQL is the truth it follows."""
    number = (await accept(world)).number
    first = await told(world, "accepted")
    assert (first["reason"], first["rows"], first["problems"]) == ("", "", "0")
    key = keyspace.job_status("acme", "spring")
    assert 0 < await world.redis.pttl(key) <= KEPT_US // 1000
    await world.ask.chunk(number, 0, b"a" * 32, 3)
    await told(world, "expanding")
    await world.ask.expanded(number, 3)
    assert (await told(world, "sending"))["rows"] == "3"
    await world.ask.job_state(number, "paused", "too many, ask ada@one.example")
    assert (await told(world, "paused"))["reason"] == ""  # a text in which somebody's address stands is left out
    await world.ask.job_state(number, "sending", "go on")
    sending = await told(world, "sending")
    assert sending["reason"] == "go on"
    assert not [name for name in sending if name.startswith("count:")]
    await tell(world, Batch(number, "one.example", delivered(1, 2)))
    await tell(world, Batch(number, "one.example", delivered(3, kind=Kind.BOUNCED, reason=Reason.USER_UNKNOWN)))
    await done(world, number)
    last = await told(world, "done")
    assert {name: n for name, n in last.items() if name.startswith("count:")} == {
        "count:delivered": "2", "count:bounced": "1"
    }  # fmt: skip
    assert int(last["updated_at"]) >= int(first["updated_at"])
    await world.restart_writer()
    await world.writer.statuses.close()
    assert await told(world, "done") == last  # nothing changed: nothing is newer


async def test_other_ends_are_told_too(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    await world.ask.chunk(number, 0, b"a" * 32, 1)
    await world.ask.expanded(number, 1)
    await world.ask.job_state(number, "cancelled", "wrong list")
    assert (await told(world, "cancelled"))["reason"] == "wrong list"
    await tell(world, Batch(number, "one.example", delivered(1, kind=Kind.CANCELLED)))
    await done(world, number)
    async with asyncio.timeout(10):
        while (await told(world, "cancelled")).get("count:cancelled") != "1":
            await asyncio.sleep(0.01)


async def test_a_status_follows_when_redis_is_back(world: PolicyWorld) -> None:
    """A mirror: while Redis is away no operation fails by it, and afterwards it says the truth."""
    number = (await accept(world)).number
    await told(world, "accepted")
    await world.server.stop()
    assert (await accept(world, "second")).status == "new"
    assert await world.ask.chunk(number, 0, b"a" * 32, 1) == "new"
    async with asyncio.timeout(10):
        while not world.writer.statuses.failures:
            await asyncio.sleep(0.01)
    assert len(world.writer.statuses.waiting) == 2
    await world.server.start()
    await told(world, "expanding")
    await told(world, "accepted", "second")
    assert not world.writer.statuses.waiting


async def test_a_redis_that_lost_everything_gets_the_statuses_back(world: PolicyWorld) -> None:
    number = (await accept(world)).number
    where, partition = tag(world)
    await world.ask.opt_out(1, partition, where, "page")  # a commit by which the loss is noticed
    await world.ask.chunk(number, 0, b"a" * 32, 1)
    await world.ask.expanded(number, 1)
    await tell(world, Batch(number, "one.example", delivered(1)))
    await done(world, number)
    await told(world, "done")
    await world.redis.flushall()
    await world.restart_writer()
    assert (await told(world, "done"))["count:delivered"] == "1"


async def test_a_refusal_never_overwrites_an_accepted_job(world: PolicyWorld) -> None:
    """Its problems are added; and what was wrong with a submission before the acceptance goes with it."""

    async def refusal(problems: list[tuple[str, str, str]], at: int) -> None:
        async with world.redis.pipeline(transaction=True) as pipe:
            refuse(pipe, "acme", "spring", problems, at)
            await pipe.execute()

    many = [(f"$.recipients[{n}].fields", "x" * 400, "y" * 5000) for n in range(500)]
    await refusal([("$.headers.ada@one.example", "`=?ada@one.example` is wrong", "ask ada@one.example"), *many], AT)
    before = await told(world, "rejected")
    assert before["problems_total"] == "501"
    assert "one.example" not in repr(await world.redis.hgetall(keyspace.job_status("acme", "spring")))
    assert 0 < int(before["problems"]) <= 32 * 1024
    accepted_at = AT + 10
    await accept(world, accepted_at=accepted_at)
    assert (await told(world, "accepted"))["problems"] == "0"
    await refusal([("$.job_id", "is taken by a job with other contents", "choose a new one")], accepted_at + 5)
    after = await told(world, "accepted")
    assert (after["reason"], after["problems_total"]) == ("", "1")
    await world.ask.job_state("spring", "cancelled")
    assert (await told(world, "cancelled"))["problems_total"] == "1"


# --- people ---------------------------------------------------------------------------------------------------------


async def test_an_opt_out_is_in_both_stores_when_it_returns(world: PolicyWorld) -> None:
    """T11."""
    told = await accept(world)
    where, partition = tag(world)
    await world.ask.opt_out(told.list, partition, where, "oneclick")
    cell = await world.redis.hget(keyspace.suppression(partition, where), where)
    assert cell == bytes([suppression.Scope.LIST, 0, 0, 0, told.list, Reason.SUPPRESSED])
    engine = open_store(world.settings.sql_address(), writer=False)
    with engine.connect() as conn:
        assert [entry.reason for entry in suppression.check(conn, where)] == ["opt-out"]
    engine.dispose()
    await world.ask.opt_out(told.list, partition, where, "oneclick")  # again: no harm


async def test_without_redis_an_opt_out_is_refused_kept_and_brought_later(world: PolicyWorld) -> None:
    """T11: else 503; SQL is the truth, Redis is rebuilt from it (T12)."""
    told = await accept(world)
    where, partition = tag(world)
    await world.server.stop()
    with pytest.raises(WireError) as error:
        await world.ask.opt_out(told.list, partition, where, "oneclick")
    assert error.value.kind == "redis"
    await world.ask.list_add(1, "other")  # what needs only SQL goes on
    await world.server.start()
    async with asyncio.timeout(10):
        while not await world.redis.hexists(keyspace.suppression(partition, where), where):
            await world.ask.ping()
    await world.ask.opt_out(told.list, partition, where, "oneclick")


async def test_redis_that_lost_everything_is_rebuilt(world: PolicyWorld) -> None:
    """T12, the part of the policy floor: suppressions, negative list and frozen accounts come back from SQL."""
    told = await accept(world)
    where, partition = tag(world)
    await world.ask.opt_out(told.list, partition, where, "page")
    [person] = await world.ask.resolve(1, week_of(AT), [(where, partition, ADA)])
    assert await world.ask.withdraw(1, where, "open_tracking")
    await world.ask.account_freeze("acme", True)
    await world.redis.flushall()
    await world.redis.hset(keyspace.suppression(1, b"z" * 12), b"z" * 12, b"stale!")
    await world.restart_writer()
    assert await world.redis.hget(keyspace.suppression(partition, where), where)
    assert not await world.redis.exists(keyspace.suppression(1, b"z" * 12))  # SQL is the truth in both directions
    assert await announced(world) == [(person.subject, "withdrawn")]
    assert await world.redis.sismember(keyspace.halts(17), "a1")


async def test_sql_that_came_back_older_takes_nothing_out_of_redis(world: PolicyWorld) -> None:
    where, partition = tag(world)
    await accept(world)
    await world.ask.opt_out(1, partition, where, "page")
    await world.redis.hset(keyspace.suppression(1, b"z" * 12), b"z" * 12, b"kept!!")
    await world.writer.stop()  # a running writer notes its own commit number, right behind the answer
    await world.redis.hset(keyspace.META, "commit", "1000")  # Redis has seen commits SQL does not know
    world.writer = Writer(world.settings, world.keyring, clock=world.clock)
    await world.writer.start()
    assert await world.redis.exists(keyspace.suppression(1, b"z" * 12))
    assert (await world.ask.ping())["commit"] == 1001


async def test_many_opt_outs_at_once_are_all_in_force(world: PolicyWorld) -> None:
    await accept(world)
    people = [tag(world, f"person{n}@one.example") for n in range(200)]
    await asyncio.gather(*[world.ask.opt_out(1, partition, where, "page") for where, partition in people])
    for where, partition in people:
        assert await world.redis.hexists(keyspace.suppression(partition, where), where)
    assert world.writer.store.transactions < 200  # group commit: not one fsync each


async def test_suppressing_and_taking_back(world: PolicyWorld) -> None:
    where, partition = tag(world)
    entry = SuppressionRecord(where, partition, suppression.Scope.PLATFORM, 0, "manual", "desk")
    assert await world.ask.suppress([entry, entry]) == 1
    assert await world.ask.suppress([entry]) == 0
    assert await world.ask.unsuppress(where, partition, suppression.Scope.PLATFORM, 0) == 1
    assert await world.ask.unsuppress(where, partition, suppression.Scope.PLATFORM, 0) == 0
    assert not await world.redis.exists(keyspace.suppression(partition, where))
    for bad in (
        SuppressionRecord(b"short", partition, 1, 0, "manual"),
        SuppressionRecord(where, 64, 1, 0, "manual"),
        SuppressionRecord(where, partition, 9, 0, "manual"),
        SuppressionRecord(where, partition, 1, 0, "no such reason"),
    ):
        with pytest.raises(WireError) as error:
            await world.ask.suppress([bad])
        assert error.value.kind == "refused"


async def test_withdrawing_is_announced_and_agreeing_anew_lifts_it(world: PolicyWorld) -> None:
    """Decision 12 and 19: the negative list follows; evidence never outranks a later withdrawal."""
    await accept(world)
    where, partition = tag(world)
    assert not await world.ask.withdraw(1, where, "open_tracking")  # nobody known by that tag
    [person] = await world.ask.resolve(1, week_of(AT), [(where, partition, ADA)])
    early = ConsentRow(person.subject, "open_tracking", "express", "yes", "form", 1000)
    assert await world.ask.consents(1, [early]) == 1
    assert await world.ask.withdraw(1, where, "open_tracking")
    await world.ask.consents(1, [early])
    assert await announced(world) == [(person.subject, "withdrawn")]
    later = msgspec.structs.replace(early, given_at=world.clock() + 1_000_000)
    await world.ask.consents(1, [later])
    assert await announced(world) == [(person.subject, "withdrawn"), (person.subject, "lifted")]
    with pytest.raises(WireError):
        await world.ask.withdraw(1, where, "no such purpose")


async def test_withdrawing_from_mail_stops_mail(world: PolicyWorld) -> None:
    await accept(world)
    where, partition = tag(world)
    await world.ask.resolve(1, week_of(AT), [(where, partition, ADA)])
    assert await world.ask.withdraw(1, where, "mail_marketing")
    cell = await world.redis.hget(keyspace.suppression(partition, where), where)
    assert cell == bytes([suppression.Scope.ACCOUNT, 0, 0, 0, 1, Reason.SUPPRESSED])


async def test_restricting_holds_mail_and_hits(world: PolicyWorld) -> None:
    await accept(world)
    where, partition = tag(world)
    await world.ask.resolve(1, week_of(AT), [(where, partition, ADA)])
    await world.ask.restrict(1, partition, where, "request")
    cell = await world.redis.hget(keyspace.suppression(partition, where), where)
    assert cell is not None
    assert cell[-1] == Reason.RESTRICTED
    assert await world.redis.xlen(keyspace.NEGATIVE) == 1


async def test_resolving_is_stable_and_audit_holds(world: PolicyWorld) -> None:
    await accept(world)
    rows = [(*tag(world, f"p{n}@one.example"), f"p{n}@one.example") for n in range(50)]
    first = await world.ask.resolve(1, 2900, rows)
    assert await world.ask.resolve(1, 2900, rows) == first
    assert [one.subject for one in await world.ask.resolve(1, 2901, rows)] == [one.subject for one in first]
    await world.ask.reject_note("acme", "bad", "30 problems")
    engine = open_store(world.settings.sql_address(), writer=False)
    with engine.connect() as conn:
        assert audit.verify(conn) is None
        assert conn.exec_driver_sql("select count(*) from audit").scalar() == 2
    engine.dispose()


# --- the socket -----------------------------------------------------------------------------------------------------


async def test_the_socket_is_ours_alone(world: PolicyWorld) -> None:
    assert stat.S_IMODE(world.settings.writer_socket.stat().st_mode) == 0o600
    with pytest.raises(WriterError, match="another policy writer"):
        await Writer(world.settings, world.keyring).start()
    assert (await world.ask.ping())["pid"]


@pytest.mark.parametrize(
    ("op", "kwargs"),
    [("no_such", {}), ("chunk", {"job": 1}), ("chunk", {"job": "x", "number": 0, "hash": b"", "rows": 1}),
     ("ping", {"extra": 1}), ("resolve", {"account": 1, "week": 1, "rows": [["x"]]})],
)  # fmt: skip
async def test_wrong_questions_get_an_answer(world: PolicyWorld, op: str, kwargs: dict[str, object]) -> None:
    with pytest.raises(WireError) as error:
        await world.ask.call(op, **kwargs)
    assert error.value.kind in ("unknown", "refused")
    assert await world.ask.ping()  # the connection is still good


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x10half", b"\x00\x00"])
async def test_garbage_ends_only_its_connection(world: PolicyWorld, garbage: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(world.settings.writer_socket))
    writer.write(garbage)
    writer.write_eof()
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()
    await writer.wait_closed()
    assert await world.ask.ping()


async def test_one_connection_carries_many_calls_in_order(world: PolicyWorld) -> None:
    await world.ask.account_add("acme")
    numbers = await asyncio.gather(*[world.ask.list_add(1, f"list{n % 40}") for n in range(400)])
    assert len(set(numbers)) == 40
    assert numbers[:40] == numbers[40:80] == numbers[360:]
    assert world.writer.statistics()["connections"] == 1


async def test_the_client_survives_a_new_writer_and_says_when_there_is_none(world: PolicyWorld) -> None:
    assert await world.ask.ping()
    await world.writer.stop()
    with pytest.raises(WriterUnavailable):
        await world.ask.ping()
    world.writer = Writer(world.settings, world.keyring)
    await world.writer.start()
    assert await world.ask.ping()


async def test_a_late_answer_is_nobody_elses(world: PolicyWorld) -> None:
    """A call that timed out keeps its place in the queue of answers."""
    hold = asyncio.Event()

    async def slow(_: object) -> str:
        await hold.wait()
        return "slow"

    world.writer.operations["ping"] = slow
    client = WriterClient(world.settings.writer_socket, timeout=0.2)
    with pytest.raises(WriterUnavailable):
        await client.ping()
    hold.set()
    assert "calls" in await client.statistics()
    await client.close()


# --- chores ---------------------------------------------------------------------------------------------------------


async def test_addresses_leave_the_append_only_file(world: PolicyWorld) -> None:
    """Decision 18: deleted from the stream is not enough; after the burst the file is rewritten without them."""
    clearing = IntakeClearing(world.redis, 600.0)
    entry = await world.redis.xadd(keyspace.INTAKE, {"job": '{"to": "grace.hopper@navy.example"}'})
    await clearing.look(0.0)
    assert clearing.age(2.0) == 2.0
    await clearing.look(2.0)
    await world.redis.xdel(keyspace.INTAKE, entry)
    folder = world.settings.redis_socket.parent / "appendonlydir"
    assert any(b"grace.hopper" in file.read_bytes() for file in folder.iterdir())
    now = 10.0
    async with asyncio.timeout(20):
        while clearing.rewrites == 0:
            await clearing.look(now)
            now += 1.0
            await asyncio.sleep(0.02)
    assert not any(b"grace.hopper" in file.read_bytes() for file in folder.iterdir())
    assert clearing.age(now) == 0.0
    again = IntakeClearing(world.redis, 600.0)  # another writer knows from META that all is clear
    await again.look(0.0)
    assert again.age(5.0) == 0.0


async def test_a_long_burst_does_not_put_clearing_off(world: PolicyWorld) -> None:
    clearing = IntakeClearing(world.redis, 600.0)
    async with asyncio.timeout(20):
        for now in itertools.count(0, 2):  # an entry every two seconds: never quiet
            await world.redis.xadd(keyspace.INTAKE, {"job": str(now)})
            await clearing.look(float(now))
            if clearing.rewrites:
                break
            if now > 480:
                await asyncio.sleep(0.02)
    assert now >= 480
    assert clearing.age(float(now)) < 600  # entries still waiting are in the new file too: the clock goes on
    assert clearing.age(float(now) + 5) > 0


async def test_statistics_are_fit_for_the_metrics_room(world: PolicyWorld) -> None:
    from policy.vitals import plain

    await accept(world)
    told = plain(world.writer.statistics())
    assert told["transactions"]
    assert (await world.ask.statistics())["calls"]["accept_job"] == 1


# --- the yearly review (P-39) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("months", "told"),
    [
        (None, []),  # for `config --check` to say
        (-2, []),
        (-12, [("warning", "the configuration wants its review soon")]),
        (-13, [("error", "the configuration wants its review")]),
    ],
)
async def test_a_start_tells_of_a_review_that_is_over(
    world: PolicyWorld, months: int | None, told: list[tuple[str, str]]
) -> None:
    today = datetime.fromtimestamp(world.clock() / 1e6, UTC).date()
    world.settings.reviewed = add_months(today, months) if months is not None else None
    with capture_logs() as logs:
        await world.restart_writer()
    assert [(line["log_level"], line["event"]) for line in logs if "review" in line["event"]] == told
