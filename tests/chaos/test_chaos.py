"""The small run of every check-in: five kills and a handful of crash points; `make chaos` is the whole of it."""

from __future__ import annotations

from policy.transitions import POINTS
from tests.chaos.crash import crash
from tests.chaos.storm import Plan, storm
from tests.chaos.world import PLACES, QUICK_PLACES, Place, chaos_world

POINTS_HERE = ("after-put", "before-dot", "after-dot", "before-settle", "after-replay", "after-drain", "after-suppress")
# the slow site of the big run is a second slower than the patience of a check-in
QUICKER = tuple(Place("slow", place.host, "dot.late.700ms", place.limits) if place.name == "slow" else place
                for place in PLACES)  # fmt: skip


async def test_five_kills_lose_nobody_and_repeat_nobody_without_a_reason() -> None:
    said: list[str] = []
    async with chaos_world(2, QUICKER) as world:
        outcome = await storm(world, Plan(seed=7, kills=5, shots=20, scale=0.5, patient=False), said.append)
    assert [str(broken) for broken in outcome.broken] == []
    assert outcome.figures.messages > 50, said
    assert outcome.figures.unknowns <= outcome.figures.unknown_bound
    assert outcome.figures.shots >= 20
    assert outcome.figures.aimed >= 10


async def test_a_handful_of_crash_points_is_survived() -> None:
    points = [point for point in POINTS if point.name in POINTS_HERE]
    async with chaos_world(1, QUICK_PLACES) as world:
        outcome = await crash(world, points, 7, lambda text: None, patient=False)
    assert [str(broken) for broken in outcome.broken] == []
    assert outcome.passed == [point.name for point in points]
