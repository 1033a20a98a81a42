"""What signing costs: per message in a batch of eight, RSA alone and with Ed25519 beside it, and everything around it.

    python -m pytest benchmarks/test_sign.py

The RSA operation is the limit (decision 2); what sign_batch adds to it (body hash, fields, joining) must stay small.
"""

from __future__ import annotations

import timeit
from collections.abc import Sequence
from hashlib import sha256
from time import process_time

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from pytest_benchmark.fixture import BenchmarkFixture

from engine.message import OpenSSLSigner, Person, Program, Unsigned, compile_campaign, compose, sign_batch
from policy.gate import Permit
from tests.engine.newsletter import campaign, recipient

RSA = OpenSSLSigner("shop.example", "s", rsa.generate_private_key(65537, 2048))
ED = OpenSSLSigner("shop.example", "e", ed25519.Ed25519PrivateKey.generate())


class NoSigner:
    """Stands where the key stands, so that only the work around it is measured."""

    algorithm, domain, selector = "rsa-sha256", "shop.example", "s"

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        return [b"x" * 256] * len(digests)


@pytest.fixture(scope="module")
def batch() -> list[Unsigned]:
    program = compile_campaign(campaign())
    assert isinstance(program, Program)
    people = [Person(5, number, f"p{number}@example.com", recipient(number)) for number in range(8)]
    for who in people:
        who.optout_url, who.preferences_url = "https://t.example/u/x", "https://t.example/p/x"
    return [compose(Permit(5, who.mref, 0.0), program, who, 1_790_000_000_000_000) for who in people]


def test_rsa_batch_of_eight(benchmark: BenchmarkFixture, batch: list[Unsigned]) -> None:
    assert len(benchmark(sign_batch, batch, [RSA])) == 8


def test_rsa_and_ed25519_batch_of_eight(benchmark: BenchmarkFixture, batch: list[Unsigned]) -> None:
    assert len(benchmark(sign_batch, batch, [RSA, ED])) == 8


def test_around_the_signature(benchmark: BenchmarkFixture, batch: list[Unsigned]) -> None:
    assert len(benchmark(sign_batch, batch, [NoSigner()])) == 8


def test_what_we_add_is_small(batch: list[Unsigned]) -> None:
    digest = sha256(b"x").digest()
    around = min(timeit.repeat(lambda: sign_batch(batch, [NoSigner()]), timer=process_time, number=4, repeat=40)) / 32
    signing = min(timeit.repeat(lambda: RSA.sign([digest]), timer=process_time, number=25, repeat=40)) / 25
    print(f"\naround {around * 1e6:.0f} us a message, RSA-2048 {signing * 1e6:.0f} us")

    assert around / signing < 1 / 4
