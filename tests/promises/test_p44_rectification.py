"""P-44: a correction reaches what waits to be sent, is kept as a version, and what is contested keeps a note."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, update

from engine.campaign import expand
from engine.campaign.job import Recipient
from engine.queue.lanes import Lanes
from policy import jobs, schema, vault
from policy.instants import DAY_US, rfc3339
from policy.keys import seal
from policy.wire import JobRecord, Resolved, job_aad
from tests.promises.floor import BOB, EVE, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

KEY = bytes(range(32))


async def _corrects_nothing(*asked: Any) -> int:
    return 0


async def _queued(floor: Floor) -> None:
    """A campaign of acme waits for Eve and Bob, with their names as the account holder spelled them."""
    keyring = floor.house.keyring

    def accept(conn: Connection) -> tuple[int, list[tuple[int, int]]]:
        record = JobRecord(
            account="acme", job_id="waits", hash=bytes(32), kind="campaign", created_at=NOW, payload=b"",
            job_key=seal(keyring.service, KEY, job_aad("key", "acme", "waits")), legal_basis="consent", list="news",
            accepted_at=NOW,
        )  # fmt: skip
        number = jobs.accept(conn, record, NOW).number
        conn.execute(update(schema.job).where(schema.job.c.number == number).values(payload=None))
        return number, vault.resolve(conn, keyring, 1, [floor.house.row(one) for one in (EVE, BOB)], 2968, NOW)

    number, known = await floor.write(accept)
    terms = expand.Terms(number, 1, 0, 0, KEY, expires_at=NOW + DAY_US, columns=frozenset({"first_name"}))
    rows: list[Recipient | None] = [
        Recipient(EVE, fields={"first_name": "Eva"}),
        Recipient(BOB, fields={"first_name": "Bob"}),
    ]
    prepared = expand.prepare(terms, keyring, 0, rows, 0, NOW)
    people = [person for some in prepared.people.values() for person in some]
    expand.number(people, [Resolved(*one) for one in known])
    assert all(await Lanes(floor.house.redis, "w").put(expand.shares(terms, keyring, prepared)))


async def _waits(floor: Floor, address: str) -> Any:
    """The name that the queued message would be rendered with."""
    queue = next(place for place in floor.places if place.name == "queue")
    [record] = await queue.export(await floor.person(address))
    return record.values["fields.first_name"]


@promise("P-44", off={"engine.queue.erasing.Erasing.amend": _corrects_nothing})
async def test_p44_a_name_corrected_while_queued_is_rendered_corrected(floor: Floor) -> None:
    await _queued(floor)
    assert (await _waits(floor, EVE), await _waits(floor, BOB)) == ("Eva", "Bob")
    await floor.asks("rectification", details={"field": "first_name", "value": "Eve"})
    assert await _waits(floor, EVE) == "Eve"
    assert await _waits(floor, BOB) == "Bob"


@pytest.mark.parametrize("details", [{"value": "Eve"}, {"contested": "my name is Eve"}], ids=["corrected", "contested"])
@promise("P-44", off={"policy.rights.carrying.Carrying._note": lambda *asked: None})
async def test_p44_the_version_and_the_note_are_kept_beside_the_data(floor: Floor, details: dict[str, str]) -> None:
    await floor.asks("rectification", details={"field": "first_name", **details}, account="acme")
    told = [one.values for one in await floor.told() if one.kind == "rectification"]
    assert [(one["field"], one["value"], one["at"]) for one in told] == [
        ("first_name", next(iter(details.values())), rfc3339(NOW))
    ]
