"""Does a delayed acknowledgement (40 ms on Linux) hold up a conversation with Postfix's smtpd? Histograms of replies.

    python -m benchmarks.stalls [--messages 400] [--bytes 33000]         root, and Debian's postfix, are needed

1. `smtpd`: a Postfix of its own in a temporary folder, on a free port of the loopback, that throws all mail away.
2. `ours`: the product's own connection (DATA; body n shares its flight with MAIL, RCPT, DATA of n+1), and one message
   at a time with a rest behind each, as transactional mail comes.
3. `chunked`: the same messages by BDAT (RFC 3030) over a plain socket, one and four in flight. A message behind another
   begins with RSET: where the one before it was refused, its transaction may still be open (RFC 3030 2).

Printed: milliseconds from the last octet of a message to its reply, how many of each, and one line of JSON. On a busy
machine of two cores, 33 kB: DATA 343 messages a second, p50 1.9 ms, nothing at 40 ms; BDAT one in flight 22 a second,
299 of 300 messages at 40 ms; four in flight 146 a second, half of them. That is why `engine.smtp` has no BDAT.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import uvloop

from engine.delivery.connection import Closed, Connection, Outbound, Target, Terms, Verdict
from engine.smtp.words import Fate, Tls

BINS = (1.0, 2.0, 5.0, 10.0, 20.0, 35.0, 60.0, 100.0)  # ms; delayed acknowledgements come between 35 and 60
STALLED = 35.0
REST = 0.003  # seconds between one message and the next where they come one at a time
_LINE = b'<td style=3D"padding:0 0 16px 0;font-family:Arial">Hello there dear reader of th=\r\n'
_HEAD = b"Subject: stalls\r\nFrom: <a@us.test>\r\nTo: <b@them.test>\r\n\r\n"
_MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/data
maillog_file = {folder}/mail.log
maillog_file_prefixes = {folder}
myhostname = stalls.test
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
mydestination =
default_transport = discard:
relay_transport = discard:
smtpd_recipient_restrictions = permit_mynetworks,reject
smtpd_client_connection_rate_limit = 0
"""
_MASTER = """\
{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


@contextlib.contextmanager
def smtpd() -> Iterator[int]:
    """The port of a Postfix that is started here and stopped behind."""
    program = shutil.which("postfix", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None or os.getuid() != 0:
        raise SystemExit("stalls: needs root and Debian's postfix")
    folder = Path(tempfile.mkdtemp(prefix="stalls-", dir="/tmp"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    folder.chmod(0o755)
    for name in ("conf", "spool", "data"):
        (folder / name).mkdir()
    shutil.chown(folder / "data", "postfix")
    (folder / "conf" / "main.cf").write_text(_MAIN.format(folder=folder))
    (folder / "conf" / "master.cf").write_text(_MASTER.format(port=port))
    command = [program, "-c", str(folder / "conf")]
    subprocess.run([*command, "start"], check=True, capture_output=True)
    try:
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
                break
            time.sleep(0.05)
        yield port
    finally:
        subprocess.run([*command, "stop"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


class _Owner:
    """Offers messages, all at once or one when it is let, and notes when the dot left and its reply came."""

    def __init__(self, messages: int, data: bytes, *, single: bool) -> None:
        self.left, self._data, self._single = messages, data, single
        self._left_at: dict[object, float] = {}
        self.waits: list[float] = []
        self.may_go = True
        self.answered = asyncio.Event()
        self.closed: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()

    def next_message(self, connection: Connection) -> Outbound | None:
        if not self.left or (self._single and not self.may_go):
            return None
        self.left -= 1
        self.may_go = False
        return Outbound(self.left, "a@us.test", f"r{self.left}@them.test", self._data)

    def on_intent(self, connection: Connection, messages: list[Outbound]) -> None:
        self._left_at.update((message.key, time.perf_counter()) for message in messages)

    def on_verdict(self, connection: Connection, message: Outbound, verdict: Verdict) -> None:
        assert verdict.fate is Fate.DELIVERED, verdict
        self.waits.append(time.perf_counter() - self._left_at.pop(message.key))
        self.answered.set()

    def on_void(self, connection: Connection, message: Outbound) -> None:
        raise AssertionError("nothing is void here")

    def on_idle(self, connection: Connection) -> None:
        if not self.left:
            connection.quit()

    def on_closed(self, connection: Connection, closed: Closed) -> None:
        self.closed.set_result(closed)


async def ours(port: int, messages: int, data: bytes, *, single: bool) -> list[float]:
    """Seconds from dot to reply through the product's connection."""
    owner = _Owner(messages, data, single=single)
    opened = await Connection.open(Target("smtpd", "127.0.0.1", port), owner, Terms("us.example", Tls.NEVER))
    assert isinstance(opened, Connection), opened
    opened.wake()
    while single and owner.left:
        await owner.answered.wait()
        owner.answered.clear()
        await asyncio.sleep(REST)
        owner.may_go = True
        opened.wake()
    await owner.closed
    return owner.waits


def chunked(port: int, messages: int, data: bytes, depth: int) -> list[float]:
    """The same by BDAT, so many in flight."""
    waits: list[float] = []
    left_at: list[float] = []
    with socket.create_connection(("127.0.0.1", port)) as peer, peer.makefile("rb") as replies:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def hear() -> bytes:
            line = replies.readline()
            while line[3:4] == b"-":
                line = replies.readline()
            assert line[:1] == b"2", line
            return line

        hear()
        peer.sendall(b"EHLO us.example\r\n")
        hear()
        for number in range(messages):
            while len(left_at) < min(messages, number + depth):
                each = len(left_at)
                reset = b"RSET\r\n" if depth > 1 else b""
                envelope = b"MAIL FROM:<a%d@us.test>\r\nRCPT TO:<r%d@them.test>\r\n" % (each, each)
                peer.sendall(b"%b%bBDAT %d LAST\r\n%b" % (reset, envelope, len(data), data))
                left_at.append(time.perf_counter())
            for _ in range(4 if depth > 1 else 3):
                hear()
            waits.append(time.perf_counter() - left_at[number])
    return waits


def _row(name: str, waits: list[float], seconds: float) -> dict[str, object]:
    found = sorted(wait * 1000 for wait in waits)
    bins = Counter(bisect.bisect_left(BINS, wait) for wait in found)
    shown = "  ".join(f"{bins[place]:5d}" for place in range(len(BINS) + 1))
    print(f"{name:24}{shown}  {len(found) / seconds:7.0f}/s")
    at = {"p50_ms": found[len(found) // 2], "p99_ms": found[int(len(found) * 0.99)]}
    stalled = sum(STALLED < wait <= 60.0 for wait in found)
    return {"messages": len(found), "stalled": stalled, **{key: round(value, 2) for key, value in at.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Delayed acknowledgements against Postfix's smtpd.")
    parser.add_argument("--messages", type=int, default=400)
    parser.add_argument("--bytes", type=int, default=33_000)
    options = parser.parse_args()
    data = _HEAD + _LINE * max(1, options.bytes // len(_LINE))
    print(f"{'dot to reply, ms':24}" + "  ".join(f"<={edge:3.0f}" for edge in BINS) + "   more")
    rows: dict[str, dict[str, object]] = {}
    with smtpd() as port:
        for name, single in (("DATA, one on another", False), ("DATA, one at a time", True)):
            began = time.perf_counter()
            waits = uvloop.run(ours(port, options.messages, data, single=single))
            rows[name] = _row(name, waits, time.perf_counter() - began)
        for depth in (1, 4):
            name = f"BDAT, {depth} in flight"
            began = time.perf_counter()
            waits = chunked(port, options.messages, data, depth)
            rows[name] = _row(name, waits, time.perf_counter() - began)
    print(json.dumps({"bench": "stalls", "bytes": len(data), **rows}))


if __name__ == "__main__":
    main()
