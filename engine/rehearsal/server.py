"""The server of a rehearsal: a fast scripted SMTP sink that plays providers by listening port, and keeps its own count.

Law: every command is answered once and in order, however groups and chains are pipelined (RFC 2920: body n and
MAIL/RCPT/DATA of n+1 may come in one segment); a message is in the record before its reply is written; what is
accepted is counted here and nowhere else, so that a sender's claim can be checked against it.

    python -m engine.rehearsal.server --provider accept:2525 --provider limit:2526:messages=20,rate=500 \\
        --record sink.jsonl --keep 300 --keep-dir kept/

On stdout comes one line of JSON when all ports are open: ports by provider and the control port. The control port
takes lines: ``counts``, ``stop``; each is answered with one line of JSON.

Offers PIPELINING, 8BITMIME, SIZE, SMTPUTF8, ENHANCEDSTATUSCODES, and on request CHUNKING and STARTTLS with a
certificate made at start; `session` speaks, `providers` decides.

Known limits: one process (some 25,000 messages of 40 kB a second of one core); the set of what was seen grows by
about 70 bytes a recipient.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.rehearsal.certificate import made_now
from engine.rehearsal.providers import BEHAVIOURS, Counts, Judge, Post, Provider, ProviderError, parse
from engine.rehearsal.session import Session
from engine.rehearsal.window import Window

_BARE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)")


@dataclass(frozen=True, slots=True)
class Plan:
    """How the sink runs. keep: messages kept a provider (-1: all), spread by keep_every; record: file or none."""

    providers: Sequence[Provider]
    host: str = "127.0.0.1"
    control_port: int = 0
    record: Path | None = None
    record_recipients: bool = False
    keep: int = 0
    keep_every: int = 1
    keep_dir: Path | None = None
    size: int = 50_000_000
    pipelining: bool = True
    chunking: bool = False
    starttls: bool = False


class Sink:
    """All ports of one process. start() -> ports by label; stop() leaves nothing open. counts() is the truth."""

    def __init__(
        self, plan: Plan, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        labels = [provider.label for provider in plan.providers]
        if len(set(labels)) != len(labels):
            raise ProviderError("two providers of one name: give one of them name=…")
        if plan.keep and plan.keep_dir is None:
            raise ProviderError("messages are to be kept, but no folder is named for them")
        self.plan = plan
        self.size, self.chunking, self.records = plan.size, plan.chunking, plan.record is not None
        self._clock = clock
        self._wall = wall
        self.sessions: set[Session] = set()
        self.window = Window()
        self.tls = _server_context() if plan.starttls else None
        self.stopped = asyncio.Event()
        self.control_port = 0
        self._began = clock()
        self._posts = {provider.label: self._post_of(provider) for provider in plan.providers}
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._controls: set[asyncio.StreamWriter] = set()
        self._record: int | None = None

    def _post_of(self, provider: Provider) -> Post:
        words = ["rehearsal.test", f"SIZE {self.plan.size}", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES"]
        words += ["PIPELINING"] * self.plan.pipelining + ["CHUNKING"] * self.plan.chunking
        words[1:1] = ["STARTTLS"] * self.plan.starttls  # never last: its line is taken out after TLS
        lines = [f"250-{word}\r\n" for word in words[:-1]] + [f"250 {words[-1]}\r\n"]
        greeting = f"220 {provider.label}.rehearsal.test ESMTP\r\n"
        return Post(Judge(provider), greeting.encode(), "".join(lines).encode())

    async def start(self) -> dict[str, int]:
        """Open every port. Raises OSError when one is taken; then nothing stays open."""
        loop = asyncio.get_running_loop()
        if self.plan.record is not None:
            self._record = os.open(self.plan.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self.plan.keep_dir is not None:
            self.plan.keep_dir.mkdir(parents=True, exist_ok=True)
        ports: dict[str, int] = {}
        try:
            for label, post in self._posts.items():
                server = await loop.create_server(
                    lambda post=post: Session(self, post),  # type: ignore[misc]  # bound now, not at the call
                    self.plan.host,
                    post.judge.provider.port,
                    backlog=1024,
                )
                self._servers.append(server)
                ports[label] = server.sockets[0].getsockname()[1]
            control = await asyncio.start_server(self._control, self.plan.host, self.plan.control_port)
            self._servers.append(control)
            self.control_port = control.sockets[0].getsockname()[1]
        except BaseException:
            await self.stop()
            raise
        return ports

    async def stop(self) -> None:
        """Close ports and connections at once, as a provider that goes away does."""
        for server in self._servers:
            server.close()
        for session in list(self.sessions):
            session.abort()
        for control in list(self._controls):
            control.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._servers = []
        if self._record is not None:
            os.close(self._record)
            self._record = None
        self.stopped.set()

    def clock(self) -> float:
        return self._clock()

    def wall(self) -> float:
        return self._wall()

    def start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def counts(self) -> dict[str, Any]:
        """By provider and together, with the CPU seconds (user and system) this process has used."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        providers = {label: _plain(post.counts) for label, post in self._posts.items()}
        return {
            "providers": providers,
            "accepted": sum(post.counts.recipients for post in self._posts.values()),
            "unique": sum(post.counts.unique for post in self._posts.values()),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 4),
            "seconds": round(self.clock() - self._began, 3),
        }

    # ---- what sessions ask of the sink

    def wants_next(self, post: Post) -> bool:
        """Is the message whose body begins now to be kept whole? One that never ends uses up its turn."""
        plan = self.plan
        if not plan.keep or 0 <= plan.keep <= post.chosen:
            return False
        post.begun += 1
        chosen = (post.begun - 1) % plan.keep_every == 0
        post.chosen += chosen
        return chosen

    def keep(self, post: Post, number: int, wire: bytes) -> None:
        assert self.plan.keep_dir is not None
        post.counts.kept += 1
        post.counts.bare_newlines += len(_BARE.findall(wire))
        name = f"{post.judge.provider.label}-{number:07d}.eml"
        draft = self.plan.keep_dir / (name + ".part")
        draft.write_bytes(wire)
        draft.replace(self.plan.keep_dir / name)  # who lists the folder sees whole messages only

    def record_line(self, post: Post, now: float, message_id: bytes, recipients: list[bytes], size: int) -> bytes:
        line: dict[str, Any] = {
            "at": round(now, 6),
            "provider": post.judge.provider.label,
            "id": message_id.decode("ascii", "replace"),
            "rcpts": len(recipients),
            "size": size,
            "reply": 250,
        }
        if self.plan.record_recipients:
            line["to"] = [address.decode("utf-8", "replace") for address in recipients]
        return json.dumps(line).encode() + b"\n"

    def write_record(self, lines: bytes) -> None:
        if self._record is not None:
            os.write(self._record, lines)

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._controls.add(writer)
        with contextlib.suppress(OSError, ValueError):
            while line := (await reader.readline()).strip():
                if line == b"stop":
                    writer.write(b'{"stopping": true}\n')
                    self.stopped.set()
                elif line == b"counts":
                    writer.write(json.dumps(self.counts()).encode() + b"\n")
                else:
                    writer.write(b'{"error": "counts or stop"}\n')
                await writer.drain()
        writer.close()
        self._controls.discard(writer)


def _plain(counts: Counts) -> dict[str, float]:
    return {name: getattr(counts, name) for name in Counts.__slots__}


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # load_cert_chain takes files only
        file.write(made_now())
        file.flush()
        context.load_cert_chain(file.name)
    return context


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. 0 after stop or SIGTERM, 1 when a port is taken, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.rehearsal.server", description="SMTP servers for rehearsals: six kinds of provider."
    )
    parser.add_argument(
        "--provider", action="append", metavar="BEHAVIOUR[:PORT[:KEY=VALUE,…]]",
        help=f"one of {', '.join(BEHAVIOURS)}; may be repeated; default: all of them on free ports",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--control", type=int, default=0, metavar="PORT", help="control port (default: a free one)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append a line of JSON for every message")
    parser.add_argument("--record-recipients", action="store_true", help="with the recipients' addresses in it")
    parser.add_argument("--keep", type=int, default=0, metavar="N", help="keep N messages a provider (-1: all)")
    parser.add_argument("--keep-every", type=int, default=1, metavar="K", help="only every K-th of them")
    parser.add_argument("--keep-dir", type=Path, metavar="DIR", help="where to keep them, as PROVIDER-NUMBER.eml")
    parser.add_argument("--size", type=int, default=50_000_000, help="largest message in bytes")
    parser.add_argument("--no-pipelining", action="store_true", help="do not offer PIPELINING")
    parser.add_argument("--chunking", action="store_true", help="offer CHUNKING (BDAT)")
    parser.add_argument("--starttls", action="store_true", help="offer STARTTLS with a certificate made now")
    options = parser.parse_args(arguments)
    try:
        plan = Plan(
            providers=[parse(text) for text in options.provider or BEHAVIOURS],
            host=options.host,
            control_port=options.control,
            record=options.record,
            record_recipients=options.record_recipients,
            keep=options.keep,
            keep_every=max(1, options.keep_every),
            keep_dir=options.keep_dir,
            size=options.size,
            pipelining=not options.no_pipelining,
            chunking=options.chunking,
            starttls=options.starttls,
        )
        import uvloop

        _allow_many_files()
        _give_way()
        return uvloop.run(_serve(plan))
    except ProviderError as error:
        print(f"rehearsal server: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rehearsal server: {error.strerror or error}", file=sys.stderr)
        return 1


def _allow_many_files() -> None:
    """A thousand connections and more: the soft limit of 1,024 files is a default of shells, not a wish."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _give_way() -> None:
    """No preemption by waking up: on shared cores every message would throw the sender off its core for one of ours.
    A remote server would not; and our own work is cheaper by a third for coming in runs (36 us a message, was 50)."""
    with contextlib.suppress(AttributeError, OSError):  # Linux only; a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


async def _serve(plan: Plan) -> int:
    sink = Sink(plan)
    ports = await sink.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, sink.stopped.set)
    print(json.dumps({"ports": ports, "control": sink.control_port, "pid": os.getpid()}), flush=True)
    await sink.stopped.wait()
    counts = sink.counts()
    await sink.stop()
    print(json.dumps(counts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
