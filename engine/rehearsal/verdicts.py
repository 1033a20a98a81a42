"""The benchmark's table: what one reads first, a column a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

_NUMBER: Final[Callable[[Any], str]] = "{:,.0f}".format
_ROWS: Final[Sequence[tuple[str, str, Callable[[Any], str]]]] = (
    ("messages/s, by the sink's count", "messages_per_second", _NUMBER),
    ("messages/s, first XADD to last ledger row", "journey_per_second", _NUMBER),
    ("share of what all cores sign (RSA-2048)", "rsa_share", "{:.1%}".format),
    ("one RSA-2048 signature, µs of CPU", "rsa_us", _NUMBER),
    ("CPU a message, µs, all our processes", "cpu_us_per_message", _NUMBER),
    ("engine's CPU in signatures", "cpu_per_rsa", "{:.2f}".format),
    ("all CPU in signatures, last 100,000", "tail_cpu_per_rsa", "{:.2f}".format),
    ("sink's CPU a message, µs", "sink_cpu_us", _NUMBER),
    ("XADD to 250, half of them within ms", "p50_ms", _NUMBER),
    ("XADD to 250, 99 % of them within ms", "p99_ms", _NUMBER),
    ("ledger behind at most, s", "ledger_lag", "{:.1f}".format),
    ("accepted by the sink", "sink_count", _NUMBER),
    ("bounced", "bounced", _NUMBER),
    ("put off", "deferrals", _NUMBER),
)


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """runs: as bench.figures gives them."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column("")
    for run in runs:
        made.add_column(f"{run['recipients']:,}", justify="right")
    for title, key, shown in _ROWS:
        made.add_row(title, *("-" if run[key] is None else shown(run[key]) for run in runs))
    parts = sorted({part for run in runs for part in run["cpu_us_by_part"]})
    for part in parts:
        made.add_row(f"  CPU of {part}, µs", *(_NUMBER(run["cpu_us_by_part"].get(part, 0.0)) for run in runs))
    names = sorted({name for run in runs for name in run["memory_peak_mb"]})
    for name in names:
        made.add_row(
            f"  memory of {name} at most, MB", *(_NUMBER(run["memory_peak_mb"].get(name, 0.0)) for run in runs)
        )
    return made
