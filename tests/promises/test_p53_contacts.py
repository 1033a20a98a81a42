"""P-53: a contact needs no account to ask us: proof of the mailbox, then an answer about every sender there is."""

from __future__ import annotations

import base64
from typing import Any

from sqlalchemy import Connection

from policy import erasure, schema
from policy.instants import HOUR_US
from policy.keys import Keyring
from policy.personal import Person
from tests.promises.floor import EVE, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


def _nobody_proves(kind: object, role: object) -> bool:
    return False


@promise(
    "P-53",
    off={"policy.rights.casework.needs_proof": _nobody_proves, "policy.rights.states.needs_proof": _nobody_proves},
)
async def test_p53_nothing_is_told_before_the_mailbox_is_proved_and_then_all_senders_are(floor: Floor) -> None:
    """Letters before that say nothing of who holds the address: whoever has not the mailbox gets no more."""
    told = await floor.desk.op_rights_open("access", EVE, channel="page")
    await floor.desk.round()
    assert (await floor.desk.op_rights_show(told["ticket"]))["state"] == "identifying"
    assert list(floor.house.folder.glob("exports/*")) == []
    assert not [text for text in floor.house.letters() if "Acme" in text or "acme" in text or "globex" in text.lower()]
    await floor.desk.op_rights_confirm(floor.house.token())
    await floor.desk.round()
    records = floor.bundle(told["ticket"]).records
    assert {one.values["account"] for one in records if one.kind == "profile"} == {"acme", "globex"}


class _Kept:
    """Tokens as they are, instead of their hash."""

    def __init__(self, token: bytes) -> None:
        self.token = token

    def digest(self) -> bytes:
        return self.token


@promise("P-53", off={"policy.rights.proof.sha256": _Kept})
async def test_p53_who_reads_the_database_cannot_prove_a_mailbox(floor: Floor) -> None:
    """The way in is a link that only the mailbox was sent."""
    told = await floor.desk.op_rights_open("access", EVE, channel="page")
    token = floor.house.token()
    [letter] = floor.house.letters("proof")
    assert f"To: {EVE}" in letter
    [row] = await floor.rows(schema.proof)
    assert row.hash != base64.urlsafe_b64decode(token + "=")
    await floor.desk.op_rights_confirm(token)
    assert (await floor.desk.op_rights_show(told["ticket"]))["state"] == "in progress"


@promise("P-53", off={"policy.rights.proof.PROOF_US": 1 << 60})
async def test_p53_a_link_that_is_too_old_proves_nothing(floor: Floor) -> None:
    told = await floor.desk.op_rights_open("access", EVE, channel="page")
    token = floor.house.token()
    floor.house.now += 72 * HOUR_US
    await floor.desk.op_rights_confirm(token)
    assert (await floor.desk.op_rights_show(told["ticket"]))["state"] == "identifying"


_person_of = erasure.person_of


def _everywhere(conn: Connection, keyring: Keyring, account: int | None, *of: Any) -> Person:
    return _person_of(conn, keyring, None, *of)


@promise("P-53", off={"policy.rights.joining.erasure.person_of": _everywhere})
async def test_p53_one_sender_does_not_learn_what_another_holds(floor: Floor) -> None:
    told = await floor.told(account="acme")
    assert {one.values["account"] for one in told if one.kind in ("profile", "message", "consent")} == {"acme"}
