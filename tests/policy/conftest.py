"""Fixtures of the ground floor: a store, a keyring, a real Valkey with an empty database for each test.

What uses `store` or `conn` (or `dialect`) runs on SQLite and on PostgreSQL (decision 15: one code path), the embedded
wheel's and, marked ``debian``, Debian's. A server is started once a test process; each test has a database of its own,
copied in 60 ms. Tests of what only one of them has are marked `tests.policy.stores.only_sqlite` or `only_postgresql`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine

from policy.keys import Keyring
from policy.valkey import connect
from tests.policy.stores import belongs, policy_store
from tests.world.postgres import PostgresServer, debian_programs, running_postgres
from tests.world.valkey_server import running_valkey

WEEK = 2967
_SERVERS = {"postgresql": "postgres", "debian": "debian_postgres"}


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def debian_postgres() -> Iterator[PostgresServer]:
    with running_postgres(debian_programs()) as server:
        yield server


@pytest.fixture
def postgres_server(request: pytest.FixtureRequest, dialect: str) -> PostgresServer:
    """The server that holds this test's store."""
    server: PostgresServer = request.getfixturevalue(_SERVERS[dialect])
    return server


@pytest.fixture(params=["sqlite", "postgresql", pytest.param("debian", marks=pytest.mark.debian)])
def dialect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Which store this test's folder has."""
    if request.param == "sqlite":
        yield "sqlite"
        return
    server: PostgresServer = request.getfixturevalue(_SERVERS[request.param])
    url = server.database(migrated=True)
    with belongs(tmp_path, url):
        yield request.param
    server.drop(url)


@pytest.fixture
def store(dialect: str, tmp_path: Path) -> Iterator[Engine]:
    with policy_store(tmp_path) as engine:
        yield engine


@pytest.fixture
def conn(store: Engine) -> Iterator[Connection]:
    """One transaction of the writer, committed at the end of the test."""
    with store.begin() as connection:
        yield connection


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.create(tmp_path / "keys", WEEK)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with running_valkey() as server:
        yield server.url


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    client = connect(valkey_url)
    await client.flushall()
    try:
        yield client
    finally:
        await client.aclose()
