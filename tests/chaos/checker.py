"""The checker: a run's history in, every broken invariant with its keys out (promises.md 3, I1 to I8 with I3b). Pure.

Path: `observe` and `world` gather a `History` · `check` asks each law in turn · a `Broken` for each violation.

What counts as what:
- a *copy* is a message whose final dot reached the sink and that the sink kept;
- a *fault* is an interval on the one monotonic clock in which a process was ended (by us, or by a crash point) together
  with what it says it was talking as: the EHLO name of a worker, "" for the sink, whose end ends every connection;
- a transaction is *in the window* of a fault when its connection had got RCPT (hence perhaps the dot), and its outcome
  need not have been journalled when the process ended: until `JOURNAL` s after the reply was handed to the kernel.
  One connection has at most one message there: the next intent takes the outcome before it to the journal.

I3 and I3b are judged for each person, not only by number: an unknown or repeated recipient needs a window of its own,
and the bound printed is the number of connections in windows, plus those the sink's script left without an answer.

Known limits: `JOURNAL` is wider than the 10 ms of T7, because a worker that shares two cores with seven processes may
look at its socket late; I5 allows for the life of a permit between the token and the RCPT.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.sink_record import Entry, Line

JOURNAL = 0.5  # s between the sink's reply and the worker's journal on a busy machine
SUPPRESSED = 1.0  # s, T4
GRAIN = (
    0.25  # s two connections may overlap in the sink's eyes: it reads an end and a beginning in one turn of its loop
)
LAG = 0.6  # s between a token and its RCPT: a Permit lives 0.5 s, the rest is the wire
WINDOWS = (1.0, 5.0, 10.0)  # s, the sliding windows of I5
RESEND_COPIES, HOLD_COPIES = 2, 1
DELIVERED, UNKNOWN = "delivered", "unknown"

Key = tuple[int, int]  # job number, mref


@dataclass(frozen=True, slots=True)
class Broken:
    """One violation. law: I1 to I8 or I3b; key: job, recipient, site, process or Redis key; text: what was seen."""

    law: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.law} {self.key}: {self.text}"


@dataclass(frozen=True, slots=True)
class Job:
    """An acknowledged submission. rows: how many; people: mref of each distinct deliverable address -> the address."""

    number: int
    job_id: str
    in_doubt: str
    list_name: str
    rows: int
    people: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Told:
    """What the ledger says of a job. messages: (mref, kind) of each terminal row; others: terminal rows beside them
    (duplicates, places of the audience without a message), by kind; counters: terminal counters by kind."""

    number: int
    state: str
    rows: int | None
    messages: Sequence[tuple[int, str]]
    others: Mapping[str, int]
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Fault:
    """A process ended between two instants. hello: whose connections it ended; "" for the sink's: all of them.

    since: from when on it may not have read its sockets (stopped before it was killed), else `began`."""

    role: str
    began: float
    ended: float
    hello: str = ""
    since: float | None = None

    @property
    def cuts(self) -> bool:
        """Whether it ends SMTP connections."""
        return self.role == "sink" or self.role.startswith("engine")


@dataclass(frozen=True, slots=True)
class Shot:
    """One suppression. t_ack: None when nobody confirmed it. scope: platform, account or list (then list_name);
    aimed: the person was leased or connecting when it was called."""

    address: str
    scope: str
    list_name: str
    t_call: float
    t_ack: float | None
    aimed: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What a site may get. rate 0: no ceiling."""

    connections: int
    rate: float = 0.0
    burst: float = 0.0


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with a limit. law: I7 or I8; key: the process or what was counted."""

    law: str
    key: str
    what: str
    value: float
    limit: float


@dataclass(slots=True)
class History:
    """Everything a run left. unacknowledged: job ids that were begun and never acknowledged: nothing is promised.

    renders: for a person, the hashes that are right (`reference`); None leaves the bodies out. orphans: Redis keys, and
    other things, that should be gone, with what they hold. hellos: of each connection, by (run, connection)."""

    jobs: Sequence[Job] = ()
    unacknowledged: Sequence[str] = ()
    told: Mapping[int, Told] = field(default_factory=dict)
    entries: Sequence[Entry] = ()
    lines: Sequence[Line] = ()
    faults: Sequence[Fault] = ()
    shots: Sequence[Shot] = ()
    limits: Mapping[str, Limits] = field(default_factory=dict)
    renders: Mapping[Key, frozenset[str]] | None = None
    measures: Sequence[Measure] = ()
    orphans: Mapping[str, str] = field(default_factory=dict)
    hellos: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the last line of a run says."""

    messages: int
    recipients: int
    duplicates: int
    unknowns: int
    unknown_bound: int
    shots: int
    aimed: int
    epsilon_ms: Mapping[str, float]


def check(history: History) -> list[Broken]:
    """Every violation, in the order of the laws."""
    laws = (nothing_lost, no_phantom, duplicates, unknowns, suppression, throttle, accounting, measures)
    return [broken for law in laws for broken in law(history)]


# --- windows ---------------------------------------------------------------------------------------------------------


def in_window(entry: Entry, fault: Fault, hello: str) -> bool:
    """Whether the outcome of this transaction may have died with the process."""
    if not fault.cuts or (fault.hello and hello and hello != fault.hello):
        return False
    if entry.rcpt_reply[:1] != "2" or entry.t_rcpt > fault.ended:
        return False
    since = fault.began if fault.since is None else min(fault.since, fault.began)
    return entry.t_reply_written is None or entry.t_reply_written >= since - JOURNAL


def windows_of(history: History) -> dict[int, list[Fault]]:
    """Entries by place in `history.entries` with the faults they were in the window of."""
    found: dict[int, list[Fault]] = {}
    gone = _closed(history.lines)
    for place, entry in enumerate(history.entries):
        at = gone.get((entry.run, entry.connection))
        hello = history.hellos.get((entry.run, entry.connection), "")
        within = [
            fault
            for fault in history.faults
            # a connection that had ended for another reason before the fault is not the fault's
            if in_window(entry, fault, hello) and not (at is not None and at < _since(fault) - JOURNAL)
        ]
        if within:
            found[place] = within
    return found


def _since(fault: Fault) -> float:
    return fault.began if fault.since is None else min(fault.since, fault.began)


def _closed(lines: Iterable[Line]) -> dict[tuple[int, int], float]:
    """When each connection ended, by (run, connection); one that a killed sink held is not there."""
    run, found = -1, {}
    for line in lines:
        if line.k == "start":
            run += 1
        elif line.k == "close":
            found[max(run, 0), line.c] = line.t
    return found


def silent(entry: Entry) -> bool:
    """The script of the sink, not a fault, left the dot without a good answer."""
    return entry.t_dot is not None and not _is_reply(entry.reply)


def _is_reply(text: str) -> bool:
    return len(text) >= 3 and text[:3].isdigit() and text[0] in "245"


def bound(history: History) -> int:
    """I3b: connections in the window of a fault, each once, and answers the script did not give."""
    pairs = {
        (history.entries[place].run, history.entries[place].connection, fault.began)
        for place, faults in windows_of(history).items()
        for fault in faults
    }
    return len(pairs) + sum(silent(entry) for entry in history.entries)


# --- the laws --------------------------------------------------------------------------------------------------------


def _by_person(history: History) -> dict[Key, list[int]]:
    found: dict[Key, list[int]] = defaultdict(list)
    for place, entry in enumerate(history.entries):
        found[entry.job, entry.mref].append(place)
    return found


def _kinds(history: History) -> dict[Key, str]:
    return {(number, mref): kind for number, told in history.told.items() for mref, kind in told.messages}


def _name(job: Job, mref: int) -> str:
    return f"job {job.number} ({job.job_id}) {job.people.get(mref, '?')} mref {mref & (1 << 64) - 1:016x}"


def nothing_lost(history: History) -> Iterator[Broken]:
    """I1: exactly one terminal state each; delivered means a 250 at the sink, and a 250 that was heard is delivered."""
    seen, within = _by_person(history), windows_of(history)
    for job in history.jobs:
        told = history.told.get(job.number)
        if told is None:
            yield Broken("I1", f"job {job.job_id}", "acknowledged and not in the ledger")
            continue
        states: dict[int, list[str]] = defaultdict(list)
        for mref, kind in told.messages:
            states[mref].append(kind)
        for mref in job.people:
            found = states.get(mref, [])
            if len(found) != 1:
                yield Broken("I1", _name(job, mref), f"{len(found)} terminal states {found}")
                continue
            places = seen.get((job.number, mref), [])
            copies = [place for place in places if history.entries[place].accepted]
            if found[0] == DELIVERED and not copies:
                yield Broken("I1", _name(job, mref), "delivered, and the sink has no 250")
            clean = [p for p in copies if p not in within and history.entries[p].t_reply_written is not None]
            if clean and found[0] != DELIVERED:
                entry = history.entries[clean[0]]
                text = f"{found[0]}, but its 250 was said at {entry.t_reply_written:.3f} with no fault near"
                yield Broken("I1", _name(job, mref), text)


def no_phantom(history: History) -> Iterator[Broken]:
    """I2: whatever arrives belongs to an acknowledged job, and is what a second life renders; nothing out of step."""
    jobs = {job.number: job for job in history.jobs}
    shas: dict[Key, set[str]] = defaultdict(set)
    for entry in history.entries:
        job = jobs.get(entry.job)
        if job is None:
            told = history.told.get(entry.job)
            if told is None or told.state == "unacknowledged":
                yield Broken("I2", f"job {entry.job} {entry.rcpt}", "arrived and nobody submitted it")
            continue
        address = job.people.get(entry.mref)
        if address is None or address.lower() != entry.rcpt.lower():
            yield Broken("I2", f"job {entry.job} {entry.rcpt}", f"is not the recipient of mref {entry.mref}: {address}")
            continue
        if entry.t_dot is None:
            continue
        if entry.bare:
            yield Broken("I2", _name(job, entry.mref), f"{entry.bare} line ends stand alone")
        shas[entry.job, entry.mref].add(entry.sha)
        if history.renders is not None:
            right = history.renders.get((entry.job, entry.mref), frozenset())
            if entry.plain not in right:
                yield Broken(
                    "I2", _name(job, entry.mref), f"{entry.plain[:12]} is not the message of a second rendering"
                )
    for (number, mref), found in shas.items():
        if len(found) > 1:
            yield Broken("I2", _name(jobs[number], mref), f"its {len(found)} copies differ")
    for line in history.lines:
        if line.k == "bad":
            yield Broken("I2", f"connection {line.c} of {line.port}", f"out of step: {line.word}")


def duplicates(history: History) -> Iterator[Broken]:
    """I3: a second copy only after one in doubt; two at most; with hold none."""
    jobs = {job.number: job for job in history.jobs}
    within = windows_of(history)
    for (number, mref), places in _by_person(history).items():
        job = jobs.get(number)
        if job is None:
            continue  # I2 has said so
        copies = sorted((p for p in places if history.entries[p].stored), key=lambda p: history.entries[p].t_rcpt)
        most = RESEND_COPIES if job.in_doubt == "resend" else HOLD_COPIES
        if len(copies) > most:
            times = ", ".join(f"{history.entries[p].t_rcpt:.3f}" for p in copies)
            yield Broken("I3", _name(job, mref), f"{len(copies)} copies ({times}) of a job that says {job.in_doubt}")
        for place in copies[:-1]:
            entry = history.entries[place]
            if place not in within and not silent(entry):
                yield Broken(
                    "I3", _name(job, mref), f"sent again, and no fault was near the copy of {entry.t_rcpt:.3f}"
                )


def unknowns(history: History) -> Iterator[Broken]:
    """I3b: everyone unknown was between RCPT and journal at a fault; no more of them than such connections."""
    jobs = {job.number: job for job in history.jobs}
    seen, within = _by_person(history), windows_of(history)
    count = 0
    for (number, mref), kind in _kinds(history).items():
        if kind != UNKNOWN or number not in jobs:
            continue
        count += 1
        places = seen.get((number, mref), [])
        if not any(place in within or silent(history.entries[place]) for place in places):
            text = (
                "unknown, and it was in no window of a fault" if places else "unknown, and the sink never heard of it"
            )
            yield Broken("I3b", _name(jobs[number], mref), text)
    most = bound(history)
    if count > most:
        yield Broken("I3b", "all jobs", f"{count} unknown, {most} connections were in doubt")


def suppression(history: History) -> Iterator[Broken]:
    """I4: no RCPT later than a second after the answer to the suppression."""
    for shot, entry in _after(history):
        assert shot.t_ack is not None
        late = entry.t_rcpt - shot.t_ack
        if late > SUPPRESSED:
            text = f"RCPT {late:.3f} s after its {shot.scope} suppression was acknowledged (job {entry.job})"
            yield Broken("I4", entry.rcpt, text)


def _after(history: History) -> Iterator[tuple[Shot, Entry]]:
    """Every RCPT later than the answer to a shot that covers it."""
    lists = {job.number: job.list_name for job in history.jobs}
    by_address: dict[str, list[Entry]] = defaultdict(list)
    for entry in history.entries:
        by_address[entry.rcpt.lower()].append(entry)
    for shot in history.shots:
        if shot.t_ack is None:
            continue
        for entry in by_address.get(shot.address.lower(), ()):
            if shot.scope == "list" and lists.get(entry.job) != shot.list_name:
                continue
            if entry.t_rcpt > shot.t_ack:
                yield shot, entry


def throttle(history: History) -> Iterator[Broken]:
    """I5: in every window at most rate * window + burst RCPTs; never more live connections than the cap."""
    starts: dict[str, list[float]] = defaultdict(list)
    for entry in history.entries:
        starts[entry.port].append(entry.t_rcpt)
    for port, limits in history.limits.items():
        if limits.rate:
            times = sorted(starts.get(port, ()))
            for window in WINDOWS:
                most = limits.rate * (window + LAG) + limits.burst
                found, at = _most_in(times, window)
                if found > most:
                    text = f"{found} messages in {window:g} s from {at:.3f}, at most {most:g}"
                    yield Broken("I5", f"site {port}", text)
        live, at = _most_live(history.lines, port)
        if live > limits.connections:
            yield Broken("I5", f"site {port}", f"{live} connections at {at:.3f}, at most {limits.connections}")


def _most_in(times: Sequence[float], window: float) -> tuple[int, float]:
    best, at, first = 0, 0.0, 0
    for last, time in enumerate(times):
        while time - times[first] > window:
            first += 1
        if last - first + 1 > best:
            best, at = last - first + 1, times[first]
    return best, at


def _most_live(lines: Sequence[Line], port: str) -> tuple[int, float]:
    """The largest number of connections that lived at one instant, the last `GRAIN` of each left out."""
    opened: dict[int, float] = {}
    changes: list[tuple[float, int]] = []

    def close(connection: int, at: float) -> None:
        began = opened.pop(connection, None)
        if began is not None and at - GRAIN > began:
            changes.append((began, 1))
            changes.append((at - GRAIN, -1))

    last = 0.0
    for line in lines:
        if line.k == "start":
            for connection in list(opened):
                close(connection, last)
        elif line.port == port and line.k == "open":
            opened[line.c] = line.t
        elif line.port == port and line.k == "close":
            close(line.c, line.t)
        last = line.t
    for connection in list(opened):
        close(connection, last)
    live = most = 0
    at = 0.0
    for time, change in sorted(changes):
        live += change
        if live > most:
            most, at = live, time
    return most, at


def accounting(history: History) -> Iterator[Broken]:
    """I6: rows = the sum of the terminal states = the counters; one terminal row each; every job is over."""
    for job in history.jobs:
        told = history.told.get(job.number)
        if told is None:
            continue  # I1 has said so
        key = f"job {job.number} ({job.job_id})"
        if told.state != "done":
            yield Broken("I6", key, f"is {told.state} at the end")
        if told.rows != job.rows:
            yield Broken("I6", key, f"counts {told.rows} rows submitted of {job.rows}")
        states = Counter(kind for _, kind in told.messages)
        states.update(told.others)
        if +states != +Counter(told.counters):
            yield Broken("I6", key, f"counters {dict(told.counters)}, rows {dict(states)}")
        if states.total() != job.rows:
            yield Broken("I6", key, f"{states.total()} terminal states for {job.rows} rows")
        twice = [mref for mref, n in Counter(mref for mref, _ in told.messages).items() if n > 1]
        for mref in twice:
            yield Broken("I6", _name(job, mref), "has two terminal rows")
        for mref, kind in told.messages:
            if mref not in job.people and kind == DELIVERED:
                yield Broken("I6", _name(job, mref), "was delivered and is nobody of this job")


def measures(history: History) -> Iterator[Broken]:
    """I7 and I8: everything drains, nothing spins, nothing is left."""
    for measure in history.measures:
        if measure.value > measure.limit:
            text = f"{measure.what} is {measure.value:g}, at most {measure.limit:g}"
            yield Broken(measure.law, measure.key, text)
    for key, what in history.orphans.items():
        yield Broken("I8", key, what)


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(history: History) -> Figures:
    """For the last line. duplicates: copies beyond the first of anybody. epsilon_ms: by how much RCPTs came after an
    acknowledged suppression, over all that did; 0 when none did."""
    numbers = {job.number for job in history.jobs}
    copies = Counter((entry.job, entry.mref) for entry in history.entries if entry.stored)
    late = sorted((entry.t_rcpt - (shot.t_ack or 0.0)) * 1000 for shot, entry in _after(history))
    return Figures(
        messages=copies.total(),
        recipients=sum(len(job.people) for job in history.jobs),
        duplicates=sum(n - 1 for n in copies.values()),
        unknowns=sum(kind == UNKNOWN for (number, _), kind in _kinds(history).items() if number in numbers),
        unknown_bound=bound(history),
        shots=sum(shot.t_ack is not None for shot in history.shots),
        aimed=sum(shot.aimed and shot.t_ack is not None for shot in history.shots),
        epsilon_ms={
            "p50": round(_quantile(late, 0.5), 1),
            "p99": round(_quantile(late, 0.99), 1),
            "max": round(_quantile(late, 1.0), 1),
        },
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
