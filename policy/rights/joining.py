"""The seams of `carrying` as this installation has them: erasure, bundles, and every place that holds personal data.

    RightsOperations(premises, enforcement, settings, seams(premises, erasures, bundles, places))

Law: a request to one account asks the places about that account only; a request to nobody in particular about all
(15(4): no account learns what another one holds, the person learns both).

Known limits: the end of a whole account is not a seam yet; the officer ends it by hand (`carrying.NeedsOfficer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from policy import erasure
from policy.bundle.operations import Bundles
from policy.erasing import ErasureOperations
from policy.personal import Person, PersonalStore, Premises
from policy.rights.carrying import Handed, Seams
from policy.rights.requests import Asked


def seams(premises: Premises, erasures: ErasureOperations, bundles: Bundles, places: Sequence[PersonalStore]) -> Seams:
    async def person(asked: Asked) -> Person:
        def find(conn: Connection) -> Person:
            return erasure.person_of(conn, premises.keyring(), asked.account or None, asked.tag, asked.address)

        return await premises.store.write(find)

    async def bundle(asked: Asked, portable: bool) -> Handed:
        right = "portability" if portable else "access"
        written = await bundles.write(await person(asked), asked.ticket, right)
        return Handed(str(written.path), written.how)

    async def erase(account: int, tag: bytes, partition: int, address: str, cause: str, request: int) -> Any:
        return await erasures.op_erase(account, tag, partition, address, cause, request)

    return Seams(erase, bundle, person, lambda: places)
