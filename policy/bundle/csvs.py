"""The CSV mirror of a file: RFC 4180 for spread-sheets, harmless in them, and read back without loss. Pure.

Laws:
- no cell begins with a character that makes a spread-sheet take it for a formula (``= + - @`` and their full-width
  forms, tab, carriage return, line feed: OWASP "CSV injection", P-56), numbers excepted;
- `read` gives back exactly what `write` was given, types included: a cell says by itself what it is.

How a cell says it: nothing is an empty cell, flags are ``true`` and ``false``, numbers are digits, everything else is
text. A text that would be taken for one of those, for a formula, or that begins with an apostrophe itself has one
apostrophe in front, which spread-sheets know as "this is text" and `read` takes away again.

Known limits: a row of a record without some field and one where it is null look alike; the JSON lines tell them apart.
A file of records without any field at all cannot be said in CSV.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from policy.personal import Value

BOM: Final = "\ufeff"  # Excel takes UTF-8 without it for the local code page
_GUARD: Final = "'"
_SAYS_ELSE: Final = re.compile(r"[=+\-@\t\r\n'\uff1d\uff0b\uff0d\uff20\ufeff]|[0-9]+\Z|(?:true|false)?\Z")
_NUMBER: Final = re.compile(r"-?[0-9]+", re.ASCII)
_FLAGS: Final = {"true": True, "false": False}


def write(columns: Sequence[str], lines: Iterable[Mapping[str, Value]], *, bom: bool = False) -> str:
    """A header and a row a record, lines ended by CR LF."""
    out = io.StringIO(newline="")
    if bom:
        out.write(BOM)
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([_cell(name) for name in columns])
    writer.writerows([[_cell(values.get(name)) for name in columns] for values in lines])
    return out.getvalue()


def read(text: str) -> list[dict[str, Value]]:
    """The records of what `write` wrote. Raises ValueError when a row has not as many cells as the header."""
    reader = csv.reader(io.StringIO(text.removeprefix(BOM), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error:
        raise ValueError("this is not a CSV file by RFC 4180") from None
    names = [str(_value(cell)) for cell in rows[0]] if rows else []
    lines: list[dict[str, Value]] = []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells, the header has {len(names)}")
        lines.append({name: _value(cell) for name, cell in zip(names, row, strict=True)})
    return lines


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return _GUARD + value if _SAYS_ELSE.match(value) else value


def _value(cell: str) -> Value:
    if not cell:
        return None
    if cell[0] == _GUARD:
        return cell[1:]
    if cell in _FLAGS:
        return _FLAGS[cell]
    return int(cell) if _NUMBER.fullmatch(cell) else cell
