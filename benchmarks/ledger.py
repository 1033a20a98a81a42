"""How many events a second the ledger takes once it is large; last, one line of JSON.

    python -m benchmarks.ledger [--store sqlite|postgres|both] [--rows N] [--expired N] [--seconds S] [--rate R]
                                [--days D] [--json-only] [--bar]

    1. `prefill`   N rows of the ledger with all their indexes: jobs of 100,000 over the last D days; --expired so many
                   more that are over since days, for the sweeper
    2. `Feed`      deliveries (a tenth put off) and hits of readers (a fifth as many; half of them only counted) into a
                   real Valkey with ``appendfsync always``, S seconds long
    3. the real writer (`policy.writer.serve`) in a process of its own drains them into a real SQLite file, or into the
                   embedded wheel's PostgreSQL 18 with ``fsync`` on and 256 MiB of buffers
    4. `Sweeps`    meanwhile the writer is asked to sweep, again as soon as it has answered, and `OptOuts` asks it ten
                   times a second to suppress somebody: how long that took, Redis and SQL
    5. after the last event: how long until the streams are empty, how large the file has become

Without --rate as many events as the writer takes: never more than `AHEAD` wait. With it so many a second, whatever
waits. Half of the deliveries go to five providers, 32 at a time, half to a tail of 3,000 domains by twos.

Lag is measured from outside, five times a second: Redis TIME against the id of the oldest entry of any stream (what is
committed is trimmed); `metric_lag_max` is what the writer says of it itself. CPU is process time of the writer and of
the servers, so other load on the machine does not count; events a second and lag are wall time and do drift with it.

--store both: the line of JSON has the figures of each under its name. --bar: exit code 1 unless, on each store, 10,000
events a second were taken (with --rate: fed, and all of it taken in the end), nobody waited for five seconds, and
everything that was over has been swept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
import uvloop
from sqlalchemy import Connection, insert, make_url

from policy import accounts, keyspace, partitions, statements
from policy.events import Batch, Event, Hit, Kind, Reason, encode_batch, encode_hits
from policy.gate import Mode
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.schema import job as job_table
from policy.schema import open_store, upgrade
from policy.settings import Officer, PolicySettings
from policy.suppression import Scope
from policy.valkey import Client, EmbeddedServer, connect
from policy.wire import SuppressionRecord, WriterClient, WriterUnavailable
from policy.writer import clock_us, serve
from tests.world.postgres import PostgresServer, running_postgres

AHEAD: Final = 20_000  # events waiting at most, without --rate: two seconds at the bar's rate
BAR_RATE: Final = 10_000.0
BAR_LAG: Final = 5.0
_JOB_ROWS: Final = 100_000
_ROUND: Final = 2_000  # events a pipeline
_LOOK_SECONDS: Final = 0.2
_DRAIN_SECONDS: Final = 120.0  # how long the rest may take
_OVER_DAYS: Final = 100  # R3 is 90 days
_OVER_ON: Final = 5  # so many days of what is over
_PAUSE: Final = 0.2  # seconds between sweeps
_OPT_OUT_SECONDS: Final = 0.1
_COLUMNS: Final = "job, mref, kind, reason, domain, code, enhanced, attempts, at, day, pseudonym, tag_sealed, tls, note"

Say = Callable[[str], None]


def _references(count: int) -> list[int]:
    """Random signed 64-bit numbers."""
    raw = os.urandom(8 * count)
    return [int.from_bytes(raw[at : at + 8], "big", signed=True) for at in range(0, len(raw), 8)]


@dataclass(frozen=True)
class Place:
    """The store that is measured: a file, or a server beside it."""

    url: str
    file: Path | None = None
    server: PostgresServer | None = None

    def bytes(self) -> int:
        """Of the whole database; with a file, its log too."""
        if self.file is not None:
            return sum(path.stat().st_size for path in self.file.parent.glob(f"{self.file.name}*"))
        return self._number("SELECT pg_database_size(current_database())")

    def log_bytes(self) -> int:
        """Of the write-ahead log now (a file), or written in all (a server)."""
        if self.file is not None:
            return self.bytes() - self.file.stat().st_size
        return self._number("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")

    def _number(self, question: str) -> int:
        url = make_url(self.url)
        with psycopg.connect(host=str(url.query["host"]), user=url.username, dbname=url.database) as conn:
            row = conn.execute(question.encode()).fetchone()
        assert row is not None
        return int(row[0])

    def cpu(self) -> float:
        """Seconds of the server's processes; those that ended are in their parent's account."""
        if self.server is None:
            return 0.0
        parent = self.server.pid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text("ascii").split()
        return _cpu(parent, ended=True) + sum(_cpu(int(child)) for child in children)


@contextlib.contextmanager
def _place(store: str, folder: Path) -> Iterator[Place]:
    if store == "sqlite":
        database = folder / "data" / "policy.db"
        yield Place(f"sqlite:///{database}", file=database)
        return
    with running_postgres(
        fsync="on", full_page_writes="on", autovacuum="on", shared_buffers="256MB", max_wal_size="4GB"
    ) as server:
        yield Place(server.database(), server=server)


def prefill(url: str, rows: int, expired: int, days: int, now: int, say: Say) -> int:
    """Rows as the drains leave them, jobs in order of their days; the number of the first job that is free.

    Indexes are there from the first row on, as in life. What only a power cut or a thief could tell is off meanwhile
    (syncs, wiping of free pages): the writer that is measured opens the store anew, with both."""
    engine = open_store(url, writer=True)
    upgrade(engine)
    is_file = engine.dialect.name == "sqlite"
    if is_file:
        with engine.connect() as conn:
            conn.exec_driver_sql("COMMIT")
            conn.exec_driver_sql("PRAGMA synchronous=OFF")
            conn.exec_driver_sql("PRAGMA secure_delete=OFF")
    over, jobs = -(-expired // _JOB_ROWS), -(-rows // _JOB_ROWS)
    number = 0
    for index in range(over + jobs):
        number += 1
        if index < over:
            count = min(_JOB_ROWS, expired - index * _JOB_ROWS)
            at = now - (_OVER_DAYS - index * _OVER_ON // over) * DAY_US
        else:
            index -= over
            count = min(_JOB_ROWS, rows - index * _JOB_ROWS)
            at = now - (jobs - index) * days * DAY_US // max(jobs, 1)
        sealed = os.urandom(40 * count)
        some = [
            (number, mref, 1, 0, 1 + n % 3000, 250, "2.0.0", 1, at, at // DAY_US, pseudonym & (1 << 63) - 1,
             sealed[40 * n : 40 * n + 40], 3, None)
            for n, (mref, pseudonym) in enumerate(zip(sorted(_references(count)), _references(count), strict=True))
        ]  # fmt: skip
        with engine.begin() as conn:
            partitions.prepare(conn, at // DAY_US)
            _enter(conn, some)
        if number % 10 == 9:
            say(f"{number * _JOB_ROWS:,} rows")
    with engine.begin() as conn:
        partitions.prepare(conn, now // DAY_US)
        _enter_job(conn, number + 1, now)
    with engine.connect() as conn:
        conn.exec_driver_sql("COMMIT")
        if is_file:
            conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        else:
            conn.exec_driver_sql("ANALYZE message")  # autovacuum would, within a minute
            conn.exec_driver_sql("COMMIT")
    engine.dispose()
    return number + 1


def _enter(conn: Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    if conn.dialect.name == "sqlite":
        conn.exec_driver_sql(statements.insert("sqlite", "message", _COLUMNS), list(rows))
    else:
        statements.copy(conn, "message", _COLUMNS, rows)


def _enter_job(conn: Connection, number: int, now: int) -> None:
    """The running campaign: the writer asks since when a job can have rows."""
    account = accounts.add(conn, "benchmark", display_name="", now=now).number
    numbers = dict.fromkeys(("priority", "wait", "opens_mode", "clicks_mode", "chunks_expected"), 1)
    words = {"job_id": "running", "state": "sending", "kind": "campaign", "legal_basis": "", "in_doubt": "hold"}
    instants = {"created_at": now, "accepted_at": now}
    row = numbers | words | instants | {"number": number, "account": account, "hash": bytes(32)}
    conn.execute(insert(job_table).values(row))


@dataclass
class Feed:
    """Writes entries as workers and trackers do. job: all events are of one running campaign."""

    redis: Client
    job: int
    dice: random.Random = field(default_factory=lambda: random.Random(4))
    events: int = 0
    hits: int = 0
    _tail: int = 0

    async def round(self, most: int) -> int:
        """About `most` events in one pipeline; how many it were."""
        told = 0
        async with self.redis.pipeline(transaction=False) as pipe:
            while told < most:
                told += self._providers(pipe) if self.dice.random() < 1 / 17 else self._tails(pipe)
            hits = told // 5
            pipe.xadd(keyspace.HITS, {"b": encode_hits(self._visits(hits))})
            await pipe.execute()
        self.events += told
        self.hits += hits
        return told + hits

    def _providers(self, pipe: Any) -> int:
        return self._settle(pipe, f"provider{self.dice.randrange(5)}.example", 32)

    def _tails(self, pipe: Any) -> int:
        self._tail += 1
        return self._settle(pipe, f"d{self._tail % 3000}.example", 2)

    def _settle(self, pipe: Any, name: str, count: int) -> int:
        at, refs, people, tags = clock_us(), _references(count), _references(count), os.urandom(12 * count)
        some = [
            Event(
                Kind.DEFERRED if self.dice.random() < 0.1 else Kind.DELIVERED, refs[n], 1, at,
                people[n] & (1 << 63) - 1, tags[12 * n : 12 * n + 12], Reason.NONE, 250, "2.0.0", 3,
            )
            for n in range(count)
        ]  # fmt: skip
        pipe.xadd(keyspace.events(keyspace.partition_of(name)), {"b": encode_batch(Batch(self.job, name, some))})
        return count

    def _visits(self, count: int) -> list[Hit]:
        at = clock_us()
        return [
            Hit(Kind.CLICKED if n % 4 == 0 else Kind.OPENED, self.job, mref if n % 2 else 0, at,
                Mode.INDIVIDUAL if n % 2 else Mode.AGGREGATE, 32, n % 20 if n % 4 == 0 else -1)
            for n, mref in enumerate(_references(count))
        ]  # fmt: skip


@dataclass
class Watch:
    """What can be seen from outside."""

    redis: Client
    ask: WriterClient
    lags: list[float] = field(default_factory=list)
    metric: float = 0.0
    taken: float = 0.0

    async def look(self) -> float:
        """Seconds that the oldest entry has been waiting."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for stream in (*(keyspace.events(partition) for partition in range(keyspace.PARTITIONS)), keyspace.HITS):
                pipe.xrange(stream, count=1)
            (seconds, micros), *firsts = await pipe.execute()
        now = seconds + micros / 1e6
        lag = max([now - int(entries[0][0].partition(b"-")[0]) / 1e3 for entries in firsts if entries], default=0.0)
        figures = await self.ask.statistics()
        self.metric = max(self.metric, float(figures["ledger_lag_seconds"]))
        self.taken = float(figures["events"]) + float(figures["hits"])
        self.lags.append(lag)
        return lag

    async def go_on(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)


@dataclass
class Sweeps:
    """Asks the writer to sweep for as long as events come. done: how often it came to an end."""

    ask: WriterClient
    done: int = 0
    is_last: bool = False

    async def go_on(self) -> None:
        while True:
            was_last = self.is_last
            await self.ask.call("sweep", dry_run=False)
            self.done += 1
            if was_last:
                return
            await asyncio.sleep(_PAUSE)


@dataclass
class OptOuts:
    """People who want no more mail while all this goes on. took: milliseconds each until it was in force."""

    ask: WriterClient
    took: list[float] = field(default_factory=list)

    async def go_on(self) -> None:
        while True:
            tag = os.urandom(12)
            begun = time.perf_counter()
            await self.ask.suppress(
                [SuppressionRecord(tag, tag[0] % keyspace.PARTITIONS, int(Scope.PLATFORM), 0, "opt-out", "benchmark")]
            )
            self.took.append((time.perf_counter() - begun) * 1e3)
            await asyncio.sleep(_OPT_OUT_SECONDS)


def _writer(settings: PolicySettings) -> None:
    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await serve(settings, stop)

    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # its log is not wanted, for as long as it lives
    uvloop.run(run())


def _cpu(pid: int, *, ended: bool = False) -> float:
    """Seconds of CPU a process has used (proc(5): utime and stime; ended: those of its children that are no more)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return sum(map(int, fields[11 : 15 if ended else 13])) / os.sysconf("SC_CLK_TCK")


async def _fed(feed: Feed, watch: Watch, seconds: float, rate: float) -> float:
    """Feed for so long; seconds it took."""
    start = time.perf_counter()
    sent = 0
    while (passed := time.perf_counter() - start) < seconds:
        waits = sent - watch.taken >= AHEAD if not rate else sent >= rate * passed
        if waits:
            await asyncio.sleep(0.01)
        else:
            sent += await feed.round(_ROUND if not rate else min(_ROUND, max(64, int(rate / 20))))
    return time.perf_counter() - start


async def _answers(ask: WriterClient) -> bool:
    try:
        await ask.ping()
    except WriterUnavailable:
        return False
    return True


async def measure(
    place: Place, folder: Path, rows: int, expired: int, seconds: float, rate: float, days: int, say: Say
) -> dict[str, Any]:
    """The figures of one run."""
    now = clock_us()
    data = folder / "data"
    data.mkdir(mode=0o700)
    Keyring.create(folder / "keys", week_of(now))
    job = await asyncio.to_thread(prefill, place.url, rows, expired, days, now, say)
    before, log_before = place.bytes(), place.log_bytes() if place.server else 0
    server = EmbeddedServer(folder / "redis")
    server.start()
    await server.wait_ready()
    officer = Officer(name="Benchmark", address="privacy@example.com")
    settings = PolicySettings(
        officer=officer, data_dir=data, keys_dir=folder / "keys", redis_url=server.url, sql_url=place.url
    )
    writer = multiprocessing.get_context("spawn").Process(target=_writer, args=(settings,))
    writer.start()
    redis = connect(server.url)
    try:
        async with (
            WriterClient(settings.writer_socket, timeout=60.0) as ask,
            WriterClient(settings.writer_socket, timeout=600.0) as ask_sweeps,  # answers come in order
            WriterClient(settings.writer_socket, timeout=60.0) as ask_opt_outs,
        ):
            while not await _answers(ask):
                if writer.exitcode is not None:
                    raise RuntimeError(f"the writer ended with {writer.exitcode}")
                await asyncio.sleep(0.05)
            assert writer.pid is not None
            feed, watch, sweeps, opt_outs = (
                Feed(redis, job),
                Watch(redis, ask),
                Sweeps(ask_sweeps),
                OptOuts(ask_opt_outs),
            )
            started = _cpu(writer.pid), _cpu(server.pid), float((await ask.statistics())["transactions"]), place.cpu()
            sweeping = asyncio.create_task(sweeps.go_on())
            beside = [asyncio.create_task(one.go_on()) for one in (watch, opt_outs)]
            took = await _fed(feed, watch, seconds, rate)
            taken = watch.taken
            wal = place.log_bytes() - log_before
            say(f"{feed.events:,} events and {feed.hits:,} hits in {took:.1f} s; waiting for the rest")
            for task in beside:
                task.cancel()
            for ended in await asyncio.gather(*beside, return_exceptions=True):
                if isinstance(ended, Exception):  # not the cancelling, which is none
                    raise ended
            begun = time.perf_counter()
            async with asyncio.timeout(_DRAIN_SECONDS):
                while await watch.look():  # noqa: ASYNC110  # it is another process that empties them
                    await asyncio.sleep(_LOOK_SECONDS)
            rest = time.perf_counter() - begun
            sweeps.is_last = True
            await sweeping
            swept_after = time.perf_counter() - begun
            statistics = await ask.statistics()
            spent = _cpu(writer.pid) - started[0], _cpu(server.pid) - started[1], place.cpu() - started[3]
            transactions = float(statistics["transactions"]) - started[2]
    finally:
        await redis.aclose()
        writer.terminate()
        await asyncio.to_thread(writer.join, 60)
        await server.stop()
    total = feed.events + feed.hits
    lags, opted_out = sorted(watch.lags), sorted(opt_outs.took)
    swept = int(float(statistics["swept_rows"]))
    return {
        "rows": rows,
        "expired": expired,
        "seconds": round(took, 2),
        "rate_asked": rate,
        "events": feed.events,
        "hits": feed.hits,
        "events_per_second": round(taken / took, 1),
        "all_taken": float(statistics["events"]) + float(statistics["hits"]) == total,
        "lag_p50": round(lags[len(lags) // 2], 2),
        "lag_max": round(lags[-1], 2),
        "metric_lag_max": round(watch.metric, 2),
        "rest_seconds": round(rest, 2),
        "writer_cpu_us": round(spent[0] / total * 1e6, 1),
        "valkey_cpu_us": round(spent[1] / total * 1e6, 1),
        "store_cpu_us": round(spent[2] / total * 1e6, 1),
        "transactions": int(transactions),
        "sweep_rounds": sweeps.done,
        "sweep_rest_seconds": round(swept_after, 2),
        "sweep_failures": int(float(statistics["sweep_failures"])),
        "swept_rows": swept,
        "opt_outs": len(opted_out),
        "opt_out_p50_ms": round(opted_out[len(opted_out) // 2], 1),
        "opt_out_p99_ms": round(opted_out[len(opted_out) * 99 // 100], 1),
        "opt_out_max_ms": round(opted_out[-1], 1),
        "bytes_per_event": round((place.bytes() - before) / total, 1),
        "wal_mib": round(wal / (1 << 20), 1),
        "fed_per_second": round(total / took, 1),
        "bar_met": swept >= expired
        and _meets(total / took if rate else taken / took, max(lags[-1], rest), rows, seconds),
    }


def _meets(rate: float, lag: float, rows: int, seconds: float) -> bool:
    """rate: what was taken; where a rate was asked for, what was fed, for no more than that can be taken, and the lag
    says whether it was. lag: the longest, that of what waited at the end too."""
    return rate >= BAR_RATE and lag < BAR_LAG and rows >= 5_000_000 and seconds >= 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__.partition("\n")[0])
    parser.add_argument("--store", choices=("sqlite", "postgres", "both"), default="both", help="default %(default)s")
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows in the ledger before (default %(default)s)")
    parser.add_argument(
        "--expired", type=int, default=100_000, help="rows that are over, to be swept meanwhile (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to feed (default %(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="events a second; 0: as many as are taken")
    parser.add_argument(
        "--days", type=int, default=30, help="days the rows before are spread over (default %(default)s)"
    )
    parser.add_argument("--json-only", action="store_true", help="nothing but the line of JSON")
    parser.add_argument("--bar", action="store_true", help="exit code 1 unless the bar is met (5 million rows, 60 s)")
    asked = parser.parse_args()

    def say(text: str) -> None:
        if not asked.json_only:
            print(f"  {text}", flush=True)

    figures: dict[str, dict[str, Any]] = {}
    for store in ("sqlite", "postgres") if asked.store == "both" else (asked.store,):
        say(store)
        folder = Path(tempfile.mkdtemp(prefix="sp-ledger-", dir="/tmp"))  # short: a socket's path has 104 bytes
        try:
            with _place(store, folder) as place:
                figures[store] = uvloop.run(
                    measure(place, folder, asked.rows, asked.expired, asked.seconds, asked.rate, asked.days, say)
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, sort_keys=True))
    good = all(told["all_taken"] and (told["bar_met"] or not asked.bar) for told in figures.values())
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
