"""P-33: disclosures are a ledger that names the actual recipient and feeds the person's access report (C-154/21)."""

from __future__ import annotations

import pytest
from sqlalchemy import delete

from policy import schema, vault
from policy.disclosures import Disclosure, DisclosureOperations
from policy.instants import rfc3339
from policy.personal import Erased, Person
from policy.places import Place
from tests.promises.floor import EVE, NOW, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

COURT = "Regional Court of Graz"
BASIS = "PIPEDA 7(3)(c): order 26-118"


async def _disclose(floor: Floor) -> None:
    operations = DisclosureOperations(floor.house.store, lambda: floor.house.now)
    tag, _, _ = floor.house.row(EVE)
    await operations.op_disclose("officer", COURT, "court", BASIS, "events", tag=tag, account="acme", at=NOW - 5)


@promise("P-33", off={"policy.dockets.Disclosures.told": lambda self, conn, person: iter(())})
async def test_p33_access_names_the_recipient_and_the_date(floor: Floor) -> None:
    await _disclose(floor)
    named = {
        record.values["recipient"]: record.values["at"] for record in await floor.told() if record.kind == "disclosure"
    }
    assert named.get(COURT) == rfc3339(NOW - 5)


@promise("P-33", off={"policy.disclosures.Disclosure.__post_init__": lambda self: None})
def test_p33_a_disclosure_to_nobody_in_particular_is_not_written() -> None:
    with pytest.raises(ValueError, match="names its recipient"):
        Disclosure(NOW, 7, 1, " ", "authority", BASIS, "events", 1, "officer")


async def _with_the_person(place: Place, person: Person) -> Erased:
    """As if the ledger went with the person."""
    return Erased(await place._premises.store.write(lambda conn: conn.execute(delete(schema.disclosure)).rowcount))


@promise("P-33", off={"policy.dockets.Disclosures.erase": _with_the_person})
async def test_p33_erasure_leaves_the_ledger_and_it_names_nobody(floor: Floor) -> None:
    await _disclose(floor)
    tag, _, _ = floor.house.row(EVE)
    subject = await floor.write(lambda conn: vault.number_of(conn, 1, tag))
    await floor.asks("erasure")
    await floor.purged()
    lines = [row for row in await floor.rows(schema.disclosure) if row.recipient == COURT]
    assert [row.subject for row in lines] == [subject]
    assert not [value for row in lines for value in row if "adams" in str(value).lower()]
