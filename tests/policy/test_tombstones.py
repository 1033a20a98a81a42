"""The erasure ledger: what is appended is replayed, and whatever was changed, taken out or cut is named by its line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from policy import accounts, consent, negative, remembering, suppression, vault
from policy.enforcement import Effects
from policy.keys import Keyring
from policy.tombstones import NAME, Line, Problem, TombstoneError, Tombstones


def lines(count: int, first: int = 0) -> list[Line]:
    return [Line("negative", 1000 + n, {"subject": n, "cause": "withdrawn", "seq": n}) for n in range(first, count)]


def written(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / NAME


def test_what_is_appended_is_replayed_by_another(file: Path) -> None:
    writer = Tombstones(file)
    writer.append(lines(3))
    writer.append(lines(5, 3))
    writer.close()
    told = Tombstones(file).replay()
    assert (told.lines, told.problems) == (lines(5), [])
    assert [line.at for line in Tombstones(file).replay(since=1003).lines] == [1003, 1004]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_file_that_is_not_there_is_no_problem(file: Path) -> None:
    told = Tombstones(file).replay()
    assert (told.lines, told.problems) == ([], [])


def test_the_chain_goes_on_after_a_restart(file: Path) -> None:
    for n in range(3):
        ledger = Tombstones(file)
        ledger.append(lines(n + 1, n))
        ledger.close()
    assert (Tombstones(file).replay().lines, Tombstones(file).replay().problems) == (lines(3), [])


def test_a_line_is_on_the_disk_when_append_returns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fdatasync

    def watched(handle: int) -> None:
        synced.append(file.stat().st_size)
        real(handle)

    monkeypatch.setattr(os, "fdatasync", watched)
    Tombstones(file).append(lines(2))
    assert synced == [file.stat().st_size]
    assert synced[0] > 0


def test_a_disk_that_refuses_is_an_error_and_leaves_a_whole_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Tombstones(file)
    ledger.append(lines(1))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", full)
        with pytest.raises(TombstoneError, match=r"tombstones\.jsonl cannot be written: No space left"):
            ledger.append(lines(2, 1))
    ledger.append(lines(3, 2))
    told = Tombstones(file).replay()
    # the line whose fsync failed may be there: its act is told again, nothing else of it is wrong
    assert told.lines[0] == lines(1)[0]
    assert told.lines[-1] == lines(3, 2)[0]
    assert told.problems == []


def test_a_changed_line_is_named_and_not_carried_out(file: Path) -> None:
    Tombstones(file).append(lines(5))
    raw = written(file)
    raw[2] = raw[2].replace(b'"subject":2', b'"subject":9')
    file.write_bytes(b"".join(raw))
    told = Tombstones(file).replay()
    assert told.problems == [Problem(3, "was changed")]
    assert told.lines == [line for line in lines(5) if line.values["subject"] != 2]


def test_a_line_taken_out_is_named(file: Path) -> None:
    Tombstones(file).append(lines(5))
    raw = written(file)
    file.write_bytes(b"".join(raw[:1] + raw[2:]))
    told = Tombstones(file).replay()
    assert told.problems == [Problem(2, "line 2 before it are missing or out of order")]


def test_a_cut_tail_is_named_and_stays_named_after_the_next_append(file: Path) -> None:
    Tombstones(file).append(lines(5))
    file.write_bytes(b"".join(written(file)[:3]))
    assert Tombstones(file).replay().problems == [Problem(4, "lines 4 to 5 are missing: the tail was cut")]
    Tombstones(file).append(lines(6, 5))
    told = Tombstones(file).replay()
    assert [problem.line for problem in told.problems] == [4]
    assert told.lines == [*lines(3), *lines(6, 5)]


def test_a_torn_line_is_reported_and_cut_off_by_the_next_append(file: Path) -> None:
    Tombstones(file).append(lines(2))
    raw = written(file)
    file.write_bytes(b"".join(raw) + b'{"at":17')  # a crash in the middle of the third: the head does not know it
    told = Tombstones(file).replay()
    assert (told.lines, told.problems) == (lines(2), [Problem(3, "is cut short")])
    Tombstones(file).append(lines(3, 2))
    assert (Tombstones(file).replay().lines, Tombstones(file).replay().problems) == (lines(3), [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bit_can_be_flipped_unseen(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "bits" / NAME
    file.unlink(missing_ok=True)
    file.with_name(NAME + ".head").unlink(missing_ok=True)
    Tombstones(file).append(lines(4))
    raw = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    line = raw[: bit // 8].count(b"\n") + 1
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)
    problems = Tombstones(file).replay().problems
    assert problems
    assert problems[0].line <= line + 1


def test_a_line_says_what_it_is(file: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        Line("address", 1)
    with pytest.raises(ValueError, match="frame"):
        Tombstones(file).append([Line("negative", 1, {"hash": "x"})])
    Tombstones(file).append(lines(1))
    [raw] = written(file)
    assert json.loads(raw).keys() == {"at", "cause", "hash", "n", "prev", "seq", "subject", "what"}


# --- what is told and carried out -----------------------------------------------------------------------------------

TAG, OTHER = b"a" * 12, b"b" * 12
Act = tuple[str, bytes, int, str]


def enter(conn: Connection, ledger: Tombstones, act: Act, now: int) -> None:
    """One transaction as `policy.enforcement` does it: the change, then its lines."""
    what, tag, scope_id, reason = act
    effects = Effects()
    scope = suppression.Scope.ACCOUNT if scope_id else suppression.Scope.PLATFORM
    if what == "add":
        suppression.add(conn, [suppression.Entry(tag, 3, scope, scope_id, reason, now, "page", now + 50)])
    else:
        suppression.remove(conn, tag, scope, scope_id, reason)
    effects.tags.add((tag, 3))
    for lines in remembering.lines_of(conn, effects, now):
        ledger.append(lines)


def standing(conn: Connection) -> set[tuple[bytes, int, int, str, int, int | None]]:
    return {(e.tag, int(e.scope), e.scope_id, e.reason, e.created, e.expires) for e in suppression.every(conn)}


acts = st.tuples(
    st.sampled_from(["add", "add", "remove"]), st.sampled_from([TAG, OTHER]), st.sampled_from([0, 1]),
    st.sampled_from(["opt-out", "complaint", "bounce"]),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(done=st.lists(acts, max_size=12), data=st.data())
def test_a_backup_of_any_instant_catches_up(
    conn: Connection, tmp_path: Path, done: list[Act], data: st.DataObject
) -> None:
    file = tmp_path / "replay" / NAME
    for path in (file, file.with_name(NAME + ".head")):
        path.unlink(missing_ok=True)
    ledger, backup_at = Tombstones(file), data.draw(st.integers(0, len(done)))
    outer = conn.begin_nested()
    for now, act in enumerate(done[:backup_at], 1):
        enter(conn, ledger, act, now)
    backup = conn.begin_nested()
    for now, act in enumerate(done[backup_at:], backup_at + 1):
        enter(conn, ledger, act, now)
    truth = standing(conn)
    backup.rollback()
    for line in ledger.replay(since=max(0, backup_at - 2)).lines:  # an overlap changes nothing
        remembering.carry_out(conn, Effects(), line, 99)
    assert standing(conn) == truth
    outer.rollback()
    ledger.close()


def test_a_withdrawal_is_brought_back(conn: Connection, keyring: Keyring, file: Path) -> None:
    account = accounts.add(conn, "acme", display_name="Acme", now=1).number
    [(subject, _)] = vault.resolve(conn, keyring, account, [(TAG, 3, "ada@one.example")], 2967, 1)
    agreed = consent.Evidence(subject, "open_tracking", "express", "v1", "form", 5)
    consent.record(conn, [agreed], 10)
    effects = Effects(negative=[(subject, "withdrawn", 1), (77, "restricted", 2)])
    Tombstones(file).append(remembering.lines_of(conn, effects, 20)[0])
    told = Effects()
    for line in Tombstones(file).replay().lines * 2:
        remembering.carry_out(conn, told, line, 30)
    assert [(number, cause) for number, cause, _ in told.negative] == [(subject, "withdrawn"), (77, "restricted")]
    assert consent.standing(conn, [subject], "open_tracking", 30) == set()
    assert negative.standing(conn, 77) == "restricted"
    lifted = Line("negative", 40, {"subject": 77, "cause": negative.LIFTED, "seq": 3})
    for _ in range(2):
        remembering.carry_out(conn, told, lifted, 50)
    assert negative.standing(conn, 77) is None
    assert len(told.negative) == 3


def test_a_gap_is_carried_out_by_nobody(conn: Connection) -> None:
    with pytest.raises(LookupError):
        remembering.carry_out(conn, Effects(), Line("gap", 1), 2)
