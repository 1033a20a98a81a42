"""Bundles that wait to be fetched, as a place of personal data: a copy of everything about one person (P-17, P-54).

Who asks for a copy and then for erasure wants both, so an erasure takes no bundle away: each is counted as left, and
the receipt waits until it was handed over and removed, or its seven days are over (`policy.bundle.writing`). A receipt
that says "gone everywhere" while the copy still lies there would be a false statement to the person.

Laws:
- a bundle is found by the ticket of a request with the person's tag; nobody else's is looked into, and none is opened;
- its records are those that the places tell already, so it tells none of its own: a bundle would else list itself.

Known limits: at whichever account the person is erased, a bundle of the same person for another one holds up the
receipt, too. Drafts that a crash left carry the ticket and are counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

from sqlalchemy import select

from policy.bundle import writing
from policy.personal import Erased, Person, PersonalStore, Premises, Record
from policy.schema import request


class BundlesPlace:
    """See the plate."""

    name = "bundles"
    covers: Sequence[str] = ("file:bundles",)

    def __init__(self, premises: Premises) -> None:
        self._premises = premises
        self._folder = premises.settings.data_dir / writing.FOLDER

    def __repr__(self) -> str:
        return "<BundlesPlace>"

    async def find(self, person: Person) -> int:
        return 0

    async def export(self, person: Person) -> list[Record]:
        return []

    async def erase(self, person: Person) -> Erased:
        asked = select(request.c.ticket).where(request.c.tag == person.tag)
        tickets = await self._premises.store.write(lambda conn: set(conn.scalars(asked)))
        return Erased(left=await asyncio.to_thread(_waiting, self._folder, tickets))

    async def amend(self, person: Person, field: str, value: str) -> int:
        """What was true when it was made."""
        return 0


def _waiting(folder: Path, tickets: Collection[str]) -> int:
    """Bundles of these requests, whole or half."""
    names = {writing.path_of(folder, ticket).name for ticket in tickets}
    return sum(path.name.partition(".zip")[0] + ".zip" in names for path in folder.glob("export-*.zip*"))


def build(premises: Premises) -> list[PersonalStore]:
    """Entry point ``bundles`` of `policy.personal.GROUP`."""
    return [BundlesPlace(premises)]
