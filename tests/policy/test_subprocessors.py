"""Who may get what: whose host it is, what a registry allows, and what the settings of this floor hand over."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from policy import outlets, pages, subprocessors
from policy.classes import RetentionSettings
from policy.cli import commands
from policy.settings import ConfigError, Officer, PolicySettings, annotate, load
from policy.subprocessors import Data, Outlet, Registry, Subprocessor

TODAY = date(2026, 11, 23)
RELAY = Outlet("engine.smarthost.host", "smtp.relay.example", frozenset({Data.ADDRESS, Data.MESSAGE}))


def declared(**other: Any) -> Subprocessor:
    said: dict[str, Any] = {
        "name": "Relay Ltd", "country": "IE", "purpose": "to deliver messages", "hosts": ["*.relay.example"],
        "data": ["address", "message"], "agreement": date(2026, 1, 15), "since": date(2026, 2, 1),
    }  # fmt: skip
    return Subprocessor(**said | other)


def told(outlet: Outlet = RELAY, *registry: Subprocessor, own: tuple[str, ...] = ()) -> list[str]:
    known = Registry({f"s{place}": one for place, one in enumerate(registry)}, own, ("IE", "DE"))
    return [str(problem) for problem in subprocessors.undeclared([outlet], known, TODAY)]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.53", "::1", "10.1.2.3", "192.168.0.9", "172.31.0.1", "fd00::7", "fe80::1%eth0", "100.64.0.1",
     "::ffff:10.0.0.1", "localhost", "redis", "valkey-0", "db.internal", "Mail.Local.", "nas.home.arpa"],
)  # fmt: skip
def test_what_the_internet_cannot_reach_is_ours(host: str) -> None:
    assert subprocessors.is_ours(host)


@pytest.mark.parametrize(
    "host",
    ["smtp.relay.example", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "134744072", "8.2056", "0x8080808",
     "internal.example", "notlocal.example", "172.32.0.1"],
)  # fmt: skip
def test_everything_else_is_somebody_elses(host: str) -> None:
    assert not subprocessors.is_ours(host)


def test_what_we_say_is_ours_is() -> None:
    own = ("*.corp.example", "9.9.9.9")
    assert [subprocessors.is_ours(host, own) for host in ("MX.corp.example", "9.9.9.9", "corp.example", "9.9.9.8")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_stranger_gets_nothing_and_is_told_by_setting_data_and_remedy() -> None:
    [line] = told()
    assert line.startswith("engine.smarthost.host: smtp.relay.example is not ours")
    assert "address, message" in line
    assert "[policy.subprocessors.<name>]" in line
    assert "policy.own_hosts" in line
    assert told(RELAY, declared(hosts=["relay.example", "smtp.relay.example.net"])) == [line]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, ""),
        ({"hosts": ["SMTP.Relay.Example."]}, ""),
        ({"since": TODAY, "agreement": TODAY}, ""),
        ({"data": ["address"]}, "may not get message"),
        ({"data": ["domain", "ledger"]}, "may not get address, message"),
        ({"agreement": date(2026, 11, 24)}, "is not signed yet"),
        ({"country": "DE"}, ""),
        ({"country": "US", "safeguard": "standard clauses"}, ""),
        ({"country": "US"}, "nothing says on which ground data goes to US"),
        ({"country": "US", "safeguard": "  "}, "nothing says on which ground data goes to US"),
        ({"since": date(2026, 11, 24)}, "may get nothing before 2026-11-24"),
    ],
)
def test_a_subprocessor_gets_what_is_declared_from_its_first_day_on(how: dict[str, Any], words: str) -> None:
    found = told(RELAY, declared(**how))
    assert [words in line for line in found] == ([True] if words else [])
    if words:
        assert found[0].startswith("policy.subprocessors.s0: ")
        assert "engine.smarthost.host would hand it address, message" in found[0]


def test_one_that_allows_it_is_enough() -> None:
    """The old agreement and the new one, side by side."""
    assert told(RELAY, declared(data=["domain"]), declared()) == []


@given(
    st.sets(st.sampled_from(Data), min_size=1),
    st.sets(st.sampled_from(Data), min_size=1),
    st.dates(date(2026, 11, 1), date(2026, 12, 31)),
    st.dates(date(2026, 11, 1), date(2026, 12, 31)),
)
def test_nothing_goes_that_is_not_declared_signed_and_begun(
    handed: set[Data], may: set[Data], agreement: date, since: date
) -> None:
    outlet = Outlet("engine.smarthost.host", "smtp.relay.example", frozenset(handed))
    allowed = not told(outlet, declared(data=sorted(may), agreement=agreement, since=since))
    assert allowed == (handed <= may and max(agreement, since) <= TODAY)


@pytest.mark.parametrize(
    "wrong",
    [{"country": "Ireland"}, {"hosts": []}, {"hosts": ["a *.b"]}, {"data": ["everything"]}, {"data": []},
     {"name": ""}, {"agreement": None}, {"dpa": "yes"}],
)  # fmt: skip
def test_a_registry_with_holes_is_no_registry(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        declared(**wrong)


def settings(**other: Any) -> PolicySettings:
    return PolicySettings(officer=Officer(name="G", address="g@one.example"), **other)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({}, []),
        ({"redis_url": "unix:///run/valkey.sock"}, []),
        ({"redis_url": "rediss://user@cache.cloud.example:6380/0"}, [("policy.redis_url", "cache.cloud.example")]),
        ({"redis_url": "redis://[2606:4700::1]:6379/0"}, [("policy.redis_url", "2606:4700::1")]),
        ({"sql_url": "sqlite:////data/policy.db"}, []),
        ({"sql_url": "postgresql+psycopg://me@db.cloud.example/x"}, [("policy.sql_url", "db.cloud.example")]),
        ({"sql_url": "postgresql+psycopg://me@%2Frun%2Fpostgresql/x"}, []),
        (
            {"sql_url": "postgresql+psycopg:///x?host=one.cloud.example:5432,/run/pg&host=two.cloud.example"},
            [("policy.sql_url", "one.cloud.example"), ("policy.sql_url", "two.cloud.example")],
        ),
        ({"sql_url": "postgresql://me@a.example/x?hostaddr=8.8.8.8"},
         [("policy.sql_url", "a.example"), ("policy.sql_url", "8.8.8.8")]),
        ({"rights": {"smarthost": "mail.relay.example:587"}}, [("policy.rights.smarthost", "mail.relay.example")]),
    ],
)  # fmt: skip
def test_the_ground_floor_names_every_host_it_talks_to(how: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert [(one.setting, one.host) for one in outlets.outlets(settings(**how))] == wanted


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        outlets.check(settings(redis_url="redis://cache.cloud.example"), [RELAY], TODAY)
    assert [problem.path for problem in refused.value.problems] == ["policy.redis_url", "engine.smarthost.host"]
    own = settings(redis_url="redis://cache.cloud.example", own_hosts=["cache.cloud.example"])
    outlets.check(own, [], TODAY)


def test_the_registry_stands_in_the_file_and_is_printed_back(tmp_path: Path) -> None:
    config = tmp_path / "sales-push.toml"
    config.write_text(
        '[policy]\nhome_countries = ["IE"]\n[policy.officer]\nname = "G"\naddress = "g@one.example"\n'
        '[policy.subprocessors.relay]\nname = "Relay Ltd"\n'
        'country = "IE"\npurpose = "to deliver"\nhosts = ["smtp.relay.example"]\ndata = ["address", "message"]\n'
        "agreement = 2026-01-15\nsince = 2026-02-01\n"
    )
    outlets.check(load(PolicySettings, config), [RELAY], TODAY)
    (tmp_path / "again.toml").write_text(annotate([PolicySettings], config))
    assert load(PolicySettings, tmp_path / "again.toml").subprocessors == load(PolicySettings, config).subprocessors


def command(*words: str) -> str:
    told = CliRunner().invoke(commands, words)
    assert told.exit_code == 0, told.output
    return told.output


def test_the_public_list_names_no_host_and_no_agreement(tmp_path: Path) -> None:
    config = tmp_path / "sales-push.toml"
    config.write_text('[policy.officer]\nname = "G"\naddress = "g@one.example"\n')
    assert "nobody is declared" in command("policy", "subprocessors", "--config", str(config))
    with config.open("a") as file:
        file.write(
            '[policy.subprocessors.relay]\nname = "Relay <Ltd>"\ncountry = "US"\npurpose = "to deliver | sometimes"\n'
            'hosts = ["smtp.relay.example"]\ndata = ["message", "address"]\nagreement = 2026-01-15\n'
            'since = 2027-02-01\nsafeguard = "standard clauses"\n'
        )
    text, html, markdown, told_json = (
        command("policy", "subprocessors", "--config", str(config), *more)
        for more in ((), ("--html",), ("--markdown",), ("--json",))
    )
    for page in (text, html, markdown, told_json):
        for wanted in ("US", "2027-02-01", "address, message", "standard clauses"):
            assert wanted in page
        assert "relay.example" not in page
        assert "2026-01-15" not in page
    assert "Relay &lt;Ltd&gt;" in html
    assert "deliver \\| sometimes" in markdown


def test_recipients_pages_name_them() -> None:
    one, other = declared(name="Zed"), declared(name="Alpha")
    shown = pages.shown(pages.PagesSettings(), RetentionSettings(), {"a": one, "b": other})
    assert [who.name for who in shown.working] == ["Alpha", "Zed"]
