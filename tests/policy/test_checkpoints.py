"""Checkpoints: signed when there is something new, taken elsewhere until every place has them, never replaced."""

from __future__ import annotations

import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, delete, select, update

from policy import audit, verifier
from policy.checkpoints import AuditKeys, CheckpointOperations, Checkpoints, Elsewhere, documents
from policy.keys import Keyring, KeyringError
from policy.schema import audit as table
from policy.schema import checkpoint
from policy.store import Store

NOW = 1_795_376_640_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "audit-keys").mkdir(mode=0o700)
    return tmp_path / "audit-keys"


@pytest.fixture
async def hand(store: Engine) -> AsyncIterator[Store]:
    made = Store(store)
    yield made
    await made.close()


@pytest.fixture
def checkpoints(hand: Store, folder: Path, tmp_path: Path) -> Checkpoints:
    return Checkpoints(hand, lambda: AuditKeys.ensure(folder), lambda: NOW, Elsewhere(tmp_path / "elsewhere"))


def lines(count: int) -> Callable[[Connection], None]:
    def work(conn: Connection) -> None:
        for n in range(count):
            audit.append(conn, NOW + n, "operator", "job-paused", f"job/{n}", "operation", "done")

    return work


async def verdict(hand: Store, folder: Path, elsewhere: Path) -> list[tuple[str, int]]:
    chain = await hand.write(lambda conn: list(audit.export(conn)))
    keys = list(AuditKeys.load(folder).public.values())
    report = verifier.check(chain, verifier.checkpoint_lines([elsewhere]), keys)
    return [(finding.kind, finding.seq) for finding in report.findings]


async def test_an_hour_in_which_something_was_written_gets_a_checkpoint(
    hand: Store, folder: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert await checkpoints.round() == 3600
    assert not elsewhere.exists(), "nothing was written, nothing is said"
    await hand.write(lines(3))
    await checkpoints.round()
    await checkpoints.round()
    assert [path.name for path in elsewhere.iterdir()] == ["audit-000000000003.json"]
    await hand.write(lines(2))
    await checkpoints.round()
    assert len(list(elsewhere.iterdir())) == 2
    assert await verdict(hand, folder, elsewhere) == []
    assert checkpoints.statistics() == {"checkpoints": 2, "checkpoint_failures": 0, "checkpoints_waiting": 0}
    kept = await hand.write(documents)
    assert b"".join(kept) == b"".join(verifier.checkpoint_lines([elsewhere]))
    assert {stat.S_IMODE(path.stat().st_mode) for path in elsewhere.iterdir()} == {0o600}


async def test_a_tail_cut_and_a_chain_made_anew_show(
    hand: Store, folder: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """What the chain alone cannot: whoever writes the database makes everything fit again."""
    await hand.write(lines(5))
    await checkpoints.round()

    def cut(conn: Connection) -> None:
        conn.execute(delete(table).where(table.c.seq > 3))
        conn.exec_driver_sql("DELETE FROM cursor WHERE stream = 'audit'")
        conn.execute(delete(checkpoint))

    await hand.write(cut)
    assert await hand.write(audit.verify) is None
    assert await verdict(hand, folder, tmp_path / "elsewhere") == [("cut", 4)]
    await hand.write(lines(4))
    assert await hand.write(audit.verify) is None
    assert await verdict(hand, folder, tmp_path / "elsewhere") == [("rewritten", 5)]


async def test_a_place_that_was_away_gets_what_it_missed(hand: Store, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "mount"
    place.write_text("not a folder yet")
    checkpoints = Checkpoints(hand, lambda: AuditKeys.ensure(folder), lambda: NOW, Elsewhere(place))
    for round_ in range(1, 3):
        await hand.write(lines(2))
        await checkpoints.round()
        assert checkpoints.statistics()["checkpoints_waiting"] == round_
    assert checkpoints.failures == 2
    assert await hand.write(lambda conn: audit.droppable(conn, NOW * 2)) == 0, "nothing may go that is only here"
    place.unlink()
    assert await CheckpointOperations(checkpoints).op_checkpoint() == {"made": 0, "waiting": 0}
    assert sorted(path.name for path in place.iterdir()) == ["audit-000000000002.json", "audit-000000000004.json"]
    assert await hand.write(lambda conn: audit.droppable(conn, NOW * 2)) == 4


async def test_another_document_of_that_number_is_not_replaced(
    hand: Store, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    known = tmp_path / "elsewhere" / "audit-000000000002.json"
    known.write_bytes(b"of a chain that was here before\n")
    await hand.write(lines(2))
    await checkpoints.round()
    assert known.read_bytes() == b"of a chain that was here before\n"
    assert (checkpoints.failures, checkpoints.waiting) == (1, 1)
    assert list((tmp_path / "elsewhere").iterdir()) == [known]


async def test_a_crash_after_a_place_took_it_repeats_harmlessly(
    hand: Store, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    await hand.write(lines(2))
    await checkpoints.round()
    await hand.write(lambda conn: conn.execute(update(checkpoint).values(exported=None)))
    await checkpoints.round()
    assert checkpoints.failures == 0
    [exported] = await hand.write(lambda conn: list(conn.scalars(select(checkpoint.c.exported))))
    assert exported == NOW


async def test_a_command_reads_the_document(hand: Store, folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    program = f"import sys; open({str(taken)!r}, 'ab').write(sys.stdin.buffer.read())"
    elsewhere = Elsewhere(command=(sys.executable, "-c", program))
    checkpoints = Checkpoints(hand, lambda: AuditKeys.ensure(folder), lambda: NOW, elsewhere)
    await hand.write(lines(2))
    await checkpoints.round()
    assert [taken.read_bytes()] == await hand.write(documents)
    failing = Elsewhere(command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(OSError, match="ended with 3"):
        await failing.take("x", b"document\n")
    with pytest.raises(OSError):
        await Elsewhere(command=(str(tmp_path / "no-such-program"),)).take("x", b"document\n")


async def test_the_newest_key_signs_and_all_verify(
    hand: Store, folder: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    await hand.write(lines(1))
    await checkpoints.round()
    second = folder / "audit.2"
    second.write_text(bytes(range(32)).hex() + "\n")
    second.chmod(0o600)
    await hand.write(lines(1))
    await checkpoints.round()
    names = await hand.write(lambda conn: list(conn.scalars(select(checkpoint.c.key_id).order_by(checkpoint.c.seq))))
    assert names == ["audit.1", "audit.2"]
    assert await verdict(hand, folder, tmp_path / "elsewhere") == []
    (folder / "audit.1").unlink()
    assert await verdict(hand, folder, tmp_path / "elsewhere") == [("signature", 1)]


def test_keys_are_made_once_closed_to_others_and_shown_nowhere(folder: Path) -> None:
    with pytest.raises(KeyringError, match=r"audit\.1 is missing"):
        AuditKeys.load(folder)
    made = AuditKeys.ensure(folder)
    assert AuditKeys.ensure(folder).public == made.public
    assert [path.name for path in folder.iterdir()] == ["audit.1"]
    secret = (folder / "audit.1").read_text().strip()
    assert secret not in repr(made)
    (folder / "audit.1").chmod(0o640)
    with pytest.raises(KeyringError, match="readable by others") as error:
        AuditKeys.load(folder)
    assert secret not in str(error.value)
    (folder / "audit.1").chmod(0o600)
    (folder / "audit.1").write_text(secret[:-2])
    with pytest.raises(KeyringError, match="64 hexadecimal digits"):
        AuditKeys.load(folder)


def test_the_keyring_takes_no_notice_of_it(tmp_path: Path) -> None:
    Keyring.create(tmp_path / "keys", 2967)
    AuditKeys.ensure(tmp_path / "keys")
    assert Keyring.load(tmp_path / "keys").kek_id == 2967


async def test_without_a_key_nothing_is_signed_and_it_is_counted(hand: Store, folder: Path) -> None:
    checkpoints = Checkpoints(hand, lambda: AuditKeys.load(folder), lambda: NOW)
    await hand.write(lines(1))
    assert await checkpoints.round() == 3600
    assert checkpoints.statistics() == {"checkpoints": 0, "checkpoint_failures": 1, "checkpoints_waiting": 0}
    assert await hand.write(documents) == []
