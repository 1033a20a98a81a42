"""Engines that break a promise on purpose: the harness must find each of them, or it proves nothing.

    python -m tests.chaos --no-points --kills 8 --mutant blind-gate       exit 0 when a law named here was broken

A mutant is a change of the copy of the sources a world runs; the tree itself is never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Mutant:
    """old, which stands once in file, becomes new; one of laws breaks."""

    file: str
    old: str
    new: str
    laws: frozenset[str]


MUTANTS: Final = {
    # what was behind its dot when a worker died is sent again, whatever the job said
    "forgets-doubt": Mutant(
        "engine/delivery/replay.py",
        "doubted = set(intents) | (",
        "doubted = set[int]() and (",
        frozenset({"I3"}),
    ),
    # a 250 that was journalled and not settled is forgotten
    "forgets-outcomes": Mutant(
        "engine/delivery/replay.py",
        "known = {o.index: o for o in found.outcomes.get(key, []) if o.index in pending}",
        "known = {o.index: o for o in found.outcomes.get(key, []) if o.index in pending and False}",
        frozenset({"I1", "I3"}),
    ),
    # the gate does not look
    "blind-gate": Mutant(
        "engine/queue/gate.lua",
        "string.char(math.max(domain, against(string.sub(tags, at, at + 11))))",
        "string.char(0)",
        frozenset({"I4"}),
    ),
    # a dead worker's slices stay his
    "keeps-the-dead": Mutant(
        "engine/queue/reclaim.lua",
        "if hand_back(leases[at], now) then",
        "if leases[at] then",
        frozenset({"I1", "I6", "I7"}),
    ),
    # a chunk that is handed out again after a crash is laid again
    "lays-twice": Mutant(
        "engine/queue/put.lua",
        "redis.call('SETBIT', prefix .. 'w:' .. job, chunk, 1) == 1",
        "redis.call('SETBIT', prefix .. 'w:' .. job, chunk, 1) == 7",
        frozenset({"I2", "I3", "I6"}),
    ),
    # one settle of seventeen tells nobody
    "loses-events": Mutant(
        "engine/queue/settle.lua",
        "if ARGV[at + 4] ~= '' then",
        "if ARGV[at + 4] ~= '' and tonumber(ARGV[at + 1]) % 17 ~= 0 then",
        frozenset({"I1", "I6", "I7"}),
    ),
    # more messages a second than a site allows
    "no-rate": Mutant(
        "engine/queue/rate.lua",
        "local granted = math.min(wanted, ",
        "local granted = math.max(wanted, ",
        frozenset({"I5"}),
    ),
    # a retry is another message
    "new-date": Mutant(
        "engine/queue/slices.py",
        "flags=header.flags, date=header.date,",
        "flags=header.flags, date=0,",
        frozenset({"I2"}),
    ),
}


def apply(name: str, sources: Path) -> None:
    """Change a copy of the sources. Raises KeyError for no such mutant, ValueError when it does not fit any more."""
    mutant = MUTANTS[name]
    path = sources / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"mutant {name} does not fit {mutant.file} any more")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
