"""Delivery to a server that others wrote: Postfix's smtp-sink, well and at fault (S-03, RFC 1047; promise I6)."""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import func, select

from policy import schema
from policy.instants import rfc3339
from tests.world.mail import SENDER, MailWorld, job, mail_world, rows
from tests.world.mail_dkim import all_pass
from tests.world.servers import short_folder
from tests.world.smtp_sink import SmtpSink, smtp_sink

pytestmark = pytest.mark.debian


async def test_a_campaign_arrives_whole() -> None:
    kinds = {"full": (), "lockstep": ("-p",), "seven": ("-8", "-E"), "old": ("-e",)}
    people = 60
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        sinks = {
            name: await stack.enter_async_context(smtp_sink(folder, *options, name=name))
            for name, options in kinds.items()
        }
        mail = await stack.enter_async_context(mail_world(others={name: sink.port for name, sink in sinks.items()}))
        await mail.start_worker()
        await mail.submit(
            job("whole", subject="Grüße, {{ name }}", attachments=[_attachment()]),
            [row for name in kinds for row in rows(people, f"a.{name}.test", name=f"Ægir {name}")],
        )
        status = await mail.finished("whole")
        arrived = {name: sink.messages() for name, sink in sinks.items()}

        assert status.counts == {"delivered": people * len(kinds)}
        for name, messages in arrived.items():
            wanted = [(f"person{number}@a.{name}.test",) for number in range(people)]
            assert sorted(one.recipients for one in messages) == sorted(wanted)
        everything = [one for messages in arrived.values() for one in messages]
        for one in everything:
            _reads_well(one.wire, one.recipients[0])
        assert len({email.message_from_bytes(one.wire)["Message-ID"] for one in everything}) == len(everything)
        assert len({one.sender for one in everything}) == len(everything), "every return path names its message"
        all_pass([one.wire for one in everything], mail.dkim_records(), ["ed25519-sha256", "rsa-sha256"])
        assert await mail.drain(mail.workers[0]) == 0


# What smtp-sink does, and how it ends for the people there: for good (5yz), for now until the job expires (4yz, and
# every end of the connection before the last dot), in doubt (no reply to the last dot).
FAULTS: dict[str, tuple[tuple[str, str], str]] = {
    "mail5": (("-f", "MAIL"), "bounced"),
    "rcpt5": (("-f", "RCPT"), "bounced"),
    "data5": (("-f", "DATA"), "bounced"),
    "dot5": (("-f", "."), "bounced"),
    "mail4": (("-r", "MAIL"), "expired"),
    "rcpt4": (("-r", "RCPT"), "expired"),
    "data4": (("-r", "DATA"), "expired"),
    "dot4": (("-r", "."), "expired"),
    "mailgone": (("-q", "MAIL"), "expired"),
    "rcptgone": (("-q", "RCPT"), "expired"),
    "datagone": (("-q", "DATA"), "expired"),
    "dotgone": (("-q", "."), "unknown"),
    "mailbye": (("-Q", "MAIL"), "expired"),
    "dotbye": (("-Q", "."), "expired"),
    "greet5": (("-f", "CONNECT"), "expired"),
    "greetgone": (("-q", "CONNECT"), "expired"),
    "helogone": (("-q", "EHLO,HELO"), "expired"),
    "well": (("-t", "100"), "delivered"),
}


async def test_every_fault_ends_in_its_state_and_stays_where_it_is() -> None:
    people = 9
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        sinks = {
            name: await stack.enter_async_context(smtp_sink(folder, *options, name=name))
            for name, (options, _) in FAULTS.items()
        }
        mail = await stack.enter_async_context(mail_world(others={name: sink.port for name, sink in sinks.items()}))
        await mail.start_worker()
        await mail.submit(
            job("faults", expires_at=rfc3339(mail.policy.clock() + 8_000_000)),
            [row for name in FAULTS for row in rows(people, f"a.{name}.test")],
        )
        status = await mail.finished("faults", 90)
        report = mail.policy.reader.report("faults", mail.policy.clock())

        assert report is not None
        ended: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
        for domain, kind, _, count in report.domains:
            if kind != "deferred":
                ended[domain.split(".")[1]][kind] += count
        assert {name: dict(states) for name, states in ended.items()} == {
            name: {state: people} for name, (_, state) in FAULTS.items()
        }
        assert status.terminal == status.rows_submitted == people * len(FAULTS)
        assert status.counts["deferred"] >= people, "who expired was tried before"
        assert sorted(one.recipients for one in sinks["well"].messages()) == sorted(
            (row["address"],) for row in rows(people, "a.well.test")
        )
        copies = Counter(one.recipients for one in sinks["dotgone"].messages())
        assert sorted(copies.values()) == [1] * people, "who is in doubt is held, not repeated"
        for name in FAULTS:
            if not name.startswith(("dot", "well")):
                assert sinks[name].messages() == [], "no body leaves before the peer has asked for it"
        # 500 5.3.0 says nothing about anybody's mailbox: nobody is suppressed for it
        assert await _count(mail, schema.suppression) == 0
        assert await mail.drain(mail.workers[0]) == 0


async def test_who_is_in_doubt_gets_one_more_copy_when_the_job_says_so() -> None:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        sink = await stack.enter_async_context(smtp_sink(folder, "-q", "."))
        mail = await stack.enter_async_context(mail_world(others={"gone": sink.port}))
        await mail.start_worker()
        await mail.submit(job("again", in_doubt="resend"), rows(6, "a.gone.test"))
        status = await mail.finished("again")

        assert status.counts == {"unknown": 6, "deferred": 6}
        copies = Counter(one.recipients for one in sink.messages())
        assert len(copies) == 6
        assert set(copies.values()) == {2}


async def test_a_site_that_recovers_gets_its_mail_once() -> None:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        sick = await stack.enter_async_context(smtp_sink(folder, "-r", "RCPT", name="sick"))
        mail = await stack.enter_async_context(mail_world(others={"sick": sick.port}))
        await mail.start_worker()
        await mail.submit(job("recovers"), rows(40, "a.sick.test"))
        async with asyncio.timeout(30):
            while (status := mail.policy.reader.job_status("recovers", mail.policy.clock())) is None or (
                status.deferrals < 5
            ):
                await asyncio.sleep(0.05)
        await sick.stop()
        well: SmtpSink = await stack.enter_async_context(smtp_sink(folder, name="well", port=sick.port))
        status = await mail.finished("recovers")

        assert status.counts["delivered"] == status.terminal == 40
        assert sorted(one.recipients for one in well.messages()) == sorted(
            (row["address"],) for row in rows(40, "a.sick.test")
        )


def _attachment() -> dict[str, Any]:
    content = base64.b64encode(bytes(range(256)) * 8).decode()
    return {"filename": "Prospekt – Grüße.pdf", "content_type": "application/pdf", "content": content}


def _reads_well(wire: bytes, recipient: str) -> None:
    message = email.message_from_bytes(wire, policy=email.policy.default)
    assert isinstance(message, email.message.EmailMessage)
    assert [part.defects for part in message.walk() if part.defects] == []
    assert message["To"].addresses[0].addr_spec == recipient
    number = recipient.removeprefix("person").partition("@")[0]
    assert message["Subject"] == f"Grüße, Person {number}"
    assert message["From"].addresses[0].addr_spec == f"hello@{SENDER}"
    html, text = message.get_body(("html",)), message.get_body(("plain",))
    assert html is not None
    assert text is not None
    assert f"Dear Person {number}," in html.get_content()
    assert f"Dear Person {number}," in text.get_content()
    [attached] = list(message.iter_attachments())
    assert attached.get_content() == bytes(range(256)) * 8
    assert attached.get_filename() == "Prospekt – Grüße.pdf"


async def _count(mail: MailWorld, table: Any) -> int:
    store = schema.open_store(mail.policy.settings.sql_address(), writer=False)
    try:
        with store.connect() as conn:
            return int(conn.execute(select(func.count()).select_from(table)).scalar_one())
    finally:
        store.dispose()
