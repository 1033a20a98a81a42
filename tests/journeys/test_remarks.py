"""What an operator writes by hand stays with the job or the halt and goes with it; the audit chain has a reference."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from policy import audit, remarks, schema
from tests.journeys.test_writer import accept
from tests.world.servers import PolicyWorld, world

__all__ = ["world"]

WORDS = "Ada Lovelace <ada@one.example> called: stop"
NEEDLES = ("ada", "lovelace", "one.example", "stop", "called", "spring", "bad-ada")


async def lines(world: PolicyWorld) -> list[Any]:
    return await world.writer.store.write(lambda conn: list(conn.execute(select(schema.audit).order_by("seq"))))


async def test_words_of_operators_are_not_in_the_chain_but_with_what_they_explain(world: PolicyWorld) -> None:
    accepted = await accept(world, "spring")
    operations = world.writer.operations
    assert {"job_state", "halt_account", "halt_domain", "reject_note"} <= operations.keys()
    before = len(await lines(world))
    await world.ask.job_state(accepted.number, "paused", WORDS)
    await world.ask.halt_account("acme", "pause", WORDS)
    await world.ask.halt_domain("one.example", "cancel", WORDS)
    await world.ask.halt_domain("one.example", "resume", WORDS)
    await world.ask.halt_account("acme", "cancel", f"  {WORDS}\n")
    await world.ask.reject_note("acme", "bad-ada@one.example", WORDS)
    told = (await lines(world))[before:]
    reference = remarks.reference(world.keyring, WORDS)
    assert [(row.action, row.purpose, row.result) for row in told] == [
        ("job-paused", reference, "done"),
        ("account-pause", reference, "done"),
        ("domain-cancel", reference, "done"),
        ("domain-resume", reference, "done"),
        ("job-cancelled", reference, "done"),
        ("account-cancel", reference, "done"),
        ("job-rejected", remarks.NONE, "rejected"),
    ]
    for row in told:
        said = " ".join([row.actor, row.action, row.object_ref, row.purpose, row.result]).lower()
        assert not [needle for needle in NEEDLES if needle in said]

    def kept(conn: Any) -> tuple[Any, ...]:
        job = conn.execute(select(schema.job.c.reason).where(schema.job.c.number == accepted.number)).scalar()
        return job, list(conn.scalars(select(schema.halt.c.reason))), audit.verify(conn)

    job, halts, broken = await world.writer.store.write(kept)
    assert (job.strip(), halts, broken) == (WORDS, [WORDS], None)


async def test_without_words_the_chain_says_operation(world: PolicyWorld) -> None:
    accepted = await accept(world, "spring")
    await world.ask.job_state(accepted.number, "paused")
    assert (await lines(world))[-1].purpose == remarks.NONE
