"""The sink itself: its words, its record before its answers, its record across a SIGKILL, whose message it was."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.bounce.verp import ReturnPaths
from tests.chaos.sink import Sink, main
from tests.chaos.sink_process import ROOT, sink_process
from tests.chaos.sink_record import bare_line_ends, digests, read_lines, read_record, reference_of
from tests.chaos.sink_script import ScriptError, of_local_part, parse

HELLO = b"EHLO us.example\r\n"
BODY = b"Message-ID: <2a.000000000000000f@us>\r\nDKIM-Signature: a\r\n\tb\r\nSubject: x\r\n\r\n..x\r\n.\r\n"


def flight(rcpt: str, sender: str = "a@us.example") -> bytes:
    return f"MAIL FROM:<{sender}>\r\nRCPT TO:<{rcpt}>\r\nDATA\r\n".encode()


class Caller:
    """A client by hand: what is said, and what comes back until `quiet` or the end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard = b""

    async def __aenter__(self) -> Caller:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def until(self, text: bytes) -> bytes:
        async with asyncio.timeout(10):
            while text not in self.heard:
                data = await self.reader.read(65536)
                assert data, f"{text!r} did not come: {self.heard!r}"
                self.heard += data
        return self.heard

    async def end(self) -> bytes:
        """Everything until the connection is over; b"RST" at its end when it was reset."""
        async with asyncio.timeout(10):
            try:
                while data := await self.reader.read(65536):
                    self.heard += data
            except ConnectionResetError:
                self.heard += b"RST"
        return self.heard


@asynccontextmanager
async def sink(tmp_path: Path, **ports: str) -> AsyncIterator[tuple[dict[str, int], Path]]:
    record = tmp_path / "record.jsonl"
    there = Sink([(name, 0, parse(words)) for name, words in (ports or {"plain": ""}).items()], record=record)
    opened, _ = await there.start()
    try:
        yield opened, record
    finally:
        await there.stop()


async def test_an_accepted_message_is_on_record_with_all_that_is_asked_of_it(tmp_path: Path) -> None:
    sender = ReturnPaths({1: b"k" * 32}, 1, "bounce.us").make(77, -5)
    async with sink(tmp_path) as (ports, record), Caller(ports["plain"]) as caller:
        caller.say(HELLO + flight("p@them", sender))
        await caller.until(b"354 ")
        caller.say(BODY + b"QUIT\r\n")
        await caller.end()
        [entry] = read_record(record)
    message = BODY.replace(b"\r\n..x", b"\r\n.x")[:-3]

    assert (entry.job, entry.mref, entry.rcpt, entry.message_id) == (77, -5, "p@them", "2a.000000000000000f@us")
    assert (entry.stored, entry.accepted, entry.rcpt_reply, entry.reply[:3]) == (True, True, "250", "250")
    assert entry.t_dot is not None
    assert entry.t_reply_written is not None
    assert entry.t_rcpt <= entry.t_dot <= entry.t_reply_written
    assert entry.sha == hashlib.sha256(message).hexdigest()
    assert entry.plain == hashlib.sha256(message.replace(b"DKIM-Signature: a\r\n\tb\r\n", b"")).hexdigest()
    assert [(line.k, line.live) for line in read_lines(record) if line.k in ("open", "close")] == [
        ("open", 1),
        ("close", 0),
    ]


async def test_rcpt_has_the_time_it_came_not_the_time_it_was_looked_at(tmp_path: Path) -> None:
    async with sink(tmp_path, slow="dot.late.300ms") as (ports, record), Caller(ports["slow"]) as caller:
        caller.say(HELLO + flight("a@them"))
        await caller.until(b"354 ")
        caller.say(BODY + flight("b@them"))  # RCPT of the second lies behind the dot of the first
        await caller.until(b"queued")
        await caller.until(b"354 End data with <CR><LF>.<CR><LF>\r\n")
        first, second = read_record(record)

        assert first.t_reply_written is not None
        assert second.t_rcpt < first.t_reply_written - 0.2


@pytest.mark.parametrize(
    ("words", "ending", "stored"),
    [
        ("rcpt.450", b"450 4.2.0 Recipient address rejected: Greylisted, please try again later\r\n", None),
        ("data.close", b"250 2.1.5 Ok\r\n", None),
        ("dot.close", b"<CRLF>", False),
        ("dot.close.stored", b"<CRLF>", True),
        ("dot.cut.2", b"RST", True),
        ("dot.full.rst", b"RST", True),
        ("dot.550", b"550 5.7.1 Message content rejected\r\n", False),
        ("dot.421", b"421 4.0.0 scripted for dot\r\n", False),
        ("dot.codes", b"550 5.7.1 three\r\n", False),
        ("dot.extra", b"250 2.0.0 nobody asked for this\r\n", True),
    ],
)
async def test_words_end_as_they_say(tmp_path: Path, words: str, ending: bytes, stored: bool | None) -> None:
    async with sink(tmp_path) as (ports, record), Caller(ports["plain"]) as caller:
        caller.say(HELLO + flight(f"p+{words}@them"))
        if words.startswith("dot"):
            await caller.until(b"354 ")
            caller.say(BODY)
        try:
            async with asyncio.timeout(0.5):  # what stays open has said all it will
                await caller.end()
        except TimeoutError:
            pass
        heard = caller.heard.replace(b"354 End data with <CR><LF>.<CR><LF>\r\n", b"<CRLF>")
        [entry] = read_record(record)
        faults = [line.word for line in read_lines(record) if line.k == "fault"]

        assert ending in heard if words == "rcpt.450" else heard.endswith(ending)
        assert faults == [words]
        assert entry.stored is bool(stored)
        assert (entry.t_dot is not None) is (stored is not None)


async def test_words_count_tries_connections_and_messages(tmp_path: Path) -> None:
    async with sink(tmp_path, two="greet.421+first.2", few="max.1", plain="") as (ports, _):
        for expected in (b"421", b"421", b"220"):
            async with Caller(ports["two"]) as caller:
                assert (await caller.until(b"\r\n")).startswith(expected)
        async with Caller(ports["few"]) as caller:
            caller.say(HELLO + flight("a@them"))
            await caller.until(b"354 ")
            caller.say(BODY + flight("b@them"))
            assert (await caller.end()).endswith(b"421 4.0.0 scripted for mail\r\n")
        async with Caller(ports["plain"]) as caller:
            caller.say(HELLO + flight("p+rcpt.451+first.1@them") + b"RSET\r\n" + flight("p+rcpt.451+first.1@them"))
            heard = await caller.until(b"354 ")
            assert b"451 4.3.0" in heard


async def test_a_sink_killed_before_it_answers_has_it_on_record(tmp_path: Path) -> None:
    async with sink_process(tmp_path, {"plain": ""}) as process:
        async with Caller(process.ports["plain"]) as caller:
            caller.say(HELLO + flight("p+dot.die@them"))
            await caller.until(b"354 ")
            caller.say(BODY)
            await caller.end()
        assert await process.wait() == -9
        port = process.ports["plain"]
        with process.record.open("ab") as torn:
            torn.write(b'{"k":"mai')
        [entry] = process.entries()
        assert (entry.run, entry.stored, entry.reply, entry.t_reply_written) == (0, False, "", None)
        assert entry.t_dot is not None

        await process.start()
        assert process.ports["plain"] == port
        async with Caller(port) as caller:
            caller.say(HELLO + flight("p@them"))
            await caller.until(b"354 ")
            caller.say(BODY)
            await caller.until(b"queued")
            assert (await process.counts())["plain"]["stored"] == 1
            assert await process.tell("port plain mail.450") == {"ok": True}
            assert "no word" in (await process.tell("port plain nonsense"))["error"]
        assert [entry.run for entry in process.entries()] == [0, 1]


def test_words_that_are_none_are_refused_and_ordinary_tags_are_no_script() -> None:
    for words in ("nonsense", "rcpt.what", "dot.late", "greylist.x", "max", "tls.none", "rcpt.450+rcpt.451"):
        with pytest.raises(ScriptError):
            parse(words)
    assert of_local_part("person+newsletter") == of_local_part("person") == parse("")
    assert of_local_part("person+rcpt.450").acts["rcpt"].code == 450
    assert parse("dot.late.1500ms").acts["dot"].late == 1.5


def test_who_it_was_is_read_from_the_return_path_or_the_message_id() -> None:
    paths = ReturnPaths({1: b"k" * 32}, 1, "us")
    for job, mref in ((1, 0), (2**40 - 1, 2**63 - 1), (5, -(2**63))):
        assert reference_of(paths.make(job, mref).upper()) == (job, mref)
    assert reference_of("a@us", "2a.ffffffffffffffff@us") == (42, -1)
    assert reference_of("b+" + "!" * 40 + "@us") == reference_of("a@us", "what") == (0, 0)


def test_digests_and_bare_line_ends() -> None:
    plain = b"A: b\r\n\r\nDKIM-Signature: in the body\r\n"
    signed = b"DKIM-Signature: v=1;\r\n b=x\r\n" + plain

    assert digests(signed)[1] == digests(plain)[1] == digests(plain)[0] != digests(signed)[0]
    assert [bare_line_ends(text) for text in (b"a\r\nb", b"a\nb", b"a\rb\n", b"\r\r\n")] == [0, 1, 2, 1]


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "x=what.ever"]) == 2
    assert "no word of a script" in capsys.readouterr().err
    help_text = subprocess.run(
        [sys.executable, "-m", "tests.chaos.sink", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--script" in help_text
