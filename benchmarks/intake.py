"""What intake costs the worker, with its I/O: from an entry of the stream to slices on lanes; last, one line of JSON.

    python -m benchmarks.intake [--recipients N]

A Valkey and a policy writer of their own (the writer in a process of its own, as in production), the audience of the
rehearsals, one `Intake` in this process. us_per_recipient is CPU time of this process: every thread of it, so the
reader's SQL counts, and other load on the machine does not; writer_us_per_recipient that of the writer, whose pages
are what a person costs there. benchmarks/test_expand.py measures the part that awaits nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from engine.campaign.intake import Intake
from engine.client import AsyncProducer
from engine.queue.lanes import Lanes
from engine.rehearsal import campaigns
from engine.rehearsal.machine import cpu_seconds
from engine.rehearsal.setting import ACCOUNT, DOMAIN, POSTAL, SENDER
from policy import keyspace
from policy.instants import week_of
from policy.keys import Keyring
from policy.schema import open_store
from policy.settings import Officer, PolicySettings
from policy.valkey import connect
from policy.wire import WriterClient, WriterUnavailable
from policy.writer import Writer
from tests.world.valkey_server import running_valkey


def _settings(folder: Path, url: str) -> PolicySettings:
    officer = Officer(name="DPO", address=f"dpo@{DOMAIN}")
    return PolicySettings(officer=officer, data_dir=folder, redis_url=url, bounce_domain=f"bounce.{DOMAIN}")


async def _write(folder: Path, url: str) -> None:
    """The policy writer, until its standard input ends."""
    settings = _settings(folder, url)
    writer = Writer(settings, Keyring.load(settings.keys_dir))
    await writer.start()
    try:
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await writer.stop()


async def _ready(writer: WriterClient) -> None:
    for _ in range(400):
        try:
            await writer.ping()
        except WriterUnavailable:
            await asyncio.sleep(0.02)
        else:
            return
    raise SystemExit("the writer does not answer")


def _cpu_of(pid: int) -> float:
    return sum(cpu_seconds(pid).values())


async def measure(folder: Path, url: str, recipients: int) -> dict[str, Any]:
    """CPU of this process from the first entry that is read to the last put."""
    settings = _settings(folder, url)
    keyring = Keyring.create(settings.keys_dir, week_of(time.time_ns() // 1000))
    command = [sys.executable, "-m", "benchmarks.intake", "--write", str(folder), "--url", url]
    child = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
    redis, writer = connect(url), WriterClient(settings.writer_socket)
    store = None
    try:
        await _ready(writer)
        await writer.account_add(ACCOUNT, display_name=SENDER, postal_address=POSTAL, opens_mode=3, clicks_mode=3)
        store = open_store(settings.sql_address(), writer=False)
        intake = Intake(
            redis, Lanes(redis, "bench"), writer, store, lambda: keyring, lambda: {DOMAIN}, "bench", {}
        )  # fmt: skip
        await intake.prepare()
        audience = campaigns.Audience(recipients)
        async with AsyncProducer(url, intake_key=keyring.intake_public) as producer:
            await producer.submit(campaigns.first("bench"), audience)
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # as engine.worker does
        began, writer_began = time.process_time(), _cpu_of(child.pid)
        while intake.counts.rows < recipients or await redis.xlen(keyspace.INTAKE):
            await intake.step(block=0.05)
        spent, writer_spent = time.process_time() - began, _cpu_of(child.pid) - writer_began
        counts = intake.counts
    finally:
        await writer.close()
        await redis.aclose()
        if store is not None:
            store.dispose()
        assert child.stdin is not None
        child.stdin.close()
        await asyncio.wait_for(child.wait(), 30.0)
    return {
        "recipients": recipients,
        "us_per_recipient": round(spent / recipients * 1e6, 2),
        "writer_us_per_recipient": round(writer_spent / recipients * 1e6, 2),
        "rows": counts.rows,
        "refused": counts.refused,
        "ok": counts.rows == recipients and counts.rejected == 0 and counts.failures == 0,
    }


def main() -> int:
    """Exit code 1 when rows were lost on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipients", type=int, default=20_000)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.write is not None:
        uvloop.run(_write(chosen.write, chosen.url))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="sp-intake-"))
    try:
        with running_valkey() as server:
            figures = uvloop.run(measure(folder, server.url, chosen.recipients))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
