"""References of words: the same for the same, another key or word another one, nothing to be read from them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from policy import remarks
from policy.keys import Keyring


def ring(service: bytes = b"s" * 32) -> Keyring:
    week = {2967: b"w" * 32}
    return Keyring(
        pepper=b"p" * 32, token={1: b"t" * 32}, token_id=1, return_path={1: b"r" * 32}, return_path_id=1, queue=week,
        queue_id=2967, kek=week, kek_id=2967, service=service, intake=b"i" * 32, lane=b"l" * 32,
    )  # fmt: skip


RING = ring()


@given(st.text(), st.text())
def test_one_reference_for_one_text(one: str, other: str) -> None:
    first, second = remarks.reference(RING, one), remarks.reference(RING, other)
    assert (first == second) is (one.strip() == other.strip())
    assert first == remarks.NONE or (first.startswith("remark/") and len(first) == 23)


def test_without_the_key_nobody_can_try_words() -> None:
    assert remarks.reference(RING, "ada called") != remarks.reference(replace(RING, service=b"x" * 32), "ada called")


@given(st.lists(st.text(max_size=6), max_size=3), st.lists(st.text(max_size=6), max_size=3))
def test_one_reference_for_one_thing_somebody_else_named(names: list[str], others: list[str]) -> None:
    """Also where the names run into each other."""
    first, second = remarks.named(RING, "refused-job", *names), remarks.named(RING, "refused-job", *others)
    assert (first == second) is (names == others)
    assert first.startswith("refused-job/")
    assert remarks.named(RING, "foreign-bundle", *names).partition("/")[2] != first.partition("/")[2]
