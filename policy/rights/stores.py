"""Places of personal data that the rights engine keeps itself: letters on their way, mail nobody has sorted yet.

    letters         data_dir/outbox       found by the tickets of a person's requests
    unsorted mail   data_dir/rights-mail  found by its sender

Laws: a letter that tells somebody of the end of their erasure must still reach them, so erasing counts it as left until
it is sent or its days are over (`outbox_days`, at most 28: within the 30 of P-54); letters of other requests are the
same. Unsorted mail of the person goes at once: what it asked for is in the request by then.

Known limits: mail is known by its From field; what others wrote about the person is not found. Both folders are read
file by file: they hold few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sqlalchemy import select

from policy.address import AddressError, normalise, parse, tag_of
from policy.instants import rfc3339
from policy.personal import Erased, Person, PersonalStore, Premises, Record
from policy.rights.mailbox import UNSORTED, read
from policy.rights.outbox import Outbox, Waiting
from policy.schema import request

OUTBOX: Final = "outbox"


class LettersPlace:
    name = "letters"
    covers: Sequence[str] = ("file:letters",)

    def __init__(self, premises: Premises, folder: Path) -> None:
        self._premises = premises
        self._outbox = Outbox(folder)

    async def find(self, person: Person) -> int:
        return len(await self._mine(person))

    async def export(self, person: Person) -> list[Record]:
        return [
            Record("letter", {"ticket": one.ticket, "letter": one.letter, "at": rfc3339(one.at)})
            for one in await self._mine(person)
        ]

    async def erase(self, person: Person) -> Erased:
        return Erased(0, len(await self._mine(person)))

    async def amend(self, person: Person, field: str, value: str) -> int:
        return 0

    async def _mine(self, person: Person) -> list[Waiting]:
        asked = select(request.c.ticket).where(request.c.tag == person.tag)
        tickets = await self._premises.store.write(lambda conn: set(conn.scalars(asked)))
        return [one for one in await asyncio.to_thread(self._outbox.waiting) if one.ticket in tickets]


class UnsortedMail:
    name = "unsorted mail"
    covers: Sequence[str] = ("file:unsorted mail",)

    def __init__(self, premises: Premises, folder: Path) -> None:
        self._premises = premises
        self._folder = folder

    async def find(self, person: Person) -> int:
        return len(await asyncio.to_thread(self._mine, person.tag))

    async def export(self, person: Person) -> list[Record]:
        mine = await asyncio.to_thread(self._mine, person.tag)
        return [
            Record("mail", {"received_at": rfc3339(int(path.name.partition("-")[0])), "text": read(raw).text})
            for path, raw in mine
        ]

    async def erase(self, person: Person) -> Erased:
        mine = await asyncio.to_thread(self._mine, person.tag)
        for path, _ in mine:
            await asyncio.to_thread(path.unlink, True)
        return Erased(len(mine))

    async def amend(self, person: Person, field: str, value: str) -> int:
        return 0

    def _mine(self, tag: bytes) -> list[tuple[Path, bytes]]:
        pepper = self._premises.keyring().pepper
        found: list[tuple[Path, bytes]] = []
        for path in sorted(self._folder.glob("[0-9]*-*.eml")):
            raw = path.read_bytes()
            try:
                sender = parse(read(raw).sender)
            except AddressError:
                continue
            if tag_of(pepper, normalise(sender.local, sender.domain)) == tag:
                found.append((path, raw))
        return found


def build(premises: Premises, outbox: Path | None = None) -> list[PersonalStore]:
    """outbox: where the settings have it; else in the data folder."""
    data = premises.settings.data_dir
    return [LettersPlace(premises, outbox or data / OUTBOX), UnsortedMail(premises, data / UNSORTED)]
