"""A store that does not sync every write forgets leases at a power cut: who is about to be written to stands in the
journal before (T6, T8). The whole of it is played by `tests.chaos.matrix`, cell everysec/power.
"""

from __future__ import annotations

import asyncio

import pytest

from engine.queue import journal
from engine.queue.journal import Foreseen, Intent
from policy import valkey
from policy.valkey import call
from tests.world.trouble import troubled


@pytest.mark.parametrize("sync", ["everysec", "always"])
async def test_whose_dot_may_follow_is_foreseen_where_the_store_may_forget(sync: str) -> None:
    async with troubled(start=False) as ward:
        await call(ward.mail.policy.redis, "CONFIG", "SET", "appendfsync", sync)
        assert await valkey.is_synced(ward.mail.policy.redis) is (sync == "always")
        await ward.start()
        async with ward.campaign(f"foreseen-{sync}", people=40):
            (log,) = await asyncio.to_thread(journal.read_folder, ward.mail.folder / "journal" / "0")
            intents = [(place, record) for place, record in enumerate(log.records) if isinstance(record, Intent)]
            assert intents
            before = {
                record.intent: place for place, record in enumerate(log.records) if isinstance(record, Foreseen)
            }  # fmt: skip
            if sync == "always":
                assert not before, "its leases are on the disk: nothing is to be paid"
            else:
                assert all(before[intent] < place for place, intent in intents)
