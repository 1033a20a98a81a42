"""Providers: how six kinds of mail provider answer, as pure decisions with the time as an argument.

    accept    takes everything
    limit     421 to a connection too many, and after `messages` on one connection; 451 above `rate` messages a second
    greylist  450 to the first attempt of a recipient and for `seconds` after it, then takes it
    unknown   550 5.1.1 for a share of local parts, always the same ones
    slow      takes everything, `delay` seconds after the final dot
    mixed     refuses a share of local parts for good (`refused`), puts another share off once (`deferred`), takes the
              rest `delay` seconds after the final dot: what a large list meets on an ordinary day

Law: a judge decides from its provider's numbers, what it has seen and the time it is given, nothing else; so a
rehearsal repeated is the same rehearsal. The words of the replies are those of large providers, because the classifier
of bounces reads them.

Known limits: a greylist forgets nothing until the process ends; one in 2^64 recipients may be taken for another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, Final

BEHAVIOURS: Final = ("accept", "limit", "greylist", "unknown", "slow", "mixed")


class ProviderError(ValueError):
    """A description of a provider that is none; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider and its numbers; those that its behaviour does not use are ignored.

    name: how it is counted (its behaviour by default); port: TCP, 0 lets the system choose; connections, messages:
    at once, and a connection, 0 for no limit; rate: messages a second, 0 for no limit; share, refused, deferred: 0 to 1
    of local parts; delay: seconds.
    """

    behaviour: str = "accept"
    port: int = 0
    name: str = ""
    connections: int = 0
    messages: int = 0
    rate: float = 0.0
    seconds: float = 3.0
    share: float = 0.25
    delay: float = 0.05
    refused: float = 0.0
    deferred: float = 0.0

    @property
    def label(self) -> str:
        return self.name or self.behaviour


_WHOLE: Final = frozenset({"connections", "messages"})
DEFAULTS: Final[dict[str, dict[str, float]]] = {
    "limit": {"connections": 10, "messages": 100, "rate": 1000.0},
    "mixed": {"refused": 0.1, "deferred": 0.05, "delay": 0.0},
}


def parse(text: str) -> Provider:
    """``behaviour[:port[:key=value,…]]``, such as ``limit:2526:messages=20,rate=500``. Raises ProviderError."""
    behaviour, _, rest = text.partition(":")
    port, _, options = rest.partition(":")
    if behaviour not in BEHAVIOURS:
        raise ProviderError(f"{behaviour!r} is no behaviour: one of {', '.join(BEHAVIOURS)}")
    if port and not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ProviderError(f"{port!r} is no TCP port")
    values: dict[str, Any] = dict(DEFAULTS.get(behaviour, {}))
    kinds = {item.name: item.type for item in fields(Provider) if item.name not in ("behaviour", "port")}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in kinds:
            raise ProviderError(f"{key!r} is no setting of a provider: one of {', '.join(kinds)}")
        values[key] = value if key == "name" else _number(key, value)
    for key in _WHOLE & values.keys():
        values[key] = int(values[key])
    return Provider(behaviour, int(port or 0), **values)


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ProviderError(f"{key} needs a number") from None
    if not 0 <= number < 1e9:
        raise ProviderError(f"{key} must be a number from 0")
    return number


TOO_MANY_CONNECTIONS: Final = b"421 4.7.0 Too many concurrent connections from your address, try again later\r\n"
TOO_MANY_MESSAGES: Final = b"421 4.7.0 Too many messages on this connection, closing it\r\n"
TOO_FAST: Final = b"451 4.7.1 You are sending too fast, please slow down\r\n"
GREYLISTED: Final = b"450 4.2.0 Recipient address rejected: Greylisted, please try again later\r\n"
UNKNOWN_USER: Final = b"550 5.1.1 The email account that you tried to reach does not exist\r\n"

# What large providers say of one mailbox; nothing here speaks about the sender, which would be another experiment.
REFUSALS: Final = (
    b"550-5.1.1 The email account that you tried to reach does not exist. Please try\r\n"
    b"550-5.1.1 double-checking the recipient's email address for typos or\r\n"
    b"550 5.1.1 unnecessary spaces. For more information, go to support pages - gsmtp\r\n",
    b"550 5.5.0 Requested action not taken: mailbox unavailable (S2017062302).\r\n",
    b"554 delivery error: dd This user doesn't have an account here (in0)\r\n",
    b"550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup\r\n",
    b"550 5.2.1 The email account that you tried to reach is disabled. - gsmtp\r\n",
    b"552 5.2.2 The recipient's inbox is out of storage space and inactive. - gsmtp\r\n",
)
DEFERRALS: Final = (
    b"450 4.2.0 Recipient address rejected: Greylisted, please come back later\r\n",
    b"452 4.2.2 The recipient's inbox is out of storage space. Please direct the recipient to - gsmtp\r\n",
    b"451 4.3.0 Mailbox temporarily unavailable. Please try again later.\r\n",
)


class Judge:
    """One provider's memory and its decisions. None means: nothing against it. Instants are monotonic seconds."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        behaviour = provider.behaviour
        self.judges_mail = behaviour == "limit"
        self.judges_recipients = behaviour in ("greylist", "unknown", "mixed")
        self.delay = provider.delay if behaviour in ("slow", "mixed") else 0.0
        self._threshold = int(provider.share * 2**32)
        self._refused = int(provider.refused * 2**32)
        self._deferred = self._refused + int(provider.deferred * 2**32)
        self._put_off: set[int] = set()
        self._first_seen: dict[bytes, float] = {}
        self._free_at = 0.0  # GCRA: when the next message would be exactly on time

    def greet(self, connections: int) -> bytes | None:
        """connections: open ones, this one included. A reply here ends the connection."""
        limit = self.provider.connections
        if self.provider.behaviour == "limit" and 0 < limit < connections:
            return TOO_MANY_CONNECTIONS
        return None

    def mail(self, messages: int, now: float) -> bytes | None:
        """messages: taken on this connection so far. 421 ends the connection, 451 only this transaction."""
        provider = self.provider
        if 0 < provider.messages <= messages:
            return TOO_MANY_MESSAGES
        if provider.rate <= 0:
            return None
        if self._free_at - now > 0.1:  # a tenth of a second of burst, about what one flight of connections makes
            return TOO_FAST
        self._free_at = max(self._free_at, now) + 1.0 / provider.rate
        return None

    def recipient(self, address: bytes, now: float) -> bytes | None:
        """address: as it stood between the angle brackets."""
        if self.provider.behaviour == "mixed":
            return self._mixed(address)
        digest = blake2b(address.lower(), digest_size=8, person=b"sp-rehearsal").digest()
        if self.provider.behaviour == "greylist":
            first = self._first_seen.setdefault(digest, now)
            return GREYLISTED if now - first < self.provider.seconds or first == now else None
        return UNKNOWN_USER if self.is_unknown(address) else None

    def _mixed(self, address: bytes) -> bytes | None:
        draw = _draw(address)
        if draw >= self._deferred:
            return None
        if draw < self._refused:
            return REFUSALS[draw % len(REFUSALS)]
        whole = hash(address.lower())
        if whole in self._put_off:
            return None  # it was put off before: the next attempt is good
        self._put_off.add(whole)
        return DEFERRALS[draw % len(DEFERRALS)]

    def is_unknown(self, address: bytes) -> bool:
        """The deterministic share of local parts that do not exist here; the domain does not matter."""
        return _draw(address) < self._threshold


def _draw(address: bytes) -> int:
    """32 bits of a local part, the same ones every time."""
    local = address.lower().rpartition(b"@")[0]
    return int.from_bytes(blake2b(local, digest_size=4, person=b"sp-unknown").digest(), "big")


@dataclass(slots=True)
class Counts:
    """What one provider did. accepted: messages; recipients: of these; unique: (Message-ID, recipient) pairs."""

    connections: int = 0
    open: int = 0
    most_open: int = 0
    accepted: int = 0
    recipients: int = 0
    unique: int = 0
    refused: int = 0  # recipients, 5xx
    deferred: int = 0  # recipients, 4xx
    closed_421: int = 0
    too_fast: int = 0
    bytes: int = 0
    kept: int = 0
    bare_newlines: int = 0
    bad_commands: int = 0
    first_at: float = 0.0  # seconds since the epoch: first and last message accepted
    last_at: float = 0.0


@dataclass(slots=True)
class Post:
    """One listening port: its judge, its counts, and the constant replies."""

    judge: Judge
    greeting: bytes
    ehlo: bytes
    counts: Counts = field(default_factory=Counts)
    seen: set[int] = field(default_factory=set)
    begun: int = 0
    chosen: int = 0
