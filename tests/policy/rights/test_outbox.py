"""Letters leave exactly when their step is committed, once the smarthost takes them, and never lie about for long."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from policy.instants import DAY_US
from policy.rights.letters import Letterhead, Letters
from policy.rights.outbox import Outbox, Refusal, Smarthost
from policy.rights.requests import Asked
from policy.rights.states import Identity, Kind, Role, State
from tests.policy.rights.conftest import ADA, NOW, House


def a_letter(text: str = "Hello") -> EmailMessage:
    message = EmailMessage()
    message["From"] = "privacy@platform.example"
    message["To"] = ADA
    message["Subject"] = "Your request"
    message.set_content(text)
    return message


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def test_a_draft_is_no_letter_until_it_is_released(outbox: Outbox, tmp_path: Path) -> None:
    name = outbox.prepare("R-ABCDE23456", 2, "done", a_letter())
    assert outbox.waiting() == []
    outbox.release(name)
    [waiting] = outbox.waiting()
    assert (waiting.ticket, waiting.seq, waiting.letter) == ("R-ABCDE23456", 2, "done")
    assert stat.S_IMODE((tmp_path / "outbox").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "outbox" / waiting.name).stat().st_mode) == 0o600
    outbox.discard(outbox.prepare("R-ABCDE23456", 3, "refused", a_letter()))
    assert len(outbox.waiting()) == 1
    assert not outbox.has_drafts


def test_what_a_crash_left_is_told_only_if_its_step_is_committed(outbox: Outbox, tmp_path: Path) -> None:
    outbox.prepare("R-ABCDE23456", 2, "done", a_letter())
    outbox.prepare("R-ABCDE23456", 3, "refused", a_letter())
    assert outbox.recover(lambda ticket, seq: True) == 0  # of this process: their transaction may be under way
    after = Outbox(tmp_path / "outbox")
    assert after.recover(lambda ticket, seq: (ticket, seq) == ("R-ABCDE23456", 2)) == 1
    assert [one.seq for one in after.waiting()] == [2]
    assert not after.has_drafts


async def test_a_letter_of_a_step_that_failed_does_not_leave(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    await house.desk.op_rights_prove(told["ticket"])
    before = len(house.letters())

    def fails(*_args: Any) -> None:
        raise RuntimeError("after the letter was written")

    monkeypatch.setattr("policy.rights.proof.void", fails)
    with pytest.raises(RuntimeError):
        await house.desk.op_rights_close(told["ticket"])
    assert len(house.letters()) == before
    assert not house.desk.outbox.has_drafts
    assert (await house.desk.op_rights_show(told["ticket"]))["state"] == "in progress"


async def test_a_letter_whose_process_ended_after_the_commit_leaves_in_the_next_round(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.desk, "_release", lambda names: None)  # the process is gone here
    await house.desk.op_rights_open("objection", ADA)
    assert house.letters() == []
    desk = house.make()
    await desk.round()
    assert len(house.letters("done")) == 1


async def test_letters_are_sent_once_and_one_that_is_refused_is_kept_for_the_officer(outbox: Outbox) -> None:
    for seq, text in enumerate(("one", "two", "three")):
        outbox.release(outbox.prepare("R-ABCDE23456", seq, "done", a_letter(text)))
    sent: list[str] = []

    async def send(message: EmailMessage) -> None:
        text = str(message.get_content()).strip()
        if text == "two":
            raise Refusal
        sent.append(text)

    assert await outbox.send(send) == (2, 1)
    assert await outbox.send(send) == (0, 0)
    assert sent == ["one", "three"]
    assert [(one.seq, one.failed) for one in outbox.waiting()] == [(1, True)]


async def test_a_smarthost_that_is_away_loses_nothing(outbox: Outbox) -> None:
    outbox.release(outbox.prepare("R-ABCDE23456", 1, "done", a_letter()))

    async def away(_message: EmailMessage) -> None:
        raise OSError("nobody there")

    with pytest.raises(OSError):
        await outbox.send(away)
    assert len(outbox.waiting()) == 1


def test_a_letter_does_not_lie_about_for_ever(outbox: Outbox, tmp_path: Path) -> None:
    outbox.release(outbox.prepare("R-ABCDE23456", 1, "done", a_letter()))
    os.utime(tmp_path / "outbox" / "R-ABCDE23456.1.done.eml", ns=(NOW * 1000, NOW * 1000))
    assert outbox.forget(NOW + 14 * DAY_US - 1, 14) == 0
    assert outbox.forget(NOW + 14 * DAY_US, 14) == 1
    assert outbox.waiting() == []


class Relay:
    """A smarthost that keeps what it takes; `answer` is what it says to a recipient."""

    def __init__(self) -> None:
        self.answer = "250 ok"
        self.taken: list[tuple[str | None, list[str], bytes]] = []
        self.port = 0

    async def handle_RCPT(
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if self.answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.answer

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        self.taken.append((envelope.mail_from, list(envelope.rcpt_tos), envelope.content))
        return "250 ok"


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    kept = Relay()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(kept, hostname="relay", loop=loop), "127.0.0.1", 0)
    kept.port = server.sockets[0].getsockname()[1]
    yield kept
    server.close()
    await server.wait_closed()


async def test_the_smarthost_gets_the_letter_from_the_officer(outbox: Outbox, relay: Relay) -> None:
    outbox.release(outbox.prepare("R-ABCDE23456", 1, "done", a_letter("Your data are ready")))
    smarthost = Smarthost(f"127.0.0.1:{relay.port}", "none", "privacy@platform.example")
    relay.answer = "451 4.7.1 later"
    with pytest.raises(OSError):
        await outbox.send(smarthost)
    relay.answer = "250 ok"
    assert await outbox.send(smarthost) == (1, 0)
    [(sender, recipients, content)] = relay.taken
    assert (sender, recipients) == ("privacy@platform.example", [ADA])
    assert b"Your data are ready" in content
    relay.answer = "550 5.1.1 nobody"
    outbox.release(outbox.prepare("R-ABCDE23456", 2, "done", a_letter()))
    assert await outbox.send(smarthost) == (0, 1)


def asked(kind: Kind, address: str = ADA) -> Asked:
    return Asked(
        1, "R-ABCDE23456", kind, Role.CONTACT, 0, address, bytes(12), 0, "cli", "gdpr", State.DONE, Identity.PROVED,
        NOW, NOW + DAY_US,
    )  # fmt: skip


@pytest.mark.parametrize("kind", list(Kind))
def test_every_letter_says_the_number_who_answers_and_nothing_that_tracks(kind: Kind) -> None:
    letters = Letters(
        Letterhead("Grace Officer", "privacy@platform.example", "https://mail.example", "Complain there.")
    )
    values: dict[str, dict[str, Any]] = {
        "acknowledged": {"restricted": True, "proof": True},
        "proof": {"link": "https://mail.example/r/x"},
        "extended": {"reason": "because"},
        "refused": {"ground": "because", "unidentified": True},
        "withdrawn": {},
        "lifting": {"reason": "because", "ends": "2026-12-01"},
        "done": {"handed": "", "kept": "a law", "contested": False, "officer_note": ""},
    }
    for letter, given in values.items():
        message = letters.compose(letter, asked(kind), NOW, **given)
        text = message.get_content()
        assert message.get_content_type() == "text/plain"
        assert "R-ABCDE23456" in str(message["Subject"])
        assert "R-ABCDE23456" in text
        assert "privacy@platform.example" in text
        assert "{{" not in text
        assert text.count("http") == (1 if letter == "proof" else 0)
        assert message["Auto-Submitted"] == "auto-replied"
        if letter in ("refused", "extended", "lifting"):
            assert "because" in text
            assert "Complain there." in text


def test_an_international_mailbox_gets_its_letter() -> None:
    letters = Letters(
        Letterhead("Grace Officer", "privacy@platform.example", "https://mail.example", "Complain there.")
    )
    message = letters.compose("withdrawn", asked(Kind.ACCESS, "zoë@example.org"), NOW)
    assert "To: zoë@example.org\r\n".encode() in message.as_bytes()
    quoted = letters.compose("withdrawn", asked(Kind.ACCESS, '"a \\"b\\" c"@example.org'), NOW)
    assert b'To: "a \\"b\\" c"@example.org\r\n' in quoted.as_bytes()
