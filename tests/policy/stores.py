"""A policy store on disk for the tests of this floor: migrated, written by one engine, closed afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import URL, Engine

from policy.schema import open_store, upgrade


def url_of(folder: Path) -> str:
    return URL.create("sqlite", database=str(folder / "policy.db")).render_as_string()


@contextlib.contextmanager
def policy_store(folder: Path) -> Iterator[Engine]:
    """The writer's engine over ``policy.db`` in the folder, at the newest revision."""
    engine = open_store(url_of(folder), writer=True)
    try:
        upgrade(engine)
        yield engine
    finally:
        engine.dispose()
