"""The vocabulary of what happened: one word for one idea on every floor.

Terminal kinds are the terminal recipient states of the design (section 5); a row submitted ends in exactly one.
The numbers are written into the ledger and into event streams: they may be added to, never changed.

A `Batch` is one entry of a partition's event stream (field ``b``, msgpack): everything one settle (or one put)
wants remembered about recipients of one job at one domain. It holds no address: a message is (job, mref), a person
is a weekly pseudonym, the suppression tag is keyed (design decision 13).
"""

from __future__ import annotations

import enum

import msgspec


class Kind(enum.IntEnum):
    """What happened. 1 to 15 are terminal, 16 to 31 history of delivery, 32 and above come from readers."""

    DELIVERED = 1
    BOUNCED = 2
    REFUSED = 3
    EXPIRED = 4
    CANCELLED = 5
    UNKNOWN = 6  # the connection died between the final dot and its reply (RFC 1047)
    LOST = 7  # no key opens the slice
    DEFERRED = 16
    COMPLAINED = 17
    LATE_BOUNCE = 18
    OPENED = 32
    CLICKED = 33
    OPTED_OUT = 34


TERMINAL = frozenset(kind for kind in Kind if kind < 16)


class Reason(enum.IntEnum):
    """Why a recipient was refused (1 to 15, decided by us) or bounced or deferred (32 up, classes of replies)."""

    NONE = 0
    SUPPRESSED = 1
    NO_CONSENT = 2
    RESTRICTED = 3
    ERASED = 4
    INVALID = 5
    DUPLICATE = 6
    ACCOUNT_FROZEN = 7
    # classes of SMTP replies and bounces: a closed vocabulary, engine.bounce maps replies onto it
    USER_UNKNOWN = 32
    BAD_DOMAIN = 33
    INACTIVE_MAILBOX = 34
    MAILBOX_FULL = 35
    TOO_MANY_RECIPIENTS = 36
    MESSAGE_TOO_LARGE = 37
    CONTENT_REJECTED = 38
    SPAM_BLOCK = 39  # our address or domain is blocked
    AUTHENTICATION = 40  # SPF, DKIM, DMARC, reverse DNS
    POLICY = 41
    RATE_LIMITED = 42
    GREYLISTED = 43
    SYSTEM_TROUBLE = 44
    NETWORK = 45
    DNS = 46
    TLS = 47
    PROTOCOL = 48
    NULL_MX = 49
    RELAY_DENIED = 50
    RECIPIENT_REJECTED = 51  # refused, the reply does not say that the mailbox is dead
    NEEDS_SMTPUTF8 = 52
    UNCLASSIFIED = 63


class Event(msgspec.Struct, array_like=True, gc=False):
    """One thing that happened to one recipient of one job. Identity for folding: (job, mref, attempt, kind).

    mref: signed 64-bit reading of the 8 bytes; at: integer microseconds since the epoch;
    pseudonym: 63 bits, 0 when the person was never resolved (refused before the vault);
    tag: 12-byte suppression tag or b""; code: basic SMTP code or 0; enhanced: "5.1.1" or "";
    tls: 0 none, 2 TLS 1.2, 3 TLS 1.3; note: sealed reply text or b"" (policy.keys.seal_note).
    """

    kind: int
    mref: int
    attempt: int
    at: int
    pseudonym: int = 0
    tag: bytes = b""
    reason: int = 0
    code: int = 0
    enhanced: str = ""
    tls: int = 0
    note: bytes = b""


class Batch(msgspec.Struct, array_like=True):
    """Events of one job at one domain (A-label; "" for invalid addresses). chunk is -1 for a settle."""

    job: int
    domain: str
    events: list[Event]
    chunk: int = -1


class Encoded(msgspec.Struct, array_like=True, gc=False):
    """A `Batch` of events that are encoded already, to the byte: once for the journal and for Redis."""

    job: int
    domain: str
    events: list[msgspec.Raw]
    chunk: int = -1


class Hit(msgspec.Struct, array_like=True, gc=False):
    """What a reader's visit left behind: kind OPENED or CLICKED, mode and visitor class as small numbers.

    mode: policy.gate.Mode; visitor: tracker.visitors.Visitor; link: link number or -1; at in microseconds, reduced to
    the hour (individual) or the day (deliverability) before it is stored; aggregate hits carry mref 0.
    """

    kind: int
    job: int
    mref: int
    at: int
    mode: int
    visitor: int
    link: int = -1


_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(Batch)
_hits_decoder = msgspec.msgpack.Decoder(list[Hit])


def encode_batch(batch: Batch) -> bytes:
    return _encoder.encode(batch)


def decode_batch(data: bytes) -> Batch:
    """Raises msgspec.DecodeError (a ValueError) on anything else."""
    return _batch_decoder.decode(data)


def encode_hits(hits: list[Hit]) -> bytes:
    return _encoder.encode(hits)


def decode_hits(data: bytes) -> list[Hit]:
    """Raises msgspec.DecodeError on anything else."""
    return _hits_decoder.decode(data)
