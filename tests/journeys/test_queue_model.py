"""The queue against a model: any sequence of what workers, operators, clocks and crashes do to it, on a real server.

Laws, checked after every script:
- the census finds only legal states (`states.violations`), and every way of a slice, of a recipient and of a job from
  one state to the next is in the table (`states.moves`, `transitions.allowed`);
- what Redis holds is what the model says: each recipient in exactly one place, waiting, leased, or ended once in the
  event stream, and nobody whose end was told is ever leased again;
- a slice is in one hand; a hand that is not current changes nothing; a date once fixed stays, whatever happens;
- the gate says what the model says, and a lease takes only what is due and neither paused nor halted.
At the end, with everything resumed, everybody put has ended exactly once and no key of them is left.

Redis TIME is a key here (tests.world.queue_clock), so that a rule can let days pass, forwards and backwards.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.queue import slices
from engine.queue.lanes import (
    GateRequest,
    JobState,
    Lanes,
    Lease,
    LeaseRequest,
    PutRequest,
    Retry,
    Settled,
    SettleRequest,
)
from engine.queue.slices import FLAG_RESEND, Contents, Header, Row
from engine.queue.states import Snapshot, moves, violations
from engine.queue.sweeps import SEEN_BYTES, Seen, Sweeps
from policy import halts, keyspace
from policy.events import TERMINAL, Batch, Event, Kind, decode_batch, encode_batch
from policy.gate import Standing
from policy.instants import DAY_US, HOUR_US, SECOND_US
from policy.transitions import DEFERRED, IN_DOUBT, JOB_ENDED, JOB_MOVES, LEASED, QUEUED, SUBMITTED, allowed
from policy.valkey import EmbeddedServer, connect
from tests.world.queue_census import FAR, whole_census
from tests.world.queue_clock import KEY as CLOCK
from tests.world.queue_clock import clock_of_our_own, set_clock
from tests.world.valkey_server import running_valkey

PART = 11
JOBS = (3, 1 << 35)
LATE = 9  # a job that may be cancelled before its first chunk comes
ACCOUNT = 1
LANES = ("A" * 11, "B" * 11, "C" * 11)
SITES = ("S" * 11, "T" * 11)
WORKERS = 2
WEEK = 2900
EXAMPLES = 50  # about 15 s; ten times as many are run by hand before the queue is changed
START = 1_800_000_000 * SECOND_US
JUMPS = (-3 * DAY_US, -HOUR_US, -SECOND_US, SECOND_US, 6 * SECOND_US, 600 * SECOND_US, HOUR_US, DAY_US, 3 * DAY_US)
SIZES = st.sampled_from([1, 2, 3, 5, 64])
LIVES = (2 * HOUR_US, 2 * DAY_US, FAR)
WORDS = (f"a{ACCOUNT}", f"a{ACCOUNT}", f"l{LANES[0]}", f"l{LANES[1]}", f"c{LANES[2]}")
ENDS = (Kind.DELIVERED, Kind.BOUNCED, Kind.REFUSED, Kind.UNKNOWN)
STANDINGS = {"sending": Standing.CLEAR, "paused": Standing.PAUSED, "cancelled": Standing.CANCELLED,
    "expired": Standing.EXPIRED, "lost": Standing.GONE}  # fmt: skip
Answered = TypeVar("Answered")
Person = tuple[int, int]  # job, mref


@dataclass
class Hand:
    """A lease as its holder remembers it, current or not. people: by index in the slice."""

    worker: int
    lease: Lease
    header: Header
    contents: Contents
    people: list[Person]
    pending: set[int]


@dataclass
class Outcome:
    """What a holder has decided about recipients of a hand: settled now, or only journalled when it dies."""

    ended: dict[int, Kind] = field(default_factory=dict)
    again: dict[int, bool] = field(default_factory=dict)  # to a younger slice; whether in doubt
    delay: float = 0.0


class Queue(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = connect(self.url)
        self.lives = [0] * WORKERS
        self.workers = [Lanes(self.redis, f"host/{number}.0") for number in range(WORKERS)]
        self.sweeps = Sweeps(self.redis, "host/0.0")
        self.now = START
        self.keys = {WEEK: os.urandom(32)}  # all there ever were: the eyes of this test
        self.ring = {WEEK}  # those that workers still have
        self.current = WEEK
        self.people: dict[Person, str] = {}  # what the model says of each
        self.jobs: dict[int, str] = {}
        self.words: set[str] = set()
        self.hands: dict[str, Hand] = {}  # by slice id: the current ones
        self.stale: list[Hand] = []
        self.put: list[PutRequest] = []
        self.walked: list[Seen] = []
        self.seen = Snapshot()
        self.stored: dict[str, bytes] = {}
        self.where: dict[Person, str] = {}  # what Redis showed at the last look
        self.ended: dict[Person, Kind] = {}
        self.last_event = "0-0"
        self.opened: dict[bytes, Contents] = {}

    def wait(self, work: Awaitable[Answered]) -> Answered:
        async def waited() -> Answered:
            return await work

        return self.runner.run(waited())

    @initialize(data=st.data(), sites=st.lists(st.sampled_from([*SITES, ""]), min_size=3, max_size=3))
    def begin(self, data: st.DataObject, sites: list[str]) -> None:
        """An empty server, a chunk of each job, and lanes some of which know their sites."""
        self.wait(self.redis.flushall())
        self.wait(set_clock(self.redis, self.now))
        for job in JOBS:
            self.put_a_chunk(job, data.draw(st.lists(SIZES, min_size=1, max_size=4)), FAR, 0, 0, data)
        for lane, site in zip(LANES, sites, strict=True):
            if site:
                self.assign(lane, site)

    # --- what the queue shows ----------------------------------------------------------------------------------------

    def did(self, work: Awaitable[Answered]) -> Answered:
        """One script, and a look at what it left."""
        told = self.wait(work)
        self.look()
        return told

    def look(self) -> None:
        """Every law about one moment, and about the way from the last one to it."""
        before, now = self.seen, self.where
        self.seen, self.stored = self.wait(whole_census(self.redis, PART))
        assert violations(self.seen) == []
        assert moves(before, self.seen) == []
        self.in_time(before)
        self.hear_events()
        self.where = self.observed()
        for person, state in self.where.items():
            old = now.get(person, SUBMITTED)
            assert allowed("recipient", old, state), f"{person} went from {old} to {state}"
        assert set(now) <= set(self.where), "somebody is nowhere"

    def in_time(self, before: Snapshot) -> None:
        """Whatever a script lets wait is looked at by its expiry, so that "expired" is told in time."""
        old = {(index, name): due for index, members in before.due.items() for name, due in members.items()}
        for index, members in self.seen.due.items():
            for name, due in members.items():
                if old.get((index, name)) != due:
                    assert due <= max(self.now, self.seen.slices[name].expires_at), f"{name} waits beyond its expiry"

    def hear_events(self) -> None:
        entries: Any = self.wait(self.redis.xrange(keyspace.events(PART), min=f"({self.last_event}"))
        for entry_id, fields in entries:
            batch = decode_batch(fields[b"b"])
            for event in batch.events:
                if event.kind in TERMINAL:
                    person = batch.job, event.mref
                    assert person not in self.ended, "one end a person"
                    self.ended[person] = Kind(event.kind)
            self.last_event = entry_id.decode()

    def observed(self) -> dict[Person, str]:
        """Where everybody is, by the slices, leases and events in Redis alone."""
        found = {person: kind.name.lower() for person, kind in self.ended.items()}
        for name, header in self.seen.slices.items():
            people = self.people_of(header, self.stored[name])
            for index in header.pending():
                person = people[index]
                assert person not in found, "in two places"
                if name in self.seen.leases:
                    found[person] = LEASED
                elif header.in_doubt(index):
                    found[person] = IN_DOUBT
                else:
                    found[person] = DEFERRED if header.attempt else QUEUED
        return found

    def contents_of(self, header: Header, data: bytes) -> Contents:
        sealed = data[slices.HEADER_BYTES :]
        if sealed not in self.opened:
            contents = slices.open_contents(self.keys, header, PART, data)
            assert isinstance(contents, Contents), "the sealed part belongs to its header"
            self.opened[sealed] = contents
        return self.opened[sealed]

    def people_of(self, header: Header, data: bytes) -> list[Person]:
        return [(header.job, row.subject) for row in self.contents_of(header, data).rows]

    # --- expansion ---------------------------------------------------------------------------------------------------

    @rule(
        job=st.sampled_from([*JOBS, LATE]),
        sizes=st.lists(SIZES, max_size=3),
        life=st.sampled_from(LIVES),
        ahead=st.sampled_from([0, 0, HOUR_US, 2 * DAY_US]),
        refused=st.integers(0, 2),
        data=st.data(),
    )
    def put_a_chunk(self, job: int, sizes: list[int], life: int, ahead: int, refused: int, data: st.DataObject) -> None:
        expires = min(self.now + life, FAR)
        built = []
        for size in sizes:
            mrefs = range(len(self.people), len(self.people) + size)
            self.people |= dict.fromkeys(((job, mref) for mref in mrefs), QUEUED)
            contents = Contents("x.test", [], [Row("r", mref, 2, 0, 0, []) for mref in mrefs])
            lane, flags = data.draw(st.sampled_from(LANES)), data.draw(st.integers(0, 3))
            key = self.keys[self.current]
            made = slices.build(key, self.current, job, PART, lane, contents, expires_at=expires, flags=flags)
            built.append((self.now + ahead if ahead else 0, made))
        refusals = []
        for mref in range(len(self.people), len(self.people) + refused):
            self.people[job, mref] = Kind.REFUSED.name.lower()
            refusals.append(Event(Kind.REFUSED, mref, 0, self.now))
        events = [encode_batch(Batch(job, "x.test", refusals, len(self.put)))] if refusals else []
        state = JobState(ACCOUNT, 2, 3, False, expires, False, 1)
        request = PutRequest(PART, job, len(self.put), state, built, events)
        self.put.append(request)
        assert self.did(self.workers[0].put([request])) == [True]
        self.jobs.setdefault(job, "cancelled" if f"x{job}" in self.words else "sending")

    @precondition(lambda self: self.put)
    @rule(data=st.data())
    def put_it_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.put))
        assert self.did(self.workers[1].put([request])) == [False]

    @rule(lane=st.sampled_from(LANES), site=st.sampled_from(SITES))
    def assign(self, lane: str, site: str) -> None:
        self.did(self.workers[0].assign(PART, lane, site))

    @rule(lane=st.sampled_from(LANES), delay=st.sampled_from([5.0, 7200.0]))
    def postpone(self, lane: str, delay: float) -> None:
        self.did(self.workers[0].postpone(PART, lane, delay))

    # --- leases ------------------------------------------------------------------------------------------------------

    @rule(worker=st.integers(0, WORKERS - 1))
    def lease_all(self, worker: int) -> None:
        """Whoever asks for more than there is gets all that is due and neither paused nor halted."""
        self.lease(worker, [50, 50, 50])
        left = [self.seen.due.get((letter, site), {}) for letter in "dD" for site in SITES]
        assert all(due > self.now for members in left for due in members.values())

    @rule(
        worker=st.integers(0, WORKERS - 1),
        wanted=st.lists(st.integers(0, 3), min_size=3, max_size=3),
        kind=st.sampled_from(["both", "both", "urgent", "plain"]),
    )
    def lease(self, worker: int, wanted: Sequence[int], kind: str = "both") -> None:
        sites = [*zip(SITES, wanted, strict=False)]
        named = {one: sites if kind == one else [] for one in ("both", "urgent", "plain")}
        request = LeaseRequest(PART, named["both"], wanted[2], named["urgent"], named["plain"])
        before, latest = self.seen, self.latest_due()
        [found] = self.did(self.workers[worker].lease_many([request]))
        assert len(found.slices) <= sum(wanted)
        assert found.now_us == self.now
        for lease in found.slices:
            name = lease.slice_id
            due = {letter: members[name] for (letter, _), members in before.due.items() if name in members}
            assert min(due.values()) <= latest
            assert lease.site == keyspace.UNRESOLVED or kind == "both" or ("D" in due) == (kind == "urgent")
            hand = self.take(worker, lease)
            assert not self.is_resting(hand.header)

    def latest_due(self) -> int:
        """Now; and where the clock has stepped back, what was due before it did stays due (step.lua)."""
        at: Any = self.wait(self.redis.hget(keyspace.counter(PART), "at"))
        return int(at) + 30 * SECOND_US if at is not None and self.now < int(at) - 5 * SECOND_US else self.now

    @rule(worker=st.integers(0, WORKERS - 1))
    def hasten(self, worker: int) -> None:
        """What is cancelled is leased wherever it waits, and nothing else."""
        waiting = {name: header for name, header in self.seen.slices.items() if name not in self.seen.leases}
        cancelled = {
            name
            for name, header in waiting.items()
            if self.jobs[header.job] == "cancelled" or f"c{header.lane}" in self.words
        }
        sweeps = Sweeps(self.redis, self.workers[worker].holder)
        found = self.did(sweeps.hasten(PART, sorted(waiting)))
        assert {lease.slice_id for lease in found.leases} == cancelled
        for lease in found.leases:
            self.take(worker, lease)

    def take(self, worker: int, lease: Lease) -> Hand:
        header = slices.parse_header(lease.data)
        assert isinstance(header, Header)
        assert lease.slice_id not in self.hands
        assert (header.token, header.lane) == (lease.token, lease.lane)
        assert header.date, "the first lease fixes the date"
        contents = self.contents_of(header, lease.data)
        if header.key_id in self.ring:
            assert slices.open_contents({k: self.keys[k] for k in self.ring}, header, PART, lease.data) == contents
        people = [(header.job, row.subject) for row in contents.rows]
        hand = Hand(worker, lease, header, contents, people, set(header.pending()))
        for index in hand.pending:
            assert self.people[people[index]] in (QUEUED, DEFERRED, IN_DOUBT)
            self.people[people[index]] = LEASED
        self.hands[lease.slice_id] = hand
        return hand

    def is_resting(self, header: Header) -> bool:
        state = self.jobs[header.job]
        if state in JOB_ENDED or f"c{header.lane}" in self.words or self.now >= header.expires_at:
            return False
        return state == "paused" or bool({f"a{ACCOUNT}", f"j{header.job}", f"l{header.lane}"} & self.words)

    def standing(self, header: Header) -> Standing:
        found = STANDINGS[self.jobs[header.job]]
        if found in (Standing.CLEAR, Standing.PAUSED):
            if f"c{header.lane}" in self.words:
                return Standing.CANCELLED
            if self.now >= header.expires_at:
                return Standing.EXPIRED
            if f"a{ACCOUNT}" in self.words:
                return Standing.FROZEN
            if {f"j{header.job}", f"l{header.lane}"} & self.words:
                return Standing.PAUSED
        return found

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def gate(self, data: st.DataObject) -> None:
        self.ask_about_all(data.draw(st.permutations([*self.hands.values()])))

    def ask_about_all(self, some: Sequence[Hand] | None = None) -> None:
        """All hands are asked about at once, as the press does, and everybody after each word of an operator."""
        some = some if some is not None else [*self.hands.values()]
        questions = [
            GateRequest(PART, hand.lease.slice_id, hand.lease.token, [b"t" * 12] * len(hand.pending), b"d" * 12)
            for hand in some
        ]
        for hand, answer in zip(some, self.did(self.workers[0].gate_many(questions)), strict=True):
            assert answer is not None
            assert answer.standing is self.standing(hand.header)
            assert answer.facts == (bytes(len(hand.pending)) if answer.standing is Standing.CLEAR else b"")

    def decide(self, hand: Hand, data: st.DataObject) -> Outcome:
        """What becomes of some of them: k kept, a letter of an end, r another attempt, q one more in doubt."""
        if hand.header.key_id not in self.ring:  # no key opens it: everybody ends lost
            return Outcome(dict.fromkeys(hand.pending, Kind.LOST))
        pending = sorted(hand.pending)
        fates = data.draw(st.lists(st.sampled_from("kdburq"), min_size=len(pending), max_size=len(pending)))
        found = Outcome(delay=data.draw(st.sampled_from([0.0, 300.0, 86_400.0])))
        over = self.standing(hand.header)
        ends = dict(zip("dbu", (Kind.DELIVERED, Kind.BOUNCED, Kind.UNKNOWN), strict=True))
        if over is Standing.CANCELLED or over is Standing.EXPIRED:
            ends = dict.fromkeys("dbu", Kind.CANCELLED if over is Standing.CANCELLED else Kind.EXPIRED)
        for index, fate in zip(pending, fates, strict=True):
            if fate in ends:
                found.ended[index] = ends[fate]
            elif fate == "r":
                found.again[index] = False
            elif fate == "q" and hand.header.flags & FLAG_RESEND and not hand.header.in_doubt(index):
                found.again[index] = True
        return found

    def request_of(self, hand: Hand, outcome: Outcome) -> SettleRequest:
        told = [*outcome.ended.items(), *((index, Kind.DEFERRED) for index in outcome.again)]
        events = [Event(kind, hand.people[index][1], hand.header.attempt + 1, self.now) for index, kind in told]
        retries = []
        for in_doubt in (False, True):
            rows = sorted(index for index, doubt in outcome.again.items() if doubt is in_doubt)
            if rows:
                doubt = rows if in_doubt else []
                key = self.keys[self.current]
                blob = slices.retry_of(key, self.current, PART, hand.header, hand.contents, rows, doubt=doubt)
                retries.append(Retry(outcome.delay, blob, rows))
        batch = encode_batch(Batch(hand.header.job, "x.test", events)) if events else b""
        return SettleRequest(PART, hand.lease.slice_id, hand.lease.token, sorted(outcome.ended), (), batch, retries)

    def carry_out(self, hand: Hand, outcome: Outcome, by: Lanes, *, times: int = 1) -> None:
        request = self.request_of(hand, outcome)
        for index, kind in outcome.ended.items():
            self.people[hand.people[index]] = kind.name.lower()
        for index, in_doubt in outcome.again.items():
            kept = in_doubt or hand.header.in_doubt(index)
            self.people[hand.people[index]] = IN_DOUBT if kept else DEFERRED
        hand.pending -= outcome.ended.keys() | outcome.again.keys()
        for turn in range(times):
            told = self.did(by.settle(request))
            assert told is (Settled.KEPT if hand.pending else Settled.STALE if turn else Settled.GONE)
        if not hand.pending:
            self.let_go(hand)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), times=st.integers(1, 2))
    def settle(self, data: st.DataObject, times: int) -> None:
        hand = data.draw(st.sampled_from([*self.hands.values()]))
        outcome = self.decide(hand, data)
        if outcome.ended or outcome.again:
            self.carry_out(hand, outcome, self.workers[hand.worker], times=times)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), delay=st.sampled_from([0.0, 60.0, 90_000.0]))
    def release(self, data: st.DataObject, delay: float) -> None:
        hand = data.draw(st.sampled_from([*self.hands.values()]))
        told = self.did(self.workers[hand.worker].release(PART, hand.lease.slice_id, hand.lease.token, delay))
        assert told is Settled.KEPT
        self.put_back(hand)

    def put_back(self, hand: Hand) -> None:
        for index in hand.pending:
            doubt, attempt = hand.header.in_doubt(index), hand.header.attempt
            self.people[hand.people[index]] = IN_DOUBT if doubt else DEFERRED if attempt else QUEUED
        self.let_go(hand)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def speak_too_late(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from(self.stale))
        lease, by = hand.lease, self.workers[hand.worker]
        request = SettleRequest(PART, lease.slice_id, lease.token, range(hand.header.count), events=b"late")
        asked = GateRequest(PART, lease.slice_id, lease.token, [b"t" * 12], b"d" * 12)
        assert self.did(by.settle(request)) is Settled.STALE
        assert self.did(by.release(PART, lease.slice_id, lease.token)) is Settled.STALE
        answer = self.did(by.gate(asked))
        assert answer is not None
        assert answer.standing is Standing.STALE

    def let_go(self, hand: Hand) -> None:
        del self.hands[hand.lease.slice_id]
        self.stale.append(hand)

    # --- heartbeats and crashes --------------------------------------------------------------------------------------

    @rule(worker=st.integers(0, WORKERS - 1))
    def beat_while_somebody_would_reclaim(self, worker: int) -> None:
        lanes, other = self.workers[worker], self.workers[not worker]
        seen = self.wait(other.holders(PART)).get(lanes.holder, 0)
        self.did(lanes.heartbeat([PART]))
        assert self.did(other.reclaim(PART, lanes.holder, seen)) is None

    @rule(worker=st.integers(0, WORKERS - 1), unclean=st.booleans(), data=st.data())
    def crash(self, worker: int, unclean: bool, data: st.DataObject) -> None:
        """A worker is gone. Its journal may know of outcomes Redis was never told, and of intents; after an unclean
        boot everybody leased is in doubt. Another one carries that out under the dead one's tokens, then reclaims."""
        dead = self.workers[worker]
        self.lives[worker] += 1
        self.workers[worker] = Lanes(self.redis, f"host/{worker}.{self.lives[worker]}")
        lost = [hand for hand in self.hands.values() if hand.worker == worker]
        for hand in lost:
            outcome = self.decide(hand, data) if data.draw(st.booleans()) else Outcome()
            if unclean and hand.header.key_id in self.ring:
                for index in hand.pending - outcome.ended.keys() - outcome.again.keys():
                    if hand.header.flags & FLAG_RESEND and not hand.header.in_doubt(index):
                        outcome.again[index] = True
                    else:
                        outcome.ended[index] = Kind.UNKNOWN
            if outcome.ended or outcome.again:
                self.carry_out(hand, outcome, self.workers[worker], times=data.draw(st.integers(1, 2)))
        left = [hand for hand in lost if hand.pending]
        seen = self.wait(self.workers[worker].holders(PART)).get(dead.holder, 0)
        assert self.did(self.workers[not worker].reclaim(PART, dead.holder, seen)) == len(left)
        for hand in left:
            self.put_back(hand)

    # --- operators ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def move_a_job(self, data: st.DataObject) -> None:
        """Paused, resumed or ended by somebody's will, as `policy.enforcement` tells it."""
        job = data.draw(st.sampled_from(sorted(self.jobs)))
        states = [state for state, sources in JOB_MOVES.items() if self.jobs[job] in sources]
        if states:
            state = data.draw(st.sampled_from(states))
            assert allowed("job", self.jobs[job], state)
            self.show_job(job, state)
            self.ask_about_all()

    def show_job(self, job: int, state: str) -> None:
        self.say(f"j{job}", stands=state == "paused")
        self.say(f"x{job}", stands=state == "cancelled")
        self.jobs[job] = state
        self.did(self.redis.hset(keyspace.job(PART, job), "st", state))

    def say(self, word: str, *, stands: bool) -> None:
        self.did(halts.tell(self.redis, [(word, stands, [PART])]))
        (self.words.add if stands else self.words.discard)(word)

    @rule(word=st.sampled_from(WORDS), stands=st.booleans(), brings=st.booleans())
    def halt_or_resume(self, word: str, stands: bool, brings: bool) -> None:
        """An account or a domain; a resume brings forward what was passed over, or leaves it to its time."""
        self.say(word, stands=stands)
        if brings:
            self.did(self.sweeps.unpark([PART]))
        self.ask_about_all()

    @precondition(lambda self: LATE not in self.jobs)
    @rule(sizes=st.lists(SIZES, min_size=1, max_size=2), life=st.sampled_from(LIVES), data=st.data())
    def cancel_what_is_not_there_yet(self, sizes: list[int], life: int, data: st.DataObject) -> None:
        """And then its first chunk comes, made before anybody heard of the end."""
        self.say(f"x{LATE}", stands=True)
        self.put_a_chunk(LATE, sizes, life, 0, 0, data)

    # --- keys --------------------------------------------------------------------------------------------------------

    @rule(destroys=st.sampled_from([False, False, True]))
    def rotate(self, destroys: bool) -> None:
        """A new week: new slices and retries are sealed under its key, and perhaps the oldest one goes."""
        self.current += 1
        self.keys[self.current] = os.urandom(32)
        self.ring.add(self.current)
        if destroys:
            self.ring.remove(min(self.ring))

    @rule()
    def walk(self) -> None:
        """The re-sealer reads; what it does about it comes later, when much may have changed."""
        place, found = self.wait(self.sweeps.scan(0, 1000))
        while place:
            place, more = self.wait(self.sweeps.scan(place, 1000))
            found += more
        self.walked = found
        assert {seen.slice_id for seen in found} == self.seen.slices.keys()

    @precondition(lambda self: self.walked)
    @rule()
    def reseal(self) -> None:
        before, stored = self.seen, self.stored
        changes = []
        for seen in self.walked:
            data = stored.get(seen.slice_id)
            # from what was read at the walk, where nothing has changed since: reseal.lua compares once more
            if data is not None and data[SEEN_BYTES:] and data[:SEEN_BYTES] == seen.head:
                anew = slices.resealed({k: self.keys[k] for k in self.ring}, self.current, PART, data)
                if isinstance(anew, bytes):
                    changes.append((seen, anew))
            elif data is not None:
                header = slices.parse_header(data)
                assert isinstance(header, Header)
                # an old head with a body that opens: the swap must be refused
                changes.append((seen, seen.head + os.urandom(40)))
        waiting = {seen.slice_id for seen, _ in changes} - before.leases.keys()
        count = self.did(self.sweeps.reseal(changes))
        same = {seen.slice_id for seen, _ in changes if stored[seen.slice_id][:SEEN_BYTES] == seen.head}
        assert count == len(waiting & same)
        for name in waiting & same:
            assert self.seen.slices[name].key_id == self.current
        for name in stored.keys() - (waiting & same):
            assert self.stored[name] == stored[name]

    # --- the clock ---------------------------------------------------------------------------------------------------

    @rule(by=st.sampled_from(JUMPS))
    def let_time_pass(self, by: int) -> None:
        """Redis TIME goes on, or jumps, forwards and backwards by days."""
        self.now = max(START - 30 * DAY_US, self.now + by)
        self.did(set_clock(self.redis, self.now))

    # --- always, and at the end --------------------------------------------------------------------------------------

    @invariant()
    def redis_shows_what_the_model_says(self) -> None:
        assert self.where == self.people
        assert {name: hand.lease.token for name, hand in self.hands.items()} == {
            name: token for name, (token, _) in self.seen.leases.items()
        }

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.wait(self.redis.aclose())
            self.runner.close()

    def drain(self) -> None:
        """Everything is resumed and nothing is in the way: everybody ends."""
        for hand in list(self.hands.values()):
            self.did(self.workers[hand.worker].release(PART, hand.lease.slice_id, hand.lease.token))
            self.put_back(hand)
        for word in sorted(self.words):
            self.say(word, stands=False)
        for job, state in sorted(self.jobs.items()):
            if state == "paused":
                self.show_job(job, "sending")
        rounds = 0
        while any(state in (QUEUED, DEFERRED, IN_DOUBT) for state in self.people.values()):
            rounds += 1
            assert rounds < 60, "somebody is never leased again"
            self.lease(0, [50, 50, 50])
            if not self.hands:
                self.let_time_pass(DAY_US)
            for hand in list(self.hands.values()):
                kind = Kind.DELIVERED if hand.header.key_id in self.ring else Kind.LOST
                self.carry_out(hand, Outcome(dict.fromkeys(hand.pending, kind)), self.workers[0])
        self.redis_shows_what_the_model_says()
        assert self.ended.keys() == self.people.keys()
        for life in range(max(self.lives) + 1):
            for worker in range(WORKERS):
                self.wait(Lanes(self.redis, f"host/{worker}.{life}").leave([PART]))
        left = {key.decode() for key in self.wait(self.redis.keys("*")) if isinstance(key, bytes)}
        assert left <= {keyspace.counter(PART), keyspace.events(PART), CLOCK} | {
            key(PART, job) for job in (*JOBS, LATE) for key in (keyspace.job, keyspace.chunks_put)
        }


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with running_valkey() as running, clock_of_our_own():
        yield running


def test_whatever_happens_everybody_ends_once(server: EmbeddedServer) -> None:
    Queue.url = server.url
    run_state_machine_as_test(Queue, settings=settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None))
