"""The vocabulary of a dialogue: steps, fates, verdicts, events and the message that is offered.

Law: an `Outbound` whose addresses or data could break out of their place on the wire cannot be built (faults 3.6;
the field has a dozen CVEs of CR and LF in an address). What the peer did is a value; only our own mistakes raise.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from engine.smtp.reply import Reply

MAX_PATH = 254  # octets of an address: RFC 5321 4.5.3.1.3 allows 256 with the angle brackets
MAX_LOCAL = 64  # RFC 5321 4.5.3.1.1
MAX_DOMAIN = 255  # RFC 5321 4.5.3.1.2


class Step(enum.Enum):
    """What a reply answers: the key of the timeout table and the word in logs."""

    __hash__ = object.__hash__  # members are one each; Enum's own is written in Python, 0.1 us a look into the table

    CONNECT = "connect"
    GREETING = "greeting"
    EHLO = "EHLO"
    HELO = "HELO"
    STARTTLS = "STARTTLS"
    TLS = "TLS handshake"
    AUTH = "AUTH"
    IDLE = "idle"
    RSET = "RSET"
    MAIL = "MAIL"
    PERMIT = "permit"  # waiting for our own side: the Permit ran out between MAIL and RCPT
    RCPT = "RCPT"
    DATA = "DATA"
    BLOCK = "data block"
    BODY = "end of data"
    QUIT = "QUIT"


FOREVER = float("inf")
# Seconds, a deadline for the whole reply and not for each read (a peer that trickles is a peer that stalls).
# RFC 5321 4.5.3.2 gives the minima of GREETING, MAIL, RCPT, DATA, BLOCK and BODY (S-01): shorter after the dot means
# duplicates. The others follow Postfix (smtp_connect_timeout, smtp_starttls_timeout, smtp_rset_timeout).
PATIENCE: Mapping[Step, float] = MappingProxyType(
    {
        Step.CONNECT: 30.0,
        Step.GREETING: 300.0,
        Step.EHLO: 300.0,
        Step.HELO: 300.0,
        Step.STARTTLS: 300.0,
        Step.TLS: 60.0,
        Step.AUTH: 120.0,  # RFC 4954 says nothing
        Step.IDLE: FOREVER,  # the owner decides how long a connection may rest
        Step.RSET: 300.0,
        Step.MAIL: 300.0,
        Step.PERMIT: 5.0,  # our own gate: it answers in milliseconds or not at all
        Step.RCPT: 300.0,
        Step.DATA: 120.0,
        Step.BLOCK: 180.0,
        Step.BODY: 600.0,
        Step.QUIT: 5.0,  # nothing hangs on it any more
    }
)


class Fate(enum.Enum):
    """What became of a message, as far as this connection can tell."""

    DELIVERED = "delivered"
    REJECTED = "rejected"
    DEFERRED = "deferred"
    UNKNOWN = "unknown"  # the final dot was handed to the network and no reply came (RFC 1047)


class Trouble(enum.Enum):
    """Why a connection ended, or why a message was settled without a reply of its own."""

    LEFT = "left"  # we said QUIT
    ABORTED = "aborted"  # our side dropped it
    UNREACHABLE = "unreachable"  # no TCP connection
    LOST = "lost"  # closed or reset by the peer
    TIMEOUT = "timeout"
    GOODBYE = "goodbye"  # 421, at whatever point (S-04)
    REFUSED = "refused"  # the greeting or EHLO was a refusal
    MALFORMED = "malformed"  # not SMTP, or a reply of a class the command cannot have
    OVERFLOW = "overflow"  # a reply beyond the caps
    DESYNC = "desync"  # a reply nobody waits for, or in the wrong order
    INJECTION = "injection"  # plain text behind the reply to STARTTLS (RFC 3207, CVE-2011-0411)
    TLS = "tls"  # handshake failed, or TLS is required and not offered
    VOID = "void"  # the Permit ran out and was not renewed (decision 7): nothing was asked of the peer for it
    TOO_LARGE = "too large"  # beyond the peer's SIZE (RFC 1870): not sent
    NEEDS_SMTPUTF8 = "needs SMTPUTF8"  # RFC 6531, not offered: not sent
    NEEDS_8BITMIME = "needs 8BITMIME"  # RFC 6152, not offered: not sent


class Tls(enum.Enum):
    """How much encryption a connection wants."""

    NEVER = "never"
    MAY = "may"  # opportunistic: take what is offered, check nothing (RFC 7435)
    MUST = "must"  # encrypted or not at all, certificate not checked
    VERIFIED = "verified"  # encrypted, certificate valid for the host's name


class AddressRefused(ValueError):
    """An address that cannot stand in a command. Never shows the address."""


class UnsafeData(ValueError):
    """A message that is not made of CRLF lines (SMTP smuggling: CVE-2023-51764 and its kin)."""


# Printable without <, > and space; a quoted local part may hold spaces. Beyond ASCII: RFC 6531.
_PLAIN = re.compile(r"[!#$%&'*+\-/0-9=?A-Z^_`a-z{|}~.\x80-\U0010ffff]+@[A-Za-z0-9._-]+")
_QUOTED = re.compile(r'"(?:[^"\\<>]|\\[^<>])*"@[A-Za-z0-9._-]+')
# Nearly every address there is: ASCII, printable and within the octets as it stands, told in 0.4 us instead of 1.1.
_COMMON = re.compile(r"[0-9A-Za-z._+=-]{1,64}@[0-9A-Za-z.-]{1,189}")


def check_address(address: str) -> None:
    """Raises AddressRefused unless the address is safe in MAIL or RCPT and within RFC 5321 4.5.3.1 (octets)."""
    if _COMMON.fullmatch(address):
        return
    if not address.isprintable() or not (_PLAIN.fullmatch(address) or _QUOTED.fullmatch(address)):
        raise AddressRefused("an address has characters that cannot stand in a command")
    if len(address) > MAX_LOCAL or not address.isascii():
        local, _, domain = address.rpartition("@")
        octets = len(local.encode("utf-8"))  # lone surrogates are not printable: encoding cannot fail here
        if octets > MAX_LOCAL or len(domain) > MAX_DOMAIN or octets + 1 + len(domain) > MAX_PATH:
            raise AddressRefused("an address is longer than RFC 5321 4.5.3.1 allows")


def check_data(data: bytes) -> None:
    """Raises UnsafeData unless every CR is followed by LF and every LF preceded by CR. About 40 µs for 30 kB."""
    pairs = data.count(b"\r\n")
    if data.count(b"\r") != pairs or data.count(b"\n") != pairs:
        raise UnsafeData("a message has a bare CR or LF")


class Outbound(msgspec.Struct, eq=False):
    """One message for one recipient: what a connection is offered and what its verdict comes back with.

    key: the caller's own handle, never looked at. sender: return path, "" for the null sender. recipient: the wire
    address. data: the complete message, CRLF lines, ending in CRLF, *not* dot-stuffed (the dialogue does that).
    void_at: monotonic seconds from which RCPT may no longer be written (decision 7).
    proven: the data came from ``message.compose``, whose laws are that it has CRLF lines only and none that begins
    with a dot, and no octet above 127 but in the address of who gets it (tests/laws/test_wire_laws.py); the searches
    for bare CR and LF (40 µs) and for such octets (1.4) are skipped, and of dots only those are looked for that would
    end the data (`lines.ends_early`). Nobody but the courier may say it (tests/engine/test_proven.py). eight_bit:
    whether the data has octets above 127, worked out here. Raises AddressRefused or UnsafeData.
    """

    key: object
    sender: str
    recipient: str
    data: bytes
    void_at: float = FOREVER
    proven: bool = False
    eight_bit: bool = False

    def __post_init__(self) -> None:
        if self.sender:
            check_address(self.sender)
        check_address(self.recipient)
        if not self.data.endswith(b"\r\n"):
            raise UnsafeData("a message does not end with CRLF")
        if not self.proven:
            check_data(self.data)
        if not (self.proven and self.recipient.isascii()):
            self.eight_bit = not self.data.isascii()


class Verdict(msgspec.Struct, frozen=True):
    """The fate of one message: decided at which step, by which reply, or by which trouble when there is no reply.

    tried is False when the peer was never waited on for this message: handing it to another connection at once is
    no second attempt. reply is then what ended the connection, if anything was said.
    """

    fate: Fate
    step: Step
    reply: Reply | None = None
    trouble: Trouble | None = None
    tried: bool = True


class Ready(msgspec.Struct, frozen=True):
    """The connection takes messages. extensions: EHLO keywords in upper case with their parameters."""

    extensions: Mapping[str, str]
    encrypted: bool


class Upgrade(msgspec.Struct, frozen=True):
    """Start TLS now, then say `Dialogue.tls_started`. Nothing may be read in plain text any more."""


class Parked(msgspec.Struct, frozen=True):
    """MAIL was accepted but the Permit has run out: answer with `Dialogue.renew` or `Dialogue.withdraw`."""

    message: Outbound


class Settled(msgspec.Struct, frozen=True):
    """This message is done with; it comes exactly once for each message taken."""

    message: Outbound
    verdict: Verdict


class Closed(msgspec.Struct, frozen=True):
    """The dialogue is over; always the last event and always exactly one."""

    trouble: Trouble
    step: Step
    reply: Reply | None = None
    detail: str = ""  # for the log: words of the operating system or of TLS, never of a message


Event = Ready | Upgrade | Parked | Settled | Closed
