"""A site's back-off is one number, however many domains hang on it and however many workers look at it."""

from __future__ import annotations

import time

from engine.queue.lanes import JobState, Lanes, PutRequest
from engine.queue.permits import Permits
from policy import keyspace
from policy.valkey import call
from tests.chaos.sink import read_record
from tests.world.courier import courier_world
from tests.world.queue_census import FAR, SITE, assert_legal, census, some_slice
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]
PART = 9


async def test_two_hundred_domains_of_a_site_are_left_alone_by_one_key(valkey: ValkeyServer) -> None:
    lanes = Lanes(valkey.client, "host/w")
    refs = [f"{number:011}" for number in range(200)]
    state = JobState(5, 6, 0, False, FAR, False, 2)
    built = [(0, some_slice(7, PART, ref, 1)) for ref in refs]
    assert await lanes.put([PutRequest(PART, 7, 0, state, built)]) == [True]
    for ref in refs:
        await lanes.assign(PART, ref, SITE)
    before, keys = await census(valkey.client, PART), await call(valkey.client, "DBSIZE")

    await Permits(valkey.client).back_off(SITE, 600)

    assert await call(valkey.client, "DBSIZE") == keys + 1
    assert await census(valkey.client, PART) == before, "no slice was touched"
    assert len(before.due["d", SITE]) == 200
    await assert_legal(valkey.client, PART)


async def test_a_worker_heeds_what_another_was_told() -> None:
    async with courier_world() as world:
        site = keyspace.site_ref("sink", world.keyring.lane)
        told_at = time.monotonic()
        await Permits(world.server.client).back_off(site, 1.2)  # as another worker says it
        await world.put(world.job(), ["ada", "bob"])
        await world.until(lambda: len(world.arrived()) == 2)

        assert min(entry.t_rcpt for entry in world.arrived()) >= told_at + 1.2
        assert len({entry.connection for entry in read_record(world.record)}) == 1, "nobody knocked meanwhile"


async def test_what_waits_for_a_site_left_alone_for_long_goes_back_to_its_lane() -> None:
    async with courier_world() as world:
        site = keyspace.site_ref("sink", world.keyring.lane)
        await Permits(world.server.client).back_off(site, 900)
        await world.put(world.job(), ["ada", "bob"])
        await world.until(lambda: bool(world.courier.desks) and not world.courier.hands)

        [waiting] = await world.waiting()
        assert waiting.holder == ""
        assert waiting.due > await world.now_us() + 800 * 1_000_000
        assert read_record(world.record) == []
