"""The engine's places that hold personal data (design decision 14): the queue, from the intake stream to the lanes.

One place on purpose, because people move through it: an entry of the intake is expanded onto lanes, or held as a sealed
chunk and comes back, or is put away as rejected. Asked one by one, each could say "not here" while the person passes.

Laws:
- looked at in the order in which people move: intake, held chunks, the intake again, lanes; then what was put away. An
  entry of the intake is acknowledged only when its effect is in the lanes, so whoever was in it is met further on, or
  counted in `left` and met the next time;
- who waits in a slice leaves it with an end of its own (`engine.queue.erasing`), who waits in a held chunk leaves a
  blank row that ends at expansion, and a rejected entry goes whole (`engine.campaign.unexpanded`);
- nobody is asked for an address: subject numbers in slices, the tag everywhere else (`engine.campaign.naming`).

What else the floor keeps of people needs nothing done (`Queue.covers` names it): fingerprints of duplicates and the
journals hold (job, mref), which lead to nobody once the subject is gone and end with the job; event streams are drained
into the ledger within a second, where the policy's own places find them; lanes and lane sites hold a keyed domain and
end with the last slice.

Known limits: what is leased, in the intake or put away is not corrected (`amend`). Keys of jobs that were looked up are
forgotten when the question ends.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select

from engine.campaign import acceptance, naming
from engine.campaign.job import MOST_ROW_BYTES
from engine.campaign.unexpanded import PUT_AWAY, Unexpanded, shown
from engine.queue.erasing import Erasing, Found
from policy.address import mref_bytes, mref_of, normalise
from policy.instants import rfc3339
from policy.keys import Keyring, open_sealed
from policy.personal import Erased, Person, PersonalStore, Premises, Record
from policy.schema import account, job
from policy.wire import job_aad

_NOT_IN_A_HEADER: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def build(premises: Premises) -> Sequence[PersonalStore]:
    """Entry point ``engine`` of `policy.personal.GROUP`."""
    return [Queue(premises)]


@dataclass(frozen=True, slots=True, repr=False)
class _Job:
    """What is needed of a job. key: None once it is destroyed; one_line: fields that end in a header, None: unknown."""

    job_id: str
    account: int
    account_name: str
    key: bytes | None
    one_line: frozenset[str] | None


class Queue:
    """See the plate. Asked in the writer's process. Every method raises RedisError."""

    name = "queue"
    covers: Sequence[str] = (
        "key:intake", "key:rejected", "key:dead", "key:held chunks", "key:slice", "key:lane", "key:lane sites",
        "key:duplicates", "key:events", "file:journal", "file:journal, carried out",
    )  # fmt: skip

    def __init__(self, premises: Premises) -> None:
        self._store = premises.store
        self._keyring = premises.keyring
        self._jobs: dict[int, _Job | None] = {}
        self._unexpanded = Unexpanded(premises.redis, premises.store, premises.keyring)
        self._slices = Erasing(premises.redis, premises.keyring, self._job_key, premises.clock)

    def __repr__(self) -> str:
        return "<Queue>"

    async def find(self, person: Person) -> int:
        return len(await self.export(person))

    async def export(self, person: Person) -> list[Record]:
        """Kind queued: where it waits, for which job, until when, and the fields it would be written to with."""
        with self._asked():
            records = [_record("submitted", said) async for one in self._unexpanded.intake(person) for said in one.says]
            async for one in self._unexpanded.held(person):
                told = _of_job(await self._job(one.job))
                rows = one.plain.split(b"\n")
                records += [_record("held", {**told, **shown(naming.fields_of(rows[at]))}) for at in one.theirs]
            for lane in await self._lanes(person):
                for found in await self._slices.find(person.partition, lane, person.subjects):
                    records += await self._waiting(found)
            for stream, word in PUT_AWAY:
                async for one in self._unexpanded.put_away(stream, word, person):
                    records += [_record(word, said) for said in one.says]
            return records

    async def erase(self, person: Person) -> Erased:
        with self._asked():
            before = await self._submitted(person)
            told = Erased()
            async for one in self._unexpanded.held(person):
                told += await self._unexpanded.blank(one)
            told += Erased(left=max(before, await self._submitted(person)))
            for lane in await self._lanes(person):
                told += await self._slices.erase(person.partition, lane, person.subjects)
            for stream, word in PUT_AWAY:
                async for one in self._unexpanded.put_away(stream, word, person):
                    told += await self._unexpanded.drop(one)
            return told

    async def amend(self, person: Person, field: str, value: str) -> int:
        """A template field in slices that wait and in held chunks. Line breaks become spaces where the field ends in a
        header. The address is none: whoever has another is another person (P-41). Raises ValueError: too long."""
        if field == "address":
            return 0
        if len(value.encode("utf-8")) > MOST_ROW_BYTES:
            raise ValueError("the corrected value is longer than a row may be")
        flat = _NOT_IN_A_HEADER.sub(" ", value)

        async def fitting(number: int) -> str:
            known = await self._job(number)
            lines = known.one_line if known is not None else None
            return flat if lines is None or field in lines else value

        with self._asked():
            changed = 0
            async for one in self._unexpanded.held(person):
                changed += await self._unexpanded.correct(one, field, await fitting(one.job))
            for lane in await self._lanes(person):
                changed += await self._slices.amend(person.partition, lane, person.subjects, field, fitting)
            return changed

    async def _lanes(self, person: Person) -> list[str]:
        """Theirs; all of the partition, where the domain was lost with the key of the address."""
        if not person.subjects:
            return []
        return [person.lane] if person.lane else await self._slices.lanes(person.partition)

    async def _submitted(self, person: Person) -> int:
        """Rows of theirs in the intake."""
        return sum([len(one.says) async for one in self._unexpanded.intake(person)])

    # --- jobs ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """What was learnt of jobs is forgotten with the question: keys of jobs do not stay in memory."""
        self._jobs.clear()
        try:
            yield
        finally:
            self._jobs.clear()

    async def _job(self, number: int) -> _Job | None:
        if number not in self._jobs:
            self._jobs[number] = await self._store.write(lambda conn: _job_of(conn, self._keyring(), number))
        return self._jobs[number]

    async def _job_key(self, number: int) -> bytes | None:
        known = await self._job(number)
        return known.key if known is not None else None

    # --- slices ----------------------------------------------------------------------------------------------------

    async def _waiting(self, found: Found) -> list[Record]:
        header, contents = found.header, found.contents
        assert contents is not None
        known = await self._job(header.job)
        told, key = _of_job(known), known.key if known is not None else None
        records = []
        for index in found.fresh:
            row = contents.rows[index]
            state = "leased" if found.holder else "deferred" if header.attempt else "queued"
            if not found.holder and header.in_doubt(index):
                state = "in doubt"
            fields = dict(zip(contents.columns, row.values, strict=True))
            row_told = shown({"address": f"{row.local}@{contents.domain}", "fields": fields})
            ends = {"attempts": header.attempt, "due": rfc3339(found.due), "expires": rfc3339(header.expires_at)}
            named = mref_bytes(mref_of(key, normalise(row.local, contents.domain))).hex() if key is not None else None
            records.append(_record(state, {**told, "reference": named, **ends, **row_told}))
        return records


def _job_of(conn: Connection, keyring: Keyring, number: int) -> _Job | None:
    wanted = select(job.c.job_id, job.c.account, account.c.name, job.c.job_key, job.c.payload)
    row = conn.execute(
        wanted.join(account, account.c.number == job.c.account).where(job.c.number == number)
    ).one_or_none()
    if row is None:
        return None
    key = lines = None
    if row.job_key is not None:
        key = open_sealed(keyring.service, row.job_key, job_aad("key", row.name, row.job_id))
    if row.payload is not None:
        payload = open_sealed(keyring.service, row.payload, job_aad("payload", row.name, row.job_id))
        lines = frozenset(acceptance.opened(payload)[1].one_line)
    return _Job(row.job_id, row.account, row.name, key, lines)


def _of_job(known: _Job | None) -> dict[str, Any]:
    """A job that is not known any more has no names."""
    return {"account": known.account_name, "job": known.job_id} if known is not None else {"account": "", "job": ""}


def _record(state: str, values: Mapping[str, Any]) -> Record:
    return Record("queued", {"state": state, **values})
