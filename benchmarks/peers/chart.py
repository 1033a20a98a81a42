"""Chart: bars of medians with a line from least to most, as SVG written by hand. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_LEFT, _WIDTH, _ROW, _TOP, _BAR = 380, 510, 34, 64, 20
_STYLE: Final = (
    "text{font:13px sans-serif;fill:#1c2b33}.t{font-size:16px;font-weight:bold}.n{fill:#5b6770;font-size:12px}"
    ".o{fill:#12343b}.p{fill:#b3a394}.w{stroke:#1c2b33;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#e8e4dc}.n{fill:#a9b2b8}.o{fill:#5fb3bf}.p{fill:#8a7f73}"
    ".w{stroke:#e8e4dc}}"
)


@dataclass(frozen=True, slots=True)
class Bar:
    """least, median, most: messages a second; note: beside the number; ours: drawn in our colour."""

    label: str
    least: float
    median: float
    most: float
    note: str = ""
    ours: bool = False


def svg(title: str, caption: str, bars: Sequence[Bar]) -> str:
    """The whole document. The scale begins at 0 and ends at the largest `most`."""
    full = max((bar.most for bar in bars), default=0.0) or 1.0
    height = _TOP + _ROW * len(bars) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1080" height="{height}" viewBox="0 0 1080 {height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="t" x="16" y="26">{escape(title)}</text>',
        f'<text class="n" x="16" y="46">{escape(caption)}</text>',
    ]
    for number, bar in enumerate(bars):
        y = _TOP + number * _ROW
        at = {name: _LEFT + _WIDTH * getattr(bar, name) / full for name in ("least", "median", "most")}
        middle = y + _BAR / 2
        lines += [
            f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect class="{"o" if bar.ours else "p"}" x="{_LEFT}" y="{y}" width="{at["median"] - _LEFT:.1f}" '
            f'height="{_BAR}" rx="2"/>',
            f'<line class="w" x1="{at["least"]:.1f}" x2="{at["most"]:.1f}" y1="{middle:g}" y2="{middle:g}"/>',
            f'<text x="{max(at["most"], at["median"]) + 8:.1f}" y="{y + 15}">{bar.median:,.0f}'
            f'<tspan class="n"> {escape(bar.note)}</tspan></text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
