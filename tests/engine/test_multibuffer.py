"""Eight signatures at a time: the same bytes as OpenSSL's, and OpenSSL wherever lanes cannot be trusted or do not pay.

`Twin` is libcrypto_mb in Python, with the arguments of the real one and `pow` for AVX-512: whatever this room puts into
buffers is checked on every machine. Tests marked `fast` are done with the real one.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib import metadata
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from engine.message import OpenSSLSigner, Signer, multibuffer
from engine.message.multibuffer import (
    LANES,
    Key,
    Library,
    MultiBufferSigner,
    RSALanes,
    Unavailable,
    accelerate,
    open_library,
)

DIGESTS = [sha256(b"%d" % number).digest() for number in range(24)]


class Function:
    """What ctypes makes of an exported function, as far as it is used."""

    restype: Any = None
    argtypes: Sequence[Any] = ()

    def __init__(self, call: Callable[..., int]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        return self.call(*arguments)


class Twin:
    """spoilt: lanes whose signatures have a wrong bit; status: what every call says; applicable: has IFMA."""

    def __init__(self, *, applicable: bool = True) -> None:
        self.spoilt: set[int] = set()
        self.status = self.calls = 0
        self.mbx_is_crypto_mb_applicable = Function(lambda _: int(applicable))
        self.mbx_RSA_Method_BufSize = Function(lambda method: 64 + method % 7)
        self.mbx_rsa_private_crt_mb8 = Function(self._private)
        self.mbx_rsa_public_mb8 = Function(self._public)
        self.mbx_ed25519_sign_mb8 = Function(self._ed25519)
        for bits, name in ((2048, "2K"), (3072, "3K"), (4096, "4K")):
            setattr(self, f"mbx_RSA{name}_private_crt_Method", Function(functools.partial(int, bits)))
            setattr(self, f"mbx_RSA{name}_pub65537_Method", Function(functools.partial(int, bits + 1)))

    def _private(self, given: Any, made: Any, p: Any, q: Any, dp: Any, dq: Any, qi: Any, bits: int, *rest: int) -> int:
        method, scratch = rest
        assert method == bits
        self.calls += 1
        ctypes.memset(scratch, 0xAA, 64)
        for lane in range(8):
            prime, other, first, second, inverse = (
                int.from_bytes(ctypes.string_at(number[lane], bits // 16), "little") for number in (p, q, dp, dq, qi)
            )
            block = int.from_bytes(ctypes.string_at(given[lane], bits // 8), "big")
            low = pow(block, second, other)
            signature = low + other * ((pow(block, first, prime) - low) * inverse % prime)
            ctypes.memmove(made[lane], (signature ^ (lane in self.spoilt)).to_bytes(bits // 8, "big"), bits // 8)
        return self.status

    def _public(self, given: Any, made: Any, modulus: Any, bits: int, method: int, scratch: int) -> int:
        assert method == bits + 1
        for lane in range(8):
            number = int.from_bytes(ctypes.string_at(modulus[lane], bits // 8), "little")
            block = pow(int.from_bytes(ctypes.string_at(given[lane], bits // 8), "big"), 65537, number)
            ctypes.memmove(made[lane], block.to_bytes(bits // 8, "big"), bits // 8)
        return 0

    def _ed25519(self, first: Any, second: Any, given: Any, lengths: Any, private: Any, public: Any) -> int:
        self.calls += 1
        for lane in range(8):
            key = ed25519.Ed25519PrivateKey.from_private_bytes(ctypes.string_at(private[lane], 32))
            assert key.public_key().public_bytes_raw() == ctypes.string_at(public[lane], 32)
            signature = key.sign(ctypes.string_at(given[lane], lengths[lane]))
            ctypes.memmove(first[lane], signature[:32], 32)
            ctypes.memmove(second[lane], signature[32:], 32)
        return self.status


@functools.cache
def key_of(kind: str) -> Key:
    return ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else rsa.generate_private_key(65537, int(kind))


@functools.cache
def plain(kind: str) -> OpenSSLSigner:
    return OpenSSLSigner("shop.example", "s2026", key_of(kind))


def watch(*seconds: float) -> Callable[[], float]:
    """A clock by which the calls of `accelerate` take these seconds: three by lanes, three by OpenSSL."""
    readings = [
        reading for number, second in enumerate(seconds) for reading in (100.0 * number, 100.0 * number + second)
    ]
    return iter(readings).__next__


CHEAP = 1.0, 1.0, 1.0, 2.0, 2.0, 2.0  # lanes cost half of OpenSSL: four digests are as dear, five are worth it


@pytest.mark.parametrize("kind", ["2048", "3072", "4096", "ed25519"])
def test_any_number_of_digests_signs_as_openssl_does(kind: str) -> None:
    twin = Twin()
    signer = accelerate(plain(kind), Library(twin), watch(*CHEAP))

    assert signer.least == 5
    for count in (0, 1, 4, 5, 8, 9, 12, 13, 16):
        assert signer.sign(DIGESTS[:count]) == plain(kind).sign(DIGESTS[:count])
    assert (signer.tally.calls, signer.tally.by_lanes, signer.tally.by_openssl) == (8, 55 - 5 + 8, 1 + 4 + 1 + 4)


@given(digests=st.lists(st.binary(min_size=32, max_size=32), max_size=20), least=st.integers(1, 9))
def test_signatures_stand_in_the_order_of_their_digests(digests: list[bytes], least: int) -> None:
    lanes = Library(Twin()).lanes(key_of("ed25519"))

    assert MultiBufferSigner(plain("ed25519"), lanes, least).sign(digests) == plain("ed25519").sign(digests)


def test_it_stands_where_a_signer_stands() -> None:
    signer: Signer = accelerate(plain("2048"), Library(Twin()), watch(*CHEAP))

    assert (signer.algorithm, signer.domain, signer.selector) == ("rsa-sha256", "shop.example", "s2026")
    assert "s2026._domainkey.shop.example" in repr(signer)


@pytest.mark.parametrize("kind", ["2048", "ed25519"])
def test_another_signature_than_openssls_is_not_taken(kind: str) -> None:
    """Not even once: a key whose first eight differ never signs mail by lanes."""
    other = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else rsa.generate_private_key(65537, 2048)
    made = Library(Twin()).lanes(other)

    class Confused:
        def lanes(self, key: Key) -> multibuffer.Lanes:
            return made

    with pytest.raises(Unavailable, match="not those of OpenSSL"):
        accelerate(plain(kind), Confused(), watch(*CHEAP))


@pytest.mark.parametrize("spoilt", [0, 7])
def test_a_lane_that_is_wrong_at_start_ends_it(spoilt: int) -> None:
    twin = Twin()
    twin.spoilt = {spoilt}

    with pytest.raises(Unavailable, match="not those of OpenSSL"):
        accelerate(plain("2048"), Library(twin), watch(*CHEAP))


def test_what_is_not_cheaper_is_not_taken() -> None:
    with pytest.raises(Unavailable, match="slower here, 250000 us beside 250000"):
        accelerate(plain("2048"), Library(Twin()), watch(3.0, 2.0, 9.0, 2.0, 5.0, 2.0))

    signer = accelerate(plain("2048"), Library(Twin()), watch(3.0, 1.99, 9.0, 2.0, 5.0, 2.0))
    assert signer.least == LANES


@pytest.mark.parametrize("spoilt", [0, 7])
def test_no_wrong_signature_leaves_later_either(spoilt: int, caplog: pytest.LogCaptureFixture) -> None:
    """One wrong half of a CRT signature would tell the key: the public half looks at every one before it goes."""
    twin = Twin()
    signer = accelerate(plain("2048"), Library(twin), watch(*CHEAP))
    twin.spoilt = {spoilt}

    assert signer.sign(DIGESTS[:8]) == plain("2048").sign(DIGESTS[:8])
    assert [(record.levelno, record.name) for record in caplog.records] == [(logging.CRITICAL, multibuffer.__name__)]
    calls, twin.spoilt = twin.calls, set()
    assert signer.sign(DIGESTS) == plain("2048").sign(DIGESTS)
    assert twin.calls == calls, "such a machine is not asked again"
    assert signer.tally.by_lanes == 0


@pytest.mark.parametrize("kind", ["2048", "ed25519"])
def test_a_call_that_says_it_failed_is_not_believed(kind: str) -> None:
    twin = Twin()
    signer = accelerate(plain(kind), Library(twin), watch(*CHEAP))
    twin.status = 0x20000000

    assert signer.sign(DIGESTS[:8]) == plain(kind).sign(DIGESTS[:8])
    assert signer.tally.by_openssl == 8


def test_keys_and_digests_that_do_not_fit_are_refused() -> None:
    library = Library(Twin())
    with pytest.raises(Unavailable, match="2048, 3072 or 4096"):
        library.lanes(rsa.generate_private_key(65537, 2304))
    with pytest.raises(Unavailable, match="exponent 65537"):
        library.lanes(rsa.generate_private_key(3, 2048))
    for digests in ([], DIGESTS[:9], [b"short"]):
        with pytest.raises(ValueError, match="SHA-256"):
            library.lanes(key_of("2048")).sign(digests)


def test_a_library_that_does_not_fit_is_refused() -> None:
    with pytest.raises(Unavailable, match="AVX-512 IFMA"):
        Library(Twin(applicable=False))
    older = Twin()
    del older.mbx_ed25519_sign_mb8
    with pytest.raises(Unavailable, match="mbx_ed25519_sign_mb8"):
        Library(older)


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(Unavailable, match="extra `fast` is not installed"):
        open_library()


def test_a_library_the_loader_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(Unavailable, match=r"intel-cmplr-lib-rt holds no libintlc\.so\.5"):
        open_library()


@pytest.mark.parametrize("kind", ["2048", "ed25519"])
def test_the_key_is_wiped_when_the_signer_goes(kind: str) -> None:
    signer = accelerate(plain(kind), Library(Twin()), watch(*CHEAP))
    signer.sign(DIGESTS[:8])
    lanes = signer._lanes
    assert isinstance(lanes, multibuffer._Key)
    buffers = list(lanes.secrets)
    assert len([buffer for buffer in buffers if any(buffer.raw)]) >= (6 if kind == "2048" else 2)

    del signer, lanes
    gc.collect()
    assert not any(any(buffer.raw) for buffer in buffers)


def test_threads_do_not_write_into_each_others_buffers() -> None:
    """Four threads, one key: each signs in a room of its own, and no more rooms are made than threads were at work."""
    lanes = RSALanes(Library(Twin()), rsa.generate_private_key(65537, 2048))
    batches = [DIGESTS[at : at + count] for at, count in itertools.product(range(0, 16, 4), (5, 8))]
    wanted = [lanes.sign(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lanes.sign, batches)) == wanted
    assert 1 <= len(lanes._rooms) <= 4


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["2048", "3072", "4096", "ed25519"])
def test_the_real_library_signs_as_openssl_does(kind: str) -> None:
    lanes = open_library().lanes(key_of(kind))

    for count in range(1, 9):
        for start in (0, 5, 16):
            batch = DIGESTS[start : start + count]
            assert lanes.sign(batch) == plain(kind).sign(batch)
    with ThreadPoolExecutor(4) as pool:
        batches = [DIGESTS[at : at + 8] for at in range(16)]
        assert list(pool.map(lanes.sign, batches)) == [plain(kind).sign(batch) for batch in batches]
