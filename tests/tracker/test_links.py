"""Both ends of the link format: what goes in comes out, under its own purpose and no other."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.address import tag_of
from policy.gate import Mode
from policy.keys import Keyring
from tracker.links import Base32, HitToken, Links, OptOut

KEY = bytes(range(32))
TAG = bytes(range(100, 112))
URL = "https://track.example"


@pytest.fixture
def links() -> Links:
    return Links({1: KEY}, 1, URL + "/")


def click_token(links: Links, job: int, mref: int, subject: int, mode: Mode) -> str:
    return links.click_base(job, mref, subject, mode).removeprefix(f"{URL}/c/")


def pixel_token(links: Links, job: int, mref: int, subject: int, mode: Mode) -> str:
    return links.pixel_url(job, mref, subject, mode).removeprefix(f"{URL}/o/").removesuffix(".gif")


@pytest.mark.parametrize("mode", [Mode.INDIVIDUAL, Mode.DELIVERABILITY])
@pytest.mark.parametrize("mref", [0, 1, -1, -(1 << 63), (1 << 63) - 1])
def test_a_click_says_who_and_how(links: Links, mode: Mode, mref: int) -> None:
    token = click_token(links, (1 << 40) - 1, mref, (1 << 63) - 1, mode)

    assert links.open_hit("click", token) == HitToken((1 << 40) - 1, mref, (1 << 63) - 1, mode)
    assert links.open_hit("open", token) is None


def test_a_pixel_is_not_a_click(links: Links) -> None:
    token = pixel_token(links, 7, -5, 99, Mode.INDIVIDUAL)

    assert links.open_hit("open", token) == HitToken(7, -5, 99, Mode.INDIVIDUAL)
    assert links.open_hit("click", token) is None


def test_an_aggregate_hit_names_nobody(links: Links) -> None:
    hit = links.open_hit("open", pixel_token(links, 7, 12345, 99, Mode.AGGREGATE))

    assert hit is not None
    assert (hit.job, hit.subject, hit.mode) == (7, 0, Mode.AGGREGATE)
    assert hit.mref != 12345
    other = links.open_hit("open", pixel_token(links, 7, 12346, 99, Mode.AGGREGATE))
    assert other is not None
    assert other.mref != hit.mref


def test_tracking_that_is_off_has_no_token(links: Links) -> None:
    with pytest.raises(ValueError, match="OFF"):
        links.click_base(1, 1, 1, Mode.OFF)
    with pytest.raises(ValueError, match="subject"):
        links.pixel_url(1, 1, 0, Mode.INDIVIDUAL)
    with pytest.raises(ValueError, match="subject"):
        links.pixel_url(1, 1, 1 << 63, Mode.INDIVIDUAL)


def test_an_opt_out_needs_no_look_up(links: Links) -> None:
    token = links.optout_url(3, 63, TAG).removeprefix(f"{URL}/u/")

    assert links.open_optout(token) == OptOut(3, 63, TAG)
    assert links.open_optout(token.upper()) == OptOut(3, 63, TAG)  # some servers fold the case of a local part
    assert links.preferences_url(3, 63, TAG) == f"{URL}/p/{token}"
    mailto = links.optout_mailto(3, 63, TAG, "bounce.example")
    assert mailto == f"u+{token}@bounce.example"
    assert len(mailto.partition("@")[0]) <= 64
    assert re.fullmatch(r"[a-z2-7]{56}", token)


def test_the_public_pages_of_a_job(links: Links) -> None:
    assert links.view_url(77).startswith(f"{URL}/v/")
    token = links.notice_url(77).removeprefix(f"{URL}/n/")

    assert links.open_job("notice", token) == 77
    assert links.open_job("view", token) == 77
    assert links.open_hit("open", token) is None
    assert links.open_optout(token) is None


def test_old_keys_still_open(links: Links) -> None:
    newer = Links({1: KEY, 2: bytes(reversed(KEY))}, 2, URL)
    token = click_token(links, 1, 2, 3, Mode.INDIVIDUAL)

    assert newer.open_hit("click", token) == HitToken(1, 2, 3, Mode.INDIVIDUAL)
    fresh = click_token(newer, 1, 2, 3, Mode.INDIVIDUAL)
    assert fresh != token
    assert links.open_hit("click", fresh) is None


def test_the_key_id_is_under_the_tag(links: Links) -> None:
    """Both ids hold the same key: a token moved to the other id must not open."""
    twin = Links({1: KEY, 2: KEY}, 2, URL)
    moved = "AQE" + click_token(twin, 1, 2, 3, Mode.INDIVIDUAL)[3:]

    assert twin.open_hit("click", moved) is None


def test_the_format_never_changes(links: Links) -> None:
    """Delivered mail holds these: a change here breaks every link ever sent (design section 5)."""
    assert click_token(links, 5, -7, 99, Mode.INDIVIDUAL) == "AQHS09CYoS7Mu1LYUrw09ldoDm6nS14MuBKfdlcWa_1WMpXRZQRv"
    assert pixel_token(links, 5, -7, 99, Mode.DELIVERABILITY) == "AQFm0p97b0bS_tbXWD6U2KD2FHigI8kR3Uq8N9oCRNGLVjlFraIo"
    assert pixel_token(links, 5, -7, 99, Mode.AGGREGATE) == "AQHw8vd4NRoHxuVwq7A1pBbloYiqegTrkXai07dXpgCI3ihDzwid"
    assert links.optout_token(3, 2, TAG) == "aeau33vwj4nbhla65saonumlfe4n5esaa4l7vunellzycb4a2d2n64po"
    assert links.job_token(5) == "AQFZhrST4KgFDVT0qp_-6P4WtzRdWtU"


@pytest.mark.parametrize("token", ["", "a", "=" * 52, "é" * 52, "\x00" * 56, "A" * 52, "a" * 56, "A" * 31, "//" * 26])
def test_garbage_is_none(links: Links, token: str) -> None:
    assert links.open_hit("open", token) is None
    assert links.open_hit("click", token) is None
    assert links.open_optout(token) is None
    assert links.open_job("view", token) is None


def test_a_job_token_has_one_spelling(links: Links) -> None:
    """31 characters have two spare bits: the three other spellings of the same bytes are refused."""
    token = links.job_token(5)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = [token[:-1] + character for character in alphabet if character != token[-1]]

    assert [links.open_job("view", other) for other in others] == [None] * 63


def test_keys_are_checked_and_not_shown() -> None:
    with pytest.raises(ValueError, match="current"):
        Links({1: KEY}, 2, URL)
    with pytest.raises(ValueError, match="16 to 64"):
        Links({1: b"short"}, 1, URL)
    with pytest.raises(ValueError, match="0 to 255"):
        Links({256: KEY}, 256, URL)
    assert KEY.hex() not in repr(Links({1: KEY}, 1, URL))


@given(st.sampled_from([5, 25, 35]), st.data())
def test_base32_is_the_librarys(octets: int, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=octets, max_size=octets))

    assert Base32(octets)(raw) == base64.b32encode(raw).decode("ascii").lower()


def test_an_opt_out_of_before_a_new_pepper_is_heard_under_todays_tag() -> None:
    """Delivered mail keeps the tag of its day for years; the number of its token key tells which peppers made it."""
    peppers, masters = [bytes([n]) * 32 for n in (1, 2)], {1: b"a" * 32, 2: b"b" * 32}
    key = bytes(32)
    ring = Keyring(
        pepper=b"".join(peppers), token=masters, token_id=2, return_path={1: key}, return_path_id=1, queue={1: key},
        queue_id=1, kek={1: key}, kek_id=1, service=key, intake=key, lane=key, pepper_ids=(1, 2),
    )  # fmt: skip
    old, new = tag_of(peppers[0], "bob@one.example"), tag_of(ring.pepper, "bob@one.example")
    sent = Links({1: masters[1]}, 1, "https://t.example").optout_token(7, 3, old)
    today = Links(masters, 2, "https://t.example", ring.heard)
    assert today.open_optout(sent) == OptOut(7, 3, new)
    assert today.open_optout(today.optout_token(7, 3, new)) == OptOut(7, 3, new)
