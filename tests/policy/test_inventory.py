"""The inventory and the public table say what the code does, because they are made from it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import Column, Integer, MetaData, Table
from typer.testing import CliRunner

from policy import files, inventory, keyspace, schema
from policy.classes import RETENTION, RetentionSettings, gone_from
from policy.cli.retention import policy as commands
from policy.instants import DAY_US
from policy.keys import Keyring
from tests.policy.sweepers import D, Sweeper, sweeper

PERIODS = RetentionSettings().periods()


@pytest.fixture
async def world(dialect: str, tmp_path: Path, keyring: Keyring, redis: Redis) -> AsyncIterator[Sweeper]:
    async with sweeper(tmp_path, keyring, redis) as made:
        yield made


def test_p01_everything_that_is_stored_is_described() -> None:
    assert inventory.missing(schema.metadata.tables.values()) == []
    found = inventory.lines(PERIODS)
    names = {(line.kind, line.name) for line in found}
    assert len(names) == len(found)
    assert {name for kind, name in names if kind == "column"} == {item.column for item in schema.inventory()}
    assert {name for kind, name in names if kind == "key"} == {entry.name for entry in keyspace.CATALOGUE}
    assert {name for kind, name in names if kind == "file"} == {family.name for family in files.CATALOGUE}
    for line in found:
        assert all((line.personal, line.purpose, line.owner, line.end)), line.name
        assert line.retention in RETENTION, line.name


def test_p01_a_new_field_is_named_until_it_is_described() -> None:
    """P-01: somebody adds geo_city to the hits."""
    stray = Table("hit", MetaData(), Column("geo_city", Integer))
    assert inventory.missing([stray]) == ["hit.geo_city"]
    info = {"personal": "town", "purpose": "figures per town", "retention": "R2"}
    assert inventory.missing([Table("hit", MetaData(), Column("geo_city", Integer, info=info))]) == []
    unknown = Table("hit", MetaData(), Column("geo_city", Integer, info=info | {"retention": "R9"}))
    assert inventory.missing([unknown]) == ["hit.geo_city"]
    assert inventory.missing([Table("diary", MetaData(), Column("day", Integer, info=info))]) == ["diary"]


def test_each_column_says_its_own_end() -> None:
    ends = {line.name: line.end for line in inventory.lines(PERIODS) if line.kind == "column"}
    assert ends["message.note"].startswith("90 days from: day of the event")
    assert ends["hit.hour"].startswith("13 months from")
    assert ends["job.payload"].startswith("1 day from: end of the job")
    assert ends["job.job_key"].startswith("90 days from")
    assert ends["link.url"].startswith("13 months from")
    assert ends["counter.n"].startswith("3 years from")
    assert ends["suppression.tag"].startswith("none: ")
    assert ends["held.record"] == "release of the hold"


def test_owners_are_rooms_that_there_are() -> None:
    """Rooms of this issue's other parts may be missing until they are there; no other name may be a slip."""
    coming = {
        "policy.rights",
        "policy.readings",
        "policy.disclosures",
        "policy.checkpoints",
        "policy.erasure",
        "policy.backup",
    }
    assert set(inventory.OWNERS) == set(schema.metadata.tables)
    for owner in set(inventory.OWNERS.values()) - coming:
        assert importlib.util.find_spec(owner) is not None, owner


async def test_p06_the_public_table_says_what_the_sweeper_does(world: Sweeper) -> None:
    """P-06: class R2 changed from 13 to 12 months: the table says 12 months, and the sweeper takes 12 months."""
    changed = RetentionSettings.model_validate({"r2": "12 months"})
    before = {row.name: row.period for row in inventory.table(PERIODS)}
    after = {row.name: row.period for row in inventory.table(changed.periods())}
    assert before["R2"] == "13 months"
    assert after == before | {"R2": "12 months"}
    await world.put("hit", day=D, job=1, mref=1)
    world.now = gone_from(D, changed.periods()["R2"]) * DAY_US
    assert await world.sweep() == {}
    assert await world.sweep(changed) == {"hit": 1}


def test_the_table_names_every_class_with_its_period_and_ground() -> None:
    rows = inventory.table(PERIODS)
    assert [row.name for row in rows] == [*(f"R{number}" for number in range(9)), "RH"]
    assert all((row.content, row.trigger, row.period, row.action, row.anchor) for row in rows)
    assert {row.name: row.period for row in rows}["RH"] == "no fixed period; reviewed every 6 months"
    page = inventory.as_html([inventory.Row("R0", "<b>", "a & b", "1 day", "x", "y")])
    assert "<td>&lt;b&gt;</td><td>a &amp; b</td>" in page
    [head, rule, row] = inventory.as_markdown([inventory.Row("R0", "a|b", "t", "p", "x", "y")])
    assert head.count("|") == rule.count("|") == 7
    assert "a\\|b" in row


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sales-push.toml"
    path.write_text('[policy]\nofficer = { name = "Officer", address = "privacy@example.org" }\n')
    return path


def test_the_commands_print_both_without_anything_running(config: Path) -> None:
    runner = CliRunner()
    told = runner.invoke(commands, ["inventory", "--json", "--config", str(config)])
    assert told.exit_code == 0, told.output
    assert len(json.loads(told.stdout)) == len(inventory.lines(PERIODS))
    told = runner.invoke(commands, ["retention", "--json", "--config", str(config)])
    assert {row["name"]: row["period"] for row in json.loads(told.stdout)}["R3"] == "90 days"
    for form in ([], ["--markdown"], ["--html"]):
        told = runner.invoke(commands, ["retention", *form, "--config", str(config)])
        assert told.exit_code == 0
        assert told.stdout.count("13 months") == 1
    page = runner.invoke(commands, ["inventory", "--markdown", "--config", str(config)]).stdout
    assert page.startswith("# Data inventory\n")
    assert "\n| kind |" in page


@pytest.mark.parametrize("name", ["inventory", "retention"])
def test_p06_the_pages_of_the_docs_are_current(name: str) -> None:
    told = CliRunner().invoke(commands, [name, "--markdown", "--shipped"])
    assert told.exit_code == 0, told.output
    written = Path(__file__).resolve().parents[2] / "docs" / f"{name}.md"
    assert written.read_text(encoding="utf-8") == told.stdout, "run: make docs"
