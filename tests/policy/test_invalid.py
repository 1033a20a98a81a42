"""A mailbox whose own server said that it does not exist is suppressed for the account that wrote to it (P-41)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine, insert, select

from policy import accounts, invalid, keyspace, schema, suppression
from policy.enforcement import Enforcement, RedisBehind
from policy.events import Batch, Event, Kind, Reason
from policy.instants import DAY_US, WEEK_US
from policy.invalid import HARD, Invalid, found, is_hard
from policy.keys import Keyring
from policy.schema import open_store
from policy.store import Store
from tests.policy.people import row_of
from tests.policy.stores import url_of

NOW = 2967 * WEEK_US
ADA, BOB = "ada@one.example", "bob@two.example"


def bounce(tag: bytes, reason: Reason = Reason.USER_UNKNOWN, code: int = 550, kind: Kind = Kind.BOUNCED) -> Event:
    return Event(int(kind), 7, 1, NOW, 5, tag, int(reason), code, "5.1.1", 3)


# --- what counts: pure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["USER_UNKNOWN", "INACTIVE_MAILBOX", "BAD_DOMAIN", "NULL_MX"])
def test_the_far_sides_word_that_there_is_no_mailbox_counts(reason: str) -> None:
    [one] = found([Batch(3, "one.example", [bounce(b"a" * 12, Reason[reason])])])
    assert (one.job, one.tag, one.partition, one.at) == (3, b"a" * 12, keyspace.partition_of("one.example"), NOW)
    assert one.source == reason.lower().replace("_", "-")


@given(st.sampled_from(list(Kind)), st.sampled_from(list(Reason)), st.integers(0, 599))
def test_nothing_else_does(kind: Kind, reason: Reason, code: int) -> None:
    """Soft replies, opinions about us or the message, and what we concluded ourselves without a reply."""
    expected = kind in (Kind.BOUNCED, Kind.LATE_BOUNCE) and int(reason) in HARD and code >= 500
    event = bounce(b"a" * 12, reason, code, kind)
    assert is_hard(event) is expected
    assert bool(found([Batch(1, "one.example", [event])])) is expected


def test_mailbox_full_spam_and_a_plain_rejection_are_not_hard() -> None:
    for reason in (Reason.MAILBOX_FULL, Reason.SPAM_BLOCK, Reason.RECIPIENT_REJECTED, Reason.POLICY, Reason.DNS):
        assert not is_hard(bounce(b"a" * 12, reason))


def test_without_a_tag_or_a_domain_or_of_somebody_erased_nobody_is_marked() -> None:
    erased = b"e" * 12
    batches = [Batch(1, "one.example", [bounce(b""), bounce(erased)]), Batch(1, "", [bounce(b"a" * 12)])]
    assert found(batches, {erased}) == []
    assert [one.tag for one in found(batches)] == [erased]


# --- the mark --------------------------------------------------------------------------------------------------------


@dataclass
class Town:
    store: Store
    enforcement: Enforcement
    redis: Redis
    keyring: Keyring
    jobs: dict[str, int] = field(default_factory=dict)
    accounts: dict[str, int] = field(default_factory=dict)
    now: int = NOW

    def invalid(self, days: int = 0, erased: frozenset[bytes] = frozenset()) -> Invalid:
        return Invalid(self.store, self.enforcement, days=days, erased=lambda: erased)

    def items(self, account: str, *events: Event, domain: str = "one.example") -> list[tuple[str, str, Batch]]:
        return [("stream", "1-1", Batch(self.jobs[account], domain, list(events)))]

    def tag(self, address: str) -> bytes:
        return row_of(self.keyring.pepper, address)[0]

    async def against(self, address: str) -> list[suppression.Entry]:
        return await self.store.write(lambda conn: suppression.check(conn, self.tag(address)))

    async def at_the_gate(self, address: str) -> bytes | None:
        tag, partition, _ = row_of(self.keyring.pepper, address)
        told: Any = await self.redis.hget(keyspace.suppression(partition, tag), tag)
        return told  # type: ignore[no-any-return]


@pytest.fixture
async def town(store: Engine, redis: Redis, keyring: Keyring, tmp_path: Path) -> AsyncIterator[Town]:
    writer = Store(store)
    enforcement = Enforcement(writer, redis, lambda: made.now, lambda: open_store(url_of(tmp_path), writer=False))
    made = Town(writer, enforcement, redis, keyring)

    def settle(conn: Connection) -> None:
        for name in ("acme", "other"):
            made.accounts[name] = accounts.add(conn, name, display_name=name, now=NOW).number
            values = {
                "account": made.accounts[name], "job_id": "j", "hash": b"h", "state": "sending", "kind": "campaign",
                "legal_basis": "consent", "in_doubt": "hold", "priority": 0, "wait": 0, "opens_mode": 3,
                "clicks_mode": 3, "created_at": NOW, "accepted_at": NOW, "chunks_expected": 1,
            }  # fmt: skip
            key = conn.execute(insert(schema.job).values(**values)).inserted_primary_key
            assert key is not None
            made.jobs[name] = int(key[0])

    await writer.write(settle)
    yield made
    await enforcement.close()
    await writer.close()


async def test_it_is_suppressed_for_that_account_only_in_sql_and_at_the_gate(town: Town) -> None:
    marker = town.invalid()
    assert await marker.mark(town.items("acme", bounce(town.tag(ADA)))) == 1
    [entry] = await town.against(ADA)
    assert (entry.scope, entry.scope_id) == (suppression.Scope.ACCOUNT, town.accounts["acme"])
    assert (entry.reason, entry.created, entry.expires, entry.source) == ("bounce", NOW, None, "user-unknown")
    cells = await town.at_the_gate(ADA)
    assert len(cells or b"") == suppression.CELL_BYTES
    assert marker.marked == 1


async def test_told_again_it_changes_nothing(town: Town) -> None:
    marker = town.invalid()
    items = town.items("acme", bounce(town.tag(ADA)), bounce(town.tag(ADA)))
    assert [await marker.mark(items), await marker.mark(items), await town.invalid().mark(items)] == [1, 0, 0]
    assert len(await town.against(ADA)) == 1


async def test_each_account_by_its_own_bounce_in_one_transaction(town: Town) -> None:
    await town.invalid().mark(town.items("acme"))  # nothing hard: no transaction at all
    before = town.store.transactions
    assert before == 1  # the fixture's
    items = town.items("acme", bounce(town.tag(ADA))) + town.items("other", bounce(town.tag(ADA)))
    items += town.items("acme", bounce(town.tag(BOB), Reason.INACTIVE_MAILBOX, 554), domain="two.example")
    assert await town.invalid().mark(items) == 3
    assert {entry.scope_id for entry in await town.against(ADA)} == set(town.accounts.values())
    assert [entry.source for entry in await town.against(BOB)] == ["inactive-mailbox"]


async def test_an_end_is_counted_from_the_bounce_and_a_later_one_extends_it(town: Town) -> None:
    marker = town.invalid(days=30)
    await marker.mark(town.items("acme", bounce(town.tag(ADA))))
    [entry] = await town.against(ADA)
    assert entry.expires == NOW + 30 * DAY_US
    later = bounce(town.tag(ADA))
    later.at = NOW + 20 * DAY_US
    assert await marker.mark(town.items("acme", later)) == 1
    [entry] = await town.against(ADA)
    assert (entry.created, entry.expires) == (NOW, NOW + 50 * DAY_US)


async def test_an_erased_person_and_a_job_that_is_gone_get_no_mark(town: Town) -> None:
    marker = town.invalid(erased=frozenset({town.tag(ADA)}))
    assert await marker.mark(town.items("acme", bounce(town.tag(ADA)))) == 0
    town.jobs["gone"] = 4711
    assert await marker.mark(town.items("gone", bounce(town.tag(BOB)))) == 0
    assert (await town.against(ADA), await town.against(BOB)) == ([], [])


async def test_the_address_keeps_what_else_is_known_of_it(town: Town) -> None:
    """Marked, not deleted; and an opt-out beside it stands by itself."""
    tag, partition, _ = row_of(town.keyring.pepper, ADA)
    scope = suppression.Scope.LIST
    entry = suppression.Entry(tag, partition, scope, 9, "opt-out", NOW - 1)
    await town.store.write(lambda conn: suppression.add(conn, [entry]))
    await town.invalid().mark(town.items("acme", bounce(tag)))
    account = town.accounts["acme"]
    removed = await town.store.write(
        lambda conn: suppression.remove(conn, tag, suppression.Scope.ACCOUNT, account, invalid.REASON)
    )
    assert removed == 1
    assert [one.reason for one in await town.against(ADA)] == ["opt-out"]


async def test_redis_being_away_the_mark_is_kept_in_sql_and_the_drain_goes_on(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = town.enforcement.apply

    async def behind(change: Any) -> Any:
        await apply(change)
        raise RedisBehind("later")

    monkeypatch.setattr(town.enforcement, "apply", behind)
    assert await town.invalid().mark(town.items("acme", bounce(town.tag(ADA)))) == 0
    assert [entry.reason for entry in await town.against(ADA)] == ["bounce"]


async def test_the_account_of_a_job_is_asked_once(town: Town) -> None:
    marker = town.invalid()
    await marker.mark(town.items("acme", bounce(town.tag(ADA))))
    before = town.store.transactions
    await marker.mark(town.items("acme", bounce(town.tag(BOB)), domain="two.example"))
    assert town.store.transactions == before + 1
    jobs = await town.store.write(lambda conn: conn.execute(select(schema.job.c.number)).all())
    assert len(jobs) == 2
