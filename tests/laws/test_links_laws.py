"""Laws of the link tokens (tracking.md 3.3): nothing forged opens, two recipients' tokens have nothing in common."""

from __future__ import annotations

import base64
import secrets

from hypothesis import given, settings
from hypothesis import strategies as st

from policy.gate import Mode
from tracker.links import HitToken, Links, OptOut

KEYS = {1: bytes(range(32)), 2: bytes(range(32, 64))}
LINKS = Links(KEYS, 1, "https://t.example")
JOBS = st.integers(0, (1 << 40) - 1)
MREFS = st.integers(-(1 << 63), (1 << 63) - 1)
SUBJECTS = st.integers(1, (1 << 63) - 1)
TAGS = st.binary(min_size=12, max_size=12)


def token_of(url: str) -> str:
    return url.rpartition("/")[2].removesuffix(".gif")


@given(JOBS, MREFS, SUBJECTS, st.sampled_from([Mode.DELIVERABILITY, Mode.INDIVIDUAL]))
def test_what_is_made_opens_under_its_own_purpose_only(job: int, mref: int, subject: int, mode: Mode) -> None:
    click = token_of(LINKS.click_base(job, mref, subject, mode))
    pixel = token_of(LINKS.pixel_url(job, mref, subject, mode))

    assert LINKS.open_hit("click", click) == LINKS.open_hit("open", pixel) == HitToken(job, mref, subject, mode)
    assert LINKS.open_hit("open", click) is None
    assert LINKS.open_hit("click", pixel) is None


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 255), TAGS)
def test_an_opt_out_opens_whatever_became_of_its_case(number: int, partition: int, tag: bytes) -> None:
    token = LINKS.optout_token(number, partition, tag)

    assert LINKS.open_optout(token) == LINKS.open_optout(token.swapcase()) == OptOut(number, partition, tag)


@given(st.text(max_size=80))
def test_no_text_is_a_token_or_an_exception(text: str) -> None:
    assert LINKS.open_hit("open", text) is None
    assert LINKS.open_hit("click", text) is None
    assert LINKS.open_optout(text) is None
    assert LINKS.open_job("view", text) is None


@given(JOBS, MREFS, SUBJECTS)
@settings(max_examples=15)
def test_every_flipped_bit_is_noticed(job: int, mref: int, subject: int) -> None:
    raw = base64.urlsafe_b64decode(token_of(LINKS.pixel_url(job, mref, subject, Mode.INDIVIDUAL)))
    for bit in range(len(raw) * 8):
        flipped = (int.from_bytes(raw, "big") ^ (1 << bit)).to_bytes(len(raw), "big")
        assert LINKS.open_hit("open", base64.urlsafe_b64encode(flipped).decode("ascii")) is None


def test_random_tokens_with_a_true_head_are_refused() -> None:
    """The hard half of "a million random tokens, none accepted": version and key id right, the rest by chance."""
    for _ in range(20_000):
        token = base64.urlsafe_b64encode(b"\x01\x01" + secrets.token_bytes(37)).decode("ascii")
        assert LINKS.open_hit("open", token) is None
        assert LINKS.open_hit("click", token) is None


@given(JOBS, MREFS, SUBJECTS)
def test_neighbours_share_no_bits_but_version_and_key(job: int, mref: int, subject: int) -> None:
    """Two recipients who differ in one bit: about half the bits differ, in every quarter of the token."""
    one = base64.urlsafe_b64decode(token_of(LINKS.click_base(job, mref, subject, Mode.INDIVIDUAL)))
    two = base64.urlsafe_b64decode(token_of(LINKS.click_base(job, mref ^ 1, subject, Mode.INDIVIDUAL)))

    assert one[:2] == two[:2]
    for start in (2, 11, 20, 29):
        pairs = zip(one[start : start + 9], two[start : start + 9], strict=True)
        assert sum((a ^ b).bit_count() for a, b in pairs) >= 12  # of 72: by chance below 1 in 10^9


@given(JOBS, MREFS, SUBJECTS, TAGS)
def test_a_token_holds_nothing_in_clear(job: int, mref: int, subject: int, tag: bytes) -> None:
    raw = base64.urlsafe_b64decode(token_of(LINKS.click_base(job, mref, subject, Mode.INDIVIDUAL)))
    optout = base64.b32decode(LINKS.optout_token(1, 1, tag).upper())

    assert mref.to_bytes(8, "big", signed=True) not in raw
    assert subject.to_bytes(8, "big") not in raw
    assert tag not in optout
