"""Where the engine's settings make people's data leave to somebody who is not the recipient's own mail server (P-35).

    smarthost           addresses and messages
    routes with a star  the same: one server for many domains is a relay. A route for one domain names its own server
    dns.servers         domains of recipients; without them the machine's resolvers, which `resolvers` tells

Whether they may is the ground floor's question (policy.outlets, policy.subprocessors).
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.settings import EngineSettings, parse_server, parse_target
from policy.subprocessors import Data, Outlet

_MAIL = frozenset({Data.ADDRESS, Data.MESSAGE})
_LOOKUPS = frozenset({Data.DOMAIN})


def outlets(settings: EngineSettings) -> Iterator[Outlet]:
    """What the settings name."""
    if settings.smarthost.host:
        yield Outlet("engine.smarthost.host", settings.smarthost.host, _MAIL)
    for pattern, target in settings.routes.items():
        if pattern.startswith("*"):
            yield Outlet(f'engine.routes."{pattern}"', parse_target(target)[0], _MAIL)
    for server in settings.dns.servers:
        yield Outlet("engine.dns.servers", parse_server(server)[0], _LOOKUPS)


def resolvers(settings: EngineSettings) -> Iterator[Outlet]:
    """What /etc/resolv.conf names, where the settings leave it to the machine: to warn of, its owner may be another.
    Reads the file."""
    import dns.resolver

    if settings.dns.servers:
        return
    try:
        servers = dns.resolver.Resolver().nameservers
    except (dns.resolver.NoResolverConfiguration, OSError):
        return
    for server in servers:
        if isinstance(server, str) and "://" not in server:
            yield Outlet("/etc/resolv.conf", server, _LOOKUPS)
