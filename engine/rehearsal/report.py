"""report.html: what came of a rehearsal, on one page that needs nothing else.

Promise: one file, no script, no font, no picture from anywhere: charts are SVG drawn here, colours follow the reader's
light or dark setting. Everything that came from outside is escaped. The only addresses on it are those of the invented
people whose story is told.

Known limits: charts show at most `SPANS` spans of time; a rehearsal of hours would want a coarser pen.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from engine.rehearsal import findings
from engine.rehearsal.screen import NAMES

if TYPE_CHECKING:
    from engine.rehearsal.outcome import Outcome

SPANS: Final = 120
_COLOURS: Final[Mapping[str, str]] = {
    "accept": "var(--c1)",
    "limit": "var(--c2)",
    "greylist": "var(--c3)",
    "unknown": "var(--c4)",
    "slow": "var(--c5)",
}
_KINDS: Final[Mapping[str, str]] = {
    "delivered": "var(--good)",
    "bounced": "var(--bad)",
    "refused": "var(--held)",
    "expired": "var(--c5)",
    "unknown": "var(--c2)",
}
# Visitor classes by their number (tracker.visitors): the engine enters the tracker through its links only.
_VISITORS: Final = ((0, "not known"), (15, "mail services' proxies"), (31, "machines"), (63, "people, likely"))

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #f6f4ef; --card: #ffffff; --ink: #1d2528; --soft: #667074;
  --line: #e2ded4; --good: #2c7a5b; --bad: #b3413a; --held: #c99a2e;
  --c1: #2c7a5b; --c2: #c4622d; --c3: #3d6fa8; --c4: #8a4f9e; --c5: #8d8a3a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14191b; --card: #1d2427; --ink: #e8e6e0; --soft: #98a3a7;
  --line: #313a3e; --good: #5fb98f; --bad: #e0766d; --held: #e0b954;
  --c1: #5fb98f; --c2: #e88f5c; --c3: #7aa9dd; --c4: #c08ad2; --c5: #bcb95f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.panel { overflow-x: auto; }
.card b { display: block; font-size: 26px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 13px; }
td, th { padding: 6px 10px; border-bottom: 1px solid var(--line); } td { text-align: right; }
td:first-child, th:first-child { text-align: left; padding-left: 0; } tr:last-child td { border-bottom: 0; }
tfoot td { font-weight: 600; }
table.words td:nth-child(2), table.words th:nth-child(2) { text-align: left; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: 1; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 8px 0 0; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
ul.checks { list-style: none; margin: 0; padding: 0; } ul.checks li { padding: 3px 0; }
.good::before { content: "\\2713"; color: var(--good); font-weight: 700; margin-right: 10px; }
.bad::before { content: "\\2717"; color: var(--bad); font-weight: 700; margin-right: 10px; }
.bad { color: var(--bad); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, monospace; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 12px; }
.two h3 { margin: 0 0 8px; font-size: 15px; }
"""


def html(outcome: Outcome) -> str:
    """The page."""
    whole, figures = outcome.whole, outcome.figures()
    parts = [
        f"<h1>{outcome.submitted:,} recipients, {outcome.seconds:.0f} seconds</h1>",
        f'<p class="soft">A rehearsal of sales-push on {escape(platform.system())}, Python '
        f"{escape(platform.python_version())}, {outcome.workers} workers. Every provider and every person on this page "
        "is invented; the mail was real.</p>",
        _troubles(outcome.troubles),
        _cards(
            [
                (f"{whole['delivered']:,}", "delivered"),
                (f"{outcome.rate:,.0f}", "messages/s where accepted"),
                (f"{whole.deferrals:,}", "attempts put off and made again"),
                (f"{whole['bounced']:,}", "bounced"),
                (f"{whole['refused']:,}", "refused by the gate"),
                (f"{figures['opted_out']} / {figures['second_refused']}", "opted out / refused next time"),
            ]
        ),
        "<h2>Delivered per second, by provider</h2>",
        _throughput(outcome),
        "<h2>Where everybody ended</h2>",
        _outcomes(outcome),
        '<div class="two"><div>',
        "<h2>Attempts until delivery</h2>",
        _attempts(outcome),
        "</div><div>",
        "<h2>Why not</h2>",
        _reasons(outcome),
        "</div></div>",
        "<h2>What the providers counted themselves</h2>",
        _sink(outcome),
        "<h2>What readers did</h2>",
        _readers(outcome),
        "<h2>Checked against somebody else's count</h2>",
        _checks(outcome.checks()),
        "<h2>Asked afterwards</h2>",
        _stories(outcome),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>sales-push: a rehearsal</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _cards(cards: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f'<div class="card"><b>{escape(n)}</b><span>{escape(name)}</span></div>' for n, name in cards)
    return f'<div class="cards">{inside}</div>'


def _troubles(troubles: Sequence[str]) -> str:
    if not troubles:
        return ""
    lines = "\n".join(escape(trouble) for trouble in troubles)
    return f'<div class="panel"><p class="bad">It did not end well.</p><pre>{lines}</pre></div>'


# --- charts -------------------------------------------------------------------------------------------------------


def _throughput(outcome: Outcome) -> str:
    """Stacked areas: delivered messages a second over time, one layer a provider; deferrals as a line above."""
    first, last = outcome.course.span
    start = min(outcome.submitted_at or first, first) if first else 0
    if last <= start:
        return '<div class="panel soft">Nothing was delivered.</div>'
    width = max(250_000, -(-(last - start) // SPANS // 250_000) * 250_000)  # spans of whole quarters of a second
    count = (last - start) // width + 1
    scale = 1e6 / width
    homes = [home for home in outcome.rows if home in _COLOURS]
    layers = {home: outcome.course.buckets(home, "delivered", start, width, count) for home in homes}
    sums = [sum(layers[home][n] for home in homes) * scale for n in range(count)]
    top = _round_up(max(sums, default=1.0))
    seconds = count * width / 1e6
    left, right, height, foot, wide = 56.0, 12.0, 240.0, 26.0, 1000.0

    def x(n: float) -> float:
        return left + (wide - left - right) * n / max(1, count - 1)

    def y(value: float) -> float:
        return 8 + (height - 8 - foot) * (1 - value / top)

    drawn = [
        f'<line class="grid" x1="{left}" x2="{wide - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:,.0f}</text>'
        for v in (0.0, top / 4, top / 2, 3 * top / 4, top)
    ]
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600) if seconds / s <= 12), 3600)
    ticks = [step * n for n in range(int(seconds / step) + 1)]
    drawn += [
        f'<text x="{x(tick / seconds * (count - 1)):.1f}" y="{height - 6}" text-anchor="middle">{tick} s</text>'
        for tick in ticks
    ]
    below = [0.0] * count
    for home in homes:
        above = [under + n * scale for under, n in zip(below, layers[home], strict=True)]
        line = [f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(above)]
        back = [f"{x(n):.1f},{y(value):.1f}" for n, value in reversed(list(enumerate(below)))]
        drawn.append(
            f'<polygon points="{" ".join(line + back)}" fill="{_COLOURS[home]}" fill-opacity="0.85">'
            f"<title>{escape(NAMES[home])}</title></polygon>"
        )
        below = above
    deferred = [outcome.course.buckets(home, "deferred", start, width, count) for home in homes]
    put_off = [sum(column) for column in zip(*deferred, strict=True)]
    line = [f"{x(n):.1f},{y(min(top, value * scale)):.1f}" for n, value in enumerate(put_off)]
    drawn.append(
        f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--bad)" stroke-width="1.5"'
        ' stroke-dasharray="4 3"/>'
    )
    key = [*((NAMES[home], _COLOURS[home]) for home in homes), ("attempts put off", "var(--bad)")]
    return (
        f'<div class="panel"><svg viewBox="0 0 {wide:g} {height:g}" role="img" aria-label="delivered per second">'
        f"{''.join(drawn)}</svg>{_key(key)}</div>"
    )


def _round_up(value: float) -> float:
    """The next round number, one that quarters well."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0) if step * power >= value)


def _key(names: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in names)
    return f'<div class="key">{items}</div>'


def _outcomes(outcome: Outcome) -> str:
    """The outcome table, each row with its bar."""
    head = "".join(f"<th>{name}</th>" for name in ("", "", "submitted", *_KINDS, "put off"))
    rows = []
    for home, n in outcome.rows.items():
        tally = outcome.tallies.get(home)
        counts = {kind: tally[kind] if tally else 0 for kind in _KINDS}
        cells = "".join(f"<td>{value:,}</td>" for value in (n, *counts.values(), tally.deferrals if tally else 0))
        rows.append(f"<tr><td>{escape(NAMES.get(home, home))}</td><td>{_bar(counts, n)}</td>{cells}</tr>")
    whole = outcome.whole
    figures = (outcome.submitted, *(whole[kind] for kind in _KINDS), whole.deferrals)
    sums = "".join(f"<td>{value:,}</td>" for value in figures)
    return (
        f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"<tfoot><tr><td>together</td><td></td>{sums}</tr></tfoot></table>{_key(_KINDS.items())}</div>"
    )


def _bar(counts: Mapping[str, int], whole: int) -> str:
    at, drawn = 0.0, []
    for kind, n in counts.items():
        wide = 160.0 * n / whole if whole else 0.0
        drawn.append(f'<rect x="{at:.2f}" width="{wide:.2f}" height="10" fill="{_KINDS[kind]}"/>')
        at += wide
    return (
        '<svg viewBox="0 0 160 10" style="width:160px" aria-hidden="true">'
        f'<rect width="160" height="10" fill="var(--line)"/>{"".join(drawn)}</svg>'
    )


def _attempts(outcome: Outcome) -> str:
    found = sorted(outcome.course.attempts.items())
    most = max((n for _, n in found), default=0)
    if not most:
        return '<div class="panel soft">Nothing was delivered.</div>'
    rows = "".join(
        f"<tr><td>{attempts}</td><td>{_bar({'delivered': n}, most)}</td><td>{n:,}</td></tr>" for attempts, n in found
    )
    return (
        '<div class="panel"><table class="words"><thead><tr><th>attempts</th><th></th><th>recipients</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _reasons(outcome: Outcome) -> str:
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{escape(reason)}</td><td>{n:,}</td></tr>"
        for (kind, reason), n in outcome.whole.reasons.most_common(14)
    )
    return (
        '<div class="panel"><table class="words"><thead><tr><th>what</th><th>why</th><th>times</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _sink(outcome: Outcome) -> str:
    providers: Mapping[str, Mapping[str, float]] = outcome.sink.get("providers", {})
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *findings.SINK_FIGURES.values()))
    rows = "".join(
        f"<tr><td>{escape(NAMES.get(home, home))}</td>"
        + "".join(f"<td>{int(counts.get(name, 0)):,}</td>" for name in findings.SINK_FIGURES)
        + "</tr>"
        for home, counts in providers.items()
    )
    return f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _readers(outcome: Outcome) -> str:
    visits = outcome.visits
    cards = _cards(
        [
            (str(outcome.readers), f"readers, {outcome.pixels} agreed to be tracked"),
            (str(visits.opened), "opened"),
            (str(visits.clicked), "clicked"),
            (str(len(visits.opted_out)), "opted out"),
        ]
    )
    if outcome.report is None:
        return cards
    classes: dict[tuple[str, str], int] = {}
    for _, _, kind, visitor, n in outcome.report.links:
        name = next((name for most, name in _VISITORS if visitor <= most), "others")
        classes[kind, name] = classes.get((kind, name), 0) + n
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{escape(name)}</td><td>{n:,}</td></tr>"
        for (kind, name), n in sorted(classes.items(), key=lambda pair: (pair[0][0], -pair[1]))
    )
    return (
        f'{cards}<div class="panel"><table class="words"><thead><tr><th>hit</th><th>by</th><th>times</th></tr></thead>'
        f'<tbody>{rows}</tbody></table><p class="soft">Of those who agreed. Machines are counted apart, never dropped; '
        "nobody who did not agree carries a pixel.</p></div>"
    )


def _checks(checks: Iterable[tuple[str, bool]]) -> str:
    items = "".join(f'<li class="{"good" if good else "bad"}">{escape(text)}</li>' for text, good in checks)
    return f'<div class="panel"><ul class="checks">{items}</ul></div>'


def _stories(outcome: Outcome) -> str:
    panels = "".join(
        f'<div class="panel"><h3>{escape(story.title)}</h3>'
        f"<pre><b>$ {escape(story.command)}</b>\n{escape(story.text)}</pre></div>"
        for story in outcome.stories
    )
    return f'<div class="two">{panels}</div>'
