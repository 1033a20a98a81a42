"""The app under hostile peers (faults.md 3.5), and over the real stores: SQLite, Valkey, the negative list."""

from __future__ import annotations

import asyncio
import gzip
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import Engine, insert

from policy import negative, schema
from policy.events import Hit, Kind, decode_hits
from policy.gate import Mode
from policy.instants import HOUR_US
from policy.keyspace import HITS, NEGATIVE
from policy.valkey import Client, EmbeddedServer, connect
from tests.tracker.twins import (
    CLICK,
    JOB,
    LEAVE,
    LINKS,
    LIST,
    MREF,
    PIXEL,
    SUBJECT,
    House,
    MemoryWriter,
    open_house,
    until,
)
from tracker.answers import GIF
from tracker.app import Tracker
from tracker.settings import TrackerSettings
from tracker.tables import SqlSource


async def raw(port: int, data: bytes, seconds: float = 10.0) -> bytes:
    """Everything the server says to these bytes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(seconds):
            writer.write(data)
            return await reader.read()
    finally:
        writer.close()


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: t", "Connection: close", *headers, "", "")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS to a plain port",
        b"GET / HTTP/9.9\r\n\r\n",
        b"NOT HTTP AT ALL\r\n\r\n",
        b"GET /o/\xff\xfe.gif HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /\x00secret-path HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /o/x.gif HTTP/1.1\r\nHost: a\r\nHost: b\r\nUser-Agent: secret-agent\r\n\r\n",
        b"GET /o/" + b"A" * 65536 + b".gif HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET /o/x.gif HTTP/1.1\r\nHost: t\r\n" + b"X: " + b"y" * 9000 + b"\r\n\r\n",
        b"GET /o/x.gif HTTP/1.1\r\nHost: t\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(500)) + b"\r\n",
        b"POST /u/x HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /o/x.gif HTTP/1.1\r\nHost: t\r\nX: a\r\n b: folded\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=[
        "tls",
        "version",
        "noise",
        "raw 8 bit",
        "nul",
        "two hosts",
        "long line",
        "long field",
        "many fields",
        "smuggling",
        "length",
    ],
)
async def test_what_is_not_http_gets_a_constant_400_and_no_word_in_the_log(
    house: House, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await raw(house.port, data)
    assert answer.startswith(b"HTTP/1.") and b" 400 " in answer.split(b"\r\n")[0]  # noqa: PT018
    assert b"aiohttp" not in answer
    assert b"secret" not in answer
    assert not [
        record for record in caplog.records if "127.0.0.1" in record.getMessage() or "secret" in record.getMessage()
    ]
    alive, body = await house.ask("GET", PIXEL)
    assert (alive.status, body) == (200, GIF)


async def test_paths_that_climb_are_only_strings(house: House) -> None:
    for path in ("/o/../../etc/passwd", "/o/..%2f..%2fetc%2fpasswd", "/o/%c0%ae%c0%ae/x", "/o/%00.gif"):
        answer = await raw(house.port, get(path))
        assert answer.endswith(GIF)


async def test_nothing_of_a_hostile_request_reaches_the_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    hostile = {"User-Agent": "marker-agent", "Referer": "https://x/?mail=marker@example.org", "Cookie": "marker=1"}
    for method, path in (
        ("GET", PIXEL),
        ("GET", CLICK + "/0?marker"),
        ("POST", LEAVE),
        ("GET", "/marker"),
        ("PUT", LEAVE),
    ):
        await house.ask(method, path, headers=hostile)
    house.writer.fail = True
    await house.ask("POST", LEAVE, headers=hostile)
    assert caplog.records  # the 503 is reported
    text = " ".join(record.getMessage() for record in caplog.records if record.name.startswith(("tracker", "aiohttp")))
    for secret in ("marker", "127.0.0.1", LEAVE.removeprefix("/u/")):
        assert secret not in text


async def test_bodies_are_never_decompressed(house: House) -> None:
    """A bomb is a few bytes to us: 100 MB of zeros in gzip stay the 100 kB that were sent."""
    bomb = gzip.compress(b"\0" * 100_000_000)
    response, _ = await house.ask("POST", LEAVE, data=bomb, headers={"Content-Encoding": "gzip"})
    assert response.status == 200
    small = gzip.compress(b"List-Unsubscribe=One-Click")
    response, body = await house.ask("POST", LEAVE, data=small, headers={"Content-Encoding": "gzip"})
    assert b"You are unsubscribed" in body  # read as it is, not as what it would unpack to


async def test_a_slow_header_is_closed_in_time() -> None:
    async with open_house(keepalive_seconds=0.2) as house:
        assert await raw(house.port, b"GET /o/x.gif HTTP/1.1\r\nHo") == b""
        assert await raw(house.port, b"") == b""


async def test_a_slow_body_counts_at_once_and_is_cut_off() -> None:
    async with open_house(body_seconds=0.1) as house:
        head = f"POST {LEAVE} HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\nList-".encode()
        answer = await raw(house.port, head)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert len(house.writer.deeds) == 1


async def test_a_flood_of_pipelined_requests_is_answered_in_order(house: House) -> None:
    one = f"GET {PIXEL} HTTP/1.1\r\nHost: t\r\n\r\n".encode()
    answer = await raw(house.port, one * 2000 + get("/c/x/0"), 60)
    assert answer.count(GIF) == 2000
    assert b"404 Not Found" in answer


async def test_over_the_limit_the_oldest_idle_connection_makes_room() -> None:
    async with open_house(connections=16, keepalive_seconds=60) as house:
        silent = [await asyncio.open_connection("127.0.0.1", house.port) for _ in range(16)]
        answer = await raw(house.port, get(PIXEL))
        assert answer.endswith(GIF)
        async with asyncio.timeout(5):
            assert await silent[0][0].read() == b""
        assert house.tracker.statistics()["connections_shed"] == 1
        for _, writer in silent:
            writer.close()


async def test_overload_drops_events_and_never_responses() -> None:
    async with open_house(buffer_hits=100) as house:
        house.redis.down = True
        for number in range(300):
            response, body = await house.ask("GET", PIXEL)
            assert (response.status, body) == (200, GIF), number
        hits = house.tracker.recorder.statistics()
        assert (hits.waiting, hits.dropped) == (100, 200)
        response, _ = await house.ask("POST", LEAVE)
        assert response.status == 200


async def test_stopping_answers_what_is_in_hand_and_twice_is_fine(house: House) -> None:
    await house.ask("GET", PIXEL)
    await house.tracker.stop()
    assert len(house.redis.hits()) == 1
    with pytest.raises(aiohttp.ClientConnectorError):
        await house.ask("GET", PIXEL)


# ---- over the real stores


@pytest.fixture(scope="module")
def valkey_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="sp-tracker-") as folder:
        server = EmbeddedServer(Path(folder) / "valkey")
        server.start()
        try:
            asyncio.run(server.wait_ready())
            yield server.url
        finally:
            asyncio.run(server.stop())


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """(writer's engine, reader's engine) over a migrated database with one account, list, job and its links."""
    url = f"sqlite:///{tmp_path / 'policy.db'}"
    writer = schema.open_store(url, writer=True)
    schema.upgrade(writer)
    with writer.begin() as connection:
        account = insert(schema.account).values(
            number=11, name="ada", display_name="Ada's Garden", postal_address="1 Bed Lane", website="",
            privacy_url="", state="active", opens_mode=Mode.INDIVIDUAL, clicks_mode=Mode.AGGREGATE, created=0,
        )  # fmt: skip
        connection.execute(account)
        connection.execute(insert(schema.list_).values(number=LIST, account=11, name="seeds", display_name=""))
        job = insert(schema.job).values(
            number=JOB, account=11, job_id="spring", hash=b"h" * 32, state="sending", kind="campaign", list=LIST,
            legal_basis="consent", in_doubt="hold", priority=0, wait=0, opens_mode=Mode.DELIVERABILITY,
            clicks_mode=Mode.INDIVIDUAL, created_at=0, accepted_at=0, chunks_expected=0,
        )  # fmt: skip
        connection.execute(job)
        urls = ["https://shop.example/0", "javascript:alert(1)", "https://shop.example/é"]
        connection.execute(insert(schema.link), [{"job": JOB, "number": n, "url": u} for n, u in enumerate(urls)])
        connection.execute(insert(schema.job_view).values(job=JOB, html="<p>hello"))
    reader = schema.open_store(url, writer=False)
    try:
        yield writer, reader
    finally:
        reader.dispose()
        writer.dispose()


def test_the_questions_to_sql(stores: tuple[Engine, Engine]) -> None:
    source = SqlSource(stores[1])
    assert source.links(JOB) == ("https://shop.example/0", "javascript:alert(1)", "https://shop.example/é")
    assert source.links(JOB + 1) is None
    assert source.view(JOB) == "<p>hello"
    assert source.view(JOB + 1) is None
    sender = source.sender_of_job(JOB)
    assert sender is not None
    assert (sender.name, sender.list_name, sender.account) == ("Ada's Garden", "seeds", 11)
    assert (sender.opens, sender.clicks) == (Mode.DELIVERABILITY, Mode.AGGREGATE)  # the strictest of account and job
    assert source.sender_of_job(JOB + 1) is None
    by_list = source.sender_of_list(LIST)
    assert by_list is not None
    assert by_list.account == 11
    assert source.sender_of_list(99) is None


@pytest.fixture
async def real(stores: tuple[Engine, Engine], valkey_url: str) -> AsyncIterator[tuple[Tracker, int, Engine]]:
    redis = connect(valkey_url)
    await redis.delete(HITS, NEGATIVE)
    tracker = Tracker(
        TrackerSettings(port=0, flush_seconds=0.01),
        links=LINKS,
        source=SqlSource(stores[1]),
        redis=redis,
        writer=MemoryWriter(),
        officer=("Grace Officer", "privacy@platform.example"),
    )
    port = await tracker.start()
    try:
        yield tracker, port, stores[0]
    finally:
        await tracker.stop()


async def hits_in(redis: Client) -> list[Hit]:
    """Every hit in the stream."""
    entries: Any = await redis.xrange(HITS)
    return [hit for _, fields in entries for hit in decode_hits(fields[b"b"])]


async def test_a_visit_over_real_stores(real: tuple[Tracker, int, Engine], valkey_url: str) -> None:
    tracker, port, writer = real
    redis = connect(valkey_url)
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession() as client:

            async def visit(path: str) -> int:
                async with client.get(f"http://127.0.0.1:{port}{path}", allow_redirects=False) as response:
                    return response.status

            assert [await visit(path) for path in (PIXEL, CLICK + "/2", CLICK + "/1")] == [200, 302, 404]
            while len(found := await hits_in(redis)) < 2:
                pass
            assert [(hit.kind, hit.job, hit.mref, hit.link) for hit in found] == [
                (Kind.OPENED, JOB, MREF, -1),
                (Kind.CLICKED, JOB, MREF, 2),
            ]
            assert all(hit.at % HOUR_US == 0 for hit in found)

            # consent withdrawn after delivery: committed, announced, and from then on nothing is stored
            with writer.begin() as connection:
                seq = negative.add(connection, SUBJECT, "withdrawn", 1)
            await negative.announce(redis, SUBJECT, "withdrawn", seq)
            await until(lambda: SUBJECT in tracker.withdrawn)
            assert [await visit(path) for path in (PIXEL, CLICK + "/0")] == [200, 302]
            assert tracker.recorder.statistics().withheld == 2
            assert await tracker.recorder.flush()
            assert len(await hits_in(redis)) == 2
    finally:
        await redis.aclose()
