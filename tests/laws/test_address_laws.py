"""Laws of `policy.address`: whatever comes in, what comes out is safe on the wire, one spelling, and names nobody."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from hypothesis import assume, example, given
from hypothesis import strategies as st

from policy.address import (
    AddressError,
    Mailbox,
    References,
    domain_tag,
    mref_bytes,
    mref_of,
    normalise,
    parse,
    parse_domain,
    parse_leniently,
    provider_canonical,
    tag_of,
)

ATEXT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+/=?^_`{|}~-"
atoms = st.text(ATEXT, min_size=1, max_size=12)
dot_atoms = st.lists(atoms, min_size=1, max_size=4).map(".".join)
labels = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
domains = st.lists(labels, min_size=1, max_size=4).map(".".join)
plain = st.tuples(dot_atoms, domains).map("@".join)
letters = st.characters(categories=("L", "M", "N"), min_codepoint=0x80)
unicode_locals = st.text(letters | st.sampled_from("abcAB.+"), min_size=1, max_size=12)
quoted = st.text(st.sampled_from('ab .@\\"(),:;[]'), max_size=12).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
locals_ = dot_atoms | unicode_locals | quoted
# Pieces that have broken parsers before, in any order: the mutation fuzz of this boundary.
PIECES = ["@", ".", "..", '"', "\\", "<", ">", "\r", "\n", "\r\n", "\0", "\t", " ", "a", "b.c", "example.com", "xn--"]
PIECES += ["-", "\u202e", "\u200b", "\u00ad", "ß", "ﬀ", "＠", "。", "[", "]", "[127.0.0.1]", "RCPT TO:<x@y>", "\ud800"]
PIECES += [
    "a" * 64,
    "b" * 63,
    "c." * 130,
    "1",
    "İ",
    "\U000e0041",
    ",",
    ";",
    ":",
    "\x7f",
    "\x85",
    "\u2028",
    "é",
    "(",
    ")",
]
garbage = st.lists(st.sampled_from(PIECES), max_size=9).map("".join) | st.text(max_size=80)

# RFC 5321 4.1.2 Mailbox without literals, with RFC 6531's characters; nothing below space, no "<" or ">", no DEL.
SAFE_WIRE = re.compile(r"[^\x00-\x1f\x7f<>\u0080-\u009f\u2028\u2029\ud800-\udfff]+@[a-z0-9-]+(\.[a-z0-9-]+)*")


def outcome(text: str, way: Callable[[str], Mailbox] = parse) -> Mailbox | AddressError:
    """Any other exception fails the test that asked."""
    try:
        return way(text)
    except AddressError as error:
        return error


def parsed(text: str) -> Mailbox:
    mailbox = outcome(text)
    assume(isinstance(mailbox, Mailbox))
    assert isinstance(mailbox, Mailbox)
    return mailbox


@given(garbage)
@example("a@b\r\nRCPT TO:<x>")
@example('"a\r\nb"@example.com')
@example("a" * 65 + "@example.com")
@example("a@" + ".".join(["b" * 60] * 5))
def test_what_is_accepted_is_safe_between_angle_brackets(text: str) -> None:
    """Law: no input raises anything but AddressError; what is accepted holds no control, CR, LF, < or >, and fits."""
    for way in (parse, parse_leniently):
        mailbox = outcome(text, way)
        if isinstance(mailbox, AddressError):
            assert re.fullmatch(r"[a-z0-9-]+", mailbox.reason)
            continue
        wire = mailbox.wire
        assert SAFE_WIRE.fullmatch(wire), ascii(wire)
        assert len(mailbox.local.encode()) <= 64
        assert len(mailbox.domain) <= 253
        assert len(wire.encode()) <= 254
        assert mailbox.domain.isascii()
        assert mailbox.domain == mailbox.domain.lower()
        assert unicodedata.is_normalized("NFC", mailbox.local)
        assert mailbox.needs_smtputf8 == (not wire.isascii())


@given(garbage | plain)
def test_an_error_never_holds_the_address(text: str) -> None:
    """Law: what is refused may be logged by its reason; the text of the error is one of a few."""
    error = outcome(text)
    if isinstance(error, AddressError):
        assert str(error) == f"not a deliverable address: {error.reason}"
        assert error.__cause__ is None


@given(plain)
def test_plain_addresses_come_through_unchanged(text: str) -> None:
    """Law: an ordinary address keeps its local part to the letter (case included) and its domain in lower case."""
    local, _, domain = text.rpartition("@")
    assert parse(text) == Mailbox(local, domain)
    assert parse(f"{local}@{domain.upper()}") == Mailbox(local, domain)


@given(locals_, domains)
def test_parsing_what_was_parsed_changes_nothing(local: str, domain: str) -> None:
    """Law: parse(parse(x).wire) == parse(x)."""
    mailbox = parsed(f"{local}@{domain}")
    assert parse(mailbox.wire) == mailbox
    assert parse_leniently(mailbox.wire) == mailbox


@given(locals_, domains)
@example("ﬀ", "example.com")
@example("İ", "example.com")
@example("\u1e9e\u0345", "example.com")
@example('"a b"', "example.com")
def test_normalising_is_idempotent(local: str, domain: str) -> None:
    """Law: normalise(normalise(x)) == normalise(x), quotes and all."""
    mailbox = parsed(f"{local}@{domain}")
    once = normalise(mailbox.local, mailbox.domain)
    again_local, _, again_domain = once.rpartition("@")
    assert normalise(again_local, again_domain) == once
    assert again_domain == mailbox.domain
    assert provider_canonical(provider_canonical(once)) == provider_canonical(once)


def full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" and char not in '."\\@' else char for char in text)


@given(dot_atoms, domains)
def test_spellings_of_one_mailbox_have_one_tag(local: str, domain: str) -> None:
    """Law (faults.md 3.7): case, width, needless quotes, a dot at the end, and what nobody sees change no tag."""
    pepper = b"p" * 32
    plain_mailbox = parsed(f"{local}@{domain}")
    tag = tag_of(pepper, normalise(plain_mailbox.local, plain_mailbox.domain))
    spellings = [
        f"{local.upper()}@{domain}",
        f"{local.swapcase()}@{domain.upper()}",
        f'"{local}"@{domain}',
        '"' + "".join(f"\\{char}" for char in local[:20]) + local[20:] + f'"@{domain}',
        f"  {local}@{domain}.  ",
        f"\ufeff{local}@{domain}\u200b",
        f"{local[:1]}\u00ad{local[1:]}@{domain}",
        f"<{local}@{domain}>",
    ]
    if len(local) <= 21:  # three octets each; 64 is the limit
        spellings.append(f"{full_width(local)}@{domain}")
    for spelling in spellings:
        mailbox = outcome(spelling, parse_leniently)
        if isinstance(mailbox, AddressError):  # quotes and width cost octets; "<" and ">" come of no atom
            assert mailbox.reason in {"local-part-too-long", "address-too-long"}
            continue
        assert tag_of(pepper, normalise(mailbox.local, mailbox.domain)) == tag, ascii(spelling)


@given(plain, plain, st.binary(min_size=16, max_size=32), st.binary(min_size=16, max_size=32))
def test_references_need_their_key(one: str, other: str, key: bytes, another: bytes) -> None:
    """Law: a tag and an mref are functions of key and address; another key or another address gives another one."""
    assume(one.lower() != other.lower())
    assume(key.rstrip(b"\0") != another.rstrip(b"\0"))  # BLAKE2 pads a key with zeros: the keyring's have one length
    assert tag_of(key, one) != tag_of(key, other)
    assert tag_of(key, one) != tag_of(another, one)
    assert mref_of(key, one) != mref_of(another, one)
    assert mref_of(key, one) != mref_of(key, other)
    assert len(tag_of(key, one)) == 12
    assert tag_of(key, one)[:8] != mref_bytes(mref_of(key, one))
    assert domain_tag(key, one.rpartition("@")[2]) not in {tag_of(key, one), tag_of(key, other)}


@given(
    st.lists(plain, min_size=1, max_size=4),
    st.binary(max_size=32),
    st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3).map(b"".join),
)
def test_references_of_many_are_those_of_each(addresses: list[str], key: bytes, pepper: bytes) -> None:
    """Law: `References` answers what `mref_of` and `tag_of` do, whatever was asked before, also with a pepper of
    several generations."""
    references = References(key, pepper)
    for address in addresses:
        assert references.of(address) == (mref_of(key, address), tag_of(pepper, address))


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_an_mref_and_its_bytes_are_one(mref: int) -> None:
    assert int.from_bytes(mref_bytes(mref), "big", signed=True) == mref


@given(garbage)
def test_a_domain_alone_is_parsed_as_in_an_address(text: str) -> None:
    """Law: parse_domain(d) is the domain of parse('a@' + d), or both refuse."""
    assume("@" not in text and not text.endswith((".", " ", "\t")) and not text.startswith((" ", "\t")))
    try:
        whole = parse(f"a@{text}").domain
    except AddressError:
        whole = ""
    try:
        alone = parse_domain(text)
    except AddressError:
        alone = ""
    assert alone == whole
