"""The other side of SMTP, by script, in a process of its own: all rows of faults.md 3.1, and a record (promises 3).

    python -m tests.chaos.sink --port plain --port 'grey:2525=greylist.3' --port 'bad=ehlo.421+first.3' \\
        --script 'slow.test=dot.late.2' --script '*.mixed.test=rcpt.452+first.1' --record sink.jsonl

On stdout comes one line of JSON when all ports are open: {"ports": {name: port}, "control": port, "pid": pid}.
The words are in `tests.chaos.sink_script`. They count by recipient (local part, then its domain) before port. The
format of the record is in `tests.chaos.sink_record`, with `read_record(path) -> list[Entry]`; both names are here too.

The control port takes lines, each answered with one line of JSON: ``counts`` (by port: connections, live, rcpts,
stored, faults, bad), ``port NAME WORDS`` and ``script DOMAIN WORDS`` (change a script; no words: none), ``stop``.

Laws: an accepted message is on record before the first byte of its answer is written; a port that is named with its
number opens there again after a SIGKILL, and appends to the same record.

Known limits: what it remembers of recipients (greylist, first.N) ends with the process; about 2,500 messages of 30 kB
a second of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import fnmatch
import functools
import json
import os
import signal
import socket
import ssl
import sys
import tempfile
import time
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.sink_record import Entry, Line, encode, read_lines, read_record
from tests.chaos.sink_script import PLAIN, Script, ScriptError, of_local_part, parse
from tests.chaos.sink_session import Session

__all__ = ["Entry", "Line", "Post", "Sink", "main", "read_lines", "read_record"]

SIZE = 50_000_000


@dataclass(slots=True)
class Post:
    """One listening port and what it counted."""

    name: str
    script: Script
    port: int = 0
    greeting: bytes = b""
    offers: tuple[str, ...] = ()
    connections: int = 0
    live: int = 0
    rcpts: int = 0
    stored: int = 0
    faults: int = 0
    bad: int = 0
    keep: bool = False
    kept: list[bytes] = field(default_factory=list)

    @property
    def host(self) -> str:
        """``slow@127.0.0.3`` listens there: sites of several hosts have shaping of their own."""
        return "::1" if self.script.v6 else self.name.partition("@")[2] or "127.0.0.1"

    def dress(self, script: Script) -> None:
        """Take a script from now on."""
        self.script = script
        offers = [f"SIZE {script.size or SIZE}", "8BITMIME", "SMTPUTF8", "PIPELINING", "ENHANCEDSTATUSCODES"]
        offers += ["STARTTLS"] * bool(script.tls or "starttls" in script.acts)
        self.offers = tuple(offer for offer in offers if offer.split()[0] not in script.absent)
        self.greeting = f"220 {self.name.partition('@')[0]}.sink.test ESMTP\r\n".encode()

    def ehlo(self, encrypted: bool) -> bytes:
        words = ["sink.test", *(offer for offer in self.offers if not (encrypted and offer == "STARTTLS"))]
        lines = [f"250-{word}\r\n" for word in words[:-1]] + [f"250 {words[-1]}\r\n"]
        return "".join(lines).encode()

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("connections", "live", "rcpts", "stored", "faults", "bad")}


class Sink:
    """All ports of one process."""

    def __init__(
        self,
        ports: Sequence[tuple[str, int, Script]],
        scripts: Mapping[str, Script] | None = None,
        *,
        record: Path | None = None,
        keep: Path | None = None,
    ) -> None:
        self.posts = {name: Post(name, script, port) for name, port, script in ports}
        for post in self.posts.values():
            post.dress(post.script)
        self.sessions: set[Session] = set()
        self.stopped = asyncio.Event()
        self.clock = time.monotonic
        self._domains: dict[str, Script] = dict(scripts or {})
        self._found: dict[str, Script] = {}
        self._path = record
        self._keep = keep
        self._record = -1
        self._connections = self._transactions = 0
        self._first_seen: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> tuple[dict[str, int], int]:
        """Open everything: (ports by name, control port). Raises OSError when a port is taken."""
        loop = asyncio.get_running_loop()
        if self._path is not None:
            self._record = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n"):
                self.write(b"\n")  # the last line of a sink before us is torn
        if self._keep is not None:
            self._keep.mkdir(parents=True, exist_ok=True)
        self.write(encode(Line(k="start", t=self.clock(), pid=os.getpid())))
        ports: dict[str, int] = {}
        for post in self.posts.values():
            listener = _listener(post.host, post.port, post.script.rcvbuf)
            while not post.port and listener.getsockname()[1] in ports.values():  # the same number, on ::1
                other = _listener(post.host, 0, post.script.rcvbuf)
                listener.close()
                listener = other
            if post.script.tls:
                tls_context(post.script.tls)  # made now: the first handshake has its own deadline
            server = await loop.create_server(functools.partial(Session, self, post), sock=listener, backlog=1024)
            self._servers.append(server)
            ports[post.name] = post.port = listener.getsockname()[1]
        control = await asyncio.start_server(self._control, "127.0.0.1", 0)
        self._servers.append(control)
        return ports, control.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for session in list(self.sessions):
            session.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # connection_lost of the sessions: they write their last lines
        if self._record >= 0:
            os.close(self._record)
            self._record = -1

    # -- what sessions ask -------------------------------------------------------------------------------------------

    def write(self, lines: bytes) -> None:
        if self._record >= 0:
            os.write(self._record, lines)

    def next_connection(self) -> int:
        self._connections += 1
        return self._connections

    def next_transaction(self) -> int:
        self._transactions += 1
        return self._transactions

    def script_of(self, address: str) -> Script:
        """Of the local part, else of the domain (exact, else the longest pattern)."""
        local, _, domain = address.rpartition("@")
        if "+" in local:
            script = of_local_part(local)
            if script is not PLAIN:
                return script
        if not self._domains:
            return PLAIN
        domain = domain.lower()
        found = self._found.get(domain)
        if found is None:
            found = self._domains.get(domain)
            if found is None:
                matching = sorted((p for p in self._domains if fnmatch.fnmatchcase(domain, p)), key=len)
                found = self._domains[matching[-1]] if matching else PLAIN
            self._found[domain] = found
        return found

    def is_old(self, address: str, seconds: float) -> bool:
        """Was this recipient first tried so long ago? The first question is the first try."""
        now = self.clock()
        first = self._first_seen.setdefault(address, now)
        return now != first and now - first >= seconds

    def tries(self, address: str, *, count: bool) -> int:
        """Which try of this recipient this is, from 1."""
        number = self._tries.get(address, 0) + 1
        if count:
            self._tries[address] = number
        return number

    def keep(self, post: Post, number: int, message: bytes) -> None:
        if self._keep is not None:
            (self._keep / f"{post.name}-{number:07d}.eml").write_bytes(message)

    def context(self, kind: str) -> ssl.SSLContext:
        return tls_context(kind)

    def start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- control -----------------------------------------------------------------------------------------------------

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := (await reader.readline()).decode().strip():
                writer.write(json.dumps(self._obey(line)).encode() + b"\n")
                await writer.drain()
        writer.close()

    def _obey(self, line: str) -> dict[str, Any]:
        word, *rest = line.split()
        try:
            if word == "counts":
                return {name: post.counts() for name, post in self.posts.items()}
            if word == "port" and rest and rest[0] in self.posts:
                self.posts[rest[0]].dress(parse("".join(rest[1:])))
                return {"ok": True}
            if word == "script" and rest:
                self._domains[rest[0]] = parse("".join(rest[1:]))
                self._found.clear()
                return {"ok": True}
            if word == "stop":
                self.stopped.set()
                return {"stopping": True}
        except ScriptError as error:
            return {"error": str(error)}
        return {"error": "counts, port NAME WORDS, script DOMAIN WORDS or stop"}


def _listener(host: str, port: int, rcvbuf: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # at the same port again after a SIGKILL
        if rcvbuf:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        listener.bind((host, port))
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


@functools.cache
def tls_context(kind: str) -> ssl.SSLContext:
    """A server's context with a certificate made now: good, expired, for a wrong name; or one nobody can agree with."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    with_rsa = kind in ("cipher", "old")  # only where the key exchange needs one: making it takes a tenth of a second
    key = rsa.generate_private_key(65537, 2048) if with_rsa else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sink.test")])
    host = "elsewhere.example" if kind == "wrong" else "sink.test"
    now = datetime.datetime.now(datetime.UTC)
    days = (-60, -30) if kind == "expired" else (-1, 30)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if kind == "cipher":  # RSA key exchange only: no client of today offers it
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-GCM-SHA256:@SECLEVEL=0")
    elif kind == "old":
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():  # that TLS 1.0 is out of date is the point
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
            context.maximum_version = ssl.TLSVersion.TLSv1
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # load_cert_chain takes files only
        file.write(certificate.public_bytes(serialization.Encoding.PEM) + secret)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _port(text: str) -> tuple[str, int, Script]:
    place, _, words = text.partition("=")
    name, _, port = place.partition(":")
    if not name or (port and not (port.isascii() and port.isdigit() and int(port) < 65536)):
        raise ScriptError(f"--port {text!r}: expected NAME[:PORT][=WORDS]")
    return name, int(port or 0), parse(words)


def _scripted(text: str) -> tuple[str, Script]:
    domain, equals, words = text.partition("=")
    if not domain or not equals:
        raise ScriptError(f"--script {text!r}: expected DOMAIN=WORDS")
    return domain.lower(), parse(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. 0 after stop or SIGTERM, 1 when a port is taken, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.sink", description="SMTP servers at fault")
    parser.add_argument(
        "--port", action="append", metavar="NAME[@HOST][:PORT][=WORDS]", help="repeatable; default: plain"
    )
    parser.add_argument("--script", action="append", default=[], metavar="DOMAIN=WORDS", help="may be repeated")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append a line of JSON for each thing")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep every message there, as PORT-NUMBER.eml")
    options = parser.parse_args(arguments)
    try:
        ports = [_port(text) for text in options.port or ["plain"]]
        scripts = dict(_scripted(text) for text in options.script)
    except ScriptError as error:
        print(f"sink: {error}", file=sys.stderr)
        return 2
    import uvloop

    try:
        return uvloop.run(_serve(ports, scripts, options.record, options.keep))
    except OSError as error:
        print(f"sink: {error.strerror or error}", file=sys.stderr)
        return 1


async def _serve(
    ports: Sequence[tuple[str, int, Script]], scripts: Mapping[str, Script], record: Path | None, keep: Path | None
) -> int:
    sink = Sink(ports, scripts, record=record, keep=keep)
    opened, control = await sink.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, sink.stopped.set)
    print(json.dumps({"ports": opened, "control": control, "pid": os.getpid()}), flush=True)
    await sink.stopped.wait()
    await sink.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
