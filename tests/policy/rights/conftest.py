"""A rights engine over a real store and a real Valkey, with a clock the test turns and seams that remember."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine

from policy import accounts, vault
from policy.enforcement import Enforcement
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.personal import Erased, Person, Premises, Record
from policy.rights.carrying import Handed, Seams
from policy.rights.operations import RightsOperations
from policy.rights.requests import Asked
from policy.rights.settings import RightsSettings
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.people import row_of

NOW = 1_795_376_640_000_000  # 2026-11-22T19:44:00Z, a Sunday
ADA = "ada@example.org"


@dataclass
class Field:
    """A place whose one field can be corrected."""

    name: str = "field"
    covers: Sequence[str] = ()
    amended: list[tuple[str, str]] = field(default_factory=list)

    async def find(self, person: Person) -> int:
        return 0

    async def export(self, person: Person) -> list[Record]:
        return []

    async def erase(self, person: Person) -> Erased:
        return Erased()

    async def amend(self, person: Person, field: str, value: str) -> int:
        self.amended.append((field, value))
        return 1


class House:
    """The engine and everything a test looks at."""

    def __init__(self, store: Store, redis: Redis, keyring: Keyring, folder: Path, enforcement: Enforcement) -> None:
        self.now = NOW
        self.store = store
        self.redis = redis
        self.keyring = keyring
        self.folder = folder
        self.enforcement = enforcement
        self.erased: list[tuple[Any, ...]] = []
        self.ended: list[int] = []
        self.bundled: list[tuple[str, bool]] = []
        self.field = Field()
        self.broken: Exception | None = None
        officer = Officer(name="Grace Officer", address="privacy@platform.example")
        self.settings = PolicySettings(officer=officer, data_dir=folder, public_url="https://mail.example")
        self.desk = self.make()

    def make(self, **settings: Any) -> RightsOperations:
        premises = Premises(self.settings, self.store, self.redis, lambda: self.keyring, lambda: self.now)
        seams = Seams(self._erase, self._bundle, self._person, lambda: [self.field], self._end)
        self.desk = RightsOperations(premises, self.enforcement, RightsSettings(**settings), seams)
        return self.desk

    async def _erase(self, account: int, tag: bytes, partition: int, address: str, cause: str, request: int) -> None:
        if self.broken is not None:
            raise self.broken
        self.erased.append((account, tag, partition, address, cause, request))

    async def _end(self, account: int, request: int) -> None:
        self.ended.append(account)

    async def _bundle(self, asked: Asked, portable: bool) -> Handed:
        if self.broken is not None:
            raise self.broken
        self.bundled.append((asked.address, portable))
        return Handed("/nowhere/bundle", "Ask us for it.")

    async def _person(self, asked: Asked) -> Person:
        return Person(asked.tag, asked.partition, "lane", address=asked.address)

    def row(self, text: str) -> tuple[bytes, int, str]:
        return row_of(self.keyring.pepper, text)

    async def knows(self, text: str, account: int = 1) -> int:
        """Make somebody known to an account; the subject's number."""

        def work(conn: Connection) -> int:
            return vault.resolve(conn, self.keyring, account, [self.row(text)], week_of(self.now), self.now)[0][0]

        return await self.store.write(work)

    def letters(self, letter: str = "") -> list[str]:
        """Texts of the letters that wait, the oldest first."""
        found = sorted(self.desk.outbox.waiting(), key=lambda one: (one.at, one.seq))
        wanted = [one for one in found if letter in ("", one.letter)]
        texts = []
        for one in wanted:
            message = self.desk.outbox.read(one.name)
            assert message is not None
            texts.append(f"To: {message['To']}\nSubject: {message['Subject']}\n\n{message.get_content()}")
        return texts

    def token(self) -> str:
        """Out of the newest proof letter."""
        text = self.letters("proof")[-1]
        return text.split("https://mail.example/r/", 1)[1].split()[0]

    async def days(self, count: float) -> None:
        """Let days go by with a round every six hours, as the writer would do it more often."""
        for _ in range(int(count * 4)):
            self.now += DAY_US // 4
            await self.desk.round()


@pytest.fixture
async def house(store: Engine, redis: Redis, keyring: Keyring, tmp_path: Path) -> AsyncIterator[House]:
    hand = Store(store)

    def clock() -> int:
        return opened.now

    enforcement = Enforcement(hand, redis, clock, lambda: store)
    opened = House(hand, redis, keyring, tmp_path, enforcement)
    await hand.write(lambda conn: accounts.add(conn, "acme", display_name="Acme", now=NOW))
    await hand.write(lambda conn: accounts.add(conn, "zeta", display_name="Zeta", now=NOW))
    yield opened
    await enforcement.close()
    while hand._turn is not None:
        await hand._turn
    hand._thread.shutdown()
