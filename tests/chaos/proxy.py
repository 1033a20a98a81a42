"""A proxy that does to a connection what networks do: between engine and sink (TCP), between anyone and Redis (unix).

    async with FaultProxy("127.0.0.1:25025") as proxy:              proxy.address is "127.0.0.1:PORT"
        proxy.down.delay = 0.2                                      from the server to the client, 200 ms late
        proxy.up.chunk = 1                                          what the client says, byte by byte
        proxy.reset_commands = 50                                   RST behind every 50th command of a connection
        proxy.hold(); proxy.release()                               as if the process were stopped

    python -m tests.chaos.proxy --to unix:/run/valkey.sock --listen unix:/tmp/p.sock --set up.delay=0.1

An address is ``host:port`` or ``unix:/path``; to listen, port 0 is any. The command prints one line of JSON with
``listen``, ``control`` (a port) and ``pid``. The control port takes lines, each answered with one line of JSON:
``set NAME VALUE`` · ``reset`` · ``close`` · ``half up|down`` · ``inject up|down HEX`` · ``hold`` · ``release`` ·
``counts`` · ``stop``. Names: up.delay, up.chunk, up.gather, up.swallow, the same for down, refuse, reset_bytes,
reset_commands, reset_before.

Laws: with nothing set, bytes pass unchanged and in order, and each end is handed on; what is set counts from the next
bytes on, also for connections that are open; `stop` leaves no task and no socket.

Known limits: over a unix socket there is no RST: the end comes as one, with unread bytes as ECONNRESET. A command is
a RESP array where the stream begins with ``*``, else a line. While held, up to 128 KiB a direction are read and kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

_HEAD: Final = re.compile(rb"[*$](-?[0-9]{1,10})\r\n")
SEGMENT_SECONDS: Final = 0.0005  # between two small writes, so that they leave as two segments


@dataclass(slots=True)
class Way:
    """One direction. delay: seconds of latency; chunk: bytes a write, 0 for as they come; gather: seconds to collect
    before one write; swallow: read and drop, as a peer that vanished does."""

    delay: float = 0.0
    chunk: int = 0
    gather: float = 0.0
    swallow: bool = False


class Commands:
    """Counts the commands in a stream that comes in pieces: RESP arrays or lines."""

    def __init__(self) -> None:
        self.count = 0
        self._rest = b""
        self._owed = 0  # bulk strings of the array that is not complete
        self._skip = 0  # bytes of a bulk string that have not come

    def feed(self, data: bytes) -> int:
        """How many commands ended in these bytes."""
        before = self.count
        if not self._owed and not self._skip and not (self._rest + data[:1]).startswith(b"*"):
            ended = (self._rest + data).count(b"\n")
            self._rest = b""
            self.count += ended
            return ended
        data, self._rest = self._rest + data, b""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                if not self._skip:
                    self._owed -= 1
                    self.count += not self._owed
                continue
            found = _HEAD.match(data, at)
            if found is None:
                self._rest = data[at:]
                break
            at = found.end()
            number = int(found[1])
            if self._owed:
                self._skip = number + 2
            else:
                self._owed = number
        return self.count - before


@dataclass(eq=False, slots=True)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    commands: Commands = field(default_factory=Commands)
    halves: set[int] = field(default_factory=set)  # ids of the writers that were ended by `half_close`
    said: int = 0  # commands since the last reset of this connection
    carried: int = 0  # bytes, both ways


class FaultProxy:
    """to: where the connections go; listen: where they come in. Everything may be changed while it runs."""

    def __init__(self, to: str, listen: str = "127.0.0.1:0") -> None:
        self.to = to
        self.address = listen
        self.up = Way()
        self.down = Way()
        self.refuse = False  # new connections are reset at once
        self.reset_bytes = 0  # RST after so many bytes of a connection, both ways together
        self.reset_commands = 0  # RST at every n-th command of a connection
        self.reset_before = False  # that command does not reach the server; else it does, and its answer is lost
        self.accepted = 0
        self.resets = 0
        self._free = asyncio.Event()
        self._free.set()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Open the door: the address to connect to."""
        if self.address.startswith("unix:"):
            self._server = await asyncio.start_unix_server(self._accept, self.address[5:])
        else:
            host, _, port = self.address.rpartition(":")
            self._server = await asyncio.start_server(self._accept, host, int(port), backlog=1024)
            self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.address.startswith("unix:"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address[5:])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- what is done to the connections that are open ---------------------------------------------------------------

    def reset(self) -> int:
        """RST to both ends of every connection; how many there were."""
        links = list(self._links)
        for link in links:
            self._reset(link)
        return len(links)

    def close(self) -> None:
        """End every connection in order, to both sides."""
        for link in self._links:
            link.client.close()
            link.server.close()

    def half_close(self, way: str) -> None:
        """Nothing more comes this way ("up": the server reads an end); the other way stays open."""
        for link in self._links:
            writer = link.server if way == "up" else link.client
            link.halves.add(id(writer))
            _end(writer)

    def inject(self, way: str, data: bytes) -> None:
        """Bytes nobody said, into every connection, between what passes."""
        for link in self._links:
            (link.server if way == "up" else link.client).write(data)

    def hold(self) -> None:
        """Let nothing pass, new connections neither: as SIGSTOP does to a peer. Nothing is lost."""
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    def counts(self) -> dict[str, int]:
        return {"accepted": self.accepted, "open": len(self._links), "resets": self.resets}

    def set(self, name: str, text: str) -> None:
        """A knob by its name. Raises ValueError for what is none."""
        place, dot, rest = name.partition(".")
        owner: object = {"up": self.up, "down": self.down}.get(place) if dot else self
        knob = rest if dot else name
        knobs = ("delay", "chunk", "gather", "swallow") if dot else _KNOBS
        if owner is None or knob not in knobs:
            raise ValueError(f"{name!r} is nothing that can be set")
        kind = type(getattr(owner, knob))
        setattr(owner, knob, text.lower() in ("1", "true", "yes") if kind is bool else kind(text))

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        try:
            await self._free.wait()
            if self.refuse:
                self.resets += 1
                _abort(writer)
                return
            there, server = await self._connect()
        except OSError:
            _abort(writer)
            return
        except asyncio.CancelledError:
            writer.close()
            raise
        link = _Link(writer, server)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(link, self.up, reader, server))
                group.create_task(self._carry(link, self.down, there, writer))
        finally:
            self._links.discard(link)
            for end in (writer, server):
                end.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.to.startswith("unix:"):
            return await asyncio.open_unix_connection(self.to[5:])
        host, _, port = self.to.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _carry(self, link: _Link, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction until its end: read now, written when it is due."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            speaking = group.create_task(self._speak(link, way, queue, writer))
            try:
                while data := await reader.read(65536):
                    await queue.put((loop.time() + way.delay, data))
            except OSError:
                speaking.cancel()
                self._reset(link)  # an end by RST is handed on as one
                return
            await queue.put((loop.time() + way.delay, b""))

    async def _speak(
        self, link: _Link, way: Way, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                due, data = await queue.get()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self._free.wait()
                if not data:
                    _end(writer)
                    return
                if way.swallow or id(writer) in link.halves:
                    continue
                ended = False
                if way.gather:
                    await asyncio.sleep(way.gather)
                    while not queue.empty():
                        more = queue.get_nowait()[1]
                        data += more
                        ended |= not more
                if not await self._hand_on(link, way, writer, data):
                    return
                if ended:
                    _end(writer)
                    return
        except OSError:
            self._reset(link)

    async def _hand_on(self, link: _Link, way: Way, writer: asyncio.StreamWriter, data: bytes) -> bool:
        """Write, with the resets that are due; False when the connection was ended."""
        cut = False
        if way is self.up and self.reset_commands:
            link.said += link.commands.feed(data)
            if link.said >= self.reset_commands:
                link.said = 0
                cut = True
                if self.reset_before:
                    data = b""
        link.carried += len(data)
        if self.reset_bytes and link.carried >= self.reset_bytes:
            data = data[: max(0, len(data) - (link.carried - self.reset_bytes))]
            link.carried = 0
            cut = True
        if way.chunk:
            for at in range(0, len(data), way.chunk):
                writer.write(data[at : at + way.chunk])
                await writer.drain()
                await asyncio.sleep(SEGMENT_SECONDS)
        elif data:
            writer.write(data)
            await writer.drain()
        if cut:
            self._reset(link)
        return not cut

    def _reset(self, link: _Link) -> None:
        if link in self._links:
            self._links.discard(link)
            self.resets += 1
            _abort(link.client)
            _abort(link.server)


_KNOBS: Final = ("refuse", "reset_bytes", "reset_commands", "reset_before")


def _end(writer: asyncio.StreamWriter) -> None:
    if not writer.transport.is_closing():
        writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX and not writer.transport.is_closing():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as handle:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# -- the command ---------------------------------------------------------------------------------------------------


def _obey(proxy: FaultProxy, line: str, stopped: asyncio.Event) -> dict[str, object]:
    word, *rest = line.split()
    try:
        match word, rest:
            case "set", [name, value]:
                proxy.set(name, value)
            case "reset", []:
                return {"reset": proxy.reset()}
            case "close", []:
                proxy.close()
            case "half", ["up" | "down" as way]:
                proxy.half_close(way)
            case "inject", ["up" | "down" as way, data]:
                proxy.inject(way, bytes.fromhex(data))
            case "hold", []:
                proxy.hold()
            case "release", []:
                proxy.release()
            case "counts", []:
                return {**proxy.counts()}
            case "stop", []:
                stopped.set()
            case _:
                return {"error": "set, reset, close, half, inject, hold, release, counts or stop"}
    except ValueError as error:
        return {"error": str(error)}
    return {"ok": True}


async def _serve(proxy: FaultProxy) -> int:
    stopped = asyncio.Event()

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := (await reader.readline()).decode().strip():
                writer.write(json.dumps(_obey(proxy, line, stopped)).encode() + b"\n")
                await writer.drain()
        writer.close()

    async with proxy:
        server = await asyncio.start_server(control, "127.0.0.1", 0)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        door = server.sockets[0].getsockname()[1]
        print(json.dumps({"listen": proxy.address, "control": door, "pid": os.getpid()}), flush=True)
        await stopped.wait()
        server.close()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. 0 after stop or SIGTERM, 1 when it cannot listen, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.proxy", description="A proxy with faults.")
    parser.add_argument("--to", required=True, metavar="ADDRESS", help="host:port or unix:/path")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="ADDRESS", help="default: a free port of loopback")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a knob, from the start")
    options = parser.parse_args(arguments)

    async def run() -> int:
        proxy = FaultProxy(options.to, options.listen)
        for knob in options.set:
            name, _, value = knob.partition("=")
            proxy.set(name, value)
        return await _serve(proxy)

    try:
        return asyncio.run(run())
    except ValueError as error:
        print(f"proxy: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"proxy: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
