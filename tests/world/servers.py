"""A real Valkey and a real policy writer, in this process's temporary folders; started for a test, stopped after it.

    async with valkey_server() as server:           server.client, server.url, await server.restart()
    async with policy_world() as world:             world.settings, world.keyring, world.redis, world.writer,
                                                    world.ask (WriterClient), world.reader, await world.drain()

As pytest fixtures: ``from tests.world.servers import valkey, world`` (import the names into the test module). A Valkey
costs 50 ms to start, a writer with its migrations 200 ms.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio

from policy.instants import week_of
from policy.keys import Keyring
from policy.ledger import Reader
from policy.schema import open_store
from policy.settings import Officer, PolicySettings
from policy.valkey import Client, EmbeddedServer, connect
from policy.wire import WriterClient
from policy.writer import Writer, clock_us


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder under /tmp: pytest's own are too long for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="sp-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class ValkeyServer:
    """An embedded server and one client of it."""

    def __init__(self, folder: Path) -> None:
        self.embedded = EmbeddedServer(folder)
        self.client: Client = connect(self.url)

    @property
    def url(self) -> str:
        return self.embedded.url

    async def start(self) -> None:
        self.embedded.start()
        await self.embedded.wait_ready()

    async def stop(self) -> None:
        """The server goes away; clients find the socket dead."""
        await self.embedded.stop()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def close(self) -> None:
        await self.client.aclose()
        await self.embedded.stop()


@contextlib.asynccontextmanager
async def valkey_server(folder: Path | None = None) -> AsyncIterator[ValkeyServer]:
    """folder: of the server (its socket is folder/valkey.sock); default a temporary one."""
    with contextlib.ExitStack() as stack:
        place = folder if folder is not None else stack.enter_context(short_folder())
        server = ValkeyServer(place)
        await server.start()
        try:
            yield server
        finally:
            await server.close()


def settings_for(folder: Path) -> PolicySettings:
    """Settings of an installation in a folder, embedded everything; drains look every 20 ms."""
    return PolicySettings(
        data_dir=folder,
        officer=Officer(name="Privacy Officer", address="privacy@example.org"),
        drain_interval=0.02,
        log_json=False,
    )


@dataclass
class PolicyWorld:
    """A running policy floor. redis is a client of our own, ask a WriterClient, reader the read-only ledger."""

    settings: PolicySettings
    keyring: Keyring
    server: ValkeyServer
    redis: Client
    writer: Writer
    ask: WriterClient
    reader: Reader
    clock: Callable[[], int]

    async def drain(self) -> None:
        """Wait until every event and hit that is in Redis now is in the ledger."""
        await self.writer.drain()

    async def restart_writer(self) -> None:
        """Stop the writer and start another on the same folder."""
        await self.writer.stop()
        self.writer = Writer(self.settings, self.keyring, clock=self.clock)
        await self.writer.start()


@contextlib.asynccontextmanager
async def policy_world(
    folder: Path | None = None, *, clock: Callable[[], int] = clock_us
) -> AsyncIterator[PolicyWorld]:
    """Everything of the policy floor in a temporary folder (or the one given), stopped at the end."""
    async with contextlib.AsyncExitStack() as stack:
        place = folder if folder is not None else stack.enter_context(short_folder())
        settings = settings_for(place)
        keyring = Keyring.create(settings.keys_dir, week_of(clock()))
        server = await stack.enter_async_context(valkey_server(settings.redis_socket.parent))
        world = PolicyWorld(
            settings=settings,
            keyring=keyring,
            server=server,
            redis=server.client,
            writer=Writer(settings, keyring, clock=clock),
            ask=WriterClient(settings.writer_socket),
            reader=None,  # type: ignore[arg-type]  # the database is made by the writer's start, two lines below
            clock=clock,
        )
        await world.writer.start()
        stack.push_async_callback(lambda: world.writer.stop())
        world.reader = Reader(open_store(settings.sql_address(), writer=False))
        stack.callback(world.reader.close)
        stack.push_async_callback(world.ask.close)
        yield world


@pytest_asyncio.fixture
async def valkey() -> AsyncIterator[ValkeyServer]:
    """A Valkey of this test's own."""
    async with valkey_server() as server:
        yield server


@pytest_asyncio.fixture
async def world() -> AsyncIterator[PolicyWorld]:
    """A policy floor of this test's own."""
    async with policy_world() as made:
        yield made
