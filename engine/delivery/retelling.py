"""Telling again what the journals know of before Redis came back older (promise T12).

The restored store has forgotten outcomes; the ledger may lack them too, when the drain had not read them yet. So every
outcome in a journal of an older epoch is told straight to its partition's event stream: the ledger folds what it knows,
and before leasing is opened anew it has them all. Slices are not touched: `leasing` compares them with the ledger.

What is in doubt by those files: `hold` is told UNKNOWN, so nobody gets a second copy; of `resend` nothing is told, the
older slice still holds them and they get the one more attempt that the job chose.

Laws: told twice is told once (identity is job, reference, attempt, kind); what the ledger has is not told, so that
half a million old outcomes do not keep it from opening.

Known limits: of somebody in doubt whose slice the restored store lacks, domain and pseudonym are not known where the
journal does not show them; he is counted under no domain.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis

from engine.delivery.campaigns import Campaigns
from engine.queue.epoch import Epoch
from engine.queue.journal import Intent, Log, Outcome, Plan
from engine.queue.lanes import Lanes
from engine.queue.slices import Lost, open_slice
from policy import keyspace
from policy.address import mref_of, normalise, tag_of
from policy.events import TERMINAL, Batch, Event, Kind, Reason, decode_batch, encode_batch
from policy.keys import Keyring

log = logging.getLogger(__name__)

BATCH = 64  # events an entry, as a settle has
_TOGETHER = 64  # entries a round trip

_Place = tuple[int, int, str]  # partition, job, domain


async def retell(
    logs: Sequence[Log],
    found: Plan,
    *,
    redis: Redis,
    lanes: Lanes,
    epoch: Epoch | None,
    campaigns: Campaigns,
    keyring: Keyring,
    now_us: int,
) -> tuple[int, int]:
    """(events told, of them recipients in doubt). found: `journal.plan` of the logs. Raises RedisError and the
    store's error: begin again."""
    events: dict[_Place, dict[tuple[int, int, int], Event]] = defaultdict(dict)
    domains: dict[tuple[int, str], str] = {}
    for outcome in _outcomes(logs):
        try:
            batch = decode_batch(outcome.event)
        except msgspec.DecodeError:
            log.error("an outcome of a journal is not readable", extra={"partition": outcome.partition})
            continue
        domains[outcome.partition, outcome.slice_id] = batch.domain
        for event in batch.events:
            events[outcome.partition, batch.job, batch.domain][event.mref, event.attempt, event.kind] = event
    ended = {(job, e.mref) for (_, job, _), some in events.items() for e in some.values() if e.kind in TERMINAL}
    doubts = 0
    for intents in found.in_doubt.values():
        for intent in intents:
            if (intent.job, intent.mref) in ended:
                continue
            domain = domains.get((intent.partition, intent.slice_id), "")
            doubtful = await _doubtful(intent, domain, redis, campaigns, keyring, now_us)
            if doubtful is not None:
                domain, event = doubtful
                events[intent.partition, intent.job, domain][event.mref, event.attempt, event.kind] = event
    told = 0
    entries: list[tuple[int, bytes]] = []
    for (partition, job, domain), by_identity in sorted(events.items()):
        fresh = await _fresh(job, list(by_identity.values()), epoch)
        told += len(fresh)
        doubts += sum(event.kind == Kind.UNKNOWN and event.at == now_us for event in fresh)
        entries += [
            (partition, encode_batch(Batch(job, domain, fresh[start : start + BATCH])))
            for start in range(0, len(fresh), BATCH)
        ]
    for start in range(0, len(entries), _TOGETHER):
        await lanes.tell(entries[start : start + _TOGETHER])
    return told, doubts


def _outcomes(logs: Sequence[Log]) -> Iterator[Outcome]:
    for each in logs:
        for record in each.records:
            if isinstance(record, Outcome):
                yield record


async def _fresh(job: int, events: list[Event], epoch: Epoch | None) -> list[Event]:
    """Those the ledger does not have: nothing of a job that is over, nothing of somebody who has reached an end."""
    if epoch is None:
        return events
    over, ended = await epoch.accounted(job, sorted({event.mref for event in events}))
    return [] if over else [event for event in events if event.mref not in ended]


async def _doubtful(
    intent: Intent, domain: str, redis: Redis, campaigns: Campaigns, keyring: Keyring, now_us: int
) -> tuple[str, Event] | None:
    """(domain, event) of somebody in doubt; None: he gets one more attempt from the older slice."""
    pseudonym, tag = 0, b""
    data: Any = await redis.get(keyspace.slice_key(intent.partition, intent.slice_id))
    opened = open_slice(keyring.queue, intent.partition, data) if data else Lost("gone")
    job = await campaigns.get(intent.job)
    resend: bool | None = None
    if not isinstance(opened, Lost) and job is not None and opened[0].job == intent.job:
        header, contents = opened
        row = contents.rows[intent.index] if intent.index < len(contents.rows) else None
        normalised = normalise(row.local, contents.domain) if row is not None else ""
        if row is not None and mref_of(job.job_key, normalised) == intent.mref:
            resend = header.resend and not header.in_doubt(intent.index)
            domain, pseudonym, tag = contents.domain, row.pseudonym, tag_of(keyring.pepper, normalised)
    if resend is None:
        resend = await asyncio.to_thread(campaigns.resends, intent.job)
    if resend:
        return None
    event = Event(
        int(Kind.UNKNOWN), intent.mref, intent.attempt + 1, now_us, pseudonym, tag, int(Reason.NETWORK)
    )  # fmt: skip
    return domain, event
