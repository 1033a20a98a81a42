"""What a disk holds after a power cut: the log of strace read, file by file (promises.md 3). Pure.

    strace -D -f -y -s 0 -e trace=... -o log program        `wrapper`
    disk = Disk(sizes); disk.read(lines)                    sizes: of the files that were there before
    disk.after_cut()                                        what became of each file that was touched

What survives is what was promised, nothing more:
- of a file, its bytes at the moment the last *completed* fsync or fdatasync of it *began*; a sync the cut met halfway
  has not happened;
- of a folder, the names it had when its own last completed sync began: a file made since is gone, whatever it holds, a
  file renamed since has its old name again;
- bytes below that size which were written over since are named (`Kept.rewritten`): old or new, both are allowed.

Known limits: a file unlinked, or replaced by a rename, without its folder being synced stays away, for its bytes are
not in the log; a new folder survives (ext4, xfs and btrfs write the parents with the first sync in it); nobody here
writes through mmap but SQLite's -shm, which is no data. Positions are kept by descriptor and path, so two processes of
one log must not write the same file without O_APPEND.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

CALLS: Final = (
    "openat", "open", "creat", "write", "pwrite64", "writev", "pwritev", "lseek", "ftruncate", "truncate", "fallocate",
    "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "chdir",
)  # fmt: skip

_LINE = re.compile(r"^(\d+) +(.*)$")
_UNFINISHED = re.compile(r"^(\w+)\((.*?),? *<unfinished \.\.\.>$")
_RESUMED = re.compile(r"^<\.\.\. (\w+) resumed>,? ?(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?(?: .*)?$")
_FD = re.compile(r"^(\d+)<(/.*?)>(?:, |$)")
_AT = re.compile(r"^(?:AT_FDCWD|\d+)<(/.*?)>, \"(.*?)\"")
_AT_TWO = re.compile(r"^(?:AT_FDCWD|\d+)<(/.*?)>, \"(.*?)\", (?:AT_FDCWD|\d+)<(/.*?)>, \"(.*?)\"")
_QUOTED = re.compile(r"\"(.*?)\"")


class NotRead(ValueError):
    """A line of the log that is in no known form: nothing may be concluded from the rest."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What becomes of a file. path: where it is now; name: where it is after the cut, "" when it is gone; size: to be
    cut to; rewritten: (from, to) below it, written since the last sync."""

    path: str
    name: str
    size: int
    rewritten: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _File:
    """size: as the program sees it; synced: as the disk promises; name: in its folder on the disk, "" in none yet."""

    size: int = 0
    synced: int = 0
    name: str = ""
    dirty: list[tuple[int, int]] = field(default_factory=list)
    touched: bool = False


@dataclass(slots=True)
class _Sync:
    """What a sync that has begun will have promised when it ends."""

    file: _File | None
    size: int
    dirty: int
    names: list[tuple[_File, str]]


def wrapper(log: str) -> list[str]:
    """The words a program is run under. -D: it stays our own child and has the pid we know."""
    return ["strace", "-D", "-f", "-y", "-s", "0", "--seccomp-bpf", "-e", f"trace={','.join(CALLS)}",
            "-e", "signal=kill", "-o", log]  # fmt: skip


class Disk:
    """What several programs wrote. Read the log of who makes a file before the logs of those who only open it."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._files = {path: _File(size, size, path) for path, size in sizes.items()}
        self._cwd = "/"
        self._appends: set[tuple[str, str]] = set()
        self._at: dict[tuple[str, str], int] = {}
        self._waiting: dict[str, tuple[str, str, _Sync | None]] = {}
        self.syncs = 0

    def read(self, lines: Iterable[str], cwd: str = "/") -> None:
        """One log. cwd: of the program, for relative names. Raises NotRead. A last line that was cut short is passed
        over."""
        self._cwd = cwd
        self._waiting.clear()
        held: str | None = None
        for line in lines:
            if held is not None:
                self._line(held)
            held = line
        if held is not None and held.endswith("\n"):
            self._line(held)

    def _line(self, line: str) -> None:
        found = _LINE.match(line.rstrip("\n"))
        if found is None:
            raise NotRead(line)
        pid, text = found.groups()
        if text.startswith(("+++", "---", "strace:")):
            return
        if begun := _UNFINISHED.match(text):
            name, arguments = begun.groups()
            self._waiting[pid] = name, arguments, self._begin(name, arguments)
            return
        sync: _Sync | None = None
        if resumed := _RESUMED.match(text):
            name, rest = resumed.groups()
            known, arguments, sync = self._waiting.pop(pid, ("", "", None))
            if known != name:
                raise NotRead(line)
            comma = ", " if arguments and not rest.startswith(")") else ""
            text = f"{name}({arguments}{comma}{rest}"
        call = _CALL.match(text)
        if call is None:
            if text.endswith("= ?"):  # the process ended inside
                return
            raise NotRead(line)
        name, arguments, answer, opened = call.groups()
        if int(answer) >= 0:
            self._done(name, arguments, int(answer), opened or "", sync or self._begin(name, arguments))

    # --- syncs ----------------------------------------------------------------------------------------------------

    def _begin(self, name: str, arguments: str) -> _Sync | None:
        if name not in ("fsync", "fdatasync"):
            return None
        found = _FD.match(arguments)
        if found is None:
            return None
        path = found[2]
        file = self._files.get(path)
        inside = [(each, at) for at, each in self._files.items() if os.path.dirname(at) == path]
        return _Sync(file, file.size if file else 0, len(file.dirty) if file else 0, inside)

    def _end(self, sync: _Sync) -> None:
        self.syncs += 1
        if sync.file is not None:
            sync.file.synced = sync.size
            del sync.file.dirty[: sync.dirty]
        for file, name in sync.names:
            file.name = name

    # --- calls ----------------------------------------------------------------------------------------------------

    def _done(self, name: str, arguments: str, answer: int, opened: str, sync: _Sync | None) -> None:
        if sync is not None:
            self._end(sync)
        elif name in ("openat", "open", "creat"):
            self._open(arguments, str(answer), opened, name == "creat")
        elif name in ("write", "writev", "pwrite64", "pwritev"):
            self._write(name, arguments, answer)
        elif name in ("lseek", "ftruncate", "fallocate"):
            self._on_descriptor(name, arguments, answer)
        elif name == "truncate":
            path = self._path(_QUOTED.findall(arguments)[0])
            if path in self._files:
                self._resize(self._files[path], int(arguments.rpartition(", ")[2]))
        elif name.startswith("rename"):
            old, new = self._two(arguments)
            self._rename(old, new)
        elif name.startswith("link"):
            old, new = self._two(arguments)
            raise NotRead(f"a second name, {new} for {old}, is not understood")
        elif name == "unlink":
            self._files.pop(self._path(_QUOTED.findall(arguments)[0]), None)
        elif name == "unlinkat":
            at = _AT.match(arguments)
            if at is not None:
                self._files.pop(os.path.normpath(os.path.join(*at.groups())), None)
        elif name == "chdir":
            self._cwd = self._path(_QUOTED.findall(arguments)[0])

    def _open(self, arguments: str, descriptor: str, path: str, is_creat: bool) -> None:
        flags = set(arguments.split('"')[-1].strip(", ").split(", ")[0].split("|"))
        if not is_creat and not flags & {"O_WRONLY", "O_RDWR"}:
            return
        key = descriptor, path
        self._at[key] = 0
        self._appends.discard(key)
        if "O_APPEND" in flags:
            self._appends.add(key)
        file = self._files.get(path)
        if file is None and (is_creat or "O_CREAT" in flags):
            self._files[path] = _File(touched=True)
        elif file is not None and (is_creat or "O_TRUNC" in flags):
            self._resize(file, 0)

    def _write(self, name: str, arguments: str, count: int) -> None:
        found = _FD.match(arguments)
        if found is None or found[2] not in self._files:
            return
        key = found[1], found[2]
        file = self._files[found[2]]
        if name.startswith("p"):
            start = int(arguments.rpartition(", ")[2])
        else:
            start = file.size if key in self._appends else self._at.get(key, 0)
            self._at[key] = start + count
        end = start + count
        if start < file.size or start > file.size:
            file.dirty.append((start, end))
        file.size, file.touched = max(file.size, end), True

    def _on_descriptor(self, name: str, arguments: str, answer: int) -> None:
        found = _FD.match(arguments)
        if found is None or found[2] not in self._files:
            return
        file = self._files[found[2]]
        if name == "lseek":
            self._at[found[1], found[2]] = answer
        elif name == "ftruncate":
            self._resize(file, int(arguments.rpartition(", ")[2]))
        else:
            _, mode, offset, length = arguments.split(", ")
            if mode == "0":
                self._resize(file, max(file.size, int(offset) + int(length)))

    def _resize(self, file: _File, size: int) -> None:
        """What is cut off is gone for both: its bytes are not in the log, and an empty end is no data."""
        file.size, file.touched = size, True
        file.synced = min(file.synced, size)
        file.dirty = [(start, min(end, size)) for start, end in file.dirty if start < size]

    def _rename(self, old: str, new: str) -> None:
        file = self._files.pop(old, None)
        replaced = self._files.get(new)
        if file is None:
            return
        file.touched = True
        if replaced is not None:
            file.name = new  # atomic, and the old bytes are not in the log: it has happened
        self._files[new] = file

    def _two(self, arguments: str) -> tuple[str, str]:
        if both := _AT_TWO.match(arguments):
            one, two = os.path.join(both[1], both[2]), os.path.join(both[3], both[4])
            return os.path.normpath(one), os.path.normpath(two)
        old, new = _QUOTED.findall(arguments)[:2]
        return self._path(old), self._path(new)

    def _path(self, name: str) -> str:
        return os.path.normpath(os.path.join(self._cwd, name))

    # --- the cut --------------------------------------------------------------------------------------------------

    def after_cut(self) -> list[Kept]:
        """Of every file that was touched, by path."""
        return [
            Kept(path, file.name, file.synced, _below(file.dirty, file.synced))
            for path, file in sorted(self._files.items())
            if file.touched
        ]


def _below(ranges: Sequence[tuple[int, int]], size: int) -> tuple[tuple[int, int], ...]:
    """Those parts that are below a size, merged."""
    found: list[tuple[int, int]] = []
    for start, end in sorted((start, min(end, size)) for start, end in ranges if start < size):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return tuple(found)
