"""Which event loops the engine's tests run on: asyncio's, and for the connection both.

The product runs on uvloop; the connection has to be right on either, because they differ in when they write, pause and
report a loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_connection.py":
        loops["uvloop"] = uvloop.new_event_loop
    return loops
