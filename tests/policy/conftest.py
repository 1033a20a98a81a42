"""Fixtures of the ground floor: a store, a keyring, a real Valkey with an empty database for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine

from policy.keys import Keyring
from policy.valkey import connect
from tests.policy.stores import policy_store
from tests.world.valkey_server import running_valkey

WEEK = 2967


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Engine]:
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
