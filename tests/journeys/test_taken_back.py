"""P-11: what a restored system replays never lifts what stood: taking back is written down after its commit."""

from __future__ import annotations

from typing import Any

import pytest

from policy import enforcement
from policy.suppression import Scope
from policy.tombstones import NAME, Tombstones
from tests.journeys.test_writer import tag
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]


def last_standing(world: PolicyWorld) -> list[Any]:
    """What the ledger says last of the tag."""
    told = Tombstones(world.settings.tombstones_dir / NAME).replay()
    assert told.problems == []
    lines = [line for line in told.lines if line.what == "standing" and line.values["tag"] == tag(world)[0].hex()]
    entries: list[Any] = lines[-1].values["entries"]
    return entries


async def test_a_failed_commit_takes_nothing_back(world: PolicyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.ask.call("opt_out", list=1, partition=tag(world)[1], tag=tag(world)[0], source="page")
    [standing] = last_standing(world)
    back = {"tag": tag(world)[0], "partition": tag(world)[1], "scope": int(Scope.LIST), "scope_id": 1}

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(enforcement, "_set_commit_number", fails)
        with pytest.raises(Exception, match="does not answer"):
            await world.ask.call("unsuppress", **back)
    assert last_standing(world) == [standing]
    assert await world.ask.call("unsuppress", **back) == 1
    assert last_standing(world) == []
