"""P-11, P-17, P-22: erased is erased for good, in copies too; that somebody is not written to again outlives them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, select

from policy import accounts, chores, erasure, negative, personal, remembering, schema, suppression, vault
from policy.enforcement import Effects
from policy.events import Reason
from policy.gate import Permit, Refusal
from policy.instants import DAY_US, WEEK_US
from policy.keys import Keyring, ensure_week
from policy.personal import Erased, Person
from policy.records import Suppressions
from policy.schema import subject as subject_table
from policy.tombstones import NAME, Line, Tombstones
from tests.journeys.test_erasure import hashes
from tests.policy.test_erasure import ADA, NOW, Town, a_town
from tests.policy.test_rewrapping import PEOPLE, WEEK, House, everybody
from tests.policy.test_rewrapping import house as vaults
from tests.promises.floor import BOB, EVE, Floor, floor
from tests.promises.marks import promise
from tests.world.octets import octets

__all__ = ["floor", "vaults"]


@pytest.fixture
def town(conn: Connection, keyring: Keyring, tmp_path: Path) -> Iterator[Town]:
    made = a_town(conn, keyring, tmp_path)
    yield made
    made.ledger.close()


async def _takes_nothing(_place: Any, _person: Person) -> Erased:
    return Erased()


def _shreds_nothing(*_: object, **__: object) -> erasure.Shredded:
    return erasure.Shredded()


# --- P-17 -----------------------------------------------------------------------------------------------------------


@promise("P-17", off={"policy.records.Ledger.erase": _takes_nothing, "policy.records.Visits.erase": _takes_nothing})
async def test_p17_what_was_asked_for_ends_with_nothing_left_but_keyed_tags(floor: Floor) -> None:
    """Asked by mail, proved by the button, carried out by the worker, purged by the loop; nobody else's is touched."""
    mine, theirs = await floor.person(EVE), await floor.person(BOB)
    assert mine.references
    assert theirs.references
    before = await _exported(floor, theirs)
    ticket = await floor.asks("erasure")
    assert (await floor.desk.op_rights_show(ticket))["outcome"] == "erased"
    await floor.purged()
    for table in (schema.message, schema.history, schema.hit, schema.last_open):
        left = {(row.job, row.mref) for row in await floor.rows(table)}
        assert left.isdisjoint(mine.references), table.name
    assert (await floor.person(EVE)).subjects == frozenset()
    assert await _exported(floor, theirs) == before
    for spelled in hashes(EVE):
        assert await _where(floor, spelled) == []
    receipts = await floor.erasures.op_erasures()
    assert {row["state"] for row in receipts} == {"purged"}
    tag, partition, _ = floor.house.row(EVE)
    again = await floor.erasures.op_erase(0, tag, partition, EVE)
    assert (again["new"], again["messages"]) == (False, 0)
    assert ("erasure", "platform", 0) in await floor.standing(EVE)


async def _exported(floor: Floor, person: Person) -> list[tuple[str, str]]:
    told = [record for place in personal.every(floor.premises) for record in await place.export(person)]
    return sorted((record.kind, repr(sorted(record.values.items()))) for record in told)


async def _where(floor: Floor, needle: bytes) -> list[str]:
    """Files of the installation and keys of Redis with these bytes in them; keys and letters apart (a letter that
    waits is to the person, and goes when it is sent)."""
    files = [path for path in sorted(floor.house.folder.rglob("*")) if path.is_file()]
    found = [path.name for path in files if not {"keys", "outbox"} & set(path.parts) and needle in octets(path)]
    redis = floor.house.redis
    keys = [key async for key in redis.scan_iter()]
    return found + [repr(key) for key in keys if needle in key or needle in (await redis.dump(key) or b"")]


@promise("P-17", off={"policy.erasure.shred": _shreds_nothing})
async def test_p17_nothing_leads_back_from_the_answer_on(floor: Floor) -> None:
    """Key and identity are gone when the request is done: there is no undo, and a later import does not bring back
    what was."""
    numbers = (await floor.person(EVE)).subjects
    assert numbers
    tag, partition, _ = floor.house.row(EVE)
    await floor.erasures.op_erase(0, tag, partition, EVE)
    rows = await floor.rows(subject_table)
    assert numbers.isdisjoint(row.number for row in rows)
    assert rows, "the others are there"


def _forgets_to(_conn: Connection, _entries: object) -> int:
    return 0


@promise("P-17", off={"policy.suppression.add": _forgets_to})
def test_p17_nobody_is_ever_erased_without_being_suppressed(town: Town) -> None:
    """The entry is in the very transaction that begins, so a kill anywhere leaves both or none."""
    town.known(town.acme, ADA)
    savepoint = town.conn.begin_nested()
    town.begin(town.acme, ADA)
    assert [entry.reason for entry in suppression.check(town.conn, town.row(ADA)[0])] == ["erasure"]
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) is not None, "suppressed first"
    savepoint.rollback()
    assert town.conn.execute(select(schema.erasure)).all() == []


# --- P-22 -----------------------------------------------------------------------------------------------------------


async def _tidies_up(place: Suppressions, person: Person) -> Erased:
    """listmonk's way: what a person is, their opt-out included, goes with their row."""

    def work(conn: Connection) -> None:
        conn.execute(delete(schema.suppression).where(schema.suppression.c.tag == person.tag))

    await place._premises.store.write(work)
    return Erased(1)


@promise("P-22", off={"policy.records.Suppressions.erase": _tidies_up})
async def test_p22_an_opt_out_outlives_the_person_who_gave_it(floor: Floor) -> None:
    tag, partition, _ = floor.house.row(EVE)

    def opt_out(conn: Connection, effects: Effects) -> None:
        entry = suppression.Entry(tag, partition, suppression.Scope.ACCOUNT, 1, "opt-out", floor.house.now, "page")
        suppression.add(conn, [entry])
        effects.tags.add((tag, partition))

    await floor.house.enforcement.apply(opt_out)
    await floor.asks("erasure")
    await floor.purged()
    assert {("opt-out", "account", 1), ("erasure", "platform", 0)} <= await floor.standing(EVE)


async def _says_nothing(*_: object, **__: object) -> None:
    return


@promise("P-22", off={"policy.suppression.push": _says_nothing})
async def test_p22_an_account_made_anew_cannot_write_to_who_was_erased(floor: Floor) -> None:
    """The account is deleted, registers again, uploads the same list: the platform's entry skips the person."""
    assert isinstance(await floor.gate(EVE), Permit)
    await floor.asks("erasure")
    await floor.purged()

    def reborn(conn: Connection) -> int:
        return accounts.add(conn, "reborn", display_name="Same list", now=floor.house.now).number

    account = await floor.write(reborn)
    verdict = await floor.gate(EVE, account)
    assert isinstance(verdict, Refusal)
    assert verdict.reason is Reason.ERASED
    assert isinstance(await floor.gate("somebody.else@one.example", account), Permit)


# --- P-11 -----------------------------------------------------------------------------------------------------------


def _keeps_old_keys(*_: object) -> None:
    return


@promise("P-11", off={"policy.keysource.Folder.destroy": _keeps_old_keys})
async def test_p11_keys_in_a_copy_of_the_database_cannot_be_opened_three_weeks_later(vaults: House) -> None:
    """Copied, re-wrapped, the old wrapping key destroyed 14 days after its week: what the copy holds is nobody's."""
    copied = await vaults.store.write(lambda conn: conn.execute(select(subject_table)).mappings().all())
    assert len(copied) == PEOPLE
    for week in (WEEK + 1, WEEK + 2):
        await vaults.week(week)
        vaults.now += DAY_US
        await vaults.finish()
    vaults.now = WEEK * WEEK_US + WEEK_US + 14 * DAY_US
    ensure_week(vaults.folder, WEEK + 3)
    os.utime(vaults.folder / f"kek.{WEEK + 3}", ns=(vaults.now * 1000, vaults.now * 1000))
    await chores.turn_keys(vaults.store, vaults.folder, vaults.now)
    assert await vaults.addresses() == everybody(), "the living are wrapped anew"

    def restored(conn: Connection) -> list[int]:
        conn.execute(delete(subject_table))
        conn.execute(insert(subject_table), [dict(row) for row in copied])
        keyring, opened = Keyring.load(vaults.folder), []
        for row in copied:
            try:
                vault.get(conn, keyring, row["number"])
                opened.append(row["number"])
            except vault.VaultError:
                continue
        return opened

    assert await vaults.store.write(restored) == []


def _lets_them_back(_conn: Connection, _effects: Effects, _line: Line, _now: int) -> None:
    return


@promise("P-11", off={"policy.remembering._erase": _lets_them_back})
def test_p11_the_erasure_ledger_outside_the_backup_erases_again(town: Town) -> None:
    """Backup taken, somebody erased, restored: the replay brings the erasure back and says nowhere who it was."""
    subject, _ = town.known(town.acme, ADA)
    backup = town.conn.begin_nested()
    begun, _ = town.begin(town.acme, ADA)
    town.shred(begun.erasures[0])
    backup.rollback()
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) == subject, "the backup knows them"
    [line] = town.ledger.replay(since=NOW - DAY_US).lines
    effects = Effects()
    remembering.carry_out(town.conn, effects, line, NOW + DAY_US)
    for number in town.conn.scalars(select(schema.erasure.c.number)).all():
        town.shred(number)
    assert vault.number_of(town.conn, town.acme, town.row(ADA)[0]) is None
    assert [entry.reason for entry in suppression.check(town.conn, town.row(ADA)[0])] == ["erasure"]
    assert negative.standing(town.conn, subject) == "erased"
    written = town.ledger.path.read_bytes()
    assert [spelled for spelled in hashes(ADA) if spelled in written] == []


@promise("P-11", off={"policy.tombstones.Tombstones._head": lambda ledger: (0, "")})
def test_p11_an_erasure_ledger_that_was_cut_is_noticed(tmp_path: Path) -> None:
    """Else a restored system would serve people whose erasure is no longer told."""
    path = tmp_path / "tombs" / NAME
    ledger = Tombstones(path)
    for number in range(3):
        ledger.append([Line("negative", NOW, {"subject": number, "cause": "erased", "seq": number})])
    ledger.close()
    assert Tombstones(path).replay().problems == []
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    problems = [str(problem) for problem in Tombstones(path).replay().problems]
    assert len(problems) == 1
    assert "the tail was cut" in problems[0]
