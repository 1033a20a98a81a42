"""Audience files, streamed: CSV or NDJSON in, rows out, each mistake with its line.

Law: reading never raises for what is in a file and never holds more than one row of it; the same file gives the same
rows in the same order, so that chunks are cut alike when a submission is repeated (engine.client.chunks). No message
quotes a cell.

CSV: UTF-8, comma, semicolon or tab, first line names. ``address`` (or ``email``), ``name``,
``consent.<purpose>.<source|time|wording|basis>``; every other column is a template field of that name. RFC 4180, so a
quoted cell may hold line breaks: a mistake is reported with the line its row begins on.
NDJSON: one row of the schema a line (``$defs/Recipient``), empty lines skipped.

Two grades: a row that cannot be read stops a submission; an address that is none is only told (the engine would refuse
that recipient alone, as ``invalid``).

Known limits: a CSV cell is text; numbers, lists and objects need NDJSON. A line is at most 1 MiB.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from engine.campaign.job import MOST_ROW_BYTES, Recipient
from engine.campaign.problems import Problem, examine, nearest, shown, type_info
from engine.campaign.strict import parse
from engine.campaign.validation import CHECKS, read_row
from policy.address import AddressError
from policy.address import parse as parse_address

MOST_LINE: Final = 1024 * 1024
_ADDRESS_COLUMNS: Final = ("address", "email", "e-mail", "mail")
_PURPOSES: Final = ("mail_marketing", "open_tracking", "click_tracking", "doe")
_EVIDENCE: Final = ("source", "time", "wording", "basis", "implied_by", "expires")


@dataclass(slots=True)
class Line:
    """One row of the file. recipient is None when it cannot be read; then problems say why.

    undeliverable: "" or the slug of what is wrong with the address.
    """

    number: int
    recipient: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    undeliverable: str = ""


class AudienceFile:
    """A CSV or NDJSON file as an iterable of rows that may be read again and again (each time from the disk)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.is_csv = path.suffix.lower() in (".csv", ".tsv", ".txt")
        self.at = 0  # bytes read in the current pass, for a progress bar

    def lines(self) -> Iterator[Line]:
        """Every row, good and bad."""
        with self.path.open("rb") as file:
            yield from (self._csv(file) if self.is_csv else self._ndjson(file))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows that can be read, as the producer contract wants them."""
        for line in self.lines():
            if line.recipient is not None:
                yield line.recipient

    def row(self, number: int) -> dict[str, Any] | None:
        """The recipient at this place, from 0, or None past the end."""
        for place, recipient in enumerate(self):
            if place == number:
                return recipient
        return None

    def _raw(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        self.at = 0
        number = 0
        while data := file.readline(MOST_LINE + 1):
            number += 1
            self.at += len(data)
            while len(data) > MOST_LINE and not data.endswith(b"\n"):  # too long: skip to its end, keep the excess
                rest = file.readline(MOST_LINE)
                if not rest:
                    break
                self.at += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, data

    def _ndjson(self, file: BinaryIO) -> Iterator[Line]:
        for number, raw in self._raw(file):
            text = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if not text:
                continue
            row = read_row(text)
            if row is not None:
                yield _judged(number, msgspec.to_builtins(row))
                continue
            place = f"line {number}"
            parsed = parse(text, MOST_ROW_BYTES)
            problems = parsed.problems or examine(parsed.value, Recipient, CHECKS)
            problems = problems or [Problem("$", "cannot be read as a recipient")]
            yield Line(number, problems=[Problem(place + p.path[1:], p.message, p.suggestion) for p in problems])

    def _csv(self, file: BinaryIO) -> Iterator[Line]:
        broken: set[int] = set()
        at = 0

        def texts() -> Iterator[str]:
            nonlocal at
            for number, raw in self._raw(file):
                at = number
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:
                    broken.add(number)
                    text = raw.decode("utf-8", "replace")
                if len(raw) > MOST_LINE:
                    broken.add(number)
                    text = "\n"
                yield text

        source = texts()
        head = next(source, "")
        delimiter = max(",;\t", key=head.count)
        names = next(csv.reader([head], delimiter=delimiter), [])
        columns, problems = _columns(names)
        if 1 in broken:
            problems.append(Problem("line 1", "is not UTF-8, or longer than 1 MiB", "save the file as UTF-8"))
        if problems:
            yield Line(1, problems=problems)
            return
        reader = csv.reader(source, delimiter=delimiter, strict=True)
        while True:
            begins = at + 1
            place = f"line {begins}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Line(begins, problems=[Problem(place, f"is not CSV: {error}")])
                continue
            if broken:
                broken.clear()
                yield Line(begins, problems=[Problem(place, "is not UTF-8, or longer than 1 MiB")])
            elif not cells:
                continue
            elif len(cells) != len(columns):
                said = f"has {len(cells)} cells, the first line names {len(columns)}"
                yield Line(begins, problems=[Problem(place, said, "put cells with the delimiter in quotes")])
            else:
                yield _checked(begins, _assembled(columns, cells))


def _columns(names: list[str]) -> tuple[list[tuple[str, ...]], list[Problem]]:
    """Where each column goes: ("address",), ("name",), ("fields", x) or ("consent", purpose, part)."""
    columns: list[tuple[str, ...]] = []
    problems: list[Problem] = []
    for number, given in enumerate(names, start=1):
        name = given.strip()
        place = f"line 1.column {number}"
        parts = name.split(".")
        if name.lower() in _ADDRESS_COLUMNS:
            column: tuple[str, ...] = ("address",)
        elif name == "name":
            column = ("name",)
        elif parts[0] == "consent":
            column = tuple(parts)
            if len(parts) != 3 or parts[1] not in _PURPOSES or parts[2] not in _EVIDENCE:
                problems.append(
                    Problem(
                        place, "is no evidence of consent", "consent.mail_marketing.time, .source, .wording, .basis"
                    )
                )
        else:
            column = ("fields", name)
            if not name.isascii() or not name.isidentifier() or len(name) > 64:
                problems.append(
                    Problem(place, f"{shown(name)!r} is no name for a template field", "letters, digits and underscore")
                )
        if column in columns:
            problems.append(Problem(place, "is there twice", "keep one"))
        columns.append(column)
    if ("address",) not in columns:
        known = [".".join(column) for column in columns if column[0] == "fields"]
        hint = next((nearest(name[7:], list(_ADDRESS_COLUMNS)) for name in known if "mail" in name.lower()), "")
        problems.append(Problem("line 1", "there is no column `address`", hint or "the first line names the columns"))
    return columns, problems


def _assembled(columns: list[tuple[str, ...]], cells: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        match column:
            case ("fields", name):
                row.setdefault("fields", {})[name] = cell
            case ("consent", purpose, part):
                if cell:
                    row.setdefault("consent", {}).setdefault(purpose, {})[part] = cell
            case (name,) if cell or name == "address":
                row[name] = cell
    return row


_RECIPIENT = type_info(Recipient)


def _checked(number: int, row: dict[str, Any]) -> Line:
    problems = examine(row, _RECIPIENT, CHECKS, f"line {number}")
    if problems:
        return Line(number, problems=problems)
    if len(msgspec.json.encode(row)) > MOST_ROW_BYTES:
        return Line(number, problems=[Problem(f"line {number}", f"is larger than {MOST_ROW_BYTES:,} bytes as JSON")])
    return _judged(number, row)


def _judged(number: int, row: dict[str, Any]) -> Line:
    try:
        parse_address(row["address"])
    except AddressError as error:
        return Line(number, row, undeliverable=error.reason)
    return Line(number, row)
