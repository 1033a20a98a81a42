"""Where keys come from: a folder or a command, told apart by nobody who uses them."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine, select
from structlog.testing import capture_logs

from policy import chores, keysource
from policy.instants import DAY_US, WEEK_US
from policy.keys import Keyring, KeyringError
from policy.keysource import Command, Folder, source_of
from policy.schema import cursor
from policy.store import Store

WEEK = 2967
SECRET = "ab" * 32

# A keeper of keys as an operator may write one: a JSON file, "make" and "destroy"; it says on standard error what it
# does, keys included.
KEEPER = """
import json, secrets, sys
place, *asked = sys.argv[1:]
held = json.load(open(place))
print("holding", held, file=sys.stderr)
if not asked:
    print(json.dumps(held))
elif asked[0] == "make":
    held.setdefault(asked[1], secrets.token_hex(32))
elif asked[0] == "destroy":
    held.pop(asked[1], None)
else:
    sys.exit(2)
json.dump(held, open(place, "w"))
"""


@pytest.fixture
def vaulted(keyring: Keyring, tmp_path: Path) -> Path:
    """The keys of `keyring`, kept elsewhere than in its folder."""
    place = tmp_path / "elsewhere.json"
    place.write_text(json.dumps({path.name: path.read_text() for path in (tmp_path / "keys").iterdir()}))
    (tmp_path / "keeper.py").write_text(KEEPER)
    return place


@pytest.fixture
def keeper(vaulted: Path, tmp_path: Path) -> Command:
    return Command([sys.executable, str(tmp_path / "keeper.py"), str(vaulted)])


@pytest.fixture
async def hand(store: Engine) -> AsyncIterator[Store]:
    made = Store(store)
    yield made
    await made.close()


def saying(text: str) -> Command:
    return Command([sys.executable, "-c", f"print({text!r})"])


def test_a_command_gives_the_keyring_a_folder_gives(keyring: Keyring, keeper: Command, tmp_path: Path) -> None:
    assert keeper.load() == keyring == Folder(tmp_path / "keys").load()


def test_the_settings_say_which(tmp_path: Path) -> None:
    folder = source_of(SimpleNamespace(keys_dir=tmp_path, keys_command=()))
    assert isinstance(folder, Folder)
    assert folder.path == tmp_path
    assert isinstance(source_of(SimpleNamespace(keys_dir=tmp_path, keys_command=["our-keys"])), Command)


def test_other_names_are_not_ours(vaulted: Path, keeper: Command, keyring: Keyring) -> None:
    held = json.loads(vaulted.read_text())
    vaulted.write_text(json.dumps({**held, "dkim.pem": "x", "pepper.1.next": SECRET, "kek.next": SECRET}))
    assert keeper.load() == keyring


def test_a_week_is_made_once(keeper: Command) -> None:
    assert not keeper.ensure_week(WEEK)
    assert keeper.ensure_week(WEEK + 1)
    first = keeper.load()
    assert (first.queue_id, first.kek_id) == (WEEK + 1, WEEK + 1)
    assert not keeper.ensure_week(WEEK + 1)
    assert keeper.load() == first
    keeper.destroy("kek", [WEEK])
    assert keeper.weeks("kek") == {WEEK + 1: None}
    assert set(keeper.weeks("queue")) == {WEEK, WEEK + 1}


def test_a_command_that_makes_nothing_is_found_out(vaulted: Path) -> None:
    lazy = "import json, sys\nif len(sys.argv) == 2: print(open(sys.argv[1]).read())"
    with pytest.raises(KeyringError, match=r"said it made kek\.2968, but does not print it"):
        Command([sys.executable, "-c", lazy, str(vaulted)]).ensure_week(WEEK + 1)


@pytest.mark.parametrize(
    "printed",
    ["", "hello", "[]", '"x"', '{"pepper.1": 5}', "{}", "[" * 100_000, '{"pepper.1": "00", "pepper.1": "00"}',
     json.dumps({"pepper.1": SECRET[:-2]}), json.dumps({"pepper.1": "zz" * 32}), json.dumps({"pepper.1": "é" * 32})],
)  # fmt: skip
def test_what_is_no_keyring_is_refused_without_repeating_it(printed: str) -> None:
    with pytest.raises(KeyringError) as caught:
        saying(printed).load()
    assert sys.executable in str(caught.value)
    assert len(printed) < 4 or printed not in str(caught.value)
    assert SECRET[:10] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_mebibyte_is_no_keyring() -> None:
    with pytest.raises(KeyringError, match="mebibyte"):
        Command([sys.executable, "-c", "print('{' + ' ' * (1 << 20) + '}')"]).load()


def test_failures_name_the_command_and_what_was_asked_only(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loud = f"import sys; print({SECRET!r}); print({SECRET!r}, file=sys.stderr); sys.exit(7)"
    failing = Command([sys.executable, "-c", loud, "--password=hunter2"])
    with pytest.raises(KeyringError, match=r"failed \(exit code 7\)") as caught:
        failing.load()
    assert SECRET not in str(caught.value) + repr(failing)
    assert "hunter2" not in str(caught.value) + repr(failing)
    assert SECRET not in "".join(capfd.readouterr())
    with pytest.raises(KeyringError, match=r"nowhere cannot be run: No such file"):
        Command([str(tmp_path / "nowhere")]).load()
    with pytest.raises(KeyringError, match=r"did not end within 0\.05 s"):
        Command([sys.executable, "-c", "import signal; signal.pause()"], patience=0.05).load()
    with pytest.raises(KeyringError, match="empty"):
        Command([])


async def test_the_writer_turns_keys_of_a_command(hand: Store, keeper: Command) -> None:
    """A successor counts from the day the writer saw it first: that survives the process, in SQL."""
    now = (WEEK + 1) * WEEK_US
    assert await chores.turn_keys(hand, keeper, now)
    assert set(keeper.weeks("kek")) == {WEEK, WEEK + 1}
    late = (WEEK + 4) * WEEK_US + 5 * DAY_US
    assert await chores.turn_keys(hand, keeper, late)  # after three weeks away: kek of this week is made
    assert set(keeper.weeks("queue")) == {WEEK + 1, WEEK + 4}
    assert set(keeper.weeks("kek")) == {WEEK + 1, WEEK + 4}
    assert not await chores.turn_keys(hand, keeper, late + DAY_US - 1)
    assert set(keeper.weeks("queue")) == {WEEK + 1, WEEK + 4}
    assert await chores.turn_keys(hand, keeper, late + DAY_US)
    assert set(keeper.weeks("queue")) == {WEEK + 4}
    assert set(keeper.weeks("kek")) == {WEEK + 1, WEEK + 4}  # two stay
    names = await hand.write(lambda conn: conn.execute(select(cursor.c.stream)).scalars().all())
    assert not [name for name in names if name == f"key:queue.{WEEK}"]


async def test_a_command_that_cannot_make_keys_stops_nothing(hand: Store, vaulted: Path) -> None:
    reading = "import sys\nsys.exit(3) if len(sys.argv) > 2 else print(open(sys.argv[1]).read())"
    command = Command([sys.executable, "-c", reading, str(vaulted)])
    with capture_logs() as logs:
        assert not await chores.turn_keys(hand, command, (WEEK + 1) * WEEK_US)
    [line] = logs
    assert f"make queue.{WEEK + 1} failed (exit code 3)" in line["error"]
    assert json.loads(vaulted.read_text())["pepper.1"].strip() not in str(line)


async def test_keys_made_before_something_failed_are_read_again(hand: Store, keyring: Keyring, tmp_path: Path) -> None:
    """This week's keys are there, but an old one cannot be destroyed: the writer must read the new ones."""

    class Jammed(Folder):
        def destroy(self, name: str, weeks: object) -> None:
            raise PermissionError(1, "Operation not permitted")

    assert await chores.turn_keys(hand, Jammed(tmp_path / "keys"), (WEEK + 1) * WEEK_US)


def test_when_a_file_key_was_made_is_its_own_time(store: Engine, keyring: Keyring, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "keys")
    weeks = folder.weeks("kek")
    made = (tmp_path / "keys" / f"kek.{WEEK}").stat().st_mtime_ns // 1000
    with store.begin() as conn:
        assert keysource.born(conn, "kek", weeks, 5) == {WEEK: made}
        assert not conn.execute(select(cursor.c.stream).where(cursor.c.stream.startswith("key:"))).all()
        assert keysource.born(conn, "kek", {1: None, 2: 9}, 5) == {1: 5, 2: 9}
        assert keysource.born(conn, "kek", {1: None, 3: None}, 6) == {1: 5, 3: 6}
        assert keysource.born(conn, "queue", {1: None}, 7) == {1: 7}
        assert keysource.born(conn, "kek", {3: None}, 8) == {3: 6}
        assert keysource.born(conn, "kek", {1: None, 3: None}, 9) == {1: 9, 3: 6}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
