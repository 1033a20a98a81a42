"""People in what is not on lanes: entries of the intake, chunks held for later, entries that were put away (P-54).

Laws:
- whoever waits in a held chunk leaves a blank row, which expansion refuses as ERASED; the chunk keeps its number, its
  rows and the digest it was registered under (field ``of``), so that a producer who sends it again changes nothing;
- a rejected or dead entry that names the person anywhere goes whole: its bytes are no rows that anybody could blank,
  and that the job was refused is told elsewhere (`policy.statuses`);
- entries of the intake are only counted: they are somebody's work, and gone from there when their effect is on lanes;
- compare and swap (exchange.lua): an entry that is gone or another by now stays as it is.

Entries are opened and searched in a thread, a few at a time (`naming`). Which accounts: those of `Person.known`; with
account 0 among them, or none, every account.

Known limits: streams are read whole, 20 ms a megabyte of rows, 40 if all are of the person's domain. A chunk that the
release has just read goes back to the intake as it was, and what a producer hands in again for later waits sealed as it
is: these rows meet the gate when they are expanded, and are refused as ERASED there. What is taken out of a rejected
stream of more than `SMALL_STREAM` stays sealed in its block of 4 KiB until that ends, 30 days at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from hashlib import sha1, sha256
from typing import Any, Final, cast

import msgspec
from sqlalchemy import select

from engine import client
from engine.campaign import naming
from engine.campaign.naming import Naming
from engine.queue.scripts import Call, Scripts
from policy import keyspace
from policy.instants import rfc3339
from policy.keys import Keyring, SealError, open_sealed, seal
from policy.personal import Erased, Person
from policy.schema import account, job
from policy.store import Store
from policy.valkey import Client

PAGE: Final = 4  # entries read at a time: of the intake up to 24 MiB each, of an audience up to 1 MiB
SMALL_STREAM: Final = 4 * 1024 * 1024  # bytes up to which exchange.lua builds a stream anew: 2 ms of the server
PUT_AWAY: Final = ((keyspace.REJECTED, "rejected"), (keyspace.DEAD, "dead"))


@dataclass(frozen=True, slots=True, repr=False)
class Entry:
    """An entry of a stream. theirs: lines of `plain` (held chunks) that are the person's; says: what an export
    shows."""

    stream: str
    id: str
    fields: Mapping[bytes, bytes]
    plain: bytes
    theirs: tuple[int, ...]
    says: tuple[dict[str, Any], ...] = ()

    @property
    def job(self) -> int:
        """Whose held chunk it is."""
        return int(self.stream.rpartition(":")[2])


Look = Callable[[str, Mapping[bytes, bytes]], Entry | None]


class Unexpanded:
    """One per process, the writer's. Every method raises RedisError."""

    def __init__(self, redis: Client, store: Store, keyring: Callable[[], Keyring]) -> None:
        self._redis = redis
        self._store = store
        self._keyring = keyring
        self._scripts = Scripts(redis)

    def __repr__(self) -> str:
        return "<Unexpanded>"

    async def _pages(self, stream: str) -> AsyncIterator[list[tuple[str, dict[bytes, bytes]]]]:
        """What is in a stream now, a few entries at a time."""
        newest: Any = await self._redis.xrevrange(stream, count=1)
        if not newest:
            return
        last, place = newest[0][0].decode("ascii"), "-"
        while some := cast(Any, await self._redis.xrange(stream, min=place, max=last, count=PAGE)):
            yield [(name.decode("ascii"), fields) for name, fields in some]
            place = f"({some[-1][0].decode('ascii')}"

    async def _searched(self, stream: str, look: Look) -> AsyncIterator[Entry]:
        """look(id, fields) -> Entry | None, in a thread: a megabyte of rows takes 20 ms."""
        async for page in self._pages(stream):
            for one in await asyncio.to_thread(lambda some: [look(*entry) for entry in some], page):
                if one is not None:
                    yield one

    async def intake(self, person: Person) -> AsyncIterator[Entry]:
        """Entries with rows of theirs that are not on lanes yet."""
        test, ring = self._naming(person), self._keyring()
        names = await self._accounts(person)
        jobs = {number: (whose, named) for number, whose, named in await self._held_jobs(frozenset())}

        def look(name: str, fields: Mapping[bytes, bytes]) -> Entry | None:
            kind, plain, whose, named = _submitted(ring, fields, jobs)
            if names is not None and whose not in names:
                return None
            if kind == "job":  # named elsewhere in it, they may come to be named in a rejected one
                rows = naming.rows_in(plain, test) or ([{}] if test.in_json(plain) else [])
            else:
                lines = plain.split(b"\n")
                rows = [naming.fields_of(lines[place]) for place in naming.places(plain, test)]
            said = tuple({"account": whose, "job": named, **shown(row)} for row in rows)
            return Entry(keyspace.INTAKE, name, fields, b"", (), said) if rows else None

        async for one in self._searched(keyspace.INTAKE, look):
            yield one

    async def held(self, person: Person) -> AsyncIterator[Entry]:
        """Chunks of scheduled jobs with rows of theirs."""
        test, service = self._naming(person), self._keyring().service
        for number, _, _ in await self._held_jobs(self._limited_to(person)):
            stream = keyspace.stream_of_chunks(number)

            def look(name: str, fields: Mapping[bytes, bytes], stream: str = stream) -> Entry | None:
                plain = _opened(service, fields, _aad(stream, fields))
                theirs = naming.places(plain, test)
                return Entry(stream, name, fields, plain, tuple(theirs)) if theirs else None

            async for one in self._searched(stream, look):
                yield one

    async def put_away(self, stream: str, purpose: str, person: Person) -> AsyncIterator[Entry]:
        """Rejected or dead entries that name them."""
        test, service = self._naming(person), self._keyring().service
        names = await self._accounts(person)

        def look(name: str, fields: Mapping[bytes, bytes]) -> Entry | None:
            plain = _opened(service, fields, purpose.encode())
            try:
                body = msgspec.msgpack.decode(plain)
            except ValueError:  # msgspec.DecodeError is one; not ours, or of another service's key
                return None
            # the account as somebody wrote it into what could not be read: without one it is anybody's
            if names is not None and body["account"] and body["account"] not in names:
                return None
            if not (test.in_json(body["payload"]) or test.in_json(msgspec.json.encode(body["problems"]))):
                return None
            told = {"account": body["account"], "job": body["job_id"], "at": rfc3339(body["at"])}
            rows = naming.rows_in(body["payload"], test) or [{}]
            return Entry(stream, name, fields, b"", (), tuple({**told, **shown(row)} for row in rows))

        async for one in self._searched(stream, look):
            yield one

    async def blank(self, one: Entry) -> Erased:
        """Their rows of a held chunk give way to blank ones."""
        told = await self._exchange(one, naming.blanked(one.plain, list(one.theirs)))
        return Erased(told.records * len(one.theirs), told.left)

    async def correct(self, one: Entry, field: str, value: str) -> int:
        """Another value of a field in their rows of a held chunk; how many. Raises ValueError: too long for a row."""
        plain, rows = naming.corrected(one.plain, list(one.theirs), field, value)
        return rows * (await self._exchange(one, plain)).records if rows else 0

    async def drop(self, one: Entry) -> Erased:
        """An entry that was put away goes whole."""
        return await self._exchange(one, None)

    async def _exchange(self, one: Entry, plain: bytes | None) -> Erased:
        """Other bytes for an entry, or none at all; with the digest of those under which it is registered."""
        sealed = digest = b""
        if plain is not None:
            sealed = seal(self._keyring().service, plain, _aad(one.stream, one.fields))
            digest = one.fields.get(b"of") or sha256(one.plain).digest()
        [size] = await self._scripts.plain([("MEMORY", "USAGE", one.stream)])
        seen = sha1(one.fields[b"sealed"], usedforsecurity=False).hexdigest()
        args = (int((size or 0) <= SMALL_STREAM), one.id, seen, sealed, digest)
        [answer] = await self._scripts.run([Call("exchange", one.stream, args)])
        if isinstance(answer, Exception):
            raise answer
        return Erased(int(answer), 1 - int(answer))

    # --- whose -----------------------------------------------------------------------------------------------------

    def _naming(self, person: Person) -> Naming:
        ring = self._keyring()
        return Naming(person.tag, person.partition, person.lane, ring.pepper, ring.lane)

    @staticmethod
    def _limited_to(person: Person) -> frozenset[int]:
        """Account numbers; none: every account."""
        return frozenset() if 0 in person.accounts else person.accounts

    async def _accounts(self, person: Person) -> frozenset[str] | None:
        """The same by name; None: every account."""
        numbers = self._limited_to(person)
        if not numbers:
            return None
        wanted = select(account.c.name).where(account.c.number.in_(sorted(numbers)))
        return await self._store.write(lambda conn: frozenset(conn.scalars(wanted)))

    async def _held_jobs(self, accounts: frozenset[int]) -> list[tuple[int, str, str]]:
        """(number, account, job id) of scheduled jobs that are not over: those that may have chunks held."""
        wanted = select(job.c.number, account.c.name, job.c.job_id).join(account, account.c.number == job.c.account)
        wanted = wanted.where(job.c.send_at.is_not(None), job.c.done_at.is_(None)).order_by(job.c.number)
        if accounts:
            wanted = wanted.where(job.c.account.in_(sorted(accounts)))
        return await self._store.write(
            lambda conn: [(int(row[0]), str(row[1]), str(row[2])) for row in conn.execute(wanted)]
        )


def _submitted(
    ring: Keyring, fields: Mapping[bytes, bytes], jobs: Mapping[int, tuple[str, str]]
) -> tuple[str, bytes, str, str]:
    """(kind, plain bytes, account, job id) of an entry of the intake; b"": what the intake will not open either."""
    if b"held" in fields:
        number = int(fields[b"held"]) if fields[b"held"].isdigit() else 0
        stream = keyspace.stream_of_chunks(number)
        return "rows", _opened(ring.service, fields, _aad(stream, fields)), *jobs.get(number, ("", ""))
    if b"audience" in fields:
        whose, named = (fields.get(name, b"").decode("utf-8", "replace") for name in (b"account", b"audience"))
        count = fields.get(b"n", b"")
        purpose = client.audience_purpose(whose, named, int(count) if count.isdigit() else 0)
        return "rows", fields.get(b"data") or _unsealed(ring, fields, purpose), whose, named
    plain = fields.get(b"job") or _unsealed(ring, fields, client.job_purpose())
    told = naming.fields_of(plain)
    return "job", plain, str(told.get("account", "")), str(told.get("job_id", ""))


def _unsealed(ring: Keyring, fields: Mapping[bytes, bytes], purpose: bytes) -> bytes:
    try:
        return client.unseal(ring.intake, fields.get(b"sealed", b""), purpose)
    except client.UnsealError:
        return b""


def _opened(key: bytes, fields: Mapping[bytes, bytes], aad: bytes) -> bytes:
    try:
        return open_sealed(key, fields.get(b"sealed", b""), aad)
    except SealError:
        return b""


def _aad(stream: str, fields: Mapping[bytes, bytes]) -> bytes:
    """As `engine.campaign.filling` seals a chunk."""
    return f"held/{stream.rpartition(':')[2]}/".encode() + fields.get(b"n", b"")


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as an export shows it: a template field by its name behind ``fields.``, lists and the like as JSON text."""
    fields = row.get("fields")
    named = {f"fields.{name}": value for name, value in fields.items()} if isinstance(fields, dict) else {}
    flat = {**{name: value for name, value in row.items() if name != "fields"}, **named}
    return {
        name: value if value is None or isinstance(value, str | int) else msgspec.json.encode(value).decode()
        for name, value in flat.items()
    }
