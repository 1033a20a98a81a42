"""What the places of this floor have in common: one area of SQL each, read and written by the one writer.

Law: a place that gives no `told` cannot be asked; one that says nothing of erasing keeps everything, on purpose, and
says in its docstring why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sqlalchemy import Connection, Table, delete

from policy.personal import Erased, Person, Premises, Record


class Place:
    """One area of SQL. Rooms that keep more than they give say so in their docstring."""

    name: str
    covers: Sequence[str]

    def __init__(self, premises: Premises) -> None:
        self._premises = premises

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    async def find(self, person: Person) -> int:
        return len(await self.export(person))

    async def export(self, person: Person) -> list[Record]:
        return await self._premises.store.write(lambda conn: list(self.told(conn, person)))

    async def erase(self, person: Person) -> Erased:
        return Erased()

    async def amend(self, person: Person, field: str, value: str) -> int:
        return 0

    def told(self, conn: Connection, person: Person) -> Iterator[Record]:
        raise NotImplementedError

    async def _delete(self, table: Table, subjects: Iterable[int]) -> Erased:
        """A person's own rows by subject number."""
        statement = delete(table).where(table.c.subject.in_(sorted(subjects)))
        return Erased(await self._premises.store.write(lambda conn: conn.execute(statement).rowcount))
