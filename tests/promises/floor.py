"""The floor as it is in service, in one process: rights, erasures, bundles and every place, over real stores.

Eve and Bob are in it (`tests.policy.bundle.house`), through the rooms that enter people in service; the clock is turned
by hand. A test file asks for it by importing `floor`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine, func, select

from engine.queue.lanes import Lanes
from engine.queue.questions import FactsRequest
from policy import personal, suppression
from policy.address import domain_tag, parse
from policy.bundle import reading
from policy.bundle.operations import Bundles
from policy.enforcement import Enforcement
from policy.erasing import Erasing, ErasureOperations
from policy.erasure import person_of
from policy.gate import Permit, Refusal, decide
from policy.instants import DAY_US
from policy.keys import Keyring
from policy.latecomers import Guard
from policy.personal import Person, Premises, Record
from policy.rights.joining import seams
from policy.rights.operations import RightsOperations
from policy.rights.settings import RightsSettings
from policy.store import Store
from policy.tombstones import NAME, Tombstones
from tests.policy.bundle.house import BOB, EVE, NOW, furnish
from tests.policy.rights.conftest import House

__all__ = ["BOB", "EVE", "NOW", "Floor", "floor"]


class Floor:
    """desk: the rights engine; `house` has clock, letters and stores."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.premises = Premises(house.settings, house.store, house.redis, lambda: house.keyring, lambda: house.now)
        self.places = personal.every(self.premises)
        self.guard = Guard()
        self.tombstones = Tombstones(house.folder / "tombstones" / NAME)
        self.erasing = Erasing(self.premises, house.enforcement, self.tombstones, self.guard, lambda: self.places)
        self.erasures = ErasureOperations(self.erasing, self.premises)
        joint = seams(self.premises, self.erasures, Bundles(self.premises, self.places), self.places)
        self.person_of = joint.person
        self.desk = RightsOperations(self.premises, house.enforcement, RightsSettings(), joint)
        house.desk = self.desk
        self._asked = 0

    async def write(self, work: Any) -> Any:
        return await self.house.store.write(work)

    async def rows(self, table: Any) -> list[Any]:
        return list(await self.write(lambda conn: conn.execute(select(table)).all()))

    async def count(self, table: Any) -> int:
        return int(await self.write(lambda conn: conn.execute(select(func.count()).select_from(table)).scalar_one()))

    async def standing(self, address: str) -> set[tuple[str, str, int]]:
        """(reason, scope, scope id) of what SQL knows against an address."""
        tag, _, _ = self.house.row(address)
        found = await self.write(lambda conn: suppression.check(conn, tag))
        return {(one.reason, one.scope.name.lower(), one.scope_id) for one in found}

    async def gate(self, address: str, account: int = 1) -> Permit | Refusal:
        """What expansion would be told of a row of a new job of this account, by the gate's script."""
        tag, partition, _ = self.house.row(address)
        self._asked += 1
        tags = [domain_tag(self.house.keyring.pepper, parse(address).domain)]
        asked = FactsRequest(partition, 9_000 + self._asked, 0, 1, account, 0, 0, [(1, tag)], tags)
        [facts] = await Lanes(self.house.redis, "test").facts([asked])
        return decide(facts[0], 9_000 + self._asked, 1, 0.0)

    async def asks(self, kind: str, address: str = EVE, **more: Any) -> str:
        """A request whose identity is proved and that was carried out as far as it goes now; its ticket."""
        told = await self.desk.op_rights_open(kind, address, **more)
        if told["state"] == "identifying":
            await self.desk.op_rights_confirm(self.house.token())
        await self.desk.round()
        return str(told["ticket"])

    def bundle(self, ticket: str) -> reading.Opened:
        """As the person opens it, with the passphrase of the letter."""
        letter = next(text for text in self.house.letters("done") if ticket in text)
        secret = letter.split("passphrase:")[1].split()[0]
        path = self.house.folder / "exports" / f"export-{ticket}.zip"
        return reading.open_bundle(path.read_bytes(), secret)

    async def told(self, address: str = EVE, right: str = "access", **more: Any) -> list[Record]:
        return self.bundle(await self.asks(right, address, **more)).records

    async def purged(self) -> None:
        """Letters carried to the post, then rounds of the writer's loop until no erasure is open, 8 days on.

        Rows of a job that goes on stay for 7, emptied (`policy.records.PATIENCE_US`)."""
        for letter in self.desk.outbox.waiting():
            self.desk.outbox.remove(letter.name)
        self.house.now += 8 * DAY_US
        async with asyncio.timeout(20):
            await self.erasing.load()
            while True:
                await self.erasing.round()
                if self.erasing.statistics()["erasures_open"] == 0:
                    return
                self.erasing._waits.clear()  # no pauses between two walks
                await asyncio.sleep(0.01)  # the server rewrites its file

    async def person(self, address: str = EVE, account: int | None = None) -> Person:
        tag, _, _ = self.house.row(address)

        def find(conn: Connection) -> Person:
            return person_of(conn, self.house.keyring, account, tag)

        found: Person = await self.write(find)
        return found


@pytest.fixture
async def floor(store: Engine, redis: Redis, keyring: Keyring, tmp_path: Path) -> AsyncIterator[Floor]:
    hand = Store(store)

    def clock() -> int:
        return house.now

    enforcement = Enforcement(hand, redis, clock, lambda: store)
    house = House(hand, redis, keyring, tmp_path, enforcement)
    await hand.write(lambda conn: furnish(conn, keyring))
    made = Floor(house)
    yield made
    made.tombstones.close()
    await enforcement.close()
    await hand.close()
