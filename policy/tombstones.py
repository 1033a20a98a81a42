"""The erasure ledger: what must never be forgotten again, in a file that a backup of the database does not bring back.

A backup is older than the erasures and opt-outs that came after it. Whoever restores it would write to those people
again; so each of these acts leaves a line here, and a restored system catches up from its backup's instant on
(`replay`) before it serves (requirements 4.4, P-11, P-17).

Laws:
- a line is on the disk (fsync) before anybody is told "done", and before the act it tells of is committed, unless it
  takes something back: then after that. A line without its act (the commit failed) and an act taken back without its
  line (a crash) are possible and harmless: a replay errs on the strict side;
- no line holds an address: keyed tags, partitions, numbers of accounts and subjects, slugs, instants;
- each line carries the hash of the one before and its own; ``<file>.head`` says how many there are. A changed line, a
  line taken out and a cut tail are reported with their line numbers, and a changed line is not carried out.

    append   all lines of one transaction: one write, one fsync
    replay   every line whose instant is not before the given one, and what is wrong with the file

Kinds of lines (``what``): `erasure` (begin this erasure again), `standing` (all reasons that stand against a tag, none:
it was taken back), `negative` (the negative list), `gap` (lines were missing when the file was opened: it goes on
behind them). What is done with them: `policy.remembering`.

Keep the folder outside of the backup, best on another disk, and copy it by itself: restored together with the database
it is as old as that. Mode 0600 in 0700; one process appends, the writer.

Cost: 190 bytes a line, one fsync a transaction.

Known limits: nothing is ever taken out, a million opt-outs are 200 MB. The chain has no key: whoever can write the
folder can write a whole new file. A head that a power cut made older than the file hides no line, it only notices less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import structlog

log = structlog.get_logger()

NAME: Final = "tombstones.jsonl"
KINDS: Final = frozenset({"erasure", "standing", "negative", "gap"})
_GENESIS: Final = "0" * 32
_TAIL: Final = 1 << 20  # bytes of the end that hold the last line for certain: a tag has a few hundred scopes at most
_ASIDE: Final = frozenset({"n", "prev", "hash", "at", "what"})


class TombstoneError(Exception):
    """The file cannot be written: then nothing that it must tell of may happen. The text names file and error only."""


@dataclass(frozen=True, slots=True)
class Line:
    """One act. at: microseconds; values: numbers, slugs, bytes as hexadecimal digits, lists of these."""

    what: str
    at: int
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.what not in KINDS:
            raise ValueError(f"unknown kind of tombstone {self.what!r}")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at a line (counted from 1) of the file."""

    line: int
    text: str


@dataclass(slots=True)
class Replay:
    """lines: in the order they were written; problems: empty for a file that is whole."""

    lines: list[Line] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class Tombstones:
    """One file, opened at the first append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._number = 0
        self._last = _GENESIS
        self.appended = 0

    def __repr__(self) -> str:
        return f"<Tombstones {self._number} lines>"

    def append(self, lines: Sequence[Line]) -> None:
        """On the disk when this returns. Raises TombstoneError: then take the act back."""
        if not lines:
            return
        try:
            handle = self._open()
            number, last, text = self._number, self._last, ""
            for line in lines:
                number += 1
                written = _written(line, number, last)
                last = written["hash"]
                text += _dumped(written) + "\n"
            self._write(handle, text.encode("ascii"))
            self._number, self._last = number, last
            self._write_head()
        except OSError as error:
            self.close()  # the next append looks at the file anew and cuts off what is torn
            raise TombstoneError(f"{self.path.name} cannot be written: {error.strerror}") from None
        self.appended += len(lines)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _write(self, handle: int, data: bytes) -> None:
        while data:
            data = data[os.write(handle, data) :]
        os.fdatasync(handle)

    def _open(self) -> int:
        if self._handle is not None:
            return self._handle
        folder = self.path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not self.path.exists()
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if is_new:
                _sync(folder)
            size = os.fstat(handle).st_size
            tail = os.pread(handle, _TAIL, max(0, size - _TAIL))
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):  # an append that a crash cut short: nobody was told of it
                log.warning("a torn line at the end of the tombstones is cut off", bytes=len(tail) - whole)
                os.ftruncate(handle, size - (len(tail) - whole))
            self._number, self._last = _end_of(tail[:whole])
            known, known_hash = self._head()
            if known > self._number:
                log.error("lines are missing at the end of the tombstones", first=self._number + 1, last=known)
                gap = Line("gap", 0, {"first": self._number + 1, "last": known})
                written = _written(gap, known + 1, known_hash)
                self._write(handle, (_dumped(written) + "\n").encode("ascii"))
                self._number, self._last = known + 1, written["hash"]
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return handle

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(self.path.name + ".head")

    def _write_head(self) -> None:
        handle = os.open(self._head_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:  # of one length always, in one write: never half of two
            os.pwrite(handle, f"{self._number:020d} {self._last}\n".encode("ascii"), 0)
        finally:
            os.close(handle)

    def _head(self) -> tuple[int, str]:
        try:
            number, last = self._head_path.read_text("ascii").split()
            return int(number), last
        except (FileNotFoundError, ValueError):
            return 0, _GENESIS

    def replay(self, since: int = 0) -> Replay:
        """What happened at or after an instant (microseconds), and what is wrong with the file as a whole.

        A file that is not there has no lines and, when no head is there either, no problem."""
        told = Replay()
        expected, last, place = 1, _GENESIS, 0
        for place, raw in enumerate(self._raw_lines(), 1):
            if not raw.endswith(b"\n"):
                told.problems.append(Problem(place, "is cut short"))
                continue
            written = _read(raw)
            if written is None:
                told.problems.append(Problem(place, "is not a line of this file"))
                expected, last = expected + 1, ""
                continue
            number = written["n"]
            is_changed = _hash(written) != written["hash"]
            if is_changed:
                told.problems.append(Problem(place, "was changed"))
            elif number != expected:
                told.problems.append(Problem(place, f"{_span(expected, number)} before it are missing or out of order"))
            elif last and written["prev"] != last:
                told.problems.append(Problem(place, "does not follow from the line before it"))
            if not is_changed and written["at"] >= since and written["what"] != "gap":
                told.lines.append(Line(written["what"], written["at"], _values(written)))
            expected, last = number + 1, "" if is_changed else written["hash"]
        known, _ = self._head()
        if known >= expected:
            told.problems.append(Problem(place + 1, f"{_span(expected, known + 1)} are missing: the tail was cut"))
        return told

    def _raw_lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from file
        except FileNotFoundError:
            return


def _span(first: int, end: int) -> str:
    return f"lines {first} to {end - 1}" if first < end - 1 else f"line {first}"


def _written(line: Line, number: int, prev: str) -> dict[str, Any]:
    if taken := _ASIDE & line.values.keys():
        raise ValueError(f"names of the frame itself: {sorted(taken)}")
    body = {**line.values, "what": line.what, "at": line.at, "n": number, "prev": prev}
    return {**body, "hash": _hash(body)}


def _dumped(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _hash(written: dict[str, Any]) -> str:
    body = {name: value for name, value in written.items() if name != "hash"}
    return blake2b(_dumped(body).encode("ascii"), digest_size=16, person=b"sp-tombstone").hexdigest()


def _read(raw: bytes) -> dict[str, Any] | None:
    try:
        written = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(written, dict) or _ASIDE - written.keys():
        return None
    whole = isinstance(written["n"], int) and isinstance(written["at"], int)
    words = isinstance(written["what"], str) and isinstance(written["hash"], str)
    return written if whole and words and written["what"] in KINDS else None


def _values(written: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in written.items() if name not in _ASIDE}


def _end_of(tail: bytes) -> tuple[int, str]:
    """(number, hash) of the last line that can be read, nothing at all: of none."""
    for raw in reversed(tail.splitlines()):
        written = _read(raw)
        if written is not None:
            return written["n"], written["hash"]
    return 0, _GENESIS


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def standing_lines(entries: Iterable[tuple[bytes, int, Sequence[Any]]], at: int) -> list[Line]:
    """(tag, partition, what stands against it: `policy.suppression.Entry`) as lines."""
    return [
        Line(
            "standing",
            at,
            {
                "tag": tag.hex(),
                "partition": partition,
                "entries": [[int(e.scope), e.scope_id, e.reason, e.created, e.expires] for e in standing],
            },
        )
        for tag, partition, standing in entries
    ]
