"""The tracker's places that hold personal data (design decision 14): hits on their way into the ledger.

A hit is (job, mref) with a mode, no name and no subject (decision 12). It waits in Redis until the writer's next look,
a second at most, then in the ledger, which is the policy's own place; entries are let go of there once they are
committed. So nothing is taken out here: what still waits is counted in `left`, and asked about again.

What else this floor keeps of people is memory: the negative list (subject numbers that must not be remembered; SQL is
its truth, `policy.negative`), and the buffer of the recorder, which asks that list again before it writes.

Law: a person is known here by the references of their messages alone (`Person.references`); without them nothing is
found, and nothing that is found later leads to them: their subject is gone.

Known limits: the stream is read whole, some 2 us a hit. While the ledger is behind, `left` stays above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
from sqlalchemy import Connection, select

from policy import keyspace
from policy.address import mref_bytes
from policy.events import Hit, Kind, decode_hits
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.personal import Erased, Person, PersonalStore, Premises, Record, Value
from policy.plain import visitor
from policy.schema import account, job, link
from policy.store import Store
from policy.valkey import Client

PAGE = 64  # entries read at a time, 12 kB each when full


def build(premises: Premises) -> Sequence[PersonalStore]:
    """Entry point ``tracker`` of `policy.personal.GROUP`."""
    return [Hits(premises.redis, premises.store)]


class Hits:
    """See the plate. Every method raises RedisError."""

    name = "hits"
    covers: Sequence[str] = ("key:hits",)

    def __init__(self, redis: Client, store: Store) -> None:
        self._redis = redis
        self._store = store

    def __repr__(self) -> str:
        return "<Hits>"

    async def find(self, person: Person) -> int:
        return len(await self._waiting(person))

    async def export(self, person: Person) -> list[Record]:
        """As the ledger will have them: what its mode leaves of each."""
        hits = await self._waiting(person)
        return await self._store.write(lambda conn: [_told(conn, hit) for hit in hits]) if hits else []

    async def erase(self, person: Person) -> Erased:
        """The ledger has them in a moment: until then they are left."""
        return Erased(left=await self.find(person))

    async def amend(self, person: Person, field: str, value: str) -> int:
        """There are no fields here."""
        return 0

    async def _waiting(self, person: Person) -> list[Hit]:
        wanted = frozenset(person.references)
        newest: Any = await self._redis.xrevrange(keyspace.HITS, count=1) if wanted else []
        if not newest:
            return []
        last, place = newest[0][0].decode("ascii"), "-"
        found: list[Hit] = []
        while some := cast(Any, await self._redis.xrange(keyspace.HITS, min=place, max=last, count=PAGE)):
            for _, fields in some:
                try:
                    hits = decode_hits(next(iter(fields.values())))
                except msgspec.DecodeError:  # passed over by the ledger, too
                    continue
                # counted hits (AGGREGATE) carry no reference: they are nobody's
                found += [hit for hit in hits if hit.mode != Mode.AGGREGATE and (hit.job, hit.mref) in wanted]
            place = f"({some[-1][0].decode('ascii')}"
        return found


def _told(conn: Connection, hit: Hit) -> Record:
    wanted = select(account.c.name, job.c.job_id).join(account, account.c.number == job.c.account)
    known = conn.execute(wanted.where(job.c.number == hit.job)).one_or_none()
    values: dict[str, Value] = {
        "account": known.name if known is not None else "",
        "job": known.job_id if known is not None else "",
        "reference": mref_bytes(hit.mref).hex(),
    }
    if hit.mode == Mode.DELIVERABILITY:
        day = rfc3339(hit.at - hit.at % DAY_US)
        return Record(
            "inferred", {**values, "what": "the mailbox is read", "value": "on that day or before", "at": day}
        )
    url = conn.execute(select(link.c.url).where(link.c.job == hit.job, link.c.number == hit.link)).scalar()
    event = Kind(hit.kind).name.lower()
    at = rfc3339(hit.at - hit.at % HOUR_US)
    return Record("event", {**values, "event": event, "at": at, "link": url or "", "visitor": visitor(hit.visitor)})
