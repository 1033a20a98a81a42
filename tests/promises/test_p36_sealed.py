"""P-36: what names or quotes a person is sealed at rest, and keys are in the key store only: a dump tells nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from engine.campaign import expand
from engine.campaign.job import Recipient
from engine.queue.lanes import Lanes
from policy import schema, vault
from policy.drains import EventBook
from policy.events import Batch, Event, Kind
from policy.keys import Keyring, seal_note
from policy.valkey import call
from tests.journeys.test_nothing_in_clear import forms
from tests.promises.floor import EVE, NOW, Floor, floor
from tests.promises.marks import promise
from tests.world.octets import octets

__all__ = ["floor"]

CANARY = "zqcanaryhvbwoe"
SPILLED = f"550 5.1.1 <{CANARY}@example.com> unknown here"


class Clear:
    """A cipher that hides nothing."""

    def __init__(self, key: bytes) -> None:
        pass

    def encrypt(self, nonce: bytes, data: bytes, associated: bytes | None) -> bytes:
        return data + bytes(16)

    def decrypt(self, nonce: bytes, data: bytes, associated: bytes | None) -> bytes:
        return data[:-16]


def _dump(folder: Path) -> bytes:
    """The database as whoever steals it has it: file and log."""
    return b"".join(octets(path) for path in sorted(folder.glob("policy.db*")))


def _found(data: bytes) -> list[bytes]:
    return [form for form in forms(CANARY) if form in data]


async def _known(floor: Floor, address: str) -> Any:
    row = floor.house.row(address)
    await floor.write(lambda conn: vault.resolve(conn, floor.house.keyring, 1, [row], 2968, NOW))
    found = await floor.write(lambda conn: vault.find(conn, floor.house.keyring, row[0]))
    return found[0]


@promise("P-36", off={"policy.vault.AESGCM": Clear, "policy.keys.AESGCM": Clear})
async def test_p36_no_address_and_no_subjects_key_in_a_dump_of_the_database(floor: Floor) -> None:
    subject = await _known(floor, f"{CANARY}@example.com")
    assert subject.address == f"{CANARY}@example.com"
    dump = _dump(floor.house.folder)
    assert subject.number in {row.number for row in await floor.rows(schema.subject)}
    assert _found(dump) == []
    assert subject.key not in dump


@promise("P-36", off={"policy.keys.AESGCM": Clear})
async def test_p36_no_reply_text_and_no_request_in_a_dump_of_the_database(floor: Floor) -> None:
    subject = await _known(floor, EVE)
    note = seal_note(floor.house.keyring, SPILLED)

    def told(conn: Any) -> None:
        book = EventBook(conn.dialect.name, floor.house.keyring.service)
        event = Event(Kind.BOUNCED, 77, 1, NOW, subject.pseudonym(2968), b"", 0, 550, "5.1.1", 0, note)
        book.record(conn, [("s", "1-0", Batch(1, "example.com", [event]))])

    await floor.write(told)
    details = {"field": "name", "value": f"{CANARY} King"}
    await floor.desk.op_rights_open("rectification", f"{CANARY}@example.com", channel="letter", details=details)
    dump = _dump(floor.house.folder)
    assert note in dump
    assert _found(dump) == []


@promise("P-36", off={"engine.queue.slices._cipher": Clear})
async def test_p36_no_address_and_no_field_in_redis(redis: Redis, keyring: Keyring) -> None:
    """Everything that waits for a person, as the server's own dump has it."""
    terms = expand.Terms(7, 1, 0, 0, bytes(32), expires_at=NOW * 2, columns=frozenset({"name"}))
    rows: list[Recipient | None] = [Recipient(f"{CANARY}@example.com", fields={"name": f"{CANARY} Brown"})]
    prepared = expand.prepare(terms, keyring, 0, rows, 0, NOW)
    assert await Lanes(redis, "w").put(expand.shares(terms, keyring, prepared)) == [True]
    await call(redis, "CONFIG", "SET", "rdbcompression", "no")  # else a search of dumps proves nothing
    keys = [key async for key in redis.scan_iter()]
    assert keys
    dumps = [bytes(await call(redis, "DUMP", key)) + bytes(key) for key in keys]
    assert _found(b"".join(dumps)) == []


@promise("P-36", off={"policy.keys.Keyring.__repr__": lambda self: repr((self.pepper, self.service, self.token))})
def test_p36_keys_lie_in_the_key_store_alone_and_are_shown_nowhere(keyring: Keyring, tmp_path: Path) -> None:
    assert repr(keyring.service) not in repr(keyring)
    assert repr(keyring.pepper) not in f"{keyring!r} {keyring!s} {[keyring]}"
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "keys").iterdir() if path.is_file()} == {0}
