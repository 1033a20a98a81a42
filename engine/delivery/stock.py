"""The recipients waiting at one desk, in the order in which they go out.

Laws:
- transactional mail goes before campaigns, and neither starves: while both wait, every fourth is a campaign's (issue 3,
  item 1; lease.lua takes slices from the lanes by the same rule, so what is near is ordered as what is far);
- among their kind those put back go first, in the order they had, then those that came first.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from engine.delivery.hand import Hand

Place: TypeAlias = tuple[Hand, int]  # of a recipient: its slice in our hands, and its index there
FAIR = 4  # one of so many is a campaign's, while transactional mail waits too


class Stock:
    """One a desk."""

    def __init__(self) -> None:
        self._urgent: deque[Place] = deque()
        self._plain: deque[Place] = deque()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._plain)

    def __iter__(self) -> Iterator[Place]:
        return itertools.chain(self._urgent, self._plain)

    def __repr__(self) -> str:
        return f"<Stock {len(self._urgent)} transactional, {len(self._plain)} of campaigns>"

    @property
    def urgent(self) -> int:
        """How many of them are transactional."""
        return len(self._urgent)

    @property
    def plain(self) -> int:
        """How many are of campaigns."""
        return len(self._plain)

    def add(self, hand: Hand, indexes: Iterable[int]) -> None:
        self._of(hand).extend((hand, index) for index in indexes)

    def put_back(self, hand: Hand, index: int) -> None:
        self._of(hand).appendleft((hand, index))

    def pop(self) -> Place:
        """Whose turn it is. Raises IndexError when nobody waits."""
        if not (self._urgent and self._plain):
            return (self._urgent or self._plain).popleft()
        self._turn = (self._turn + 1) % FAIR
        return self._urgent.popleft() if self._turn else self._plain.popleft()

    def keep(self, is_wanted: Callable[[Hand, int], bool]) -> None:
        """Only these stay, in their order."""
        self._urgent = deque(place for place in self._urgent if is_wanted(*place))
        self._plain = deque(place for place in self._plain if is_wanted(*place))

    def drop(self, hand: Hand) -> list[int]:
        """Everybody of a hand leaves; who that was."""
        indexes = [index for other, index in self._of(hand) if other is hand]
        self.keep(lambda other, _: other is not hand)
        return indexes

    def _of(self, hand: Hand) -> deque[Place]:
        return self._urgent if hand.header.priority else self._plain
