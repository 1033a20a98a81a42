"""Suppression: reasons side by side in SQL, cells in Redis that always say what SQL says, 32 bytes an entry."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import Connection, Engine, delete

from policy import keyspace, schema, suppression
from policy.events import Reason
from policy.suppression import CELL_BYTES, Entry, Scope
from policy.valkey import connect

NOW = 1_795_376_640_000_000
TAG = bytes(range(12))
OPT_OUT = Entry(TAG, 3, Scope.LIST, 9, "opt-out", NOW, "page")


def cells(value: bytes) -> set[tuple[int, int, int]]:
    """(scope, scope id, reason) of each cell, read as the Lua scripts read it."""
    assert len(value) % CELL_BYTES == 0
    return {
        (value[at], int.from_bytes(value[at + 1 : at + 5], "big"), value[at + 5])
        for at in range(0, len(value), CELL_BYTES)
    }


def value_of(conn: Connection, tag: bytes = TAG, now: int = NOW) -> set[tuple[int, int, int]]:
    [field] = suppression.fields(conn, [(tag, 3)], now)
    return cells(field.value)


async def everything(redis: Redis) -> dict[bytes, dict[bytes, bytes]]:
    keys = [key async for key in redis.scan_iter(match="sp:{p*}:x:*", count=1000)]
    answers: Any = [await redis.hgetall(key) for key in sorted(keys)]  # redis-py's types say less than its answers
    return dict(zip(sorted(keys), answers, strict=True))


def test_an_entry_is_added_once_and_checked(conn: Connection) -> None:
    assert suppression.add(conn, [OPT_OUT, OPT_OUT]) == 1
    assert suppression.add(conn, [OPT_OUT]) == 0
    assert suppression.check(conn, TAG) == [OPT_OUT]
    assert suppression.check(conn, bytes(12)) == []
    assert value_of(conn) == {(3, 9, Reason.SUPPRESSED)}


def test_reasons_stand_beside_each_other(conn: Connection) -> None:
    """Law: lifting a restriction leaves the opt-out that was there before it."""
    restriction = Entry(TAG, 3, Scope.ACCOUNT, 2, "restriction", NOW)
    opt_out = Entry(TAG, 3, Scope.ACCOUNT, 2, "opt-out", NOW)
    erasure = Entry(TAG, 3, Scope.PLATFORM, 0, "erasure", NOW)
    assert suppression.add(conn, [opt_out, restriction, erasure]) == 3
    assert value_of(conn) == {(1, 0, Reason.ERASED), (2, 2, Reason.RESTRICTED)}
    assert suppression.remove(conn, TAG, Scope.ACCOUNT, 2, "restriction") == 1
    assert value_of(conn) == {(1, 0, Reason.ERASED), (2, 2, Reason.SUPPRESSED)}
    assert suppression.remove(conn, TAG, Scope.ACCOUNT, 2) == 1
    assert suppression.remove(conn, TAG, Scope.ACCOUNT, 2) == 0
    assert value_of(conn) == {(1, 0, Reason.ERASED)}


def test_the_same_reason_again_never_shortens_it(conn: Connection) -> None:
    bounce = Entry(TAG, 3, Scope.PLATFORM, 0, "bounce", NOW, expires=NOW + 10)
    assert suppression.add(conn, [bounce]) == 1
    later = Entry(TAG, 3, Scope.PLATFORM, 0, "bounce", NOW + 5, expires=NOW + 20)
    assert suppression.add(conn, [later]) == 1
    assert suppression.add(conn, [bounce]) == 0
    [kept] = suppression.check(conn, TAG)
    assert (kept.created, kept.expires) == (NOW, NOW + 20)
    assert suppression.add(conn, [Entry(TAG, 3, Scope.PLATFORM, 0, "bounce", NOW)]) == 1
    assert suppression.add(conn, [later]) == 0
    [kept] = suppression.check(conn, TAG)
    assert kept.expires is None


def test_an_end_is_exclusive_and_expired_entries_go(conn: Connection) -> None:
    other = bytes(reversed(TAG))
    suppression.add(conn, [Entry(TAG, 3, Scope.PLATFORM, 0, "bounce", NOW, expires=NOW + 10), OPT_OUT])
    suppression.add(conn, [Entry(other, 4, Scope.PLATFORM, 0, "bounce", NOW, expires=NOW + 11)])
    assert value_of(conn, now=NOW + 9) == {(1, 0, Reason.SUPPRESSED), (3, 9, Reason.SUPPRESSED)}
    assert value_of(conn, now=NOW + 10) == {(3, 9, Reason.SUPPRESSED)}
    assert suppression.expire(conn, NOW + 9) == []
    assert suppression.expire(conn, NOW + 10) == [(TAG, 3)]
    assert suppression.check(conn, TAG) == [OPT_OUT]
    assert len(suppression.check(conn, other)) == 1


@pytest.mark.parametrize(
    ("scope", "scope_id", "reason", "tag", "partition"),
    [
        (Scope.PLATFORM, 1, "opt-out", TAG, 3),
        (Scope.LIST, 0, "opt-out", TAG, 3),
        (Scope.LIST, 1 << 32, "opt-out", TAG, 3),
        (Scope.LIST, 1, "whim", TAG, 3),
        (Scope.LIST, 1, "opt-out", TAG[:8], 3),
        (Scope.LIST, 1, "opt-out", TAG, keyspace.PARTITIONS),
    ],
)
def test_an_entry_that_could_not_work_is_not_made(
    scope: Scope, scope_id: int, reason: str, tag: bytes, partition: int
) -> None:
    with pytest.raises(ValueError):
        Entry(tag, partition, scope, scope_id, reason, NOW)


def test_export_goes_by_partition_and_tag(conn: Connection) -> None:
    entries = [Entry(bytes([n % 7, n % 256]) + bytes(10), n % 5, Scope.LIST, n + 1, "import", NOW) for n in range(2500)]
    suppression.add(conn, entries)
    exported = list(suppression.every(conn))
    assert len(exported) == 2500
    assert [(entry.partition, entry.tag) for entry in exported] == sorted((e.partition, e.tag) for e in entries)


async def test_redis_holds_the_cells_where_the_scripts_look(conn: Connection, redis: Redis) -> None:
    suppression.add(conn, [OPT_OUT, Entry(TAG, 3, Scope.PLATFORM, 0, "erasure", NOW)])
    await suppression.push(redis, suppression.fields(conn, [(TAG, 3)], NOW))
    key = keyspace.suppression(3, TAG)
    assert keyspace.entry_of(key) is not None
    assert await redis.hget(key, TAG) == bytes.fromhex("010000000004030000000901")
    suppression.remove(conn, TAG, Scope.PLATFORM, 0)
    suppression.remove(conn, TAG, Scope.LIST, 9)
    await suppression.push(redis, suppression.fields(conn, [(TAG, 3)], NOW))
    assert await everything(redis) == {}
    await suppression.push(redis, [])


async def test_a_push_that_fails_says_so(valkey_url: str) -> None:
    """Then nobody is told that it is done (T11): the caller answers 503."""
    nowhere = connect("unix:///nonexistent/valkey.sock")
    with pytest.raises(RedisConnectionError):
        await suppression.push(nowhere, [suppression.Field(3, TAG, b"\0" * 6)])
    await nowhere.aclose()


async def test_a_rebuild_makes_redis_say_what_sql_says(conn: Connection, redis: Redis) -> None:
    """After a restore from an older dump: opt-outs since are back, entries that were taken back are gone."""
    chance = random.Random(11)
    entries = [
        Entry(chance.randbytes(12), chance.randrange(64), Scope.LIST, chance.randrange(1, 9), "opt-out", NOW)
        for _ in range(3000)
    ]
    corners = [(0, bytes(12)), (0, b"\xff" * 12), (63, bytes(11) + b"\1"), (63, b"\xff" * 11 + b"\xfe")]
    edges = [Entry(tag, place, Scope.PLATFORM, 0, "manual", NOW) for place, tag in corners]
    ended = Entry(b"\x80" * 12, 5, Scope.PLATFORM, 0, "bounce", NOW - 9, expires=NOW)
    suppression.add(conn, [*entries, *edges, ended])
    places = {(entry.tag, entry.partition) for entry in [*entries, *edges]}
    await suppression.push(redis, suppression.fields(conn, places, NOW))
    wanted = await everything(redis)
    assert sum(map(len, wanted.values())) == 3004
    await redis.delete(*list(wanted)[::3])
    stale = keyspace.suppression(7, b"\x42" * 12)
    await redis.hset(stale, b"\x42" * 12, b"\x01\0\0\0\0\x01")
    await redis.set("sp:{p07}:j:1", "not ours")
    assert await suppression.rebuild(redis, conn, NOW) == 3004
    assert await everything(redis) == wanted
    assert await redis.get("sp:{p07}:j:1") == b"not ours"
    await redis.flushall()
    assert await suppression.rebuild(redis, conn, NOW) == 3004
    assert await everything(redis) == wanted
    conn.execute(delete(schema.suppression))
    assert await suppression.rebuild(redis, conn, NOW) == 0
    assert await everything(redis) == {}


places = st.tuples(st.sampled_from([TAG, bytes(12)]), st.sampled_from([(1, 0), (2, 1), (3, 1), (3, 2)]))
steps = st.lists(
    st.tuples(places, st.sampled_from([None, *suppression.REASONS]), st.none() | st.integers(1, 5)), max_size=12
)


@settings(max_examples=60)
@given(steps, st.integers(0, 6))
def test_any_run_of_additions_and_removals_is_as_the_model(
    story: list[tuple[tuple[bytes, tuple[int, int]], str | None, int | None]], now: int
) -> None:
    """Law: what Redis is told is the strongest standing reason of each scope, whatever came in which order."""
    engine = schema.open_store("sqlite://", writer=True)
    schema.metadata.create_all(engine)
    model: dict[tuple[bytes, int, int, str], int | None] = {}
    with engine.begin() as conn:
        for (tag, (scope, scope_id)), reason, expires in story:
            if reason is None:
                suppression.remove(conn, tag, Scope(scope), scope_id)
                model = {key: end for key, end in model.items() if key[:3] != (tag, scope, scope_id)}
                continue
            suppression.add(conn, [Entry(tag, 3, Scope(scope), scope_id, reason, 0, expires=expires)])
            key = (tag, scope, scope_id, reason)
            before = model.get(key, expires)
            model[key] = None if before is None or expires is None else max(before, expires)
        for tag in (TAG, bytes(12)):
            assert value_of(conn, tag, now) == strongest(model, tag, now)
    engine.dispose()


def strongest(model: dict[tuple[bytes, int, int, str], int | None], tag: bytes, now: int) -> set[tuple[int, int, int]]:
    order = ["erasure", "restriction", "opt-out", "complaint", "bounce", "manual", "import"]
    standing = [key for key, end in model.items() if key[0] == tag and (end is None or end > now)]

    def answer(reasons: Iterable[str]) -> int:
        return int(suppression.REASONS[min(reasons, key=order.index)])

    spots = {key[1:3] for key in standing}
    return {(*spot, answer(key[3] for key in standing if key[1:3] == spot)) for spot in spots}


async def test_redis_spends_at_most_32_bytes_an_entry(store: Engine, redis: Redis) -> None:
    """As dense as a million: 15 entries a bucket, here in four of the 64 partitions, as the server itself counts."""
    chance = random.Random(5)
    count = 15 * keyspace.SUPPRESSION_BUCKETS * 4
    await redis.ping()
    empty = (await redis.info("memory"))["used_memory"]
    value = b"\x03\0\0\0\x09\x01"
    tags = (chance.randbytes(12) for _ in range(count))
    await suppression.push(redis, [suppression.Field(n % 4, tag, value) for n, tag in enumerate(tags)])
    full = (await redis.info("memory"))["used_memory"]
    overhead = 4 * keyspace.SUPPRESSION_BUCKETS * 16  # what the table of keys doubles by at worst, in this small store
    assert (full - empty - overhead) / count <= 32
