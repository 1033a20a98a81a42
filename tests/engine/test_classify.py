"""The judgement is the samples: every shipped rule decides its own examples, and living people stay written to."""

from __future__ import annotations

import time

import pytest

from engine.bounce.classify import Rule, RuleError, classify, classify_line, read, rules
from policy.events import Reason

EXAMPLES = [(rule, example) for rule in rules() for example in rule.examples]


@pytest.mark.parametrize(("rule", "example"), EXAMPLES, ids=[f"{rule.name}: {text[:30]}" for rule, text in EXAMPLES])
def test_every_rule_decides_its_own_examples(rule: Rule, example: str) -> None:
    judged = classify_line(example)
    assert judged.rule == rule.name
    assert (judged.reason, judged.hard) == (rule.reason, rule.hard)


def test_hard_is_only_about_mailboxes_and_domains_that_do_not_exist() -> None:
    dead = {Reason.USER_UNKNOWN, Reason.BAD_DOMAIN, Reason.NULL_MX}
    assert {rule.reason for rule in rules() if rule.hard} <= dead
    assert all(rule.codes and all(code.startswith("5") for code in rule.codes) for rule in rules() if rule.hard)


LIVING = [
    "550 Unknown user user@docomo.example.ne.jp",
    "550 5.7.1 <user@sfr.example>: Recipient address rejected: User unknown",
    "550 5.2.1 <user@example.jp>... User Unknown",
    "552 5.2.2 <user@example.net>: Recipient address rejected: Mailbox full",
    "550 5.7.1 Your IP is blacklisted; no such user may be written to from there",
    "550 5.1.1 Service unavailable; Client host [192.0.2.1] blocked using Spamhaus",
    "554 5.7.1 <user@example.org>: Relay access denied",
    "450 4.1.1 <user@example.org>: Recipient address rejected: User unknown (greylisted)",
    "421 4.1.1 user unknown",
    "550 5.1.8 Sender address rejected: domain not found",
    "554 5.7.1 spam: unknown user behaviour",
    "550 5.7.26 DMARC: no such domain policy",
    "554",
    "550",
    "",
]


@pytest.mark.parametrize("reply", LIVING)
def test_the_living_are_not_buried(reply: str) -> None:
    assert not classify_line(reply).hard


DEAD = [
    ("550 5.1.1 The email account that you tried to reach does not exist", Reason.USER_UNKNOWN),
    ("550-5.1.1 gone\n550 5.1.1 no such user", Reason.USER_UNKNOWN),
    ("550 5.1.2 no such domain", Reason.BAD_DOMAIN),
    ("550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup", Reason.USER_UNKNOWN),
    ("556 5.1.10 nullMX", Reason.NULL_MX),
    ("553 sorry, no mailbox here by that name (#5.1.1)", Reason.USER_UNKNOWN),
]


@pytest.mark.parametrize(("reply", "reason"), DEAD)
def test_the_dead_are_known(reply: str, reason: Reason) -> None:
    judged = classify_line(reply)
    assert (judged.reason, judged.hard) == (reason, True)


def test_an_address_is_not_a_word() -> None:
    """The text is judged without addresses: people are called spam@, user.unknown@ and full.mailbox@."""
    judged = classify(550, "5.2.2", "<spam.virus@relay-access-denied.example>: over quota")
    assert judged.reason is Reason.MAILBOX_FULL


def test_anything_is_judged_and_fast() -> None:
    hostile = [
        "x" * 100_000,
        "mailbox " * 20_000,
        "a@" * 50_000,
        "user \0\x1b" * 1000,
        "(((((" * 1000,
        "domain does not " * 5000,
    ]
    started = time.process_time()
    for text in hostile:
        assert classify(550, "", text).reason in Reason
    assert time.process_time() - started < 1.0  # about 20 ms: text is cut and no pattern backtracks far


GOOD = '[[rule]]\nname = "a"\nreason = "policy"\nexamples = ["550 x"]\n'


@pytest.mark.parametrize(
    "source",
    [
        GOOD + GOOD,
        GOOD.replace('name = "a"\n', ""),
        GOOD.replace("policy", "nonsense"),
        GOOD.replace('["550 x"]', "[]"),
        GOOD + "colour = 3\n",
        GOOD + "text = '('\n",
    ],
)
def test_a_rule_that_is_wrong_is_refused(source: str) -> None:
    assert len(read(GOOD)) == 1
    with pytest.raises(RuleError):
        read(source)
