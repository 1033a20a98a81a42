"""The demo in small, as a person would run it: the same play, the same equations; and nothing left behind, ever."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engine.rehearsal import campaigns, proof
from engine.rehearsal.demo import perform
from engine.rehearsal.outcome import Outcome, Plan
from engine.rehearsal.readers import read_mail
from engine.rehearsal.screen import Screen
from engine.rehearsal.setting import Setting
from engine.rehearsal.stage import Stage, StageError

RECIPIENTS = 400
PATIENCE = 60.0  # seconds; only ever spent when something is broken
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp") as name:
        yield Path(name)


def living(folder: Path) -> list[str]:
    """Processes that work in a folder, whoever started them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()[:80]!r}")
        except OSError:
            continue
    return found


def wait_for_silence(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while living(folder):
        assert time.monotonic() < deadline, living(folder)
        time.sleep(0.05)  # between two looks at other processes


@pytest.mark.timeout(180)
async def test_the_demo_in_small(folder: Path) -> None:
    out = io.StringIO()
    screen, outcome = Screen(Console(file=out, width=140, highlight=False)), Outcome()
    plan = Plan(recipients=RECIPIENTS, folder=folder, results=folder, deadline=90.0)
    began = time.monotonic()
    async with Stage(folder, Setting(workers=2, keep=120, keep_every=2)) as stage:
        await perform(stage, plan, screen, outcome)
        played = time.monotonic() - began
        data, logs, kept = stage.data, stage.logs, stage.kept
    text = out.getvalue()

    assert outcome.troubles == []
    figures = outcome.figures()
    assert [name for name, good in outcome.checks() if not good] == [], f"{figures}\n{text}"
    assert figures["ok"]
    assert figures["submitted"] == RECIPIENTS
    assert figures["delivered"] + figures["refused"] + figures["bounced"] + figures["expired"] == RECIPIENTS
    assert (figures["deferred"], figures["unknown"], figures["expired"]) == (0, 0, 0)
    assert figures["delivered"] >= 0.8 * RECIPIENTS
    assert figures["delivered"] == figures["sink_accepted"]
    assert figures["second_refused"] == figures["opted_out"] > 10
    assert figures["dkim_verified"]
    assert figures["messages_per_second"] > 0
    assert played < 60.0

    census = campaigns.census(campaigns.Audience(RECIPIENTS))
    assert outcome.whole.reasons["refused", "no-consent"] == len(census.without_consent) == 4
    assert outcome.whole.reasons["refused", "invalid"] == census.rows[campaigns.NO_ADDRESS] == 1
    assert outcome.whole.reasons["refused", "duplicate"] == 1
    assert outcome.tallies["unknown"]["bounced"] == outcome.whole["bounced"] > 0
    assert outcome.tallies["greylist"].deferrals >= outcome.tallies["greylist"]["delivered"] > 0
    assert outcome.visits.statuses["pixel 200"] == outcome.pixels
    assert outcome.report is not None
    assert outcome.report.status.opens == outcome.visits.opened
    assert outcome.report.status.clicks == outcome.visits.clicked

    # the stories are those of the only people named on the screen
    assert [story.title.split()[-1] for story in outcome.stories] == ["it", "it", "somebody", "more"]
    said = [story.text for story in outcome.stories]
    assert "delivered" in said[0]
    assert "550 5.1.1" in said[1]
    assert "no-consent" in said[2]
    assert "suppressed: address, list weekly: opt-out" in said[3]
    named = {story.command.split()[-1] for story in outcome.stories}
    assert set(ADDRESS.findall(text)) <= named
    assert "\x1b" not in text

    # three people's addresses: in the mailboxes of the providers, and in clear nowhere else, stopped files included
    people = sorted({read_mail(path.read_bytes()).recipient for path in kept.glob("*.eml")})[:3]
    assert len(people) == 3
    assert len(proof.scan([kept], people).hits) >= 3, "the scan would not find them"
    assert proof.scan_aside([kept], people) == proof.scan([kept], people)
    scanned = proof.scan([data, logs], people)
    assert scanned.hits == {}
    names = {path.name for path in data.rglob("*")}
    assert {"policy.db", "valkey", "journal"} <= names
    assert any(name.startswith("appendonly.aof") for name in names)

    assert living(folder) == []


@pytest.mark.timeout(120)
async def test_a_killed_supervisor_is_told_and_everything_is_stopped(folder: Path) -> None:
    with pytest.raises(StageError, match="up ended with code -9"):
        async with Stage(folder, Setting(workers=1)) as stage:
            os.kill(stage.pids[0], signal.SIGKILL)
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                stage.check_alive()
    wait_for_silence(folder)  # the children are told by the kernel and end by themselves


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    home = folder / "d"
    command = [
        sys.executable, "-c", "from engine.cli import main; main()",
        "demo", "--recipients", "2000", "--workers", "1", "--dir", str(home), "--json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            if "delivering with" in line:
                break
        assert living(home)
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.stdout.read() == ""
        assert process.wait(PATIENCE) == 130, rest

    assert "Traceback" not in rest
    assert living(home) == []


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    (folder / "mine").write_text("kept")
    command = [sys.executable, "-c", "from engine.cli import main; main()", "demo", "--dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.timeout(120)
def test_kept_running_it_answers_and_ends_when_told(folder: Path) -> None:
    home = folder / "d"
    command = [
        sys.executable, "-c", "from engine.cli import main; main()",
        "demo", "--recipients", "100", "--workers", "1", "--dir", str(home), "--keep",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    told = re.search(r"stop +kill (\d+) (\d+)\b", done.stdout)
    assert told is not None, done.stdout + done.stderr
    try:
        figures = json.loads(done.stdout.splitlines()[-1])
        assert figures["submitted"] == 100
        assert len(living(home)) >= 5
    finally:
        for pid in told.groups():
            os.kill(int(pid), signal.SIGTERM)
        wait_for_silence(home)
