"""Places that hold personal data, and the one way to ask them about a person (design decision 14, P-42, P-54).

A right is carried out by walking every place: each floor tells its own by an entry point ``sales_push.stores``, so that
rights reach queue, journals and link tables without this floor importing upward. A place is a `PersonalStore`; what it
covers it says in names of the inventory: ``table:message``, ``key:slice`` (`policy.keyspace.CATALOGUE`),
``file:journal`` (`policy.files.CATALOGUE`). A census test fails when something that holds personal data is covered by
nobody.

Laws of a place:
- every call may be repeated and changes nothing the second time; a crash in between is mended by the next call;
- `erase` never makes somebody writable again: suppressions are not its business and survive it;
- what cannot be taken out yet (a slice that a worker holds) is counted in `Erased.left`, never forgotten;
- nobody else's records are touched, however near they lie.

Known limits: places are asked one after another, in the writer's process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from policy.keys import Keyring
    from policy.settings import PolicySettings
    from policy.store import Store
    from policy.valkey import Client

GROUP: Final = "sales_push.stores"

Value = str | int | bool | None


@dataclass(frozen=True, slots=True, repr=False)
class Known:
    """A person as one account knows them. subject: 0 where the vault has no number for them, places that hold them by
    tag or address (the intake, held chunks) may know them all the same; key: the subject's own key, b"" once it is
    destroyed; pseudonyms of the weeks that the ledger still keeps, by week."""

    subject: int
    account: int
    key: bytes = b""
    pseudonyms: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class Person:
    """One data subject, as places are asked about. tag: suppression tag (12 bytes); domain: A-label; lane: keyed domain
    reference; address: normalised, "" once the identity is gone: a place must then find its records by tag, lane,
    subject and references; known: at each account the question is about; references: (job, mref) of their messages."""

    tag: bytes
    partition: int
    lane: str
    domain: str = ""
    address: str = ""
    known: tuple[Known, ...] = ()
    references: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        return f"<Person of {len(self.known)} accounts, {len(self.references)} messages>"

    @property
    def subjects(self) -> frozenset[int]:
        """Never 0: that is nobody, in every place."""
        return frozenset(one.subject for one in self.known if one.subject)

    @property
    def accounts(self) -> frozenset[int]:
        return frozenset(one.account for one in self.known)


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One record about a person as an export shows it. kind: profile, subscription, consent, message, event, inferred,
    suppression, consultation, disclosure, use, queued, request; values: plain, instants as RFC 3339 text in UTC."""

    kind: str
    values: dict[str, Value]


@dataclass(frozen=True, slots=True)
class Erased:
    """records: taken out by this call; left: still there, because somebody works on them: ask again."""

    records: int = 0
    left: int = 0

    def __add__(self, other: Erased) -> Erased:
        return Erased(self.records + other.records, self.left + other.left)


class PersonalStore(Protocol):
    """One place. covers: names of the inventory; weeks, jobs and so on are found from the person alone."""

    name: str
    covers: Sequence[str]

    async def find(self, person: Person) -> int:
        """How many records of the person there are."""
        ...

    async def export(self, person: Person) -> list[Record]:
        """Each of them, in a stable order."""
        ...

    async def erase(self, person: Person) -> Erased:
        """Take them out."""
        ...

    async def amend(self, person: Person, field: str, value: str) -> int:
        """Correct a field wherever it waits to be used; how many records (P-44). Places without such fields: 0."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Premises:
    """What places work on: the writer's own hands. keyring is asked at each use, it turns weekly."""

    settings: PolicySettings
    store: Store
    redis: Client
    keyring: Callable[[], Keyring]
    clock: Callable[[], int]


Build = Callable[[Premises], Sequence[PersonalStore]]


def every(premises: Premises) -> list[PersonalStore]:
    """The places of all floors, by name. Raises ValueError when two have one name."""
    found: dict[str, PersonalStore] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        build: Build = entry.load()
        for place in build(premises):
            if place.name in found:
                raise ValueError(f"two places of personal data are called {place.name}")
            found[place.name] = place
    return [found[name] for name in sorted(found)]
