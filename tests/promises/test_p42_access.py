"""P-42: access tells all that is held, from every place, with a manifest that verifies and schemas that hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # its stubs are a package of their own

from policy import files, keyspace, personal, schema
from policy.bundle import contents, gathering, reading, writing, zips
from policy.bundle.manifest import ManifestError, decode
from tests.policy.bundle.house import BOB, FACTS, facts
from tests.policy.bundle.people import PERSON, about, shelves
from tests.promises.floor import Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

ROWS = 7


def _without_one(places: Any, person: Any) -> Any:
    """As if one place were forgotten."""
    return _gather(places[:-1], person)


_gather = gathering.gather


@promise("P-42", off={"policy.bundle.gathering.gather": _without_one})
async def test_p42_n_rows_in_each_of_m_places_are_n_times_m_records() -> None:
    places = shelves(7, ROWS)
    gathered = await gathering.gather(places, PERSON)
    opened = reading.open_bundle(zips.write(writing.assemble(gathered.records, about(contents.ACCESS))))
    told = [record for record in opened.records if record.kind != "use"]
    assert len(told) == ROWS * len(places)
    assert sorted(repr(record.values) for record in gathered.records) == sorted(
        repr(record.values) for place in places for record in place.records
    )


@promise("P-42", off={"policy.records.Visits.told": lambda self, conn, person: iter(())})
async def test_p42_the_bundle_of_the_real_places_is_what_was_put_in_and_nothing_of_the_neighbour(floor: Floor) -> None:
    told = await floor.told()
    assert facts(told) == FACTS
    assert BOB not in str([record.values for record in told]).lower()


@promise("P-42", off={"policy.bundle.reading.check": lambda files: decode(files["manifest.json"])})
async def test_p42_the_manifest_finds_one_changed_bit() -> None:
    records = [record for place in shelves(8, ROWS) for record in place.records]
    made = writing.assemble(records, about(contents.ACCESS))
    reading.open_bundle(zips.write(made))
    name = "data/messages.jsonl"
    made[name] = made[name].replace(b"delivered", b"delivereD")
    with pytest.raises(ManifestError, match="messages"):
        reading.open_bundle(zips.write(made))


@promise("P-42", off={"policy.bundle.writing.schemas.text_of": lambda name, right: "{}"})
def test_p42_every_line_is_valid_by_the_schema_beside_it_which_refuses_others() -> None:
    records = [record for place in shelves(9, ROWS) for record in place.records]
    made = writing.assemble(records, about(contents.ACCESS))
    for name in [name for name in made if name.startswith("data/")]:
        validator = Draft202012Validator(json.loads(made[f"schema/{name[5:-6]}.schema.json"]))
        assert not validator.is_valid({})
        assert all(validator.is_valid(json.loads(line)) for line in made[name].splitlines())


def _but_the_queue(premises: Any) -> list[Any]:
    return [place for place in _every(premises) if place.name != "queue"]


_every = personal.every


# Not asked about a person: the stores' own files, whose contents are asked by table and key; the proof of erasures,
# which outlives them on purpose (keyed, P-22); and bundles, which are answers of this very kind and end in 7 days.
APART = {
    "file:ledger", "file:ledger, being converted", "file:queue", "file:queue, being rewritten", "file:tombstones",
    "file:backup, being made", "file:restore, being made ready",
}  # fmt: skip


@promise("P-42", off={"policy.personal.every": _but_the_queue})
async def test_p42_every_table_key_and_file_that_may_hold_a_person_is_asked(floor: Floor) -> None:
    """Redis and files too: what the inventory says may hold somebody is covered by a place that is asked."""
    tables = {item.column.partition(".")[0] for item in schema.inventory() if item.personal != schema.NONE}
    holding = (
        {f"table:{name}" for name in tables}
        | {f"key:{one.name}" for one in keyspace.CATALOGUE if one.personal != "none"}
        | {f"file:{one.name}" for one in files.CATALOGUE if one.personal != "none"}
    )
    covered = {name for place in floor.places for name in place.covers}
    assert sorted(holding - covered - APART) == []
