"""What is in the ledger leaves Redis also when a crash or an outage came between the commit and the trim (T9, I8)."""

from __future__ import annotations

import asyncio

from policy import keyspace
from policy.drains import EventBook
from policy.events import Batch, Event, Kind, encode_batch
from policy.schema import open_store
from policy.valkey import call
from policy.writer import Writer
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]


async def test_events_that_were_committed_and_not_trimmed_go_with_the_next_look(world: PolicyWorld) -> None:
    batch = Batch(1, "a.example", [Event(int(Kind.DEFERRED), 1, 1, world.clock())])
    stream = keyspace.events(3)
    identity = (await call(world.redis, "XADD", stream, "*", "b", encode_batch(batch))).decode()
    await world.drain()
    await world.writer.stop()
    # the same entry again, as a writer that died after its commit would have left it
    last = f"{int(identity.partition('-')[0]) + 1}-0"
    await call(world.redis, "XADD", stream, last, "b", encode_batch(batch))
    await _commit(world, stream, last, batch)
    assert await world.redis.xlen(stream) == 1

    world.writer = Writer(world.settings, world.keyring, clock=world.clock)
    await world.writer.start()
    async with asyncio.timeout(30):
        while await world.redis.xlen(stream):
            await asyncio.sleep(0.02)


async def _commit(world: PolicyWorld, stream: str, identity: str, batch: Batch) -> None:
    """What the dead writer's last transaction did."""
    engine = open_store(world.settings.sql_address(), writer=True)
    try:
        with engine.begin() as conn:
            EventBook(engine.dialect.name, world.keyring.service).record(conn, [(stream, identity, batch)])
    finally:
        engine.dispose()
