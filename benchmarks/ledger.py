"""How many events a second the ledger takes once it is large; last, one line of JSON.

    python -m benchmarks.ledger [--rows N] [--seconds S] [--rate R] [--days D] [--json-only] [--bar]

    1. `prefill`   N rows of the ledger with all their indexes: jobs of 100,000 over the last D days
    2. `Feed`      deliveries (a tenth put off) and hits of readers (a fifth as many; half of them only counted) into a
                   real Valkey with ``appendfsync always``, S seconds long
    3. the real writer (`policy.writer.serve`) in a process of its own drains them into a real SQLite file
    4. after the last event: how long until the streams are empty, how large the file has become

Without --rate as many events as the writer takes: never more than `AHEAD` wait. With it so many a second, whatever
waits. Half of the deliveries go to five providers, 32 at a time, half to a tail of 3,000 domains by twos.

Lag is measured from outside, five times a second: Redis TIME against the id of the oldest entry of any stream (what is
committed is trimmed); `metric_lag_max` is what the writer says of it itself. CPU is process time of the writer and of
the server, so other load on the machine does not count; events a second and lag are wall time and do drift with it.

--bar: exit code 1 unless 10,000 events a second were taken (with --rate: fed, and all of it taken in the end) and
nobody waited for five seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from policy import keyspace, statements
from policy.events import Batch, Event, Hit, Kind, Reason, encode_batch, encode_hits
from policy.gate import Mode
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.schema import open_store, upgrade
from policy.settings import Officer, PolicySettings
from policy.valkey import Client, EmbeddedServer, connect
from policy.wire import WriterClient
from policy.writer import clock_us, serve

AHEAD: Final = 20_000  # events waiting at most, without --rate: two seconds at the bar's rate
BAR_RATE: Final = 10_000.0
BAR_LAG: Final = 5.0
_JOB_ROWS: Final = 100_000
_ROUND: Final = 2_000  # events a pipeline
_LOOK_SECONDS: Final = 0.2
_DRAIN_SECONDS: Final = 120.0  # how long the rest may take

Say = Callable[[str], None]


def _references(count: int) -> list[int]:
    """Random signed 64-bit numbers."""
    raw = os.urandom(8 * count)
    return [int.from_bytes(raw[at : at + 8], "big", signed=True) for at in range(0, len(raw), 8)]


def prefill(url: str, rows: int, days: int, now: int, say: Say) -> int:
    """Rows as the drains leave them, jobs in order of their days; the number of the first job that is free.

    Indexes are there from the first row on, as in life. What only a power cut or a thief could tell is off meanwhile
    (syncs, wiping of free pages): the writer that is measured opens the file anew, with both."""
    engine = open_store(url, writer=True)
    upgrade(engine)
    with engine.connect() as conn:
        conn.exec_driver_sql("COMMIT")
        conn.exec_driver_sql("PRAGMA synchronous=OFF")
        conn.exec_driver_sql("PRAGMA secure_delete=OFF")
    columns = "job, mref, kind, reason, domain, code, enhanced, attempts, at, day, pseudonym, tag_sealed, tls, note"
    sql = statements.insert("sqlite", "message", columns)
    jobs = -(-rows // _JOB_ROWS)
    for number in range(jobs):
        count = min(_JOB_ROWS, rows - number * _JOB_ROWS)
        at = now - (jobs - number) * days * DAY_US // max(jobs, 1)
        sealed = os.urandom(40 * count)
        some = [
            (number + 1, mref, 1, 0, 1 + n % 3000, 250, "2.0.0", 1, at, at // DAY_US, pseudonym & (1 << 63) - 1,
             sealed[40 * n : 40 * n + 40], 3, None)
            for n, (mref, pseudonym) in enumerate(zip(sorted(_references(count)), _references(count), strict=True))
        ]  # fmt: skip
        with engine.begin() as conn:
            conn.exec_driver_sql(sql, some)
        if number % 10 == 9:
            say(f"{(number + 1) * _JOB_ROWS:,} rows")
    with engine.connect() as conn:
        conn.exec_driver_sql("COMMIT")
        conn.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return jobs + 1


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


def _writer(settings: PolicySettings) -> None:
    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await serve(settings, stop)

    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # its log is not wanted, for as long as it lives
    uvloop.run(run())


def _cpu(pid: int) -> float:
    """Seconds of CPU a process has used (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _bytes(database: Path) -> int:
    return sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*"))


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


async def measure(folder: Path, rows: int, seconds: float, rate: float, days: int, say: Say) -> dict[str, Any]:
    """The figures of one run."""
    now = clock_us()
    database = folder / "data" / "policy.db"
    database.parent.mkdir(mode=0o700)
    Keyring.create(folder / "keys", week_of(now))
    job = await asyncio.to_thread(prefill, f"sqlite:///{database}", rows, days, now, say)
    before = _bytes(database)
    server = EmbeddedServer(folder / "redis")
    server.start()
    await server.wait_ready()
    officer = Officer(name="Benchmark", address="privacy@example.com")
    settings = PolicySettings(officer=officer, data_dir=database.parent, keys_dir=folder / "keys", redis_url=server.url)
    writer = multiprocessing.get_context("spawn").Process(target=_writer, args=(settings,))
    writer.start()
    redis = connect(server.url)
    try:
        async with WriterClient(settings.writer_socket, timeout=60.0) as ask:
            while not settings.writer_socket.exists():
                if writer.exitcode is not None:
                    raise RuntimeError(f"the writer ended with {writer.exitcode}")
                await asyncio.sleep(0.05)
            await ask.ping()
            assert writer.pid is not None
            feed, watch = Feed(redis, job), Watch(redis, ask)
            started = _cpu(writer.pid), _cpu(server.pid), float((await ask.statistics())["transactions"])
            looking = asyncio.create_task(watch.go_on())
            took = await _fed(feed, watch, seconds, rate)
            taken = watch.taken
            wal = _bytes(database) - database.stat().st_size
            say(f"{feed.events:,} events and {feed.hits:,} hits in {took:.1f} s; waiting for the rest")
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            begun = time.perf_counter()
            async with asyncio.timeout(_DRAIN_SECONDS):
                while await watch.look():  # noqa: ASYNC110  # it is another process that empties them
                    await asyncio.sleep(_LOOK_SECONDS)
            rest = time.perf_counter() - begun
            statistics = await ask.statistics()
            spent = _cpu(writer.pid) - started[0], _cpu(server.pid) - started[1]
            transactions = float(statistics["transactions"]) - started[2]
    finally:
        await redis.aclose()
        writer.terminate()
        await asyncio.to_thread(writer.join, 60)
        await server.stop()
    total = feed.events + feed.hits
    lags = sorted(watch.lags)
    return {
        "rows": rows,
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
        "transactions": int(transactions),
        "bytes_per_event": round((_bytes(database) - before) / total, 1),
        "wal_mib": round(wal / (1 << 20), 1),
        "fed_per_second": round(total / took, 1),
        "bar_met": _meets(total / took if rate else taken / took, max(lags[-1], rest), rows, seconds),
    }


def _meets(rate: float, lag: float, rows: int, seconds: float) -> bool:
    """rate: what was taken; where a rate was asked for, what was fed, for no more than that can be taken, and the lag
    says whether it was. lag: the longest, that of what waited at the end too."""
    return rate >= BAR_RATE and lag < BAR_LAG and rows >= 5_000_000 and seconds >= 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows in the ledger before (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to feed (default %(default)s)")
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

    folder = Path(tempfile.mkdtemp(prefix="sp-ledger-", dir="/tmp"))  # short: a socket's path has 104 bytes
    try:
        figures = uvloop.run(measure(folder, asked.rows, asked.seconds, asked.rate, asked.days, say))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures, sort_keys=True))
    return 0 if figures["all_taken"] and (figures["bar_met"] or not asked.bar) else 1


if __name__ == "__main__":
    raise SystemExit(main())
