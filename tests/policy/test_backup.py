"""Backups and restores by themselves: containers, copies, ends, keys, the swap; quarantine is a journey."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert, make_url, select, text

from policy import audit, containers, keys, restoring, schema, vault
from policy.backup import (
    BackupError,
    BackupOperations,
    Made,
    Manifest,
    fingerprint,
    forget_copies,
    is_key_name,
    pack_keys,
    publish,
    write,
)
from policy.containers import CHUNK, ContainerError, Secret, new_key_file, pack, unpack
from policy.instants import DAY_US, SECOND_US, WEEK_US
from policy.jobs import Refused
from policy.keys import Keyring
from policy.quarantine import close_lost, lost
from policy.restoring import (
    FOLDER,
    MARK,
    STANDING,
    SWAPPING,
    RestoreError,
    finish,
    is_quarantined,
    put_mark,
    read_mark,
    restore,
    restore_keys,
)
from policy.settings import Officer, PolicySettings
from policy.store import Store
from policy.vitals import Vitals
from tests.policy.conftest import WEEK
from tests.policy.people import row_of
from tests.policy.stores import only_postgresql, only_sqlite, url_of
from tests.world.mail import ROOT
from tests.world.octets import octets
from tests.world.postgres import debian_programs, embedded_programs

NOW = WEEK * WEEK_US + 3 * DAY_US


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    new_key_file(tmp_path / "backup.key")
    return Secret.of_key_file(tmp_path / "backup.key")


def settings_of(folder: Path, **more: Any) -> PolicySettings:
    url = url_of(folder)
    return PolicySettings(
        data_dir=folder,
        sql_url="" if make_url(url).get_backend_name() == "sqlite" else url,
        officer=Officer(name="Privacy Officer", address="privacy@example.org"),
        **more,
    )


def seed(store: Engine, keyring: Keyring, *people: str) -> None:
    with store.begin() as conn:
        if conn.execute(select(schema.account.c.number)).first() is None:
            conn.execute(
                insert(schema.account).values(
                    number=1, name="acme", display_name="", postal_address="", website="", privacy_url="",
                    state="active", opens_mode=3, clicks_mode=3, created=NOW,
                )
            )  # fmt: skip
        vault.resolve(conn, keyring, 1, [row_of(keyring.pepper, one) for one in people], WEEK, NOW)
        audit.append(conn, NOW, "operator", "seeded", "account/1", "operation", "done")


def known(store: Engine, keyring: Keyring) -> list[str]:
    with store.connect() as conn:
        numbers = conn.scalars(select(schema.subject.c.number)).all()
        return sorted(one.address for n in numbers if (one := vault.get(conn, keyring, n)) is not None)


def backed_up(folder: Path, keyring: Keyring, secret: Secret, days: int = 35) -> tuple[Path, Made]:
    out = folder / "copy.backup"
    made = write(settings_of(folder), keyring, secret, out, NOW, days, lambda *_: None)
    publish(made, out)
    return out, made


# --- containers -----------------------------------------------------------------------------------------------------


def contained(secret: Secret, *sizes: int) -> tuple[bytes, dict[str, bytes]]:
    files = {f"file{n}": os.urandom(size) for n, size in enumerate(sizes)}
    out = io.BytesIO()
    pack(out, secret, "ledger", {"at": "now"}, list(files.items()))
    return out.getvalue(), files


def opened(sealed: bytes, secret: Secret, folder: Path, kind: str = "ledger") -> dict[str, bytes]:
    folder.mkdir()
    told = list(unpack(io.BytesIO(sealed), secret, kind, folder, lambda name: name.startswith("file")))
    assert all(sha256(path.read_bytes()).hexdigest() == digest for _, path, digest in told)
    return {name: path.read_bytes() for name, path, _ in told}


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1024, CHUNK, 2 * CHUNK, 3 * CHUNK + 7])
def test_what_is_packed_is_unpacked(secret: Secret, tmp_path: Path, size: int) -> None:
    sealed, files = contained(secret, size, 10)
    assert opened(sealed, secret, tmp_path / "out") == files
    assert all(stat_mode(path) == 0o600 for path in (tmp_path / "out").iterdir())
    assert size < 32 or files["file0"][:32] not in sealed


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_any_change_is_seen(secret: Secret, tmp_path: Path) -> None:
    sealed, _ = contained(secret, 2 * CHUNK)
    head = sealed.index(b"\n", len(containers.MAGIC)) + 1
    places = [3, head - 5, head, head + CHUNK, head + CHUNK + 16, len(sealed) - 1]
    for n, place in enumerate(places):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(ContainerError):
            opened(bytes(changed), secret, tmp_path / f"changed{n}")
    chunk = CHUNK + 16
    first, second = sealed[head : head + chunk], sealed[head + chunk : head + 2 * chunk]
    rest = sealed[head + 2 * chunk :]
    for n, wrong in enumerate(
        [first, first + second, second + first + rest, first + rest, first + second + rest + rest, b"", rest]
    ):
        with pytest.raises(ContainerError):
            opened(sealed[:head] + wrong, secret, tmp_path / f"cut{n}")


def test_no_two_containers_of_the_same_are_alike(secret: Secret) -> None:
    one, other = io.BytesIO(), io.BytesIO()
    for out in (one, other):
        pack(out, secret, "ledger", {}, [("file", b"x" * 100)])
    assert one.getvalue()[-100:] != other.getvalue()[-100:]


def test_secrets(secret: Secret, tmp_path: Path) -> None:
    sealed, files = contained(secret, 100)
    new_key_file(tmp_path / "other")
    with pytest.raises(ContainerError, match="another key"):
        opened(sealed, Secret.of_key_file(tmp_path / "other"), tmp_path / "a")
    with pytest.raises(ContainerError, match="not of the keys"):
        opened(sealed, secret, tmp_path / "b", "keys")
    with pytest.raises(FileExistsError):
        new_key_file(tmp_path / "other")
    phrase = tmp_path / "phrase"
    phrase.write_text("too short\n")
    phrase.chmod(0o600)
    with pytest.raises(ContainerError, match="fewer than 20"):
        Secret.of_passphrase_file(phrase)
    phrase.write_text("correct horse battery staple\n")
    said = Secret.of_passphrase_file(phrase)
    with pytest.raises(ContainerError, match="sealed with a key"):
        opened(sealed, said, tmp_path / "c")
    out = io.BytesIO()
    pack(out, said, "ledger", {}, list(files.items()))
    assert opened(out.getvalue(), said, tmp_path / "d") == files
    phrase.chmod(0o640)
    with pytest.raises(ContainerError, match="readable by others"):
        Secret.of_passphrase_file(phrase)
    with pytest.raises(ContainerError, match="cannot be read"):
        Secret.of_key_file(tmp_path / "nowhere")
    with pytest.raises(ContainerError, match="64 hexadecimal"):
        phrase.chmod(0o600)
        Secret.of_key_file(phrase)
    assert "horse" not in repr(said)


def test_a_container_holds_only_what_belongs_there(secret: Secret, tmp_path: Path) -> None:
    out = io.BytesIO()
    pack(out, secret, "ledger", {}, [("../evil", b"x")])
    with pytest.raises(ContainerError, match="does not belong"):
        opened(out.getvalue(), secret, tmp_path / "a")
    assert is_key_name("kek.2967")
    assert is_key_name("audit.1")
    assert is_key_name("dkim/a.example.rsa.pem")
    for name in ("dkim/../kek.1.pem", "x/kek.1", "kek.next", "/dkim/a.pem", "audit.x"):
        assert not is_key_name(name)


# --- making ---------------------------------------------------------------------------------------------------------


def test_a_backup_comes_back(store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path, dialect: str) -> None:
    """The whole way on either store: what was there then is there again, quarantined; what came since is not."""
    seed(store, keyring, "ada@one.example")
    with programs(dialect):
        out, made = backed_up(tmp_path, keyring, secret)
        assert (made.bytes, made.digest) == (out.stat().st_size, sha256(out.read_bytes()).digest())
        assert stat_mode(out) == 0o600
        for needle in (b"SQLite format", b"ada@one", b"one.example", keyring.service, keyring.kek[WEEK]):
            assert needle not in out.read_bytes()
        assert not (tmp_path / "backup").exists()
        seed(store, keyring, "bob@one.example")
        store.dispose()
        mark = restore(settings_of(tmp_path), secret, out, NOW + DAY_US)
    assert (mark.state, mark.at, mark.keys) == (STANDING, NOW, fingerprint(keyring))
    assert is_quarantined(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    assert known(store, keyring) == ["ada@one.example"]
    with store.begin() as conn:
        assert audit.verify(conn) is None
        values = {"account": 1, "name": "news", "display_name": ""}
        made_number = conn.execute(insert(schema.list_).values(**values)).inserted_primary_key
        assert made_number is not None
        assert made_number[0] > restoring.SHORT_JUMP, "a list that delivered mail may know is never named again"
        assert audit.head(conn)[0] == 1
    store.dispose()


@contextlib.contextmanager
def programs(dialect: str) -> Iterator[None]:
    """PostgreSQL's client programs of the server's version, first on the PATH."""
    with pytest.MonkeyPatch.context() as patch:
        if dialect != "sqlite":
            folder = embedded_programs() if dialect == "postgresql" else debian_programs()
            patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


@only_postgresql
def test_without_pg_dump_it_is_said(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackupError, match="pg_dump is not on the PATH"):
        backed_up(tmp_path, keyring, secret)


@only_sqlite
def test_a_backup_is_taken_while_somebody_writes(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path
) -> None:
    seed(store, keyring, "ada@one.example")
    with store.begin() as conn:
        audit.append(conn, NOW, "operator", "unfinished", "account/1", "operation", "done")
        out, _ = backed_up(tmp_path, keyring, secret)
    steps: list[tuple[str, int, int]] = []
    told = restore(settings_of(tmp_path / "other"), secret, out, NOW, lambda *step: steps.append(step))
    assert told.at == NOW
    assert steps[-1][1] <= steps[-1][2]
    with sqlite3.connect(tmp_path / "other" / "policy.db") as copy:
        assert copy.execute("SELECT count(*) FROM audit").fetchone() == (1,)


@only_sqlite
def test_neither_keys_nor_tombstones_nor_freed_pages_are_in_it(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path
) -> None:
    seed(store, keyring, "ada@one.example")
    out, _ = backed_up(tmp_path, keyring, secret)
    with out.open("rb") as file:
        folder = tmp_path / "seen"
        folder.mkdir()
        told = {name: path.read_bytes() for name, path, _ in unpack(file, secret, "ledger", folder, lambda _: True)}
    assert sorted(told) == ["manifest.json", "policy.db"]
    manifest = Manifest.of(told["manifest.json"])
    assert (manifest.audit_seq, manifest.tombstones, manifest.ends) == (1, 0, NOW + 35 * DAY_US)
    for key in (keyring.pepper, keyring.service, *keyring.kek.values()):
        assert key not in told["policy.db"]
        assert key.hex().encode() not in told["policy.db"] + told["manifest.json"]


@only_sqlite
def test_a_backup_replaces_nothing(store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path) -> None:
    out, made = backed_up(tmp_path, keyring, secret)
    with pytest.raises(BackupError, match="is there already"):
        backed_up(tmp_path, keyring, secret)
    made.part.write_bytes(b"another")
    with pytest.raises(FileExistsError):
        publish(made, out)
    assert sha256(out.read_bytes()).digest() == made.digest


# --- ends -----------------------------------------------------------------------------------------------------------


@only_sqlite
def test_past_its_end_it_is_not_restored(store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path) -> None:
    """P-11: copies have an end, of 35 days at most."""
    out, made = backed_up(tmp_path, keyring, secret, 90)
    assert made.ends == NOW + 35 * DAY_US
    store.dispose()
    with pytest.raises(RestoreError, match="to be destroyed"):
        restore(settings_of(tmp_path), secret, out, made.ends)
    assert not is_quarantined(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    restore(settings_of(tmp_path), secret, out, made.ends - 1)


async def test_copies_are_listed_with_their_ends(store: Engine, tmp_path: Path) -> None:
    now = NOW
    rooms = Store(store)
    ops = BackupOperations(rooms, lambda: now, tmp_path)
    try:
        assert await ops.op_backups() == []
        number = await ops.op_backup_made(NOW, NOW + 2 * DAY_US, b"d" * 32, 100)
        for wrong in ((NOW, NOW, 1), (NOW, NOW + 36 * DAY_US, 1), (NOW, NOW + DAY_US, 0)):
            with pytest.raises(Refused):
                await ops.op_backup_made(wrong[0], wrong[1], b"d" * 32, wrong[2])
        assert await ops.op_backups(due_only=True) == []
        now = NOW + 2 * DAY_US
        assert [one["number"] for one in await ops.op_backups(due_only=True)] == [number]
        await ops.round()
        assert ops.statistics() == {"backups_kept": 1.0, "backups_due": 1.0, "backup_age_seconds": 172800.0}
        assert await ops.op_backup_destroyed(number)
        assert not await ops.op_backup_destroyed(number)
        with pytest.raises(Refused):
            await ops.op_backup_destroyed(number + 1)
        await ops.round()
        assert ops.statistics()["backups_due"] == 0.0
        assert (await ops.op_backups())[0]["destroyed"] == now
        assert await rooms.write(audit.verify) is None
    finally:
        await rooms.close()


# --- the swap -------------------------------------------------------------------------------------------------------


@only_sqlite
def test_a_running_writer_is_refused(store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path) -> None:
    out, _ = backed_up(tmp_path, keyring, secret)
    with restoring._locked(tmp_path), pytest.raises(RestoreError, match="is running"):
        restore(settings_of(tmp_path), secret, out, NOW)
    assert not is_quarantined(tmp_path)


@only_sqlite
def test_whoever_reads_the_store_is_refused_too(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path
) -> None:
    out, _ = backed_up(tmp_path, keyring, secret)
    store.dispose()
    tracker = Vitals(tmp_path, "tracker", 3)
    tracker.publish({}, NOW / SECOND_US - 2)
    with pytest.raises(RestoreError, match="tracker 3 was alive"):
        restore(settings_of(tmp_path), secret, out, NOW)
    restore(settings_of(tmp_path), secret, out, NOW + 60 * SECOND_US)  # it was killed, then


def test_unsealed_copies_of_a_killed_backup_go(tmp_path: Path) -> None:
    old, young = tmp_path / "aaaaaaaa-policy.db", tmp_path / "bbbbbbbb-policy.db"
    for path, hours in ((old, 7), (young, 5)):
        path.touch()
        os.utime(path, (NOW / SECOND_US - hours * 3600,) * 2)
    assert (forget_copies(tmp_path, NOW), forget_copies(tmp_path, NOW), young.exists()) == (1, 0, True)
    assert forget_copies(tmp_path / "nowhere", NOW) == 0


@only_sqlite
def test_the_old_log_never_meets_the_new_store(store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path) -> None:
    """SQLite would replay a log it finds beside a database, whoever's it was."""
    seed(store, keyring, "ada@one.example")
    out, _ = backed_up(tmp_path, keyring, secret)
    seed(store, keyring, "bob@one.example")
    log = octets(tmp_path / "policy.db-wal")
    assert log
    store.dispose()
    (tmp_path / "policy.db-wal").write_bytes(log)  # as a kill -9 of the writer leaves it
    restore(settings_of(tmp_path), secret, out, NOW)
    assert not (tmp_path / "policy.db-wal").exists()
    assert known(store, keyring) == ["ada@one.example"]
    store.dispose()


@only_sqlite
@pytest.mark.parametrize("damage", ["cut", "another program", "no database", "not its manifest"])
def test_a_damaged_backup_changes_nothing(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path, damage: str
) -> None:
    seed(store, keyring, "ada@one.example")
    if damage == "another program":
        with store.begin() as conn:
            conn.execute(text("UPDATE schema_version SET version_num = '9999'"))
    out, _ = backed_up(tmp_path, keyring, secret)
    if damage == "cut":
        out.write_bytes(out.read_bytes()[:-1])
    elif damage in ("no database", "not its manifest"):
        folder = tmp_path / "seen"
        folder.mkdir()
        with out.open("rb") as file:
            files = {
                name: path.read_bytes() for name, path, _ in unpack(file, secret, "ledger", folder, lambda _: True)
            }
        files["policy.db"] = b"x" * 5000
        if damage == "no database":
            told = json.loads(files["manifest.json"])
            told["files"]["policy.db"] = sha256(files["policy.db"]).hexdigest()
            files["manifest.json"] = json.dumps(told).encode()
        with out.open("wb") as file:
            pack(file, secret, "ledger", {}, sorted(files.items()))
    store.dispose()
    words = {
        "cut": "does not open", "another program": "newer program", "no database": "damaged",
        "not its manifest": "manifest says",
    }  # fmt: skip
    with pytest.raises((RestoreError, ContainerError), match=words[damage]):
        restore(settings_of(tmp_path), secret, out, NOW)
    assert not is_quarantined(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    assert known(store, keyring) == ["ada@one.example"]
    store.dispose()


STEPS = ("unpacked", "prepared", "marked", "cleared", "swapped", "standing")


def restore_and_die(folder: Path, step: str) -> None:
    def reached(point: str) -> None:
        if point == step:
            os.kill(os.getpid(), signal.SIGKILL)

    secret = Secret.of_key_file(folder / "backup.key")
    restore(settings_of(folder), secret, folder / "copy.backup", NOW, reached=reached)
    print("never came there")


@only_sqlite
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step_of_the_swap(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path, step: str
) -> None:
    """One of the two stores, whole; from the mark on never served without the way out of quarantine."""
    seed(store, keyring, "ada@one.example")
    backed_up(tmp_path, keyring, secret)
    seed(store, keyring, "bob@one.example")
    store.dispose()
    code = (
        "import sys; from pathlib import Path; from tests.policy.test_backup import restore_and_die; "
        "restore_and_die(Path(sys.argv[1]), sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), step], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    is_marked = STEPS.index(step) >= STEPS.index("marked")
    assert is_quarantined(tmp_path) == is_marked
    finish(settings_of(tmp_path))
    finish(settings_of(tmp_path))
    assert not (tmp_path / FOLDER).exists()
    assert is_quarantined(tmp_path) == is_marked
    if is_marked:
        mark = read_mark(tmp_path)
        assert mark is not None
        assert mark.state == STANDING
        assert known(store, keyring) == ["ada@one.example"]
    else:
        assert known(store, keyring) == ["ada@one.example", "bob@one.example"]
    store.dispose()
    restore(settings_of(tmp_path), secret, tmp_path / "copy.backup", NOW)  # and the command again comes through
    assert known(store, keyring) == ["ada@one.example"]
    store.dispose()


@only_sqlite
def test_a_mark_that_cannot_be_read_serves_nobody(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path
) -> None:
    (tmp_path / MARK).write_text("{")
    assert is_quarantined(tmp_path)
    with pytest.raises(RestoreError, match="cannot be read"):
        finish(settings_of(tmp_path))


# --- keys -----------------------------------------------------------------------------------------------------------


@only_sqlite
def test_keys_are_backed_up_apart_and_what_was_destroyed_stays_so(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path)
    keys.ensure_week(settings.keys_dir, WEEK + 1)
    (settings.keys_dir / "dkim").mkdir()
    (settings.keys_dir / "dkim" / "a.example.rsa.pem").write_text("pem")
    out = tmp_path / "keys.backup"
    made = pack_keys(settings, Keyring.load(settings.keys_dir), secret, out, NOW, 35)
    publish(made, out)
    assert made.ends == NOW + 14 * DAY_US, "no copy of a weekly key outlives the key"
    before = {path.name: path.read_bytes() for path in settings.keys_dir.rglob("*") if path.is_file()}
    lane = settings.keys_dir / "lane.1"
    for path in [*settings.keys_dir.glob("kek.*"), settings.keys_dir / "pepper.1"]:
        path.unlink()
    lane.write_text("aa" * 32 + "\n")
    back, gone = restore_keys(settings, secret, out, NOW + DAY_US)
    assert (back, gone) == ([f"kek.{WEEK}", f"kek.{WEEK + 1}", "pepper.1"], [])
    assert lane.read_text() == "aa" * 32 + "\n", "nothing is replaced"
    assert {path.name: path.read_bytes() for path in settings.keys_dir.rglob("*") if path.is_file()} == before | {
        "lane.1": lane.read_bytes()
    }
    assert all(stat_mode(path) == 0o600 for path in settings.keys_dir.glob("kek.*"))
    with pytest.raises(RestoreError, match="to be destroyed"):
        restore_keys(settings, secret, out, made.ends)


@only_sqlite
def test_a_destroyed_weekly_key_does_not_come_back(
    store: Engine, keyring: Keyring, secret: Secret, tmp_path: Path
) -> None:
    """Decision 13: 14 days after its week it is gone, a backup of it included."""
    settings = settings_of(tmp_path)
    late = (WEEK + 1) * WEEK_US + 14 * DAY_US - DAY_US
    out = tmp_path / "keys.backup"
    publish(pack_keys(settings, keyring, secret, out, late, 14), out)
    for week in (WEEK + 1, WEEK + 2, WEEK + 3):
        keys.ensure_week(settings.keys_dir, week)
    keys.destroy(settings.keys_dir, "kek", [WEEK])
    assert restore_keys(settings, secret, out, late + DAY_US) == ([], [f"kek.{WEEK}", f"queue.{WEEK}"])
    assert not (settings.keys_dir / f"kek.{WEEK}").exists()


# --- people whose key is gone ---------------------------------------------------------------------------------------


def test_whose_key_is_gone_comes_back_by_an_import(store: Engine, tmp_path: Path, keyring: Keyring) -> None:
    """Decision 13: number and tag stay, so consent and the negative list do; nothing of before can be opened."""
    people = [f"person{n}@one.example" for n in range(7)]
    seed(store, keyring, *people)
    with store.connect() as conn:
        before = {row.tag: row for row in conn.execute(select(schema.subject))}
    keys.ensure_week(tmp_path / "keys", WEEK + 3)
    keys.destroy(tmp_path / "keys", "kek", [WEEK])
    later = Keyring.load(tmp_path / "keys")
    rows = [row_of(keyring.pepper, one) for one in people]
    with store.begin() as conn:
        with pytest.raises(vault.VaultError, match=f"kek.{WEEK}"):
            vault.resolve(conn, later, 1, rows, WEEK + 3, NOW)
        assert [close_lost(conn, keyring=later, rows=4) for _ in range(3)] == [4, 3, 0]
        assert lost(conn) == 7
        for row in conn.execute(select(schema.subject)):
            assert (row.address, row.key, row.kek_id, row.number) == (b"", b"", vault.LOST, before[row.tag].number)
        with pytest.raises(vault.VaultError, match="importing the person"):
            vault.find(conn, later, rows[0][0])
        fresh = row_of(keyring.pepper, "new@one.example")
        told = vault.resolve(conn, later, 1, [*rows[:3], fresh, rows[0]], WEEK + 3, NOW)
        assert [number for number, _ in told[:3]] == [before[tag].number for tag, _, _ in rows[:3]]
        assert told[4] == told[0]
        assert vault.resolve(conn, later, 1, [rows[0]], WEEK + 3, NOW) == [told[0]]
        [one] = vault.find(conn, later, rows[0][0])
        assert (one.address, one.pseudonym(WEEK + 3)) == (people[0], told[0][1])
        assert lost(conn) == 4


@only_sqlite
def test_the_store_refuses_nothing_it_should_take(store: Engine, tmp_path: Path) -> None:
    """Raising numbers of an empty store too: what was given out since is not known there."""
    with store.begin() as conn:
        restoring.raise_numbers(conn)
        restoring.raise_numbers(conn)
        told = dict(tuple(row) for row in conn.execute(text("SELECT name, seq FROM sqlite_sequence")))
    assert "audit" not in told
    assert told["job"] == told["negative"] == 2 * restoring.LONG_JUMP
    assert told["list"] == told["topic"] == told["account"] == 2 * restoring.SHORT_JUMP


@only_sqlite
def test_put_and_take(store: Engine, tmp_path: Path) -> None:
    mark = restoring.Mark(SWAPPING, NOW, NOW, "postgresql", 0, "", "", "")
    put_mark(tmp_path, mark)
    assert stat_mode(tmp_path / MARK) == 0o600
    with pytest.raises(RestoreError, match="interrupted"):
        finish(settings_of(tmp_path))
    assert restoring.forgive(tmp_path).forgiven
    restoring.take_mark(tmp_path)
    with pytest.raises(RestoreError, match="is not quarantined"):
        restoring.forgive(tmp_path)
    finish(settings_of(tmp_path))
