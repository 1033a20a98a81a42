"""Peer: what the contest asks of each: is it there, which settings, one run, and how it was configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.peers.signing import Key

Setting = Mapping[str, int]  # such as {"connections": 20}; what it means is the peer's


class Missing(Exception):
    """Something the peer needs is not installed; the text names the package."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run happens. corpus: folder of the corpus; key: the DKIM key; patience: seconds a run may take."""

    folder: Path
    corpus: Path
    key: Key
    patience: float


@dataclass(frozen=True, slots=True)
class Run:
    """seconds: from the first byte or call to the last message at the sink; window: from the first to the last there;
    cpu_us, sink_cpu_us: CPU time a message, of the peer's processes and of the sink; samples: as the sink took them."""

    messages: int
    seconds: float
    window: float
    cpu_us: float
    sink_cpu_us: float
    samples: Sequence[bytes] = ()

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds if self.seconds > 0 else 0.0


class Peer(Protocol):
    """name: as in the figures; title: for people; settings: those that are probed."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def settings(self) -> Sequence[Setting]: ...

    def look(self) -> str:
        """Version; raises Missing."""
        ...

    def run(self, place: Place, setting: Setting, count: int, keep: int = 0) -> Run:
        """The first `count` messages of the corpus. keep: samples wanted. Raises RunError."""
        ...

    def configuration(self, setting: Setting) -> dict[str, str]:
        """File name -> what the peer was given, for the results."""
        ...
