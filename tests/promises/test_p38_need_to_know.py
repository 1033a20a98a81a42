"""P-38: every read of personal data is asked for first, limited by role, and written down without saying whom."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis
from sqlalchemy import Connection, select

from policy import purposes, readings, schema
from policy.keys import Keyring
from policy.readings import Answer, Asked
from tests.promises.floor import EVE, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

SUPPORT = "support/00ff00ff00ff00ff"
LIMITS = {"support": 200, "officer": 0}


def _reads(conn: Connection, **more: Any) -> Answer:
    return readings.enter(conn, Asked(SUPPORT, "support", **more), LIMITS, purposes.registry(), NOW)


@promise("P-38", off={"policy.readings._is_over": lambda *asked: False})
def test_p38_support_exporting_ten_thousand_contacts_is_denied_with_a_log_entry(conn: Connection) -> None:
    assert _reads(conn, what="contact export", account=1, count=10_000).denied == "over-limit"
    [line] = conn.execute(select(schema.audit)).all()
    assert (line.action, line.result, line.actor) == ("read-denied", "over-limit", SUPPORT)
    assert conn.execute(select(schema.reading)).all() == []
    assert _reads(conn, what="contact export", account=1, count=200).rows == 1


@promise("P-38", off={"policy.readings._keyed": lambda keyring, person, data: data[:16].ljust(16)})
async def test_p38_the_log_of_reads_has_no_address(floor: Floor, keyring: Keyring, redis: Redis) -> None:
    """Who, what for, how many and a hash of the question: who reads the log learns of nobody."""
    tag, _, _ = floor.house.row(EVE)
    query = readings.query_hash(keyring, EVE)
    actor = readings.actor_of(keyring, "support", "eve.adams")
    asked = Asked(actor, "support", "story", tag=tag, query=query)
    await floor.write(lambda conn: readings.enter(conn, asked, LIMITS, purposes.registry(), NOW))
    mine = [row for row in await floor.rows(schema.reading) if row.query == query]
    assert len(mine) == 2, "she is known at two accounts"
    for row in [*mine, *await floor.rows(schema.audit)]:
        assert "adams" not in repr(tuple(row)).lower()
        assert b"eve.adams".hex() not in repr(tuple(row)).lower()


@promise("P-38", off={"policy.dockets.Readings.told": lambda self, conn, person: iter(())})
async def test_p38_the_access_log_is_part_of_the_persons_export(floor: Floor) -> None:
    told = [record.values for record in await floor.told() if record.kind == "consultation"]
    assert [(one["purpose"], one["what"]) for one in told if one["purpose"] == "support"] == [("support", "why")]


@promise("P-38", off={"policy.readings.Asked.role": "officer"})
def test_p38_a_role_that_nobody_gave_a_limit_reads_nobody(conn: Connection) -> None:
    asked = Asked("intern/00ff00ff00ff00ff", "support", "story", subject=7)
    assert readings.enter(conn, asked, LIMITS, purposes.registry(), NOW).denied == "over-limit"
