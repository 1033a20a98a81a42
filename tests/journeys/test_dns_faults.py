"""DNS in trouble, each row of faults.md 3.2: over real UDP and TCP, through dnspython, and with a real worker.

Law: what DNS cannot say is never held against anybody: deferred, not bounced, and nobody is suppressed for it.

tests/engine/test_site.py proves these rows against a zone in memory: SERVFAIL and timeout are temporary; NXDOMAIN
is believed the second time, an hour later, and a domain that came back is forgiven; no MX, so A or AAAA; null MX;
dangling MX; MX that names localhost, private, link-local or embedded addresses, or ourselves; caps on MX and
addresses; TTL 0 and 2^31; equal preferences shuffled. Here is what needs a real resolver or a whole queue.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from sqlalchemy import func, select

from engine.delivery.lookup import Status, SystemDns
from engine.delivery.site import MAX_TTL, MIN_TTL, NoSite, Resolver, Site
from policy.events import Reason
from policy.schema import open_store, suppression
from tests.world.mail import job, rows
from tests.world.name_server import NameServer, name_server
from tests.world.trouble import Ward, troubled, until

V4 = "93.184.216.34"
SOON = 0.25  # seconds of a lookup that is not to be answered


def asking(server: NameServer, patience: float = 10.0) -> SystemDns:
    return SystemDns([f"127.0.0.1:{server.port}"], lifetime=patience)


async def looked_up(server: NameServer, domain: str, patience: float = 10.0) -> Site | NoSite:
    return await Resolver(asking(server, patience), shuffle=lambda hosts: hosts.sort()).resolve(domain)


def chain(*links: tuple[str, str], last: tuple[str, str, str] | None = None) -> Callable[[dns.message.Message], bytes]:
    """A reply whose answer section walks these aliases, and ends with a record (name, kind, text)."""

    def reply(question: dns.message.Message) -> bytes:
        message = dns.message.make_response(question)
        for alias, target in links:
            message.answer.append(dns.rrset.from_text(alias + ".", 300, "IN", "CNAME", target + "."))
        if last is not None and dns.rdatatype.from_text(last[1]) == question.question[0].rdtype:
            message.answer.append(dns.rrset.from_text(last[0] + ".", 300, "IN", *last[1:]))
        return message.to_wire()

    return reply


# --- one lookup ----------------------------------------------------------------------------------------------------


async def test_a_short_chain_of_aliases_is_followed() -> None:
    links = [(f"n{number}.a", f"n{number + 1}.a") for number in range(5)]
    async with name_server() as server:
        server.answers["n0.a"] = chain(*links, last=("n5.a", "MX", "10 mx.a."))
        server.zone["mx.a"] = {"A": [V4]}
        found = await looked_up(server, "n0.a")
    assert isinstance(found, Site)
    assert [(host.name, host.ip) for host in found.hosts] == [("mx.a", V4)]


@pytest.mark.parametrize(
    "links",
    [
        [(f"n{number}.a", f"n{number + 1}.a") for number in range(40)],
        [("n0.a", "n1.a"), ("n1.a", "n0.a")],
        [("n0.a", "n0.a")],
    ],
    ids=["long", "loop", "itself"],
)
async def test_aliases_without_an_end_are_trouble_and_nobodys_fault(links: list[tuple[str, str]]) -> None:
    async with name_server() as server:
        server.answers["n0.a"] = chain(*links, last=("n40.a", "MX", "10 mx.a."))
        server.zone["b"] = {"MX": ["10 n0.a."]}  # and as the name of an MX (RFC 2181 10.3 forbids it, people do it)
        for domain in ("n0.a", "b"):
            found = await looked_up(server, domain, SOON)
            assert isinstance(found, NoSite), found
            assert not found.permanent
        assert sum(server.asked.values()) < 20, "a limit, not a walk"


async def test_an_mx_that_is_an_alias_is_dialled_where_the_alias_leads() -> None:
    async with name_server() as server:
        server.zone["a"] = {"MX": ["10 alias.a."]}
        server.answers["alias.a"] = chain(("alias.a", "mx.a"), last=("mx.a", "A", V4))
        found = await looked_up(server, "a")
    assert isinstance(found, Site)
    assert [(host.name, host.ip) for host in found.hosts] == [("alias.a", V4)]


async def test_five_hundred_mx_with_a_hundred_addresses_come_over_tcp_and_are_capped() -> None:
    async with name_server() as server:
        server.zone["a"] = {"MX": [f"{number} mx{number}.a." for number in range(500)]}
        for number in range(500):
            server.zone[f"mx{number}.a"] = {"A": [f"93.184.216.{part}" for part in range(1, 101)]}
        found = await looked_up(server, "a")
        assert isinstance(found, Site), found
        assert server.over_tcp >= 1
        assert len(found.hosts) == 80
        assert {host.preference for host in found.hosts} == set(range(10)), "the best ones"
        assert len(server.asked) <= 21


@pytest.mark.parametrize("ttl", [0, 2**31 - 1, 2**31, 2**32 - 1])
async def test_any_time_to_live_is_kept_between_a_minute_and_six_hours(ttl: int) -> None:
    now = 1000.0
    async with name_server() as server:
        server.zone["a"] = {"MX": ["10 mx.a."]}
        server.zone["mx.a"] = {"A": [V4]}

        def reply(question: dns.message.Message) -> bytes:
            server.ttl = 300
            wire = server.reply(question).to_wire()
            return wire.replace((300).to_bytes(4, "big"), ttl.to_bytes(4, "big"))

        server.answers = {"a": reply, "mx.a": reply}
        resolver = Resolver(asking(server), clock=lambda: now)
        assert isinstance(await resolver.resolve("a"), Site)
        now += MIN_TTL - 1
        await resolver.resolve("a")
        assert server.asked["a", "MX"] == 1
        now += MAX_TTL
        await resolver.resolve("a")
        assert server.asked["a", "MX"] == 2


async def test_names_are_one_whatever_their_case() -> None:
    async with name_server() as server:
        server.zone["a"] = {"MX": ["10 MX.BIG.A."]}
        server.zone["xn--fa-hia.a"] = {"MX": ["10 mx.Big.a."]}
        server.zone["mx.big.a"] = {"A": [V4]}
        one, other = await looked_up(server, "a"), await looked_up(server, "xn--fa-hia.a")
    assert isinstance(one, Site)
    assert isinstance(other, Site)
    assert one.name == other.name == "mx.big.a"


def _rcode(code: dns.rcode.Rcode) -> Callable[[dns.message.Message], bytes]:
    def reply(question: dns.message.Message) -> bytes:
        message = dns.message.make_response(question)
        message.set_rcode(code)
        return message.to_wire()

    return reply


def _of_another(question: dns.message.Message) -> bytes:
    other = dns.message.make_query("other.a.", "MX", id=question.id)
    message = dns.message.make_response(other)
    message.answer.append(dns.rrset.from_text("other.a.", 300, "IN", "MX", "10 evil.a."))
    return message.to_wire()


def _truncated_for_ever(question: dns.message.Message) -> bytes:
    message = dns.message.make_response(question)
    message.flags |= dns.flags.TC
    return message.to_wire()


def _cut(question: dns.message.Message) -> bytes:
    return chain(last=("n0.a", "MX", "10 mx.a."))(question)[:-7]


NONSENSE: dict[str, Callable[[dns.message.Message], bytes | None]] = {
    "silence": lambda question: None,
    "empty": lambda question: b"",
    "three bytes": lambda question: b"\x00\x01\x02",
    "the question again": lambda question: question.to_wire(),
    "noise": lambda question: question.to_wire()[:2] + bytes(range(256)),
    "another's id": lambda question: b"\xff\xff" + _rcode(dns.rcode.NXDOMAIN)(question)[2:],
    "another's answer": _of_another,
    "cut": _cut,
    "truncated for ever": _truncated_for_ever,
    "more records than there are": lambda question: _rcode(dns.rcode.NOERROR)(question)[:6] + b"\xff\xff" * 3,
    "SERVFAIL": _rcode(dns.rcode.SERVFAIL),
    "REFUSED": _rcode(dns.rcode.REFUSED),
    "FORMERR": _rcode(dns.rcode.FORMERR),
    "NOTIMP": _rcode(dns.rcode.NOTIMP),
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_nonsense_is_temporary_and_said_to_be_trouble(what: str) -> None:
    async with name_server() as server:
        server.answers["n0.a"] = NONSENSE[what]
        server.zone["b"] = {"MX": ["10 n0.a."]}
        for found in await asyncio.gather(looked_up(server, "n0.a", SOON), looked_up(server, "b", SOON)):
            assert isinstance(found, NoSite), found
            assert (found.permanent, found.reason) == (False, Reason.DNS)


@pytest.mark.parametrize("host", ["\\000.a.", "a\\.b.a.", "\\255\\254.a.", "-.a.", "*.a.", "_25._tcp.a.", "a\\032b.a."])
async def test_mx_names_that_are_none_do_no_harm(host: str) -> None:
    async with name_server() as server:
        server.zone["a"] = {"MX": [f"10 {host}"]}
        found = await looked_up(server, "a")
    assert isinstance(found, NoSite)
    assert not found.permanent


async def test_a_resolver_is_named_with_its_port() -> None:
    async with name_server() as server:
        server.zone["a"] = {"A": [V4]}
        answer = await SystemDns([f"127.0.0.1:{server.port}"], lifetime=10.0).query("a", "A")
        assert (answer.status, answer.records) == (Status.FOUND, ((0, V4),))


# --- the queue -----------------------------------------------------------------------------------------------------

_SETTINGS = """
[engine.dns]
servers = ["127.0.0.1:{port}"]
timeout = 0.3
"""


def _bounds(ward: Ward) -> str:
    """Mail goes to the sink's port; a prelude for the worker: a minute is a second."""
    config, private = ward.mail.config, "allow_private_targets = true\n"
    config.write_text(config.read_text().replace(private, f"{private}mx_port = {ward.sink.port}\n"))
    return (
        "import engine.delivery.lookup as l, engine.delivery.site as s; l.SOON = 0.5; "
        "s.TROUBLE_TTL = 0.5; s.MIN_TTL = 1.0; "
    )


async def _suppressed(ward: Ward) -> int:
    engine = open_store(ward.mail.policy.settings.sql_address(), writer=False)
    try:
        with engine.connect() as conn:
            return int(conn.execute(select(func.count()).select_from(suppression)).scalar_one())
    finally:
        engine.dispose()


async def test_a_resolver_that_is_dead_for_long_pauses_the_queue_and_nothing_else() -> None:
    """Mail to places that need no lookup goes on meanwhile; afterwards all of it goes, once, and nobody was blamed."""
    domains = [f"d{number}.example" for number in range(30)]
    async with name_server() as server, troubled(
        settings=[("[engine]\n", "[engine]\nallow_private_targets = true\n")],
        tail=_SETTINGS.format(port=server.port), start=False,
    ) as ward:  # fmt: skip
        for domain in domains:
            server.zone[domain] = {"MX": [f"10 mx.{domain}."]}
            server.zone[f"mx.{domain}"] = {"A": ["127.0.0.1"]}
        server.dead = True
        await ward.start(_bounds(ward))
        people = [person for domain in domains for person in rows(10, domain)]
        await ward.mail.submit(job("resolved"), people)
        await until(lambda: sum(server.asked.values()) >= 30)
        ward.begin()
        await ward.mail.submit(job("routed"), rows(200, "a.held.test"))
        assert (await ward.mail.finished("routed")).counts == {"delivered": 200}
        before = sum(server.asked.values())
        await asyncio.sleep(4)  # the resolver stays dead for so long, eight times its time of trouble
        ward.nothing_spins()
        asked = sum(server.asked.values()) - before
        assert asked <= 30 * 10 * 3, "each domain once a time of trouble, with dnspython's own repetitions"
        status = ward.mail.policy.reader.job_status("resolved", ward.mail.policy.clock())
        assert status is not None
        assert status.terminal == 0
        server.dead = False
        status = await ward.mail.finished("resolved")
        assert status.counts["delivered"] == 300
        assert status.terminal == 300
        got = Counter({address: n for address, n in ward.sink.stored.items() if address.endswith(".example")})
        assert got == Counter(person["address"] for person in people)
        assert await _suppressed(ward) == 0


async def test_a_missing_domain_ends_only_after_it_was_missing_twice_and_suppresses_nobody() -> None:
    async with name_server() as server, troubled(
        settings=[("[engine]\n", "[engine]\nallow_private_targets = true\n")],
        tail=_SETTINGS.format(port=server.port), start=False,
    ) as ward:  # fmt: skip
        server.zone["here.example"] = {"MX": ["10 mx.here.example."]}
        server.zone["mx.here.example"] = {"A": ["127.0.0.1"]}
        await ward.start(_bounds(ward) + "s.CONFIRM_AFTER = 3.0; ")
        people = rows(5, "gone.example") + rows(5, "here.example") + rows(5, "flaky.example")
        await ward.mail.submit(job("missing"), people)
        await until(lambda: server.asked["flaky.example", "MX"] >= 1)
        server.zone["flaky.example"] = server.zone["here.example"]  # it was there all the time
        status = await ward.mail.finished("missing")
        assert status.counts["delivered"] == 10
        assert status.reasons["bounced"] == {"bad-domain": 5}
        assert server.asked["gone.example", "MX"] >= 2
        assert await _suppressed(ward) == 0
