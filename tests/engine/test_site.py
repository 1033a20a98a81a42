"""Where mail goes: each row of S-09, S-10 and faults 3.2 against a zone in memory."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from engine.delivery.connection import Target
from engine.delivery.dialable import is_public
from engine.delivery.lookup import Status, SystemDns
from engine.delivery.site import (
    CONFIRM_AFTER,
    MAX_TTL,
    MIN_TTL,
    TROUBLE_TTL,
    NoSite,
    Resolver,
    RouteError,
    Site,
    parse_route,
)
from engine.smtp.words import Tls
from policy.events import Reason
from tests.world.dns import Zone

V4 = "93.184.216.34"  # public addresses: documentation ranges are, rightly, never dialled
V4_TOO = "93.184.216.35"
V6 = "2606:2800:220:1:248:1893:25c8:1946"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def resolver(zone: Zone, **options: object) -> Resolver:
    return Resolver(zone, shuffle=lambda hosts: hosts.sort(), **options)  # type: ignore[arg-type]  # the options tested


async def site_of(zone: Zone, domain: str, **options: object) -> Site:
    found = await resolver(zone, **options).resolve(domain)
    assert isinstance(found, Site), found
    return found


async def none_of(zone: Zone, domain: str, **options: object) -> NoSite:
    found = await resolver(zone, **options).resolve(domain)
    assert isinstance(found, NoSite), found
    return found


async def test_mx_by_preference_each_with_its_addresses() -> None:
    zone = Zone(
        {
            "a.com": {"MX": [(20, "mx2.a.com"), (10, "mx1.a.com")]},
            "mx1.a.com": {"A": [V4], "AAAA": [V6]},
            "mx2.a.com": {"A": [V4_TOO]},
        }
    )
    site = await site_of(zone, "a.com")
    assert site.name == "mx1.a.com,mx2.a.com"
    assert [(host.name, host.ip, host.port) for host in site.hosts] == [
        ("mx1.a.com", V4, 25),
        ("mx1.a.com", V6, 25),
        ("mx2.a.com", V4_TOO, 25),
    ]
    assert {site.target(turn).name for turn in range(5)} == {"mx1.a.com"}, "a backup MX is for trouble"
    assert site.target(0, failures=2).name == "mx2.a.com"
    for turn in range(4):
        tried = [site.target(turn, failures) for failures in range(len(site.hosts))]
        assert sorted(map(id, tried)) == sorted(map(id, site.hosts)), "in one turn everyone is tried, nobody twice"
    assert site.tls is Tls.MAY


async def test_domains_of_one_mx_set_are_one_site() -> None:
    hosts = {"mx1.big.com": {"A": [V4]}, "mx2.big.com": {"A": [V4_TOO]}}
    zone = Zone(
        {
            "one.com": {"MX": [(1, "mx1.big.com"), (5, "mx2.big.com")]},
            "two.com": {"MX": [(7, "mx2.big.com"), (3, "mx1.big.com")]},
            **hosts,
        }
    )
    assert (await site_of(zone, "one.com")).name == (await site_of(zone, "two.com")).name


async def test_equal_preferences_are_shuffled() -> None:
    zone = Zone(
        {"a.com": {"MX": [(10, f"mx{n}.a.com") for n in range(5)]}, **{f"mx{n}.a.com": {"A": [V4]} for n in range(5)}}
    )
    orders = set()
    for _ in range(40):
        found = await Resolver(zone).resolve("a.com")
        assert isinstance(found, Site)
        orders.add(tuple(host.name for host in found.hosts))
    assert len(orders) > 5


async def test_no_mx_falls_back_to_the_domain_itself() -> None:
    site = await site_of(Zone({"a.com": {"A": [V4]}}), "a.com")
    assert (site.name, site.hosts) == ("a.com", (Target("a.com", V4),))
    assert (await site_of(Zone({"a.com": {"AAAA": [V6]}}), "a.com")).hosts[0].ip == V6


async def test_null_mx_is_permanent_and_nothing_is_dialled() -> None:
    zone = Zone({"a.com": {"MX": [(0, "")], "A": [V4]}, "b.com": {"MX": [(0, ".")]}})
    for domain in ("a.com", "b.com"):
        found = await none_of(zone, domain)
        assert (found.permanent, found.reason, found.enhanced) == (True, Reason.NULL_MX, "5.1.10")


async def test_null_mx_among_others_is_not_null() -> None:
    zone = Zone({"a.com": {"MX": [(0, ""), (10, "mx.a.com")]}, "mx.a.com": {"A": [V4]}})
    assert (await site_of(zone, "a.com")).hosts[0].name == "mx.a.com"


async def test_missing_domain_is_believed_the_second_time_an_hour_later() -> None:
    clock = Clock()
    one = resolver(Zone({"empty.com": {"TXT": ["x"]}}), clock=clock)
    for domain in ("no.com", "empty.com"):
        first = await one.resolve(domain)
        assert isinstance(first, NoSite)
        assert (first.permanent, first.reason) == (False, Reason.BAD_DOMAIN)
    clock.now += CONFIRM_AFTER / 2
    again = await one.resolve("no.com")
    assert isinstance(again, NoSite)
    assert not again.permanent
    clock.now += CONFIRM_AFTER
    for domain in ("no.com", "empty.com"):
        last = await one.resolve(domain)
        assert isinstance(last, NoSite)
        assert (last.permanent, last.enhanced) == (True, "5.1.2")


async def test_a_domain_that_came_back_is_forgiven() -> None:
    clock, zone = Clock(), Zone()
    one = resolver(zone, clock=clock)
    await one.resolve("a.com")
    zone.names["a.com"] = {"A": [V4]}
    clock.now += CONFIRM_AFTER
    assert isinstance(await one.resolve("a.com"), Site)
    del zone.names["a.com"]
    clock.now += CONFIRM_AFTER + MAX_TTL
    gone = await one.resolve("a.com")
    assert isinstance(gone, NoSite)
    assert not gone.permanent


@pytest.mark.parametrize("kind", ["MX", "A"])
async def test_dns_trouble_is_never_held_against_anybody(kind: str) -> None:
    zone = Zone({"a.com": {"A": [V4]}})
    zone.fail = {(kind, "a.com"), ("AAAA", "a.com")}
    found = await none_of(zone, "a.com")
    assert (found.permanent, found.reason) == (False, Reason.DNS)


async def test_dangling_mx_is_temporary_and_does_not_fall_back() -> None:
    zone = Zone({"a.com": {"MX": [(10, "gone.a.com")], "A": [V4]}})
    found = await none_of(zone, "a.com")
    assert (found.permanent, found.reason) == (False, Reason.DNS)


async def test_one_dead_host_does_not_hide_the_other() -> None:
    zone = Zone({"a.com": {"MX": [(10, "bad.a.com"), (20, "mx.a.com")]}, "mx.a.com": {"A": [V4]}})
    zone.fail = {("A", "bad.a.com")}
    assert [host.name for host in (await site_of(zone, "a.com")).hosts] == ["mx.a.com"]


async def test_we_are_never_our_own_mx() -> None:
    zone = Zone(
        {
            "a.com": {"MX": [(10, "better.com"), (20, "us.example"), (30, "worse.com")]},
            "loop.com": {"MX": [(5, "us.example"), (10, "worse.com")]},
            "better.com": {"A": [V4]},
            "worse.com": {"A": [V4_TOO]},
        }
    )
    us = frozenset({"us.example"})
    assert [host.name for host in (await site_of(zone, "a.com", own_names=us)).hosts] == ["better.com"]
    loop = await none_of(zone, "loop.com", own_names=us)
    assert (loop.permanent, loop.enhanced) == (True, "5.4.6")


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.1.2.3 10.0.0.1 192.168.1.1 172.16.0.1 169.254.1.1 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
    192.0.2.1 ::1 :: fe80::1 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1
    2002:7f00:1:: 2002:a00:1::1 ::127.0.0.1 2001:0:7f00:1:: 2001:0:4136:e378:8000:63bf:80ff:fffe 2606:2800::5efe:7f00:1
    2606:2800::200:5efe:10.0.0.1""".split(),
)
async def test_addresses_that_are_never_dialled(address: str) -> None:
    kind = "AAAA" if ":" in address else "A"
    zone = Zone({"a.com": {"MX": [(10, "mx.a.com")]}, "mx.a.com": {kind: [address]}})
    found = await none_of(zone, "a.com")
    assert (found.permanent, found.enhanced) == (True, "5.4.6")
    allowed = await site_of(zone, "a.com", allow_private=True)
    assert allowed.hosts[0].ip == address


@pytest.mark.parametrize(
    "address", [V4, V6, "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "8.8.8.8", "2a00:1450:4001::1a"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "::1"])
async def test_an_mx_that_names_a_place_at_home(host: str) -> None:
    found = await none_of(Zone({"a.com": {"MX": [(10, host)], "A": [V4]}}), "a.com")
    assert found.reason in (Reason.DNS, Reason.BAD_DOMAIN)
    assert found.enhanced in ("4.4.3", "5.4.6")


async def test_too_many_hosts_and_addresses_are_capped() -> None:
    zone = Zone(
        {
            "a.com": {"MX": [(n, f"mx{n}.a.com") for n in range(500)]},
            **{f"mx{n}.a.com": {"A": [f"93.184.{n % 200}.{m}" for m in range(1, 101)]} for n in range(500)},
        }
    )
    site = await site_of(zone, "a.com")
    assert len(site.hosts) <= 80
    assert len(zone.asked) <= 21


async def test_routes_win_and_may_lead_home() -> None:
    routes = {
        "*.test": "127.0.0.1:2525",
        "*.slow.test": "127.0.0.1:2526",
        "exact.test": "[::1]:2527",
        "other.com": "Relay.Example:99",
    }
    zone = Zone({"relay.example": {"A": ["10.0.0.9"]}})
    one = resolver(zone, routes=routes)
    expected = {
        "a.test": ("127.0.0.1", 2525),
        "b.slow.test": ("127.0.0.1", 2526),
        "exact.test": ("::1", 2527),
        "other.com": ("10.0.0.9", 99),
    }
    for domain, (ip, port) in expected.items():
        site = await one.resolve(domain)
        assert isinstance(site, Site)
        assert (site.hosts[0].ip, site.hosts[0].port) == (ip, port)
    first, second = await one.resolve("a.test"), await one.resolve("c.test")
    assert isinstance(first, Site)
    assert isinstance(second, Site)
    assert first.name == second.name == "127.0.0.1:2525"
    assert not any(kind == "MX" for kind, _ in zone.asked)


@pytest.mark.parametrize(
    "text", ["", ":25", "host:", "host:0", "host:65536", "host:x", "[::1", "[nonsense]:25", "[::1]25", "a:b:c"]
)
def test_routes_that_cannot_be_read(text: str) -> None:
    if text == "host:":
        assert parse_route(text) == ("host", 25)
        return
    with pytest.raises(RouteError):
        parse_route(text)


async def test_simultaneous_questions_are_one_and_a_cancelled_caller_is_not_the_others() -> None:
    zone = Zone({"a.com": {"MX": [(10, "mx.a.com")]}, "mx.a.com": {"A": [V4]}})
    zone.gate = asyncio.Event()
    one = resolver(zone)
    callers = [asyncio.create_task(one.resolve("a.com")) for _ in range(50)]
    await asyncio.sleep(0)
    callers[0].cancel()
    zone.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, Site) for result in results[1:])
    assert zone.asked["MX", "a.com"] == 1
    assert one.statistics()["asking"] == 0


async def test_domains_of_one_mx_set_share_the_site_until_an_address_is_old() -> None:
    clock = Clock()
    records = {"MX": [(10, "mx1.a.com"), (20, "mx2.a.com")]}
    zone = Zone({f"d{number}.com": records for number in range(300)}, ttl=300.0)
    zone.names["other.com"] = {"MX": [(20, "mx1.a.com"), (10, "mx2.a.com")]}  # the same hosts, preferred otherwise
    zone.names |= {"mx1.a.com": {"A": [V4]}, "mx2.a.com": {"A": [V4_TOO]}}
    one = resolver(zone, clock=clock)

    sites = {id(await one.resolve(f"d{number}.com")) for number in range(200)}
    other = await one.resolve("other.com")

    assert len(sites) == 1
    assert isinstance(other, Site)
    assert other.hosts[0].name == "mx2.a.com"
    assert one.statistics()["mx_sets"] == 2
    assert sum(count for (kind, _), count in zone.asked.items() if kind == "A") == 2
    zone.names["mx1.a.com"] = {"A": [V6]}
    clock.now += 299
    await one.resolve("d200.com")
    assert zone.asked["A", "mx1.a.com"] == 1
    clock.now += 2
    moved = await one.resolve("d201.com")
    assert isinstance(moved, Site)
    assert moved.hosts[0].ip == V6, "no address is dialled longer than DNS said"


@pytest.mark.parametrize(("ttl", "kept"), [(0.0, MIN_TTL), (300.0, 300.0), (2.0**31, MAX_TTL)])
async def test_answers_are_kept_for_a_sane_time(ttl: float, kept: float) -> None:
    clock, zone = Clock(), Zone({"a.com": {"A": [V4]}}, ttl=ttl)
    one = resolver(zone, clock=clock)
    await one.resolve("a.com")
    clock.now += kept - 1
    await one.resolve("a.com")
    assert zone.asked["MX", "a.com"] == 1
    clock.now += 2
    await one.resolve("a.com")
    assert zone.asked["MX", "a.com"] == 2


async def test_a_dead_resolver_is_not_asked_in_a_loop_and_recovers() -> None:
    clock, zone = Clock(), Zone({"a.com": {"A": [V4]}})
    zone.fail = {("MX", "a.com")}
    one = resolver(zone, clock=clock)
    for _ in range(100):
        await one.resolve("a.com")
    assert zone.asked["MX", "a.com"] == 1
    zone.fail.clear()
    clock.now += TROUBLE_TTL + 1
    assert isinstance(await one.resolve("a.com"), Site)


async def test_the_cache_has_an_end() -> None:
    zone = Zone()
    one = resolver(zone, cache=10)
    for number in range(50):
        await one.resolve(f"d{number}.com")
    assert one.statistics()["sites"] == 10


async def test_the_real_resolver_turns_a_dead_server_into_trouble() -> None:
    dead = SystemDns(["127.0.0.1"], port=1, lifetime=0.2)
    assert (await dead.query("example.com", "MX")).status is Status.TROUBLE
    assert (await dead.query("x" * 64 + ".com", "MX")).status is Status.TROUBLE
