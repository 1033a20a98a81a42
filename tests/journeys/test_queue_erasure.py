"""A person is taken out of all that waits, from the intake to the lanes, and nobody else notices (P-44, P-54)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from engine.campaign import unexpanded
from engine.campaign.intake import Intake
from engine.queue.lanes import Lanes
from engine.stores import Queue, build
from policy import keyspace, vault
from policy.address import normalise, parse, tag_of
from policy.instants import HOUR_US, SECOND_US, rfc3339
from policy.keys import open_sealed, seal
from policy.personal import Erased, Known, Person, PersonalStore, Premises
from policy.schema import account, open_store
from policy.store import Store
from policy.suppression import Scope
from policy.valkey import call
from policy.wire import SuppressionRecord
from tests.journeys.test_intake import World, folder, people, server, world
from tests.world.mail import job, mail_world, rows

__all__ = ["folder", "server", "world"]

GONE, STAYS = "p8@d1.example", "p1@d1.example"  # of one domain, mostly in one slice


@dataclass
class Site:
    """The intake's world, and the place that is asked."""

    world: World
    queue: PersonalStore
    store: Store

    async def person(self, address: str, *, accounts: tuple[str, ...] = ("acme",)) -> Person:
        """As an erasure asks: without an address."""
        ring, mailbox = self.world.keyring, parse(address)
        tag = tag_of(ring.pepper, normalise(mailbox.local, mailbox.domain))

        def known(conn: Any) -> tuple[Known, ...]:
            numbers = dict(conn.execute(select(account.c.name, account.c.number)).all())
            return tuple(Known(vault.number_of(conn, numbers[one], tag) or 0, numbers[one]) for one in accounts)

        lane = keyspace.lane_ref(mailbox.domain, ring.lane)
        partition = keyspace.partition_of(mailbox.domain)
        return Person(tag, partition, lane, known=await self.store.write(known))

    async def stop(self, person: Person) -> None:
        """What comes before an erasure: nobody may write to them."""
        entries = [SuppressionRecord(person.tag, person.partition, int(Scope.PLATFORM), 0, "erasure", "test")]
        await self.world.writer.suppress(entries)

    async def held(self, job_id: str = "letter-47") -> dict[int, bytes]:
        """Chunks held of a job, opened, by number."""
        job = self.world.status(job_id).number
        told: Any = await self.world.redis.xrange(keyspace.stream_of_chunks(job))
        service = self.world.keyring.service
        return {
            int(fields[b"n"]): open_sealed(service, fields[b"sealed"], f"held/{job}/{int(fields[b'n'])}".encode())
            for _, fields in told
        }


@pytest.fixture
async def site(world: World) -> AsyncIterator[Site]:
    store = Store(open_store(world.settings.sql_address(), writer=False))
    premises = Premises(world.settings, store, world.redis, lambda: world.keyring, world.clock)
    [queue] = build(premises)
    yield Site(world, queue, store)
    await store.close()


async def later(site: Site, **more: Any) -> dict[str, Any]:
    return site.world.job(send_at=rfc3339(site.world.clock() + 5 * HOUR_US), **more)


async def come_back(site: Site, intake: Intake, rows: int) -> None:
    site.world.clock.ahead += 4 * HOUR_US + SECOND_US
    intake._next_held = 0.0
    await site.world.settle(intake, until=lambda: intake.counts.rows == rows)
    await site.world.settle(intake)


async def test_a_person_leaves_the_lanes_with_an_end_and_the_others_stay(site: Site) -> None:
    world, intake = site.world, site.world.intake()
    await world.submit(world.job(recipients=...), people(70))
    await world.submit(world.job(recipients=..., job_id="second"), people(20))
    await world.settle(intake)
    before, person = await world.queued(), await site.person(GONE)
    other = await site.person(STAYS)

    assert await site.queue.find(person) == 2
    first, second = [record.values for record in await site.queue.export(person)]
    assert (first["state"], first["account"], first["job"], first["address"], first["fields.name"]) == (
        "queued", "acme", "letter-47", GONE, "P8",
    )  # fmt: skip
    assert second["job"] == "second"
    assert len(str(first["reference"])) == 16
    await site.stop(person)
    assert await site.queue.erase(person) == Erased(2, 0)
    assert await site.queue.erase(person) == Erased(0, 0)

    assert sorted(filter(lambda one: not one.startswith("@"), await world.queued())) == sorted(
        one for one in before if one != GONE
    )
    assert await site.queue.export(person) == []
    assert await site.queue.find(other) == 2
    assert await world.refused(rows=1) == {"erased": 1}
    assert await world.refused("second", rows=1) == {"erased": 1}
    assert await Lanes(world.redis, "w").waiting(world.status().number) == 69


async def test_the_last_of_a_job_gone_the_job_is_done_and_leaves_nothing(site: Site) -> None:
    world, intake = site.world, site.world.intake()
    await world.submit(world.job(recipients=[{"address": GONE, "name": "G"}]))
    await world.settle(intake)
    person = await site.person(GONE)
    await site.stop(person)

    assert await site.queue.erase(person) == Erased(1, 0)
    await world.until(lambda: world.status().state == "done")
    assert world.status().reasons == {"refused": {"erased": 1}}
    assert [key async for key in world.redis.scan_iter(match="sp:*:[slDd]:*")] == []


async def test_a_leased_slice_is_left_until_it_is_back(site: Site) -> None:
    world, intake, lanes = site.world, site.world.intake(), Lanes(site.world.redis, "worker")
    await world.submit(world.job(recipients=...), people(20))
    await world.settle(intake)
    person = await site.person(GONE)
    await site.stop(person)
    [lease] = (await lanes.lease(person.partition, [], 1)).slices

    assert (await site.queue.export(person))[0].values["state"] == "leased"
    assert await site.queue.erase(person) == Erased(0, 1)
    assert GONE in await world.queued()
    await lanes.release(lease.partition, lease.slice_id, lease.token)
    assert await site.queue.erase(person) == Erased(1, 0)
    assert GONE not in await world.queued()


@pytest.mark.parametrize("inline", [False, True])
async def test_a_held_chunk_keeps_its_number_its_rows_and_its_digest(site: Site, inline: bool) -> None:
    """The person's row is blank; everybody else is put on lanes when the time comes; a producer may repeat itself."""
    world, intake = site.world, site.world.intake()
    rows = people(1200 if not inline else 40)
    job = await later(site, recipients=rows if inline else ...)
    await world.submit(job, None if inline else rows)
    await world.settle(intake)
    person, before = await site.person(GONE), await site.held()
    await site.stop(person)

    [shown] = await site.queue.export(person)
    assert shown.values == {
        "state": "held", "account": "acme", "job": "letter-47", "address": GONE, "name": "P8", "fields.points": 8,
    }  # fmt: skip
    assert await site.queue.erase(person) == Erased(1, 0)
    assert await site.queue.erase(person) == Erased(0, 0)

    after = await site.held()
    assert after.keys() == before.keys()
    for number, old in before.items():
        pairs = list(zip(old.split(b"\n"), after[number].split(b"\n"), strict=True))
        assert sum(one != other for one, other in pairs) == (number == 0)
        assert GONE.encode() not in after[number]
    await world.submit({**job, "created_at": job["created_at"]}, None if inline else rows)  # repeated: no conflict
    await world.settle(intake)
    await come_back(site, intake, 2 * len(rows))  # what was handed in again was held again, and changes nothing
    queued = await world.queued()
    assert len(queued) == len(rows) - 1
    assert GONE not in queued
    status = world.status()
    assert (status.rows_submitted, status.state) == (len(rows), "sending")
    assert await world.refused(rows=1) == {"erased": 1}


async def test_recipients_handed_in_with_a_job_for_later_come_back_as_what_was_registered(site: Site) -> None:
    """They were registered as they stood in the job and come back as lines: that is no other audience."""
    world, intake = site.world, site.world.intake()
    await world.submit(await later(site, recipients=people(5)))
    await world.settle(intake)
    await come_back(site, intake, 5)
    assert (world.status().state, len(await world.queued())) == ("sending", 5)


async def _sealed(world: World) -> bytes:
    told: Any = await world.redis.xrange(keyspace.stream_of_chunks(world.status().number), count=1)
    return bytes(told[0][1][b"sealed"])


async def test_what_was_taken_out_of_a_stream_is_not_in_its_blocks(site: Site) -> None:
    """XDEL only marks; a small stream is built anew, so not even sealed bytes are left in what Redis would save."""
    world, intake = site.world, site.world.intake()
    await world.submit(await later(site, recipients=[{"address": GONE, "name": "G"}, {"address": STAYS, "name": "S"}]))
    await world.settle(intake)
    person, sealed = await site.person(GONE), await _sealed(world)
    key = keyspace.stream_of_chunks(world.status().number)
    assert sealed[:64] in (await world.redis.dump(key) or b"")  # it is stored as it is

    await site.queue.erase(person)
    assert sealed[:64] not in (await world.redis.dump(key) or b"")


async def test_rejected_and_dead_entries_that_name_a_person_go_and_the_others_stay(site: Site) -> None:
    world, intake = site.world, site.world.intake()
    broken = {"subject": "{{ name"}
    await world.submit(world.job(**broken, recipients=[{"address": GONE, "name": "G"}]))
    await world.submit(world.job(**broken, job_id="second", recipients=[{"address": STAYS, "name": "S"}]))
    await world.add(job=f'{{"job_id": "third", "to": "{GONE}"')  # no JSON
    await world.submit(world.job(**broken, job_id="fourth", account="nobody", recipients=[{"address": GONE}]))
    await world.settle(intake)
    told: Any = await world.redis.xrange(keyspace.REJECTED)
    ids = {one["job_id"]: name for one, (name, _) in zip(await world.rejected(), told, strict=True)}
    assert ids.keys() == {"letter-47", "second", "", "fourth"}
    person = await site.person(GONE)

    shown = {record.values["job"]: record.values for record in await site.queue.export(person)}
    assert [one["state"] for one in shown.values()] == ["rejected", "rejected"]
    assert shown.keys() == {"letter-47", ""}
    assert (shown["letter-47"]["account"], shown["letter-47"]["address"]) == ("acme", GONE)
    assert await site.queue.erase(person) == Erased(2, 0)

    left: Any = await world.redis.xrange(keyspace.REJECTED)
    kept = {one["job_id"]: name for one, (name, _) in zip(await world.rejected(), left, strict=True)}
    # the fourth is another account's; ids are when they came: they go when their class ends
    assert kept == {name: ids[name] for name in ("second", "fourth")}
    everywhere = Person(person.tag, person.partition, person.lane, known=(Known(0, 0),))
    assert await site.queue.erase(everywhere) == Erased(1, 0)
    assert [one["job_id"] for one in await world.rejected()] == ["second"]


@pytest.mark.parametrize("sealed", [False, True])
async def test_who_is_not_taken_yet_is_left_and_refused_later(site: Site, sealed: bool) -> None:
    world, intake = site.world, site.world.intake()
    job = world.job(recipients=...)
    if sealed:
        await world.submit(job, people(20))
    else:
        await world.add(job=json.dumps({**job, "audience": {"chunks": 1}}))
        lines = b"\n".join(msgspec.json.encode(row) for row in people(20))
        await world.add(audience="letter-47", account="acme", n=0, data=lines)
    await world.submit(world.job(job_id="inline", recipients=[{"address": GONE.upper(), "name": "G"}]))
    person = await site.person(GONE)
    await site.stop(person)

    shown = [record.values for record in await site.queue.export(person)]
    assert [(one["state"], one["account"], one["job"]) for one in shown] == [
        ("submitted", "acme", "letter-47"), ("submitted", "acme", "inline"),
    ]  # fmt: skip
    assert await site.queue.erase(person) == Erased(0, 2)
    assert await site.queue.erase(await site.person("p500@d1.example")) == Erased(0, 0)
    await world.settle(intake)
    assert await site.queue.erase(await site.person(GONE)) == Erased(0, 0)
    assert len(await world.queued()) == 19
    assert await world.refused(rows=1) == {"erased": 1}


async def test_another_accounts_people_are_another_question(site: Site) -> None:
    world, intake = site.world, site.world.intake()
    await world.writer.account_add("other", display_name="O", postal_address="1 Road", opens_mode=3, clicks_mode=3)
    await world.submit(await later(site, recipients=[{"address": GONE, "name": "G"}]))
    await world.submit(world.job(account="other", job_id="theirs", recipients=[{"address": GONE, "name": "G"}]))
    await world.settle(intake)

    assert await site.queue.find(await site.person(GONE)) == 1
    assert await site.queue.find(await site.person(GONE, accounts=("acme", "other"))) == 2
    assert await site.queue.erase(await site.person(GONE, accounts=("other",))) == Erased(1, 0)
    assert GONE.encode() in (await site.held())[0]


async def test_a_corrected_field_is_what_is_sent(site: Site) -> None:
    """Wherever it waits; where it ends in a header, on one line (RFC 5322 2.2)."""
    world, intake = site.world, site.world.intake()
    rows = [
        {"address": GONE, "name": "G", "fields": {"town": "York"}},
        {"address": STAYS, "name": "S", "fields": {"town": "York"}},
    ]
    templates = {"subject": "For {{ name }}", "html": "<p>{{ name }} of {{ town }}</p>", "text": ""}
    await world.submit(world.job(**templates, recipients=rows))
    await world.submit(await later(site, **templates, job_id="held", recipients=rows))
    await world.settle(intake)
    person = await site.person(GONE)

    assert await site.queue.amend(person, "name", "Grace\r\nBcc: x@y.example") == 2
    assert await site.queue.amend(person, "town", "New\nYork") == 2
    assert await site.queue.amend(person, "town", "New\nYork") == 0
    assert await site.queue.amend(person, "address", "other@d1.example") == 0
    with pytest.raises(ValueError, match="longer"):
        await site.queue.amend(person, "town", "x" * 30_000)
    await come_back(site, intake, 4)
    told = {
        (record.values["job"], record.values["fields.name"], record.values["fields.town"])
        for record in await site.queue.export(person)
    }
    assert told == {(job, "Grace Bcc: x@y.example", "New\nYork") for job in ("letter-47", "held")}
    [*others] = await site.queue.export(await site.person(STAYS))
    assert {(one.values["fields.name"], one.values["fields.town"]) for one in others} == {("S", "York")}


async def test_where_the_domain_is_lost_all_lanes_of_the_partition_are_looked_through(site: Site) -> None:
    world, intake = site.world, site.world.intake()
    await world.submit(world.job(recipients=...), people(20))
    await world.settle(intake)
    person = await site.person(GONE)
    lost = Person(person.tag, person.partition, "", known=person.known)
    assert await site.queue.erase(lost) == Erased(1, 0)
    assert GONE not in await world.queued()


async def test_an_address_is_nowhere_in_redis_after_it(site: Site) -> None:
    """Memory and keys as an RDB would save them: sealed before, and after it not even sealed."""
    world, intake = site.world, site.world.intake()
    await world.submit(world.job(recipients=...), people(20))
    await world.settle(intake)
    person = await site.person(GONE)
    sealed = {bytes(await call(world.redis, "DUMP", key)) async for key in world.redis.scan_iter(match="sp:*:s:*")}
    await site.queue.erase(person)
    await asyncio.gather(site.queue.erase(person), site.queue.erase(person))
    after = {bytes(await call(world.redis, "DUMP", key)) async for key in world.redis.scan_iter(match="sp:*:s:*")}
    assert len(sealed - after) == 1
    rows = [row for _, contents in await world.slices() for row in contents.rows]
    assert not any(row.subject in person.subjects for row in rows)
    assert isinstance(site.queue, Queue)


@pytest.mark.parametrize("small", [True, False])
async def test_streams_of_any_size(site: Site, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large stream is not built anew: an entry that is replaced comes back at its end, one that is dropped goes."""
    if not small:
        monkeypatch.setattr(unexpanded, "SMALL_STREAM", 0)
    world, intake = site.world, site.world.intake()
    await world.submit(await later(site, recipients=...), people(2500))
    await world.settle(intake)
    for purpose, stream in (("dead", keyspace.DEAD), ("rejected", keyspace.REJECTED)):
        for address in (GONE, STAYS):
            body = {"at": 1, "account": "", "job_id": address, "problems": [], "payload": address.encode()}
            sealed = seal(world.keyring.service, msgspec.msgpack.encode(body), purpose.encode())
            await world.redis.xadd(stream, {"sealed": sealed})
    person = await site.person(GONE)

    assert await site.queue.find(person) == 3
    assert await site.queue.erase(person) == Erased(3, 0)
    assert await site.queue.erase(person) == Erased(0, 0)
    for word, stream in ((b"dead", keyspace.DEAD), (b"rejected", keyspace.REJECTED)):
        assert [one["job_id"] for one in await world.rejected(stream, word)] == [STAYS]
    assert sorted(await site.held()) == [0, 1, 2]
    await come_back(site, intake, 2500)
    assert len(await world.queued()) == 2499
    assert world.status().rows_submitted == 2500


async def test_a_chunk_that_changed_meanwhile_is_left(site: Site) -> None:
    """Two erasures at once, or the release: nobody's change is undone by another's."""
    world, intake = site.world, site.world.intake()
    await world.submit(await later(site, recipients=...), people(20))
    await world.settle(intake)
    person, other = await site.person(GONE), await site.person(STAYS)
    place = unexpanded.Unexpanded(world.redis, site.store, lambda: world.keyring)
    [read] = [one async for one in place.held(person)]

    assert await site.queue.erase(other) == Erased(1, 0)
    assert await place.blank(read) == Erased(0, 1)
    assert await site.queue.erase(person) == Erased(1, 0)
    assert STAYS.encode() not in (await site.held())[0]
    [read] = [one async for one in place.held(await site.person("p15@d1.example"))]
    await world.redis.delete(read.stream)
    assert await place.blank(read) == Erased(0, 1)


class Killed(BaseException):
    """The process is gone: no error that anybody may catch."""


@pytest.mark.parametrize("after", [False, True])
async def test_killed_at_each_command_it_converges(site: Site, after: bool) -> None:
    """Before a command was sent or after it was carried out: the next call finishes it, each row has one end."""
    world, intake = site.world, site.world.intake()
    step, finished = 0, False
    while not finished:
        step += 1
        gone = f"gone{step}@d1.example"
        people_now = [{"address": gone, "name": "G"}, {"address": STAYS, "name": "S"}]
        await world.submit(world.job(job_id=f"now{step}", recipients=people_now))
        await world.submit(await later(site, job_id=f"held{step}", recipients=people_now))
        await world.submit(world.job(job_id=f"bad{step}", subject="{{ name", recipients=people_now))
        await world.settle(intake)
        person = await site.person(gone)
        left = step

        def dying(run: Any) -> Any:
            async def called(*args: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0 or (left == 0 and not after):
                    raise Killed
                answer = await run(*args)
                if left == 0:
                    raise Killed
                return answer

            return called

        place: Any = Queue(Premises(world.settings, site.store, world.redis, lambda: world.keyring, world.clock))
        for scripts in (place._slices._scripts, place._unexpanded._scripts):
            scripts.run, scripts.plain = dying(scripts.run), dying(scripts.plain)
        try:
            await place.erase(person)
        except Killed:
            assert step < 60
        else:
            finished = True
        await site.queue.erase(person)
        assert await site.queue.erase(person) == Erased()
        assert await site.queue.find(person) == 0
        assert (await site.held(f"held{step}"))[0].count(b"\n") == 1
        assert STAYS.encode() in (await site.held(f"held{step}"))[0]
        assert await world.refused(f"now{step}", rows=1) == {"erased": 1}
        assert [one for one in await world.queued(f"now{step}") if one != "@d1.example"] == [STAYS]
        assert f"bad{step}" not in [one["job_id"] for one in await world.rejected()]
    assert step > 5


async def test_while_workers_deliver_a_person_is_taken_out_and_all_others_get_theirs() -> None:
    """Real workers, a slow site: every row has one end (I6), the person gets nothing, everybody else one copy."""
    async with mail_world("slow:0:name=slow,delay=0.05", sink_options=("--record-recipients",)) as mail:
        policy = mail.policy
        gone = parse("person299@a.slow.test")
        tag = tag_of(policy.keyring.pepper, normalise(gone.local, gone.domain))
        premises = Premises(policy.settings, policy.writer.store, policy.redis, lambda: policy.keyring, policy.clock)
        [queue] = build(premises)
        await mail.start_worker()
        await mail.submit(job("main"), rows(300, "a.slow.test"))
        partition, lane = keyspace.partition_of(gone.domain), keyspace.lane_ref(gone.domain, policy.keyring.lane)
        async with asyncio.timeout(60):
            while (status := policy.reader.job_status("main", policy.clock())) is None or not status.terminal:
                await asyncio.sleep(0.01)  # another process's work
        entry = SuppressionRecord(tag, partition, int(Scope.PLATFORM), 0, "erasure", "test")
        number = await premises.store.write(lambda conn: vault.number_of(conn, 1, tag))
        person = Person(tag, partition, lane, known=(Known(number or 0, 1),))
        await policy.ask.suppress([entry])
        told = await queue.erase(person)
        async with asyncio.timeout(60):
            while told.left:  # a worker has the slice, and the gate refuses them there
                await asyncio.sleep(0.02)
                told = await queue.erase(person)
        status = await mail.finished("main")

        assert number
        assert (status.counts["delivered"], status.counts["refused"], status.rows_submitted) == (299, 1, 300)
        assert status.reasons["refused"] == {"erased": 1}
        assert await queue.find(person) == 0
        assert not any(b"person299@" in wire for wire in mail.kept())
        assert len(mail.kept()) == 299
