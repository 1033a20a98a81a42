"""Hosts: the registry, `sales-push host list|drain|forget`, who reclaims whose leases (issue 3, item 3; decision 6)."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import pty
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.delivery.presence import Presence, home_of
from engine.delivery.reclaiming import Reclaiming, names
from engine.queue.journal import Journal, boot_id
from engine.queue.lanes import JobState, Lanes, LeaseRequest, PutRequest
from policy import hosts, keyspace
from policy.valkey import Client, call
from tests.journeys.test_drain import left_in_redis, progress, taken, until
from tests.world.mail import ROOT, MailWorld, job, mail_world, rows
from tests.world.queue_census import FAR, assert_legal, lane_named, some_slice
from tests.world.servers import ValkeyServer, valkey

__all__ = ["valkey"]

P = 11
LEASE = 60.0  # seconds on the test's own clock
HERE = platform.node() or "host"


async def cli(mail: MailWorld, *arguments: str, stdin: int = asyncio.subprocess.DEVNULL) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``sales-push host …``."""
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from engine.cli import main; main()", "host", *arguments, "--config", str(mail.config),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=stdin,
    )  # fmt: skip
    out, err = await program.communicate()
    assert program.returncode is not None
    return program.returncode, out.decode(), err.decode()


async def listed(mail: MailWorld) -> dict[str, Any]:
    code, out, err = await cli(mail, "list", "--json")
    assert code == 0, err
    return {one["host"]: one for one in json.loads(out)}


# --- names and entries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holder", "host", "index"),
    [
        ("mx1:0:4711-9f2c31aa", "mx1", 0),
        ("mx1.example.org:12:1-a", "mx1.example.org", 12),
        ("fe80::1:3:7-a", "fe80::1", 3),
        ("w1", "w1", -1),
        ("a:b:c", "a:b:c", -1),
    ],
)
def test_a_holder_names_its_host_and_place(holder: str, host: str, index: int) -> None:
    assert hosts.host_of(holder) == host
    assert hosts.index_of(holder) == index


async def test_a_worker_says_that_it_lives_and_takes_its_entry_away(valkey: ValkeyServer, tmp_path: Path) -> None:
    presence = Presence(valkey.client, "mx1:0:7-aa", home_of(tmp_path))
    presence.look = lambda: ("working", 3, 40)
    heard: list[bool] = []
    presence.on_rest = heard.append
    await presence.say()
    registry = await hosts.read(valkey.client)
    [worker] = registry.workers
    assert (worker.host, worker.index, worker.state, worker.slices, worker.recipients) == ("mx1", 0, "working", 3, 40)
    assert worker.version == hosts.program_version()
    assert 0 <= registry.now - worker.at < 5_000_000

    assert await hosts.ask_to_rest(valkey.client, "mx1")
    assert not await hosts.ask_to_rest(valkey.client, "mx1"), "asked already"
    await presence.say()
    assert await hosts.let_work(valkey.client, "mx1")
    await presence.say()
    assert heard == [True, False]
    await presence.leave()
    assert await call(valkey.client, "EXISTS", keyspace.HOSTS) == 0


async def test_a_successor_buries_the_entries_of_its_own_place_only(valkey: ValkeyServer, tmp_path: Path) -> None:
    home = home_of(tmp_path)
    for holder in ("mx1:0:1-dead", "mx1:5:2-gone", "mx1:1:3-neighbour"):
        await Presence(valkey.client, holder, home).say()
    await Presence(valkey.client, "mx1:0:4-other-folder", "feed").say()
    await Presence(valkey.client, "mx2:0:5-other-host", home).say()
    ours = Presence(valkey.client, "mx1:0:9-new", home)
    await ours.say()
    await ours.succeed(lambda index: index == 0 or index >= 2)
    left = {worker.holder for worker in (await hosts.read(valkey.client)).workers}
    assert left == {"mx1:1:3-neighbour", "mx1:0:4-other-folder", "mx2:0:5-other-host", "mx1:0:9-new"}


def test_a_home_is_told_from_any_other_and_not_told(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert home_of(tmp_path / "one") != home_of(tmp_path / "two")
    assert home_of(tmp_path / "one") == home_of(tmp_path / "one" / ".." / "one")


# --- reclaiming -------------------------------------------------------------------------------------------------------


class Scene:
    """One reclaimer of this host with a clock of the test's own, and slices to be held by others."""

    def __init__(self, redis: Client, folder: Path) -> None:
        self.redis = redis
        self.journals = folder / "journal"
        self.now = 1000.0
        self.lanes = Lanes(redis, f"{HERE}:0:1-ours")
        self.reclaiming = Reclaiming(redis, self.lanes, self.journals, LEASE, home="ours", clock=lambda: self.now)
        self.chunk = 0

    async def holder(self, name: str) -> Lanes:
        """Somebody who has leased one slice, and said so by a heartbeat."""
        self.chunk += 1
        state = JobState(1, 0, 0, False, FAR, False, 1)
        lane = lane_named(chr(ord("A") + self.chunk))
        await self.lanes.put([PutRequest(P, 5, self.chunk, state, [(0, some_slice(5, P, lane, 3))])])
        lanes = Lanes(self.redis, name)
        [leased] = await lanes.lease_many([LeaseRequest(P, [], 1)])
        assert len(leased.slices) == 1
        return lanes

    async def pass_by(self, seconds: float) -> int:
        """Time goes by in looks as often as the worker's own; how many slices went back."""
        back, until = 0, self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + LEASE / 3)
            back += await self.reclaiming.look()
        return back

    async def leases(self, lanes: Lanes) -> int:
        return len(await lanes.our_leases())


@pytest.fixture
def scene(valkey: ValkeyServer, tmp_path: Path) -> Scene:
    return Scene(valkey.client, tmp_path)


async def test_a_dead_holder_of_this_host_is_reclaimed_after_a_full_lease(scene: Scene) -> None:
    dead = await scene.holder(f"{HERE}:3:2-dead")
    assert await scene.reclaiming.look() == 0, "the first look begins the watch"
    assert await scene.pass_by(LEASE - 1) == 0
    assert await scene.leases(dead) == 1
    assert await scene.pass_by(2) == 1
    assert await scene.leases(dead) == 0
    assert await dead.holders(P) == {}
    assert scene.reclaiming.reclaimed == 1
    await assert_legal(scene.redis, P)


async def test_a_heartbeat_begins_the_watch_anew(scene: Scene) -> None:
    slow = await scene.holder(f"{HERE}:3:2-slow")
    await scene.reclaiming.look()
    for _ in range(4):
        assert await scene.pass_by(LEASE * 0.9) == 0
        await slow.heartbeat([P])
    assert await scene.leases(slow) == 1


async def test_a_heartbeat_between_look_and_script_wins(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    late = await scene.holder(f"{HERE}:3:2-late")
    await scene.reclaiming.look()
    await scene.pass_by(LEASE - 1)
    real = scene.lanes.reclaim

    async def after_a_beat(partition: int, holder: str, seen: int) -> int | None:
        await late.heartbeat([P])
        return await real(partition, holder, seen)

    monkeypatch.setattr(scene.lanes, "reclaim", after_a_beat)
    assert await scene.pass_by(2) == 0
    assert await scene.leases(late) == 1


async def test_whose_journal_is_here_is_never_reclaimed(scene: Scene) -> None:
    """Alive and stopped (SIGSTOP), or dead and still to be replayed: the file says so in both cases."""
    name = f"{HERE}:3:2-stopped"
    stopped_one = await scene.holder(name)
    journal = Journal.open(scene.journals / "3", name, boot_id())
    try:
        assert names(scene.journals) == {name}
        await scene.reclaiming.look()
        assert await scene.pass_by(10 * LEASE) == 0
        assert await scene.leases(stopped_one) == 1
    finally:
        await journal.close()
    assert await scene.pass_by(LEASE) == 1, "its journal was carried out, or went with a clean end"


async def test_another_hosts_holder_is_never_reclaimed(scene: Scene) -> None:
    far = await scene.holder("elsewhere:0:2-dead")
    await scene.reclaiming.look()
    assert await scene.pass_by(10 * LEASE) == 0
    assert await scene.leases(far) == 1


async def test_ourselves_and_another_installation_of_this_host_are_never_reclaimed(scene: Scene) -> None:
    name = f"{HERE}:0:2-theirs"
    theirs = await scene.holder(name)
    ours = await scene.holder(scene.lanes.holder)
    await Presence(scene.redis, name, "theirs").say()
    await scene.reclaiming.look()
    assert await scene.pass_by(10 * LEASE) == 0
    assert await scene.leases(theirs) == await scene.leases(ours) == 1


async def test_who_is_heard_of_in_the_registry_lives(scene: Scene) -> None:
    """A worker beats only where it has leases; that it lives is known from elsewhere, too."""
    name = f"{HERE}:3:2-quiet"
    quiet = await scene.holder(name)
    presence = Presence(scene.redis, name, "ours")
    for _ in range(9):
        await presence.say()
        assert await scene.pass_by(LEASE / 3) == 0
    assert await scene.pass_by(LEASE - 1) == 0
    assert await scene.pass_by(2) == 1
    assert await scene.leases(quiet) == 0


async def test_a_watch_that_was_interrupted_begins_anew(scene: Scene) -> None:
    """We were stopped, or Redis was away: the others may have been, too."""
    dead = await scene.holder(f"{HERE}:3:2-dead")
    await scene.reclaiming.look()
    scene.now += 10 * LEASE
    assert await scene.reclaiming.look() == 0
    assert await scene.pass_by(LEASE - 1) == 0
    assert await scene.pass_by(2) == 1
    assert await scene.leases(dead) == 0


async def test_a_journal_without_a_head_names_nobody_and_stops_nobody(scene: Scene) -> None:
    folder = scene.journals / "3"
    folder.mkdir(parents=True)
    (folder / "00000001.journal").write_bytes(b"")
    (folder / "00000002.journal").write_bytes(b"\xff" * 100)
    dead = await scene.holder(f"{HERE}:3:2-dead")
    await scene.reclaiming.look()
    assert await scene.pass_by(LEASE) == 1
    assert await scene.leases(dead) == 0


async def test_a_worker_reclaims_what_a_lost_one_of_its_host_held() -> None:
    async with mail_world("slow:0:name=slow,delay=0.02") as mail:
        mail.config.write_text(mail.config.read_text().replace("lease_seconds = 10", "lease_seconds = 2"))
        await call(mail.policy.redis, "SADD", keyspace.halts(keyspace.partition_of("a.slow.test")), "a1")
        worker = await mail.start_worker()
        await mail.submit(job("lost"), rows(80, "a.slow.test"))
        partition = keyspace.partition_of("a.slow.test")

        async def is_put() -> bool:
            return bool(await call(mail.policy.redis, "KEYS", keyspace.slice_key(partition, "*")))

        await until(is_put)
        assert await mail.drain(worker) == 0
        await call(mail.policy.redis, "SREM", keyspace.halts(partition), "a1")
        ghost, far = Lanes(mail.policy.redis, f"{HERE}:7:1-ghost"), Lanes(mail.policy.redis, "elsewhere:0:1-far")

        async def all_of_one() -> bool:
            [leased] = await ghost.lease_many([LeaseRequest(partition, [], 1)])
            return bool(leased.slices)

        await until(all_of_one)  # what was passed over while halted is due again within seconds
        await until(lambda: _one(far, partition))
        await mail.start_worker()

        async def reclaimed() -> bool:
            status = mail.policy.reader.job_status("lost", mail.policy.clock())
            return status is not None and status.terminal >= 40

        await until(reclaimed)
        assert await ghost.our_leases() == []
        assert len(await far.our_leases()) == 1, "another host's dead are declared by hand"
        await far.release_many(await far.our_leases())
        status = await mail.finished("lost")
        assert status.counts == {"delivered": 80}


async def _one(lanes: Lanes, partition: int) -> bool:
    [leased] = await lanes.lease_many([LeaseRequest(partition, [], 1)])
    return bool(leased.slices)


async def test_a_worker_started_by_hand_beyond_the_number_is_not_replayed_while_it_lives() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        by_hand = await mail.start_worker(5)
        await mail.submit(job("hand"), rows(150, "a.slow.test"))
        await progress(mail, 10)
        await mail.start_worker(0)

        async def both_work() -> bool:
            return [worker.state for worker in (await hosts.read(mail.policy.redis)).workers] == ["working"] * 2

        await until(both_work)
        assert "place 5 is filled by a living worker" in mail.log()
        assert (await mail.finished("hand")).counts == {"delivered": 150}
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 150
        assert await mail.drain(by_hand) == 0


# --- the commands -----------------------------------------------------------------------------------------------------


async def test_list_and_drain_and_undo() -> None:
    async with mail_world("slow:0:name=slow,delay=0.1", workers=2) as mail:
        workers = [await mail.start_worker(0), await mail.start_worker(1)]
        await mail.submit(job("rest"), rows(500, "a.slow.test") + rows(300, "b.slow.test"))
        await progress(mail, 20)

        async def both_work() -> bool:
            workers = (await hosts.read(mail.policy.redis)).workers
            return [worker.state for worker in workers] == ["working"] * 2

        await until(both_work)
        found = await listed(mail)
        assert set(found) == {HERE}
        assert found[HERE]["leases"] > 0
        assert found[HERE]["in_flight"] > 0
        assert found[HERE]["unregistered"] == []
        assert [worker["index"] for worker in found[HERE]["workers"]] == [0, 1]
        assert {worker["pid"] for worker in found[HERE]["workers"]} == {worker.pid for worker in workers}
        assert {worker["state"] for worker in found[HERE]["workers"]} == {"working"}
        assert all(worker["age_seconds"] < 30 for worker in found[HERE]["workers"])

        assert await cli(mail, "drain", HERE) == (0, f"{HERE} is asked to rest\n", "")

        async def rests() -> bool:
            one = (await listed(mail))[HERE]
            return {worker["state"] for worker in one["workers"]} == {"drained"} and one["leases"] == 0

        await until(rests)
        assert (await listed(mail))[HERE]["resting"]
        assert [worker.returncode for worker in workers] == [None, None]
        before = await taken(mail)
        await mail.submit(job("later"), rows(5, "c.slow.test"))
        assert await call(mail.policy.redis, "KEYS", "sp:{s:*}:c") == [], "no connection is open"
        code, out, _ = await cli(mail, "list")
        assert code == 0
        assert "asked to rest" in out
        assert "drained" in out
        assert await taken(mail) == before, "nothing was sent while it rests"
        assert mail.policy.reader.job_status("later", mail.policy.clock()) is None, "nor was anything taken in"

        assert await cli(mail, "drain", HERE, "--undo", "--json") == (
            0, json.dumps({"host": HERE, "resting": False, "changed": True}) + "\n", "",
        )  # fmt: skip
        assert (await mail.finished("rest")).counts == {"delivered": 800}
        assert (await mail.finished("later")).counts == {"delivered": 5}
        sink = (await mail.sink_counts())["slow"]
        assert sink["accepted"] == sink["unique"] == 805
        for worker in workers:
            assert await mail.drain(worker) == 0
        assert await left_in_redis(mail) == {}
        assert await listed(mail) == {}


async def test_a_host_asked_to_rest_rests_after_a_restart_too_and_ends_in_order() -> None:
    async with mail_world("slow:0:name=slow,delay=0.1") as mail:
        await hosts.ask_to_rest(mail.policy.redis, HERE)
        worker = await mail.start_worker()

        async def rests() -> bool:
            workers = (await hosts.read(mail.policy.redis)).workers
            return {worker.state for worker in workers} == {"drained"}

        await until(rests)
        await mail.submit(job("waits"), rows(5, "a.slow.test"))
        assert await mail.drain(worker) == 0
        assert await taken(mail) == 0
        await hosts.let_work(mail.policy.redis, HERE)
        await mail.start_worker()
        assert (await mail.finished("waits")).counts == {"delivered": 5}


async def test_wrong_names_and_nobody_to_ask() -> None:
    async with mail_world() as mail:
        for command in ("drain", "forget"):
            code, out, err = await cli(mail, command, "nowhere", *(["--yes"] if command == "forget" else []))
            assert (code, out) == (1, "")
            assert "there is no host nowhere" in err
        code, _, err = await cli(mail, "forget", "nowhere")
        assert code == 2
        assert "--yes" in err
        assert await cli(mail, "list") == (0, "no host is at work\n", "")


ELSEWHERE = """
import platform, sys
from pathlib import Path
platform.node = lambda: "elsewhere"
from engine.worker import run_worker
sys.exit(run_worker(0, Path(sys.argv[1])))
"""


async def start_elsewhere(mail: MailWorld) -> asyncio.subprocess.Process:
    """A worker of another host, as far as its name goes."""
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", ELSEWHERE, str(mail.config), cwd=ROOT)
    mail.workers.append(worker)
    return worker


async def test_forget_ends_hold_unknown_and_gives_resend_one_more_attempt() -> None:
    async with mail_world("slow:0:name=slow,delay=0.2") as mail:
        mail.config.write_text(mail.config.read_text().replace("lease_seconds = 10", "lease_seconds = 3"))
        worker = await start_elsewhere(mail)
        await mail.submit(job("hold"), rows(400, "a.slow.test"))
        await mail.submit(job("again", kind="transactional"), rows(40, "b.slow.test"))
        await progress(mail, 12)
        code, _, err = await cli(mail, "forget", "elsewhere", "--yes")
        assert code == 1
        assert "was seen" in err
        await mail.kill(worker)
        for path in (mail.folder / "journal" / "0").iterdir():
            path.unlink()  # it is on the disk of the other host
        await mail.policy.drain()
        sent = await taken(mail)
        found = (await listed(mail))["elsewhere"]
        assert found["leases"] > 0
        assert len(found["workers"]) == 1
        local = await mail.start_worker()  # may not touch what the other holds, however long it is silent

        async def is_old() -> bool:
            return bool((await listed(mail))["elsewhere"]["workers"][0]["age_seconds"] > 6)

        await until(is_old)
        assert (await listed(mail))["elsewhere"]["leases"] == found["leases"]
        code, out, err = await cli(mail, "forget", "elsewhere", "--yes", "--json")
        assert code == 0, err
        told = json.loads(out)
        assert told["host"] == "elsewhere"
        assert told["in_doubt"] == found["in_flight"]
        hold, again = await mail.finished("hold"), await mail.finished("again")
        sink = (await mail.sink_counts())["slow"]

        assert hold.terminal == 400
        assert again.terminal == 40
        assert again.counts.get("unknown", 0) == 0
        assert 0 < hold.counts["unknown"] <= found["in_flight"]
        assert hold.counts["unknown"] + hold.counts["delivered"] == 400
        twice = sink["accepted"] - sink["unique"]
        assert twice <= min(40, sent), "only of `resend`, and only who was sent to before"
        assert "elsewhere" not in await listed(mail)
        assert await mail.drain(local) == 0

        async def is_clean() -> bool:  # permits of the dead worker's connections run out by themselves
            return await left_in_redis(mail) == {}

        await until(is_clean)


async def test_a_host_whose_journal_lies_here_is_not_forgotten_but_started() -> None:
    async with mail_world("slow:0:name=slow,delay=0.4") as mail:
        mail.config.write_text(mail.config.read_text().replace("lease_seconds = 10", "lease_seconds = 2"))
        worker = await mail.start_worker()
        await mail.submit(job("here"), rows(60, "a.slow.test"))
        await progress(mail, 8)
        await mail.kill(worker)

        async def is_old() -> bool:
            return bool((await listed(mail))[HERE]["workers"][0]["age_seconds"] > 3)

        await until(is_old)
        code, _, err = await cli(mail, "forget", HERE, "--yes")
        assert code == 1
        assert "journal" in err
        await mail.start_worker()
        status = await mail.finished("here")
        assert status.terminal == 60
        assert [one["pid"] for one in (await listed(mail))[HERE]["workers"]] == [mail.workers[-1].pid]


async def test_a_host_that_never_registered_is_shown_and_watched_before_it_is_forgotten() -> None:
    async with mail_world() as mail:
        mail.config.write_text(mail.config.read_text().replace("lease_seconds = 10", "lease_seconds = 2"))
        old = Lanes(mail.policy.redis, "ancient:0:1-0a")
        await old.heartbeat([3])
        found = await listed(mail)
        assert found["ancient"]["unregistered"] == ["ancient:0:1-0a"]
        assert found["ancient"]["workers"] == []

        beating = asyncio.create_task(_beat(old))
        try:
            code, _, err = await cli(mail, "forget", "ancient", "--yes")
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        assert code == 1
        assert "lives" in err
        code, out, err = await cli(mail, "forget", "ancient", "--yes")
        assert code == 0, err
        assert out == "ancient is forgotten: 0 recipients in doubt, 0 slices go on elsewhere\n"
        assert await listed(mail) == {}


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
async def test_on_a_terminal_it_asks_first(answer: bytes, code: int) -> None:
    async with mail_world() as mail:
        mail.config.write_text(mail.config.read_text().replace("lease_seconds = 10", "lease_seconds = 2"))
        await Lanes(mail.policy.redis, "ancient:0:1-0a").heartbeat([3])
        ours, theirs = pty.openpty()
        try:
            os.write(ours, answer)
            told, out, err = await cli(mail, "forget", "ancient", stdin=theirs)
        finally:
            os.close(ours)
            os.close(theirs)
        assert told == code, err
        assert "Declare it dead?" in out
        assert ("ancient" in await listed(mail)) is (code == 1)


async def _beat(lanes: Lanes) -> None:
    while True:
        await lanes.heartbeat([3])
        await asyncio.sleep(0.2)
