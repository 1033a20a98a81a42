"""DKIM keys that are exchanged while a worker runs: jobs in hand sign with the new ones from their next batch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import cast

import msgspec
import pytest

from engine.delivery.campaigns import Campaigns, Loaded, compose_together
from engine.delivery.hand import Hand, Letter
from engine.message import Campaign, Signer
from engine.queue.lanes import Lease
from engine.queue.slices import Contents, Header, Row
from engine.settings import KeyFileError
from policy.gate import Permit
from policy.keys import Keyring, seal
from policy.ledger import JobPayload, Reader
from policy.wire import job_aad


class Named:
    """A signer that shows who signed."""

    algorithm = "rsa-sha256"

    def __init__(self, domain: str, selector: str) -> None:
        self.domain, self.selector = domain, selector

    def sign(self, digests: Sequence[bytes]) -> list[bytes]:
        return [digest * 8 for digest in digests]


class Rows:
    """The one question of a Reader that is asked here: jobs 1 and 2 of a.example, 3 of b.example."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def job_payload(self, number: int) -> JobPayload:
        letter = Campaign("Hi", f"x@{'b' if number == 3 else 'a'}.example", text="Hello {{ name }}\n", bulk=False)
        payload = seal(self._keyring.service, msgspec.msgpack.encode(letter), job_aad("payload", "acc", f"j{number}"))
        key = seal(self._keyring.service, os.urandom(32), job_aad("key", "acc", f"j{number}"))
        return JobPayload(
            number, 1, "acc", f"j{number}", "running", "transactional", 0, "", 0, "", "hold", False, False, 0, 0, 0,
            None, None, 1, payload, key,
        )  # fmt: skip


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring.create(tmp_path_factory.mktemp("ring") / "keys", 2900)


def campaigns(keyring: Keyring, signers: dict[str, list[Signer]]) -> Campaigns:
    reader = cast("Reader", Rows(keyring))
    return Campaigns(reader, lambda: keyring, signers, public_url="https://t.example", bounce_domain="bounce.example")


def keys(selector: str, *domains: str) -> dict[str, list[Signer]]:
    return {domain: [Named(domain, selector)] for domain in domains}


async def got(of: Campaigns, number: int) -> Loaded:
    loaded = await of.get(number)
    assert loaded is not None
    return loaded


def selectors(job: Loaded, keyring: Keyring) -> set[bytes]:
    """Which keys the job's next batch is signed with."""
    header = Header(job.number, 2900, 2, 0, 0, 0, 0, 1_790_000_000_000_000, 1, 1 << 60, "00")
    contents = Contents("people.example", ["name"], [Row(name, 1, 2, 0, 0, [name]) for name in ("ada", "bob")])
    hand = Hand(Lease(3, "1", "site", "00", 1, b""), header, contents, job, keyring.pepper)
    pairs = []
    for index in range(2):
        mref = hand.reference(index)[0]
        pairs.append((Permit(job.number, mref, 0.0), Letter(hand, index, mref)))
    composed, failed = compose_together(pairs)
    assert failed == []
    return {wire.partition(b"s=")[2].partition(b";")[0] for *_, wire in composed}


def test_jobs_in_hand_sign_with_the_new_key_from_their_next_batch(keyring: Keyring) -> None:
    async def story() -> None:
        room = campaigns(keyring, keys("old", "a.example", "b.example"))
        held, other = await got(room, 1), await got(room, 3)
        assert selectors(held, keyring) == selectors(other, keyring) == {b"old"}

        assert await room.reload_signers(lambda: {**keys("new", "a.example"), **keys("old", "b.example")})

        assert selectors(held, keyring) == selectors(await got(room, 2), keyring) == {b"new"}
        assert selectors(other, keyring) == {b"old"}

    asyncio.run(story())


@pytest.mark.parametrize(
    "fault", [ValueError("not a PEM private key"), KeyFileError("k.pem: run: chmod 600 k.pem"), OSError("gone")]
)
def test_a_reload_that_fails_keeps_the_old_keys_and_says_so_once(
    keyring: Keyring, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    def failing() -> dict[str, list[Signer]]:
        raise fault

    async def story() -> None:
        room = campaigns(keyring, keys("old", "a.example"))
        held = await got(room, 1)
        for _ in range(3):
            assert not await room.reload_signers(failing)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert selectors(held, keyring) == selectors(await got(room, 2), keyring) == {b"old"}

        assert await room.reload_signers(lambda: keys("new", "a.example"))
        assert selectors(held, keyring) == {b"new"}
        assert not await room.reload_signers(failing)  # a new story: said again
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 2

    asyncio.run(story())


def test_a_key_that_comes_later_is_found_and_one_that_goes_stays_with_jobs_in_hand(
    keyring: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        room = campaigns(keyring, keys("old", "a.example"))
        held = await got(room, 1)
        assert await room.get(3) is None  # no key for b.example yet

        assert await room.reload_signers(lambda: keys("new", "b.example"))
        assert selectors(await got(room, 3), keyring) == {b"new"}
        assert selectors(held, keyring) == {b"old"}
        assert await room.get(2) is None
        assert [getattr(record, "domain", None) for record in caplog.records if "no signing key" in record.message] == [
            "a.example"
        ]

        assert await room.reload_signers(lambda: keys("newer", "a.example", "b.example"))
        assert selectors(held, keyring) == selectors(await got(room, 2), keyring) == {b"newer"}

    asyncio.run(story())


def test_a_load_that_waits_for_its_thread_meets_the_exchange(keyring: Keyring) -> None:
    """A job that is being read while keys are exchanged never keeps the old ones."""

    async def story() -> None:
        room = campaigns(keyring, keys("old", "a.example"))
        loading = asyncio.ensure_future(room.get(1))
        await room.reload_signers(lambda: keys("new", "a.example"))
        loaded = await loading
        assert loaded is not None
        assert selectors(loaded, keyring) == {b"new"}

    asyncio.run(story())
