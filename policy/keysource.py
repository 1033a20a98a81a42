"""Where keys come from: a folder (also systemd's), or a command that asks whatever keeps them (decision 13, P-36).

Promise: whoever holds a `Source` loads the keyring, has a week's keys made and old ones destroyed without knowing where
they lie. No key, and nothing that a command prints, gets into an error text or a log.

    folder      `policy.keys`: files 0600 in a folder 0700; systemd's $CREDENTIALS_DIRECTORY is a folder that cannot be
                written, so there weekly keys are put and taken away by whoever keeps them
    command     ``keys_command = ["/usr/local/bin/our-keys"]``, run without a shell, with these arguments:
                  (none)              prints {"pepper.1": "<64 hexadecimal digits>", "kek.2968": "…", …}
                  make kek.2968       makes a key that is not there yet; exit code 0 when it is there afterwards
                  destroy kek.2968    destroys one, everywhere it is kept; exit code 0 when it is gone
                Another exit code, or no end within 10 s, is a failure: it is told with the command's name and tried
                again an hour later. Its error output is thrown away, it could quote what it prints.

When a key was made is known of a file. A command is not asked: what counts is when the writer first saw it, kept in SQL
beside the cursors (`born`), so that a key's successor has been there for a day whatever the clocks say.

The command runs at the start of each process and whenever its keys are read again, at least once an hour in the writer.

Known limits: destroying by command happens in the writer's transaction, like destroying a file: a slow command holds up
other writes for as long as it runs, a few times a week at most. DKIM keys are read from files whatever the source.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from sqlalchemy import Connection, delete, select

from policy import keys
from policy.cursors import set_rows
from policy.keys import WEEKLY, Keyring, KeyringError
from policy.schema import cursor

_PATIENCE_SECONDS: Final = 10.0
_LONGEST: Final = 1 << 20  # bytes of JSON: ten thousand keys
_SEEN: Final = "key:"


class Source(Protocol):
    """One place of keys. Its methods block: files, or a command."""

    def load(self) -> Keyring:
        """Raises KeyringError."""
        ...

    def ensure_week(self, week: int) -> bool:
        """Have this week's keys made where they are missing; True: load again. Raises KeyringError, OSError."""
        ...

    def weeks(self, name: str) -> dict[int, int | None]:
        """The weeks of which there is a key ("queue", "kek"), with when it was made (microseconds) where that is known.
        Raises KeyringError, OSError."""
        ...

    def destroy(self, name: str, weeks: Iterable[int]) -> None:
        """Destroy keys, and finish what was begun. Raises KeyringError, OSError: try again."""
        ...


class Folder:
    """Key files in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    def load(self) -> Keyring:
        return Keyring.load(self.path)

    def ensure_week(self, week: int) -> bool:
        return keys.ensure_week(self.path, week)

    def weeks(self, name: str) -> dict[int, int | None]:
        return dict(keys.weeks_in(self.path, name))

    def destroy(self, name: str, weeks: Iterable[int]) -> None:
        keys.destroy(self.path, name, weeks)


class Command:
    """A command that prints keys. arguments: the program and what always comes behind it."""

    def __init__(self, arguments: Sequence[str], *, patience: float = _PATIENCE_SECONDS) -> None:
        if not arguments:
            raise KeyringError("the keys command is empty: name a program in keys_command")
        self._arguments = list(arguments)
        self._patience = patience

    def __repr__(self) -> str:
        return f"Command({self._arguments[0]!r})"  # what stands behind the program may be a secret

    def load(self) -> Keyring:
        return Keyring.of(self._printed(), f"of {self._arguments[0]}: ")

    def ensure_week(self, week: int) -> bool:
        there = self._printed()
        missing = [name for kind in WEEKLY if (name := f"{kind}.{week}") not in there]
        for name in missing:
            self._run("make", name)
        if missing and (still := sorted(set(missing) - self._printed().keys())):
            raise KeyringError(f"the keys command {self._arguments[0]} said it made {still[0]}, but does not print it")
        return bool(missing)

    def weeks(self, name: str) -> dict[int, int | None]:
        found = (key.rpartition(".") for key in self._printed())
        return {int(number): None for kind, _, number in found if kind == name}

    def destroy(self, name: str, weeks: Iterable[int]) -> None:
        for week in weeks:
            self._run("destroy", f"{name}.{week}")

    def _printed(self) -> dict[str, bytes]:
        text = self._run()
        if len(text) > _LONGEST:
            raise KeyringError(f"the keys command {self._arguments[0]} prints more than a mebibyte: that is no keyring")
        try:
            told: Any = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict) or not all(isinstance(key, str) for key in told.values()):
            raise KeyringError(
                f'the keys command {self._arguments[0]} does not print {{"<name>": "<hexadecimal>"}}: run it by hand'
            ) from None
        return {
            name: keys.parse_key(key.encode("ascii", "replace"), f"of {self._arguments[0]}: {name}")
            for name, key in told.items()
            if keys.is_key(name)
        }

    def _run(self, *more: str) -> bytes:
        asked = f"the keys command {' '.join((self._arguments[0], *more))}"
        try:
            # standard error is not ours to read: it may quote a key
            done = subprocess.run(
                [*self._arguments, *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=self._patience, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise KeyringError(f"{asked} did not end within {self._patience:g} s") from None
        except OSError as error:
            raise KeyringError(f"{asked} cannot be run: {error.strerror}") from None
        if done.returncode:
            raise KeyringError(f"{asked} failed (exit code {done.returncode}): run it by hand to see why")
        return done.stdout


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name twice")  # which of the two is the key?
    return dict(pairs)


class Settled(Protocol):
    """What of the settings says where keys are (policy.settings.PolicySettings)."""

    @property
    def keys_dir(self) -> Path: ...

    @property
    def keys_command(self) -> Sequence[str]: ...


def source_of(settings: Settled) -> Source:
    """The source of the settings: the command where one is named, else the folder."""
    return Command(settings.keys_command) if settings.keys_command else Folder(settings.keys_dir)


def born(conn: Connection, name: str, weeks: Mapping[int, int | None], now: int) -> dict[int, int]:
    """Each week with when its key was made, or when it was first seen where the source does not know: remembered in
    this transaction, and forgotten when the key is gone."""
    known = {week: at for week, at in weeks.items() if at is not None}
    if len(known) == len(weeks):
        return known
    mine = cursor.c.stream.startswith(f"{_SEEN}{name}.", autoescape=True)
    rows = conn.execute(select(cursor.c.stream, cursor.c.last_id).where(mine))
    seen = {int(row.stream.rpartition(".")[2]): int(row.last_id) for row in rows}
    if gone := seen.keys() - weeks.keys():
        conn.execute(delete(cursor).where(cursor.c.stream.in_([f"{_SEEN}{name}.{week}" for week in gone])))
    fresh = {week: now for week in weeks if week not in known and week not in seen}
    set_rows(conn, {f"{_SEEN}{name}.{week}": at for week, at in fresh.items()})
    return {week: known.get(week, seen.get(week, now)) for week in weeks}
