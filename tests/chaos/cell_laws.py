"""What each cell of the matrix promises (promises.md T0, T4, T11, T12), and what was seen of it. Pure.

Path: `cells` fills a `Facts` beside the `History` of `observe` · `broken_by` asks the checker's laws and those of the
cell · `again`, `twice` are figures for the table.

Known limits: copies made by a store that forgot a lease may differ in their Date, which a slice takes with its first
lease; that is told in no cell.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from tests.chaos import checker
from tests.chaos.checker import Broken, History

BEATS = "matrix:beats"
LOSABLE = 2.0  # s of accepted jobs that everysec may lose at a machine crash (T0)
CLOSED = 1.0  # s after the first refusal: a Permit lives half of that
DRAIN = 60.0


@dataclass(slots=True)
class Facts:
    """What the cell saw beside the history. fault, back: when it came, and when everything could begin again; refused:
    first write that was refused; missing, lost: job ids before they were submitted again; ended: kinds of those who had
    opted out, of a job for them alone."""

    sync: str
    kind: str
    fault: float = 0.0
    back: float = 0.0
    refused: float | None = None
    acked: dict[str, float] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    lost: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # rows in the ledger, states told, people lost
    beats: set[int] = field(default_factory=set)
    beats_found: set[int] = field(default_factory=set)
    ended: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)


def broken_by(facts: Facts, history: History) -> list[Broken]:
    """Every promise of this cell that does not hold."""
    laws = [
        checker.nothing_lost, checker.no_phantom, checker.duplicates, checker.suppression, checker.throttle,
        checker.accounting,
    ]  # fmt: skip
    if facts.kind != "power":
        laws.append(checker.unknowns)  # I3b excepts the power cut
    found = [broken for law in laws for broken in law(history)]
    forgets = facts.kind == "dump" or (facts.kind == "power" and facts.sync == "everysec")
    if forgets:  # a slice has its Date from its first lease; a store that forgot that lease gives another one
        found = [broken for broken in found if not (broken.law == "I2" and broken.text.endswith("copies differ"))]
    found += [Broken("I7", name, f"not over {DRAIN:g} s after the fault") for name in facts.left]
    for name in sorted(facts.missing | set(facts.lost)):
        before = facts.fault - facts.acked[name]
        if not forgets:
            found.append(Broken("T0", name, "an acknowledged job has lost people"))
        elif before < 0:
            found.append(Broken("T0", name, "lost, and it was acknowledged after the fault"))
        elif facts.kind == "power" and before > LOSABLE:
            found.append(Broken("T0", name, f"lost, and it had been acknowledged {before:.1f} s before the cut"))
    for name, (rows, told, _) in facts.lost.items():
        if rows != told:
            found.append(Broken("T12", name, f"lost, and {told} terminal states are told of {rows} rows"))
    gone = len(facts.beats - facts.beats_found)
    if gone and (facts.kind in ("kill", "full") or (facts.sync == "always" and facts.kind == "power")):
        found.append(Broken("T0", BEATS, f"{gone} acknowledged writes are gone"))
    if facts.ended.get("delivered") or facts.ended.get("unknown") or not facts.ended:
        found.append(Broken("T11", "opt-outs", f"of those who opted out: {dict(facts.ended)}"))
    if facts.kind == "full":
        found += _closed(facts, history)
    return found


def _closed(facts: Facts, history: History) -> list[Broken]:
    """A full disk: from the first refusal on nobody new is written to."""
    if facts.refused is None:
        return [Broken("T4", "disk", "it was full and no write was refused")]
    since, until = facts.refused + CLOSED, facts.back
    late = [entry.t_rcpt for entry in history.entries if since < entry.t_rcpt < until]
    return [Broken("T4", "disk", f"{len(late)} RCPTs while no write could be kept")] if late else []


def again(history: History, facts: Facts) -> float:
    """Seconds from the end of the fault to the end of the longest silence that began around it."""
    times = [entry.t_rcpt for entry in history.entries if entry.t_rcpt >= facts.fault - 1.0]
    pauses = [(after - before, after) for before, after in itertools.pairwise(times)]
    ends = max(pauses, default=(0.0, facts.back))[1]
    return max(0.0, ends - facts.back)


def twice(history: History) -> tuple[int, int]:
    """Copies beyond the first of anybody: of jobs that hold, and of those that send again when in doubt."""
    in_doubt = {job.number: job.in_doubt for job in history.jobs}
    copies = Counter((entry.job, entry.mref) for entry in history.entries if entry.stored)
    more = Counter[str]()
    for (number, _), count in copies.items():
        more[in_doubt.get(number, "hold")] += count - 1
    return more["hold"], more["resend"]
