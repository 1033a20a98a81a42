"""What is halted: accounts and domains by an operator's hand, jobs by their state. SQL is the truth, Redis is told.

Laws:
- paused: nothing is leased and the gate says no, within a second, also of what is leased already; nothing ends by it;
- cancelled (a domain): whoever waits there, or comes while it stands, ends CANCELLED, until `resume`;
- what Redis holds can be rebuilt from SQL alone (T12): `every` is all of it, `rebuild` brings it.

Words of a partition's set `keyspace.halts`, as the scripts of the queue read them:

    a<account>   paused or frozen        j<job>    paused, or held until its last chunk is in
    l<lane>      domain paused           c<lane>   domain cancelled: leased all the same, the gate says CANCELLED
    x<job>       ended by somebody's will: a share put from now on begins as cancelled (written with the job's state)

A domain's words are in its own partition, an account's and a job's in all of them. The lane reference is kept with the
domain, because its key never rotates; the domain itself is kept, for somebody has to know what is halted. So is the
reason as the operator wrote it: it goes with the halt, and nowhere else (`policy.remarks`).

Known limits: cancelling an account is an act, not a state: it cancels every open job of it (`policy.operations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from policy import keyspace
from policy.schema import account, halt, job

if TYPE_CHECKING:
    from redis.asyncio import Redis

PAUSED: Final = "paused"
CANCELLED: Final = "cancelled"
_EVERYWHERE: Final = range(keyspace.PARTITIONS)


@dataclass(frozen=True, slots=True)
class Halt:
    """One line of SQL. account 0: a domain. state: paused | cancelled; since: microseconds."""

    account: int
    domain: str
    lane: str
    state: str
    reason: str
    since: int


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the sets in Redis and the partitions it belongs to."""

    text: str
    partitions: Sequence[int]


# --- SQL ------------------------------------------------------------------------------------------------------------


def pause_account(conn: Connection, number: int, reason: str, now: int) -> bool:
    """False: it was paused already."""
    return _set(conn, Halt(number, "", "", PAUSED, reason, now))


def resume_account(conn: Connection, number: int) -> bool:
    """False: it was not paused. A frozen account stays frozen."""
    return conn.execute(delete(halt).where(halt.c.account == number, halt.c.domain == "")).rowcount == 1


def is_account_halted(conn: Connection, number: int) -> bool:
    """Paused here or frozen: what a<account> says."""
    frozen = select(account.c.number).where(account.c.number == number, account.c.state != "active")
    paused = select(halt.c.account).where(halt.c.account == number, halt.c.domain == "")
    return conn.execute(frozen).first() is not None or conn.execute(paused).first() is not None


def halt_domain(conn: Connection, domain: str, lane: str, state: str, reason: str, now: int) -> bool:
    """domain: A-label; state PAUSED or CANCELLED, the later word holds. False: it was so already."""
    return _set(conn, Halt(0, domain, lane, state, reason, now))


def resume_domain(conn: Connection, domain: str) -> bool:
    """False: it was not halted."""
    return conn.execute(delete(halt).where(halt.c.account == 0, halt.c.domain == domain)).rowcount == 1


def standing(conn: Connection) -> list[Halt]:
    """Every account and domain that is halted, accounts first."""
    rows = conn.execute(select(halt).order_by(halt.c.domain, halt.c.account))
    return [Halt(row.account, row.domain, row.lane, row.state, row.reason, row.since) for row in rows]


def cancelled_lanes(conn: Connection) -> list[tuple[int, str]]:
    """(partition, lane reference) of every domain that is cancelled."""
    rows = conn.execute(select(halt.c.domain, halt.c.lane).where(halt.c.account == 0, halt.c.state == CANCELLED))
    return [(keyspace.partition_of(row.domain), row.lane) for row in rows]


def unfinished(conn: Connection) -> list[int]:
    """Jobs that were cancelled (or lost, policy.losses) and have recipients whose end is not in the ledger yet."""
    open_ones = select(job.c.number).where(job.c.state.in_((CANCELLED, "lost")), job.c.done_at.is_(None))
    return [int(number) for number in conn.scalars(open_ones.order_by(job.c.number))]


def _set(conn: Connection, wanted: Halt) -> bool:
    mine = (halt.c.account == wanted.account, halt.c.domain == wanted.domain)
    known = conn.execute(select(halt.c.state).where(*mine)).scalar()
    if known == wanted.state:
        return False
    values = {"state": wanted.state, "reason": wanted.reason[:200], "since": wanted.since}
    if known is None:
        conn.execute(insert(halt).values(account=wanted.account, domain=wanted.domain, lane=wanted.lane, **values))
    else:
        conn.execute(update(halt).where(*mine).values(**values))
    return True


# --- Redis ----------------------------------------------------------------------------------------------------------


def words_of_domain(lane: str, state: str | None) -> dict[str, bool]:
    """Which words stand in the partition of a domain; None: resumed."""
    return {f"l{lane}": state == PAUSED, f"c{lane}": state == CANCELLED}


def every(conn: Connection) -> list[Word]:
    """All that must stand in Redis, from SQL as it is in this transaction."""
    frozen = conn.scalars(select(account.c.number).where(account.c.state != "active")).all()
    halts = standing(conn)
    accounts = sorted({*frozen, *(one.account for one in halts if one.account)})
    words = [Word(f"a{number}", _EVERYWHERE) for number in accounts]
    words += [Word(f"j{number}", _EVERYWHERE) for number in conn.scalars(select(job.c.number).where(_held()))]
    words += [Word(f"x{number}", _EVERYWHERE) for number in unfinished(conn)]
    for one in halts:
        if one.account == 0:
            letter = "l" if one.state == PAUSED else "c"
            words.append(Word(f"{letter}{one.lane}", (keyspace.partition_of(one.domain),)))
    return words


def _held() -> ColumnElement[bool]:
    """Paused, or asked to be held until all its chunks are in."""
    waits = (job.c.wait == 1) & job.c.rows_submitted.is_(None) & job.c.state.in_(("accepted", "expanding"))
    return (job.c.state == "paused") | waits


async def tell(redis: Redis, words: Iterable[tuple[str, bool, Sequence[int]]]) -> None:
    """Put words (text, whether it stands, partitions) into the sets or take them out. Raises redis.RedisError."""
    async with redis.pipeline(transaction=False) as pipe:
        for text, stands, partitions in words:
            for partition in partitions:
                pipe.execute_command("SADD" if stands else "SREM", keyspace.halts(partition), text)
        await pipe.execute()


async def rebuild(redis: Redis, conn: Connection, *, add_only: bool = False) -> int:
    """Make the sets hold what SQL says, after a loss or a restore; how many words there are.

    Words SQL does not know are taken out only where it must know them: a job that was accepted after this snapshot may
    have been held by its intake meanwhile. add_only: SQL itself came back older, nothing is taken out. Additions first,
    so that nothing is free for an instant. The caller sees to it that no other halt is told meanwhile.
    """
    words = every(conn)
    await tell(redis, [(word.text, True, word.partitions) for word in words])
    if add_only:
        return len(words)
    newest = int(conn.execute(select(job.c.number).order_by(job.c.number.desc()).limit(1)).scalar() or 0)
    wanted: dict[int, set[str]] = {partition: set() for partition in _EVERYWHERE}
    for word in words:
        for partition in word.partitions:
            wanted[partition].add(word.text)
    async with redis.pipeline(transaction=False) as pipe:
        for partition in _EVERYWHERE:
            pipe.execute_command("SMEMBERS", keyspace.halts(partition))
        held: list[Any] = await pipe.execute()
    stale: list[tuple[str, bool, Sequence[int]]] = []
    for partition, members in zip(_EVERYWHERE, held, strict=True):
        for raw in members:
            text = raw.decode("ascii")
            if text not in wanted[partition] and not (text[0] in "jx" and int(text[1:]) > newest):
                stale.append((text, False, (partition,)))
    await tell(redis, stale)
    return len(words)
