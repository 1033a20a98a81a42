"""Multi-buffer signatures: eight at a time, on processors with AVX-512 IFMA (extra `fast`, decision 2).

Laws:
- what comes out is what OpenSSL makes, byte for byte: a key is trusted to this room only after it made eight signatures
  at start, on this machine, that equal OpenSSL's and cost less (`accelerate`);
- no RSA signature leaves before the public half of its key has verified it. One wrong half of a CRT signature gives the
  key away (Boneh, DeMillo, Lipton 1997); OpenSSL looks, too. After the first that fails OpenSSL signs, with an alarm;
- the key's numbers in buffers of ours are zeros again when the signer has gone.

CPU per signature in calls of eight, beside OpenSSL in the same minute (build machine, us): RSA-2048 127 + 5 to verify,
OpenSSL 235; RSA-3072 950 beside 670, so OpenSSL keeps it; RSA-4096 1,300 + 20 beside 1,420; Ed25519 3.3 beside 31. A
call costs the same with one digest in it as with eight: what is less than `least` goes to OpenSSL (RSA-2048: below 5).

The library is Intel's `libcrypto_mb.so` (PyPI ipp-crypto) with the compiler's runtime (PyPI intel-cmplr-lib-rt). The
loader takes what a library needs from those already loaded under the same name (SONAME), so the four runtime libraries
are loaded first, by full path and for themselves alone: global ones would lend their `exp` and `sin` to everybody.

Known limits: the numbers Python read from the key file, and OpenSSL's own copy of the key, live until the process ends.
No clock is read here: the caller lends one.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engine.message.dkim import OpenSSLSigner

log = logging.getLogger(__name__)

LANES: Final = 8
# RFC 8017 9.2, EMSA-PKCS1-v1_5 of SHA-256: 0x00 0x01, ones, 0x00, then this and the digest.
_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")
_SIZES: Final = {2048: "2K", 3072: "3K", 4096: "4K"}
_LIBRARY: Final = ("ipp-crypto", "libcrypto_mb.so")
_RUNTIME: Final = ("intel-cmplr-lib-rt", ("libintlc.so.5", "libimf.so", "libirng.so", "libsvml.so"))  # in this order

_Buffer = ctypes.Array[ctypes.c_char]
_Pointers = ctypes.c_void_p * LANES
_Lengths = ctypes.c_uint32 * LANES


Key = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class Unavailable(Exception):
    """Why there is no multi-buffer signer, in words for the log."""


class Lanes(Protocol):
    """One key, ready to sign up to eight digests at once. None: a lane failed, nothing of this call may be used."""

    def sign(self, digests: Sequence[bytes]) -> list[bytes] | None: ...


class LaneMaker(Protocol):
    """What makes lanes of keys; `Library`, or something a test puts in its place. Raises Unavailable."""

    def lanes(self, key: Key) -> Lanes: ...


@dataclass(slots=True)
class Tally:
    """How signatures were made: by lanes in so many calls, or one at a time."""

    calls: int = 0
    by_lanes: int = 0
    by_openssl: int = 0


class MultiBufferSigner:
    """A `Signer`: eights by lanes, what is left over by OpenSSL when it is fewer than `least`. Thread-safe (the tally
    may miss a count)."""

    def __init__(self, plain: OpenSSLSigner, lanes: Lanes, least: int) -> None:
        self.algorithm, self.domain, self.selector = plain.algorithm, plain.domain, plain.selector
        self.least, self.tally = least, Tally()
        self._plain, self._lanes = plain, lanes

    def __repr__(self) -> str:
        return f"MultiBufferSigner({self.selector}._domainkey.{self.domain}, {self.algorithm}, from {self.least})"

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        signatures: list[bytes] = []
        for start in range(0, len(digests), LANES):
            eight = digests[start : start + LANES]
            made = self._together(eight) if len(eight) >= self.least else None
            if made is None:
                made = self._plain.sign(eight)
                self.tally.by_openssl += len(eight)
            signatures += made
        return signatures

    def _together(self, digests: Sequence[bytes]) -> list[bytes] | None:
        made = self._lanes.sign(digests)
        if made is None:
            self.least = LANES + 1
            log.critical("a multi-buffer signature was wrong: OpenSSL signs from now on", extra={"key": repr(self)})
            return None
        self.tally.calls += 1
        self.tally.by_lanes += len(made)
        return made


def accelerate(signer: OpenSSLSigner, maker: LaneMaker, clock: Callable[[], float]) -> MultiBufferSigner:
    """The same key, eight at a time, once it has shown that it is worth it; 10 ms with RSA-2048.

    clock: seconds of CPU of this thread. Raises Unavailable with the reason.
    """
    name = f"{signer.selector}._domainkey.{signer.domain}"
    lanes = maker.lanes(signer.key)
    digests = [sha256(b"sales-push %d" % number).digest() for number in range(LANES)]
    if lanes.sign(digests) != signer.sign(digests) or lanes.sign(digests[:1]) != signer.sign(digests[:1]):
        raise Unavailable(f"{name}: the signatures are not those of OpenSSL")
    together = _least_of(lambda: lanes.sign(digests), clock)
    alone = _least_of(lambda: signer.sign(digests), clock) / LANES
    if together >= LANES * alone:
        raise Unavailable(f"{name}: slower here, {together / LANES * 1e6:.0f} us beside {alone * 1e6:.0f} of OpenSSL")
    return MultiBufferSigner(signer, lanes, min(LANES, int(together / alone) + 1))


def _least_of(action: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the cheapest of three calls: the others were disturbed."""
    seconds: list[float] = []
    for _ in range(3):
        begun = clock()
        action()
        seconds.append(clock() - begun)
    return min(seconds)


class Library:
    """The functions of libcrypto_mb that are used. Kept for as long as the process lives."""

    def __init__(self, loaded: Any) -> None:
        try:
            if not _of(loaded, "mbx_is_crypto_mb_applicable", ctypes.c_int, ctypes.c_uint64)(0):
                raise Unavailable("the processor has no AVX-512 IFMA")
            lanes, text = [_Pointers], [ctypes.c_void_p]
            self.scratch = _of(loaded, "mbx_RSA_Method_BufSize", ctypes.c_int, *text)
            sizes = [ctypes.c_int, *text, *text]
            self.rsa_private = _of(loaded, "mbx_rsa_private_crt_mb8", ctypes.c_uint32, *lanes * 7, *sizes)
            self.rsa_public = _of(loaded, "mbx_rsa_public_mb8", ctypes.c_uint32, *lanes * 3, *sizes)
            self.ed25519 = _of(loaded, "mbx_ed25519_sign_mb8", ctypes.c_uint32, *lanes * 3, _Lengths, *lanes * 2)
            self.methods: dict[int, tuple[int, int]] = {}
            for bits, size in _SIZES.items():
                names = f"mbx_RSA{size}_private_crt_Method", f"mbx_RSA{size}_pub65537_Method"
                private, public = (_of(loaded, name, ctypes.c_void_p)() for name in names)
                self.methods[bits] = private, public
        except AttributeError as error:
            raise Unavailable(f"another libcrypto_mb than expected: {error}") from None

    def lanes(self, key: Key) -> Lanes:
        """Raises Unavailable for a key the library does not take."""
        return RSALanes(self, key) if isinstance(key, rsa.RSAPrivateKey) else Ed25519Lanes(self, key)


def open_library() -> Library:
    """libcrypto_mb of this environment. 5 ms, no environment variable. Raises Unavailable with the reason."""
    try:
        runtime, names = _RUNTIME
        for name in names:
            ctypes.CDLL(_path(runtime, name))
        return Library(ctypes.CDLL(_path(*_LIBRARY)))
    except metadata.PackageNotFoundError as error:
        raise Unavailable(f"the extra `fast` is not installed ({error.name} is missing)") from None
    except OSError as error:  # another processor or C library, or there is no libcrypto.so.3 on the system
        raise Unavailable(f"cannot be loaded: {error}") from None


def _path(distribution: str, name: str) -> str:
    """Where pip put a library: its own record knows, wherever that is. Raises PackageNotFoundError, OSError."""
    for file in metadata.files(distribution) or ():
        if file.name == name:
            return str(file.locate())
    raise OSError(f"{distribution} holds no {name}")


def _of(loaded: Any, name: str, result: Any, *arguments: Any) -> Callable[..., int]:
    function: Callable[..., int] = getattr(loaded, name)
    function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return function


class _Room:
    """Buffers of one call: eight digests in, eight signatures out, eight verified ones; scratch for the library."""

    def __init__(self, given: int, made: int, scratch: int, secrets: list[_Buffer]) -> None:
        self.given, self.made = ctypes.create_string_buffer(given * LANES), ctypes.create_string_buffer(made * LANES)
        self.verified, self.scratch = ctypes.create_string_buffer(made * LANES), ctypes.create_string_buffer(scratch)
        self.given_at, self.made_at = _pointers(self.given, given), _pointers(self.made, made)
        self.halves_at = _pointers(self.made, made, made // 2)  # S behind R, which Ed25519 writes one by one
        self.verified_at, self.scratch_at = _pointers(self.verified, made), ctypes.addressof(self.scratch)
        secrets.append(self.scratch)


class _Key:
    """What the lanes of both algorithms share: secrets that are wiped, and rooms, one for every thread at work."""

    def __init__(self, given: int, made: int, scratch: int) -> None:
        self.secrets: list[_Buffer] = []
        self._sizes = given, made, scratch
        self._rooms: deque[_Room] = deque([self._room()])
        weakref.finalize(self, _wipe, self.secrets)

    def _room(self) -> _Room:
        return _Room(*self._sizes, self.secrets)

    def _enter(self) -> _Room:
        try:
            return self._rooms.pop()
        except IndexError:  # another thread is in there
            return self._room()

    def _secret(self, number: bytes) -> ctypes.Array[ctypes.c_void_p]:
        """A number of the key, the same in every lane."""
        buffer = ctypes.create_string_buffer(number, len(number))
        self.secrets.append(buffer)
        return _pointers(buffer, 0)


class RSALanes(_Key):
    """An RSA key of 2048, 3072 or 4096 bits with exponent 65537."""

    def __init__(self, library: Library, key: rsa.RSAPrivateKey) -> None:
        numbers, bits = key.private_numbers(), key.key_size
        if bits not in library.methods or numbers.public_numbers.e != 65537:
            raise Unavailable("RSA keys must have 2048, 3072 or 4096 bits and exponent 65537")
        self._library, self._bits, self._size = library, bits, bits // 8
        self._private, self._public = library.methods[bits]
        super().__init__(self._size, self._size, max(map(library.scratch, library.methods[bits])))
        half = self._size // 2
        crt = (numbers.p, numbers.q, numbers.dmp1, numbers.dmq1, numbers.iqmp)
        try:
            self._crt = [self._secret(number.to_bytes(half, "little")) for number in crt]
        except OverflowError:
            raise Unavailable("the two primes of an RSA key must be of one length") from None
        self._modulus_held = ctypes.create_string_buffer(numbers.public_numbers.n.to_bytes(self._size, "little"))
        self._modulus = _pointers(self._modulus_held, 0)
        self._padding = b"\x00\x01" + b"\xff" * (self._size - 54) + b"\x00" + _DIGEST_INFO

    def sign(self, digests: Sequence[bytes]) -> list[bytes] | None:
        size, library, room = self._size, self._library, self._enter()
        blocks = b"".join([self._padding + digest for digest in _filled(digests)])
        ctypes.memmove(room.given, blocks, LANES * size)
        failed = library.rsa_private(
            room.given_at, room.made_at, *self._crt, self._bits, self._private, room.scratch_at
        )
        failed |= library.rsa_public(
            room.made_at, room.verified_at, self._modulus, self._bits, self._public, room.scratch_at
        )
        signatures = _cut(room.made.raw, size, len(digests)) if not failed and room.verified.raw == blocks else None
        self._rooms.append(room)
        return signatures


class Ed25519Lanes(_Key):
    """An Ed25519 key. Signatures are not verified, OpenSSL does not either."""

    def __init__(self, library: Library, key: ed25519.Ed25519PrivateKey) -> None:
        super().__init__(32, 64, 1)
        self._library = library
        self._private = self._secret(key.private_bytes_raw())
        self._public = self._secret(key.public_key().public_bytes_raw())
        self._lengths = _Lengths(*[32] * LANES)

    def sign(self, digests: Sequence[bytes]) -> list[bytes] | None:
        room = self._enter()
        ctypes.memmove(room.given, b"".join(_filled(digests)), LANES * 32)
        failed = self._library.ed25519(
            room.made_at, room.halves_at, room.given_at, self._lengths, self._private, self._public
        )
        signatures = _cut(room.made.raw, 64, len(digests)) if not failed else None
        self._rooms.append(room)
        return signatures


def _filled(digests: Sequence[bytes]) -> Sequence[bytes]:
    """Eight of them: the last one again where there are fewer. A call costs the same."""
    if not 1 <= len(digests) <= LANES or any(len(digest) != 32 for digest in digests):
        raise ValueError("one to eight SHA-256 digests")
    return [*digests, *[digests[-1]] * (LANES - len(digests))]


def _cut(raw: bytes, size: int, count: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, count * size, size)]


def _pointers(buffer: _Buffer, step: int, offset: int = 0) -> ctypes.Array[ctypes.c_void_p]:
    """For every lane where its part of the buffer begins; step 0: all lanes read the same."""
    begin = ctypes.addressof(buffer) + offset
    return _Pointers(*[begin + step * lane for lane in range(LANES)])


def _wipe(secrets: list[_Buffer]) -> None:
    for buffer in secrets:
        ctypes.memset(buffer, 0, len(buffer))
