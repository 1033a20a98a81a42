"""The judge behind a Postfix: what it is asked in pieces, what it answers, whom it hangs up on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.bounce.classify import classify
from engine.rehearsal.delegation import MOST, Delegate, action_of
from engine.rehearsal.providers import DEFERRALS, REFUSALS, Judge, parse
from policy.events import Reason

REQUEST = b"request=smtpd_access_policy\nprotocol_state=RCPT\nsender=a@letter.example\nrecipient=%b\nsize=34000\n\n"


@asynccontextmanager
async def delegate(folder: Path, spec: str) -> AsyncIterator[Path]:
    one = Delegate(Judge(parse(spec)), folder / "judge")
    await one.start()
    try:
        yield one.path
    finally:
        await one.stop()
        await one.stop()
    assert not one.path.exists()


@asynccontextmanager
async def asking(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_it_answers_each_request_in_whatever_pieces_it_comes(tmp_path: Path) -> None:
    async with delegate(tmp_path, "unknown:0:share=1.0") as path, asking(path) as (reader, writer):
        for octet in REQUEST % b"ada@one.test":
            writer.write(bytes((octet,)))
            await writer.drain()
        assert await reader.readuntil(b"\n\n") == (
            b"action=550 5.1.1 The email account that you tried to reach does not exist\n\n"
        )
        writer.write(REQUEST % b"bob@one.test" * 2)
        for _ in range(2):
            assert (await reader.readuntil(b"\n\n")).startswith(b"action=550 5.1.1 ")


async def test_it_puts_off_once_and_takes_at_the_second_attempt(tmp_path: Path) -> None:
    async with delegate(tmp_path, "mixed:0:refused=0,deferred=1.0") as path, asking(path) as (reader, writer):
        told = []
        for _ in range(2):
            writer.write(REQUEST % b"ada@one.test")
            told.append(await reader.readuntil(b"\n\n"))
        assert told[0].startswith(b"action=45")
        assert told[1] == b"action=DUNNO\n\n"


async def test_it_takes_its_time_for_each_connection_apart(tmp_path: Path) -> None:
    """A hundred that wait half a second each are done long before fifty seconds."""
    async with delegate(tmp_path, "mixed:0:refused=0,deferred=0,delay=0.5") as path, asyncio.timeout(20):

        async def ask(number: int) -> bytes:
            async with asking(path) as (reader, writer):
                writer.write(REQUEST % b"n%d@one.test" % number)
                return await reader.readuntil(b"\n\n")

        began = asyncio.get_running_loop().time()
        assert set(await asyncio.gather(*map(ask, range(100)))) == {b"action=DUNNO\n\n"}
        assert asyncio.get_running_loop().time() - began >= 0.49, "nobody was answered at once"


@pytest.mark.parametrize(
    "nonsense",
    [b"EHLO mail.example\r\n\n\n", b"\n\n", b"recipient=\n\n", b"sender=a@b.test\n\n", b"x" * (2 * MOST) + b"\n\n"],
    ids=["smtp", "empty", "nobody", "no recipient", "too long"],
)
async def test_who_talks_nonsense_is_hung_up_on_and_others_are_answered(tmp_path: Path, nonsense: bytes) -> None:
    async with delegate(tmp_path, "accept") as path, asking(path) as (reader, writer):
        writer.write(nonsense)
        assert await reader.read() == b""
        async with asking(path) as (other, to_other):
            to_other.write(REQUEST % b"ada@one.test")
            assert await other.readuntil(b"\n\n") == b"action=DUNNO\n\n"


async def test_stopping_ends_who_still_waits(tmp_path: Path) -> None:
    one = Delegate(Judge(parse("mixed:0:refused=0,deferred=0,delay=3600")), tmp_path / "judge")
    await one.start()
    async with asking(one.path) as (reader, writer):
        writer.write(REQUEST % b"ada@one.test")
        while not one._talks:
            await asyncio.sleep(0)
        await one.stop()
        assert await reader.read() == b""


@pytest.mark.parametrize("reply", [*REFUSALS, *DEFERRALS])
def test_an_action_says_what_the_reply_says(reply: bytes) -> None:
    """One line; the code is the reply's, and a bounce means the same to the classifier."""
    action = action_of(reply)
    assert "\n" not in action
    assert "\r" not in action
    code, enhanced, words = action.split(" ", 2)
    last = reply.splitlines()[-1].decode()
    assert code == last[:3]
    assert enhanced == (last.split(" ")[1] if last.split(" ")[1][:2] in ("4.", "5.") else f"{code[0]}.0.0")
    assert words.split(" ")[0] not in (enhanced, code)
    assert classify(int(code), enhanced, words).reason is not Reason.POLICY
    assert action_of(None) == "DUNNO"
