"""The systemd units: accepted by systemd, hardened, and patient enough to let a drain end."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

from engine.settings import EngineSettings
from engine.supervisor import RECORD_SECONDS
from policy.valkey import STOP_SECONDS

UNITS = sorted((Path(__file__).resolve().parents[1] / "deploy" / "systemd").glob("*.service"))
MOST_EXPOSURE = 20  # tenths: `systemd-analyze security` calls 2.0 and below "OK"


def section(path: Path, name: str) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # configparser's documented way to keep case
    parser.read(path, encoding="utf-8")
    return parser[name]


def test_there_is_a_unit_for_every_role() -> None:
    commands = [section(path, "Service")["ExecStart"].split("sales-push ", 1)[1] for path in UNITS]

    assert sorted(commands) == ["run engine --index %i", "run ops", "run policy", "run tracker", "up"]


@pytest.mark.parametrize("name", ["sales-push.service", "sales-push-engine@.service"])
def test_systemd_waits_longer_than_a_drain(name: str) -> None:
    [path] = [path for path in UNITS if path.name == name]
    seconds = re.fullmatch(r"(\d+)s", section(path, "Service")["TimeoutStopSec"])

    assert seconds is not None
    assert int(seconds[1]) > EngineSettings().supervisor.drain_seconds + RECORD_SECONDS + STOP_SECONDS


@pytest.mark.debian
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_the_unit_hardened(path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSURE}", "--no-pager", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert "Overall exposure level" in done.stdout
