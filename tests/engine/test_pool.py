"""The pool's decision: laws of engine.delivery.pool as sentences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.delivery.pool import Limits, Plan, plan

numbers = st.integers(0, 500)


@given(
    stock=numbers, connected=numbers, opening=numbers, idle=numbers, ceiling=st.integers(1, 50), most=st.integers(1, 50)
)
def test_never_more_connections_than_site_pace_and_batches_allow(
    stock: int, connected: int, opening: int, idle: int, ceiling: int, most: int
) -> None:
    """Never more connections than the site's limit, than the pace allows, or than there are batches to fill them."""
    idle = min(idle, connected)
    limits = Limits(connections=most, share=16)
    decided = plan(
        stock=stock, connected=connected, opening=opening, idle=idle, ceiling=ceiling, limits=limits, failing=False,
        held=False,
    )  # fmt: skip
    after = connected + opening + decided.open
    if decided.open:
        assert after <= min(most, ceiling, -(-stock // 16))
    assert 0 <= decided.close <= idle


def test_a_held_site_gets_nothing_and_loses_its_idle_connections() -> None:
    decided = plan(stock=900, connected=4, opening=1, idle=3, ceiling=10, limits=Limits(), failing=False, held=True)

    assert decided == Plan(open=0, close=3)


def test_a_failing_site_is_approached_with_one_connection() -> None:
    decided = plan(stock=900, connected=0, opening=0, idle=0, ceiling=10, limits=Limits(), failing=True, held=False)

    assert decided == Plan(open=1, close=0)


def test_idle_connections_are_used_before_new_ones_are_opened() -> None:
    decided = plan(stock=16, connected=3, opening=0, idle=3, ceiling=10, limits=Limits(), failing=False, held=False)

    assert decided == Plan(open=0, close=0)


def test_idle_connections_above_a_pace_that_came_down_are_closed() -> None:
    decided = plan(stock=0, connected=8, opening=0, idle=8, ceiling=2, limits=Limits(), failing=False, held=False)

    assert decided == Plan(open=0, close=6)
