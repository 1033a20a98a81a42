"""A policy store for the tests of this floor: migrated, written by one engine, closed afterwards.

A folder's store is ``policy.db`` in it, unless `belongs` named another for it: so a test that asks `url_of` for a
second engine runs on both stores as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine

from policy.schema import open_store, upgrade

# for tests of what only one store has: its files, its way of telling a plan
only_sqlite = pytest.mark.parametrize("dialect", ["sqlite"], indirect=True)
only_postgresql = pytest.mark.parametrize(
    "dialect", ["postgresql", pytest.param("debian", marks=pytest.mark.debian)], indirect=True
)

_ELSEWHERE: dict[Path, str] = {}


def url_of(folder: Path) -> str:
    return _ELSEWHERE.get(folder) or URL.create("sqlite", database=str(folder / "policy.db")).render_as_string()


@contextlib.contextmanager
def belongs(folder: Path, url: str) -> Iterator[None]:
    """The folder's store is there (a PostgreSQL database of this test's own)."""
    _ELSEWHERE[folder] = url
    try:
        yield
    finally:
        del _ELSEWHERE[folder]


@contextlib.contextmanager
def policy_store(folder: Path) -> Iterator[Engine]:
    """The writer's engine over the store of the folder, at the newest revision."""
    engine = open_store(url_of(folder), writer=True)
    try:
        upgrade(engine)
        yield engine
    finally:
        engine.dispose()
