"""How long the answer to an erasure takes in a large ledger; last, one line of JSON.

    python -m benchmarks.erasure [--messages N] [--own N] [--people N] [--no-search] [--json-only]

N messages (default two million) of the last 90 days with all their indexes in a real SQLite file, `own` of them of each
of `people` persons whose subjects are a year old, so that every week has its pseudonym; each of their own was deferred
once and opened once. Then the people are erased, one after another, as the command asks (writer's socket, the places of
every floor, a real Valkey): suppressed, in force at the gate, listed, shredded, with tombstone and audit lines.

Told: wall time of each answer; opt-outs of others meanwhile (a writer that is busy with an erasure must not keep them);
time until all receipts are given; then every file and every value of Redis searched for the first of them, in each form
of `tests.world.traces`, as a search before had found them. Exit code 1: an answer took a second or more (the bar of the
issue), or something was found.

Seconds on a shared machine drift. Known limits: the search is for one person; a reader of the database would delay the
receipts (`policy.erasing`), here there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import Connection, func, insert, select

from policy import accounts, schema, statements, vault
from policy.address import tag_of
from policy.events import Kind
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US, WEEK_US, week_of
from policy.keyspace import partition_of
from tests.world.servers import PolicyWorld, policy_world
from tests.world.traces import Traces, open_values

_BAR_SECONDS: Final = 1.0  # issue 5, "must show"
_DAYS: Final = 90
_DOMAIN: Final = "one.example"
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
                made = row(place, at, of_person[week_of(at) - week_of(now) - 1])
                theirs.append((made[0], made[1], at))
                yield made

    theirs: list[tuple[int, int, int]] = []
    sql = statements.insert(conn.dialect.name, "message", _COLUMNS, "DO NOTHING")
    part: list[tuple[Any, ...]] = []
    for one in rows():
        part.append(one)
        if len(part) == 20_000:
            conn.exec_driver_sql(sql, part)
            part = []
    if part:
        conn.exec_driver_sql(sql, part)
    steps = [
        {
            "job": job, "mref": mref, "attempt": 1, "kind": int(Kind.DEFERRED), "at": at, "day": at // DAY_US,
            "reason": 0, "code": 451, "enhanced": "4.7.1", "note": os.urandom(60),
        }
        for job, mref, at in theirs
    ]  # fmt: skip
    opens = [
        {
            "job": job, "mref": mref, "kind": int(Kind.OPENED), "link": -1, "hour": at // HOUR_US,
            "day": at // DAY_US, "visitor": 33, "mode": int(Mode.INDIVIDUAL),
        }
        for job, mref, at in theirs
    ]  # fmt: skip
    if theirs:
        conn.execute(insert(schema.history), steps)
        conn.execute(insert(schema.hit), opens)


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
    rows = [(tag_of(keyring.pepper, one), partition_of(_DOMAIN), one) for one in people]
    resolved = vault.resolve(conn, keyring, holder, rows, week_of(born), born)
    names = []
    for number, _ in resolved:
        subject = vault.get(conn, keyring, number)
        assert subject is not None
        names.append([subject.pseudonym(week_of(now) - back) for back in range(52, -1, -1)])
    fill(conn, messages, own, names, now)


async def measure(messages: int, own: int, people: int, is_searched: bool) -> dict[str, Any]:
    async with policy_world() as world:
        now = world.clock()
        addresses = [f"person{place}.quillonzwx@{_DOMAIN}" for place in range(people)]
        await open_values(world.redis)
        begun = time.perf_counter()
        await world.writer.store.write(lambda conn: prepare(conn, world.keyring, addresses, messages, own, now))
        filled = time.perf_counter() - begun
        first = await _first(world, addresses[0])
        before = len(first.in_files(world.settings.data_dir)) if is_searched else 0

        others = asyncio.create_task(_opt_outs(world))
        answers, listed = [], 0
        receipts = time.perf_counter()
        for address in addresses:
            began = time.perf_counter()
            tag = tag_of(world.keyring.pepper, address)
            told = await world.ask.call("erase", account=0, tag=tag, partition=partition_of(_DOMAIN), address=address)
            answers.append(time.perf_counter() - began)
            listed += told["messages"]
        while world.writer.erasing.statistics()["erasures_open"]:  # noqa: ASYNC110 - the work of a loop of the writer
            await asyncio.sleep(0.02)
        receipts = time.perf_counter() - receipts
        others.cancel()
        waits = await others
        found = 0
        if is_searched:
            found = len(first.in_files(world.settings.data_dir)) + len(await first.in_redis(world.redis))
        return {
            "messages": messages,
            "own": own,
            "people": people,
            "listed": listed,
            "filled_seconds": round(filled, 1),
            "answer_seconds_median": round(sorted(answers)[len(answers) // 2], 4),
            "answer_seconds_max": round(max(answers), 4),
            "all_receipts_seconds": round(receipts, 2),
            "optouts_meanwhile": len(waits),
            "optout_seconds_max": round(max(waits, default=0.0), 4),
            "files_with_traces_before": before,
            "places_with_traces_after": found,
            "ok": max(answers) < _BAR_SECONDS and found == 0 and (before > 0 or not is_searched),
        }


async def _first(world: PolicyWorld, address: str) -> Traces:
    """What of the first person can be searched for: the address, and what lies sealed."""
    tag = tag_of(world.keyring.pepper, address)
    wanted = select(schema.subject.c.address, schema.subject.c.key).where(schema.subject.c.tag == tag)
    rows = await world.writer.store.write(lambda conn: conn.execute(wanted).all())
    return Traces.of(address, raw=[octets for row in rows for octets in row])


async def _opt_outs(world: PolicyWorld) -> list[float]:
    """Of other people, one after another until it is cancelled: seconds of each answer."""
    waits: list[float] = []
    chance = random.Random(11)
    offers = await world.ask.list_add(1, "offers")
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            began = time.perf_counter()
            await world.ask.opt_out(offers, partition_of(_DOMAIN), chance.randbytes(12), "page")
            waits.append(time.perf_counter() - began)
            await asyncio.sleep(0.01)
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=2_000_000)
    parser.add_argument("--own", type=int, default=1_000, help="messages of each person")
    parser.add_argument("--people", type=int, default=9)
    parser.add_argument("--no-search", action="store_true", help="do not search for what is left")
    parser.add_argument("--json-only", action="store_true")
    arguments = parser.parse_args()
    told = asyncio.run(measure(arguments.messages, arguments.own, arguments.people, not arguments.no_search))
    if not arguments.json_only:
        print(
            f"{told['messages']:,} messages: {told['answer_seconds_median']} s an erasure of {told['own']:,} messages,"
            f" {told['answer_seconds_max']} s at most; receipts of all after {told['all_receipts_seconds']} s;"
            f" an opt-out of somebody else waited {told['optout_seconds_max']} s at most"
        )
        if not arguments.no_search:
            print(f"places where something of the first is left: {told['places_with_traces_after']}")
    print(json.dumps(told))
    sys.exit(0 if told["ok"] else 1)


if __name__ == "__main__":
    main()
