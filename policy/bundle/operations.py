"""What the writer does about bundles: make one for a request, take one in, end those whose time is over.

Promise: `Bundles.write` returns when the file is on the disk; its passphrase is in the answer and nowhere else.
`op_bundle_import` returns when everything taken is committed and in force at gate and trackers.

The engine of rights (`policy.rights`) calls `write` once the person's identity is proved; there is no operation that
writes a bundle without a request, and none that reads one to anybody.

Known limits: the file of an import is named by path, the caller is this host's service user.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

from policy import accounts, audit
from policy.bundle import entering, gathering, reading, writing, zips
from policy.bundle.manifest import About, Party
from policy.enforcement import Effects, Enforcement
from policy.instants import rfc3339
from policy.jobs import Refused
from policy.personal import Person, PersonalStore, Premises

_LARGEST: Final = zips.READ_LIMIT


@dataclass(frozen=True, slots=True, repr=False)
class Written:
    """path: the sealed file; passphrase: for the person, by another way than the file; ends: microseconds."""

    path: Path
    passphrase: str
    records: int
    ends: int
    notes: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """For the letter: the file itself comes by another way (handed over, or a mail of its own)."""
        return (
            f"Your data are in the file {self.path.name}, which you get separately. It is an AES-256 zip: 7-Zip,"
            f" WinZip, Keka and other programs open it with this passphrase: {self.passphrase}\n"
            f"We keep the file until {rfc3339(self.ends)[:10]} and the passphrase not at all."
        )


class Bundles:
    """places: `policy.personal.every(premises)`."""

    def __init__(self, premises: Premises, places: Sequence[PersonalStore]) -> None:
        self._premises = premises
        self._places = places
        self.folder = premises.settings.data_dir / writing.FOLDER

    async def write(self, person: Person, ticket: str, right: str, notes: Sequence[str] = ()) -> Written:
        """A bundle for a request of access or portability. notes: what the officer adds to the statement of
        completeness. Replaces an earlier one of this ticket. Raises ValueError, OSError, what a place raises."""
        path = writing.path_of(self.folder, ticket)  # a ticket that is none is refused before anybody is asked
        gathered = await gathering.gather(self._places, person)
        now = self._premises.clock()
        controllers = await self._premises.store.write(lambda conn: _controllers(conn, person))
        officer = self._premises.settings.officer
        about = About(
            ticket=ticket,
            right=right,
            made_at=now,
            generator=f"sales-push {version('sales-push')}",
            controllers=controllers,
            officer=Party(name=officer.name, address=officer.address),
            places=gathered.places,
            notes=(*gathered.notes, *notes),
        )
        secret = zips.passphrase()
        await asyncio.to_thread(_make, self.folder, gathered, about, secret)
        # the line comes after the file: a line without a file would claim an answer that nobody can fetch
        await self._premises.store.write(
            lambda conn: audit.append(conn, now, "officer", "bundle-write", f"request/{ticket}", right, "done")
        )
        return Written(path, secret, len(gathered.records), now + writing.KEPT_US, about.notes)

    async def expire(self) -> int:
        """Remove bundles whose 7 days are over; how many. Cheap: once an hour is often enough."""
        return await asyncio.to_thread(writing.expire, self.folder, self._premises.clock())


class BundleOperations:
    """The part that is asked over the socket."""

    def __init__(self, premises: Premises, enforcement: Enforcement) -> None:
        self._premises = premises
        self._enforcement = enforcement

    async def op_bundle_import(self, file: str, passphrase: str = "", make_accounts: bool = False) -> dict[str, Any]:
        """Counts by kind of what was taken and what was left, and the new rows of the ledger."""
        opened = await asyncio.to_thread(_read, Path(file), passphrase)

        def change(conn: Connection, effects: Effects) -> entering.Entered:
            now = self._premises.clock()
            return entering.enter(conn, effects, self._premises.keyring(), opened, now, make_accounts=make_accounts)

        entered: entering.Entered = await self._enforcement.apply(change)
        return {"taken": dict(entered.taken), "left": dict(entered.left), "rows": entered.rows}


def _make(folder: Path, gathered: gathering.Gathered, about: About, secret: str) -> None:
    content = zips.write(writing.assemble(gathered.records, about), secret)
    writing.keep(folder, about.ticket, content, about.made_at)


def _controllers(conn: Connection, person: Person) -> tuple[Party, ...]:
    """The accounts the question is about."""
    found = [accounts.by_number(conn, number) for number in sorted(person.accounts)]
    return tuple(
        Party(
            name=one.display_name or one.name, address=one.postal_address, website=one.website,
            privacy_url=one.privacy_url,
        )
        for one in found if one is not None
    )  # fmt: skip


def _read(path: Path, passphrase: str) -> reading.Opened:
    try:
        if path.stat().st_size > _LARGEST:
            raise Refused("refused", "this file is too large for a bundle")
        content = path.read_bytes()
    except OSError as error:
        raise Refused("not-found", f"the file cannot be read: {error.strerror}") from None
    return reading.open_bundle(content, passphrase)
