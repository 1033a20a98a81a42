"""To whom we may not write: keyed tags with a scope and a reason, in SQL the truth, in Redis for the gate to read.

Laws:
- SQL decides. What Redis holds of a tag is computed from SQL (`fields`) and replaced as a whole, so a push repeated,
  late or after a restore from an older dump heals and never undoes an opt-out (T11);
- each reason stands by itself: a restriction lifted leaves the opt-out beside it, a bounce that expires leaves the
  complaint. The same reason again keeps the earlier beginning and the later end;
- an entry survives erasure: it holds no address and no subject, only the tag (decision 13, P-22).

The path of an opt-out: `add` in the writer's transaction · commit · `fields` of the tags touched · `push` · only then
the answer. A failed push is an error to the caller (503), SQL keeps the entry, `rebuild` brings it to Redis.

In Redis: key `keyspace.suppression(partition, tag)`, field the 12 bytes of the tag, value cells of 6 bytes: scope
(1), scope id (4, big-endian), the `policy.events.Reason` the gate answers (1). Small hashes stay listpacks: 1,024
buckets in 64 partitions hold a million entries with 15 a bucket, at 27.0 bytes of Redis memory each (measured with
Valkey 9.1; tests/policy/test_suppression.py keeps the limit of 32); `rebuild` of a million takes six seconds of CPU.

Known limits: a value above 64 bytes (a person with more than ten scopes) turns its bucket into a hash table, ten times
the memory for these 15 entries. Pushes of one tag must not overtake each other: the one writer does them in order of
commit. An expired entry works in Redis until `expire` is run and pushed.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, Select, delete, func, insert, or_, select, update

from policy import keyspace
from policy.events import Reason
from policy.schema import suppression as table

if TYPE_CHECKING:
    from redis.asyncio import Redis

CELL_BYTES = 6
_MANY = 500  # tags a statement; SQLite takes 32,766 variables, PostgreSQL 65,535


class Scope(enum.IntEnum):
    """How far an entry reaches. scope_id: 0 for the platform, else the number of the account, list or topic."""

    PLATFORM = 1
    ACCOUNT = 2
    LIST = 3
    TOPIC = 4


# What the gate answers for each reason. A closed vocabulary: an unknown reason is a caller's error, not an entry.
REASONS: dict[str, Reason] = {
    "opt-out": Reason.SUPPRESSED,
    "complaint": Reason.SUPPRESSED,
    "bounce": Reason.SUPPRESSED,
    "manual": Reason.SUPPRESSED,
    "import": Reason.SUPPRESSED,
    "restriction": Reason.RESTRICTED,
    "erasure": Reason.ERASED,
}
# Of several reasons in one scope the gate gives one: that which says most about why nothing will ever be sent.
_RANK = {Reason.SUPPRESSED: 1, Reason.RESTRICTED: 2, Reason.ERASED: 3}


@dataclass(frozen=True, slots=True)
class Entry:
    """One reason not to write to a tag. created, expires: microseconds, expires None for never; source: a slug."""

    tag: bytes
    partition: int
    scope: Scope
    scope_id: int
    reason: str
    created: int
    source: str = ""
    expires: int | None = None

    def __post_init__(self) -> None:
        if len(self.tag) != 12:
            raise ValueError("a suppression tag has 12 bytes")
        if not 0 <= self.partition < keyspace.PARTITIONS:
            raise ValueError(f"partition {self.partition} does not exist")
        if self.reason not in REASONS:
            raise ValueError(f"unknown suppression reason {self.reason!r}, one of {', '.join(REASONS)}")
        if not 0 <= self.scope_id < 1 << 32 or (self.scope is Scope.PLATFORM) != (self.scope_id == 0):
            raise ValueError(f"scope id {self.scope_id} does not fit scope {Scope(self.scope).name.lower()}")


@dataclass(frozen=True, slots=True)
class Field:
    """What Redis holds of one tag: the cells, or b"" when nothing stands against it and the field goes."""

    partition: int
    tag: bytes
    value: bytes


def add(conn: Connection, entries: Iterable[Entry]) -> int:
    """Enter reasons; how many were new or changed. Then `push` what `fields` says of their tags."""
    wanted: dict[tuple[bytes, int, int, str], Entry] = {}
    for entry in entries:
        key = (entry.tag, int(entry.scope), entry.scope_id, entry.reason)
        wanted[key] = _merged(wanted[key], entry) if key in wanted else entry
    stored = {
        (entry.tag, int(entry.scope), entry.scope_id, entry.reason): entry
        for entry in _entries_of(conn, {key[0] for key in wanted})
    }
    fresh = []
    changed = 0
    for key, entry in wanted.items():
        before = stored.get(key)
        if before is None:
            fresh.append(_row(entry))
            continue
        after = _merged(before, entry)
        if (after.created, after.expires) != (before.created, before.expires):
            tag, scope, scope_id, reason = key
            conn.execute(
                update(table)
                .where(table.c.tag == tag, table.c.scope == scope)
                .where(table.c.scope_id == scope_id, table.c.reason == reason)
                .values(created=after.created, expires=after.expires)
            )
            changed += 1
    if fresh:
        conn.execute(insert(table), fresh)
    return len(fresh) + changed


def remove(conn: Connection, tag: bytes, scope: Scope, scope_id: int, reason: str | None = None) -> int:
    """Take back a reason, or every reason of a scope; how many there were. Then `push`."""
    statement = delete(table).where(table.c.tag == tag, table.c.scope == int(scope), table.c.scope_id == scope_id)
    if reason is not None:
        statement = statement.where(table.c.reason == reason)
    return conn.execute(statement).rowcount


def expire(conn: Connection, now: int) -> list[tuple[bytes, int]]:
    """Delete what has ended (an end is exclusive); the (tag, partition) pairs to push."""
    ended = table.c.expires <= now
    tags = [(row.tag, row.partition) for row in conn.execute(select(table.c.tag, table.c.partition).where(ended))]
    if tags:
        conn.execute(delete(table).where(ended))
    return sorted(set(tags))


def check(conn: Connection, tag: bytes) -> list[Entry]:
    """Everything known against a tag, widest scope first; ended entries included until `expire` runs."""
    return _entries_of(conn, [tag])


def every(conn: Connection) -> Iterator[Entry]:
    """All entries by partition and tag, read a thousand at a time: for `rebuild` and export."""
    statement = select(table).order_by(table.c.partition, table.c.tag, table.c.scope, table.c.scope_id)
    yield from map(_entry, conn.execute(statement.execution_options(yield_per=1000)))


def count(conn: Connection) -> int:
    """How many entries `every` gives."""
    return int(conn.execute(select(func.count()).select_from(table)).scalar_one())


def fields(conn: Connection, tags: Iterable[tuple[bytes, int]], now: int) -> list[Field]:
    """What Redis must hold of these (tag, partition) pairs, from SQL as it stands in this transaction."""
    places = dict(tags)
    standing: dict[bytes, list[_Reason]] = {tag: [] for tag in places}
    for some in _batched(places, _MANY):
        for _, tag, scope, scope_id, reason in conn.execute(_standing(now).where(table.c.tag.in_(some))):
            standing[tag].append((scope, scope_id, reason))
    return [Field(partition, tag, _cells(standing[tag])) for tag, partition in places.items()]


async def push(redis: Redis, changes: Sequence[Field]) -> None:
    """Write the fields to Redis. Raises redis.RedisError: then nobody may be told that it is done."""
    if not changes:
        return
    pipeline = redis.pipeline(transaction=False)
    for field in changes:
        key = keyspace.suppression(field.partition, field.tag)
        if field.value:
            pipeline.hset(key, field.tag, field.value)
        else:
            pipeline.hdel(key, field.tag)
    await pipeline.execute()


async def rebuild(redis: Redis, conn: Connection, now: int) -> int:
    """Make Redis hold exactly what SQL says, after a loss or a restore; how many tags there are.

    A few hundred buckets of one partition in one MULTI, so that nobody suppressed is free for an instant; buckets that
    SQL does not know go away. Reads one snapshot: the caller sees to it that no push runs meanwhile.
    """
    total = 0
    for partition, first, buckets in _runs_of_buckets(conn, now):
        pipeline = redis.pipeline(transaction=True)
        for offset, bucket in enumerate(buckets):
            key = keyspace.suppression(partition, (first + offset << 6).to_bytes(2, "big"))
            pipeline.delete(key)
            if bucket:
                pipeline.hset(key, mapping=dict(bucket))  # type: ignore[arg-type]  # stubs know no bytes field names
                total += len(bucket)
        await pipeline.execute()
    return total


_RUN = 256  # buckets a MULTI: some 4,000 entries at a million, a few milliseconds of the server's time


def _runs_of_buckets(conn: Connection, now: int) -> Iterator[tuple[int, int, list[dict[bytes, bytes]]]]:
    """Every bucket of every partition in order, the empty ones too: (partition, first bucket, contents)."""
    statement = _standing(now).order_by(table.c.partition, table.c.tag).execution_options(yield_per=5000)
    by_tag = itertools.groupby(conn.execute(statement), key=itemgetter(0, 1))
    following = next(by_tag, None)
    for partition in range(keyspace.PARTITIONS):
        for first in range(0, keyspace.SUPPRESSION_BUCKETS, _RUN):
            buckets: list[dict[bytes, bytes]] = [{} for _ in range(_RUN)]
            while following is not None:
                (place, tag), reasons = following
                number = int.from_bytes(tag[:2], "big") >> 6
                if (place, number) >= (partition, first + _RUN):
                    break
                buckets[number - first][tag] = _cells(
                    [(scope, scope_id, reason) for _, _, scope, scope_id, reason in reasons]
                )
                following = next(by_tag, None)
            yield partition, first, buckets


def _standing(now: int) -> Select[Any]:
    """(partition, tag, scope, scope id, reason) of all that has not ended: a million of them make no objects."""
    return select(table.c.partition, table.c.tag, table.c.scope, table.c.scope_id, table.c.reason).where(
        or_(table.c.expires.is_(None), table.c.expires > now)
    )


_CELL = struct.Struct(">BIB")
_Reason = tuple[int, int, str]  # scope, scope id, reason


def _cells(reasons: Sequence[_Reason]) -> bytes:
    """One cell a scope, in order of scope and id, with the answer of the strongest reason that stands there."""
    if len(reasons) == 1:
        [(scope, scope_id, reason)] = reasons
        return _CELL.pack(scope, scope_id, REASONS[reason])
    strongest: dict[tuple[int, int], Reason] = {}
    for scope, scope_id, reason in reasons:
        answer = REASONS[reason]
        before = strongest.get((scope, scope_id))
        if before is None or _RANK[answer] > _RANK[before]:
            strongest[scope, scope_id] = answer
    return b"".join(_CELL.pack(*place, answer) for place, answer in sorted(strongest.items()))


def _merged(one: Entry, other: Entry) -> Entry:
    """The same reason twice: the earlier beginning, the later end (None is never)."""
    end = None if one.expires is None or other.expires is None else max(one.expires, other.expires)
    return replace(one, created=min(one.created, other.created), expires=end)


def _entries_of(conn: Connection, tags: Iterable[bytes]) -> list[Entry]:
    found: list[Entry] = []
    for some in _batched(tags, _MANY):
        statement = select(table).where(table.c.tag.in_(some)).order_by(table.c.tag, table.c.scope, table.c.scope_id)
        found.extend(map(_entry, conn.execute(statement)))
    return found


def _batched(items: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """itertools.batched comes with Python 3.12."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some


def _entry(row: Row[Any]) -> Entry:
    return Entry(
        tag=row.tag,
        partition=row.partition,
        scope=Scope(row.scope),
        scope_id=row.scope_id,
        reason=row.reason,
        created=row.created,
        source=row.source,
        expires=row.expires,
    )


def _row(entry: Entry) -> dict[str, object]:
    return {
        "tag": entry.tag,
        "partition": entry.partition,
        "scope": int(entry.scope),
        "scope_id": entry.scope_id,
        "reason": entry.reason,
        "created": entry.created,
        "source": entry.source,
        "expires": entry.expires,
    }
