"""DNS: the seam, and what is behind it: a short way for plain answers, dnspython for everything else.

What DNS said is a value: found, no data, no such domain, or trouble, which says nothing about the domain and is never
held against anybody (faults 3.2). tests/world/dns.py has the in-memory twin.

A question goes once over UDP to the first resolver and its answer is read by `dnswire`; what is late, truncated, an
error, refused or not plain is asked again by dnspython, with its repetitions, its other resolvers and TCP. To a
resolver on this host all questions share a socket; to another each has its own, with a port and a number that nobody
can foresee (RFC 5452 9.2), and only messages from that resolver arrive at it.
"""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import random
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.resolver
from dns.nameserver import Do53Nameserver

from engine.delivery import dnswire
from engine.settings import parse_server

SOON = 60.0  # seconds: how long "no" is believed where the answer does not say
FIRST_TRY = 2.0  # seconds, and never more than a third of what a lookup may take: dnspython, too, waits so long
LONGEST = 4096  # octets of a datagram that are read; a plain answer has 512 at most (RFC 1035 4.2.1)
AT_ONCE = 128  # questions on one socket: a buffer of the kernel holds 277 of either side (212,992 octets, 768 each)


Records = dnswire.Records


class Status(enum.Enum):
    FOUND = "found"
    NODATA = "no data"
    NXDOMAIN = "no such domain"
    TROUBLE = "trouble"  # SERVFAIL, timeout, nonsense: says nothing about the domain


@dataclass(frozen=True, slots=True)
class Answer:
    """What DNS said: records as (preference, host) for MX and (0, address) for A and AAAA; ttl in seconds."""

    status: Status
    records: Records = ()
    ttl: float = 0.0
    text: str = ""


class Dns(Protocol):
    """The seam to DNS; tests/world/dns.py has the in-memory twin."""

    async def query(self, name: str, kind: str) -> Answer:
        """kind: MX, A or AAAA. Names without the final dot, lower case. Never raises for what the network does."""


class SystemDns:
    """The seam, with the resolvers of /etc/resolv.conf or those given, as ``address[:port]``. For one event loop."""

    def __init__(self, nameservers: list[str] | None = None, *, port: int = 53, lifetime: float = 10.0) -> None:
        self._resolver = dns.asyncresolver.Resolver(configure=nameservers is None)
        if nameservers is not None:
            self._resolver.nameservers = [Do53Nameserver(*parse_server(text, port)) for text in nameservers]
        self._resolver.lifetime = lifetime
        self._lifetime = lifetime
        self._first = _first(self._resolver)
        self._near = self._first is not None and ipaddress.ip_address(self._first[0]).is_loopback
        self._line: _Line | None = None

    async def query(self, name: str, kind: str) -> Answer:
        until = time.monotonic() + self._lifetime
        answer = await self._plain(name, kind)
        return answer if answer is not None else await self._thorough(name, kind, max(0.1, until - time.monotonic()))

    async def _plain(self, name: str, kind: str) -> Answer | None:
        """None: to be asked again."""
        asked = dnswire.question(name, kind, 0)
        if asked is None or self._first is None:
            return None
        try:
            line = self._line_of(self._first)
            told = await line.ask(asked, min(FIRST_TRY, self._lifetime / 3))
        except OSError:  # TimeoutError is one
            return None
        said = dnswire.read(asked, told)
        if said is None:
            return None
        is_there, records, ttl = said
        if records:
            return Answer(Status.FOUND, records, float(ttl))
        return Answer(Status.NODATA if is_there else Status.NXDOMAIN, ttl=SOON)

    def _line_of(self, server: tuple[str, int]) -> _Line:
        if not self._near:
            return _Line(server, most=1)
        if self._line is None or not self._line.is_open:
            self._line = _Line(server, most=AT_ONCE)
        return self._line

    async def _thorough(self, name: str, kind: str, lifetime: float) -> Answer:
        try:
            answer = await self._resolver.resolve(name + ".", kind, raise_on_no_answer=False, lifetime=lifetime)
        except dns.resolver.NXDOMAIN:
            return Answer(Status.NXDOMAIN, ttl=SOON)
        except (dns.exception.DNSException, OSError, ValueError) as error:
            return Answer(Status.TROUBLE, text=type(error).__name__)
        if answer.response.flags & dns.flags.TC:  # cut short over TCP too: what is missing is not known to be missing
            return Answer(Status.TROUBLE, text="Truncated")
        if answer.rrset is None:
            return Answer(Status.NODATA, ttl=SOON)
        if kind == "MX":
            records = tuple((rr.preference, rr.exchange.to_text(omit_final_dot=True).lower()) for rr in answer.rrset)
        else:
            records = tuple((0, rr.address) for rr in answer.rrset)
        return Answer(Status.FOUND, records, float(answer.rrset.ttl))


def _first(resolver: dns.asyncresolver.Resolver) -> tuple[str, int] | None:
    """The first of the resolvers, if it is asked by plain DNS (not over HTTPS)."""
    for server in resolver.nameservers[:1]:
        address = server.address if isinstance(server, Do53Nameserver) else str(server)
        port = server.port if isinstance(server, Do53Nameserver) else resolver.port
        with suppress(ValueError):
            return str(ipaddress.ip_address(address)), port
    return None


class _Line:
    """A connected UDP socket and the questions that wait on it; closed when the last of them has its answer."""

    def __init__(self, server: tuple[str, int], most: int) -> None:
        """Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(most)
        self._waiting: dict[int, tuple[bytes, asyncio.Future[bytes]]] = {}
        self._users = 0
        self._socket = socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect(server)
            self._loop.add_reader(self._socket, self._read)
        except BaseException:
            self._socket.close()
            raise

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    async def ask(self, asked: bytes, seconds: float) -> bytes:
        """The message that answers. Raises OSError, TimeoutError among them."""
        self._users += 1
        try:
            async with self._room:
                return await self._ask(asked, seconds)
        finally:
            self._users -= 1
            if not self._users:
                self._close()

    async def _ask(self, asked: bytes, seconds: float) -> bytes:
        number = _random.getrandbits(16)
        while number in self._waiting:
            number = _random.getrandbits(16)
        asked = number.to_bytes(2, "big") + asked[2:]
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting[number] = asked, answer
        late = self._loop.call_later(seconds, _too_late, answer)
        try:
            self._socket.send(asked)
            return await answer
        finally:
            late.cancel()
            del self._waiting[number]

    def _read(self) -> None:
        try:
            while True:
                told = self._socket.recv(LONGEST)
                asked, answer = self._waiting.get(int.from_bytes(told[:2], "big"), (b"", None))
                # Whatever else comes is not for us, and the answer may still follow
                if answer is not None and not answer.done() and dnswire.answers(asked, told):
                    answer.set_result(told)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:  # such as: nobody listens there (ICMP)
            for _, answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(OSError(error.errno, error.strerror))

    def _close(self) -> None:
        if self.is_open:
            self._loop.remove_reader(self._socket)
            self._socket.close()


def _too_late(answer: asyncio.Future[bytes]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


_random = random.SystemRandom()
