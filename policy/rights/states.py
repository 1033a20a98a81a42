"""A request's life: which act leads where, who must prove what first, and what is to do next. Pure.

Laws (tests/laws/test_rights_laws.py):
- no act leads out of a closed state;
- a request whose worker runs, and whose work can be done, is closed before its due date;
- nothing that shows or destroys data happens before identity is proved (GDPR 12(6)).

    received ──ask──> identifying ──prove──> in progress ──finish──> done
        └──────────────begin (no proof needed)──────^          refuse ──> refused      withdraw ──> withdrawn

Who must prove: a contact who wants data shown, changed or destroyed. Restriction, objection and withdrawal only take
away from us, so they begin at receipt: whoever holds a forwarded mail can do as much by its opt-out link. Account
holders prove always, since what they ask stops or changes a whole account. A child's report needs no proof of mailbox
either (it may be the parent's or the school's): mail stops at receipt, and the erasure comes after a day of grace in
which the officer may look, well within the 72 hours of P-48 (a contact's; that an account holder is a child has to be
proved like everything about an account).

A proof link lives 72 hours and is sent three times. Who has not answered two days before the due date cannot be
identified and is refused on that ground (GDPR 12(2), 11(2)); asking again is free.

Known limits: a request entered when its due date is near or past still gets its 72 hours, and may end late; it is
counted as overdue (`operations`), never dropped.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from policy.instants import DAY_US, HOUR_US

PROOF_US: Final = 72 * HOUR_US  # P-15
ASKS: Final = 3
LAPSE_US: Final = 2 * DAY_US  # before the due date: time for the letter and for who meant to answer today
MINOR_DUE_US: Final = 72 * HOUR_US  # P-48
MINOR_GRACE_US: Final = 24 * HOUR_US
RETRY_US: Final = HOUR_US // 4
LIFT_NOTICE_US: Final = 3 * DAY_US  # GDPR 18(3): told before it ends, with time to object


class State(enum.StrEnum):
    RECEIVED = "received"
    IDENTIFYING = "identifying"
    IN_PROGRESS = "in progress"
    DONE = "done"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


class Kind(enum.StrEnum):
    ACCESS = "access"
    RECTIFICATION = "rectification"
    ERASURE = "erasure"
    RESTRICTION = "restriction"
    PORTABILITY = "portability"
    OBJECTION = "objection"
    WITHDRAWAL = "withdrawal"
    MINOR = "minor"


class Role(enum.StrEnum):
    CONTACT = "contact"
    HOLDER = "holder"


class Identity(enum.StrEnum):
    OPEN = "open"
    ASKED = "asked"
    PROVED = "proved"
    BY_HAND = "by-hand"


class Act(enum.StrEnum):
    OPEN = "open"
    ASK = "ask"
    PROVE = "prove"
    BEGIN = "begin"
    FINISH = "finish"
    REFUSE = "refuse"
    WITHDRAW = "withdraw"
    EXTEND = "extend"
    RESTRICT = "restrict"
    LIFT = "lift"  # notice that a restriction will end (GDPR 18(3))
    LIFTED = "lifted"
    NOTE = "note"


CLOSED: Final = frozenset({State.DONE, State.REFUSED, State.WITHDRAWN})
OPEN: Final = frozenset(State) - CLOSED
PROTECTIVE: Final = frozenset({Kind.RESTRICTION, Kind.OBJECTION, Kind.WITHDRAWAL, Kind.MINOR})
# P-14, P-54, P-57: processing rests while the request is looked at
RESTRICTED_AT_ONCE: Final = frozenset({Kind.ERASURE, Kind.RESTRICTION, Kind.MINOR})

# act -> (from, to); to None: the state stays
_MOVES: Final[dict[Act, tuple[frozenset[State], State | None]]] = {
    Act.ASK: (frozenset({State.RECEIVED, State.IDENTIFYING}), State.IDENTIFYING),
    Act.PROVE: (frozenset({State.RECEIVED, State.IDENTIFYING}), State.IN_PROGRESS),
    Act.BEGIN: (frozenset({State.RECEIVED}), State.IN_PROGRESS),
    Act.FINISH: (frozenset({State.IN_PROGRESS}), State.DONE),
    Act.REFUSE: (OPEN, State.REFUSED),
    Act.WITHDRAW: (OPEN, State.WITHDRAWN),
    Act.EXTEND: (OPEN, None),
    Act.RESTRICT: (OPEN, None),
    Act.LIFT: (frozenset({State.DONE}), None),  # a restriction outlives the request that asked for it
    Act.LIFTED: (frozenset({State.DONE}), None),
    Act.NOTE: (frozenset(State), None),
}


class NotPossible(ValueError):
    """This act is not possible in this state. The text names both."""


def move(state: State, act: Act) -> State:
    """The state after an act. Raises NotPossible."""
    sources, target = _MOVES.get(act, (frozenset(), None))
    if state not in sources:
        raise NotPossible(f"a request that is {state.value} cannot take the act {act.value}")
    return state if target is None else target


def needs_proof(kind: Kind, role: Role) -> bool:
    return role is Role.HOLDER or kind not in PROTECTIVE


@dataclass(frozen=True, slots=True)
class Case:
    """What of a request decides its next step. Instants in microseconds. asks: proof letters sent; first_asked,
    last_asked: when; tried: when carrying it out failed last, 0 never."""

    kind: Kind
    role: Role
    state: State
    identity: Identity
    received: int
    due: int
    asks: int = 0
    first_asked: int = 0
    last_asked: int = 0
    tried: int = 0


class Next(enum.StrEnum):
    ASK = "ask"
    BEGIN = "begin"
    CARRY = "carry"
    LAPSE = "lapse"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Plan:
    """step: what to do now; at: for WAIT, when to look again."""

    step: Next
    at: int = 0


def lapses_at(case: Case) -> int:
    """From when on a person who was asked counts as not identified: never before a whole proof period."""
    return max(case.due - LAPSE_US, case.first_asked + PROOF_US)


def plan(case: Case, now: int) -> Plan:
    """What is next to do for a request. Raises nothing: a closed one waits for ever."""
    if case.state in CLOSED:
        return Plan(Next.WAIT, 1 << 62)
    if case.state is State.IN_PROGRESS:
        return _carry(case, now)
    if not needs_proof(case.kind, case.role):
        return Plan(Next.BEGIN)
    if case.asks == 0:
        return Plan(Next.ASK)
    lapse = lapses_at(case)
    if now >= lapse:
        return Plan(Next.LAPSE)
    again = case.last_asked + PROOF_US
    if case.asks < ASKS and again < lapse:
        return Plan(Next.ASK) if now >= again else Plan(Next.WAIT, again)
    return Plan(Next.WAIT, lapse)


def _carry(case: Case, now: int) -> Plan:
    ready = case.received
    if case.kind is Kind.MINOR and case.identity is not Identity.BY_HAND:
        ready = case.received + MINOR_GRACE_US
    if case.tried:
        ready = max(ready, case.tried + RETRY_US)
    return Plan(Next.CARRY) if now >= ready else Plan(Next.WAIT, ready)
