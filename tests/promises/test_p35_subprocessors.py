"""P-35: who works for us gets only what is declared; nobody else gets anything."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.cli import commands
from engine.worker import run_worker
from policy.settings import ConfigError, PolicySettings, load
from policy.writer import Writer
from tests.promises.marks import promise

TODAY = date(2026, 11, 23)
OFF = {"policy.subprocessors.undeclared": lambda *_: iter(())}
OFFICER = '[policy.officer]\nname = "Grace Officer"\naddress = "privacy@platform.example"\n'
RELAY = """
[policy.subprocessors.relay]
name = "Relay Ltd"
country = "IE"
purpose = "to deliver messages"
hosts = ["smtp.relay.example", "cache.relay.example"]
data = ["address"{more}]
agreement = 2026-01-15
since = 2026-02-01
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "sales-push.toml"


def _write(config: Path, *parts: str) -> None:
    config.write_text(
        f'[policy]\ndata_dir = "{config.parent / "data"}"\nhome_countries = ["IE"]\n{OFFICER}' + "".join(parts)
    )


def _checked(config: Path, *words: str) -> str:
    """ "" when all is well; else every mistake."""
    told = CliRunner().invoke(commands, [*words, "--config", str(config)])
    if isinstance(told.exception, ConfigError):
        return str(told.exception)
    assert told.exit_code == 0, told.output
    return ""


@promise("P-35", off=OFF)
@pytest.mark.parametrize(
    "engine",
    ['[engine.smarthost]\nhost = "smtp.relay.example"\n', '[engine.routes]\n"*" = "smtp.relay.example:25"\n'],
    ids=["smarthost", "route"],
)
def test_p35_mail_goes_to_no_relay_that_is_not_in_the_registry(config: Path, engine: str) -> None:
    _write(config, engine)
    assert "smtp.relay.example is not ours, and no subprocessor names it" in _checked(config, "config", "--check")
    with pytest.raises(ConfigError, match="would get address, message"):
        run_worker(0, config)
    _write(config, engine, RELAY.format(more=', "message"'))
    assert _checked(config, "config", "--check") == ""


@promise("P-35", off=OFF)
def test_p35_a_subprocessor_gets_no_data_that_is_not_declared(config: Path) -> None:
    smarthost = '[engine.smarthost]\nhost = "smtp.relay.example"\n'
    _write(config, smarthost, RELAY.format(more=""))
    assert "policy.subprocessors.relay: may not get message" in _checked(config, "config", "--check")
    with pytest.raises(ConfigError, match="may not get message"):
        run_worker(0, config)


@promise("P-35", off=OFF)
async def test_p35_the_policy_speaks_to_no_server_that_is_not_in_the_registry(config: Path, keyring: Any) -> None:
    _write(config, '[policy.rights]\nsmarthost = "smtp.relay.example:587"\n')
    settings = load(PolicySettings, config)
    settings.data_dir.mkdir()
    (settings.data_dir / "policy.lock").mkdir()  # what comes behind the question fails here
    with pytest.raises(ConfigError, match="would get address, letter"):
        await Writer(settings, keyring).start()


@promise("P-35", off={**OFF, "policy.subprocessors.table": lambda _registry: []})
def test_p35_who_works_for_us_is_public_before_it_gets_anything(config: Path) -> None:
    _write(config, RELAY.format(more=', "message"').replace("2026-02-01", "2099-01-01"),
           '[engine.smarthost]\nhost = "smtp.relay.example"\n')  # fmt: skip
    told = CliRunner().invoke(commands, ["config", "--check", "--config", str(config)])
    from policy.cli import commands as policy_commands

    listed = CliRunner().invoke(policy_commands, ["policy", "subprocessors", "--config", str(config)])
    assert "Relay Ltd (IE)  since 2099-01-01" in listed.output
    assert "may get nothing before 2099-01-01" in str(told.exception)
