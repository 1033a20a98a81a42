"""A real DNS server of our own on loopback, over UDP and TCP, that answers as it is told, nonsense included.

    async with name_server() as dns:
        dns.zone["a.example"] = {"MX": ["10 mx.a.example."], "A": ["192.0.2.1"]}
        dns.answers["bad.example"] = lambda question: b"nonsense"     bytes, or None: no answer at all
        dns.dead = True                                               nobody is answered

Known limits: no recursion, no EDNS; it believes every packet it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

Answer = Callable[[dns.message.Message], bytes | None]
LONGEST = 512  # bytes of an answer over UDP (RFC 1035 2.3.4); the rest is asked for over TCP


class NameServer:
    """asked: by (name, kind); zone: records by kind as text; answers: by name, instead of the zone."""

    def __init__(self) -> None:
        self.zone: dict[str, Mapping[str, Sequence[str]]] = {}
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.over_tcp = 0
        self.ttl = 300
        self.dead = False
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tcp = await asyncio.start_server(self._stream, "127.0.0.1", 0)
        self.port = self._tcp.sockets[0].getsockname()[1]
        self._udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), ("127.0.0.1", self.port))

    async def stop(self) -> None:
        self._udp.close()
        self._tcp.close()
        for writer in list(self._writers):
            writer.close()

    def answer(self, wire: bytes) -> bytes | None:
        try:
            question = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return None
        name = question.question[0].name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked[name, kind] += 1
        if self.dead:
            return None
        if name in self.answers:
            return self.answers[name](question)
        return self.reply(question).to_wire(max_size=65535)

    def reply(self, question: dns.message.Message) -> dns.message.Message:
        """As the zone has it."""
        message = dns.message.make_response(question, recursion_available=True)
        asked = question.question[0]
        kind = dns.rdatatype.to_text(asked.rdtype)
        records = self.zone.get(asked.name.to_text(omit_final_dot=True).lower())
        if records is None:
            message.set_rcode(dns.rcode.NXDOMAIN)
        elif records.get(kind):
            message.answer.append(dns.rrset.from_text_list(asked.name, self.ttl, "IN", kind, list(records[kind])))
        return message

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                length = int.from_bytes(await reader.readexactly(2), "big")
                self.over_tcp += 1
                told = self.answer(await reader.readexactly(length))
                if told is None:
                    break
                writer.write(len(told).to_bytes(2, "big") + told)
                await writer.drain()
        self._writers.discard(writer)
        writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # CPython 3.11's own is one by duck only

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        told = self._server.answer(data)
        if told is None:
            return
        if len(told) > LONGEST and told[2] & 0x80:
            short = dns.message.make_response(dns.message.from_wire(data))
            short.flags |= dns.flags.TC
            told = short.to_wire()
        self._transport.sendto(told, address)


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    server = NameServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
