"""Bundles that wait, as a place of personal data: they hold up a receipt and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import Engine

from policy.bundle import writing
from policy.bundle.stores import build
from policy.files import family_of
from policy.instants import DAY_US
from policy.keys import Keyring
from policy.personal import Erased, Person, PersonalStore, Premises
from policy.rights import requests
from policy.rights.states import Kind, Role
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.people import row_of

NOW = 1_795_376_640_000_000
EVE, BOB = "eve@example.com", "bob@example.com"


class House:
    """Requests of two people, and a folder of bundles."""

    def __init__(self, engine: Engine, keyring: Keyring, redis: Redis, folder: Path) -> None:
        officer = Officer(name="Officer", address="privacy@sender.example")
        settings = PolicySettings(officer=officer, data_dir=folder)
        self.keyring, self.store = keyring, Store(engine)
        self.folder = folder / writing.FOLDER
        [self.place] = build(Premises(settings, self.store, redis, lambda: keyring, lambda: NOW))

    async def ask(self, address: str) -> str:
        tag, partition, _ = row_of(self.keyring.pepper, address)
        asked, _ = await self.store.write(
            lambda conn: requests.open_(
                conn, self.keyring, kind=Kind.ACCESS, role=Role.CONTACT, account=0, address=address, tag=tag,
                partition=partition, channel="cli", jurisdiction="gdpr", details={}, received=NOW, due=NOW + DAY_US,
                actor="operator", now=NOW,
            )
        )  # fmt: skip
        return asked.ticket

    def person(self, address: str) -> Person:
        tag, partition, _ = row_of(self.keyring.pepper, address)
        return Person(tag, partition, "")


@pytest.fixture
async def house(store: Engine, keyring: Keyring, redis: Redis, tmp_path: Path) -> AsyncIterator[House]:
    made = House(store, keyring, redis, tmp_path)
    yield made
    await made.store.close()


async def test_a_bundle_is_left_until_it_is_gone_and_only_its_own_person_waits(house: House) -> None:
    place: PersonalStore = house.place
    eve, bob = house.person(EVE), house.person(BOB)
    assert await place.erase(eve) == Erased()  # there is no folder yet
    path = writing.keep(house.folder, await house.ask(EVE), b"sealed", NOW)
    assert await place.erase(eve) == Erased(left=1)
    assert await place.erase(eve) == Erased(left=1)
    assert path.read_bytes() == b"sealed"  # who asks for a copy and for erasure wants both
    assert await place.erase(bob) == Erased()
    await house.ask(BOB)
    assert await place.erase(bob) == Erased()

    assert writing.expire(house.folder, NOW + writing.KEPT_US - 1) == 0
    assert await place.erase(eve) == Erased(left=1)
    assert writing.expire(house.folder, NOW + writing.KEPT_US) == 1
    assert await place.erase(eve) == Erased()


async def test_half_a_bundle_counts_and_a_longer_ticket_is_another(house: House) -> None:
    ticket = await house.ask(EVE)
    writing.keep(house.folder, f"{ticket}X", b"somebody else's", NOW)
    assert await house.place.erase(house.person(EVE)) == Erased()
    (house.folder / f"export-{ticket}.zip.part").write_bytes(b"half")
    assert await house.place.erase(house.person(EVE)) == Erased(left=1)


async def test_it_tells_no_records_of_its_own_and_covers_its_family(house: House) -> None:
    path = writing.keep(house.folder, await house.ask(EVE), b"sealed", NOW)
    eve = house.person(EVE)
    assert (await house.place.find(eve), await house.place.export(eve)) == (0, [])
    assert await house.place.amend(eve, "name", "E") == 0
    family = family_of(path.relative_to(house.folder.parent).as_posix())
    assert family is not None
    assert house.place.covers == (f"file:{family.name}",)
