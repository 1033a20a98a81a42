"""``make chaos-blocked``: 10,000 domains behind one provider that blocks us, and 100 domains that take everything.

    python -m tests.chaos.blocked [--domains 10000] [--free 12000]

Law: who waits for a blocked site costs the others nothing: the free domains keep 95 % of their throughput without it,
and the worker asks for leases that it cannot get less than 20 times a second.

Path: 1. a campaign to the free domains, alone, twice (the second is the measure); 2. one to the 10,000 domains, whose
provider greets with 421, and the free ones again while their site is being found out (told, not judged); 3. once every
lane waits there, the free ones twice more, the blocked 30,000 waiting in their lanes; 4. the figures, one line of JSON.

One run, one machine, ratios only: throughput is from the first to the last message of a campaign by the sink's clock.
Known limits: neighbours on the machine move single campaigns by several per cent, so the better of two is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from policy.vitals import read_all
from tests.chaos.sink_process import SinkProcess, sink_process
from tests.world.mail import MailWorld, job, mail_world

FREE_SITES, FREE_DOMAINS = 10, 100
EACH = 3  # people a blocked domain
KEPT, EMPTY = 0.95, 20.0


def statistics(mail: MailWorld) -> dict[str, float]:
    [engine] = [sign for sign in read_all(mail.folder) if sign.role == "engine"]
    return {name: value for name, value in engine.numbers.items() if isinstance(value, int | float)}


async def campaign(mail: MailWorld, name: str, people: list[dict[str, Any]]) -> float:
    """Messages a second of the free sites, from the first to the last."""
    before = await mail.sink_counts()
    began = time.time()
    await mail.submit(job(name), people)
    status = await mail.finished(name, 300)
    assert status.counts.get("delivered") == len(people), status
    counts = await mail.sink_counts()
    taken: int = sum(counts[site]["accepted"] - before[site]["accepted"] for site in counts)
    assert taken == len(people)
    last: float = max(counts[site]["last_at"] for site in counts)
    return taken / (last - began)


def free(count: int, start: int) -> list[dict[str, Any]]:
    return [
        {"address": f"p{i}@d{i % FREE_DOMAINS}.free{i % FREE_SITES}.test", "fields": {"name": f"Person {i}"}}
        for i in range(start, start + count)
    ]


async def all_wait(mail: MailWorld, people: int) -> None:
    """Until every blocked recipient is in a lane of the site, none of a site unknown."""
    async with asyncio.timeout(300):
        while True:
            figures = statistics(mail)
            if figures["sites_backing_off"] and figures["recipients_in_stock"] == 0 and figures["slices_in_hand"] == 0:
                unknown = 0
                async for key in mail.policy.redis.scan_iter(match="sp:*:[dD]:[?]", count=1000):
                    unknown += await mail.policy.redis.zcard(key)
                if not unknown:
                    return
            await asyncio.sleep(0.2)


async def measure(options: argparse.Namespace, mail: MailWorld, sink: SinkProcess) -> dict[str, Any]:
    def say(text: str) -> None:
        print(text, flush=True)

    await mail.start_worker()
    alone = [await campaign(mail, f"alone-{n}", free(options.free, n * options.free)) for n in range(2)]
    say(f"alone: {alone[0]:,.0f} and {alone[1]:,.0f} messages a second")
    hosted = [
        {"address": f"p{n}@d{d}.blocked.test", "fields": {"name": f"Person {n}"}}
        for n in range(EACH)
        for d in range(options.domains)
    ]
    await mail.submit(job("hosted"), hosted)
    meanwhile = await campaign(mail, "meanwhile", free(options.free, 10**6))
    say(f"while the blocked site is found out: {meanwhile:,.0f}")
    await all_wait(mail, len(hosted))
    await asyncio.sleep(3)  # the vitals of the last second are written
    before, at = statistics(mail), time.monotonic()
    beside = [await campaign(mail, f"beside-{n}", free(options.free, 10**7 + n * options.free)) for n in range(2)]
    busy, busy_seconds = statistics(mail), time.monotonic() - at
    await asyncio.sleep(10)  # nothing to do but the blocked ones: a measuring time, not a synchronisation
    after, seconds = statistics(mail), time.monotonic() - at
    waiting = mail.policy.reader.job_status("hosted", mail.policy.clock())
    assert waiting is not None
    empty = (after["lease_calls_empty"] - before["lease_calls_empty"]) / seconds
    return {
        "alone": [round(one) for one in alone],
        "meanwhile": round(meanwhile),
        "beside": [round(one) for one in beside],
        "kept": round(max(beside) / max(alone), 3),
        "kept_meanwhile": round(meanwhile / max(alone), 3),
        "empty_leases_a_second": round(empty, 1),
        "empty_leases_a_second_busy": round(
            (busy["lease_calls_empty"] - before["lease_calls_empty"]) / busy_seconds, 1
        ),
        "blocked_domains": options.domains,
        "blocked_waiting": waiting.waiting,
        "blocked_connections": (await sink.counts())["blocked"]["connections"],
        "free_domains": FREE_DOMAINS,
    }


async def run(options: argparse.Namespace, folder: Path) -> int:
    providers = [f"accept:0:name=free{n}" for n in range(FREE_SITES)]
    async with sink_process(folder, {"blocked": "greet.421"}) as sink:
        async with mail_world(
            *providers, others={"blocked": sink.ports["blocked"]}, sink_options=("--keep", "0")
        ) as mail:
            # a provider that blocks is asked again after seconds here and after half an hour in earnest
            text = mail.config.read_text()
            for name, usual, here in (("back_off", "0.3", 5), ("back_off_cap", "1", 20), ("block_back_off", "0.3", 10)):
                text = text.replace(f"\n{name} = {usual}\n", f"\n{name} = {here}\n")
            mail.config.write_text(text)
            figures = await measure(options, mail, sink)
    figures["broken"] = [
        name
        for name, is_broken in (
            ("kept", figures["kept"] < KEPT),
            ("empty_leases_a_second", figures["empty_leases_a_second"] >= EMPTY),
            ("blocked_waiting", figures["blocked_waiting"] != EACH * options.domains),
        )
        if is_broken
    ]
    print(json.dumps({"benchmark": "blocked", **figures}))
    return int(bool(figures["broken"]))


def main() -> int:
    import tempfile

    parser = argparse.ArgumentParser(prog="python -m tests.chaos.blocked", description="one blocked provider")
    parser.add_argument("--domains", type=int, default=10_000, help="domains behind the blocked provider")
    parser.add_argument("--free", type=int, default=12_000, help="recipients of each campaign to the free ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp") as folder:
        return asyncio.run(run(options, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
