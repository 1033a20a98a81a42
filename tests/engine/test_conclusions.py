"""What is counted as lost is what nobody can open any more, and nothing else: an alarm hangs on it (decision 3)."""

from __future__ import annotations

from typing import Any, cast

import pytest

from engine.delivery.campaigns import Loaded
from engine.delivery.conclusions import Conclusions
from engine.delivery.hand import Hand
from engine.delivery.settling import Settling
from engine.queue import schedule
from engine.queue.lanes import Lease
from engine.queue.slices import Header
from policy.events import Event, Kind
from policy.keys import Keyring


class _Settled:
    def __init__(self) -> None:
        self.ended: list[int] = []
        self.passed_over: list[int] = []

    def terminal(self, hand: Hand, index: int, event: Event) -> None:
        self.ended.append(event.kind)

    def known(self, hand: Hand, indexes: list[int]) -> None:
        self.passed_over += indexes


class _Keys:
    pepper = bytes(32)


def _lease() -> tuple[Lease, Header]:
    header = Header(7, 2900, 3, 0, 0, 0, 0, 1, 5, 2, "L" * 11)
    return Lease(3, "c1", "S" * 11, "L" * 11, 5, b""), header


@pytest.mark.doubles
def test_a_slice_that_is_buried_is_not_a_slice_that_is_lost() -> None:
    settled: Any = _Settled()
    nothing = Loaded(0, b"", 0, None, (), None, None)
    conclusions = Conclusions(
        cast(Settling, settled), lambda: cast(Keyring, _Keys()), schedule.Retry(), nothing, lambda: 1
    )

    conclusions.bury(*_lease())
    assert (conclusions.slices_lost, settled.ended, settled.passed_over) == (0, [], [0, 1, 2])

    conclusions.lose(*_lease())
    assert (conclusions.slices_lost, settled.ended) == (1, [int(Kind.LOST)] * 3)
