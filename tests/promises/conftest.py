"""Switches enforcement off where the second run asks for it, and writes down how each promise's tests ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from tests.policy.conftest import keyring, redis, valkey_url
from tests.policy.stores import policy_store
from tests.promises.marks import MARK

__all__ = ["keyring", "redis", "valkey_url"]  # fixtures of the ground floor

_KEY = pytest.StashKey[dict[str, list[dict[str, str]]]]()


@pytest.fixture(autouse=True)
def _enforcement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = request.node.get_closest_marker(MARK)
    assert mark is not None, "a test in this folder belongs to a promise"
    if request.config.getoption("--unguarded"):
        for path, instead in mark.kwargs["off"].items():
            monkeypatch.setattr(path, instead)  # a path that leads nowhere is an error: the test guards nothing


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Engine]:
    """SQLite: what both stores do alike is tested in `tests/policy`."""
    with policy_store(tmp_path) as engine:
        yield engine


@pytest.fixture
def conn(store: Engine) -> Iterator[Connection]:
    with store.begin() as connection:
        yield connection


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    """One line a test: the call's end; a set-up that fails is an error, in the second run too."""
    mark = item.get_closest_marker(MARK)
    if mark is None or (call.when != "call" and call.excinfo is None) or call.when == "teardown":
        return
    failed = call.excinfo is not None
    end = ("error" if call.when == "setup" else "failed") if failed else "passed"
    told = item.config.stash.setdefault(_KEY, {})
    told.setdefault(mark.args[0], []).append({"test": item.nodeid, "end": end})


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--promises")
    if path:
        Path(path).write_text(json.dumps(session.config.stash.get(_KEY, {})), "utf-8")
