"""Every place asked for its records of one person, one after another.

Law: what a place counts (`find`) and what it hands out (`export`) is the same number, or the bundle says so: a bundle
that calls itself complete while a place kept something back would be a false statement to the person (P-42).
Disclosures under a gag are the one thing a place keeps back knowingly; it does not count them either.

Known limits: places are asked at slightly different moments, and mail goes on meanwhile: a message delivered in between
can show as queued and as delivered. When the numbers differ the place is asked again, at most `_TRIES` times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from policy.bundle.manifest import Place
from policy.personal import Person, PersonalStore, Record

_TRIES: Final = 3


@dataclass(frozen=True, slots=True, repr=False)
class Gathered:
    """notes: places whose records changed while they were read, for the statement of completeness."""

    records: list[Record]
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()


async def gather(places: Sequence[PersonalStore], person: Person) -> Gathered:
    """What all of them hold. Raises what a place raises: half an answer is none."""
    records: list[Record] = []
    asked: list[Place] = []
    notes: list[str] = []
    for place in places:
        for _ in range(_TRIES):
            held = await place.find(person)
            told = await place.export(person)
            if held == len(told):
                break
        else:
            notes.append(f"Records of the place {place.name} were changing while they were read.")
        records += told
        asked.append(Place(place.name, tuple(place.covers), len(told)))
    return Gathered(records, tuple(asked), tuple(notes))
