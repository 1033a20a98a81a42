"""The slice by example: its bytes at their documented places, and everything that does not open is Lost."""

from __future__ import annotations

import struct

import pytest

from engine.queue import slices
from engine.queue.slices import Contents, Header, Lost, Row

KEY = bytes(range(32))
LANE = "abcdefghijk"
ROWS = [Row("ada", 11, 21, 3, 0, ["Ada", 1, None, 2.5, True]), Row("bob", 12, 22, 0, 0, ["Bob", 0, "", 0.0, False])]
CONTENTS = Contents("example.test", ["name", "n", "x", "f", "b"], ROWS)


def built(attempt: int = 0, flags: int = 0, date: int = 0) -> bytes:
    return slices.build(
        KEY, 2910, 1 << 39, 7, LANE, CONTENTS,
        expires_at=1_800_000_000_000_000, attempt=attempt, flags=flags, date=date,
    )  # fmt: skip


def test_the_header_has_the_layout_of_the_design() -> None:
    data = built(attempt=3, flags=slices.FLAG_PRIORITY | slices.FLAG_RESEND, date=1_700_000_000_000_001)

    assert data[0] == 1
    assert int.from_bytes(data[1:6], "big") == 1 << 39
    assert struct.unpack(">HBBB", data[6:11]) == (2910, 2, 3, 3)
    assert data[11:32] == bytes(21)
    assert struct.unpack(">QQQ", data[32:56]) == (1_700_000_000_000_001, 0, 1_800_000_000_000_000)
    assert data[56:67] == LANE.encode()


def test_a_slice_opens_to_what_was_sealed() -> None:
    opened = slices.open_slice({2910: KEY}, 7, built())

    assert not isinstance(opened, Lost)
    header, contents = opened
    assert contents == CONTENTS
    assert (header.job, header.count, header.lane, header.priority, header.resend) == (1 << 39, 2, LANE, False, False)
    assert header.pending() == [0, 1]


def test_no_name_is_in_clear() -> None:
    assert b"ada" not in built()
    assert b"example" not in built()


@pytest.mark.parametrize(
    ("keys", "partition", "damage", "reason"),
    [
        ({}, 7, 0, "key-destroyed"),
        ({2910: bytes(32)}, 7, 0, "does-not-open"),
        ({2910: KEY}, 8, 0, "does-not-open"),
        ({2910: KEY}, 7, 70, "does-not-open"),
        ({2910: KEY}, 7, 8, "count-differs"),
        ({2910: KEY}, 7, 5, "does-not-open"),  # another job number
        ({2910: KEY}, 7, 60, None),  # the lane is not bound: it only says where the slice waits
        ({2910: KEY}, 7, 1 << 20, "short"),
    ],
)
def test_what_does_not_open_is_lost(keys: dict[int, bytes], partition: int, damage: int, reason: str | None) -> None:
    data = bytearray(built())
    if damage == 1 << 20:
        del data[66:]
    elif damage:
        data[damage] ^= 1

    opened = slices.open_slice(keys, partition, bytes(data))

    assert opened == Lost(reason) if reason else not isinstance(opened, Lost)


def test_garbage_is_lost() -> None:
    assert slices.parse_header(b"\x02" + bytes(200)) == Lost("unknown-layout")
    assert slices.parse_header(b"") == Lost("short")
    assert slices.open_slice({2910: KEY}, 7, built()[:70]) == Lost("does-not-open")


def test_maps_read_from_the_left() -> None:
    assert slices.mask_of([0]) == b"\x80" + bytes(7)
    assert slices.mask_of([63]) == bytes(7) + b"\x01"
    with pytest.raises(slices.SliceError):
        slices.mask_of([64])


def test_a_retry_keeps_job_date_expiry_and_doubt() -> None:
    data = bytearray(built(date=5, flags=slices.FLAG_RESEND))
    data[24:32] = slices.mask_of([1])
    header = slices.parse_header(bytes(data))
    assert isinstance(header, Header)

    opened = slices.open_slice({3: KEY}, 7, slices.retry_of(KEY, 3, 7, header, CONTENTS, [1]))

    assert not isinstance(opened, Lost)
    again, contents = opened
    assert contents.rows == [ROWS[1]]
    assert (again.job, again.attempt, again.date, again.expires_at) == (1 << 39, 1, 5, header.expires_at)
    assert (again.in_doubt(0), again.resend, again.lane, again.token) == (True, True, LANE, 0)


def test_what_cannot_be_a_slice_is_our_fault() -> None:
    with pytest.raises(slices.SliceError):
        slices.build(KEY, 1, 1, 1, LANE, Contents("x.test", [], []), expires_at=1)
    with pytest.raises(slices.SliceError):
        slices.build(KEY, 1, 1, 1, "short", CONTENTS, expires_at=1)
    with pytest.raises(slices.SliceError):
        slices.build(KEY, 70_000, 1, 1, LANE, CONTENTS, expires_at=1)
    with pytest.raises(slices.SliceError):
        slices.build(KEY, 1, 1 << 40, 1, LANE, CONTENTS, expires_at=1)


def test_cutting_by_count_and_by_bytes() -> None:
    assert slices.cut([]) == []
    assert slices.cut([10] * 130) == [(0, 64), (64, 128), (128, 130)]
    assert slices.cut([20_000, 20_000, 1]) == [(0, 1), (1, 3)]
    assert slices.cut([50_000, 50_000]) == [(0, 1), (1, 2)]
    assert slices.cut_rows(ROWS) == [(0, 2)]
