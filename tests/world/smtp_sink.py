"""Postfix's smtp-sink (Debian: postfix) on a free port: a server others wrote, with faults on demand.

    async with smtp_sink(folder, "-q", "MAIL") as sink:      sink.port, sink.messages(), await sink.stop()

Options are smtp-sink's own (man smtp-sink): -f, -r, -q, -Q with commands refuse for good, refuse for now, hang up, say
421 and hang up. Postfix itself is never started. Fails, never skips, when the program is missing.

Known limits: smtp-sink takes the end of line as it comes and writes LF, so bare line feeds do not show here (the
rehearsal's server counts those); it judges no recipient.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

_RECORD = re.compile(rb"\A((?:X-[A-Za-z]+-[A-Za-z]+: [^\n]*\n)+)Received: [^\n]*\n(?:[ \t][^\n]*\n)*")
_PATH = re.compile(rb"^X-(Mail|Rcpt)-Args: <([^>\n]*)>", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Arrived:
    """One mail transaction. wire: as it was after DATA, with CRLF and without smtp-sink's own fields."""

    sender: str
    recipients: tuple[str, ...]
    wire: bytes


@dataclass
class SmtpSink:
    """folder: of the captured messages, one file each."""

    port: int
    folder: Path
    process: asyncio.subprocess.Process
    log: Path

    def messages(self) -> list[Arrived]:
        """Every body captured, accepted or not; a transaction that ended before its body leaves an empty file."""
        records = [path.read_bytes() for path in sorted(self.folder.iterdir())]
        return [_read(record) for record in records if record]

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def smtp_sink(folder: Path, *options: str, name: str = "sink", port: int = 0) -> AsyncIterator[SmtpSink]:
    """Listens on 127.0.0.1 and captures into folder/name; port 0: any that is free."""
    program = shutil.which("smtp-sink", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    assert program is not None, "install Debian's postfix for its smtp-sink"
    captured = folder / name
    captured.mkdir(exist_ok=True)
    as_user: tuple[str, ...] = ()
    if os.getuid() == 0:  # smtp-sink insists on giving up root, and then has to reach the folder
        as_user = ("-u", "nobody")
        folder.chmod(0o711)
        captured.chmod(0o777)
    log = folder / f"{name}.log"
    sink = await _started([program, *as_user, *options, "-d", f"{captured}/m."], port, captured, log)
    try:
        yield sink
    finally:
        await sink.stop()


async def _started(command: list[str], port: int, captured: Path, log: Path) -> SmtpSink:
    for _ in range(5):  # the port was free a moment ago; somebody may have taken it since
        chosen = port or _free_port()
        with log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *command, f"127.0.0.1:{chosen}", "100", stdout=out, stderr=out, cwd="/"
            )
        async with asyncio.timeout(20):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", chosen)
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)  # until it listens: it has no way to say so
                    continue
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
                return SmtpSink(chosen, captured, process, log)
    raise AssertionError(f"smtp-sink did not start: {log.read_text()[-1000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _read(record: bytes) -> Arrived:
    found = _RECORD.match(record)
    assert found is not None, record[:300]
    paths = _PATH.findall(found[1])
    senders = [path.decode() for kind, path in paths if kind == b"Mail"]
    assert len(senders) == 1, found[1]
    wire = record[found.end() :].removesuffix(b"\n")  # an empty line ends the record
    recipients = tuple(path.decode() for kind, path in paths if kind == b"Rcpt")
    return Arrived(senders[0], recipients, wire.replace(b"\n", b"\r\n"))
