"""Where a domain's mail goes: the site it belongs to, and the addresses that may be dialled.

Law: nothing is dialled that is not named by the configuration or an address on the public internet (faults 3.2);
trouble with DNS is never held against a recipient; a domain is called dead only when DNS said so twice, an hour apart.

1. `Resolver.resolve(domain)` answers a `Site` or a `NoSite`: route of the configuration (exact, else the longest
   pattern), else the smarthost, else MX by preference, else the domain itself (RFC 5321 5.1, S-09; null MX: S-10).
2. ``Site.name`` is the place that is paced: the sorted MX hosts, or the route; domains of one MX set share it.
3. ``Site.hosts`` are the addresses to dial, best preference first and equals shuffled, as IP literals: what was
   checked is what is dialled (DNS rebinding). `Site.target` picks one: the best by turns, the others after failures.

DNS answers are kept between MIN_TTL and MAX_TTL, trouble for TROUBLE_TTL, so that a dead resolver is asked twice a
minute a domain and not in a loop; simultaneous questions for one name are one question. Domains with the same MX
records share one `Site` object for as long as the addresses in it are believed: 40,000 domains have 200 of them.

Known limits: which domains were missing is remembered in this process only; at most 10 hosts and 8 addresses each.
"""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.delivery.connection import Target
from engine.delivery.dialable import is_public
from engine.delivery.lookup import Answer, Dns, Records, Status, SystemDns
from engine.settings import EngineSettings
from engine.smtp.words import Tls
from policy.events import Reason

SMTP_PORT = 25
MIN_TTL, MAX_TTL = 60.0, 6 * 3600.0  # seconds: TTL 0 must not mean a question a message, 2**31 not for ever
TROUBLE_TTL = 30.0
TROUBLE_LIMIT, LONGEST_WAIT = 3600.0, 300.0  # a resolver is mended within the hour, and then the queue is back soon
CONFIRM_AFTER = 3600.0  # seconds between two NXDOMAIN before the domain is called dead (faults 3.2)
MAX_HOSTS, MAX_ADDRESSES = 10, 8

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Site:
    """A place that takes mail for one or many domains. name: keys its pace; hosts: best first, never empty."""

    name: str
    hosts: tuple[Target, ...]
    tls: Tls = Tls.MAY

    def target(self, turn: int, failures: int = 0) -> Target:
        """What to dial now: the hosts of best preference by turns, each of them before the next preference (S-09).

        failures: how many were tried in this turn already; none comes twice before all had theirs.
        """
        best = sum(target.preference == self.hosts[0].preference for target in self.hosts)
        if failures < best:
            return self.hosts[(turn + failures) % best]
        return self.hosts[failures % len(self.hosts)]


@dataclass(frozen=True, slots=True)
class NoSite:
    """Nowhere to deliver now. permanent: the message has come to its end; else it is deferred."""

    permanent: bool
    reason: Reason
    enhanced: str
    text: str


@dataclass(frozen=True, slots=True)
class Route:
    """A target of the configuration, dialled as it is named, private addresses included."""

    host: str
    port: int
    tls: Tls
    implicit: bool = False
    login: tuple[str, str] | None = None


class RouteError(ValueError):
    """A route of the configuration that cannot be read."""


def parse_route(text: str) -> tuple[str, int]:
    """``host``, ``host:port``, ``[::1]`` or ``[::1]:port`` as (host, port). Raises RouteError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or str(SMTP_PORT)
        sound = bool(bracket) and _literal(host) is not None and (not rest or rest.startswith(":"))
    else:
        host, _, port = text.partition(":")
        port = port or str(SMTP_PORT)
        sound = bool(host)
    if not sound or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise RouteError(f"route {text!r}: expected host, host:port or [address]:port")
    return host.lower(), int(port)


class Resolver:
    """Domains to sites. For one event loop."""

    def __init__(
        self,
        seam: Dns,
        *,
        routes: Mapping[str, str] | None = None,
        smarthost: Route | None = None,
        tls: Tls = Tls.MAY,
        allow_private: bool = False,
        own_names: frozenset[str] = frozenset(),
        cache: int = 50_000,
        port: int = SMTP_PORT,
        clock: Callable[[], float] = time.monotonic,
        shuffle: Callable[[list[tuple[int, str]]], None] = random.shuffle,
    ) -> None:
        """routes: pattern to ``host:port``. own_names: MX hosts that are ourselves: they and what stands behind them
        would be a loop. port: of the hosts DNS names. Raises RouteError."""
        parsed = {pattern.lower(): Route(*parse_route(route), tls) for pattern, route in (routes or {}).items()}
        self._exact = {pattern: route for pattern, route in parsed.items() if "*" not in pattern}
        self._patterns = sorted((item for item in parsed.items() if "*" in item[0]), key=lambda item: -len(item[0]))
        self._dns = seam
        self._smarthost = smarthost
        self._tls = tls
        self._allow_private = allow_private
        self._own_names = own_names
        self._room = cache
        self._port = port
        self._clock = clock
        self._shuffle = shuffle
        self._sites: OrderedDict[str, tuple[float, Site | NoSite]] = OrderedDict()
        self._hosts: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self._sets: OrderedDict[Records, tuple[float, Site]] = OrderedDict()  # by the MX records, sorted
        self._troubled: OrderedDict[str, float] = OrderedDict()  # domain -> since when DNS could not say
        self._missing: OrderedDict[str, float] = OrderedDict()  # domain -> when DNS first said it is not there
        self._asking: dict[str, asyncio.Task[Site | NoSite]] = {}
        self._looking: dict[str, asyncio.Task[Answer]] = {}

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> Resolver:
        """As configured, asking the system's resolvers. Raises RouteError, OSError or KeyError (smarthost secret)."""
        host = settings.smarthost
        smarthost = None
        if host.host:
            login = (host.username, host.password()) if host.username else None
            tls = Tls.NEVER if host.tls == "none" else Tls.VERIFIED  # RFC 8314: a submission server can be named
            smarthost = Route(host.host.lower(), host.port, tls, host.tls == "implicit", login)
        return cls(
            SystemDns(settings.dns.servers or None, lifetime=settings.dns.timeout),
            routes=settings.routes,
            smarthost=smarthost,
            tls={"opportunistic": Tls.MAY, "required": Tls.MUST, "off": Tls.NEVER}[settings.tls],
            allow_private=settings.allow_private_targets,
            own_names=frozenset({settings.ehlo_name}),
            cache=settings.dns.cache_entries,
            port=settings.mx_port,
        )

    async def resolve(self, domain: str) -> Site | NoSite:
        """The site of an A-label domain. Never raises for what DNS does; a cached answer takes no turn of the loop."""
        held = self._sites.get(domain)
        if held is not None and self._clock() < held[0]:
            return held[1]
        task = self._asking.get(domain)
        if task is None:
            task = asyncio.create_task(self._ask(domain))
            self._asking[domain] = task
            task.add_done_callback(lambda _: self._asking.pop(domain, None))
        return await asyncio.shield(task)  # one caller's cancellation is not the others'

    def wait(self, domain: str) -> float:
        """Seconds to leave a domain alone because DNS cannot say where it is, as resolvers that are down come back;
        0.0 when it can, or could not for so long that it is the domain's own trouble: then it counts as an attempt."""
        since = self._troubled.get(domain)
        if since is None or (lasted := self._clock() - since) >= TROUBLE_LIMIT:
            return 0.0
        return min(max(TROUBLE_TTL, lasted / 4), LONGEST_WAIT) * (1.0 + 0.5 * random.random())

    def statistics(self) -> dict[str, int]:
        return {
            "sites": len(self._sites),
            "hosts": len(self._hosts),
            "mx_sets": len(self._sets),
            "asking": len(self._asking),
            "in_trouble": len(self._troubled),
        }

    # -- which hosts ------------------------------------------------------------------------------------------------

    async def _ask(self, domain: str) -> Site | NoSite:
        route = self._route(domain)
        if route is not None:
            lifetime, result = MIN_TTL, await self._of_route(route)
        else:
            answer = await self._dns.query(domain, "MX")
            lifetime, result = _lifetime(answer), await self._of_answer(domain, answer)
        if isinstance(result, NoSite) and result.reason is Reason.DNS:
            lifetime = TROUBLE_TTL
            if domain not in self._troubled:
                _keep(self._troubled, domain, self._clock(), self._room)
        else:
            self._troubled.pop(domain, None)
        _keep(self._sites, domain, (self._clock() + lifetime, result), self._room)
        return result

    def _route(self, domain: str) -> Route | None:
        route = self._exact.get(domain)
        if route is None:
            route = next((route for pattern, route in self._patterns if fnmatch.fnmatchcase(domain, pattern)), None)
        return route or self._smarthost

    async def _of_route(self, route: Route) -> Site | NoSite:
        answer = await self._addresses(route.host, trusted=True)
        if not answer.records:
            return NoSite(False, Reason.DNS, "4.4.3", "no address found for the host of the route")
        hosts = tuple(
            Target(route.host, address, route.port, 0, route.implicit, route.login) for _, address in answer.records
        )
        return Site(f"{route.host}:{route.port}", hosts, route.tls)

    async def _of_answer(self, domain: str, answer: Answer) -> Site | NoSite:
        if answer.status is Status.TROUBLE:
            return NoSite(False, Reason.DNS, "4.4.3", answer.text or "DNS trouble")
        if answer.status is Status.NXDOMAIN:
            return self._not_there(domain)
        if answer.status is Status.FOUND:
            self._missing.pop(domain, None)
            return await self._of_set(tuple(sorted(answer.records)))
        # no MX: the domain itself, if it has an address (RFC 5321 5.1)
        own = await self._addresses(domain)
        if own.status in (Status.NODATA, Status.NXDOMAIN):
            return self._not_there(domain)
        self._missing.pop(domain, None)
        return await self._reach([(0, domain)])

    async def _of_set(self, records: Records) -> Site | NoSite:
        """The site of these MX records, sorted."""
        held = self._sets.get(records)
        if held is not None and self._clock() < held[0]:
            return held[1]
        usable = self._usable(records)
        if isinstance(usable, NoSite):
            return usable
        site = await self._reach(usable)
        if isinstance(site, Site):
            # As long as the first of the addresses asked for; a literal has none, and is no answer of DNS.
            until = min((self._hosts[host][0] for _, host in usable if host in self._hosts), default=0.0)
            _keep(self._sets, records, (until, site), self._room)
        return site

    def _usable(self, records: Records) -> list[tuple[int, str]] | NoSite:
        hosts = [(preference, host) for preference, host in records if host not in ("", ".")]
        if not hosts:  # RFC 7505 (S-10): no connection, and it is the domain's own word
            return NoSite(True, Reason.NULL_MX, "5.1.10", "the domain takes no mail (null MX)")
        ours = [preference for preference, host in hosts if host in self._own_names]
        if ours:  # RFC 5321 5.1: what is not preferred to ourselves would be a loop
            hosts = [(preference, host) for preference, host in hosts if preference < min(ours)]
            if not hosts:
                return NoSite(True, Reason.BAD_DOMAIN, "5.4.6", "the best MX of the domain is this host: a loop")
        self._shuffle(hosts)
        hosts.sort(key=lambda host: host[0])
        return hosts[:MAX_HOSTS]

    async def _reach(self, hosts: list[tuple[int, str]]) -> Site | NoSite:
        """The addresses of these hosts that may be dialled. S-09: if none may, there is no falling back to A."""
        answers = await asyncio.gather(*(self._addresses(host) for _, host in hosts))
        found: list[Target] = []
        refused = doubt = False
        for (preference, host), answer in zip(hosts, answers, strict=True):
            doubt |= answer.status is Status.TROUBLE
            for _, text in answer.records[:MAX_ADDRESSES]:
                if self._allow_private or is_public(ipaddress.ip_address(text)):
                    found.append(Target(host, text, self._port, preference))
                else:
                    refused = True
        if found:
            return Site(",".join(sorted({host for _, host in hosts})), tuple(found), self._tls)
        if refused and not doubt:
            return NoSite(True, Reason.BAD_DOMAIN, "5.4.6", "every address of the domain is one that is never dialled")
        return NoSite(False, Reason.DNS, "4.4.3", "no address found for the hosts of the domain")

    def _not_there(self, domain: str) -> NoSite:
        now = self._clock()
        first = self._missing.get(domain)
        if first is None:
            _keep(self._missing, domain, now, self._room)
        elif now - first >= CONFIRM_AFTER:
            return NoSite(True, Reason.BAD_DOMAIN, "5.1.2", "no such domain, said twice")
        return NoSite(False, Reason.BAD_DOMAIN, "4.1.2", "no such domain; asked again before it is believed")

    # -- which addresses --------------------------------------------------------------------------------------------

    async def _addresses(self, host: str, *, trusted: bool = False) -> Answer:
        """A and AAAA of a host, IPv4 first. An MX must be a name: a literal counts only where we wrote it."""
        literal = _literal(host)
        if literal is not None:
            return Answer(Status.FOUND, ((0, literal),), MAX_TTL) if trusted else Answer(Status.NODATA)
        if host == "localhost":  # RFC 6761 6.3: never a question for DNS
            return Answer(Status.FOUND, ((0, "127.0.0.1"), (0, "::1")), MAX_TTL)
        held = self._hosts.get(host)
        if held is not None and self._clock() < held[0]:
            return held[1]
        task = self._looking.get(host)
        if task is None:
            task = asyncio.create_task(self._look(host))
            self._looking[host] = task
            task.add_done_callback(lambda _: self._looking.pop(host, None))
        return await asyncio.shield(task)

    async def _look(self, host: str) -> Answer:
        v4, v6 = await asyncio.gather(self._dns.query(host, "A"), self._dns.query(host, "AAAA"))
        records = v4.records + v6.records
        if records:
            answer = Answer(Status.FOUND, records, min(part.ttl for part in (v4, v6) if part.records))
        elif Status.TROUBLE in (v4.status, v6.status):
            answer = Answer(Status.TROUBLE, text=v4.text or v6.text)
        else:
            answer = v4
        _keep(self._hosts, host, (self._clock() + _lifetime(answer), answer), self._room)
        return answer


def _literal(host: str) -> str | None:
    """The address, if this is one as `ipaddress` reads it: 127.1 and 0x7f.1 are names here, and no MX has them."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _lifetime(answer: Answer) -> float:
    return TROUBLE_TTL if answer.status is Status.TROUBLE else min(max(answer.ttl, MIN_TTL), MAX_TTL)


def _keep(cache: OrderedDict[K, V], key: K, value: V, room: int) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > room:
        cache.popitem(last=False)
