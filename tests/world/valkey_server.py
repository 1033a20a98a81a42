"""A real server for tests that are not about servers: `policy.valkey.EmbeddedServer` in a folder of its own.

The path of a unix socket is at most 107 bytes, so the folder is made directly under the system's temporary folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from policy import valkey


@contextlib.contextmanager
def running_valkey(binary: Path | None = None) -> Iterator[valkey.EmbeddedServer]:
    """Started and answering; stopped and its folder removed afterwards. For fixtures outside an event loop.

    binary: another server than the embedded default, such as Debian's redis-server 7.0.
    """
    folder = Path(tempfile.mkdtemp(prefix="sp-valkey-"))
    server = valkey.EmbeddedServer(folder)
    try:
        with mock.patch.object(valkey, "find_binary", return_value=binary) if binary else contextlib.nullcontext():
            server.start()
        asyncio.run(server.wait_ready())
        yield server
    finally:
        asyncio.run(server.stop())
        shutil.rmtree(folder, ignore_errors=True)
