"""Every attempt is the same message, byte for byte: Message-ID, Date, boundary, tokens, return path and signature.

Sources: promise T8 and design section 5 (a copy that arrives twice is known as one), S-06 (a late bounce finds its
message). What must not change it: another attempt, a connection that died behind the dot, a re-seal under another
queue key, a worker that died, another worker.
"""

from __future__ import annotations

import email
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from engine.delivery.hand import Hand, Letter
from engine.queue.lanes import JobState, Lanes, Lease, PutRequest, Settled, SettleRequest
from engine.queue.lanes import Retry as Moved
from engine.queue.schedule import Retry
from engine.queue.slices import Contents, Lost, build, open_slice, resealed, retry_of
from engine.queue.sweeps import Sweeps
from policy import keyspace
from policy.gate import Permit
from policy.instants import week_of
from policy.keys import Keyring
from tests.chaos.sink import Entry, read_record
from tests.world.courier import DOMAIN, CourierWorld, Job, courier_world, make_job, row
from tests.world.queue_census import FAR
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]
NEXT_SECOND = Retry(schedule=(1.5,))  # at least 1.1 s later: a Date of the attempt's own would differ


async def copies(world: CourierWorld, count: int) -> list[Entry]:
    """What the server stored, whatever it answered."""

    def stored() -> list[Entry]:
        return [entry for entry in read_record(world.record) if entry.stored]

    await world.until(lambda: len(stored()) == count)
    return stored()


def is_one_message(entries: list[Entry]) -> bool:
    assert all(entry.sha and entry.message_id and entry.token for entry in entries)
    return len({(entry.sha, entry.message_id, entry.sender, entry.rcpt, entry.size) for entry in entries}) == 1


async def test_a_deferred_message_comes_again_as_it_was() -> None:
    async with courier_world(keep=True, retry=NEXT_SECOND) as world:
        await world.put(world.job(), ["ada+dot.451.stored+first.1"])
        entries = await copies(world, 2)

        assert [entry.reply[:3] for entry in entries] == ["451", "250"]
        assert is_one_message(entries)
        wires = [path.read_bytes() for path in sorted((world.folder / "kept").iterdir())]
        assert len(set(wires)) == 1
        message = email.message_from_bytes(wires[0])
        for name in ("Message-ID", "Date", "DKIM-Signature", "List-Unsubscribe"):
            assert message[name], "a message without it proves nothing"
        assert message.get_boundary()
        pages = [part.get_payload(decode=True) for part in message.walk() if part.get_content_type() == "text/html"]
        page = pages[0]
        assert isinstance(page, bytes)
        assert re.search(rb"https://track\.example/c/[\w-]{20,}", page), "a click token"
        assert re.search(rb"https://track\.example/o/[\w-]{20,}", page), "an open token"


async def test_a_copy_after_a_connection_that_died_behind_the_dot_is_the_same() -> None:
    async with courier_world(retry=NEXT_SECOND) as world:
        await world.put(world.job(), ["bob+dot.close.stored+first.1"], resend=True)
        entries = await copies(world, 2)

        assert [entry.t_reply_written is None for entry in entries] == [True, False]
        assert is_one_message(entries)


def written(job: Job, keys: Mapping[int, bytes], keyring: Keyring, lease: Lease) -> dict[str, tuple[str, bytes]]:
    """What would be sent for each recipient of a lease: (envelope sender, signed message)."""
    opened = open_slice(keys, lease.partition, lease.data)
    assert not isinstance(opened, Lost)
    hand = Hand(lease, *opened, job, keyring.pepper)
    pairs = []
    for index in opened[0].pending():
        mref = hand.reference(index)[0]
        pairs.append((Permit(job.number, mref, 0.0), Letter(hand, index, mref)))
    composed, failed = job.compose(pairs)
    assert failed == []
    return {recipient: (sender, wire) for _, sender, recipient, wire in composed}


async def test_neither_a_crash_nor_another_key_nor_another_worker_changes_a_byte(
    valkey: ValkeyServer, tmp_path: Path
) -> None:
    keyring = Keyring.create(tmp_path / "keys", week_of(time.time_ns() // 1000))
    job = make_job(1, keyring)
    partition, lane = keyspace.partition_of(DOMAIN), keyspace.lane_ref(DOMAIN, keyring.lane)
    first_week, next_week = keyring.queue_id, keyring.queue_id + 1
    keys = {first_week: keyring.queue[first_week], next_week: os.urandom(32)}
    contents = Contents(DOMAIN, ["name"], [row(name, place) for place, name in enumerate(["ada", "bob", "cid"])])
    data = build(keys[first_week], first_week, 1, partition, lane, contents, expires_at=FAR)
    one, other = Lanes(valkey.client, "host/one"), Lanes(valkey.client, "host/other")
    state = JobState(1, 1, 0, False, FAR, False, 1)
    assert await one.put([PutRequest(partition, 1, 0, state, [(0, data)])]) == [True]

    [lease] = (await one.lease(partition, [], 1)).slices
    first = written(job, keys, keyring, lease)
    assert await other.reclaim(partition, "host/one", (await other.holders(partition))["host/one"]) == 1

    sweeps = Sweeps(valkey.client, "host/other")
    seen = [one for one in (await sweeps.scan(0, 10_000))[1] if one.partition == partition]
    [stored] = await sweeps.read(seen)
    assert stored is not None
    anew = resealed(keys, next_week, partition, stored)
    assert isinstance(anew, bytes)
    assert await sweeps.reseal([(seen[0], anew)]) == 1

    [again] = (await other.lease(partition, [], 1)).slices
    second = written(job, {next_week: keys[next_week]}, keyring, again)
    assert second == first
    assert len(second) == 3

    opened = open_slice(keys, partition, again.data)
    assert not isinstance(opened, Lost)
    moved = retry_of(keys[next_week], next_week, partition, *opened, [1, 2])
    request = SettleRequest(partition, again.slice_id, again.token, [0], retries=[Moved(0.0, moved, [1, 2])])
    assert await other.settle(request) is Settled.GONE
    [third] = (await one.lease(partition, [], 1)).slices
    kept = written(job, keys, keyring, third)
    assert kept == {recipient: first[recipient] for recipient in kept}
    assert len(kept) == 2
