"""``manifest.json``: who made this bundle for whom, what is in it, and how to see that nothing was changed. Pure.

Law: `check` accepts exactly the files that the manifest names with the bytes it names: one more, one less, one changed
bit is a `ManifestError` that says which file. The manifest itself is vouched for by whoever hands the bundle over.

Known limits: SHA-256 tells a change, not who made it; the bundle is not signed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

SCHEMA_VERSION: Final = 1
_PLAIN: Final = re.compile(r"(?:(?:data|csv|schema)/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NAME: Final = "manifest.json"
COMPLETE: Final = (
    "This bundle holds every record that each place listed under `places` keeps about the person, queues and work in "
    "progress included. What is kept without naming anybody (sums, rates) is not about a person and not in it."
)
PORTABLE: Final = (
    "This bundle holds what the person provided and what was observed of them, from every place listed under `places` "
    "(GDPR 20). What was concluded about them is left out: ask for access (GDPR 15) to see that too."
)
BACKUPS: Final = (
    "Copies of the database exist for a limited time to survive the loss of a disk. They hold nothing of the person "
    "that this bundle does not show, except what was changed or erased since they were made; nobody looks into them, "
    "and a restored copy is brought up to date with every erasure before it serves again."
)


class ManifestError(ValueError):
    """A bundle that is not what its manifest says. The text names files of the bundle, never their content."""


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """A controller or officer: name, and how to reach them."""

    name: str
    address: str = ""
    website: str = ""
    privacy_url: str = ""


class Place(msgspec.Struct, frozen=True):
    """A place that was asked. covers: names of the data inventory; records: how many it gave."""

    name: str
    covers: tuple[str, ...]
    records: int


class File(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int
    records: int | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int
    generator: str
    ticket: str
    right: str
    made_at: str
    controllers: tuple[Party, ...]
    officer: Party
    completeness: str
    backups: str
    places: tuple[Place, ...]
    left_out: tuple[str, ...]
    files: dict[str, File]


@dataclass(frozen=True, slots=True)
class About:
    """What stands in a manifest apart from the files. made_at: microseconds; notes: what the officer adds to the
    statement of completeness (a hold, a gag that has ended, records of others that were blacked out)."""

    ticket: str
    right: str
    made_at: int
    generator: str
    controllers: tuple[Party, ...]
    officer: Party
    places: tuple[Place, ...] = ()
    notes: tuple[str, ...] = ()
    backups: str = BACKUPS


def file_of(content: bytes, records: int | None = None) -> File:
    return File(hashlib.sha256(content).hexdigest(), len(content), records)


def encode(manifest: Manifest) -> bytes:
    """Indented, members in the order of the class, files by name."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(data: bytes) -> Manifest:
    """Raises ManifestError, also when a newer version wrote it."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ManifestError(f"{NAME} is not the manifest of a bundle") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ManifestError(f"{NAME} has schema version {manifest.schema_version}, this is {SCHEMA_VERSION}")
    return manifest


def check(entries: Mapping[str, bytes]) -> Manifest:
    """The manifest of these files, every one as it says. Raises ManifestError."""
    if NAME not in entries:
        raise ManifestError(f"there is no {NAME}")
    manifest = decode(entries[NAME])
    if not all(_PLAIN.fullmatch(name) for name in manifest.files):
        raise ManifestError(f"{NAME} has a file name that no bundle has")  # whoever unpacks would write it anywhere
    _none(sorted(set(manifest.files) - set(entries)), "missing")
    _none(sorted(set(entries) - set(manifest.files) - {NAME}), "not in the manifest")
    changed = [
        name
        for name, said in sorted(manifest.files.items())
        if hashlib.sha256(entries[name]).hexdigest() != said.sha256 or len(entries[name]) != said.bytes
    ]
    _none(changed, "changed")
    return manifest


def _none(names: Sequence[str], what: str) -> None:
    if names:
        raise ManifestError(f"{what}: {', '.join(names[:5])}")
