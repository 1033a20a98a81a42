"""Hits on their way: found by the references of a person's messages, left for the ledger, nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, insert

from policy import accounts, keyspace
from policy.events import Hit, Kind, encode_hits
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.keys import Keyring
from policy.personal import Erased, Person, Premises
from policy.schema import job, link, open_store, upgrade
from policy.settings import Officer, PolicySettings
from policy.store import Store
from policy.valkey import connect
from tests.world.valkey_server import running_valkey
from tracker.stores import PAGE, Hits, build

AT = 20_000 * DAY_US + 5 * HOUR_US
PERSON = Person(b"t" * 12, 3, "l" * 11, references=((7, -5), (8, 6)))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_valkey() as server:
        yield server.url


@pytest.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    client = connect(url)
    await client.flushall()
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
async def place(redis: Redis, tmp_path: Path) -> AsyncIterator[Hits]:
    engine = open_store(f"sqlite:///{tmp_path / 'policy.db'}", writer=True)
    upgrade(engine)
    store = Store(engine)
    settings = PolicySettings(data_dir=tmp_path, officer=Officer(name="DPO", address="dpo@acme.example"))
    [made] = build(Premises(settings, store, redis, lambda: Keyring.create(tmp_path / "keys", 2967), lambda: AT))
    assert isinstance(made, Hits)

    def enter(conn: Connection) -> None:
        number = accounts.add(conn, "acme", display_name="Acme", now=AT).number
        common = {"account": number, "hash": b"h", "state": "sending", "kind": "campaign", "legal_basis": "consent"}
        more = {"in_doubt": "hold", "priority": 0, "wait": 0, "opens_mode": 3, "clicks_mode": 3}
        times = {"created_at": AT, "accepted_at": AT, "chunks_expected": 1}
        conn.execute(insert(job), [{"number": n, "job_id": f"job-{n}", **common, **more, **times} for n in (7, 8)])
        conn.execute(insert(link), [{"job": 7, "number": 2, "url": "https://acme.example/two"}])

    await store.write(enter)
    yield made
    await store.close()


def hit(job: int, mref: int, mode: Mode = Mode.INDIVIDUAL, link: int = -1) -> Hit:
    return Hit(int(Kind.CLICKED if link >= 0 else Kind.OPENED), job, mref, AT + 9, int(mode), 1, link)


async def test_theirs_are_shown_and_left_for_the_ledger(redis: Redis, place: Hits) -> None:
    assert await place.find(PERSON) == 0
    for _ in range(2 * PAGE):
        await redis.xadd(keyspace.HITS, {"b": encode_hits([hit(7, 5), hit(9, -5)])})  # others
    await redis.xadd(keyspace.HITS, {"b": encode_hits([hit(7, 1), hit(7, -5, link=2), hit(8, 6, Mode.DELIVERABILITY)])})
    await redis.xadd(keyspace.HITS, {"b": b"\xc1"})  # poison: passed over by the ledger, too
    before = await redis.xlen(keyspace.HITS)

    assert await place.find(PERSON) == 2
    clicked, opened = await place.export(PERSON)
    assert (clicked.kind, clicked.values) == (
        "event",
        {
            "account": "acme", "job": "job-7", "reference": "fffffffffffffffb", "event": "clicked",
            "at": rfc3339(AT), "link": "https://acme.example/two", "visitor": "a mail service",
        },
    )  # fmt: skip
    assert (opened.kind, opened.values["job"], opened.values["at"]) == ("inferred", "job-8", rfc3339(20_000 * DAY_US))
    assert "link" not in opened.values
    assert await place.erase(PERSON) == await place.erase(PERSON) == Erased(0, 2)
    assert await redis.xlen(keyspace.HITS) == before
    await redis.xtrim(keyspace.HITS, 0)  # the ledger has them
    assert await place.erase(PERSON) == Erased()


async def test_a_counted_hit_is_nobodys(redis: Redis, place: Hits) -> None:
    await redis.xadd(keyspace.HITS, {"b": encode_hits([hit(7, 0, Mode.AGGREGATE)])})
    assert await place.find(Person(b"t" * 12, 3, "l" * 11, references=((7, 0),))) == 0


async def test_without_messages_there_is_nothing_to_look_for(redis: Redis, place: Hits) -> None:
    await redis.xadd(keyspace.HITS, {"b": encode_hits([hit(7, -5)])})
    assert await place.erase(Person(b"t" * 12, 3, "l" * 11)) == Erased()
    assert await place.amend(PERSON, "name", "Ada") == 0
