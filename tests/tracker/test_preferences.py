"""The preference page: three choices, POST only, confirmed when durable and not before."""

from __future__ import annotations

import pytest

from policy.suppression import Scope
from policy.wire import SuppressionRecord
from tests.tracker.twins import CHOOSE, LIST, PARTITION, TAG, House

LEFT = ("opt_out", LIST, PARTITION, TAG, "preference page")
LEFT_ACCOUNT = ("suppress", SuppressionRecord(TAG, PARTITION, Scope.ACCOUNT, 11, "opt-out", "preference page"))
SILENT = [("withdraw", 11, TAG, "open_tracking"), ("withdraw", 11, TAG, "click_tracking")]


async def test_the_form_is_plain_and_accessible(house: House) -> None:
    response, body = await house.ask("GET", CHOOSE)
    page = body.decode()
    assert response.status == 200
    assert page.count('type="checkbox"') == 3
    assert page.count("<label") == 3
    assert "<legend>" in page
    assert 'lang="en"' in page
    assert "checked" not in page
    assert "<script" not in page
    assert house.writer.deeds == []


@pytest.mark.parametrize(
    ("fields", "deeds"),
    [
        ("choice=list", [LEFT]),
        ("choice=account", [LEFT_ACCOUNT]),
        ("choice=tracking", SILENT),
        ("choice=tracking&choice=account&choice=list", [LEFT, LEFT_ACCOUNT, *SILENT]),
        ("choice=list&choice=list&choice=unheard-of&x=y", [LEFT]),
    ],
)
async def test_each_choice_does_its_deed(house: House, fields: str, deeds: list[tuple[object, ...]]) -> None:
    response, body = await house.ask("POST", CHOOSE, data=fields)
    assert response.status == 200
    assert b"Your choices are saved" in body
    assert house.writer.deeds == deeds


async def test_nothing_chosen_is_said_and_nothing_done(house: House) -> None:
    for fields in (b"", b"choice=unheard-of", b"\xff\xfe", b"&" * 1000):
        response, body = await house.ask("POST", CHOOSE, data=fields)
        assert response.status == 200
        assert b"Nothing was chosen" in body
    assert house.writer.deeds == []


async def test_a_choice_that_is_not_durable_is_a_503(house: House) -> None:
    house.writer.fail = True
    for choice in ("list", "account", "tracking"):
        response, body = await house.ask("POST", CHOOSE, data={"choice": choice})
        assert response.status == 503
        assert "Retry-After" in response.headers
        assert b"saved" not in body


async def test_without_sql_the_list_can_be_left_and_the_rest_waits(house: House) -> None:
    house.source.down = True
    response, _ = await house.ask("POST", CHOOSE, data={"choice": "list"})
    assert response.status == 200
    response, _ = await house.ask("POST", CHOOSE, data={"choice": "account"})
    assert response.status == 503
    assert house.writer.deeds == [LEFT]


async def test_a_forged_token_and_a_huge_form_do_nothing(house: House) -> None:
    response, body = await house.ask("POST", CHOOSE[:-1] + "a1", data={"choice": "list"})
    assert response.status == 200
    assert b"Nothing was changed" in body
    response, _ = await house.ask("POST", CHOOSE, data=b"choice=list&" + b"x" * 1_000_000)
    assert response.status == 413
    assert house.writer.deeds == []
