"""Every row of faults.md 3.1: a real worker against the scripted sink, one world for most rows, one test a row.

The worlds are played once (`_main_world`, `_strict_world`); the tests read what came of it: the ledger's story of each
person, the sink's record, the worker's log. Deadlines are those of RFC 5321 times `HURRY`, so 600 s after the dot are
4.8 s here. Everywhere: nobody lost, no command out of place, as many copies as the row says, the worker alive.

Rows that the golden dialogues prove byte by byte as well: goodbye_*.txt (421 at each step, for all of a flight, idle),
lost_*.txt and timeout_after_dot.txt (loss before, behind and in the middle of a reply), mail_refused_and_closed.txt,
reply_*.txt (desync), starttls_*.txt (injection, 454, failed), lone_dot.txt, hello_*.txt, international*.txt,
too_large.txt, reset_*.txt, stale_connection*.txt, bare_line_feeds.txt, nonsense.txt, codes_unknown.txt.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from policy.instants import rfc3339
from policy.ledger import JobStatus
from policy.stories import Story
from tests.chaos.proxy import FaultProxy
from tests.chaos.sink_process import SinkProcess, sink_process
from tests.chaos.sink_record import Entry, Line
from tests.world.mail import MailWorld, job, mail_world
from tests.world.servers import short_folder

HURRY = 0.008  # of every deadline of RFC 5321: 4.8 s for the dot, 2.4 s for MAIL and RCPT, 1 s for DATA
BIG = 6_000_000  # bytes of attachment: more than the kernel's buffers between the two take (tcp_wmem: 4 MiB)


@dataclass(frozen=True)
class Row:
    """One kind of fault. port, domain: its script; people: by local part (kind at the end, copies the sink kept).

    faults: the script's words that must have been played at least so often; job: which of the jobs it is in.
    """

    name: str
    people: Mapping[str, tuple[str, int]]
    port: str = ""
    domain: str = ""
    faults: int = 1
    job: str = "rows"
    reason: str = ""

    def addresses(self) -> list[str]:
        return [f"{local}@a.{self.name}.test" for local in self.people]


def all_of(kind: str, copies: int, count: int = 4) -> dict[str, tuple[str, int]]:
    return {f"p{number}": (kind, copies) for number in range(count)}


WELL = ("delivered", 1)
NO = ("bounced", 0)
DOUBT = ("unknown", 1)
TIGHT = "rcvbuf.4096"
ROWS = [
    # -- the connection is lost
    Row("dataclose", all_of(*WELL), domain="data.close+first.1", faults=4),
    Row("dotclose", all_of("unknown", 0), domain="dot.close", faults=4, reason="network"),
    Row("dotkept", all_of(*DOUBT), domain="dot.close.stored", faults=4, reason="network"),
    Row("cut", all_of(*DOUBT), domain="dot.cut.2", faults=4, reason="network"),
    Row("full", all_of(*WELL), domain="dot.full.rst", faults=4),
    Row("split", all_of(*WELL), domain="dot.split", faults=4),
    Row("late", all_of(*WELL), domain="dot.late.1500ms", faults=4),
    Row("toolate", all_of(*DOUBT), domain="dot.late.8", faults=4, reason="network"),
    Row("halfopen", all_of(*WELL, count=12), domain="data.hold+first.1", faults=12),
    # -- 421 wherever it can be said
    Row("byegreet", all_of(*WELL), port="greet.421+first.3", faults=3),
    Row("byeehlo", all_of(*WELL), port="ehlo.421+first.3", faults=3),
    Row("byemail", all_of(*WELL), domain="mail.421+first.1", faults=4),
    Row("byercpt", all_of(*WELL), domain="rcpt.421+first.1", faults=4),
    Row("byedata", all_of(*WELL), domain="data.421+first.1", faults=4),
    Row("byedot", all_of(*WELL), domain="dot.421+first.1", faults=4),
    Row("byereset", all_of(*WELL, count=8), port="rset.421+first.2", domain="rcpt.450+first.1", faults=9),
    Row("byeidle", all_of(*WELL), port="idle.421", faults=1),
    # -- refused for good, and hung up on
    Row("mailclose", all_of(*NO), domain="mail.550.close", faults=4, reason="spam-block"),
    Row("rcptclose", all_of(*NO), domain="rcpt.550.close", faults=4, reason="user-unknown"),
    # -- out of step
    Row(
        "desync",
        {
            "p0+dot.twice+first.1": WELL,
            "p1+dot.extra+first.1": WELL,
            "p2+rcpt.early+first.1": WELL,
            "p3+mail.twice+first.1": WELL,
            "p4+data.early+first.1": WELL,
            "p5+rcpt.550": NO,
            **{f"n{number}": WELL for number in range(12)},
        },
        faults=4,  # one may spoil the first try of the next before its own turn comes
    ),
    Row("greetearly", all_of(*WELL), port="greet.early+first.2", faults=2),
    Row("ehlotwice", all_of(*WELL), port="ehlo.twice+first.2", faults=2),
    Row("chatty", all_of(*WELL), port="idle.250", faults=1),
    Row("inject", all_of(*WELL), port="tls.inject+first.2", faults=2),
    # -- too slow, too much
    Row("lorisgreet", all_of(*WELL), port="greet.drip.120ms+first.2", faults=2),
    Row("lorisehlo", all_of(*WELL), port="ehlo.drip.40ms+first.2", faults=2),
    Row("lorisdot", all_of(*DOUBT), domain="dot.drip.250ms", faults=4, reason="network"),
    Row("endless", all_of(*WELL), port="ehlo.endless+first.2", faults=2),
    Row("longline", all_of(*WELL), domain="rcpt.long.1000000+first.1", faults=4),
    Row("manylines", all_of(*WELL), domain="mail.lines.100000+first.1", faults=4),
    Row("dotendless", all_of(*DOUBT), domain="dot.endless", faults=4, reason="network"),
    # -- strange words
    Row(
        "odd",
        {
            "p0+rcpt.four+first.1": WELL,
            "p1+rcpt.letter+first.1": WELL,
            "p2+rcpt.c199+first.1": WELL,
            "p3+rcpt.c600+first.1": WELL,
            "p4+rcpt.binary+first.1": WELL,
            "p5+rcpt.lf": WELL,
            "p6+rcpt.empty": WELL,
            "p7+dot.lf": WELL,
            "p8+dot.empty": WELL,
            "p9+dot.codes": NO,
            "p10+rcpt.two": NO,
            "p11+dot.four": DOUBT,
        },
        faults=12,
    ),
    Row("words", {f"p{n}+rcpt.{word}": NO for n, word in enumerate(("nul", "ansi", "html", "latin"))}, faults=4),
    # -- yes and no, by person
    Row("grey", all_of(*WELL), domain="greylist.200ms", faults=4),
    Row(
        "mixed",
        {
            "p0+rcpt.452+first.1": WELL,
            "p1+rcpt.451+first.1": WELL,
            "p2": WELL,
            "p3+rcpt.550": NO,
            "p4+rcpt.452+first.1": WELL,
            "p5": WELL,
        },
        faults=4,
    ),
    Row("dotno", all_of(*NO), domain="dot.550", faults=4, reason="content-rejected"),
    Row("dotlater", all_of(*WELL), domain="dot.451+first.1", faults=4),
    Row("lonedot", all_of(*NO), domain="rcpt.550+data.354", faults=8, reason="user-unknown"),
    Row("resets", {f"p{n}+rcpt.550" if n % 2 else f"p{n}": NO if n % 2 else WELL for n in range(12)}, faults=6),
    # -- what is not offered
    Row("helo", all_of(*WELL), port="ehlo.502", faults=1),
    Row("lockstep", all_of(*WELL), port="no.pipelining", faults=0),
    Row(
        "plain",
        {**all_of(*WELL), "dörte": NO},
        port="no.pipelining+no.size+no.8bitmime+no.smtputf8+no.enhancedstatuscodes",
        faults=0,
    ),
    Row("eai", {"dörte": WELL, "p1": WELL}, faults=0),
    Row("small", all_of(*NO), port="size.1000", faults=0, reason="message-too-large"),
    # -- TLS, where it may be
    Row("tlsexpired", all_of(*WELL), port="tls.expired"),
    Row("tlswrong", all_of(*WELL), port="tls.wrong"),
    Row("tlscipher", all_of(*WELL), port="tls.cipher"),
    Row("tlsold", all_of(*WELL), port="tls.old"),
    Row("tlsclose", all_of(*WELL), port="tls.close"),
    Row("tlsgarbage", all_of(*WELL), port="tls.garbage"),
    Row("tlslater", all_of(*WELL), port="starttls.454"),
    # -- limits a connection
    Row("most", all_of(*WELL, count=9), port="max.2"),
    Row("mostclose", all_of(*WELL, count=9), port="max.2.close"),
    # -- the way there
    Row("next", all_of(*WELL, count=6), port="v6", faults=0),
    Row("full2", all_of(*WELL, count=6), port="v6", faults=0),
    Row("dead", all_of("expired", 0), faults=0, job="dead"),
    Row("vanish", all_of(*WELL), faults=0),
    # -- bodies larger than all buffers
    Row(
        "bigclose",
        all_of(*WELL, count=2),
        port="rcvbuf.4096",
        domain="body.window.300ms.close+first.1",
        job="big",
        faults=2,
    ),
    Row("bigstuck", all_of(*WELL, count=2), port=TIGHT, domain="body.window.60+first.1", job="big", faults=2),
    Row("bigbye", all_of(*WELL, count=2), port=TIGHT, domain="body.421+first.1", job="big", faults=2),
    Row("bigno", all_of(*NO, count=2), port=TIGHT, domain="body.550", job="big", faults=2),
    # -- in doubt, and the job wants one more
    Row("twokept", all_of("delivered", 2), domain="dot.close.stored+first.1", job="resend", faults=4),
    Row("twolost", all_of("delivered", 1), domain="dot.close+first.1", job="resend", faults=4),
    Row("twotwice", all_of("unknown", 2), domain="dot.close.stored", job="resend", faults=8),
]
BY_NAME = {row.name: row for row in ROWS}
AGAIN = ("byeidle", "chatty", "vanish")  # written to once more, after a rest
TLS_KINDS = ("expired", "wrong", "cipher", "old", "close", "garbage")


@dataclass
class Played:
    """What a world left behind."""

    entries: list[Entry]
    lines: list[Line]
    stories: dict[tuple[str, str], Story]  # (job id, address)
    statuses: dict[str, JobStatus]
    log: str
    exit: int
    permits: list[tuple[str, Any, float]]  # site, name, microseconds
    peak: int  # KiB of the worker's memory
    more: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.rcpt.endswith(f".{name}.test")]

    def told(self, name: str) -> dict[str, Story]:
        """The stories of a row's people by local part."""
        row = BY_NAME[name]
        return {local: self.stories[row.job, f"{local}@a.{name}.test"] for local in row.people}

    def copies(self, address: str, job_id: str) -> list[Entry]:
        number = self.statuses[job_id].number
        return [entry for entry in self.entries if entry.rcpt == address and entry.job == number and entry.stored]

    def faults(self, name: str) -> list[Line]:
        return [line for line in self.lines if line.k == "fault" and (line.port == name or f".{name}." in line.rcpt)]


@pytest.fixture(scope="module")
def played() -> Played:
    return asyncio.run(_main_world())


@pytest.fixture(scope="module")
def strict() -> Played:
    return asyncio.run(_strict_world())


async def _main_world() -> Played:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        sink = await stack.enter_async_context(
            sink_process(
                folder,
                {row.name: row.port for row in ROWS},
                {f"*.{row.name}.test": row.domain for row in ROWS if row.domain},
            )
        )
        proxy = await stack.enter_async_context(FaultProxy(f"127.0.0.1:{sink.ports['vanish']}"))
        others = {**sink.ports, "vanish": proxy.port}
        # the first address of these two does not answer; the second is where the sink is
        stack.enter_context(_never_accepts(sink.ports["full2"]))
        mail = await stack.enter_async_context(mail_world(others=others, tls="opportunistic"))
        _configure(mail, sink, HURRY, named=("next", "full2"), closed=("dead",))
        worker = await mail.start_worker()
        for name in ("rows", "resend", "big", "dead"):
            await mail.submit(_job(mail, name), _people([row for row in ROWS if row.job == name]))
        statuses = {name: await mail.finished(name, 50) for name in ("rows", "resend", "big", "dead")}
        more = {"rested": len(sink.lines())}
        await _until_played(sink, ("byeidle", "chatty"))
        proxy.up.swallow = proxy.down.swallow = True  # who is there does not hear and is not heard any more
        before = proxy.accepted
        await mail.submit(job("again"), _people([BY_NAME[name] for name in AGAIN]))
        async with asyncio.timeout(20):
            while proxy.accepted == before:  # the worker gives up on its connections and dials again
                await asyncio.sleep(0.02)
        proxy.up.swallow = proxy.down.swallow = False
        statuses["again"] = await mail.finished("again", 40)
        return await _gather(mail, sink, worker, statuses, more)


async def _strict_world() -> Played:
    """TLS required; a tarpit among healthy sites; a sink that is killed between storing and answering."""
    tls = {f"tls{kind}": f"tls.{kind}" for kind in TLS_KINDS}
    healthy = {f"healthy{number}": "" for number in range(5)}
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        mortal = folder / "mortal"
        mortal.mkdir()
        sink = await stack.enter_async_context(
            sink_process(
                folder,
                {**tls, "tlslater": "starttls.454+tls.good", "tlsnone": "", **dict.fromkeys(healthy, "tls.good")},
            )
        )
        slow = folder / "slow"
        slow.mkdir()
        tarpit = await stack.enter_async_context(sink_process(slow, {"tarpit": "tls.good+tarpit.2"}))
        dying = await stack.enter_async_context(sink_process(mortal, {"mortal": "tls.good"}))
        others = {**sink.ports, **tarpit.ports, **dying.ports}
        mail = await stack.enter_async_context(mail_world(others=others, tls="required"))
        _configure(mail, sink, 0.02)
        worker = await mail.start_worker()
        people = [f"p{n}@a.{name}.test" for name in (*tls, "tlslater", "tlsnone") for n in range(2)]
        deadline = rfc3339(mail.policy.clock() + 15_000_000)
        await mail.submit(job("strict", expires_at=deadline), _rows(people))
        mortals = ["p0@a.mortal.test", "p1+dot.die@a.mortal.test", *(f"p{n}@a.mortal.test" for n in range(2, 6))]
        await mail.submit(job("mortal"), _rows(mortals))
        await mail.submit(job("tarpit"), _rows([f"p{n}@a.tarpit.test" for n in range(8)]))
        await mail.submit(job("healthy"), _rows([f"p{n}@a.{name}.test" for n in range(40) for name in healthy]))
        statuses = {"healthy": await mail.finished("healthy", 40)}
        more = {"tarpit": tarpit.entries(), "tarpit_live": (await tarpit.counts())["tarpit"]["live"]}
        assert await dying.wait() == -9
        await dying.start()
        statuses["mortal"] = await mail.finished("mortal", 40)
        statuses["strict"] = await mail.finished("strict", 40)
        await mail.policy.ask.job_state("tarpit", "cancelled", "test")
        statuses["tarpit"] = await mail.finished("tarpit", 60)
        more |= {"mortal": dying.entries(), "mortals": mortals}
        return await _gather(mail, sink, worker, statuses, more)


def _configure(
    mail: MailWorld, sink: SinkProcess, hurry: float, named: Sequence[str] = (), closed: Sequence[str] = ()
) -> None:
    """named: routes by the name localhost, which is 127.0.0.1 and ::1; closed: the same, where nobody listens."""
    config = mail.config.read_text().replace("min_free_bytes = 0", f"min_free_bytes = 0\npatience = {hurry}")
    for name in named:
        config = config.replace(f'"*.{name}.test" = "127.0.0.1:', f'"*.{name}.test" = "localhost:')
    for name in closed:
        config = config.replace(f'"*.{name}.test" = "127.0.0.1:{sink.ports[name]}"', f'"*.{name}.test" = "localhost:1"')
    mail.config.write_text(config)


def _job(mail: MailWorld, name: str) -> dict[str, Any]:
    if name == "resend":
        return job(name, in_doubt="resend")
    if name == "dead":
        return job(name, expires_at=rfc3339(mail.policy.clock() + 12_000_000))
    if name == "big":
        content = base64.b64encode(os.urandom(BIG)).decode()
        file = {"filename": "x.bin", "content_type": "application/octet-stream", "content": content}
        return job(name, attachments=[file])
    return job(name)


def _rows(addresses: Sequence[str]) -> list[dict[str, Any]]:
    return [{"address": address, "fields": {"name": f"Person {n}"}} for n, address in enumerate(addresses)]


def _people(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return _rows([address for row in rows for address in row.addresses()])


@contextmanager
def _never_accepts(port: int) -> Iterator[None]:
    """127.0.0.1:port with a full backlog: a dial there meets silence (the kernel drops SYN)."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield


async def _until_played(sink: SinkProcess, names: Sequence[str]) -> None:
    """Until each of these ports has said something to a connection that rested."""
    async with asyncio.timeout(20):
        while True:
            counts = await sink.counts()
            if all(counts[name]["faults"] for name in names):
                return
            await asyncio.sleep(0.05)


async def _gather(
    mail: MailWorld,
    sink: SinkProcess,
    worker: asyncio.subprocess.Process,
    statuses: dict[str, JobStatus],
    more: dict[str, Any],
) -> Played:
    assert worker.returncode is None, f"the worker ended: {mail.log()}"
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{worker.pid}/status").read_text())[1])  # type: ignore[index]  # a line of every Linux
    code = await mail.drain(worker)
    stories = {}
    addresses = {entry.rcpt for entry in sink.entries()} | {a for row in ROWS for a in row.addresses()}
    addresses |= {entry.rcpt for name in ("tarpit", "mortal") for entry in more.get(name, [])}
    for address in addresses:
        for story in mail.policy.reader.why(address, mail.policy.keyring).stories:
            stories[story.job_id, address] = story
    permits = []
    for key in await mail.policy.redis.keys("sp:{s:*}:c"):
        permits += [(str(key), *held) for held in await mail.policy.redis.zrange(key, 0, -1, withscores=True)]
    log = "".join(path.read_text() for path in sorted(mail.folder.glob("worker-*.log")))
    return Played(sink.entries(), sink.lines(), stories, statuses, log, code, permits, peak, more)


# -- every row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_everybody_ends_as_the_row_says(played: Played, row: Row) -> None:
    ended = {local: story.kind for local, story in played.told(row.name).items()}
    copies = {local: len(played.copies(f"{local}@a.{row.name}.test", row.job)) for local in row.people}

    assert {local: (ended[local], copies[local]) for local in row.people} == dict(row.people)
    assert len(played.faults(row.name)) >= row.faults, "the fault was not played"
    if row.reason:
        assert {story.reason for story in played.told(row.name).values()} == {row.reason}


def test_nobody_is_lost_and_everybody_counted_once(played: Played) -> None:
    for name, status in played.statuses.items():
        submitted = sum(len(row.people) for row in ROWS if row.job == name)
        if name == "again":
            submitted = sum(len(BY_NAME[row].people) for row in AGAIN)
        assert status.terminal == status.rows_submitted == submitted, name
    wanted = Counter(kind for row in ROWS if row.job == "rows" for kind, _ in row.people.values())
    told = played.statuses["rows"].counts
    assert {kind: told.get(kind, 0) for kind in wanted} == dict(wanted)


def test_no_command_was_out_of_place_and_no_line_end_bare(played: Played) -> None:
    assert [(line.port, line.word) for line in played.lines if line.k == "bad"] == []
    assert all(entry.bare == 0 for entry in played.entries)


def test_what_arrived_for_someone_is_theirs_and_the_same_each_time(played: Played) -> None:
    who: dict[tuple[int, int], set[str]] = defaultdict(set)
    what: dict[tuple[int, int], set[tuple[str, str]]] = defaultdict(set)
    for entry in played.entries:
        who[entry.job, entry.mref].add(entry.rcpt)
        if entry.t_dot is not None:
            what[entry.job, entry.mref].add((entry.message_id, entry.sha))
    assert all(len(rcpts) == 1 for rcpts in who.values()), "a return path is of one person"
    assert all(len(messages) == 1 for messages in what.values()), "Message-ID and bytes are the same on every attempt"


def test_the_worker_lived_ended_well_and_left_no_permit(played: Played) -> None:
    assert played.exit == 0
    assert "Traceback" not in played.log
    assert played.permits == []
    assert played.peak < 400_000, "endless replies must not be kept (KiB)"


def test_nobody_is_dialled_in_a_loop(played: Played) -> None:
    dialled = Counter(line.port for line in played.lines if line.k == "open")
    assert {row.name: dialled[row.name] for row in ROWS if dialled[row.name] > 8 + 2 * len(row.people)} == {}


# -- what single rows say besides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dataclose", "halfopen", "byemail", "byercpt", "byedata", "byedot", "bigclose", "bigstuck"]
)
def test_a_failure_before_the_end_is_tried_again_and_not_in_doubt(played: Played, name: str) -> None:
    for story in played.told(name).values():
        assert {step.kind for step in story.history} == {"deferred"}
        assert story.attempts == len(story.history) + 1


@pytest.mark.parametrize(
    "name", ["byegreet", "byeehlo", "greetearly", "ehlotwice", "lorisgreet", "lorisehlo", "endless"]
)
def test_who_was_not_asked_about_has_no_attempt(played: Played, name: str) -> None:
    assert {(story.attempts, len(story.history)) for story in played.told(name).values()} == {(1, 0)}


@pytest.mark.parametrize("name", ["most", "mostclose", "byeidle", "byereset"])
def test_a_limit_of_the_connection_is_nobodys_attempt(played: Played, name: str) -> None:
    expected = 2 if name == "byereset" else 1  # there everybody has a 450 of his own

    assert {story.attempts for story in played.told(name).values()} == {expected}
    if name.startswith("most"):
        each = Counter(entry.connection for entry in played.of(name) if entry.stored)
        assert max(each.values()) <= 2


def test_421_says_who_asked_to_come_later(played: Played) -> None:
    for name in ("byemail", "byercpt", "byedata", "byedot"):
        for story in played.told(name).values():
            assert 421 in [step.code for step in story.history if step.kind == "deferred"]


def test_a_refusal_before_a_hang_up_is_the_verdict(played: Played) -> None:
    for name in ("mailclose", "rcptclose"):
        for story in played.told(name).values():
            assert (story.code, story.attempts) == (550, 1)
    assert {story.enhanced for story in played.told("mailclose").values()} == {"5.7.1"}
    assert {story.enhanced for story in played.told("rcptclose").values()} == {"5.1.1"}


def test_a_late_reply_is_waited_for_as_long_as_the_deadline(played: Played) -> None:
    for entry in played.of("late"):
        assert entry.t_dot is not None
        assert entry.t_reply_written is not None
        assert entry.t_reply_written - entry.t_dot >= 1.4
    closed = {line.c: line.t for line in played.lines if line.k == "close"}
    for name in ("toolate", "lorisdot"):
        for entry in played.of(name):
            assert entry.t_dot is not None
            assert closed[entry.connection] - entry.t_dot >= 600 * HURRY - 0.05, "not given up before the deadline"


def test_a_connection_out_of_step_carries_no_further_body(played: Played) -> None:
    """After the reply too many the next message may have its RCPT out, but never its body: it came by another way."""
    for line in played.faults("desync"):
        if line.word.startswith(("dot.twice", "dot.extra", "rcpt.early", "mail.twice", "data.early")):
            later = [e for e in played.entries if e.connection == line.c and e.transaction > line.n and e.t_dot]
            assert later == []


@pytest.mark.parametrize("name", ["longline", "manylines", "dotendless"])
def test_a_reply_without_end_is_cut_off_at_the_cap(played: Played, name: str) -> None:
    for story in played.told(name).values():
        said = story.reply if name == "dotendless" else story.history[0].reply
        assert said == "overflow", "cut off at the cap, not at the deadline"


def test_nothing_is_said_behind_an_injection(played: Played) -> None:
    injected = {line.c for line in played.faults("inject") if line.word == "inject"}

    assert len(injected) == 2
    assert not [entry for entry in played.of("inject") if entry.connection in injected]


def test_strange_words_are_kept_as_harmless_text(played: Played) -> None:
    told = played.told("words")
    replies = {local.partition(".")[2]: story.reply for local, story in told.items()}

    assert all(reply.isprintable() for reply in replies.values())
    assert "<script>alert(1)</script>" in replies["html"], "text stays text; whoever shows it escapes it"
    assert replies["nul"] == "no\N{REPLACEMENT CHARACTER}thing\N{REPLACEMENT CHARACTER}"
    assert replies["ansi"].startswith("\N{REPLACEMENT CHARACTER}[2J")
    assert replies["latin"].startswith("Gr\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}e")
    assert {story.enhanced for story in told.values()} == {"5.7.1"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", played.log), "no log line was forged or coloured"
    assert "<script>" not in played.log


def test_odd_codes_count_by_their_last_line_and_two_numbers_are_no_enhanced_code(played: Played) -> None:
    told = played.told("odd")

    assert (told["p9+dot.codes"].code, told["p9+dot.codes"].reply) == (550, "one two three")
    assert (told["p10+rcpt.two"].code, told["p10+rcpt.two"].enhanced) == (550, "")
    assert told["p10+rcpt.two"].reply == "5.7 two numbers only"
    for local in ("p0+rcpt.four+first.1", "p1+rcpt.letter+first.1", "p2+rcpt.c199+first.1", "p3+rcpt.c600+first.1"):
        assert [step.reason for step in told[local].history if step.kind == "deferred"] == ["protocol"]


def test_mixed_answers_are_each_persons_own(played: Played) -> None:
    told = played.told("mixed")

    def codes(local: str) -> list[int]:
        return [*(step.code for step in told[local].history), told[local].code]

    assert codes("p0+rcpt.452+first.1") == codes("p4+rcpt.452+first.1") == [452, 250]
    assert codes("p1+rcpt.451+first.1") == [451, 250]
    assert codes("p2") == codes("p5") == [250]
    assert codes("p3+rcpt.550") == [550]


def test_a_refusal_at_the_dot_is_told_in_its_words(played: Played) -> None:
    for story in played.told("dotno").values():
        assert (story.code, story.enhanced, story.reply) == (550, "5.7.1", "Message content rejected")
    assert all(entry.rcpt_reply == "250" and entry.reply.startswith("550") for entry in played.of("dotno"))


def test_greylisted_comes_back_by_the_first_delay_of_the_schedule(played: Played) -> None:
    for story in played.told("grey").values():
        assert [(step.kind, step.code, step.reason) for step in story.history] == [("deferred", 450, "greylisted")]
        waited = (story.at - story.history[0].at) / 1e6
        assert waited >= 0.5 * 0.75, "never before its time"


def test_what_is_not_offered_is_not_used(played: Played) -> None:
    assert played.of("small") == [], "beyond SIZE nothing is said at all"
    assert {story.enhanced for story in played.told("small").values()} == {"5.3.4"}
    refused = played.told("plain")["dörte"]
    assert (refused.reason, refused.enhanced, refused.attempts) == ("needs-smtputf8", "5.6.7", 1)
    assert not [entry for entry in played.of("plain") if not entry.rcpt.isascii()]


def test_tls_is_taken_as_it_is_and_clear_is_the_last_resort(played: Played) -> None:
    for name, version in (("tlsexpired", 3), ("tlswrong", 3), ("tlscipher", 0), ("tlsold", 0), ("tlsclose", 0)):
        assert {story.tls for story in played.told(name).values()} == {version}, name
    for name in ("tlsgarbage", "tlslater"):
        assert {story.tls for story in played.told(name).values()} == {0}, name


def test_the_next_address_is_dialled_and_nobody_has_an_attempt_for_it(played: Played) -> None:
    for name in ("next", "full2"):
        assert {(story.attempts, len(story.history)) for story in played.told(name).values()} == {(1, 0)}, name


def test_where_nobody_answers_each_address_says_why(played: Played) -> None:
    for story in played.told("dead").values():
        assert story.reason == "network"
        assert [part.partition(" [")[0] for part in story.reply.split("; ")] == ["localhost", "localhost"]
        assert "[127.0.0.1]: connect: unreachable" in story.reply
        assert "[::1]: connect: unreachable" in story.reply
    assert "a site is left alone" in played.log


def test_a_peer_that_vanished_is_noticed_and_written_to_on_another_connection(played: Played) -> None:
    for name in AGAIN:
        for local in BY_NAME[name].people:
            address = f"{local}@a.{name}.test"
            assert played.stories["again", address].kind == "delivered"
            assert len(played.copies(address, "again")) == 1


# -- TLS required, a tarpit, a death -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*TLS_KINDS, "later", "none"])
def test_where_tls_is_required_nothing_is_said_in_clear(strict: Played, kind: str) -> None:
    entries = strict.of(f"tls{kind}")
    if kind in ("expired", "wrong"):  # required is not verified: RFC 7435
        assert [entry.stored for entry in entries] == [True, True]
        assert {strict.stories["strict", entry.rcpt].tls for entry in entries} == {3}
    else:
        assert entries == []


def test_who_cannot_be_reached_with_tls_waits_until_the_job_ends(strict: Played) -> None:
    assert strict.statuses["strict"].counts["delivered"] == 4
    assert strict.statuses["strict"].counts["expired"] == 12


def test_a_tarpit_holds_up_nobody_else(strict: Played) -> None:
    """200 people of five healthy sites had their mail before the tarpit had answered anybody's dot."""
    assert strict.statuses["healthy"].counts == {"delivered": 200}
    assert strict.more["tarpit_live"] > 0
    assert [entry for entry in strict.more["tarpit"] if entry.t_reply_written is not None] == []


def test_a_sink_killed_between_storing_and_answering_leaves_one_in_doubt(strict: Played) -> None:
    entries = strict.more["mortal"]
    copies = Counter(entry.rcpt for entry in entries if entry.stored)
    ended = {address: strict.stories["mortal", address].kind for address in strict.more["mortals"]}

    assert ended.pop("p1+dot.die@a.mortal.test") == "unknown"
    assert set(ended.values()) <= {"delivered", "unknown"}
    assert set(copies.values()) == {1}
    assert {entry.run for entry in entries} == {0, 1}
    for address, kind in ended.items():
        assert kind == "delivered" or copies[address] <= 1


def test_the_strict_worker_lived_and_ended_well(strict: Played) -> None:
    assert strict.exit == 0
    assert "Traceback" not in strict.log
    assert strict.permits == []
    assert [(line.port, line.word) for line in strict.lines if line.k == "bad"] == []
