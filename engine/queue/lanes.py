"""Every question the engine asks of the queue, one method each; each is one script of one partition (decision 5).
Gate and settle take many slices a script, releases and assignments of one moment share a pipeline: what a script costs
before it does anything is as much as a slice of one.

Laws (T2 to T7 of promises.md):
- A chunk is put into a partition once; a repeat is told so and changes nothing.
- A slice is waiting, leased, or gone; at most one token is current, and every later write compares it.
- Redis TIME is the only clock: callers hand in *delays* in seconds, scripts add them. Only `put` takes an instant
  (the job's send_at, microseconds; 0 is now).
- What the store does not answer is None (`gate_many`, `settle_many`): no leave to send, and try again later.

The path of a slice: facts → put → lease → (assign, when its lane had no site) → gate → settle … → gone;
release hands it back, reclaim takes it from a worker whose heartbeat counter stood still.

Errors: methods that return no None raise redis.RedisError; a script that finds us contradicting ourselves raises
QueueError. The client may repeat a call whose reply was lost, so every script is safe to run twice; a *lease* run
twice leaves a lease its holder does not know of: `holder_leases` shows it, and the courier releases it.

Known limits: on a Redis Cluster the pipelines need redis-py's cluster client to route by the first key. `put` does not
look at the cap of the event stream (leasing does): intake is held back by the writer it calls for every chunk.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from engine.queue.questions import (
    Answer,
    FactsRequest,
    GateRequest,
    JobState,
    Lease,
    Leased,
    LeaseRequest,
    PutRequest,
    Retry,
    Settled,
    SettleRequest,
    Waiting,
)
from engine.queue.scripts import Call, QueueError, Scripts
from engine.queue.slices import mask_of
from policy import keyspace
from policy.gate import Standing

EVENT_CAP = 4_000  # batches in a partition's event stream at which leasing stops (decision 15): 4 KiB each when full
TAG_BYTES = 12
AT_ONCE = 256  # scripts of a pipeline, about 10 us each
UNPARK = (200, 500)  # sites, slices of each: a script, 10 us a slice; what is left comes by itself in five seconds
FEW = 8  # scripts that share a pipeline with others; a chunk of a thousand rows has one for each partition it touches
TOGETHER = 64  # slices a script: each holds the server for 10 to 20 us, so about a millisecond
_MREF = struct.Struct(">q")

__all__ = [
    "EVENT_CAP", "Answer", "FactsRequest", "GateRequest", "JobState", "Lanes", "Lease", "LeaseRequest", "Leased",
    "PutRequest", "QueueError", "Retry", "SettleRequest", "Settled", "Waiting",
]  # fmt: skip


class Lanes:
    """The queue as one worker sees it. holder names host, worker and journal, without spaces; binary-safe client
    (decode_responses=False)."""

    def __init__(self, redis: Redis, holder: str, *, event_cap: int = EVENT_CAP) -> None:
        if not holder or any(letter.isspace() for letter in holder):
            raise QueueError("a holder is one word")
        self._scripts = Scripts(redis)
        self.holder = holder
        self._event_cap = event_cap
        self._waiting: list[tuple[Call, asyncio.Future[Any], int | None]] = []
        self._asking: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Lanes of {self.holder}>"

    # --- expansion -------------------------------------------------------------------------------------------------

    async def facts(self, requests: Sequence[FactsRequest]) -> list[bytes]:
        """One byte a row and request: 0 or a policy.events.Reason, DUPLICATE where this job has had the mref before.

        The same chunk asking again gets the same answers. Raises RedisError: nothing may be put without facts.
        """
        answers = await self._few([_facts_call(request) for request in requests])
        facts: list[bytes] = []
        for request, answer in zip(requests, answers, strict=True):
            told = _value(answer)
            if not isinstance(told, bytes) or len(told) != len(request.rows):
                raise QueueError("facts for another number of rows")
            facts.append(told)
        return facts

    async def put(self, requests: Sequence[PutRequest]) -> list[bool]:
        """Write shares of chunks; True where written now, False where that chunk had been put before. Then wakes
        whoever listens on keyspace.WAKE. Raises RedisError: put again, it is safe."""
        wakes = [request.partition if request.slices else None for request in requests]
        answers = await self._few([_put_call(request) for request in requests], wakes)
        return [_value(answer) == 1 for answer in answers]

    # --- delivery --------------------------------------------------------------------------------------------------

    async def lease_many(self, requests: Sequence[LeaseRequest], ready_limit: int = 64) -> list[Leased]:
        """Take due slices of the sites named; see LeaseRequest and Leased. Priority goes first, but every fourth pick
        prefers a campaign. What is paused or halted is passed over until it expires. Raises RedisError."""
        calls = []
        for request in requests:
            args: list[bytes | str | int] = [self.holder, self._event_cap, ready_limit, request.unresolved]
            for site, count in request.sites:
                args += (site, count)
            for kind, some in (("p", request.urgent), ("c", request.plain)):
                for site, count in some:
                    args += (site, f"{kind}{count}")
            calls.append(Call("lease", keyspace.prefix(request.partition), args))
        answers = await self._scripts.run(calls)
        return [_leased(request.partition, _value(answer)) for request, answer in zip(requests, answers, strict=True)]

    async def lease(
        self, partition: int, sites: Sequence[tuple[str, int]], unresolved: int = 0, ready_limit: int = 64
    ) -> Leased:
        """`lease_many` for one partition."""
        return (await self.lease_many([LeaseRequest(partition, sites, unresolved)], ready_limit))[0]

    async def assign(self, partition: int, lane: str, site: str) -> None:
        """Remember the site of a lane and move its waiting slices there. Idempotent; a lane without slices is not
        remembered. A thousand slices a call, so that no script holds the server for long."""
        await self._walk("assign", partition, lane, site)

    async def postpone(self, partition: int, lane: str, delay: float) -> None:
        """Nothing of this lane is due before `delay` seconds from now (its domain does not resolve at the moment)."""
        await self._walk("postpone", partition, lane, _micros(delay))

    async def gate_many(self, requests: Sequence[GateRequest]) -> list[Answer | None]:
        """Ask about recipients of leased slices on ready connections. None: no answer (unreadable or unwritable
        store, or words we do not know), so nothing may be sent. Note the monotonic time *before* calling: it is the
        asked_at of policy.gate.decide."""
        groups = _together(requests)
        told: list[Answer | None] = [None] * len(requests)
        try:
            answers = await self._scripts.run([_gate_call([requests[i] for i in group]) for group in groups])
        except (RedisError, OSError):
            return told
        for group, answer in zip(groups, answers, strict=True):
            for index, one in zip(group, _answers([requests[i] for i in group], answer), strict=True):
                told[index] = one
        return told

    async def gate(self, request: GateRequest) -> Answer | None:
        """`gate_many` for one slice."""
        return (await self.gate_many([request]))[0]

    async def settle_many(self, requests: Sequence[SettleRequest]) -> list[Settled | None]:
        """Write outcomes of leased slices: maps, events, retries, counters, in one script each. None: the store did
        not take it, keep it journalled and try again. Running the same request twice changes nothing more. Raises
        QueueError where a retry names recipients of whom some, not all, were already done."""
        groups = _together(requests)
        told: list[Settled | None] = [None] * len(requests)
        try:
            answers = await self._scripts.run([_settle_call([requests[i] for i in group]) for group in groups])
        except (RedisError, OSError):
            return told
        for group, answer in zip(groups, answers, strict=True):
            if isinstance(answer, Exception):
                continue
            if -1 in answer:
                raise QueueError("a retry contradicts what is already settled")
            for index, settled in zip(group, answer, strict=True):
                told[index] = Settled(settled)
        return told

    async def tell(self, batches: Sequence[tuple[int, bytes]]) -> None:
        """Events by themselves, (partition, encoded policy.events.Batch) each: outcomes whose slice is not ours any
        more. Raises RedisError: tell them again, the ledger folds what it knows."""
        await self._scripts.plain([("XADD", keyspace.events(where), "*", "b", batch) for where, batch in batches])

    async def settle(self, request: SettleRequest) -> Settled | None:
        """`settle_many` for one slice."""
        return (await self.settle_many([request]))[0]

    async def release(self, partition: int, slice_id: str, token: int, delay: float = 0.0) -> Settled:
        """Hand a slice back, due again after `delay` seconds (at its expiry at the latest). KEPT or STALE."""
        call = Call("release", keyspace.prefix(partition), (slice_id, token, _micros(delay)))
        return Settled(await self._soon(call))

    async def release_many(self, leases: Sequence[tuple[int, str, int]]) -> None:
        """`release` of (partition, slice id, token), due at once, in one round trip. Raises the first error."""
        calls = [Call("release", keyspace.prefix(partition), (name, token, 0)) for partition, name, token in leases]
        for answer in await self._scripts.run(calls):
            _value(answer)

    # --- heartbeat and the dead ------------------------------------------------------------------------------------

    async def heartbeat(self, partitions: Iterable[int]) -> None:
        """Move our counter in the partitions where we hold leases. Raises RedisError: after half a lease without a
        heartbeat start no DATA (promises.md 2)."""
        for answer in await self._scripts.run([Call("beat", keyspace.prefix(p), (self.holder,)) for p in partitions]):
            _value(answer)

    async def holders(self, partition: int) -> dict[str, int]:
        """Who has leased here and where their counters stand, for the reclaimer to watch with its own clock."""
        stored = await self._pairs(keyspace.holders(partition))
        return {_text(name): int(count) for name, count in stored.items()}

    async def all_holders(self) -> dict[tuple[int, str], int]:
        """`holders` of every partition in one round trip: counters by (partition, holder)."""
        partitions = range(keyspace.PARTITIONS)
        told = await self._scripts.plain([("HGETALL", keyspace.holders(partition)) for partition in partitions])
        return {(p, _text(name)): int(count) for p, stored in enumerate(told) for name, count in stored.items()}

    async def all_leases(self) -> list[tuple[int, str, int, str]]:
        """(partition, slice id, token, holder) of every lease there is, in one round trip."""
        partitions = range(keyspace.PARTITIONS)
        told = await self._scripts.plain([("HGETALL", keyspace.leases(partition)) for partition in partitions])
        found = []
        for partition, stored in enumerate(told):
            for slice_id, lease in stored.items():
                token, _, holder = _text(lease).partition(" ")
                found.append((partition, _text(slice_id), int(token), holder))
        return found

    async def our_leases(self) -> list[tuple[int, str, int]]:
        """(partition, slice id, token) of every lease this holder has, known to it or not."""
        return [(p, name, token) for p, name, token, holder in await self.all_leases() if holder == self.holder]

    async def holder_leases(self, partition: int, holder: str) -> list[tuple[str, int]]:
        """(slice id, token) of every lease somebody has in this partition."""
        stored = await self._pairs(keyspace.leases(partition))
        found = []
        for slice_id, lease in stored.items():
            token, _, name = _text(lease).partition(" ")
            if name == holder:
                found.append((_text(slice_id), int(token)))
        return found

    async def reclaim(self, partition: int, holder: str, seen: int) -> int | None:
        """Take every lease of a dead holder back, if its counter still reads `seen`: how many, or None when it moved.

        Only after the counter stood still for a full lease on the caller's monotonic clock (decision 6) and after the
        journal of that holder was replayed. The caller must not be that holder's own process."""
        count = _value((await self._scripts.run([Call("reclaim", keyspace.prefix(partition), (holder, seen))]))[0])
        return None if count < 0 else int(count)

    async def leave(self, partitions: Iterable[int]) -> None:
        """A clean goodbye: forget our heartbeat where we hold no lease any more."""
        for answer in await self._scripts.run([Call("leave", keyspace.prefix(p), (self.holder,)) for p in partitions]):
            _value(answer)

    # --- operators -------------------------------------------------------------------------------------------------

    async def halt(self, what: str, partitions: Iterable[int] = range(keyspace.PARTITIONS)) -> None:
        """Stop leasing of "a<account>", "j<job>" or "l<lane reference>"; the gate refuses what is already leased."""
        await self._scripts.plain([("SADD", keyspace.halts(partition), what) for partition in partitions])

    async def resume(self, what: str, partitions: Iterable[int] = range(keyspace.PARTITIONS)) -> None:
        """Undo `halt`. What was passed over meanwhile is due again within five seconds."""
        await self._scripts.plain([("SREM", keyspace.halts(partition), what) for partition in partitions])

    async def let_go(self, what: str, partitions: Iterable[int] = range(keyspace.PARTITIONS)) -> None:
        """`resume`, and what was passed over meanwhile is due now: whoever listens on keyspace.WAKE is woken."""
        partitions = list(partitions)
        await self.resume(what, partitions)
        answers = await self._scripts.run([Call("unpark", keyspace.prefix(p), UNPARK) for p in partitions])
        some = [p for p, answer in zip(partitions, answers, strict=True) if _value(answer)]
        await self._scripts.plain(_published(some))

    async def waiting(self, job: int, partitions: Iterable[int] = range(keyspace.PARTITIONS)) -> int:
        """Recipients of a job that have not reached a terminal state, over these partitions."""
        counts = await self._scripts.plain([("HGET", keyspace.job(partition, job), "w") for partition in partitions])
        return sum(int(count) for count in counts if count is not None)

    async def lane_slices(self, partition: int, lane: str) -> list[Waiting]:
        """Every slice of a lane, leased or not."""
        told = await self._scripts.plain([("ZRANGE", keyspace.lane(partition, lane), "0", "-1", "WITHSCORES")])
        flat = told[0]
        # RESP3 answers with pairs, RESP2 with one flat list: the client's choice, not ours
        pairs = flat if flat and isinstance(flat[0], list) else list(zip(flat[::2], flat[1::2], strict=True))
        asked: list[tuple[str, ...]] = []
        for slice_id, _ in pairs:
            asked += (
                ("GET", keyspace.slice_key(partition, _text(slice_id))),
                ("HGET", keyspace.leases(partition), _text(slice_id)),
            )
        told = await self._scripts.plain(asked)
        return [
            Waiting(partition, _text(slice_id), int(due), _text(lease or b" ").partition(" ")[2], data)
            for (slice_id, due), data, lease in zip(pairs, told[::2], told[1::2], strict=True)
            if data is not None
        ]

    async def _pairs(self, key: str) -> dict[bytes, bytes]:
        stored: dict[bytes, bytes] = (await self._scripts.plain([("HGETALL", key)]))[0]
        return stored

    async def _walk(self, script: str, partition: int, lane: str, argument: str | int) -> None:
        place = 0
        while place >= 0:
            call = Call(script, keyspace.prefix(partition), (lane, argument, place))
            place = int(await self._soon(call))

    async def _few(self, calls: Sequence[Call], wakes: Sequence[int | None] = ()) -> Sequence[Any]:
        """Answers, or errors in their places. wakes: of each call the partition in which somebody listens for it.

        A chunk has a pipeline of its own; what a small job asks goes with whatever else is asked at this moment."""
        wakes = wakes or [None] * len(calls)
        if len(calls) > FEW:
            return await self._scripts.run(calls, _published(wakes))
        return await asyncio.gather(*[self._queued(call, wake) for call, wake in zip(calls, wakes, strict=True)])

    async def _soon(self, call: Call) -> Any:
        """The answer of a script that many ask for at once, each for itself: a provider that blocks us sends ten
        thousand slices back. Those of a moment share a pipeline, and none waits for a connection of its own."""
        return _value(await self._queued(call, None))

    def _queued(self, call: Call, wake: int | None) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer, wake))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="lanes")
        return answer

    async def _ask(self) -> None:
        try:
            await asyncio.sleep(0)  # whoever else is about to ask in this turn of the loop
            while self._waiting:
                some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                answers: Sequence[Any]
                try:
                    answers = await self._scripts.run(
                        [call for call, _, _ in some], _published([wake for _, _, wake in some])
                    )
                except Exception as error:  # each of them hears of it, whatever it was
                    answers = [error] * len(some)
                for (_, answer, _), told in zip(some, answers, strict=True):
                    if not answer.done():
                        answer.set_result(told)
        finally:
            self._asking = None
            for _, answer, _ in self._waiting:
                answer.cancel()
            self._waiting = []


def _published(wakes: Iterable[int | None]) -> list[tuple[str, ...]]:
    """The commands that tell workers where something was laid, once a partition."""
    return [("PUBLISH", keyspace.WAKE, str(wake)) for wake in {wake for wake in wakes if wake is not None}]


def _facts_call(request: FactsRequest) -> Call:
    if any(len(tag) != TAG_BYTES for tag in request.domain_tags) or len(request.rows) != len(request.domain_tags):
        raise QueueError("a row has a 12-byte tag and a 12-byte tag of its domain")
    packed = bytearray()
    for (mref, tag), domain_tag in zip(request.rows, request.domain_tags, strict=True):
        if len(tag) != TAG_BYTES:
            raise QueueError("a row has a 12-byte tag and a 12-byte tag of its domain")
        packed += _MREF.pack(mref) + tag + domain_tag
    scopes = (request.account, request.list_number, request.topic_number)
    args = (request.job, request.chunk, max(1, request.buckets), *scopes, bytes(packed))
    return Call("facts", keyspace.prefix(request.partition), args)


def _put_call(request: PutRequest) -> Call:
    state = request.state
    args: list[bytes | str | int] = [
        request.job, request.chunk, state.account, state.list_number, state.topic_number, int(state.priority),
        state.expires_at, "resend" if state.resend_in_doubt else "hold", state.buckets, state.state,
        len(request.slices),
    ]  # fmt: skip
    for due, data in request.slices:
        args += (due, data)
    args += request.events
    return Call("put", keyspace.prefix(request.partition), args)


def _together(requests: Sequence[GateRequest | SettleRequest]) -> list[list[int]]:
    """Which requests go into one script: those of a partition, in their order, at most TOGETHER."""
    groups: dict[int, list[list[int]]] = {}
    for index, request in enumerate(requests):
        parts = groups.setdefault(request.partition, [[]])
        if len(parts[-1]) >= TOGETHER:
            parts.append([])
        parts[-1].append(index)
    return [group for parts in groups.values() for group in parts]


def _gate_call(requests: Sequence[GateRequest]) -> Call:
    args: list[bytes | str | int] = []
    for request in requests:
        tags = b"".join(request.tags)
        if len(tags) != TAG_BYTES * len(request.tags) or len(request.domain_tag) != TAG_BYTES:
            raise QueueError("a tag has 12 bytes")
        args += (request.slice_id, request.token, tags, request.domain_tag)
    return Call("gate", keyspace.prefix(requests[0].partition), args)


def _settle_call(requests: Sequence[SettleRequest]) -> Call:
    args: list[bytes | str | int] = []
    for request in requests:
        done = set(request.done)
        for retry in request.retries:
            done.update(retry.rows)
        args += (request.slice_id, request.token, mask_of(done), mask_of(request.doubt), request.events)
        args.append(len(request.retries))
        for retry in request.retries:
            args += (_micros(retry.delay), mask_of(retry.rows), retry.data)
    return Call("settle", keyspace.prefix(requests[0].partition), args)


def _leased(partition: int, told: Any) -> Leased:
    now_us, full, taken, ready, strangers = told
    slices = [
        Lease(partition, _text(taken[i]), _text(taken[i + 1]), _text(taken[i + 2]), *taken[i + 3 : i + 6])
        for i in range(0, len(taken), 6)
    ]
    sites: dict[str, int] = {}
    for i in range(0, len(ready), 2):
        sites.setdefault(_text(ready[i]), int(float(ready[i + 1])))
    return Leased(partition, now_us, slices, list(sites.items()), bool(full), strangers)


def _answers(requests: Sequence[GateRequest], told: Any) -> list[Answer | None]:
    """None where the store did not answer, or in other words than ours."""
    if not isinstance(told, list) or len(told) != 2 * len(requests):
        return [None] * len(requests)
    return [_answer(request, *told[2 * i : 2 * i + 2]) for i, request in enumerate(requests)]


def _answer(request: GateRequest, standing: Any, facts: Any) -> Answer | None:
    try:
        answer = Answer(Standing(standing), facts)
    except (TypeError, ValueError):
        return None
    if not isinstance(facts, bytes) or len(facts) != (len(request.tags) if answer.standing is Standing.CLEAR else 0):
        return None
    return answer


def _value(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode("ascii")


def _micros(delay: float) -> int:
    return max(0, round(delay * 1_000_000))
