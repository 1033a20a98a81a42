"""P-31: promotions of the platform itself are a list like any other; leaving it leaves the mail about the service."""

from __future__ import annotations

from redis.asyncio import Redis
from sqlalchemy import Connection, Engine

from engine.queue.lanes import Lanes
from engine.queue.questions import FactsRequest
from policy import accounts, suppression
from policy.enforcement import Effects, Enforcement
from policy.events import Reason
from policy.gate import Permit, Refusal, decide
from policy.keys import Keyring
from policy.store import Store
from policy.suppression import Entry, Scope
from tests.policy.people import row_of
from tests.promises.marks import promise

NOW = 1_800_000_000_000_000
HOLDER = "holder@customer.example"


@promise("P-31", off={"policy.suppression.fields": lambda conn, tags, now: []})
async def test_p31_who_left_promotions_gets_service_mail_and_never_promotions(
    store: Engine, redis: Redis, keyring: Keyring
) -> None:
    """Through the truth in SQL, what is told to Redis, and the gate's own script."""
    hand = Store(store)
    enforcement = Enforcement(hand, redis, lambda: NOW, lambda: store)
    platform = await hand.write(lambda conn: accounts.add(conn, "platform", display_name="Platform", now=NOW).number)

    def listed(conn: Connection) -> dict[str, int]:
        return {name: accounts.list_number(conn, platform, name) for name in ("promotions", "service")}

    lists = await hand.write(listed)
    tag, partition, _ = row_of(keyring.pepper, HOLDER)
    domain_tag = row_of(keyring.pepper, "nobody@customer.example")[0]

    def leave(conn: Connection, effects: Effects) -> None:
        suppression.add(conn, [Entry(tag, partition, Scope.LIST, lists["promotions"], "opt-out", NOW)])
        effects.tags.add((tag, partition))

    async def verdict(name: str, job: int) -> Permit | Refusal:
        asked = FactsRequest(partition, job, 0, 1, platform, lists[name], 0, [(1, tag)], [domain_tag])
        [facts] = await Lanes(redis, "w").facts([asked])
        return decide(facts[0], job, 1, 0.0)

    try:
        assert isinstance(await verdict("promotions", 1), Permit)
        await enforcement.apply(leave)
        refused = await verdict("promotions", 2)
        assert isinstance(refused, Refusal)
        assert refused.reason is Reason.SUPPRESSED
        assert isinstance(await verdict("service", 3), Permit)
        assert isinstance(await verdict("promotions", 4), Refusal), "and never again"
    finally:
        await enforcement.close()
        await hand.close()
