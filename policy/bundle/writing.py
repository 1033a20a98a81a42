"""The files of a bundle, and the folder where finished ones wait to be fetched.

    1. `assemble`   records into data/, csv/, schema/, README.html and the manifest over all of them; pure
    2. `zips.write` one zip, sealed under a one-time passphrase
    3. `keep`       0600 in data_dir/exports, whole or not at all, on the disk before anybody is told
    4. `expire`     gone after 7 days (4.6): the file, not only its name in a list

Law: the passphrase is told to the caller once and kept nowhere; it goes to the person another way than the file.

Known limits: the end of a file is counted from its time stamp, which `keep` sets to the instant it is given; a file
system that is restored without time stamps gives a bundle another 7 days. Nothing here overwrites what it unlinks:
the content is sealed and its passphrase is not here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from policy.bundle import csvs, pages, schemas
from policy.bundle.contents import KINDS, PORTABILITY, columns, line, sort
from policy.bundle.manifest import COMPLETE, NAME, PORTABLE, SCHEMA_VERSION, About, File, Manifest, encode, file_of
from policy.instants import DAY_US, rfc3339
from policy.personal import Record

FOLDER: Final = "exports"
KEPT_US: Final = 7 * DAY_US
_TICKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DRAFT: Final = ".part"


def assemble(records: Iterable[Record], about: About, *, bom: bool = False) -> dict[str, bytes]:
    """Every file of the bundle by its name in the zip. bom: CSV with a byte order mark. Raises ValueError."""
    told = sort(records, about.right)
    files: dict[str, bytes] = {}
    listed: dict[str, File] = {}

    def add(name: str, text: str, count: int | None = None) -> None:
        files[name] = text.encode()
        listed[name] = file_of(files[name], count)

    for name, lines in told.items():
        kind = KINDS[name]
        add(f"data/{kind.file}.jsonl", "".join(line(kind, values) + "\n" for values in lines), len(lines))
        names = columns(kind, lines) or [field.name for field in kind.fields]
        add(f"csv/{kind.file}.csv", csvs.write(names, lines, bom=bom), len(lines))
        add(f"schema/{kind.file}.schema.json", schemas.text_of(name, about.right))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        generator=about.generator,
        ticket=about.ticket,
        right=about.right,
        made_at=rfc3339(about.made_at),
        controllers=about.controllers,
        officer=about.officer,
        completeness=PORTABLE if about.right == PORTABILITY else COMPLETE,
        backups=about.backups,
        places=about.places,
        left_out=about.notes,
        files={},
    )
    add("README.html", pages.readme(manifest, told))
    by_name = dict(sorted(listed.items()))
    return {NAME: encode(replace(manifest, files=by_name)), **{name: files[name] for name in by_name}}


def path_of(folder: Path, ticket: str) -> Path:
    """Raises ValueError when the ticket is none: it becomes part of a file name."""
    if not _TICKET.fullmatch(ticket):
        raise ValueError("a ticket is 1 to 64 letters, digits, hyphens and underscores")
    return folder / f"export-{ticket}.zip"


def keep(folder: Path, ticket: str, content: bytes, now: int) -> Path:
    """Where the bundle lies now; replaces an earlier one of this ticket. Raises ValueError, OSError."""
    path = path_of(folder, ticket)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(path.name + _DRAFT)
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.utime(descriptor, ns=(now * 1000, now * 1000))
        os.fsync(descriptor)
    draft.replace(path)
    _sync(folder)
    return path


def expire(folder: Path, now: int) -> int:
    """Remove every bundle, and every draft a crash left, whose 7 days are over (the end is exclusive); how many."""
    if not folder.is_dir():
        return 0
    gone = 0
    for path in sorted(folder.glob("export-*.zip*")):
        if path.name.endswith((".zip", ".zip" + _DRAFT)) and now >= path.lstat().st_mtime_ns // 1000 + KEPT_US:
            path.unlink(missing_ok=True)
            gone += 1
    if gone:
        _sync(folder)
    return gone


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
