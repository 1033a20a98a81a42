"""The benchmark in small, as a person would run it: every figure of the line, against somebody else's count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from engine.rehearsal.bench import provider
from engine.rehearsal.campaigns import Audience, census

RECIPIENTS = 200
KEYS = """messages_per_second rsa_share rsa_share_fast postfix_ratio cpu_us_per_message cpu_per_rsa sink_count
sink_cpu_us p50_ms p99_ms memory_peak_mb ledger_lag cpu_us_by_part sink_cpu_us_per_message rsa_per_second_one_core cores
delivered refused seconds workers wait ok"""


def played(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from engine.cli import main; main()", "bench", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "@" not in done.stderr, "nobody is named"
    figures: dict[str, Any] = json.loads(done.stdout)
    assert set(KEYS.split()) <= figures.keys()
    assert figures["ok"]
    return figures


def deliverable() -> int:
    """Rows that can be sent: an address, consent, nobody twice; counted from the audience itself."""
    rows = [row for row in Audience(RECIPIENTS, providers=(provider(),)) if row["consent"]]
    found = census(Audience(RECIPIENTS, providers=(provider(),)))
    assert found.submitted == RECIPIENTS
    return len({row["address"] for row in rows if ".." not in row["address"]})


@pytest.mark.timeout(170)
def test_the_benchmark_in_small(tmp_path: Path) -> None:
    drawn = tmp_path / "chart.svg"
    figures = played("--recipients", str(RECIPIENTS), "--workers", "2", "--chart", str(drawn), "--no-fast")

    assert figures["delivered"] == figures["sink_count"] == figures["latency_of"] == deliverable()
    assert figures["refused"] == RECIPIENTS - deliverable()
    assert 0 < figures["journey_per_second"] < figures["messages_per_second"]
    limit = figures["rsa_per_second_one_core"] * figures["cores"]
    assert figures["rsa_share"] == pytest.approx(figures["messages_per_second"] / limit, rel=0.01)
    assert (figures["fast"], figures["rsa_share_fast"], figures["postfix_ratio"]) == (False, None, None)
    assert figures["cores"] == os.cpu_count()
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["seconds"] * 1000
    assert figures["cpu_per_rsa"] == pytest.approx(figures["cpu_us_by_part"]["engine"] / figures["rsa_us"], rel=0.01)
    assert figures["cpu_us_by_part"]["engine"] > figures["rsa_us"], "a signature each, at least"
    assert {"engine-0", "engine-1", "policy-0", "tracker-0", "ops-0", "valkey-0"} <= figures["memory_peak_mb"].keys()
    assert all(value > 1 for value in figures["memory_peak_mb"].values())
    root = ElementTree.parse(drawn).getroot()
    assert any((element.text or "").startswith(f"{deliverable():,} messages") for element in root.iter())


@pytest.mark.timeout(170)
def test_runs_one_after_another_with_tls_and_refusals() -> None:
    figures = played("--recipients", "100,150", "--workers", "1", "--mix", "--tls", "--domains", "100")

    small, large = figures["runs"]
    assert (small["recipients"], large["recipients"], figures["recipients"]) == (100, 150, 150)
    assert figures["growth"] is None, "the largest is also that nearest 100,000: nothing to compare"
    for one in (small, large):
        assert one["bounced"] > 0
        assert one["deferrals"] > 0
        assert one["delivered"] == one["sink_count"]
        assert one["delivered"] + one["bounced"] + one["refused"] == one["recipients"]


@pytest.mark.debian
@pytest.mark.timeout(170)
@pytest.mark.parametrize("sink", ["postfix", "smtpd"])
def test_against_sinks_that_others_wrote(sink: str) -> None:
    figures = played("--recipients", str(RECIPIENTS), "--workers", "1", "--sink", sink)

    assert figures["sink"] == sink
    assert figures["delivered"] == figures["sink_count"] == deliverable()
    assert figures["sink_cpu_us"] > 0


@pytest.mark.debian
@pytest.mark.timeout(170)
def test_a_whole_postfix_plays_a_scene() -> None:
    """It refuses some for good, puts others off once and takes those at the next attempt."""
    figures = played("--recipients", str(RECIPIENTS), "--workers", "1", "--sink", "smtpd", "--mix")

    assert figures["bounced"] > 0
    assert figures["deferrals"] > 0
    assert figures["delivered"] == figures["sink_count"] == deliverable() - figures["bounced"]
