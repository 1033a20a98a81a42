"""P-11: a backup brings nobody back. A restored system serves only when what was erased since is erased again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select

from policy import backup, quarantine, schema, suppression
from policy.containers import Secret, new_key_file
from policy.instants import DAY_US
from policy.quarantine import QuarantineError
from policy.restoring import RestoreError, is_quarantined, restore
from policy.schema import open_store
from policy.settings import Officer, PolicySettings
from policy.tombstones import NAME
from tests.promises.floor import BOB, EVE, Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]

Restored = Callable[[], Awaitable[PolicySettings]]


def _settings(floor: Floor, valkey_url: str) -> PolicySettings:
    officer = Officer(name="Privacy Officer", address="privacy@example.org")
    return PolicySettings(officer=officer, data_dir=floor.house.folder, redis_url=valkey_url)


def _backed_up(floor: Floor, settings: PolicySettings, days: int = 35) -> tuple[Path, Secret, int]:
    """A backup of now; when it ends."""
    key, out = floor.house.folder / "backup.key", floor.house.folder / "copy.backup"
    new_key_file(key)
    secret = Secret.of_key_file(key)
    made = backup.write(settings, floor.house.keyring, secret, out, floor.house.now, days, lambda *_: None)
    backup.publish(made, out)
    return out, secret, made.ends


def _told(settings: PolicySettings, work: Callable[[Connection], Any]) -> Any:
    engine = open_store(settings.sql_address(), writer=False)
    try:
        with engine.connect() as conn:
            return work(conn)
    finally:
        engine.dispose()


async def _restored(floor: Floor, settings: PolicySettings) -> tuple[bytes, bytes]:
    """Backup, erasure of Eve, restore: the tags of Eve and Bob, both known again."""
    out, secret, _ = _backed_up(floor, settings)
    await floor.asks("erasure")
    await floor.purged()
    floor.tombstones.close()
    await floor.house.enforcement.close()
    await floor.house.store.close()
    restore(settings, secret, out, floor.house.now)
    tags = floor.house.row(EVE)[0], floor.house.row(BOB)[0]
    assert set(tags) <= set(_told(settings, lambda conn: conn.scalars(select(schema.subject.c.tag)).all()))
    assert is_quarantined(settings.data_dir), "not ready"
    return tags


def _nothing(*_: object, **__: object) -> None:
    return


@promise("P-11", off={"policy.quarantine._replay": _nothing})
async def test_p11_restored_it_is_quarantined_until_who_was_erased_since_is_gone_again(
    floor: Floor, valkey_url: str
) -> None:
    settings = _settings(floor, valkey_url)
    eve, bob = await _restored(floor, settings)
    left = await quarantine.leave(settings, floor.house.keyring, lambda: floor.house.now)
    assert left is not None
    assert not is_quarantined(settings.data_dir)
    tags = _told(settings, lambda conn: conn.scalars(select(schema.subject.c.tag)).all())
    assert eve not in tags
    assert bob in tags, "and nobody else"
    standing = _told(settings, lambda conn: suppression.check(conn, eve))
    assert ("erasure", suppression.Scope.PLATFORM) in {(entry.reason, entry.scope) for entry in standing}


@promise("P-11", off={"policy.quarantine._lines": lambda settings, mark: []})
@pytest.mark.parametrize("what", ["missing", "cut"])
async def test_p11_without_the_whole_erasure_ledger_it_stays_quarantined(
    floor: Floor, valkey_url: str, what: str
) -> None:
    settings = _settings(floor, valkey_url)
    await _restored(floor, settings)
    path = settings.tombstones_dir / NAME
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(QuarantineError, match="erasure ledger"):
        await quarantine.leave(settings, floor.house.keyring, lambda: floor.house.now)
    assert is_quarantined(settings.data_dir)


@promise("P-11", off={"policy.backup._bounded": lambda days, most: days})
async def test_p11_a_copy_has_an_end_of_35_days_at_most(floor: Floor, valkey_url: str) -> None:
    settings = _settings(floor, valkey_url)
    out, secret, ends = _backed_up(floor, settings, 400)
    assert ends == floor.house.now + 35 * DAY_US
    with pytest.raises(RestoreError, match="to be destroyed"):
        restore(settings, secret, out, ends)
