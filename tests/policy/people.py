"""Made-up people for the tests of this floor: address, tag and partition as the expansion works them out."""

from __future__ import annotations

from policy.address import normalise, parse, tag_of
from policy.keyspace import partition_of


def row_of(pepper: bytes, text: str) -> tuple[bytes, int, str]:
    """(tag, partition, wire address), what `vault.resolve` takes."""
    mailbox = parse(text)
    tag = tag_of(pepper, normalise(mailbox.local, mailbox.domain))
    return tag, partition_of(mailbox.domain), mailbox.wire


def rows_of(pepper: bytes, count: int, first: int = 0) -> list[tuple[bytes, int, str]]:
    """Numbered people at a hundred domains."""
    return [row_of(pepper, f"person.{n}@domain{n % 100}.example") for n in range(first, first + count)]
