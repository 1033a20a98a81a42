"""The CSV mirror: RFC 4180, harmless in spread-sheets, read back without loss (P-56)."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.bundle import csvs

FORMULA = tuple("=+-@\t\r\n＝＋－＠")
texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["=1+1", "'", "''=", "-5", "+7", "@sum", "007", "true", "false", "", "a,b", 'a"b', "x\ry", "\ufeffx", "\x00"]
)
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts
tables = st.lists(texts, min_size=1, max_size=5, unique=True).flatmap(
    lambda names: st.tuples(st.just(names), st.lists(st.fixed_dictionaries(dict.fromkeys(names, values))))
)


@given(tables, st.booleans())
def test_what_is_written_is_read_back_types_included(
    table: tuple[list[str], list[dict[str, object]]], bom: bool
) -> None:
    names, lines = table
    text = csvs.write(names, lines, bom=bom)  # type: ignore[arg-type]
    told = csvs.read(text.encode().decode())
    assert told == lines
    assert [[type(line[name]) for name in names] for line in told] == [
        [type(line[name]) for name in names] for line in lines
    ]


@given(tables)
def test_no_cell_of_text_begins_a_formula(table: tuple[list[str], list[dict[str, object]]]) -> None:
    names, lines = table
    cells = list(csv.reader(io.StringIO(csvs.write(names, lines), newline="")))  # type: ignore[arg-type]
    assert not [cell for cell in cells[0] if cell.startswith(FORMULA)]
    for row, line in zip(cells[1:], lines, strict=True):
        for cell, name in zip(row, names, strict=True):
            assert not cell.startswith(FORMULA) or isinstance(line[name], int)


def test_lines_end_as_rfc_4180_says_and_the_mark_is_there_when_asked_for() -> None:
    text = csvs.write(["a", "b"], [{"a": 'x,"y"', "b": None}, {"a": True}], bom=True)
    assert text == '\ufeffa,b\r\n"x,""y""",\r\ntrue,\r\n'
    assert csvs.write(["a"], []) == "a\r\n"


def test_a_ragged_file_is_refused() -> None:
    with pytest.raises(ValueError, match="row 3 has 1 cells, the header has 2"):
        csvs.read("a,b\r\n1,2\r\n3\r\n")
    with pytest.raises(ValueError, match="RFC 4180"):
        csvs.read('a\r\n"b"c\r\n')
