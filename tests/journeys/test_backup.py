"""Must show (issue 5, P-11): a restored backup is quarantined until it has caught up; nobody erased comes back.

The writer is the real one, over real Valkey and SQLite; `start` is what its start does (policy.quarantine, then the
writer). Where it is to be killed, the way out of quarantine runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from policy import audit, backup, erasure, keys, keyspace, negative, restoring, schema, suppression, vault
from policy.backup import BackupOperations
from policy.cli.backup import backup as backup_command
from policy.cli.backup import backups, restore
from policy.containers import Secret
from policy.doorway import handlers
from policy.fence import Fence, RunNotCleared
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.quarantine import Left, QuarantineError, leave
from policy.schema import open_store
from policy.tombstones import NAME
from policy.valkey import connect
from policy.vault import VaultError
from policy.wire import ConsentRow
from policy.writer import Writer
from tests.journeys.test_erasure import BOB, seed, told, where
from tests.journeys.test_policy_cli import config
from tests.journeys.test_writer import ADA, mref, tag
from tests.world.mail import ROOT
from tests.world.servers import PolicyWorld, policy_world, settings_for, world

__all__ = ["world"]

CAROL = "carol@one.example"
LIST = suppression.Scope.LIST
APP = typer.Typer()
APP.command("backup")(backup_command)
APP.command("backups")(backups)
APP.command("restore")(restore)


class Shell:
    """Runs the commands off the loop, because they bring loops of their own."""

    def __init__(self, folder: Path) -> None:
        self._config = str(config(folder))
        self.key = folder / "backup.key"

    async def __call__(self, *words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, APP, [*words, "--config", self._config])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    async def json(self, *words: str) -> Any:
        return json.loads(await self(*words, "--json"))

    async def save(self, out: Path) -> Any:
        return await self.json("backup", str(out), "--key", str(self.key))

    async def bring_back(self, out: Path, *more: str) -> Any:
        return await self.json("restore", str(out), "--key", str(self.key), "--yes", *more)


@pytest.fixture
async def sh(world: PolicyWorld, monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)
    attach(world)
    made = Shell(world.settings.data_dir)
    await made("backup", "--new-key", str(made.key))
    return made


def attach(world: PolicyWorld) -> None:
    """The writer's operations on backups."""
    if "backup_made" not in world.writer.operations:
        world.writer.operations.update(
            handlers(BackupOperations(world.writer.store, world.clock, world.settings.data_dir))
        )


async def start(world: PolicyWorld, reached: Any = lambda _point: None) -> Left | None:
    """The next start of the policy process."""
    left = await leave(world.settings, world.keyring, world.clock, reached=reached)
    world.writer = Writer(world.settings, world.keyring, clock=world.clock)
    await world.writer.start()
    return left


async def cell(world: PolicyWorld, address: str) -> bytes:
    """What the gate holds against somebody."""
    held: Any = await world.redis.hget(
        keyspace.suppression(tag(world, address)[1], tag(world, address)[0]), tag(world, address)[0]
    )
    return held or b""


async def people(world: PolicyWorld) -> dict[str, int]:
    known = {tag(world, one)[0]: one for one in (ADA, BOB, CAROL)}
    return {known[row.tag]: row.number for row in await told(world, schema.subject)}


async def since(world: PolicyWorld) -> dict[str, int]:
    """What happens between the backup and the loss: Ada is erased, Bob opts out, Carol withdraws from tracking."""
    numbers = await people(world)
    await world.ask.call("erase", account=0, tag=tag(world)[0], partition=tag(world)[1], address=ADA)
    await world.ask.call("opt_out", list=1, partition=tag(world, BOB)[1], tag=tag(world, BOB)[0], source="page")
    assert await world.ask.call("withdraw", account=1, tag=tag(world, CAROL)[0], purpose="open_tracking")
    return numbers


async def seeded(world: PolicyWorld) -> None:
    await seed(world, (ADA, BOB, CAROL))
    number = (await people(world))[CAROL]
    await world.ask.consents(1, [ConsentRow(number, "open_tracking", "consent", "v1", "form", world.clock() - 1000)])


async def caught_up(world: PolicyWorld, numbers: dict[str, int]) -> None:
    """Everything that happened since the backup is in force again."""
    assert not restoring.is_quarantined(world.settings.data_dir)
    assert sorted(await people(world)) == sorted([BOB, CAROL])
    store = world.writer.store
    assert {e.reason for e in await store.write(lambda conn: suppression.check(conn, tag(world)[0]))} == {"erasure"}
    [out] = await store.write(lambda conn: suppression.check(conn, tag(world, BOB)[0]))
    assert (out.scope, out.scope_id, out.reason) == (LIST, 1, "opt-out")
    assert await cell(world, ADA)
    assert await cell(world, BOB)
    assert not await cell(world, CAROL)
    listed, _ = await store.write(negative.load)
    assert listed == {numbers[ADA], numbers[CAROL]}
    assert {row.cause for row in await told(world, schema.erasure)} == {"replay"}
    assert await store.write(audit.verify) is None
    assert [row.subject for row in await world.ask.resolve(1, week_of(world.clock()), [(*tag(world), ADA)])] == [0]


async def test_whoever_was_erased_since_is_erased_again(world: PolicyWorld, sh: Shell) -> None:
    """P-11: backup taken, subject erased, backup restored: refuses until the replay is done, then the subject is absent
    and no key of theirs is anywhere."""
    await seeded(world)
    folder, out = world.settings.data_dir, world.settings.data_dir / "copy.backup"
    made = await sh.save(out)
    [listed] = (await sh.json("backups"))["backups"]
    assert (listed["number"], listed["bytes"], listed["due"]) == (made["number"], out.stat().st_size, False)
    ada = next(row for row in await told(world, schema.subject) if row.tag == tag(world)[0])
    numbers = await since(world)
    assert "is running" in await sh("restore", str(out), "--key", str(sh.key), "--yes", code=1)
    await world.writer.stop()
    assert (await sh.bring_back(out))["state"] == "quarantined"
    assert where(folder, ada.key), "it did come back with the backup"

    seen: list[str] = []

    def reached(point: str) -> None:
        seen.append(point)
        assert restoring.is_quarantined(folder)
        assert not world.settings.writer_socket.exists()

    left = await start(world, reached)
    assert seen == ["read", "fenced", "replayed", "shredded", "closed", "swept", "told"]
    assert left is not None
    assert (left.erased, left.lost) == (2, 0)
    await caught_up(world, numbers)
    actors = [(row.actor, row.action) for row in await told(world, schema.audit)]
    assert ("policy", "restored") in actors
    await purged(world)
    assert where(folder, ada.key, ada.address) == []
    assert [row.mref for row in await told(world, schema.message) if row.mref == mref(ADA)] == []
    assert await start_again(world) is None


async def start_again(world: PolicyWorld) -> Left | None:
    await world.writer.stop()
    return await start(world)


async def purged(world: PolicyWorld) -> None:
    """Until the loop of the writer has taken out every byte."""
    async with asyncio.timeout(30):
        while any(row.state != erasure.PURGED for row in await told(world, schema.erasure)):
            await asyncio.sleep(0.02)


async def test_nobody_is_let_in_before(world: PolicyWorld, sh: Shell) -> None:
    """The server runs on, with workers of another host on it: no connection is admitted any more."""
    await seeded(world)
    await sh.save(out := world.settings.data_dir / "copy.backup")
    await since(world)
    worker = connect(world.settings.redis_address(), Fence())
    await worker.ping()
    await world.writer.stop()
    await sh.bring_back(out)

    class Stop(Exception):
        pass

    def reached(point: str) -> None:
        if point == "fenced":
            raise Stop

    with pytest.raises(Stop):
        await leave(world.settings, world.keyring, world.clock, reached=reached)
    assert restoring.is_quarantined(world.settings.data_dir)
    assert await world.redis.hmget(keyspace.META, ["run", "lease"]) == [None, None]
    other = connect(world.settings.redis_address(), Fence())
    with pytest.raises(RunNotCleared):
        await other.ping()
    await start(world)
    await other.ping()
    await worker.aclose()
    await other.aclose()


async def test_a_redis_that_is_lost_too_is_made_from_the_store(world: PolicyWorld, sh: Shell) -> None:
    await seeded(world)
    await sh.save(out := world.settings.data_dir / "copy.backup")
    numbers = await since(world)
    await world.writer.stop()
    await world.redis.flushall()
    await sh.bring_back(out)
    await start(world)
    await caught_up(world, numbers)


# --- the erasure ledger ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["missing", "cut", "changed", "another"])
async def test_without_a_whole_ledger_it_stays_quarantined(world: PolicyWorld, sh: Shell, harm: str) -> None:
    await seeded(world)
    await world.ask.call("opt_out", list=1, partition=0, tag=b"t" * 12, source="page")  # the ledger has a line by now
    await sh.save(out := world.settings.data_dir / "copy.backup")
    numbers = await since(world)
    await world.writer.stop()
    await sh.bring_back(out)
    ledger = world.settings.tombstones_dir / NAME
    head, whole = ledger.with_name(NAME + ".head"), ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    if harm == "missing":
        ledger.unlink()
    elif harm == "cut":
        ledger.write_bytes(b"".join(lines[:-1]))
    elif harm == "changed":
        ledger.write_bytes(whole.replace(b"list", b"l1st").replace(b"erasure", b"erasvre"))
    else:
        ledger.write_bytes(b"")
        head.unlink()
    words = {"missing": "is missing", "cut": "tail was cut", "changed": "line ", "another": "another one"}
    for _ in range(2):
        with pytest.raises(QuarantineError, match=words[harm]):
            await leave(world.settings, world.keyring, world.clock)
        assert restoring.is_quarantined(world.settings.data_dir)
    ledger.write_bytes(whole)
    await start(world)
    await caught_up(world, numbers)


async def test_an_officers_word_goes_on_without_and_is_audited(world: PolicyWorld, sh: Shell) -> None:
    """What only Redis knows stays in force then: nobody is forgotten who need not be."""
    await seeded(world)
    await sh.save(out := world.settings.data_dir / "copy.backup")
    await since(world)
    await world.writer.stop()
    (world.settings.tombstones_dir / NAME).unlink()
    await sh.bring_back(out)
    with pytest.raises(QuarantineError, match="without-tombstones"):
        await leave(world.settings, world.keyring, world.clock)
    await sh("restore", "--without-tombstones", code=2)
    assert (await sh.json("restore", "--without-tombstones", "--yes"))["forgiven"]
    left = await start(world)
    assert left is not None
    assert left.lines == 0
    [line] = [row for row in await told(world, schema.audit) if row.action == "restored"]
    assert (line.actor, line.result.split(",")[0]) == ("officer", "an officer went on without tombstones")
    assert await cell(world, ADA)
    assert await cell(world, BOB)
    store = world.writer.store
    assert [e.reason for e in await store.write(lambda conn: suppression.check(conn, tag(world)[0]))] == ["erasure"]
    assert [row.subject for row in await world.ask.resolve(1, week_of(world.clock()), [(*tag(world), ADA)])] == [0]
    assert await sh("restore", "--without-tombstones", "--yes", code=1) == "this installation is not quarantined\n"


# --- an old backup --------------------------------------------------------------------------------------------------


@pytest.fixture
async def old_world() -> AsyncIterator[PolicyWorld]:
    """A world whose clock can be turned: `hands[0]` microseconds."""
    begun = (week_of(1_795_000_000_000_000) * 7 + 6) * DAY_US  # the last day of a week: its key goes 15 days later
    hands[:] = [begun]
    async with policy_world(clock=lambda: hands[0]) as made:
        yield made


hands: list[int] = []


async def test_a_backup_twenty_days_old(old_world: PolicyWorld) -> None:
    """Issue 5, P-36: quarantined until the replay; nobody's key can be opened. The living come back by an import, with
    their consent and withdrawals; the erased do not."""
    world = old_world
    settings, out = world.settings, world.settings.data_dir / "copy.backup"
    await seeded(world)
    secret = Secret("key", b"k" * 32)
    made = await asyncio.to_thread(backup.write, settings, world.keyring, secret, out, hands[0], 35, lambda *_: None)
    backup.publish(made, out)
    numbers = await since(world)
    before = {row.number: row for row in await told(world, schema.subject)}
    await world.writer.stop()

    hands[0] += 20 * DAY_US
    week = week_of(hands[0])
    for one in (week - 1, week):
        keys.ensure_week(settings.keys_dir, one)
    keys.destroy(settings.keys_dir, "kek", [world.keyring.kek_id])  # as `turn_keys` did on its day
    world.keyring = Keyring.load(settings.keys_dir)
    await asyncio.to_thread(restoring.restore, settings, secret, out, hands[0])
    assert restoring.is_quarantined(settings.data_dir)
    engine = open_store(settings.sql_address(), writer=False)
    with engine.connect() as conn:
        for number in numbers.values():
            with pytest.raises(VaultError):
                vault.get(conn, world.keyring, number)
    engine.dispose()

    left = await start(world)
    assert left is not None
    assert (left.erased, left.lost) == (2, 2)
    await caught_up(world, numbers)
    for row in await told(world, schema.subject):
        assert (row.kek_id, row.key, row.address) == (vault.LOST, b"", b"")
        assert where(settings.data_dir, before[row.number].key) in ([], ["policy.db-wal"])
    rows = [(*tag(world, one), one) for one in (BOB, CAROL)]
    again = await world.ask.resolve(1, week, rows)
    assert [one.subject for one in again] == [numbers[BOB], numbers[CAROL]]
    found = await world.writer.store.write(lambda conn: vault.find(conn, world.keyring, tag(world, CAROL)[0]))
    assert [one.address for one in found] == [CAROL]
    assert await world.writer.store.write(lambda conn: negative.standing(conn, numbers[CAROL])) == "withdrawn"


async def test_a_key_that_is_missing_before_its_time_was_forgotten(world: PolicyWorld, sh: Shell) -> None:
    """Not destroyed, so nobody is given up: it stays quarantined until the keys are back."""
    await seeded(world)
    await sh.save(out := world.settings.data_dir / "copy.backup")
    apart = world.settings.data_dir / "keys.backup"
    await sh("backup", "--keys", str(apart), "--key", str(sh.key))
    await world.writer.stop()
    await sh.bring_back(out)
    ring, folder = world.keyring, world.settings.keys_dir
    (folder / f"kek.{ring.kek_id}").unlink()
    keys.ensure_week(folder, ring.kek_id - 1)
    world.settings.tombstones_dir.mkdir(exist_ok=True)
    (world.settings.tombstones_dir / NAME).touch()
    with pytest.raises(QuarantineError, match="before its time"):
        await leave(world.settings, Keyring.load(folder), world.clock)
    back = await sh.json("restore", "--keys", str(apart), "--key", str(sh.key))
    assert back["keys"]["back"] == [f"kek.{ring.kek_id}"]
    with pytest.raises(QuarantineError, match="not the keys of that backup"):
        await leave(world.settings, Keyring.create(folder.with_name("others"), ring.kek_id), world.clock)
    await start(world)
    assert len(await people(world)) == 3


async def test_numbers_that_delivered_mail_knows_are_not_given_out_again(world: PolicyWorld, sh: Shell) -> None:
    await seeded(world)
    await sh.save(out := world.settings.data_dir / "copy.backup")
    later = [await world.ask.call("list_add", account=1, name=f"later{n}") for n in range(3)]
    _, seq = await world.writer.store.write(negative.load)
    await since(world)
    await world.writer.stop()
    await sh.bring_back(out)
    await start(world)
    assert await world.ask.call("list_add", account=1, name="new") > max(later)
    entries: Any = await world.redis.xrange(keyspace.NEGATIVE)
    told_by = [int(fields[b"q"]) for _, fields in entries]
    assert all(one < other for one, other in itertools.pairwise(told_by)), "trackers miss nothing they think they know"
    assert told_by[-1] > seq


# --- killed ---------------------------------------------------------------------------------------------------------

STEPS = ("read", "fenced", "replayed", "shredded", "closed", "swept", "told")


async def leave_and_die(folder: Path, step: str) -> None:
    def reached(point: str) -> None:
        if point == step:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = settings_for(folder)
    from policy.writer import clock_us

    await leave(settings, Keyring.load(settings.keys_dir), clock_us, reached=reached)
    print("never came there")


@pytest.mark.parametrize("step", STEPS)
async def test_killed_on_the_way_out_it_converges(step: str) -> None:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(policy_world())
        await seeded(world)
        settings, out = world.settings, world.settings.data_dir / "copy.backup"
        secret = Secret("key", b"k" * 32)
        made = await asyncio.to_thread(
            backup.write, settings, world.keyring, secret, out, world.clock(), 35, lambda *_: None
        )
        backup.publish(made, out)
        numbers = await since(world)
        await world.writer.stop()
        await asyncio.to_thread(restoring.restore, settings, secret, out, world.clock())
        code = (
            "import asyncio, sys; from pathlib import Path; from tests.journeys.test_backup import leave_and_die; "
            "asyncio.run(leave_and_die(Path(sys.argv[1]), sys.argv[2]))"
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(settings.data_dir), step, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, errors = await child.communicate()
        assert child.returncode == -signal.SIGKILL, errors.decode()[-2000:]
        assert restoring.is_quarantined(settings.data_dir)
        await start(world)
        await caught_up(world, numbers)
