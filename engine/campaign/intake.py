"""The intake: entries of the jobs stream in, slices on lanes out; any number of workers share it.

Promises (T0 to T2 of promises.md, decision 18):
- every entry ends accepted, rejected (with every error, sealed) or, after `deliveries` deliveries, dead; nothing in an
  entry ends the worker;
- an entry is acknowledged and deleted only when its whole effect is in the lanes; a crash anywhere is repaired by
  whoever claims the entry next, because acceptance, chunks and puts are idempotent;
- a job is reported expanded once, with the sum of its rows, when its last entry is in.

    1. `step`      XREADGROUP (new), XAUTOCLAIM (of the dead), parked ones whose time has come
    2. `_job`      open, judge (validation, acceptance), WriterClient.accept_job; inline recipients are entry 0
    3. `_audience` find the job, WriterClient.chunk (same bytes: no effect; other bytes: the job is stopped)
    4. `_expand`   at most 1,000 rows at a time: facts, consent ledger -> gate -> vault -> slices -> put (expand.py)
    5. `_complete` a mark a finished entry in the job's home partition; all marks there -> WriterClient.expanded
    6. `_release_held`  an hour before send_at the sealed chunks of a scheduled job come back as entries (decision 3)

What comes too early waits ("parked"): an audience entry whose job another worker is just accepting, everything while
Redis or the writer is away. Waiting does not count as a delivery. An entry that nobody's job claims within
`ORPHAN_SECONDS` is dropped, and so is one older than its job: left over from a submission that was rejected.

Known limits: an entry being expanded for longer than `claim_idle` would be claimed by a second worker, who does the
same again to no effect. Rows of a job that is cancelled before their entry was begun are dropped with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Final, cast

import msgspec
import structlog
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

from engine import client
from engine.campaign import acceptance, expand, standing
from engine.campaign.job import CHUNK_BYTES, Recipient
from engine.campaign.problems import Problem
from engine.campaign.validation import Reading, read, read_row
from engine.queue.lanes import Lanes, PutRequest
from policy import keyspace
from policy.events import Kind
from policy.instants import HOUR_US, week_of
from policy.keys import Keyring, SealError, open_sealed, seal
from policy.ledger import JobPayload, Reader
from policy.valkey import Client
from policy.wire import Accepted, Resolved, WireError, WriterClient, WriterUnavailable

log = structlog.get_logger()

HOLD_US: Final = HOUR_US  # decision 3: sealed chunks until an hour before send_at
ORPHAN_SECONDS: Final = 600.0  # an audience follows its job within seconds; nobody's addresses wait longer in clear
KEPT: Final = 10_000  # entries of the rejected and the dead stream (policy.keyspace)
KEPT_PAYLOAD: Final = 256 * 1024  # of a rejected payload: enough to see what it was, times KEPT
MOST_ROWS: Final = (expand.CHUNKS_AN_ENTRY - 1) * client.CHUNK_ROWS  # the last chunk number of an entry is its mark
_MARK: Final = expand.CHUNKS_AN_ENTRY - 1
_ENDED: Final = {"cancelled": Kind.CANCELLED, "expired": Kind.EXPIRED, "lost": Kind.LOST}
_AWAY: Final = (RedisError, OSError, WriterUnavailable, OperationalError)
_OURS_TO_RETRY: Final = frozenset({"redis", "internal"})


@dataclass(slots=True)
class Intake:
    """One worker's share of the intake. consumer: unique a process; reader: a read-only engine (policy.schema)."""

    redis: Client
    lanes: Lanes
    writer: WriterClient
    engine: Engine
    keyring: Callable[[], Keyring]
    signing_domains: Callable[[], Collection[str]]
    consumer: str
    life: Mapping[str, float]
    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], int] = lambda: time.time_ns() // 1000
    monotonic: Callable[[], float] = time.monotonic
    counts: Counts = field(default_factory=Counts)
    _parked: dict[str, _Parked] = field(default_factory=dict)
    _known: OrderedDict[int, tuple[expand.Terms, acceptance.Expansion]] = field(default_factory=OrderedDict)
    _cursor: str = "0-0"
    _next_claim: float = 0.0
    _next_held: float = 0.0
    _slots: asyncio.Semaphore = field(init=False)
    _reader: Reader = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.limits.together)
        self._reader = Reader(self.engine)

    def __repr__(self) -> str:
        return f"<Intake {self.consumer} entries={self.counts.entries} parked={len(self._parked)}>"

    # --- the loop --------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; what was begun is finished. Never raises for the store, the writer or an entry."""
        pause = 0.1
        ready = False
        while not stop.is_set():
            try:
                if not ready:
                    await self.prepare()
                    ready = True
                await self.step(block=0.5)
                pause = 0.1
            except _AWAY as error:
                ready = False
                log.warning("intake waits", error=type(error).__name__)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause)
                pause = min(2 * pause, 5.0)

    async def prepare(self) -> None:
        """The consumer group and our public key, which producers seal to."""
        try:
            await self.redis.xgroup_create(keyspace.INTAKE, keyspace.INTAKE_GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        await self.redis.hset(keyspace.META, client.META_FIELD, self.keyring().intake_public.hex())

    async def step(self, block: float = 0.0) -> int:
        """One round; how many entries ended in it. block: seconds to wait for new ones when there is nothing else."""
        entries = await self._due()
        room = max(0, self.limits.claim - len(entries))
        entries += await self._claim(room)
        room = max(0, self.limits.claim - len(entries))
        if room:
            entries += await self._new(room, 0.0 if entries else self._patience(block))
        await self._release_held()
        if not entries:
            return 0
        # jobs first: the audience that was read with its job need not wait for it
        jobs = [entry for entry in entries if b"audience" not in entry.fields]
        rest = [entry for entry in entries if b"audience" in entry.fields]
        ended = await asyncio.gather(*[self._handle(entry) for entry in jobs])
        return sum(ended) + sum(await asyncio.gather(*[self._handle(entry) for entry in rest]))

    # --- one entry -------------------------------------------------------------------------------------------------

    async def _handle(self, entry: Entry) -> bool:
        """True when the entry ended."""
        if entry.deliveries > self.limits.deliveries:
            problem = Problem("$", f"handed out {entry.deliveries - 1} times and finished by nobody")
            await self._put_away(entry, keyspace.DEAD, b"dead", Refused(problem))
            self.counts.dead += 1
            return True
        try:
            await self._by_kind(entry)
        except Later:
            return await self._park(entry, 0.05)
        except Refused as refused:
            await self._reject(entry, refused)
        except _AWAY as error:
            log.warning("entry waits", error=type(error).__name__)
            return await self._park(entry, 0.5)
        except WireError as error:
            if error.kind in _OURS_TO_RETRY:
                return await self._park(entry, 0.5)
            log.error("the writer refuses an entry", kind=error.kind)
            self.counts.failures += 1
            return False
        except Exception as error:  # poison must not end the worker (T1); it is delivered again, at most five times
            log.error("entry failed", error=type(error).__name__, deliveries=entry.deliveries)
            self.counts.failures += 1
            self._parked.pop(entry.id, None)
            return False
        else:
            await self._finish(entry)
        self._parked.pop(entry.id, None)
        return True

    async def _by_kind(self, entry: Entry) -> None:
        fields = entry.fields
        if b"audience" in fields:
            await self._audience(entry)
        elif b"held" in fields:
            await self._returned(entry)
        elif b"job" in fields or b"sealed" in fields:
            await self._job(entry)
        else:
            raise Refused(Problem("$", "an entry has a field `job`, `sealed` or `audience`", "see docs/jobs.md"))

    async def _reject(self, entry: Entry, refused: Refused) -> None:
        await self._put_away(entry, keyspace.REJECTED, b"rejected", refused)
        self.counts.rejected += 1
        reading = refused.reading
        with contextlib.suppress(WireError, WriterUnavailable):  # a line for the audit; the stream is the record
            reason = f"{len(refused.problems)} problems"
            await self.writer.reject_note(account=reading.account, job_id=reading.job_id, reason=reason)
        log.info("job rejected", account=reading.account, job_id=reading.job_id, problems=len(refused.problems))

    async def _put_away(self, entry: Entry, stream: str, purpose: bytes, refused: Refused) -> None:
        """Sealed into another stream and out of the intake, in one transaction of one slot."""
        reading = refused.reading
        payload = self._opened_payload(entry)
        body = {
            "at": self.clock(),
            "entry": "audience" if b"audience" in entry.fields else "job",
            "account": reading.account or _shown(entry.fields.get(b"account")),
            "job_id": reading.job_id or _shown(entry.fields.get(b"audience")),
            "problems": [[problem.path, problem.message, problem.suggestion] for problem in refused.problems],
            "payload": payload if len(payload) <= KEPT_PAYLOAD else b"",
        }
        sealed = seal(self.keyring().service, msgspec.msgpack.encode(body), purpose)
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.xadd(stream, {"sealed": sealed}, maxlen=KEPT, approximate=True)
            pipe.xack(keyspace.INTAKE, keyspace.INTAKE_GROUP, entry.id)
            pipe.xdel(keyspace.INTAKE, entry.id)
            await pipe.execute()
        self._parked.pop(entry.id, None)
        self.counts.entries += 1

    def _opened_payload(self, entry: Entry) -> bytes:
        if b"job" in entry.fields:
            return entry.fields[b"job"]
        with contextlib.suppress(client.UnsealError):
            if b"sealed" in entry.fields and b"audience" not in entry.fields:
                return client.unseal(self.keyring().intake, entry.fields[b"sealed"], client.job_purpose())
        return b""  # rows of an audience are nobody's to keep once they are refused

    # --- jobs ------------------------------------------------------------------------------------------------------

    async def _job(self, entry: Entry) -> None:
        payload = entry.fields.get(b"job")
        if payload is None:
            try:
                payload = client.unseal(self.keyring().intake, entry.fields[b"sealed"], client.job_purpose())
            except client.UnsealError as error:
                raise Refused(Problem("$", f"cannot be opened: {error}", "fetch the public key anew")) from None
        now = self.clock()
        reading = read(payload, now)
        account = await self._read(lambda _: self._reader.account(reading.account)) if reading.account else None
        review = acceptance.review(reading, account, self.signing_domains(), most_bytes=self.limits.message_bytes)
        if review.problems:
            raise Refused(*review.problems, reading=reading)
        job = reading.job
        assert job is not None  # no problems: a job
        keyring = self.keyring()
        record = acceptance.record(review, keyring, now, self.life, entry.id)
        accepted = await self.writer.accept_job(record)
        match accepted.status:
            case "new":
                self.counts.accepted += 1
            case "same":
                pass
            case "conflict":
                raise Refused(
                    Problem("$.job_id", "is taken by a job with other contents", "choose a new one"), reading=reading
                )
            case "frozen":
                raise Refused(Problem("$.account", "is frozen: it may not send"), reading=reading)
            case _:
                raise Refused(Problem("$.account", "there is no such account"), reading=reading)
        at = await self._read(lambda conn: standing.job_standing(conn, accepted.number))
        if at is None or at.rows_submitted is not None:
            await self._settled(accepted)
            return
        if job.wait and job.audience is not None:
            await self.lanes.halt(f"j{accepted.number}")
        if job.recipients is not None:
            digest = sha256(msgspec.json.encode(job.recipients)).digest()
            await self._entry_of(accepted.number, 0, digest, job.recipients)

    async def _settled(self, accepted: Accepted) -> None:
        payload = await self._read(lambda _: self._reader.job_payload(accepted.number))
        if payload is not None and payload.wait:
            await self.lanes.resume(f"j{accepted.number}")

    # --- audience --------------------------------------------------------------------------------------------------

    async def _audience(self, entry: Entry) -> None:
        job_id, account = _shown(entry.fields[b"audience"]), _shown(entry.fields.get(b"account"))
        number = _whole(entry.fields.get(b"n"))
        if not job_id or number is None:
            raise Refused(
                Problem("$", "an audience entry has `audience` (the job id) and `n` (from 0)", "docs/jobs.md")
            )
        at = await self._read(lambda conn: standing.find_job(conn, account, job_id))
        if at is None:
            age = self.clock() // 1000 - entry.order[0]
            if age > ORPHAN_SECONDS * 1000:
                self.counts.dropped += 1
                log.warning("audience of no job dropped", job_id=job_id)
                return
            raise Later
        terms, expansion = await self._terms(at.number, at.state)
        if entry.order < order_of(expansion.entry):
            self.counts.dropped += 1  # left over from an earlier submission under this id, which was rejected
            return
        if at.rows_submitted is not None:
            await self._unhalt(at.number, expansion)
            return
        if number >= at.chunks_expected:
            raise Refused(Problem("$.n", f"the job names {at.chunks_expected} entries, numbered from 0"))
        data = entry.fields.get(b"data")
        if data is None:
            try:
                purpose = client.audience_purpose(expansion.account, job_id, number)
                data = client.unseal(self.keyring().intake, entry.fields.get(b"sealed", b""), purpose)
            except client.UnsealError as error:
                await self._stop(at.number, f"audience entry {number} cannot be opened")
                raise Refused(Problem("$", f"cannot be opened: {error}")) from None
        if len(data) > CHUNK_BYTES:
            await self._stop(at.number, f"audience entry {number} is larger than 1 MiB")
            raise Refused(Problem("$", f"has {len(data):,} bytes, at most {CHUNK_BYTES:,}", "cut smaller entries"))
        await self._lines(at.number, number, data, terms)

    async def _returned(self, entry: Entry) -> None:
        """A chunk of a scheduled job, an hour before its time."""
        job, number = _whole(entry.fields.get(b"held")), _whole(entry.fields.get(b"n"))
        try:
            aad = f"held/{job}/{number}".encode()
            data = open_sealed(self.keyring().service, entry.fields.get(b"sealed", b""), aad)
        except SealError:
            raise Refused(Problem("$", "is no chunk that was held here")) from None
        assert job is not None  # sealed by ourselves
        assert number is not None
        at = await self._read(lambda conn: standing.job_standing(conn, job))
        if at is None or at.rows_submitted is not None:
            return
        terms, _ = await self._terms(job, at.state)
        await self._lines(job, number, data, terms)

def _shown(data: bytes | None) -> str:
    """A job id or account as an entry names it, "" for anything that cannot be one."""
    text = (data or b"").decode("utf-8", "replace")
    allowed = text.isascii() and len(text) <= 100 and all(c.isalnum() or c in "._:-" for c in text)
    return text if allowed else ""


def _whole(data: bytes | None) -> int | None:
    return int(data) if data is not None and data.isdigit() and len(data) <= 15 else None


