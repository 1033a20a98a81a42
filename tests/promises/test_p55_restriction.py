"""P-55: a restricted person is stored and nothing else; it ends after notice, and nothing that stood before is lost."""

from __future__ import annotations

from typing import Any

import aiohttp
from redis.asyncio import Redis
from sqlalchemy import Connection, delete

from policy import negative, vault
from policy.events import Hit, Reason, decode_hits
from policy.gate import Mode, Permit, Refusal
from policy.instants import DAY_US
from policy.keyspace import HITS
from policy.schema import open_store, suppression
from policy.suppression import Scope
from policy.valkey import connect
from tests.policy.stores import url_of
from tests.promises.floor import BOB, Floor, floor
from tests.promises.marks import promise
from tests.tracker.twins import LINKS, MemoryWriter, path_of, until
from tracker.app import Tracker
from tracker.settings import TrackerSettings
from tracker.tables import SqlSource

__all__ = ["floor"]


@promise("P-55", off={"policy.rights.protections._suppress": lambda *asked: None})
async def test_p55_no_campaign_reaches_a_restricted_person_and_the_row_is_kept(floor: Floor) -> None:
    tag, _, _ = floor.house.row(BOB)
    before = await floor.write(lambda conn: vault.find(conn, floor.house.keyring, tag))
    assert isinstance(await floor.gate(BOB), Permit)
    await floor.asks("restriction", BOB)
    told = await floor.gate(BOB)
    assert isinstance(told, Refusal)
    assert told.reason is Reason.RESTRICTED
    assert await floor.write(lambda conn: vault.find(conn, floor.house.keyring, tag)) == before
    assert len((await floor.person(BOB)).references) == 2


async def _hits(redis: Redis) -> list[Hit]:
    entries: Any = await redis.xrange(HITS)
    return [hit for _, fields in entries for hit in decode_hits(fields[b"b"])]


@promise("P-55", off={"tracker.tables.Withdrawn.__contains__": lambda self, subject: False})
async def test_p55_a_pixel_of_a_restricted_person_leaves_no_trace(floor: Floor, valkey_url: str) -> None:
    """Through a tracker over the same stores; the neighbour's is kept."""
    known = {}
    for address in (BOB, "carol@example.com"):
        row = floor.house.row(address)
        known[address] = (await floor.write(
            lambda conn, row=row: vault.resolve(conn, floor.house.keyring, 1, [row], 2968, floor.house.now)
        ))[0][0]  # fmt: skip
    await floor.asks("restriction", BOB)
    assert await floor.write(lambda conn: negative.standing(conn, known[BOB])) == "restricted"
    reader = open_store(url_of(floor.house.folder), writer=False)
    tracker = Tracker(
        TrackerSettings(port=0, flush_seconds=0.01), links=LINKS, source=SqlSource(reader), redis=connect(valkey_url),
        writer=MemoryWriter(), officer=("Grace", "privacy@platform.example"),
    )  # fmt: skip
    port = await tracker.start()
    try:
        await until(tracker.withdrawn.is_loaded)
        async with aiohttp.ClientSession() as client:
            for place, subject in enumerate(known.values()):
                pixel = path_of(LINKS.pixel_url(1, place, subject, Mode.INDIVIDUAL))
                async with client.get(f"http://127.0.0.1:{port}{pixel}") as response:
                    assert response.status == 200
        await until(tracker.withdrawn.is_fresh)
        assert await tracker.recorder.flush()
        assert [hit.mref for hit in await _hits(floor.house.redis)] == [1]
    finally:
        await tracker.stop()
        reader.dispose()


@promise("P-55", off={"policy.rights.rounds.LIFT_NOTICE_US": -DAY_US})
async def test_p55_it_is_lifted_only_after_the_person_was_told(floor: Floor) -> None:
    ticket = await floor.asks("restriction", BOB)
    told = await floor.desk.op_rights_lift(ticket, "the claim is settled")
    [notice] = floor.house.letters("lifting")
    assert "the claim is settled" in notice
    await floor.desk.round()
    assert ("restriction", "platform", 0) in await floor.standing(BOB)
    floor.house.now = told["ends"]
    await floor.desk.round()
    assert await floor.standing(BOB) == set()


def _all(conn: Connection, tag: bytes, scope: Scope, scope_id: int, reason: str | None = None) -> int:
    """Whatever stands there, not the restriction alone."""
    return conn.execute(delete(suppression).where(suppression.c.tag == tag)).rowcount


@promise("P-55", off={"policy.suppression.remove": _all})
async def test_p55_lifting_leaves_an_opt_out_where_it_was(floor: Floor) -> None:
    await floor.asks("objection", BOB, account="acme")
    ticket = await floor.asks("restriction", BOB, account="acme")
    told = await floor.desk.op_rights_lift(ticket, "the claim is settled")
    floor.house.now = told["ends"]
    await floor.desk.round()
    assert await floor.standing(BOB) == {("opt-out", "account", 1)}
    assert isinstance(await floor.gate(BOB), Refusal)
