"""What a rehearsal shows while it runs: one line an act, a table that moves on a terminal, plain lines elsewhere.

Law: no address is printed but those of the invented people whose story is told. Output to a file or a pipe has no
control characters and at most one line of progress in two seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.rehearsal.findings import Tally, total

NAMES: Final[Mapping[str, str]] = {
    "accept": "Posthaus: accepts",
    "limit": "Tollgate: 421 above its limits",
    "greylist": "Patience: greylists for 3 s",
    "unknown": "Strict: refuses unknown users",
    "slow": "Snail: answers slowly",
    "(no address)": "rows that are no address",
}
_PLAIN_SECONDS: Final = 2.0
_WIDTH: Final = 24


class Screen:
    """One rehearsal's output. console: a terminal moves, anything else gets lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def act(self, text: str) -> None:
        """A new act begins."""
        self.console.print(Text.assemble((f"{self.seconds:6.1f} s  ", "dim"), (text, "bold")), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(f"          {text}"), soft_wrap=True)

    def verbatim(self, text: str) -> None:
        """Somebody else's output, as it is."""
        self.console.print(Text(text.rstrip()), soft_wrap=True)

    def trouble(self, text: str) -> None:
        self.console.print(Text(text.rstrip(), style="bold red"), soft_wrap=True)

    def outcome(self, rows: Mapping[str, int], found: Mapping[str, Tally]) -> None:
        """The table of outcomes. rows: submitted by behaviour."""
        self.console.print(_table(rows, found, bars=False))

    def progress(self, rows: Mapping[str, int]) -> Progress:
        return Progress(self, rows)


class Progress:
    """``with screen.progress(rows) as progress: progress.show(found)``, as often as there is news."""

    def __init__(self, screen: Screen, rows: Mapping[str, int]) -> None:
        self._screen = screen
        self._rows = rows
        self._last = ""
        self._next = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._screen.console.is_terminal:
            self._live = Live(_table(self._rows, {}), console=self._screen.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: object, ___: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, found: Mapping[str, Tally]) -> None:
        if self._live is not None:
            self._live.update(_table(self._rows, found), refresh=True)
            return
        now = time.monotonic()
        line = _line(total(found), sum(self._rows.values()))
        if now < self._next or line == self._last:
            return
        self._last, self._next = line, now + _PLAIN_SECONDS
        self._screen.act(line)


def _line(whole: Tally, submitted: int) -> str:
    ended = ", ".join(f"{kind} {n:,}" for kind, n in sorted(whole.counts.items()) if n)
    return f"{whole.ended:,} of {submitted:,}: {ended or 'nothing ended yet'}; put off {whole.deferrals:,} times"


def _table(rows: Mapping[str, int], found: Mapping[str, Tally], *, bars: bool = True) -> Table:
    table = Table(show_footer=True, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    whole = total(found)
    submitted = sum(rows.values())
    table.add_column("provider", footer="together")
    if bars:
        table.add_column("", footer=_bar(whole.ended, submitted))
    figures = {
        "submitted": submitted,
        "delivered": whole["delivered"],
        "refused": whole["refused"],
        "bounced": whole["bounced"],
        "expired": whole["expired"],
        "waiting": max(0, submitted - whole.ended),
        "attempts put off": whole.deferrals,
    }
    for name, n in figures.items():
        table.add_column(name, footer=f"{n:,}", justify="right")
    for home, n in rows.items():
        tally = found.get(home, Tally())
        cells = [NAMES.get(home, home), *([_bar(tally.ended, n)] if bars else []), f"{n:,}"]
        cells += [f"{tally[kind]:,}" for kind in ("delivered", "refused", "bounced", "expired")]
        table.add_row(*cells, f"{max(0, n - tally.ended):,}", f"{tally.deferrals:,}")
    return table


def _bar(done: int, whole: int) -> str:
    full = round(_WIDTH * done / whole) if whole else 0
    return "█" * min(_WIDTH, full) + "░" * max(0, _WIDTH - full)
