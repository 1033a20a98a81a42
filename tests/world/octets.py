"""What a file holds, without taking SQLite's locks from it.

A process that closes any descriptor of a file lets go of all POSIX locks it has on it (fcntl(2), "advisory record
locks"). SQLite relies on them, in policy.db and in its -shm: with those gone, the next process that opens the store
takes itself for the first one, cuts the -shm short and the writer here ends with SIGBUS at its next commit. So a test
that has a store open looks into its files by another process.

    octets(path)     what is in it: by `cat` where SQLite may have it open
    guard()          an audit hook for the whole suite: opening a file that SQLite has open here is an error
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_SQLITE = (".db", ".db-wal", ".db-shm", ".db-journal")


def octets(path: Path) -> bytes:
    if path.name.endswith(_SQLITE):
        return subprocess.run(["cat", "--", path], stdout=subprocess.PIPE, check=True).stdout
    return path.read_bytes()


def _open_here(path: str) -> bool:
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return False
    for handle in os.listdir("/proc/self/fd"):
        try:
            held = os.stat(int(handle))
        except OSError:  # the listing's own
            continue
        if (held.st_dev, held.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], (str, os.PathLike)):
        return
    if len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & os.O_EXCL:
        return  # of what is there it opens nothing
    path = os.fspath(arguments[0])
    if isinstance(path, str) and path.endswith(_SQLITE) and _open_here(path):
        raise RuntimeError(
            f"{os.path.basename(path)} is open in SQLite here and would lose its locks: octets() reads it"
        )


def guard() -> None:
    """For the life of this process: an audit hook cannot be taken out again."""
    sys.addaudithook(_hook)
