"""The host in trouble, the rows of faults.md 3.4 that concern the queue, with a real worker: disk, descriptors, clock,
journal files a crash left (promises T6 to T8; I1, I3, I3b, I7). SIGTERM has its own file, test_drain.py.

Known limits: a full disk is a tmpfs in a mount namespace of its own (``unshare -rm``: root, or user namespaces).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.queue import journal
from engine.queue.journal import Intent, Journal, JournalBroken, Outcome
from engine.queue.replay import MAGIC
from policy.events import Kind
from tests.world.mail import job, rows
from tests.world.trouble import Ward, troubled

LINES = 8  # connections of a world's worker at most
DOUBTS = 2 * LINES  # each with one behind its dot and one ahead of it


async def finished_once(ward: Ward, name: str, people: int, *, unknowns: int = 0) -> int:
    """Everybody came to one end, nobody was written to twice; how many are unknown."""
    status = await ward.mail.finished(name)
    unknown = status.counts.get("unknown", 0)
    assert status.terminal == people
    assert status.counts["delivered"] + unknown == people, status
    assert unknown <= unknowns
    assert set(ward.sink.stored.values()) == {1}, "nobody twice"
    assert status.counts["delivered"] <= len(ward.sink.stored) <= people
    return unknown


# --- the disk of the journal ---------------------------------------------------------------------------------------


@dataclass
class Disk:
    """A small disk only who is started with `enter` sees. path: it, from outside."""

    path: Path
    enter: Sequence[str]

    @property
    def filler(self) -> Path:
        return self.path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Until only so many bytes are free."""
        free = os.statvfs(self.path)
        with self.filler.open("ab") as file:
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))

    def empty(self) -> None:
        self.filler.unlink()


@contextlib.asynccontextmanager
async def small_disk(folder: Path, kilobytes: int) -> AsyncIterator[Disk]:
    folder.mkdir(parents=True, exist_ok=True)
    mount = f'mount -t tmpfs -o size={kilobytes}k small "$0" && echo here && exec cat'
    holder = await asyncio.create_subprocess_exec(
        "unshare", "-rm", "sh", "-c", mount, folder,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert await holder.stdout.readline() == b"here\n"
        enter = ("nsenter", "--preserve-credentials", "-U", "-m", "-t", str(holder.pid), "--")
        yield Disk(Path(f"/proc/{holder.pid}/root{folder}"), enter)
    finally:
        holder.stdin.close()
        await holder.communicate()


async def test_a_disk_below_its_floor_starts_nothing_says_so_and_recovers() -> None:
    async with troubled(settings=[("min_free_bytes = 0", "min_free_bytes = 1048576")], start=False) as ward:
        async with small_disk(ward.mail.folder / "journal", 4096) as disk:
            ward.journals = disk.path
            await ward.start(wrapper=disk.enter)
            async with ward.campaign("floor"):
                disk.fill(leave=512 * 1024)
                await ward.says("disk_full", 1)
                ward.begin()
                await ward.wire_finishes()
                await ward.nothing_new()
                assert "below its floor" in ward.log
                disk.empty()
                await ward.says("disk_full", 0)
            assert "over: the disk of the journal" in ward.log


async def test_a_full_disk_ends_the_worker_and_the_next_one_knows_what_was_on_the_wire() -> None:
    async with troubled(start=False) as ward:
        async with small_disk(ward.mail.folder / "journal", 1024) as disk:
            worker = await ward.start(wrapper=disk.enter)
            ward.sink.hold()
            await ward.mail.submit(job("full"), rows(200, "a.held.test"))
            await ward.until(lambda: ward.sink.waiting >= 2)
            disk.fill()
            ward.sink.release()
            assert await asyncio.wait_for(worker.wait(), 30) == 1
            assert "No space left" in ward.log
            asked = sum(ward.sink.asked.values())
            before = sorted(path.name for path in (disk.path / "0").iterdir())
            ward.mail.workers.clear()
            assert await asyncio.wait_for((await ward.start(wrapper=disk.enter)).wait(), 30) == 1
            ward.mail.workers.clear()
            assert sorted(path.name for path in (disk.path / "0").iterdir()) == before, "no litter of empty files"
            assert sum(ward.sink.asked.values()) == asked, "no attempt without a journal"
            disk.empty()
            await ward.start(wrapper=disk.enter)
            await finished_once(ward, "full", 200, unknowns=DOUBTS)


@contextlib.asynccontextmanager
async def traced(ward: Ward, inject: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """A worker whose fdatasync does what strace injects, and the trace of every one of them."""
    strace = shutil.which("strace")
    assert strace, "strace is missing: .ci/run installs it"
    trace = ward.mail.folder / "trace"
    wrapper = (strace, "-f", "-q", "-o", str(trace), "-e", "trace=fdatasync", "-e", f"inject=fdatasync:{inject}")
    worker = await ward.start(wrapper=wrapper)
    try:
        yield worker, trace
    finally:
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), 9)  # strace that is killed lets go of it
        await worker.wait()
        ward.mail.workers.remove(worker)


@pytest.mark.debian
async def test_a_failed_sync_is_the_last_one_and_ends_the_worker() -> None:
    """fsyncgate: the kernel may have dropped the pages, and would call a second try a success."""
    async with troubled(start=False) as ward:
        ward.sink.hold()
        async with traced(ward, "error=EIO:when=2+") as (worker, trace):  # counted by thread: the journal's second
            await ward.mail.submit(job("broken"), rows(200, "a.held.test"))
            await ward.until(lambda: ward.sink.waiting >= 2)
            ward.sink.release()
            assert await asyncio.wait_for(worker.wait(), 30) == 1
        assert "Input/output error" in ward.log
        syncs = re.findall(r"^(\d+) .*(fdatasync\(|<\.\.\. fdatasync).*= (-?\d+)", trace.read_text(), re.MULTILINE)
        failed = [at for at, sync in enumerate(syncs) if sync[2] == "-1"]
        assert failed == [len(syncs) - 1], "the first that fails is the last there is"
        await ward.start()
        await finished_once(ward, "broken", 200, unknowns=DOUBTS)


@pytest.mark.debian
async def test_a_slow_disk_slows_the_settling_and_nothing_else() -> None:
    async with troubled(settings=[("lease_seconds = 10", "lease_seconds = 2")], start=False) as ward:
        async with traced(ward, "delay_enter=1500000") as (worker, _):  # µs: longer than half a lease
            await ward.mail.submit(job("slow"), rows(40, "a.held.test"))
            await finished_once(ward, "slow", 40)
            assert worker.returncode is None


# --- what a crash left ---------------------------------------------------------------------------------------------


async def test_torn_empty_and_strange_journal_files_are_read_as_far_as_they_go() -> None:
    async with troubled() as ward:
        ward.sink.hold()
        await ward.mail.submit(job("torn"), rows(200, "a.held.test"))
        await ward.until(lambda: ward.sink.waiting >= 2)
        await ward.mail.kill(ward.worker)
        folder = ward.mail.folder / "journal" / "0"
        [left] = list(folder.glob("*.journal"))
        with left.open("ab") as file:
            file.write(b"\x00\x00\x00\x40half a rec")
        (folder / "00000050.journal").touch()
        (folder / "00000051.journal").write_bytes(MAGIC)
        (folder / "00000052.journal").write_bytes(b"not a journal at all")
        (folder / "notes.txt").write_text("mine")
        (folder / "lock").write_text("4194304\n")  # of a process that is not: only the kernel's lock counts
        ward.sink.release()
        await ward.start()
        assert await finished_once(ward, "torn", 200, unknowns=DOUBTS) >= 2
        assert "torn tail" in ward.log
        assert (folder / "notes.txt").read_text() == "mine"


async def test_a_second_worker_of_one_place_ends_and_disturbs_nobody() -> None:
    async with troubled() as ward:
        await ward.until(lambda: bool(list((ward.mail.folder / "journal" / "0").glob("*.journal"))))
        first, second = ward.worker, await ward.start()
        ward.mail.workers.remove(second)
        async with ward.campaign("shared", 60):
            ward.sink.release()
            assert await asyncio.wait_for(second.wait(), 30) == 1
            assert "living process" in ward.log
            assert first.returncode is None


async def test_a_worker_that_dies_again_and_again_gets_everybody_through() -> None:
    async with troubled() as ward:
        await ward.mail.submit(job("again"), rows(300, "a.held.test"))
        unknowns = 0
        for life in range(1, 4):
            while len(ward.sink.stored) < 60 * life:
                await asyncio.sleep(0.01)
            await ward.mail.kill(ward.worker)
            unknowns += DOUBTS
            await ward.start()
        await finished_once(ward, "again", 300, unknowns=unknowns)
        ward.mail.workers[:-1] = []
        assert await ward.mail.drain(ward.worker) == 0


async def test_a_journal_is_begun_and_ended_a_hundred_times(tmp_path: Path) -> None:
    """Every other life ends without a word, as a killed process does; nothing written is lost, nothing is left over."""
    handles = len(os.listdir("/proc/self/fd"))
    for life in range(100):
        key = (life % 64, f"c{life:x}", life + 1)
        book = Journal.open(tmp_path, f"host:0:{life}", "boot")
        book.intend([Intent(1, index, 0, *key, index) for index in range(20)])
        for index in range(0, 20, 2):
            book.record(Outcome(*key, index, int(Kind.DELIVERED), b"event"))
        with pytest.raises(JournalBroken, match="living process"):
            Journal.open(tmp_path, "other", "boot")
        if life % 2:
            await book.durable()
            book.forget(*key)
            await book.close()
            assert not list(tmp_path.glob("*.journal"))
            continue
        await book.durable()
        _die(book)
        with journal.adopt(tmp_path) as logs:
            found = journal.plan(logs, "boot")
            assert [outcome.index for outcome in found.outcomes[key]] == list(range(0, 20, 2))
            assert [intent.index for intent in found.in_doubt[key]] == list(range(1, 20, 2))
            journal.discard(logs)
    assert len(os.listdir("/proc/self/fd")) <= handles + 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def _die(book: Journal) -> None:
    """As SIGKILL would have it: the kernel closes what was open, and nobody else does anything."""
    book._threads.shutdown()
    os.close(book._file.handle)
    os.close(book._lock)


# --- descriptors and clocks ----------------------------------------------------------------------------------------


async def test_two_hundred_and_fifty_six_descriptors_are_enough_for_many_sites() -> None:
    """What the system refuses us is not the sites' fault: none of them is called dead, and everybody is delivered."""
    sites = 400
    homes = [f"127.0.{1 + number // 200}.{1 + number % 200}" for number in range(sites)]
    routes = "".join(f'"s{number}.test" = "{home}:PORT"\n' for number, home in enumerate(homes))
    blame = ("back_off = 0.3\nback_off_cap = 1\n", "back_off = 300\nback_off_cap = 300\ndead_after = 1\n")
    async with troubled(settings=[blame], start=False) as ward:
        await ward.sink.stop()
        await ward.sink.start("0.0.0.0")
        ward.mail.config.write_text(ward.mail.config.read_text() + routes.replace("PORT", str(ward.sink.port)))
        await ward.start(wrapper=("prlimit", "--nofile=256:256", "--"))
        people = [person for number in range(sites) for person in rows(3, f"s{number}.test")]
        await ward.mail.submit(job("many"), people)
        status = await ward.mail.finished("many", 60)
        assert status.counts == {"delivered": 3 * sites}
        assert ward.sink.stored == Counter(person["address"] for person in people)
        assert ward.worker.returncode is None
        assert await ward.mail.drain(ward.worker) == 0


DAYS = 86_400.0
_SHIFTED = (
    "import time as t, pathlib; real, real_ns = t.time, t.time_ns; by = pathlib.Path({file!r}); "
    "t.time = lambda: real() + float(by.read_text()); "
    "t.time_ns = lambda: real_ns() + int(float(by.read_text()) * 1e9); "
)


@pytest.mark.parametrize("days", [-3, 3])
async def test_a_worker_whose_clock_is_wrong_by_days_works_by_the_clock_of_the_store(days: int) -> None:
    async with troubled(start=False) as ward:
        file = ward.mail.folder / "clock"
        file.write_text(str(days * DAYS))
        await ward.start(_SHIFTED.format(file=str(file)))
        async with ward.campaign("wrong"):
            pass
        async with ward.campaign("step"):
            file.write_text(str(-days * DAYS))  # it steps while slices are leased and messages are on the wire
        why = ward.mail.policy.reader.why("person3@wrong.held.test", ward.mail.policy.keyring)
        assert abs(why.stories[0].at - ward.mail.policy.clock()) < 3600 * 1_000_000, "events carry the store's time"


async def test_a_journal_that_breaks_says_so_at_once_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the dot nothing is settled, so nobody would ask: the worker would connect, send and drop for ever."""
    book = Journal.open(tmp_path, "host:0:1", "boot")
    told: list[JournalBroken] = []
    book.on_broken = told.append

    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for index in range(3):
        with pytest.raises(JournalBroken):
            book.intend([Intent(1, index, 0, 1, "c1", 1, index)])
    monkeypatch.undo()
    await book.close()
    assert len(told) == 1
