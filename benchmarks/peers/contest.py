"""The contest: check, probe and time the peers in turn with ours; what each was told is written beside the figures.

Law: bounded in count and time. A peer that fails is reported with its last words and left out of the rounds; ours
failing ends the contest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import corpus, figures, machine, ours, signing
from benchmarks.peers.figures import Entry, Pair
from benchmarks.peers.peer import Missing, Peer, Place, Run, Setting
from benchmarks.peers.processes import RunError
from engine.rehearsal.setting import DOMAIN

CHECKED: Final = 5  # messages looked at before a peer is timed
_FIRST_PROBE: Final = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """recipients: of ours, and at most of a peer; seconds, probe_seconds: about what a timed run and a probe of a peer
    last; patience: seconds until a run is given up; rounds: 0 checks and probes only; options: more words for ours;
    settings: so many of a peer's are tried, 0 for all."""

    recipients: int
    rounds: int
    seconds: float
    probe_seconds: float
    patience: float
    options: tuple[str, ...] = ()
    settings: int = 0


@dataclass(slots=True)
class Contest:
    """Use: prepare(), then run(); then entries, runs (ours), rsa, skipped. mean_bytes: of a message; folder: emptied by
    whoever made it."""

    plan: Plan
    folder: Path
    say: Callable[[str], None]
    entries: list[Entry] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    rsa: list[float] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    mean_bytes: int = 0
    _peers: dict[str, Peer] = field(default_factory=dict)
    _key: signing.Key = field(default_factory=signing.make_key)

    def prepare(self, peers: Sequence[Peer], results: Path) -> None:
        """Make the corpus; check and probe each peer that is installed; write down its configuration."""
        made = corpus.make(self.folder, self.plan.recipients)
        self.mean_bytes = made.mean_bytes
        try:
            where = machine.file_system(self.folder) or "unknown"
            self.say(f"{len(made):,} messages of {made.mean_bytes:,} bytes; file system: {where}")
            for peer in peers:
                try:
                    version = peer.look()
                except Missing as missing:
                    self.skipped[peer.name] = str(missing)
                    self.say(f"{peer.name}: skipped, not installed: {missing}")
                    continue
                entry = Entry(peer.name, peer.title, version)
                self.entries.append(entry)
                self._peers[peer.name] = peer
                try:
                    self._check(peer, made)
                    self._probe(peer, entry)
                except RunError as error:
                    self._give_up(entry, error)
                    continue
                _write(results / peer.name, peer.configuration(entry.setting))
        finally:
            made.close()

    def run(self) -> None:
        """The rounds. Raises RunError when ours fails."""
        for number in range(1, self.plan.rounds + 1):
            for entry in self.entries:
                if entry.trouble:
                    continue
                self.rsa.append(machine.rsa_rate())
                with self._place() as place:
                    mine = ours.run(place.folder, self.plan.recipients, self.plan.patience, self.plan.options)
                self.runs.append(mine)
                try:
                    run = self._run(self._peers[entry.name], entry.setting, entry.count)
                except RunError as error:
                    self._give_up(entry, error)
                    continue
                pair = Pair(float(mine["messages_per_second"]), run)
                entry.pairs.append(pair)
                self.say(
                    f"round {number}: ours {pair.ours:,.0f}/s, {entry.name} {run.rate:,.0f}/s "
                    f"({entry.count:,} messages in {run.seconds:.1f} s), {pair.ratio:.2f} x"
                )

    def _check(self, peer: Peer, made: corpus.Corpus) -> None:
        """Raises RunError unless what arrives is what was given, signed validly."""
        samples = self._run(peer, peer.settings[0], min(CHECKED, self.plan.recipients), CHECKED).samples
        if not samples:
            raise RunError(f"{peer.name}: the sink kept no message to look at")
        if not all(made.is_ours(wire) for wire in samples):
            raise RunError(f"{peer.name}: a message at the sink is not the one that was given")
        if not all(signing.verified(wire, DOMAIN, self._key.record) for wire in samples):
            raise RunError(f"{peer.name}: dkimpy does not verify a signature")
        self.say(f"{peer.name}: bodies are the corpus's, signatures verify")

    def _probe(self, peer: Peer, entry: Entry) -> None:
        most = self.plan.recipients
        count = most
        if most > _FIRST_PROBE:
            rough = self._run(peer, peer.settings[0], _FIRST_PROBE).rate
            count = figures.count_for(rough, self.plan.probe_seconds, _FIRST_PROBE, most)
        for setting in peer.settings[: self.plan.settings or None]:
            run = self._run(peer, setting, count)
            entry.probes.append((setting, run.rate))
            self.say(f"{peer.name}: {figures.words(setting)}: {run.rate:,.0f}/s, {run.cpu_us:,.0f} us CPU a message")
        entry.setting, rate = figures.best(entry.probes)
        entry.count = figures.count_for(rate, self.plan.seconds, _FIRST_PROBE, most)
        self.say(f"{peer.name}: best with {figures.words(entry.setting)}; {entry.count:,} messages a round")

    def _run(self, peer: Peer, setting: Setting, count: int, keep: int = 0) -> Run:
        with self._place() as place:
            return peer.run(place, setting, count, keep)

    def _give_up(self, entry: Entry, error: RunError) -> None:
        entry.trouble = str(error).splitlines()[0]
        self.say(f"{entry.name}: failed: {error}")

    @contextmanager
    def _place(self) -> Iterator[Place]:
        """A folder for one run, gone after it."""
        folder = Path(tempfile.mkdtemp(prefix="r-", dir=self.folder))
        try:
            yield Place(folder, self.folder, self._key, self.plan.patience)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
