"""DNS: the seam, and dnspython behind it.

What DNS said is a value: found, no data, no such domain, or trouble, which says nothing about the domain and is never
held against anybody (faults 3.2). tests/world/dns.py has the in-memory twin.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.resolver
from dns.nameserver import Do53Nameserver

from engine.settings import parse_server

SOON = 60.0  # seconds: how long "no" is believed where the answer does not say


class Status(enum.Enum):
    FOUND = "found"
    NODATA = "no data"
    NXDOMAIN = "no such domain"
    TROUBLE = "trouble"  # SERVFAIL, timeout, nonsense: says nothing about the domain


@dataclass(frozen=True, slots=True)
class Answer:
    """What DNS said: records as (preference, host) for MX and (0, address) for A and AAAA; ttl in seconds."""

    status: Status
    records: tuple[tuple[int, str], ...] = ()
    ttl: float = 0.0
    text: str = ""


class Dns(Protocol):
    """The seam to DNS; tests/world/dns.py has the in-memory twin."""

    async def query(self, name: str, kind: str) -> Answer:
        """kind: MX, A or AAAA. Names without the final dot, lower case. Never raises for what the network does."""


class SystemDns:
    """The seam through dnspython, with the resolvers of /etc/resolv.conf or those given, as ``address[:port]``."""

    def __init__(self, nameservers: list[str] | None = None, *, port: int = 53, lifetime: float = 10.0) -> None:
        self._resolver = dns.asyncresolver.Resolver(configure=nameservers is None)
        if nameservers is not None:
            self._resolver.nameservers = [Do53Nameserver(*parse_server(text, port)) for text in nameservers]
        self._resolver.lifetime = lifetime

    async def query(self, name: str, kind: str) -> Answer:
        try:
            answer = await self._resolver.resolve(name + ".", kind, raise_on_no_answer=False)
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
