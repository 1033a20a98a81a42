"""Visitor classes: the rules are their examples, the score is the table of tracking.md 3.2."""

from __future__ import annotations

import pytest

from tracker.visitors import RULES, Bursts, Clues, Visitor, classify, family

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:121.0) Gecko/20100101 Firefox/121.0"


@pytest.mark.parametrize(("visitor", "agent"), [(rule.visitor, example) for rule in RULES for example in rule.examples])
def test_every_example_is_matched_by_its_own_rule(visitor: Visitor, agent: str) -> None:
    assert family(agent) is visitor


def test_every_rule_has_an_example_and_lower_case_words() -> None:
    for rule in RULES:
        assert rule.examples
        assert all(word == word.lower() and len(word) >= 3 for word in rule.contains)


def test_the_numbers_fit_the_ledger_and_the_groups_do_not_overlap() -> None:
    assert all(0 <= visitor <= 63 for visitor in Visitor)
    assert len(set(Visitor)) <= 64
    assert not any(visitor.is_machine and visitor.is_likely_human for visitor in Visitor)
    assert not Visitor.PROXY_APPLE.is_likely_human  # Mail Privacy Protection is no engagement
    assert not Visitor.PROXY_APPLE.is_machine


@pytest.mark.parametrize(
    ("clues", "visitor"),
    [
        (Clues("Mozilla/5.0", is_click=False), Visitor.PROXY_APPLE),
        (Clues("Mozilla/5.0", is_click=True), Visitor.LIBRARY),
        (Clues("", is_click=False), Visitor.NAMELESS),
        (Clues("   ", is_click=True), Visitor.NAMELESS),
        (Clues("nothing anybody knows", is_click=False), Visitor.LIBRARY),
        (Clues("Mozilla/5.0 (Amiga)", is_click=False), Visitor.BROWSER),
        (Clues(FIREFOX, is_click=False), Visitor.LINUX),
        (Clues(FIREFOX, is_click=True, has_manners=True), Visitor.LINUX),
        (Clues(FIREFOX, is_click=True, has_manners=False), Visitor.LINUX),  # 2 points: not enough for suspicion
        (Clues(FIREFOX, is_click=True, has_manners=True, is_burst=True), Visitor.SUSPECT),
        (Clues(FIREFOX, is_click=True, is_burst=True), Visitor.MACHINE),
        (Clues(FIREFOX, is_click=True, is_prefetch=True), Visitor.PREFETCH),
        (Clues("(via ggpht.com GoogleImageProxy)", is_click=True), Visitor.SCANNER),
        (Clues("curl/8.5.0", is_click=True), Visitor.LIBRARY),
    ],
)
def test_the_label_of_a_hit(clues: Clues, visitor: Visitor) -> None:
    assert classify(clues) is visitor


def test_a_burst_is_most_of_the_links_within_thirty_seconds() -> None:
    bursts = Bursts()
    seen = [bursts.saw(1, 2, link, 5, 1_000_000 * link) for link in range(5)]
    assert seen == [False, False, False, True, True]  # four of five are 80 %


def test_slow_readers_and_short_mails_are_no_burst() -> None:
    bursts = Bursts()
    assert not any(bursts.saw(1, 2, link, 5, 31_000_000 * link) for link in range(5))
    assert not any(bursts.saw(1, 3, link, 2, 0) for link in range(2))
    assert not any(bursts.saw(1, 4, 0, 5, n) for n in range(10))  # one link again and again


def test_the_window_forgets_and_stays_small() -> None:
    bursts = Bursts(capacity=10)
    for message in range(100):
        bursts.saw(1, message, 0, 5, 0)
    assert len(bursts) <= 10
    bursts.saw(1, 1000, 0, 5, 31_000_000)
    assert len(bursts) == 1
    assert not bursts.saw(1, 1000, 1, 5, 0)  # the clock jumped back: begins anew, does not fail
