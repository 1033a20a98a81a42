"""Transactional mail goes before campaigns to the same site, from the lane to the wire, and neither starves."""

from __future__ import annotations

from engine.delivery.desk import MOST
from engine.queue.lanes import JobState, Lanes, LeaseRequest, PutRequest
from policy.instants import SECOND_US
from tests.world.courier import courier_world
from tests.world.queue_census import FAR, SITE, assert_legal, lane_named, some_slice
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]
PART = 9


async def test_a_transactional_message_overtakes_a_desk_full_of_campaign_letters() -> None:
    async with courier_world("dot.late.50ms") as world:
        campaign, invoices = world.job(), world.job(priority=True)
        soon = await world.now_us() + SECOND_US
        for start in range(0, 640, 64):  # ten slices: the lane of so many learns its site, and is leased by appetite
            await world.put(campaign, [f"letter{number}" for number in range(start, start + 64)], due=soon)
        await world.until(lambda: len(world.arrived()) >= 5)
        [desk] = world.courier.desks.values()
        await world.until(lambda: desk.appetite < MOST < len(desk.stock) // 5)
        assert await world.sites() == [desk.ref], "what comes now goes to the site's own index"

        await world.put(invoices, [f"invoice{number}" for number in range(24)])
        before = len(world.arrived())
        await world.until(lambda: sum(name.startswith("invoice") for name in world.names()) == 24)

        names = world.names()
        places = [place for place, name in enumerate(names) if name.startswith("invoice")]
        assert places[0] < before + 3 * MOST, "behind what was written for the line already, not behind the stock"
        between = [name for name in names[places[0] : places[-1]] if name.startswith("letter")]
        assert 24 // 3 - MOST <= len(between) <= 24 // 3 + 2 * MOST, "every fourth was a campaign's, by batches"
        assert len(set(names)) == len(names)


async def test_a_campaign_goes_on_while_transactional_mail_keeps_coming() -> None:
    async with courier_world("dot.late.30ms") as world:
        campaign, invoices = world.job(), world.job(priority=True)
        soon = await world.now_us() + SECOND_US  # all of it is due at once
        for start in range(0, 100, 10):  # ten slices of either kind: the lanes are fair by slices, a desk by recipients
            await world.put(invoices, [f"invoice{number}" for number in range(start, start + 10)], due=soon)
            await world.put(campaign, [f"letter{number}" for number in range(start, start + 10)], due=soon)
        await world.until(lambda: sum(name.startswith("invoice") for name in world.names()) == 100)

        names = world.names()
        letters = sum(name.startswith("letter") for name in names)
        assert 100 // 6 <= letters <= 100 // 2, "about one for three"
        assert sum(name.startswith("invoice") for name in names[:60]) >= 30


async def test_a_lease_can_ask_for_one_kind_alone(valkey: ValkeyServer) -> None:
    lanes = Lanes(valkey.client, "host/w")
    built = [some_slice(7, PART, lane_named("A"), 1, flags=number % 2) for number in range(20)]
    state = JobState(5, 6, 0, False, FAR, False, 2)
    assert await lanes.put([PutRequest(PART, 7, 0, state, [(0, data) for data in built])]) == [True]
    await lanes.assign(PART, lane_named("A"), SITE)

    async def taken(request: LeaseRequest) -> str:
        [found] = await lanes.lease_many([request])
        return "".join(lease.slice_id[0] for lease in found.slices)

    assert await taken(LeaseRequest(PART, [], urgent=[(SITE, 4)])) == "pppp"
    assert await taken(LeaseRequest(PART, [], plain=[(SITE, 3)])) == "ccc"
    assert await taken(LeaseRequest(PART, [], urgent=[(SITE, 50)])) == "p" * 6
    assert await taken(LeaseRequest(PART, [], urgent=[(SITE, 50)])) == ""
    assert await taken(LeaseRequest(PART, [(SITE, 50)])) == "c" * 7
    await assert_legal(valkey.client, PART)
