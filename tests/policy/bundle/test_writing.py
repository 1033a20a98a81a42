"""A bundle against the oracle: exactly what the places said, valid by its schemas, the same bytes each time."""

from __future__ import annotations

import copy
import json
import random
import stat
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # its stubs are a package of their own

from policy.bundle import gathering, writing, zips
from policy.bundle.contents import ACCESS, KINDS, PORTABILITY, sort
from policy.bundle.manifest import About, ManifestError, check
from policy.bundle.reading import mirror, open_bundle
from policy.instants import DAY_US
from policy.personal import Record
from tests.policy.bundle.people import NOW, PERSON, about, shelves

ROWS = 9


def _frozen(records: list[Record]) -> Counter[tuple[str, str]]:
    return Counter((record.kind, json.dumps(record.values, sort_keys=True)) for record in records)


@pytest.mark.parametrize("seed", range(3))
async def test_p42_the_bundle_is_the_oracles_list_record_for_record(seed: int) -> None:
    places = shelves(seed, ROWS)
    oracle = [record for place in places for record in place.records]
    gathered = await gathering.gather(places, PERSON)
    files = writing.assemble(gathered.records, about(ACCESS, gathered.places))
    told = [record for record in open_bundle(zips.write(files)).records if record.kind != "use"]
    assert _frozen(told) == _frozen(oracle)
    assert len(told) == len(places) * ROWS
    manifest = check(files)
    assert [(place.name, place.records) for place in manifest.places] == [(place.name, ROWS) for place in places]
    assert manifest.officer.address == "privacy@sender.example"
    assert manifest.completeness
    assert manifest.backups


def test_p56_portability_leaves_out_what_was_concluded_and_nothing_else() -> None:
    records = [record for place in shelves(1, ROWS) for record in place.records]
    files = writing.assemble(records, about(PORTABILITY))
    assert "data/inferred.jsonl" not in files
    expected = copy.deepcopy([record for record in records if record.kind != "inferred"])
    for record in expected:
        if record.kind == "event":
            del record.values["visitor"]
    told = [record for record in open_bundle(zips.write(files)).records if record.kind != "use"]
    assert _frozen(told) == _frozen(expected)
    assert "visitor" not in json.loads(files["schema/events.schema.json"])["properties"]


@pytest.mark.parametrize("right", [ACCESS, PORTABILITY])
def test_every_line_is_valid_by_the_schema_beside_it(right: str) -> None:
    records = [record for place in shelves(2, ROWS) for record in place.records]
    files = writing.assemble(records, about(right))
    seen = 0
    for name in files:
        if name.startswith("data/"):
            schema = json.loads(files[f"schema/{name[5:-6]}.schema.json"])
            Draft202012Validator.check_schema(schema)
            validator = Draft202012Validator(schema)
            for raw in files[name].splitlines():
                validator.validate(json.loads(raw))
                seen += 1
    assert seen >= ROWS * 11


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_schema_refuses_what_is_no_such_record(name: str) -> None:
    kind = KINDS[name]
    schema = json.loads(writing.assemble([], about(ACCESS))[f"schema/{kind.file}.schema.json"])
    assert not Draft202012Validator(schema).is_valid({"unknown": {"nested": 1}})
    required = next(field for field in kind.fields if field.required)
    assert not Draft202012Validator(schema).is_valid({})
    good = {
        field.name: {"text": "x", "instant": "2026-11-22T19:44:00.000000Z", "number": 1, "flag": True}[field.type]
        for field in kind.fields
    }
    assert Draft202012Validator(schema).is_valid(good)
    assert not Draft202012Validator(schema).is_valid({**good, required.name: None})
    for field in kind.fields:
        if field.type == "instant":
            assert not Draft202012Validator(schema).is_valid({**good, field.name: "2026-11-22 19:44"})


def test_same_records_in_any_order_are_the_same_bytes() -> None:
    records = [record for place in shelves(3, ROWS) for record in place.records]
    one = zips.write(writing.assemble(records, about(ACCESS)))
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert zips.write(writing.assemble(records, about(ACCESS))) == one


@pytest.mark.parametrize("bom", [False, True])
def test_the_csv_mirror_says_the_same(bom: bool) -> None:
    records = [record for place in shelves(4, ROWS) for record in place.records]
    files = writing.assemble(records, about(ACCESS), bom=bom)
    opened = open_bundle(zips.write(files))
    for name, lines in sort(records, ACCESS).items():
        assert files[f"csv/{KINDS[name].file}.csv"].startswith(b"\xef\xbb\xbf") is bom
        held = mirror(opened, name)
        assert [{key: value for key, value in line.items() if value is not None} for line in held] == [
            {key: value for key, value in line.items() if value is not None} for line in lines
        ]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: Counter[str] = Counter()
        self.tags: set[str] = set()
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "td":
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "td" and self._cell is not None:
            self.cells["".join(self._cell)] += 1
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def test_the_page_for_people_has_every_value_and_loads_nothing() -> None:
    records = [record for place in shelves(5, ROWS) for record in place.records]
    records.append(Record("inferred", {"what": "x", "value": "<script>alert(1)</script><img src=//evil.example>"}))
    page = _Page()
    text = writing.assemble(records, about(ACCESS))["README.html"].decode()
    page.feed(text)
    for lines in sort(records, ACCESS).values():
        for value in [value for values in lines for value in values.values() if isinstance(value, str)]:
            assert page.cells[value.replace("\r\n", "\n")] or page.cells[value], value
    assert page.tags.isdisjoint({"script", "img", "link", "a", "iframe"})
    assert "Acme &lt;&amp; Sons&gt;" in text


def test_a_changed_missing_or_added_file_is_named() -> None:
    files = writing.assemble([Record("inferred", {"what": "x"})], about(ACCESS))
    check(files)
    with pytest.raises(ManifestError, match=r"changed: data/inferred\.jsonl"):
        check({**files, "data/inferred.jsonl": b'{"what": "y"}\n'})
    with pytest.raises(ManifestError, match=r"missing: README\.html"):
        check({name: content for name, content in files.items() if name != "README.html"})
    with pytest.raises(ManifestError, match=r"not in the manifest: data/more\.jsonl"):
        check({**files, "data/more.jsonl": b""})
    with pytest.raises(ManifestError, match="file name that no bundle has"):
        manifest = files["manifest.json"].replace(b'"README.html"', b'"../README.html"')
        check({**files, "manifest.json": manifest, "../README.html": files["README.html"]})


async def test_a_place_whose_records_move_is_asked_again_and_told_of_when_it_goes_on() -> None:
    calm, restless = shelves(6, 2)[:2]
    calm.moving = 2
    gathered = await gathering.gather([calm, restless], PERSON)
    assert (gathered.notes, calm.asked, restless.asked) == ((), 3, 1)
    restless.moving = 99
    gathered = await gathering.gather([restless], PERSON)
    assert gathered.notes == ("Records of the place shelf subscription were changing while they were read.",)
    assert gathered.notes[0] in writing.assemble([], _noted(gathered.notes))["README.html"].decode()


def _noted(notes: tuple[str, ...]) -> About:
    return replace(about(ACCESS), notes=notes)


def test_a_right_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="access or portability"):
        writing.assemble([], about("erasure"))


def test_kept_for_seven_days_to_the_microsecond_and_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "exports"
    path = writing.keep(folder, "T-7", b"one", NOW)
    assert path == folder / "export-T-7.zip"
    assert writing.keep(folder, "T-7", b"two", NOW) == path
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "export-T-8.zip.part").write_bytes(b"what a crash left")
    other = folder / "notes.txt"
    other.write_bytes(b"somebody else's")
    assert writing.expire(folder, NOW + 7 * DAY_US - 1) == 0
    assert path.exists()
    assert writing.expire(folder, NOW + 7 * DAY_US) >= 1
    assert not path.exists()
    assert writing.expire(folder, NOW + 10_000 * DAY_US) in (0, 1)
    assert [one.name for one in folder.iterdir()] == ["notes.txt"]
    assert writing.expire(tmp_path / "nowhere", NOW) == 0


@pytest.mark.parametrize("ticket", ["", "../x", "a/b", "a.b", "x" * 65, "eve@example.com"])
def test_a_ticket_becomes_a_file_name_only_when_it_is_one(tmp_path: Path, ticket: str) -> None:
    with pytest.raises(ValueError, match="a ticket is"):
        writing.keep(tmp_path, ticket, b"", NOW)
