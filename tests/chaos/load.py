"""The producer: hands in jobs of every kind under fire, and keeps its own ledger of what was acknowledged.

    python -m tests.chaos.load sales-push.toml jobs.jsonl --seed 1 --seconds 60

A line ``job`` is written before a job is submitted, a line ``ack`` after `submit` returned (T0); a job that the store
did not take is submitted again under its id until it is. SIGTERM: what was begun is finished, then it ends with 0.

What it sends, in turns: campaigns that hold and mail that is sent again when in doubt; big domains, a site that takes
two seconds a message, a long tail of domains with one person each, a site with a rate, and recipients for whom the sink
has a script (deferred once, refused, dropped behind the dot); duplicates and rows that are no address among them.

Known limits: one job at a time; people come back in later jobs, so whoever was suppressed is refused there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis.exceptions

from engine.client import AsyncProducer
from policy.instants import rfc3339
from policy.settings import PolicySettings, load
from tests.chaos.world import ACCOUNT, SENDER

POOL = 3000  # people a domain
TINY = 4000  # domains of the long tail
BEHAVIOURS = (
    "rcpt.450+first.1",
    "rcpt.452+first.2",
    "rcpt.550",
    "dot.451+first.1",
    "dot.550",
    "dot.close",
    "dot.close.stored",
    "dot.late.300ms",
)
PAUSE = 0.5  # s between two jobs
_RETRY = 0.2


def template(job_id: str, **more: Any) -> dict[str, Any]:
    """A job in the words of the producer contract."""
    return {
        "v": 1,
        "job_id": job_id,
        "created_at": rfc3339(time.time_ns() // 1000),
        "account": ACCOUNT,
        "from": {"name": "The Letter", "address": f"hello@{SENDER}"},
        "subject": "Hello {{ name }}",
        "html": "<p>Dear {{ name }}, number {{ number }}: "
        '<a href="https://shop.example/a">look</a> {{ postal_address }}</p>',
        "postal_address": "1 High Street",
        "legal_basis": {"basis": "existing-customer"},
        **more,
    }


def campaign(job_id: str, in_doubt: str = "hold", **more: Any) -> dict[str, Any]:
    html = (
        '<p>Dear {{ name }}, number {{ number }}: <a href="https://shop.example/a">look</a> '
        '<a href="{{ unsubscribe_url }}">unsubscribe</a> {{ postal_address }}</p>'
    )
    return template(job_id, kind="campaign", list="letter", html=html, in_doubt=in_doubt, **more)


def mail(job_id: str, **more: Any) -> dict[str, Any]:
    """Transactional: `resend` is its default."""
    return template(job_id, kind="transactional", **more)


def people(addresses: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each address."""
    return [
        {"address": address, "fields": {"name": f"P {address.partition('@')[0]}", "number": place}}
        for place, address in enumerate(addresses)
    ]


def at(domain: str, numbers: Sequence[int]) -> list[str]:
    return [f"p{number}@{domain}" for number in numbers]


def stream_of_jobs(seed: int, scale: float = 1.0) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Without end: (job, rows). The same seed, the same jobs."""
    chance = random.Random(seed)

    def some(count: int) -> list[int]:
        return chance.sample(range(POOL), max(1, round(count * scale)))

    turn = 0
    while True:
        turn += 1
        name = f"s{seed}-{turn}"
        big = [address for domain in ("a", "b", "c") for address in at(f"{domain}.fast.test", some(20))]
        big += [big[0].upper().replace("P", "p", 1), "no address"]
        chance.shuffle(big)
        yield campaign(f"{name}-big"), people(big)
        yield mail(f"{name}-mail"), people(at("a.fast.test", some(20)))
        yield campaign(f"{name}-slow"), people(at("a.slow.test", some(2)) + at("b.slow.test", some(1)))
        tiny = [f"p{n % 7}@t{n}.tail.test" for n in chance.sample(range(TINY), max(1, round(40 * scale)))]
        yield campaign(f"{name}-tail", in_doubt=chance.choice(("hold", "resend"))), people(tiny)
        yield campaign(f"{name}-paced"), people(at("a.paced.test", some(40)))
        scripts = [f"p{number}+{chance.choice(BEHAVIOURS)}@x.odd.test" for number in some(10)]
        odd = mail(f"{name}-odd") if turn % 2 else campaign(f"{name}-odd")
        yield odd, people(scripts)


class Book:
    """The producer's own ledger, a line of JSON for each thing, on its way to the disk before anything else happens."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def say(self, **line: Any) -> None:
        os.write(self._handle, json.dumps({**line, "t": time.monotonic()}).encode() + b"\n")

    def close(self) -> None:
        os.close(self._handle)


async def submit(url: str, book: Book, job: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Until it is acknowledged, however often Redis goes away meanwhile."""
    in_doubt = job.get("in_doubt") or ("hold" if job["kind"] == "campaign" else "resend")
    book.say(k="job", job_id=job["job_id"], in_doubt=in_doubt, rows=rows, job=job)
    while True:
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            async with AsyncProducer(url) as producer:
                await producer.submit(job, rows)
            break
        await asyncio.sleep(_RETRY)
    book.say(k="ack", job_id=job["job_id"])


async def produce(url: str, path: Path, seed: int, seconds: float, scale: float) -> int:
    """How many jobs were acknowledged."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    book = Book(path)
    began, count = time.monotonic(), 0
    for job, rows in stream_of_jobs(seed, scale):
        if stopped.is_set() or time.monotonic() - began > seconds:
            break
        await submit(url, book, job, rows)
        count += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), PAUSE)
    book.close()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.load", description="jobs under fire")
    parser.add_argument("config", type=Path)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the jobs")
    options = parser.parse_args()
    url = load(PolicySettings, options.config).redis_address()
    asyncio.run(produce(url, options.ledger, options.seed, options.seconds, options.scale))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
