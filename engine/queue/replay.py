"""What is in a journal, and what a dead worker's journal obliges us to (promises T6 to T8).

Laws:
- What is read is a prefix of what was written: a torn or damaged record ends the reading, and how much was not read is
  reported.
- `plan` is pure; a terminal outcome stands whatever follows it, an intent that nothing followed is in doubt.

After a crash: `adopt` the folder (refused while its worker lives) · `plan` · settle the outcomes, decide the in-doubt ·
`Lanes.reclaim` · `carried`. `Plan.unclean` says that the machine restarted in between: the tail may be missing although
it was written, so every leased recipient of that holder without an outcome is in doubt.

A file that is carried out (``.kept``) is kept until the ledger has what was settled (`journal.Journal.retain`): a Redis
that comes back older has forgotten settles, and then every file of an older epoch is told again (T12).

File: 8 bytes of magic, then records of length (4), CRC-32 (4), body; big-endian. No address is ever in it: a message
is (job, mref), the event is the ledger's (policy.events).

Known limits: CRC-32 finds torn and flipped records, not forged ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from policy.events import TERMINAL

MAGIC = b"SPJRNL\x00\x01"
SUFFIX = ".journal"
KEPT = ".kept"  # carried out, and kept until the ledger has it
_FRAME = struct.Struct(">II")
_OLD_HEAD, _INTENT, _OUTCOME, _HEAD, _FORGOTTEN, _FORESEEN = 0, 1, 2, 3, 4, 5
_OLD_HEAD_FIELDS = struct.Struct(">BH")  # up to 0.1.0: without an epoch, which was 0
_HEAD_FIELDS = struct.Struct(">BHQ")
_FORGOTTEN_FIELDS = struct.Struct(">BBQ")
_INTENT_FIELDS = struct.Struct(">BBBBQQq")
_OUTCOME_FIELDS = struct.Struct(">BBBBQB")
_MAX_RECORD = 1 << 20  # a length above this is damage, not a record
_HEAD_BYTES = 1024  # a boot id, a host name and a few numbers

LeaseKey = tuple[int, str, int]  # partition, slice id, token


class JournalBroken(Exception):
    """The journal could not be written, synced or owned. The worker must stop sending and exit."""


@dataclass(frozen=True, slots=True)
class Intent:
    """The final dot of this message is about to leave."""

    job: int
    mref: int
    attempt: int
    partition: int
    slice_id: str
    token: int
    index: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one recipient of a lease. kind: policy.events.Kind; event: encoded as the caller likes."""

    partition: int
    slice_id: str
    token: int
    index: int
    kind: int
    event: bytes


@dataclass(frozen=True, slots=True)
class Forgotten:
    """This lease is over: it was settled to its end or handed back with nothing of it on the wire."""

    partition: int
    slice_id: str
    token: int


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A message is about to be composed, its dot may follow. It counts after an unclean boot only: a store that does
    not sync every write may have forgotten the lease, and the disk an intent of the last moment."""

    intent: Intent


Record = Intent | Outcome | Forgotten | Foreseen


@dataclass(frozen=True, slots=True)
class Log:
    """One file as far as it could be read. boot, holder are "" when not even its head could; torn: bytes not read;
    epoch: of the store when the file was begun (`policy.fence`)."""

    path: Path
    boot: str
    holder: str
    records: tuple[Record, ...]
    torn: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a dead worker's journal obliges us to. outcomes and in_doubt by lease, at most one entry a recipient."""

    outcomes: dict[LeaseKey, list[Outcome]] = field(default_factory=dict)
    in_doubt: dict[LeaseKey, list[Intent]] = field(default_factory=dict)
    holders: frozenset[str] = frozenset()
    unclean: bool = False


def frame(body: bytes) -> bytes:
    """A record as it stands in the file."""
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def encode_head(boot: str, holder: str, epoch: int = 0) -> bytes:
    """The first record of a file."""
    name = boot.encode()
    return _HEAD_FIELDS.pack(_HEAD, len(name), epoch) + name + holder.encode()


def encode_intent(intent: Intent, *, foreseen: bool = False) -> bytes:
    kind = _FORESEEN if foreseen else _INTENT
    return _INTENT_FIELDS.pack(
        kind, intent.partition, intent.index, min(intent.attempt, 255), intent.token, intent.job, intent.mref
    ) + intent.slice_id.encode("ascii")


def encode_outcome(outcome: Outcome) -> bytes:
    name = outcome.slice_id.encode("ascii")
    fields = _OUTCOME_FIELDS.pack(
        _OUTCOME, outcome.partition, outcome.index, outcome.kind, outcome.token, len(name)
    )  # fmt: skip
    return fields + name + outcome.event


def encode_forgotten(partition: int, slice_id: str, token: int) -> bytes:
    return _FORGOTTEN_FIELDS.pack(_FORGOTTEN, partition, token) + slice_id.encode("ascii")


def read(path: Path) -> Log:
    """Everything in a file up to the first record that is torn or damaged. Raises OSError only."""
    return _read(path, path.read_bytes())


def read_head(path: Path) -> Log:
    """What the head of a file says; no records. Raises OSError only."""
    with path.open("rb") as file:
        log = _read(path, file.read(_HEAD_BYTES))
    return replace(log, records=(), torn=0)


def _read(path: Path, data: bytes) -> Log:
    if data[: len(MAGIC)] != MAGIC:
        return Log(path, "", "", (), len(data))
    boot, holder, epoch = "", "", 0
    records: list[Record] = []
    end = len(MAGIC)
    for body, after in _bodies(data, end):
        try:
            if body[0] in (_HEAD, _OLD_HEAD):
                boot, holder, epoch = _decode_head(body)
            else:
                records.append(_decode(body))
        except (struct.error, ValueError):  # UnicodeDecodeError is a ValueError
            break
        end = after
    return Log(path, boot, holder, tuple(records), len(data) - end, epoch)


def read_folder(folder: Path) -> list[Log]:
    """All files of a worker that are not carried out, oldest first; none when there is no folder."""
    return [read(path) for path in paths(folder)]


def read_kept(folder: Path, epoch: int) -> tuple[list[Log], list[Path]]:
    """Files that are carried out: those of another epoch, read, and the paths of those of this one; oldest first."""
    others, same = [], []
    for path in paths(folder, KEPT):
        if read_head(path).epoch == epoch:
            same.append(path)
        else:
            others.append(read(path))
    return others, same


@contextlib.contextmanager
def adopt(folder: Path) -> Iterator[list[Log]]:
    """The logs of a dead worker, with nobody else replaying them meanwhile. Raises JournalBroken while it lives."""
    handle = own(folder)
    try:
        yield read_folder(folder)
    finally:
        os.close(handle)


def plan(logs: Sequence[Log], boot: str) -> Plan:
    """For each recipient the last word. boot: `journal.boot_id()` of now; logs: oldest first, of one worker."""
    last: dict[tuple[LeaseKey, int], Intent | Outcome] = {}
    forgotten: set[LeaseKey] = set()
    foreseen: dict[tuple[LeaseKey, int], Intent] = {}
    for log in logs:
        for record in log.records:
            if isinstance(record, Foreseen):
                ahead = record.intent
                foreseen[(ahead.partition, ahead.slice_id, ahead.token), ahead.index] = ahead
                continue
            key = (record.partition, record.slice_id, record.token)
            if isinstance(record, Forgotten):
                forgotten.add(key)
                continue
            place = (key, record.index)
            known = last.get(place)
            if isinstance(known, Outcome) and known.kind in TERMINAL:
                continue
            last[place] = record
    named = [log for log in logs if log.holder]
    unclean = any(log.boot != boot for log in named)
    if unclean:
        last = {**foreseen, **last}
    outcomes: dict[LeaseKey, list[Outcome]] = {}
    in_doubt: dict[LeaseKey, list[Intent]] = {}
    for (key, _), record in last.items():
        if isinstance(record, Outcome):
            outcomes.setdefault(key, []).append(record)
        elif key not in forgotten:  # an intent whose lease was handed back was answered, or never reached its peer
            in_doubt.setdefault(key, []).append(record)
    return Plan(outcomes, in_doubt, frozenset(log.holder for log in named), unclean)


def discard(logs: Sequence[Log]) -> None:
    """Remove files whose plan has been carried out and whose outcomes the ledger has."""
    for log in logs:
        log.path.unlink(missing_ok=True)


def carried(path: Path) -> Path:
    """This file's plan is carried out: it is not replayed again. Its name from now on."""
    return path if path.suffix == KEPT else path.rename(path.with_suffix(KEPT))


def paths(folder: Path, suffix: str = SUFFIX) -> list[Path]:
    """The journal files of a folder, oldest first. suffix: SUFFIX those to be replayed, KEPT those carried out."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.suffix == suffix and path.stem.isdigit())
    return sorted(found, key=lambda path: int(path.stem))


def own(folder: Path) -> int:
    """Lock a worker's folder; the handle holds the lock until it is closed or the process dies."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise JournalBroken(f"the journal folder {folder} belongs to a living process") from None
    return handle


def _decode_head(body: bytes) -> tuple[str, str, int]:
    """(boot id, holder, epoch)"""
    epoch = 0
    if body[0] == _HEAD:
        _, length, epoch = _HEAD_FIELDS.unpack_from(body)
        text = body[_HEAD_FIELDS.size :]
    else:
        _, length = _OLD_HEAD_FIELDS.unpack_from(body)
        text = body[_OLD_HEAD_FIELDS.size :]
    return text[:length].decode(), text[length:].decode(), epoch


def _decode(body: bytes) -> Record:
    if body[0] == _FORGOTTEN:
        _, partition, token = _FORGOTTEN_FIELDS.unpack_from(body)
        return Forgotten(partition, body[_FORGOTTEN_FIELDS.size :].decode("ascii"), token)
    if body[0] in (_INTENT, _FORESEEN):
        _, partition, index, attempt, token, job, mref = _INTENT_FIELDS.unpack_from(body)
        intent = Intent(job, mref, attempt, partition, body[_INTENT_FIELDS.size :].decode("ascii"), token, index)
        return Foreseen(intent) if body[0] == _FORESEEN else intent
    if body[0] == _OUTCOME:
        _, partition, index, kind, token, length = _OUTCOME_FIELDS.unpack_from(body)
        name = body[_OUTCOME_FIELDS.size : _OUTCOME_FIELDS.size + length].decode("ascii")
        return Outcome(partition, name, token, index, kind, body[_OUTCOME_FIELDS.size + length :])
    raise ValueError("a record of no known kind")


def _bodies(data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    while start + _FRAME.size <= len(data):
        length, check = _FRAME.unpack_from(data, start)
        end = start + _FRAME.size + length
        if not 0 < length <= _MAX_RECORD or end > len(data):
            return
        body = data[start + _FRAME.size : end]
        if zlib.crc32(body) != check:
            return
        yield body, end
        start = end
