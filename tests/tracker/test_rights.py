"""Rights pages: a button that proves, a form that asks, and the same words to everybody."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import pytest

from policy.wire import WireError, WriterUnavailable
from tests.tracker.twins import LINKS, House, MemoryRedis, MemorySource, MemoryWriter, until
from tracker.app import Tracker
from tracker.rights import KINDS

TOKEN = "A" * 42 + "E"


class Desk:
    """The writer's side; `error` is what it says."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    async def call(self, op: str, **kwargs: Any) -> Any:
        self.calls.append((op, kwargs))
        if self.error is not None:
            raise self.error
        return None


class Office(House):
    """The tracker's house with a desk for rights."""

    def __init__(self, desk: Desk | None) -> None:
        super().__init__()
        self.desk = desk
        self.spare = self.tracker
        self.writer, self.source, self.redis = MemoryWriter(), MemorySource(), MemoryRedis()
        self.tracker = Tracker(
            self.settings,
            links=LINKS,
            source=self.source,
            redis=cast(Any, self.redis),
            writer=self.writer,
            officer=("Grace Officer", "privacy@platform.example"),
            rights=desk,
        )


@contextlib.asynccontextmanager
async def an_office(desk: Desk | None) -> AsyncIterator[Office]:
    office = Office(desk)
    await office.spare.stop()
    office.port = await office.tracker.start()
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client:
        office.client = client
        try:
            await until(office.tracker.withdrawn.is_loaded)
            yield office
        finally:
            await office.tracker.stop()


@pytest.fixture
async def desk() -> Desk:
    return Desk()


@pytest.fixture
async def office(desk: Desk) -> AsyncIterator[Office]:
    async with an_office(desk) as opened:
        yield opened


async def test_P15_looking_does_nothing_and_the_button_proves(office: Office, desk: Desk) -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        response, body = await office.ask(method, f"/r/{TOKEN}")
        assert response.status in (200, 204)
        assert "Set-Cookie" not in response.headers
        assert TOKEN.encode() not in body  # not in the page, so not in a saved copy of it
    assert desk.calls == []
    response, body = await office.ask("GET", f"/r/{TOKEN}")
    assert b'<form method="post">' in body
    assert b"<script" not in body
    assert response.headers["Referrer-Policy"] == "no-referrer"
    response, body = await office.ask("POST", f"/r/{TOKEN}")
    assert response.status == 200
    assert desk.calls == [("rights_confirm", {"token": TOKEN})]


async def test_every_token_gets_the_same_answer(office: Office, desk: Desk) -> None:
    asked = [await office.ask("GET", f"/r/{name}") for name in (TOKEN, "B" * 43, "", "x/y", "%00", "é")]
    said = [await office.ask("POST", f"/r/{name}") for name in (TOKEN, "B" * 43, "", "x/y", "%00", "é")]
    assert len({body for _, body in asked}) == 1
    assert len({body for _, body in said}) == 1
    assert {response.status for response, _ in asked + said} == {200}
    assert [call[1]["token"] for call in desk.calls] == [TOKEN, "B" * 43]


async def test_what_is_not_committed_is_a_503(office: Office, desk: Desk) -> None:
    desk.error = WriterUnavailable("away")
    for path, form in ((f"/r/{TOKEN}", {}), ("/r", {"kind": "access", "address": "ada@example.org"})):
        response, body = await office.ask("POST", path, data=form)
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert b"Thank you" not in body


async def test_P53_anybody_can_ask_without_an_account(office: Office, desk: Desk) -> None:
    response, body = await office.ask("GET", "/r")
    assert response.status == 200
    assert body.count(b'type="radio"') == len(KINDS)
    assert b"<script" not in body
    response, body = await office.ask("POST", "/r", data={"kind": "erasure", "address": " ada@example.org "})
    assert response.status == 200
    assert b"We have your request" in body
    assert b"ada" not in body
    assert desk.calls == [("rights_open", {"kind": "erasure", "address": "ada@example.org", "channel": "page"})]


@pytest.mark.parametrize(
    "form",
    [{}, {"kind": "revenge", "address": "ada@example.org"}, {"kind": "access"}, {"kind": "access", "address": "a"}],
)
async def test_a_form_that_says_too_little_is_shown_again(office: Office, desk: Desk, form: dict[str, str]) -> None:
    response, body = await office.ask("POST", "/r", data=form)
    assert response.status == 200
    assert b'role="alert"' in body
    assert desk.calls == []


async def test_what_is_no_address_is_said_and_a_full_hour_is_a_503(office: Office, desk: Desk) -> None:
    form = {"kind": "access", "address": "not an address"}
    desk.error = WireError("refused", "not a deliverable address")
    response, body = await office.ask("POST", "/r", data=form)
    assert (response.status, b'role="alert"' in body) == (200, True)
    desk.error = WireError("busy", "too many")
    response, _ = await office.ask("POST", "/r", data=form)
    assert response.status == 503


async def test_a_huge_form_does_nothing(office: Office, desk: Desk) -> None:
    response, _ = await office.ask("POST", "/r", data=b"kind=access&address=" + b"x" * 1_000_000)
    assert response.status == 413
    assert desk.calls == []


async def test_without_a_desk_nobody_is_told_that_it_is_done() -> None:
    async with an_office(None) as office:
        for path, form in ((f"/r/{TOKEN}", {}), ("/r", {"kind": "access", "address": "ada@example.org"})):
            response, _ = await office.ask("POST", path, data=form)
            assert response.status == 503
