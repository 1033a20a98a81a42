"""`sales-push init` and `sales-push up`, as an operator runs them: ready, alone, drained, everything stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from policy.vitals import read_all

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds; only ever spent when something is broken
PROGRAM = [sys.executable, "-c", "from engine.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def home() -> Iterator[Path]:
    """An installation made by init, with ports of its own."""
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        folder = Path(name)
        officer = ("--officer-name", "Privacy Officer", "--officer-address", "privacy@example.com")
        subprocess.run(
            [*PROGRAM, "init", "--domain", "example.com", *officer],
            cwd=folder, env=environment(), check=True, capture_output=True, timeout=PATIENCE,
        )  # fmt: skip
        yield folder


def environment() -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SALES_PUSH_ENGINE_WORKERS": "1",
        "SALES_PUSH_ENGINE_OPS__PORT": "0",
        "SALES_PUSH_TRACKER_PORT": str(free_port()),
    }


@contextmanager
def up(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (home / "up.log").open("ab") as log:
        process = subprocess.Popen([*PROGRAM, "up"], cwd=home, env=environment(), stderr=log, stdout=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def alive(pid: int) -> bool:
    """A zombie is dead: in a container nobody may reap an adopted orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def readiness(home: Path) -> dict[str, Any]:
    """What /readyz says, {} while nobody listens."""
    try:
        url = (home / "sales-push-data" / "run" / "ops.url").read_text().strip()
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as refused:
        with refused:
            return dict(json.load(refused))
    except (OSError, ValueError):
        return {}


def wait_until_ready(home: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Ready by its own supervisor: the roles of a killed one may still be ending, and say so on the same files."""
    deadline = time.monotonic() + PATIENCE
    while True:
        state = readiness(home)
        parts = state.get("parts", {})
        ours = [sign for sign in read_all(home / "sales-push-data") if sign.pid == process.pid]
        if ours and state.get("ready") and {"engine-0", "tracker-0", "policy", "ops", "valkey"} <= parts.keys():
            return state
        assert process.poll() is None, (home / "up.log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"{state}\n{(home / 'up.log').read_text()[-3000:]}"
        time.sleep(0.05)  # between two looks at another process


def test_up_gets_ready_refuses_company_and_drains_to_nothing(home: Path) -> None:
    with up(home) as process:
        state = wait_until_ready(home, process)
        assert all(state["parts"].values())
        pids = {sign.role: sign.pid for sign in read_all(home / "sales-push-data")}

        second = subprocess.run(
            [*PROGRAM, "up"], cwd=home, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert second.returncode == 1
        assert f"pid {process.pid}" in second.stderr
        assert "Traceback" not in second.stderr
        wait_until_ready(home, process)
        assert {sign.role: sign.pid for sign in read_all(home / "sales-push-data")} == pids, "it disturbed the first"

        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, (home / "up.log").read_text()[-3000:]

    left = [path.name for path in (home / "sales-push-data" / "run").iterdir()]
    assert left == ["up.lock"]
    assert not (home / "sales-push-data" / "policy.sock").exists()
    assert "privacy@example.com" not in (home / "up.log").read_text()


def test_after_a_killed_supervisor_the_next_one_adopts_the_server(home: Path) -> None:
    data = home / "sales-push-data"
    with up(home) as process:
        wait_until_ready(home, process)
        server = int((data / "valkey" / "valkey.pid").read_text())
        process.kill()
        process.wait(PATIENCE)
    with up(home) as process:
        wait_until_ready(home, process)
        assert int((data / "valkey" / "valkey.pid").read_text()) == server
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, (home / "up.log").read_text()[-3000:]
    assert not alive(server)
