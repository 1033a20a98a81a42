"""The connection on real sockets: golden dialogues once more, deadlines, TLS, large bodies, owners that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from engine.delivery.connection import Closed, Connection, Outbound, Target, Terms, Verdict
from engine.smtp.words import Fate, Settled, Step, Tls, Trouble
from tests.world import dialogue_player
from tests.world.dialogue_player import DATA, Golden, describe, unescape

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HELLO = Terms("us.example", Tls.NEVER)


class Desk:
    """An owner that offers its messages in order and quits when none is left."""

    def __init__(self, *messages: Outbound, quits: bool = True) -> None:
        self.queue = deque(messages)
        self.quits = quits
        self.verdicts: list[tuple[Outbound, Verdict]] = []
        self.intents: list[Outbound] = []
        self.voids: list[Outbound] = []
        self.idles = 0
        self.closed: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()
        self.settled = asyncio.Event()
        self.idle = asyncio.Event()

    def next_message(self, connection: Connection) -> Outbound | None:
        return self.queue.popleft() if self.queue else None

    def on_intent(self, connection: Connection, messages: list[Outbound]) -> None:
        self.intents += messages

    def on_verdict(self, connection: Connection, message: Outbound, verdict: Verdict) -> None:
        self.verdicts.append((message, verdict))
        self.settled.set()

    def on_void(self, connection: Connection, message: Outbound) -> None:
        self.voids.append(message)

    def on_idle(self, connection: Connection) -> None:
        self.idles += 1
        self.idle.set()
        if self.quits and not self.queue:
            connection.quit()

    def on_closed(self, connection: Connection, closed: Closed) -> None:
        self.closed.set_result(closed)

    @property
    def fates(self) -> list[Fate]:
        return [verdict.fate for _, verdict in self.verdicts]


@contextlib.asynccontextmanager
async def serving(talk: Talk, **options: object) -> AsyncIterator[Target]:
    """A server on a free loopback port; errors in `talk` come out, connections are closed at the end."""
    failures: list[BaseException] = []
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client under test hung up
        except asyncio.CancelledError:
            return
        except BaseException as error:
            failures.append(error)
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, **options)  # type: ignore[arg-type]  # ssl, limit
    try:
        yield Target("localhost", "127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await server.wait_closed()
    assert failures == []


async def connect(target: Target, desk: Desk, terms: Terms = HELLO) -> Connection:
    connection = await Connection.open(target, desk, terms)
    assert isinstance(connection, Connection), connection
    return connection


async def talk_to_end(target: Target, desk: Desk, terms: Terms = HELLO) -> Closed:
    connection = await connect(target, desk, terms)
    connection.wake()
    closed = await desk.closed
    await connection.wait_closed()
    return closed


def letter(number: int = 0, data: bytes = DATA, **options: float) -> Outbound:
    return Outbound(number, "a@us", f"x{number}@them", data, **options)  # type: ignore[arg-type]  # void_at


def patient(**seconds: float) -> Terms:
    return Terms("us.example", Tls.NEVER, patience={Step[name]: value for name, value in seconds.items()})


async def say(writer: asyncio.StreamWriter, *lines: str) -> None:
    writer.write("".join(f"{line}\r\n" for line in lines).encode())
    await writer.drain()


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *extensions: str) -> None:
    await say(writer, "220 mx")
    assert await reader.readline() == b"EHLO us.example\r\n"
    offered = ["mx", *extensions]
    await say(writer, *(f"250-{name}" for name in offered[:-1]), f"250 {offered[-1]}")


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bodies: list[bytes]) -> None:
    """Take every message until QUIT."""
    while line := await reader.readline():
        word = line[:4]
        if word == b"DATA":
            await say(writer, "354 go")
            bodies.append(await reader.readuntil(b"\r\n.\r\n"))
        await say(writer, "221 bye" if word == b"QUIT" else "250 ok")
        if word == b"QUIT":
            return


GOLDEN = [golden for golden in map(dialogue_player.read, dialogue_player.names()) if golden.on_sockets]


@pytest.mark.parametrize("golden", GOLDEN, ids=[golden.name for golden in GOLDEN])
async def test_golden_dialogues_on_a_socket(golden: Golden) -> None:
    """The same files as in test_dialogue, served by a socket that says what the file says."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for what, text, number in golden.moves:
            if what == "C:":
                if text == "(body)":
                    await reader.readuntil(b"\r\n.\r\n")
                else:
                    assert await reader.readline() == text.encode() + b"\r\n", number
            elif what == "--":
                if text == "eof":
                    return
            else:
                writer.write(text.encode() + b"\r\n" if what == "S:" else unescape(text))
                await writer.drain()
        assert await reader.read() == b"", "the client says no more"

    async with serving(talk) as target:
        desk = Desk(*golden.messages, quits=("--", "quit") in [move[:2] for move in golden.moves])
        connection = await Connection.open(target, desk, HELLO)
        if isinstance(connection, Closed):
            assert golden.expected == [describe(connection)]
            return
        connection.wake()
        closed = await desk.closed
        told = [Settled(message, verdict) for message, verdict in desk.verdicts]
        assert [*map(describe, told), describe(closed)] == golden.expected


async def test_many_messages_one_connection_and_one_write_each() -> None:
    bodies: list[bytes] = []
    together = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal together
        await greet(reader, writer, "PIPELINING")
        buffer = b""
        while chunk := await reader.read(65536):
            buffer += chunk
            together += b".\r\nMAIL FROM" in chunk
            replies = []
            while b"\r\n" in buffer:
                if buffer.startswith((b"MAIL", b"RCPT", b"DATA", b"QUIT")):
                    line, _, buffer = buffer.partition(b"\r\n")
                    replies.append({b"DATA": "354 go", b"QUIT": "221 bye"}.get(line[:4], "250 ok"))
                elif b"\r\n.\r\n" in buffer:
                    body, _, buffer = buffer.partition(b"\r\n.\r\n")
                    bodies.append(body + b"\r\n")
                    replies.append("250 taken")
                else:
                    break
            await say(writer, *replies)

    async with serving(talk) as target:
        desk = Desk(*(letter(number, b"Number: %d\r\n\r\nhello\r\n" % number) for number in range(200)))
        closed = await talk_to_end(target, desk)
    assert closed.trouble is Trouble.LEFT
    assert desk.fates == [Fate.DELIVERED] * 200
    assert [message.key for message, _ in desk.verdicts] == list(range(200))
    assert [message.key for message in desk.intents] == list(range(200))
    assert bodies == [b"Number: %d\r\n\r\nhello\r\n" % number for number in range(200)]
    assert together > 150, "body n and the commands of n+1 leave together"


async def test_the_limit_of_messages_ends_in_quit() -> None:
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await accept(reader, writer, bodies)

    async with serving(talk) as target:
        desk = Desk(*map(letter, range(5)), quits=False)
        closed = await talk_to_end(target, desk, Terms("us.example", Tls.NEVER, messages=3))
    assert closed.trouble is Trouble.LEFT
    assert len(bodies) == len(desk.verdicts) == 3
    assert len(desk.queue) == 2


async def test_rest_wake_and_quit() -> None:
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await accept(reader, writer, bodies)

    async with serving(talk) as target:
        desk = Desk(quits=False)
        connection = await connect(target, desk)
        assert connection.idle
        for number in range(3):
            desk.queue.append(letter(number))
            desk.idle.clear()
            connection.wake()
            await desk.idle.wait()
        assert connection.delivered == 3
        assert "delivered 3" in repr(connection)
        connection.quit()
        assert (await desk.closed).trouble is Trouble.LEFT
        connection.wake()
        connection.quit()
        connection.abort()
        await connection.wait_closed()
    assert len(bodies) == 3


# -- deadlines -------------------------------------------------------------------------------------------------------


async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drip(writer: asyncio.StreamWriter) -> None:
    """One byte at a time, for ever: reads succeed, replies never come (slow-loris)."""
    while True:
        writer.write(b"2")
        await writer.drain()
        await asyncio.sleep(0.02)  # the peer's own pace is what is tested


async def test_a_silent_greeting_times_out() -> None:
    async with serving(quiet) as target:
        closed = await Connection.open(target, Desk(), patient(GREETING=0.1))
    assert isinstance(closed, Closed)
    assert (closed.trouble, closed.step) == (Trouble.TIMEOUT, Step.GREETING)


async def test_a_dripping_greeting_times_out_for_the_deadline_is_the_replys() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await drip(writer)

    async with serving(talk) as target:
        started = asyncio.get_running_loop().time()
        closed = await Connection.open(target, Desk(), patient(GREETING=0.2))
        assert asyncio.get_running_loop().time() - started < 2.0
    assert isinstance(closed, Closed)
    assert (closed.trouble, closed.step) == (Trouble.TIMEOUT, Step.GREETING)


@pytest.mark.parametrize(
    ("step", "replies", "fate"),
    [
        (Step.MAIL, [], Fate.DEFERRED),
        (Step.RCPT, ["250 ok"], Fate.DEFERRED),
        (Step.DATA, ["250 ok", "250 ok"], Fate.DEFERRED),
        (Step.BODY, ["250 ok", "250 ok", "354 go"], Fate.UNKNOWN),
    ],
)
async def test_a_server_that_stalls(step: Step, replies: list[str], fate: Fate) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await reader.readuntil(b"DATA\r\n")
        if replies:
            await say(writer, *replies)
        await drip(writer)

    async with serving(talk) as target:
        desk = Desk(letter())
        closed = await talk_to_end(target, desk, patient(**{step.name: 0.15}))
    assert (closed.trouble, closed.step) == (Trouble.TIMEOUT, step)
    assert desk.fates == [fate]
    assert bool(desk.intents) is (step is Step.BODY)


async def test_patience_is_the_rfcs_where_nothing_is_said() -> None:
    """S-01: a stall shorter than the minimum is waited for. The last stall is longer than any other step's patience."""
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        for _ in range(2):
            await reader.readline()
            await say(writer, "250 ok")
        await reader.readline()
        await say(writer, "354 go")
        bodies.append(await reader.readuntil(b"\r\n.\r\n"))
        await asyncio.sleep(0.3)  # the server's stall
        await say(writer, "250 ok")
        await accept(reader, writer, bodies)

    async with serving(talk) as target:
        desk = Desk(letter())
        closed = await talk_to_end(target, desk, patient(GREETING=0.2, EHLO=0.2, MAIL=0.2, RCPT=0.2, DATA=0.2, BODY=5))
    assert closed.trouble is Trouble.LEFT
    assert desk.fates == [Fate.DELIVERED]


async def test_a_resting_connection_may_be_given_an_end() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await accept(reader, writer, [])

    async with serving(talk) as target:
        desk = Desk(quits=False)
        assert (await talk_to_end(target, desk, patient(IDLE=0.1))).trouble is Trouble.LEFT


# -- large bodies and stopped readers --------------------------------------------------------------------------------


async def test_a_peer_that_stops_reading_is_a_safe_retry() -> None:
    """faults 3.1, window 0 with a large body: the dot is still with us, so nothing is in doubt."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await reader.readuntil(b"DATA\r\n")
        await say(writer, "250 ok", "250 ok", "354 go")
        await asyncio.Event().wait()  # reads no more; the stream's own limit stops the socket

    async with serving(talk) as target:
        desk = Desk(letter(1, b"x" * 998 + b"\r\n" + (b"y" * 998 + b"\r\n") * 40_000))
        closed = await talk_to_end(target, desk, patient(BLOCK=0.3))
    assert closed.trouble is Trouble.TIMEOUT
    assert desk.fates == [Fate.DEFERRED]
    assert desk.intents == []


async def test_a_large_body_arrives_whole_and_its_intent_is_told_before_its_dot() -> None:
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await reader.readuntil(b"DATA\r\n")
        await say(writer, "250 ok", "250 ok", "354 go")
        bodies.append(await reader.readuntil(b"\r\n.\r\n"))
        assert len(desk.intents) == 1
        await say(writer, "250 ok")
        await accept(reader, writer, bodies)

    data = (b"y" * 998 + b"\r\n") * 10_000
    async with serving(talk, limit=2**25) as target:
        desk = Desk(letter(1, data))
        closed = await talk_to_end(target, desk)
    assert closed.trouble is Trouble.LEFT
    assert desk.fates == [Fate.DELIVERED]
    assert bodies == [data + b".\r\n"]


# -- Permits ---------------------------------------------------------------------------------------------------------


async def test_a_void_permit_leaves_no_byte() -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        heard.append(await reader.readline())
        await say(writer, "221 bye")

    async with serving(talk) as target:
        desk = Desk(letter(1, void_at=0.0))
        assert (await talk_to_end(target, desk)).trouble is Trouble.LEFT
    assert heard == [b"QUIT\r\n"]
    (verdict,) = [verdict for _, verdict in desk.verdicts]
    assert (verdict.fate, verdict.trouble, verdict.tried) == (Fate.DEFERRED, Trouble.VOID, False)


@pytest.mark.parametrize("answer", ["renew", "withdraw", "silence"])
async def test_a_permit_that_ages_between_mail_and_rcpt(answer: str) -> None:
    heard: list[bytes] = []
    aged = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        while line := await reader.readline():
            heard.append(line[:4])
            if line.startswith(b"MAIL"):
                await aged.wait()
            if line.startswith(b"DATA"):
                await say(writer, "354 go")
                await reader.readuntil(b"\r\n.\r\n")
            await say(writer, "250 ok")

    class Asked(Desk):
        def on_void(self, connection: Connection, message: Outbound) -> None:
            super().on_void(connection, message)
            if answer == "renew":
                connection.renew(message, float("inf"))
            elif answer == "withdraw":
                connection.withdraw(message)

    async with serving(talk) as target:
        loop = asyncio.get_running_loop()
        message = letter(1)
        desk = Asked(message)
        connection = await connect(target, desk, patient(PERMIT=0.2))
        message.void_at = loop.time() + 0.1  # from here on: opening may take longer than that
        connection.wake()
        loop.call_at(message.void_at + 0.02, aged.set)
        await desk.closed
        await connection.wait_closed()
    assert desk.voids == [message]
    assert (b"RCPT" in heard) is (answer == "renew")
    assert desk.fates == [Fate.DELIVERED if answer == "renew" else Fate.DEFERRED]


# -- owners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["next_message", "on_intent", "on_verdict", "on_idle"])
async def test_an_owner_that_raises_loses_the_connection_and_nothing_else(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await accept(reader, writer, bodies)

    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with serving(talk) as target:
        desk = Desk(letter(1), letter(2))
        original = getattr(desk, method)
        calls = 0

        def broken(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 2 or method != "next_message":
                raise RuntimeError("broken owner")
            return original(*arguments)

        monkeypatch.setattr(desk, method, broken)
        closed = await talk_to_end(target, desk)
    assert closed.trouble is Trouble.ABORTED
    assert [str(context["exception"]) for context in reported][:1] == ["broken owner"]
    if method == "on_intent":
        assert bodies == [], "the dot stayed in"
        assert desk.fates == [Fate.DEFERRED, Fate.DEFERRED]


async def test_an_owner_that_drops_the_connection_in_the_middle() -> None:
    class Dropping(Desk):
        def on_intent(self, connection: Connection, messages: list[Outbound]) -> None:
            super().on_intent(connection, messages)
            connection.abort()

    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await accept(reader, writer, bodies)

    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with serving(talk) as target:
        desk = Dropping(letter(1), letter(2))
        closed = await talk_to_end(target, desk)
    assert reported == []
    assert closed.trouble is Trouble.ABORTED
    assert desk.fates == [Fate.DEFERRED, Fate.DEFERRED]
    assert bodies == []


async def test_abort_behind_the_dot_is_in_doubt() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING")
        await reader.readuntil(b"DATA\r\n")
        await say(writer, "250 ok", "250 ok", "354 go")
        await reader.readuntil(b"\r\n.\r\n")
        connection.abort()

    async with serving(talk) as target:
        desk = Desk(letter(1))
        connection = await connect(target, desk)
        connection.wake()
        await desk.closed
        await connection.wait_closed()
    assert desk.fates == [Fate.UNKNOWN]


# -- opening and TLS -------------------------------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    async with serving(quiet) as target:
        pass
    closed = await Connection.open(target, Desk(), HELLO)
    assert isinstance(closed, Closed)
    assert (closed.trouble, closed.step) == (Trouble.UNREACHABLE, Step.CONNECT)


async def test_opening_can_be_cancelled() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        gone.set()

    async with serving(talk) as target:
        task = asyncio.create_task(Connection.open(target, Desk(), HELLO))
        await asyncio.wait([task], timeout=0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 5)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for another name, expired: opportunistic TLS takes it, verified TLS must not."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "other.example")])
    yesterday = datetime.now(UTC) - timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(yesterday - timedelta(days=1))
        .not_valid_after(yesterday)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def server_context(certificate: Path, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.maximum_version = newest
    return context


def upgrading(context: ssl.SSLContext, bodies: list[bytes]) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "PIPELINING", "STARTTLS")
        line = await reader.readline()
        if line != b"STARTTLS\r\n":
            assert line.startswith(b"MAIL")
            await say(writer, "250 ok")
            await accept(reader, writer, bodies)
            return
        await say(writer, "220 go")
        await writer.start_tls(context)
        assert await reader.readline() == b"EHLO us.example\r\n"
        await say(writer, "250 mx")
        await accept(reader, writer, bodies)

    return talk


@pytest.mark.parametrize(("newest", "version"), [(ssl.TLSVersion.TLSv1_2, 2), (ssl.TLSVersion.TLSv1_3, 3)])
async def test_opportunistic_tls_takes_any_certificate(certificate: Path, newest: ssl.TLSVersion, version: int) -> None:
    bodies: list[bytes] = []
    async with serving(upgrading(server_context(certificate, newest), bodies)) as target:
        desk = Desk(letter(1), letter(2))
        connection = await connect(target, desk, Terms("us.example", Tls.MAY))
        assert connection.tls_version == version
        assert dict(connection.extensions) == {}, "what was offered in clear is forgotten"
        connection.wake()
        await desk.closed
        await connection.wait_closed()
    assert desk.fates == [Fate.DELIVERED, Fate.DELIVERED]
    assert len(bodies) == 2


async def test_verified_tls_refuses_that_certificate(certificate: Path) -> None:
    async with serving(upgrading(server_context(certificate), [])) as target:
        closed = await Connection.open(target, Desk(), Terms("us.example", Tls.VERIFIED))
    assert isinstance(closed, Closed)
    assert (closed.trouble, closed.step) == (Trouble.TLS, Step.TLS)


@pytest.mark.parametrize("tls", [Tls.MAY, Tls.MUST])
@pytest.mark.parametrize("fault", ["garbage", "close", "silence"])
async def test_a_failed_handshake_goes_on_in_clear_only_if_policy_allows(tls: Tls, fault: str) -> None:
    bodies: list[bytes] = []
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await greet(reader, writer, "STARTTLS")
        line = await reader.readline()
        if line == b"STARTTLS\r\n":
            await say(writer, "220 go")
            if fault == "garbage":
                await reader.read(10)
                writer.write(b"garbage" * 100)
                await writer.drain()
            elif fault == "silence":
                await reader.read()
            return
        assert line.startswith(b"MAIL")
        await say(writer, "250 ok")
        await accept(reader, writer, bodies)

    async with serving(talk) as target:
        desk = Desk(letter(1))
        opened = await Connection.open(target, desk, Terms("us.example", tls, patience={Step.TLS: 0.3}))
        if tls is Tls.MUST:
            assert isinstance(opened, Closed)
            assert opened.step is Step.TLS
            assert connections == 1
            return
        assert isinstance(opened, Connection)
        opened.wake()
        await desk.closed
        await opened.wait_closed()
    assert connections == 2
    assert desk.fates == [Fate.DELIVERED]


async def test_implicit_tls(certificate: Path) -> None:
    bodies: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer, "AUTH PLAIN", "PIPELINING")
        assert await reader.readline() == b"AUTH PLAIN AG1lAHNlY3JldA==\r\n"
        await say(writer, "235 welcome")
        await accept(reader, writer, bodies)

    async with serving(talk, ssl=server_context(certificate)) as plain:
        target = Target("localhost", plain.ip, plain.port, implicit=True, login=("me", "secret"))
        assert "secret" not in repr(target)
        desk = Desk(letter(1))
        connection = await connect(target, desk, Terms("us.example", Tls.MUST))
        assert connection.tls_version == 3
        connection.wake()
        await desk.closed
        await connection.wait_closed()
        refused = await Connection.open(target, Desk(), Terms("us.example", Tls.VERIFIED))
        assert isinstance(refused, Closed)
        assert refused.trouble is Trouble.TLS
    assert desk.fates == [Fate.DELIVERED]
