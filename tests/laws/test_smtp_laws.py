"""The laws of the SMTP dialogue, against whatever a server may say and however it is cut."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.smtp import lines
from engine.smtp.dialogue import Dialogue
from engine.smtp.lines import LocalError, commands, ends_early, flight, mail, rcpt, stuffed
from engine.smtp.words import (
    AddressRefused,
    Closed,
    Event,
    Fate,
    Outbound,
    Parked,
    Settled,
    Step,
    Tls,
    Trouble,
    UnsafeData,
    Upgrade,
)

LAW = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

REPLIES = st.one_of(
    st.sampled_from(
        [
            b"220 mx\r\n",
            b"250 ok\r\n",
            b"250 2.1.5 ok\r\n",
            b"250-mx\r\n250 PIPELINING\r\n",
            b"250-mx\r\n250-PIPELINING\r\n250-STARTTLS\r\n250 SIZE 1000\r\n",
            b"354 go\r\n",
            b"354 go\r\n",
            b"250 ok\r\n250 ok\r\n354 go\r\n",
            b"250 ok\r\n550 5.1.1 no\r\n354 go\r\n",
            b"250 ok\r\n550 5.1.1 no\r\n503 no\r\n",
            b"421 bye\r\n",
            b"450 4.2.0 later\r\n",
            b"503 what\r\n",
            b"550 5.1.1 no\r\n",
            b"554 no\r\n",
            b"250-",
            b"2",
            b"\r\n",
            b"nonsense\r\n",
            b"199 x\r\n",
        ]
    ),
    st.binary(max_size=20),
)
HAPPENINGS = st.one_of(
    st.tuples(st.just("say"), REPLIES),
    st.tuples(st.just("say"), REPLIES),
    st.tuples(st.just("say"), REPLIES),
    st.tuples(st.just("lose"), st.sampled_from([Trouble.LOST, Trouble.TIMEOUT, Trouble.ABORTED])),
    st.tuples(st.just("quit"), st.none()),
    st.tuples(st.just("void"), st.booleans()),
    st.tuples(st.just("answer"), st.booleans()),
    st.tuples(st.just("hold"), st.booleans()),
)


class Run:
    """A dialogue with an eager driver: offers messages whenever one is wanted and writes whatever it is given."""

    def __init__(self, tls: Tls, pipeline: bool) -> None:
        self.void = False
        self.hold = False
        self.taken: list[Outbound] = []
        self.events: list[Event] = []
        self.committed: list[Outbound] = []
        self.wire: list[bytes] = []
        self.parked: Outbound | None = None
        self.late = False  # RCPT said while void
        self.dialogue = Dialogue(
            "us.example", tls, on_commit=self.committed.append, is_void=lambda _: self.void, pipeline=pipeline
        )

    def take(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, Parked):
                self.parked = event.message
            elif isinstance(event, Upgrade):
                self.take(self.dialogue.tls_started())
        while self.dialogue.wants and len(self.taken) < 40 and not (self.void or self.hold):
            number = len(self.taken)
            message = Outbound(number, f"a{number}@us", f"x{number}@them", f"N: {number}\r\n\r\n.{number}\r\n".encode())
            self.taken.append(message)
            self.events += self.dialogue.deliver(message)
            if not self.dialogue.closed and self.dialogue.waiting_for is not Step.IDLE:
                break
        if not self.hold:
            self.wire += self.dialogue.outgoing()

    def happen(self, what: str, argument: object) -> None:
        dialogue = self.dialogue
        if what == "say":
            assert isinstance(argument, bytes)
            self.take(dialogue.receive(argument))
        elif what == "lose":
            assert isinstance(argument, Trouble)
            self.take(dialogue.lost(argument))
        elif what == "quit":
            self.take(dialogue.quit())
        elif what == "void":
            self.void = bool(argument)
        elif what == "hold":
            self.hold = bool(argument)
        elif self.parked is not None and dialogue.waiting_for is Step.PERMIT and not dialogue.closed:
            message, self.parked = self.parked, None
            self.void = False
            self.take((dialogue.renew if argument else dialogue.withdraw)(message))

    def finish(self) -> None:
        self.take(self.dialogue.lost(Trouble.LOST))


@LAW
@given(st.sampled_from(list(Tls)), st.booleans(), st.lists(HAPPENINGS, max_size=60))
def test_every_message_taken_is_settled_exactly_once_and_there_is_exactly_one_closed(
    tls: Tls, pipeline: bool, happenings: list[tuple[str, object]]
) -> None:
    """Law 1, whatever comes; and law 4: UNKNOWN only behind a dot that was announced."""
    run = Run(tls, pipeline)
    run.happen("say", b"220 mx\r\n")
    run.happen("say", b"250-mx\r\n250 PIPELINING\r\n")
    for what, argument in happenings:
        run.happen(what, argument)
    run.finish()

    settled = [event for event in run.events if isinstance(event, Settled)]
    assert sorted(str(event.message.key) for event in settled) == sorted(map(str, range(len(run.taken))))
    assert sum(isinstance(event, Closed) for event in run.events) == 1
    assert isinstance(run.events[-1], Closed)
    for event in settled:
        if event.verdict.fate in (Fate.UNKNOWN, Fate.DELIVERED):
            assert event.message in run.committed
        if event.verdict.fate is Fate.UNKNOWN:
            assert event.verdict.step is Step.BODY
        if event.verdict.fate is Fate.DELIVERED:
            assert event.verdict.reply is not None
            assert event.verdict.reply.accepted
    assert len(run.committed) == len(set(run.committed)), "a dot is announced once"


@LAW
@given(st.booleans(), st.lists(REPLIES, max_size=30), st.randoms(use_true_random=False))
def test_any_split_of_what_the_peer_says_gives_the_same_events_and_the_same_bytes(
    pipeline: bool, replies: list[bytes], chance: random.Random
) -> None:
    """Law 2. Between two things of ours the bytes may come in any pieces."""
    whole, cut = Run(Tls.NEVER, pipeline), Run(Tls.NEVER, pipeline)
    for reply in [b"220 mx\r\n", b"250-mx\r\n250 PIPELINING\r\n", *replies]:
        whole.take(whole.dialogue.receive(reply))
        events: list[Event] = []
        at = 0
        while at < len(reply):
            end = at + chance.randint(1, 4)
            events += cut.dialogue.receive(reply[at:end])
            at = end
        cut.take(events)
    whole.finish()
    cut.finish()
    assert _shown(whole) == _shown(cut)


def _shown(run: Run) -> tuple[list[str], bytes]:
    shown = []
    for event in run.events:
        if isinstance(event, Settled):
            shown.append(f"{event.message.key} {event.verdict}")
        elif isinstance(event, Closed):
            shown.append(f"{event.trouble} {event.step} {event.reply}")
    return shown, b"".join(run.wire)


GRAMMAR = re.compile(
    rb"(?:EHLO us\.example|HELO us\.example|STARTTLS|RSET|DATA|QUIT|"
    rb"MAIL FROM:<[^<>\x00-\x20\x7f]*>(?: SIZE=\d+)?(?: BODY=8BITMIME)?(?: SMTPUTF8)?|RCPT TO:<[^<>\x00-\x20\x7f]+>)"
)


@LAW
@given(st.sampled_from([Tls.NEVER, Tls.MAY]), st.booleans(), st.lists(HAPPENINGS, max_size=60))
def test_all_that_leaves_is_smtp_grammar(tls: Tls, pipeline: bool, happenings: list[tuple[str, object]]) -> None:
    """Law 3: command lines by grammar, bodies between DATA and the dot, no bare CR or LF anywhere."""
    run = Run(tls, pipeline)
    for what, argument in [("say", b"220 mx\r\n"), ("say", b"250-mx\r\n250 PIPELINING\r\n"), *happenings]:
        run.happen(what, argument)
    run.finish()
    wire = b"".join(run.wire)
    assert wire.count(b"\r") == wire.count(b"\n") == wire.count(b"\r\n")
    lines = wire.split(b"\r\n")
    assert lines.pop() == b""
    in_body = False
    for number, line in enumerate(lines):
        if in_body:
            in_body = line != b"."
            continue
        if line == b"." or line.startswith(b"N: "):  # DATA's permission came: the rest is a body
            in_body = line != b"."
            continue
        assert GRAMMAR.fullmatch(line), (number, line)
        assert len(line) <= 510


NEARLY_ADDRESSES = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.sampled_from([*'ab@.<>\r\n\0 "\\ä\u2028\ud800:;,', "a@b", '"a b"@c', "x@them", "\r\nRCPT TO:<x@y>"])
    ).map("".join),
)


@LAW
@given(NEARLY_ADDRESSES, NEARLY_ADDRESSES)
def test_no_text_becomes_two_commands(sender: str, recipient: str) -> None:
    """Law 3: whatever the addresses, an Outbound refuses them or each stays inside one pair of angle brackets."""
    try:
        message = Outbound(None, sender, recipient, b"\r\n")
    except AddressRefused:
        return
    assert flight(message, {"SIZE": ""}) == commands(mail(message, {"SIZE": ""}), rcpt(message), "DATA")
    line = commands(mail(message, {}), rcpt(message))
    assert line.count(b"\r\n") == 2
    assert line.count(b"<") == line.count(b">") == 2
    for address in (message.sender, message.recipient):
        assert not set(address) & set("<>\r\n\0\t")
        assert address.isprintable()


@LAW
@given(NEARLY_ADDRESSES, NEARLY_ADDRESSES)
def test_a_flight_is_the_commands_it_is_made_of_whatever_became_of_the_addresses(sender: str, recipient: str) -> None:
    """Law 3: the two places that write commands write the same, and refuse the same."""
    message = Outbound(None, "a@us", "x@them", b"\r\n")
    message.sender, message.recipient = sender, recipient
    try:
        wanted = commands(mail(message, {}), rcpt(message), "DATA")
    except LocalError:
        with pytest.raises(LocalError):
            flight(message, {})
        return
    assert flight(message, {}) == wanted


@pytest.mark.parametrize("long", [64, 65, 600])
@pytest.mark.parametrize("far", [60, 189, 190, 255, 600])
def test_an_address_is_as_long_as_the_rfc_allows(long: int, far: int) -> None:
    address = f"{'a' * long}@{'b' * far}"
    if long <= 64 and long + 1 + far <= 254:
        Outbound(None, address, address, b"\r\n")
        return
    with pytest.raises(AddressRefused):
        Outbound(None, address, "x@them", b"\r\n")


@LAW
@given(st.lists(st.sampled_from([b"\r\n", b".", b"a", b"\0", b"\r\n.\r\n", b"a" * 40])).map(b"".join), st.booleans())
def test_a_body_is_searched_to_its_end_with_and_without_the_c_library(data: bytes, with_it: bool) -> None:
    """A NUL ends a text of C, and no body."""
    with pytest.MonkeyPatch.context() as patch:
        if not with_it:
            patch.setattr(lines, "_STRSTR", None)
        assert ends_early(data) is (b"\r\n.\r\n" in b"\r\n" + data)
        assert stuffed(data) == (b"\r\n" + data).replace(b"\r\n.", b"\r\n..")[2:]


@LAW
@given(st.lists(st.sampled_from([b"\r\n", b".", b"a"])).map(lambda parts: b"".join(parts) + b"\r\n"), st.booleans())
def test_no_body_ends_the_data_before_its_end_whoever_vouches_for_it(data: bytes, proven: bool) -> None:
    """Law 3: `proven` is the composer's word for line ends, octets and dots; what would end the data is looked for all
    the same."""
    dialogue = Dialogue("us.example", Tls.NEVER)
    for said in (b"220 mx\r\n", b"250-mx\r\n250 PIPELINING\r\n"):
        dialogue.receive(said)
        dialogue.outgoing()
    dialogue.deliver(Outbound(None, "", "x@them", data, proven=proven))
    dialogue.outgoing()
    dialogue.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    sent = b"".join(dialogue.outgoing())
    is_dotted = data.startswith(b".") or b"\n." in data
    assert sent == (data if proven and not ends_early(data) else stuffed(data)) + b".\r\n"
    assert b"\r\n.\r\n" not in b"\r\n" + sent[:-3]
    assert is_dotted or stuffed(data) is data


@LAW
@given(st.lists(st.text(max_size=600), min_size=1, max_size=4))
def test_a_command_is_one_line(lines: list[str]) -> None:
    """Law 3: the one place that writes commands writes as many lines as it was given, or raises."""
    try:
        data = commands(*lines)
    except LocalError:
        return
    written = data.split(b"\r\n")
    assert written.pop() == b""
    assert len(written) == len(lines)
    assert all(len(line) <= 510 and b"\r" not in line and b"\n" not in line for line in written)


SMUGGLING = [
    b"\n.\n",
    b"\r.\r",
    b"\r.\n",
    b"\n.\r",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
]


@LAW
@given(st.lists(st.one_of(st.sampled_from([*SMUGGLING, b"\r\n.\r\n", b".", b"a", b"\r\n"]), st.binary(max_size=5))))
def test_no_body_ends_before_its_end(parts: list[bytes]) -> None:
    """Law 3, SMTP smuggling: a body with bare CR or LF cannot be built; any other reads back byte for byte."""
    data = b"".join(parts) + b"\r\n"
    bare = data.replace(b"\r\n", b"")
    try:
        Outbound(None, "", "x@them", data)
    except UnsafeData:
        assert b"\r" in bare or b"\n" in bare
        return
    assert b"\r" not in bare
    assert b"\n" not in bare
    sent = stuffed(data) + b".\r\n"
    read = []
    for number, line in enumerate(sent.split(b"\r\n")):
        if line == b".":
            assert number == data.count(b"\r\n"), "the lone dot is the last line"
            break
        read.append(line.removeprefix(b"."))
    assert b"\r\n".join(read) + b"\r\n" == data


class Server:
    """A strict server that decides by address: what it hears is what it knows, and every body is kept."""

    def __init__(self, pipelining: bool, verdicts: Callable[[str], tuple[int, int, int]]) -> None:
        self._hello = b"250-mx\r\n250 PIPELINING\r\n" if pipelining else b"250 mx\r\n"
        self._verdicts = verdicts
        self._buffer = b""
        self._in_data = False
        self._body = b""
        self._sender: str | None = None
        self._recipients: list[str] = []
        self.mailbox: list[tuple[str, bytes]] = []
        self.nested = 0

    def hear(self, data: bytes) -> bytes:
        self._buffer += data
        said = b""
        while b"\r\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            said += self._line(line)
        return said

    def _line(self, line: bytes) -> bytes:
        if self._in_data:
            if line != b".":
                self._body += line.removeprefix(b".") + b"\r\n"
                return b""
            recipients, body = self._recipients, self._body
            self._in_data, self._body, self._sender, self._recipients = False, b"", None, []
            if not recipients:
                return b"554 no valid recipients\r\n"
            code = self._verdicts(recipients[0])[2]
            if code < 300:
                self.mailbox.append((recipients[0], body))
            return b"%d at the dot\r\n" % code
        word, _, rest = line.decode().partition(":")
        if word.startswith("EHLO"):
            return self._hello
        if word == "MAIL FROM":
            if self._sender is not None:
                self.nested += 1
                return b"503 nested MAIL\r\n"
            address = rest[1 : rest.index(">")]
            code = self._verdicts(address.replace("a", "x").replace("us", "them"))[0]
            self._sender = address if code < 300 else None
            return b"%d sender\r\n" % code
        if word == "RCPT TO":
            if self._sender is None:
                return b"503 need MAIL\r\n"
            code = self._verdicts(rest[1:-1])[1]
            if code < 300:
                self._recipients.append(rest[1:-1])
            return b"%d recipient\r\n" % code
        if word == "DATA":
            if self._sender is None or (not self._recipients and self._verdicts("strict")[0] < 300):
                return b"503 need RCPT\r\n"
            self._in_data = True
            return b"354 go\r\n"
        if word == "RSET":
            self._sender, self._recipients = None, []
            return b"250 reset\r\n"
        return b"221 bye\r\n"


CODES = st.tuples(
    st.sampled_from([250, 250, 250, 451, 550]),
    st.sampled_from([250, 250, 250, 252, 450, 550, 553]),
    st.sampled_from([250, 250, 250, 452, 554]),
)


@LAW
@given(st.lists(CODES, min_size=1, max_size=12), st.booleans())
def test_pipelined_and_lockstep_are_each_others_oracle(codes: list[tuple[int, int, int]], strict: bool) -> None:
    """The same messages to the same server: same fates, same mailbox, and never a MAIL inside a transaction."""
    table = {f"x{number}@them": code for number, code in enumerate(codes)}
    table["strict"] = (250, 0, 0) if strict else (550, 0, 0)
    results = []
    for pipelining in (True, False):
        server = Server(pipelining, table.__getitem__)
        dialogue = Dialogue("us.example", Tls.NEVER)
        events = dialogue.receive(b"220 mx\r\n")
        waiting = [
            Outbound(number, f"a{number}@us", f"x{number}@them", b"N: %d\r\n\r\n.dot\r\n" % number)
            for number in range(len(codes))
        ]
        while not dialogue.closed:
            while waiting and dialogue.wants:
                events += dialogue.deliver(waiting.pop(0))
            if not waiting:
                events += dialogue.quit()
            said = b"".join(dialogue.outgoing())
            assert said, "nobody waits for anybody"
            events += dialogue.receive(server.hear(said))
        fates = {
            event.message.key: (event.verdict.fate, event.verdict.step)
            for event in events
            if isinstance(event, Settled)
        }
        assert server.nested == 0
        results.append((fates, server.mailbox))
    assert results[0] == results[1]
    fates, mailbox = results[0]
    assert [fate for fate, _ in fates.values()].count(Fate.DELIVERED) == len(mailbox)
    assert all(body.endswith(b"\r\n\r\n.dot\r\n") for _, body in mailbox)
