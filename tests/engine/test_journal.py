"""The journal: what is promised about a crash, a power cut, a broken disk; what is read is what was written."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.queue import journal
from engine.queue.journal import Foreseen, Forgotten, Intent, Journal, JournalBroken, Outcome, Page, Plan
from engine.queue.replay import MAGIC, encode_intent, encode_outcome, frame
from policy.events import Kind

HOLDER = "host/worker-0"
BOOT = "boot-1"


def an_intent(index: int, token: int = 9, slice_id: str = "c1") -> Intent:
    return Intent(job=1 << 39, mref=-index - 1, attempt=2, partition=63, slice_id=slice_id, token=token, index=index)


def an_outcome(index: int, kind: Kind = Kind.DELIVERED, token: int = 9, slice_id: str = "c1") -> Outcome:
    return Outcome(63, slice_id, token, index, int(kind), bytes([index, 0, 255]))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.journal"))


def files_in(folder: Path) -> int:
    return len(list(folder.glob("*.journal")))


async def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    book.intend([an_intent(0), an_intent(1)])
    book.record(an_outcome(0))
    await book.durable()
    await book.close()

    (log,) = journal.read_folder(tmp_path)
    assert (log.boot, log.holder, log.torn) == (BOOT, HOLDER, 0)
    assert log.records == (an_intent(0), an_intent(1), an_outcome(0))
    assert (tmp_path / "00000001.journal").stat().st_mode & 0o777 == 0o600


async def test_who_is_foreseen_is_on_the_disk_when_durable_returns(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    book.foresee([an_intent(0), an_intent(1)])
    await book.durable()
    assert journal.read_folder(tmp_path)[0].records == (Foreseen(an_intent(0)), Foreseen(an_intent(1)))
    book.forget(63, "c1", 9)
    await book.close()
    assert files_in(tmp_path) == 0, "a lease that is over keeps no file"


def test_a_test_may_say_which_boot_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = journal.boot_id()
    monkeypatch.setenv(journal.BOOT_VARIABLE, "the-next-boot")
    assert journal.boot_id() == "the-next-boot" != ours


async def test_an_intent_is_with_the_kernel_when_intend_returns(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    book.record(an_outcome(5))
    book.intend([an_intent(0)])

    (log,) = journal.read_folder(tmp_path)  # read by its name: through the kernel, not through the writer's memory
    assert log.records == (an_outcome(5), an_intent(0))
    await book.close()


async def test_durable_waits_for_the_disk_and_shares_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    real, syncs = os.fdatasync, []

    def counted(handle: int) -> None:
        syncs.append(bytes_in(tmp_path))
        real(handle)

    monkeypatch.setattr(os, "fdatasync", counted)

    async def worker(index: int) -> None:
        book.record(an_outcome(index))
        await book.durable()
        assert syncs

    await asyncio.gather(*map(worker, range(50)))

    assert len(syncs) == 1
    assert syncs[0] == bytes_in(tmp_path)
    await book.close()


async def test_an_outcome_reaches_the_disk_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT, window=0.0)
    synced, loop, real = asyncio.Event(), asyncio.get_running_loop(), os.fdatasync

    def telling(handle: int) -> None:
        real(handle)
        loop.call_soon_threadsafe(synced.set)

    monkeypatch.setattr(os, "fdatasync", telling)
    book.record(an_outcome(0))

    await asyncio.wait_for(synced.wait(), 10)
    assert journal.read_folder(tmp_path)[0].records == (an_outcome(0),)
    await book.close()


async def test_a_failed_sync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    tries = []

    def broken(handle: int) -> None:
        tries.append(handle)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    book.record(an_outcome(0))
    with pytest.raises(JournalBroken):
        await book.durable()
    monkeypatch.undo()

    with pytest.raises(JournalBroken):
        book.record(an_outcome(1))
    with pytest.raises(JournalBroken):
        book.intend([an_intent(1)])
    with pytest.raises(JournalBroken):
        await book.durable()
    await book.close()
    assert len(tries) == 1
    assert len(journal.read_folder(tmp_path)) == 1  # nothing a crash would need is removed


async def test_a_full_disk_breaks_the_journal_before_the_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)

    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JournalBroken, match="No space"):
        book.intend([an_intent(0)])
    monkeypatch.undo()
    await book.close()


async def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data[:7])))
    book.intend([an_intent(0), an_intent(1)])
    monkeypatch.undo()

    assert journal.read_folder(tmp_path)[0].records == (an_intent(0), an_intent(1))
    await book.close()


async def test_files_rotate_and_go_with_their_last_lease(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT, file_limit=100)
    for token in range(1, 5):
        for index in range(5):
            book.record(an_outcome(index, token=token, slice_id=f"c{token}"))
        await book.durable()
    assert files_in(tmp_path) == 5
    assert sum(len(log.records) for log in journal.read_folder(tmp_path)) == 20

    book.forget(63, "c2", 2)
    assert files_in(tmp_path) == 4
    for token in (1, 3, 4):
        book.forget(63, f"c{token}", token)
    await book.close()

    assert files_in(tmp_path) == 0


async def test_a_clean_stop_with_everything_settled_leaves_nothing(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    book.intend([an_intent(0)])
    book.record(an_outcome(0))
    await book.durable()
    book.forget(63, "c1", 9)
    await book.close()
    await book.close()

    assert journal.read_folder(tmp_path) == []
    with pytest.raises(JournalBroken):
        book.record(an_outcome(1))


async def test_a_living_workers_folder_is_its_own(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    with pytest.raises(JournalBroken, match="living"):
        Journal.open(tmp_path, HOLDER, BOOT)
    with pytest.raises(JournalBroken, match="living"), journal.adopt(tmp_path):
        pass
    book.record(an_outcome(0))
    await book.close()

    with journal.adopt(tmp_path) as logs:
        assert logs[0].records == (an_outcome(0),)
        journal.discard(logs)
    assert journal.read_folder(tmp_path) == []


class Clock:
    """Redis TIME, in microseconds."""

    now = 1_000

    def __call__(self) -> int:
        return self.now


async def test_a_file_lives_until_the_ledger_has_what_was_settled(tmp_path: Path) -> None:
    clock = Clock()
    book = Journal.open(tmp_path, HOLDER, BOOT, file_limit=100, clock=clock)
    for token in (1, 2):
        for index in range(5):
            book.record(an_outcome(index, token=token))
        await book.durable()
    assert files_in(tmp_path) == 3
    book.ledgered(900)
    book.forget(63, "c1", 1)
    book.ledgered(999)
    assert files_in(tmp_path) == 3, "what was settled at 1000 is not in the ledger yet"
    book.ledgered(1_000)
    assert files_in(tmp_path) == 2
    book.ledgered(5_000)
    assert files_in(tmp_path) == 2, "its lease is not over"
    book.forget(63, "c1", 2)
    book.ledgered(5_000)
    assert files_in(tmp_path) == 2, "the clock of Redis stepped back: that was said before"
    book.ledgered(1_001)
    assert files_in(tmp_path) == 1
    await book.close()


async def test_a_clean_stop_keeps_what_the_ledger_lacks_and_does_not_replay_it(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT, epoch=4, clock=Clock())
    book.intend([an_intent(0)])
    book.record(an_outcome(0))
    await book.durable()
    book.forget(63, "c1", 9)
    await book.close()

    assert journal.read_folder(tmp_path) == []
    assert journal.read_kept(tmp_path, 4) == ([], [tmp_path / "00000001.kept"])
    (log,), same = journal.read_kept(tmp_path, 5)
    assert same == []
    assert (log.epoch, log.records) == (4, (an_intent(0), an_outcome(0), Forgotten(63, "c1", 9)))

    clock = Clock()
    later = Journal.open(tmp_path, HOLDER, BOOT, epoch=5, clock=clock)
    assert files_in(tmp_path) == 1
    assert (tmp_path / "00000002.journal").exists(), "a number is given once"
    later.retain([log.path])
    later.ledgered(999)
    assert log.path.exists()
    later.ledgered(1_000)
    assert not log.path.exists()
    await later.close()


async def test_what_was_replayed_is_told_from_what_is_to_be(tmp_path: Path) -> None:
    dead = Journal.open(tmp_path, HOLDER, BOOT)
    dead.record(an_outcome(0))
    await dead.close()
    book = Journal.open(tmp_path, "host/worker-0-b", BOOT, clock=Clock())
    (log,) = (log for log in journal.read_folder(tmp_path) if log.holder == HOLDER)
    book.retain([log.path])

    assert [each.holder for each in journal.read_folder(tmp_path)] == ["host/worker-0-b"]
    assert journal.read_head(tmp_path / "00000001.kept").holder == HOLDER
    await book.close()


def test_a_head_of_before_epochs_is_of_epoch_0(tmp_path: Path) -> None:
    path = tmp_path / "00000001.journal"
    path.write_bytes(MAGIC + frame(b"\0\0\6" + BOOT.encode() + HOLDER.encode()) + frame(encode_intent(an_intent(0))))
    log = journal.read(path)
    assert (log.boot, log.holder, log.epoch, log.records) == (BOOT, HOLDER, 0, (an_intent(0),))


def test_who_was_on_a_lease_that_was_handed_back_is_not_in_doubt() -> None:
    """421 after the dot, or a gate that said no: the intent stays open, and the next lease says what became of it."""
    logs = [journal.Log(Path("x"), BOOT, HOLDER, (an_intent(0), an_outcome(1), Forgotten(63, "c1", 9)), 0)]
    found = journal.plan(logs, BOOT)
    assert found.in_doubt == {}
    assert found.outcomes == {(63, "c1", 9): [an_outcome(1)]}


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalBroken, match="cannot be written"):
        Journal.open(tmp_path / "file", HOLDER, BOOT)


async def test_the_disk_floor(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    assert book.has_room(1)
    assert not book.has_room(1 << 60)
    await book.close()


def test_a_killed_process_forgets_no_intent(tmp_path: Path) -> None:
    """SIGKILL right after `intend`: the intent is there, the outcome recorded an instant earlier too."""
    script = """
import asyncio, os, signal, sys
from pathlib import Path
from engine.queue.replay import MAGIC
from engine.queue.journal import Intent, Journal, Outcome
async def main():
    book = Journal.open(Path(sys.argv[1]), "host/worker-0", "boot-1")
    book.record(Outcome(63, "c1", 9, 0, 1, b"x"))
    book.intend([Intent(1, 2, 0, 63, "c1", 9, index) for index in range(3)])
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)

    assert done.returncode == -signal.SIGKILL
    with journal.adopt(tmp_path) as logs:
        found = journal.plan(logs, "boot-1")
    assert [intent.index for intent in found.in_doubt[63, "c1", 9]] == [1, 2]  # 0 was delivered before
    assert len(logs[0].records) == 4


def _plan(*records: Intent | Outcome | Foreseen | Forgotten, boot: str = BOOT) -> Plan:
    return journal.plan([journal.Log(Path("x"), BOOT, HOLDER, records, 0)], boot)


def test_an_intent_without_outcome_is_in_doubt() -> None:
    found = _plan(an_intent(0), an_intent(1), an_outcome(0), an_outcome(2, Kind.DEFERRED))

    assert found.in_doubt == {(63, "c1", 9): [an_intent(1)]}
    assert found.outcomes == {(63, "c1", 9): [an_outcome(0), an_outcome(2, Kind.DEFERRED)]}
    assert found.holders == frozenset({HOLDER})
    assert not found.unclean


def test_an_intent_after_a_deferral_is_in_doubt_again() -> None:
    found = _plan(an_intent(0), an_outcome(0, Kind.DEFERRED), an_intent(0))

    assert found.in_doubt == {(63, "c1", 9): [an_intent(0)]}
    assert found.outcomes == {}


def test_a_recorded_delivery_is_never_forgotten() -> None:
    assert _plan(an_intent(0), an_outcome(0), an_intent(0)).in_doubt == {}


def test_leases_are_told_apart_by_token() -> None:
    found = _plan(an_intent(0, token=1), an_outcome(0, token=2))

    assert list(found.in_doubt) == [(63, "c1", 1)]
    assert list(found.outcomes) == [(63, "c1", 2)]


def test_another_boot_is_unclean() -> None:
    assert _plan(an_intent(0), boot="boot-2").unclean
    assert not _plan(boot=BOOT).unclean


def test_whom_the_press_foresaw_is_in_doubt_after_an_unclean_boot_only() -> None:
    ahead = Foreseen(an_intent(0)), Foreseen(an_intent(1)), an_outcome(1)
    assert _plan(*ahead).in_doubt == {}
    assert _plan(*ahead, boot="boot-2").in_doubt == {(63, "c1", 9): [an_intent(0)]}
    assert _plan(*ahead, Forgotten(63, "c1", 9), boot="boot-2").in_doubt == {}, "handed back, or settled to its end"
    assert _plan(Foreseen(an_intent(0)), an_intent(0), boot="boot-2").in_doubt == {(63, "c1", 9): [an_intent(0)]}
    assert journal.boot_id() == journal.boot_id() != ""


INTENTS = st.builds(
    Intent, job=st.integers(0, 2**40 - 1), mref=st.integers(-(2**63), 2**63 - 1), attempt=st.integers(0, 255),
    partition=st.integers(0, 63), slice_id=st.from_regex(r"[pc][0-9a-f]{1,12}", fullmatch=True),
    token=st.integers(0, 2**53), index=st.integers(0, 63),
)  # fmt: skip
OUTCOMES = st.builds(
    Outcome, partition=st.integers(0, 63), slice_id=st.from_regex(r"[pc][0-9a-f]{1,12}", fullmatch=True),
    token=st.integers(0, 2**53), index=st.integers(0, 63), kind=st.integers(1, 17), event=st.binary(max_size=50),
)  # fmt: skip


@settings(deadline=None)
@given(INTENTS, OUTCOMES)
def test_a_page_writes_the_same_records(intent: Intent, outcome: Outcome) -> None:
    """One page serves every recipient of its lease, and nobody who reads can tell which way a record was written."""
    page = Page(intent.job, intent.attempt, (intent.partition, intent.slice_id, intent.token))
    assert page.intent(intent.index, intent.mref) == encode_intent(intent)
    page = Page(intent.job, intent.attempt, (outcome.partition, outcome.slice_id, outcome.token))
    assert page.outcome(outcome.index, outcome.kind, outcome.event) == encode_outcome(outcome)


async def test_what_pages_say_is_with_the_kernel_at_once_and_keeps_its_file(tmp_path: Path) -> None:
    book = Journal.open(tmp_path, HOLDER, BOOT)
    pages = [Page(1 << 39, 2, (63, name, 9)) for name in ("c1", "c2")]
    book.record_on(pages[0], 5, int(Kind.DELIVERED), bytes([5, 0, 255]))
    book.intend_on([(page, 3, -4) for page in pages])

    (log,) = journal.read_folder(tmp_path)
    assert log.records == (an_outcome(5), an_intent(3), an_intent(3, slice_id="c2"))
    book.forget(63, "c1", 9)
    await book.close()
    assert files_in(tmp_path) == 1, "the other lease is not over"


def _file_of(records: list[Intent | Outcome], folder: Path) -> Path:
    async def write() -> None:
        book = Journal.open(folder, HOLDER, BOOT)
        for record in records:
            if isinstance(record, Intent):
                book.intend([record])
            else:
                book.record(record)
        await book.close()

    asyncio.run(write())
    return folder / "00000001.journal"


@settings(deadline=None)  # files and syncs of a machine that others use, too
@given(st.lists(INTENTS | OUTCOMES, min_size=1, max_size=8), st.data())
def test_a_cut_or_flipped_file_reads_as_a_prefix(records: list[Intent | Outcome], data: st.DataObject) -> None:
    """Whatever a power cut or a bad sector leaves, what is read is a prefix of what was written, and it says so."""
    with tempfile.TemporaryDirectory() as name:
        path = _file_of(records, Path(name))
        whole = path.read_bytes()
        place = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            path.write_bytes(whole[:place])
        else:
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
            )
        log = journal.read(path)

    assert list(log.records) == records[: len(log.records)]
    assert len(log.records) < len(records)


@settings(deadline=None)  # files and syncs of a machine that others use, too
@given(st.binary(max_size=300))
def test_garbage_is_read_as_nothing(tail: bytes) -> None:
    """No file makes the reader raise."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "1.journal"
        path.write_bytes(tail)
        log = journal.read(path)
    assert log.records == ()
    assert log.torn in (len(tail), len(tail) - len(MAGIC))
