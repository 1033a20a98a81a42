"""Are these data older than what SQL knows? The questions that tell a plain restart of Redis from a loss (promise T12).

    `see`        what the server says: its run, META, the last id of every stream, whether it syncs every write
    `remembered` what SQL says of it
    `evidence`   pure: the reasons to believe that something was forgotten; none: a plain restart

Law: every doubt counts as loss. Of a server that does not sync every write, hides its configuration or was a replica
once, nothing is believed: a needless restore costs seconds of rest, a loss not seen costs people a second copy.

Known limits: on a server that says it syncs every write, a loss of nothing but the last second is seen only where a
drain, a commit or a beat fell into it (policy.restore).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, func, select

from policy import cursors, keyspace, streams
from policy.fence import EPOCH, RUN
from policy.schema import job
from policy.valkey import Client

LEASE: Final = "lease"
RESTORED: Final = "restored"
PULSE: Final = "pulse"
COMMIT: Final = "commit"
PUSHED: Final = "pushed"  # SQL only: the commit number that Redis was known to have at the last beat
STREAMS: Final = (*streams.EVENT_STREAMS, keyspace.HITS)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server says. run: of this process; cleared (META run) to restored: of META, None where it is silent;
    synced: every write is on the disk before it is answered; promoted: it was a replica once; last: id a stream."""

    run: str
    cleared: str | None = None
    epoch: int | None = None
    pulse: int | None = None
    commit: int | None = None
    lease: int | None = None
    restored: int | None = None
    synced: bool = True
    promoted: bool = False
    last: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """What SQL remembers. run: let in last, "" never any; pushed: a commit number Redis is known to have had; jobs:
    highest job number."""

    run: str = ""
    epoch: int = 0
    pulse: int = 0
    pushed: int = 0
    commit: int = 0
    jobs: int = 0
    cursors: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """Nothing has happened yet that a Redis could have forgotten."""
        return not (self.jobs or self.commit or any(self.cursors.get(stream) for stream in STREAMS))


def evidence(seen: Seen, known: Known) -> list[str]:
    """Why these data are older than what SQL knows; empty: they are not."""
    if known.is_new:
        return []
    if seen.cleared is None and seen.commit is None:
        return ["it is empty"]
    found: list[str] = []
    if seen.epoch is not None and seen.epoch < known.epoch:
        found.append("it has not seen the last restore")
    if (seen.pulse or 0) < known.pulse:
        found.append("it has not seen the last beat")
    if any(cursors.is_before(seen.last.get(stream, "0-0"), known.cursors.get(stream, "0-0")) for stream in STREAMS):
        found.append("events in the ledger were never written")
    if seen.run == seen.cleared or not known.run:
        return found  # the process that was let in lives on; or no process ever was: an older program worked here
    if seen.cleared != known.run:
        found.append("its last run is not the one let in last")
    if (seen.commit or 0) < known.pushed:
        found.append("it has forgotten a commit")
    if not seen.synced:
        found.append("it does not sync every write")
    if seen.promoted:
        found.append("it was a replica")
    return found


async def see(redis: Client, run: str) -> Seen:
    """What this run of the server says of itself and its data. Raises RedisError."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.hmget(keyspace.META, [RUN, EPOCH, PULSE, COMMIT, LEASE, RESTORED])
        pipe.info("replication")
        for name in ("appendonly", "appendfsync"):
            pipe.config_get(name)
        for stream in STREAMS:
            pipe.xinfo_stream(stream)
        meta, replication, only, sync, *streams = await pipe.execute(raise_on_error=False)
    for part in (meta, replication, *streams):  # a stream that is not there is an answer
        if isinstance(part, Exception) and "no such key" not in str(part):
            raise part
    cleared, epoch, pulse, commit, lease, restored = meta
    return Seen(
        run=run,
        cleared=text(cleared),
        epoch=number(epoch),
        pulse=number(pulse),
        commit=number(commit),
        lease=number(lease),
        restored=number(restored),
        # CONFIG is hidden by some managed servers: what is not known is not relied on
        synced=_setting(only) == "yes" and _setting(sync) == "always",
        promoted=int(replication.get("second_repl_offset", -1)) >= 0,
        last={
            stream: _last_id(info)
            for stream, info in zip(STREAMS, streams, strict=True)
            if not isinstance(info, Exception)
        },
    )


def remembered(conn: Connection) -> Known:
    rows = cursors.load(conn)
    return Known(
        run=rows.get(RUN, ""),
        epoch=int(rows.get(EPOCH, 0)),
        pulse=int(rows.get(PULSE, 0)),
        pushed=int(rows.get(PUSHED, 0)),
        commit=int(rows.get(COMMIT, 0)),
        jobs=int(conn.execute(select(func.max(job.c.number))).scalar() or 0),
        cursors={stream: rows[stream] for stream in STREAMS if stream in rows},
    )


def _last_id(info: Any) -> str:
    told = {text(name): value for name, value in dict(info).items()}
    return text(told["last-generated-id"]) or "0-0"


def text(raw: Any) -> str | None:
    """What a field of META says, None where it is not there."""
    if raw is None:
        return None
    return raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)


def number(raw: Any) -> int | None:
    """The same of a whole number; anything else is as good as nothing."""
    told = text(raw)
    return int(told) if told is not None and told.isdigit() else None


def _setting(told: Any) -> str:
    """The one value of a CONFIG GET, "" where it is refused."""
    return "" if isinstance(told, Exception) else next((text(value) or "" for value in dict(told).values()), "")
