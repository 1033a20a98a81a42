"""What an address is: parsed strictly, one spelling for matching, keyed references that say nothing without the key.

Laws:
- what `parse` returns can be written between the angle brackets of an SMTP path: no control character, no CR, LF, NUL,
  no ``<`` or ``>``, local part at most 64 octets, domain at most 255, both at most 254 (RFC 5321 4.5.3.1, 2.3.5);
- `parse` never raises anything but `AddressError`, whose text names a reason and never the address;
- `normalise` is idempotent, and two spellings that reach one mailbox by case, width, ligature or needless quotes are
  one (faults.md 3.7): it decides suppression, so it would rather match too much than too little;
- neither a tag nor an mref can be tested against an address without the pepper or the job's key (decision 13).

Domains are lower-case A-labels by UTS 46 (package idna): the standard library's codec makes ``faß.de`` somebody
else's ``fass.de``. Nearly all mail is plain ASCII, which takes the fast path: one regular expression, domain cached.

What `normalise` does, and nothing else (narrow on purpose: a rule too many silences a stranger):

    domain      lower-case A-label, UTS 46 without transitional mapping, one dot at its end forgiven when looked up
    local part  invisible characters out, NFKC, case folded, needless quotes and backslashes of a quoted string out
    kept        dots, ``+tags``, hyphens, accents: ``bob.b``, ``bobb`` and ``bob+x`` are three people

`provider_canonical` does more for the two domains that document it (gmail.com, googlemail.com: no dots, no ``+tag``).
It is never sent to and never names a person: an opt-out or complaint enters its tag beside the address's own, and
expansion asks about it where it is another one.

Tags have generations: `chain` makes the tag of a further pepper from the last one's, without an address
(`policy.peppers`).

Known limits: address literals (``@[192.0.2.1]``) and all-numeric top labels are refused, we deliver by MX only and a
resolver might read the latter as an IP address; comments and folding white space of RFC 5322 headers are refused;
SMTPUTF8 local parts are NFC, as RFC 6532 3.1 asks. Characters that show nothing (format, private, unassigned) are
refused in local parts, as email-validator does.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import idna

MAX_LOCAL = 64  # octets, RFC 5321 4.5.3.1.1
MAX_DOMAIN = 255  # octets, RFC 5321 4.5.3.1.2; the DNS allows 253 of text
MAX_PATH = 254  # octets: 4.5.3.1.3 says 256 with the angle brackets
TAG_BYTES = 12
PEPPER_BYTES = 32  # a generation's; a pepper is all of them one behind another, the oldest first (`chain`)

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"  # RFC 5322 3.2.3
_PLAIN = re.compile(rf"([{_ATEXT}]+(?:\.[{_ATEXT}]+)*)@([A-Za-z0-9.-]+)", re.ASCII)
_DOT_ATOM = re.compile(rf"[{_ATEXT}\u0080-\U0010ffff]+(?:\.[{_ATEXT}\u0080-\U0010ffff]+)*")
# RFC 5321 4.1.2 QcontentSMTP, with RFC 6531 3.3 for what is not ASCII; "<" and ">" are legal there and refused here:
# the choke point behind us refuses them anyway (S: nodemailer CVE-2026-82853, MimeKit CVE-2026-30227).
_QUOTED = re.compile(r'"(?:[ !#-;=?-\[\]-~\u0080-\U0010ffff]|\\[ -;=?-~])*"')
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")  # what inet_aton reads as a number: 127.1, 0x7f.1, 2130706433
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)


class AddressError(ValueError):
    """Not an address we can deliver to. reason: a short slug, safe to log and to show; the address is not in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a deliverable address: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Mailbox:
    """local: as given, NFC, quotes included; domain: lower-case A-label. Build it with `parse` only."""

    local: str
    domain: str

    @property
    def wire(self) -> str:
        """What stands between the angle brackets of MAIL and RCPT."""
        return f"{self.local}@{self.domain}"

    @property
    def needs_smtputf8(self) -> bool:
        """The domain is always ASCII; a local part that is not needs the peer's SMTPUTF8 (RFC 6531 3.2)."""
        return not self.local.isascii()

    def __repr__(self) -> str:
        """An address in a log by way of a traceback is still an address in a log."""
        return "Mailbox(…)"


def parse(text: str) -> Mailbox:
    """An address as people write it, ``local@domain``; spaces and tabs around it are forgiven. Raises AddressError."""
    match = _PLAIN.fullmatch(text)
    if match is not None:
        local, domain = match.groups()
        if len(local) > MAX_LOCAL:
            raise AddressError("local-part-too-long")
        domain = _ascii_domain(domain)
        if len(local) + 1 + len(domain) > MAX_PATH:
            raise AddressError("address-too-long")
        return Mailbox(local, domain)
    return _parse_slowly(text.strip(" \t"))


def _parse_slowly(text: str) -> Mailbox:
    if len(text) > 4 * MAX_PATH:  # nothing longer can become short enough; bounds the work of what follows
        raise AddressError("address-too-long")
    local, at, domain = text.rpartition("@")
    if not at:
        raise AddressError("no-at-sign")
    if not local:
        raise AddressError("no-local-part")
    if not domain:
        raise AddressError("no-domain")
    local = _check_local(local)
    domain = _any_domain(domain)
    if len(local.encode()) + 1 + len(domain) > MAX_PATH:
        raise AddressError("address-too-long")
    return Mailbox(local, domain)


def _check_local(local: str) -> str:
    if not local.isascii():
        for character in local:
            # C: control, format, surrogate, private, unassigned; Z: separators. NUL to US are ASCII and fail below.
            if character > "\x7f" and unicodedata.category(character)[0] in "CZ":
                raise AddressError("unsafe-character")
        local = unicodedata.normalize("NFC", local)
    if not _DOT_ATOM.fullmatch(local) and not _QUOTED.fullmatch(local):
        raise AddressError("local-part-syntax")
    if len(local.encode()) > MAX_LOCAL:
        raise AddressError("local-part-too-long")
    return local


@lru_cache(maxsize=65_536)
def _ascii_domain(domain: str) -> str:
    """LDH labels (RFC 5321 4.1.2, RFC 1123 2.1). An xn-- label is taken as it is: DNS will know it or not."""
    domain = domain.lower()
    if len(domain) > MAX_DOMAIN - 2:
        raise AddressError("domain-too-long")
    labels = domain.split(".")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise AddressError("domain-syntax")
    if _NUMERIC.fullmatch(labels[-1]):
        raise AddressError("numeric-top-label")
    return domain


@lru_cache(maxsize=4_096)
def _any_domain(domain: str) -> str:
    if domain.startswith("["):
        raise AddressError("address-literal")
    if not domain.isascii():
        try:
            domain = idna.encode(domain, uts46=True, std3_rules=True, transitional=False).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise AddressError("domain-not-idna") from None
    return _ascii_domain(domain)


def parse_domain(text: str) -> str:
    """A domain alone as a lower-case A-label; one dot at its end is forgiven. Raises AddressError."""
    text = text.strip(" \t")
    return _any_domain(text[:-1] if text.endswith(".") else text)


# What a spread-sheet or a form adds without anybody seeing it: soft hyphen, zero-width (non-)joiner and space, word
# joiner, byte order mark, bidirectional marks (faults.md 3.7).
_INVISIBLE = dict.fromkeys(
    [0x00AD, 0x034F, 0x061C, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)]
)


def parse_leniently(text: str) -> Mailbox:
    """For suppressing and for looking up, where a missed match is worse than a generous one.

    White space around it, invisible characters, full-width signs and a dot at the end of the domain are forgiven; what
    we would send to is still decided by `parse`. Raises AddressError.
    """
    if len(text) > 4 * MAX_PATH:
        raise AddressError("address-too-long")
    text = text.translate(_INVISIBLE).strip()
    if text.startswith("<") and text.endswith(">"):
        text = text[1:-1]
    if not text.isascii():
        text = text.replace("\uff20", "@").replace("\ufe6b", "@")
    return parse(text[:-1] if text.endswith((".", "。", "．", "｡")) else text)


def normalise(local: str, domain: str) -> str:
    """The one spelling of a mailbox, for tags and mref: ``local@domain`` with NFKC, case folded, needless quotes gone.

    Takes the two halves of a `Mailbox`. The local part is case-folded although RFC 5321 2.4 calls it case-sensitive:
    no provider of note makes use of that, and somebody who opted out as ``Bob`` does not expect mail as ``bob``.
    """
    if local.isascii() and '"' not in local:
        return f"{local.lower()}@{domain}"
    if len(local) > 1 and local[0] == local[-1] == '"':
        local = _QUOTED_PAIR.sub(r"\1", local[1:-1])
    local = _fold(local)
    if not _DOT_ATOM.fullmatch(local):
        escaped = local.replace("\\", "\\\\").replace('"', '\\"')
        local = f'"{escaped}"'
    return f"{local}@{domain}"


def _fold(text: str) -> str:
    """NFKC_Casefold (Unicode 3.13, D146) to its fixed point, reached in two rounds; the third only looks."""
    for _ in range(4):
        folded = unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold()
        folded = unicodedata.normalize("NFKC", folded)
        if folded == text:
            break
        text = folded
    return text


# Providers that document both: dots mean nothing, and what follows "+" is the reader's own label. A second tag for
# opt-outs and complaints only. No rule for other providers: cutting at "-" or "+" everywhere would silence strangers
# (style.md 1.4 on mox).
DOTLESS = frozenset({"gmail.com", "googlemail.com"})


def provider_canonical(normalised: str) -> str:
    """The spelling under which a provider files a normalised address; itself where we know of no rule.

    The domain stays what it is, googlemail.com too: the gate looks in the partition of the domain it delivers to.
    """
    local, _, domain = normalised.rpartition("@")
    if domain not in DOTLESS or local.startswith('"'):
        return normalised
    bare = local.partition("+")[0].replace(".", "")
    return f"{bare}@{domain}" if bare else normalised


def tag_of(pepper: bytes, normalised: str) -> bytes:
    """The 12-byte suppression tag of a normalised address. pepper: `policy.keys.Keyring.pepper`."""
    first = pepper[:PEPPER_BYTES]
    tag = blake2b(normalised.encode(), digest_size=TAG_BYTES, key=first, person=b"sp-tag").digest()
    return tag if len(pepper) == len(first) else chain(pepper[PEPPER_BYTES:], tag)


def chain(peppers: bytes, tag: bytes) -> bytes:
    """The tag after further generations of the pepper, which need no address: tag2 = BLAKE2b(pepper2, tag1)."""
    for at in range(0, len(peppers), PEPPER_BYTES):
        key = peppers[at : at + PEPPER_BYTES]
        tag = blake2b(tag, digest_size=TAG_BYTES, key=key, person=b"sp-tag-chain").digest()
    return tag


def domain_tag(pepper: bytes, domain: str) -> bytes:
    """The tag under which a whole domain (A-label) is suppressed. No address is without a local part: no clash."""
    return tag_of(pepper, "@" + domain)


def mref_of(job_key: bytes, normalised: str) -> int:
    """The reference of a message within its job: signed 64-bit reading of BLAKE2b-8 under the job's key (section 5)."""
    return int.from_bytes(blake2b(normalised.encode(), digest_size=8, key=job_key).digest(), "big", signed=True)


class References:
    """`mref_of` and `tag_of` of many addresses under one job's key and one pepper: the keys' own blocks of the hashes
    are done once, which leaves 0.8 us of 1.4 for an address. Holds what the keys do: keep it no longer than them."""

    __slots__ = ("_further", "_mref", "_tag")

    def __init__(self, job_key: bytes, pepper: bytes) -> None:
        self._mref = blake2b(digest_size=8, key=job_key)
        self._tag = blake2b(digest_size=TAG_BYTES, key=pepper[:PEPPER_BYTES], person=b"sp-tag")
        self._further = pepper[PEPPER_BYTES:]

    def of(self, normalised: str) -> tuple[int, bytes]:
        """(mref, suppression tag) of a normalised address."""
        octets = normalised.encode()
        mref, tag = self._mref.copy(), self._tag.copy()
        mref.update(octets)
        tag.update(octets)
        told = tag.digest()
        if self._further:
            told = chain(self._further, told)
        return int.from_bytes(mref.digest(), "big", signed=True), told


def mref_bytes(mref: int) -> bytes:
    """The 8 bytes an mref was read from. Raises OverflowError outside 64 bits."""
    return mref.to_bytes(8, "big", signed=True)
