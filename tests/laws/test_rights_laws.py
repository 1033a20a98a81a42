"""Laws of the rights engine: every request ends in time, and nothing leads out of its end (P-51).

The pure half is walked with every kind, role and law, by people who answer or do not, and work that fails for a while.
The whole engine is then led through any order of acts by people and officers over SQL; what it does to gate and
trackers is in tests/policy/rights.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, select

from policy import accounts, audit, schema
from policy.enforcement import Change, Effects, Enforcement
from policy.instants import DAY_US, HOUR_US
from policy.jobs import Refused
from policy.keys import Keyring
from policy.personal import Person, Premises
from policy.rights.carrying import Handed, Seams
from policy.rights.due import RULES, Calendar, due
from policy.rights.operations import RightsOperations
from policy.rights.requests import Asked
from policy.rights.settings import RightsSettings
from policy.rights.states import (
    CLOSED,
    MINOR_DUE_US,
    PROOF_US,
    Act,
    Case,
    Identity,
    Kind,
    Next,
    NotPossible,
    Role,
    State,
    move,
    needs_proof,
    plan,
)
from policy.schema import open_store, upgrade
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.rights.conftest import ADA

START = 20_000 * DAY_US


@given(st.sampled_from(sorted(CLOSED)), st.lists(st.sampled_from(list(Act))))
def test_no_act_leads_out_of_a_closed_state(state: State, acts: list[Act]) -> None:
    before = state
    for act in acts:
        try:
            state = move(state, act)
        except NotPossible:
            continue
        assert state is before


@given(st.lists(st.sampled_from(list(Act)), max_size=12))
def test_done_is_reached_through_in_progress_only(acts: list[Act]) -> None:
    state, seen = State.RECEIVED, [State.RECEIVED]
    for act in acts:
        try:
            state = move(state, act)
        except NotPossible:
            continue
        seen.append(state)
    if State.DONE in seen:
        assert State.IN_PROGRESS in seen[: seen.index(State.DONE)]


def test_every_open_state_can_be_refused_and_taken_back() -> None:
    for state in set(State) - CLOSED:
        assert move(state, Act.REFUSE) is State.REFUSED
        assert move(state, Act.WITHDRAW) is State.WITHDRAWN


@settings(max_examples=300)
@given(
    kind=st.sampled_from(list(Kind)),
    role=st.sampled_from(list(Role)),
    law=st.sampled_from(sorted(RULES)),
    hour=st.integers(0, 24 * 400),
    holidays=st.sets(st.integers(0, 500), max_size=10),
    answers_after=st.one_of(st.none(), st.integers(0, 40 * 24)),
    fails=st.integers(0, 20),
    rounds=st.integers(1, 12),
)
def test_every_request_ends_before_its_due_date(
    kind: Kind,
    role: Role,
    law: str,
    hour: int,
    holidays: set[int],
    answers_after: int | None,
    fails: int,
    rounds: int,
) -> None:
    """The worker comes by every `rounds` hours; carrying out fails `fails` times before it works."""
    assume(fails * max(1, rounds) < 40)  # a store that is away for days is an incident, not a law
    received = START + hour * HOUR_US
    calendar = Calendar(UTC, {date(2024, 10, 4) + timedelta(n) for n in holidays})
    end = due(law, received, calendar)
    if kind is Kind.MINOR and role is Role.CONTACT:
        end = min(end, received + MINOR_DUE_US)
    case = Case(kind, role, State.RECEIVED, Identity.OPEN, received, end)
    now = received
    while case.state not in CLOSED:
        assert now < case.due
        todo = plan(case, now)
        if todo.step is Next.ASK:
            case = replace(
                case, state=move(case.state, Act.ASK), identity=Identity.ASKED, asks=case.asks + 1,
                first_asked=case.first_asked or now, last_asked=now,
            )  # fmt: skip
        elif todo.step is Next.BEGIN:
            assert not needs_proof(kind, role)
            case = replace(case, state=move(case.state, Act.BEGIN))
        elif todo.step is Next.CARRY:
            assert case.identity is Identity.PROVED or not needs_proof(kind, role)
            if fails:
                fails -= 1
                case = replace(case, tried=now)
            else:
                case = replace(case, state=move(case.state, Act.FINISH))
        elif todo.step is Next.LAPSE:
            assert now >= case.first_asked + PROOF_US  # nobody is refused who could still press the button
            case = replace(case, state=move(case.state, Act.REFUSE))
        else:
            assert todo.at > now
        if answers_after is not None and case.state is State.IDENTIFYING and now >= received + answers_after * HOUR_US:
            case = replace(case, state=move(case.state, Act.PROVE), identity=Identity.PROVED)
        now += rounds * HOUR_US
    assert plan(case, now).step is Next.WAIT


@pytest.mark.parametrize("kind", list(Kind))
def test_what_shows_or_destroys_waits_for_proof(kind: Kind) -> None:
    assert needs_proof(kind, Role.HOLDER)
    destroys = {Kind.ACCESS, Kind.PORTABILITY, Kind.RECTIFICATION, Kind.ERASURE}
    assert needs_proof(kind, Role.CONTACT) == (kind in destroys)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    opened = open_store("sqlite://", writer=True)
    upgrade(opened)
    with opened.begin() as conn:
        accounts.add(conn, "acme", display_name="Acme", now=START)
    yield opened
    opened.dispose()


class Direct:
    """Enforcement without a gate: the change is committed, whom it would tell is somebody else's test."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def apply(self, change: Change) -> Any:
        return await self._store.write(lambda conn: change(conn, Effects()))


class Walk:
    """One request led through any order of acts. `look` holds what must be true after each."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.now = START
        self.store = store
        self.broken = False
        self.erased = 0
        self.ticket = ""
        self.end: dict[str, Any] = {}
        keyring = Keyring.create(folder / "keys", 2857)
        officer = Officer(name="Grace", address="privacy@platform.example")
        settings_ = PolicySettings(officer=officer, data_dir=folder)
        premises = Premises(settings_, store, cast(Any, None), lambda: keyring, lambda: self.now)
        seams = Seams(self._erase, self._bundle, self._person, list, self._end)
        enforcement = cast(Enforcement, Direct(store))
        self.desk = RightsOperations(premises, enforcement, RightsSettings(), seams)

    async def _erase(self, account: int, tag: bytes, partition: int, address: str, cause: str, request: int) -> None:
        if self.broken:
            raise OSError
        self.erased += 1

    async def _end(self, account: int, request: int) -> None:
        return

    async def _bundle(self, asked: Asked, portable: bool) -> Handed:
        if self.broken:
            raise OSError
        return Handed("/nowhere", "Ask.")

    async def _person(self, asked: Asked) -> Person:
        return Person(asked.tag, asked.partition, "lane")

    def token(self) -> str:
        found = [one for one in self.desk.outbox.waiting() if one.letter == "proof"]
        message = self.desk.outbox.read(max(found, key=lambda one: one.seq).name) if found else None
        return str(message.get_content()).split("/r/")[1].split()[0] if message else "nothing"

    async def do(self, act: str) -> None:
        desk, ticket = self.desk, self.ticket
        try:
            if act == "confirm":
                await desk.op_rights_confirm(self.token())
            elif act == "break":
                self.broken = not self.broken
            elif act.startswith("wait"):
                self.now += int(act[4:]) * HOUR_US
                await desk.round()
            elif act in ("extend", "lift"):
                await getattr(desk, f"op_rights_{act}")(ticket, "because")
            elif act == "refuse":
                await desk.op_rights_refuse(ticket, "a ground")
            elif act == "note":
                await desk.op_rights_note(ticket, "a note")
            else:
                await getattr(desk, f"op_rights_{act}")(ticket)
        except (NotPossible, Refused):
            pass  # said, and nothing done: `look` sees to the second half

    async def look(self) -> dict[str, Any]:
        told = next(one for one in await self.desk.op_rights_list(open_only=False) if one["ticket"] == self.ticket)
        if self.end:
            assert (told["state"], told["closed"]) == (self.end["state"], self.end["closed"])
        elif told["closed"]:
            self.end = told
            assert State(told["state"]) in CLOSED
        proved = told["identity"] in ("proved", "by-hand")
        destroys = told["kind"] in ("erasure", "access", "portability", "rectification")
        if told["state"] in ("done", "in progress") and (destroys or told["role"] == "holder"):
            assert proved
        assert not self.erased or proved or told["kind"] == "minor"
        if told["state"] == "refused":
            assert told["ground"]
        if told["state"] in ("refused", "withdrawn"):
            assert not await self.store.write(_restrictions)
        assert await self.store.write(audit.verify) is None
        return told


def _restrictions(conn: Connection) -> list[Any]:
    restricted = select(schema.suppression).where(schema.suppression.c.reason == "restriction")
    return [*conn.execute(restricted), *conn.execute(select(schema.halt))]


acts = st.sampled_from(
    ["confirm", "prove", "extend", "refuse", "withdraw", "close", "note", "ask", "lift", "break", "wait1", "wait30",
     "wait80", "wait200"]
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(list(Kind)),
    role=st.sampled_from(list(Role)),
    channel=st.sampled_from(["cli", "mail", "letter"]),
    then=st.lists(acts, max_size=8),
)
def test_any_order_of_acts_leads_to_one_end_in_time(
    engine: Engine, kind: Kind, role: Role, channel: str, then: list[str]
) -> None:
    async def walk() -> None:
        store = Store(engine)
        with tempfile.TemporaryDirectory() as folder:
            one = Walk(store, Path(folder))
            details = {"field": "postal_address", "value": "1 Main St"} if kind is Kind.RECTIFICATION else {}
            told = await one.desk.op_rights_open(
                kind, ADA, role=role, account="acme", channel=channel, details=details
            )  # fmt: skip
            one.ticket = told["ticket"]
            for act in then:
                await one.do(act)
                told = await one.look()
            one.broken = False
            # a worker that comes every six hours has a turn left, and nobody was promised 72 hours anew
            must_be_in_time = (
                not told["closed"]
                and kind is not Kind.MINOR
                and "ask" not in then
                and one.now + 6 * HOUR_US < told["due"]
            )
            while not told["closed"]:
                await one.do("wait6")
                told = await one.look()
                assert one.now < START + 200 * DAY_US
            assert told["closed"] < told["due"] or not must_be_in_time
        await asyncio.to_thread(store._thread.shutdown)

    with engine.begin() as conn:
        for table in ("proof", "request_step", "request", "suppression", "halt", "rectification"):
            conn.execute(schema.metadata.tables[table].delete())
    asyncio.run(walk())
