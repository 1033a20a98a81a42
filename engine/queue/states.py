"""The legal states of the queue in Redis, and a census that finds any other (after qmail's INTERNALS: list the states).

A slice is, at every instant between two scripts, in exactly one state: *waiting* (its id in one due index ``d:``/``D:``
of its site), *leased* (in the hash ``lease``, with token and holder) or *gone* (no key of it is left); and in both
living states in the sorted set ``l:`` of its lane. Its ways, from `policy.transitions` (a test compares)::

    -       -> waiting (put, settle)
    waiting -> waiting (assign, reseal, purge) · gone (purge) · leased (lease)
    leased  -> leased (settle) · gone (settle, replay) · waiting (release, reclaim)

A recipient is waiting (no done bit), perhaps in doubt (doubt bit), or has left the slice: terminal in the event stream,
or moved to a younger slice by a retry::

    submitted -> queued | refused | expired | cancelled | lost (put)
    queued    -> leased (lease) · lost (clear) · refused (purge)
    deferred  -> leased (lease) · lost (clear) · refused (purge)
    in doubt  -> leased (lease) · lost (clear) · refused (purge)
    leased    -> queued (release, reclaim) · deferred | in doubt | delivered | bounced | refused | expired |
                 cancelled | unknown | lost (settle, replay)

Other keys: ``idx`` site → earliest due, a lower bound; ``site`` lane → site, ``<lane`` → the site it is being moved
from; ``hold`` holder → heartbeat counter; ``n`` seq, tok, beat, at; ``j:`` a job's standing and ``w``, its recipients
without a terminal state; ``w:`` a bit for each chunk put; ``u:`` fingerprints.

`violations` judges a `Snapshot` somebody else took, `moves` the way from one to the next; both are pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.queue.slices import MAX_ROWS, Header
from policy import transitions
from policy.transitions import GONE, LEASED, NOTHING, WAITING

JOB_STATES = tuple(state for state in transitions.JOB_STATES if state != "done")  # a job that is done has no key left
SENDING, PAUSED, CANCELLED = "sending", "paused", "cancelled"

CAMPAIGN, PRIORITY = "d", "D"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One partition at one instant. due: (index letter, site) → slice → µs; leases: slice → (token, holder)."""

    slices: Mapping[str, Header] = field(default_factory=dict)
    lanes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)
    due: Mapping[tuple[str, str], Mapping[str, int]] = field(default_factory=dict)
    index: Mapping[str, int] = field(default_factory=dict)
    leases: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    holders: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    waiting: Mapping[int, int] = field(default_factory=dict)


def violations(seen: Snapshot) -> list[str]:
    """Every way in which the snapshot is none of the legal states, in words; empty when it is one."""
    return [*_of_slices(seen), *_of_indexes(seen), *_of_leases(seen), *_of_jobs(seen)]


def state_of(seen: Snapshot, name: str) -> tuple[str, ...]:
    """The states of the table a slice is in: exactly one, or the snapshot is not legal."""
    waiting = sum(name in members for members in seen.due.values())
    where = {WAITING: waiting, LEASED: int(name in seen.leases), GONE: int(not waiting and name not in seen.slices)}
    return tuple(state for state in transitions.SLICE_STATES for _ in range(where[state]))


def moves(before: Snapshot, after: Snapshot) -> list[str]:
    """Every way from one snapshot to the next, one script later, that the table does not have; in words."""
    found = []
    for name in {*before.slices, *after.slices}:
        source = state_of(before, name)[:1] or ("nowhere",) if name in before.slices else (NOTHING,)
        target = state_of(after, name)[:1] or ("nowhere",)
        if not transitions.allowed("slice", source[0], target[0]):
            found.append(f"slice {name} went from {source[0] or 'nothing'} to {target[0]}")
        old, new = before.slices.get(name), after.slices.get(name)
        if old is not None and new is not None:
            if old.done & ~new.done:
                found.append(f"slice {name}: somebody who was done is not")
            if new.done & ~old.done and source != (LEASED,):
                found.append(f"slice {name}: somebody was done without a lease")
            if (old.job, old.count, old.lane) != (new.job, new.count, new.lane):
                found.append(f"slice {name} became another")
            if old.date and old.date != new.date:
                found.append(f"slice {name}: the date of its messages moved")
    return found


def _of_slices(seen: Snapshot) -> list[str]:
    found = []
    for name, header in seen.slices.items():
        places = [key for key, members in seen.due.items() if name in members]
        states = state_of(seen, name)
        if len(states) != 1:
            found.append(f"slice {name} is in {len(states)} states")
        lanes = [lane for lane, members in seen.lanes.items() if name in members]
        if lanes != [header.lane]:
            found.append(f"slice {name} is not in its lane alone")
        if places and places[0][0] != (PRIORITY if header.priority else CAMPAIGN):
            found.append(f"slice {name} waits in the wrong queue")
        if header.done & ((1 << (MAX_ROWS - header.count)) - 1):
            found.append(f"slice {name} has done bits of nobody")
        if not header.pending():
            found.append(f"slice {name} is finished and not gone")
    return found


def _of_indexes(seen: Snapshot) -> list[str]:
    found = []
    for (letter, site), members in seen.due.items():
        for name, due in members.items():
            if name not in seen.slices:
                found.append(f"{letter}:{site} holds {name}, which is gone")
            elif seen.sites.get(seen.slices[name].lane, "?") != site:
                found.append(f"slice {name} waits at a site that is not its lane's")
            if seen.index.get(site, due + 1) > due:
                found.append(f"idx does not lead to {name} at {site}")
    for lane, members in seen.lanes.items():
        found += [f"lane {lane} holds {name}, which is gone" for name in members if name not in seen.slices]
    for lane in seen.sites:
        if lane.startswith("<"):
            found.append(f"lane {lane[1:]} is still being moved")
        elif lane not in seen.lanes:
            found.append(f"lane {lane} is gone and its site is remembered")
    return found


def _of_leases(seen: Snapshot) -> list[str]:
    found = []
    tokens = [token for token, _ in seen.leases.values()]
    if len(set(tokens)) != len(tokens):
        found.append("two leases have one token")
    for name, (token, holder) in seen.leases.items():
        if name not in seen.slices:
            found.append(f"a lease of {name}, which is gone")
        elif seen.slices[name].token != token:
            found.append(f"the lease of {name} has another token than the slice")
        if token > seen.tokens:
            found.append(f"the lease of {name} has a token never given")
        if holder not in seen.holders:
            found.append(f"the lease of {name} has a holder without heartbeat")
    return found


def _of_jobs(seen: Snapshot) -> list[str]:
    pending: dict[int, int] = dict.fromkeys(seen.waiting, 0)
    for header in seen.slices.values():
        pending[header.job] = pending.get(header.job, 0) + len(header.pending())
    return [
        f"job {job} counts {seen.waiting.get(job)} waiting, its slices hold {count}"
        for job, count in pending.items()
        if seen.waiting.get(job) != count
    ]
