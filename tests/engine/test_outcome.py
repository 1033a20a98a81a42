"""What a verdict means: digits decide about trying again, classes about who backs off."""

from __future__ import annotations

import pytest

from engine.delivery.outcome import LONGEST_WAIT, Scope, asked_wait, judge, judge_connection
from engine.queue.pace import Tone
from engine.smtp.reply import Reply
from engine.smtp.words import Closed, Fate, Step, Trouble, Verdict
from policy.events import Kind, Reason


def reply(text: str) -> Reply:
    return Reply(int(text[:3]), (text[4:].encode(),))


def verdict(text: str, step: Step = Step.RCPT) -> Verdict:
    made = reply(text)
    fate = Fate.DELIVERED if made.code < 300 else Fate.DEFERRED if made.code < 500 else Fate.REJECTED
    return Verdict(fate, step, made)


@pytest.mark.parametrize(
    ("text", "kind", "reason", "scope", "tone", "hard"),
    [
        ("250 2.0.0 queued", Kind.DELIVERED, Reason.NONE, Scope.RECIPIENT, Tone.ACCEPTED, False),
        ("550 5.1.1 no such user", Kind.BOUNCED, Reason.USER_UNKNOWN, Scope.RECIPIENT, Tone.NEUTRAL, True),
        ("450 4.1.1 user unknown", Kind.DEFERRED, Reason.RECIPIENT_REJECTED, Scope.RECIPIENT, Tone.NEUTRAL, False),
        ("552 5.2.2 mailbox full", Kind.BOUNCED, Reason.MAILBOX_FULL, Scope.RECIPIENT, Tone.NEUTRAL, False),
        ("450 4.2.0 greylisted", Kind.DEFERRED, Reason.GREYLISTED, Scope.RECIPIENT, Tone.NEUTRAL, False),
        ("421 4.7.28 unusual rate of mail", Kind.DEFERRED, Reason.RATE_LIMITED, Scope.SITE, Tone.SLOWER, False),
        ("421 bye", Kind.DEFERRED, Reason.SYSTEM_TROUBLE, Scope.SITE, Tone.SLOWER, False),
        ("451 4.3.0 local problem", Kind.DEFERRED, Reason.SYSTEM_TROUBLE, Scope.SITE, Tone.SLOWER, False),
        ("554 5.7.1 blocked using Spamhaus", Kind.BOUNCED, Reason.SPAM_BLOCK, Scope.SITE, Tone.BLOCKED, False),
        ("550 5.7.26 DMARC", Kind.BOUNCED, Reason.AUTHENTICATION, Scope.MESSAGE, Tone.NEUTRAL, False),
        (
            "554 5.7.1 message looks like spam",
            Kind.BOUNCED,
            Reason.CONTENT_REJECTED,
            Scope.MESSAGE,
            Tone.NEUTRAL,
            False,
        ),
        ("552 too many recipients", Kind.DEFERRED, Reason.TOO_MANY_RECIPIENTS, Scope.SITE, Tone.SLOWER, False),
        (
            "530 5.7.4 Must issue a STARTTLS command first",
            Kind.DEFERRED,
            Reason.TLS,
            Scope.SITE,
            Tone.UNREACHABLE,
            False,
        ),
        ("502 5.5.2 not implemented", Kind.DEFERRED, Reason.PROTOCOL, Scope.SITE, Tone.UNREACHABLE, False),
        ("554 5.3.0 internal error", Kind.BOUNCED, Reason.SYSTEM_TROUBLE, Scope.SITE, Tone.NEUTRAL, False),
    ],
)
def test_replies(text: str, kind: Kind, reason: Reason, scope: Scope, tone: Tone, hard: bool) -> None:
    outcome = judge(verdict(text))
    assert (outcome.kind, outcome.reason, outcome.scope, outcome.tone, outcome.hard) == (
        kind,
        reason,
        scope,
        tone,
        hard,
    )
    assert outcome.retry is (kind is Kind.DEFERRED)
    assert outcome.recorded
    assert outcome.code == int(text[:3])


def test_the_first_digit_decides_whatever_the_enhanced_code_says() -> None:
    assert judge(verdict("451 5.1.1 no such user")).kind is Kind.DEFERRED
    assert not judge(verdict("451 5.1.1 no such user")).hard
    assert judge(verdict("554 4.2.1 later")).kind is Kind.BOUNCED
    for code in range(400, 500):
        assert judge(verdict(f"{code} x")).retry
    for code in set(range(500, 600)) - {502, 503}:
        assert judge(verdict(f"{code} x")).kind is Kind.BOUNCED


def test_in_doubt() -> None:
    doubt = Verdict(Fate.UNKNOWN, Step.BODY, None, Trouble.LOST)
    held, again = judge(doubt), judge(doubt, resend=True)
    assert (held.kind, held.retry, held.resend) == (Kind.UNKNOWN, False, False)
    assert (again.kind, again.retry, again.resend) == (Kind.DEFERRED, True, True)
    assert not held.hard


@pytest.mark.parametrize("trouble", list(Trouble))
def test_every_trouble_is_judged(trouble: Trouble) -> None:
    deferred = judge(Verdict(Fate.DEFERRED, Step.MAIL, None, trouble))
    assert (deferred.kind, deferred.hard) == (Kind.DEFERRED, False)
    ended = judge_connection(Closed(trouble, Step.GREETING, None, "some words"))
    assert (ended.kind, ended.scope, ended.hard) == (Kind.DEFERRED, ended.scope, False)
    assert trouble is Trouble.LEFT or ended.rule


def test_not_tried_is_not_recorded_and_says_nothing_about_the_pace() -> None:
    outcome = judge(Verdict(Fate.DEFERRED, Step.MAIL, None, Trouble.LOST, tried=False))
    assert (outcome.recorded, outcome.tone) == (False, Tone.NEUTRAL)


@pytest.mark.parametrize(
    ("trouble", "reason", "enhanced"),
    [
        (Trouble.TOO_LARGE, Reason.MESSAGE_TOO_LARGE, "5.3.4"),
        (Trouble.NEEDS_SMTPUTF8, Reason.NEEDS_SMTPUTF8, "5.6.7"),
        (Trouble.NEEDS_8BITMIME, Reason.CONTENT_REJECTED, "5.6.3"),
    ],
)
def test_what_we_refuse_ourselves(trouble: Trouble, reason: Reason, enhanced: str) -> None:
    outcome = judge(Verdict(Fate.REJECTED, Step.MAIL, None, trouble))
    assert (outcome.kind, outcome.reason, outcome.enhanced, outcome.hard) == (Kind.BOUNCED, reason, enhanced, False)


def test_bad_sequence_is_about_the_conversation() -> None:
    outcome = judge(Verdict(Fate.DEFERRED, Step.MAIL, reply("503 5.5.1 nested MAIL"), Trouble.DESYNC))
    assert (outcome.kind, outcome.reason, outcome.scope, outcome.code) == (
        Kind.DEFERRED,
        Reason.PROTOCOL,
        Scope.SITE,
        503,
    )


def test_out_of_step_words_are_kept_but_not_believed() -> None:
    outcome = judge(Verdict(Fate.DEFERRED, Step.MAIL, reply("503 5.1.1 no such user"), Trouble.DESYNC))
    assert (outcome.reason, outcome.hard, outcome.text) == (Reason.PROTOCOL, False, "no such user")


def test_a_refused_greeting_is_nobodys_bounce() -> None:
    outcome = judge_connection(Closed(Trouble.REFUSED, Step.GREETING, reply("554 5.7.1 blocked, poor reputation")))
    assert (outcome.kind, outcome.scope, outcome.tone, outcome.hard) == (Kind.DEFERRED, Scope.SITE, Tone.BLOCKED, False)
    strange = judge_connection(Closed(Trouble.REFUSED, Step.GREETING, reply("554 5.1.1 no such user")))
    assert (strange.kind, strange.scope, strange.hard) == (Kind.DEFERRED, Scope.SITE, False)


def test_words_of_a_stranger_are_printable() -> None:
    outcome = judge(Verdict(Fate.REJECTED, Step.RCPT, Reply(550, (b"5.1.1 \x1b[2J\r\x00 no",))))
    assert outcome.text.isprintable()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("greylisted, try again in 300 seconds", 300.0),
        ("Try again after 5 minutes", 300.0),
        ("please retry in 1 hour", 3600.0),
        ("come back in 60s", 60.0),
        ("try again in 999999 hours", LONGEST_WAIT),
        ("try again later", 0.0),
        ("deferred, see http://example.com/421", 0.0),
        ("", 0.0),
    ],
)
def test_the_wait_a_peer_asks_for(text: str, seconds: float) -> None:
    assert asked_wait(text) == seconds
    assert judge(verdict(f"451 4.7.1 {text}")).wait == seconds
