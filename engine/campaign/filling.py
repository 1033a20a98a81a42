"""Filling: an entry of the audience, whole, from rows to slices on lanes; and when the last one is in.

Laws (T2):
- registered with the writer first (same bytes: no effect; other bytes: the job is stopped), marked as finished last;
- what happens between is idempotent: facts answer a repeat of a chunk alike, a chunk is put into a partition once;
- a job is reported expanded with the sum of its rows when every entry has its mark, by whoever set the last one, and
  again by whoever repeats that; only then is a `wait` lifted.

    1 `entry`     WriterClient.chunk · held, when its time is more than an hour away
    2 `_expand`   at most 1,000 rows: facts and consent ledger -> gate -> vault -> slices -> Lanes.put (expand.py)
    3 `_complete` a bit in the job's home partition; all bits there -> WriterClient.expanded. A job with one entry needs
                  no bit: that the writer knows it as expanded says the same

What came with its job was registered by the same transaction. Questions of small jobs are gathered (gathering.py).

Several chunks are under way at a time (`Limits.together`), so that the vault and Redis work while rows are keyed here.
They come to the vault together, `_MUSTERED` of them in one call: a thousand new people are a thousand places in each of
its trees, and four thousand share most of the pages that a thousand write (the writer's CPU a recipient fell by a
quarter, python -m benchmarks.intake). Rows are keyed and sealed a chunk a turn of the loop: mail goes out in between.

Known limits: rows of a job that ended before their entry was begun are dropped with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Final, TypeVar, cast

import msgspec
import structlog
from sqlalchemy import Connection, Engine

from engine import client
from engine.campaign import acceptance, expand, standing
from engine.campaign.asking import Asking
from engine.campaign.claims import Counts, Later, Refused
from engine.campaign.gathering import Gathering, Muster
from engine.campaign.job import Recipient
from engine.campaign.people import Person
from engine.campaign.problems import Problem
from engine.campaign.validation import read_row
from engine.queue.epoch import Epoch
from engine.queue.lanes import Lanes, PutRequest
from policy import keyspace
from policy.crashpoints import reach
from policy.events import Kind, Reason
from policy.instants import HOUR_US, week_of
from policy.keys import Keyring, seal
from policy.ledger import Reader
from policy.valkey import Client
from policy.wire import ConsentRow, Resolved, WireError, WriterClient

log = structlog.get_logger()

HOLD_US: Final = HOUR_US  # decision 3: sealed chunks until an hour before send_at
MOST_ROWS: Final = (expand.CHUNKS_AN_ENTRY - 1) * client.CHUNK_ROWS  # the last chunk number of an entry is its mark
_MARK: Final = expand.CHUNKS_AN_ENTRY - 1
_ENDED: Final = {"cancelled": Kind.CANCELLED, "expired": Kind.EXPIRED, "lost": Kind.LOST}
_KNOWN: Final = 256  # jobs whose terms are kept open
_FEW: Final = 64  # rows that are expanded beside whatever else is under way
_MUSTERED: Final = 4  # chunks in one call to the vault: its answer takes a third of a second

T = TypeVar("T")
Unresolved = tuple[int, int, list[tuple[bytes, int, str]]]  # account, week, (tag, partition, wire address) a person


@dataclass(slots=True)
class Filling:
    """One worker's hands on the lanes. engine: read-only (policy.schema.open_store)."""

    redis: Client
    lanes: Lanes
    writer: WriterClient
    engine: Engine
    keyring: Callable[[], Keyring]
    clock: Callable[[], int]
    monotonic: Callable[[], float]
    counts: Counts
    together: int
    epoch: Epoch | None = None
    _known: OrderedDict[int, tuple[expand.Terms, acceptance.Expansion]] = field(default_factory=OrderedDict)
    _slots: asyncio.Semaphore = field(init=False)
    _reader: Reader = field(init=False)
    _asking: Asking = field(init=False)
    _expanded: Gathering[tuple[int, int], None] = field(init=False)
    _resolved: Gathering[Unresolved, list[Resolved]] = field(init=False)
    _mustered: Muster[Unresolved, list[Resolved]] = field(init=False)
    _agreed: Gathering[tuple[int, list[ConsentRow]], None] = field(init=False)
    _keying: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.together)
        self._reader = Reader(self.engine)
        self._asking = Asking(self.engine)
        self._expanded = Gathering(self._expand_all, WireError)
        self._resolved = Gathering(self._resolve_all, WireError)
        self._mustered = Muster(self._resolve_all, WireError, _MUSTERED)
        self._agreed = Gathering(self._consent_all, WireError)

    async def lines(self, job: int, number: int, data: bytes, digest: bytes = b"") -> None:
        """An entry as NDJSON. digest: under which it is registered, when that is not of these bytes."""
        rows = [read_row(line) for line in data.split(b"\n") if line and not line.isspace()]
        if len(rows) > MOST_ROWS:
            await self.stop(job, f"audience entry {number} has more than {MOST_ROWS:,} rows")
            raise Refused(Problem("$", f"has {len(rows):,} rows, at most {MOST_ROWS:,}", "cut smaller entries"))
        await self.entry(job, number, digest or sha256(data).digest(), rows, data)

    async def entry(
        self,
        job: int,
        number: int,
        digest: bytes,
        rows: Sequence[Recipient | None],
        data: bytes | None = None,
        *,
        is_new: bool = False,
        is_registered: bool = False,
    ) -> None:
        """One entry of the audience, whole: registered, expanded (or held), marked. is_new: its job was accepted a
        moment ago, so that it stands as it was accepted; is_registered: by the same transaction."""
        self._hold_off()
        reach("before-register")
        if not (is_registered or await self._register(job, number, digest, len(rows))):
            return
        reach("after-register")
        at = None if is_new else await self.ask(lambda conn: standing.job_standing(conn, job))
        terms, expansion = await self.terms(job, at.state if at else "")
        if terms.due > self.clock() + HOLD_US and terms.fate is None:
            # no digest: recipients of the job itself, registered with it
            registered = digest or acceptance.entry_hash(cast(Sequence[Recipient], rows))
            await self._hold(job, number, data if data is not None else _ndjson(rows), registered)
            return
        if expansion.wait:
            await self.lanes.halt(f"j{job}")
        parts = range(0, len(rows), client.CHUNK_ROWS)
        await asyncio.gather(
            *[
                self._expand(
                    terms,
                    number * expand.CHUNKS_AN_ENTRY + place,
                    rows[start : start + client.CHUNK_ROWS],
                    number * max(len(rows), client.CHUNK_ROWS) + start,
                )
                for place, start in enumerate(parts)
            ]
        )
        await self._complete(terms, expansion, number, len(rows))

    async def _register(self, job: int, number: int, digest: bytes, rows: int) -> bool:
        """False: its job has ended, the entry is dropped."""
        try:
            told = await self.writer.chunk(job, number, digest, rows)
        except WireError as error:
            if error.kind != "ended":
                raise
            self.counts.dropped += 1
            return False
        if told == "conflict":
            await self.stop(job, f"audience entry {number} came twice with different contents")
            raise Refused(Problem("$", "this number came before with other contents: the job is stopped"))
        return True

    async def _expand(self, terms: expand.Terms, chunk: int, rows: Sequence[Recipient | None], first: int) -> None:
        is_small = len(rows) <= _FEW
        async with contextlib.nullcontext() if is_small else self._slots:
            self._hold_off()
            keyring, now = self.keyring(), self.clock()
            with contextlib.nullcontext() if is_small else self._mustered.coming():
                async with self._turn(is_small):
                    prepared = expand.prepare(terms, keyring, chunk, rows, first, now)
                permitted: list[Person] = []
                if prepared.people:
                    asked_at = self.monotonic()
                    questions = expand.questions(terms, keyring, prepared)
                    tags = [person.tag for people in prepared.people.values() for person in people]
                    answers, known = await asyncio.gather(
                        self.lanes.facts(questions),
                        self.ask(lambda conn: standing.consents(conn, terms.account, tags, now)),
                    )
                    facts = {question.partition: answer for question, answer in zip(questions, answers, strict=True)}
                    permitted = expand.decide(terms, prepared, facts, known, asked_at)
                if self.epoch is not None and self.epoch.suspects(terms.job):
                    permitted = await self._spared(terms.job, prepared, permitted)
            if permitted:
                asking = self._resolved if is_small else self._mustered
                unresolved = [(person.tag, person.partition, person.wire) for person in permitted]
                expand.number(permitted, await asking.ask((terms.account, week_of(now), unresolved)))
                permitted = _without_the_erased(prepared, permitted)
                lines = expand.evidence(permitted, known)
                if lines:
                    await self._agreed.ask((terms.account, lines))
            reach("before-put")
            async with self._turn(is_small):
                shares = expand.shares(terms, keyring, prepared)
            await self.lanes.put(shares)
            reach("after-put")
            self.counts.rows += len(rows)
            self.counts.refused += len(rows) - len(permitted)

    @contextlib.asynccontextmanager
    async def _turn(self, is_small: bool) -> AsyncIterator[None]:
        """A thousand rows a turn of the loop: 20 ms, and nobody else's message waits longer for ours."""
        if is_small:
            yield
            return
        async with self._keying:
            yield
            await asyncio.sleep(0)

    def _hold_off(self) -> None:
        """Nothing is put on lanes of a store that is not open for it (T12)."""
        if self.epoch is not None and not self.epoch.is_open:
            raise Later

    def is_forgotten(self, at: standing.JobStanding) -> bool:
        """Whether entries of this job are expanded even if all of them were before: the store may have forgotten it.
        Chunks that it knows are passed over there, people of whom the ledger has an end here."""
        return self.epoch is not None and self.epoch.suspects(at.number) and at.done_at is None

    async def _spared(self, job: int, prepared: expand.Prepared, permitted: Sequence[Person]) -> list[Person]:
        """Without those of whom the ledger has an end: the store may have forgotten that they were put (T12)."""
        mrefs = [person.mref for person in permitted]
        mrefs += [event.mref for events in prepared.events.values() for event in events]
        ended, repeated = await self.ask(lambda conn: standing.accounted(conn, job, prepared.chunk, mrefs))
        return expand.spare(prepared, permitted, ended, repeated)

    async def _expand_all(self, jobs: Sequence[tuple[int, int]]) -> list[Exception | None]:
        told = await self.writer.expanded_all(jobs)
        return [WireError(*refused.split(": ", 1)) if refused else None for refused in told]

    async def _consent_all(self, asked: Sequence[tuple[int, list[ConsentRow]]]) -> list[None]:
        """One call an account."""
        lines: dict[int, list[ConsentRow]] = defaultdict(list)
        for account, some in asked:
            lines[account] += some
        for account, together in lines.items():
            await self.writer.consents(account, together)
        return [None] * len(asked)

    async def _resolve_all(self, asked: Sequence[Unresolved]) -> list[list[Resolved] | Exception]:
        """One call an account and week."""
        rows: dict[tuple[int, int], list[tuple[bytes, int, str]]] = defaultdict(list)
        for account, week, some in asked:
            rows[account, week] += some
        answers = {key: iter(await self.writer.resolve(*key, some)) for key, some in rows.items()}
        return [list(itertools.islice(answers[account, week], len(some))) for account, week, some in asked]

    async def _complete(self, terms: expand.Terms, expansion: acceptance.Expansion, number: int, rows: int) -> None:
        """Mark the entry, of so many rows, in the job's home partition; with the last mark the job is expanded."""
        if expansion.chunks == 1:  # the only one: that the writer knows it as expanded is its mark
            reach("before-mark")
            await self._expanded.ask((terms.job, rows))
            reach("after-mark")
            await self.unhalt(terms.job, expansion)
            return
        home = terms.job % keyspace.PARTITIONS
        mark = PutRequest(home, terms.job, number * expand.CHUNKS_AN_ENTRY + _MARK, terms.state, ())
        reach("before-mark")
        await self.lanes.put([mark])
        reach("after-mark")
        marks = cast(bytes, await self.redis.get(keyspace.chunks_put(home, terms.job)) or b"")
        # bit 63 of every eight bytes is the mark of an entry
        if sum(byte & 1 for byte in marks[7::8]) < expansion.chunks:
            return
        entries, known = await self.ask(lambda conn: standing.chunks_known(conn, terms.job))
        if entries == expansion.chunks:
            await self.writer.expanded(terms.job, known)
            await self.unhalt(terms.job, expansion)

    async def unhalt(self, job: int, expansion: acceptance.Expansion) -> None:
        if expansion.wait:
            await self.lanes.let_go(f"j{job}")

    async def stop(self, job: int, reason: str) -> None:
        """End a job that cannot be sent as it was meant; a job that has ended already stays as it is."""
        log.warning("job stopped", job=job, reason=reason)
        with contextlib.suppress(WireError):
            await self.writer.job_state(job, "cancelled", reason)

    async def terms(self, job: int, state: str) -> tuple[expand.Terms, acceptance.Expansion]:
        known = self._known.get(job)
        if known is None:
            payload = await asyncio.to_thread(self._reader.job_payload, job)
            if payload is None or payload.payload is None or payload.job_key is None:
                raise Refused(Problem("$", "the job is no longer kept"))
            known = acceptance.terms(payload, self.keyring())
            self.know(known)
        fate = _ENDED.get(state)
        terms, expansion = known
        return (terms if fate is None else replace(terms, fate=fate)), expansion

    def know(self, known: tuple[expand.Terms, acceptance.Expansion]) -> None:
        """The terms of a job, for whoever asks next."""
        self._known[known[0].job] = known
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    async def _hold(self, job: int, number: int, data: bytes, digest: bytes) -> None:
        """digest: under which the entry is registered. What comes back may be other bytes: recipients of a job handed
        in whole were registered as they stood there, and people are taken out while it waits (engine.stores)."""
        sealed = seal(self.keyring().service, data, f"held/{job}/{number}".encode())
        fields: dict[str | bytes, bytes | int] = {"n": number, "sealed": sealed}
        if digest != sha256(data).digest():
            fields["of"] = digest
        await self.redis.xadd(keyspace.stream_of_chunks(job), cast(dict[Any, Any], fields))
        self.counts.held += 1

    async def ask(self, question: Callable[[Connection], T]) -> T:
        """A question of SQL, off the loop and together with whatever else is asked at this moment."""
        return await self._asking.ask(question)


def _ndjson(rows: Sequence[Recipient | None]) -> bytes:
    return b"\n".join(msgspec.json.encode(row) for row in rows)


def _without_the_erased(prepared: expand.Prepared, permitted: list[Person]) -> list[Person]:
    """Who was erased between the gate's answer and the vault's: refused, and nobody new is made of them (P-54)."""
    gone = [person for person in permitted if not person.subject]
    for person in gone:
        prepared.refuse(person, Kind.REFUSED, Reason.ERASED)
        prepared.people[person.partition].remove(person)
    return [person for person in permitted if person.subject] if gone else permitted
