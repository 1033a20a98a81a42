"""P-47: a link to somebody else's page tells them nothing: no token, no identifier, no referrer."""

from __future__ import annotations

from typing import Any

import pytest

from engine.message import Campaign, compile_campaign
from tests.promises.marks import promise
from tests.tracker.twins import CLICK, TARGETS, open_house

TOKEN = CLICK.rpartition("/")[2]
LINKED = Campaign(
    subject="Hello", from_address="news@shop.example", html="<p>x</p>", fields=frozenset({"email", "code"}),
    list_id="weekly.shop.example", postal_address="1 Market Street", notice_url="https://t.example/n/x",
)  # fmt: skip


@promise("P-47", off={"tracker.answers._ALWAYS": {}})
async def test_p47_a_click_sends_no_referrer_along() -> None:
    async with open_house() as house:
        response, _ = await house.ask("GET", f"{CLICK}/0")
        assert response.status == 302
        assert response.headers.get("Referrer-Policy") == "no-referrer"


def _with_token(target: str) -> Any:
    from aiohttp import web

    return web.Response(status=302, headers={"Location": f"{target}&sp={TOKEN}", "Referrer-Policy": "no-referrer"})


@promise("P-47", off={"tracker.pages.redirect": _with_token})
async def test_p47_the_destination_gets_its_own_address_and_nothing_of_ours() -> None:
    """Also where the visitor adds a query of their own: nothing is passed on."""
    async with open_house() as house:
        for number, target in enumerate(TARGETS):
            response, body = await house.ask("GET", f"{CLICK}/{number}?utm_source=x&to=https://evil.example")
            assert response.headers["Location"] == target
            assert TOKEN not in str(response.headers)
            assert TOKEN.encode() not in body


@promise("P-47", off={"engine.message.rewrite.looks_like_address": lambda *asked: False})
@pytest.mark.parametrize("href", ["https://shop.example/?who={{ email }}", "https://shop.example/{{ email|lower }}"])
def test_p47_a_destination_with_the_address_merged_in_is_refused(href: str) -> None:
    from dataclasses import replace

    told = compile_campaign(replace(LINKED, html=f'<p><a href="{href}">Shop</a></p>'))
    assert isinstance(told, list)
    assert any(problem.path == "html" for problem in told)
    fine = compile_campaign(replace(LINKED, html='<p><a href="https://shop.example/?c={{ code }}">Shop</a></p>'))
    assert not isinstance(fine, list)
