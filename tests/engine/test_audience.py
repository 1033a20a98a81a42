"""Audience files: streamed, the same twice, each mistake with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.campaign.audience import MOST_LINE, AudienceFile, Line


def lines_of(folder: Path, data: bytes | str, name: str = "people.csv") -> list[Line]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(AudienceFile(path).lines())


def told(lines: list[Line]) -> list[str]:
    return [str(problem) for line in lines for problem in line.problems]


def rows(lines: list[Line]) -> list[dict[str, Any] | None]:
    return [line.recipient for line in lines]


def test_csv_columns_go_where_they_belong(tmp_path: Path) -> None:
    data = (
        "email,name,city,consent.mail_marketing.source,consent.mail_marketing.time\n"
        'ada@one.example,Ada,"Graz, ""centre""",form,2026-01-01T00:00:00Z\n'
        "bob@two.example,,Porto,,\n"
    )
    lines = lines_of(tmp_path, data)
    assert told(lines) == []
    assert rows(lines) == [
        {
            "address": "ada@one.example",
            "name": "Ada",
            "fields": {"city": 'Graz, "centre"'},
            "consent": {"mail_marketing": {"source": "form", "time": "2026-01-01T00:00:00Z"}},
        },
        {"address": "bob@two.example", "fields": {"city": "Porto"}},
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_spellings_of_csv(tmp_path: Path, delimiter: str, ending: str, mark: bytes) -> None:
    text = ending.join([f"address{delimiter}city", f"ada@one.example{delimiter}Košice", ""])
    lines = lines_of(tmp_path, mark + text.encode())
    assert rows(lines) == [{"address": "ada@one.example", "fields": {"city": "Košice"}}]


def test_mistakes_name_their_line(tmp_path: Path) -> None:
    data = (
        b"address,city,consent.mail_marketing.time\n"
        b"ada@one.example,Graz,\n"
        b"too,few\n"
        b'bob@two.example,"two\nlines",\n'
        b"carl@three.example,caf\xe9,\n"
        b"not an address,Lyon,\n"
        b"dana@four.example,Porto,soon\n"
        b"\n"
        b'emil@five.example,"open,\n'
    )
    lines = lines_of(tmp_path, data)
    assert [(line.number, line.recipient is not None) for line in lines] == [
        (2, True), (3, False), (4, True), (6, False), (7, True), (8, False), (10, False),
    ]  # fmt: skip
    said = told(lines)
    assert said[0].startswith("line 3: has 2 cells, the first line names 3")
    assert said[1].startswith("line 6: is not UTF-8")
    assert said[2].startswith("line 8.consent.mail_marketing.time: is not a date-time")
    assert said[3].startswith("line 10: is not CSV")
    assert lines[4].undeliverable == "no-at-sign"
    assert lines[2].recipient == {"address": "bob@two.example", "fields": {"city": "two\nlines"}}
    assert not any("example" in text for text in said)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("name,city", "there is no column `address`"),
        ("", "there is no column `address`"),
        ("address,city,city", "is there twice"),
        ("address,my city", "is no name for a template field"),
        ("address,consent.mail_marketing", "is no evidence of consent"),
        ("address,consent.spam.time", "is no evidence of consent"),
    ],
)
def test_a_first_line_that_names_nothing_useful(tmp_path: Path, head: str, said: str) -> None:
    lines = lines_of(tmp_path, head + "\na@b.example,x\n")
    assert len(lines) == 1
    assert said in told(lines)[0]


def test_ndjson_mistakes_name_line_and_field(tmp_path: Path) -> None:
    data = "\n".join(
        [
            '{"address": "ada@one.example", "fields": {"points": 3, "offers": ["tea", "walk"]}}',
            "",
            '{"adress": "bob@two.example"}',
            '{"address": "a@b.example", "fields": {"x": 1, "x": 2}}',
            "nonsense",
            '{"address": "nobody"}',
            '{"address": "a@b.example", "fields": {"x": [[1]]}}',
        ]
    )
    lines = lines_of(tmp_path, data, "people.ndjson")
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7]
    said = told(lines)
    assert said[0].startswith("line 3.address: is missing")
    assert said[1].startswith("line 3.adress: there is no such field (did you mean 'address'?)")
    assert said[2].startswith("line 4.fields.x: the name comes twice")
    assert said[3].startswith("line 5: not JSON")
    assert said[4].startswith("line 7.fields.x[0]")
    assert lines[4].undeliverable == "no-at-sign"
    first = lines[0].recipient
    assert first is not None
    assert first["fields"]["offers"] == ["tea", "walk"]


def test_a_line_without_end_does_not_fill_memory(tmp_path: Path) -> None:
    data = b"address\n" + b"x" * (3 * MOST_LINE) + b"\nada@one.example\n"
    lines = lines_of(tmp_path, data)
    assert [line.recipient is not None for line in lines] == [False, True]
    assert "longer than 1 MiB" in told(lines)[0]
    lines = lines_of(tmp_path, b"{" * (3 * MOST_LINE) + b'\n{"address": "ada@one.example"}', "p.ndjson")
    assert [line.recipient is not None for line in lines] == [False, True]


def test_a_file_reads_the_same_twice_and_by_place(tmp_path: Path) -> None:
    path = tmp_path / "people.ndjson"
    path.write_text("\n".join(json.dumps({"address": f"p{n}@one.example"}) for n in range(50)))
    audience = AudienceFile(path)
    assert list(audience) == list(audience)
    assert audience.at == audience.size
    assert audience.row(7) == {"address": "p7@one.example"}
    assert audience.row(50) is None
