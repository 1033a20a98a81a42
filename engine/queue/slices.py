"""The slice: up to 64 recipients of one job at one domain, as one string in Redis (design decision 3).

Laws:
- `parse_header(build(...))` gives back what was built; a header never names a person.
- Whatever is not opened by the key it names ends as `Lost`, a value the courier must handle, never as an exception
  half-way through a delivery.
- `cut` is a function of the sizes alone: the same rows give the same slices, so expansion can be repeated (T2).

Layout, big-endian (the scripts read and write the same offsets; they are listed in `states`):

====== ===== =======================================================================
offset bytes what
====== ===== =======================================================================
0      1     version (1)
1      5     job number
6      2     key id: the week of the queue key that seals the contents
8      1     count of recipients, 1 to 64
9      1     attempt, from 0
10     1     flags: 1 priority, 2 resend when in doubt
11     5     zero
16     8     done map: bit i (from the left) is recipient i
24     8     doubt map
32     8     date of the messages, microseconds; 0 until the first lease
40     8     token of the latest lease
48     8     expires_at, microseconds
56     11    lane reference
67     ..    nonce (12) and AES-256-GCM of the msgpack contents
====== ===== =======================================================================

Only date, token and the two maps change after a slice is built, and only inside scripts; key id and sealed part, when a
walk puts other bytes in their place (`resealed`, `rewritten`). The sealed part is bound to (job, partition) by
associated data, so a blob copied to another job does not open. The row of somebody who was erased is `blank` and done.

Known limits: attempt, flags and expiry are in clear and not authenticated: who can write to Redis can change them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = 1
MAX_ROWS = 64  # the width of the maps
MAX_BYTES = 32 * 1024  # of packed rows: what one lease reply and one seal should not exceed (decision 3)
HEADER_BYTES = 67
LANE_BYTES = 11
FLAG_PRIORITY = 1
FLAG_RESEND = 2

NONCE_BYTES = 12

_HEADER = struct.Struct(">B5sHBBB5x8s8sQQQ11s")
KEY_ID = slice(6, 8)  # where the header says it
DONE = slice(16, 24)

Value = Any  # what JSON has: templates loop over lists, too


class Row(msgspec.Struct, array_like=True, gc=False):
    """One recipient. mode_*: policy.gate.Mode; pseudonym: of the week the slice was built in; values: by column."""

    local: str
    subject: int
    pseudonym: int
    mode_opens: int
    mode_clicks: int
    values: list[Value]


class Contents(msgspec.Struct, array_like=True):
    """What is sealed: the domain (A-label), the names of the personalisation fields, the recipients."""

    domain: str
    columns: list[str]
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class Header:
    """The part in clear. done and doubt are 64-bit integers whose top bit is recipient 0."""

    job: int
    key_id: int
    count: int
    attempt: int
    flags: int
    done: int
    doubt: int
    date: int
    token: int
    expires_at: int
    lane: str

    @property
    def priority(self) -> bool:
        return bool(self.flags & FLAG_PRIORITY)

    @property
    def resend(self) -> bool:
        return bool(self.flags & FLAG_RESEND)

    def pending(self) -> list[int]:
        """Indexes of recipients without a done bit, in order."""
        return [index for index in range(self.count) if not self.done >> (MAX_ROWS - 1 - index) & 1]

    def in_doubt(self, index: int) -> bool:
        """True where an earlier attempt ended between the dot and its reply, and one more is allowed (T8)."""
        return bool(self.doubt >> (MAX_ROWS - 1 - index) & 1)


@dataclass(frozen=True, slots=True)
class Lost:
    """A slice nobody can open: its recipients end `lost`. reason is a short slug and names no content."""

    reason: str


class SliceError(ValueError):
    """We asked for something a slice cannot be (too many rows, a field out of range): a fault of ours."""


def mask_of(indexes: Iterable[int]) -> bytes:
    """The 8-byte map with the bits of these recipients set."""
    bits = 0
    for index in indexes:
        if not 0 <= index < MAX_ROWS:
            raise SliceError("recipient index outside 0..63")
        bits |= 1 << (MAX_ROWS - 1 - index)
    return bits.to_bytes(8, "big")


def cut(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where to cut rows of these packed sizes (bytes): half-open ranges of at most 64 rows and 32 KiB.

    A single row over 32 KiB gets a slice of its own: the job's limits bound it, the queue does not lose it.
    """
    ranges: list[tuple[int, int]] = []
    start = weight = 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= MAX_ROWS or weight + size > MAX_BYTES):
            ranges.append((start, index))
            start, weight = index, 0
        weight += size
    if start < len(sizes):
        ranges.append((start, len(sizes)))
    return ranges


def cut_rows(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """`cut` by the packed size of each row."""
    return cut([len(_row_encoder.encode(row)) for row in rows])


def packed(contents: Contents) -> list[tuple[int, int, bytes]]:
    """Any number of rows as `cut_rows` cuts them: (start, end, the packed contents of a slice).

    Each row is packed once: where 64 of them with their names stay under 32 KiB, so do the rows alone, and `cut` would
    cut there. Where a slice is larger, rows are weighed one by one."""
    rows = contents.rows
    ranges = [(start, min(start + MAX_ROWS, len(rows))) for start in range(0, len(rows), MAX_ROWS)]
    made = [(start, end, _part(contents, start, end)) for start, end in ranges]
    if all(len(data) <= MAX_BYTES for _, _, data in made):
        return made
    return [(start, end, _part(contents, start, end)) for start, end in cut_rows(rows)]


def _part(contents: Contents, start: int, end: int) -> bytes:
    return _encoder.encode(Contents(contents.domain, contents.columns, contents.rows[start:end]))


def build(
    key: bytes,
    key_id: int,
    job: int,
    partition: int,
    lane: str,
    contents: Contents,
    *,
    expires_at: int,
    attempt: int = 0,
    flags: int = 0,
    date: int = 0,
    doubt: Iterable[int] = (),
) -> bytes:
    """Header and sealed contents, ready for `Lanes.put` or a retry in `Lanes.settle`.

    expires_at, date in microseconds (date 0: fixed by the first lease; a retry carries the date it had);
    doubt: indexes into contents.rows. Raises SliceError when a number does not fit.
    """
    return build_packed(
        key, key_id, job, partition, lane, len(contents.rows), _encoder.encode(contents),
        expires_at=expires_at, attempt=attempt, flags=flags, date=date, doubt=doubt,
    )  # fmt: skip


def build_packed(
    key: bytes,
    key_id: int,
    job: int,
    partition: int,
    lane: str,
    count: int,
    contents: bytes,
    *,
    expires_at: int,
    attempt: int = 0,
    flags: int = 0,
    date: int = 0,
    doubt: Iterable[int] = (),
) -> bytes:
    """`build` of one of `packed`. count: of its rows."""
    reference = lane.encode("ascii")
    if not 1 <= count <= MAX_ROWS or len(reference) != LANE_BYTES:
        raise SliceError("a slice holds 1 to 64 recipients and an 11-character lane reference")
    try:
        header = _HEADER.pack(
            VERSION, job.to_bytes(5, "big"), key_id, count, min(attempt, 255), flags,
            b"\0" * 8, mask_of(doubt), date, 0, expires_at, reference,
        )  # fmt: skip
    except (struct.error, OverflowError) as error:
        raise SliceError(f"a header field is out of range: {error}") from None
    nonce = os.urandom(NONCE_BYTES)  # random 96 bits: a weekly key seals far fewer than 2^32 slices (SP 800-38D 8.3)
    return header + nonce + _cipher(key).encrypt(nonce, contents, _bound_to(job, partition))


def parse_header(data: bytes) -> Header | Lost:
    """Read the clear part. Anything that is not a slice of this version is Lost."""
    if len(data) < HEADER_BYTES:
        return Lost("short")
    fields = _HEADER.unpack_from(data)
    version, job, key_id, count, attempt, flags, done, doubt, date, token, expires_at, lane = fields
    if version != VERSION or not 1 <= count <= MAX_ROWS or not lane.isascii():
        return Lost("unknown-layout")
    return Header(
        job=int.from_bytes(job, "big"), key_id=key_id, count=count, attempt=attempt, flags=flags,
        done=int.from_bytes(done, "big"), doubt=int.from_bytes(doubt, "big"),
        date=date, token=token, expires_at=expires_at, lane=lane.decode("ascii"),
    )  # fmt: skip


def open_contents(keys: Mapping[int, bytes], header: Header, partition: int, data: bytes) -> Contents | Lost:
    """Unseal the recipients of a slice. keys: queue keys by week. Whatever does not open or fit is Lost."""
    plain = _unsealed(keys, header, partition, data)
    if isinstance(plain, Lost):
        return plain
    try:
        contents = _decoder.decode(plain)
    except ValueError:  # msgspec.DecodeError is one
        return Lost("does-not-open")
    if len(contents.rows) != header.count:
        return Lost("count-differs")
    return contents


def open_slice(keys: Mapping[int, bytes], partition: int, data: bytes) -> tuple[Header, Contents] | Lost:
    """`parse_header` and `open_contents` in one."""
    header = parse_header(data)
    if isinstance(header, Lost):
        return header
    contents = open_contents(keys, header, partition, data)
    return contents if isinstance(contents, Lost) else (header, contents)


def retry_of(
    key: bytes, key_id: int, partition: int, header: Header, contents: Contents, rows: Sequence[int], *,
    doubt: Iterable[int] = (),
) -> bytes:  # fmt: skip
    """A new slice of some recipients of an old one, one attempt later: same job, lane, date, expiry and flags.

    rows, doubt: indexes into the old slice. Doubt bits the old slice already had go along.
    """
    doubted = set(doubt) | {index for index in rows if header.in_doubt(index)}
    return build(
        key, key_id, header.job, partition, header.lane,
        Contents(contents.domain, contents.columns, [contents.rows[index] for index in rows]),
        expires_at=header.expires_at, attempt=header.attempt + 1, flags=header.flags, date=header.date,
        doubt=[place for place, index in enumerate(rows) if index in doubted],
    )  # fmt: skip


def resealed(keys: Mapping[int, bytes], key_id: int, partition: int, data: bytes) -> bytes | Lost:
    """The same slice under another key: only key id and sealed part differ. Lost: no key opens it."""
    header = parse_header(data)
    if isinstance(header, Lost):
        return header
    plain = _unsealed(keys, header, partition, data)
    if isinstance(plain, Lost):
        return plain
    nonce = os.urandom(NONCE_BYTES)
    named = data[: KEY_ID.start] + key_id.to_bytes(2, "big") + data[KEY_ID.stop : HEADER_BYTES]
    return named + nonce + _cipher(keys[key_id]).encrypt(nonce, plain, _bound_to(header.job, partition))


def blank() -> Row:
    """What stands in the place of somebody who was erased: the others keep theirs, and the maps their meaning."""
    return Row("", 0, 0, 0, 0, [])


def contents_with(
    keys: Mapping[int, bytes], header: Header, partition: int, data: bytes, subjects: Iterable[int]
) -> Contents | Lost | None:
    """`open_contents` of a slice that names one of these people; None: it names nobody of them.

    A lane may have ten thousand slices and one that is looked for: whether a number can be among them is told from the
    packed bytes, at a quarter of what opening costs (4 us for 64 rows of 3 fields, 15 us opened)."""
    plain = _unsealed(keys, header, partition, data)
    if isinstance(plain, Lost):
        return plain
    wanted = frozenset(subjects)
    if not any(_encoder.encode(subject) in plain for subject in wanted):
        return None
    contents = open_contents(keys, header, partition, data)
    if isinstance(contents, Lost) or any(row.subject in wanted for row in contents.rows):
        return contents
    return None


def rewritten(
    keys: Mapping[int, bytes], key_id: int, partition: int, data: bytes, contents: Contents, gone: Iterable[int] = ()
) -> bytes:
    """The same slice with other contents of as many rows, sealed anew. gone: indexes that are done from now on.

    Job, lane, due, date, token, doubt and expiry stay. Raises SliceError when the contents are of another slice."""
    header = parse_header(data)
    if isinstance(header, Lost) or len(contents.rows) != header.count:
        raise SliceError("contents of another slice")
    done = header.done | int.from_bytes(mask_of(gone), "big")
    nonce = os.urandom(NONCE_BYTES)
    named = data[: KEY_ID.start] + key_id.to_bytes(2, "big") + data[KEY_ID.stop : DONE.start]
    clear = named + done.to_bytes(8, "big") + data[DONE.stop : HEADER_BYTES]
    return (
        clear
        + nonce
        + _cipher(keys[key_id]).encrypt(nonce, _encoder.encode(contents), _bound_to(header.job, partition))
    )


def forget_keys() -> None:
    """Let go of the ciphers of keys that were destroyed: whatever is still used is set up again."""
    _cipher.cache_clear()


def _unsealed(keys: Mapping[int, bytes], header: Header, partition: int, data: bytes) -> bytes | Lost:
    key = keys.get(header.key_id)
    if key is None:
        return Lost("key-destroyed")
    body = HEADER_BYTES + NONCE_BYTES
    try:
        return _cipher(key).decrypt(data[HEADER_BYTES:body], data[body:], _bound_to(header.job, partition))
    except (InvalidTag, ValueError):  # ValueError: a nonce cut short
        return Lost("does-not-open")


def _bound_to(job: int, partition: int) -> bytes:
    return job.to_bytes(5, "big") + bytes((partition,))


@lru_cache(maxsize=16)  # two weeks' keys are in use at a time; setting one up costs more than sealing a slice
def _cipher(key: bytes) -> AESGCM:
    return AESGCM(key)


_encoder = msgspec.msgpack.Encoder()
_row_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Contents)
