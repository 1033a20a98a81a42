"""What is said of each promise where there is nothing, or not all, to test here: later, not software, missing.

Promises with tests need no line: their tests speak. A line for one that has tests tells what these do not cover.
"""

from __future__ import annotations

from typing import Final

PROMISES: Final = tuple(f"P-{number:02d}" for number in range(1, 61))

# Comes with accounts, the desk, incidents and the Delivery Optimization Engine switch.
LATER: Final[dict[str, str]] = {}

# What a program cannot do or know: a sentence why.
NOT_SOFTWARE: Final[dict[str, str]] = {}

# Held in part: what is missing.
GAPS: Final[dict[str, str]] = {}
