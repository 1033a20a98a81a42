"""Processes: what a run starts, it ends, by pid; what is left of a killed run ends with it.

Law: no process is looked for by name. Each child leads a session of its own, so its CPU time is that of the session;
it gets SIGTERM when this process dies (PR_SET_PDEATHSIG), and stop() sends SIGTERM, then SIGKILL, to that pid.

A worker prints ``ready``, starts when it reads ``go``, prints one line of JSON, and ends when its input does: so its
CPU time can be read while it still is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_POLL: Final = 0.01
_LIBC: Final = ctypes.CDLL(None)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class RunError(Exception):
    """A peer could not be run to its end; the text says why, with the last lines of its log."""


def environment(**more: str) -> dict[str, str]:
    """Ours without an operator's variables; children import what this process imports."""
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith("SALES_PUSH_")}
    roots = [str(REPOSITORY), ours.get("PYTHONPATH", "")]
    return ours | {"PYTHONPATH": os.pathsep.join(root for root in roots if root)} | more


def _tie() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class Child:
    """A process with its output in folder/name.out and folder/name.err. Use with ``with``: it is stopped at the end."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        group: str | None = None,
        patience: float = 10.0,
    ) -> None:
        self._patience = patience
        self.name, self._out, self._err = name, folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                list(command), cwd=folder, env=dict(env) if env is not None else environment(),
                stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True, preexec_fn=_tie,
                user=user, group=group, extra_groups=[] if user is not None else None,
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self, deadline: float) -> None:
        """Raises RunError when it has ended or the time (monotonic) is over."""
        if (code := self.process.poll()) is not None:
            raise RunError(f"{self.name} ended with code {code}\n{self.last_words()}")
        if time.monotonic() > deadline:
            raise RunError(f"{self.name} took too long\n{self.last_words()}")

    def line(self, number: int, deadline: float) -> str:
        """A whole line of its output, waited for."""
        while True:
            whole = self._out.read_bytes().split(b"\n")[:-1]
            if len(whole) > number:
                return whole[number].decode("utf-8", "replace")
            self.check(deadline)
            time.sleep(_POLL)

    def wait(self, deadline: float) -> int:
        """Until it ends by itself: its code. Raises RunError when the time is over."""
        while (code := self.process.poll()) is None:
            self.check(deadline)
            time.sleep(_POLL)
        return code

    def output(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    def last_words(self, lines: int = 12) -> str:
        return "\n".join(self._err.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word.encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise RunError(f"{self.name} went away: {error.strerror}\n{self.last_words()}") from None

    def stop(self) -> None:
        """Safe to call twice."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        for number, seconds in ((signal.SIGTERM, self._patience), (signal.SIGKILL, 5.0)):
            if self.process.poll() is not None:
                break
            self.process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)


def result(worker: Child, deadline: float) -> dict[str, Any]:
    """What a worker says at its end."""
    told: dict[str, Any] = json.loads(worker.line(1, deadline))
    return told


def cpu_seconds(sessions: Sequence[int]) -> float:
    """User and system time of all processes in these sessions, with those they reaped (proc(5), fields 6, 14 to 17)."""
    wanted, ticks = set(sessions), 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[3]) in wanted:
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")
