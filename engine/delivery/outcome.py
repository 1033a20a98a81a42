"""What a verdict means for the recipient, the campaign and the site: one value, no clock, no I/O.

Law: the first digit decides whether to try again (S-03), with four exceptions that are written where they stand; the
class (`engine.bounce.classify`) decides who backs off; only `Outcome.hard` may lead to suppression, and nothing that
is about us (block lists, authentication, protocol, TLS) is ever hard. Exactly one `Outcome` a verdict.

Scope (style principle 6): SITE, the peer or the way to it: its pace eases, other messages there would meet the same;
MESSAGE, this content or campaign; RECIPIENT, this address alone.
"""

from __future__ import annotations

import enum
import functools
import re

import msgspec

from engine.bounce.classify import Judgement, classify
from engine.queue.pace import Tone
from engine.smtp.reply import Reply
from engine.smtp.words import Closed, Fate, Step, Trouble, Verdict
from policy.events import Kind, Reason


class Scope(enum.Enum):
    """Who is meant, and so who backs off."""

    SITE = "site"
    MESSAGE = "message"
    RECIPIENT = "recipient"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """kind: DELIVERED, BOUNCED, DEFERRED (try again) or UNKNOWN. tone: what it says to the site's pace.

    recorded: the try counts as an attempt; False means the peer was never asked: hand it out again at once.
    resend: the retry is the one extra copy that `resend` allows after the in-doubt window (T8).
    hard: the mailbox or its domain is surely dead: suppress. wait: seconds the peer asked for, 0.0 if it did not.
    code and enhanced: of the reply, 0 and "". text: the peer's words, printable, for the sealed note only: it may hold
    the address. rule: which judgement, for logs.
    """

    kind: Kind
    reason: Reason = Reason.NONE
    scope: Scope = Scope.RECIPIENT
    tone: Tone = Tone.NEUTRAL
    hard: bool = False
    recorded: bool = True
    resend: bool = False
    wait: float = 0.0
    code: int = 0
    enhanced: str = ""
    text: str = ""
    rule: str = ""

    @property
    def retry(self) -> bool:
        return self.kind is Kind.DEFERRED


_SCOPES = {
    Reason.USER_UNKNOWN: Scope.RECIPIENT,
    Reason.BAD_DOMAIN: Scope.RECIPIENT,
    Reason.NULL_MX: Scope.RECIPIENT,
    Reason.INACTIVE_MAILBOX: Scope.RECIPIENT,
    Reason.MAILBOX_FULL: Scope.RECIPIENT,
    Reason.RECIPIENT_REJECTED: Scope.RECIPIENT,
    Reason.GREYLISTED: Scope.RECIPIENT,
    Reason.NEEDS_SMTPUTF8: Scope.RECIPIENT,
    Reason.RELAY_DENIED: Scope.RECIPIENT,
    Reason.TOO_MANY_RECIPIENTS: Scope.SITE,
    Reason.MESSAGE_TOO_LARGE: Scope.MESSAGE,
    Reason.CONTENT_REJECTED: Scope.MESSAGE,
    Reason.AUTHENTICATION: Scope.MESSAGE,  # our From domain: pause it, never suppress (mail-standards 2.5)
    Reason.POLICY: Scope.MESSAGE,
    Reason.SPAM_BLOCK: Scope.SITE,
    Reason.RATE_LIMITED: Scope.SITE,
    Reason.SYSTEM_TROUBLE: Scope.SITE,
    Reason.NETWORK: Scope.SITE,
    Reason.DNS: Scope.SITE,
    Reason.TLS: Scope.SITE,
    Reason.PROTOCOL: Scope.SITE,
    Reason.UNCLASSIFIED: Scope.RECIPIENT,
}
_TONES = {
    Reason.RATE_LIMITED: Tone.SLOWER,
    Reason.SYSTEM_TROUBLE: Tone.SLOWER,
    Reason.TOO_MANY_RECIPIENTS: Tone.SLOWER,
    Reason.SPAM_BLOCK: Tone.BLOCKED,
    Reason.NETWORK: Tone.UNREACHABLE,
    Reason.TLS: Tone.UNREACHABLE,
    Reason.PROTOCOL: Tone.UNREACHABLE,
}

# What a trouble without a reply of the peer's means.
_TROUBLES = {
    Trouble.LEFT: Reason.NONE,
    Trouble.ABORTED: Reason.NONE,
    Trouble.VOID: Reason.NONE,
    Trouble.UNREACHABLE: Reason.NETWORK,
    Trouble.LOST: Reason.NETWORK,
    Trouble.TIMEOUT: Reason.NETWORK,
    Trouble.GOODBYE: Reason.SYSTEM_TROUBLE,
    Trouble.REFUSED: Reason.SYSTEM_TROUBLE,
    Trouble.MALFORMED: Reason.PROTOCOL,
    Trouble.OVERFLOW: Reason.PROTOCOL,
    Trouble.DESYNC: Reason.PROTOCOL,
    Trouble.INJECTION: Reason.TLS,
    Trouble.TLS: Reason.TLS,
    Trouble.TOO_LARGE: Reason.MESSAGE_TOO_LARGE,
    Trouble.NEEDS_SMTPUTF8: Reason.NEEDS_SMTPUTF8,
    Trouble.NEEDS_8BITMIME: Reason.CONTENT_REJECTED,
}
# What we say ourselves where the peer said nothing (RFC 3463).
_LOCAL = {
    Trouble.TOO_LARGE: "5.3.4",
    Trouble.NEEDS_SMTPUTF8: "5.6.7",
    Trouble.NEEDS_8BITMIME: "5.6.3",
    Trouble.UNREACHABLE: "4.4.1",
    Trouble.LOST: "4.4.2",
    Trouble.TIMEOUT: "4.4.2",
}


def judge(verdict: Verdict, *, resend: bool = False) -> Outcome:
    """Judge one verdict. resend: the job chose `resend` and this message has not used its extra copy yet (T8)."""
    reply, trouble = verdict.reply, verdict.trouble
    if verdict.fate is Fate.DELIVERED and reply is not None:
        return _delivered(reply.code, reply.enhanced)
    if verdict.fate is Fate.UNKNOWN:
        return Outcome(
            kind=Kind.DEFERRED if resend else Kind.UNKNOWN,
            reason=Reason.NETWORK,
            scope=Scope.SITE,
            tone=Tone.UNREACHABLE,
            resend=resend,
            text=trouble.value if trouble is not None else "",
            rule="in doubt",
        )
    if reply is not None and reply.code >= 400 and trouble is not Trouble.DESYNC:
        return _judged(reply, verdict.fate is Fate.REJECTED, verdict.step, recorded=verdict.tried)
    # DESYNC with a reply (503 and its like) is about the conversation: the words are kept, not judged
    return _troubled(verdict, trouble or Trouble.LOST)


@functools.lru_cache(maxsize=64)
def _delivered(code: int, enhanced: str) -> Outcome:
    # Without the words: nobody asks a 250 for them, and they are not kept (P-12).
    return Outcome(kind=Kind.DELIVERED, tone=Tone.ACCEPTED, code=code, enhanced=enhanced)


def judge_connection(closed: Closed) -> Outcome:
    """What the end of a connection says about the site when no message was in flight, or none could be opened.

    Never terminal: a 554 greeting is about our address and this host, not about anyone's mailbox (Postfix:
    smtp_skip_5xx_greeting); the next host, or the same later, is asked.
    """
    reply = closed.reply
    if closed.trouble is Trouble.LEFT:
        return Outcome(kind=Kind.DEFERRED, scope=Scope.SITE, recorded=False, rule="trouble: left")
    if reply is not None and reply.code >= 400 and closed.trouble is not Trouble.DESYNC:
        return _judged(reply, False, closed.step, site=True)
    return _troubled(Verdict(Fate.DEFERRED, closed.step, reply, closed.trouble), closed.trouble, closed.detail)


def _judged(reply: Reply, rejected: bool, step: Step, *, recorded: bool = True, site: bool = False) -> Outcome:
    text, enhanced = reply.text, reply.enhanced
    judgement = classify(reply.code, enhanced, text)
    retry = not rejected or _is_temporary(reply.code, judgement, step)
    goodbye = reply.code == 421
    tone = _TONES.get(judgement.reason, Tone.SLOWER if goodbye else Tone.NEUTRAL)
    if tone is Tone.SLOWER and not retry:
        tone = Tone.NEUTRAL  # a 5yz is final: there is nothing to come back for more slowly
    if site and tone is Tone.NEUTRAL:
        tone = Tone.UNREACHABLE  # no mail gets in there now, whatever the reason
    return Outcome(
        kind=Kind.DEFERRED if retry else Kind.BOUNCED,
        reason=judgement.reason,
        scope=Scope.SITE if site or goodbye else _SCOPES[judgement.reason],
        tone=tone,
        hard=judgement.hard and not retry,
        recorded=recorded,
        wait=asked_wait(text) if retry else 0.0,
        code=reply.code,
        enhanced=enhanced,
        text=text,
        rule=judgement.rule,
    )


def _is_temporary(code: int, judgement: Judgement, step: Step) -> bool:
    """The 5yz that are to be tried again all the same."""
    if judgement.reason is Reason.TOO_MANY_RECIPIENTS and step is not Step.BODY:
        return True  # 552 after RCPT: RFC 5321 4.5.3.1.10 says to treat it as 452 (S-04)
    if code in (502, 503):
        return True  # the conversation went wrong, not the message
    return judgement.reason is Reason.TLS  # 530 5.7.4: another connection may be encrypted


def _troubled(verdict: Verdict, trouble: Trouble, detail: str = "") -> Outcome:
    reason = _TROUBLES[trouble]
    rejected = verdict.fate is Fate.REJECTED
    reply = verdict.reply
    text = reply.text if reply is not None else ": ".join(part for part in (trouble.value, detail) if part)
    return Outcome(
        kind=Kind.BOUNCED if rejected else Kind.DEFERRED,
        reason=reason,
        scope=_SCOPES.get(reason, Scope.SITE),
        tone=_TONES.get(reason, Tone.NEUTRAL) if verdict.tried else Tone.NEUTRAL,
        recorded=verdict.tried,
        code=reply.code if reply is not None else 0,
        enhanced=reply.enhanced if reply is not None else _LOCAL.get(trouble, ""),
        text=text,
        rule=f"trouble: {trouble.value}",
    )


LONGEST_WAIT = 86_400.0  # seconds: what a stranger asks for is a hint, and never more than a day
_WAIT = re.compile(
    r"(?:try again|retry|come back|wait|deferred|delayed|greylisted)[^\d]{0,40}?(?:in|for|after)?\s*(\d{1,6})\s*"
    r"(s\b|secs?\b|seconds?\b|m\b|mins?\b|minutes?\b|h\b|hours?\b)",
    re.IGNORECASE,
)


def asked_wait(text: str) -> float:
    """Seconds a deferral asks us to wait ("try again in 5 minutes"), 0.0 when it does not say."""
    found = _WAIT.search(text)
    if found is None:
        return 0.0
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2][0].lower()]
    return min(int(found[1]) * unit, LONGEST_WAIT)
