"""The intake: entries of the jobs stream in, slices on lanes out; any number of workers share it.

Promises (T0 to T2 of promises.md, decision 18):
- every entry ends accepted, rejected (with every error, sealed) or, after `deliveries` deliveries, dead; nothing in an
  entry ends the worker;
- whoever handed in a job that says who it is reads in its status why it was refused (`policy.statuses`);
- an entry is acknowledged and deleted only when its whole effect is in the lanes; a crash anywhere is repaired by
  whoever claims the entry next, because acceptance, chunks and puts are idempotent;
- a job is reported expanded once, with the sum of its rows, when its last entry is in.

    1. `step`       entries in hand (claims.py): new ones, those of dead workers, parked ones whose time has come
    2. `_job`       open, judge (validation, acceptance), WriterClient.accept_job; inline recipients are entry 0
    3. `_audience`  find the job, open; `filling` puts the rows on lanes and knows when the last entry is in
    4. `_release_held`  an hour before send_at the sealed chunks of a scheduled job come back as entries (decision 3)

What comes too early waits: an audience entry whose job another worker is just accepting, everything while Redis or the
writer is away. An entry that nobody's job claims within `ORPHAN_SECONDS` is dropped, and so is one older than its job:
left over from a submission that was rejected.

Known limits: two workers that release held chunks at the same time do it twice, to no effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec
import structlog
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from engine import client
from engine.campaign import acceptance, standing
from engine.campaign.claims import Claims, Counts, Entry, Later, Limits, Refused, order_of
from engine.campaign.filling import HOLD_US, Filling
from engine.campaign.job import CHUNK_BYTES, Job
from engine.campaign.problems import Problem
from engine.campaign.validation import read
from engine.queue.epoch import Epoch
from engine.queue.lanes import Lanes
from policy import accounts, keyspace, statuses
from policy.crashpoints import reach
from policy.keys import Keyring, SealError, open_sealed, seal
from policy.valkey import Client
from policy.wire import WireError, WriterClient, WriterUnavailable

__all__ = ["Counts", "Intake", "Limits"]

log = structlog.get_logger()

ORPHAN_SECONDS: Final = 600.0  # an audience follows its job within seconds; nobody's addresses wait longer in clear
KEPT: Final = 10_000  # entries of the rejected and the dead stream (policy.keyspace)
KEPT_PAYLOAD: Final = 256 * 1024  # of a rejected payload: enough to see what it was, times KEPT
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
    epoch: Epoch | None = None
    claims: Claims = field(init=False)
    filling: Filling = field(init=False)
    _next_held: float = 0.0
    _resting: bool = False

    def __post_init__(self) -> None:
        self.claims = Claims(self.redis, self.consumer, self.limits, self.monotonic)
        self.filling = Filling(
            self.redis, self.lanes, self.writer, self.engine, self.keyring, self.clock, self.monotonic, self.counts,
            self.limits.together, self.epoch,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Intake {self.consumer} entries={self.counts.entries} parked={len(self.claims.parked)}>"

    # --- the loop --------------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; what was begun is finished. Never raises for the store, the writer or an entry."""
        pause = 0.1
        ready = False
        while not stop.is_set():
            if self._resting:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.2)
                continue
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

    async def leave(self) -> None:
        """After `run`: what is still ours is anybody's at once. Should Redis not hear it, it is so after a minute."""
        with contextlib.suppress(*_AWAY):
            async with asyncio.timeout(1.0):
                await self.claims.leave()

    def rest(self, is_wanted: bool) -> None:
        """Take no entries while the host is asked to rest; what is parked here is somebody else's after a minute."""
        self._resting = is_wanted

    async def prepare(self) -> None:
        """The consumer group and our public key, which producers seal to."""
        await self.claims.prepare()
        await self.redis.hset(keyspace.META, client.META_FIELD, self.keyring().intake_public.hex())

    async def step(self, block: float = 0.0) -> int:
        """One round; how many entries ended in it. block: seconds to wait for new ones when there is nothing else."""
        entries = await self.claims.take(block)
        await self._release_held()
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
            try:
                await self._by_kind(entry)
            except Refused as refused:
                await self._reject(entry, refused)
            else:
                await self.claims.finish(entry)
                self.counts.entries += 1
        except Later:
            self.claims.park(entry, 0.05)
        except SealError:
            log.critical("a stored job does not open: are these its keys?", entry=entry.id)
            self.claims.park(entry, 5.0)
        except _AWAY as error:
            log.warning("entry waits", error=type(error).__name__)
            self.claims.park(entry, 0.5)
        except WireError as error:
            if error.kind in _OURS_TO_RETRY:
                self.claims.park(entry, 0.5)
            else:
                self._failed(entry, f"WireError {error.kind}")
        except Exception as error:  # poison must not end the worker (T1); it is delivered again, at most five times
            self._failed(entry, type(error).__name__)
        else:
            return True
        return False

    def _failed(self, entry: Entry, error: str) -> None:
        log.error("entry failed", error=error, deliveries=entry.deliveries)
        self.counts.failures += 1
        self.claims.drop_claim(entry)

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
        now = self.clock()
        account = reading.account or _shown(entry.fields.get(b"account"))
        job_id = reading.job_id or _shown(entry.fields.get(b"audience"))
        problems = [(problem.path, problem.message, problem.suggestion) for problem in refused.problems]
        body = {
            "at": now,
            "entry": "audience" if b"audience" in entry.fields else "job",
            "account": account,
            "job_id": job_id,
            "problems": problems,
            "payload": payload if len(payload) <= KEPT_PAYLOAD else b"",
        }
        sealed = seal(self.keyring().service, msgspec.msgpack.encode(body), purpose)

        def tell(pipe: Any) -> None:
            if account and job_id:
                statuses.refuse(pipe, account, job_id, problems, now)

        await self.claims.put_away(entry, stream, {"sealed": sealed}, KEPT, tell)
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
        if any(problem.path == "$.created_at" for problem in reading.problems):
            # One of two clocks may be wrong by days, the store's or this host's: nobody is refused for its error.
            by_the_other = read(payload, time.time_ns() // 1000)
            if not any(problem.path == "$.created_at" for problem in by_the_other.problems):
                reading = by_the_other
        account = await self.filling.ask(lambda conn: accounts.get(conn, reading.account)) if reading.account else None
        review = acceptance.review(reading, account, self.signing_domains(), most_bytes=self.limits.message_bytes)
        if review.problems:
            raise Refused(*review.problems, reading=reading)
        job = reading.job
        assert job is not None  # no problems: a job
        keyring = self.keyring()
        record = acceptance.record(review, keyring, now, self.life, entry.id)
        reach("before-accept")
        accepted = await self.writer.accept_job(record)
        reach("after-accept")
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
        if accepted.status == "new":
            if not accepted.job_key:  # else it was lost and is taken up again, under the key that names its people
                self.filling.know(acceptance.fresh_terms(review, record, accepted))
            await self._inline(accepted.number, job, is_new=True, is_registered=accepted.has_entry)
            return
        at = await self.filling.ask(lambda conn: standing.job_standing(conn, accepted.number))
        if at is None or (at.is_filled and not self.filling.is_forgotten(at)):
            if job.wait:
                await self.lanes.let_go(f"j{accepted.number}")
            return
        await self._inline(accepted.number, job)

    async def _inline(self, number: int, job: Job, *, is_new: bool = False, is_registered: bool = False) -> None:
        """Recipients in the job itself are its only entry."""
        if job.recipients is not None:
            digest = b"" if is_registered else acceptance.entry_hash(job.recipients)
            await self.filling.entry(number, 0, digest, job.recipients, is_new=is_new, is_registered=is_registered)

    # --- audience --------------------------------------------------------------------------------------------------

    async def _audience(self, entry: Entry) -> None:
        job_id, account = _shown(entry.fields[b"audience"]), _shown(entry.fields.get(b"account"))
        number = _whole(entry.fields.get(b"n"))
        if not job_id or number is None:
            raise Refused(
                Problem("$", "an audience entry has `audience` (the job id) and `n` (from 0)", "docs/jobs.md")
            )
        at = await self.filling.ask(lambda conn: standing.find_job(conn, account, job_id))
        if at is None:
            age = self.clock() // 1000 - entry.order[0]
            if age > ORPHAN_SECONDS * 1000:
                self.counts.dropped += 1
                log.warning("audience of no job dropped", job_id=job_id)
                return
            raise Later
        _, expansion = await self.filling.terms(at.number, at.state)
        if entry.order < order_of(expansion.entry):
            self.counts.dropped += 1  # left over from an earlier submission under this id, which was rejected
            return
        if at.is_filled and not self.filling.is_forgotten(at):
            await self.filling.unhalt(at.number, expansion)
            return
        if number >= at.chunks_expected:
            raise Refused(Problem("$.n", f"the job names {at.chunks_expected} entries, numbered from 0"))
        data = entry.fields.get(b"data")
        if data is None:
            try:
                purpose = client.audience_purpose(expansion.account, job_id, number)
                data = client.unseal(self.keyring().intake, entry.fields.get(b"sealed", b""), purpose)
            except client.UnsealError as error:
                await self.filling.stop(at.number, f"audience entry {number} cannot be opened")
                raise Refused(Problem("$", f"cannot be opened: {error}")) from None
        if len(data) > CHUNK_BYTES:
            await self.filling.stop(at.number, f"audience entry {number} is larger than 1 MiB")
            raise Refused(Problem("$", f"has {len(data):,} bytes, at most {CHUNK_BYTES:,}", "cut smaller entries"))
        await self.filling.lines(at.number, number, data)

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
        at = await self.filling.ask(lambda conn: standing.job_standing(conn, job))
        if at is None or (at.is_filled and not self.filling.is_forgotten(at)):
            return
        await self.filling.lines(job, number, data, entry.fields.get(b"of", b""))

    # --- scheduled jobs --------------------------------------------------------------------------------------------

    async def _release_held(self) -> None:
        """Give the chunks of jobs whose time comes back to the intake; two workers at once do it twice to no effect."""
        now = self.monotonic()
        if now < self._next_held:
            return
        self._next_held = now + 10.0
        until = self.clock() + HOLD_US
        for job in await self.filling.ask(lambda conn: standing.held_jobs(conn, until)):
            stream = keyspace.stream_of_chunks(job)
            while some := await self.redis.xrange(stream, count=4):
                async with self.redis.pipeline(transaction=True) as pipe:
                    for entry_id, fields in cast(list[tuple[bytes, dict[Any, Any]]], some):
                        pipe.xadd(keyspace.INTAKE, {b"held": job, **fields})
                        pipe.xdel(stream, entry_id)
                    await pipe.execute()
            await self.redis.delete(stream)


def _shown(data: bytes | None) -> str:
    """A job id or account as an entry names it, "" for anything that cannot be one."""
    text = (data or b"").decode("utf-8", "replace")
    allowed = text.isascii() and len(text) <= 100 and all(c.isalnum() or c in "._:-" for c in text)
    return text if allowed else ""


def _whole(data: bytes | None) -> int | None:
    return int(data) if data is not None and data.isdigit() and len(data) <= 15 else None
