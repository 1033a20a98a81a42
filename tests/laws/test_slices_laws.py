"""Laws of the slice: nothing is lost by cutting, nothing is changed by sealing, nothing opens that was touched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.queue import slices
from engine.queue.slices import Contents, Header, Lost, Row

KEY = bytes(range(1, 33))
VALUES = st.one_of(st.text(max_size=20), st.integers(-(2**53), 2**53), st.booleans(), st.none())
ROWS = st.builds(
    Row,
    local=st.text(min_size=1, max_size=64),
    subject=st.integers(0, 2**63 - 1),
    pseudonym=st.integers(0, 2**63 - 1),
    mode_opens=st.integers(0, 3),
    mode_clicks=st.integers(0, 3),
    values=st.lists(VALUES, max_size=5),
)
CONTENTS = st.builds(
    Contents, domain=st.just("example.test"), columns=st.lists(st.text(max_size=9), max_size=5),
    rows=st.lists(ROWS, min_size=1, max_size=64),
)  # fmt: skip


@given(st.lists(st.integers(1, 40_000), max_size=300))
def test_cutting_keeps_every_row_once_in_order_and_within_bounds(sizes: list[int]) -> None:
    """Every row is in exactly one slice, in order; a slice of more than one row is within 64 rows and 32 KiB."""
    ranges = slices.cut(sizes)

    assert [index for start, end in ranges for index in range(start, end)] == list(range(len(sizes)))
    for start, end in ranges:
        assert 1 <= end - start <= 64
        assert end - start == 1 or sum(sizes[start:end]) <= 32 * 1024
    assert ranges == slices.cut(list(sizes))


@given(st.lists(st.tuples(st.integers(1, 64), st.sampled_from((0, 5, 300, 3_000, 40_000))), max_size=200))
def test_packing_cuts_where_cutting_by_weight_does(sizes: list[tuple[int, int]]) -> None:
    """packed(contents) has the ranges of cut_rows, and each is the contents of these rows."""
    rows = [Row("x" * local, 1, 2, 3, 3, ["y" * value]) for local, value in sizes]

    made = slices.packed(Contents("example.test", ["name"], rows))

    assert [(start, end) for start, end, _ in made] == slices.cut_rows(rows)
    for start, end, data in made:
        whole = slices.build_packed(KEY, 1, 1, 0, "l" * 11, end - start, data, expires_at=1)
        opened = slices.open_slice({1: KEY}, 0, whole)
        assert not isinstance(opened, Lost)
        assert opened[1] == Contents("example.test", ["name"], rows[start:end])


@given(CONTENTS, st.integers(0, 2**40 - 1), st.integers(0, 63), st.integers(0, 2**16 - 1), st.integers(0, 2**53))
def test_what_is_sealed_is_opened(contents: Contents, job: int, partition: int, week: int, expires_at: int) -> None:
    """open(build(x)) is x, header included."""
    data = slices.build(KEY, week, job, partition, "l" * 11, contents, expires_at=expires_at)

    opened = slices.open_slice({week: KEY}, partition, data)

    assert not isinstance(opened, Lost)
    header, again = opened
    assert again == contents
    assert header == Header(job, week, len(contents.rows), 0, 0, 0, 0, 0, 0, expires_at, "l" * 11)


@given(st.binary(max_size=300), st.booleans())
def test_anything_at_all_is_a_slice_or_lost(data: bytes, versioned: bool) -> None:
    """No bytes whatever make the reader raise, and none of them open without the key having sealed them."""
    assert isinstance(slices.open_slice({0: KEY, 1: KEY}, 0, (b"\x01" if versioned else b"") + data), Lost)


@given(CONTENTS, st.data())
def test_a_touched_seal_never_opens(contents: Contents, data: st.DataObject) -> None:
    """One flipped bit in the sealed part, and the slice is lost."""
    sealed = bytearray(slices.build(KEY, 1, 9, 3, "l" * 11, contents, expires_at=1))
    place = data.draw(st.integers(slices.HEADER_BYTES, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))

    assert slices.open_slice({1: KEY}, 3, bytes(sealed)) == Lost("does-not-open")


@given(st.sets(st.integers(0, 63)), st.integers(1, 64))
def test_pending_is_the_complement_of_done(done: set[int], count: int) -> None:
    """A recipient is pending or done, never both, never neither."""
    header = Header(1, 1, count, 0, 0, int.from_bytes(slices.mask_of(done), "big"), 0, 0, 0, 0, "l" * 11)

    assert set(header.pending()) == set(range(count)) - done
