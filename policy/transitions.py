"""The state table: every state there is, every way from one to another, and the instant at which a crash hurts most.

Laws:
- what is not in `TRANSITIONS` does not happen: checkers, the model of the queue and the chaos harness ask `allowed`;
- every transition is made by one step, and a process may die right before and right after each (`POINTS`); the crash
  points are worked out here from the table, never listed by hand anywhere else;
- the numbers (T0 to T12) are those of the promises: what is durable before what.

Why on the ground floor: a recipient's state is what a person may ask about, and both upper floors move it (design,
section 5: states, of which the terminal ones are `policy.events.Kind`). After qmail's INTERNALS: list every legal
state, then assert that no other ever exists.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from policy.events import TERMINAL, Kind

ENGINE, POLICY = "engine", "policy"


@dataclass(frozen=True, slots=True)
class Step:
    """Something one process does that moves states. role: which process; promise: T0 to T12."""

    name: str
    role: str
    promise: str


@dataclass(frozen=True, slots=True)
class Transition:
    """subject goes from source to target by a step."""

    subject: str
    source: str
    target: str
    step: str


@dataclass(frozen=True, slots=True)
class Point:
    """An instant right before or right after a step. name: as `policy.crashpoints` knows it."""

    name: str
    role: str
    promise: str


STEPS: Final = (
    Step("accept", ENGINE, "T1"),  # the writer is asked to keep a job
    Step("register", ENGINE, "T2"),  # an entry of its audience, by number and hash
    Step("put", ENGINE, "T2"),  # slices on lanes, one script a partition
    Step("mark", ENGINE, "T2"),  # the entry is whole; with the last one the job is expanded
    Step("acknowledge", ENGINE, "T0"),  # the entry leaves the intake stream
    Step("lease", ENGINE, "T3"),
    Step("assign", ENGINE, "T3"),  # a lane learns its site
    Step("gate", ENGINE, "T4"),
    Step("intent", ENGINE, "T6"),  # journalled, the dot has not left
    Step("dot", ENGINE, "T6"),  # bytes with final dots are handed to the socket
    Step("reply", ENGINE, "T7"),  # a verdict is heard
    Step("outcome", ENGINE, "T7"),  # and appended to the journal
    Step("fsync", ENGINE, "T7"),
    Step("settle", ENGINE, "T7"),
    Step("release", ENGINE, "T3"),  # a slice goes back untouched
    Step("reclaim", ENGINE, "T3"),  # a dead holder's slices go back
    Step("replay", ENGINE, "T8"),  # a dead worker's journal is carried out
    Step("reseal", ENGINE, "T3"),  # a waiting slice moves to this week's key
    Step("drain", POLICY, "T9"),  # events are read from the streams
    Step("commit", POLICY, "T9"),  # and committed with the cursor that passes them
    Step("trim", POLICY, "T9"),
    Step("finish", POLICY, "T9"),  # the job's last row is in the ledger
    Step("suppress", POLICY, "T11"),  # SQL has it
    Step("enforce", POLICY, "T11"),  # Redis has it; then the answer
    Step("shred", POLICY, "T11"),  # the keys and the identity of an erased person go
    Step("purge", POLICY, "T11"),  # a place gives up what it has of them
    Step("receipt", POLICY, "T11"),  # nothing is left anywhere
    Step("clear", POLICY, "T12"),  # a run of Redis is compared with SQL and let in
)

JOB_STATES: Final = ("accepted", "expanding", "sending", "paused", "done", "cancelled", "expired", "lost", "rejected")
JOB_ENDED: Final = frozenset({"done", "cancelled", "expired", "lost", "rejected"})
# What may be asked for from outside (by an operator or by the clock), and in which states it may be asked.
JOB_MOVES: Final = {
    "paused": frozenset({"accepted", "expanding", "sending"}),
    "sending": frozenset({"paused"}),
    "cancelled": frozenset({"accepted", "expanding", "sending", "paused"}),
    "expired": frozenset({"accepted", "expanding", "sending", "paused"}),
    "lost": frozenset({"accepted", "expanding", "sending", "paused"}),
}
SUBMITTED, QUEUED, LEASED, DEFERRED, IN_DOUBT = "submitted", "queued", "leased", "deferred", "in doubt"
TERMINAL_STATES: Final = tuple(kind.name.lower() for kind in sorted(TERMINAL))
RECIPIENT_STATES: Final = (SUBMITTED, QUEUED, LEASED, DEFERRED, IN_DOUBT, *TERMINAL_STATES)
WAITING, GONE = "waiting", "gone"
SLICE_STATES: Final = (WAITING, LEASED, GONE)
NOTHING: Final = ""  # not there yet


def _jobs() -> Iterator[Transition]:
    yield Transition("job", NOTHING, "accepted", "accept")
    yield Transition("job", NOTHING, "rejected", "acknowledge")
    yield Transition("job", "lost", "accepted", "accept")  # resubmitted under its id (T12)
    yield Transition("job", "accepted", "expanding", "register")
    for source in ("accepted", "expanding"):
        yield Transition("job", source, "sending", "mark")
    for target, sources in JOB_MOVES.items():
        for source in sorted(sources):
            yield Transition("job", source, target, "clear" if target == "lost" else "enforce")
    yield Transition("job", "paused", "expanding", "enforce")  # resumed before its last entry was in
    for source in ("sending", "paused"):
        yield Transition("job", source, "done", "finish")


def _recipients() -> Iterator[Transition]:
    yield Transition("recipient", SUBMITTED, QUEUED, "put")
    # ended while it was being expanded: refused by the gate, or with its job
    for kind in (Kind.REFUSED, Kind.EXPIRED, Kind.CANCELLED, Kind.LOST):
        yield Transition("recipient", SUBMITTED, kind.name.lower(), "put")
    for source in (QUEUED, DEFERRED, IN_DOUBT):
        yield Transition("recipient", source, LEASED, "lease")
        yield Transition("recipient", source, Kind.LOST.name.lower(), "clear")
        yield Transition("recipient", source, Kind.REFUSED.name.lower(), "purge")  # erased while waiting
    yield Transition("recipient", LEASED, QUEUED, "release")
    yield Transition("recipient", LEASED, QUEUED, "reclaim")
    yield Transition("recipient", LEASED, DEFERRED, "settle")
    yield Transition("recipient", LEASED, IN_DOUBT, "settle")  # `resend`: one more attempt, marked so
    yield Transition("recipient", LEASED, DEFERRED, "replay")
    yield Transition("recipient", LEASED, IN_DOUBT, "replay")
    for state in TERMINAL_STATES:
        yield Transition("recipient", LEASED, state, "settle")
        yield Transition("recipient", LEASED, state, "replay")


TRANSITIONS: Final = (
    *_jobs(),
    *_recipients(),
    Transition("entry", NOTHING, "registered", "register"),
    Transition("entry", "registered", "expanded", "mark"),
    Transition("entry", "expanded", GONE, "acknowledge"),
    Transition("slice", NOTHING, WAITING, "put"),
    Transition("slice", NOTHING, WAITING, "settle"),  # a retry
    Transition("slice", WAITING, WAITING, "assign"),
    Transition("slice", WAITING, WAITING, "reseal"),
    Transition("slice", WAITING, WAITING, "purge"),
    Transition("slice", WAITING, GONE, "purge"),
    Transition("slice", WAITING, LEASED, "lease"),
    Transition("slice", LEASED, LEASED, "settle"),
    Transition("slice", LEASED, GONE, "settle"),
    Transition("slice", LEASED, GONE, "replay"),
    Transition("slice", LEASED, WAITING, "release"),
    Transition("slice", LEASED, WAITING, "reclaim"),
    Transition("attempt", "composed", "permitted", "gate"),
    Transition("attempt", "permitted", "intended", "intent"),
    Transition("attempt", "intended", "sent", "dot"),
    Transition("attempt", "sent", "answered", "reply"),
    Transition("attempt", "answered", "recorded", "outcome"),
    Transition("attempt", "recorded", "durable", "fsync"),
    Transition("attempt", "durable", "settled", "settle"),
    Transition("event", "streamed", "read", "drain"),
    Transition("event", "read", "kept", "commit"),
    Transition("event", "kept", GONE, "trim"),
    Transition("suppression", "asked", "kept", "suppress"),
    Transition("suppression", "kept", "in force", "enforce"),
    Transition("erasure", NOTHING, "suppressed", "suppress"),
    Transition("erasure", "suppressed", "shredded", "shred"),
    Transition("erasure", "shredded", "shredded", "purge"),
    Transition("erasure", "shredded", "purged", "receipt"),
    Transition("store", "unknown", "cleared", "clear"),
)

SUBJECTS: Final = tuple(dict.fromkeys(transition.subject for transition in TRANSITIONS))
POINTS: Final = tuple(
    Point(f"{when}-{step.name}", step.role, step.promise)
    for step in STEPS
    if any(transition.step == step.name for transition in TRANSITIONS)
    for when in ("before", "after")
)
_ALLOWED: Final = frozenset((t.subject, t.source, t.target) for t in TRANSITIONS)


def allowed(subject: str, source: str, target: str) -> bool:
    """Whether the table has this way. Staying where one is needs no transition and is always allowed."""
    return source == target or (subject, source, target) in _ALLOWED


def steps_of(subject: str, source: str, target: str) -> tuple[str, ...]:
    """By which steps a subject goes this way; none: it does not."""
    return tuple(t.step for t in TRANSITIONS if (t.subject, t.source, t.target) == (subject, source, target))


def diagram(subject: str) -> str:
    """The ways of a subject, one line a source, as the plates show them::

    leased      -> queued (release, reclaim) · deferred (settle, replay)
    """
    ways: dict[str, dict[str, list[str]]] = {}
    for transition in TRANSITIONS:
        if transition.subject == subject:
            steps = ways.setdefault(transition.source, {}).setdefault(transition.target, [])
            if transition.step not in steps:
                steps.append(transition.step)
    width = max((len(source) for source in ways), default=0) or 1
    lines = []
    for source, targets in ways.items():
        same: dict[tuple[str, ...], list[str]] = {}
        for target, steps in targets.items():
            same.setdefault(tuple(steps), []).append(target)
        told = " · ".join(f"{' | '.join(names)} ({', '.join(steps)})" for steps, names in same.items())
        lines.append(f"{source or '-':<{max(width, 1)}} -> {told}")
    return "\n".join(lines)
