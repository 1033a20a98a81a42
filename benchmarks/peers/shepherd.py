"""Shepherd: runs a program that must not outlive us although it sheds PR_SET_PDEATHSIG, as Postfix's master does when
it changes its user.

    python -m benchmarks.peers.shepherd PROGRAM [ARGUMENT ...]

First it says when it starts the program, in seconds since the epoch, so that its own start (some 50 ms of Python) is
in nobody's figures. The program leads a process group of its own (master tells its children by that). When our input
ends (who started us is gone, however it ended) or SIGTERM comes, it gets SIGTERM, and after ten seconds, or when it is
gone, its whole group SIGKILL. Exit code: the program's; 1 when it ended by a signal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from typing import Final

_POLL_SECONDS: Final = 0.05
_PATIENCE_SECONDS: Final = 10.0


def main() -> int:
    ended = False

    def stop(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, stop)
    print(time.time(), flush=True)
    flock = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    try:
        while flock.poll() is None and not ended:
            readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
            ended = ended or bool(readable and not os.read(sys.stdin.fileno(), 64))
        if flock.poll() is None:
            flock.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                flock.wait(_PATIENCE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(flock.pid, signal.SIGKILL)
        flock.wait()
    return max(flock.returncode, 0) if ended or flock.returncode >= 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
