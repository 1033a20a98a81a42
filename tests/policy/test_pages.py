"""Slots of the operator's own pages, and the periods beside them: nothing invented, nothing that leads elsewhere."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from policy import inventory
from policy.classes import RetentionSettings
from policy.pages import NOTHING, PagesSettings, Shown, shown

KEPT = RetentionSettings()


def test_what_is_empty_is_left_out() -> None:
    told = shown(PagesSettings(), KEPT)
    assert (told.operator, told.links, told.regulators) == ("", (), ())
    assert Shown() == NOTHING
    one = shown(PagesSettings(cookies="https://example.org/cookies"), KEPT)
    assert one.links == (("Cookies", "https://example.org/cookies"),)


def test_a_recipient_sees_no_page_that_is_for_account_holders() -> None:
    every = {name: f"https://example.org/{name}" for name in PagesSettings.model_fields if name not in
             ("operator", "regulators")}  # fmt: skip
    told = shown(PagesSettings.model_validate(every), KEPT)
    assert {address.rpartition("/")[2] for _, address in told.links} == set(every) - {"terms", "processing"}


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "data:text/html,x", "//example.org/x", "example.org", "https://", "ftp://example.org/",
     "https://user@example.org/", "https://user:word@example.org/", "https://[::1", " https://example.org"],
)  # fmt: skip
def test_an_address_that_may_not_stand_in_a_page_is_refused(address: str) -> None:
    for name in ("privacy", "terms"):
        with pytest.raises(ValidationError):
            PagesSettings.model_validate({name: address})
    with pytest.raises(ValidationError):
        PagesSettings.model_validate({"regulators": {"one": {"name": "One", "page": address}}})


def test_authorities_keep_their_order_and_need_a_name() -> None:
    told = {"dsb": {"name": "Datenschutzbeh\u00f6rde"}, "opc": {"name": "OPC", "reach": "Gatineau"}}
    assert [one.name for one in shown(PagesSettings.model_validate({"regulators": told}), KEPT).regulators] == [
        "Datenschutzbeh\u00f6rde", "OPC",
    ]  # fmt: skip
    with pytest.raises(ValidationError):
        PagesSettings.model_validate({"regulators": {"x": {"page": "https://example.org/"}}})
    with pytest.raises(ValidationError):
        PagesSettings.model_validate({"imprint": "https://example.org/"})


def test_p06_periods_are_those_of_the_sweeper() -> None:
    shorter = RetentionSettings.model_validate({"r2": "12 months"})
    said = dict(shown(PagesSettings(), shorter).kept)
    assert len(said) == 4
    rows = {row.name: row for row in inventory.table(shorter.periods())}
    for name in ("R2", "R3", "R4", "R5"):
        content = rows[name].content
        words = said[content[0].upper() + content[1:]]
        assert words.startswith(f"{rows[name].period}, counted" if name != "R5" else rows[name].trigger)
    assert any(words.startswith("12 months") for words in said.values())
