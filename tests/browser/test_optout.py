"""The opt-out and preference pages in a real browser with JavaScript off: what a person sees and presses.

Debian's Chromium (apt-get install chromium, or chromium-headless-shell) through playwright; fails when it is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from tests.tracker.twins import CHOOSE, LEAVE, LIST, NOTICE, PARTITION, PIXEL, TAG, VIEW, House, house_in_thread

pytestmark = pytest.mark.debian


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with house_in_thread() as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    assert binary, "install Debian's chromium or chromium-headless-shell to run the tests marked debian"
    with sync_playwright() as playwright:
        # no sandbox: the tests may run as root in a container; everything it opens is ours
        opened = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


@pytest.fixture
def page(browser: Browser, house: House) -> Iterator[Page]:
    house.writer.deeds.clear()
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    try:
        yield opened
        assert context.cookies() == []
        assert problems == []  # the style sheet's hash is right, nothing is blocked by our own policy
    finally:
        context.close()


def test_leaving_a_list_takes_one_press(page: Page, house: House) -> None:
    page.goto(house.base + LEAVE)
    assert page.get_by_role("heading", level=1).inner_text() == "Unsubscribe from Weekly seeds?"
    assert house.writer.deeds == []
    page.get_by_role("button", name="Unsubscribe").click()
    assert page.get_by_role("heading", level=1).inner_text() == "You are unsubscribed"
    assert house.writer.deeds == [("opt_out", LIST, PARTITION, TAG, "opt-out link")]


def test_the_button_is_reached_and_pressed_by_keyboard(page: Page, house: House) -> None:
    page.goto(house.base + LEAVE)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You are unsubscribed")
    assert len(house.writer.deeds) == 1


def test_choices_are_found_by_their_labels_and_saved(page: Page, house: House) -> None:
    page.goto(house.base + LEAVE)
    page.get_by_role("link", name="All choices").click()
    page.get_by_label("Do not record whether I open").check()
    page.get_by_label("at all").check()
    page.get_by_role("button", name="Save").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Your choices are saved"
    assert [deed[0] for deed in house.writer.deeds] == ["suppress", "withdraw", "withdraw"]


def test_saving_nothing_says_so(page: Page, house: House) -> None:
    page.goto(house.base + CHOOSE)
    page.get_by_role("button", name="Save").click()
    assert "Nothing was chosen" in page.get_by_role("alert").inner_text()
    assert house.writer.deeds == []


def test_a_cut_link_can_be_pasted_by_hand(page: Page, house: House) -> None:
    page.goto(house.base + LEAVE[:-5])
    page.get_by_label("Copy the whole").fill(f"https://mail.example{LEAVE}")
    page.get_by_role("button", name="Go on").click()
    assert house.writer.deeds == []
    page.get_by_role("button", name="Unsubscribe").click()
    assert len(house.writer.deeds) == 1


@pytest.mark.parametrize("path", [LEAVE, CHOOSE, NOTICE, "/"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_styled_and_fit_a_small_telephone(browser: Browser, house: House, path: str, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    try:
        page = context.new_page()
        page.goto(house.base + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        assert page.evaluate("getComputedStyle(document.querySelector('main')).borderRadius") == "12px"
        assert page.evaluate("document.querySelectorAll('h1').length") == 1
        assert page.evaluate("document.documentElement.lang") == "en"
    finally:
        context.close()


def test_the_pixel_is_an_image_of_one_pixel_and_the_web_version_runs_no_script(browser: Browser, house: House) -> None:
    context = browser.new_context()
    try:
        page = context.new_page()
        said: list[str] = []

        def hear(dialog: Dialog) -> None:
            said.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", hear)
        page.goto(house.base + VIEW)
        assert page.get_by_role("heading").inner_text() == "Seeds"
        assert said == []  # <script>alert(1)</script> stands in that page
        page.goto(house.base + PIXEL)
        assert page.evaluate("[document.images[0].naturalWidth, document.images[0].naturalHeight]") == [1, 1]
        assert context.cookies() == []
    finally:
        context.close()
