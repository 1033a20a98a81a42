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

from policy.instants import WEEK_US
from policy.keys import (
    QUEUE_KEY_LIFE_US,
    SEAL_OVERHEAD,
    SUCCESSOR_AGE_US,
    Keyring,
    KeyringError,
    SealError,
    destroy_old,
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


def test_a_second_pepper_without_its_token_key_is_refused(folder: Path) -> None:
    """Tags of the other pepper would silently match nobody."""
    Keyring.create(folder, 2967)
    os.link(folder / "pepper.1", folder / "pepper.2")
    with pytest.raises(KeyringError, match=r"pepper\.2 is without token\.2"):
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


def test_systemds_credentials_may_show_its_acl_as_group_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring.create(folder, 2967)
    for path in folder.iterdir():
        path.chmod(0o440)
    folder.chmod(0o550)
    with pytest.raises(KeyringError, match="open to others"):
        Keyring.load(folder)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert Keyring.load(folder) == keyring
    (folder / "lane.1").chmod(0o444)
    with pytest.raises(KeyringError, match=r"lane\.1 is readable by others"):
        Keyring.load(folder)
    (folder / "lane.1").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder.parent))
    with pytest.raises(KeyringError, match="open to others"):
        Keyring.load(folder)


# --- destruction (decision 3): 14 days after the end of its week, never before a younger key is a day old -------------

WEEK = 2967
ENDED_US = (WEEK + 1) * WEEK_US


def aged(folder: Path, week: int, at_us: int) -> None:
    """The slice key of a week, made at this instant."""
    ensure_week(folder, week)
    os.utime(folder / f"queue.{week}", ns=(at_us * 1000, at_us * 1000))


def queue_keys(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "queue" in path.name)


def test_a_slice_key_is_destroyed_14_days_after_its_week(folder: Path) -> None:
    Keyring.create(folder, WEEK)
    aged(folder, WEEK + 1, ENDED_US)
    secret = (folder / f"queue.{WEEK}").read_bytes()
    held = os.open(folder / f"queue.{WEEK}", os.O_RDONLY)  # what a disk would still hold after the name is gone
    try:
        assert destroy_old(folder, ENDED_US + QUEUE_KEY_LIFE_US - 1) == []
        assert queue_keys(folder) == [f"queue.{WEEK}", f"queue.{WEEK + 1}"]
        assert destroy_old(folder, ENDED_US + QUEUE_KEY_LIFE_US) == [WEEK]
        assert os.pread(held, 1000, 0) == b"\0" * len(secret)
    finally:
        os.close(held)
    assert queue_keys(folder) == [f"queue.{WEEK + 1}"]
    assert WEEK not in Keyring.load(folder).queue
    assert destroy_old(folder, ENDED_US + QUEUE_KEY_LIFE_US) == []
    assert (folder / f"kek.{WEEK}").exists()  # subjects' keys have their own end


def test_the_newest_key_stays_however_old_it_is(folder: Path) -> None:
    Keyring.create(folder, WEEK)
    assert destroy_old(folder, ENDED_US + 100 * WEEK_US) == []
    assert queue_keys(folder) == [f"queue.{WEEK}"]


def test_after_a_month_away_old_keys_live_until_what_waits_could_be_sealed_anew(folder: Path) -> None:
    Keyring.create(folder, WEEK)
    back = ENDED_US + 5 * WEEK_US
    aged(folder, WEEK + 6, back)
    assert destroy_old(folder, back + SUCCESSOR_AGE_US - 1) == []
    assert destroy_old(folder, back + SUCCESSOR_AGE_US) == [WEEK]


def test_a_clock_that_was_far_ahead_for_a_moment_destroys_nothing(folder: Path) -> None:
    Keyring.create(folder, WEEK)
    ahead = ENDED_US + 30 * WEEK_US
    aged(folder, WEEK + 31, ahead)
    assert destroy_old(folder, ahead) == []
    assert destroy_old(folder, ENDED_US - WEEK_US) == []  # and right again


def test_a_crash_in_the_middle_leaves_no_half_key_and_is_finished_later(folder: Path) -> None:
    Keyring.create(folder, WEEK)
    aged(folder, WEEK + 1, ENDED_US)
    (folder / f"queue.{WEEK}").rename(folder / f".destroyed.queue.{WEEK}")
    (folder / f".destroyed.queue.{WEEK}").write_bytes(b"\0" * 65)
    assert list(Keyring.load(folder).queue) == [WEEK + 1]
    assert destroy_old(folder, ENDED_US) == []
    assert queue_keys(folder) == [f"queue.{WEEK + 1}"]
