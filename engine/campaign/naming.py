"""Whether something that waits to be expanded names a person, and the same without them or with a field put right.

No I/O. A person is known by suppression tag and domain alone: the address may be gone by then (decision 13), so each
address that is met is keyed and compared. Only addresses of the person's own domain are keyed: a chunk of a thousand
rows costs about as much as reading it, twice that where all are of one domain.

Laws:
- a row belongs to whoever it is addressed to; that another row mentions the person in a field does not make it theirs,
  and it is not touched;
- lines keep their number and their order, all other lines every byte: places in the audience, and the references made
  of places, stay what they were (`expand._invalid`);
- the same again changes nothing.

`BLANK_LINE` is a row whose address is no address; `engine.campaign.expand` refuses it as ERASED, an older program as
INVALID, and neither resolves, asks or keeps anything of it.

Known limits: in bytes that are no JSON an address is looked for as it is written; one hidden by escapes is not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from engine.campaign.expand import ERASED_ADDRESS
from engine.campaign.job import MOST_ROW_BYTES
from engine.campaign.validation import read_row
from policy import keyspace
from policy.address import AddressError, normalise, parse, tag_of

BLANK_LINE: Final = msgspec.json.encode({"address": ERASED_ADDRESS})
_ENDS: Final = frozenset("\t\n\r\v\f <>()[],;:@\"'\\")  # what an address in running text stands behind
_IN_DOMAINS: Final = ".-\u3002\uff0e\uff61"  # beside letters and digits; the dots of IDNA (RFC 3490 3.1)
_PARTS: Final = "=/?&|"  # and what may be glued to its front: "to=ada@example.org"
_LONGEST: Final = 320
_DOMAINS_KEPT: Final = 10_000


class Naming:
    """The test for one person. lane: keyed domain reference, "": any domain of the partition; pepper, lane_key: of the
    keyring."""

    def __init__(self, tag: bytes, partition: int, lane: str, pepper: bytes, lane_key: bytes) -> None:
        self._tag = tag
        self._partition = partition
        self._lane = lane
        self._pepper = pepper
        self._lane_key = lane_key
        self._domains: dict[str, bool] = {}

    def __repr__(self) -> str:
        return "<Naming>"

    def is_theirs(self, address: str) -> bool:
        """Whether this address is the person's, in any spelling that has the same tag."""
        _, at, domain = address.rpartition("@")
        if not at or len(address) > _LONGEST or not self._is_their_domain(domain.strip().lower()):
            return False
        try:
            mailbox = parse(address)
        except (AddressError, UnicodeError):
            return False
        return tag_of(self._pepper, normalise(mailbox.local, mailbox.domain)) == self._tag

    def in_text(self, text: str) -> bool:
        """Whether their address stands somewhere in a text. Linear in its length."""
        if "@" not in text:
            return False
        if self.is_theirs(text.strip()):
            return True
        at = text.find("@")
        while at >= 0:
            start, end = at, at + 1
            while start > max(0, at - _LONGEST) and text[start - 1] not in _ENDS:
                start -= 1
            while end < min(len(text), at + _LONGEST) and (text[end].isalnum() or text[end] in _IN_DOMAINS):
                end += 1
            local, domain = text[start:at], text[at + 1 : end].rstrip(".")
            cut = max(local.rfind(part) for part in _PARTS)
            if any(self.is_theirs(f"{one}@{domain}") for one in {local, local[cut + 1 :]} if one):
                return True
            at = text.find("@", at + 1)
        return False

    def in_json(self, data: bytes) -> bool:
        """Whether a payload, JSON or not, names them anywhere at all."""
        try:
            tree = msgspec.json.decode(data)
        except (ValueError, RecursionError):
            return self.in_text(data.decode("utf-8", "replace"))
        return any(map(self.in_text, _texts(tree)))

    def _is_their_domain(self, domain: str) -> bool:
        known = self._domains.get(domain)
        if known is None:
            try:
                name = parse(f"x@{domain}").domain
            except (AddressError, UnicodeError):
                known = False
            else:
                known = keyspace.partition_of(name) == self._partition and (
                    not self._lane or keyspace.lane_ref(name, self._lane_key) == self._lane
                )
            if len(self._domains) >= _DOMAINS_KEPT:
                self._domains.clear()
            self._domains[domain] = known
        return known


def places(data: bytes, naming: Naming) -> list[int]:
    """Indexes of the lines of an audience entry that are the person's rows."""
    return [place for place, line in enumerate(data.split(b"\n")) if _is_their_line(line, naming)]


def blanked(data: bytes, theirs: list[int]) -> bytes:
    """The entry with blank lines in these places."""
    lines = data.split(b"\n")
    for place in theirs:
        lines[place] = BLANK_LINE
    return b"\n".join(lines)


def corrected(data: bytes, theirs: list[int], field: str, value: str) -> tuple[bytes, int]:
    """The entry with another value of a field in these rows, where they have it; in how many it was another."""
    lines = data.split(b"\n")
    changed = 0
    for place in theirs:
        row = fields_of(lines[place])
        holder = row if field == "name" and "name" in row else row.get("fields")
        if not isinstance(holder, dict) or field not in holder or holder[field] == value:
            continue
        holder[field] = value
        line = msgspec.json.encode(row)
        if len(line) > MOST_ROW_BYTES:
            raise ValueError("the corrected row would be longer than a row may be")
        lines[place] = line
        changed += 1
    return b"\n".join(lines), changed


def fields_of(line: bytes) -> dict[str, Any]:
    """A row as it was written; {} where it cannot be read."""
    try:
        row = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def rows_in(payload: bytes, naming: Naming) -> list[dict[str, Any]]:
    """The person's rows among the recipients of a job that was handed in whole."""
    rows = fields_of(payload).get("recipients")
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, dict) and naming.is_theirs(str(row.get("address", "")))]


def _is_their_line(line: bytes, naming: Naming) -> bool:
    if b"@" not in line and b"\\" not in line:  # an escape may hide the sign
        return False
    row = read_row(line)
    if row is not None:
        return naming.is_theirs(row.address)
    address = fields_of(line).get("address")  # a row that will be refused for something else
    if isinstance(address, str):
        return naming.is_theirs(address)
    return naming.in_text(line.decode("utf-8", "replace"))


def _texts(tree: Any) -> Iterator[str]:
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
