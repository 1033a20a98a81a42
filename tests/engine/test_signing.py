"""Which signers a worker starts with, and how letters of several jobs come to be signed together."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engine.delivery import campaigns
from engine.delivery.campaigns import Implementation, compose_together, load_signers
from engine.delivery.hand import Hand, Letter
from engine.message import OpenSSLSigner, Signer
from engine.message.multibuffer import Key, LaneMaker, Lanes, MultiBufferSigner, Unavailable, open_library
from engine.queue.lanes import Lease
from engine.queue.slices import Contents, Header
from engine.settings import DkimFiles, EngineSettings
from policy.gate import Permit
from policy.keys import Keyring
from tests.world.courier import Job, make_job, row

PEM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DkimFiles]:
    """Two From domains, one of them with an Ed25519 key, too."""
    folder = tmp_path_factory.mktemp("dkim")
    for name in ("a", "b"):
        (folder / name).write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*PEM))
    (folder / "e").write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*PEM))
    return {
        "a.example": DkimFiles("a.example", "s", folder / "a", "e", folder / "e"),
        "b.example": DkimFiles("b.example", "s", folder / "b", None, None),
    }


class Maker:
    """Lanes that are OpenSSL underneath; wrong: they sign something else."""

    def __init__(self, *, wrong: bool = False) -> None:
        self.wrong = wrong

    def lanes(self, key: Key) -> Lanes:
        return Underneath(OpenSSLSigner("x.example", "s", key), self.wrong)


class Underneath:
    def __init__(self, plain: OpenSSLSigner, wrong: bool) -> None:
        self.plain, self.wrong = plain, wrong
        self.sizes: list[int] = []

    def sign(self, digests: Sequence[bytes]) -> list[bytes] | None:
        self.sizes.append(len(digests))
        signatures = self.plain.sign(digests)
        return [signature[::-1] for signature in signatures] if self.wrong else signatures


def clock(lanes: float, alone: float) -> Callable[[], float]:
    """By which three calls of lanes take so many seconds, then three of OpenSSL, and so on."""

    def readings() -> Iterator[float]:
        for number in itertools.count():
            yield 100.0 * number
            yield 100.0 * number + (lanes if number % 6 < 3 else alone)

    return readings().__next__


def kinds(signers: dict[str, list[Signer]]) -> dict[str, list[type]]:
    return {domain: [type(signer) for signer in found] for domain, found in signers.items()}


PLAIN = {"a.example": [OpenSSLSigner, OpenSSLSigner], "b.example": [OpenSSLSigner]}
FAST = {"a.example": [MultiBufferSigner, MultiBufferSigner], "b.example": [MultiBufferSigner]}


def missing() -> LaneMaker:
    raise Unavailable("the extra `fast` is not installed")


@pytest.mark.parametrize("implementation", ["auto", "multi-buffer"])
def test_lanes_sign_where_they_can_be_had(
    files: dict[str, DkimFiles], implementation: Implementation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    signers = load_signers(files, implementation, opened=Maker, clock=clock(1.0, 2.0))

    assert kinds(signers) == FAST
    assert [signer.algorithm for signer in signers["a.example"]] == ["rsa-sha256", "ed25519-sha256"]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("opened", "lanes", "why"),
    [
        (missing, 1.0, "the extra `fast` is not installed"),
        (lambda: Maker(wrong=True), 1.0, "not those of OpenSSL"),
        (Maker, 3.0, "slower here"),
    ],
    ids=["missing", "wrong", "slower"],
)
def test_openssl_signs_where_they_cannot_and_one_line_says_why(
    files: dict[str, DkimFiles],
    opened: Callable[[], LaneMaker],
    lanes: float,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert kinds(load_signers(files, opened=opened, clock=clock(lanes, 2.0))) == PLAIN
    [line] = caplog.records
    assert why in line.__dict__["why"]

    with pytest.raises(ValueError, match=r'"multi-buffer" cannot be had: .*' + why):
        load_signers(files, "multi-buffer", opened=opened, clock=clock(lanes, 2.0))


def test_openssl_is_openssl(files: dict[str, DkimFiles], caplog: pytest.LogCaptureFixture) -> None:
    """The library is not even loaded."""

    def never() -> LaneMaker:
        raise AssertionError("loaded")

    caplog.set_level(logging.INFO)
    assert kinds(load_signers(files, "openssl", opened=never)) == PLAIN
    assert caplog.records == []


def test_the_setting_has_the_words_of_the_room() -> None:
    assert EngineSettings().signing.implementation == "auto"
    with pytest.raises(ValueError, match="openssl"):
        EngineSettings.model_validate({"signing": {"implementation": "libressl"}})


# --- letters of several jobs ------------------------------------------------------------------------------------------


class Counter:
    """A signer that remembers how many digests it got at once."""

    algorithm, domain, selector = "rsa-sha256", "letter.example", "s1"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        self.sizes.append(len(digests))
        return [digest * 8 for digest in digests]


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring.create(tmp_path_factory.mktemp("ring") / "keys", 2900)


def letters(job: Job, keyring: Keyring, names: Sequence[str]) -> list[tuple[Permit, Letter]]:
    header = Header(job.number, 2900, len(names), 0, 0, 0, 0, 1_790_000_000_000_000 + job.number, 1, 1 << 60, "00")
    contents = Contents("people.example", ["name"], [row(name, place) for place, name in enumerate(names)])
    hand = Hand(Lease(3, f"{job.number:x}", "site", "00", 1, b""), header, contents, job, keyring.pepper)
    made = []
    for index in range(len(names)):
        mref = hand.reference(index)[0]
        made.append((Permit(job.number, mref, 0.0), Letter(hand, index, mref)))
    return made


@pytest.mark.doubles
def test_jobs_of_one_domain_are_signed_together_and_come_back_in_order(keyring: Keyring) -> None:
    """Four jobs, two of them with other keys, in turn: two calls of four digests each, and every message where its
    letter stood, the same as if its job had been alone."""
    one, other = Counter(), Counter()
    jobs = [replace(make_job(number, keyring), signers=[other if number > 2 else one]) for number in (1, 2, 3, 4)]
    by_job = [letters(job, keyring, ["ada", "bob"]) for job in jobs]
    mixed = [pairs[place] for place in (0, 1) for pairs in by_job]

    composed, failed = compose_together(mixed)

    assert failed == []
    assert one.sizes == other.sizes == [4]
    assert [letter for letter, *_ in composed] == [letter for _, letter in mixed]
    assert [recipient for _, _, recipient, _ in composed] == ["ada@people.example"] * 4 + ["bob@people.example"] * 4
    alone = {id(done[0]): done[1:] for pairs in by_job for done in compose_together(pairs)[0]}
    assert [done[1:] for done in composed] == [alone[id(letter)] for letter, *_ in composed]
    assert len({sender for _, sender, _, _ in composed}) == 8


@pytest.mark.doubles
def test_who_cannot_be_written_to_does_not_stop_the_others(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, campaigns.__name__)
    counter = Counter()
    job = replace(make_job(1, keyring), signers=[counter])
    pairs = letters(job, keyring, ["ada", "bob", "eve", "dan"])
    rows = pairs[0][1].hand.contents.rows
    rows[1].values[0] = "Bob\r\nBcc: everybody"
    rows[2].mode_opens = 9

    composed, failed = compose_together(pairs)

    assert [letter.index for letter, *_ in composed] == [0, 3]
    assert [letter.index for letter in failed] == [1, 2]
    assert counter.sizes == [2]
    assert "Bob" not in caplog.text
    assert "people.example" not in caplog.text


def test_nobody_is_nothing() -> None:
    assert compose_together([]) == ([], [])


@pytest.mark.fast
def test_mail_signed_by_the_real_library_is_the_same_mail(files: dict[str, DkimFiles], keyring: Keyring) -> None:
    """Eight of RSA at once, five more, three that OpenSSL signs; Ed25519 beside it."""
    job = make_job(1, keyring)
    pairs = letters(job, keyring, [f"p{number}" for number in range(24)])
    fast = load_signers(files, "multi-buffer", opened=open_library, clock=clock(1.0, 2.0))["a.example"]
    plain = load_signers(files, "openssl")["a.example"]

    for size in (3, 8, 13, 24):
        wires = []
        for signers in (fast, plain):
            own = replace(job, signers=signers)
            for _, letter in pairs:
                letter.hand.job = own
            wires.append([wire for *_, wire in compose_together(pairs[:size])[0]])
        assert wires[0] == wires[1]
        assert len(wires[0]) == size
    [counted, _] = [signer.tally for signer in fast if isinstance(signer, MultiBufferSigner)]
    assert (counted.calls, counted.by_openssl) == (1 + 2 + 3, 3)
