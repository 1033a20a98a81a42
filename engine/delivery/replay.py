"""What a dead worker left: its journal is carried out before its slices are given to anybody else (T6, T8).

Path: 1. read the journal folder, cutting a torn tail; 2. outcomes that are on the disk are settled under the dead
worker's own lease tokens, which nobody has taken yet; 3. intents without outcome are in doubt: `hold` ends them
UNKNOWN, `resend` moves them to one more attempt; 4. after an unclean boot every leased recipient without outcome is in
doubt, because the tail may be missing although it was written; 5. what is left of its leases goes back to the lanes;
6. the files go. Run twice it does nothing twice: tokens and done bits say what is already written.

Known limits: waits for Redis as long as it takes; a worker that cannot replay must not send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.delivery.campaigns import Campaigns
from engine.queue import journal, schedule
from engine.queue.journal import LeaseKey, Plan
from engine.queue.lanes import Lanes, Retry, SettleRequest
from engine.queue.slices import Contents, Header, Lost, open_slice, retry_of
from policy import keyspace
from policy.address import mref_of, normalise, tag_of
from policy.events import TERMINAL, Batch, Event, Kind, Reason, decode_batch, encode_batch
from policy.keys import Keyring

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was found and done. torn: bytes at the end of a file that were not a whole record."""

    outcomes: int = 0
    in_doubt: int = 0
    released: int = 0
    torn: int = 0


async def replay(
    folder: Path,
    *,
    redis: Redis,
    lanes: Lanes,
    campaigns: Campaigns,
    keyring: Keyring,
    retry: schedule.Retry,
    now_us: int,
    jitter: Callable[[], float],
    ours: str = "",
) -> Replayed:
    """Carry out one worker's journal folder. lanes: of the living worker, whose own holder
    name is `ours`; the dead one's names come from its files."""
    logs = [each for each in journal.read_folder(folder) if not ours or each.holder != ours]
    if not logs:
        return Replayed()
    found = journal.plan(logs, journal.boot_id())
    torn = sum(each.torn for each in logs)
    if torn:
        log.warning("a journal had a torn tail", extra={"bytes": torn})
    outcomes = in_doubt = 0
    for key in await _leases_of(lanes, found):
        request, settled, doubted = await _request(
            key, found, redis=redis, campaigns=campaigns, keyring=keyring, retry=retry, now_us=now_us, jitter=jitter
        )
        outcomes += settled
        in_doubt += doubted
        if request is not None:
            await _patiently(partial(_settle, lanes, request))
    released = 0
    for holder in found.holders:
        for partition in range(keyspace.PARTITIONS):
            seen = (await _patiently(partial(lanes.holders, partition))).get(holder, 0)
            taken = await _patiently(partial(lanes.reclaim, partition, holder, seen))
            released += taken or 0
    journal.discard(logs)
    done = Replayed(outcomes, in_doubt, released, torn)
    log.info(
        "a journal was replayed",
        extra={"outcomes": outcomes, "in_doubt": in_doubt, "slices_released": released, "unclean": found.unclean},
    )
    return done


T = TypeVar("T")


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Redis may still be starting; nothing may be sent before this is through, so there is nothing better to do."""
    while True:
        try:
            return await ask()
        except (RedisError, OSError):
            await asyncio.sleep(0.5)


async def _settle(lanes: Lanes, request: SettleRequest) -> None:
    if (await lanes.settle_many([request]))[0] is None:
        raise ConnectionError("the store did not take it")


async def _leases_of(lanes: Lanes, found: Plan) -> list[LeaseKey]:
    """Every lease the journal speaks of; after an unclean boot also those it is silent about."""
    keys = set(found.outcomes) | set(found.in_doubt)
    if found.unclean:
        for holder in found.holders:
            for partition in range(keyspace.PARTITIONS):
                leases = await _patiently(partial(lanes.holder_leases, partition, holder))
                keys.update((partition, slice_id, token) for slice_id, token in leases)
    return sorted(keys)


async def _request(
    key: LeaseKey,
    found: Plan,
    *,
    redis: Redis,
    campaigns: Campaigns,
    keyring: Keyring,
    retry: schedule.Retry,
    now_us: int,
    jitter: Callable[[], float],
) -> tuple[SettleRequest | None, int, int]:
    """What is to be settled of one lease, and how many outcomes and doubts that is."""
    partition, slice_id, token = key
    data: bytes | None = await _patiently(
        partial(redis.execute_command, "GET", keyspace.slice_key(partition, slice_id))
    )
    opened = open_slice(keyring.queue, partition, data) if data else Lost("gone")
    if isinstance(opened, Lost):
        return None, 0, 0  # settled before the crash, or lost: the courier that leases it next says so
    header, contents = opened
    pending = set(header.pending())
    known = {o.index: o for o in found.outcomes.get(key, []) if o.index in pending}
    doubted = {intent.index for intent in found.in_doubt.get(key, [])} & pending
    if found.unclean:
        doubted |= pending - set(known)
    events: list[Event] = []
    done: list[int] = []
    retries: list[Retry] = []
    for index, outcome in known.items():
        batch = decode_batch(outcome.event)
        events += batch.events
        if outcome.kind in TERMINAL:
            done.append(index)
            continue
        reason = batch.events[0].reason if batch.events else int(Reason.NONE)
        wait = schedule.delay(retry, header.attempt, reason, jitter())
        retries.append(_moved(keyring, partition, header, contents, index, wait, in_doubt=False))
    job = await campaigns.get(header.job) if doubted else None
    for index in sorted(doubted):
        row = contents.rows[index]
        normalised = normalise(row.local, contents.domain)
        mref = mref_of(job.job_key, normalised) if job is not None else 0
        again = header.resend and not header.in_doubt(index)
        kind = Kind.DEFERRED if again else Kind.UNKNOWN
        tag = tag_of(keyring.pepper, normalised)
        reason = int(Reason.NETWORK)
        events.append(Event(int(kind), mref, header.attempt + 1, now_us, row.pseudonym, tag, reason))
        if again:
            wait = schedule.delay(retry, header.attempt, reason, jitter(), in_doubt=True)
            retries.append(_moved(keyring, partition, header, contents, index, wait, in_doubt=True))
        else:
            done.append(index)
    if not done and not retries:
        return None, 0, 0
    batch_bytes = encode_batch(Batch(header.job, contents.domain, events))
    return SettleRequest(partition, slice_id, token, done, (), batch_bytes, retries), len(known), len(doubted)


def _moved(
    keyring: Keyring, partition: int, header: Header, contents: Contents, index: int, wait: float, *, in_doubt: bool
) -> Retry:
    doubt = (index,) if in_doubt else ()
    key = keyring.queue[keyring.queue_id]
    return Retry(wait, retry_of(key, keyring.queue_id, partition, header, contents, [index], doubt=doubt), [index])
