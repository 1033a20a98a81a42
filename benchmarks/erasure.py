"""How long the answer to an erasure takes in a large ledger; last, one line of JSON.

    python -m benchmarks.erasure [--messages N] [--own N] [--people N] [--json-only]

N messages (default two million) of the last 90 days with all their indexes in a real SQLite file, `own` of them of each
of `people` persons whose subjects are a year old, so that every week has its pseudonym. Then the people are erased, one
after another, through the real writer's hand (`policy.erasing`) over a real Valkey: suppressed, in force at the gate,
listed, shredded, with tombstone and audit lines. Wall time of each answer; then until all receipts are given.

Seconds on a shared machine drift; the bar of the issue is one second an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select

from policy import accounts, erasing, records, schema, statements, vault
from policy.address import tag_of
from policy.instants import DAY_US, WEEK_US, week_of
from policy.keyspace import partition_of
from policy.personal import Premises
from policy.tombstones import NAME, Tombstones
from tests.world.servers import policy_world

_DAYS: Final = 90
_COLUMNS: Final = "job, mref, kind, reason, domain, code, enhanced, attempts, at, day, pseudonym, tag_sealed, tls, note"


def fill(conn: Connection, count: int, own: int, names: list[list[int]], now: int) -> None:
    """names: of each person the pseudonyms by week, the oldest first."""
    job = conn.execute(select(func.min(schema.job.c.number))).scalar_one()
    chance = random.Random(7)

    def row(place: int, at: int, pseudonym: int) -> tuple[Any, ...]:
        mref = chance.getrandbits(63)
        return (job + place % 20, mref, 1, 0, 1, 250, "2.0.0", 1, at, at // DAY_US, pseudonym, os.urandom(40), 3, None)

    def rows() -> Iterator[tuple[Any, ...]]:
        for place in range(count):
            at = now - _DAYS * DAY_US + place * _DAYS * DAY_US // count
            yield row(place, at, chance.getrandbits(63) or 1)
        for of_person in names:
            for place in range(own):
                at = now - _DAYS * DAY_US + place * _DAYS * DAY_US // own
                yield row(place, at, of_person[week_of(at) - week_of(now) - 1])

    sql = statements.insert(conn.dialect.name, "message", _COLUMNS, "DO NOTHING")
    part: list[tuple[Any, ...]] = []
    for one in rows():
        part.append(one)
        if len(part) == 20_000:
            conn.exec_driver_sql(sql, part)
            part = []
    if part:
        conn.exec_driver_sql(sql, part)


def prepare(conn: Connection, keyring: Any, people: list[str], messages: int, own: int, now: int) -> None:
    holder = accounts.add(conn, "acme", display_name="Acme", now=now).number
    values = {
        "account": holder, "hash": b"h", "state": "done", "kind": "campaign", "legal_basis": "consent",
        "in_doubt": "hold", "priority": 0, "wait": 0, "opens_mode": 0, "clicks_mode": 0, "created_at": now,
        "accepted_at": now, "chunks_expected": 1, "done_at": now,
    }  # fmt: skip
    for place in range(20):
        conn.execute(insert(schema.job).values(job_id=f"job-{place}", **values))
    born = now - 52 * WEEK_US
    rows = [(tag_of(keyring.pepper, one), partition_of("one.example"), one) for one in people]
    resolved = vault.resolve(conn, keyring, holder, rows, week_of(born), born)
    names = []
    for number, _ in resolved:
        subject = vault.get(conn, keyring, number)
        assert subject is not None
        names.append([subject.pseudonym(week_of(now) - back) for back in range(52, -1, -1)])
    fill(conn, messages, own, names, now)


async def measure(messages: int, own: int, people: int) -> dict[str, Any]:
    async with policy_world() as world:
        writer, now = world.writer, world.clock()
        addresses = [f"person{place}@one.example" for place in range(people)]
        begun = time.perf_counter()
        await writer.store.write(lambda conn: prepare(conn, world.keyring, addresses, messages, own, now))
        filled = time.perf_counter() - begun
        premises = Premises(world.settings, writer.store, writer.redis, lambda: writer.keyring, world.clock)
        places = records.build(premises)
        ledger = Tombstones(world.settings.data_dir / "tombstones" / NAME)
        made = erasing.Erasing(premises, writer.enforcement, ledger, writer._book.guard, lambda: places)
        await made.load()
        answers = []
        listed = 0
        for address in addresses:
            began = time.perf_counter()
            tag = tag_of(world.keyring.pepper, address)
            told = await made.erase(0, tag, partition_of("one.example"), address, "request", None)
            answers.append(time.perf_counter() - began)
            listed += told["messages"]
        began = time.perf_counter()
        while made.statistics()["erasures_open"]:
            await made.round()
            await asyncio.sleep(0.02)
        return {
            "messages": messages,
            "own": own,
            "people": people,
            "listed": listed,
            "filled_seconds": round(filled, 1),
            "answer_seconds_median": round(sorted(answers)[len(answers) // 2], 4),
            "answer_seconds_max": round(max(answers), 4),
            "all_receipts_seconds": round(time.perf_counter() - began, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=2_000_000)
    parser.add_argument("--own", type=int, default=1_000, help="messages of each person")
    parser.add_argument("--people", type=int, default=9)
    parser.add_argument("--json-only", action="store_true")
    arguments = parser.parse_args()
    told = asyncio.run(measure(arguments.messages, arguments.own, arguments.people))
    if not arguments.json_only:
        print(
            f"{told['messages']:,} messages: {told['answer_seconds_median']} s an erasure of {told['own']:,} messages,"
            f" {told['answer_seconds_max']} s at most; receipts of all after {told['all_receipts_seconds']} s"
        )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
