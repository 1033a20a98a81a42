"""Named instants at which a test may end this process, as a power cut would: no clean-up, no flush (SIGKILL).

    SALESPUSH_CRASH_AT=before-settle:3      the third time this process is about to settle, it is gone

Law: without the variable `reach` does nothing and costs 40 ns, and no name but those of `policy.transitions.POINTS`
is taken: a misspelt point would be a test that cannot fail, so it ends the process at its start with exit code 2.

Asked on every floor, because a person's message may be lost or sent twice on each: hence on the ground floor. Who can
set a process's environment can end it anyway; nothing else is given away here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Final

from policy.transitions import POINTS

VARIABLE: Final = "SALESPUSH_CRASH_AT"
NAMES: Final = frozenset(point.name for point in POINTS)


class NoSuchPoint(ValueError):
    """The variable names no crash point, or no count."""


def parse(text: str) -> tuple[str, int]:
    """("before-settle", 3) of "before-settle:3"; without a number, the first time. Raises NoSuchPoint."""
    name, _, count = text.partition(":")
    if name not in NAMES:
        raise NoSuchPoint(f"{VARIABLE} names no crash point: {name[:40]!r}; see policy.transitions.POINTS")
    if count and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise NoSuchPoint(f"{VARIABLE} counts from 1: {count[:20]!r}")
    return name, int(count or 1)


def _nothing(_point: str) -> None:
    return


def armed(text: str, end: Callable[[], None]) -> Callable[[str], None]:
    """What `reach` is when the variable says text. Raises NoSuchPoint."""
    wanted, left = parse(text)

    def reached(point: str) -> None:
        nonlocal left
        if point == wanted:
            left -= 1
            if left == 0:
                end()

    return reached


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _chosen(text: str) -> Callable[[str], None]:
    if not text:
        return _nothing
    try:
        return armed(text, _end)
    except NoSuchPoint as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


reach: Callable[[str], None] = _chosen(os.environ.get(VARIABLE, ""))
"""Say where you are. point: a name of `policy.transitions.POINTS`."""
