"""What one recipient costs before the signature: 34 kB, 51 slots, 25 links (design decision 1 measured 37 us, hash in).

    python -m pytest benchmarks/test_compose.py

The assertion is a ratio within the same run, since shared machines drift: composing must stay below a third of one
RSA-2048 signature by the same core (80 us against about 276).
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pytest_benchmark.fixture import BenchmarkFixture

from engine.message import OpenSSLSigner, Person, Problem, Program, compile_campaign, compose, person
from engine.message.acceptance import _compile
from policy.gate import Mode, Permit
from tests.engine.newsletter import campaign, recipient
from tracker.links import Links

LINKS = Links({1: bytes(range(32))}, 1, "https://track.shop.example")
DATE = 1_790_000_000_000_000


@pytest.fixture(scope="module")
def program() -> Program:
    compiled = compile_campaign(campaign())
    assert isinstance(compiled, Program)
    return compiled


def somebody(program: Program) -> Person:
    return person(
        LINKS, program, job=5, mref=7, subject=99, address="joe@example.com", fields=recipient(3), list_number=3,
        partition=2, tag=b"t" * 12, optout_domain="bounce.example", mode_opens=Mode.INDIVIDUAL,
        mode_clicks=Mode.INDIVIDUAL,
    )  # fmt: skip


def cost(action: Callable[[], object]) -> float:
    """Seconds of CPU of one call: the quietest of forty short rounds, so that neighbours on the machine matter less."""
    return min(timeit.repeat(action, timer=time.process_time, number=25, repeat=40)) / 25


def test_compose(benchmark: BenchmarkFixture, program: Program) -> None:
    who, permit = somebody(program), Permit(5, 7, 0.0)
    unsigned = benchmark(compose, permit, program, who, DATE)

    assert 30_000 < len(unsigned.body) < 36_000


def test_tokens(benchmark: BenchmarkFixture, program: Program) -> None:
    """The three tokens of a recipient and the Person that holds them (12 us of AES-SIV and base32 in the budget)."""
    assert benchmark(somebody, program).pixel_url


def test_hash(benchmark: BenchmarkFixture, program: Program) -> None:
    """The body hash, which sign_batch makes (without the GIL)."""
    body = compose(Permit(5, 7, 0.0), program, somebody(program), DATE).body
    benchmark(lambda: sha256(body).digest())


def test_compile(benchmark: BenchmarkFixture) -> None:
    """Once per campaign and process."""

    def fresh() -> Program | list[Problem]:
        _compile.cache_clear()
        return compile_campaign(campaign())

    assert isinstance(benchmark(fresh), Program)


def test_compose_beside_the_signature(program: Program) -> None:
    who, permit = somebody(program), Permit(5, 7, 0.0)
    signer = OpenSSLSigner("shop.example", "s", rsa.generate_private_key(65537, 2048))
    digest = sha256(b"x").digest()
    composing = cost(lambda: compose(permit, program, who, DATE))
    hashing = cost(lambda: sha256(b"x" * 34_000).digest())
    signing = cost(lambda: signer.sign([digest]))
    print(f"\ncompose {composing * 1e6:.0f} us, hash {hashing * 1e6:.0f} us, RSA-2048 {signing * 1e6:.0f} us")

    assert (composing + hashing) / signing < 1 / 3
