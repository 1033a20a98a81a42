"""Kept mail: what the simulated providers stored, and in which order it is read.

Law: readers come from every provider in turns, and people who agreed to be tracked alternate with those who did not,
so that any first hundred of them is of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from engine.rehearsal.campaigns import Census
from engine.rehearsal.readers import Mail, Visits, read_mail


def mails_of(kept: Path, census: Census) -> list[tuple[Path, Mail]]:
    """What the providers stored, taken in turns from each of them, people with and without consent alternating."""
    by_provider: dict[str, list[tuple[Path, Mail]]] = {}
    for path in sorted(kept.glob("*.eml")):
        mail = read_mail(path.read_bytes())
        by_provider.setdefault(path.name.partition("-")[0], []).append((path, mail))
    for found in by_provider.values():
        found[:] = _alternating(found, lambda pair: pair[1].recipient in census.tracked)
    queues = [iter(found) for found in by_provider.values()]
    mixed: list[tuple[Path, Mail]] = []
    while queues:
        for queue in list(queues):
            pair = next(queue, None)
            if pair is None:
                queues.remove(queue)
            else:
                mixed.append(pair)
    return mixed


def _alternating(
    pairs: Iterable[tuple[Path, Mail]], is_first: Callable[[tuple[Path, Mail]], bool]
) -> list[tuple[Path, Mail]]:
    yes: list[tuple[Path, Mail]] = []
    no: list[tuple[Path, Mail]] = []
    for pair in pairs:
        (yes if is_first(pair) else no).append(pair)
    longer = max(len(yes), len(no))
    return [pair for place in range(longer) for side in (yes, no) if place < len(side) for pair in (side[place],)]


def sample(mails: list[tuple[Path, Mail]], visits: Visits, census: Census) -> list[str]:
    """Somebody delivered, somebody who opted out, somebody refused."""
    gone = set(visits.opted_out)
    delivered = next((mail.recipient for _, mail in mails if mail.recipient not in gone), "")
    return [one for one in (delivered, *visits.opted_out[:1], *census.without_consent[:1]) if one]
