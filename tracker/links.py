"""Links: the tokens in delivered mail, both ends in one room (design section 5; delivered mail cannot be changed).

Law: a token opens only under the purpose it was made for, and anything else (flipped, cut, of another purpose, under
a key we do not hold, any garbage at all) is None, never an exception. No token holds an address or anything that can
be tested against one. Two recipients' tokens share no bits but version and key id: AES-SIV output looks random from
its first bit to a reader without the key (RFC 5297).

    open, click    version 1, key id 1, SIV 16, then job 5, mref 8, subject 8 enciphered    base64url, 52 characters
    opt-out        version 1, key id 1, SIV 16, then list 4, partition 1, tag 12            base32 lower case, 56
    view, notice   version 1, key id 1, SIV 16, then job 5                                  base64url, 31

The version and key id are associated data, so they are under the tag too. Deterministic: the same recipient of the
same job gets the same token on every attempt. The mode travels in the subject field: 0 is AGGREGATE, the top bit is
DELIVERABILITY, else INDIVIDUAL (subject numbers have 63 bits). The link number stands outside the token ("/7").

In AGGREGATE mode the mref is replaced by a one-way keyed nonce, so that a hit cannot be carried back to a row of the
ledger by anyone who reads the store (tracking.md 3.1). Known limit: who holds the token key *and* the mref could
recompute it; the nonce is derived, not random, so that a resent message is the same message.

The opt-out token is base32 in lower case because it is also the local part "u+<token>" of the mailto form and some
servers fold case on the way; it opens in either case. It needs no look-up and never expires. Its tag is of the day it
was sent; `forward` makes today's of it (policy.peppers: the token key's number tells its peppers).
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal
from urllib.parse import quote

import idna
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from policy.gate import Mode

VERSION: Final = 1
TAG_BYTES: Final = 12  # a suppression tag (policy.address.tag_of)

Purpose = Literal["open", "click"]
JobPurpose = Literal["view", "notice"]

_HIT_CHARACTERS: Final = 52  # 39 bytes: no spare bits in base64
_OPTOUT_CHARACTERS: Final = 56  # 35 bytes: no spare bits in base32
_JOB_CHARACTERS: Final = 31  # 23 bytes: two spare bits, checked
_DELIVERABILITY: Final = 1 << 63
# By names of their own: a member costs 0.1 us by its class (EnumType of CPython 3.11 has a __getattr__).
_AGGREGATE: Final = Mode.AGGREGATE
_BY_DELIVERABILITY: Final = Mode.DELIVERABILITY
_INDIVIDUAL: Final = Mode.INDIVIDUAL
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"  # RFC 4648 section 6, lower case
_LETTERS: Final = _ALPHABET.encode("ascii").ljust(256, b"?")
_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")


class Base32:
    """Base32 in lower case (RFC 4648 section 6) of values of one length, a multiple of five octets.

    The library's is pure Python, 12 us a token. Here all groups are worked on at once inside one large number: 40 bits
    are moved into lanes of 64, halves of them into lanes of 32, 16 and 8, and then a table names the letters (1 us).
    """

    __slots__ = ("_masks", "_split", "_width")

    def __init__(self, octets: int) -> None:
        groups = octets // 5
        self._split = struct.Struct("5s" * groups)
        self._width = groups * 8

        def lanes(width: int, bits: int) -> int:
            """A mask of `bits` low bits in every lane of `width`."""
            return sum((1 << bits) - 1 << at for at in range(0, groups * 64, width))

        steps = ((64, 20), (32, 10), (16, 5))
        self._masks = tuple(lanes(width, bits) << at for width, bits in steps for at in (0, bits))

    def __call__(self, data: bytes) -> str:
        number = int.from_bytes(b"\0\0\0".join((b"", *self._split.unpack(data))), "big")
        low20, high20, low10, high10, low5, high5 = self._masks
        number = number & low20 | (number & high20) << 12
        number = number & low10 | (number & high10) << 6
        number = number & low5 | (number & high5) << 3
        return number.to_bytes(self._width, "big").translate(_LETTERS).decode("ascii")


_OPTOUT_BASE32: Final = Base32(35)


@dataclass(frozen=True, slots=True)
class HitToken:
    """What an open or click token says. AGGREGATE: mref is a nonce and subject 0."""

    job: int
    mref: int
    subject: int
    mode: Mode


@dataclass(frozen=True, slots=True)
class OptOut:
    """Which list to leave, and the suppression tag with its partition: all that an opt-out needs, no look-up."""

    list: int
    partition: int
    tag: bytes


class _Ciphers:
    """One master key's purpose-bound ciphers."""

    __slots__ = ("click", "head", "nonce", "open", "optout", "view")

    def __init__(self, key_id: int, master: bytes) -> None:
        self.head = bytes((VERSION, key_id))
        self.open = AESSIV(_derive(master, b"sp-open"))
        self.click = AESSIV(_derive(master, b"sp-click"))
        self.optout = AESSIV(_derive(master, b"sp-opt-out"))
        self.view = AESSIV(_derive(master, b"sp-view"))
        self.nonce = blake2b(key=_derive(master, b"sp-aggregate"), digest_size=8)


def _derive(master: bytes, purpose: bytes) -> bytes:
    return blake2b(key=master, digest_size=64, person=purpose).digest()


class Links:
    """Makes tokens and URLs under the current key, opens those of every key given.

    token_keys: key id (0..255) to master key (16..64 bytes); public_url: where the tracker is reached from outside;
    forward: today's suppression tag of one sent under a token key (policy.keys.Keyring.heard).
    Raises ValueError on a key id that is not in token_keys and on arguments outside their ranges (our own mistake).
    """

    def __init__(
        self,
        token_keys: Mapping[int, bytes],
        key_id: int,
        public_url: str,
        forward: Callable[[int, bytes], bytes] | None = None,
    ) -> None:
        for number, master in token_keys.items():
            if not 0 <= number <= 255 or not 16 <= len(master) <= 64:
                raise ValueError(f"token key {number}: id must be 0 to 255 and the key 16 to 64 bytes")
        if key_id not in token_keys:
            raise ValueError(f"token key {key_id} is the current one, but it is not among the keys given")
        self._ciphers = {number: _Ciphers(number, master) for number, master in token_keys.items()}
        self._current = self._ciphers[key_id]
        self._aad = [self._current.head]
        self._forward = forward
        self.public_url = public_url.rstrip("/")
        self._click = self.public_url + "/c/"
        self._open = self.public_url + "/o/"

    def __repr__(self) -> str:
        return f"Links({self.public_url!r}, keys {sorted(self._ciphers)})"

    # ---- made by the composer

    def click_base(self, job: int, mref: int, subject: int, mode: Mode) -> str:
        """ "https://host/c/<token>": the program appends "/" and the link number."""
        current = self._current
        sealed = current.click.encrypt(self._hit(job, mref, subject, mode), self._aad)
        return self._click + _url_base64(current.head + sealed)

    def pixel_url(self, job: int, mref: int, subject: int, mode: Mode) -> str:
        current = self._current
        sealed = current.open.encrypt(self._hit(job, mref, subject, mode), self._aad)
        return self._open + _url_base64(current.head + sealed) + ".gif"

    def optout_token(self, list_number: int, partition: int, tag: bytes) -> str:
        if len(tag) != TAG_BYTES:
            raise ValueError("a suppression tag has 12 bytes")
        plain = list_number.to_bytes(4, "big") + partition.to_bytes(1, "big") + tag
        sealed = self._current.optout.encrypt(plain, self._aad)
        return _OPTOUT_BASE32(self._current.head + sealed)

    def optout_url(self, list_number: int, partition: int, tag: bytes) -> str:
        return f"{self.public_url}/u/{self.optout_token(list_number, partition, tag)}"

    def preferences_url(self, list_number: int, partition: int, tag: bytes) -> str:
        return f"{self.public_url}/p/{self.optout_token(list_number, partition, tag)}"

    def optout_mailto(self, list_number: int, partition: int, tag: bytes, domain: str) -> str:
        """ "u+<token>@domain", 58 octets before the at sign (64 are allowed, RFC 5321 4.5.3.1.1)."""
        return f"u+{self.optout_token(list_number, partition, tag)}@{domain}"

    def view_url(self, job: int) -> str:
        return f"{self.public_url}/v/{self.job_token(job)}"

    def notice_url(self, job: int) -> str:
        return f"{self.public_url}/n/{self.job_token(job)}"

    def job_token(self, job: int) -> str:
        """Names a job to its public pages (web view, notice); the same for all its recipients."""
        sealed = self._current.view.encrypt(job.to_bytes(5, "big"), self._aad)
        return base64.urlsafe_b64encode(self._current.head + sealed).rstrip(b"=").decode("ascii")

    def _hit(self, job: int, mref: int, subject: int, mode: Mode) -> bytes:
        if mode is _AGGREGATE:
            message = job.to_bytes(5, "big") + mref.to_bytes(8, "big", signed=True)
            nonce = self._current.nonce.copy()  # the key's own block of the hash is done
            nonce.update(message)
            return message[:5] + nonce.digest() + bytes(8)
        if not 0 < subject < _DELIVERABILITY:
            raise ValueError("a subject number has 63 bits and is not 0")
        if mode is _BY_DELIVERABILITY:
            subject |= _DELIVERABILITY
        elif mode is not _INDIVIDUAL:
            raise ValueError("no token without tracking: the mode is OFF")
        return job.to_bytes(5, "big") + mref.to_bytes(8, "big", signed=True) + subject.to_bytes(8, "big")

    # ---- opened by the tracker

    def open_hit(self, purpose: Purpose, token: str) -> HitToken | None:
        """The token of a pixel (without ".gif") or a click (without the link number)."""
        raw = _base64(token, _HIT_CHARACTERS)
        ciphers = self._of(raw)
        if raw is None or ciphers is None:
            return None
        plain = _decrypt(ciphers.open if purpose == "open" else ciphers.click, raw)
        if plain is None:
            return None
        job = int.from_bytes(plain[:5], "big")
        mref = int.from_bytes(plain[5:13], "big", signed=True)
        subject = int.from_bytes(plain[13:], "big")
        if subject == 0:
            return HitToken(job, mref, 0, Mode.AGGREGATE)
        if subject & _DELIVERABILITY:
            return HitToken(job, mref, subject ^ _DELIVERABILITY, Mode.DELIVERABILITY)
        return HitToken(job, mref, subject, Mode.INDIVIDUAL)

    def open_optout(self, token: str) -> OptOut | None:
        """The token of an opt-out or preferences URL, or of the mailto form (without "u+"), in either case."""
        if len(token) != _OPTOUT_CHARACTERS or not token.isascii():
            return None
        try:
            raw = base64.b32decode(token.upper())
        except binascii.Error:
            return None
        ciphers = self._of(raw)
        if ciphers is None:
            return None
        plain = _decrypt(ciphers.optout, raw)
        if plain is None or raw is None:
            return None
        tag = plain[5:] if self._forward is None else self._forward(raw[1], plain[5:])
        return OptOut(int.from_bytes(plain[:4], "big"), plain[4], tag)

    def open_job(self, purpose: JobPurpose, token: str) -> int | None:
        """The job of a view or notice URL. Both pages show the same public things, so both purposes share a key."""
        if purpose not in ("view", "notice"):
            return None
        raw = _base64(token, _JOB_CHARACTERS)
        ciphers = self._of(raw)
        if raw is None or ciphers is None:
            return None
        plain = _decrypt(ciphers.view, raw)
        return None if plain is None else int.from_bytes(plain, "big")

    def _of(self, raw: bytes | None) -> _Ciphers | None:
        if raw is None or raw[0] != VERSION:
            return None
        return self._ciphers.get(raw[1])


def _url_base64(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).translate(_URL_SAFE).decode("ascii")


_BASE64URL: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def _base64(token: str, characters: int) -> bytes | None:
    """Strict base64url of exactly so many characters: one spelling per token (the library drops what it dislikes)."""
    if len(token) != characters or not _BASE64URL.issuperset(token):
        return None
    raw = base64.urlsafe_b64decode(token + "=" * (-characters % 4))
    if characters % 4 and base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii") != token:
        return None
    return raw


def _decrypt(cipher: AESSIV, raw: bytes) -> bytes | None:
    try:
        return cipher.decrypt(raw[2:], [raw[:2]])
    except InvalidTag:
        return None


_LONGEST_TARGET: Final = 8000  # what common servers take in a request line, with room to spare
_TARGET: Final = re.compile(r"(?i)(https?)://([^/?#@\\:\[\]]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?([/?#].*)?")
_FORBIDDEN: Final = re.compile(r"[\x00-\x1f\x7f\\\u0080-\u009f\u2028\u2029\ud800-\udfff]")
_PRINTABLE: Final = "".join(map(chr, range(0x21, 0x7F))).translate({ord(c): None for c in '"<>`{}|^'})


def safe_target(url: str) -> str | None:
    """The ASCII form of a link that we redirect to, or None. Only absolute http and https with a host pass.

    Refused: other schemes, `//evil`, `https:evil`, user names before the host, backslashes, control characters
    (header injection), hosts that IDNA refuses. Spaces and non-ASCII in path and query are percent-encoded.
    """
    if len(url) > _LONGEST_TARGET or _FORBIDDEN.search(url):
        return None
    match = _TARGET.fullmatch(url.strip(" "))
    if match is None:
        return None
    scheme, host, port, rest = match.groups(default="")
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii")  # also turns Unicode dots into dots, as browsers do
        except idna.IDNAError:
            return None
    if re.search(r"[^A-Za-z0-9._\-\[\]:]", host):
        return None
    target = f"{scheme}://{host}{port}{quote(rest, safe=_PRINTABLE)}"
    return target if len(target) <= _LONGEST_TARGET else None
