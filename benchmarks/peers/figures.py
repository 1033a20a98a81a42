"""Figures: from runs to medians, ratios by pairs, a table and the last line. Pure.

Law: a ratio is ours over peer of two neighbouring runs, never of two medians: a shared machine drifts, and neighbours
drift together. The ratio of a peer is the median of its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from benchmarks.peers.peer import Run, Setting

NAMES: Final = (
    "postfix", "postfix_drain", "postfix_tmpfs", "postfix_tmpfs_drain", "nodemailer", "aiosmtplib_dkimpy",
    "aiosmtplib_cryptography",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """ours: messages a second of the run before the peer's."""

    ours: float
    peer: Run

    @property
    def ratio(self) -> float:
        return self.ours / self.peer.rate if self.peer.rate > 0 else 0.0


@dataclass(slots=True)
class Entry:
    """One peer in the contest. probes: setting and rate; setting: the best of them; trouble: why it was given up."""

    name: str
    title: str
    version: str
    probes: list[tuple[Setting, float]] = field(default_factory=list)
    setting: Setting = field(default_factory=dict)
    count: int = 0
    pairs: list[Pair] = field(default_factory=list)
    trouble: str = ""


def spread(values: Sequence[float], digits: int = 1) -> tuple[float, float, float] | None:
    """Least, median, most; None of nothing."""
    if not values:
        return None
    return round(min(values), digits), round(median(values), digits), round(max(values), digits)


def best(probes: Sequence[tuple[Setting, float]]) -> tuple[Setting, float]:
    """The fastest; of equals the first."""
    return max(probes, key=lambda probe: probe[1])


def count_for(rate: float, seconds: float, least: int, most: int) -> int:
    """How many messages take about `seconds` at that rate, within bounds."""
    return max(min(least, most), min(most, round(rate * seconds)))


def words(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def summary(
    entries: Sequence[Entry],
    ours: Sequence[Mapping[str, Any]],
    rsa: Sequence[float],
    skipped: Mapping[str, str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The last line. Every peer has a key <name>_ratio: None when it was not timed."""
    rates = [float(run["messages_per_second"]) for run in ours]
    peers: dict[str, Any] = {
        "ours": {
            "messages_per_second": spread(rates),
            "cpu_us_per_message": spread([float(run.get("cpu_us_per_message", 0.0)) for run in ours]),
            "rsa_share": spread([float(run.get("rsa_share", 0.0)) for run in ours], 4),
        }
    }
    ratios: dict[str, list[float]] = {}
    for entry in entries:
        runs = [pair.peer for pair in entry.pairs]
        peers[entry.name] = {
            "version": entry.version,
            "setting": dict(entry.setting),
            "probes": [[dict(setting), round(rate, 1)] for setting, rate in entry.probes],
            "messages": entry.count,
            "messages_per_second": spread([run.rate for run in runs]),
            "messages_per_second_at_sink": spread([run.messages / run.window for run in runs if run.window > 0]),
            "cpu_us_per_message": spread([run.cpu_us for run in runs]),
        }
        if entry.trouble:
            peers[entry.name]["trouble"] = entry.trouble
        ratios[entry.name] = [round(pair.ratio, 3) for pair in entry.pairs]
    return {
        **about,
        "peers": peers,
        "ratios": ratios,
        **{f"{name}_ratio": _middle(ratios.get(name, ())) for name in NAMES},
        "rsa_per_second_one_core": spread(rsa),
        "skipped": dict(skipped),
        "ok": not any(entry.trouble for entry in entries),
    }


def _middle(values: Sequence[float]) -> float | None:
    return round(median(values), 3) if values else None


def table(entries: Sequence[Entry], ours: Sequence[Mapping[str, Any]]) -> str:
    """For people: a line for ours and for each peer that was timed."""
    rows = [("", "messages/s", "[least, most]", "CPU us", "ours is", "[least, most]", "setting")]
    rates = [float(run["messages_per_second"]) for run in ours]
    rows.append(("sales-push", *_cells(rates), _cpu([float(r.get("cpu_us_per_message", 0)) for r in ours]), "", "", ""))
    for entry in entries:
        runs = [pair.peer for pair in entry.pairs]
        ratios = [pair.ratio for pair in entry.pairs]
        times = (f"{median(ratios):.2f} x", f"[{min(ratios):.2f}, {max(ratios):.2f}]") if ratios else ("", "")
        cells = _cells([run.rate for run in runs])
        rows.append((entry.title, *cells, _cpu([run.cpu_us for run in runs]), *times, words(entry.setting)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _cells(rates: Sequence[float]) -> tuple[str, str]:
    return (f"{median(rates):,.0f}", f"[{min(rates):,.0f}, {max(rates):,.0f}]") if rates else ("-", "")


def _cpu(values: Sequence[float]) -> str:
    return f"{median(values):,.0f}" if values else ""
