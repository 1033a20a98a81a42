"""The keyring: made once, read strictly, shown nowhere."""

from __future__ import annotations

import os
import pickle
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from policy.keys import (
    SEAL_OVERHEAD,
    Keyring,
    KeyringError,
    SealError,
    ensure_week,
    open_note,
    open_sealed,
    seal,
    seal_note,
)

NAMES = ["intake.1", "kek.2967", "lane.1", "pepper.1", "queue.2967", "return-path.1", "service.1", "token.1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_create_makes_every_key_private_and_distinct(folder: Path) -> None:
    keyring = Keyring.create(folder, 2967)
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    keys = [
        keyring.pepper,
        keyring.token[keyring.token_id],
        keyring.return_path[keyring.return_path_id],
        keyring.queue[keyring.queue_id],
        keyring.kek[keyring.kek_id],
        keyring.service,
        keyring.intake,
        keyring.lane,
    ]
    assert {len(key) for key in keys} == {32}
    assert len(set(keys)) == len(keys)
    assert (keyring.queue_id, keyring.kek_id, keyring.token_id) == (2967, 2967, 1)


def test_create_again_keeps_what_is_there(folder: Path) -> None:
    first = Keyring.create(folder, 2967)
    assert Keyring.create(folder, 2967) == first
    assert Keyring.load(folder) == first
    (folder / "lane.1").unlink()
    mended = Keyring.create(folder, 2967)
    assert mended.lane != first.lane
    assert mended.pepper == first.pepper


def test_a_new_week_adds_keys_and_uses_them(folder: Path) -> None:
    first = Keyring.create(folder, 2967)
    assert not ensure_week(folder, 2967)
    assert ensure_week(folder, 2968)
    second = Keyring.load(folder)
    assert (second.queue_id, second.kek_id) == (2968, 2968)
    assert second.queue[2967] == first.queue[2967]
    assert second.kek[2968] != second.kek[2967]


def test_two_at_once_make_one_key(folder: Path) -> None:
    """The policy process and a command may both turn the week: one file, and both read the same key."""
    Keyring.create(folder, 2967)
    start = threading.Barrier(4)
    made: list[bool] = []

    def turn() -> None:
        start.wait()
        made.append(ensure_week(folder, 2968))

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(made)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert Keyring.load(folder).kek_id == 2968


@pytest.mark.parametrize("name", NAMES)
def test_a_key_others_may_read_is_refused_by_name_and_fix(folder: Path, name: str) -> None:
    Keyring.create(folder, 2967)
    (folder / name).chmod(0o640)
    with pytest.raises(KeyringError, match=rf"{name} is readable by others: chmod 0600"):
        Keyring.load(folder)


def test_an_open_folder_is_refused(folder: Path) -> None:
    Keyring.create(folder, 2967)
    folder.chmod(0o750)
    with pytest.raises(KeyringError, match="chmod 0700"):
        Keyring.load(folder)
    with pytest.raises(KeyringError, match="chmod 0700"):
        Keyring.create(folder, 2967)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_key_is_named(folder: Path, name: str) -> None:
    Keyring.create(folder, 2967)
    (folder / name).unlink()
    with pytest.raises(KeyringError, match=name.partition(".")[0]):
        Keyring.load(folder)


@pytest.mark.parametrize("content", ["", "zz" * 32, "00" * 31, "00" * 33, "\x00" * 64, "00" * 4000])
def test_what_is_not_a_key_is_refused_without_showing_it(folder: Path, content: str) -> None:
    Keyring.create(folder, 2967)
    (folder / "service.1").write_text(content)
    with pytest.raises(KeyringError, match=r"service\.1") as caught:
        Keyring.load(folder)
    assert not content or content not in str(caught.value)


def test_a_missing_folder_says_what_to_do(folder: Path) -> None:
    with pytest.raises(KeyringError, match="sales-push init"):
        Keyring.load(folder)


def test_two_peppers_are_refused(folder: Path) -> None:
    """Tags of the other pepper would silently match nobody."""
    Keyring.create(folder, 2967)
    os.link(folder / "pepper.1", folder / "pepper.2")
    with pytest.raises(KeyringError, match="exactly one"):
        Keyring.load(folder)


def test_no_representation_shows_a_key(folder: Path) -> None:
    keyring = Keyring.create(folder, 2967)
    shown = repr(keyring) + str(keyring) + f"{keyring!r:s}"
    for key in (keyring.pepper, keyring.service, keyring.kek[2967], keyring.intake):
        assert key.hex() not in shown
        assert repr(key) not in shown


def test_the_public_intake_key_belongs_to_the_private_one(folder: Path) -> None:
    keyring = Keyring.create(folder, 2967)
    private = X25519PrivateKey.from_private_bytes(keyring.intake)
    assert keyring.intake_public == private.public_key().public_bytes_raw()
    assert pickle.loads(pickle.dumps(keyring)) == keyring


KEY = bytes(range(32))


@given(st.binary(max_size=300), st.binary(max_size=30))
def test_what_is_sealed_opens_and_is_never_the_same_twice(plaintext: bytes, aad: bytes) -> None:
    sealed = seal(KEY, plaintext, aad)
    assert open_sealed(KEY, sealed, aad) == plaintext
    assert len(sealed) == len(plaintext) + SEAL_OVERHEAD
    assert seal(KEY, plaintext, aad) != sealed


@given(st.binary(max_size=60), st.data())
def test_one_flipped_bit_opens_nothing(plaintext: bytes, data: st.DataObject) -> None:
    """Law: no changed byte, other key, other purpose or cut seal opens."""
    sealed = bytearray(seal(KEY, plaintext, b"a"))
    place = data.draw(st.integers(0, len(sealed) * 8 - 1))
    with pytest.raises(SealError):
        open_sealed(KEY, bytes(sealed), b"b")
    with pytest.raises(SealError):
        open_sealed(bytes(32), bytes(sealed), b"a")
    with pytest.raises(SealError):
        open_sealed(KEY, bytes(sealed[: place // 8]), b"a")
    sealed[place // 8] ^= 1 << place % 8
    with pytest.raises(SealError):
        open_sealed(KEY, bytes(sealed), b"a")


def test_notes_are_sealed_and_no_text_is_no_bytes(folder: Path) -> None:
    keyring = Keyring.create(folder, 2967)
    note = seal_note(keyring, "550 5.1.1 <bob@example.com> unknown \ud800")
    assert b"bob" not in note
    assert open_note(keyring, note) == "550 5.1.1 <bob@example.com> unknown ?"
    assert (seal_note(keyring, ""), open_note(keyring, b"")) == (b"", "")
