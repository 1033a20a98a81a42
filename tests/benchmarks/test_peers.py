"""The peers' contest: figures, chart and configurations without a peer; then real peers in small."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import dkim  # type: ignore[import-untyped]  # dkimpy has no types
import pytest

from benchmarks.peers import corpus, figures, inject, machine, ours, postfix, postfix_files, signing
from benchmarks.peers.__main__ import draw
from benchmarks.peers.chart import Bar, svg
from benchmarks.peers.clients import Nodemailer
from benchmarks.peers.contest import Contest, Plan
from benchmarks.peers.figures import Entry, Pair
from benchmarks.peers.peer import Missing, Place, Run, Setting
from benchmarks.peers.processes import Child, RunError, cpu_seconds, environment
from benchmarks.peers.sink import Sink
from engine.message import load_signer
from engine.rehearsal.setting import DOMAIN
from tests.world.servers import short_folder

COUNT = 40


@pytest.fixture(scope="module")
def letters() -> Iterator[tuple[Path, corpus.Corpus]]:
    with short_folder() as folder:
        made = corpus.make(folder, COUNT)
        yield folder, made
        made.close()


@pytest.fixture(scope="module")
def key() -> signing.Key:
    return signing.make_key()


# --- the messages


def test_the_corpus_is_what_ours_sends(letters: tuple[Path, corpus.Corpus]) -> None:
    _, made = letters
    messages = [made.message(number) for number in range(COUNT)]

    assert len(made) == COUNT
    assert len(set(made.recipients)) == COUNT
    assert 33_000 < made.mean_bytes < 36_000
    for recipient, wire in zip(made.recipients, messages, strict=True):
        assert f"<{recipient}>".encode() in wire.partition(b"\r\n\r\n")[0]
        assert wire.endswith(b"\r\n")
        assert b"\r\n." not in wire, "nothing to stuff"
        assert b"\n" not in wire.replace(b"\r\n", b"")
        assert b"DKIM-Signature" not in wire
        assert made.is_ours(b"Received: by a peer\r\n" + wire)
    tracked = sum(b"/o/" in wire for wire in messages)
    assert 0 < tracked < COUNT, "half of the audience agreed to be tracked"


def test_a_message_that_was_changed_is_not_ours(letters: tuple[Path, corpus.Corpus]) -> None:
    _, made = letters
    wire = made.message(3)

    assert made.is_ours(wire)
    assert not made.is_ours(wire.replace(b"</table>", b"</tabel>", 1))
    assert not made.is_ours(wire.replace(b"Message-ID: <5.0000000000000004", b"Message-ID: <5.00000000000f0004"))
    assert not made.is_ours(b"Subject: none\r\n\r\nof ours\r\n")


@pytest.mark.parametrize("name", sorted(signing.SIGNERS))
def test_what_the_signers_sign_verifies(name: str, letters: tuple[Path, corpus.Corpus], key: signing.Key) -> None:
    _, made = letters
    signed = signing.SIGNERS[name](DOMAIN, signing.SELECTOR, key.pem).sign(made.message(0))

    assert made.is_ours(signed)
    assert signing.verified(signed, DOMAIN, key.record)
    assert not signing.verified(signed.replace(b"Subject: ", b"Subject: not ", 1), DOMAIN, key.record)
    assert not signing.verified(signed.replace(b"</table>", b"</tabel>", 1), DOMAIN, key.record)
    assert not signing.verified(signed, "other.example", key.record)
    assert not signing.verified(made.message(0), DOMAIN, key.record), "no signature at all"


def test_the_peers_sign_with_a_key_of_our_size(key: signing.Key) -> None:
    signer = load_signer(DOMAIN, signing.SELECTOR, key.pem)

    assert signer.public_record().encode() == key.record
    assert len(signer.sign([sha256(b"x").digest()])[0]) == 2048 // 8


@pytest.mark.parametrize("body", [b"", b"a\r\n", b"a", b"a\r\n\r\n\r\n", b"\r\n\r\n", b" a \t b \r\n"])
def test_the_cached_signer_canonicalises_every_end(body: bytes, key: signing.Key) -> None:
    wire = b"From: a@%s\r\nTo:  b@example.org\r\nSubject: one\r\n\ttwo   three \r\n\r\n" % DOMAIN.encode() + body
    signed = signing.CachedSigner(DOMAIN, signing.SELECTOR, key.pem).sign(wire)

    assert dkim.verify(signed, dnsfunc=lambda *_, **__: key.record)
    assert signed.endswith(wire)


# --- figures


def run(messages: int, seconds: float) -> Run:
    return Run(messages=messages, seconds=seconds, window=seconds / 2, cpu_us=4000.0, sink_cpu_us=80.0)


def entry(name: str = "postfix", *rates: tuple[float, float]) -> Entry:
    """rates: of ours and of the peer, by pairs."""
    pairs = [Pair(mine, run(1000, 1000 / theirs)) for mine, theirs in rates]
    return Entry(name, "Postfix & co", "3.7", [({"connections": 5}, 300.0)], {"connections": 5}, 1000, pairs)


def test_a_ratio_is_that_of_neighbours() -> None:
    """The machine gets three times slower: pairs say 8, 8 and 10, medians of all would say something else."""
    one = entry("postfix", (3200.0, 400.0), (1600.0, 200.0), (1000.0, 100.0))
    mine = [{"messages_per_second": pair.ours, "cpu_us_per_message": 900.0, "rsa_share": 0.3} for pair in one.pairs]
    whole = figures.summary([one], mine, [3600.0, 3500.0], {"nodemailer": "npm package"}, {"rounds": 3})

    assert whole["ratios"] == {"postfix": [8.0, 8.0, 10.0]}
    assert whole["postfix_ratio"] == 8.0
    assert whole["nodemailer_ratio"] is None
    assert whole["skipped"] == {"nodemailer": "npm package"}
    assert whole["peers"]["postfix"]["messages_per_second"] == (100.0, 200.0, 400.0)
    assert whole["peers"]["postfix"]["messages_per_second_at_sink"] == (200.0, 400.0, 800.0)
    assert whole["peers"]["ours"]["messages_per_second"] == (1000.0, 1600.0, 3200.0)
    assert whole["rsa_per_second_one_core"] == (3500.0, 3550.0, 3600.0)
    assert whole["rounds"] == 3
    assert whole["ok"]
    assert {f"{name}_ratio" for name in figures.NAMES} <= whole.keys()
    assert json.loads(json.dumps(whole))["postfix_ratio"] == 8.0


def test_a_peer_that_failed_is_in_the_figures_and_makes_them_not_ok() -> None:
    failed = entry()
    failed.trouble = "it ended with code 1"
    whole = figures.summary([failed], [], [], {}, {})

    assert not whole["ok"]
    assert whole["peers"]["postfix"]["trouble"] == "it ended with code 1"
    assert whole["peers"]["postfix"]["messages_per_second"] is None
    assert whole["postfix_ratio"] is None


def test_the_best_setting_and_how_many_messages() -> None:
    probes: list[tuple[Setting, float]] = [({"c": 5}, 300.0), ({"c": 20}, 410.0), ({"c": 100}, 410.0)]

    assert figures.best(probes) == ({"c": 20}, 410.0)
    assert figures.count_for(400.0, 15.0, 200, 20_000) == 6000
    assert figures.count_for(9000.0, 15.0, 200, 20_000) == 20_000
    assert figures.count_for(1.0, 5.0, 200, 20_000) == 200
    assert figures.count_for(400.0, 15.0, 200, 30) == 30


def test_the_table_has_a_line_for_each() -> None:
    text = figures.table([entry("postfix", (3000.0, 400.0))], [{"messages_per_second": 3000.0}])
    head, mine, theirs = text.splitlines()

    assert "ours is" in head
    assert "3,000" in mine
    assert "400" in theirs
    assert "7.50 x" in theirs
    assert "connections 5" in theirs
    assert figures.table([entry()], []).splitlines()[2].split()[-1] == "5", "not timed: no figures, its setting"


def test_the_chart_is_well_formed_and_to_scale() -> None:
    bars = [Bar("ours <&>", 900, 1000, 2000, ours=True), Bar("theirs", 90, 100, 110, "ours 10 x")]
    root = xml.etree.ElementTree.fromstring(svg('A "title"', "for <all>", bars))
    rectangles = root.findall("{*}rect")

    assert [one.get("class") for one in rectangles] == ["o", "p"]
    assert float(rectangles[0].get("width", "")) == 10 * float(rectangles[1].get("width", ""))
    assert "ours <&>" in [one.text for one in root.findall("{*}text")]
    assert xml.etree.ElementTree.fromstring(svg("nothing", "", [])).findall("{*}rect") == []


def test_the_contest_is_drawn() -> None:
    with short_folder() as folder:
        contest = Contest(Plan(1000, 1, 1.0, 1.0, 1.0), folder, print)
        contest.entries = [entry("postfix", (3000.0, 400.0)), entry("nodemailer")]
        contest.runs = [{"messages_per_second": 3000.0}]
        root = xml.etree.ElementTree.fromstring(draw(contest))

    assert len(root.findall("{*}rect")) == 2, "ours and the one that was timed"


def test_ours_is_read_from_the_last_line() -> None:
    said = 'noise\n{"ok": false}\n{"ok": true, "messages_per_second": 2196.0}\n'

    assert ours.read(said)["messages_per_second"] == 2196.0
    for wrong in ("", "no figures\n", '{"ok": false, "messages_per_second": 5}\n', '{"ok": true}\n', '{"ok": tr'):
        with pytest.raises(RunError, match="the worker ended"):
            ours.read(wrong, "the worker ended")


def test_the_file_system_is_that_of_the_device() -> None:
    lines = [
        "22 28 0:20 / /proc rw,nosuid shared:5 - proc proc rw",
        "26 28 0:23 / /dev/shm rw,nosuid shared:4 master:1 - tmpfs tmpfs rw",
        "28 1 254:0 / / rw,relatime - ext4 /dev/root rw",
    ]

    assert machine.type_of(lines, "0:23") == "tmpfs"
    assert machine.type_of(lines, "254:0") == "ext4"
    assert machine.type_of(lines, "9:9") == ""


# --- configurations


def lines_of(text: str) -> dict[str, str]:
    pairs = [line.partition("=") for line in text.splitlines() if line and not line.startswith("#")]
    return {name.strip(): value.strip() for name, _, value in pairs}


def test_postfix_is_its_own_instance_and_not_crippled() -> None:
    setting = {"concurrency": 37, "connections": 11}
    folder = Path("/tmp/here")
    main = lines_of(postfix_files.main_cf(folder, 2500, setting))
    services = postfix_files.master_cf(2600, setting)

    assert main["queue_directory"] == "/tmp/here/spool"
    assert main["data_directory"] == "/tmp/here/data"
    assert main["inet_interfaces"] == "127.0.0.1"
    assert main["relayhost"] == "[127.0.0.1]:2500"
    assert main["default_destination_concurrency_limit"] == "37"
    assert main["in_flow_delay"] == "0"
    assert main["smtp_connection_cache_destinations"] == "[127.0.0.1]:2500"
    assert main["milter_default_action"] == "tempfail", "what is not signed is not sent"
    assert "maillog_file" not in main
    assert lines_of(postfix_files.main_cf(folder, 2500, setting, log=True))["maillog_file"] == "/tmp/here/data/log"
    words = [line.split() for line in services.splitlines() if not line.startswith("#")]
    assert [line[0] for line in words if line[1] == "inet"] == ["127.0.0.1:2600"]
    assert ["smtp", "unix", "-", "-", "n", "-", "37", "smtp"] in words
    assert int(words[0][6]) >= 11, "a process for each connection of the injector"
    assert any(line[0] == "qmgr" for line in words)
    held = postfix_files.master_cf(2600, setting, delivering=False)
    assert [line for line in held.splitlines() if line.startswith("qmgr")] == []
    assert "KeyFile             /tmp/here/dkim.pem" in postfix_files.opendkim_conf(folder)


# --- processes


def test_a_child_that_is_gone_or_late_is_said(tmp_path: Path) -> None:
    with Child("gone", [sys.executable, "-c", "import sys; sys.exit('it was ' + 'so')"], tmp_path) as gone:
        with pytest.raises(RunError, match=r"gone ended with code 1\nit was so"):
            gone.line(0, time.monotonic() + 30)
    with Child("late", [sys.executable, "-c", "input()"], tmp_path) as late:
        with pytest.raises(RunError, match="late took too long"):
            late.line(0, time.monotonic())
    assert late.process.poll() is not None, "and it was ended"


def test_the_cpu_time_of_a_session_has_its_children_in(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    source = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print('ready', flush=True); input()"
    )
    with Child("parent", [sys.executable, "-c", source], tmp_path) as parent:
        parent.line(0, time.monotonic() + 60)

        assert cpu_seconds([parent.pid]) >= 0.3
        assert cpu_seconds([]) == 0.0


def test_an_operators_settings_reach_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALES_PUSH_CONFIG", "/etc/sales-push.toml")

    assert "SALES_PUSH_CONFIG" not in environment()
    assert environment(TMPDIR="/there")["TMPDIR"] == "/there"


@pytest.mark.parametrize("how", ["input", "signal"])
def test_the_shepherd_leaves_nobody_behind(how: str, tmp_path: Path) -> None:
    """The program's child would outlive it, as those of a killed master do."""
    source = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-m", "benchmarks.peers.shepherd", sys.executable, "-c", source]
    with Child("shepherd", command, tmp_path) as shepherd:
        began = float(shepherd.line(0, time.monotonic() + 60))
        assert 0 <= time.time() - began < 60
        orphan = int(shepherd.line(1, time.monotonic() + 60))
        if how == "signal":
            shepherd.process.send_signal(signal.SIGTERM)
        else:
            assert shepherd.process.stdin is not None
            shepherd.process.stdin.close()
        shepherd.process.wait(60)
    stat = Path(f"/proc/{orphan}/stat")
    deadline = time.monotonic() + 30
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child of the program lives on"
        time.sleep(0.02)


# --- injector and sink


async def test_the_injector_sends_each_message_once(letters: tuple[Path, corpus.Corpus]) -> None:
    _, made = letters
    with short_folder() as folder, Sink(folder, keep=-1) as sink:
        sent = await inject.inject(made, sink.port, COUNT, 3)
        taken = sink.wait(COUNT, time.monotonic() + 30, [])
        kept = sink.kept()

        assert sent == taken.messages == taken.unique == COUNT
        assert Counter(kept) == Counter(made.message(number) for number in range(COUNT))
        with pytest.raises(RunError, match=r"40 of 41 messages arrived in time"):
            sink.wait(COUNT + 1, time.monotonic(), [])
        with pytest.raises(RunError, match=r"the sink took 40 messages"):
            sink.wait(COUNT - 1, time.monotonic() + 30, [])


async def test_the_injector_says_what_was_refused(letters: tuple[Path, corpus.Corpus]) -> None:
    _, made = letters

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        await reader.readline()
        writer.write(b"250-here\r\n250 PIPELINING\r\n")
        await reader.readline()
        writer.write(b"452 4.3.1 no room\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        with pytest.raises(inject.Refused, match=r"mail: 452 4\.3\.1 no room"):
            await inject.inject(made, server.sockets[0].getsockname()[1], 3, 1)


# --- the contest


class Twin:
    """A peer that is a sink's injector with a signer; signs: whether it does what it should."""

    name, title = "postfix", "a twin"
    settings: tuple[Setting, ...] = ({"speed": 1}, {"speed": 2})

    def __init__(self, folder: Path, *, signs: bool = True) -> None:
        self.folder, self.signs = folder, signs
        self.asked: list[tuple[Setting, int]] = []

    def look(self) -> str:
        return "twin 1"

    def run(self, place: Place, setting: Setting, count: int, keep: int = 0) -> Run:
        self.asked.append((setting, count))
        made = corpus.Corpus(place.corpus)
        samples = [made.message(number) for number in range(keep)]
        made.close()
        if self.signs:
            signer = signing.CachedSigner(DOMAIN, signing.SELECTOR, place.key.pem)
            samples = [signer.sign(wire) for wire in samples]
        return Run(count, count / (1000.0 * setting["speed"]), 1.0, 100.0, 10.0, samples)

    def configuration(self, setting: Setting) -> dict[str, str]:
        return {"setting.json": json.dumps(dict(setting))}


class Absent(Twin):
    name = "nodemailer"

    def look(self) -> str:
        raise Missing("npm package nodemailer")


def test_a_peer_is_checked_and_probed_and_the_best_setting_is_kept(tmp_path: Path) -> None:
    twin = Twin(tmp_path)
    said: list[str] = []
    contest = Contest(Plan(300, 0, 0.1, 0.1, 10.0), tmp_path, said.append)
    contest.prepare([twin, Absent(tmp_path)], tmp_path / "results")
    [one] = contest.entries

    assert one.trouble == ""
    assert one.setting == {"speed": 2}
    assert [setting for setting, _ in one.probes] == [{"speed": 1}, {"speed": 2}]
    assert one.count == 200
    assert json.loads((tmp_path / "results" / "postfix" / "setting.json").read_text()) == {"speed": 2}
    assert contest.skipped == {"nodemailer": "npm package nodemailer"}
    assert any("nodemailer: skipped, not installed: npm package nodemailer" in line for line in said)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("r-")] == [], "each run cleans up"


def test_a_peer_that_does_not_sign_is_not_timed(tmp_path: Path) -> None:
    twin = Twin(tmp_path, signs=False)
    contest = Contest(Plan(300, 1, 0.1, 0.1, 10.0), tmp_path, lambda _: None)
    contest.prepare([twin], tmp_path / "results")
    contest.run()

    assert contest.entries[0].trouble == "postfix: dkimpy does not verify a signature"
    assert twin.asked == [({"speed": 1}, 5)], "the check and nothing after it"
    assert contest.runs == []


def test_pairs_are_ours_then_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def mine(folder: Path, recipients: int, patience: float, options: tuple[str, ...]) -> dict[str, Any]:
        order.append(f"ours {recipients} {' '.join(options)}")
        return {"messages_per_second": 4000.0, "ok": True}

    monkeypatch.setattr(ours, "run", mine)
    monkeypatch.setattr(machine, "rsa_rate", lambda: 3600.0)
    twin = Twin(tmp_path)
    contest = Contest(Plan(300, 3, 0.1, 0.1, 10.0, ("--fast",)), tmp_path, order.append)
    contest.prepare([twin], tmp_path / "results")
    order.clear()
    contest.run()

    assert [line.split(":")[0] for line in order] == ["ours 300 --fast", "round 1"] + [
        word for number in (2, 3) for word in ("ours 300 --fast", f"round {number}")
    ]
    assert [pair.ratio for pair in contest.entries[0].pairs] == [2.0, 2.0, 2.0]
    assert contest.rsa == [3600.0] * 3


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Nodemailer(2, tmp_path / "node", install=False)
    monkeypatch.setattr(peer, "_node", "")
    with pytest.raises(Missing, match="Debian package nodejs"):
        peer.look()
    monkeypatch.setattr(peer, "_node", sys.executable)
    with pytest.raises(Missing, match=r"npm package nodemailer@\d"):
        peer.look()


def test_a_folder_that_keeps_postfix_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(postfix, "program", lambda name, package: name)
    shut = tmp_path / "shut"
    (shut / "inside").mkdir(parents=True)
    shut.chmod(0o700)
    with pytest.raises(Missing, match="shut keeps Postfix's user out"):
        postfix.Postfix(shut / "inside").look()
    with pytest.raises(Missing, match=r"the folder .*nowhere"):
        postfix.Postfix(tmp_path / "nowhere").look()


def test_a_program_that_is_not_there_names_its_package() -> None:
    with pytest.raises(Missing, match="Debian package opendkim"):
        postfix.program("no-such-program-of-opendkim", "opendkim")


# --- real peers


@pytest.mark.debian
@pytest.mark.timeout(240)  # 20 s on a quiet machine
def test_postfix_with_opendkim_and_aiosmtplib_run() -> None:
    """The whole command in small: checked, probed, configurations written, everything ended and put away. Postfix's
    master starts as root only, so a user needs sudo here, as .ci/run does."""
    assert shutil.which("opendkim", path="/usr/sbin:/usr/bin"), "install Debian's opendkim"
    names = ("postfix", "postfix_drain", "aiosmtplib_dkimpy", "aiosmtplib_cryptography")
    with short_folder() as folder:
        folder.chmod(0o711)  # Postfix and OpenDKIM run as another user
        results = folder / "results"
        words = ["--rounds", "0", "--recipients", "30", "--settings", "1", "--patience", "90"]
        words += ["--folder", str(folder), "--results", str(results)]
        command = [sys.executable, "-m", "benchmarks.peers", *words, *(w for name in names for w in ("--only", name))]
        if os.geteuid() != 0:
            command = ["sudo", "-n", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=230, env=environment())
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(done.stdout.splitlines()[-1])

        assert told["skipped"] == {}
        assert set(told["peers"]) == {"ours", *names}
        for name in names:
            assert f"{name}: bodies are the corpus's, signatures verify" in done.stderr
            assert told["peers"][name]["messages"] == 30
            assert all(rate > 0 for _, rate in told["peers"][name]["probes"])
        assert "in_flow_delay = 0" in (results / "postfix" / "main.cf").read_text()
        assert [path.name for path in folder.iterdir()] == ["results"]
        assert told == json.loads((results / "figures.json").read_text())
