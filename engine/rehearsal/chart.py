"""The chart of a benchmark: messages a second over time, and CPU by part a message, drawn by hand as SVG.

Law: the file is whole in itself (no script, no font, no address of anybody) and readable on light and dark grounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from engine.rehearsal.samples import Samples

_COLOURS: Final = {
    "engine": "#2f6f8f",
    "policy": "#c98a2b",
    "valkey": "#b3541e",
    "tracker": "#6a994e",
    "ops": "#8a6fa8",
    "supervisor": "#7c8490",
    "sink": "#b9c2cc",
}
_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _FOOT = 960.0, 300.0, 64.0, 20.0, 44.0, 36.0


def rates(samples: Samples, points: int = 120) -> list[tuple[float, float]]:
    """(seconds since the first sample, messages a second since the point before), at most `points` of them."""
    taken = samples.taken
    if len(taken) < 2:
        return []
    step = max(1, -(-(len(taken) - 1) // points))
    chosen = [*taken[:-1:step], taken[-1]]
    return [
        (b.at - taken[0].at, (b.accepted - a.accepted) / (b.at - a.at))
        for a, b in itertools.pairwise(chosen)
        if b.at > a.at
    ]


def svg(title: str, samples: Samples, cpu: Mapping[str, float], rsa_limit: float) -> str:
    """cpu: microseconds a message by part, the sink included; rsa_limit: signatures a second of all cores."""
    parts = [_line_chart(rates(samples), rsa_limit), _bars(cpu)]
    high = 2 * _HIGH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE:g} {high:g}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="#6b7280"><title>{escape(title)}</title>'
        f'<text x="{_LEFT:g}" y="24" font-size="16" font-weight="bold">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _line_chart(points: Sequence[tuple[float, float]], limit: float) -> str:
    longest = max((at for at, _ in points), default=1.0) or 1.0
    digits = 1 if longest < 10 else 0
    top = _round_up(max([limit, *(rate for _, rate in points)], default=1.0))

    def x(at: float) -> float:
        return _LEFT + (_WIDE - _LEFT - _RIGHT) * at / longest

    def y(rate: float) -> float:
        return _TOP + (_HIGH - _TOP - _FOOT) * (1 - rate / top)

    drawn = [
        f'<line x1="{_LEFT:g}" x2="{_WIDE - _RIGHT:g}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#9aa1ab" '
        f'stroke-opacity="0.3"/><text x="{_LEFT - 8:g}" y="{y(v) + 4:.1f}" text-anchor="end">{v:,.0f}</text>'
        for v in (0.0, top / 4, top / 2, 3 * top / 4, top)
    ]
    drawn += [
        f'<text x="{x(at):.1f}" y="{_HIGH - 12:g}" text-anchor="{anchor}">{at:,.{digits}f} s</text>'
        for at, anchor in zip(
            (longest * n / 4 for n in range(5)), ("start", "middle", "middle", "middle", "end"), strict=True
        )
    ]
    line = " ".join(f"{x(at):.1f},{y(rate):.1f}" for at, rate in points)
    drawn.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS["engine"]}" stroke-width="2.5"/>')
    if limit:
        drawn.append(
            f'<line x1="{_LEFT:g}" x2="{_WIDE - _RIGHT:g}" y1="{y(limit):.1f}" y2="{y(limit):.1f}" stroke="#b3541e" '
            f'stroke-dasharray="6 4"/><text x="{_WIDE - _RIGHT:g}" y="{y(limit) - 6:.1f}" text-anchor="end" '
            f'fill="#b3541e">what all cores sign: {limit:,.0f}/s</text>'
        )
    drawn.append(f'<text x="{_LEFT:g}" y="{_TOP - 4:g}">messages a second</text>')
    return "".join(drawn)


def _bars(cpu: Mapping[str, float]) -> str:
    ordered = sorted(((part, value) for part, value in cpu.items() if value > 0), key=lambda pair: -pair[1])
    most = max((value for _, value in ordered), default=1.0)
    room = (_HIGH - 40) / max(1, len(ordered))
    drawn = [f'<text x="{_LEFT:g}" y="{_HIGH + 16:g}">CPU by part, microseconds a message</text>']
    for place, (part, value) in enumerate(ordered):
        at = _HIGH + 28 + place * room
        wide = (_WIDE - _LEFT - 220) * value / most
        drawn.append(
            f'<text x="{_LEFT + 80:g}" y="{at + room / 2 + 4:.1f}" text-anchor="end">{escape(part)}</text>'
            f'<rect x="{_LEFT + 90:g}" y="{at + 3:.1f}" width="{max(1.0, wide):.1f}" height="{max(4.0, room - 8):.1f}" '
            f'fill="{_COLOURS.get(part, "#7c8490")}"/>'
            f'<text x="{_LEFT + 98 + wide:.1f}" y="{at + room / 2 + 4:.1f}">{value:,.0f}</text>'
        )
    return "".join(drawn)


def _round_up(value: float) -> float:
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0) if step * power >= value)
