"""How many connections a site gets: decided at once, without a wait between looking and changing (style, principle 4).

Laws: never more connections than the site's limit, than the pace allows, or than there are batches to fill them; none
while the site backs off; one at a time towards a site that has just failed, until one of them has delivered.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker may do at a site. rate: messages a second, 0 for no limit; share: rows that feed a connection."""

    connections: int = 10
    rate: float = 0.0
    burst: float = 20.0
    messages_per_connection: int = 100
    share: int = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What the courier is to do now: open so many, close so many of the idle ones."""

    open: int
    close: int


def plan(
    *, stock: int, connected: int, opening: int, idle: int, ceiling: int, limits: Limits, failing: bool, held: bool
) -> Plan:
    """The decision. stock: rows waiting; ceiling: what the pace grants; failing: the last attempt to connect failed;
    held: the site backs off until later, or the worker is draining.
    """
    if held:
        return Plan(0, idle)
    wanted = min(limits.connections, ceiling, -(-stock // limits.share))
    if failing:
        wanted = min(wanted, 1)
    have = connected + opening
    if wanted > have - idle:
        return Plan(max(0, wanted - have), 0)
    # idle connections above the limit go at once; below it they are kept for what comes next
    return Plan(0, max(0, min(idle, have - min(limits.connections, ceiling))))
