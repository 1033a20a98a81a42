"""What the machine gives and what processes take of it, read from /proc: CPU time, memory, and the rate of RSA.

Law: CPU time is user and system time of a process with the children it has reaped; the rate of RSA is signatures a
second of CPU time, not of the clock, so that it can be taken while every core is busy: 40 ms of work each time.

The rate is OpenSSL's through `cryptography`, whatever the engine signs with: it is the unit that figures of different
machines, and of one machine at different minutes, are compared in.

Known limits: Linux only (0 elsewhere); a child that ends and is started again within a run takes its time with it; a
core that shares its units with a busy neighbour (SMT) signs slower for the same CPU time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SLICE_SECONDS: Final = 0.04  # of CPU a sample: half a percent of one core, sampled every 10 s
EVERY_SECONDS: Final = 10.0
_ROOT: Final = str(Path(__file__).resolve().parents[2])


@dataclass(slots=True)
class Use:
    """cpu: seconds by part; memory, peak: resident MB by process, now and at most."""

    cpu: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    def total(self) -> float:
        return sum(self.cpu.values())


def use_of(root: int) -> Use:
    """Of a process and all that descend from it now. A part is the role in the command line (``run engine``), else the
    name of the program; a process is its part and its place among its like, ``engine-0``."""
    ticks = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.parent.name)
        parents[pid] = int(fields[1])  # proc(5): state, ppid, …; utime, stime, cutime, cstime are fields 14 to 17
        used[pid] = sum(int(field) for field in fields[11:15])
    found = Use()
    level = {root} & used.keys()
    while level:
        for pid in sorted(level):
            part = _part(pid)
            found.cpu[part] = found.cpu.get(part, 0.0) + used[pid] / ticks
            name = f"{part}-{sum(one.startswith(f'{part}-') for one in found.memory)}"
            found.memory[name], found.peak[name] = _memory(pid)
        level = {pid for pid, parent in parents.items() if parent in level}
    return found


def cpu_seconds(root: int) -> dict[str, float]:
    """By part, as `use_of`."""
    return use_of(root).cpu


def _part(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return "gone"
    if "run" in words[:-1]:
        return words[words.index("run") + 1]
    return "valkey" if "server" in words[0] else "supervisor"


def _memory(pid: int) -> tuple[float, float]:
    found = {"VmRSS": 0.0, "VmHWM": 0.0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = round(int(value.split()[0]) / 1024, 1)  # kB
    except OSError:
        pass
    return found["VmRSS"], found["VmHWM"]


# --- the rate of RSA ----------------------------------------------------------------------------------------------


class Signing:
    """RSA-2048 by the library the engine signs with; the key is made once."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

        key = rsa.generate_private_key(65537, 2048)
        digest, prehashed, scheme = os.urandom(32), utils.Prehashed(hashes.SHA256()), padding.PKCS1v15()
        self._sign: Callable[[], bytes] = lambda: key.sign(digest, scheme, prehashed)
        self._sign()

    def rate(self, seconds: float) -> float:
        """Signatures a second of this thread's CPU time, taken over `seconds` of it."""
        began, count = time.thread_time(), 0
        while (taken := time.thread_time() - began) < seconds:
            for _ in range(10):
                self._sign()
            count += 10
        return count / taken


def rsa_rate(seconds: float = 1.0) -> float:
    """RSA-2048 signatures a second of one core."""
    return Signing().rate(seconds)


class RsaClock:
    """``async with RsaClock() as clock: await clock.sample()``: a child that signs only when it is asked to.

    samples: (monotonic seconds, signatures a second of CPU). The child ends with its standard input.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> RsaClock:
        paths = os.pathsep.join(path for path in (_ROOT, os.environ.get("PYTHONPATH", "")) if path)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "engine.rehearsal.machine", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5.0)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def sample(self, seconds: float = SLICE_SECONDS) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"%f\n" % seconds)
        await self._process.stdin.drain()
        rate = float(json.loads(await self._process.stdout.readline()))
        self.samples.append((time.monotonic(), rate))
        return rate

    async def keep_time(self) -> None:
        """A sample after 2 s and then every 10 s, until cancelled."""
        await asyncio.sleep(2.0)
        while True:
            await self.sample()
            await asyncio.sleep(EVERY_SECONDS)


def _answer() -> None:
    signing = Signing()
    for line in sys.stdin:
        print(signing.rate(float(line)), flush=True)


if __name__ == "__main__":
    _answer()
