"""What recipients share is looked up: the same bytes as made afresh, bounded, and nothing of a single person stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.message import Campaign, Person, Program, Unwritable, compile_campaign, compose
from engine.message.acceptance import _compile, _judged
from engine.message.recall import LONGEST, MOST, REST, SEEN, Recall
from policy.gate import Permit

LETTER = Campaign(
    "{{ name }} and {{ city | title }}",
    "a@shop.example",
    html="<p>Dear {{ name }},</p>\n  {% if points > 3 %}<b>{{ points }}</b>\n   .{% endif %}\n"
    '<a href="https://shop.example/{{ city }}?q={{ name }}">{{ city | upper }}</a> {{ points }}\n'
    "{% for offer in offers %}<li>{{ offer }} for {{ name }}</li>\n{% endfor %}{{ name | default('you') }}",
    text="Dear {{ name }},\n{% if points > 3 %}{{ points }} points\n{% endif %}{{ city | upper }}\n"
    "{% for offer in offers %}- {{ offer }} for {{ name }}\n{% endfor %}caf\u00e9 {{ points }}",
    bulk=False,
)
VALUES: st.SearchStrategy[Any] = (
    st.sampled_from(
        [0, 1, 4, True, False, 1.0, 4.0, -0.0, "", "1", "4", "True", "Zo\u00eb", ".", "From me", "a=", "_", "<b>"]
    )
    | st.text(max_size=5)
    | st.integers(-5, 5)
    | st.floats(-2, 5)
)
PEOPLE = st.fixed_dictionaries(
    {"name": VALUES, "city": VALUES, "points": VALUES, "offers": st.lists(st.sampled_from(["tea", "", ".x", "a  b"]))}
)


def compiled() -> Program:
    """Nothing is known yet."""
    _compile.cache_clear()
    _judged.cache_clear()
    program = compile_campaign(LETTER)
    assert isinstance(program, Program)
    return program


def written(program: Program, fields: dict[str, Any]) -> tuple[bytes, bytes, bytes | None, bytes] | str:
    try:
        made = compose(Permit(5, 7, 0.0), program, Person(5, 7, "joe@example.com", fields), 1_790_000_000_000_000)
    except Unwritable as fault:
        return str(fault)
    return made.head, made.body, made.hashed, made.head_hash.digest()


@given(st.lists(PEOPLE, min_size=1, max_size=4))
def test_what_is_looked_up_is_what_would_be_made(people: list[dict[str, Any]]) -> None:
    """Law: with everybody written four times in turn (so that every look-up is met), each message is the one that a
    program which knows nothing writes; True, 1 and 1.0 stay apart, though they are equal."""
    alone = [written(compiled(), fields) for fields in people]
    program = compiled()

    for _ in range(4):
        assert [written(program, fields) for fields in people] == alone


@pytest.mark.parametrize("make", [lambda n: f"value {n}", lambda n: b"%d" % n, lambda n: n])
def test_it_is_bounded_and_keeps_nothing_that_came_once(make: Callable[[int], Any]) -> None:
    recall: Recall[Any, bytes] = Recall()
    for number in range(3 * SEEN):
        assert recall.keep(make(number), b"form") == b"form"
    assert len(recall) == 0
    assert len(recall._seen) <= SEEN
    assert all(type(number) is int for number in recall._seen)

    for number in range(REST):  # it rests, since nothing was shared, and wakes
        recall.keep(make(number % 2), b"form")
    assert recall.get(make(1)) == b"form"

    for number in itertools.chain.from_iterable((n, n) for n in range(2 * MOST)):
        recall.keep(make(number), b"form")
        assert len(recall) <= MOST
    assert recall.get(make(2 * MOST - 1)) == b"form"


def test_long_values_are_not_kept() -> None:
    recall: Recall[str, bytes] = Recall()
    for _ in range(3):
        recall.keep("x" * (LONGEST + 1), b"")
        recall.keep("x" * LONGEST, b"")
    assert list(recall) == ["x" * LONGEST]
