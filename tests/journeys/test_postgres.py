"""Journeys over PostgreSQL (decision 15): the writer, the workers and whoever reads, from XADD to the ledger.

Every role is told where the store is as an operator tells it, by ``SALES_PUSH_POLICY_SQL_URL``.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import func, make_url, select, text

from policy import audit, keyspace, partitions, schema
from policy.address import normalise, parse, tag_of
from policy.events import Batch, Event, Kind, encode_batch
from policy.instants import DAY_US
from policy.keyspace import partition_of
from policy.suppression import Scope
from policy.wire import JobRecord, SuppressionRecord
from policy.writer import clock_us
from tests.journeys.test_erasure import BOB, Shell, seed
from tests.journeys.test_writer import ADA, mref, tag
from tests.world.mail import ROOT, MailWorld, job, mail_world, rows
from tests.world.postgres import PostgresServer, debian_programs, running_postgres
from tests.world.servers import PolicyWorld, policy_world


@pytest.fixture(scope="module", params=["wheel", pytest.param("debian", marks=pytest.mark.debian)])
def server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    with running_postgres(debian_programs() if request.param == "debian" else None) as made:
        yield made


@pytest.fixture
def url(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty database, which everything that reads settings finds."""
    made = server.database()
    monkeypatch.setenv("SALES_PUSH_POLICY_SQL_URL", made)
    yield made
    server.drop(made)


def suppression_of(mail: MailWorld, address: str) -> SuppressionRecord:
    mailbox = parse(address)
    tag = tag_of(mail.policy.keyring.pepper, normalise(mailbox.local, mailbox.domain))
    return SuppressionRecord(tag, partition_of(mailbox.domain), int(Scope.PLATFORM), 0, "manual", "test")


async def test_a_campaign_is_delivered_accounted_for_and_explained(url: str) -> None:
    async with mail_world(
        "accept:0:name=accept", "unknown:0:name=strict,share=0.5", "greylist:0:name=grey,seconds=0.4"
    ) as mail:
        assert mail.policy.settings.sql_address() == url
        await mail.start_worker()
        people = rows(40, "a.accept.test") + rows(30, "s.strict.test") + rows(20, "g.grey.test")
        people += [{"address": "no address", "fields": {"name": "x"}}, people[0]]
        await mail.policy.ask.suppress([suppression_of(mail, "person7@a.accept.test")])
        await mail.submit(job("one"), people)
        status = await mail.finished("one")
        counts = await mail.sink_counts()

        assert status.rows_submitted == 92
        assert status.terminal == 92
        assert status.reasons["refused"] == {"suppressed": 1, "invalid": 1, "duplicate": 1}
        assert status.counts["delivered"] == sum(c["accepted"] for c in counts.values())
        assert status.counts["deferred"] >= 20
        assert not list(mail.policy.settings.data_dir.glob("policy.db*")), "nothing is in SQLite"
        today = mail.policy.clock() // DAY_US
        with mail.policy.writer.store.engine.connect() as conn:
            held = conn.scalar(select(func.count()).select_from(schema.message))
            default = conn.scalar(text("SELECT count(*) FROM message_default"))
            days = partitions.days(conn, "message")
        assert held is not None
        assert held >= 90
        assert default == 0
        assert set(days) <= {today - 1, today}
        assert (await mail.policy.ask.statistics())["rows_adopted"] == 0


async def test_a_killed_worker_loses_nobody_and_the_writer_comes_back(url: str) -> None:
    async with mail_world("slow:0:name=slow,delay=0.02") as mail:
        worker = await mail.start_worker()
        await mail.submit(job("two"), rows(300, "a.slow.test"))
        while (await mail.sink_counts())["slow"]["accepted"] < 40:
            await asyncio.sleep(0.02)
        await mail.kill(worker)
        await mail.policy.restart_writer()
        await mail.start_worker()
        status = await mail.finished("two")
        sink = (await mail.sink_counts())["slow"]
        assert status.terminal == status.rows_submitted == 300
        assert sink["accepted"] == sink["unique"], "hold never repeats anybody"


async def test_a_store_that_ends_every_session_is_written_again(url: str) -> None:
    """A restart of the server, a fail-over: the drains go on with a new session, nothing is lost or told twice."""
    async with policy_world() as world:
        await world.ask.account_add("acme")
        number = (await world.ask.accept_job(_record())).number
        await _tell(world, number, range(20))
        await world.drain()
        ended = end_sessions(url)
        assert ended >= 1
        await _tell(world, number, range(15, 40))
        async with asyncio.timeout(30):
            while (status := world.reader.job_status(number, world.clock())) is None or status.terminal < 40:
                await asyncio.sleep(0.05)
        assert status.counts == {"delivered": 40}


async def test_an_opt_out_is_durable_when_told_and_there_after_a_crash_of_the_store(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T11: told means committed, with the write-ahead log on the disk. The server is stopped without a checkpoint."""
    made = server.database()
    monkeypatch.setenv("SALES_PUSH_POLICY_SQL_URL", made)
    async with policy_world() as world:
        await world.ask.suppress([SuppressionRecord(b"t" * 12, 1, int(Scope.PLATFORM), 0, "manual", "test")])
        await asyncio.to_thread(server.crash)
        await world.ask.suppress([SuppressionRecord(b"u" * 12, 1, int(Scope.PLATFORM), 0, "manual", "test")])
        engine = schema.open_store(made, writer=False)
        with engine.connect() as conn:
            assert set(conn.scalars(select(schema.suppression.c.tag))) == {b"t" * 12, b"u" * 12}
        engine.dispose()
    server.drop(made)


async def test_a_person_is_erased_everywhere_by_command_and_the_neighbour_is_not(url: str) -> None:
    """P-54, P-17 through the writer's own loop: no row of hers is left, she stays suppressed, sums stay."""
    async with policy_world() as world:
        await seed(world)
        ada, _ = tag(world, ADA)
        answer = json.loads(await Shell(world.settings.data_dir)("erase", ADA, "--yes", "--json"))
        assert (answer["new"], answer["messages"]) == (True, 1)
        async with asyncio.timeout(30):
            while world.writer.erasing.statistics()["erasures_open"]:
                await asyncio.sleep(0.05)
        with world.writer.store.engine.connect() as conn:
            assert conn.scalars(select(schema.subject.c.tag)).all() == [tag(world, BOB)[0]]
            assert conn.scalars(select(schema.message.c.mref)).all() == [mref(BOB)]
            assert set(conn.scalars(select(schema.erasure.c.state))) == {"purged"}
            assert ada in set(conn.scalars(select(schema.suppression.c.tag)))
            assert audit.verify(conn) is None
        assert [one.reason for one in world.reader.why(ADA, world.keyring).standing] == ["erasure"]
        status = world.reader.job_status("spring", world.clock())
        assert status is not None
        assert (status.counts["delivered"], status.terminal) == (2, 2)


async def test_a_day_whose_retention_is_over_is_dropped_by_the_writer_that_goes_on(url: str) -> None:
    """P-10 with the writer's clock 91 days later: the day's tables are gone, what is told that day stands."""
    later = [0]
    async with policy_world(clock=lambda: clock_us() + later[0]) as world:
        await seed(world)
        first = world.clock() // DAY_US
        later[0] = 91 * DAY_US
        done = await world.ask.call("sweep", dry_run=False)
        assert ("message", first, 2) in {(one["place"], one["day"], one["rows"]) for one in done}
        number = (await world.ask.accept_job(_record())).number
        await _tell(world, number, range(3))
        await world.drain()
        with world.writer.store.engine.connect() as conn:
            assert partitions.days(conn, "message") == [world.clock() // DAY_US]
            assert conn.scalar(text(f"SELECT to_regclass('message_d{first}')")) is None
            assert audit.verify(conn) is None
        assert (await world.ask.statistics())["sweep_failures"] == 0


def test_a_store_that_is_not_there_is_one_line_and_no_traceback(server: PostgresServer, tmp_path: Path) -> None:
    """What an operator mistypes first. The same for a database that was never made."""
    officer = 'officer = { name = "O", address = "privacy@example.org" }'
    for nowhere in (server.url("never_made"), "postgresql+psycopg://nobody@/none?host=/nowhere"):
        config = tmp_path / "sales-push.toml"
        config.write_text(f'[policy]\n{officer}\ndata_dir = "{tmp_path}"\nsql_url = "{nowhere}"\n')
        command = [sys.executable, "-c", "from engine.cli import main; main()", "jobs", "list"]
        told = subprocess.run(
            [*command, "--config", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert told.returncode == 1, told.stderr
        assert told.stderr == "sales-push: the database does not answer: is it up, and is [policy] sql_url right?\n"


def _record() -> JobRecord:
    return JobRecord(
        account="acme", job_id="sessions", hash=b"h" * 32, kind="transactional", created_at=1, payload=b"p",
        job_key=b"k", legal_basis="contract", links=(), chunks_expected=1,
    )  # fmt: skip


async def _tell(world: PolicyWorld, number: int, people: range) -> None:
    events = [Event(Kind.DELIVERED, mref, 1, world.clock(), mref + 1, b"t" * 12) for mref in people]
    batch = encode_batch(Batch(number, "one.example", events))
    await world.redis.xadd(keyspace.events(partition_of("one.example")), {"b": batch})


def end_sessions(url: str) -> int:
    """Every session of the database but this one; how many those were."""
    parsed = make_url(url)
    with psycopg.connect(host=str(parsed.query["host"]), user=parsed.username, dbname="postgres") as conn:
        row = conn.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s", (parsed.database,)
        ).fetchone()
        assert row is not None
        return int(row[0])
