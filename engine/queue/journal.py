"""The journal of one worker: intents before the dot, outcomes before the settle (promises T6, T7; decision 8).

Laws:
- When `intend` returns, the intents are with the kernel (write(2)): a killed process cannot forget them.
- When `durable` returns, everything appended before it was called is on the disk (fdatasync).
- Where the store may forget its leases at a power cut (not appendfsync always), everybody is `foresee`n on the disk
  before his message is composed; it puts him in doubt after an unclean boot, and says nothing otherwise (T8).
- Every outcome is on the disk within `window` (10 ms at most) and one fdatasync of being recorded, asked for or not.
- A failed write or sync is final: the journal is broken, and says so at every later call. Never is fdatasync tried
  again after an error; the kernel may have dropped the pages and would call the second try a success (fsyncgate).

- A file lives until every lease in it is forgotten *and* the ledger has what was settled (`ledgered`): a Redis that
  comes back older has forgotten settles, the journal has not (T12).

The life of a record: `record` puts it in memory · the window ends or an intent comes, one write(2) · one fdatasync in
a thread for all that wait (group commit) · the settle reaches Redis · `forget` · the drain reaches SQL · `ledgered`.
What a crash leaves is read by `replay`, whose names are exported here too.

Known limits: one journal is used from one event loop. A file of 64 MiB that is full is synced on the loop itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from engine.queue.replay import (
    KEPT,
    MAGIC,
    SUFFIX,
    Foreseen,
    Forgotten,
    Intent,
    JournalBroken,
    LeaseKey,
    Log,
    Outcome,
    Plan,
    adopt,
    carried,
    discard,
    encode_forgotten,
    encode_head,
    encode_intent,
    encode_outcome,
    frame,
    own,
    paths,
    plan,
    read,
    read_folder,
    read_head,
    read_kept,
)
from policy.crashpoints import reach

WINDOW = 0.008  # seconds of group commit: with the sync itself within the 10 ms of T7 on an ordinary disk
FILE_LIMIT = 64 * 1024 * 1024  # bytes; half a million outcomes
BOOT_VARIABLE = "SALESPUSH_BOOT_ID"

__all__ = [
    "FILE_LIMIT", "WINDOW", "Foreseen", "Forgotten", "Intent", "Journal", "JournalBroken", "LeaseKey", "Log",
    "Outcome", "Page", "Plan", "adopt", "boot_id", "carried", "discard", "plan", "read", "read_folder", "read_head",
    "read_kept",
]  # fmt: skip


@dataclass(slots=True)
class _File:
    """forgotten: µs of Redis TIME of the last `forget` that has a part in it; known: what was ledgered then."""

    path: Path
    handle: int
    size: int = 0
    leases: set[LeaseKey] = field(default_factory=set)
    forgotten: int = 0
    known: int = 0


class Page:
    """What the journal writes about one lease, all but the recipient worked out once: 0.4 us a record, not 1.5. The
    records are those of `encode_intent` and `encode_outcome`, cut where the recipient's fields stand."""

    __slots__ = ("_intent", "_outcome", "_tail", "key")

    def __init__(self, job: int, attempt: int, key: LeaseKey) -> None:
        self.key = key
        intent = encode_intent(Intent(job, 0, attempt, *key, 0))
        outcome = encode_outcome(Outcome(*key, 0, 0, b""))
        self._intent = (intent[:2], intent[3:20], intent[28:])
        self._outcome = (outcome[:2], outcome[4:])

    def intent(self, index: int, mref: int) -> bytes:
        """The record of an intent."""
        kind, lease, name = self._intent
        return b"%b%c%b%b%b" % (kind, index, lease, mref.to_bytes(8, "big", signed=True), name)

    def outcome(self, index: int, kind: int, event: bytes) -> bytes:
        """The record of an outcome."""
        head, lease = self._outcome
        return b"%b%c%c%b%b" % (head, index, kind, lease, event)


class Journal:
    """Open for writing. `Journal.open` in the worker, once; `close` at the end."""

    def __init__(
        self,
        folder: Path,
        holder: str,
        boot: str,
        *,
        epoch: int,
        clock: Callable[[], int] | None,
        window: float,
        file_limit: int,
    ) -> None:
        self._folder, self._holder, self._boot, self._epoch = folder, holder, boot, epoch
        self._clock = clock
        self._ledgered = 0
        self._window, self._file_limit = min(window, 0.010), file_limit
        self._buffer = bytearray()
        self._asides = bytearray()  # written with the next record: nobody waits for them
        self._written = self._synced = 0
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._sync: asyncio.Future[None] | None = None
        self._broken: JournalBroken | None = None
        self.on_broken: Callable[[JournalBroken], None] = lambda error: None  # told once, whoever was asking
        self._closed = False
        self._old: list[_File] = []
        self._lock = own(folder)
        try:
            self._file = self._new_file()
        except BaseException:
            os.close(self._lock)
            raise
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="journal")

    @classmethod
    def open(
        cls,
        folder: Path,
        holder: str,
        boot: str,
        *,
        epoch: int = 0,
        clock: Callable[[], int] | None = None,
        window: float = WINDOW,
        file_limit: int = FILE_LIMIT,
    ) -> Journal:
        """A new file in the worker's folder (made 0700). Older files stay: read, carry out and `retain` them first.

        epoch: of the store; clock: Redis TIME in µs, never behind it. Without a clock nobody says what the ledger has,
        and files go with their last lease. Raises JournalBroken, also when a living process owns the folder."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(folder, holder, boot, epoch=epoch, clock=clock, window=window, file_limit=file_limit)
        except OSError as error:
            raise JournalBroken(f"the journal folder {folder} cannot be written: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<Journal of {self._holder}: {self._written} bytes written, {self._synced} on disk>"

    def intend(self, intents: Iterable[Intent]) -> None:
        """Call right before the bytes with the final dots are handed to the socket. One write(2) for all."""
        for intent in intents:
            self._append(encode_intent(intent), (intent.partition, intent.slice_id, intent.token))
        self._write()

    def intend_on(self, intents: Iterable[tuple[Page, int, int]]) -> None:
        """`intend`, by page, index and mref."""
        for page, index, mref in intents:
            self._append(page.intent(index, mref), page.key)
        self._write()

    def foresee(self, intents: Iterable[Intent]) -> None:
        """Whose messages are about to be composed, where the store may forget at a power cut that it leased them.
        `await durable()` before any of them is handed to a line: then none can have arrived and be known to nobody."""
        for intent in intents:
            key = (intent.partition, intent.slice_id, intent.token)
            self._append(encode_intent(intent, foreseen=True), key)
        self._commit_soon()

    def record(self, outcome: Outcome) -> None:
        """Remember an outcome; on the disk within the window. `await durable()` before it is settled."""
        self._append(encode_outcome(outcome), (outcome.partition, outcome.slice_id, outcome.token))
        self._commit_soon()

    def record_on(self, page: Page, index: int, kind: int, event: bytes) -> None:
        """`record`, by page."""
        self._append(page.outcome(index, kind, event), page.key)
        self._commit_soon()

    async def durable(self) -> None:
        """Wait until all that was appended is on the disk. Raises JournalBroken."""
        self._check()
        target = self._written + len(self._buffer)
        if target <= self._synced:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((target, waiter))
        self._commit_soon()
        await waiter

    def forget(self, partition: int, slice_id: str, token: int) -> None:
        """This lease is over and everything recorded of it is in Redis. Old files nobody needs any more go."""
        key = (partition, slice_id, token)
        now = self._clock() if self._clock is not None else 0
        known = False
        for file in (*self._old, self._file):
            if key in file.leases:
                known = True
                file.leases.remove(key)
                file.forgotten, file.known = now, self._ledgered
        if not known:
            return  # nothing of it was ever written
        if self._broken is None:
            self._asides += frame(encode_forgotten(partition, slice_id, token))
            self._file.forgotten, self._file.known = now, self._ledgered
        self._sweep()

    def ledgered(self, moment: int) -> None:
        """Every event that was in Redis at this moment (µs, Redis TIME) is in SQL."""
        self._ledgered = moment
        self._sweep()

    def retain(self, files: Iterable[Path]) -> None:
        """Files of before that are carried out, by now: they go when the ledger has it."""
        now = self._clock() if self._clock is not None else 0
        self._old += [_File(carried(path), -1, forgotten=now, known=self._ledgered) for path in files]
        self._sweep()

    def _sweep(self) -> None:
        for file in [file for file in self._old if not file.leases and self._is_told(file)]:
            self._old.remove(file)
            file.path.unlink(missing_ok=True)

    def _is_told(self, file: _File) -> bool:
        """Whether the ledger has all that was settled of a file whose leases are forgotten. Where the clock of Redis
        stepped back, an instant may be passed that is still to come: so it must have been said since."""
        if self._clock is None or not file.forgotten:
            return True
        return self._ledgered >= file.forgotten and self._ledgered != file.known

    def has_room(self, floor: int) -> bool:
        """Whether the disk has this many bytes left: below it no new attempts, before it is too late (faults 3.4)."""
        space = os.statvfs(self._folder)
        return space.f_bavail * space.f_frsize >= floor

    async def close(self) -> None:
        """Sync what is left; safe to call twice. A clean stop leaves nothing to replay: files whose leases are all
        forgotten are removed, or kept as carried out. Raises JournalBroken when the last sync fails."""
        if self._closed:
            return
        try:
            if self._broken is None:
                self._buffer += self._asides
                self._asides.clear()
                await self.durable()
        finally:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            if self._sync is not None:
                await self._sync
            self._threads.shutdown()
            os.close(self._file.handle)
            if self._broken is None:
                self._sweep()
                for file in (*self._old, self._file):
                    if file.leases:
                        continue
                    if self._is_told(file):
                        file.path.unlink(missing_ok=True)
                    else:
                        carried(file.path)
            os.close(self._lock)
            self._broken = self._broken or JournalBroken("the journal is closed")

    def _append(self, body: bytes, key: LeaseKey) -> None:
        if self._broken is not None:
            raise self._broken
        if self._asides:
            self._buffer += self._asides
            self._asides.clear()
        self._buffer += frame(body)
        self._file.leases.add(key)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _write(self) -> None:
        self._check()
        data, self._buffer = self._buffer, bytearray()
        try:
            while data:
                written = os.write(self._file.handle, data)
                self._written += written
                self._file.size += written
                if written == len(data):
                    break
                del data[:written]
        except OSError as error:
            self._fail(error)
            self._check()

    def _commit_soon(self) -> None:
        if self._timer is None and self._sync is None:
            self._timer = asyncio.get_running_loop().call_later(self._window, self._commit)

    def _commit(self) -> None:
        self._timer = None
        with contextlib.suppress(JournalBroken):  # the waiters have been told, and every later call will be
            self._write()
            if self._file.size >= self._file_limit:
                self._rotate()
            self._sync = asyncio.ensure_future(self._synchronise(self._written))

    async def _synchronise(self, target: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            reach("before-fsync")
            await loop.run_in_executor(self._threads, os.fdatasync, self._file.handle)
            reach("after-fsync")
        except OSError as error:
            self._fail(error)
            return
        finally:
            self._sync = None
        self._synced = target
        waiting, self._waiters = self._waiters, []
        for position, waiter in waiting:
            if position > target:
                self._waiters.append((position, waiter))
            elif not waiter.done():
                waiter.set_result(None)
        if self._buffer or self._written > self._synced:
            self._commit_soon()

    def _rotate(self) -> None:
        # The old file is synced before the new one begins, or a power cut could keep the later and lose the earlier.
        try:
            os.fdatasync(self._file.handle)
            os.close(self._file.handle)
            self._old.append(self._file)
            self._sweep()
            self._file = self._new_file()
        except OSError as error:
            self._fail(error)
            self._check()

    def _fail(self, error: OSError) -> None:
        self._broken = JournalBroken(f"the journal failed: {error.strerror}")
        self.on_broken(self._broken)
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(self._broken)
        self._waiters.clear()

    def _new_file(self) -> _File:
        taken = paths(self._folder) + paths(self._folder, KEPT)
        number = 1 + max((int(path.stem) for path in taken), default=0)
        path = self._folder / f"{number:08d}{SUFFIX}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            head = MAGIC + frame(encode_head(self._boot, self._holder, self._epoch))
            if os.write(handle, head) != len(head):  # a torn head would hide everything written behind it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(handle)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)  # the name must survive a power cut as well as the contents
            finally:
                os.close(folder)
        except BaseException:
            os.close(handle)
            with contextlib.suppress(OSError):  # a worker that cannot begin is started again and again
                path.unlink()
            raise
        return _File(path, handle)


def boot_id() -> str:
    """What names this run of the machine. Where the system does not say, a new name each time: always unclean.

    SALESPUSH_BOOT_ID says it instead, for a test that plays a power cut: who sets it to what it was before a crash
    would hide that crash, so nobody else has a reason to."""
    if said := os.environ.get(BOOT_VARIABLE):
        return said
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.uuid4())
