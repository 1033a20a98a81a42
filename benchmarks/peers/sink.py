"""Sink: our own (engine.rehearsal.server), a new process for each run, and what it counted.

The same program the journey is measured with; its wall clock is this machine's, so that "last message taken" minus
"first byte sent" is one subtraction.
"""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.processes import Child, RunError

_LOOK_SECONDS: Final = 0.05  # an answer costs the sink some 50 us


@dataclass(frozen=True, slots=True)
class Taken:
    """messages: accepted; unique: (Message-ID, recipient) pairs; first_at, last_at: seconds since the epoch."""

    messages: int
    unique: int
    first_at: float
    last_at: float
    cpu_seconds: float


class Sink:
    """Use: ``with Sink(folder, keep) as sink``; sink.port, sink.wait(count, ...), sink.kept()."""

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self._kept = folder / "kept"
        self._child = Child(
            "sink",
            [
                sys.executable, "-m", "engine.rehearsal.server", "--provider", "accept",
                "--keep", str(keep), "--keep-dir", str(self._kept),
            ],
            folder,
        )  # fmt: skip
        try:
            told = json.loads(self._child.line(0, time.monotonic() + 30))
        except BaseException:
            self._child.stop()
            raise
        self.port, self._control = int(told["ports"]["accept"]), int(told["control"])

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def taken(self) -> Taken:
        with socket.create_connection(("127.0.0.1", self._control), timeout=30) as control:
            control.sendall(b"counts\n")
            with control.makefile("rb") as answers:
                counts: dict[str, Any] = json.loads(answers.readline())
        mine = counts["providers"]["accept"]
        return Taken(
            int(mine["accepted"]), int(mine["unique"]), mine["first_at"], mine["last_at"], counts["cpu_seconds"]
        )

    def wait(self, count: int, deadline: float, alive: list[Child]) -> Taken:
        """Until `count` messages were taken. Raises RunError when somebody ends before, or the time is over."""
        while True:
            taken = self.taken()
            if taken.messages >= count:
                if taken.messages > count or taken.unique != count:
                    raise RunError(f"the sink took {taken.messages} messages, {taken.unique} of them distinct")
                return taken
            if time.monotonic() > deadline:
                words = "\n".join(child.last_words() for child in alive)
                raise RunError(f"{taken.messages} of {count} messages arrived in time\n{words}")
            for child in (self._child, *alive):
                child.check(math.inf)
            time.sleep(_LOOK_SECONDS)

    def kept(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self._kept.glob("*.eml"))]
