"""What is looked at while a benchmark runs, once a second: the sink's count, CPU by part, memory by process, lag.

Law: a look costs a few milliseconds of the benchmark's own CPU and asks the ledger nothing; whatever is computed from
the samples is computed afterwards.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from engine.rehearsal.machine import Use, use_of
from engine.rehearsal.stage import Stage
from policy.vitals import read_all

SECONDS: Final = 1.0
TAIL: Final = 100_000  # messages: the last part of a long run, compared with a run of that size


@dataclass(frozen=True, slots=True)
class Sample:
    """at: monotonic seconds; accepted: by the sink so far; sink_cpu: its seconds; lag: of the ledger's writer, s."""

    at: float
    accepted: int
    use: Use
    sink_cpu: float
    lag: float


@dataclass(slots=True)
class Samples:
    """In the order they were taken; rsa: (monotonic seconds, signatures a second of CPU)."""

    taken: list[Sample] = field(default_factory=list)
    rsa: list[tuple[float, float]] = field(default_factory=list)

    def rsa_rate(self, first: Sample, last: Sample) -> float:
        """The median of what was measured between them; of everything, before and after too, when nothing was. 0.0
        without samples."""
        rates = [rate for at, rate in self.rsa if first.at <= at <= last.at] or [rate for _, rate in self.rsa]
        return statistics.median(rates) if rates else 0.0

    def between(self, first: Sample, last: Sample) -> dict[str, float]:
        """CPU microseconds a message by part."""
        messages = max(1, last.accepted - first.accepted)
        spent = {part: seconds - first.use.cpu.get(part, 0.0) for part, seconds in last.use.cpu.items()}
        return {part: max(0.0, seconds) / messages * 1e6 for part, seconds in sorted(spent.items())}

    def tail(self, messages: int = TAIL) -> tuple[Sample, Sample]:
        """From the sample with which the last `messages` begin, to the last."""
        last = self.taken[-1]
        return next(one for one in reversed(self.taken) if _is_before(one, last, messages, self.taken[0])), last

    def peak(self) -> dict[str, float]:
        """Resident MB at most, by process."""
        found: dict[str, float] = {}
        for sample in self.taken:
            for name, value in sample.use.peak.items():
                found[name] = max(found.get(name, 0.0), value)
        return dict(sorted(found.items()))

    def memory(self, part: str, points: int = 10) -> list[float]:
        """Resident MB of all processes of a part together, at evenly spread samples: does it grow?"""
        sums = [
            round(sum(value for name, value in sample.use.memory.items() if name.startswith(f"{part}-")), 1)
            for sample in self.taken
        ]
        return spread(sums, points)


def _is_before(one: Sample, last: Sample, messages: int, first: Sample) -> bool:
    return one is first or last.accepted - one.accepted >= messages


def spread(values: Sequence[float], points: int) -> list[float]:
    """At most `points` of them, first and last included."""
    if len(values) <= points:
        return list(values)
    return [values[round(n * (len(values) - 1) / (points - 1))] for n in range(points)]


async def look(stage: Stage) -> Sample:
    counts: dict[str, Any] = await stage.counts()
    lag = max((float(_plain(sign.numbers.get("ledger_lag_seconds"))) for sign in read_all(stage.data)), default=0.0)
    return Sample(
        at=time.monotonic(),
        accepted=int(counts["accepted"]),
        use=use_of(stage.pids[0]),
        sink_cpu=float(counts["cpu_seconds"]),
        lag=lag,
    )


def _plain(value: float | dict[str, float] | None) -> float:
    return value if isinstance(value, float | int) else 0.0


async def keep_looking(stage: Stage, samples: Samples) -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(SECONDS)
        samples.taken.append(await look(stage))
