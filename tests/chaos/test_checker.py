"""The checker, fed with histories in which one thing is wrong: each law is seen to fail, and a whole one to hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import (
    Broken,
    Fault,
    History,
    Job,
    Limits,
    Measure,
    Shot,
    Told,
    bound,
    check,
    figures,
)
from tests.chaos.sink_record import Entry, Line

PLAIN, OTHER = "a" * 64, "b" * 64
SITE = "fast@127.0.0.1"


def heard(mref: int = 1, **more: Any) -> Entry:
    """A message that arrived at 10.1 and was answered 250 at 10.2."""
    base: dict[str, Any] = {
        "run": 0, "port": SITE, "connection": 1, "transaction": mref, "sender": "b+x@letter.example",
        "rcpt": f"p{mref}@a.fast.test", "token": "x", "job": 7, "mref": mref, "message_id": "<m>", "t_rcpt": 10.0,
        "rcpt_reply": "250", "t_dot": 10.1, "reply": "250 2.0.0 Ok", "stored": True, "t_reply_written": 10.2,
        "size": 100, "sha": "s" * 64, "plain": PLAIN, "bare": 0,
    }  # fmt: skip
    return Entry(**(base | more))


def whole(in_doubt: str = "hold", **more: Any) -> History:
    """Two people of one job, both delivered."""
    job = Job(7, "j7", in_doubt, "1", 2, {1: "p1@a.fast.test", 2: "p2@a.fast.test"})
    told = Told(7, "done", 2, [(1, "delivered"), (2, "delivered")], {}, {"delivered": 2})
    history = History(
        jobs=[job],
        told={7: told},
        entries=[heard(1), heard(2)],
        renders={(7, 1): frozenset({PLAIN}), (7, 2): frozenset({PLAIN})},
        limits={SITE: Limits(2, rate=10.0, burst=5.0)},
    )
    for name, value in more.items():
        setattr(history, name, value)
    return history


def told(*kinds: str, **more: Any) -> dict[int, Told]:
    """What the ledger says of job 7, person by person."""
    counters = {kind: kinds.count(kind) for kind in kinds}
    base: dict[str, Any] = {
        "number": 7, "state": "done", "rows": len(kinds), "messages": list(enumerate(kinds, start=1)), "others": {},
        "counters": counters,
    }  # fmt: skip
    return {7: Told(**(base | more))}


def laws(history: History) -> set[str]:
    return {broken.law for broken in check(history)}


def at_fault(role: str = "engine-0", began: float = 10.15, hello: str = "", since: float | None = None) -> Fault:
    return Fault(role, began, began + 0.01, hello, since)


def test_a_history_without_fault_holds() -> None:
    assert check(whole()) == []
    assert figures(whole()).messages == 2


# --- I1 --------------------------------------------------------------------------------------------------------------


def test_i1_a_job_that_was_acknowledged_and_is_not_in_the_ledger() -> None:
    assert "I1" in laws(whole(told={}, entries=[]))


def test_i1_a_person_without_a_terminal_state() -> None:
    history = whole(told=told("delivered", rows=2, others={"refused": 1}, counters={"delivered": 1, "refused": 1}))
    assert [broken.law for broken in check(history)] == ["I1"]


def test_i1_a_person_with_two_terminal_states() -> None:
    twice = [(1, "delivered"), (1, "bounced"), (2, "delivered")]
    assert "I1" in laws(whole(told=told("delivered", "delivered", messages=twice)))


def test_i1_delivered_without_a_250() -> None:
    assert laws(whole(entries=[heard(1)])) == {"I1"}
    refused = heard(2, reply="550 5.7.1 no", stored=False)
    assert laws(whole(entries=[heard(1), refused])) == {"I1"}


def test_i1_a_250_that_was_said_in_peace_and_forgotten() -> None:
    assert laws(whole(told=told("delivered", "expired"))) == {"I1"}


def test_i1_a_250_may_be_forgotten_at_a_fault() -> None:
    assert check(whole(told=told("delivered", "unknown"), faults=[at_fault()])) == []


# --- I2 --------------------------------------------------------------------------------------------------------------


def test_i2_mail_of_no_job() -> None:
    assert laws(whole(entries=[heard(1), heard(2), heard(3, job=99)])) == {"I2"}


def test_i2_mail_to_somebody_else() -> None:
    assert "I2" in laws(whole(entries=[heard(1), heard(2), heard(3)]))
    assert "I2" in laws(whole(entries=[heard(1), heard(2, rcpt="q@a.fast.test")]))


def test_i2_a_message_that_is_not_the_second_rendering() -> None:
    assert laws(whole(entries=[heard(1), heard(2, plain=OTHER)])) == {"I2"}
    assert laws(whole(renders={(7, 1): frozenset({PLAIN})})) == {"I2"}
    assert check(whole(renders=None, entries=[heard(1), heard(2, plain=OTHER)])) == []


def test_i2_copies_that_differ() -> None:
    copies = [heard(1), heard(2, sha="1" * 64, t_reply_written=None), heard(2, t_rcpt=20.0, t_dot=20.1, connection=2)]
    assert "I2" in laws(whole("resend", entries=copies, faults=[at_fault()]))


def test_i2_a_bare_line_end_and_a_client_out_of_step() -> None:
    assert laws(whole(entries=[heard(1, bare=1), heard(2)])) == {"I2"}
    assert laws(whole(lines=[Line(k="bad", t=1.0, c=1, port=SITE, word="MAIL out of place")])) == {"I2"}


# --- I3, I3b ---------------------------------------------------------------------------------------------------------


def second(mref: int = 1, at: float = 20.0) -> Entry:
    return heard(mref, t_rcpt=at, t_dot=at + 0.1, t_reply_written=at + 0.2, connection=9)


def test_i3_a_second_copy_without_a_fault() -> None:
    assert laws(whole("resend", entries=[heard(1), heard(2), second()])) == {"I3"}


def test_i3_a_second_copy_after_a_fault_is_what_resend_allows() -> None:
    history = whole("resend", entries=[heard(1), heard(2), second()], faults=[at_fault()])
    assert check(history) == []
    assert figures(history).duplicates == 1


def test_i3_hold_allows_none() -> None:
    assert laws(whole("hold", entries=[heard(1), heard(2), second()], faults=[at_fault()])) == {"I3"}


def test_i3_three_copies_are_too_many() -> None:
    entries = [heard(1), heard(2), second(), second(at=30.0)]
    assert laws(whole("resend", entries=entries, faults=[at_fault(), at_fault(began=20.15)])) == {"I3"}


def test_i3_a_fault_of_another_worker_excuses_nobody() -> None:
    hellos = {(0, 1): "w0.letter.example", (0, 9): "w1.letter.example"}
    entries = [heard(1), heard(2), second()]
    theirs = whole("resend", entries=entries, faults=[at_fault("engine-1", hello="w1.letter.example")], hellos=hellos)
    assert laws(theirs) == {"I3"}
    ours = whole("resend", entries=entries, faults=[at_fault("engine-0", hello="w0.letter.example")], hellos=hellos)
    assert check(ours) == []


@pytest.mark.parametrize("role", ["redis", "policy", "tracker", "load"])
def test_i3_what_speaks_no_smtp_excuses_nobody(role: str) -> None:
    assert laws(whole("resend", entries=[heard(1), heard(2), second()], faults=[at_fault(role)])) == {"I3"}


def test_i3_a_fault_before_or_long_after_excuses_nobody() -> None:
    for began in (9.5, 12.0):
        history = whole("resend", entries=[heard(1), heard(2), second()], faults=[at_fault(began=began)])
        assert laws(history) == {"I3"}, began


def test_i3_a_worker_that_was_stopped_had_not_read_its_reply() -> None:
    history = whole("resend", entries=[heard(1), heard(2), second()], faults=[at_fault(began=13.0, since=10.1)])
    assert check(history) == []


def test_i3_a_connection_that_had_ended_is_not_the_faults() -> None:
    lines = [Line(k="open", t=9.0, c=1, port=SITE), Line(k="close", t=10.15, c=1, port=SITE)]
    first = heard(1, t_dot=10.1, t_reply_written=None)
    history = whole("resend", entries=[first, heard(2), second()], faults=[at_fault(began=15.0)], lines=lines)
    assert "I3" in laws(history)


def test_i3b_an_unknown_without_a_fault() -> None:
    assert "I3b" in laws(whole(told=told("delivered", "unknown")))


def test_i3b_an_unknown_the_sink_never_heard_of() -> None:
    history = whole(told=told("delivered", "unknown"), entries=[heard(1)], faults=[at_fault()])
    assert laws(history) == {"I3b"}


def test_i3b_a_script_that_never_answers_leaves_one_unknown() -> None:
    silent = heard(2, reply="", stored=True, t_reply_written=None)
    history = whole(told=told("delivered", "unknown"), entries=[heard(1), silent])
    assert check(history) == []
    assert bound(history) == 1


def test_i3b_one_connection_leaves_one_unknown() -> None:
    kinds = told("unknown", "unknown")
    near = [heard(1, t_reply_written=10.2), heard(2, t_rcpt=10.1, t_dot=10.14, t_reply_written=None)]
    assert laws(whole(told=kinds, entries=near, faults=[at_fault()])) == {"I3b"}
    apart = [near[0], replace(near[1], connection=2)]
    history = whole(told=kinds, entries=apart, faults=[at_fault()])
    assert check(history) == []
    assert (figures(history).unknowns, figures(history).unknown_bound) == (2, 2)


# --- I4 --------------------------------------------------------------------------------------------------------------


def shot(t_ack: float | None, scope: str = "platform", list_name: str = "1") -> Shot:
    return Shot("P1@a.fast.test", scope, list_name, 8.0, t_ack, True)


def test_i4_a_rcpt_more_than_a_second_after_the_answer() -> None:
    assert laws(whole(shots=[shot(8.9)])) == {"I4"}
    assert check(whole(shots=[shot(9.1)])) == []
    assert figures(whole(shots=[shot(9.1)])).epsilon_ms == {"p50": 900.0, "p99": 900.0, "max": 900.0}


def test_i4_an_unanswered_shot_promises_nothing_and_another_list_is_another_promise() -> None:
    assert check(whole(shots=[shot(None)])) == []
    assert check(whole(shots=[shot(8.0, "list", "2")])) == []
    assert laws(whole(shots=[shot(8.0, "list", "1")])) == {"I4"}
    assert laws(whole(shots=[shot(8.0, "account")])) == {"I4"}


# --- I5 --------------------------------------------------------------------------------------------------------------


def test_i5_more_messages_than_the_rate_and_the_burst() -> None:
    job = Job(7, "j7", "hold", "1", 40, {n: f"p{n}@a.fast.test" for n in range(1, 41)})
    fast = [heard(n, t_rcpt=10.0 + n * 0.01) for n in range(1, 41)]
    history = whole(jobs=[job], told=told(*["delivered"] * 40), entries=fast, renders=None)
    assert laws(history) == {"I5"}
    history.entries = [heard(n, t_rcpt=10.0 + n * 0.1) for n in range(1, 41)]
    assert check(history) == []


def test_i5_more_connections_than_the_cap() -> None:
    lines = [Line(k="open", t=float(n), c=n, port=SITE) for n in range(1, 4)]
    lines += [Line(k="close", t=10.0 + n, c=n, port=SITE) for n in range(1, 4)]
    assert laws(whole(lines=lines)) == {"I5"}
    assert check(whole(lines=[*lines[:1], Line(k="start", t=1.5, pid=2), *lines[1:]])) == []


def test_i5_a_connection_replaced_at_once_is_one_connection() -> None:
    lines = [
        Line(k="open", t=1.0, c=1, port=SITE),
        Line(k="open", t=1.0, c=2, port=SITE),
        Line(k="open", t=5.0, c=3, port=SITE),
        Line(k="close", t=5.01, c=2, port=SITE),
        Line(k="close", t=9.0, c=1, port=SITE),
        Line(k="close", t=9.0, c=3, port=SITE),
    ]
    assert check(whole(lines=lines)) == []


# --- I6 --------------------------------------------------------------------------------------------------------------


def test_i6_a_job_that_is_not_over() -> None:
    assert laws(whole(told=told("delivered", "delivered", state="sending"))) == {"I6"}


def test_i6_rows_that_do_not_add_up() -> None:
    assert laws(whole(told=told("delivered", "delivered", rows=3))) == {"I6"}
    more = told("delivered", "delivered", others={"refused": 1}, counters={"delivered": 2, "refused": 1})
    assert laws(whole(told=more)) == {"I6"}


def test_i6_counters_that_say_something_else() -> None:
    assert laws(whole(told=told("delivered", "delivered", counters={"delivered": 3}))) == {"I6"}


def test_i6_two_rows_of_one_person() -> None:
    twice = [(1, "delivered"), (2, "delivered"), (2, "delivered")]
    job = Job(7, "j7", "hold", "1", 3, {1: "p1@a.fast.test", 2: "p2@a.fast.test"})
    found = told("delivered", "delivered", "delivered", messages=twice)
    assert "I6" in laws(whole(jobs=[job], told=found))


def test_i6_delivered_to_nobody_of_the_job() -> None:
    found = told("delivered", "delivered", "delivered", rows=3)
    job = Job(7, "j7", "hold", "1", 3, {1: "p1@a.fast.test", 2: "p2@a.fast.test"})
    assert laws(whole(jobs=[job], told=found)) == {"I6"}


# --- I7, I8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["I7", "I8"])
def test_i7_and_i8_a_number_over_its_limit(law: str) -> None:
    assert laws(whole(measures=[Measure(law, "engine-0", "CPU at rest", 0.9, 0.3)])) == {law}
    assert check(whole(measures=[Measure(law, "engine-0", "CPU at rest", 0.3, 0.3)])) == []


def test_i8_something_is_left() -> None:
    assert check(whole(orphans={"sp:{p01}:lease": "one lease"})) == [Broken("I8", "sp:{p01}:lease", "one lease")]
