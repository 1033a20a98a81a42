"""P-09, P-13, P-26: a visit is cut down before anything is written, tells no two days apart, and sets no cookie."""

from __future__ import annotations

import logging
import struct
from typing import Any

import pytest
from aiohttp import web

from policy import schema
from policy.events import Hit, Kind
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US
from policy.keyspace import HITS
from tests.promises.marks import promise
from tests.tracker.test_app import get, raw
from tests.tracker.test_with_policy import Street, street
from tests.tracker.twins import (
    CHOOSE,
    CLICK,
    JOB,
    LEAVE,
    LINKS,
    LIST,
    MREF,
    NOTICE,
    PIXEL,
    SUBJECT,
    VIEW,
    House,
    open_house,
    path_of,
)
from tests.world.octets import octets
from tracker.answers import GIF
from tracker.recorder import Replays

__all__ = ["street"]

HEADERS = {
    "Cookie": "session=c00kie-marker",
    "X-Forwarded-For": "203.0.113.77, 198.51.100.9",
    "Forwarded": "for=203.0.113.77",
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/121.0 " + "agent-marker " * 40,
    "Referer": "https://webmail.example/inbox?user=ada.lovelace",
    "Accept-Language": "de-AT-marker",
}
RAW = (
    b"c00kie-marker", b"203.0.113.77", b"198.51.100.9", b"agent-marker", b"Gecko", b"Firefox", b"lovelace",
    b"webmail.example", b"de-AT", b"127.0.0.1",
)  # fmt: skip


@promise("P-09", off={"tracker.recorder.cut": lambda hit: hit})
async def test_p09_of_a_visit_only_its_hour_kind_and_family_are_written() -> None:
    """What goes to Redis, byte for byte: no raw value of the request, and of its time the hour."""
    async with open_house() as house:
        house.now += 61_234_567
        for path in (PIXEL, f"{CLICK}/0"):
            await house.ask("GET", path + "?email=ada.lovelace%40one.example", headers=HEADERS)
        [opened, clicked] = await house.written()
        assert [hit.at for hit in (opened, clicked)] == [house.now - house.now % HOUR_US] * 2
        assert (opened.mref, clicked.link) == (MREF, 0)
        written = b"".join(value for _, fields in house.redis.streams[HITS] for value in fields.values())
        assert written
        assert [needle for needle in RAW if needle in written] == []


@promise("P-09", off={"tracker.recorder.cut": lambda hit: hit})
async def test_p09_nothing_raw_is_in_database_redis_files_or_logs(
    street: Street, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The acceptance test as it stands: a visit with everything a browser tells, then a search through all there is:
    SQL and its log, Redis, its append-only file and its log of slow commands, every other file, every log line."""
    caplog.set_level(logging.DEBUG)
    exact = street.world.clock()
    monkeypatch.setattr(street.tracker.pages, "_clock", lambda: exact)
    before = len(await street.rows(schema.hit))
    for url in (street.pixel(), street.click(1)):
        status, _ = await street.ask("GET", url + "?email=ada.lovelace%40one.example", headers=HEADERS)
        assert status in (200, 302)
    assert len(await street.rows(schema.hit)) == before + 2
    folder, redis = street.world.settings.data_dir, street.world.redis
    places = {
        str(path.relative_to(folder)): octets(path)
        for path in folder.rglob("*")
        if path.is_file() and "keys" not in path.parts
    }
    assert any(name.endswith(".incr.aof") for name in places)
    assert "policy.db" in places
    async for key in redis.scan_iter():
        places[f"redis {key!r}"] = await redis.dump(key) or b""
    places["slow commands"] = repr(await redis.slowlog_get(1000)).encode()
    places["log"] = "\n".join(record.getMessage() for record in caplog.records).encode()
    needles = [*(needle for needle in RAW if needle != b"127.0.0.1"), struct.pack(">q", exact)]  # its conf names that
    assert [(name, needle) for name, data in places.items() for needle in needles if needle in data] == []


class _Talkative:
    """aiohttp as it comes: it names the peer and quotes the request."""

    log_exception = web.RequestHandler.log_exception
    handle_error = web.RequestHandler.handle_error


@promise(
    "P-09",
    off={
        "tracker.app._Connection.log_exception": _Talkative.log_exception,
        "tracker.app._Connection.handle_error": _Talkative.handle_error,
    },
)
async def test_p09_no_log_line_holds_anything_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    lines = [f"{name}: {value[:200]}" for name, value in HEADERS.items()]
    async with open_house() as house:
        for path in (PIXEL, f"{CLICK}/0", LEAVE, "/x"):
            assert await raw(house.port, get(path + "?email=ada.lovelace%40one.example", *lines))
        broken = b"GET /o/203.0.113.77?email=lovelace HTTP/1.1\r\nHost: a\r\nHost: b\r\n"
        assert await raw(house.port, broken + "\r\n".join([*lines, "", ""]).encode())
    told = "\n".join(record.getMessage() + str(record.exc_info) for record in caplog.records).encode()
    assert [needle for needle in RAW if needle in told] == []


def _key_for_ever(replays: Any, day: int) -> None:
    replays._before, replays._now, replays._day = replays._now, bytearray(len(replays._now)), day


@promise("P-13", off={"tracker.recorder.Replays._turn": _key_for_ever})
def test_p13_the_same_visitor_has_another_unique_key_each_day_and_old_salts_are_gone() -> None:
    """The only thing here that is kept to count somebody once: the mark of an anonymous token."""
    first_key = b"salt of the first day at 16 B.."
    replays = Replays(first_key)
    keys, marks = set(), []
    for day in range(1, 4):
        replays.seen(Hit(Kind.OPENED, JOB, MREF, (20_000 + day) * DAY_US, Mode.AGGREGATE, 0))
        keys.add(replays._key)
        marks.append(bytes(replays._now))
    assert len(keys) == 3, "a salt a day"
    assert len(set(marks)) == 3, "unique keys of one visitor differ"
    kept = {value for value in vars(replays).values() if isinstance(value, bytes)}
    assert first_key not in kept
    assert len(kept) <= 2, "today's and the one before"
    assert bytes(replays._before) != marks[0] != bytes(replays._now)


def _unrolled(hit: Hit) -> Hit:
    return Hit(hit.kind, hit.job, hit.mref, hit.at - hit.at % HOUR_US, hit.mode, hit.visitor, hit.link)


@promise("P-13", off={"tracker.recorder.cut": _unrolled})
async def test_p13_anonymous_figures_say_neither_who_nor_when_of_a_day() -> None:
    async with open_house() as house:
        url = path_of(LINKS.pixel_url(JOB, MREF, SUBJECT, Mode.AGGREGATE))
        house.now += 5 * HOUR_US
        await house.ask("GET", url)
        [hit] = await house.written()
        assert (hit.mref, hit.at % DAY_US) == (0, 0)


# --- no cookies -----------------------------------------------------------------------------------------------------


def _recognising() -> web.Response:
    """As a framework's session middleware and a static file handler would answer."""
    answer = web.Response(body=GIF, headers={"Content-Type": "image/gif", "ETag": '"visitor-7"'})
    answer.set_cookie("visitor", "7")
    return answer


def _remembering(target: str) -> web.Response:
    answer = web.Response(status=302, headers={"Location": target, "Last-Modified": "Thu, 01 Jan 1970 00:00:07 GMT"})
    answer.set_cookie("visitor", "7")
    return answer


IDENTIFYING = ("Set-Cookie", "Set-Cookie2", "ETag", "Last-Modified", "Accept-CH", "Expect-CT", "Report-To", "NEL")


async def _asked(house: House, path: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for method in ("GET", "HEAD", "POST"):
        response, _ = await house.ask(method, path, headers=HEADERS)
        names |= dict(response.headers)
    return names


@promise("P-26", off={"tracker.pages.pixel": _recognising, "tracker.pages.redirect": _remembering})
async def test_p26_no_answer_sets_a_cookie_or_a_validator() -> None:
    async with open_house() as house:
        for path in (PIXEL, f"{CLICK}/0", LEAVE, CHOOSE, VIEW, NOTICE, "/r", "/nothing"):
            told = await _asked(house, path)
            assert [name for name in IDENTIFYING if name in told] == [], path
        for path in (PIXEL, f"{CLICK}/0"):
            response, _ = await house.ask("GET", path, headers={"If-None-Match": '"visitor-7"'})
            assert response.status in (200, 302), "nobody is known again by what a cache kept"


async def _tells_them_apart(room: Any, request: web.Request) -> web.Response:
    known = room._links.open_hit("open", request.match_info["token"].removesuffix(".gif"))
    return web.Response(body=GIF, headers={"Content-Type": "image/gif"}) if known else web.Response(status=404)


@promise("P-26", off={"tracker.pages.Pages.open": _tells_them_apart})
async def test_p26_a_pixel_is_the_same_for_every_token() -> None:
    """Valid, of every mode, of a list, cut, forged: status, body and headers do not tell which."""
    async with open_house() as house:
        tokens = [LINKS.pixel_url(JOB, MREF, SUBJECT, mode) for mode in (Mode.AGGREGATE, Mode.INDIVIDUAL)]
        paths = [
            *map(path_of, tokens),
            PIXEL,
            PIXEL[:-9] + ".gif",
            "/o/x.gif",
            "/o/" + LINKS.optout_token(LIST, 5, b"t" * 12),
        ]
        answers = []
        for path in paths:
            response, body = await house.ask("GET", path)
            headers = {name: value for name, value in response.headers.items() if name != "Date"}
            answers.append((response.status, body, headers))
        assert answers == [answers[0]] * len(paths)
        assert answers[0][:2] == (200, GIF)
