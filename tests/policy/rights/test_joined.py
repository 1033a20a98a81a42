"""The engine with the real rooms behind it: erasure, bundles and the places of the SQL tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select

from policy import purposes, records, schema, suppression, vault
from policy.bundle import reading
from policy.bundle.operations import Bundles
from policy.erasing import Erasing, ErasureOperations
from policy.latecomers import Guard
from policy.personal import Premises
from policy.rights.joining import seams
from policy.rights.operations import RightsOperations
from policy.rights.settings import RightsSettings
from policy.suppression import Scope
from policy.tombstones import NAME, Tombstones
from tests.policy.rights.conftest import ADA, House

BEN = "ben@example.org"


@pytest.fixture
def joined(house: House) -> Callable[[], RightsOperations]:
    premises = Premises(house.settings, house.store, house.redis, lambda: house.keyring, lambda: house.now)
    places = records.build(premises)
    tombstones = Tombstones(house.folder / "tombstones" / NAME)
    erasing = Erasing(premises, house.enforcement, tombstones, Guard(), lambda: places)
    joint = seams(premises, ErasureOperations(erasing, premises), Bundles(premises, places), places)

    def make() -> RightsOperations:
        house.desk = RightsOperations(premises, house.enforcement, RightsSettings(), joint)
        return house.desk

    return make


async def test_P54_a_proved_erasure_takes_the_identity_and_leaves_the_suppression(
    house: House, joined: Callable[[], RightsOperations]
) -> None:
    desk = joined()
    await house.knows(ADA, 1)
    await house.knows(ADA, 2)
    other = await house.knows(BEN, 1)
    told = await desk.op_rights_open("erasure", ADA)
    await desk.op_rights_confirm(house.token())
    await desk.round()
    assert (await desk.op_rights_show(told["ticket"]))["state"] == "done"
    tag = house.row(ADA)[0]
    assert await house.store.write(lambda conn: vault.find(conn, house.keyring, tag)) == []
    reasons = {(one.reason, one.scope) for one in await house.store.write(lambda conn: suppression.check(conn, tag))}
    assert ("erasure", Scope.PLATFORM) in reasons
    assert not {reason for reason, _ in reasons} & {"restriction"}
    rows = await house.store.write(lambda conn: conn.execute(select(schema.erasure)).all())
    assert {row.request for row in rows} == {1}
    assert {row.cause for row in rows} == {"request"}
    assert await house.store.write(lambda conn: vault.number_of(conn, 1, house.row(BEN)[0])) == other
    assert len(house.letters("done")) == 1  # written before the address was forgotten


async def test_P53_access_answers_for_every_account_in_one_bundle(
    house: House, joined: Callable[[], RightsOperations]
) -> None:
    desk = joined()
    await house.knows(ADA, 1)
    await house.knows(ADA, 2)
    await house.knows(BEN, 2)
    told = await desk.op_rights_open("access", ADA)
    await desk.op_rights_prove(told["ticket"])
    await desk.round()
    [letter] = house.letters("done")
    path = house.folder / "exports" / f"export-{told['ticket']}.zip"
    secret = next(line for line in letter.splitlines() if "passphrase:" in line).split("passphrase:")[1].split()[0]
    opened = reading.open_bundle(path.read_bytes(), secret)
    profiles = [record.values for record in opened.records if record.kind == "profile"]
    assert {values["account"] for values in profiles} == {"acme", "zeta"}
    assert {values["address"] for values in profiles} == {ADA}


async def test_P38_looking_at_a_request_is_written_down_and_without_a_purpose_refused(
    house: House, joined: Callable[[], RightsOperations]
) -> None:
    desk = joined()
    subject = await house.knows(ADA, 1)
    told = await desk.op_rights_open("access", ADA)
    assert (await desk.op_rights_show(told["ticket"]))["address"] == ADA
    [row] = await house.store.write(lambda conn: conn.execute(select(schema.reading)).all())
    assert (row.subject, row.purpose, row.what, row.actor) == (subject, "rights", "rights show", "officer")
    assert "curiosity" not in purposes.registry().purposes
    with pytest.raises(Exception, match="not allowed"):
        await desk.op_rights_show(told["ticket"], purpose="curiosity")
