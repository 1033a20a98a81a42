"""Injector: puts messages of the corpus into an MTA, one recipient each, pipelined over several connections.

smtp-source cannot send given bodies; this costs the shared cores less than it does, too. Body of message n and
MAIL/RCPT/DATA of n+1 leave in one write (RFC 2920: DATA is last in its group), so the MTA never waits for us.

    python -m benchmarks.peers.inject CORPUS --port PORT --count N --connections C

A worker (see `processes`): "ready", "go", then {"began": wall clock of the first byte, "sent": N}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import uvloop

from benchmarks.peers.corpus import Corpus

_EXPECTED: Final = {"greet": b"220", "ehlo": b"250", "mail": b"250", "rcpt": b"250", "data": b"354", "dot": b"250"}


class Refused(Exception):
    """The MTA did not take something; the text holds the step and the reply."""


class Connection(asyncio.Protocol):
    """One connection; takes the next number from the shared iterator until it is empty. done: when it has no more."""

    def __init__(self, corpus: Corpus, numbers: Iterator[int]) -> None:
        self._corpus, self._numbers = corpus, numbers
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting = ["greet"]  # steps whose replies are still to come, in order
        self._rest = b""
        self._current: int | None = None
        self._sent = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by isinstance

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(Refused("the connection was closed"))

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        for line in lines:
            if line[3:4] == b"-" or self.done.done():
                continue
            step = self._waiting.pop(0) if self._waiting else "nothing"
            if line[:3] != _EXPECTED.get(step):
                self.done.set_exception(Refused(f"{step}: {line.decode('utf-8', 'replace')}"))
                self._transport.abort()
                return
            self._answered(step)

    def _answered(self, step: str) -> None:
        if step == "greet":
            self._waiting.append("ehlo")
            self._transport.write(b"EHLO injector.test\r\n")
        elif step == "ehlo":
            self._transport.write(self._next())
        elif step == "data":
            assert self._current is not None
            body = self._corpus.message(self._current)
            self._waiting.append("dot")
            self._transport.write(b"".join((body, b".\r\n", self._next())))
        elif step == "dot":
            self._sent += 1
        if not self._waiting and not self.done.done():
            self._transport.write(b"QUIT\r\n")
            self.done.set_result(self._sent)

    def _next(self) -> bytes:
        """The envelope of the next message, b"" when there is none."""
        self._current = next(self._numbers, None)
        if self._current is None:
            return b""
        self._waiting += ("mail", "rcpt", "data")
        recipient = self._corpus.recipients[self._current]
        return f"MAIL FROM:<{self._corpus.sender}>\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode()


async def inject(corpus: Corpus, port: int, count: int, connections: int) -> int:
    """How many were taken. Raises Refused, or OSError when nobody listens."""
    loop = asyncio.get_running_loop()
    numbers = iter(range(count))
    opened = []
    for _ in range(min(connections, count)):
        _, protocol = await loop.create_connection(lambda: Connection(corpus, numbers), "127.0.0.1", port)
        opened.append(protocol)
    return sum(await asyncio.gather(*(protocol.done for protocol in opened)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.inject")
    parser.add_argument("corpus", type=Path)
    for name in ("--port", "--count", "--connections"):
        parser.add_argument(name, type=int, required=True)
    asked = parser.parse_args()
    corpus = Corpus(asked.corpus)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    try:
        sent = uvloop.run(inject(corpus, asked.port, asked.count, asked.connections))
    except (Refused, OSError) as error:
        print(f"injector: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"began": began, "sent": sent}), flush=True)
    sys.stdin.readline()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
