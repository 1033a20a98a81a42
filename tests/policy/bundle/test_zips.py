"""Zip files: read by others, the same bytes each time, opened by the passphrase alone."""

from __future__ import annotations

import base64
import io
import struct
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.bundle import zips

ENTRIES = {"manifest.json": b"{}", "data/profile.jsonl": "żółć\n".encode() * 50, "data/empty.jsonl": b""}
SECRET = "K3QD7A-AAAAAA-BBBBBB-CCCCCC"


def test_the_standard_library_reads_plain_ones() -> None:
    data = zips.write(ENTRIES)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {one.filename: archive.read(one) for one in archive.infolist()} == ENTRIES
        assert {one.date_time for one in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {one.external_attr >> 16 & 0o777 for one in archive.infolist()} == {0o600}
    assert zips.write(ENTRIES) == data
    assert not zips.is_sealed(data)


@given(st.dictionaries(st.text(st.characters(codec="utf-8", categories=["L"]), min_size=1), st.binary(), max_size=4))
def test_both_kinds_are_read_back(entries: dict[str, bytes]) -> None:
    assert zips.read(zips.write(entries)) == entries
    sealed = zips.write(entries, SECRET)
    assert zips.read(sealed, SECRET) == entries


def test_a_sealed_one_shows_nothing_and_opens_with_its_passphrase_only() -> None:
    sealed = zips.write(ENTRIES, SECRET)
    assert zips.is_sealed(sealed)
    assert "żółć".encode() not in sealed
    assert sealed != zips.write(ENTRIES, SECRET)  # another salt each time
    assert zips.read(sealed, SECRET) == ENTRIES
    with pytest.raises(zips.ZipError, match="needs its passphrase"):
        zips.read(sealed)
    with pytest.raises(zips.ZipError, match=r"not the one of this file|another"):
        zips.read(sealed, SECRET[:-1])


def test_sealed_as_winzip_specifies_it() -> None:
    """Field by field from the AE-2 specification, and one entry by hand: other programs read by these."""
    sealed = zips.write({"a": b"secret"}, SECRET)
    method, extra = struct.unpack_from("<H", sealed, 8)[0], sealed[31:42]
    assert method == 99
    assert struct.unpack("<HHH2sBH", extra) == (0x9901, 7, 2, b"AE", 3, 0)
    assert struct.unpack_from("<I", sealed, 14)[0] == 0  # AE-2 keeps no checksum of the content
    assert struct.unpack_from("<II", sealed, 18) == (6 + 28, 6)


# made by pyzipper 0.4.0, which also opened ours when this was written
THEIRS = (
    "UEsDBBQAAQBjALkud10AAAAAMAAAABQAAAAMAAsAZGF0YS9hLmpzb25sAZkHAAIAQUUDAADu6CrRFT1+nABYHWEPnJvbCwBxH4r8"
    "OpZvOXwgFxz171MjNg59rEjBfamjYfVwEktQSwECFAMUAAEAYwC5LnddAAAAADAAAAAUAAAADAALAAAAAAAAAAAAgAEAAAAAZGF0"
    "YS9hLmpzb25sAZkHAAIAQUUDAABQSwUGAAAAAAEAAQBFAAAAZQAAAAAA"
)


def test_what_another_program_sealed_is_read() -> None:
    assert zips.read(base64.b64decode(THEIRS), "K3QD7A-AAAAAA") == {"data/a.jsonl": b"twenty bytes of text"}


@pytest.mark.parametrize("secret", ["", SECRET])
def test_any_flipped_bit_of_content_is_found(secret: str) -> None:
    data = zips.write({"data/a.jsonl": b"content"}, secret)
    start = data.index(b"a.jsonl") + 7 + (11 if secret else 0)
    for place in range(start, start + 7 + (28 if secret else 0)):
        broken = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(zips.ZipError):
            zips.read(broken, secret)


@given(st.binary(max_size=200) | st.integers(1, 400).map(lambda cut: zips.write(ENTRIES, SECRET)[:-cut]))
def test_what_is_no_zip_is_refused_with_one_error(data: bytes) -> None:
    with pytest.raises(zips.ZipError):
        zips.read(data, SECRET)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("data/profile.jsonl", "w") as entry:
            for _ in range((zips.READ_LIMIT >> 20) + 1):
                entry.write(bytes(1 << 20))
    with pytest.raises(zips.ZipError, match="larger than"):
        zips.read(out.getvalue())


def test_a_passphrase_is_long_enough_to_be_left_alone_with() -> None:
    made = {zips.passphrase() for _ in range(100)}
    assert len(made) == 100
    assert {len(one) for one in made} == {27}
