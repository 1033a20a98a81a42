"""The writer's part: a bundle made for a request, taken in elsewhere, gone after seven days."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Engine, select

from policy import doorway, keyspace, schema
from policy.bundle import reading, zips
from policy.bundle.contents import ACCESS, PORTABILITY
from policy.bundle.operations import BundleOperations, Bundles
from policy.enforcement import Enforcement
from policy.erasure import person_of
from policy.instants import DAY_US
from policy.jobs import Refused
from policy.keys import Keyring
from policy.personal import Person, Premises
from policy.records import build
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.bundle.house import EVE, FACTS, NOW, facts, furnish
from tests.policy.people import row_of


class House:
    def __init__(self, engine: Engine, keyring: Keyring, redis: Redis, folder: Path) -> None:
        self.now = NOW
        settings = PolicySettings(officer=Officer(name="Officer", address="privacy@sender.example"), data_dir=folder)
        self.premises = Premises(settings, Store(engine), redis, lambda: keyring, lambda: self.now)
        self.enforcement = Enforcement(self.premises.store, redis, lambda: self.now, lambda: engine)
        self.bundles = Bundles(self.premises, build(self.premises))
        self.operations = BundleOperations(self.premises, self.enforcement)

    async def person(self) -> Person:
        keyring = self.premises.keyring()
        tag, _, _ = row_of(keyring.pepper, EVE)
        return await self.premises.store.write(lambda conn: person_of(conn, keyring, None, tag))


@pytest.fixture
async def house(store: Engine, keyring: Keyring, redis: Redis, tmp_path: Path) -> Any:
    made = House(store, keyring, redis, tmp_path)
    await made.premises.store.write(lambda conn: furnish(conn, keyring))
    yield made
    await made.enforcement.close()
    await made.premises.store.close()


async def test_a_bundle_lies_sealed_and_closed_and_its_passphrase_nowhere(house: House, tmp_path: Path) -> None:
    written = await house.bundles.write(await house.person(), "T-2026-1", ACCESS, ["A hold keeps one message."])
    assert written.path == tmp_path / "exports" / "export-T-2026-1.zip"
    assert stat.S_IMODE(written.path.stat().st_mode) == 0o600
    content = written.path.read_bytes()
    assert zips.is_sealed(content)
    assert EVE.encode() not in content
    opened = reading.open_bundle(content, written.passphrase)
    assert facts(opened.records) == FACTS
    assert written.passphrase in written.how
    assert {controller.name for controller in opened.manifest.controllers} == {"Acme", "Globex"}
    assert opened.manifest.left_out == ("A hold keeps one message.",)
    assert sum(place.records for place in opened.manifest.places) == written.records
    with house.premises.store.engine.connect() as conn:
        for row in conn.execute(select(schema.audit)):
            assert written.passphrase not in str(row)
            assert "example.com" not in str(row)
        assert conn.execute(select(schema.audit.c.object_ref, schema.audit.c.result)).all()[-1] == (
            "request/T-2026-1", "done",
        )  # fmt: skip


async def test_a_bundle_goes_after_seven_days(house: House) -> None:
    written = await house.bundles.write(await house.person(), "T-1", PORTABILITY)
    assert written.ends == NOW + 7 * DAY_US
    house.now = written.ends - 1
    assert await house.bundles.expire() == 0
    house.now = written.ends
    assert await house.bundles.expire() == 1
    assert not written.path.exists()


async def test_a_ticket_that_is_none_is_refused_before_anybody_is_asked(house: House) -> None:
    with pytest.raises(ValueError, match="a ticket is"):
        await house.bundles.write(await house.person(), "../T", ACCESS)
    assert not (house.bundles.folder.parent / "T.zip").exists()


async def test_taken_in_over_the_socket_it_is_in_force(
    house: House, tmp_path: Path, redis: Redis, keyring: Keyring
) -> None:
    """Into the same house: everything is there already, but Redis was lost and hears of it again."""
    written = await house.bundles.write(await house.person(), "T-1", PORTABILITY)
    await redis.flushall()
    handlers = doorway.handlers(house.operations)
    assert set(handlers) == {"bundle_import"}
    told = await house.operations.op_bundle_import(str(written.path), written.passphrase)
    assert told["taken"]["suppression"] == 3
    assert told["left"]["message"] == 3  # sent from here
    tag, partition, _ = row_of(keyring.pepper, EVE)
    assert await redis.hget(keyspace.suppression(partition, tag), tag)


async def test_what_cannot_be_read_is_an_answer_and_not_a_crash(house: House, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        await house.operations.op_bundle_import(str(tmp_path / "nowhere.zip"))
    written = await house.bundles.write(await house.person(), "T-1", ACCESS)
    with pytest.raises(ValueError, match="needs its passphrase"):
        await house.operations.op_bundle_import(str(written.path))
    (tmp_path / "text.zip").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a zip"):
        await house.operations.op_bundle_import(str(tmp_path / "text.zip"))
