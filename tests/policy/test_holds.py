"""Legal holds: copies of one person's records, sealed, before their day goes; nobody else is kept because of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, update
from typer import Typer
from typer.testing import CliRunner

from policy import dockets, holds, schema, vault
from policy.address import normalise, parse, tag_of
from policy.classes import RetentionSettings, gone_from
from policy.cli import retention as cli
from policy.doorway import Doorway, handlers
from policy.holds import HoldOperations
from policy.instants import DAY_US
from policy.jobs import Refused
from policy.keys import Keyring, SealError, seal
from tests.policy.sweepers import D, Sweeper, sweeper

PERIODS = RetentionSettings().periods()
HELD, OTHER = "held@example.org", "other@example.org"


@pytest.fixture
async def world(dialect: str, tmp_path: Path, keyring: Keyring, redis: Redis) -> AsyncIterator[Sweeper]:
    async with sweeper(tmp_path, keyring, redis) as made:
        yield made


def tag(world: Sweeper, address: str) -> bytes:
    mailbox = parse(address)
    return tag_of(world.keyring.pepper, normalise(mailbox.local, mailbox.domain))


async def hold_on(world: Sweeper, address: str = HELD, account: str = "acme") -> int:
    operations = HoldOperations(world.premises)
    [number] = await operations.op_hold_place(account, tag(world, address), "claim 12", "Court of Berlin")
    return number


async def copies(world: Sweeper, number: int) -> list[holds.Copy]:
    return await world.premises.store.write(lambda conn: holds.copies(conn, world.keyring, number))


async def two_people(world: Sweeper) -> tuple[vault.Subject, vault.Subject]:
    """Each with a message, a history line, a visit and evidence of one day, in one job."""
    account = await world.account()
    held, other = await world.person(account, HELD), await world.person(account, OTHER)
    await world.job(account, 1, D, payload=None)
    for mref, person in ((5, held), (6, other)):
        await world.message(1, mref, D, person, "550 no")
        await world.put("history", job=1, mref=mref, day=D + 1)
        await world.put("hit", job=1, mref=mref, day=D)
        await world.put("last_open", job=1, mref=mref, day=D)
        await world.put("disclosure", subject=person.number, day=D)
        await world.put("consent", subject=person.number, purpose="doe", recorded_at=D * DAY_US)
        await world.put("rectification", subject=person.number, at=D * DAY_US, state="corrected")
    return held, other


async def test_p21_held_rows_are_copied_before_their_day_goes_and_nobody_elses(world: Sweeper) -> None:
    held, _ = await two_people(world)
    number = await hold_on(world)
    world.now = gone_from(D + 1, PERIODS["R3"]) * DAY_US
    told = await world.sweep()
    assert (told["message"], told["history"]) == (2, 2), "the day goes as always"
    found = await copies(world, number)
    assert {(copy.place, copy.row["mref"], copy.day) for copy in found} == {("message", 5, D), ("history", 5, D + 1)}
    assert [copy.row["note"] is not None for copy in found if copy.place == "message"] == [True]

    world.now = gone_from(D, PERIODS["R2"]) * DAY_US
    told = await world.sweep()
    assert (told["hit"], told["last_open"]) == (2, 2)
    found = await copies(world, number)
    assert {copy.row["mref"] for copy in found} == {5}, "visits are told by the copies of messages that are gone"
    assert sorted(copy.place for copy in found) == ["history", "hit", "last_open", "message"]

    world.now = gone_from(D, PERIODS["R4"]) * DAY_US
    await world.sweep()
    found = await copies(world, number)
    assert {copy.row["subject"] for copy in found if "subject" in copy.row} == {held.number}
    assert {"consent", "disclosure", "rectification"} < {copy.place for copy in found}
    assert await world.count("held") == 7


async def test_copies_are_sealed_and_bound_to_their_hold(world: Sweeper) -> None:
    await two_people(world)
    number = await hold_on(world)
    world.now = gone_from(D + 1, PERIODS["R3"]) * DAY_US
    await world.sweep()
    for row in await world.rows("held"):
        assert b"pseudonym" not in row["record"]
        assert b"mref" not in row["record"]

    def moved(conn: Connection) -> None:
        conn.execute(update(schema.held).values(place="reading"))

    await world.premises.store.write(moved)
    with pytest.raises(SealError):
        await copies(world, number)


async def test_what_an_erasure_takes_is_copied_first_and_once(world: Sweeper) -> None:
    """P-21: held copy kept, everything else may go. Called again after a crash, it copies nothing twice."""
    held, _ = await two_people(world)
    number = await hold_on(world)
    world.now += DAY_US

    def keep(conn: Connection) -> int:
        return holds.keep_all(conn, world.keyring, held.number, world.now)

    assert await world.premises.store.write(keep) == 8
    assert await world.premises.store.write(keep) == 0
    found = {copy.place: copy.row for copy in await copies(world, number)}
    assert set(found) == {
        "subject", "message", "history", "hit", "last_open", "disclosure", "consent", "rectification"
    }  # fmt: skip
    assert found["subject"]["address"] == HELD
    assert {row["mref"] for row in found.values() if "mref" in row} == {5}

    def erased(conn: Connection) -> None:
        conn.execute(schema.subject.delete().where(schema.subject.c.number == held.number))

    await world.premises.store.write(erased)
    await world.message(1, 77, D)
    assert await world.premises.store.write(keep) == 0
    world.now = gone_from(D + 1, PERIODS["R3"]) * DAY_US
    await world.sweep()
    assert await world.count("message") == 0, "the identity is gone, the sweep goes on"


async def test_what_the_erasure_itself_copied_is_understood_here(world: Sweeper) -> None:
    """`policy.dockets.keep_held` is what an erasure calls: sweeps and `copies` must be able to read it."""
    held, _ = await two_people(world)
    number = await hold_on(world)
    await world.put("erasure", number=1, subject=held.number, cause="request", state="suppressed")
    await world.put("purge", erasure=1, job=1, mref=5)

    def keep(conn: Connection) -> list[int]:
        return list(dockets.keep_held(conn, world.keyring, held, 1, world.now))

    assert await world.premises.store.write(keep) == [number]
    found = await copies(world, number)
    assert {"subject", "message", "history", "hit", "consent"} <= {copy.place for copy in found}
    assert {copy.row["mref"] for copy in found if "mref" in copy.row} == {5}
    world.now = gone_from(D, PERIODS["R2"]) * DAY_US
    sweeping = world.sweeping()
    await sweeping.sweep()
    assert sweeping.failures == 0
    assert await world.count("message") == await world.count("hit") == 0


async def test_a_corrected_value_is_copied_in_a_form_that_outlives_its_key(world: Sweeper) -> None:
    held, _ = await two_people(world)
    number = await hold_on(world)
    value = seal(held.key, b"Ada", holds.correction_aad(held.number, "name"))
    at = (D + 1) * DAY_US
    await world.put("rectification", subject=held.number, at=at, state="corrected", field="name", value=value)
    await world.premises.store.write(lambda conn: holds.keep_all(conn, world.keyring, held.number, at))
    assert {copy.row["value"] for copy in await copies(world, number) if copy.place == "rectification"} == {
        None,
        b"Ada",
    }


async def test_without_a_hold_nothing_is_copied(world: Sweeper) -> None:
    held, _ = await two_people(world)
    kept = await world.premises.store.write(lambda conn: holds.keep_all(conn, world.keyring, held.number, world.now))
    world.now = gone_from(D, PERIODS["R4"]) * DAY_US
    await world.sweep()
    assert kept == await world.count("held") == 0


async def test_a_released_hold_goes_with_its_copies_and_only_then(world: Sweeper) -> None:
    await two_people(world)
    number, other = await hold_on(world), await hold_on(world, OTHER)
    world.now = gone_from(D + 1, PERIODS["R3"]) * DAY_US
    await world.sweep()
    assert await world.count("held") == 4
    operations = HoldOperations(world.premises)
    assert await operations.op_hold_release(number)
    assert not await operations.op_hold_release(number)
    assert (await world.sweep())["hold"] == 3
    assert [row["number"] for row in await world.rows("hold")] == [other]
    assert await world.count("held") == 2
    actions = [row["action"] for row in await world.rows("audit") if row["purpose"] == "legal-hold"]
    assert actions == ["hold-placed", "hold-placed", "hold-released"]


async def test_a_hold_is_placed_with_reason_and_authority_on_somebody_known(world: Sweeper) -> None:
    account, other = await world.account(), await world.account("other")
    for one in (account, other):
        await world.person(one, HELD)
    operations = HoldOperations(world.premises)
    with pytest.raises(Refused, match="reason"):
        await operations.op_hold_place("acme", tag(world, HELD), " ", "court")
    with pytest.raises(Refused, match="knows nobody"):
        await operations.op_hold_place("acme", tag(world, OTHER), "claim", "court")
    with pytest.raises(Refused, match="within 6 months"):
        await operations.op_hold_place("acme", tag(world, HELD), "claim", "court", review=world.now + 400 * DAY_US)
    assert len(await operations.op_hold_place("", tag(world, HELD), "claim", "court")) == 2
    assert await world.count("hold") == 2


async def test_the_commands_reach_the_writer(world: Sweeper, tmp_path: Path) -> None:
    """Over its socket, as an operator types them: place, list, sweep, shorten, release."""
    await two_people(world)
    config = tmp_path / "sales-push.toml"
    config.write_text(
        f'[policy]\nofficer = {{ name = "Officer", address = "privacy@example.org" }}\ndata_dir = "{tmp_path}"\n'
    )
    operations = handlers(HoldOperations(world.premises), world.sweeping())
    door = Doorway(tmp_path / "policy.sock", operations)
    await door.open()

    async def run(commands: Typer, *words: str) -> Any:
        arguments = [*words, "--json", "--config", str(config)]
        told = await asyncio.to_thread(CliRunner().invoke, commands, arguments)
        assert told.exit_code == 0, told.output
        return json.loads(told.stdout)

    try:
        placed = await run(cli.hold, "place", HELD, "--reason", "claim", "--authority", "court", "--account", "acme")
        [number] = placed["holds"]
        assert [one["number"] for one in await run(cli.hold, "list")] == [number]
        world.now = gone_from(D, PERIODS["R3"]) * DAY_US
        planned = await run(cli.policy, "sweep", "--dry-run")
        assert {"retention": "R3", "place": "message", "day": D, "account": 0, "rows": 2} in planned
        assert await world.count("message") == 2
        swept = await run(cli.policy, "sweep")
        assert {one["place"]: one["rows"] for one in swept}["message"] == 2
        assert await run(cli.policy, "sweep", "--dry-run") == []
        assert [copy.place for copy in await copies(world, number)] == ["message"]
        assert (await run(cli.policy, "shorten", "acme", "R2", "30"))["days"] == 30
        assert (await run(cli.hold, "release", str(number)))["released"] is True
        refused = await asyncio.to_thread(CliRunner().invoke, cli.hold, ["release", "99", "--config", str(config)])
        assert (refused.exit_code, refused.output) == (1, "no such hold stands\n")
        wrong = ["place", "not an address", "--reason", "r", "--authority", "a", "--config", str(config)]
        told = await asyncio.to_thread(CliRunner().invoke, cli.hold, wrong)
        assert told.exit_code == 2
        assert "not an address (" in told.output
    finally:
        await door.close()


async def test_a_review_that_is_due_is_counted_and_the_hold_stands(world: Sweeper) -> None:
    await two_people(world)
    number = await hold_on(world)
    [told] = await HoldOperations(world.premises).op_hold_list()
    assert (told["number"], told["due"]) == (number, False)
    world.now = told["review"]
    sweeping = world.sweeping()
    await sweeping.sweep()
    [told] = await HoldOperations(world.premises).op_hold_list()
    assert told["due"]
    assert sweeping.statistics()["holds_due"] == 1
    assert await world.count("hold") == 1
    assert "claim" not in str(await world.rows("audit"))
