"""P-56: what was provided and observed, not what was concluded, as machines read it and another house takes it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from policy.bundle import csvs, entering
from policy.bundle.reading import Opened
from policy.enforcement import Effects
from policy.erasure import person_of
from policy.instants import DAY_US
from policy.keys import Keyring
from policy.personal import Premises, Record, every
from policy.store import Store
from tests.policy.bundle.test_entering import _meaning
from tests.policy.people import row_of
from tests.policy.stores import policy_store
from tests.promises.floor import EVE, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture
async def there(floor: Floor, tmp_path: Path) -> AsyncIterator[Premises]:
    """Another house: empty, with keys of its own."""
    folder = tmp_path / "there"
    folder.mkdir()
    keyring = Keyring.create(folder / "keys", 2968)
    with policy_store(folder) as engine:
        store = Store(engine)
        settings = floor.premises.settings.model_copy(update={"data_dir": folder})
        yield Premises(settings, store, floor.house.redis, lambda: keyring, lambda: NOW + DAY_US)
        await store.close()


_enter = entering.enter


def _without_events(conn: Connection, effects: Effects, keyring: Keyring, opened: Opened, *at: Any, **how: Any) -> Any:
    kept = [record for record in opened.records if record.kind != "event"]
    return _enter(conn, effects, keyring, replace(opened, records=kept), *at, **how)


async def _known(premises: Premises) -> list[Record]:
    """What the places of a house tell of Eve."""
    tag, _, _ = row_of(premises.keyring().pepper, EVE)
    person = await premises.store.write(lambda conn: person_of(conn, premises.keyring(), None, tag))
    return [record for place in every(premises) for record in await place.export(person)]


@promise("P-56", off={"policy.bundle.entering.enter": _without_events})
async def test_p56_imported_into_an_empty_instance_it_means_the_same(floor: Floor, there: Premises) -> None:
    before = _meaning(await _known(floor.premises))
    opened = floor.bundle(await floor.asks("portability"))

    def take(conn: Connection) -> None:
        entering.enter(conn, Effects(), there.keyring(), opened, NOW + DAY_US, make_accounts=True)

    await there.store.write(take)
    assert before
    assert _meaning(await _known(there)) == before


@promise("P-56", off={"policy.bundle.contents.PORTABILITY": "another right"})
async def test_p56_observed_yes_inferred_no(floor: Floor) -> None:
    opened = floor.bundle(await floor.asks("portability"))
    events = [record.values for record in opened.records if record.kind == "event"]
    assert {"opened", "clicked"} <= {event["event"] for event in events}
    assert not [event for event in events if event.get("visitor")]
    assert not [name for name in opened.files if "inferred" in name]


@promise("P-56", off={"policy.bundle.csvs._cell": lambda value: "" if value is None else str(value)})
def test_p56_no_cell_is_a_formula_and_every_cell_comes_back() -> None:
    evil: list[dict[str, Any]] = [{"name": text, "n": -5} for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "a")]
    text = csvs.write(["name", "n"], evil)
    cells = [line.partition(",")[0].strip('"') for line in text.splitlines()[1:]]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]
    assert csvs.read(text) == evil


@promise("P-56", off={"policy.records.rfc3339": str})
async def test_p56_lines_are_json_in_utf_8_with_instants_of_rfc_3339_in_utc(floor: Floor) -> None:
    opened = floor.bundle(await floor.asks("portability"))
    lines = [line for name, data in opened.files.items() if name.endswith(".jsonl") for line in data.splitlines()]
    values = [value for line in lines for value in json.loads(line.decode("utf-8")).items()]
    instants = [value for name, value in values if (name == "at" or name.endswith("_at")) and value is not None]
    assert len(instants) > 10
    assert not [value for value in instants if not INSTANT.fullmatch(value)]
