"""Conclusions: what an attempt, a refusal or an end of time comes to in the ledger's words (step 9, promise T7).

Laws: exactly one terminal event for each recipient; what is tried again is tried before its job expires, or ends
EXPIRED now; what is in doubt goes to one more attempt only where the job chose `resend`, and only once (T8).

Everything said here goes through `settling`: to the journal first, then to Redis.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import blake2b
from typing import Final

from engine.delivery.campaigns import Loaded
from engine.delivery.hand import Hand, Letter
from engine.delivery.outcome import Outcome
from engine.delivery.settling import Settling
from engine.delivery.site import NoSite
from engine.queue import schedule
from engine.queue.lanes import Lease
from engine.queue.slices import Contents, Header, Row
from policy.events import Event, Kind, Reason
from policy.keys import Keyring, seal_note

_DELIVERED: Final = Kind.DELIVERED  # by a name of its own: see engine.smtp.dialogue
LONGEST_WAIT = 3600.0  # seconds: what a peer asks us to wait ("try again in 5 minutes") is followed up to here


class Conclusions:
    """One per worker. nothing: the job of slices whose own job is gone; now_us: Redis TIME as the courier knows it."""

    def __init__(
        self,
        settling: Settling,
        keyring: Callable[[], Keyring],
        retry: schedule.Retry,
        nothing: Loaded,
        now_us: Callable[[], int],
    ) -> None:
        self.settling = settling
        self.counts: dict[str, int] = {}
        self.slices_lost = 0
        self._keyring = keyring
        self._retry = retry
        self._nothing = nothing
        self._now_us = now_us

    def conclude(self, letter: Letter, outcome: Outcome, tls: int) -> None:
        """What an attempt came to: an end, or another attempt later."""
        hand, kind = letter.hand, outcome.kind
        if kind is _DELIVERED:  # nearly everybody: nothing is decided and nothing is sealed
            event = self.event(letter, kind, outcome.reason, outcome.code, outcome.enhanced, tls)
            self.count("delivered")
            self.settling.terminal(hand, letter.index, event)
            return
        note = seal_note(self._keyring(), outcome.text)
        delay: float | None = None
        if kind is Kind.DEFERRED:
            delay = self._next(hand, outcome.reason, in_doubt=outcome.resend, at_least=min(outcome.wait, LONGEST_WAIT))
            if delay is None:  # behind its dot it is not known to have expired
                kind = Kind.UNKNOWN if outcome.resend else Kind.EXPIRED
        event = self.event(letter, kind, outcome.reason, outcome.code, outcome.enhanced, tls, note)
        if delay is not None:
            self.count("deferred")
            self.settling.retry(hand, letter.index, delay, event, in_doubt=outcome.resend)
        else:
            self.count(kind.name.lower())
            self.settling.terminal(hand, letter.index, event)

    def refuse(self, letter: Letter, reason: Reason) -> None:
        self.count("refused")
        self.settling.terminal(letter.hand, letter.index, self.event(letter, Kind.REFUSED, reason))

    def _next(self, hand: Hand, reason: Reason, *, in_doubt: bool = False, at_least: float = 0.0) -> float | None:
        header = hand.header
        # One delay for what is deferred together keeps slices together: jitter is drawn a tenth of a second apart.
        return schedule.next_attempt(
            self._retry, header.attempt, reason, jitter(), now_us=self._now_us(), expires_at=header.expires_at,
            in_doubt=in_doubt, at_least=at_least, window=hand.job.window,
        )  # fmt: skip

    def event(
        self,
        letter: Letter,
        kind: Kind,
        reason: Reason,
        code: int = 0,
        enhanced: str = "",
        tls: int = 0,
        note: bytes = b"",
    ) -> Event:
        hand = letter.hand
        mref, tag = hand.reference(letter.index)
        return Event(
            int(kind), mref, hand.header.attempt + 1, self._now_us(), hand.row(letter.index).pseudonym, tag,
            int(reason), code, enhanced, tls, note,
        )  # fmt: skip

    def no_site(self, hand: Hand, pending: list[int], site: NoSite) -> None:
        if site.permanent:
            self.end_all(hand, pending, Kind.BOUNCED, site.reason, site.text)
            return
        delay = self._next(hand, Reason.DNS)
        if delay is None:
            self.end_all(hand, pending, Kind.EXPIRED, site.reason, site.text)
            return
        note = seal_note(self._keyring(), site.text)
        for index in pending:
            letter = Letter(hand, index, hand.reference(index)[0])
            event = self.event(letter, Kind.DEFERRED, site.reason, note=note)
            self.count("deferred")
            self.settling.retry(hand, index, delay, event)

    def end_all(self, hand: Hand, pending: list[int], kind: Kind, reason: Reason, text: str = "") -> None:
        note = seal_note(self._keyring(), text)
        for index in pending:
            letter = Letter(hand, index, hand.reference(index)[0])
            self.count(kind.name.lower())
            self.settling.terminal(hand, index, self.event(letter, kind, reason, note=note))

    def bury(self, lease: Lease, header: Header) -> Hand:
        """Its job is over, a restored store did not know: all of it is done, and nothing is said of it again (T12).
        Answers the hand that carries this to the settle."""
        hand = self._nameless(lease, header)
        self.count("known", len(header.pending()))
        self.settling.known(hand, header.pending())
        return hand

    def _nameless(self, lease: Lease, header: Header) -> Hand:
        nobody = Contents("", [], [Row("", 0, 0, 0, 0, []) for _ in range(header.count)])
        return Hand(lease, header, nobody, self._nothing, self._keyring().pepper)

    def lose(self, lease: Lease, header: Header) -> Hand:
        """No key opens it, or its job is gone: every recipient ends LOST under a reference made of its place. Answers
        the hand that carries this to the settle."""
        self.slices_lost += 1
        hand = self._nameless(lease, header)
        for index in header.pending():
            place = f"{lease.partition}/{lease.slice_id}/{index}".encode()
            mref = int.from_bytes(blake2b(place, digest_size=8, person=b"sp-lost").digest(), "big", signed=True)
            self.count("lost")
            event = Event(int(Kind.LOST), mref, header.attempt + 1, self._now_us())
            self.settling.terminal(hand, index, event)
        return hand

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + n


def jitter() -> float:
    """A number in [0, 1) for the retry schedule."""
    return random.random()
