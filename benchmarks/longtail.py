"""The long tail: the newsletter to many domains on few MX sets, beside the same to 20 domains, in one run.

    python -m benchmarks.longtail [--recipients 20000] [--domains 8000] [--mx-sets 200] [--pairs 1] [--sites] [--full]

1. `benchmarks.unbound` answers for every domain with the MX of its set, and for every MX host with loopback, where our
   sink listens; the engine is told of it by [engine.dns] servers and mx_port, and otherwise works as it always does.
2. In turn, so that a machine that drifts drifts for both: `sales-push bench` with 20 domains (routes, no DNS), and with
   the domains asked for. --pairs of them; the figures are medians.
3. --sites: once more with an MX set for each domain, so that each is a site: paced, permitted and connected for itself.

--full is the size of issue 4: 100,000 recipients over 40,000 domains on 200 MX sets.

The last line is JSON: twenty_domains_rate, longtail_rate, many_sites_rate (messages a second by the sink's count; null
without --sites), ratio (long tail over twenty), rsa_share and cpu_us_by_part of each (CPU microseconds a message;
``unbound`` and ``sink`` among them), dns_questions (of the long tail, by unbound's count) and rsa_us.
Exit code 1 when a run lost somebody.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.unbound import NoUnbound, program, unbound
from engine.rehearsal.bench import Plan, figures, provider, run
from engine.rehearsal.screen import Screen
from engine.rehearsal.stage import StageError

LOOPBACK = "127.0.0.1"
FULL = {"recipients": 100_000, "domains": 40_000, "mx_sets": 200}


def tail_names(domains: int, sets: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """MX hosts by domain (two a set, the second less preferred) and their addresses."""
    hosts = [[f"mx{which}.set{number}.test" for which in (1, 2)] for number in range(sets)]
    mx = {domain: hosts[place % sets] for place, domain in enumerate(provider(domains).domains)}
    return mx, {host: LOOPBACK for pair in hosts for host in pair}


async def tail(plan: Plan, domains: int, sets: int, screen: Screen) -> dict[str, Any]:
    """Figures of a run whose domains are asked for. Raises NoUnbound, StageError."""
    with tempfile.TemporaryDirectory(prefix="sales-push-tail-") as folder:
        with unbound(Path(folder), *tail_names(domains, sets)) as resolver:
            asking = dataclasses.replace(plan, domains=domains, resolver=resolver.address)
            before = resolver.cpu_seconds()
            told = figures(asking, await run(asking, plan.recipients[0], screen))
            spent = resolver.cpu_seconds() - before
        told["cpu_us_by_part"]["unbound"] = round(spent / max(1, told["sink_count"]) * 1e6, 1)
        told["dns_questions"] = resolver.questions
    return told


async def play(asked: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    plan = Plan(recipients=(asked.recipients,), workers=asked.workers, fast=asked.fast)
    twenty: list[dict[str, Any]] = []
    long: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    for _ in range(asked.pairs):
        if not asked.tail_only:
            twenty.append(_said(screen, "20 domains", figures(plan, await run(plan, asked.recipients, screen))))
        long.append(
            _said(
                screen, f"{asked.domains:,} domains on {asked.mx_sets:,} MX sets",
                await tail(plan, asked.domains, asked.mx_sets, screen),
            )
        )  # fmt: skip
    if asked.sites:
        many.append(_said(screen, f"{asked.domains:,} sites", await tail(plan, asked.domains, asked.domains, screen)))
    rates = [_median(runs, "messages_per_second") for runs in (twenty, long, many)]
    return {
        "recipients": asked.recipients,
        "domains": asked.domains,
        "mx_sets": asked.mx_sets,
        "twenty_domains_rate": rates[0],
        "longtail_rate": rates[1],
        "many_sites_rate": rates[2],
        "ratio": round(rates[1] / rates[0], 3) if rates[0] and rates[1] else None,
        "rsa_share": {"twenty": _median(twenty, "rsa_share"), "longtail": _median(long, "rsa_share")},
        "rsa_us": _median([*twenty, *long], "rsa_us"),
        "cpu_us_by_part": {
            name: _parts(runs) for name, runs in (("twenty", twenty), ("longtail", long), ("many_sites", many)) if runs
        },
        "dns_questions": _median(long, "dns_questions"),
        "dns_questions_many_sites": _median(many, "dns_questions"),
        "ok": all(one["ok"] for one in (*twenty, *long, *many)),
    }


def _said(screen: Screen, what: str, told: dict[str, Any]) -> dict[str, Any]:
    parts = {**told["cpu_us_by_part"], "sink": told["sink_cpu_us"]}
    screen.act(
        f"{what}: {told['messages_per_second']:,.0f} messages/s, {told['rsa_share']:.3f} of RSA; CPU µs a message: "
        + ", ".join(f"{part} {value:,.0f}" for part, value in parts.items())
        + (f"; {told['dns_questions']:,} questions" if "dns_questions" in told else "")
    )
    return told


def _median(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    return round(statistics.median(one[key] for one in runs), 4) if runs else None


def _parts(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    parts = [{**one["cpu_us_by_part"], "sink": one["sink_cpu_us"]} for one in runs]
    names = sorted({name for one in parts for name in one})
    return {name: round(statistics.median(one.get(name, 0.0) for one in parts), 1) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longtail", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipients", type=int, default=20_000, help="messages a run (default: 20000)")
    parser.add_argument("--domains", type=int, default=8_000, help="of the long tail (default: 8000)")
    parser.add_argument("--mx-sets", type=int, default=200, help="the domains share (default: 200)")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each, in turn (default: 1)")
    parser.add_argument("--sites", action="store_true", help="a second line: each domain has an MX set of its own")
    parser.add_argument("--full", action="store_true", help="the size of issue 4: 100,000 over 40,000 on 200")
    parser.add_argument("--workers", type=int, default=0, help="default: one a core")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=None, help="multi-buffer RSA")
    parser.add_argument("--tail-only", action="store_true", help="leave the 20 domains out, to look at the tail")
    asked = parser.parse_args(arguments)
    if asked.full:
        for name, value in FULL.items():
            setattr(asked, name, value)
    screen = Screen(Console(stderr=True))
    try:
        program()
        told = asyncio.run(play(asked, screen))
    except (NoUnbound, StageError) as error:
        print(f"longtail: {error}", file=sys.stderr)
        return 1
    print(json.dumps(told))
    return 0 if told["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
