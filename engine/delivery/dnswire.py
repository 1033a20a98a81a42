"""DNS messages as octets, as far as a stub resolver needs them: a question, and what a plain answer says (RFC 1035 4).

Law: whatever is not plain is `None` and left to dnspython, which is asked again: names that would need escapes, chains
of aliases that are long or closed, records that do not fit, error codes, truncation. So what is read here is read the
same way there (tests/laws/test_dns_laws.py). A look-up of an MX of two hosts takes 34 us of CPU instead of 296 (CPython
3.11, unbound on this host, 100 at a time): those of 6,400 domains were half of what a worker did.

Pure: no sockets, no clock.
"""

from __future__ import annotations

import re
import struct
from typing import Final

KINDS: Final = {"A": 1, "MX": 15, "AAAA": 28}
_CNAME: Final = 5
_IN: Final = 1
_HEADER: Final = struct.Struct(">HHHHHH")
_RECORD: Final = struct.Struct(">HHIH")
_RECURSE: Final = 0x0100
# QR, opcode, TC and RCODE of a plain answer to a plain question: QR alone. AA, RA, AD, CD may be as they like.
_JUDGED: Final = 0x8000 | 0x7800 | 0x0200 | 0x000F
_ANSWER: Final = 0x8000
_NXDOMAIN: Final = 0x8003
_ALIASES: Final = 8  # dnspython follows 16
_FIRST: Final = b"\xc0\x0c"  # a pointer to the name in the question: the owner of nearly every record
_POINTERS: Final = 32  # of one name; a message of 512 octets has no use for more
_LABEL: Final = re.compile(rb"[A-Za-z0-9_-]{1,63}")

Records = tuple[tuple[int, str], ...]


def question(name: str, kind: str, number: int) -> bytes | None:
    """The message that asks for `kind` of `name` (no final dot) with recursion; None for a name that is not plain."""
    packed = packed_name(name)
    if packed is None:
        return None
    return _HEADER.pack(number, _RECURSE, 1, 0, 0, 0) + packed + struct.pack(">HH", KINDS[kind], _IN)


def packed_name(name: str) -> bytes | None:
    """Length and octets of each label, and the root's zero; None where a label is not letters, digits, - and _."""
    if not name.isascii() or not 0 < len(name) <= 253:
        return None
    packed = bytearray()
    for label in name.encode("ascii").split(b"."):
        if _LABEL.fullmatch(label) is None:
            return None
        packed.append(len(label))
        packed += label
    packed.append(0)
    return bytes(packed)


def answers(asked: bytes, told: bytes) -> bool:
    """Whether a message answers this question: its number and question are ours, whatever it says (RFC 5452 9.1)."""
    return (
        len(told) >= len(asked)
        and told[:2] == asked[:2]
        and told[4:6] == b"\0\1"
        and told[12 : len(asked)].lower() == asked[12:].lower()
    )


def read(asked: bytes, told: bytes) -> tuple[bool, Records, int] | None:
    """What a message that `answers` says: (whether the name is there, records, their shortest TTL in seconds).

    Records as engine.delivery.lookup.Answer has them; none where the name has none of this kind. None: not plain."""
    judged = _HEADER.unpack_from(told)[1] & _JUDGED
    if judged == _NXDOMAIN:
        return False, (), 0
    if judged != _ANSWER:
        return None
    try:
        return _records(asked, told)
    except (struct.error, IndexError):
        return None  # cut short


def _records(asked: bytes, told: bytes) -> tuple[bool, Records, int] | None:
    kind = int.from_bytes(asked[-4:-2], "big")
    wanted, _ = _name(asked, 12)
    first = wanted
    aliases: dict[str, str] = {}
    found: list[tuple[str, int, str]] = []
    shortest = 0x7FFFFFFF
    place = len(asked)
    for _ in range(int.from_bytes(told[6:8], "big")):
        owner, place = (first, place + 2) if told[place : place + 2] == _FIRST else _name(told, place)
        sort, family, ttl, size = _RECORD.unpack_from(told, place)
        place += _RECORD.size
        end = place + size
        if owner is None or end > len(told):
            return None
        if family == _IN and sort == kind:
            value = _value(told, kind, place, end)
            if value is None:
                return None
            found.append((owner, *value))
            shortest = min(shortest, 0 if ttl & 0x80000000 else ttl)  # RFC 2181 8
        elif family == _IN and sort == _CNAME:
            target, after = _name(told, place)
            if target is None or after != end or owner in aliases:
                return None
            aliases[owner] = target
        place = end
    for _ in range(_ALIASES):
        if wanted is None or wanted not in aliases:
            break
        wanted = aliases[wanted]
    if wanted is None or wanted in aliases or any(owner != wanted for owner, _, _ in found):
        return None
    return True, tuple(dict.fromkeys((preference, text) for _, preference, text in found)), shortest if found else 0


def _value(told: bytes, kind: int, place: int, end: int) -> tuple[int, str] | None:
    if kind == KINDS["MX"]:
        host, after = _name(told, place + 2)
        return (int.from_bytes(told[place : place + 2], "big"), host) if host is not None and after == end else None
    if kind == KINDS["A"]:
        return (0, "{}.{}.{}.{}".format(*told[place:end])) if end - place == 4 else None
    return None  # IPv6 has many spellings, and dnspython's is the one that is compared: once a host, not once a domain


def _name(told: bytes, place: int) -> tuple[str | None, int]:
    """A name in lower case without its final dot ("." is the root), and the place behind it; None where it is not
    plain. Raises IndexError for one that is cut short."""
    labels: list[bytes] = []
    after = 0
    for _ in range(127 + _POINTERS):
        size = told[place]
        if not size:
            text = b".".join(labels)
            return (text.decode("ascii").lower() or ".") if len(text) <= 253 else None, after or place + 1
        if size >= 0xC0:  # RFC 1035 4.1.4
            after = after or place + 2
            target = (size & 0x3F) << 8 | told[place + 1]
            if target >= place:
                return None, after  # a pointer points back, or it goes round for ever
            place = target
            continue
        label = told[place + 1 : place + 1 + size]
        if _LABEL.fullmatch(label) is None or len(label) != size:
            return None, after or place + 1
        labels.append(label)
        place += 1 + size
    return None, after or place
