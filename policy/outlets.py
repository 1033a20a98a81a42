"""Where this floor's settings make people's data leave, and the question before every start: may it? (P-35)

`outlets` names them for the ground floor; `check` is asked by every process before it opens a connection, with the
outlets of its floor, and by `sales-push up`, `config --check`, `submit` and `render --send-test`. What a setting leaves
to the machine is not here: a resolver of /etc/resolv.conf (engine.outlets warns of it), libpq's environment.

Known limits: commands that only look (hosts, jobs, status) ask the stores without this question: they bring nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date
from urllib.parse import parse_qs, urlsplit

from policy import subprocessors
from policy.settings import ConfigError, PolicySettings
from policy.subprocessors import Data, Outlet, Registry

# Audiences wait in Redis for the intake, then recipients sealed: whoever runs it can read the first.
_QUEUE = frozenset({Data.ADDRESS, Data.MESSAGE})
_LEDGER = frozenset({Data.LEDGER})
_LETTERS = frozenset({Data.ADDRESS, Data.LETTER})


def outlets(settings: PolicySettings) -> Iterator[Outlet]:
    """Of the ground floor."""
    for host in _hosts(settings.redis_url):
        yield Outlet("policy.redis_url", host, _QUEUE)
    for host in _hosts(settings.sql_url):
        yield Outlet("policy.sql_url", host, _LEDGER)
    if settings.rights.smarthost:
        yield Outlet("policy.rights.smarthost", settings.rights.smarthost.rpartition(":")[0], _LETTERS)


def registry(settings: PolicySettings) -> Registry:
    return Registry(settings.subprocessors, settings.own_hosts, settings.home_countries)


def check(settings: PolicySettings, others: Iterable[Outlet], today: date) -> None:
    """Of this floor's outlets and those of others. Raises ConfigError, a line each for what would leave to somebody
    whom the registry does not allow it."""
    if problems := list(subprocessors.undeclared([*outlets(settings), *others], registry(settings), today)):
        raise ConfigError(problems)


def _hosts(url: str) -> Iterator[str]:
    """Of a URL; libpq takes several, and takes them from the query too. A socket has none."""
    parts = urlsplit(url)
    if not url or parts.scheme.partition("+")[0] in ("unix", "sqlite"):
        return
    named = parts.netloc.rpartition("@")[2].split(",")
    for name in ("host", "hostaddr"):
        for value in parse_qs(parts.query).get(name, []):
            named += value.split(",")
    for text in named:
        host = _without_port(text)
        if host and not host.startswith(("/", "%2f", "%2F")):
            yield host


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text if text.count(":") > 1 else text.partition(":")[0]
