"""Ours: the whole product, as `sales-push bench` runs it, a process like the peers; its last line is the figure.

It does more than a peer does: intake, queue, consent, personalisation, link tracking, journal and ledger are in.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.processes import Child, RunError, environment

_START_SECONDS = 60.0


def run(folder: Path, recipients: int, patience: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of one run. folder: where it makes its own temporary one. Raises RunError."""
    command = [
        sys.executable, "-c", "from engine.cli import main; main()", "bench", "--json",
        "--recipients", str(recipients), "--deadline", str(patience), *options,
    ]  # fmt: skip
    with Child("ours", command, folder, env=environment(TMPDIR=str(folder))) as child:
        deadline = time.monotonic() + patience + _START_SECONDS
        while child.process.poll() is None:
            child.check(deadline)
            time.sleep(0.1)
        return read(child.output(), child.last_words())


def read(output: str, trouble: str = "") -> dict[str, Any]:
    """The last line of JSON. Raises RunError when there is none or it says that something is wrong."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    try:
        figures: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        figures = {}
    if not figures.get("ok") or not figures.get("messages_per_second"):
        raise RunError(f"sales-push bench did not end well\n{trouble}")
    return figures
