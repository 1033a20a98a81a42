"""P-41: who changes address keeps both histories apart: the old one stays suppressed, the new one agreed to nothing.

Hard bounces: `test_p41_bounces`.
"""

from __future__ import annotations

from sqlalchemy import Connection, update

from policy import consent, schema, vault
from policy.address import normalise, parse, tag_of
from policy.enforcement import Effects
from policy.keys import Keyring
from policy.rights.carrying import Carrying
from policy.rights.requests import Asked
from policy.suppression import Entry, Scope, add
from tests.promises.floor import BOB, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

NEW = "robert@example.net"


def _renamed(self: Carrying, conn: Connection, effects: Effects, asked: Asked, text: str, now: int) -> None:
    """What one would do without thinking: the same person under another address."""
    keyring: Keyring = self._keyring()
    mailbox = parse(text)
    tag = tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain))
    conn.execute(update(schema.subject).where(schema.subject.c.tag == asked.tag).values(tag=tag))


async def _moved(floor: Floor) -> int:
    """Bob writes from another address now; the number of the new subject."""
    await floor.asks("rectification", BOB, details={"field": "address", "value": NEW})
    tag, _, _ = floor.house.row(NEW)
    number = await floor.write(lambda conn: vault.number_of(conn, 1, tag))
    assert isinstance(number, int)
    return number


@promise("P-41", off={"policy.rights.carrying.Carrying._move": _renamed})
async def test_p41_the_new_address_does_not_inherit_consent(floor: Floor) -> None:
    old = await floor.write(lambda conn: vault.number_of(conn, 1, floor.house.row(BOB)[0]))
    assert await floor.write(lambda conn: consent.standing(conn, [old], "mail_marketing", NOW)) == {old}
    new = await _moved(floor)
    assert await floor.write(lambda conn: consent.history(conn, new)) == []
    assert await floor.standing(NEW) == set()
    assert len(await floor.write(lambda conn: consent.history(conn, old))) == 2, "the old one keeps its history"


@promise("P-41", off={"policy.rights.protections.suppress_for_good": lambda *asked: None})
async def test_p41_the_old_address_stays_suppressed_and_is_written_to_no_more(floor: Floor) -> None:
    tag, partition, _ = floor.house.row(BOB)
    before = Entry(tag, partition, Scope.ACCOUNT, 1, "complaint", NOW)
    await floor.write(lambda conn: add(conn, [before]))
    await _moved(floor)
    assert await floor.standing(BOB) == {("complaint", "account", 1), ("manual", "account", 1)}
