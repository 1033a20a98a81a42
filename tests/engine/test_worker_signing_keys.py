"""DKIM selectors are rotated by putting files into the keys folder, while the worker runs."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from engine import worker
from engine.delivery.campaigns import Campaigns
from engine.settings import EngineSettings

PEM = rsa.generate_private_key(65537, 2048).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)


def put(folder: Path, name: str, data: bytes) -> None:
    path = folder / "dkim" / name
    path.touch(mode=0o600)
    path.write_bytes(data)


async def test_a_new_selector_signs_without_a_restart_and_a_half_written_one_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "KEYS_LOOK_SECONDS", 0.01)
    (tmp_path / "dkim").mkdir()
    put(tmp_path, "a.example.2026a.rsa.pem", PEM)
    settings = EngineSettings.model_validate({"signing": {"implementation": "openssl"}})
    signing = worker.SigningKeys(settings, tmp_path)
    signers = signing.load()
    campaigns = Campaigns(
        None, lambda: None, signers, public_url="https://t.example", bounce_domain="b.example"  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    following = asyncio.create_task(signing.follow(campaigns))
    try:
        assert campaigns.signing_domains == {"a.example"}
        put(tmp_path, "a.example.2026b.rsa.pem", PEM[:100])  # half of it
        put(tmp_path, "b.example.2026b.rsa.pem", PEM)
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert campaigns.signing_domains == {"a.example"}, "nothing is exchanged while one of them does not open"
        put(tmp_path, "a.example.2026b.rsa.pem", PEM)
        async with asyncio.timeout(10):
            while campaigns.signing_domains != {"a.example", "b.example"}:
                await asyncio.sleep(0.01)
        assert [one.selector for one in signing.load()["a.example"]] == ["2026b"]
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
