"""Where the engine hands people's data to others, and that no other place of the sources opens a connection."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import dns.resolver
import pytest

from engine.outlets import outlets, resolvers
from engine.settings import EngineSettings
from policy.subprocessors import Data

ROOT = Path(__file__).resolve().parents[2]
MAIL = {Data.ADDRESS, Data.MESSAGE}

# Every file that opens a connection, starts a program or asks a resolver, and as what it is declared.
OPENS = {
    "engine/campaign/commands.py": "policy.redis_url, or the producer's own",
    "engine/campaign/preview.py": "engine.smarthost, engine.routes, the recipient's own server; asked in commands.py",
    "engine/cli/hosts.py": "policy.redis_url, to look",
    "engine/cli/install.py": "a socket's length is tried on this host",
    "engine/client.py": "the producer's Redis: upstream, not ours to declare",
    "engine/compiled.py": "the C compiler",
    "engine/delivery/connection.py": "engine.smarthost, engine.routes, the recipient's own server",
    "engine/delivery/lookup.py": "engine.dns.servers",
    "engine/ops/api.py": "policy.redis_url",
    "engine/outlets.py": "reads /etc/resolv.conf",
    "engine/supervisor.py": "our own processes",
    "engine/worker.py": "policy.redis_url",
    "policy/backup.py": "policy.sql_url: pg_dump; SQLite's own file",
    "policy/checkpoints.py": "policy.checkpoints_command: no data of people",
    "policy/cli/work.py": "policy.redis_url, to look",
    "policy/keysource.py": "policy.keys_command: names of keys",
    "policy/quarantine.py": "policy.redis_url, behind the writer's question",
    "policy/restoring.py": "policy.sql_url: psql; a copy on this host",
    "policy/rights/outbox.py": "policy.rights.smarthost",
    "policy/schema.py": "policy.sql_url",
    "policy/valkey.py": "policy.redis_url; the embedded server",
    "policy/wire.py": "the writer's socket on this host",
    "policy/writer.py": "policy.redis_url",
    "tracker/app.py": "policy.redis_url",
}
# Calls by their last name, whatever they are called on; by their last two; and alone, as an imported function.
METHODS = {
    "create_connection", "open_connection", "create_unix_connection", "open_unix_connection",
    "create_datagram_endpoint", "sock_connect", "getaddrinfo", "gethostbyname", "urlopen", "ClientSession",
    "from_url", "Popen", "create_subprocess_exec", "create_subprocess_shell", "sendto", "HTTPConnection",
    "HTTPSConnection", "AsyncResolver",
}  # fmt: skip
PAIRS = {
    "aiosmtplib.send", "aiosmtplib.SMTP", "smtplib.SMTP", "subprocess.run", "os.system", "sqlite3.connect",
    "valkey.connect", "_socket.connect", "probe.connect", "asyncresolver.Resolver", "resolver.Resolver",
    "asyncresolver.resolve", "resolver.resolve", "psycopg.connect",
}  # fmt: skip
ALONE = {"connect", "create_engine", "urlopen", "create_connection", "Redis", "Client"}


def settings(**other: Any) -> EngineSettings:
    return EngineSettings(**other)


def _opens(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = ast.unparse(node.func).split(".")
            if words[-1] in METHODS or ".".join(words[-2:]) in PAIRS or (len(words) == 1 and words[0] in ALONE):
                return True
    return False


@pytest.mark.parametrize(
    "source",
    ["await loop.create_connection(f, h)", "import redis\nredis.Redis.from_url(u)", "aiosmtplib.send(m)",
     "connect(url)", "dns.asyncresolver.resolve(d)", "self._socket.connect(a)", "asyncio.open_connection(h, p)"],
)  # fmt: skip
def test_a_way_out_is_seen(source: str) -> None:
    assert _opens(ast.parse(source, mode="exec") if "await" not in source else ast.parse(f"async def f():\n  {source}"))


@pytest.mark.parametrize("source", ["engine.connect()", "Path(x).resolve()", "resolve(people)", "self.send(x)"])
def test_what_only_sounds_like_one_is_not(source: str) -> None:
    assert not _opens(ast.parse(source))


def test_no_file_opens_a_connection_that_is_not_declared_here() -> None:
    opening = {
        path.relative_to(ROOT).as_posix()
        for floor in ("engine", "tracker", "policy")
        for path in (ROOT / floor).rglob("*.py")
        if _opens(ast.parse(path.read_text("utf-8")))
    }
    opening = {name for name in opening if not name.startswith("engine/rehearsal/")}  # talks to itself on loopback
    assert opening == set(OPENS), f"declare: {opening - set(OPENS)}, gone: {set(OPENS) - opening}"


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({}, []),
        ({"smarthost": {"host": "smtp.relay.example"}}, [("engine.smarthost.host", "smtp.relay.example", MAIL)]),
        (
            {"routes": {"*": "relay.example:25", "*.gov": "[2001:db8::1]:25", "one.example": "mx.one.example:25"}},
            [('engine.routes."*"', "relay.example", MAIL), ('engine.routes."*.gov"', "2001:db8::1", MAIL)],
        ),
        (
            {"dns": {"servers": ["9.9.9.9", "[2620:fe::fe]:53"]}},
            [("engine.dns.servers", "9.9.9.9", {Data.DOMAIN}), ("engine.dns.servers", "2620:fe::fe", {Data.DOMAIN})],
        ),
    ],
)
def test_smarthost_wide_routes_and_resolvers_are_outlets(how: dict[str, Any], wanted: list[Any]) -> None:
    assert [(one.setting, one.host, set(one.data)) for one in outlets(settings(**how))] == wanted


def test_the_machines_resolvers_are_told_where_the_settings_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        nameservers = ("8.8.8.8", "127.0.0.53")

    monkeypatch.setattr(dns.resolver, "Resolver", Machine)
    assert [(one.setting, one.host) for one in resolvers(settings())] == [
        ("/etc/resolv.conf", "8.8.8.8"),
        ("/etc/resolv.conf", "127.0.0.53"),
    ]
    assert list(resolvers(settings(dns={"servers": ["9.9.9.9"]}))) == []

    def nothing() -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.resolver, "Resolver", nothing)
    assert list(resolvers(settings())) == []
