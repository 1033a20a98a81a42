"""Strict JSON: what readers let through in silence is noticed, and reading goes on (faults.md 3.6).

Law: whatever bytes come in, `parse` returns. Doubled names (the last would win), NaN and infinities, integers beyond
2**53 (RFC 7493 2.2: other readers round them) and lone surrogates make the tree doubtful: the unusable value stands in
it as an `Unusable` and `problems.examine` reports it with its path. Nesting that blows a stack is one problem.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from engine.campaign.problems import Doubled, Problem, Unusable

LARGEST_INTEGER: Final = 2**53 - 1  # RFC 7493 2.2
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(slots=True)
class Parsed:
    """value: the tree (None when the text is not JSON at all, then problems say why).

    doubtful: the tree may hold `Unusable`, `Doubled` or broken text, so it must be examined, not trusted.
    exact: no float and no name outside the basic plane, so the canonical form needs no slow path (canonical.py).
    """

    value: Any
    problems: list[Problem] = field(default_factory=list)
    doubtful: bool = False
    exact: bool = True


def parse(payload: bytes, most_bytes: int) -> Parsed:
    """Read JSON strictly. Never raises."""
    if len(payload) > most_bytes:
        return Parsed(None, [Problem("$", f"the payload has {len(payload):,} bytes, at most {most_bytes:,} are read")])
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        return Parsed(None, [Problem("$", f"not UTF-8: byte {error.start} cannot be read", "encode the JSON as UTF-8")])
    parsed = Parsed(None, doubtful=_SURROGATE_ESCAPE.search(payload) is not None)

    def unusable(message: str) -> Unusable:
        parsed.doubtful = True
        return Unusable(message)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) == len(items):
            return made
        parsed.doubtful = True
        doubled = Doubled(made)
        seen: set[str] = set()
        doubled.names = []
        for name, _ in items:
            if name in seen and name not in doubled.names:
                doubled.names.append(name)
            seen.add(name)
        return doubled

    def integer(digits: str) -> int | Unusable:
        if len(digits) < 16 or (len(digits) <= 17 and abs(int(digits)) <= LARGEST_INTEGER):
            return int(digits)
        return unusable("the number is beyond 2^53-1: other readers would round it")

    def decimal(digits: str) -> float | Unusable:
        parsed.exact = False
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            return unusable("the number is too large")
        return number

    def constant(name: str) -> Unusable:
        return unusable(f"{name} is not JSON")

    try:
        parsed.value = json.loads(
            text, object_pairs_hook=pairs, parse_int=integer, parse_float=decimal, parse_constant=constant
        )
    except RecursionError:
        parsed.problems.append(Problem("$", "nested too deeply to be read"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        parsed.problems.append(Problem("$", f"not JSON: {error.msg} at {where}"))
    except ValueError:
        parsed.problems.append(Problem("$", "not JSON that can be read"))
    return parsed
