"""Requests that come by mail: what people write, what machines write, and nothing ever lost."""

from __future__ import annotations

import os
from pathlib import Path

import aiosmtplib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.instants import DAY_US
from policy.personal import Premises
from policy.rights.mailbox import MAX_BYTES, MailIntake, read
from policy.rights.settings import RightsSettings
from policy.rights.states import Kind
from tests.policy.rights.conftest import ADA, NOW, House

OFFICER = "privacy@platform.example"


def mail(subject: str, text: str = "", sender: str = f"Ada <{ADA}>", *extra: str) -> bytes:
    head = [f"From: {sender}", f"To: {OFFICER}", f"Subject: {subject}", *extra]
    return "\r\n".join([*head, "MIME-Version: 1.0", "Content-Type: text/plain; charset=utf-8", "", text, ""]).encode()


@pytest.mark.parametrize(
    ("subject", "text", "kind"),
    [
        ("Please delete my data", "", Kind.ERASURE),
        ("Right to be forgotten", "", Kind.ERASURE),
        ("Erase me", "", Kind.ERASURE),
        ("Re: Summer sale", "unsubscribe and delete all my personal data", Kind.ERASURE),
        ("Re: Summer sale", "STOP emailing me", Kind.OBJECTION),
        ("remove me from your list", "", Kind.OBJECTION),
        ("Unsubscribe", "", Kind.OBJECTION),
        ("Subject access request", "", Kind.ACCESS),
        ("Question", "What data do you hold about me?", Kind.ACCESS),
        ("Data portability", "", Kind.PORTABILITY),
        ("Please correct my name", "It is Ada", Kind.RECTIFICATION),
        ("I withdraw my consent", "", Kind.WITHDRAWAL),
        ("Please restrict the use of my data", "", Kind.RESTRICTION),
        ("You write to my son", "he is ten", Kind.MINOR),
        ("Bitte um Löschung", "", Kind.ERASURE),
        ("Auskunft nach DSGVO", "", Kind.ACCESS),
        ("Droit d'accès", "", Kind.ACCESS),
        ("Invoice 1234", "please pay", None),
        ("Re: your mail", "thanks!\n> unsubscribe here", None),
    ],
)
def test_which_right_it_is(subject: str, text: str, kind: Kind | None) -> None:
    found = read(mail(subject, text))
    assert (found.kind, found.sender, found.automatic) == (kind, ADA, False)


@pytest.mark.parametrize(
    "extra",
    ["Auto-Submitted: auto-replied", "Precedence: bulk", "Return-Path: <>", "List-Id: <news.example>"],
)
def test_machines_are_not_answered(extra: str) -> None:
    assert read(mail("delete my data", "", f"Ada <{ADA}>", extra)).automatic


def test_two_senders_or_none_are_nobody() -> None:
    assert read(mail("delete my data", "", f"{ADA}, ben@example.org")).sender == ""
    assert read(b"Subject: delete my data\r\n\r\nhello").sender == ""


@given(st.binary(max_size=600))
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    read(raw)
    read(b"From: " + raw + b"\r\nSubject: " + raw + b"\r\nContent-Type: " + raw + b"\r\n\r\n" + raw)


@pytest.fixture
def intake(house: House, tmp_path: Path) -> MailIntake:
    return MailIntake(
        house.desk, [OFFICER], tmp_path / "unsorted", lambda: house.now, drop_dir=tmp_path / "drop",
        listen="127.0.0.1:0",
    )  # fmt: skip


def unsorted(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "unsorted").glob("*.eml"))]


async def test_P45_a_mail_opens_a_request_whose_clock_started_when_it_came(intake: MailIntake, house: House) -> None:
    assert await intake.take(mail("Please delete my data"), NOW - 5) == "opened"
    [told] = await house.desk.op_rights_list()
    assert (told["kind"], told["channel"], told["received"]) == ("erasure", "mail", NOW - 5)
    assert f"To: {ADA}" in house.letters("proof")[0]


async def test_a_reply_with_the_ticket_is_noted_if_it_is_from_that_mailbox(
    intake: MailIntake, house: House, tmp_path: Path
) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    assert await intake.take(mail(f"Re: Your request {told['ticket']}", "also the old ones"), NOW) == "noted"
    steps = (await house.desk.op_rights_show(told["ticket"]))["steps"]
    assert steps[-1]["note"] == "also the old ones"
    stranger = mail(f"Re: Your request {told['ticket']}", "delete my data", "ben@example.org")
    assert await intake.take(stranger, NOW) == "unsorted"
    assert await intake.take(mail("Re: Your request R-AAAAAAAAAA", "hello"), NOW) == "unsorted"
    assert len(unsorted(tmp_path)) == 2
    assert len(await house.desk.op_rights_list(open_only=False)) == 1


async def test_what_nobody_understands_is_kept_whole_for_the_officer(
    intake: MailIntake, house: House, tmp_path: Path
) -> None:
    odd = mail("Hello", "how are you?")
    bounce = mail("Undelivered: delete my data", "", f"Ada <{ADA}>", "Auto-Submitted: auto-replied")
    assert await intake.take(odd, NOW) == "unsorted"
    assert await intake.take(bounce, NOW + 1) == "unsorted"
    assert unsorted(tmp_path) == [odd, bounce]
    assert await house.desk.op_rights_list(open_only=False) == []
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "unsorted").iterdir()} == {0o600}


async def test_dropped_files_are_taken_once_oldest_first(intake: MailIntake, house: House, tmp_path: Path) -> None:
    drop = tmp_path / "drop"
    drop.mkdir()
    for number, (subject, at) in enumerate([("access request", NOW - 20), ("delete my data", NOW - 90)]):
        path = drop / f"{number}.eml"
        path.write_bytes(mail(subject))
        os.utime(path, ns=(at * 1000, at * 1000))
    (drop / "half-written.tmp").write_bytes(b"From:")
    assert await intake.look() == 2
    assert await intake.look() == 0
    assert [path.name for path in drop.iterdir()] == ["half-written.tmp"]
    told = await house.desk.op_rights_list()
    assert sorted((one["kind"], one["received"]) for one in told) == [("access", NOW - 20), ("erasure", NOW - 90)]


async def test_over_the_limit_a_dropped_file_keeps_its_place(house: House, tmp_path: Path) -> None:
    desk = house.make(strangers_per_hour=1)
    drop = tmp_path / "drop"
    drop.mkdir()
    intake = MailIntake(desk, [OFFICER], tmp_path / "unsorted", lambda: house.now, drop_dir=drop)
    for name in ("one", "two"):
        (drop / f"{name}.eml").write_bytes(mail("access request", "", f"{name}@example.org"))
        os.utime(drop / f"{name}.eml", ns=(NOW * 1000, NOW * 1000))
    assert await intake.look() == 1
    assert [path.name for path in drop.iterdir()] == ["two.eml"]


async def test_the_listener_takes_mail_for_the_officer_only(intake: MailIntake, house: House, tmp_path: Path) -> None:
    port = await intake.start()
    try:
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False)
        async with client:
            await client.sendmail(ADA, [OFFICER.upper()], mail("delete my data"))
            await client.sendmail("", [OFFICER], mail("access request"))  # a bounce: nobody is written to
            with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
                await client.sendmail(ADA, ["somebody@else.example"], mail("delete my data"))
            with pytest.raises(aiosmtplib.SMTPResponseException):
                await client.sendmail(ADA, [OFFICER], mail("delete my data", "x\r\n" * MAX_BYTES))
    finally:
        await intake.stop()
    assert [one["kind"] for one in await house.desk.op_rights_list()] == ["erasure"]
    assert len(unsorted(tmp_path)) == 1


async def test_what_cannot_be_kept_is_put_off_not_taken(house: House, tmp_path: Path) -> None:
    desk = house.make(strangers_per_hour=1)
    await desk.op_rights_open("access", "first@example.org", channel="page")
    intake = MailIntake(desk, [OFFICER], tmp_path / "unsorted", lambda: house.now, listen="127.0.0.1:0")
    port = await intake.start()
    try:
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as client:
            with pytest.raises(aiosmtplib.SMTPDataError) as refused:
                await client.sendmail(ADA, [OFFICER], mail("delete my data"))
            assert refused.value.code == 451
    finally:
        await intake.stop()


async def test_unsorted_mail_has_its_days(house: House, tmp_path: Path) -> None:
    premises = Premises(house.settings, house.store, house.redis, lambda: house.keyring, lambda: house.now)
    intake = MailIntake.of(house.desk, premises, RightsSettings(unsorted_days=30))
    await intake.take(mail("Hello"), NOW)
    await intake.take(mail("Hello again"), NOW + DAY_US)
    house.now = NOW + 30 * DAY_US - 1
    await intake.look()
    assert len(intake.unsorted()) == 2
    house.now += 1
    await intake.look()
    assert [path.name.partition("-")[0] for path in intake.unsorted()] == [str(NOW + DAY_US)]
