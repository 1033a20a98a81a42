"""P-51: every request ends before its due date: done, refused with a ground and where to complain, or withdrawn."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.instants import DAY_US, HOUR_US
from policy.jobs import Refused
from policy.rights import states
from policy.rights.due import RULES, Calendar, due
from policy.rights.states import CLOSED, MINOR_DUE_US, Act, Case, Identity, Kind, Next, Role, State, move
from tests.promises.floor import EVE, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

START = 20_000 * DAY_US
_DEED = {Next.ASK: Act.ASK, Next.BEGIN: Act.BEGIN, Next.LAPSE: Act.REFUSE, Next.CARRY: Act.FINISH}


def _lived(case: Case, answers_after: int | None, fails: int) -> tuple[State, int]:
    """How a request ends when the engine looks every six hours, and when."""
    now = case.received
    while now < case.due:
        asked = case.state in (State.RECEIVED, State.IDENTIFYING) and case.asks > 0
        if asked and answers_after is not None and now >= case.received + answers_after * HOUR_US:
            case = replace(case, state=move(case.state, Act.PROVE), identity=Identity.PROVED)
        todo = states.plan(case, now)
        if todo.step is Next.CARRY and fails:
            fails -= 1
            case = replace(case, tried=now)
        elif todo.step is not Next.WAIT:
            case = replace(case, state=move(case.state, _DEED[todo.step]))
            if todo.step is Next.ASK:
                case = replace(case, asks=case.asks + 1, last_asked=now, first_asked=case.first_asked or now)
            continue
        if case.state in CLOSED:
            break
        now += 6 * HOUR_US
    return case.state, now


@promise("P-51", off={"policy.rights.states.lapses_at": lambda case: 1 << 62})
def test_p51_every_request_ends_before_its_due_date() -> None:
    """Of every kind, role and law; by people who answer or never do; with work that fails for a while."""

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(
        st.sampled_from(list(Kind)), st.sampled_from(list(Role)), st.sampled_from(sorted(RULES)),
        st.integers(0, 24 * 400), st.none() | st.integers(0, 20 * 24), st.integers(0, 3),
    )  # fmt: skip
    def law(kind: Kind, role: Role, rule: str, hour: int, answers_after: int | None, fails: int) -> None:
        received = START + hour * HOUR_US
        end = due(rule, received, Calendar(UTC))
        if kind is Kind.MINOR and role is Role.CONTACT:
            end = min(end, received + MINOR_DUE_US)
        case = Case(kind, role, State.RECEIVED, Identity.OPEN, received, end)
        state, at = _lived(case, answers_after, fails)
        assert state in CLOSED
        assert at < end

    law()


async def _anyhow(desk: object, ticket: str, ground: str) -> dict[str, str]:
    return {"state": "refused", "ground": ground}


@promise("P-51", off={"policy.rights.operations.RightsOperations.op_rights_refuse": _anyhow})
async def test_p51_a_refusal_has_a_ground_and_says_where_to_complain(floor: Floor) -> None:
    told = await floor.desk.op_rights_open("access", EVE)
    with pytest.raises(Refused, match="ground"):
        await floor.desk.op_rights_refuse(told["ticket"], "  ")
    await floor.desk.op_rights_refuse(told["ticket"], "manifestly excessive, the tenth this week")
    [letter] = floor.house.letters("refused")
    assert "manifestly excessive" in letter
    assert "data protection authority" in letter


@promise("P-51", off={"policy.rights.states.PROOF_US": 1 << 60, "policy.rights.states.lapses_at": lambda case: 1 << 62})
async def test_p51_who_never_answers_is_refused_in_time_by_the_engine_itself(floor: Floor) -> None:
    told = await floor.desk.op_rights_open("erasure", EVE)
    while floor.house.now < told["due"]:
        floor.house.now += DAY_US
        await floor.desk.round()
    after = await floor.desk.op_rights_show(told["ticket"])
    assert (after["state"], after["outcome"]) == ("refused", "not identified")
    assert after["closed"] < told["due"]
