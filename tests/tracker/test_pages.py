"""The endpoint contract (tracking.md 3.3), one-click opt-out (RFC 8058, mail-standards.md 2.4) and its failures."""

from __future__ import annotations

import asyncio
from datetime import date

import pytest
from aiohttp import web

from policy.classes import RetentionSettings
from policy.events import Kind
from policy.gate import Mode
from policy.instants import HOUR_US
from policy.pages import PagesSettings, Regulator, shown
from policy.subprocessors import Data, Subprocessor
from tests.tracker.twins import (
    CHOOSE,
    CLICK,
    JOB,
    LEAVE,
    LINKS,
    LIST,
    MREF,
    NOTICE,
    PARTITION,
    PIXEL,
    SENDER,
    SUBJECT,
    TAG,
    TARGETS,
    VIEW,
    House,
    open_house,
    path_of,
)
from tracker.answers import GIF, Answers
from tracker.links import safe_target
from tracker.visitors import Visitor

BROWSER = {"User-Agent": "Mozilla/5.0 (Windows NT 10.0) Firefox/121.0", "Accept-Language": "en"}
NEVER = ("Set-Cookie", "ETag", "Last-Modified", "Accept-CH", "Server", "Location")
DEED = ("opt_out", LIST, PARTITION, TAG, "opt-out link")


def flipped(path: str) -> str:
    """The same path with one bit of its token turned."""
    return path[:20] + ("A" if path[20] != "A" else "B") + path[21:]


# ---- the pixel


async def test_the_pixel_is_one_gif_with_exactly_these_headers(house: House) -> None:
    response, body = await house.ask("GET", PIXEL, headers=BROWSER)
    headers = {name: value for name, value in response.headers.items() if name != "Date"}
    assert (response.status, body) == (200, GIF)
    assert len(GIF) == 43
    assert headers == {
        "Content-Type": "image/gif",
        "Content-Length": "43",
        "Cache-Control": "no-store, no-cache, private, max-age=0",
        "Pragma": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "X-Robots-Tag": "noindex",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    (hit,) = await house.written()
    assert (hit.kind, hit.job, hit.mref, hit.mode, hit.visitor, hit.link) == (
        Kind.OPENED, JOB, MREF, Mode.INDIVIDUAL, Visitor.WINDOWS, -1,
    )  # fmt: skip
    assert hit.at == house.now - house.now % HOUR_US


@pytest.mark.parametrize(
    "path",
    [
        flipped(PIXEL),
        PIXEL[:-9],
        "/o/",
        "/o/x.gif",
        "/o/..%2f..%2fetc%2fpasswd",
        "/o/%00%ff%c0%ae.gif",
        "/o/" + "A" * 5000,
        CLICK.replace("/c/", "/o/") + ".gif",  # a token of another purpose
        path_of(LINKS.pixel_url(JOB + 1, MREF, SUBJECT, Mode.INDIVIDUAL)),
    ],
)
async def test_the_pixel_is_the_same_whatever_the_token(house: House, path: str) -> None:
    good, good_body = await house.ask("GET", PIXEL)
    other, other_body = await house.ask("GET", path)
    assert other.status == good.status == 200
    assert other_body == good_body
    good_headers, other_headers = dict(good.headers), dict(other.headers)
    good_headers.pop("Date"), other_headers.pop("Date")
    assert good_headers == other_headers


async def test_forged_pixels_leave_nothing(house: House) -> None:
    for path in (flipped(PIXEL), CLICK.replace("/c/", "/o/") + ".gif", "/o/x.gif"):
        await house.ask("GET", path)
    assert await house.written() == []
    assert house.tracker.pages.count["invalid_open"] == 3


async def test_head_answers_the_same_and_records_nothing(house: House) -> None:
    response, body = await house.ask("HEAD", PIXEL)
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", "43")
    response, _ = await house.ask("HEAD", CLICK + "/0")
    assert (response.status, response.headers["Location"]) == (302, TARGETS[0])
    assert await house.written() == []


async def test_the_pixel_survives_everything_behind_it(house: House) -> None:
    house.redis.down = house.source.down = house.writer.fail = True
    house.now = "not a time"  # type: ignore[assignment]  # a bug of ours, simulated
    response, body = await house.ask("GET", PIXEL)
    assert (response.status, body) == (200, GIF)
    assert house.tracker.pages.count["failures"] == 1
    house.now = 0


@pytest.mark.parametrize(
    ("headers", "visitor"),
    [
        ({"User-Agent": "Mozilla/5.0"}, Visitor.PROXY_APPLE),
        ({"User-Agent": "x (via ggpht.com GoogleImageProxy)"}, Visitor.PROXY_GMAIL),
        ({"User-Agent": "Mozilla/5.0 (X11)", "Purpose": "prefetch"}, Visitor.PREFETCH),
        ({"User-Agent": "curl/8", "Range": "bytes=0-9"}, Visitor.LIBRARY),
        ({"User-Agent": "<script>alert(1)</script>"}, Visitor.LIBRARY),
    ],
)
async def test_who_opened_is_one_small_number(house: House, headers: dict[str, str], visitor: Visitor) -> None:
    response, body = await house.ask("GET", PIXEL, headers=headers)
    assert (response.status, body) == (200, GIF)
    (hit,) = await house.written()
    assert hit.visitor == visitor


# ---- clicks


async def test_a_click_goes_where_the_jobs_own_table_says(house: House) -> None:
    response, body = await house.ask("GET", CLICK + "/4?url=https://evil.example", headers=BROWSER)
    assert (response.status, response.headers["Location"], body) == (302, TARGETS[4], b"")
    assert "no-store" in response.headers["Cache-Control"]
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert not [name for name in NEVER if name in response.headers and name != "Location"]
    (hit,) = await house.written()
    assert (hit.kind, hit.mref, hit.link, hit.visitor) == (Kind.CLICKED, MREF, 4, Visitor.WINDOWS)


@pytest.mark.parametrize(
    "path",
    [
        CLICK,
        CLICK + "/",
        CLICK + "/6",
        CLICK + "/-1",
        CLICK + "/00",
        CLICK + "/1/2",
        CLICK + "/%D9%A1",  # ARABIC-INDIC DIGIT ONE is a digit to Python
        CLICK + "/99999999999999999999",
        flipped(CLICK) + "/0",
        PIXEL.replace("/o/", "/c/").removesuffix(".gif") + "/0",
        path_of(LINKS.click_base(JOB + 1, MREF, SUBJECT, Mode.INDIVIDUAL)) + "/0",
        "/c/",
        "/c//evil.example/",
        "/c/https://evil.example/0",
        "/c/%0d%0aLocation:%20https://evil.example/0",
    ],
)
async def test_everything_else_is_one_404_that_echoes_nothing(house: House, path: str) -> None:
    response, body = await house.ask("GET", path)
    known, known_body = await house.ask("GET", "/c/x/0")
    assert response.status == known.status == 404
    assert body == known_body
    assert b"evil" not in body
    assert "Location" not in response.headers
    assert await house.written() == []


async def test_links_work_from_memory_when_sql_and_redis_are_away(house: House) -> None:
    await house.ask("GET", CLICK + "/1")
    house.redis.down = house.source.down = True
    response, _ = await house.ask("GET", CLICK + "/2")
    assert (response.status, response.headers["Location"]) == (302, TARGETS[2])
    other = path_of(LINKS.click_base(JOB + 1, MREF, SUBJECT, Mode.INDIVIDUAL))
    response, _ = await house.ask("GET", other + "/0")
    assert (response.status, response.headers["Retry-After"]) == (503, "30")


async def test_who_withdrew_is_sent_on_and_leaves_nothing(house: House) -> None:
    house.tracker.withdrawn._hear(SUBJECT, True)
    click, _ = await house.ask("GET", CLICK + "/0")
    pixel, _ = await house.ask("GET", PIXEL)
    assert (click.status, pixel.status) == (302, 200)
    assert await house.written() == []
    assert house.redis.hits() == []


@pytest.mark.parametrize("signal", [{"Sec-GPC": "1"}, {"DNT": "1"}])
async def test_who_objects_by_header_is_counted_and_forgotten(house: House, signal: dict[str, str]) -> None:
    await house.ask("GET", CLICK + "/0", headers={**BROWSER, **signal})
    (hit,) = await house.written()
    assert (hit.mode, hit.mref, hit.link) == (Mode.AGGREGATE, 0, 0)


async def test_anonymous_tokens_are_counted_once_and_carry_no_message(house: House) -> None:
    pixel = path_of(LINKS.pixel_url(JOB, MREF, SUBJECT, Mode.AGGREGATE))
    for _ in range(3):
        await house.ask("GET", pixel)
    (hit,) = await house.written()
    assert (hit.mref, hit.mode) == (0, Mode.AGGREGATE)


async def test_following_every_link_at_once_is_a_machine(house: House) -> None:
    for number in range(6):
        await house.ask("GET", f"{CLICK}/{number}", headers={"User-Agent": "Mozilla/5.0 (Windows NT 10.0)"})
    labels = [hit.visitor for hit in await house.written()]
    assert labels[:4] == [Visitor.WINDOWS] * 4
    assert labels[4:] == [Visitor.MACHINE] * 2


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://a.example", "https://a.example"),
        ("HTTP://A.Example:8080/x?y=%20z#f", "HTTP://A.Example:8080/x?y=%20z#f"),
        (" https://a.example/a b/ü?q=é ", "https://a.example/a%20b/%C3%BC?q=%C3%A9"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://a。example/", "https://a.example/"),
        ("https://[2001:db8::1]:8443/x", "https://[2001:db8::1]:8443/x"),
        ("https://a.example/?to=https://b.example/@x", "https://a.example/?to=https://b.example/@x"),
        ("//evil.example", None),
        ("/relative", None),
        ("https:evil.example", None),
        ("https:/evil.example", None),
        ("https:///evil.example", None),
        ("javascript:alert(1)", None),
        ("data:text/html,x", None),
        ("ftp://a.example/", None),
        ("https://good.example@evil.example/", None),
        ("https://good.example\\@evil.example/", None),
        ("https://a.example\\.evil.example/", None),
        ("https://a.example/\r\nSet-Cookie: x=1", None),
        ("https://a.example/\tx", None),
        ("ht\ntps://a.example/", None),
        ("https://a.example/\u2028", None),
        ("https://a.example/\ud800", None),
        ("https://a example/", None),
        ("https://a.example:99999999/", None),
        ("https://" + "a" * 9000, None),
        ("", None),
    ],
)
def test_redirects_go_to_plain_web_addresses_only(url: str, target: str | None) -> None:
    assert safe_target(url) == target


# ---- leaving a list


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_looking_at_the_opt_out_page_changes_nothing(house: House, method: str) -> None:
    for path in (LEAVE, CHOOSE, LEAVE + "?List-Unsubscribe=One-Click", CHOOSE + "?choice=list"):
        response, _ = await house.ask(method, path, headers={"Purpose": "prefetch"})
        assert response.status == (204 if method == "OPTIONS" else 200)
    assert house.writer.deeds == []


async def test_the_page_has_one_button_and_asks_for_nothing(house: House) -> None:
    response, body = await house.ask("GET", LEAVE)
    page = body.decode()
    assert page.count("<button") == 1
    assert 'method="post"' in page
    assert "<script" not in page
    assert "Weekly seeds" in page
    assert "Ada&#39;s &lt;Garden&gt;" in page
    assert "Grace Officer" in page
    assert "privacy@platform.example" in page
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert not [name for name in NEVER if name in response.headers]


@pytest.mark.parametrize(
    "body",
    [
        {"data": b"List-Unsubscribe=One-Click", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {
            "data": b'--b\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--b--\r\n',
            "headers": {"Content-Type": "multipart/form-data; boundary=b"},
        },
        {"data": b"List-Unsubscribe=One-Click", "headers": {"Origin": "https://evil.example", "Cookie": "a=b"}},
    ],
    ids=["urlencoded", "multipart", "foreign origin"],
)
async def test_one_click_is_done_and_answered_in_one_short_line(house: House, body: dict[str, object]) -> None:
    response, answer = await house.ask("POST", LEAVE, **body)
    assert (response.status, answer) == (200, b"Unsubscribed.\n")
    assert house.writer.deeds == [DEED]
    assert not [name for name in NEVER if name in response.headers]


@pytest.mark.parametrize("data", [b"", b"choice=list", b"\xff\x00garbage", b"List-Unsubscribe=Maybe"])
async def test_any_other_post_has_the_same_effect_and_a_page(house: House, data: bytes) -> None:
    response, answer = await house.ask("POST", LEAVE, data=data)
    assert response.status == 200
    assert b"You are unsubscribed" in answer
    assert house.writer.deeds == [DEED]


async def test_a_repeat_is_harmless_and_works_in_capitals(house: House) -> None:
    for path in (LEAVE, LEAVE, "/u/" + LEAVE.removeprefix("/u/").upper()):
        response, _ = await house.ask("POST", path, data=b"List-Unsubscribe=One-Click")
        assert response.status == 200
    assert house.writer.deeds == [DEED] * 3


async def test_no_200_without_durability(house: House) -> None:
    house.writer.fail = True
    for path, data in ((LEAVE, b"List-Unsubscribe=One-Click"), (LEAVE, b""), (CHOOSE, b"choice=list")):
        response, body = await house.ask("POST", path, data=data)
        assert (response.status, response.headers["Retry-After"]) == (503, "30")
        assert b"unsubscribed" not in body
    assert house.tracker.pages.count["not_durable"] == 3


async def test_a_writer_that_hangs_is_a_503_in_time() -> None:
    async with open_house(writer_seconds=0.05) as house:
        house.writer.hang = True
        async with asyncio.timeout(5):
            response, _ = await house.ask("POST", LEAVE, data=b"List-Unsubscribe=One-Click")
        assert response.status == 503


async def test_opting_out_needs_neither_sql_nor_redis_here(house: House) -> None:
    house.source.down = house.redis.down = True
    response, body = await house.ask("GET", LEAVE)
    assert response.status == 200
    assert b"<button" in body
    response, _ = await house.ask("POST", LEAVE, data=b"")
    assert response.status == 200
    assert house.writer.deeds == [DEED]


async def test_a_huge_or_broken_body_does_not_undo_the_deed() -> None:
    async with open_house(body_bytes=1024) as house:
        response, _ = await house.ask("POST", LEAVE, data=b"x" * 100_000)
        assert response.status == 200
        assert house.writer.deeds == [DEED]


@pytest.mark.parametrize("path", [flipped(LEAVE), "/u/", "/u/x", "/u/../p/x", LEAVE[:-1]])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_token_that_opens_to_nothing_gets_the_page_for_doing_it_by_hand(
    house: House, method: str, path: str
) -> None:
    response, body = await house.ask(method, path)
    assert response.status == 200
    assert b"Nothing was changed" in body
    assert house.writer.deeds == []


async def test_a_pasted_link_leads_to_the_page_with_the_button_and_no_further(house: House) -> None:
    token = LEAVE.removeprefix("/u/")
    pasted = {"code": f" <https://mail.example/u/{token}> "}
    response, body = await house.ask("POST", "/u/", data=pasted)
    assert response.status == 200
    assert token.encode() in body
    assert b"<button" in body
    assert house.writer.deeds == []
    response, body = await house.ask("POST", "/u/", data={"code": "a" * 56})
    assert b"Nothing was changed" in body


# ---- about a message


async def test_the_web_version_is_caged(house: House) -> None:
    response, body = await house.ask("GET", VIEW)
    assert (response.status, body) == (200, b"<h1>Seeds</h1><script>alert(1)</script>")
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox ")
    assert "allow-scripts" not in policy
    assert "allow-same-origin" not in policy
    assert "default-src 'none'" in policy


async def test_the_notice_names_sender_officer_modes_and_rights(house: House) -> None:
    response, body = await house.ask("GET", NOTICE)
    page = body.decode()
    assert response.status == 200
    assert "1 Bed Lane" in page
    assert 'href="https://garden.example/"' in page
    assert 'href="javascript:' not in page
    assert "in which hour" in page
    assert "anonymous count" in page
    assert "complain" in page


def text_of(response: web.Response) -> str:
    assert isinstance(response.body, bytes)
    return response.body.decode()


def test_the_notice_shows_what_only_the_operator_can_give_and_the_periods_in_force() -> None:
    """P-06, P-52; docs/privacy.md: empty slots leave no trace, and nothing stands in a page unescaped."""
    sender = {"sender": SENDER, "opens": "x", "clicks": "y"}
    bare = text_of(Answers("O", "o@example.org", retry_after=1).page("notice.html", **sender))
    assert "for example" not in bare
    assert "on the sender" not in bare
    pages = PagesSettings(
        operator="Mail & Sons, Graz",
        cookies="https://example.org/c?a=1&b=2",
        terms="https://example.org/terms",
        regulators={"dsb": Regulator(name="DSB <1>", page="https://dsb.example/"), "opc": Regulator(name="OPC")},
    )
    told = shown(pages, RetentionSettings.model_validate({"r3": "60 days"}))
    answers = Answers("O", "o@example.org", retry_after=1, shown=told)
    page = text_of(answers.page("notice.html", **sender))
    assert "Mail &amp; Sons, Graz" in page
    assert '<a href="https://dsb.example/" rel="noreferrer noopener">DSB &lt;1&gt;</a>' in page
    assert "<li>OPC</li>" in page
    assert "60 days, counted from: day of the event" in page
    link = '<a href="https://example.org/c?a=1&amp;b=2" rel="noreferrer noopener">Cookies</a>'
    assert link in page
    assert link in text_of(answers.page("preferences.html", token="t", sender=None, nothing_chosen=False))
    assert "terms" not in page


def test_the_notice_names_who_works_for_us_and_from_when_on() -> None:
    """P-35: also before the first day, which is how people hear of a change."""
    sender = {"sender": SENDER, "opens": "x", "clicks": "y"}
    bare = text_of(Answers("O", "o@example.org", retry_after=1).page("notice.html", **sender))
    assert "Who works with it" not in bare
    relay = Subprocessor(
        name="Relay & Co", country="IE", purpose="delivers <mail>", hosts=["smtp.relay.example"],
        data=[Data.ADDRESS], agreement=date(2026, 1, 15), since=date(2027, 2, 1), safeguard="standard clauses",
    )  # fmt: skip
    told = shown(PagesSettings(), RetentionSettings(), {"relay": relay})
    page = text_of(Answers("O", "o@example.org", retry_after=1, shown=told).page("notice.html", **sender))
    assert "<dt>Relay &amp; Co (IE)</dt><dd>delivers &lt;mail&gt;, from 2027-02-01 on; standard clauses</dd>" in page
    assert "relay.example" not in page


async def test_pages_of_unknown_jobs_are_not_there(house: House) -> None:
    for path in (flipped(VIEW), path_of(LINKS.view_url(999)), path_of(LINKS.notice_url(999)), "/v/", "/nothing"):
        response, _ = await house.ask("GET", path)
        assert response.status == 404


async def test_pages_about_a_message_say_later_when_sql_is_away(house: House) -> None:
    house.source.down = True
    for path in (VIEW, NOTICE):
        response, _ = await house.ask("GET", path)
        assert (response.status, response.headers["Retry-After"]) == (503, "30")
    assert house.tracker.pages.count["failures"] == 0


@pytest.mark.parametrize(
    ("method", "path"), [("POST", PIXEL), ("POST", CLICK + "/0"), ("PUT", LEAVE), ("DELETE", CHOOSE), ("POST", VIEW)]
)
async def test_other_methods_are_refused_without_effect(house: House, method: str, path: str) -> None:
    response, _ = await house.ask(method, path, data=b"List-Unsubscribe=One-Click")
    assert response.status == 405
    assert "GET" in response.headers["Allow"]
    assert house.writer.deeds == []
    assert not [name for name in NEVER if name in response.headers]


async def test_health_is_not_said_before_the_negative_list_is_known(house: House) -> None:
    response, body = await house.ask("GET", "/healthz")
    assert (response.status, body) == (200, b"ok\n")
    house.tracker.withdrawn._loaded_at = None
    response, _ = await house.ask("GET", "/healthz")
    assert response.status == 503
