"""A sweeper over a store of its own, a clock that the test turns, and rows of every place by name."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from sqlalchemy import Connection, LargeBinary, Text, func, insert, select

from policy import schema, vault
from policy.classes import RetentionSettings
from policy.events import Kind
from policy.instants import DAY_US, week_of
from policy.keys import Keyring, seal_note
from policy.personal import Premises
from policy.schema import open_store
from policy.settings import Officer, PolicySettings
from policy.store import Store
from policy.sweeping import Sweeping
from tests.policy.people import row_of
from tests.policy.stores import policy_store, url_of

D = 20_780  # 2026-11-23


@dataclass
class Sweeper:
    """Everything a test of sweeps touches. now: microseconds; forgotten: names of domains the ledger was told of."""

    premises: Premises
    keyring: Keyring
    now: int = D * DAY_US
    forgotten: list[str] = field(default_factory=list)

    def sweeping(self, retention: RetentionSettings | None = None, rows: int = 5_000) -> Sweeping:
        return Sweeping(
            self.premises, retention or RetentionSettings(), forget_domains=self.forgotten.extend, rows=rows
        )

    async def sweep(self, retention: RetentionSettings | None = None, rows: int = 5_000) -> dict[str, int]:
        """Rows by place."""
        told: dict[str, int] = {}
        for one in await self.sweeping(retention, rows).sweep():
            told[one.place] = told.get(one.place, 0) + one.rows
        return told

    async def put(self, table: str, **values: Any) -> int:
        return await self.premises.store.write(lambda conn: put(conn, table, **values))

    async def count(self, table: str, **equal: Any) -> int:
        wanted = schema.metadata.tables[table]
        which = [wanted.c[name] == value for name, value in equal.items()]
        return await self.premises.store.write(
            lambda conn: conn.execute(select(func.count()).select_from(wanted).where(*which)).scalar_one()
        )

    async def rows(self, table: str) -> list[dict[str, Any]]:
        wanted = schema.metadata.tables[table]
        return await self.premises.store.write(
            lambda conn: [dict(row._mapping) for row in conn.execute(select(wanted).order_by(*wanted.primary_key))]
        )

    async def account(self, name: str = "acme") -> int:
        return await self.put("account", name=name, state="active")

    async def job(self, account: int, number: int, done: int | None, **values: Any) -> int:
        """A job that ended on a day, at its last microsecond; None: not over."""
        at = None if done is None else (done + 1) * DAY_US - 1
        given = {
            "state": "sending" if at is None else "done", "kind": "campaign", "in_doubt": "hold", "payload": b"payload",
            "job_key": b"key", "subject_sealed": b"subject",
        }  # fmt: skip
        return await self.put(
            "job", number=number, account=account, job_id=f"job-{number}", done_at=at, **(given | values)
        )

    async def person(self, account: int, address: str, created: int = 0) -> vault.Subject:
        row, at = row_of(self.keyring.pepper, address), (created or D) * DAY_US

        def work(conn: Connection) -> vault.Subject:
            [(number, _)] = vault.resolve(conn, self.keyring, account, [row], week_of(at), at)
            found = vault.get(conn, self.keyring, number)
            assert found is not None
            return found

        return await self.premises.store.write(work)

    async def message(self, job: int, mref: int, day: int, person: vault.Subject | None = None, note: str = "") -> int:
        pseudonym = person.pseudonym(week_of(day * DAY_US)) if person else mref + 10_000
        return await self.put(
            "message", job=job, mref=mref, day=day, at=day * DAY_US, kind=int(Kind.DELIVERED), pseudonym=pseudonym,
            note=seal_note(self.keyring, note) if note else None,
        )  # fmt: skip


def put(conn: Connection, table: str, **values: Any) -> int:
    """A row with what is said, and nothing in the columns that must have something."""
    wanted = schema.metadata.tables[table]
    for column in wanted.columns:
        is_number = column.primary_key and len(wanted.primary_key) == 1
        if column.name not in values and not column.nullable and not is_number:
            kind = column.type
            values[column.name] = b"" if isinstance(kind, LargeBinary) else "" if isinstance(kind, Text) else 0
    key = conn.execute(insert(wanted).values(**values)).inserted_primary_key
    assert key is not None
    return key[0] if isinstance(key[0], int) else 0


@contextlib.asynccontextmanager
async def sweeper(folder: Path, keyring: Keyring, redis: Redis) -> AsyncIterator[Sweeper]:
    with policy_store(folder):
        pass
    store = Store(open_store(url_of(folder), writer=True))
    officer = Officer(name="Officer", address="privacy@example.org")
    settings = PolicySettings(officer=officer, data_dir=folder, keys_dir=folder / "keys", sql_url=url_of(folder))
    made: list[Sweeper] = []
    premises = Premises(settings, store, redis, lambda: keyring, lambda: made[0].now)
    made.append(Sweeper(premises, keyring))
    try:
        yield made[0]
    finally:
        await store.close()
