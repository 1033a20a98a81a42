"""The embedded server: ours alone, durable, survives its supervisor, refuses to break promises."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import pytest
import redis.exceptions

from policy import keyspace
from policy.valkey import EmbeddedServer, EmbeddedServerError, ServerRefused, call, check_server, connect
from tests.world.servers import ValkeyServer, short_folder, valkey, valkey_server

__all__ = ["valkey"]


async def test_it_keeps_the_promises_of_t0(valkey: ValkeyServer) -> None:
    assert await check_server(valkey.client) == []
    assert await check_server(valkey.client) == []  # the second start finds what the first one set
    port = await valkey.client.config_get("port")
    assert str(next(iter(port.values()))) in ("0", "b'0'")
    folder = valkey.embedded.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(valkey.embedded.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "valkey.conf").stat().st_mode) == 0o600
    for file in (folder / "appendonlydir").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0


async def test_what_was_acknowledged_survives_a_kill(valkey: ValkeyServer) -> None:
    await valkey.client.set("acknowledged", "yes")
    os.kill(valkey.embedded.pid, signal.SIGKILL)
    await valkey.embedded.stop()
    await valkey.start()
    assert await valkey.client.get("acknowledged") == b"yes"


async def test_it_outlives_its_supervisor_and_is_adopted() -> None:
    with short_folder() as folder:
        async with valkey_server(folder) as first:
            await first.client.set("queue", "kept")
            pid = first.embedded.pid
            first.embedded.abandon()
            second = EmbeddedServer(folder)
            second.start()
            assert second.adopted
            assert second.pid == pid
            await second.wait_ready()
            assert await first.client.get("queue") == b"kept"
            await second.stop()
            assert second.pid == 0
        assert (await asyncio.to_thread(os.waitpid, pid, 0))[0] == pid  # our child all the same: ended, and reaped here


async def test_one_folder_one_supervisor(valkey: ValkeyServer) -> None:
    with pytest.raises(EmbeddedServerError, match="in use"):
        EmbeddedServer(valkey.embedded.folder).start()
    assert await valkey.client.ping()


async def test_a_stale_pid_file_of_another_process_is_not_adopted() -> None:
    with short_folder() as folder:
        (folder / "valkey.pid").write_text(str(os.getpid()))
        async with valkey_server(folder) as server:
            assert not server.embedded.adopted
            assert server.embedded.pid != os.getpid()


async def test_a_server_that_cannot_start_says_where_to_look() -> None:
    with short_folder() as folder:
        (folder / "appendonlydir").write_text("not a folder")
        server = EmbeddedServer(folder)
        server.start()
        try:
            with pytest.raises(EmbeddedServerError, match=r"valkey\.log"):
                await server.wait_ready()
        finally:
            await server.stop()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="shorter data_dir"):
        EmbeddedServer(tmp_path / ("x" * 120)).start()


async def test_a_server_that_evicts_is_refused(valkey: ValkeyServer) -> None:
    await valkey.client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ServerRefused, match="noeviction"):
        await check_server(valkey.client)


async def test_a_server_that_may_lose_is_warned_about(valkey: ValkeyServer) -> None:
    await valkey.client.config_set("appendfsync", "everysec")
    assert "appendfsync" in (await check_server(valkey.client))[0]
    await valkey.client.config_set("appendonly", "no")
    assert "appendonly" in (await check_server(valkey.client))[0]


@pytest.mark.parametrize("field", ["schema", "partitions"])
async def test_another_schema_or_partition_count_is_refused(valkey: ValkeyServer, field: str) -> None:
    await valkey.client.hset(keyspace.META, field, "7")
    with pytest.raises(ServerRefused, match=field):
        await check_server(valkey.client)


async def test_nobody_there_is_an_error_of_the_connection() -> None:
    with short_folder() as folder:
        client = connect(f"unix://{folder}/none.sock")
        with pytest.raises((redis.exceptions.ConnectionError, OSError)):
            await client.ping()
        await client.aclose()


async def test_a_command_that_is_cancelled_is_cancelled(valkey: ValkeyServer) -> None:
    """redis-py's own default of 5 s a command wraps it in asyncio.wait_for, which swallows a cancellation now and then:
    a loop that was told to end went on."""
    client = connect(valkey.url)
    try:
        await call(client, "PING")
        for turns in range(120):
            asking = asyncio.create_task(call(client, "PING"))
            for _ in range(turns % 12):
                await asyncio.sleep(0)
            if not asking.done():
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
    finally:
        await client.aclose()
