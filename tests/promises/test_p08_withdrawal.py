"""P-08, P-28: a withdrawal stops what is queued when it is answered, and what delivered pixels leave behind."""

from __future__ import annotations

import time
from typing import Any

from engine.queue import slices
from engine.queue.lanes import GateRequest, JobState, Lanes, PutRequest
from engine.queue.slices import Contents, Row
from policy import keyspace, schema
from policy.events import Reason
from policy.gate import PERMIT_SECONDS, Mode, Permit, Refusal, Standing, decide
from policy.instants import week_of
from tests.promises.marks import promise
from tests.tracker.test_with_policy import TAG, Street, street
from tests.tracker.twins import until
from tests.world.queue_census import FAR, lane_named
from tests.world.servers import PolicyWorld, world
from tracker.answers import GIF

__all__ = ["street", "world"]

PART, JOB, LANE = 9, 11, lane_named("A")


async def _says_nothing(*_: object, **__: object) -> None:
    return


def _knows_nobody(_room: Any, _subject: int) -> bool:
    return False


async def _queued(world: PolicyWorld, account: int) -> GateRequest:
    """A slice with one person in it, leased: the question a worker asks on a connection that is ready for RCPT."""
    contents = Contents("one.example", [], [Row("ada", 1, 2, 0, 0, [])])
    data = slices.build(b"k" * 32, 2900, JOB, PART, LANE, contents, expires_at=FAR)
    state = JobState(account, 6, 0, priority=False, expires_at=FAR, resend_in_doubt=False, buckets=2)
    lanes = Lanes(world.redis, "worker")
    await lanes.put([PutRequest(PART, JOB, 0, state, [(0, data)])])
    [lease] = (await lanes.lease(PART, [], 1)).slices
    return GateRequest(PART, lease.slice_id, lease.token, [TAG], b"d" * 12)


async def _verdict(world: PolicyWorld, question: GateRequest) -> Permit | Refusal:
    answer = await Lanes(world.redis, "worker").gate(question)
    assert answer is not None
    assert answer.standing is Standing.CLEAR
    return decide(answer.facts[0], JOB, 2, time.monotonic())


@promise("P-08", off={"policy.enforcement.Enforcement._tell": _says_nothing})
async def test_p08_what_is_queued_does_not_leave_once_the_withdrawal_is_answered(world: PolicyWorld) -> None:
    """A campaign on its way: the gate is asked at RCPT time, and epsilon is the withdrawal's own answer."""
    account = await world.ask.account_add("acme", display_name="Acme")
    await world.ask.resolve(account, week_of(world.clock()), [(TAG, PART, "ada@one.example")])
    question = await _queued(world, account)
    assert isinstance(await _verdict(world, question), Permit)
    assert await world.ask.withdraw(account, TAG, "mail_marketing")
    refused = await _verdict(world, question)
    assert isinstance(refused, Refusal)
    assert refused.reason is Reason.SUPPRESSED


@promise("P-08", off={"policy.gate.PERMIT_SECONDS": 3600.0})
def test_p08_leave_from_before_a_withdrawal_is_void_within_its_time() -> None:
    """What the gate said before t0 is worth nothing 0.5 s later; epsilon is 5 s."""
    permit = Permit(JOB, 2, 100.0)
    assert not permit.is_void(100.0)
    assert permit.is_void(100.6)
    assert permit.is_void(105.0)
    assert permit.is_void(99.9), "a clock that went back is not trusted"
    assert PERMIT_SECONDS < 5


@promise("P-08", off={"tracker.preferences.Preferences._fall_silent": _says_nothing})
async def test_p08_one_button_withdraws_and_delivered_pixels_stop_logging(street: Street) -> None:
    """As easy as giving: a page of the mail's own link, no login, no address to type."""
    await street.ask("GET", street.pixel())
    assert len(await street.rows(schema.hit)) == 1
    status, _ = await street.ask("POST", street.preferences(), data={"choice": "tracking"})
    assert status == 200
    assert {(row.subject, row.reason) for row in await street.rows(schema.negative)} == {(street.subject, "withdrawn")}
    await until(lambda: len(street.tracker.withdrawn) == 1)
    assert (await street.ask("GET", street.pixel()))[0] == 200
    assert (await street.ask("GET", street.click(1)))[0] == 302, "links go on working"
    assert len(await street.rows(schema.hit)) == 1


@promise("P-28", off={"tracker.tables.Withdrawn.__contains__": _knows_nobody})
async def test_p28_a_pixel_fetched_after_the_withdrawal_stores_not_a_byte(street: Street) -> None:
    before = await street.ask("GET", street.pixel())
    assert len(await street.rows(schema.hit)) == 1
    assert await street.world.ask.withdraw(street.account, TAG, "open_tracking")
    await until(lambda: len(street.tracker.withdrawn) == 1)
    told = await street.world.redis.xinfo_stream(keyspace.HITS)
    counted = await street.rows(schema.hit_counter)
    for mode in (Mode.INDIVIDUAL, Mode.DELIVERABILITY):
        after = await street.ask("GET", street.pixel(mode))
        assert after == before == (200, GIF.decode(errors="replace"))
    assert len(await street.rows(schema.hit)) == 1
    assert await street.rows(schema.last_open) == []
    assert await street.rows(schema.hit_counter) == counted
    assert await street.world.redis.xinfo_stream(keyspace.HITS) == told
    assert street.tracker.recorder.statistics().withheld == 2
