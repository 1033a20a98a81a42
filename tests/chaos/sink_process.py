"""The sink as a process of a test: started, killed, started again on its ports, asked and told over its control port.

async with sink_process(folder, {"plain": "", "grey": "greylist.2"}, {"*.bad.test": "dot.close"}) as sink:
    sink.ports["plain"], await sink.counts(), await sink.tell("port plain mail.421"), sink.entries(), sink.lines()
    await sink.kill(); await sink.start()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.sink_record import Entry, Line, read_lines, read_record

ROOT = Path(__file__).parents[2]


@dataclass
class SinkProcess:
    """record: the file it appends to; ports: by name, the same ones after `start` was called again."""

    scripts: Mapping[str, str]
    domains: Mapping[str, str]
    record: Path
    keep: Path | None = None
    ports: dict[str, int] = field(default_factory=dict)
    control: int = 0
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        arguments = ["--record", str(self.record)] + (["--keep", str(self.keep)] if self.keep is not None else [])
        for name, words in self.scripts.items():
            arguments += ["--port", f"{name}:{self.ports.get(name, 0)}={words}"]
        for domain, words in self.domains.items():
            arguments += ["--script", f"{domain}={words}"]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.sink", *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        assert line, f"the sink did not start: exit {await self.process.wait()}"
        said = json.loads(line)
        self.ports, self.control = said["ports"], said["control"]

    async def tell(self, command: str) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.control)
        try:
            writer.write(command.encode() + b"\n")
            answer: dict[str, Any] = json.loads(await reader.readline())
            return answer
        finally:
            writer.close()
            await writer.wait_closed()

    async def counts(self) -> dict[str, dict[str, int]]:
        return await self.tell("counts")

    def lines(self) -> list[Line]:
        return read_lines(self.record)

    def entries(self) -> list[Entry]:
        return read_record(self.record)

    async def kill(self) -> None:
        """SIGKILL, if it lives."""
        if self.process is not None:
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.send_signal(signal.SIGKILL)
            await self.wait()

    async def wait(self) -> int:
        """Until it has ended."""
        assert self.process is not None
        assert self.process.stdout is not None
        code = await self.process.wait()
        while await self.process.stdout.read(65536):  # its pipe closes in a later turn of the loop
            pass
        return code


@contextlib.asynccontextmanager
async def sink_process(
    folder: Path, scripts: Mapping[str, str], domains: Mapping[str, str] | None = None, *, keep: bool = False
) -> AsyncIterator[SinkProcess]:
    """scripts: words by port name; domains: words by domain or pattern. The record is folder/sink.jsonl."""
    sink = SinkProcess(scripts, domains or {}, folder / "sink.jsonl", folder / "arrived" if keep else None)
    await sink.start()
    try:
        yield sink
    finally:
        await sink.kill()
