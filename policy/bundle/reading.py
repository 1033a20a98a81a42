"""A bundle opened: every file as its manifest says, every line a record again (P-56).

Law: nothing of a bundle is used before all of it was checked: hashes, counts, and that each line is one record of
plain values. What a bundle says is somebody else's word: `entering` decides what of it may count.

Known limits: a file of a kind this version does not know is refused; newer bundles say another schema version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from policy.bundle import csvs, zips
from policy.bundle.contents import KINDS
from policy.bundle.manifest import Manifest, ManifestError, check
from policy.personal import Record, Value

_LINE: Final = msgspec.json.Decoder(dict[str, str | int | bool | None])
_BY_FILE: Final = {f"data/{kind.file}.jsonl": kind for kind in KINDS.values()}


@dataclass(frozen=True, slots=True, repr=False)
class Opened:
    """records: in the order of the files, kinds as places named them."""

    manifest: Manifest
    files: Mapping[str, bytes]
    records: list[Record]


def open_bundle(data: bytes, passphrase: str = "") -> Opened:
    """Raises `zips.ZipError` or ManifestError (both ValueErrors, neither tells content)."""
    files = zips.read(data, passphrase)
    manifest = check(files)
    records: list[Record] = []
    for name, said in manifest.files.items():
        if not name.startswith("data/"):
            continue
        kind = _BY_FILE.get(name)
        if kind is None:
            raise ManifestError(f"{name} is no file of a bundle")
        lines = _lines(name, files[name])
        if said.records != len(lines):
            raise ManifestError(f"{name} holds {len(lines)} records, the manifest says {said.records}")
        records += [_record(kind.name, values) for values in lines]
    return Opened(manifest, files, records)


def mirror(opened: Opened, name: str) -> list[dict[str, Value]]:
    """The records of a kind as its CSV file has them: every field in every record. Raises ValueError."""
    return csvs.read(opened.files[f"csv/{KINDS[name].file}.csv"].decode())


def _lines(name: str, content: bytes) -> list[dict[str, Value]]:
    lines: list[dict[str, Value]] = []
    for number, raw in enumerate(content.split(b"\n")[:-1], 1):  # the last line ends too: behind it is nothing
        try:
            lines.append(dict(_LINE.decode(raw)))
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ManifestError(f"{name} line {number} is not a record of plain values") from None
    return lines


def _record(kind: str, values: dict[str, Value]) -> Record:
    if kind == "other":
        return Record(str(values.pop("kind", "other")), values)
    return Record(kind, values)
