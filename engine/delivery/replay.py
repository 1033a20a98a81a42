"""What a dead worker left: its journal is carried out before its slices are given to anybody else (T6, T8).

Path: 1. read the journal folder, cutting a torn tail; 2. files of an older epoch of the store are told again
(`retelling`, T12); of this epoch, 3. outcomes that are on the disk are settled under the dead worker's own lease
tokens, which nobody has taken yet; 4. intents without outcome are in doubt: `hold` ends them UNKNOWN, `resend` moves
them to one more attempt; 5. after an unclean boot every leased recipient without outcome is in doubt, because the tail
may be missing although it was written; 6. what is left of its leases goes back to the lanes; 7. the files are kept as
carried out until the ledger has it all. Run twice it does nothing twice: tokens and done bits say what is written.

Laws: what is in doubt is decided only where the lease is still the dead worker's; an outcome that was recorded is never
lost, whoever has the slice now (it is told by itself, the ledger folds).

Known limits: waits for Redis as long as it takes; a worker that cannot replay must not send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.delivery.campaigns import Campaigns
from engine.delivery.retelling import retell
from engine.queue import journal, schedule
from engine.queue.epoch import Epoch
from engine.queue.journal import LeaseKey, Log, Plan
from engine.queue.lanes import Lanes, Retry, Settled, SettleRequest
from engine.queue.slices import Contents, Header, Lost, open_slice, retry_of
from policy import keyspace
from policy.address import mref_of, normalise, tag_of
from policy.crashpoints import reach
from policy.events import TERMINAL, Batch, Event, Kind, Reason, decode_batch, encode_batch
from policy.fence import StoreOlder
from policy.keys import Keyring

log = logging.getLogger(__name__)

_TOGETHER = 128  # leases looked at in one round trip


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was found and done. torn: bytes at the end of a file that were not a whole record; told: events of an older
    epoch that were told again."""

    outcomes: int = 0
    in_doubt: int = 0
    released: int = 0
    torn: int = 0
    told: int = 0


@dataclass(frozen=True, slots=True)
class Tools:
    """What carrying out a journal needs. lanes: of the living worker; now_us: for the events of what is in doubt;
    epoch: of the store, None where nobody counts (no writer ever ran)."""

    redis: Redis
    lanes: Lanes
    campaigns: Campaigns
    keyring: Keyring
    retry: schedule.Retry
    now_us: int
    jitter: Callable[[], float]
    epoch: Epoch | None = None


async def replay(
    folder: Path, tools: Tools, *, ours: str = "", retain: Callable[[Iterable[Path]], None] | None = None
) -> Replayed:
    """Carry out one worker's journal folder. ours: the holder of the living worker, whose own file is passed over; the
    dead one's names come from its files. retain: gets the files when they are carried out, default: they go.

    Raises StoreOlder, when Redis comes back older meanwhile."""
    number = tools.epoch.number if tools.epoch is not None else 0
    logs = [each for each in journal.read_folder(folder) if not ours or each.holder != ours]
    kept_of_others, kept = journal.read_kept(folder, number)
    older = [*kept_of_others, *(each for each in logs if each.epoch != number)]
    current = [each for each in logs if each.epoch == number]
    if not (older or current or kept):
        return Replayed()
    reach("before-replay")
    torn = sum(each.torn for each in logs)
    if torn:
        log.warning("a journal had a torn tail", extra={"bytes": torn})
    told = outcomes = in_doubt = released = 0
    if older:
        told, doubts = await _tell_again(older, tools)
        in_doubt += doubts
        released += await _reclaim(tools.lanes, older)
    if current:
        found = journal.plan(current, journal.boot_id())
        settled, doubts = await _carry_out(found, tools, await _held(tools.lanes, found))
        outcomes, in_doubt = settled, in_doubt + doubts
        released += await _reclaim(tools.lanes, current)
    if retain is None:
        journal.discard([*older, *current])
    else:
        retain([*(each.path for each in (*older, *current)), *kept])
    reach("after-replay")
    done = Replayed(outcomes, in_doubt, released, torn, told)
    log.info(
        "a journal was replayed",
        extra={"outcomes": outcomes, "in_doubt": in_doubt, "slices_released": released, "told_again": told},
    )
    return done


async def declare_dead(holders: Iterable[str], tools: Tools) -> Replayed:
    """A host that does not come back, as a person says (`sales-push host forget`): its journal is out of reach, so it
    is as after an unclean boot. Everybody leased by these holders is in doubt; then their leases go back.

    Raises StoreOlder, and the store's error."""
    found = Plan({}, {}, frozenset(holders), True)
    _, doubts = await _carry_out(found, tools, await _held(tools.lanes, found))
    return Replayed(in_doubt=doubts, released=await _take_back(tools.lanes, found.holders))


async def tell_of_neighbours(folders: Iterable[Path], tools: Tools) -> int:
    """After a restore: what the journals of other workers of this host know of before it, for those who do not come
    back soon enough to say it themselves. Living ones are passed over, nothing is carried out; events told."""
    assert tools.epoch is not None
    told = 0
    for folder in folders:
        try:
            with journal.adopt(folder) as logs:  # held while we read only: its own worker may be starting
                older, _ = journal.read_kept(folder, tools.epoch.number)
                older += [each for each in logs if each.epoch != tools.epoch.number]
        except (journal.JournalBroken, OSError):
            continue
        if older:
            told += (await _tell_again(older, tools))[0]
    log.info("journals of neighbours were read", extra={"told_again": told})
    return told


async def _tell_again(older: Sequence[Log], tools: Tools) -> tuple[int, int]:
    """(events told, recipients in doubt) of files of before a restore."""
    found = journal.plan(older, journal.boot_id())
    told, doubts = await patiently(
        partial(
            retell, older, found, redis=tools.redis, lanes=tools.lanes, epoch=tools.epoch, campaigns=tools.campaigns,
            keyring=tools.keyring, now_us=tools.now_us,
        )
    )  # fmt: skip
    if found.unclean:
        # the machine went down as well: whom the restored store shows in their hands may have had his mail
        held = await _held(tools.lanes, found)
        known = {key: outcomes for key, outcomes in found.outcomes.items() if key in held}
        doubts += (await _carry_out(Plan(known, {}, found.holders, True), tools, held))[1]
    return told, doubts


T = TypeVar("T")


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Redis may still be starting; nothing may be sent before this is through, so there is nothing better to do.
    Raises StoreOlder: that does not pass."""
    while True:
        try:
            return await ask()
        except StoreOlder:
            raise
        except (RedisError, OSError):
            await asyncio.sleep(0.5)


async def _held(lanes: Lanes, found: Plan) -> set[LeaseKey]:
    """Leases the dead one still has, when the machine went down with it: the journal may be silent about some."""
    keys: set[LeaseKey] = set()
    if found.unclean:
        for holder in found.holders:
            for partition in range(keyspace.PARTITIONS):
                leases = await patiently(partial(lanes.holder_leases, partition, holder))
                keys.update((partition, slice_id, token) for slice_id, token in leases)
    return keys


async def _reclaim(lanes: Lanes, logs: Sequence[Log]) -> int:
    """How many slices went back to the lanes."""
    return await _take_back(lanes, {each.holder for each in logs if each.holder})


async def _take_back(lanes: Lanes, holders: Iterable[str]) -> int:
    released = 0
    for holder in holders:
        for partition in range(keyspace.PARTITIONS):
            seen = (await patiently(partial(lanes.holders, partition))).get(holder, 0)
            reach("before-reclaim")
            taken = await patiently(partial(lanes.reclaim, partition, holder, seen))
            reach("after-reclaim")
            released += taken or 0
    return released


@dataclass(slots=True)
class _Case:
    """What is to be settled of one lease. spoken: events of recorded outcomes, told whoever has the lease."""

    request: SettleRequest
    outcomes: int
    doubts: int
    spoken: list[Event] = field(default_factory=list)
    batch: Batch | None = None


async def _carry_out(found: Plan, tools: Tools, held: set[LeaseKey]) -> tuple[int, int]:
    """(outcomes settled, recipients in doubt)."""
    outcomes = doubts = 0
    keys = sorted(set(found.outcomes) | set(found.in_doubt) | held)
    for start in range(0, len(keys), _TOGETHER):
        some = keys[start : start + _TOGETHER]
        slices = await patiently(partial(_slices, tools.redis, some))
        cases = []
        for key, data in zip(some, slices, strict=True):
            case = await _case(key, data, found, tools, key in held)
            if case is not None:
                cases.append(case)
        await patiently(partial(_settle, tools.lanes, cases))
        outcomes += sum(case.outcomes for case in cases)
        doubts += sum(case.doubts for case in cases)
    return outcomes, doubts


async def _slices(redis: Redis, keys: Sequence[LeaseKey]) -> list[bytes | None]:
    async with redis.pipeline(transaction=False) as pipe:
        for partition, slice_id, _ in keys:
            pipe.get(keyspace.slice_key(partition, slice_id))
        return list(await pipe.execute())


async def _settle(lanes: Lanes, cases: Sequence[_Case]) -> None:
    answers = await lanes.settle_many([case.request for case in cases])
    if any(answer is None for answer in answers):
        raise ConnectionError("the store did not take it")
    await lanes.tell(
        [
            (case.request.partition, encode_batch(Batch(case.batch.job, case.batch.domain, case.spoken)))
            for case, answer in zip(cases, answers, strict=True)
            if answer is Settled.STALE and case.spoken and case.batch is not None
        ]
    )


async def _case(key: LeaseKey, data: bytes | None, found: Plan, tools: Tools, is_held: bool) -> _Case | None:
    """None: nothing to settle. is_held: the machine went down, and the lease is still the dead worker's."""
    partition, slice_id, token = key
    keyring = tools.keyring
    opened = open_slice(keyring.queue, partition, data) if data else Lost("gone")
    if isinstance(opened, Lost):
        return None  # settled before the crash, or lost: the courier that leases it next says so
    header, contents = opened
    pending = set(header.pending())
    known = {o.index: o for o in found.outcomes.get(key, []) if o.index in pending}
    intents = {intent.index: intent.mref for intent in found.in_doubt.get(key, []) if intent.index in pending}
    doubted = set(intents) | (pending - set(known) if is_held else set())
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
        wait = schedule.delay(tools.retry, header.attempt, reason, tools.jitter())
        retries.append(_moved(keyring, partition, header, contents, index, wait, in_doubt=False))
    spoken = list(events)
    job_key = await tools.campaigns.job_key(header.job) if doubted - set(intents) else None
    doubts = 0
    for index in sorted(doubted):
        row = contents.rows[index]
        normalised = normalise(row.local, contents.domain)
        if index not in intents and job_key is None:
            continue  # nobody can name them: the courier that leases it next says that they are lost
        mref = intents[index] if index in intents else mref_of(job_key or b"", normalised)
        again = header.resend and not header.in_doubt(index)
        kind = Kind.DEFERRED if again else Kind.UNKNOWN
        tag = tag_of(keyring.pepper, normalised)
        reason = int(Reason.NETWORK)
        events.append(Event(int(kind), mref, header.attempt + 1, tools.now_us, row.pseudonym, tag, reason))
        doubts += 1
        if again:
            wait = schedule.delay(tools.retry, header.attempt, reason, tools.jitter(), in_doubt=True)
            retries.append(_moved(keyring, partition, header, contents, index, wait, in_doubt=True))
        else:
            done.append(index)
    if not done and not retries:
        return None
    whole = Batch(header.job, contents.domain, events)
    request = SettleRequest(partition, slice_id, token, done, (), encode_batch(whole), retries)
    return _Case(request, len(known), doubts, spoken, whole)


def _moved(
    keyring: Keyring, partition: int, header: Header, contents: Contents, index: int, wait: float, *, in_doubt: bool
) -> Retry:
    doubt = (index,) if in_doubt else ()
    key = keyring.queue[keyring.queue_id]
    return Retry(wait, retry_of(key, keyring.queue_id, partition, header, contents, [index], doubt=doubt), [index])
