"""The recorder: bounded, batched, asked about again, and already cut down when it leaves (promises.md T10)."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from policy.events import Hit, Kind
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US
from policy.keyspace import HITS
from tests.tracker.twins import MemoryRedis, until
from tracker.recorder import Recorder, Replays, cut

NOON = 20_000 * DAY_US + 12 * HOUR_US + 12_345_678


def opened(
    mode: Mode = Mode.INDIVIDUAL, mref: int = 1, at: int = NOON, kind: Kind = Kind.OPENED, link: int = -1
) -> Hit:
    return Hit(kind, 7, mref, at, mode, 33, link)


class Rig:
    def __init__(self, capacity: int = 100) -> None:
        self.redis = MemoryRedis()
        self.withdrawn: set[int] = set()
        self.fresh = True
        self.recorder = Recorder(
            cast(Any, self.redis),
            is_withdrawn=self.withdrawn.__contains__,
            may_write=lambda: self.fresh,
            replays=Replays(b"key"),
            capacity=capacity,
            flush_seconds=0.001,
            stream_hits=1000,
        )


@pytest.mark.parametrize(
    ("hit", "kept"),
    [
        (opened(), opened(at=20_000 * DAY_US + 12 * HOUR_US)),
        (opened(Mode.AGGREGATE, mref=77), opened(Mode.AGGREGATE, mref=0, at=20_000 * DAY_US)),
        (
            Hit(Kind.CLICKED, 7, 5, NOON, Mode.DELIVERABILITY, 33, 4),
            Hit(Kind.OPENED, 7, 5, 20_000 * DAY_US, Mode.DELIVERABILITY, 0, -1),
        ),
    ],
)
def test_a_mode_keeps_no_more_than_it_may(hit: Hit, kept: Hit) -> None:
    assert cut(hit) == kept


def test_off_is_no_mode_to_record() -> None:
    with pytest.raises(ValueError):
        cut(opened(Mode.OFF))


async def test_hits_go_out_in_batches() -> None:
    rig = Rig(capacity=2000)
    for number in range(1201):
        assert rig.recorder.record(9, opened(mref=number))
    assert await rig.recorder.flush()
    assert [hit.mref for hit in rig.redis.hits()] == list(range(1201))
    assert len(rig.redis.streams[HITS]) == 3
    assert rig.recorder.statistics().written == 1201


async def test_a_full_buffer_drops_events_and_never_fails() -> None:
    rig = Rig(capacity=10)
    assert [rig.recorder.record(9, opened()) for _ in range(15)] == [True] * 10 + [False] * 5
    assert rig.recorder.statistics().dropped == 5


async def test_who_withdrew_leaves_nothing_even_when_the_hit_was_already_waiting() -> None:
    rig = Rig()
    rig.recorder.record(9, opened(mref=1))
    rig.recorder.record(8, opened(mref=2))
    rig.withdrawn.add(9)
    assert not rig.recorder.record(9, opened(mref=3))
    assert await rig.recorder.flush()
    assert [hit.mref for hit in rig.redis.hits()] == [2]
    assert rig.recorder.statistics().withheld == 2


async def test_without_news_of_the_negative_list_hits_wait() -> None:
    rig = Rig()
    rig.recorder.record(9, opened())
    rig.fresh = False
    assert not await rig.recorder.flush()
    assert rig.redis.hits() == []
    rig.fresh = True
    assert await rig.recorder.flush()
    assert len(rig.redis.hits()) == 1


async def test_redis_away_keeps_the_order_and_loses_nothing_within_the_limit() -> None:
    rig = Rig()
    for number in range(5):
        rig.recorder.record(9, opened(mref=number))
    rig.redis.down = True
    assert not await rig.recorder.flush()
    rig.redis.down = False
    assert await rig.recorder.flush()
    assert [hit.mref for hit in rig.redis.hits()] == list(range(5))


async def test_an_anonymous_token_counts_once_per_link_and_kind() -> None:
    rig = Rig()
    hits = [
        opened(Mode.AGGREGATE, mref=5),
        opened(Mode.AGGREGATE, mref=5),
        opened(Mode.AGGREGATE, mref=6),
        opened(Mode.AGGREGATE, mref=5, kind=Kind.CLICKED, link=0),
        opened(Mode.AGGREGATE, mref=5, kind=Kind.CLICKED, link=1),
        opened(Mode.AGGREGATE, mref=5, kind=Kind.CLICKED, link=0),
    ]
    assert [rig.recorder.record(0, hit) for hit in hits] == [True, False, True, True, True, False]
    assert await rig.recorder.flush()
    assert {hit.mref for hit in rig.redis.hits()} == {0}


def test_replays_are_known_for_a_day_and_forgotten_after_two() -> None:
    replays = Replays(b"key")
    first = opened(Mode.AGGREGATE, at=NOON)
    assert not replays.seen(first)
    assert replays.seen(opened(Mode.AGGREGATE, at=NOON + DAY_US))
    assert not Replays(b"other").seen(first)
    assert not replays.seen(opened(Mode.AGGREGATE, at=NOON + 4 * DAY_US))


def test_few_first_sights_are_taken_for_replays() -> None:
    replays = Replays(b"key")
    wrong = sum(replays.seen(opened(Mode.AGGREGATE, mref=number)) for number in range(50_000))
    assert wrong <= 5


async def test_the_loop_writes_by_itself_and_close_writes_the_rest() -> None:
    rig = Rig()
    running = asyncio.create_task(rig.recorder.run())
    rig.recorder.record(9, opened(mref=1))
    await until(lambda: bool(rig.redis.hits()))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    rig.recorder.record(9, opened(mref=2))
    await rig.recorder.close()
    assert [hit.mref for hit in rig.redis.hits()] == [1, 2]
