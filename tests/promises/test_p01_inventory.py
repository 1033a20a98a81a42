"""P-01, P-06: what is stored is described, and the public table is made of the very configuration that sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from redis.asyncio import Redis
from sqlalchemy import Column, Engine, Text, inspect
from sqlalchemy.schema import MetaData
from typer.testing import CliRunner

from policy import inventory, schema
from policy.classes import RETENTION, Period, RetentionSettings, gone_from, last_gone
from policy.cli.retention import policy as commands
from policy.instants import DAY_US
from policy.keys import Keyring
from policy.settings import PolicySettings, load
from tests.policy.sweepers import D, sweeper
from tests.promises.marks import promise

THIRTEEN = Period(13, "month")


def _as_written_by_hand(_: RetentionSettings) -> dict[str, Period]:
    return {name: one.default for name, one in RETENTION.items() if one.default is not None}


def _by_a_constant_of_its_own(today: int, kept: Period) -> int:
    return last_gone(today, THIRTEEN if kept.unit == "month" else kept)


@promise("P-01", off={"policy.inventory.missing": lambda tables: []})
def test_p01_a_new_field_is_named_until_it_has_purpose_and_class() -> None:
    """Given a new field `geo_city` among the visits, what CI runs names it; described, it passes."""
    widened = schema.hit.to_metadata(MetaData())
    widened.append_column(Column("geo_city", Text))
    assert inventory.missing([widened]) == ["hit.geo_city"]
    entry = {"personal": "town", "purpose": "figures by town", "retention": "R2"}
    described = schema.hit.to_metadata(MetaData())
    described.append_column(Column("geo_city", Text, info=entry))
    assert inventory.missing([described]) == []
    assert inventory.missing(schema.metadata.tables.values()) == []


def _all_but_one(real: Callable[[], Iterable[schema.Item]] = schema.inventory) -> list[schema.Item]:
    return [item for item in real() if item.column != "message.note"]


@promise("P-01", off={"policy.schema.inventory": _all_but_one})
def test_p01_every_column_of_the_database_as_it_is_has_its_line(store: Engine) -> None:
    """Asked of the database that the migrations made, not of our own description of it."""
    lines = {line.name: line for line in inventory.lines(RetentionSettings().periods()) if line.kind == "column"}
    there = inspect(store)
    stored = {
        f"{table}.{column['name']}"
        for table in there.get_table_names()
        if table != "schema_version"  # the number of the newest migration
        for column in there.get_columns(table)
    }
    assert stored - lines.keys() == set()
    assert all((line.personal, line.purpose, line.owner, line.end) for line in lines.values())
    assert {line.retention for line in lines.values()} <= RETENTION.keys()


def _configured(folder: Path) -> Path:
    path = folder / "sales-push.toml"
    officer = '[policy]\nofficer = { name = "Officer", address = "privacy@example.org" }\n'
    path.write_text(f'{officer}[policy.retention]\nr2 = "12 months"\n')
    return path


@promise("P-06", off={"policy.classes.RetentionSettings.periods": _as_written_by_hand})
def test_p06_the_public_table_says_what_is_configured(tmp_path: Path) -> None:
    config = str(_configured(tmp_path))
    told = CliRunner().invoke(commands, ["retention", "--json", "--config", config])
    assert {row["name"]: row["period"] for row in json.loads(told.stdout)}["R2"] == "12 months"
    page = CliRunner().invoke(commands, ["retention", "--html", "--config", config]).stdout
    assert "<td>12 months</td>" in page
    assert "13 months" not in page


@promise("P-06", off={"policy.retention.last_gone": _by_a_constant_of_its_own})
async def test_p06_the_sweeper_uses_what_the_table_says(tmp_path: Path, keyring: Keyring, redis: Redis) -> None:
    retention = load(PolicySettings, _configured(tmp_path)).retention
    async with sweeper(tmp_path, keyring, redis) as world:
        await world.put("hit", day=D, job=1, mref=1)
        world.now = gone_from(D, Period(12, "month")) * DAY_US - 1
        await world.sweep(retention)
        assert await world.count("hit") == 1
        world.now += 1
        await world.sweep(retention)
        assert await world.count("hit") == 0
