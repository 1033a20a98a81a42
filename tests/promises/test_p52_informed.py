"""P-52: a campaign says who sends it, from where, how to leave and what is kept; no template can forget it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from engine.message import Campaign, Program, compile_campaign
from policy.gate import Mode
from tests.engine.test_message_compose import page, read, somebody
from tests.promises.marks import promise
from tests.tracker.twins import NOTICE, SENDER, open_house
from tracker.pages import MODE_WORDS

BARE = Campaign(
    subject="Hello {{ first_name }}", from_address="news@shop.example", html="<p>Hello {{ first_name }}</p>",
    fields=frozenset({"first_name"}), list_id="weekly.shop.example", list_label="Weekly",
    account_name="Shop of Examples", postal_address="1 Market Street, Exampleton",
    notice_url="https://track.shop.example/n/abcdef",
)  # fmt: skip


def _forgetful(campaign: Campaign, visible: set[str], source: str | None) -> list[str]:
    return []


@promise("P-52", off={"engine.message.acceptance._wanted": _forgetful})
@pytest.mark.parametrize("part", ["html", "text"])
def test_p52_the_footer_has_identity_address_unsubscribe_choices_and_notice(part: str) -> None:
    """A template without any of it, rendered for somebody."""
    program = compile_campaign(BARE)
    assert isinstance(program, Program)
    message = read(program, somebody(program))
    body = message.get_body(("plain",))
    assert body is not None
    text = page(message) if part == "html" else str(body.get_content())
    for wanted in ("Shop of Examples", "1 Market Street", "/u/", "/p/", "https://track.shop.example/n/abcdef"):
        assert wanted in text, wanted


@promise("P-52", off={"engine.message.acceptance._head_problems": lambda campaign: []})
@pytest.mark.parametrize(
    ("bad", "path"),
    [(replace(BARE, postal_address=""), "postal_address"), (replace(BARE, list_id=""), "list")],
    ids=["no address", "no way out"],
)
def test_p52_a_campaign_without_address_or_way_out_is_refused(bad: Campaign, path: str) -> None:
    told = compile_campaign(bad)
    assert isinstance(told, list)
    assert {problem.path for problem in told} == {path}


@promise("P-52", off={"tracker.pages.MODE_WORDS": defaultdict(str)})
async def test_p52_the_notice_says_who_decides_what_is_tracked_for_how_long_and_which_rights() -> None:
    async with open_house() as house:
        response, body = await house.ask("GET", NOTICE)
        text = body.decode()
        assert response.status == 200
        for wanted in (
            "Ada&#39;s &lt;Garden&gt;", "1 Bed Lane", "who decides why and how", "is deleted by fixed dates",
            "see, correct, move and erase", "complain", "privacy@platform.example",
        ):  # fmt: skip
            assert wanted in text, wanted
        assert SENDER.opens is Mode.INDIVIDUAL
        assert MODE_WORDS[SENDER.opens]
        assert "in which hour" in text
        assert "nobody can tell that it was you" in text
