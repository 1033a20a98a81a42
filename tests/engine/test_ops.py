"""Metrics and health: what is said of a host is complete, holds no address and never breaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from engine.ops.api import Api, readiness, serve
from engine.ops.metrics import StoreFacts, exposition, store_facts
from engine.settings import EngineSettings, Ops
from policy import keyspace, vitals
from policy.settings import Officer, PolicySettings
from policy.valkey import EmbeddedServer, connect
from policy.vitals import Sign, Vitals, VitalsError, read_all

OFFICER = Officer(name="Privacy Officer", address="privacy@example.com")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        yield Path(name)


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[EmbeddedServer]:
    valkey = EmbeddedServer(folder / "data" / "valkey")
    valkey.start()
    await valkey.wait_ready()
    yield valkey
    await valkey.stop()


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text.decode("utf-8"))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


# --- what a process says ------------------------------------------------------------------------------------------


def test_what_is_published_is_read_back(tmp_path: Path) -> None:
    Vitals(tmp_path, "engine", 1).publish({"delivered_total": 5, "replies_total": {"250": 4, "421": 1}}, at=100.0)
    Vitals(tmp_path, "engine", 0).publish({"delivered_total": 7}, at=101.0)

    first, second = read_all(tmp_path)

    assert (first.role, first.index, first.at, first.numbers) == ("engine", 0, 101.0, {"delivered_total": 7.0})
    assert second.numbers["replies_total"] == {"250": 4.0, "421": 1.0}


@pytest.mark.parametrize(
    "statistics",
    [
        {"someone@example.com": 1},
        {"delivered to": 1},
        {"Delivered": 1},
        {"": 1},
        {"replies_total": {"someone@example.com": 1}},
        {"replies_total": {"550 no such user": 1}},
        {"replies_total": {"": 1}},
        {"replies_total": {"x" * 129: 1}},
    ],
)
def test_an_address_never_gets_into_a_metric(tmp_path: Path, statistics: vitals.Statistics) -> None:
    with pytest.raises(VitalsError) as caught:
        Vitals(tmp_path, "engine").publish(statistics, at=1.0)

    assert "@example.com" not in str(caught.value).replace("'someone@example.com'", "")
    assert read_all(tmp_path) == []


@given(st.dictionaries(st.from_regex(r"[a-z0-9.]{1,20}", fullmatch=True), st.integers(0, 10**9), max_size=200))
def test_however_many_labels_the_sum_is_kept_and_the_number_of_series_bounded(counted: dict[str, int]) -> None:
    """A campaign to 30,000 domains cannot blow up the exporter, and no event is missing from its total."""
    capped = vitals.plain({"by_site": counted})["by_site"]

    assert isinstance(capped, dict)
    assert len(capped) <= vitals.MOST_LABELS
    assert math.isclose(sum(capped.values()), sum(counted.values()), rel_tol=1e-9, abs_tol=1e-6)


def test_files_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    Vitals(tmp_path, "tracker").publish({"hits_total": 1}, at=1.0)
    run = vitals.run_dir(tmp_path)
    (run / "engine-0.json").write_bytes(b'{"role": "engine"')
    (run / "engine-1.json").write_bytes(b"")
    (run / "policy-0.json").write_bytes(b"\xff\xfe")

    assert [sign.role for sign in read_all(tmp_path)] == ["tracker"]


async def test_a_role_that_ends_in_order_takes_its_file_away(tmp_path: Path) -> None:
    ticks = iter(range(100, 200))
    tracker = Vitals(tmp_path, "tracker")
    asked = asyncio.Event()

    def statistics() -> dict[str, int]:
        asked.set()
        return {"hits_total": 1}

    beat = asyncio.create_task(tracker.beat(statistics, lambda: float(next(ticks))))
    await asked.wait()
    assert [sign.at for sign in read_all(tmp_path)] == [100.0]

    beat.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beat
    assert read_all(tmp_path) == []


# --- metrics ------------------------------------------------------------------------------------------------------


def test_the_exposition_parses_and_says_what_was_said() -> None:
    signs = [
        Sign("engine", 0, 1, 90.0, {"delivered_total": 5.0, "connections": 3.0, "replies_total": {"250": 4.0}}),
        Sign("engine", 1, 2, 99.0, {"delivered_total": 6.0, "connections": 1.0}),
    ]
    store = StoreFacts(memory_bytes=1000, clients=2, oldest_age=1.5, streams={"jobs": 1, "events": 7})

    found = values(exposition(signs, store, now=100.0))

    assert found["sales_push_engine_delivered_total", (("index", "0"),)] == 5.0
    assert found["sales_push_engine_delivered_total", (("index", "1"),)] == 6.0
    assert found["sales_push_engine_connections", (("index", "1"),)] == 1.0
    assert found["sales_push_engine_replies_total", (("index", "0"), ("of", "250"))] == 4.0
    assert found["sales_push_process_silent_seconds", (("index", "0"), ("role", "engine"))] == 10.0
    assert found["sales_push_stream_entries", (("stream", "events"),)] == 7.0
    assert found["sales_push_intake_oldest_seconds", ()] == 1.5


async def test_the_facts_of_the_store_are_those_of_the_store(server: EmbeddedServer) -> None:
    client = connect(server.url)
    empty = await store_facts(client)
    now_ms = (await client.time())[0] * 1000
    await client.xadd(keyspace.INTAKE, {"job": b"{}"}, id=f"{now_ms - 60_000}-0")
    for partition in (0, 63):
        await client.xadd(keyspace.events(partition), {"b": b"x"})
    facts = await store_facts(client)
    await client.aclose()

    assert (empty.oldest_age, sum(empty.streams.values())) == (0.0, 0)
    assert facts.streams == {"jobs": 1, "rejected": 0, "dead": 0, "hits": 0, "events": 2}
    assert 60.0 <= facts.oldest_age < 120.0
    assert facts.memory_bytes > 0


# --- readiness ----------------------------------------------------------------------------------------------------

TRACKER = Sign("tracker", 0, 1, 100.0, {})
ENGINE = Sign("engine", 0, 2, 100.0, {})
CHILDREN = {"engine-0": 1.0, "tracker-0": 1.0, "valkey": 1.0}


def supervisor(at: float = 100.0, **up: float) -> Sign:
    return Sign("supervisor", 0, 3, at, {"up": {**CHILDREN, **{name.replace("_", "-"): n for name, n in up.items()}}})


@pytest.mark.parametrize(
    ("signs", "redis_up", "writer_up", "down"),
    [
        ([TRACKER, supervisor(), ENGINE], True, True, set()),
        ([TRACKER, supervisor(), ENGINE], True, None, set()),
        ([], True, None, set()),
        ([TRACKER], False, True, {"redis"}),
        ([TRACKER], True, False, {"writer"}),
        ([TRACKER, Sign("engine", 3, 2, 80.0, {})], True, True, {"engine-3"}),
        ([TRACKER, supervisor()], True, True, {"engine-0"}),  # started, and has not spoken yet
        ([TRACKER, supervisor(engine_0=0.0), ENGINE], True, True, {"engine-0"}),  # spoke, and has died since
        ([TRACKER, supervisor(valkey=0.0), ENGINE], True, True, {"valkey"}),
        ([TRACKER, supervisor(at=10.0), ENGINE], True, True, {"supervisor"}),
    ],
)
def test_ready_means_that_every_part_works(
    signs: list[Sign], redis_up: bool, writer_up: bool | None, down: set[str]
) -> None:
    state = readiness(signs, now=101.0, stale_seconds=15.0, redis_up=redis_up, writer_up=writer_up)

    assert {name for name, works in state.parts.items() if not works} == down
    assert state.ready == (not down)


async def test_the_listener_answers_also_when_the_store_is_away(folder: Path) -> None:
    Vitals(folder, "tracker").publish({"hits_total": 3}, at=time.time())
    redis = connect(f"unix://{folder}/nobody.sock")
    api = Api(folder, folder / "policy.sock", redis, stale_seconds=15.0)
    async with TestClient(TestServer(api.application())) as client:
        metrics = await client.get("/metrics")
        health = await client.get("/healthz")
        ready = await client.get("/readyz")

        assert (metrics.status, health.status, ready.status) == (200, 200, 503)
        assert metrics.headers["Content-Type"].startswith("text/plain")
        assert values(await metrics.read())["sales_push_tracker_hits_total", (("index", "0"),)] == 3.0
        assert json.loads(await ready.text()) == {"ready": False, "parts": {"redis": False, "tracker-0": True}}
        assert (await client.post("/metrics")).status == 405
        assert (await client.get("/metrics/../../etc/passwd")).status == 404
    await redis.aclose()


async def test_the_ops_process_says_where_it_listens_and_leaves_nothing(folder: Path, server: EmbeddedServer) -> None:
    policy = PolicySettings(officer=OFFICER, data_dir=folder / "data")
    run = vitals.run_dir(policy.data_dir)
    stop = asyncio.Event()
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(policy, EngineSettings(ops=Ops(port=0)), stop, told.set_result))
    url = await asyncio.wait_for(told, 30)

    assert (run / "ops.url").read_text() == f"{url}\n"
    async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as answer:
        assert answer.status == 200
        assert await answer.json() == {"ready": True, "parts": {"redis": True, "ops": True}}

    stop.set()
    await asyncio.wait_for(task, 30)
    assert list(run.iterdir()) == []
