"""What fault journeys look at: a sink that can hold its replies, a worker's CPU seconds, log lines and journal.

    async with troubled(stack) as ward:                 a MailWorld, its worker, the sink behind ``*.held.test``
        async with ward.campaign("one", 120):           submitted, and every line of the worker stands behind a dot
            ...break something...
            await ward.wire_finishes()                  dots are answered; what was begun comes to its end
            await ward.nothing_new()                    nobody else was asked for, the journal knows all, nothing spins
            ...mend it...
                                                        at the end of the block: everybody once, and in the ledger

The sink parses what arrives at once and counts it there and then, even while its replies wait: what it has counted
is what was on the wire.

Known limits: Linux only (/proc); the sink speaks what the engine says and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.queue import journal
from policy.events import Kind
from policy.gate import PERMIT_SECONDS
from policy.vitals import read_all
from tests.world.mail import ROOT, MailWorld, job, mail_world, rows

_OFFERS = ("held.test", "PIPELINING", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "SIZE 50000000")
_HELLO = b"".join(f"250{'-' if word != _OFFERS[-1] else ' '}{word}\r\n".encode() for word in _OFFERS)
CPU_SHARE = 0.6  # of one core, while a fault lasts: the machine is shared, and a loop that spins takes a whole one
LINES_A_SECOND = 12  # log lines of a worker in trouble: every loop of it may say once a second what it waits for


class HeldSink:
    """An SMTP server in this process. asked, stored: by address, how often named in RCPT and taken with a 250."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.bodies = 0
        self.opened = 0
        self.open: set[_Session] = set()
        self.port = 0
        self.holding = False
        self._server: asyncio.Server | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Session(self), host, port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for session in list(self.open):
            session.abort()

    def hold(self) -> None:
        """From now on no final dot is answered."""
        self.holding = True

    def release(self) -> None:
        self.holding = False
        for session in list(self.open):
            session.answer()

    @property
    def waiting(self) -> int:
        """Connections whose client waits for the reply to a dot."""
        return sum(session.is_held for session in self.open)

    @property
    def busy(self) -> int:
        """Connections in the middle of a transaction."""
        return sum(session.is_busy for session in self.open)


class _Session(asyncio.Protocol):
    def __init__(self, sink: HeldSink) -> None:
        self._sink = sink
        self._data = b""
        self._in_body = False
        self._to: list[str] = []
        self._replies: deque[tuple[bytes, list[str]]] = deque()  # (reply, who is stored when it leaves)

    @property
    def is_held(self) -> bool:
        return bool(self._replies) and bool(self._replies[0][1])

    @property
    def is_busy(self) -> bool:
        return bool(self._replies or self._to or self._in_body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sink.open.add(self)
        self._sink.opened += 1
        transport.write(b"220 held.test ESMTP\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._sink.open.discard(self)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._data += data
        while self._step():
            pass
        self.answer()

    def answer(self) -> None:
        while self._replies:
            reply, stored = self._replies[0]
            if stored and self._sink.holding:
                return
            self._replies.popleft()
            self._sink.stored.update(stored)
            self._transport.write(reply)

    def _step(self) -> bool:
        end = b"\r\n.\r\n" if self._in_body else b"\r\n"
        head, found, rest = self._data.partition(end)
        if not found:
            return False
        self._data = rest
        if self._in_body:
            self._in_body = False
            self._sink.bodies += 1
            self._replies.append((b"250 2.0.0 stored\r\n", self._to))
            self._to = []
        else:
            self._command(head)
        return True

    def _command(self, line: bytes) -> None:
        verb = line[:4].upper()
        reply = b"250 2.0.0 ok\r\n"
        if verb == b"EHLO":
            reply = _HELLO
        elif verb == b"RCPT":
            address = line.partition(b"<")[2].partition(b">")[0].decode()
            self._sink.asked[address] += 1
            self._to.append(address)
        elif verb == b"DATA":
            self._in_body = True
            reply = b"354 go ahead\r\n"
        elif verb == b"RSET":
            self._to = []
        elif verb == b"QUIT":
            self._replies.append((b"221 2.0.0 bye\r\n", []))
            self.answer()
            self._transport.close()
            return
        self._replies.append((reply, []))


def cpu_seconds(pid: int) -> float:
    """User and system time a living process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def until(true: Callable[[], bool], seconds: float = 30.0, say: Callable[[], object] = lambda: "") -> None:
    """Wait for something nothing can tell us of; fails with what `say` says."""
    try:
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"did not happen within {seconds:g} s: {say()}") from None


@dataclass
class Ward:
    """A world with one worker that is about to be in trouble."""

    mail: MailWorld
    sink: HeldSink
    journals: Path | None = None  # where the folders of the journals are seen from here, when not at their place
    _asked: int = 0
    _cpu: float = 0.0
    _lines: int = 0
    _began: float = 0.0
    _stored: set[str] = field(default_factory=set)

    @property
    def worker(self) -> asyncio.subprocess.Process:
        return self.mail.workers[-1]

    @property
    def asked_before(self) -> int:
        """How many were asked for when the fault began."""
        return self._asked

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.mail.folder.glob("worker-*.log")))

    async def start(self, prelude: str = "", *, wrapper: Sequence[str] = ()) -> asyncio.subprocess.Process:
        """A worker with something done to it first: statements of Python, or a program it runs under."""
        code = (
            f"{prelude}import sys; from pathlib import Path; from engine.worker import run_worker; "
            "sys.exit(run_worker(0, Path(sys.argv[1])))"
        )
        with (self.mail.folder / "worker-0.log").open("ab") as log:
            worker = await asyncio.create_subprocess_exec(
                *wrapper, sys.executable, "-c", code, str(self.mail.config), cwd=ROOT, stderr=log, stdout=log
            )
        self.mail.workers.append(worker)
        return worker

    @property
    def news(self) -> str:
        """What it has logged since the fault began."""
        return "".join(self.log.splitlines(keepends=True)[self._lines :])

    async def until(self, true: Callable[[], bool], seconds: float = 30.0) -> None:
        """`until`, as long as the worker lives."""

        def alive_and_true() -> bool:
            assert self.worker.returncode is None, self.log[-5000:]
            return true()

        await until(alive_and_true, seconds, lambda: self.log[-5000:])

    async def says(self, name: str, value: float) -> None:
        """Until its statistics say so."""
        await self.until(lambda: self._figure(name) == value)

    def _figure(self, name: str) -> object:
        return next((sign.numbers.get(name) for sign in read_all(self.mail.folder) if sign.role == "engine"), None)

    def journalled(self) -> int:
        """Deliveries in the journal files of the worker."""
        logs = journal.read_folder((self.journals or self.mail.folder / "journal") / "0")
        return sum(
            isinstance(record, journal.Outcome) and record.kind == Kind.DELIVERED
            for log in logs
            for record in log.records
        )

    @contextlib.asynccontextmanager
    async def campaign(self, name: str, people: int = 160, seconds: float = 60.0) -> AsyncIterator[None]:
        """Submitted; everything the worker began stands behind its dot, and nothing moves. Afterwards everybody has
        been delivered exactly once and the ledger says so."""
        self.sink.hold()
        domain = f"{name.replace('_', '-')}.held.test"
        recipients = rows(people, domain)
        await self.mail.submit(job(name), recipients)
        await self.until(lambda: self.sink.waiting >= 2)
        await self._at_rest()
        self.begin()
        yield
        self.sink.release()
        status = await self.mail.finished(name, seconds)
        assert status.counts == {"delivered": people}, self.log[-3000:]
        got = Counter({address: n for address, n in self.sink.stored.items() if address.endswith(domain)})
        assert got == Counter(row["address"] for row in recipients), "exactly once each"

    async def _at_rest(self) -> None:
        """Until no new command has come for half a second: all lines stand behind their dots."""
        last, quiet = -1, 0
        while quiet < 25:
            await asyncio.sleep(0.02)
            now = sum(self.sink.asked.values()) + self.sink.bodies + self.sink.opened
            quiet = quiet + 1 if now == last else 0
            last = now

    def begin(self) -> None:
        """The fault begins here."""
        self._asked = sum(self.sink.asked.values())
        self._stored = set(self.sink.stored)
        self._cpu = cpu_seconds(self.worker.pid)
        self._lines = self.log.count("\n")
        self._began = asyncio.get_running_loop().time()

    async def wire_finishes(self) -> None:
        """The Permits of what was written before are void by now; the dots are answered, and the lines come to rest."""
        await asyncio.sleep(2 * PERMIT_SECONDS)  # a law about time, not a synchronisation: until then it could be sent
        self.sink.release()
        await self.until(lambda: not self.sink.busy)

    async def nothing_new(self, seconds: float = 1.0) -> None:
        """Nobody was asked for since the fault began, the journal has all that was answered, and nothing spins."""
        await asyncio.sleep(seconds)  # the fault goes on for so long
        assert self.worker.returncode is None, self.log[-3000:]
        assert sum(self.sink.asked.values()) == self._asked, "no new attempt"
        assert self.sink.bodies == sum(self.sink.stored.values()), "what was begun is finished"
        answered = len(set(self.sink.stored) - self._stored)
        assert answered >= 2
        assert self.journalled() >= answered
        self.nothing_spins()

    def nothing_spins(self) -> None:
        lasted = asyncio.get_running_loop().time() - self._began
        used = cpu_seconds(self.worker.pid) - self._cpu
        assert used < CPU_SHARE * lasted, f"{used:.2f} s of CPU in {lasted:.1f} s"
        lines = self.log.count("\n") - self._lines
        assert lines < LINES_A_SECOND * lasted + 10, self.log[-3000:]


@contextlib.asynccontextmanager
async def troubled(
    *,
    settings: Sequence[tuple[str, str]] = (),
    policy: str = "",
    start: bool = True,
    before: Callable[[MailWorld], None] = lambda mail: None,
    tail: str = "",
) -> AsyncIterator[Ward]:
    """settings: replacements in the configuration file; policy: lines for its table [policy]; tail: lines for its end;
    before: called with the world before the worker starts."""
    async with contextlib.AsyncExitStack() as stack:
        sink = HeldSink()
        await sink.start()
        stack.push_async_callback(sink.stop)
        mail = await stack.enter_async_context(mail_world(others={"held": sink.port}))
        text = mail.config.read_text()
        for old, new in settings:
            assert old in text, old
            text = text.replace(old, new)
        mail.config.write_text(text.replace("[policy]\n", f"[policy]\n{policy}", 1) + tail)
        before(mail)
        ward = Ward(mail, sink)
        if start:
            await mail.start_worker()
        yield ward
