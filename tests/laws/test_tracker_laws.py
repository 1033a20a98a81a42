"""Laws of the tracker's boundary, whatever a peer sends."""

from __future__ import annotations

import http.client
import string
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy.events import Hit, Kind
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US
from tests.tracker.twins import CHOOSE, CLICK, LEAVE, PIXEL, House, house_in_thread
from tracker.answers import GIF
from tracker.links import safe_target
from tracker.pages import form_of, is_one_click
from tracker.recorder import cut
from tracker.visitors import Bursts, Clues, Visitor, classify

FIXTURE = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=80)
header_text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with house_in_thread() as opened:
        yield opened


def ask(house: House, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", house.port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@FIXTURE
@given(tail=visible, agent=header_text)
def test_every_pixel_is_the_same_43_bytes_under_the_same_headers(house: House, tail: str, agent: str) -> None:
    """The pixel is the same GIF with the same headers whatever the token: no cookie, no validator, no oracle."""
    good, good_body = ask(house, "GET", PIXEL, {"User-Agent": agent})
    other, other_body = ask(house, "GET", "/o/" + tail, {"User-Agent": agent, "Cookie": "a=b"})
    assert good.status == other.status == 200
    assert good_body == other_body == GIF
    good_headers, other_headers = dict(good.getheaders()), dict(other.getheaders())
    del good_headers["Date"], other_headers["Date"]
    assert good_headers == other_headers
    assert not {"set-cookie", "etag", "last-modified", "server"} & {name.lower() for name in other_headers}


@FIXTURE
@given(
    method=st.sampled_from(["GET", "HEAD", "OPTIONS", "TRACE", "DELETE", "PUT", "PATCH"]),
    path=st.sampled_from([LEAVE, CHOOSE]),
    query=visible,
    extra=st.dictionaries(
        st.sampled_from(["X-HTTP-Method-Override", "List-Unsubscribe", "Purpose", "Origin", "Cookie"]), header_text
    ),
)
def test_only_post_changes_anything(house: House, method: str, path: str, query: str, extra: dict[str, str]) -> None:
    """GET never changes state, nor does anything else but POST, whatever query and headers come with it."""
    extra.setdefault("X-HTTP-Method-Override", "POST")
    before = len(house.writer.deeds)
    ask(house, method, f"{path}?{query}", extra)
    assert len(house.writer.deeds) == before


@FIXTURE
@given(
    body=st.binary(max_size=300),
    kind=st.sampled_from(["application/x-www-form-urlencoded", "multipart/form-data", "x/y"]),
)
def test_every_post_with_a_good_token_opts_out_exactly_once(house: House, body: bytes, kind: str) -> None:
    """The token in the URL is all that counts: any body, any encoding, one deed, 200."""
    before = len(house.writer.deeds)
    response, _ = ask(house, "POST", LEAVE, {"Content-Type": kind}, body)
    assert response.status == 200
    assert len(house.writer.deeds) == before + 1


@FIXTURE
@given(tail=visible)
def test_a_redirect_never_leaves_the_jobs_own_table(house: House, tail: str) -> None:
    """No open redirect: Location is one of the job's links or there is none, and no body echoes the request."""
    for path in (f"{CLICK}/{tail}", f"/c/{tail}"):
        response, body = ask(house, "GET", path, {})
        target = response.getheader("Location")
        assert target is None or target.startswith("https://shop.example/item/")
        assert response.status in (302, 404)
        assert len(tail) < 12 or tail.encode() not in body


hosts = st.sampled_from(
    ["a.example", "A.EXAMPLE", "bücher.example", "a。b", "1.2.3.4", "[::1]", "", "a b", "evil@a", "x\\y"]
)
urls = st.one_of(
    st.text(max_size=60),
    st.builds(
        lambda scheme, host, rest: scheme + host + rest,
        st.sampled_from(["https://", "http://", "HTTP://", "//", "https:", "javascript:", " https://", "ftp://"]),
        hosts,
        st.text(st.characters(exclude_categories=()), max_size=20).map(lambda text: "/" + text) | st.just(""),
    ),
)


@settings(max_examples=1500, deadline=None)
@given(url=urls)
def test_a_target_is_plain_ascii_http_with_a_host_and_nobody_before_it(url: str) -> None:
    """Whatever stands in a link table, Location gets printable ASCII, http or https, a host, no user name."""
    target = safe_target(url)
    if target is None:
        return
    assert all("!" <= character <= "~" for character in target)
    assert "\\" not in target
    parts = urlsplit(target)
    assert parts.scheme in ("http", "https")
    assert parts.hostname
    assert "@" not in parts.netloc
    assert safe_target(target) == target


@settings(max_examples=1000)
@given(agent=st.text(max_size=200), flags=st.tuples(*[st.booleans()] * 4))
def test_every_request_gets_one_label(agent: str, flags: tuple[bool, bool, bool, bool]) -> None:
    """classify is total: any bytes as User-Agent, any combination of clues, one Visitor."""
    assert isinstance(classify(Clues(agent, *flags)), Visitor)


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(-(10**8), 10**8)), max_size=60),
    capacity=st.integers(1, 5),
)
def test_the_window_of_bursts_stays_within_its_capacity(steps: list[tuple[int, int, int]], capacity: int) -> None:
    """Memory is bounded whatever the clock does, and one or two links are never a burst."""
    bursts = Bursts(capacity)
    for mref, link, now in steps:
        seen = bursts.saw(1, mref, link, 10, now)
        assert len(bursts) <= capacity
        assert not seen or len({step[1] for step in steps}) >= Bursts.FEWEST


hits = st.builds(
    Hit,
    kind=st.sampled_from([Kind.OPENED, Kind.CLICKED]).map(int),
    job=st.integers(1, 2**40 - 1),
    mref=st.integers(-(2**63), 2**63 - 1),
    at=st.integers(0, 2**52),
    mode=st.sampled_from([Mode.AGGREGATE, Mode.DELIVERABILITY, Mode.INDIVIDUAL]).map(int),
    visitor=st.sampled_from(list(Visitor)).map(int),
    link=st.integers(-1, 500),
)


@given(hit=hits)
def test_a_mode_keeps_no_more_than_its_row_in_tracking_md_3_1(hit: Hit) -> None:
    """AGGREGATE: nobody and the day. DELIVERABILITY: the day of an open, no link, no visitor. INDIVIDUAL: the hour."""
    kept = cut(hit)
    assert kept == cut(kept)
    if hit.mode == Mode.AGGREGATE:
        assert (kept.mref, kept.at % DAY_US) == (0, 0)
    elif hit.mode == Mode.DELIVERABILITY:
        assert (kept.kind, kept.visitor, kept.link, kept.at % DAY_US) == (Kind.OPENED, 0, -1, 0)
    else:
        assert kept.at % HOUR_US == 0
    assert kept.at <= hit.at


@given(body=st.binary(max_size=400))
def test_bodies_are_read_without_failing(body: bytes) -> None:
    """A form is a list of fields or nothing, never an exception."""
    assert isinstance(form_of(body), list)
    assert isinstance(is_one_click(body), bool)


def test_the_alphabet_of_tokens_survives_a_path() -> None:
    """No character of a token is special in a URL path: what the composer writes is what the tracker reads."""
    allowed = set(string.ascii_letters + string.digits + "-_./")
    assert set(PIXEL + CLICK + LEAVE + CHOOSE) <= allowed
