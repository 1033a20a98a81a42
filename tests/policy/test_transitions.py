"""The state table is one whole: every point is reached in the code, every plate shows it, no name is misspelt."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.queue import states
from policy import crashpoints, transitions
from policy.events import TERMINAL

ROOT = Path(__file__).parents[2]
_REACHED = re.compile(r"""\breach\("([a-z-]+)"\)""")


def reached_in_code() -> dict[str, str]:
    """Point -> the floor whose code reaches it."""
    found: dict[str, str] = {}
    for floor in ("engine", "policy"):
        for path in sorted((ROOT / floor).rglob("*.py")):
            if path.name != "crashpoints.py":
                found |= dict.fromkeys(_REACHED.findall(path.read_text(encoding="utf-8")), floor)
    return found


def test_there_are_at_least_32_points_and_each_is_in_the_code_of_its_role() -> None:
    points = {point.name: point.role for point in transitions.POINTS}
    assert len(points) >= 32
    assert reached_in_code() == points


def test_every_step_moves_something_and_every_transition_has_a_step() -> None:
    steps = {step.name for step in transitions.STEPS}
    assert {transition.step for transition in transitions.TRANSITIONS} == steps


def test_every_state_is_reached_and_no_terminal_one_is_left() -> None:
    targets = {(t.subject, t.target) for t in transitions.TRANSITIONS}
    for state in transitions.RECIPIENT_STATES:
        assert state == transitions.SUBMITTED or ("recipient", state) in targets
    for state in transitions.JOB_STATES:
        assert ("job", state) in targets
    left = {t.source for t in transitions.TRANSITIONS if t.subject == "recipient"}
    assert not left & {kind.name.lower() for kind in TERMINAL}
    assert {t.source for t in transitions.TRANSITIONS if t.subject == "job"} & transitions.JOB_ENDED == {"lost"}


def test_no_way_but_those_of_the_table() -> None:
    assert transitions.allowed("recipient", "leased", "delivered")
    assert transitions.allowed("slice", "waiting", "waiting")
    assert not transitions.allowed("recipient", "delivered", "queued")
    assert not transitions.allowed("recipient", "queued", "delivered")
    assert not transitions.allowed("slice", "gone", "waiting")
    assert not transitions.allowed("job", "done", "sending")
    assert transitions.steps_of("slice", "leased", "waiting") == ("release", "reclaim")


@pytest.mark.parametrize("subject", ["slice", "recipient"])
def test_the_plate_of_the_queue_shows_the_table(subject: str) -> None:
    plate = " ".join((states.__doc__ or "").split())
    for line in transitions.diagram(subject).splitlines():
        assert " ".join(line.split()) in plate


@pytest.mark.parametrize("text", ["settle", "before-lunch", "before-settle:0", "before-settle:x", "before-settle:-1"])
def test_a_point_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(crashpoints.NoSuchPoint):
        crashpoints.parse(text)


def test_it_ends_the_process_at_the_time_named_and_not_before() -> None:
    ended: list[str] = []
    reach = crashpoints.armed("before-settle:2", lambda: ended.append("now"))
    for point in ("before-settle", "after-settle", "before-lease"):
        reach(point)
    assert not ended
    reach("before-settle")
    assert ended == ["now"]
    reach("before-settle")
    assert ended == ["now"]


@pytest.mark.parametrize(("value", "code"), [("before-gate:2", -signal.SIGKILL), ("nowhere", 2), ("", 0)])
def test_a_process_dies_where_it_was_told(value: str, code: int) -> None:
    program = "from policy.crashpoints import reach; reach('before-gate'); reach('before-gate'); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={crashpoints.VARIABLE: value}, capture_output=True, timeout=30
    )
    assert done.returncode == code
