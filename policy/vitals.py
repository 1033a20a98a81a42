"""What a running process says about itself to the metrics endpoint of its host: numbers, never a person.

Promise: no metric holds an address or anything that can be tested against one (design decision 13). This room is the
choke point: a name or a label outside ``[A-Za-z0-9_.:-]`` is our mistake and raises `VitalsError`, so that an ``@``
can never reach a label. That question, asked of every floor, is why the room lies on the ground floor.

Path: 1. a role makes `Vitals(data_dir, "engine", 0)`; 2. every `BEAT_SECONDS` it hands in its frozen ``statistics()``
(`publish`, or the loop `beat`); 3. one JSON file ``data_dir/run/<role>-<index>.json`` is replaced atomically; 4. ops
of the host reads them all (`read_all`) when it is scraped; 5. a role that ends in order takes its file away
(`withdraw`): a file that grows old is a process that died or hangs.

Files and not Redis, because metrics are wanted most when Redis is away. Nothing here outlives the process for long:
retention R0, no personal data.

Known limits: one level of nesting (a counter by one label); at most `MOST_LABELS` labels a counter, the rest is summed
under "other" so that a campaign to 30,000 domains cannot blow up the exporter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

BEAT_SECONDS = 2.0  # seven missed beats are the 15 s after which ops calls a process stale
MOST_LABELS = 50  # Prometheus: a label with more values than that costs more than it tells
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_LABEL = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

Number: TypeAlias = int | float
Statistics: TypeAlias = Mapping[str, Number | Mapping[str, Number]]


class VitalsError(Exception):
    """A statistic that must not leave the process: bad name or label. The text names the field, not the label."""


class Sign(msgspec.Struct, frozen=True):
    """One process as last heard of. at: seconds since the epoch; numbers: name -> value or label -> value."""

    role: str
    index: int
    pid: int
    at: float
    numbers: dict[str, float | dict[str, float]]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Sign)


def run_dir(data_dir: Path) -> Path:
    """The folder of what lives only as long as processes do: locks, pids, vitals."""
    return data_dir / "run"


def plain(statistics: Statistics) -> dict[str, float | dict[str, float]]:
    """Check and cap what a loop says: names ``[a-z][a-z0-9_]*``, labels without ``@`` or spaces. Raises VitalsError."""
    numbers: dict[str, float | dict[str, float]] = {}
    for name, value in statistics.items():
        if not _NAME.fullmatch(name):
            raise VitalsError(f"{name[:40]!r} is no name for a statistic")
        numbers[name] = _labelled(name, value) if isinstance(value, Mapping) else float(value)
    return numbers


def _labelled(name: str, values: Mapping[str, Number]) -> dict[str, float]:
    if not all(_LABEL.fullmatch(label) for label in values):
        raise VitalsError(f"a label of {name} is not made of letters, digits and _ . : -")
    if len(values) <= MOST_LABELS:
        return {label: float(value) for label, value in values.items()}
    ranked = sorted(values.items(), key=lambda pair: -pair[1])
    kept = {label: float(value) for label, value in ranked[: MOST_LABELS - 1] if label != "other"}
    kept["other"] = float(sum(values.values())) - sum(kept.values())
    return kept


class Vitals:
    """The file of one process. Not thread-safe: one loop writes it."""

    def __init__(self, data_dir: Path, role: str, index: int = 0) -> None:
        if not _NAME.fullmatch(role):
            raise VitalsError(f"{role[:40]!r} is no name for a role")
        self.role = role
        self.index = index
        self.path = run_dir(data_dir) / f"{role}-{index}.json"

    def __repr__(self) -> str:
        return f"<Vitals {self.role}-{self.index}>"

    def publish(self, statistics: Statistics, at: float) -> None:
        """Replace the file. at: seconds since the epoch. Raises VitalsError, OSError."""
        sign = Sign(self.role, self.index, os.getpid(), at, plain(statistics))
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}.new")
        draft.write_bytes(_encoder.encode(sign))
        draft.replace(self.path)

    def withdraw(self) -> None:
        """Take the file away: this process ends in order."""
        self.path.unlink(missing_ok=True)

    async def beat(self, statistics: Callable[[], Statistics], clock: Callable[[], float]) -> None:
        """Publish every BEAT_SECONDS until cancelled, then withdraw. A full disk costs figures, never the role."""
        try:
            while True:
                with contextlib.suppress(OSError):
                    self.publish(statistics(), clock())
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            with contextlib.suppress(OSError):
                self.withdraw()


def read_all(data_dir: Path) -> list[Sign]:
    """What every process of this host said last, sorted by role and index. Files that make no sense are left out."""
    signs: list[Sign] = []
    for path in run_dir(data_dir).glob("*-*.json"):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            signs.append(_decoder.decode(path.read_bytes()))
    return sorted(signs, key=lambda sign: (sign.role, sign.index))
