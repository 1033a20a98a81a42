"""Keys in a running writer: weekly wrapping, a new pepper, an opt-out in another spelling."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import select

from policy import keyspace, peppers, suppression
from policy.address import normalise, parse, tag_of
from policy.instants import DAY_US
from policy.keys import Keyring, KeyringError
from policy.keyspace import partition_of
from policy.schema import open_store, subject
from policy.suppression import Scope
from policy.wire import SuppressionRecord
from policy.writer import Writer, clock_us
from tests.world.servers import PolicyWorld, policy_world, world
from tracker.links import Links

__all__ = ["world"]

ADA = "ada@one.example"


def tag(keyring: Keyring, address: str = ADA) -> bytes:
    mailbox = parse(address)
    return tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain))


async def in_redis(world: PolicyWorld, one: bytes, partition: int) -> bool:
    return bool(await world.redis.hexists(keyspace.suppression(partition, one), one))


async def suppress(world: PolicyWorld, keyring: Keyring, address: str = ADA, reason: str = "opt-out") -> None:
    record = SuppressionRecord(tag(keyring, address), partition_of(parse(address).domain), 1, 0, reason, "test")
    await world.ask.suppress([record])


async def test_a_new_week_wraps_everybody_anew() -> None:
    ahead = [0]
    async with policy_world(clock=lambda: clock_us() + ahead[0]) as world:
        account = await world.ask.account_add("acme")
        await world.ask.resolve(account, 1, [(tag(world.keyring), partition_of("one.example"), ADA)])
        ahead[0] = 8 * DAY_US
        await world.restart_writer()  # makes the new week's keys
        async with asyncio.timeout(20):
            while (fresh := Keyring.load(world.settings.keys_dir)).kek_id == world.keyring.kek_id:
                await asyncio.sleep(0.01)
            world.keyring = fresh
            await world.restart_writer()
            while (
                await world.writer.store.write(lambda conn: conn.execute(select(subject.c.kek_id)).scalar())
                != fresh.kek_id
            ):
                await asyncio.sleep(0.01)
        assert world.writer.statistics()["rewrapped"] == 1.0


async def test_an_opt_out_holds_for_the_mailbox_however_it_is_spelled(world: PolicyWorld) -> None:
    account, partition = await world.ask.account_add("acme"), partition_of("gmail.com")
    spelled, filed = tag(world.keyring, "b.o.b+shop@gmail.com"), tag(world.keyring, "bob@gmail.com")
    await world.ask.resolve(account, 1, [(spelled, partition, "b.o.b+shop@gmail.com")])
    await suppress(world, world.keyring, "b.o.b+shop@gmail.com", "bounce")
    assert not await in_redis(world, filed, partition)
    number = await world.ask.list_add(account, "news")
    await world.ask.opt_out(number, partition, spelled, "link")
    assert await in_redis(world, filed, partition)
    entries = await world.writer.store.write(lambda conn: suppression.check(conn, filed))
    assert [(entry.scope, entry.scope_id, entry.reason) for entry in entries] == [(Scope.LIST, number, "opt-out")]


async def test_after_a_new_pepper_nobody_is_written_to_again_and_old_links_work(world: PolicyWorld) -> None:
    """The service is stopped, the pepper turned, the service started: Redis follows, delivered links are understood."""
    before, partition = world.keyring, partition_of("one.example")
    account = await world.ask.account_add("acme")
    number = await world.ask.list_add(account, "news")
    url = "https://t.example"
    sent = Links(before.token, before.token_id, url).optout_token(number, partition, tag(before, "eve@one.example"))
    await suppress(world, before)
    await world.writer.stop()

    writer, reader = (open_store(world.settings.sql_address(), writer=is_writer) for is_writer in (True, False))
    peppers.rotate(world.settings.keys_dir, writer, reader, world.clock())
    reader.dispose()
    writer.dispose()
    with pytest.raises(KeyringError, match=r"made with pepper\.2"):
        await Writer(world.settings, before, clock=world.clock).start()
    world.keyring = after = Keyring.load(world.settings.keys_dir)
    world.writer = Writer(world.settings, after, clock=world.clock)
    await world.writer.start()

    assert await in_redis(world, tag(after), partition)
    heard = Links(after.token, after.token_id, url, after.heard).open_optout(sent)
    assert heard is not None
    assert heard.tag == tag(after, "eve@one.example")
    await world.ask.opt_out(heard.list, heard.partition, heard.tag, "link")
    assert await in_redis(world, tag(after, "eve@one.example"), partition)
