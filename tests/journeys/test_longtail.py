"""The long tail in small: hundreds of domains that unbound (Debian) answers for, shared MX sets, and a site for each.

Law: each name is asked for at most once a worker, and sites that come all at once do not take the conversation with
Redis away from everybody else.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.unbound import NoUnbound, program, unbound
from engine.delivery.lookup import Answer, Status, SystemDns
from engine.delivery.site import Resolver, Site
from engine.queue.permits import Permits
from policy.valkey import connect
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]
RECIPIENTS, DOMAINS, SETS, WORKERS = 400, 300, 20, 2
MX = {f"d{number}.test": [f"mx1.s{number % 20}.test", f"mx2.s{number % 20}.test"] for number in range(300)}
ADDRESSES = {host: "127.0.0.1" for hosts in MX.values() for host in hosts}


@pytest.fixture
def only_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    async def thorough(*_: object) -> Answer:
        raise AssertionError("left to dnspython")

    monkeypatch.setattr(SystemDns, "_thorough", thorough)


@pytest.mark.debian
async def test_what_unbound_says_is_read_without_dnspython(tmp_path: Path, only_plain: None) -> None:
    with unbound(tmp_path / "unbound", MX, ADDRESSES) as server:
        dns = SystemDns([server.address])
        found = await dns.query("d7.test", "MX")
        assert (found.status, set(found.records)) == (Status.FOUND, {(10, "mx1.s7.test"), (20, "mx2.s7.test")})
        assert found.ttl > 0
        assert (await dns.query("mx1.s7.test", "A")).records == ((0, "127.0.0.1"),)
        assert (await dns.query("mx1.s7.test", "AAAA")).status is Status.NODATA
        assert (await dns.query("nobody.test", "MX")).status is Status.NXDOMAIN
    assert server.questions == 4


@pytest.mark.debian
async def test_hundreds_of_domains_at_once_are_one_question_each_and_a_site_a_set(
    tmp_path: Path, only_plain: None
) -> None:
    with unbound(tmp_path / "unbound", MX, ADDRESSES) as server:
        resolver = Resolver(SystemDns([server.address]), allow_private=True)
        for _ in range(2):
            sites = await asyncio.gather(*(resolver.resolve(domain) for domain in MX for _ in range(3)))
            assert all(isinstance(site, Site) for site in sites)
            assert len({site.name for site in sites if isinstance(site, Site)}) == SETS
    assert server.questions == len(MX) + 2 * len(ADDRESSES), "MX a domain, A and AAAA a host"


@pytest.mark.debian
async def test_what_is_not_plain_is_asked_again_by_dnspython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.delivery.dnswire.read", lambda *_: None)
    with unbound(tmp_path / "unbound", MX, ADDRESSES) as server:
        found = await SystemDns([server.address]).query("d7.test", "MX")
        assert (found.status, len(found.records)) == (Status.FOUND, 2)
    assert server.questions == 2


@pytest.mark.debian
@pytest.mark.timeout(170)
def test_a_long_tail_is_delivered_and_each_name_asked_for_once_a_worker() -> None:
    words = ("--recipients", RECIPIENTS, "--domains", DOMAINS, "--mx-sets", SETS, "--workers", WORKERS, "--sites")
    command = [sys.executable, "-m", "benchmarks.longtail", *map(str, words), "--no-fast"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["ok"], "somebody else's count"
    assert told["twenty_domains_rate"] > 0
    assert told["ratio"] == pytest.approx(told["longtail_rate"] / told["twenty_domains_rate"], abs=0.01)
    assert told["many_sites_rate"] > 0
    assert {"engine", "policy", "valkey", "unbound", "sink"} <= told["cpu_us_by_part"]["longtail"].keys()
    # A domain nobody of the audience lives at is not asked for
    assert 0.5 * DOMAINS < told["dns_questions"] <= WORKERS * (DOMAINS + 2 * 2 * SETS)
    assert 0.5 * DOMAINS < told["dns_questions_many_sites"] <= WORKERS * (DOMAINS + 2 * 2 * DOMAINS)


async def test_a_thousand_sites_ask_for_permits_over_two_connections(valkey: ValkeyServer) -> None:
    """Each by itself they took all 64 connections of a worker: leasing paused, and audiences waited for a minute."""
    client = connect(valkey.url, max_connections=2)
    try:
        permits = Permits(client)
        sites = [f"{number:011}" for number in range(1000)]
        await permits.back_off(sites[3], 60)
        left = await asyncio.gather(*(permits.back_offs([site]) for site in sites))
        assert [site for site, [seconds] in zip(sites, left, strict=True) if seconds] == [sites[3]]
        assert set(await asyncio.gather(*(permits.take(site, ["a"], 1) for site in sites))) == {1}
        assert await permits.take(sites[0], ["b"], 1) == 0
        await asyncio.gather(*(permits.give_back(site, ["a"]) for site in sites[:500]))
        again = await asyncio.gather(*(permits.take(site, ["b"], 1) for site in sites))
        assert again == [1] * 500 + [0] * 500
    finally:
        await client.aclose()


async def test_a_permit_nobody_waits_for_any_more_is_not_taken(valkey: ValkeyServer) -> None:
    permits = Permits(valkey.client)
    waiting = asyncio.create_task(permits.take("S" * 11, ["a"], 1))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await permits.give_back("S" * 11, ["a"])
    assert await permits.take("S" * 11, ["b"], 1) == 1


def test_a_machine_without_unbound_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.unbound._PATH", "")
    with pytest.raises(NoUnbound, match="apt-get install unbound"):
        program()
