"""Return paths: ours come back, nobody else's do."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bounce.verp import Returned, ReturnPaths

OLD, NEW = b"o" * 32, b"n" * 32
PATHS = ReturnPaths({1: OLD, 2: NEW}, 2, "bounce.example.com")

JOBS = st.integers(0, 2**40 - 1)
MREFS = st.integers(-(2**63), 2**63 - 1)


@given(JOBS, MREFS)
def test_what_was_made_opens(job: int, mref: int) -> None:
    address = PATHS.make(job, mref)
    assert re.fullmatch(r"b\+[a-z2-7]{40}@bounce\.example\.com", address)
    assert len(address.partition("@")[0]) <= 64
    assert PATHS.open(address) == Returned(job, mref)
    assert PATHS.open(address.upper()) == Returned(job, mref), "some servers raise or lower local parts"


@given(JOBS, MREFS, st.integers(0, 39), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_one_letter_changed_opens_nothing(job: int, mref: int, place: int, letter: str) -> None:
    address = PATHS.make(job, mref)
    changed = address[: 2 + place] + letter + address[3 + place :]
    assert PATHS.open(changed) == (Returned(job, mref) if changed == address else None)


@given(st.text(max_size=80))
def test_garbage_opens_nothing_and_raises_nothing(text: str) -> None:
    assert PATHS.open(text) is None
    assert PATHS.open(f"b+{text}@bounce.example.com") is None


def test_it_is_base32_of_rfc_4648() -> None:
    token = PATHS.make(7, -9)[2:42]
    data = base64.b32decode(token.upper())
    assert data[:2] == b"\x01\x02"
    assert int.from_bytes(data[2:7], "big") == 7
    assert len(data) == 25


def test_the_format_never_changes() -> None:
    """Delivered mail holds these: a change here loses every bounce still on its way."""
    assert PATHS.make(7, -9) == "b+aebaaaaaaad777777777777xwhnoi64k3hssluvf@bounce.example.com"


def test_old_keys_still_open_and_lost_ones_do_not() -> None:
    old = ReturnPaths({1: OLD}, 1, "bounce.example.com").make(3, 4)
    assert PATHS.open(old) == Returned(3, 4)
    assert ReturnPaths({2: NEW}, 2, "bounce.example.com").open(old) is None


def test_other_domains_and_other_keys_open_nothing() -> None:
    address = PATHS.make(3, 4)
    assert PATHS.open(address.replace("bounce.example.com", "bounce.example.org")) is None
    assert ReturnPaths({2: OLD}, 2, "bounce.example.com").open(address) is None
    assert PATHS.open(address.partition("@")[0]) is None


def test_misuse() -> None:
    with pytest.raises(ValueError, match="ring"):
        ReturnPaths({1: OLD}, 2, "x")
    with pytest.raises(OverflowError):
        PATHS.make(2**40, 0)
    assert "6f6f" not in repr(PATHS)
    assert "ooo" not in repr(PATHS)
