"""What a dead worker held of the intake is its successor's at once, and its name is forgotten (T1, I7, I8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.campaign.claims import Claims, Limits, inherit
from engine.delivery.arrival import holders_in
from engine.queue.replay import MAGIC, SUFFIX, encode_head, frame
from policy import keyspace
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]


async def _held(server: ValkeyServer, name: str, count: int) -> Claims:
    claims = Claims(server.client, name, Limits(claim=2000), lambda: 0.0)
    await claims.prepare()
    for number in range(count):
        await server.client.xadd(keyspace.INTAKE, {"job": str(number)})
    assert len(await claims.new(count, 0.0)) == count
    return claims


async def test_what_the_dead_held_is_taken_at_the_next_look_and_counts_as_a_delivery(valkey: ValkeyServer) -> None:
    await _held(valkey, "host:0:1-a", 3)
    await inherit(valkey.client, "host:0:2-b", ["host:0:1-a", "host:0:0-never"])

    heir = Claims(valkey.client, "host:0:2-b", Limits(), lambda: 0.0)
    taken = await heir.take(0.0)
    assert [(entry.fields[b"job"], entry.deliveries) for entry in taken] == [(b"0", 2), (b"1", 2), (b"2", 2)]
    consumers: Any = await valkey.client.xinfo_consumers(keyspace.INTAKE, keyspace.INTAKE_GROUP)
    assert [consumer["name"] for consumer in consumers] == [b"host:0:2-b"]


async def test_more_than_one_call_of_redis_takes(valkey: ValkeyServer) -> None:
    await _held(valkey, "host:0:1-a", 1500)
    await inherit(valkey.client, "host:0:2-b", ["host:0:1-a"])
    pending: Any = await valkey.client.xpending(keyspace.INTAKE, keyspace.INTAKE_GROUP)
    assert [(each["name"], each["pending"]) for each in pending["consumers"]] == [(b"host:0:2-b", 1500)]


async def test_the_living_keep_what_they_hold(valkey: ValkeyServer) -> None:
    await _held(valkey, "host:1:9-z", 2)
    await inherit(valkey.client, "host:0:2-b", ["host:0:1-a"])
    pending: Any = await valkey.client.xpending(keyspace.INTAKE, keyspace.INTAKE_GROUP)
    assert [(each["name"], each["pending"]) for each in pending["consumers"]] == [(b"host:1:9-z", 2)]


def test_the_dead_are_those_whose_journals_lie_in_our_folder(tmp_path: Path) -> None:
    for number, holder in enumerate(("host:0:1-a", "host:0:2-b", "host:0:1-a"), start=1):
        (tmp_path / f"{number:08d}{SUFFIX}").write_bytes(MAGIC + frame(encode_head("boot", holder)))
    (tmp_path / f"00000009{SUFFIX}").write_bytes(b"")
    assert holders_in(tmp_path, "host:0:2-b") == ["host:0:1-a"]


async def test_there_need_be_no_intake_yet(valkey: ValkeyServer) -> None:
    await inherit(valkey.client, "host:0:2-b", ["host:0:1-a"])
    assert not await valkey.client.exists(keyspace.INTAKE)


async def test_an_entry_whose_reply_was_lost_is_found_and_one_that_failed_is_not(valkey: ValkeyServer) -> None:
    claims = await _held(valkey, "host:0:1-a", 2)  # given to us, and nobody here remembers
    now = 0.0
    claims.monotonic = lambda: now
    first, second = await claims.take(0.0)
    assert [first.fields[b"job"], second.fields[b"job"]] == [b"0", b"1"]
    claims.park(first, 60.0)
    claims.drop_claim(second)
    now = 10.0
    assert await claims.take(0.0) == []
    await claims.finish(first)
    assert await valkey.client.xlen(keyspace.INTAKE) == 1
