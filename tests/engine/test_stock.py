"""A desk's stock by law: transactional mail first, campaigns not starved, everybody once and in their order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.delivery.hand import Hand
from engine.delivery.stock import FAIR, Stock


@dataclass
class _Header:
    priority: bool


@dataclass(eq=False)
class _Slice:
    """What the stock looks at of a hand."""

    name: str
    header: _Header
    indexes: list[int] = field(default_factory=list)


def hand(name: str, *, priority: bool = False) -> Hand:
    return cast(Hand, _Slice(name, _Header(priority)))


def is_urgent(one: Hand) -> bool:
    return one.header.priority


@pytest.mark.doubles
def test_transactional_mail_goes_first_and_every_fourth_is_a_campaigns() -> None:
    stock = Stock()
    stock.add(hand("letter"), range(20))
    stock.add(hand("invoice", priority=True), range(6))

    order = ["t" if is_urgent(stock.pop()[0]) else "c" for _ in range(26)]

    assert "".join(order) == "tttctttc" + "c" * 18


@pytest.mark.doubles
def test_what_comes_later_still_goes_first() -> None:
    stock = Stock()
    stock.add(hand("letter"), range(20))
    first = [stock.pop() for _ in range(5)]
    stock.add(hand("invoice", priority=True), [7])

    assert [index for _, index in first] == [0, 1, 2, 3, 4]
    assert stock.pop()[1] == 7
    assert stock.pop()[1] == 5


@pytest.mark.doubles
def test_what_was_put_back_is_next_among_its_kind() -> None:
    stock, letter, invoice = Stock(), hand("letter"), hand("invoice", priority=True)
    stock.add(letter, range(5))
    stock.add(invoice, range(2))
    stock.put_back(letter, 9)
    stock.put_back(invoice, 8)

    assert [stock.pop()[1] for _ in range(4)] == [8, 0, 1, 9]


@pytest.mark.doubles
def test_a_hand_leaves_whole() -> None:
    stock, one, other = Stock(), hand("one"), hand("other", priority=True)
    stock.add(one, [1, 2])
    stock.add(other, [5])
    stock.add(one, [3])

    assert stock.drop(one) == [1, 2, 3]
    assert [index for _, index in stock] == [5]
    assert (len(stock), stock.urgent, bool(stock)) == (1, 1, True)
    stock.keep(lambda who, _: who is not other)
    assert not stock


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(1, 12)),
        st.tuples(st.just("pop"), st.just(0), st.integers(1, 9)),
        st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
    ),
    max_size=40,
)


@pytest.mark.doubles
@given(steps)
def test_nobody_is_lost_doubled_or_starved(taken: list[tuple[str, int, int]]) -> None:
    """Law: whoever was added leaves once, in order among its kind; while both kinds wait, of any FAIR in a row one at
    least is a campaign's and all others are transactional."""
    stock = Stock()
    hands = [hand(str(number), priority=number % 2 == 0) for number in range(6)]
    waiting: list[tuple[Hand, int]] = []
    numbers = iter(range(10_000))
    contested: list[bool] = []
    for what, which, count in taken:
        one = hands[which]
        if what == "add":
            indexes = [next(numbers) for _ in range(count)]
            stock.add(one, indexes)
            waiting += [(one, index) for index in indexes]
        elif what == "drop":
            gone = [index for other, index in waiting if other is one]
            assert stock.drop(one) == gone
            waiting = [pair for pair in waiting if pair[0] is not one]
        else:
            for _ in range(min(count, len(waiting))):
                both = len({is_urgent(each) for each, _ in waiting}) == 2
                popped = stock.pop()
                assert popped == next(pair for pair in waiting if is_urgent(pair[0]) == is_urgent(popped[0]))
                waiting.remove(popped)
                if both:
                    contested.append(is_urgent(popped[0]))
                else:
                    assert stock.urgent in (0, len(stock))
        assert len(stock) == len(waiting)
        assert sorted(index for _, index in stock) == sorted(index for _, index in waiting)
    for start in range(len(contested) - FAIR + 1):
        assert sum(contested[start : start + FAIR]) == FAIR - 1
