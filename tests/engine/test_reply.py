"""Replies from bytes: what is tolerated, what is refused, and that memory stays flat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.smtp.parser import KNOWN, MAX_BYTES, MAX_LINES, ReplyParser
from engine.smtp.reply import Malformed, Reply, printable


def parse(data: bytes) -> list[Reply | Malformed]:
    parser = ReplyParser()
    parser.feed(data)
    found: list[Reply | Malformed] = []
    while (reply := parser.next_reply()) is not None:
        found.append(reply)
        if isinstance(reply, Malformed):
            break
    return found


@pytest.mark.parametrize(
    ("data", "code", "enhanced", "text"),
    [
        (b"250 ok\r\n", 250, "", "ok"),
        (b"250\r\n", 250, "", ""),
        (b"250 \r\n", 250, "", ""),
        (b"250 ok\n", 250, "", "ok"),
        (b"550 5.1.1 no such user\r\n", 550, "5.1.1", "no such user"),
        (b"550-5.1.1 no\r\n550 5.1.1 such user\r\n", 550, "5.1.1", "no such user"),
        (b"550 5.7 two numbers\r\n", 550, "", "5.7 two numbers"),  # CVE-2026-43964
        (b"550 5.7.1\r\n", 550, "5.7.1", ""),
        (b"550 5.7.1.2 four\r\n", 550, "", "5.7.1.2 four"),
        (b"550 5.1.1234 long\r\n", 550, "", "5.1.1234 long"),
        (b"550 4.2.1 the classes differ\r\n", 550, "4.2.1", "the classes differ"),
        (b"550 #5.1.0 Address rejected.\r\n", 550, "5.1.0", "#5.1.0 Address rejected."),
        (b"250-a\r\n251-b\r\n252 c\r\n", 252, "", "a b c"),
        (b"250\ttab\r\n", 250, "", "tab"),
        (b"550 caf\xc3\xa9\r\n", 550, "", "café"),
        (b"550 caf\xe9\r\n", 550, "", "caf\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_tolerated(data: bytes, code: int, enhanced: str, text: str) -> None:
    (reply,) = parse(data)
    assert isinstance(reply, Reply)
    assert (reply.code, reply.enhanced, reply.text) == (code, enhanced, text)


@pytest.mark.parametrize(
    "data",
    [
        b"2200 x\r\n",
        b"25O ok\r\n",
        b"199 x\r\n",
        b"600 x\r\n",
        b"\r\n",
        b"hello\r\n",
        b" 250 ok\r\n",
        b"+OK\r\n",
        b"25\r\n",
        b"250-ok\r\nnot a reply\r\n",
        "２５０ ok\r\n".encode(),
        b"\x00\x00\x00 ok\r\n",
    ],
)
def test_refused(data: bytes) -> None:
    found = parse(data)
    assert isinstance(found[-1], Malformed)
    assert not found[-1].overflow


def test_a_reply_stays_refused() -> None:
    parser = ReplyParser()
    parser.feed(b"nonsense\r\n250 ok\r\n")
    assert isinstance(parser.next_reply(), Malformed)
    parser.feed(b"250 ok\r\n")
    assert isinstance(parser.next_reply(), Malformed)


def test_endless_line_is_cut_off() -> None:
    parser = ReplyParser()
    for _ in range(MAX_BYTES // 1000 + 1):
        parser.feed(b"x" * 1000)
        reply = parser.next_reply()
        if reply is not None:
            break
    assert isinstance(reply, Malformed)
    assert reply.overflow
    assert len(reply.sample) <= 80
    assert not parser.pending


def test_endless_continuation_is_cut_off() -> None:
    found = parse(b"250-x\r\n" * (MAX_LINES + 1))
    assert isinstance(found[-1], Malformed)
    assert found[-1].overflow


def test_longest_reply_allowed() -> None:
    (reply,) = parse(b"250-x\r\n" * (MAX_LINES - 1) + b"250 x\r\n")
    assert isinstance(reply, Reply)
    assert len(reply.lines) == MAX_LINES


def test_text_can_do_nothing_to_a_terminal_or_a_log() -> None:
    hostile = b"550 \x1b[2J\x07\x00\x9b31m\xe2\x80\xae\xe2\x80\xa8\xc2\x85<script>\r\n"
    (reply,) = parse(hostile)
    assert isinstance(reply, Reply)
    assert reply.text.isprintable()
    assert "\N{REPLACEMENT CHARACTER}" in reply.text
    assert "<script>" in reply.text  # shown escaped by whoever makes a page of it
    assert len(printable(b"x" * 100_000)) <= 2048


def test_pending_sees_every_byte() -> None:
    parser = ReplyParser()
    assert not parser.pending
    parser.feed(b"220 go\r\n2")
    parser.next_reply()
    assert parser.pending
    parser.next_reply()
    assert parser.pending


LINES = st.sampled_from(
    [
        b"250 2.1.0 Ok\r\n",
        b"250 2.1.0 Ok\n",
        b"250-2.1.0 Ok\r\n",
        b"251 2.1.0 Ok\r\n",
        b"354 go\r\n",
        b"550 5.1.1 <x@them> no\r\n",
        b"250 " + b"x" * 200 + b"\r\n",
        b"250 2.1.0 Ok\r\r\n",
    ]
) | st.integers(0, 40).map(lambda number: b"250 2.0.0 Ok: queued as %d\r\n" % number)


@settings(deadline=None)
@given(st.lists(LINES, max_size=80), st.integers(1, 50))
def test_what_was_read_before_reads_as_if_it_had_not_been(lines: list[bytes], size: int) -> None:
    """A parser that remembers lines gives the replies of one that never saw them, however the bytes are cut."""
    data = b"".join(lines)
    parser, found = ReplyParser(), []
    for start in range(0, len(data), size):
        parser.feed(data[start : start + size])
        while (reply := parser.next_reply()) is not None:
            found.append(reply)
    wanted = []
    while lines:
        fresh = ReplyParser()
        while lines and (reply := fresh.next_reply()) is None:
            fresh.feed(lines.pop(0))
        if (reply := reply or fresh.next_reply()) is not None:
            wanted.append(reply)
            assert not fresh.pending
    assert found == wanted
    assert len(parser._known) <= KNOWN, "whatever the peer says"


@pytest.mark.parametrize("status", ["2.0.0", "2.6.0", "2.1.5"])
def test_the_codes_of_a_delivery_are_read_as_any_other(status: str) -> None:
    assert Reply(250, (status.encode() + b" Ok",)).enhanced == status
    assert Reply(250, (status.encode() + b"1 Ok",)).enhanced == f"{status}1"
    assert Reply(250, (status.encode(),)).enhanced == status
    assert Reply(550, (status.encode() + b" Ok", b"5.1.1 no")).enhanced == "5.1.1"
    assert Reply(550, (status.encode() + b" Ok",)).enhanced == status
