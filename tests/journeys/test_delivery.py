"""Journeys of mail: from XADD to the ledger through real Valkey, SQLite, sockets and worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import email

import dkim  # type: ignore[import-untyped]  # ships no types
import pytest
from redis.exceptions import ResponseError

from engine.message import load_signer
from policy.address import normalise, parse, tag_of
from policy.instants import rfc3339
from policy.keyspace import partition_of
from policy.suppression import Scope
from policy.valkey import Client
from policy.wire import SuppressionRecord
from tests.world.mail import SENDER, MailWorld, job, mail_world, rows
from tests.world.octets import octets


def suppression_of(mail: MailWorld, address: str) -> SuppressionRecord:
    mailbox = parse(address)
    tag = tag_of(mail.policy.keyring.pepper, normalise(mailbox.local, mailbox.domain))
    return SuppressionRecord(tag, partition_of(mailbox.domain), int(Scope.PLATFORM), 0, "manual", "test")


async def test_everyone_ends_in_one_state_and_what_arrived_verifies() -> None:
    async with mail_world(
        "accept:0:name=accept", "unknown:0:name=strict,share=0.5", "greylist:0:name=grey,seconds=0.4"
    ) as mail:
        await mail.start_worker()
        people = rows(40, "a.accept.test") + rows(30, "s.strict.test") + rows(20, "g.grey.test")
        people += [{"address": "no address", "fields": {"name": "x"}}, people[0]]
        await mail.policy.ask.suppress([suppression_of(mail, "person7@a.accept.test")])
        await mail.submit(job("one"), people)
        status = await mail.finished("one")
        counts = await mail.sink_counts()

        assert status.rows_submitted == 92
        assert sum(status.counts.get(kind, 0) for kind in ("delivered", "bounced", "refused")) == 92
        assert status.reasons["refused"] == {"suppressed": 1, "invalid": 1, "duplicate": 1}
        assert status.counts["delivered"] == sum(c["accepted"] for c in counts.values())
        assert counts["accept"]["accepted"] == 39
        assert status.reasons["bounced"] == {"user-unknown": counts["strict"]["refused"]}
        assert status.counts["deferred"] >= 20
        assert all(c["bare_newlines"] == 0 and c["bad_commands"] == 0 for c in counts.values())
        records = _records(mail)
        for wire in mail.kept():
            assert dkim.verify(wire, dnsfunc=lambda name, timeout=5: records[name.decode().rstrip(".")])
            message = email.message_from_bytes(wire)
            assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
            assert "list-unsubscribe-post" in message["DKIM-Signature"].replace(" ", "").lower()
        assert not await mail.policy.redis.keys("sp:{p*}:[sjwu]:*"), "a done job leaves nothing in the queue"


async def test_a_killed_worker_loses_nobody_and_repeats_only_whom_it_left_in_doubt() -> None:
    async with mail_world("slow:0:name=slow,delay=0.05") as mail:
        worker = await mail.start_worker()
        await mail.submit(job("two"), rows(300, "a.slow.test") + rows(100, "b.slow.test"))
        while (await mail.sink_counts())["slow"]["accepted"] < 60:
            await asyncio.sleep(0.02)
        await mail.kill(worker)
        await mail.start_worker()
        status = await mail.finished("two")
        sink = (await mail.sink_counts())["slow"]

        assert status.rows_submitted == 400
        assert status.terminal == 400
        unknown = status.counts.get("unknown", 0)
        assert status.counts["delivered"] + unknown == 400
        assert unknown <= 8 * 2, "at most what was behind its dot on eight connections, one ahead on each"
        assert sink["accepted"] == sink["unique"], "hold never repeats anybody"
        assert status.counts["delivered"] <= sink["unique"] <= 400


async def test_an_interrupted_worker_drains_and_the_next_one_goes_on() -> None:
    async with mail_world("slow:0:name=slow,delay=0.05") as mail:
        worker = await mail.start_worker()
        await mail.submit(job("three"), rows(300, "a.slow.test"))
        while (await mail.sink_counts())["slow"]["accepted"] < 40:
            await asyncio.sleep(0.02)
        assert await mail.drain(worker) == 0
        first = (await mail.sink_counts())["slow"]["accepted"]
        assert first < 300
        await mail.start_worker()
        status = await mail.finished("three")
        sink = (await mail.sink_counts())["slow"]

        assert status.counts == {"delivered": 300}
        assert sink["accepted"] == sink["unique"] == 300


async def test_an_opt_out_during_the_campaign_is_in_force_at_once() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2", sink_options=("--record-recipients",)) as mail:
        await mail.start_worker()
        await mail.submit(job("four"), rows(120, "a.slow.test"))
        while (await mail.sink_counts())["slow"]["accepted"] < 5:
            await asyncio.sleep(0.02)
        late = [f"person{number}@a.slow.test" for number in range(90, 120)]
        await mail.policy.ask.suppress([suppression_of(mail, address) for address in late])
        status = await mail.finished("four")

        assert status.counts["delivered"] + status.counts["refused"] == 120
        assert status.reasons["refused"] == {"suppressed": 30}


async def test_a_cancelled_job_stops_and_says_so() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        await mail.start_worker()
        await mail.submit(job("five"), rows(200, "a.slow.test"))
        while (await mail.sink_counts())["slow"]["accepted"] < 5:
            await asyncio.sleep(0.02)
        await mail.policy.ask.job_state("five", "cancelled", "test")
        status = await mail.finished("five")
        sink = (await mail.sink_counts())["slow"]

        assert status.terminal == 200
        assert status.counts["cancelled"] > 100
        assert status.counts["delivered"] == sink["accepted"] < 100


async def test_a_paused_job_waits_and_goes_on() -> None:
    async with mail_world("slow:0:name=slow,delay=0.1") as mail:
        await mail.start_worker()
        await mail.submit(job("six"), rows(80, "a.slow.test"))
        while (await mail.sink_counts())["slow"]["accepted"] < 5:
            await asyncio.sleep(0.02)
        await mail.policy.ask.job_state("six", "paused")
        before = -1
        while before != (before := (await mail.sink_counts())["slow"]["accepted"]):
            await asyncio.sleep(0.5)  # longer than a message takes: until nothing more arrives
        assert before < 80
        await mail.policy.ask.job_state("six", "sending")
        status = await mail.finished("six")

        assert status.counts == {"delivered": 80}


async def test_a_job_expires_while_its_site_is_away() -> None:
    async with mail_world() as mail:
        config = mail.config.read_text().replace(
            '"*.accept.test" = "127.0.0.1:', '"*.away.test" = "127.0.0.1:1"\n"*.accept.test" = "127.0.0.1:'
        )
        mail.config.write_text(config)
        await mail.start_worker()
        await mail.submit(job("first"), rows(1, "b.accept.test"))
        await mail.finished("first")  # a worker that is still starting could take up the next one too late
        now = mail.policy.clock()
        await mail.submit(
            job("seven", expires_at=rfc3339(now + 3_000_000)), rows(10, "x.away.test") + rows(5, "b.accept.test")
        )
        status = await mail.finished("seven")

        assert status.counts["expired"] == 10
        assert status.counts["delivered"] == 5


@pytest.mark.parametrize("options", [("--no-pipelining",), ("--starttls",)])
async def test_peers_without_pipelining_and_with_starttls(options: tuple[str, ...]) -> None:
    async with mail_world(sink_options=options, tls="opportunistic") as mail:
        await mail.start_worker()
        await mail.submit(job("eight"), rows(50, "a.accept.test"))
        status = await mail.finished("eight")
        why = mail.policy.reader.why("person3@a.accept.test", mail.policy.keyring)

        assert status.counts == {"delivered": 50}
        assert why.stories[0].tls == (3 if options == ("--starttls",) else 0)


async def test_two_workers_share_a_job_and_no_address_is_in_any_file() -> None:
    async with mail_world("accept:0:name=accept", "greylist:0:name=grey,seconds=1", workers=2) as mail:
        await asyncio.gather(mail.start_worker(0), mail.start_worker(1))
        people = rows(200, "a.accept.test") + rows(40, "g.grey.test")
        await mail.submit(job("nine"), people)
        status = await mail.finished("nine")
        counts = await mail.sink_counts()
        assert status.counts["delivered"] == 240
        assert counts["accept"]["unique"] == counts["accept"]["accepted"] == 200
        for worker in mail.workers:
            assert await mail.drain(worker) == 0
        await _rewritten(mail.policy.redis)
        needles = [people[n]["address"].encode() for n in (3, 100, 220)]
        for path in mail.folder.rglob("*"):
            if path.is_file() and "kept" not in path.parts:
                content = octets(path)
                assert not any(needle in content for needle in needles), path.name


async def _rewritten(redis: Client) -> None:
    """One whole rewrite of the append-only file; the writer may be at one of its own (policy.chores)."""
    asked = False
    while True:
        told = await redis.info("persistence")
        if not told["aof_rewrite_in_progress"] and not told["aof_rewrite_scheduled"]:
            if asked:
                return
            with contextlib.suppress(ResponseError):  # another began in between
                await redis.bgrewriteaof()
                asked = True
        await asyncio.sleep(0.05)


def _records(mail: MailWorld) -> dict[str, bytes]:
    """The DNS records that belong to the signing keys."""
    records = {}
    for path in (mail.policy.settings.keys_dir / "dkim").iterdir():
        selector = path.name.removeprefix(SENDER + ".").split(".")[0]
        signer = load_signer(SENDER, selector, path.read_bytes())
        records[f"{selector}._domainkey.{SENDER}"] = signer.public_record().encode()
    return records
