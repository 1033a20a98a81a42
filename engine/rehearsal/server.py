"""The server of a rehearsal: a fast scripted SMTP sink that plays providers by listening port, and keeps its own count.

Law: every command is answered once and in order, however groups and chains are pipelined (RFC 2920: body n and
MAIL/RCPT/DATA of n+1 may come in one segment); a message is in the record before its reply is written; what is
accepted is counted here and nowhere else, so that a sender's claim can be checked against it.

    python -m engine.rehearsal.server --provider accept:2525 --provider limit:2526:messages=20,rate=500 \\
        --record sink.jsonl --keep 300 --keep-dir kept/

On stdout comes one line of JSON when all ports are open: ports by provider and the control port. The control port
takes lines: ``counts``, ``stop``; each is answered with one line of JSON.

Speaks ESMTP with PIPELINING, 8BITMIME, SIZE, SMTPUTF8, ENHANCEDSTATUSCODES, and on request CHUNKING and STARTTLS with a
certificate made at start. At 421 it closes its own direction and reads on for a moment: a plain close with unread
input makes the kernel send RST, which can eat the 421 on its way.

Known limits: loopback only by default, no authentication, one process; a body is not checked but for bare CR and LF in
those that are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import re
import resource
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, cast

from engine.rehearsal.providers import BEHAVIOURS, Judge, Provider, ProviderError, parse

MAX_LINE: Final = 4096  # bytes; RFC 5321 4.5.3.1.4 asks for 512, extensions add
HEAD_BYTES: Final = 16_384  # of a message that is not kept, to find its Message-ID
LINGER_SECONDS: Final = 2.0
_END: Final = b"\r\n.\r\n"
_MESSAGE_ID: Final = re.compile(rb"(?im)^message-id:\s*<([^>\r\n]*)>")
_PATH: Final = re.compile(rb"(?i)(?:FROM|TO): ?<([^<>\r\n]*)>(.*)")
_BARE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)")


@dataclass(slots=True)
class Counts:
    """What one provider did. accepted: messages; recipients: of these; unique: (Message-ID, recipient) pairs."""

    connections: int = 0
    open: int = 0
    most_open: int = 0
    accepted: int = 0
    recipients: int = 0
    unique: int = 0
    refused: int = 0  # recipients, 5xx
    deferred: int = 0  # recipients, 4xx
    closed_421: int = 0
    too_fast: int = 0
    bytes: int = 0
    kept: int = 0
    bare_newlines: int = 0
    bad_commands: int = 0
    first_at: float = 0.0  # seconds since the epoch: first and last message accepted
    last_at: float = 0.0


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


@dataclass(slots=True)
class _Post:
    """One listening port: its judge, its counts, and the constant replies."""

    judge: Judge
    greeting: bytes
    ehlo: bytes
    counts: Counts = field(default_factory=Counts)
    seen: set[bytes] = field(default_factory=set)
    begun: int = 0
    chosen: int = 0


class Session(asyncio.Protocol):
    """One connection. Input is taken apart as it comes; replies gather in `_out` and leave in one write."""

    def __init__(self, sink: Sink, post: _Post) -> None:
        self._sink = sink
        self._post = post
        self._counts = post.counts
        self._judge = post.judge
        self._transport: asyncio.Transport
        self._buffer = b""
        self._out: list[bytes] = []
        self._records: list[bytes] = []
        self._greeted = False
        self._said_hello = False
        self._is_tls = False
        self._paused = False  # a slow provider is thinking, or TLS is being made
        self._closing = False
        self._messages = 0
        self._reset()

    def _reset(self) -> None:
        self._sender: bytes | None = None
        self._recipients: list[bytes] = []
        self._data = False
        self._fresh = False  # no byte of the body was seen yet
        self._bdat = 0
        self._bdat_last = False
        self._in_chunks = False
        self._keeping = False  # decided when the body begins: the head alone is no message
        self._parts: list[bytes] = []
        self._size = 0

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        if self._greeted:  # the same session again, inside TLS
            return
        self._greeted = True
        counts = self._counts
        counts.connections += 1
        counts.open += 1
        counts.most_open = max(counts.most_open, counts.open)
        self._sink.sessions.add(self)
        refusal = self._judge.greet(counts.open)
        if refusal is not None:
            self._goodbye(refusal)
        else:
            self._out.append(self._post.greeting)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._sink.sessions:
            self._sink.sessions.discard(self)
            self._counts.open -= 1

    def eof_received(self) -> bool:
        return False

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._buffer = self._buffer + data if self._buffer else data
        if not self._paused:
            self._run()

    def _run(self) -> None:
        """Take apart what is there, until it ends or something must be waited for; then speak."""
        data, at = self._buffer, 0
        self._buffer = b""
        goes_on = True
        while goes_on and at < len(data) and not self._paused and not self._closing:
            if self._data:
                at, goes_on = self._body(data, at)
            elif self._bdat:
                at = self._chunk(data, at)
            else:
                end = data.find(b"\r\n", at)
                if end >= 0:
                    self._command(data[at:end])
                    at = end + 2
                    continue
                goes_on = False
                if len(data) - at > MAX_LINE:
                    self._counts.bad_commands += 1
                    self._goodbye(b"421 4.5.2 Line too long\r\n")
        self._buffer = data[at:]
        self._flush()

    def _flush(self) -> None:
        if self._records:
            self._sink.write_record(b"".join(self._records))
            self._records.clear()
        if self._out:
            if not self._transport.is_closing():
                self._transport.write(b"".join(self._out))
            self._out.clear()
        if self._closing:
            self._close()

    def _goodbye(self, reply: bytes) -> None:
        self._out.append(reply)
        if reply.startswith(b"421"):
            self._counts.closed_421 += 1
        self._closing = True

    def _close(self) -> None:
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)
        else:
            self._transport.close()

    # ---- commands

    def _command(self, line: bytes) -> None:
        handler = _COMMANDS.get(line[:4].upper())
        if handler is None:
            self._counts.bad_commands += 1
            self._out.append(b"500 5.5.2 Command not recognised\r\n")
        else:
            handler(self, line)

    def _hello(self, line: bytes) -> None:
        self._reset()
        self._said_hello = True
        if line[:1] in b"Hh":
            self._out.append(b"250 rehearsal.test\r\n")
        else:
            self._out.append(self._post.ehlo.replace(b"250-STARTTLS\r\n", b"") if self._is_tls else self._post.ehlo)

    def _mail(self, line: bytes) -> None:
        path = _PATH.fullmatch(line, 5)
        if not self._said_hello or self._sender is not None or path is None:
            self._counts.bad_commands += 1
            self._out.append(b"501 5.5.4 Bad path\r\n" if path is None else b"503 5.5.1 Bad sequence\r\n")
            return
        size = re.search(rb"(?i) SIZE=([0-9]{1,15})(?: |$)", path[2])
        if size is not None and int(size[1]) > self._sink.plan.size:
            self._out.append(b"552 5.3.4 Message size exceeds fixed limit\r\n")
            return
        if self._judge.judges_mail:
            refusal = self._judge.mail(self._messages, self._sink.clock())
            if refusal is not None:
                if refusal.startswith(b"421"):
                    self._goodbye(refusal)
                else:
                    self._counts.too_fast += 1
                    self._out.append(refusal)
                return
        self._sender = path[1]
        self._out.append(b"250 2.1.0 Ok\r\n")

    def _rcpt(self, line: bytes) -> None:
        path = _PATH.fullmatch(line, 5)
        if self._sender is None or path is None:
            self._counts.bad_commands += path is None
            self._out.append(b"501 5.5.4 Bad path\r\n" if path is None else b"503 5.5.1 Need MAIL first\r\n")
            return
        address = path[1]
        if self._judge.judges_recipients:
            refusal = self._judge.recipient(address, self._sink.clock())
            if refusal is not None:
                if refusal.startswith(b"5"):
                    self._counts.refused += 1
                else:
                    self._counts.deferred += 1
                self._out.append(refusal)
                return
        self._recipients.append(address)
        self._out.append(b"250 2.1.5 Ok\r\n")

    def _data_(self, _line: bytes) -> None:
        if not self._recipients:
            self._out.append(
                b"554 5.5.1 No valid recipients\r\n" if self._sender is not None else b"503 5.5.1 Need MAIL\r\n"
            )
            return
        self._data = self._fresh = True
        self._keeping = self._sink.wants_next(self._post)
        self._out.append(b"354 End data with <CR><LF>.<CR><LF>\r\n")

    def _bdat_(self, line: bytes) -> None:
        words = line.split()
        if not self._sink.plan.chunking or len(words) not in (2, 3) or not words[1].isdigit():
            self._counts.bad_commands += 1
            self._goodbye(b"421 5.5.4 Bad BDAT\r\n")  # the bytes that follow could not be told from commands
            return
        if not self._in_chunks:
            self._in_chunks = True
            self._keeping = self._sink.wants_next(self._post)
        self._bdat = int(words[1])
        self._bdat_last = len(words) == 3 and words[2].upper() == b"LAST"
        if not self._bdat:
            self._chunk(b"", 0)

    def _rset(self, _line: bytes) -> None:
        self._reset()
        self._out.append(b"250 2.0.0 Ok\r\n")

    def _noop(self, _line: bytes) -> None:
        self._out.append(b"250 2.0.0 Ok\r\n")

    def _vrfy(self, _line: bytes) -> None:
        self._out.append(b"252 2.5.2 Will try\r\n")

    def _quit(self, _line: bytes) -> None:
        self._goodbye(b"221 2.0.0 Bye\r\n")

    def _starttls(self, line: bytes) -> None:
        context = self._sink.tls
        if context is None or self._is_tls or line.upper() != b"STARTTLS":
            self._counts.bad_commands += 1
            self._out.append(b"503 5.5.1 TLS not available\r\n")
            return
        self._out.append(b"220 2.0.0 Go ahead\r\n")
        self._paused = True
        self._transport.pause_reading()  # nothing of the handshake may arrive as commands
        self._sink.start_task(self._upgrade(context))

    async def _upgrade(self, context: ssl.SSLContext) -> None:
        self._buffer = b""  # what came in clear after STARTTLS is not a part of the session (RFC 3207 4.2)
        try:
            secured = await asyncio.get_running_loop().start_tls(self._transport, self, context, server_side=True)
        except (OSError, ssl.SSLError):
            self._transport.abort()
            return
        if secured is None:
            return
        self._transport = secured
        self._is_tls, self._said_hello, self._paused = True, False, False
        self._reset()
        if self._buffer:
            self._run()

    # ---- bodies

    def _body(self, data: bytes, at: int) -> tuple[int, bool]:
        """Take body bytes; how far, and whether the message ended there (else more input is needed)."""
        if self._fresh:
            # The CRLF that ended DATA belongs to the pattern too: ".\r\n" at once is an empty body.
            if data.startswith(b".\r\n", at):
                self._finish()
                return at + 3, True
            if len(data) - at < 3:
                return at, False
            self._fresh = False
        end = data.find(_END, at)
        if end >= 0:
            self._take(data[at : end + 2])
            self._finish()
            return end + 5, True
        keep = max(at, len(data) - 4)  # the end may be cut by the segment's
        self._take(data[at:keep])
        return keep, False

    def _chunk(self, data: bytes, at: int) -> int:
        """Take bytes of a BDAT chunk (RFC 3030); the position after what was taken."""
        taken = data[at : at + self._bdat]
        self._take(taken)
        self._bdat -= len(taken)
        if self._bdat == 0:
            if not self._recipients:
                last = self._bdat_last
                self._parts.clear()
                self._bdat_last = False
                self._out.append(b"503 5.5.1 No valid recipients\r\n")
                if last:
                    self._reset()
            elif self._bdat_last:
                self._bdat_last = False
                self._finish()
            else:
                self._out.append(b"250 2.0.0 Chunk taken\r\n")
        return at + len(taken)

    def _take(self, part: bytes) -> None:
        self._size += len(part)
        if self._keeping or self._size - len(part) < HEAD_BYTES:
            self._parts.append(part)

    def _finish(self) -> None:
        """A whole message has come: count it, record it, answer it (a slow provider later)."""
        sink, counts = self._sink, self._counts
        if self._size > sink.plan.size:
            self._out.append(b"552 5.3.4 Message size exceeds fixed limit\r\n")
            self._reset()
            return
        wire = b"".join(self._parts) if len(self._parts) != 1 else self._parts[0]
        message_id = message_id_of(wire)
        self._messages += 1
        now = sink.wall()
        number = counts.accepted
        counts.accepted += 1
        counts.recipients += len(self._recipients)
        counts.bytes += self._size
        counts.last_at = now
        if not number:
            counts.first_at = now
        seen = self._post.seen
        before = len(seen)
        for address in self._recipients:
            seen.add(blake2b(message_id + b"\0" + address, digest_size=8).digest())
        counts.unique += len(seen) - before
        if self._keeping:
            sink.keep(self._post, number, wire if self._in_chunks else unstuff(wire))
        if sink.plan.record is not None:
            self._records.append(sink.record_line(self._post, now, message_id, self._recipients, self._size))
        self._reset()
        reply = b"250 2.0.0 Ok: queued as %d\r\n" % counts.accepted
        if self._judge.delay:
            self._flush()
            self._paused = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(self._judge.delay, self._answer_late, reply)
        else:
            self._out.append(reply)

    def _answer_late(self, reply: bytes) -> None:
        if self._transport.is_closing():
            return
        self._paused = False
        self._out.append(reply)
        self._transport.resume_reading()
        self._run()


_COMMANDS: Final[dict[bytes, Callable[[Session, bytes], None]]] = {
    b"EHLO": Session._hello,
    b"HELO": Session._hello,
    b"MAIL": Session._mail,
    b"RCPT": Session._rcpt,
    b"DATA": Session._data_,
    b"BDAT": Session._bdat_,
    b"RSET": Session._rset,
    b"NOOP": Session._noop,
    b"VRFY": Session._vrfy,
    b"QUIT": Session._quit,
    b"STAR": Session._starttls,
}


def message_id_of(wire: bytes) -> bytes:
    """What stands between the angle brackets of Message-ID, b"" when there is none in the header section."""
    end = wire.find(b"\r\n\r\n")
    found = _MESSAGE_ID.search(wire, 0, end if end >= 0 else len(wire))
    return found[1] if found else b""


def unstuff(wire: bytes) -> bytes:
    """RFC 5321 4.5.2: the first dot of a line goes."""
    if wire.startswith(b".."):
        wire = wire[1:]
    return wire.replace(b"\r\n..", b"\r\n.")


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
        self.clock = clock
        self.wall = wall
        self.sessions: set[Session] = set()
        self.tls = _server_context() if plan.starttls else None
        self.stopped = asyncio.Event()
        self.control_port = 0
        self._began = clock()
        self._posts = {provider.label: self._post(provider) for provider in plan.providers}
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._record: int | None = None

    def _post(self, provider: Provider) -> _Post:
        words = ["rehearsal.test", f"SIZE {self.plan.size}", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES"]
        words += ["PIPELINING"] * self.plan.pipelining + ["CHUNKING"] * self.plan.chunking
        words[1:1] = ["STARTTLS"] * self.plan.starttls  # never last: its line is taken out after TLS
        lines = [f"250-{word}\r\n" for word in words[:-1]] + [f"250 {words[-1]}\r\n"]
        greeting = f"220 {provider.label}.rehearsal.test ESMTP\r\n"
        return _Post(Judge(provider), greeting.encode(), "".join(lines).encode())

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
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._servers = []
        if self._record is not None:
            os.close(self._record)
            self._record = None
        self.stopped.set()

    def start_task(self, work: Any) -> None:
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

    def wants_next(self, post: _Post) -> bool:
        """Is the message whose body begins now to be kept whole? One that never ends uses up its turn."""
        plan = self.plan
        if not plan.keep or 0 <= plan.keep <= post.chosen:
            return False
        post.begun += 1
        chosen = (post.begun - 1) % plan.keep_every == 0
        post.chosen += chosen
        return chosen

    def keep(self, post: _Post, number: int, wire: bytes) -> None:
        assert self.plan.keep_dir is not None
        post.counts.kept += 1
        post.counts.bare_newlines += len(_BARE.findall(wire))
        name = f"{post.judge.provider.label}-{number:07d}.eml"
        draft = self.plan.keep_dir / (name + ".part")
        draft.write_bytes(wire)
        draft.replace(self.plan.keep_dir / name)  # who lists the folder sees whole messages only

    def record_line(self, post: _Post, now: float, message_id: bytes, recipients: list[bytes], size: int) -> bytes:
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


def _plain(counts: Counts) -> dict[str, float]:
    return {name: getattr(counts, name) for name in Counts.__slots__}


def _server_context() -> ssl.SSLContext:
    """A certificate for rehearsal.test, made now and forgotten: opportunistic TLS asks for no more."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rehearsal.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("rehearsal.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # load_cert_chain takes files only
        file.write(certificate.public_bytes(serialization.Encoding.PEM) + secret)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. 0 after stop or SIGTERM, 1 when a port is taken, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.rehearsal.server", description="SMTP servers for rehearsals: five kinds of provider."
    )
    parser.add_argument(
        "--provider", action="append", metavar="BEHAVIOUR[:PORT[:KEY=VALUE,…]]",
        help=f"one of {', '.join(BEHAVIOURS)}; may be repeated; default: all five on free ports",
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

        return uvloop.run(_serve(plan))
    except ProviderError as error:
        print(f"rehearsal server: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"rehearsal server: {error.strerror or error}", file=sys.stderr)
        return 1


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
