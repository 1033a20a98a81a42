"""CPU of expansion per recipient, everything the worker does itself: rows read, keyed, decided, sealed, encoded.

The aim of the worker is 25 us with its I/O, which benchmarks/intake.py measures.
The audience is the demo's kind: many people at few providers and a tail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from pytest_benchmark.fixture import BenchmarkFixture

from engine.campaign import expand
from engine.campaign.validation import read_row
from policy.gate import Mode
from policy.keys import Keyring
from policy.wire import Resolved

NOW = 1_795_000_000_000_000
YES = {"source": "signup form", "time": "2026-03-01T10:00:00Z", "wording": "letter-v2"}


def _lines(count: int) -> list[bytes]:
    domains = [f"mail{n}.posthaus.example" for n in range(12)]
    rows: list[dict[str, Any]] = [
        {
            "address": f"person.number{n}@{domains[n % 12] if n % 10 else f'own{n}.example'}",
            "name": f"Name {n}",
            "fields": {"city": "Graz", "points": n, "member": n % 3 == 0, "offers": ["tea", "walk", "bread"]},
            "consent": {"mail_marketing": YES, **({"open_tracking": YES} if n % 2 else {})},
        }
        for n in range(count)
    ]
    return [msgspec.json.encode(row) for row in rows]


def test_expansion_of_a_thousand_rows(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "keys", 2967)
    lines = _lines(1000)
    terms = expand.Terms(
        job=1, account=1, list_number=1, topic_number=0, job_key=b"k" * 32, expires_at=NOW, needs_consent=True,
        opens=Mode.INDIVIDUAL, clicks=Mode.INDIVIDUAL, columns=frozenset({"name", "city", "points", "offers"}),
        required=frozenset({"name", "city"}), one_line=frozenset({"name"}),
    )  # fmt: skip

    def chunk() -> int:
        prepared = expand.prepare(terms, keyring, 0, [read_row(line) for line in lines], 0, NOW)
        facts = {q.partition: bytes(len(q.rows)) for q in expand.questions(terms, keyring, prepared)}
        permitted = expand.decide(terms, prepared, facts, {}, 1.0)
        expand.number(permitted, [Resolved(n + 1, n + 1) for n in range(len(permitted))])
        expand.evidence(permitted, {})
        return sum(len(share.slices) for share in expand.shares(terms, keyring, prepared))

    made = benchmark(chunk)
    assert made > 100
    benchmark.extra_info["us_per_recipient"] = benchmark.stats.stats.mean * 1e3 if benchmark.stats else 0.0
