"""The rehearsal's SMTP sink: honest dialogues by hand and by aiosmtplib, five providers, and its own count."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.bounce.classify import classify_line
from engine.rehearsal.providers import BEHAVIOURS, DEFERRALS, REFUSALS, Judge, Post, Provider, ProviderError, parse
from engine.rehearsal.server import Plan, Sink
from engine.rehearsal.session import Session, message_id_of, unstuff
from engine.rehearsal.window import HEADROOM, Window
from policy.events import Reason

BODY = b"Message-ID: <m1@us.test>\r\nSubject: hello\r\n\r\nline\r\n"
GROUP = b"MAIL FROM:<a@us.test>\r\nRCPT TO:<b@them.test>\r\nDATA\r\n"


class Rig:
    """A sink in this loop with a clock that stands still until it is moved."""

    def __init__(self, *providers: Provider, **plan: Any) -> None:
        self.now = 1000.0
        self.sink = Sink(Plan(providers, **plan), clock=lambda: self.now, wall=lambda: 5000.0)
        self.ports: dict[str, int] = {}

    def counts(self, label: str = "accept") -> dict[str, Any]:
        found: dict[str, Any] = self.sink.counts()["providers"][label]
        return found

    async def say(self, *parts: bytes, label: str = "accept") -> list[bytes]:
        """Write the parts one after the other, close our side, and read every line until the sink closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[label])
        async with asyncio.timeout(20):
            for part in parts:
                writer.write(part)
                await writer.drain()
            if not parts or not parts[-1].endswith(b"QUIT\r\n"):
                writer.write_eof()
            lines = (await reader.read()).splitlines()
        writer.close()
        return lines

    async def codes(self, *parts: bytes, label: str = "accept") -> list[bytes]:
        return [line[:3] for line in await self.say(*parts, label=label) if line[3:4] == b" "]


@asynccontextmanager
async def rig_of(*providers: Provider, **plan: Any) -> AsyncIterator[Rig]:
    rig = Rig(*(providers or (Provider("accept"),)), **plan)
    rig.ports = await rig.sink.start()
    try:
        yield rig
    finally:
        await rig.sink.stop()


# ---- the dialogue


async def test_a_chain_is_answered_in_order() -> None:
    async with rig_of() as rig:
        chain = b"EHLO us\r\n" + GROUP + (BODY + b".\r\n" + GROUP) * 9 + BODY + b".\r\nQUIT\r\n"
        codes = await rig.codes(chain)
        assert codes == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 10 + [b"221"]
        counts = rig.counts()
        assert (counts["accepted"], counts["recipients"], counts["bytes"]) == (10, 10, 10 * len(BODY))
        assert counts["unique"] == 1  # ten copies of one message to one recipient
        assert (counts["connections"], counts["most_open"]) == (1, 1)
        async with asyncio.timeout(20):
            while rig.counts()["open"]:  # until the sink has heard that we closed
                await asyncio.sleep(0)


async def test_what_is_offered() -> None:
    async with rig_of(Provider("accept"), size=1000, chunking=True) as rig:
        lines = await rig.say(b"EHLO us\r\nQUIT\r\n")
        words = {line[4:] for line in lines if line.startswith(b"250")}
        assert words >= {b"PIPELINING", b"SIZE 1000", b"8BITMIME", b"ENHANCEDSTATUSCODES", b"SMTPUTF8", b"CHUNKING"}
        assert b"STARTTLS" not in words
    async with rig_of(pipelining=False) as rig:
        assert not [line for line in await rig.say(b"EHLO us\r\nQUIT\r\n") if b"PIPELINING" in line]
        assert await rig.codes(b"HELO us\r\nNOOP\r\nRSET\r\nVRFY x\r\nQUIT\r\n") == [
            b"220", b"250", b"250", b"250", b"252", b"221",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("commands", "codes"),
    [
        (b"MAIL FROM:<a@b>\r\n", [b"503"]),
        (b"EHLO us\r\nRCPT TO:<a@b>\r\n", [b"250", b"503"]),
        (b"EHLO us\r\nDATA\r\n", [b"250", b"503"]),
        (b"EHLO us\r\nMAIL FROM:<a@b>\r\nDATA\r\n", [b"250", b"250", b"554"]),
        (b"EHLO us\r\nMAIL FROM:<a@b>\r\nMAIL FROM:<a@b>\r\n", [b"250", b"250", b"503"]),
        (b"EHLO us\r\nMAIL FROM:a@b\r\n", [b"250", b"501"]),
        (b"EHLO us\r\nMAIL FROM:<a@b> BODY=8BITMIME SIZE=2001\r\n", [b"250", b"552"]),
        (b"EHLO us\r\nMAIL FROM:<a@b> SIZE=1999 BODY=8BITMIME\r\n", [b"250", b"250"]),
        (b"EHLO us\r\nMAIL FROM:<>\r\nRSET\r\nRCPT TO:<a@b>\r\n", [b"250", b"250", b"250", b"503"]),
        (b"WHAT\r\nehlo us\r\nnoop\r\n", [b"500", b"250", b"250"]),
        (b"EHLO us\r\nSTARTTLS\r\n", [b"250", b"503"]),
        (b"x" * 5000, [b"421"]),
        (b"EHLO us\r\n" + GROUP + b"x" * 3000 + b"\r\n.\r\n", [b"250", b"250", b"250", b"354", b"552"]),
    ],
)
async def test_order_and_syntax_are_kept(commands: bytes, codes: list[bytes]) -> None:
    async with rig_of(size=2000) as rig:
        assert await rig.codes(commands) == [b"220", *codes]


async def test_aiosmtplib_finds_an_ordinary_server() -> None:
    async with rig_of() as rig:
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=rig.ports["accept"], start_tls=False)
        async with client:
            for _ in range(3):
                errors, reply = await client.sendmail("a@us.test", ["b@them.test", "c@them.test"], BODY)
                assert (errors, reply[:9]) == ({}, "2.0.0 Ok:")
        counts = rig.counts()
        assert (counts["accepted"], counts["recipients"], counts["unique"]) == (3, 6, 2)


async def test_starttls_begins_anew_and_drops_what_came_in_clear() -> None:
    async with rig_of(starttls=True) as rig:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=rig.ports["accept"], start_tls=True, tls_context=context)
        async with client:
            assert not client.supports_extension("starttls")
            await client.sendmail("a@us.test", ["b@them.test"], BODY * 2000)
        assert rig.counts()["accepted"] == 1
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.ports["accept"])
        writer.write(b"EHLO us\r\nSTARTTLS\r\n" + GROUP)  # injected behind STARTTLS
        async with asyncio.timeout(20):
            while not (await reader.readline()).startswith(b"220 2.0.0"):
                pass
            await writer.start_tls(context)
            writer.write(b"MAIL FROM:<a@b>\r\n")
            assert (await reader.readline()).startswith(b"503")  # the greeting of before is forgotten
        writer.close()
        await writer.wait_closed()


async def test_chunks_are_taken_by_length_and_their_dots_left_alone(tmp_path: Path) -> None:
    async with rig_of(chunking=True, keep=1, keep_dir=tmp_path) as rig:
        wire = BODY + b"..two dots\r\n.\r\nQUIT\r\n"
        head, tail = wire[:20], wire[20:]
        said = b"EHLO us\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
        said += b"BDAT %d\r\n%bBDAT %d LAST\r\n%bQUIT\r\n" % (len(head), head, len(tail), tail)
        assert await rig.codes(said) == [b"220", b"250", b"250", b"250", b"250", b"250", b"221"]
        assert files(tmp_path) == {"accept-0000000.eml": wire}
        assert rig.counts()["accepted"] == 1
        empty = b"EHLO us\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 0 LAST\r\nBDAT 3 LAST\r\nabcNOOP\r\nQUIT\r\n"
        assert await rig.codes(empty) == [b"220", b"250", b"250", b"250", b"250", b"503", b"250", b"221"]
    async with rig_of() as rig:
        assert await rig.codes(b"EHLO us\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 3 LAST\r\nabc") == [
            b"220", b"250", b"250", b"250", b"421",
        ]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_replies(cuts: list[int]) -> None:
    """However the client's bytes are cut into segments, the replies, the counts and the kept bodies are the same."""
    bodies = (b"..a\r\n.b\r\n\r\n" + BODY, b"", BODY)
    said = b"EHLO us\r\n" + b"".join(GROUP + body + b".\r\n" for body in bodies) + b"QUIT\r\n"
    edges = sorted({0, len(said), *(cut % len(said) for cut in cuts)})
    parts = [said[a:b] for a, b in itertools.pairwise(edges)]
    replies: list[bytes] = []
    sink = Sink(Plan([Provider("accept")]), clock=lambda: 0.0, wall=lambda: 0.0)
    session = Session(sink, sink._posts["accept"])
    session.connection_made(Wire(replies))
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(feed(session, parts))
    finally:
        loop.close()
    codes = [line[:3] for line in b"".join(replies).splitlines() if line[3:4] == b" "]
    assert codes == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 3 + [b"221"]
    counts = sink.counts()["providers"]["accept"]
    assert (counts["accepted"], counts["bytes"], counts["unique"]) == (3, sum(map(len, bodies)), 2)


class Memory(Sink):
    """A sink that keeps every message here instead of in files."""

    def __init__(self, *providers: Provider, **plan: Any) -> None:
        super().__init__(Plan(providers or [Provider("accept")], **plan), clock=lambda: 0.0, wall=lambda: 0.0)
        self.wires: list[bytes] = []

    def keep(self, post: Post, number: int, wire: bytes) -> None:
        self.wires.append(wire)


def heard(parts: list[bytes], *, keeps: bool, size: int = 3000) -> tuple[bytes, dict[str, Any], set[int], list[bytes]]:
    """Replies, counts, what was seen, and the bodies kept of one session that hears these segments."""
    sink = Memory(chunking=True, size=size, keep=-1 if keeps else 0, keep_dir=Path("/nowhere") if keeps else None)
    replies: list[bytes] = []
    session = Session(sink, sink._posts["accept"])
    session.connection_made(Wire(replies))
    for part in parts:
        hear(session, part)
    counts = sink.counts()["providers"]["accept"]
    counts.pop("kept")
    return b"".join(replies), counts, sink._posts["accept"].seen, sink.wires


LINES = st.lists(st.sampled_from([b"", b".", b"..", b".x", b"x" * 70, b"a.\t.", b"Message-ID: <late@x>"]), max_size=12)
HEADS = st.sampled_from(
    [b"Message-ID: <1@x>\r\n\r\n", b"A: b\r\nmessage-id:\r\n <2@x>\r\nC: d\r\n\r\n",
     b"A: b\r\nMessage-ID: <3@x>\r\n\r\n", b"", b"\r\n", b"A: " + b"y" * 400 + b"\r\nMessage-ID: <4@x>\r\n\r\n"]
)  # fmt: skip
GROUPS = st.sampled_from(
    [GROUP, GROUP.lower(), b"MAIL FROM:<> BODY=8BITMIME\r\nRCPT TO:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n",
     b"MAIL FROM:<s@x> SIZE=2999\r\nRCPT TO:<p@q> NOTIFY=NEVER\r\nDATA\r\n"]
)  # fmt: skip


@st.composite
def talk(draw: st.DrawFn) -> bytes:
    """What a client may say: messages by DATA and BDAT, dots stuffed, some too large, commands out of place."""
    said = [b"EHLO us\r\n"]
    for _ in range(draw(st.integers(1, 5))):
        body = draw(HEADS) + b"".join(line + b"\r\n" for line in draw(LINES))
        body += b"z" * 76 * draw(st.sampled_from([0, 0, 0, 60]))  # above the limit
        kind = draw(st.sampled_from(["data", "data", "bdat", "noise", "announced"]))
        if kind == "data":
            stuffed = b"".join(b"." + line if line[:1] == b"." else line for line in body.splitlines(keepends=True))
            said += [draw(GROUPS), stuffed, b"" if stuffed.endswith(b"\r\n") or not stuffed else b"\r\n", b".\r\n"]
        elif kind == "bdat":
            cut = draw(st.integers(0, len(body)))
            said += [b"MAIL FROM:<s@x>\r\nRCPT TO:<a@b>\r\n", b"BDAT %d\r\n" % cut, body[:cut]]
            said += [b"BDAT %d LAST\r\n" % (len(body) - cut), body[cut:]]
        elif kind == "noise":
            said.append(
                draw(st.sampled_from([b"NOOP\r\n", b"WHAT?\r\n", b"RCPT TO:<a@b>\r\n", b"DATA\r\n", b"RSET\r\n"]))
            )
        else:
            said.append(b"MAIL FROM:<s@x> SIZE=3001\r\nRCPT TO:<a@b>\r\nDATA\r\nRSET\r\n")
    return b"".join([*said, b"NOOP\r\n"])


@settings(max_examples=200, deadline=None)
@given(said=talk(), cuts=st.lists(st.integers(0, 20_000), max_size=16), keeps=st.booleans())
def test_any_talk_is_the_same_however_it_is_cut(said: bytes, cuts: list[int], keeps: bool) -> None:
    """Whole, in any segments, and octet by octet where it is short: the same replies, counts, recipients, bodies."""
    edges = sorted({0, len(said), *(cut % len(said) for cut in cuts)})
    whole = heard([said], keeps=keeps)

    assert heard([said[a:b] for a, b in itertools.pairwise(edges)], keeps=keeps) == whole
    if len(said) < 1500:
        assert heard([said[n : n + 1] for n in range(len(said))], keeps=keeps) == whole


@settings(max_examples=100, deadline=None)
@given(said=talk())
def test_a_message_counts_the_same_whether_it_is_kept_or_not(said: bytes) -> None:
    """Replies, counts and who was seen do not depend on keeping, but for the bodies themselves."""
    kept, dropped = heard([said], keeps=True), heard([said], keeps=False)

    assert kept[:3] == dropped[:3]
    assert len(kept[3]) == kept[1]["accepted"]
    assert dropped[3] == []


@settings(max_examples=200, deadline=None)
@given(body=LINES, more=st.booleans())
def test_a_stuffed_body_arrives_as_it_was(body: list[bytes], more: bool) -> None:
    """RFC 5321 4.5.2: what was kept is what was meant, dots and all."""
    meant = b"".join(line + b"\r\n" for line in body)
    stuffed = b"".join((b"." + line if line.startswith(b".") else line) + b"\r\n" for line in body)
    said = b"EHLO us\r\n" + GROUP + stuffed + b".\r\n" + (GROUP + stuffed + b".\r\n") * more

    assert heard([said], keeps=True)[3] == [meant] * (1 + more)


@settings(max_examples=100, deadline=None)
@given(order=st.lists(st.booleans(), min_size=20, max_size=60), cut=st.integers(1, 97))
def test_sessions_that_share_the_window_do_not_hear_each_other(order: list[bool], cut: int) -> None:
    """Segments of two sessions in any order: each is answered as if it were alone."""
    chain = b"EHLO us\r\n" + (GROUP + BODY + b".\r\n") * 3
    sink = Memory()
    replies: tuple[list[bytes], list[bytes]] = ([], [])
    sessions = [Session(sink, sink._posts["accept"]) for _ in replies]
    for session, said in zip(sessions, replies, strict=True):
        session.connection_made(Wire(said))
    left = [[chain[n : n + cut] for n in range(0, len(chain), cut)] for _ in replies]
    for which in [*map(int, order), *([0] * len(left[0])), *([1] * len(left[1]))]:
        if left[which]:
            hear(sessions[which], left[which].pop(0))

    for said in replies:
        codes = [line[:3] for line in b"".join(said).splitlines() if line[3:4] == b" "]
        assert codes == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 3
    assert sink.counts()["accepted"] == 6


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from([b"\r", b"\n", b".", b"\r\n.\r", b"\r\n.\r\n", b"x", b"\0"]), max_size=30).map(
        b"".join
    ),
    at=st.integers(0, 10),
    stop=st.integers(0, 60),
)
def test_the_end_of_data_is_where_find_says(text: bytes, at: int, stop: int) -> None:
    """strstr on the window, bytes.find on anything else and without strstr: one answer; what lies behind is not it."""
    window, without = Window(), Window()
    without._strstr = None
    at, stop = min(at, len(text)), min(stop, len(text))
    for one in (window, without):
        one.view[: len(text) + 5] = text + b"\r\n.\r\n"
        wanted = text.find(b"\r\n.\r\n", at, stop) if at <= stop else -1
        found = one.end_of_data(one.octets, HEADROOM + at, HEADROOM + max(at, stop))
        assert found == (wanted + HEADROOM if wanted >= 0 else -1)
        assert one.end_of_data(text, at, max(at, stop)) == wanted


def test_an_endless_header_gives_its_id_up_and_an_endless_line_ends_the_session() -> None:
    """A Message-ID behind the first 16 KiB is not looked for: what an accepted message may cost is bounded."""
    head = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 60) for n in range(400))
    told, counts, seen, _ = heard(
        [b"EHLO us\r\n" + GROUP + head + b"Message-ID: <far@x>\r\n\r\nhi\r\n.\r\n"], keeps=False, size=100_000
    )
    assert b"250 2.0.0 Ok: queued as 1" in told
    assert counts["accepted"] == 1
    assert seen == {hash((b"", b"b@them.test"))}
    assert heard([b"x" * 5000], keeps=False)[0].endswith(b"421 4.5.2 Line too long\r\n")


class Wire(asyncio.Transport):
    """A transport that only remembers."""

    def __init__(self, said: list[bytes]) -> None:
        super().__init__()
        self._said = said

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._said.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self._said.append(b"")


def hear(session: Session, part: bytes) -> None:
    """What a loop does: the kernel's octets go into the sink's window, and nobody else's come until they are taken."""
    view = session.get_buffer(-1)
    view[: len(part)] = part
    session.buffer_updated(len(part))
    view[: len(part)] = b"Z" * len(part)  # whoever still looks there sees it


async def feed(session: Session, parts: list[bytes]) -> None:
    for part in parts:
        hear(session, part)


# ---- the providers


async def test_a_limit_of_messages_and_connections_closes_with_421() -> None:
    async with rig_of(Provider("limit", messages=2, connections=2)) as rig:
        chain = b"EHLO us\r\n" + GROUP + (BODY + b".\r\n" + GROUP) * 5
        codes = await rig.codes(chain, label="limit")
        assert codes == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 2 + [b"421"]
        held = [await asyncio.open_connection("127.0.0.1", rig.ports["limit"]) for _ in range(2)]
        for reader, _ in held:
            assert (await reader.readline()).startswith(b"220")
        assert await rig.codes(label="limit") == [b"421"]
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        counts = rig.counts("limit")
        assert (counts["accepted"], counts["closed_421"], counts["most_open"]) == (2, 2, 3)


def test_a_limit_of_rate_lets_through_what_it_says() -> None:
    judge = Judge(Provider("limit", rate=100.0))
    taken = sum(judge.mail(0, now / 1000) is None for now in range(2000))
    assert 200 <= taken <= 215  # two seconds at 100 a second, and a tenth of a second of burst


async def test_a_greylist_takes_the_second_attempt_after_its_time() -> None:
    async with rig_of(Provider("greylist", seconds=3.0)) as rig:
        said = b"EHLO us\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nQUIT\r\n"
        assert (await rig.codes(said, label="greylist"))[3] == b"450"
        rig.now += 2.9
        assert (await rig.codes(said, label="greylist"))[3] == b"450"
        rig.now += 0.2
        assert (await rig.codes(said, label="greylist"))[3] == b"250"
        assert (await rig.codes(said.replace(b"c@d", b"e@d"), label="greylist"))[3] == b"450"
        assert rig.counts("greylist")["deferred"] == 3


def test_unknown_users_are_the_same_share_every_time() -> None:
    judges = [Judge(Provider("unknown", share=0.3)) for _ in range(2)]
    people = [b"person%d@home.strict.test" % number for number in range(4000)]
    refused = [judges[0].recipient(person, 0.0) is not None for person in people]
    assert 0.27 <= sum(refused) / len(people) <= 0.33
    assert refused == [judges[1].recipient(person.upper(), 9.9) is not None for person in people]
    assert refused == [judges[1].is_unknown(person) for person in people]
    assert not any(Judge(Provider("unknown", share=0.0)).is_unknown(person) for person in people)
    assert all(Judge(Provider("unknown", share=1.0)).is_unknown(person) for person in people)


async def test_refusals_in_a_pipelined_group_are_told_one_by_one() -> None:
    async with rig_of(Provider("unknown", share=1.0)) as rig:
        codes = await rig.codes(b"EHLO us\r\n" + GROUP + b"RSET\r\nQUIT\r\n", label="unknown")
        assert codes == [b"220", b"250", b"250", b"550", b"554", b"250", b"221"]
        assert rig.counts("unknown")["refused"] == 1


async def test_a_slow_provider_keeps_the_order_and_its_connections_apart() -> None:
    async with rig_of(Provider("slow", delay=0.02)) as rig:
        chain = b"EHLO us\r\n" + GROUP + (BODY + b".\r\n" + GROUP) * 3 + BODY + b".\r\nQUIT\r\n"
        answers = await asyncio.gather(*(rig.codes(chain, label="slow") for _ in range(4)))
        assert all(codes == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 4 + [b"221"] for codes in answers)
        assert rig.counts("slow")["accepted"] == 16


@pytest.mark.parametrize(
    ("text", "provider"),
    [
        ("accept", Provider("accept")),
        ("accept:2525", Provider("accept", 2525)),
        ("greylist:0:seconds=1.5,name=grey", Provider("greylist", 0, "grey", seconds=1.5)),
        ("limit:1:messages=20,rate=0,connections=3", Provider("limit", 1, connections=3, messages=20, rate=0.0)),
    ],
)
def test_descriptions_are_read(text: str, provider: Provider) -> None:
    assert parse(text) == provider


@pytest.mark.parametrize(
    "text", ["", "nice", "accept:x", "accept:70000", "slow:1:delay=x", "slow:1:speed=1", "slow:1:delay=-1"]
)
def test_wrong_descriptions_are_refused_in_words(text: str) -> None:
    with pytest.raises(ProviderError):
        parse(text)


def test_the_defaults_of_every_behaviour_are_a_provider() -> None:
    assert [parse(behaviour).behaviour for behaviour in BEHAVIOURS] == list(BEHAVIOURS)
    assert parse("limit").messages > 0


def test_a_mixed_provider_refuses_a_share_and_puts_another_off_once() -> None:
    judge = Judge(parse("mixed:0:refused=0.1,deferred=0.05"))
    people = [b"person%d@mail.test" % number for number in range(6000)]
    first = {person: judge.recipient(person, 0.0) for person in people}
    refused = {person for person, reply in first.items() if reply is not None and reply.startswith(b"5")}
    deferred = {person for person, reply in first.items() if reply is not None and reply.startswith(b"4")}

    assert 0.085 <= len(refused) / len(people) <= 0.115
    assert 0.04 <= len(deferred) / len(people) <= 0.06
    assert len({first[person] for person in refused}) == len(REFUSALS)
    assert len({first[person] for person in deferred}) == len(DEFERRALS)
    again = {person: judge.recipient(person.upper(), 9.0) for person in people}
    assert {person for person, reply in again.items() if reply is not None} == refused
    assert {again[person] for person in refused} == {first[person] for person in refused} - {None}


@pytest.mark.parametrize("reply", [*REFUSALS, *DEFERRALS])
def test_what_a_mixed_provider_says_is_a_reply_about_one_mailbox(reply: bytes) -> None:
    lines = reply.decode("ascii").removesuffix("\r\n").split("\r\n")
    assert {line[:3] for line in lines} == {lines[0][:3]}
    assert [line[3] for line in lines] == ["-"] * (len(lines) - 1) + [" "]
    assert all(len(line) <= 510 for line in lines)
    judged = classify_line(lines[0][:4].replace("-", " ") + " ".join(line[4:] for line in lines))
    assert judged.reason in (
        Reason.USER_UNKNOWN, Reason.RECIPIENT_REJECTED, Reason.INACTIVE_MAILBOX, Reason.MAILBOX_FULL,
        Reason.GREYLISTED, Reason.SYSTEM_TROUBLE,
    )  # fmt: skip


async def test_what_is_said_while_a_provider_thinks_is_answered_after_it() -> None:
    async with rig_of(Provider("mixed", delay=0.02)) as rig:
        chain = b"EHLO us\r\n" + GROUP + (BODY + b".\r\n" + GROUP) * 3 + BODY + b".\r\n"
        octets = [chain[n : n + 37] for n in range(0, len(chain), 37)]
        codes = await rig.codes(*octets, b"QUIT\r\n", label="mixed")
        assert codes == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 4 + [b"221"]
        said_no_more = await rig.codes(chain, label="mixed")
        assert said_no_more == [b"220", b"250"] + [b"250", b"250", b"354", b"250"] * 4


# ---- what it keeps and says


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_kept_messages_are_whole_unstuffed_and_as_many_as_asked(tmp_path: Path) -> None:
    async with rig_of(keep=3, keep_every=2, keep_dir=tmp_path / "kept") as rig:
        body = BODY + b"..dot\r\nlone\nnewline\r\n"
        chain = b"EHLO us\r\n" + GROUP + (body + b".\r\n" + GROUP) * 9 + body + b".\r\nQUIT\r\n"
        await rig.codes(chain)
        plain = BODY + b".dot\r\nlone\nnewline\r\n"
        assert files(tmp_path / "kept") == {f"accept-000000{n}.eml": plain for n in (0, 2, 4)}
        counts = rig.counts()
        assert (counts["kept"], counts["bare_newlines"]) == (3, 3)


async def test_all_messages_are_kept_whole_over_many_connections(tmp_path: Path) -> None:
    async with rig_of(keep=-1, keep_dir=tmp_path) as rig:
        body = BODY + b"x" * 76 * 2000 + b"\r\n"
        chain = b"EHLO us\r\n" + GROUP + (body + b".\r\n" + GROUP) * 4 + body + b".\r\nQUIT\r\n"
        await asyncio.gather(*(rig.codes(chain) for _ in range(5)))
        kept = files(tmp_path)
        assert len(kept) == rig.counts()["kept"] == 25
        assert set(kept.values()) == {body}


async def test_the_record_is_written_before_the_reply(tmp_path: Path) -> None:
    path = tmp_path / "sink.jsonl"
    async with rig_of(record=path, record_recipients=True) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.ports["accept"])
        writer.write(b"EHLO us\r\n" + GROUP + BODY + b".\r\n")
        async with asyncio.timeout(20):
            while b"queued" not in await reader.readline():
                pass
        (line,) = map(json.loads, path.read_bytes().splitlines())
        assert line == {
            "at": 5000.0, "provider": "accept", "id": "m1@us.test", "rcpts": 1, "size": len(BODY), "reply": 250,
            "to": ["b@them.test"],
        }  # fmt: skip
        writer.close()
        await writer.wait_closed()


async def test_the_control_port_tells_counts_and_stops() -> None:
    async with rig_of(Provider("accept"), Provider("slow", name="snail")) as rig:
        assert set(rig.ports) == {"accept", "snail"}
        await rig.codes(b"EHLO us\r\n" + GROUP + BODY + b".\r\nQUIT\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.sink.control_port)
        async with asyncio.timeout(20):
            writer.write(b"counts\nnonsense\nstop\n")
            counts, error, stopping = [json.loads(await reader.readline()) for _ in range(3)]
        assert counts["accepted"] == counts["unique"] == 1
        assert counts["providers"]["snail"]["accepted"] == 0
        assert counts["cpu_seconds"] > 0
        assert "error" in error
        assert stopping == {"stopping": True}
        assert rig.sink.stopped.is_set()
        writer.close()
        await writer.wait_closed()


async def test_two_providers_of_one_name_and_keeping_nowhere_are_refused() -> None:
    with pytest.raises(ProviderError):
        Sink(Plan([Provider("accept"), Provider("accept")]))
    with pytest.raises(ProviderError):
        Sink(Plan([Provider("accept")], keep=1))


def test_helpers_of_the_wire() -> None:
    assert message_id_of(BODY) == b"m1@us.test"
    assert message_id_of(b"subject: x\r\nMESSAGE-id:\r\n <folded@x>\r\n\r\n") == b"folded@x"
    assert message_id_of(b"Subject: x\r\n\r\nMessage-ID: <in-the-body@x>\r\n") == b""
    assert unstuff(b"..a\r\n..b\r\nc..\r\n") == b".a\r\n.b\r\nc..\r\n"


def test_the_process_alone(tmp_path: Path) -> None:
    """python -m engine.rehearsal.server: ports on stdout, counts at the end, wrong usage is 2, a taken port is 1."""

    with process_of("--provider", "accept", "--keep", "1", "--keep-dir", str(tmp_path)) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        asyncio.run(send_one(ready["ports"]["accept"]))
        with process_of("--provider", f"accept:{ready['ports']['accept']}") as second:
            assert second.wait(20) == 1
        os.kill(ready["pid"], signal.SIGTERM)
        counts = json.loads(process.stdout.readline())
        assert process.wait(20) == 0
    assert counts["accepted"] == 1
    assert (tmp_path / "accept-0000000.eml").read_bytes().endswith(b"line\r\n")
    for wrong in (["--provider", "nice"], ["--keep", "1"], ["--unheard-of"]):
        with process_of(*wrong) as process:
            assert process.wait(20) == 2


@contextmanager
def process_of(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "engine.rehearsal.server", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def send_one(port: int) -> None:
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as client:
        await client.sendmail("a@us.test", ["b@them.test"], BODY)
