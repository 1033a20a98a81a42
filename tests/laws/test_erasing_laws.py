"""Laws of erasing from slices: who is erased is gone to the last byte that could be opened, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from engine.queue import slices, states
from engine.queue.erasing import Erasing
from engine.queue.lanes import JobState, Lanes, PutRequest, SettleRequest
from engine.queue.slices import Contents, Header, Lost, Row
from engine.queue.sweeps import Sweeps
from policy import keyspace
from policy.address import mref_of, normalise
from policy.events import Batch, Event, Kind, Reason, decode_batch, encode_batch
from policy.keys import Keyring
from policy.personal import Erased
from policy.valkey import EmbeddedServer, connect
from tests.world.queue_census import FAR, SITE, census, lane_named, whole_census
from tests.world.valkey_server import running_valkey

OLD, NEW = 2966, 2967
KEYS = {OLD: os.urandom(32), NEW: os.urandom(32)}
RING = Keyring(
    b"p" * 32, {1: b"t" * 32}, 1, {1: b"r" * 32}, 1, KEYS, NEW, {NEW: b"k" * 32}, NEW, b"s" * 32, b"i" * 32, b"l" * 32
)
PART, LANE = 9, lane_named("A")
JOB_KEY = b"j" * 32
NOW = 1_790_000_000_000_000
DOMAIN = "example.test"

VALUES = st.one_of(st.text(max_size=20), st.integers(-(2**53), 2**53), st.booleans(), st.none())
SUBJECTS = st.integers(1, 12)  # few, so that people are met again in other slices
ROWS = st.builds(
    Row, local=st.text("abcdefgh", min_size=1, max_size=12), subject=SUBJECTS, pseudonym=st.integers(1, 2**63 - 1),
    mode_opens=st.integers(0, 3), mode_clicks=st.integers(0, 3), values=st.lists(VALUES, min_size=2, max_size=2),
)  # fmt: skip
PEOPLE = st.lists(ROWS, min_size=1, max_size=64)


def built(rows: list[Row], key_id: int = OLD, job: int = 5, **more: Any) -> bytes:
    return slices.build(
        KEYS[key_id], key_id, job, PART, LANE, Contents(DOMAIN, ["name", "town"], rows), expires_at=FAR, **more
    )


def opened(data: bytes) -> tuple[Header, Contents]:
    found = slices.open_slice(KEYS, PART, data)
    assert not isinstance(found, Lost), found
    return found


@given(PEOPLE, st.sets(SUBJECTS), st.sets(st.integers(0, 63)))
def test_all_others_of_a_rewritten_slice_are_what_they_were(rows: list[Row], gone: set[int], doubt: set[int]) -> None:
    """Rows, places, doubt, expiry and attempt; only done bits of those who left are added, and another key seals it."""
    doubt = {index for index in doubt if index < len(rows)}
    data = built(rows, doubt=doubt, attempt=3, date=7)
    header, contents = opened(data)
    theirs = [index for index, row in enumerate(rows) if row.subject in gone]
    left = [slices.blank() if index in theirs else row for index, row in enumerate(rows)]

    after = slices.rewritten(KEYS, NEW, PART, data, Contents(DOMAIN, contents.columns, left), theirs)

    new, found = opened(after)
    assert found.rows == left
    done = int.from_bytes(slices.mask_of(theirs), "big")
    assert new == replace(header, key_id=NEW, done=done)
    assert {new.in_doubt(index) for index in doubt} <= {True}
    assert after[slices.HEADER_BYTES :][:12] != data[slices.HEADER_BYTES :][:12]  # the nonce: a swap is seen by it


@given(PEOPLE, st.sets(st.integers(1, 15)))
def test_a_slice_is_met_exactly_when_it_names_one_of_them(rows: list[Row], wanted: set[int]) -> None:
    """The look into packed bytes may only ever spare work."""
    data = built(rows)
    header = slices.parse_header(data)
    assert isinstance(header, Header)
    met = slices.contents_with(KEYS, header, PART, data, wanted)
    assert (met is not None) == any(row.subject in wanted for row in rows)
    assert met is None or met == opened(data)[1]


def test_what_is_of_another_slice_is_refused() -> None:
    rows = [Row("a", 1, 1, 0, 0, [1, 2])]
    with pytest.raises(slices.SliceError):
        slices.rewritten(KEYS, NEW, PART, built(rows), Contents(DOMAIN, [], [*rows, *rows]))


# --- on a server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=pytest.mark.debian)])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    binary = None
    if request.param == "redis":
        found = shutil.which("redis-server")
        assert found is not None, "Debian's redis-server is not installed"
        binary = Path(found)
    with running_valkey(binary) as running:
        yield running


@dataclass
class Queue:
    """A lane with slices on a real server, and what is done to it. told: events so far."""

    redis: Redis
    killed_at: int = -1
    calls: int = 0
    told: list[tuple[int, Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lanes = Lanes(self.redis, "worker")

    def erasing(self, clock: Callable[[], int] = lambda: NOW) -> Erasing:
        async def job_key(number: int) -> bytes | None:
            return JOB_KEY

        return Erasing(self.redis, lambda: RING, job_key, clock)

    async def put(self, chunk: int, data: list[bytes], job: int = 5) -> None:
        state = JobState(3, 4, 0, priority=False, expires_at=FAR, resend_in_doubt=False, buckets=1)
        await self.lanes.put([PutRequest(PART, job, chunk, state, [(0, each) for each in data])])

    async def stored(self) -> dict[str, tuple[Header, Contents]]:
        seen, data = await whole_census(self.redis, PART)
        assert states.violations(seen) == []
        return {name: opened(each) for name, each in data.items()}

    async def events(self) -> list[Event]:
        told: Any = await self.redis.xrange(keyspace.events(PART))
        batches = [decode_batch(fields[b"b"]) for _, fields in told]
        assert all(batch.chunk == -1 for batch in batches)
        return [event for batch in batches for event in batch.events]


def named(stored: dict[str, tuple[Header, Contents]], subjects: set[int]) -> list[Row]:
    return [row for _, contents in stored.values() for row in contents.rows if row.subject in subjects]


def on(server: EmbeddedServer, work: Callable[[Queue], Awaitable[None]]) -> None:
    async def run() -> None:
        redis = connect(server.url)
        try:
            await redis.flushall()
            await work(Queue(redis))
        finally:
            await redis.aclose()

    asyncio.run(run())


def distinct(parts: list[list[Row]]) -> list[list[Row]]:
    """Local parts that name their subject and place: expansion lets nobody into a job twice."""
    return [
        [Row(f"r{number}x{place}", row.subject, row.pseudonym, 0, 0, row.values) for place, row in enumerate(rows)]
        for number, rows in enumerate(parts)
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(ROWS, min_size=1, max_size=9), min_size=1, max_size=6), st.sets(SUBJECTS), st.data())
def test_erasing_anybody_leaves_everybody_else(
    server: EmbeddedServer, parts: list[list[Row]], gone: set[int], data: st.DataObject
) -> None:
    """Some slices are leased, some people are done: in the end nobody who was erased is named, everybody else is where
    and what they were, each erased row has ended once, and asked again nothing happens."""
    parts = distinct(parts)
    leased = data.draw(st.integers(0, len(parts)))
    sited, finished = data.draw(st.booleans()), data.draw(st.booleans())

    async def work(queue: Queue) -> None:
        await queue.put(0, [built(rows) for rows in parts])
        before = await queue.stored()
        if sited:
            await queue.lanes.assign(PART, LANE, SITE)
        leases = (await queue.lanes.lease(PART, [(SITE, leased)] if sited else [], int(leased > 0))).slices
        settled: set[tuple[str, int]] = set()
        if finished and leases and len(before[leases[0].slice_id][1].rows) > 1:
            one = leases[0]
            row = before[one.slice_id][1].rows[0]
            ended = Event(int(Kind.DELIVERED), mref_of(JOB_KEY, normalise(row.local, DOMAIN)), 1, NOW)
            batch = encode_batch(Batch(5, DOMAIN, [ended]))
            await queue.lanes.settle(SettleRequest(PART, one.slice_id, one.token, [0], (), batch))
            settled.add((one.slice_id, 0))
        erasing = queue.erasing()

        first = await erasing.erase(PART, LANE, gone)
        assert first.left == sum(any(row.subject in gone for row in before[one.slice_id][1].rows) for one in leases)
        again = await erasing.erase(PART, LANE, gone)
        assert again == Erased(0, first.left)
        for one in leases:
            await queue.lanes.release(PART, one.slice_id, one.token)
        second = await erasing.erase(PART, LANE, gone)
        assert second.left == 0
        assert await erasing.erase(PART, LANE, gone) == Erased(0, 0)

        after = await queue.stored()
        if not after:  # the last of a site is gone: nobody looks there for nothing
            assert (await census(queue.redis, PART)).index == {}
        assert named(after, gone) == []
        fresh = set()
        for name, (header, contents) in before.items():
            theirs = {index for index, row in enumerate(contents.rows) if row.subject in gone}
            fresh |= {(name, index) for index in theirs if (name, index) not in settled}
            mine = {index for index in range(header.count) if (name, index) in settled}
            if theirs | mine == set(range(header.count)):
                assert name not in after
                continue
            new, found = after[name]
            assert found.columns == contents.columns
            for index, row in enumerate(contents.rows):
                assert found.rows[index] == (slices.blank() if index in theirs else row)
            assert set(new.pending()) == set(range(header.count)) - theirs - mine
            assert (new.job, new.count, new.attempt, new.flags, new.doubt, new.expires_at, new.lane) == (
                header.job, header.count, header.attempt, header.flags, header.doubt, header.expires_at, header.lane,
            )  # fmt: skip
        assert first.records + second.records == sum(
            row.subject in gone for _, contents in before.values() for row in contents.rows
        )
        told = [event for event in await queue.events() if event.kind == Kind.REFUSED]
        wanted = [
            mref_of(JOB_KEY, normalise(before[name][1].rows[index].local, DOMAIN)) for name, index in sorted(fresh)
        ]
        assert sorted(event.mref for event in told) == sorted(wanted)
        assert all(
            (event.reason, event.pseudonym, event.tag, event.note, event.attempt)
            == (int(Reason.ERASED), 0, b"", b"", 1)
            for event in told
        )

    on(server, work)


class Killed(BaseException):
    """The process is gone: not an error anybody may catch."""


class Dying:
    """A connection pool's client whose n-th call is the last: before it is sent, or after it was carried out."""

    def __init__(self, redis: Redis, last: int, *, after: bool) -> None:
        self.redis, self.left, self.after = redis, last, after

    def patch(self, erasing: Erasing) -> None:
        scripts: Any = erasing._scripts
        run, plain = scripts.run, scripts.plain

        def dying(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def called(*args: Any) -> Any:
                self.left -= 1
                if self.left < 0 or (self.left == 0 and not self.after):
                    raise Killed
                answer = await call(*args)
                if self.left == 0:
                    raise Killed
                return answer

            return called

        scripts.run, scripts.plain = dying(run), dying(plain)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_each_step_it_converges(server: EmbeddedServer, after: bool) -> None:
    """Before or after each command: the next call finishes it, and nobody has two ends."""
    parts = distinct(
        [[Row("", subject, 7, 0, 0, ["Ada", 1]) for subject in part] for part in ((1, 2), (1,), (2, 3, 1))]
    )

    async def work(queue: Queue) -> None:
        steps = 0
        while True:
            await queue.redis.flushall()
            await queue.put(0, [built(rows) for rows in parts])
            steps += 1
            dying = queue.erasing()
            Dying(queue.redis, steps, after=after).patch(dying)
            try:
                await dying.erase(PART, LANE, {1})
            except Killed:
                finished = False
            else:
                finished = True
            told = await queue.erasing().erase(PART, LANE, {1})
            assert told.left == 0
            stored = await queue.stored()
            assert named(stored, {1}) == []
            assert sorted(row.subject for row in named(stored, {2, 3})) == [2, 2, 3]
            events = await queue.events()
            assert len({event.mref for event in events}) == len(events) == 3
            if finished:
                return
            assert steps < 50

    on(server, work)


async def _lease(queue: Queue) -> None:
    assert len((await queue.lanes.lease(PART, [], 1)).slices) == 1


async def _lease_and_release(queue: Queue) -> None:
    [lease] = (await queue.lanes.lease(PART, [], 1)).slices
    await queue.lanes.release(PART, lease.slice_id, lease.token)


async def _settle(queue: Queue) -> None:
    """Another of the slice is delivered, and the slice handed back."""
    [lease] = (await queue.lanes.lease(PART, [], 1)).slices
    batch = encode_batch(Batch(5, DOMAIN, [Event(int(Kind.DELIVERED), 77, 1, NOW)]))
    await queue.lanes.settle(SettleRequest(PART, lease.slice_id, lease.token, [1], (), batch))
    await queue.lanes.release(PART, lease.slice_id, lease.token)


async def _reseal(queue: Queue) -> None:
    sweeps = Sweeps(queue.redis, "walker")
    _, [seen] = await sweeps.scan(0, 1000)
    [data] = await sweeps.read([seen])
    assert data is not None
    moved = slices.resealed(KEYS, NEW, PART, data)
    assert isinstance(moved, bytes)
    assert await sweeps.reseal([(seen, moved)]) == 1


async def _erase_another(queue: Queue) -> None:
    assert await queue.erasing().erase(PART, LANE, {3}) == Erased(1, 0)


@pytest.mark.parametrize("meanwhile", [_lease, _lease_and_release, _settle, _reseal, _erase_another])
def test_what_changed_between_reading_and_writing_is_left_and_done_later(
    server: EmbeddedServer, meanwhile: Callable[[Queue], Awaitable[None]]
) -> None:
    async def work(queue: Queue) -> None:
        [rows] = distinct([[Row("", subject, 7, 0, 0, ["Ada", 1]) for subject in (1, 2, 3)]])
        await queue.put(0, [built(rows)])
        erasing = queue.erasing()
        scripts: Any = erasing._scripts
        run = scripts.run

        async def later(*args: Any) -> Any:
            scripts.run = run
            await meanwhile(queue)
            [changed] = (await queue.stored()).values()
            answer = await run(*args)
            assert list((await queue.stored()).values()) == [changed]
            return answer

        scripts.run = later
        assert await erasing.erase(PART, LANE, {1}) == Erased(0, 1)
        for partition, name, token in await queue.lanes.our_leases():
            await queue.lanes.release(partition, name, token)
        assert await erasing.erase(PART, LANE, {1}) == Erased(1, 0)
        stored = await queue.stored()
        assert named(stored, {1}) == []
        [(_, contents)] = stored.values()
        assert contents.rows[1] == rows[1]
        assert [event.reason for event in await queue.events()].count(Reason.ERASED) >= 1

    on(server, work)


def test_at_the_cap_of_the_event_stream_nobody_leaves_without_an_end(server: EmbeddedServer) -> None:
    async def work(queue: Queue) -> None:
        [rows] = distinct([[Row("", subject, 7, 0, 0, ["Ada", 1]) for subject in (1, 2)]])
        await queue.put(0, [built(rows)])

        async def job_key(number: int) -> bytes | None:
            return None

        full = Erasing(queue.redis, lambda: RING, job_key, lambda: NOW, event_cap=0)
        assert await full.erase(PART, LANE, {1}) == Erased(0, 1)
        assert len(named(await queue.stored(), {1})) == 1
        room = Erasing(queue.redis, lambda: RING, job_key, lambda: NOW, event_cap=1)
        assert await room.erase(PART, LANE, {1}) == Erased(1, 0)
        assert (
            len(await queue.events()) == 1
        )  # the job's key is gone: an end all the same, under a reference of its own

    on(server, work)


def test_a_field_is_put_right_where_it_waits_and_nowhere_else(server: EmbeddedServer) -> None:
    async def work(queue: Queue) -> None:
        parts = distinct(
            [[Row("", subject, 7, 0, 0, ["Ada", subject]) for subject in part] for part in ((1, 2), (3, 1))]
        )
        await queue.put(0, [built(rows) for rows in parts])
        before = await queue.stored()

        async def value(job: int) -> str:
            return f"Ada of {job}"

        assert await queue.erasing().amend(PART, LANE, {1}, "name", value) == 2
        assert await queue.erasing().amend(PART, LANE, {1}, "name", value) == 0
        assert await queue.erasing().amend(PART, LANE, {1}, "street", value) == 0
        after = await queue.stored()
        for name, (header, contents) in before.items():
            new, found = after[name]
            assert replace(new, key_id=OLD) == header
            for row, corrected in zip(contents.rows, found.rows, strict=True):
                wanted = ["Ada of 5" if row.subject == 1 else "Ada", row.values[1]]
                assert (corrected.local, corrected.subject, corrected.values) == (row.local, row.subject, wanted)
        assert await queue.events() == []
        assert len((await queue.lanes.lease(PART, [], 1)).slices) == 1
        assert await queue.erasing().amend(PART, LANE, {1}, "town", value) == 1  # the other one is being sent

    on(server, work)


def test_what_cannot_be_read_here_is_left_where_others_may_read_it(server: EmbeddedServer) -> None:
    """A newer program's layout, or the key of a week this process has not read yet; not what nobody opens any more."""

    async def work(queue: Queue) -> None:
        for chunk, (key_id, left) in enumerate(((NEW + 1, 1), (OLD - 9, 0), (NEW, 0))):
            await queue.redis.flushall()
            rows = [Row("a", 1, 1, 0, 0, ["Ada", 1])]
            contents = Contents(DOMAIN, ["name", "town"], rows)
            data = slices.build(os.urandom(32), key_id, 5, PART, LANE, contents, expires_at=FAR)
            await queue.put(chunk, [data])
            assert await queue.erasing().erase(PART, LANE, {1}) == Erased(0, left)
            [name] = await queue.redis.keys(f"{keyspace.prefix(PART)}s:*")
            assert await queue.redis.get(name) == data
        await queue.redis.setrange(name, 0, b"\x02")
        assert await queue.erasing().erase(PART, LANE, {1}) == Erased(0, 1)
        assert await queue.erasing().find(PART, LANE, {1}) == []

    on(server, work)
