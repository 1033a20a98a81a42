"""What signing costs: per message in a batch of eight, RSA alone and with Ed25519 beside it, and everything around it.

    python -m pytest benchmarks/test_sign.py                  with the extra `fast`: -s prints both implementations
    python -m pytest benchmarks/test_sign.py -m "not fast"    without it

The RSA operation is the limit (decision 2); what sign_batch adds to it (body hash, fields, joining) must stay small.
"""

from __future__ import annotations

import timeit
from collections.abc import Sequence
from hashlib import sha256
from time import process_time, thread_time

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from pytest_benchmark.fixture import BenchmarkFixture

from engine.message import OpenSSLSigner, Person, Program, Unsigned, compile_campaign, compose, sign_batch
from engine.message.multibuffer import MultiBufferSigner, accelerate, open_library
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


@pytest.fixture(scope="module")
def fast() -> list[MultiBufferSigner]:
    """The same two keys by lanes."""
    library = open_library()
    return [accelerate(signer, library, thread_time) for signer in (RSA, ED)]


@pytest.mark.fast
def test_rsa_batch_of_eight_by_lanes(
    benchmark: BenchmarkFixture, batch: list[Unsigned], fast: list[MultiBufferSigner]
) -> None:
    assert len(benchmark(sign_batch, batch, fast[:1])) == 8


@pytest.mark.fast
def test_rsa_and_ed25519_batch_of_eight_by_lanes(
    benchmark: BenchmarkFixture, batch: list[Unsigned], fast: list[MultiBufferSigner]
) -> None:
    assert len(benchmark(sign_batch, batch, fast)) == 8


@pytest.mark.fast
@pytest.mark.parametrize("place", [0, 1], ids=["rsa-2048", "ed25519"])
def test_lanes_beside_openssl(fast: list[MultiBufferSigner], place: int) -> None:
    """CPU per signature by the number of digests in a call, in turns, so that a neighbour disturbs both. Where the
    signer itself goes to OpenSSL (RSA: fewer than five), both columns are OpenSSL."""
    digests = [sha256(b"%d" % number).digest() for number in range(16)]
    ratios: dict[int, float] = {}
    for count in (1, 4, 5, 8, 13, 16):
        given = digests[:count]
        best = {signer: float("inf") for signer in (fast[place], (RSA, ED)[place])}
        for _ in range(20):
            for signer in best:
                best[signer] = min(best[signer], timeit.timeit(lambda: signer.sign(given), process_time, number=2) / 2)  # noqa: B023
        lanes, alone = (1e6 * seconds / count for seconds in best.values())
        print(f"\n{fast[place].algorithm}, {count} at once: {lanes:.1f} us a signature, OpenSSL {alone:.1f}")
        ratios[count] = lanes / alone

    assert ratios[8] < 3 / 4


def test_what_we_add_is_small(batch: list[Unsigned]) -> None:
    digest = sha256(b"x").digest()
    around = min(timeit.repeat(lambda: sign_batch(batch, [NoSigner()]), timer=process_time, number=4, repeat=40)) / 32
    signing = min(timeit.repeat(lambda: RSA.sign([digest]), timer=process_time, number=25, repeat=40)) / 25
    print(f"\naround {around * 1e6:.0f} us a message, RSA-2048 {signing * 1e6:.0f} us")

    assert around / signing < 1 / 6
