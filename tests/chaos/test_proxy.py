"""The proxy: nothing set changes nothing; each knob does what its name says; stop leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.chaos.proxy import Commands, FaultProxy
from tests.world.servers import short_folder

ROOT = Path(__file__).parents[2]


class Echo:
    """Answers with what it hears; remembers it, and how each connection ended."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.ends: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard.append(data)
                writer.write(data)
                await writer.drain()
            self.ends.append("eof")
        except ConnectionError:
            self.ends.append("reset")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
        finally:
            writer.close()


@asynccontextmanager
async def echo(folder: Path | None = None) -> AsyncIterator[tuple[Echo, FaultProxy]]:
    """folder: over unix sockets there, both sides."""
    there = Echo()
    if folder is None:
        server = await asyncio.start_server(there.serve, "127.0.0.1", 0)
        proxy = FaultProxy(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    else:
        server = await asyncio.start_unix_server(there.serve, folder / "there.sock")
        proxy = FaultProxy(f"unix:{folder}/there.sock", f"unix:{folder}/here.sock")
    async with proxy, asyncio.timeout(20):
        yield there, proxy
    server.close()
    await server.wait_closed()


async def dial(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if proxy.address.startswith("unix:"):
        return await asyncio.open_unix_connection(proxy.address[5:])
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("unix", [False, True])
async def test_bytes_pass_unchanged_and_ends_are_handed_on(unix: bool) -> None:
    with short_folder() as folder:
        async with echo(folder if unix else None) as (there, proxy):
            reader, writer = await dial(proxy)
            said = bytes(range(256)) * 4000
            writer.write(said)
            assert await reader.readexactly(len(said)) == said
            writer.write_eof()
            assert await reader.read() == b""
            await until(lambda: there.ends == ["eof"])
            writer.close()
        assert b"".join(there.heard) == said
        assert not (folder / "here.sock").exists()


async def test_delay_comes_once_however_many_pieces_follow() -> None:
    async with echo() as (_, proxy):
        proxy.up.delay = proxy.down.delay = 0.1
        reader, writer = await dial(proxy)
        began = time.monotonic()
        for number in range(20):
            writer.write(b"%02d" % number)
            await asyncio.sleep(0.005)
        assert await reader.readexactly(2) == b"00"
        assert time.monotonic() - began >= 0.2
        assert await reader.readexactly(38)
        writer.close()


async def test_small_writes_and_gathered_ones() -> None:
    async with echo() as (there, proxy):
        proxy.up.chunk = 1
        reader, writer = await dial(proxy)
        writer.write(b"0123456789" * 5)
        await reader.readexactly(50)
        assert len(there.heard) > 10
        there.heard.clear()
        proxy.up.chunk, proxy.up.gather = 0, 0.3
        for number in range(5):
            writer.write(b"%d" % number)
            await asyncio.sleep(0.01)
        await reader.readexactly(5)
        assert there.heard == [b"01234"]
        writer.close()


async def test_a_reset_reaches_both_ends() -> None:
    async with echo() as (there, proxy):
        reader, writer = await dial(proxy)
        writer.write(b"x")
        await reader.readexactly(1)
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        await until(lambda: there.ends == ["reset"])
        proxy.refuse = True
        reader, writer = await dial(proxy)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        assert proxy.counts() == {"accepted": 2, "open": 0, "resets": 2}


@pytest.mark.parametrize("before", [False, True])
async def test_every_nth_command_is_cut_and_its_answer_lost(before: bool) -> None:
    async with echo() as (there, proxy):
        proxy.reset_commands, proxy.reset_before = 3, before
        ping = b"*1\r\n$4\r\nPING\r\n"
        reader, writer = await dial(proxy)
        for _ in range(2):
            writer.write(ping)
            assert await reader.readexactly(len(ping)) == ping
        writer.write(ping)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(len(ping))
        await until(lambda: there.ends)
        # a reset may overtake what was written before it: the server has heard the third, or not
        assert len(b"".join(there.heard)) // len(ping) in ((2,) if before else (2, 3))
        writer.close()


async def test_a_connection_is_cut_after_so_many_bytes() -> None:
    async with echo() as (there, proxy):
        proxy.reset_bytes = 10
        reader, writer = await dial(proxy)
        writer.write(b"x" * 100)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(100)
        assert sum(len(data) for data in there.heard) <= 10
        writer.close()


async def test_held_is_late_and_not_lost_and_swallowed_is_lost() -> None:
    async with echo() as (there, proxy):
        reader, writer = await dial(proxy)
        proxy.hold()
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(4), 0.1)
        assert there.heard == []
        proxy.release()
        assert await reader.readexactly(4) == b"held"
        proxy.up.swallow = True
        writer.write(b"gone")
        await asyncio.sleep(0.05)
        proxy.up.swallow = False
        writer.write(b"more")
        assert await reader.readexactly(4) == b"more"
        writer.close()


async def test_half_closed_and_garbage() -> None:
    async with echo() as (there, proxy):
        reader, writer = await dial(proxy)
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.inject("down", b"junk")
        assert await reader.readexactly(4) == b"junk"
        proxy.half_close("up")
        writer.write(b"unheard")
        await until(lambda: there.ends == ["eof"])
        assert there.heard == [b"x"]
        writer.close()


def test_commands_are_counted_however_they_are_cut() -> None:
    stream = b"*2\r\n$3\r\nGET\r\n$5\r\n*\r\n$1\r\n*1\r\n$4\r\nPING\r\n" * 3
    for size in (1, 2, 3, 7, 1000):
        counter = Commands()
        total = sum(counter.feed(stream[at : at + size]) for at in range(0, len(stream), size))
        assert total == counter.count == 6, size
    lines = Commands()
    assert [lines.feed(b"EHLO x\r\nMA"), lines.feed(b"IL\r\n")] == [1, 1]


async def test_the_command_is_controlled_while_it_runs() -> None:
    there = Echo()
    server = await asyncio.start_server(there.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.proxy", "--to", f"127.0.0.1:{port}", "--set", "down.delay=0.01",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(20):
        said = json.loads(await process.stdout.readline())
        door, lines = await asyncio.open_connection("127.0.0.1", said["control"])
        reader, writer = await asyncio.open_connection(*said["listen"].split(":"))
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        answers = []
        for command in ("set up.chunk 3", "set nonsense 1", "counts", "inject down 6869", "reset", "counts", "stop"):
            lines.write(command.encode() + b"\n")
            answers.append(json.loads(await door.readline()))
        assert answers[0] == {"ok": True}
        assert "nonsense" in answers[1]["error"]
        assert answers[2] == {"accepted": 1, "open": 1, "resets": 0}
        assert answers[4:6] == [{"reset": 1}, {"accepted": 1, "open": 0, "resets": 1}]
        assert await process.wait() == 0
        assert await process.stdout.read() == b""
    for end in (lines, writer):
        end.close()
    server.close()
    await server.wait_closed()
