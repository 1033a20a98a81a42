"""The reader of strace's log: what a disk holds after a power cut is what was synced, and nothing more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.power import Disk, Kept, NotRead, wrapper

OPENED = '7  openat(AT_FDCWD</d>, "a", O_WRONLY|O_CREAT|O_APPEND|O_CLOEXEC, 0600) = 3</d/a>'
FOLDER = ['7  openat(AT_FDCWD</d>, "/d", O_RDONLY|O_DIRECTORY) = 4</d>', "7  fsync(4</d>) = 0"]


def after(*lines: str, sizes: dict[str, int] | None = None) -> list[Kept]:
    disk = Disk(sizes or {})
    disk.read([line + "\n" for line in lines], "/d")
    return disk.after_cut()


def write(count: int, descriptor: str = "3</d/a>") -> str:
    return f'7  write({descriptor}, ""..., {count}) = {count}'


def test_what_was_written_after_the_last_sync_is_gone() -> None:
    assert after(OPENED, *FOLDER, write(10), "7  fdatasync(3</d/a>) = 0", write(5)) == [Kept("/d/a", "/d/a", 10)]


def test_a_sync_covers_what_was_written_before_it_began_not_while_it_ran() -> None:
    lines = [
        OPENED, *FOLDER, write(10), "8  fdatasync(3</d/a> <unfinished ...>", write(5),
        "8  <... fdatasync resumed>)         = 0",
    ]  # fmt: skip
    assert after(*lines) == [Kept("/d/a", "/d/a", 10)]


@pytest.mark.parametrize(
    "end",
    [
        ["8  <... fdatasync resumed>) = -1 EIO (Input/output error)"],
        ["8  <... fdatasync resumed>) = ?", "8  +++ killed by SIGKILL +++"],
        ["8  +++ killed by SIGKILL +++"],
    ],
)
def test_a_sync_that_did_not_end_well_promises_nothing(end: list[str]) -> None:
    lines = [OPENED, *FOLDER, write(10), "8  fdatasync(3</d/a> <unfinished ...>"]
    assert after(*lines, *end) == [Kept("/d/a", "/d/a", 0)]


def test_a_write_in_two_lines_counts_when_it_is_over() -> None:
    lines = [OPENED, *FOLDER, '7  write(3</d/a>, ""..., 10 <unfinished ...>', "8  fsync(3</d/a>) = 0"]
    assert after(*lines, "7  <... write resumed>) = 10") == [Kept("/d/a", "/d/a", 0)]
    assert after(*lines, "7  <... write resumed>) = 10", "8  fsync(3</d/a>) = 0") == [Kept("/d/a", "/d/a", 10)]


def test_a_name_that_its_folder_does_not_have_yet_is_gone_with_all_that_was_synced() -> None:
    assert after(OPENED, write(10), "7  fsync(3</d/a>) = 0") == [Kept("/d/a", "", 10)]


def test_a_file_that_was_there_keeps_its_name_and_its_bytes() -> None:
    assert after(OPENED, write(5), sizes={"/d/a": 100, "/d/b": 7}) == [Kept("/d/a", "/d/a", 100)]


def test_a_rename_is_undone_unless_its_folder_was_synced() -> None:
    lines = [OPENED, *FOLDER, 'X  rename("a", "b") = 0'.replace("X", "7")]
    assert after(*lines) == [Kept("/d/b", "/d/a", 0)]
    assert after(*lines, FOLDER[1]) == [Kept("/d/b", "/d/b", 0)]
    both = '7  renameat2(AT_FDCWD</d>, "a", AT_FDCWD</d>, "b", 0) = 0'
    assert after(OPENED, *FOLDER, both) == [Kept("/d/b", "/d/a", 0)]


def test_a_rename_over_another_file_has_happened() -> None:
    assert after('7  rename("a", "b") = 0', sizes={"/d/a": 5, "/d/b": 9}) == [Kept("/d/b", "/d/b", 5)]


def test_a_file_that_is_removed_is_nobodys_business() -> None:
    assert after(OPENED, write(3), '7  unlink("/d/a") = 0') == []
    assert after(OPENED, '7  unlinkat(AT_FDCWD</d>, "a", 0) = 0', write(3, "3</d/a>(deleted)")) == []


def test_bytes_written_over_are_named_until_the_next_sync() -> None:
    opened = '7  openat(AT_FDCWD</d>, "w", O_RDWR|O_CREAT, 0600) = 3</d/w>'
    over = ['7  pwrite64(3</d/w>, ""..., 24, 32) = 24', '7  pwrite64(3</d/w>, ""..., 100, 56) = 100']
    sizes = {"/d/w": 1000}
    assert after(opened, *over, sizes=sizes) == [Kept("/d/w", "/d/w", 1000, ((32, 156),))]
    assert after(opened, *over, "7  fsync(3</d/w>) = 0", sizes=sizes) == [Kept("/d/w", "/d/w", 1000)]
    beyond = '7  pwrite64(3</d/w>, ""..., 20, 990) = 20'
    assert after(opened, beyond, sizes=sizes) == [Kept("/d/w", "/d/w", 1000, ((990, 1000),))]


def test_positions_without_append_are_followed() -> None:
    opened = '7  openat(AT_FDCWD</d>, "a", O_WRONLY|O_CREAT, 0600) = 3</d/a>'
    lines = [opened, write(4), "7  lseek(3</d/a>, 20, SEEK_SET) = 20", write(4), "7  fsync(3</d/a>) = 0"]
    assert after(*lines, sizes={"/d/a": 10}) == [Kept("/d/a", "/d/a", 24)]


def test_what_is_cut_off_or_begun_anew_is_gone() -> None:
    sizes = {"/d/a": 100}
    assert after(OPENED, "7  ftruncate(3</d/a>, 30) = 0", write(5), sizes=sizes) == [Kept("/d/a", "/d/a", 30)]
    anew = '7  openat(AT_FDCWD</d>, "a", O_WRONLY|O_CREAT|O_TRUNC, 0600) = 3</d/a>'
    assert after(anew, write(5), sizes=sizes) == [Kept("/d/a", "/d/a", 0)]


def test_calls_that_failed_did_nothing() -> None:
    failed = [
        '7  openat(AT_FDCWD</d>, "b", O_WRONLY|O_CREAT, 0600) = -1 ENOSPC (No space left on device)',
        '7  write(3</d/a>, ""..., 9) = -1 ENOSPC (No space left on device)', '7  rename("a", "b") = -1 EXDEV (x)',
    ]  # fmt: skip
    assert after(OPENED, *FOLDER, *failed) == [Kept("/d/a", "/d/a", 0)]


def test_the_programs_of_several_logs_share_a_disk() -> None:
    disk = Disk({})
    disk.read([line + "\n" for line in [OPENED, *FOLDER, write(9), "7  fsync(3</d/a>) = 0"]], "/d")
    disk.read(['9  openat(AT_FDCWD</e>, "/d/a", O_RDWR|O_CREAT, 0600) = 3</d/a>\n'], "/e")
    assert disk.after_cut() == [Kept("/d/a", "/d/a", 9)]
    assert disk.syncs == 2


def test_a_line_that_is_not_understood_ends_it_and_a_torn_last_one_does_not() -> None:
    with pytest.raises(NotRead):
        after("what is this", OPENED)
    with pytest.raises(NotRead):
        after("7  <... fdatasync resumed>) = 0", OPENED)
    with pytest.raises(NotRead):
        after('7  link("a", "b") = 0', OPENED)
    disk = Disk({"/d/a": 4})
    disk.read([OPENED + "\n", '7  write(3</d/a>, ""...'], "/d")
    assert disk.after_cut() == []


_PROGRAM = """
import os, signal
a = os.open("a", os.O_WRONLY | os.O_CREAT | os.O_APPEND); d = os.open(".", os.O_RDONLY)
os.write(a, b"x" * 10); os.fdatasync(a); os.fsync(d)
os.write(a, b"y" * 7)
b = os.open("b", os.O_WRONLY | os.O_CREAT); os.write(b, b"z"); os.fsync(b)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.debian
def test_the_log_of_a_real_strace_is_read(tmp_path: Path) -> None:
    log, place = tmp_path / "log", tmp_path / "place"
    place.mkdir()
    words = [word for word in wrapper(str(log)) if word != "-D"]  # its end is the end of the program
    subprocess.run([*words, sys.executable, "-I", "-S", "-c", _PROGRAM], cwd=place, timeout=30, check=False)
    disk = Disk({})
    with log.open() as lines:
        disk.read(lines, str(place))
    kept = {kept.path: kept for kept in disk.after_cut()}
    a, b = str(place / "a"), str(place / "b")
    assert kept == {a: Kept(a, a, 10), b: Kept(b, "", 1)}
    assert (place / "a").stat().st_size == 17
