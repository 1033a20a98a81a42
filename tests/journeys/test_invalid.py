"""A dead mailbox in a running writer: from the event that says so to the gate, before that event counts (P-41)."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from policy import keyspace, schema, suppression
from policy.events import Batch, Event, Kind, Reason
from tests.journeys.test_writer import ADA, accept, done, mref, tag, tell
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]

BOB = "bob@one.example"


def bounced(world: PolicyWorld, address: str, reason: Reason, code: int, enhanced: str) -> Event:
    kind = int(Kind.BOUNCED)
    return Event(kind, mref(address), 1, world.clock(), 7, tag(world, address)[0], int(reason), code, enhanced, 3)


async def at_the_gate(world: PolicyWorld, address: str) -> bool:
    one, partition = tag(world, address)
    return bool(await world.redis.hexists(keyspace.suppression(partition, one), one))


async def test_p41_a_hard_bounce_is_written_to_no_more_and_deletes_nothing(world: PolicyWorld) -> None:
    accepted = await accept(world, "spring")
    people = [(*tag(world, one), one) for one in (ADA, BOB)]
    await world.ask.resolve(accepted.account, world.clock() // (7 * 86_400_000_000), people)
    dead = bounced(world, ADA, Reason.USER_UNKNOWN, 550, "5.1.1")
    full = bounced(world, BOB, Reason.MAILBOX_FULL, 552, "5.2.2")
    await tell(world, Batch(accepted.number, "one.example", [dead, full]))
    await tell(world, Batch(accepted.number, "one.example", [dead]))  # told twice
    await world.ask.expanded(accepted.number, 2)
    await done(world, accepted.number)

    def kept(conn: Any) -> tuple[Any, ...]:
        against = [suppression.check(conn, tag(world, one)[0]) for one in (ADA, BOB)]
        return against, len(conn.execute(select(schema.subject)).all()), len(conn.execute(select(schema.message)).all())

    (adas, bobs), subjects, messages = await world.writer.store.write(kept)
    [entry] = adas
    assert (entry.reason, entry.scope, entry.scope_id) == ("bounce", suppression.Scope.ACCOUNT, accepted.account)
    assert (bobs, subjects, messages) == ([], 2, 2)
    assert await at_the_gate(world, ADA)
    assert not await at_the_gate(world, BOB)
    assert world.writer.statistics()["mailboxes_invalid"] == 1.0
