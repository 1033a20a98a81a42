"""Laws of the producer's door: no payload whatever crashes it, and its two passes never disagree."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.campaign.canonical import canonical
from engine.campaign.job import Job, Recipient
from engine.campaign.problems import examine
from engine.campaign.validation import CHECKS, Reading, read, read_row
from tests.engine.test_job import NOW, THIRTY, good

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({*good(), *THIRTY, "audience", "attachments", "consent", "headers", "tracking", "expires_at"})


def judged(payload: bytes) -> Reading:
    reading = read(payload, NOW)
    assert (reading.job is None) == bool(reading.problems)
    for problem in reading.problems:
        assert problem.path.startswith("$")
        assert problem.message
        str(problem).encode("utf-8")
    return reading


@given(st.binary(max_size=300))
@example(b'{"a":' * 3000)
@example(b"[" * 200_000)
@example(b'{"v":1,"recipients":[{"address":"\\ud800"}]}')
@example(b'{"recipients":[{"address":"a@b.c","fields":{"x":' + b"[" * 900 + b"]" * 900 + b"}}]}")
def test_no_bytes_crash_the_validator(payload: bytes) -> None:
    judged(payload)
    read_row(payload)


@given(json_values)
def test_no_json_crashes_the_validator(value: Any) -> None:
    payload = json.dumps(value).encode()
    judged(payload)
    read_row(payload)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=6))
def test_no_mistake_in_any_field_crashes_the_validator(changes: dict[str, Any]) -> None:
    judged(json.dumps({**good(), **changes}).encode())


def _mutated(value: Any, draw: random.Random) -> Any:
    """The same tree with one node replaced by something odd."""
    odd: list[Any] = [
        None,
        True,
        -1,
        1.5,
        10**30,
        "",
        "\r\n",
        "\ud800",
        [],
        [[]],
        {},
        {"x": {"y": []}},
        float("nan"),
        "a@b.example",
    ]
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(sorted(value))
        return {**value, name: _mutated(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [*value[:place], _mutated(value[place], draw), *value[place + 1 :]]
    return draw.choice(odd)


def test_thousands_of_jobs_with_one_odd_value_are_judged() -> None:
    draw = random.Random(8)
    whole = good(
        consent={"open_tracking": {"source": "form", "time": "2026-01-01T00:00:00Z"}},
        attachments=[{"filename": "a.png", "content_type": "image/png", "content": "AAAA", "cid": "a"}],
        headers={"X-A": "b"}, tracking={"opens": "individual"}, send_at="2026-11-20T00:00:00Z", rate=5,
    )  # fmt: skip
    accepted = 0
    for _ in range(4000):
        reading = judged(json.dumps(_mutated(whole, draw)).encode())
        accepted += reading.job is not None
    assert 0 < accepted < 4000


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=3))
def test_the_two_passes_agree(changes: dict[str, Any]) -> None:
    """What the walk finds nothing in converts; what converts, the walk (without its checks) finds nothing in."""
    tree = json.loads(json.dumps({**good(), **changes}))
    try:
        msgspec.convert(tree, Job)
        converts = True
    except (ValueError, TypeError):
        converts = False
    found = examine(tree, Job, {name: lambda value: None for name in CHECKS})
    if not found:
        assert converts
    if found and converts:
        # the walk may be stricter in two things only: broken text and true standing where a number should
        assert any("surrogate" in p.message or "got true or false" in p.message for p in found), [str(p) for p in found]


@given(json_values)
def test_rows_convert_exactly_when_the_walk_is_silent(value: Any) -> None:
    tree = {"address": "a@b.example", "fields": {"x": value}}
    text = json.dumps(tree)
    row = read_row(text.encode())
    try:
        msgspec.json.decode(text, type=Recipient)
        converts = True
    except (ValueError, RecursionError):
        converts = False
    assert (row is not None) == converts


pairs = st.lists(
    st.tuples(st.sampled_from(["x", "y", 'q":', "z:"]), st.sampled_from(["1", '"a"', '"\\":"', "[1]", '{"k":1}']))
)
gaps = st.sampled_from(["", " ", "\n\t"])


def _text_of(items: list[tuple[str, str]], gap: str) -> str:
    return "{" + ",".join(f"{json.dumps(name)}{gap}:{value}" for name, value in items) + "}"


@settings(max_examples=400)
@given(pairs, st.sampled_from([[], ["name"], ["name", "name"], ["address"], ["consent"]]), gaps, gaps)
def test_a_row_with_a_name_twice_is_never_read(
    fields: list[tuple[str, str]], more: list[str], inner: str, outer: str
) -> None:
    """Law: a name that comes twice in one object is refused, however the JSON is spaced, quoted or defaulted."""
    kept = [(name, value) for name, value in fields if name.isidentifier()]
    values = {"name": '""', "address": '"b@b.example"', "consent": "{}"}
    items = [("address", '"a@b.example"'), ("fields", _text_of(kept, inner)), *((name, values[name]) for name in more)]
    twice = len({name for name, _ in items}) < len(items) or len(dict(kept)) < len(kept)
    assert (read_row(_text_of(items, outer).encode()) is None) == twice


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_the_canonical_form_is_stable(value: Any) -> None:
    """Reading the canonical form and writing it again gives the same bytes, whatever the order of names was."""
    text = canonical(value)
    again = json.loads(text)
    assert canonical(again) == text
    if isinstance(value, dict):
        assert canonical(dict(reversed(list(value.items())))) == text
