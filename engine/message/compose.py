"""Compose: Permit + program + one recipient -> the message's bytes, all but the signature (journey step 7).

Law: nothing is composed without a Permit of the same job and recipient, and mypy sees to it (`compose` takes a Permit,
not a truth value). Everything that identifies the message (boundary, Message-ID, Date, tokens, DKIM times) follows
from (job, mref) and the slice's date: a second attempt is the same message, byte for byte.

The pixel is in only when the opens mode allows it and links carry tokens only when the clicks mode does (decision 12,
P-07). A recipient whose values do not fit (a line break for the subject, a missing field, a javascript: link) raises
`Unwritable`; its text names field and rule, never a value, and the recipient ends refused as invalid.

Slow path: a value that does not fit a 7-bit part (engine.message.sevenbit) puts that part into quoted-printable.

Cost and how it is measured: benchmarks/test_compose.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from engine.message import headers
from engine.message.program import Program
from engine.message.renderer import RenderError
from engine.message.slots import Frame
from policy.gate import Mode, Permit
from tracker.links import Links

_OFF: Final = Mode.OFF  # by a name of its own: see engine.smtp.dialogue


class Digest(Protocol):
    """What hashlib makes."""

    def copy(self) -> Digest: ...

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class Unwritable(ValueError):
    """This recipient's values cannot be put into this message: their fault is in the data, not in the campaign."""


class PermitMismatch(Exception):
    """Composed for somebody the Permit does not name: a mistake of ours, never of the world."""


@dataclass(slots=True)  # these three are not frozen: freezing costs 2 us each a message
class Person:
    """One recipient, ready to be written to. `person` makes one with its tokens.

    address: wire form; name: display name or ""; fields: what the templates see; a mode other than OFF needs its
    token: click_base, pixel_url. optout_mailto without "mailto:".
    """

    job: int
    mref: int
    address: str
    fields: Mapping[str, Any]
    name: str = ""
    mode_opens: Mode = Mode.OFF
    mode_clicks: Mode = Mode.OFF
    click_base: str = ""
    pixel_url: str = ""
    optout_url: str = ""
    preferences_url: str = ""
    optout_mailto: str = ""


@dataclass(slots=True)
class Unsigned:
    """A message that lacks its signatures. head: the header without the empty line; signed: the h= list; head_hash:
    SHA-256 over the canonical form of the signed headers so far; at: seconds since the epoch, t= of the signature;
    hashed: the body in relaxed canonical form (RFC 6376 3.4.4), None when the body is that already."""

    job: int
    mref: int
    head: bytes
    body: bytes
    head_hash: Digest
    signed: str
    at: int
    hashed: bytes | None = None


@dataclass(slots=True)
class Message:
    """A message as it goes over the wire after DATA: CRLF everywhere, no line begins with a dot, without the final
    dot. size: octets, as SIZE= declares them (RFC 1870)."""

    job: int
    mref: int
    wire: bytes

    @property
    def size(self) -> int:
        return len(self.wire)


def person(
    links: Links,
    program: Program,
    job: int,
    mref: int,
    subject: int,
    address: str,
    fields: Mapping[str, Any],
    list_number: int,
    partition: int,
    tag: bytes,
    optout_domain: str = "",
    name: str = "",
    mode_opens: Mode = _OFF,
    mode_clicks: Mode = _OFF,
) -> Person:
    """A Person with the tokens its modes and its list call for, and no others."""
    optout_url = preferences_url = mailto = ""
    if program.listed:
        token = links.optout_token(list_number, partition, tag)
        public_url = links.public_url
        optout_url, preferences_url = f"{public_url}/u/{token}", f"{public_url}/p/{token}"
        mailto = f"u+{token}@{optout_domain}" if optout_domain else ""
    clicks = mode_clicks is not _OFF and bool(program.links)
    return Person(
        job,
        mref,
        address,
        fields,
        name,
        mode_opens,
        mode_clicks,
        links.click_base(job, mref, subject, mode_clicks) if clicks else "",
        links.pixel_url(job, mref, subject, mode_opens) if mode_opens is not _OFF else "",
        optout_url,
        preferences_url,
        mailto,
    )


def compose(permit: Permit, program: Program, person: Person, date_us: int) -> Unsigned:
    """Writes one message. date_us: the slice's date, integer microseconds. The Message-ID is the same on every attempt
    (S-06), and a late bounce that quotes it can be placed.

    Raises Unwritable for values that do not fit, PermitMismatch for a Permit of another job or recipient.
    """
    job, mref, optout_url, preferences_url = person.job, person.mref, person.optout_url, person.preferences_url
    if permit.job != job or permit.mref != mref:
        raise PermitMismatch("the permit is for another job or recipient")
    values = {name: value for name, value in person.fields.items() if value is not None}  # null is absent
    values |= program.constants
    values["unsubscribe_url"], values["preferences_url"] = optout_url, preferences_url
    if not optout_url:
        del values["unsubscribe_url"]  # a producer's field of that name is not it
    if not preferences_url:
        del values["preferences_url"]
    clicks = person.click_base if person.mode_clicks is not _OFF else ""
    pixel = person.pixel_url if person.mode_opens is not _OFF else ""
    values["sp_click"], values["sp_pixel"] = clicks, pixel
    number = b"%016x" % (mref & _64_BITS)
    boundary = b"=_%b%010x" % (number, job)
    frame = Frame(values, boundary, clicks, pixel)
    seconds = date_us // 1_000_000
    try:
        body, hashed = program.variant(tracked=bool(clicks), pixel=bool(pixel)).body(frame)
        date, low_date = _date(seconds)
        to, low_to = _TO.address(person.name, person.address)
        identifier = b"<%x.%b%b" % (job, number, program.id_end)
        written = [date, to, b"Message-ID: ", identifier]
        canonical = [low_date, low_to, b"message-id:", identifier]
        subject = program.subject(frame)
        if subject is not None:
            written.insert(0, subject[0])
            canonical.insert(0, subject[1])
        if program.type_cut is not None:
            before, after, low_before, low_after = program.type_cut
            written += before, boundary, after
            canonical += low_before, boundary, low_after
        if program.listed:
            mailto = person.optout_mailto
            both = _UNSUBSCRIBE.uris((optout_url, "mailto:" + mailto) if mailto else (optout_url,))
            written.append(both[0])
            canonical.append(both[1])
    except (RenderError, headers.HeaderError) as error:
        raise Unwritable(str(error)) from None
    written.append(program.static_head)
    digest = program.head_hash.copy()
    digest.update(b"".join(canonical))
    return Unsigned(job, mref, b"".join(written), body, digest, program.signed, seconds, hashed)


_TO: Final = headers.Prepared("To")
_UNSUBSCRIBE: Final = headers.Prepared("List-Unsubscribe")
_64_BITS: Final = (1 << 64) - 1


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@functools.lru_cache(maxsize=4096)
def _date(seconds: int) -> headers.Both:
    """RFC 5322 3.3, in UTC. A slice has one date, so most calls are answered from the cache."""
    at = datetime.fromtimestamp(seconds, UTC)
    clock = f"{at.hour:02}:{at.minute:02}:{at.second:02}"
    day = f"{_DAYS[at.weekday()]}, {at.day:02} {_MONTHS[at.month - 1]} {at.year}"
    return f"Date: {day} {clock} +0000\r\n".encode("ascii"), f"date:{day} {clock} +0000\r\n".encode("ascii")
