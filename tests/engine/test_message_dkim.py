"""Signatures: verified by dkimpy, reproduced from RFC 8463, and without the tags that let strangers in."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import dkim  # type: ignore[import-untyped]  # dkimpy has no types
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from engine.message import (
    Message,
    OpenSSLSigner,
    Person,
    Program,
    Signer,
    Unsigned,
    compile_campaign,
    compose,
    headers,
    load_signer,
    sign_batch,
)
from policy.gate import Permit
from tests.engine.newsletter import campaign, recipient

NOW = int(time.time() * 1_000_000)  # dkimpy looks at the clock: x= must lie ahead


@pytest.fixture(scope="module")
def rsa_signer() -> OpenSSLSigner:
    return OpenSSLSigner("shop.example", "s2026", rsa.generate_private_key(65537, 2048))


@pytest.fixture(scope="module")
def ed_signer() -> OpenSSLSigner:
    return OpenSSLSigner("shop.example", "e2026", ed25519.Ed25519PrivateKey.generate())


def sent(number: int, *signers: OpenSSLSigner) -> Message:
    program = compile_campaign(campaign())
    assert isinstance(program, Program)
    person = Person(5, number, f"p{number}@example.com", recipient(number), optout_url="https://t.example/u/x",
                    preferences_url="https://t.example/p/x", optout_mailto="u+x@bounce.example")  # fmt: skip
    return sign_batch([compose(Permit(5, number, 0.0), program, person, NOW)], signers)[0]


def verifies(wire: bytes, index: int, *signers: OpenSSLSigner) -> bool:
    records = {f"{s.selector}._domainkey.{s.domain}.": s.public_record().encode() for s in signers}

    def look_up(name: bytes | str, timeout: int = 0) -> bytes | None:
        return records.get(name.decode() if isinstance(name, bytes) else name)

    try:
        return bool(dkim.DKIM(wire).verify(index, dnsfunc=look_up))
    except dkim.DKIMException:
        return False


def test_both_signatures_verify(rsa_signer: OpenSSLSigner, ed_signer: OpenSSLSigner) -> None:
    wire = sent(1, rsa_signer, ed_signer).wire

    assert verifies(wire, 0, rsa_signer, ed_signer)
    assert verifies(wire, 1, rsa_signer, ed_signer)
    assert not verifies(wire.replace(b"Person1", b"Person2"), 0, rsa_signer, ed_signer)
    assert not verifies(wire.replace(b"To: p1@", b"To: p2@"), 1, rsa_signer, ed_signer)


@pytest.mark.parametrize(
    "name", [b"From", b"Reply-To", b"Subject", b"Date", b"To", b"Cc", b"Content-Type", b"List-Unsubscribe"]
)
def test_no_header_can_be_added(rsa_signer: OpenSSLSigner, name: bytes) -> None:
    """Oversigned: one instance more than there is (mail-standards.md 2.3)."""
    wire = sent(1, rsa_signer).wire
    assert verifies(wire, 0, rsa_signer)

    head, _, rest = wire.partition(b"\r\nSubject:")
    forged = head + b"\r\n" + name + b": evil@example.net\r\nSubject:" + rest
    assert not verifies(forged, 0, rsa_signer)
    top = name + b": evil@example.net\r\n" + wire
    assert not verifies(top, 0, rsa_signer)


def test_the_tags(rsa_signer: OpenSSLSigner) -> None:
    message = sent(1, rsa_signer)
    assert message.size == len(message.wire)
    field = re.match(rb"DKIM-Signature: (.*?)\r\n(?! )", message.wire, re.DOTALL)
    assert field is not None
    tags = dict(pair.strip().split("=", 1) for pair in field.group(1).decode().replace("\r\n", "").split(";"))

    assert "l" not in tags
    assert tags["c"] == "relaxed/relaxed"
    assert int(tags["x"]) - int(tags["t"]) == 14 * 86_400
    assert int(tags["t"]) == NOW // 1_000_000
    signed = [name.strip() for name in tags["h"].split(":")]
    for name in (
        "from",
        "to",
        "subject",
        "date",
        "content-type",
        "mime-version",
        "list-unsubscribe",
        "list-unsubscribe-post",
    ):
        assert signed.count(name) == 2
    for name in ("message-id", "list-id", "feedback-id"):
        assert signed.count(name) == 1
    assert all(len(line) <= 78 for line in field.group(0).split(b"\r\n"))


def test_a_batch_in_threads_is_the_same_batch(rsa_signer: OpenSSLSigner) -> None:
    """RSA PKCS#1 v1.5 and Ed25519 are deterministic: the same message signs to the same bytes on every attempt."""
    with ThreadPoolExecutor(4) as pool:
        wires = list(pool.map(lambda number: sent(number % 3, rsa_signer).wire, range(24)))

    assert len(set(wires)) == 3
    assert all(verifies(wire, 0, rsa_signer) for wire in set(wires))


def test_an_rsa_signature_is_always_there(ed_signer: OpenSSLSigner) -> None:
    with pytest.raises(ValueError, match="RSA"):
        sent(1, ed_signer)


def test_keys_are_judged(rsa_signer: OpenSSLSigner, ed_signer: OpenSSLSigner) -> None:
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key = ed25519.Ed25519PrivateKey.generate().private_bytes(*pem)

    assert load_signer("shop.example", "e", key).algorithm == "ed25519-sha256"
    assert rsa_signer.self_test()
    assert ed_signer.self_test()
    with pytest.raises(ValueError, match="not a PEM"):
        load_signer("shop.example", "e", b"nonsense")
    with pytest.raises(ValueError, match="neither"):
        load_signer("shop.example", "e", ec.generate_private_key(ec.SECP256R1()).private_bytes(*pem))
    with pytest.raises(ValueError, match="2048"):
        OpenSSLSigner("shop.example", "s", rsa.generate_private_key(65537, 1024))  # refused is the test
    with pytest.raises(ValueError, match="DNS"):
        OpenSSLSigner("shop.example; l=0", "s", ed25519.Ed25519PrivateKey.generate())
    assert "key" not in repr(rsa_signer).lower().replace("domainkey", "")


def test_the_ed25519_signature_of_rfc_8463() -> None:
    """Our signing core, given the RFC's key and message (simple/simple), makes the b= that the RFC prints."""
    raw = (Path(__file__).parent / "rfc8463.eml").read_bytes()
    head, _, body = raw.partition(b"\r\n\r\n")
    body = body.rstrip(b"\r\n") + b"\r\n"  # simple canonicalisation, RFC 6376 3.4.3
    fields = re.findall(rb"(?:^|(?<=\r\n))(\S.*?\r\n)(?=\S|$)", head + b"\r\n", re.DOTALL)
    assert base64.b64encode(sha256(body).digest()) == b"4bLNXImK9drULnmePzZNEBleUanJCX5PIsDIFoH4KTQ="
    signature = fields[0]
    wanted = re.search(rb"b=([A-Za-z0-9+/=\s]+)$", signature)
    assert wanted is not None
    unsigned = signature[: wanted.start(1)]
    by_name = {field.partition(b":")[0].lower(): field for field in fields}
    signed = b"".join(by_name[name] for name in (b"from", b"to", b"subject", b"date", b"message-id"))
    key = ed25519.Ed25519PrivateKey.from_private_bytes(base64.b64decode("nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="))
    signer = OpenSSLSigner("football.example.com", "brisbane", key)

    assert signer.public_record() == "v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
    made = signer.sign([sha256(signed + unsigned).digest()])[0]
    assert made == base64.b64decode(wanted.group(1))


class Scribbler:
    """A signer that signs nothing: what it is given comes back, to compare what is around the signature."""

    def __init__(self, algorithm: str, domain: str, octets: int) -> None:
        self.algorithm, self.domain, self.selector, self._octets = algorithm, domain, "s2026", octets

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        return [(digest * 16)[: self._octets] for digest in digests]


def plainly(message: Unsigned, signers: Sequence[Signer]) -> bytes:
    """RFC 6376 3.5 word for word and slowly: what sign_batch must come to, whatever it does to be quick."""
    fields = b""
    for signer in signers:
        names = message.signed.split(":")
        listed = ":\r\n ".join(":".join(names[at : at + 5]) for at in range(0, len(names), 5))
        body = message.body if message.hashed is None else message.hashed
        body_hash = base64.b64encode(sha256(body).digest()).decode()
        tags = [
            f"DKIM-Signature: v=1; a={signer.algorithm}; c=relaxed/relaxed; d={signer.domain};",
            f" s={signer.selector};",
            f" h={listed};",
            f" t={message.at}; x={message.at + 14 * 86_400};",
            f" bh={body_hash};",
            " b=",
        ]
        unsigned = "\r\n".join(tags).encode()
        digest = message.head_hash.copy()
        digest.update(headers.relaxed(unsigned + b"\r\n").removesuffix(b"\r\n"))
        encoded = base64.b64encode(signer.sign([digest.digest()])[0])
        fields += unsigned + b"\r\n ".join(re.findall(rb".{1,72}", encoded)) + b"\r\n"
    return fields + message.head + b"\r\n" + message.body


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,30}", fullmatch=True), min_size=1, max_size=40).map(":".join)
UNSIGNED = st.builds(
    lambda head, body, signed, at, hashed: Unsigned(5, 1, head, body, sha256(head), signed, at, hashed),
    st.binary(max_size=99), st.binary(max_size=300), st.sampled_from(["from:to", "from:from:to:to:subject"]) | NAMES,
    st.integers(0, 1 << 40), st.none() | st.binary(max_size=9),
)  # fmt: skip


@given(
    batch=st.lists(UNSIGNED, max_size=9),
    domain=LABEL,
    octets=st.sampled_from([64, 256, 384, 512]),
    second=st.booleans(),
)
def test_every_signature_is_one_field_and_says_what_the_rfc_says(
    batch: list[Unsigned], domain: str, octets: int, second: bool
) -> None:
    """Also in batches of messages of several campaigns and several slices, and with keys of any size."""
    signers = [Scribbler("rsa-sha256", f"{domain}.example", octets)]
    if second:
        signers.append(Scribbler("ed25519-sha256", f"{domain}.example", 64))
    wires = [message.wire for message in sign_batch(batch, signers)]

    assert wires == [plainly(message, signers) for message in batch]
    for message, wire in zip(batch, wires, strict=True):
        written = wire.removesuffix(message.head + b"\r\n" + message.body)
        fields = re.findall(rb"DKIM-Signature: (?:[^\n]|\n )*\r\n(?! )", written)
        assert b"".join(fields) == written
        assert len(fields) == len(signers)
        for field in fields:
            assert headers.finished("DKIM-Signature", field) == field
    assert [message.wire for message in sign_batch(batch, signers)] == wires  # nothing of the first time is left


def test_a_header_list_that_breaks_the_line_is_refused() -> None:
    """The writer of header fields sees the lead of every kind of signature before the first one leaves."""
    forged = Unsigned(5, 1, b"", b"", sha256(), "from:to\r\nBcc: evil@example.net", 1_790_000_000)

    with pytest.raises(headers.HeaderError):
        sign_batch([forged], [Scribbler("rsa-sha256", "shop.example", 256)])
