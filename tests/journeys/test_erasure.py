"""Must show (issue 5): a person is erased everywhere, stays suppressed, and a kill at any step changes neither.

The writer is the real one, in this process or (to be killed) in one of its own, over real Valkey and SQLite.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import typer
from sqlalchemy import func, select
from typer.testing import CliRunner

import policy.enforcement
from policy import audit, erasing, erasure, keyspace, records, schema, suppression
from policy.address import normalise, parse, tag_of
from policy.cli.erasing import erase, erasures
from policy.doorway import handlers
from policy.events import Batch, Kind
from policy.keys import Keyring
from policy.keyspace import partition_of
from policy.personal import Premises
from policy.schema import open_store
from policy.settings import PolicySettings
from policy.tombstones import NAME, Tombstones
from policy.writer import Writer
from tests.journeys.test_nothing_in_clear import forms
from tests.journeys.test_policy_cli import config
from tests.journeys.test_writer import ADA, accept, delivered, done, mref, tag, tell
from tests.world.mail import ROOT, job, mail_world, rows
from tests.world.octets import octets
from tests.world.servers import PolicyWorld, policy_world, settings_for, world
from tracker.app import build as build_tracker
from tracker.links import Links
from tracker.settings import TrackerSettings

__all__ = ["world"]

BOB = "bob@one.example"


def attach(writer: Writer, settings: PolicySettings) -> erasing.Erasing:
    """The writer's erasures, with the places of this floor alone."""
    premises = Premises(settings, writer.store, writer.redis, lambda: writer.keyring, writer._clock)
    places = records.build(premises)
    ledger = Tombstones(settings.data_dir / "tombstones" / NAME)
    made = erasing.Erasing(premises, writer.enforcement, ledger, writer._book.guard, lambda: places)
    writer.operations.update(handlers(erasing.ErasureOperations(made, premises)))
    return made


async def purged(made: erasing.Erasing, seconds: float = 30.0) -> None:
    """Rounds until nothing is open; what the loop of the writer does."""
    async with asyncio.timeout(seconds):
        await made.load()
        while True:
            await made.round()
            if made.statistics()["erasures_open"] == 0:
                return
            made._waits.clear()  # no pauses between two walks
            await asyncio.sleep(0.01)


async def seed(world: PolicyWorld, people: tuple[str, ...] = (ADA, BOB)) -> None:
    """A finished job with these people in it, through vault and drains."""
    accepted = await accept(world, "spring")
    resolved = await world.ask.resolve(
        accepted.account, world.clock() // (7 * 86_400_000_000), [(*tag(world, one), one) for one in people]
    )
    events = delivered(*[mref(one) for one in people])
    for event, one, who in zip(events, resolved, people, strict=True):
        event.pseudonym, event.tag, event.at = one.pseudonym, tag(world, who)[0], world.clock()
        event.note = f"sealed reply about {one.subject}".encode()  # stands for ciphertext: the scan looks for it
    await tell(world, Batch(accepted.number, "one.example", events))
    await world.ask.expanded(accepted.number, len(people))
    await done(world, accepted.number)


APP = typer.Typer()
APP.command("erase")(erase)
APP.command("erasures")(erasures)


class Shell:
    """Runs the commands of this right off the loop, because they bring loops of their own."""

    def __init__(self, folder: Path) -> None:
        self._config = str(config(folder))

    async def __call__(self, *words: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, APP, [*words, "--config", self._config])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    async def json(self, *words: str) -> Any:
        return json.loads(await self(*words, "--json"))


@pytest.fixture
async def sh(world: PolicyWorld, monkeypatch: pytest.MonkeyPatch) -> Shell:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)
    return Shell(world.settings.data_dir)


async def told(world: PolicyWorld, table: Any) -> list[Any]:
    return await world.writer.store.write(lambda conn: list(conn.execute(select(table))))


def everything_written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each file of the installation but keys and sockets."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "keys" not in path.parts and "kept" not in path.parts:
            yield path.name, octets(path)


def where(folder: Path, *needles: bytes) -> list[str]:
    return [name for name, data in everything_written(folder) if any(needle in data for needle in needles)]


# --- the person is gone ---------------------------------------------------------------------------------------------


async def test_erased_by_command_to_the_last_byte(world: PolicyWorld, sh: Shell) -> None:
    """P-54, P-17: suppressed and unlinkable when the command returns, physically gone with the receipt."""
    made = attach(world.writer, world.settings)
    await made.load()
    await seed(world)
    subjects = {row.tag: row for row in await told(world, schema.subject)}
    ada, bob = subjects[tag(world)[0]], subjects[tag(world, BOB)[0]]
    reply = f"sealed reply about {ada.number}".encode()
    folder = world.settings.data_dir
    for trace in (ada.address, ada.key, reply):
        assert where(folder, trace), "the search finds it where it is"

    told_json = await sh.json("erase", ADA, "--yes")
    assert (told_json["new"], told_json["messages"]) == (True, 1)
    assert [row.number for row in await told(world, schema.subject)] == [bob.number]
    assert [one.reason for one in world.reader.why(ADA, world.keyring).standing] == ["erasure"]
    cell = await world.redis.hget(keyspace.suppression(tag(world)[1], tag(world)[0]), tag(world)[0])
    assert cell, "the gate knows it already"

    await purged(made)
    for trace in (ada.address, ada.key, reply, *forms(ADA), *hashes(ADA)):
        assert where(folder, trace) == []
    assert where(folder, bob.address)
    left = await told(world, schema.message)
    assert [row.mref for row in left] == [mref(BOB)]
    status = world.reader.job_status("spring", world.clock())
    assert status is not None
    assert (status.counts["delivered"], status.terminal) == (2, 2), "counters name nobody and stay"
    [one, everywhere] = sorted((await sh.json("erasures"))["erasures"], key=lambda row: int(row["number"]))
    assert (one["state"], everywhere["state"]) == ("purged", "purged")
    assert one["records"] == 1
    assert await world.writer.store.write(audit.verify) is None

    again = await sh.json("erase", ADA)
    assert (again["new"], again["messages"]) == (False, 0)
    assert "was erased" in await sh("erase", ADA)
    assert "purged" in await sh("erasures")


async def test_commands_that_cannot_be(world: PolicyWorld, sh: Shell) -> None:
    attach(world.writer, world.settings)
    assert "not an address" in await sh("erase", "nobody", code=2)
    assert "no account" in await sh("erase", ADA, "--account", "acme", code=1)
    await sh("erase", ADA, "--cause", "whim", code=2)
    assert "no erasures" in await sh("erasures")


async def test_at_one_account_the_others_keep_theirs(world: PolicyWorld, sh: Shell) -> None:
    made = attach(world.writer, world.settings)
    await seed(world)
    other = await world.ask.account_add("other", display_name="Other")
    await world.ask.resolve(other, 2967, [(*tag(world), ADA)])
    told_json = await sh.json("erase", ADA, "--account", "acme")
    assert len(told_json["erasures"]) == 1
    await purged(made)
    assert sorted(row.account for row in await told(world, schema.subject)) == [1, other]
    [entry] = await told(world, schema.suppression)
    assert (entry.scope, entry.scope_id) == (int(suppression.Scope.ACCOUNT), 1)


async def test_nothing_is_shredded_while_redis_does_not_know(world: PolicyWorld) -> None:
    """P-17: stop, suppress, then shred."""
    made = attach(world.writer, world.settings)
    await seed(world, (ADA,))
    await world.server.stop()
    with pytest.raises(policy.enforcement.RedisBehind):
        await made.erase(0, *tag(world), ADA, "request", None)
    assert len(await told(world, schema.subject)) == 1
    assert [row.state for row in await told(world, schema.erasure)] == ["suppressed", "suppressed"]
    await made.round()
    assert len(await told(world, schema.subject)) == 1
    await world.server.start()
    async with asyncio.timeout(20):
        while world.writer.enforcement.behind:
            await asyncio.sleep(0.02)
    await purged(made)
    assert await told(world, schema.subject) == []


async def test_a_place_that_fails_holds_up_one_erasure_and_is_tried_again(
    world: PolicyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = attach(world.writer, world.settings)
    await seed(world)
    first = (await made.erase(1, *tag(world), ADA, "request", None))["erasures"]
    await made.erase(1, *tag(world, BOB), BOB, "minor", None)
    real = erasure.erased_person

    def failing(conn: Any, number: int, *more: Any) -> Any:
        if number == first[0]:
            raise RuntimeError("a place is broken")
        return real(conn, number, *more)

    with monkeypatch.context() as patched:
        patched.setattr(erasure, "erased_person", failing)
        async with asyncio.timeout(20):
            while made.statistics()["erasures_purged"] < 1:
                await made.round()
                await asyncio.sleep(0.01)
    assert {row.cause: row.state for row in await told(world, schema.erasure)} == {
        "request": "shredded", "minor": "purged",
    }  # fmt: skip
    assert made.statistics()["erasure_failures"] >= 1
    assert made.statistics()["erasures_open"] == 1
    await purged(made)


async def test_what_is_told_after_the_receipt_is_taken_out_too(world: PolicyWorld) -> None:
    made = attach(world.writer, world.settings)
    await seed(world)
    [late] = delivered(777)
    accepted = await accept(world, "summer")
    [one] = await world.ask.resolve(1, 2967, [(*tag(world), ADA)])
    late.pseudonym, late.tag, late.at = one.pseudonym, tag(world)[0], world.clock()
    await made.erase(0, *tag(world), ADA, "request", None)
    await purged(made)
    await tell(world, Batch(accepted.number, "one.example", [late]))
    await world.ask.expanded(accepted.number, 1)
    await done(world, accepted.number)
    status = world.reader.job_status("summer", world.clock())
    assert status is not None
    assert status.counts == {"delivered": 1}
    await made.round()
    assert [row.mref for row in await told(world, schema.message)] == [mref(BOB)]
    assert made.statistics()["events_of_erased"] == 1


async def test_a_reader_in_the_way_delays_the_receipt(world: PolicyWorld) -> None:
    made = attach(world.writer, world.settings)
    await seed(world, (ADA,))
    reader = open_store(world.settings.sql_address(), writer=False)
    with reader.connect() as snapshot:
        snapshot.execute(select(schema.subject)).all()
        await made.erase(0, *tag(world), ADA, "request", None)
        assert await asyncio.to_thread(erasing.cut_log, world.writer.store.engine) is False
        assert {row.state for row in await told(world, schema.erasure)} == {"shredded"}
    reader.dispose()
    await purged(made)
    assert (world.settings.data_dir / "policy.db-wal").stat().st_size < 64 * 1024  # the receipt itself came after


# --- killed at each step --------------------------------------------------------------------------------------------

STEPS = (
    "before-suppress", "in-tombstone", "after-suppress", "before-enforce", "after-enforce", "before-shred",
    "after-shred", "before-purge", "after-purge", "before-receipt", "after-receipt",
)  # fmt: skip


async def erase_and_die(folder: Path, step: str) -> None:
    """A writer of its own that erases Ada and is gone at a step (SIGKILL), else says that it never came there."""

    def reached(point: str) -> None:
        if point == step:
            os.kill(os.getpid(), signal.SIGKILL)

    class Dying(Tombstones):
        def append(self, lines: Any) -> None:
            super().append(lines)
            reached("in-tombstone")

    settings = settings_for(folder)
    writer = Writer(settings, Keyring.load(settings.keys_dir))
    await writer.start()
    for room in (policy.enforcement, erasing):
        vars(room)["reach"] = reached
    made = attach(writer, settings)
    made._tombstones = Dying(settings.data_dir / "tombstones" / NAME)
    mailbox = parse(ADA)
    spelled = tag_of(writer.keyring.pepper, normalise(mailbox.local, mailbox.domain))
    await made.erase(0, spelled, partition_of(mailbox.domain), ADA, "request", None)
    await purged(made)
    await writer.stop()
    print("never came there")


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_each_step_it_converges_and_is_never_erased_without_being_suppressed(step: str) -> None:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(policy_world())
        await seed(world)
        folder = world.settings.data_dir
        await world.writer.stop()
        code = (
            "import asyncio, sys; from pathlib import Path; from tests.journeys.test_erasure import erase_and_die; "
            "asyncio.run(erase_and_die(Path(sys.argv[1]), sys.argv[2]))"
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(folder), step, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, errors = await child.communicate()
        assert child.returncode == -signal.SIGKILL, (out, errors.decode()[-2000:])

        engine = open_store(world.settings.sql_address(), writer=False)
        with engine.connect() as conn:
            is_known = conn.execute(
                select(func.count()).select_from(schema.subject).where(schema.subject.c.tag == tag(world)[0])
            ).scalar()
            entries = suppression.check(conn, tag(world)[0])
        engine.dispose()
        assert is_known or entries, "erased, and not suppressed"
        world.writer = Writer(world.settings, world.keyring, clock=world.clock)
        await world.writer.start()
        made = attach(world.writer, world.settings)
        if step not in ("before-suppress", "in-tombstone"):
            await purged(made)  # by itself: it was told to SQL
        else:  # nobody was told that it was done: asked again, or carried out from the tombstones
            assert is_known
            told_lines = Tombstones(folder / "tombstones" / NAME).replay()
            assert (len(told_lines.lines), told_lines.problems) == (int(step == "in-tombstone"), [])
            await made.erase(0, *tag(world), ADA, "request", None)
            await purged(made)
        assert [row.tag for row in await told(world, schema.subject)] == [tag(world, BOB)[0]]
        assert {row.reason for row in await told(world, schema.suppression)} == {"erasure"}
        place = keyspace.suppression(tag(world)[1], tag(world)[0])
        assert await world.redis.hget(place, tag(world)[0])
        assert [row.state for row in await told(world, schema.erasure)] == ["purged", "purged"]
        assert [row.mref for row in await told(world, schema.message)] == [mref(BOB)]
        status = world.reader.job_status("spring", world.clock())
        assert status is not None
        assert status.counts == {"delivered": 2}
        assert await world.writer.store.write(audit.verify) is None


# --- afterwards -----------------------------------------------------------------------------------------------------


async def test_an_opt_out_link_works_after_the_erasure_and_without_the_send_log(world: PolicyWorld) -> None:
    """Design section 5: the link needs no look-up and never expires."""
    async with AsyncExitStack() as stack:
        made = attach(world.writer, world.settings)
        await seed(world)
        accepted = await accept(world, "spring")
        await made.erase(0, *tag(world), ADA, "request", None)
        await purged(made)
        for table in (schema.message, schema.history, schema.counter):
            await world.writer.store.write(lambda conn, table=table: conn.execute(table.delete()))  # type: ignore[misc]
        tracker, engine = build_tracker(TrackerSettings(port=0, flush_seconds=0.01, writer_seconds=5.0), world.settings)
        stack.callback(engine.dispose)
        stack.push_async_callback(tracker.stop)
        port = await tracker.start()
        links = Links(world.keyring.token, world.keyring.token_id, world.settings.public_url)
        client = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        for address in (ADA, BOB):
            url = links.optout_url(accepted.list, tag(world, address)[1], tag(world, address)[0])
            path = url.removeprefix(world.settings.public_url)
            body = {"List-Unsubscribe": "One-Click"}
            async with client.post(f"http://127.0.0.1:{port}{path}", data=body) as answer:
                assert (answer.status, await answer.text()) == (200, "Unsubscribed.\n")
        found = {(row.tag, row.reason) for row in await told(world, schema.suppression)}
        assert found == {(tag(world)[0], "erasure"), (tag(world)[0], "opt-out"), (tag(world, BOB)[0], "opt-out")}
        assert [row.tag for row in await told(world, schema.subject)] == [tag(world, BOB)[0]]


async def test_somebody_erased_who_is_imported_again_is_refused() -> None:
    """P-22, P-54: through the real engine, by whichever account."""
    async with mail_world() as mail:
        world = mail.policy
        made = attach(world.writer, world.settings)
        await mail.start_worker()
        await mail.submit(job("one"), rows(3, "a.accept.test"))
        assert (await mail.finished("one")).counts == {"delivered": 3}
        gone = "person1@a.accept.test"
        await made.erase(0, *tag(world, gone), gone, "request", None)
        await purged(made)
        before = [name for name, data in everything_written(mail.folder) if gone.encode() in data]
        assert before == []
        await mail.submit(job("two"), rows(3, "a.accept.test"))
        status = await mail.finished("two")
        assert (status.counts, status.reasons["refused"]) == ({"delivered": 2, "refused": 1}, {"erased": 1})
        subjects = {row.tag for row in await told(world, schema.subject)}
        assert len(subjects) == 2
        assert tag(world, gone)[0] not in subjects
        # The row of the refusal names nobody, and joins the list of the erasure (policy.latecomers): the writer's own
        # rounds, a second apart, take it out, perhaps before anybody looks.
        async with asyncio.timeout(30.0):
            while refused := [row for row in await told(world, schema.message) if row.kind == Kind.REFUSED]:
                assert [(row.pseudonym, row.tag_sealed) for row in refused] == [(0, None)]
                await asyncio.sleep(0.02)
        for spelled in hashes(gone):
            assert where(mail.folder, spelled) == []


def hashes(address: str) -> list[bytes]:
    """What an address is looked up by elsewhere: plain, and its usual hashes."""
    raw = address.encode()
    made = [hashlib.new(name, raw) for name in ("md5", "sha1", "sha256")]
    return [raw, *(one.digest() for one in made), *(one.hexdigest().encode() for one in made)]
