"""P-41: a mailbox whose own server says that it does not exist is marked, not deleted, and written to no more."""

from __future__ import annotations

from sqlalchemy import select

from policy import schema, vault
from policy.events import Batch, Event, Kind, Reason
from policy.gate import Permit, Refusal
from policy.invalid import Invalid
from tests.promises.floor import BOB, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


@promise("P-41", off={"policy.invalid.is_hard": lambda event: False})
async def test_p41_a_hard_bounce_marks_the_address_and_deletes_nothing(floor: Floor) -> None:
    tag, _, _ = floor.house.row(BOB)
    subject = await floor.write(lambda conn: vault.number_of(conn, 1, tag))
    jobs = schema.job.c
    job = await floor.write(lambda conn: conn.execute(select(jobs.number).where(jobs.account == 1).limit(1)).scalar())
    assert isinstance(await floor.gate(BOB), Permit)
    invalid = Invalid(floor.house.store, floor.house.enforcement, erased=lambda: floor.guard.tags)
    full = Event(int(Kind.BOUNCED), 5, 1, NOW, 7, tag, int(Reason.MAILBOX_FULL), 552, "5.2.2")
    await invalid.mark([("events", "1-1", Batch(job, "example.com", [full]))])
    assert isinstance(await floor.gate(BOB), Permit), "a full mailbox is not a dead one"
    domain = BOB.rpartition("@")[2]
    dead = Event(int(Kind.BOUNCED), 6, 1, NOW, 7, tag, int(Reason.USER_UNKNOWN), 550, "5.1.1")
    await invalid.mark([("events", "1-2", Batch(job, domain, [dead]))])
    assert isinstance(await floor.gate(BOB), Refusal)
    assert isinstance(await floor.gate(BOB, account=2), Permit), "one account's bounce is not another's business"
    assert await floor.standing(BOB) == {("bounce", "account", 1)}
    assert await floor.write(lambda conn: vault.number_of(conn, 1, tag)) == subject, "marked, not deleted"
