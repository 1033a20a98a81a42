"""Wrapping anew: each week everybody under the newest key, nobody lost on the way, then the old key destroyed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, delete, func, insert, select, update
from structlog.testing import capture_logs

from policy import accounts, chores, rewrapping, vault
from policy.instants import DAY_US, WEEK_US
from policy.keys import KEY_BYTES, Keyring, ensure_week
from policy.keysource import Folder
from policy.rewrapping import Rewrapping
from policy.schema import audit, cursor
from policy.schema import subject as table
from policy.store import Store
from tests.policy.people import rows_of
from tests.policy.stores import only_sqlite

WEEK = 2967
BEGUN = WEEK * WEEK_US
PEOPLE = 60


class House:
    """A writer's store and keys, weeks going by at a word."""

    def __init__(self, store: Store, folder: Path, keyring: Keyring) -> None:
        self.store = store
        self.folder = folder
        self.keyring = keyring
        self.now = BEGUN
        self.walk = self.walking()

    def walking(self, rows: int = 7) -> Rewrapping:
        """A new process: nothing is remembered but what is in the store."""
        return Rewrapping(self.store, Folder(self.folder), lambda: self.keyring, lambda: self.now, rows=rows)

    async def week(self, week: int, *, reload: bool = True) -> None:
        """A week begins: its keys are made."""
        self.now = week * WEEK_US
        await chores.turn_keys(self.store, self.folder, self.now)
        for path in self.folder.glob(f"*.{week}"):
            os.utime(path, ns=(self.now * 1000, self.now * 1000))
        if reload:
            self.keyring = Keyring.load(self.folder)

    async def enter(self, count: int, first: int = 0, keyring: Keyring | None = None) -> None:
        rows = rows_of(self.keyring.pepper, count, first)
        await self.store.write(
            lambda conn: vault.resolve(conn, keyring or self.keyring, 1, rows, self.now // WEEK_US, self.now)
        )

    async def finish(self) -> int:
        """The whole walk; how many rounds it took."""
        rounds = 1
        while await self.walk.round() < 1.0:
            rounds += 1
        return rounds

    async def keks(self) -> dict[int, int]:
        """How many subjects each wrapping key has."""
        counted = select(table.c.kek_id, func.count()).group_by(table.c.kek_id)
        return await self.store.write(lambda conn: {row[0]: row[1] for row in conn.execute(counted)})

    async def addresses(self) -> list[str]:
        """Of everybody, opened with the keys that lie in the folder."""
        keyring = Keyring.load(self.folder)
        numbers = await self.store.write(lambda conn: conn.execute(select(table.c.number)).scalars().all())
        found = await self.store.write(lambda conn: [vault.get(conn, keyring, number) for number in numbers])
        return sorted(subject.address for subject in found if subject is not None)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if "kek" in path.name)


@pytest.fixture
async def house(store: Engine, keyring: Keyring, tmp_path: Path) -> AsyncIterator[House]:
    hand = Store(store)
    for name in ("kek", "queue"):
        os.utime(tmp_path / "keys" / f"{name}.{WEEK}", ns=(BEGUN * 1000, BEGUN * 1000))
    built = House(hand, tmp_path / "keys", keyring)
    await hand.write(lambda conn: accounts.add(conn, "acme", display_name="Acme", now=BEGUN))
    await built.enter(PEOPLE)
    yield built
    await hand.close()


def everybody(count: int = PEOPLE) -> list[str]:
    return sorted(f"person.{n}@domain{n % 100}.example" for n in range(count))


async def test_a_day_after_a_new_key_everybody_is_wrapped_under_it(house: House) -> None:
    pseudonyms = await house.store.write(
        lambda conn: vault.resolve(conn, house.keyring, 1, rows_of(house.keyring.pepper, PEOPLE), WEEK, BEGUN)
    )
    await house.week(WEEK + 1)
    house.now += DAY_US - 1
    assert await house.walk.round() >= 3600.0
    assert await house.keks() == {WEEK: PEOPLE}
    house.now += 1
    assert await house.finish() == PEOPLE // 7 + 1
    assert await house.keks() == {WEEK + 1: PEOPLE}
    assert await house.addresses() == everybody()
    assert pseudonyms == await house.store.write(
        lambda conn: vault.resolve(conn, house.keyring, 1, rows_of(house.keyring.pepper, PEOPLE), WEEK, BEGUN)
    )
    assert house.walk.statistics() == {"rewrapped": PEOPLE, "rewrap_broken": 0}


async def test_a_walk_that_is_done_changes_nothing_more(house: House) -> None:
    await house.week(WEEK + 1)
    house.now += DAY_US
    await house.finish()
    before = await house.store.write(lambda conn: conn.execute(select(table)).all())
    assert await house.finish() == 1
    house.walk = house.walking()
    assert await house.finish() == 1
    assert before == await house.store.write(lambda conn: conn.execute(select(table)).all())


@only_sqlite
@pytest.mark.parametrize("killed_after", range(10))
async def test_killed_anywhere_it_goes_on_where_it_was(house: House, killed_after: int) -> None:
    """Each round is one transaction; a new process knows only what was committed."""
    await house.week(WEEK + 1)
    house.now += DAY_US
    for _ in range(killed_after):
        await house.walk.round()
    left = PEOPLE - min(PEOPLE, 7 * killed_after)
    assert (await house.keks()).get(WEEK, 0) == left
    house.walk = house.walking()
    await house.finish()
    assert house.walk.wrapped == left
    assert await house.keks() == {WEEK + 1: PEOPLE}
    assert await house.addresses() == everybody()


async def test_killed_inside_a_transaction_nobody_is_half_wrapped(house: House) -> None:
    await house.week(WEEK + 1)

    class Killed(Exception):
        pass

    def work(conn: Connection) -> None:
        assert rewrapping.step(conn, house.keyring, 7).wrapped == 7
        raise Killed

    with pytest.raises(Killed):
        await house.store.write(work)
    assert await house.keks() == {WEEK: PEOPLE}
    assert await house.addresses() == everybody()


async def test_old_keys_go_14_days_after_their_week_and_copies_die_with_them(house: House) -> None:
    copied = await house.store.write(lambda conn: conn.execute(select(table)).mappings().all())
    for week in (WEEK + 1, WEEK + 2):
        await house.week(week)
        house.now += DAY_US
        await house.finish()
    house.now = BEGUN + WEEK_US + 14 * DAY_US - 1
    ensure_week(house.folder, WEEK + 3)  # made early, so that only the clock of the old key is asked
    os.utime(house.folder / f"kek.{WEEK + 3}", ns=(house.now * 1000, house.now * 1000))
    await chores.turn_keys(house.store, house.folder, house.now)
    assert house.files() == [f"kek.{week}" for week in range(WEEK, WEEK + 4)]
    await chores.turn_keys(house.store, house.folder, house.now + 1)
    assert house.files() == [f"kek.{week}" for week in range(WEEK + 1, WEEK + 4)]
    assert await house.addresses() == everybody()
    lines = await house.store.write(lambda conn: conn.execute(select(audit.c.object_ref)).scalars().all())
    assert f"key/kek.{WEEK}" in lines

    def restored(conn: Connection) -> None:
        conn.execute(delete(table))
        conn.execute(insert(table), [dict(row) for row in copied])
        vault.resolve(conn, Keyring.load(house.folder), 1, rows_of(house.keyring.pepper, 1), WEEK, house.now)

    with pytest.raises(vault.VaultError, match=rf"kek\.{WEEK} is missing"):
        await house.store.write(restored)


async def test_two_wrapping_keys_always_stay(house: House) -> None:
    """After a month away there are two: the old one is past its time and wraps nobody, and is the only other one."""
    await house.week(WEEK + 4)
    house.now += DAY_US
    await house.finish()
    assert await house.keks() == {WEEK + 4: PEOPLE}
    await chores.turn_keys(house.store, house.folder, house.now + DAY_US)
    assert house.files() == [f"kek.{WEEK}", f"kek.{WEEK + 4}"]
    assert not (house.folder / f"queue.{WEEK}").exists()
    await house.week(WEEK + 5)
    await chores.turn_keys(house.store, house.folder, house.now + DAY_US)
    assert house.files() == [f"kek.{WEEK + 4}", f"kek.{WEEK + 5}"]


async def test_a_key_that_wraps_anybody_is_not_destroyed_and_they_are_found(house: House) -> None:
    """Somebody was made under the old key behind the walk, by a keyring that had not been read again."""
    stale = house.keyring
    await house.week(WEEK + 1)
    house.now += DAY_US
    await house.finish()
    await house.enter(20, first=PEOPLE, keyring=stale)
    ensure_week(house.folder, WEEK + 2)  # a third key, and a walk to it that is thought to be done
    house.keyring = Keyring.load(house.folder)
    done = update(cursor).where(cursor.c.stream == "rewrap").values(last_id=f"{WEEK + 2}:done")
    await house.store.write(lambda conn: conn.execute(done))
    house.now = (WEEK + 3) * WEEK_US
    os.utime(house.folder / f"kek.{WEEK + 2}", ns=((WEEK + 2) * WEEK_US * 1000,) * 2)
    with capture_logs() as logs:
        await chores.turn_keys(house.store, house.folder, house.now)
    assert house.files() == [f"kek.{week}" for week in range(WEEK, WEEK + 4)]
    assert [line["weeks"] for line in logs if line["log_level"] == "warning"] == [[WEEK]]
    await house.finish()
    assert await house.keks() == {WEEK + 2: PEOPLE + 20}
    await chores.turn_keys(house.store, house.folder, house.now)
    assert house.files() == [f"kek.{week}" for week in range(WEEK + 1, WEEK + 4)]
    assert await house.addresses() == everybody(PEOPLE + 20)


async def test_somebody_made_under_the_old_key_ahead_of_the_walk_is_wrapped_by_it(house: House) -> None:
    stale = house.keyring
    await house.week(WEEK + 1)
    house.now += DAY_US
    await house.walk.round()
    place = await house.store.write(lambda conn: rewrapping._place(conn, WEEK + 1))
    assert place is not None
    await house.enter(40, first=PEOPLE, keyring=stale)
    ahead = select(func.count()).where(table.c.number > place)
    expected = await house.store.write(lambda conn: conn.execute(ahead).scalar())
    await house.finish()
    keks = await house.keks()
    assert keks[WEEK + 1] == 7 + int(expected or 0)
    assert sum(keks.values()) == PEOPLE + 40


async def test_who_is_erased_during_the_walk_stays_erased(house: House) -> None:
    await house.week(WEEK + 1)
    house.now += DAY_US
    await house.walk.round()
    gone = await house.store.write(
        lambda conn: conn.execute(select(table.c.number).order_by(table.c.number.desc()).limit(5)).scalars().all()
    )
    await house.store.write(lambda conn: conn.execute(delete(table).where(table.c.number.in_(gone))))
    await house.finish()
    assert await house.keks() == {WEEK + 1: PEOPLE - 5}


async def test_a_row_that_does_not_open_is_told_and_holds_up_nobody_else(house: House) -> None:
    numbers = await house.store.write(lambda conn: conn.execute(select(table.c.number)).scalars().all())
    broken = update(table).where(table.c.number == numbers[10]).values(key=bytes(60))
    await house.store.write(lambda conn: conn.execute(broken))
    await house.week(WEEK + 1)
    house.now += DAY_US
    with capture_logs() as logs:
        await house.finish()
    assert await house.keks() == {WEEK: 1, WEEK + 1: PEOPLE - 1}
    assert house.walk.statistics()["rewrap_broken"] == 1
    assert [line["subjects"] for line in logs if line["log_level"] == "error"] == [1]
    await house.week(WEEK + 4)
    await chores.turn_keys(house.store, house.folder, house.now + DAY_US)
    assert f"kek.{WEEK}" in house.files()


async def test_no_key_of_a_subject_is_ever_in_clear(house: House) -> None:
    before = await house.store.write(
        lambda conn: vault.find(conn, house.keyring, rows_of(house.keyring.pepper, 1)[0][0])
    )
    await house.week(WEEK + 1)
    house.now += DAY_US
    await house.finish()
    rows = await house.store.write(lambda conn: conn.execute(select(table.c.key)).scalars().all())
    assert {len(key) for key in rows} == {KEY_BYTES + 28}
    assert not any(before[0].key[:8] in key for key in rows)
