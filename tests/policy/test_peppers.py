"""A new pepper over the old tags: everybody who was suppressed still is, and no address was needed for it."""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine, insert, select
from typer.testing import CliRunner, Result

from policy import accounts, audit, keyspace, peppers, suppression, vault
from policy.address import chain, domain_tag, tag_of
from policy.cli.keys import keys as commands
from policy.drains import TAG_AAD
from policy.enforcement import Enforcement, commit_number
from policy.instants import DAY_US, WEEK_US
from policy.keys import Keyring, KeyringError, SealError, seal
from policy.peppers import OVERLAP_US, PepperError
from policy.schema import erasure, open_store, request, subject
from policy.schema import suppression as table
from policy.store import Store
from policy.suppression import Entry, Scope
from tests.policy.people import row_of, rows_of
from tests.policy.stores import only_sqlite, url_of

NOW = 1_795_376_640_000_000
ADDRESSES = [f"person.{n}@domain{n % 100}.example" for n in range(10_000)]


@pytest.fixture
def folder(keyring: Keyring, tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def reader(store: Engine, tmp_path: Path) -> Iterator[Engine]:
    engine = open_store(url_of(tmp_path), writer=False)
    yield engine
    engine.dispose()


def entry(tag: bytes, partition: int, reason: str = "opt-out", expires: int | None = None) -> Entry:
    return Entry(tag, partition, Scope.PLATFORM, 0, reason, NOW, "test", expires)


def tag(keyring: Keyring, text: str) -> bytes:
    return row_of(keyring.pepper, text)[0]


def of_tags(keyring: Keyring, conn: Connection, texts: list[str]) -> list[bool]:
    """Whether each of the addresses is suppressed, asked as everybody asks."""
    tags = {text: tag(keyring, text) for text in texts}
    found = {row.tag for row in conn.execute(select(table.c.tag))}
    return [tags[text] in found for text in texts]


def spelled(text: str, dice: random.Random) -> str:
    """Another spelling of the same mailbox."""
    local, _, domain = text.partition("@")
    local = "".join(character.upper() if dice.random() < 0.5 else character for character in local)
    if dice.random() < 0.3:
        local = f'"{local}"'
    if dice.random() < 0.3:
        local = "".join(chr(ord(c) + 0xFEE0) if c.isalpha() and dice.random() < 0.3 else c for c in local)
    return f"{local}@{domain.upper() if dice.random() < 0.5 else domain}"


def test_everybody_suppressed_before_is_suppressed_after_in_every_spelling(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path
) -> None:
    """The property of a rotation: 10,000 addresses, half of them suppressed, ten spellings of each."""
    dice = random.Random(5)
    with store.begin() as conn:
        suppressed = [row_of(keyring.pepper, text) for text in ADDRESSES[::2]]
        suppression.add(conn, [entry(one, partition) for one, partition, _ in suppressed])
    done = peppers.rotate(folder, store, reader, NOW)
    later = Keyring.load(folder)
    assert (done.pepper_id, done.suppressions) == (2, 5000)
    assert (later.pepper_ids, later.token_id) == ((1, 2), 2)
    with store.begin() as conn:
        suppression.expire(conn, NOW + OVERLAP_US)  # what is left of the old tags goes
        for _ in range(10):
            variants = [spelled(text, dice) for text in ADDRESSES]
            assert of_tags(later, conn, variants) == [n % 2 == 0 for n in range(10_000)]
        assert not any(of_tags(keyring, conn, ADDRESSES))


def test_entries_keep_everything_but_their_tag(store: Engine, reader: Engine, keyring: Keyring, folder: Path) -> None:
    entries = [
        Entry(tag(keyring, "a@one.example"), 3, Scope.ACCOUNT, 7, "complaint", NOW - 5, "arf", None),
        Entry(tag(keyring, "a@one.example"), 3, Scope.LIST, 2, "bounce", NOW - 4, "mx", NOW + DAY_US),
        Entry(domain_tag(keyring.pepper, "two.example"), 4, Scope.PLATFORM, 0, "manual", NOW - 3, "cli", NOW + WEEK_US),
    ]
    with store.begin() as conn:
        suppression.add(conn, entries)
    peppers.rotate(folder, store, reader, NOW)
    later = Keyring.load(folder)
    moved = {tag(keyring, "a@one.example"): tag(later, "a@one.example")}
    moved[entries[2].tag] = domain_tag(later.pepper, "two.example")
    with store.connect() as conn:
        found = {(one.tag, one.scope): one for one in suppression.every(conn)}
    assert len(found) == 6
    for before in entries:
        after = found[moved[before.tag], before.scope]
        assert (after.partition, after.scope_id, after.reason) == (before.partition, before.scope_id, before.reason)
        assert (after.created, after.source, after.expires) == (before.created, before.source, before.expires)
        old = found[before.tag, before.scope].expires  # a forgotten worker still refuses, for a while
        assert old == min(before.expires or NOW + OVERLAP_US, NOW + OVERLAP_US)


def test_people_requests_and_erasures_are_found_under_the_new_tag(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path
) -> None:
    rows = rows_of(keyring.pepper, 30)
    with store.begin() as conn:
        number = accounts.add(conn, "acme", display_name="Acme", now=NOW).number
        before = vault.resolve(conn, keyring, number, rows, 2967, NOW)
        conn.execute(
            insert(erasure).values(
                subject=5, account=number, tag=rows[3][0], partition=rows[3][1], lane="x", cause="request",
                state="purged", begun=NOW, records=0,
            )
        )  # fmt: skip
        conn.execute(
            insert(request).values(
                ticket="T1", kind="access", role="contact", tag=rows[4][0], partition=rows[4][1], channel="cli",
                jurisdiction="gdpr", state="received", identity="open", received=NOW, due=NOW, outcome="", ground="",
            )
        )  # fmt: skip
    done = peppers.rotate(folder, store, reader, NOW)
    assert (done.subjects, done.others) == (30, 2)
    later = Keyring.load(folder)
    fresh = rows_of(later.pepper, 30)
    with store.begin() as conn:
        assert vault.resolve(conn, later, number, fresh, 2967, NOW) == before
        assert len(conn.execute(select(subject)).all()) == 30
        assert conn.execute(select(erasure.c.tag)).scalar() == fresh[3][0]
        assert conn.execute(select(request.c.tag)).scalar() == fresh[4][0]
        assert audit.verify(conn) is None


@given(st.integers(1, 6), st.data())
def test_a_tag_of_any_generation_comes_forward(generations: int, data: st.DataObject) -> None:
    """Law: forward(tag of generation n, n) is today's tag; of today's, itself."""
    parts = [bytes([n]) * 32 for n in range(generations)]
    ids = tuple(range(1, 2 * generations, 2))  # token keys may have turned in between
    ring = _ring(b"".join(parts), ids)
    held = data.draw(st.integers(0, generations - 1))
    old = tag_of(b"".join(parts[: held + 1]), "bob@example.com")
    assert ring.forward(old, ids[held]) == tag_of(ring.pepper, "bob@example.com")
    assert ring.heard(ids[held] + 1, old) == tag_of(ring.pepper, "bob@example.com")
    assert tag_of(ring.pepper, "bob@example.com") != tag_of(ring.pepper, "eve@example.com")


def test_the_first_generation_is_what_it_always_was() -> None:
    """Tags in delivered mail and stored tags of every installation there is."""
    pepper = bytes(range(32))
    assert tag_of(pepper, "bob@example.com").hex() == "9beef13f50037e86ba1c0b2f"
    assert tag_of(pepper * 2, "bob@example.com") == chain(pepper, tag_of(pepper, "bob@example.com"))
    assert tag_of(pepper * 2, "bob@example.com") != tag_of(pepper, "bob@example.com")


def _ring(pepper: bytes, ids: tuple[int, ...]) -> Keyring:
    key = bytes(32)
    return Keyring(
        pepper=pepper, token={1: key}, token_id=1, return_path={1: key}, return_path_id=1, queue={1: key}, queue_id=1,
        kek={1: key}, kek_id=1, service=key, intake=key, lane=key, pepper_ids=ids,
    )  # fmt: skip


class Killed(Exception):
    """A power cut."""


@only_sqlite
@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_step_it_converges_and_nothing_runs_meanwhile(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """At every file operation and around the commit: the store and the keys that a process would load agree, or the
    process refuses; the next run ends the same rotation."""
    with store.begin() as conn:
        suppression.add(conn, [entry(tag(keyring, text), 1) for text in ADDRESSES[:20]])
    left = [step]

    def passed() -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1

    def dying(name: str) -> None:
        real = getattr(peppers, name)

        def call(*args: object) -> object:
            passed()
            result = real(*args)
            passed()
            return result

        monkeypatch.setattr(peppers, name, call)

    for name in ("write_key", "give_name", "bring_forward"):
        dying(name)
    killed = False
    try:
        peppers.rotate(folder, store, reader, NOW)
    except Killed:
        killed = True
    monkeypatch.undo()
    assert killed == (step < 10)

    refused, now = "", None
    with store.connect() as conn:
        try:
            now = Keyring.load(folder)
            peppers.check(conn, now)
            assert all(of_tags(now, conn, ADDRESSES[:20]))
        except KeyringError as error:
            refused = str(error)
    # half the pair has its name: nobody may read keys at all, also who does not ask the store (workers, trackers)
    assert (now is None) == (7 <= step <= 8)
    assert bool(refused) == (5 <= step <= 8)  # between the commit and the last name
    assert not refused or "rotate-pepper" in refused
    if killed and step < 9:  # behind the last name there is nothing to end: that run would be a rotation of its own
        peppers.rotate(folder, store, reader, NOW)
    after = Keyring.load(folder)
    assert after.pepper_ids == (1, 2)
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".next")]
    with store.begin() as conn:
        peppers.check(conn, after)
        suppression.expire(conn, NOW + OVERLAP_US)
        assert all(of_tags(after, conn, ADDRESSES[:20]))
        assert len(list(suppression.every(conn))) == 20


def test_a_second_turn_goes_over_the_first(store: Engine, reader: Engine, keyring: Keyring, folder: Path) -> None:
    with store.begin() as conn:
        suppression.add(conn, [entry(tag(keyring, text), 1) for text in ADDRESSES[:20]])
    peppers.rotate(folder, store, reader, NOW)
    peppers.rotate(folder, store, reader, NOW + DAY_US)  # within the overlap of the first
    later = Keyring.load(folder)
    assert later.pepper_ids == (1, 2, 3)
    with store.begin() as conn:
        suppression.expire(conn, NOW + OVERLAP_US + DAY_US)
        assert all(of_tags(later, conn, ADDRESSES[:20]))
        assert len(list(suppression.every(conn))) == 20
        assert peppers.turns(conn) == {2: NOW, 3: NOW + DAY_US}


def test_sealed_tags_of_message_rows_are_opened_by_the_day_they_were_sealed(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path
) -> None:
    first = tag(keyring, "bob@example.com")
    peppers.rotate(folder, store, reader, NOW)
    second = tag(Keyring.load(folder), "bob@example.com")
    peppers.rotate(folder, store, reader, NOW + DAY_US)
    ring = Keyring.load(folder)
    with store.connect() as conn:
        when = peppers.turns(conn)
    today = tag(ring, "bob@example.com")
    for made, at in ((first, NOW - 1), (second, NOW), (second, NOW + DAY_US - 1), (today, NOW + DAY_US)):
        assert peppers.open_tag(ring, when, seal(ring.service, made, TAG_AAD), at) == today
    with pytest.raises(SealError):
        peppers.open_tag(ring, when, seal(ring.service, first, b"other"), NOW)


def test_a_store_from_before_the_turn_is_brought_forward_not_turned_again(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path
) -> None:
    """Keys put there by hand, or a restored database: the keys stay, the tags follow."""
    for name in ("pepper", "token"):
        (folder / f"{name}.2").write_text("ab" * 32 + "\n")
        (folder / f"{name}.2").chmod(0o600)
    with store.begin() as conn:
        suppression.add(conn, [entry(tag(keyring, "a@one.example"), 1)])
        later = Keyring.load(folder)
        with pytest.raises(KeyringError, match=r"pepper\.2 is newer than the tags of the store \(pepper\.1\)"):
            peppers.check(conn, later)
    assert peppers.rotate(folder, store, reader, NOW).pepper_id == 2
    assert Keyring.load(folder) == later
    with store.connect() as conn:
        peppers.check(conn, later)
        assert of_tags(later, conn, ["a@one.example"]) == [True]
        with pytest.raises(KeyringError, match=r"made with pepper\.2, the newest key file is pepper\.1"):
            peppers.check(conn, keyring)


def test_without_the_newest_pepper_nothing_is_made(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path
) -> None:
    peppers.rotate(folder, store, reader, NOW)
    for name in ("pepper", "token"):
        (folder / f"{name}.2").unlink()
    with pytest.raises(PepperError, match=r"pepper\.2, with which .* is missing"):
        peppers.rotate(folder, store, reader, NOW)
    assert Keyring.load(folder) == keyring


def test_two_half_rotations_are_left_to_a_human(store: Engine, reader: Engine, folder: Path) -> None:
    for name in ("pepper.2.next", "token.3.next"):
        (folder / name).write_text("ab" * 32)
    with pytest.raises(PepperError, match="several rotations"):
        peppers.rotate(folder, store, reader, NOW)


def test_drafts_are_no_keys_and_are_as_private(
    store: Engine, reader: Engine, keyring: Keyring, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(peppers, "bring_forward", fails)
    with pytest.raises(Killed):
        peppers.rotate(folder, store, reader, NOW)
    monkeypatch.undo()
    assert Keyring.load(folder) == keyring
    drafts = sorted(path for path in folder.iterdir() if path.suffix == ".next")
    assert [path.name for path in drafts] == ["pepper.2.next", "token.2.next"]
    drafts[0].chmod(0o644)
    with pytest.raises(KeyringError, match=r"pepper\.2\.next is readable by others"):
        peppers.rotate(folder, store, reader, NOW)


def test_nobody_rotates_while_the_writer_runs(tmp_path: Path) -> None:
    with peppers.alone(tmp_path), pytest.raises(PepperError, match="stop the service"), peppers.alone(tmp_path):
        raise AssertionError
    handle = os.open(tmp_path / "policy.lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


async def test_the_writer_rebuilds_redis_after_a_turn(
    store: Engine, reader: Engine, redis: Redis, keyring: Keyring, folder: Path, tmp_path: Path
) -> None:
    hand = Store(store)
    gate = Enforcement(hand, redis, lambda: NOW, lambda: open_store(url_of(tmp_path), writer=False))

    def suppress(conn: Connection, effects: object) -> None:
        one = entry(tag(keyring, "a@one.example"), 9)
        suppression.add(conn, [one])
        effects.tags.add((one.tag, one.partition))  # type: ignore[attr-defined]

    await gate.apply(suppress)
    assert not await gate.mend()
    before = await hand.write(commit_number)
    peppers.rotate(folder, store, reader, NOW)
    assert await hand.write(commit_number) == before + 1
    assert await gate.mend()
    new = tag(Keyring.load(folder), "a@one.example")
    for one in (new, tag(keyring, "a@one.example")):
        assert await redis.hget(keyspace.suppression(9, one), one)
    await hand.close()


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(store: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)
    text = f'[policy]\ndata_dir = "{tmp_path}"\nsql_url = "{url_of(tmp_path)}"\n'
    file = tmp_path / "sales-push.toml"
    file.write_text(text + '[policy.officer]\nname = "O"\naddress = "privacy@example.org"\n')
    return lambda *words: CliRunner().invoke(commands, [*words, "--config", str(file)])


def test_the_command_makes_a_new_pepper_and_lists_it(
    shell: Callable[..., Result], store: Engine, keyring: Keyring, folder: Path
) -> None:
    with store.begin() as conn:
        suppression.add(conn, [entry(tag(keyring, text), 1) for text in ADDRESSES[:3]])
    turned = shell("rotate-pepper", "--json")
    assert (turned.exit_code, json.loads(turned.output)) == (
        0, {"pepper": 2, "suppressions": 3, "subjects": 0, "others": 0},
    )  # fmt: skip
    later = Keyring.load(folder)
    listed = shell("list", "--json")
    told = json.loads(listed.output)
    assert (told["pepper"], told["token"], list(told["kek"])) == ([1, 2], [1, 2], [str(later.kek_id)])
    shown = turned.output + listed.output + shell("list").output
    for key in (*later.token.values(), *later.kek.values(), later.pepper[32:], later.service):
        assert key.hex() not in shown


def test_the_command_refuses_while_the_writer_runs(shell: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    with peppers.alone(tmp_path):
        refused = shell("rotate-pepper")
    assert refused.exit_code == 1
    assert "stop the service" in refused.output
    assert Keyring.load(folder).pepper_ids == (1,)


def test_a_missing_key_is_told_by_the_command(shell: Callable[..., Result], folder: Path) -> None:
    (folder / "lane.1").unlink()
    for words in (("list",), ("rotate-pepper",)):
        refused = shell(*words)
        assert refused.exit_code in (1, 2)
        assert "lane.1 is missing" in refused.output
