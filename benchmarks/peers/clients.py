"""Clients: the peers that are libraries, each in processes of its own: nodemailer, aiosmtplib with two signers.

They hold no queue and write nothing: what is timed is signing and SMTP, from the word "go" (processes started, keys
parsed, nothing connected yet) to the last message at the sink.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers import aio, signing
from benchmarks.peers.peer import Missing, Place, Run, Setting
from benchmarks.peers.processes import Child, RunError, cpu_seconds, environment, result
from benchmarks.peers.sink import Sink
from engine.rehearsal.setting import DOMAIN

NODEMAILER: Final = "10.6.0"
_WORKER: Final = Path(__file__).with_name("nodemailer_worker.cjs")
_START_SECONDS: Final = 30.0


class _Library(abc.ABC):
    """The part all clients share: start the processes, say go, wait for the sink."""

    name = ""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    @abc.abstractmethod
    def command(self, place: Place, key: Path, port: int, setting: Setting, first: int, count: int) -> list[str]:
        """The command line of one process."""

    def run(self, place: Place, setting: Setting, count: int, keep: int = 0) -> Run:
        key = place.folder / "dkim.pem"
        key.touch(0o600)
        key.write_bytes(place.key.pem)
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(Sink(place.folder, keep))
            workers = [
                stack.enter_context(
                    Child(
                        f"{self.name}-{first}", self.command(place, key, sink.port, setting, first, count), place.folder
                    )
                )
                for first in range(self.processes)
            ]
            ready = time.monotonic() + _START_SECONDS
            for worker in workers:
                worker.line(0, ready)
            sessions = [worker.pid for worker in workers]
            cpu, before = cpu_seconds(sessions), sink.taken()
            deadline = time.monotonic() + place.patience
            for worker in workers:
                worker.say("go")
            taken = sink.wait(count, deadline, workers)
            told = [result(worker, deadline) for worker in workers]
            cpu = cpu_seconds(sessions) - cpu
            if sum(one["sent"] for one in told) != count:
                raise RunError(f"{self.name} says it sent {sum(one['sent'] for one in told)} of {count}")
            return Run(
                messages=count,
                seconds=taken.last_at - min(one["began"] for one in told),
                window=taken.last_at - taken.first_at,
                cpu_us=cpu / count * 1e6,
                sink_cpu_us=(taken.cpu_seconds - before.cpu_seconds) / count * 1e6,
                samples=sink.kept(),
            )


class Aiosmtplib(_Library):
    """signer: "dkimpy" or "cryptography"."""

    def __init__(self, signer: str, processes: int) -> None:
        super().__init__(processes)
        self.signer = signer
        self.name = f"aiosmtplib_{signer}"
        self.title = f"aiosmtplib + {signer}, {processes} processes"
        self.settings: Sequence[Setting] = [{"connections": 2}, {"connections": 5}, {"connections": 20}]

    def look(self) -> str:
        try:
            names = ("aiosmtplib", "dkimpy" if self.signer == "dkimpy" else "cryptography", "uvloop")
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        except importlib.metadata.PackageNotFoundError as error:
            raise Missing(f"pip package {error.name}") from None

    def command(self, place: Place, key: Path, port: int, setting: Setting, first: int, count: int) -> list[str]:
        return [
            sys.executable, "-m", "benchmarks.peers.aio", str(place.corpus), "--port", str(port), "--key", str(key),
            "--signer", self.signer, "--first", str(first), "--step", str(self.processes), "--count", str(count),
            "--connections", str(setting["connections"]),
        ]  # fmt: skip

    def configuration(self, setting: Setting) -> dict[str, str]:
        sources = {f"{module.__name__.rpartition('.')[2]}.py": Path(str(module.__file__)) for module in (aio, signing)}
        texts = {name: path.read_text(encoding="utf-8") for name, path in sources.items()}
        return {"setting.json": json.dumps({"processes": self.processes, **setting}), **texts}


class Nodemailer(_Library):
    """cache: folder whose node_modules holds nodemailer, or shall when it is to be installed."""

    name = "nodemailer"

    def __init__(self, processes: int, cache: Path, install: bool) -> None:
        super().__init__(processes)
        self.title = f"nodemailer, pool and own DKIM, {processes} processes"
        self.settings: Sequence[Setting] = [{"pool": 5}, {"pool": 10}, {"pool": 20}, {"pool": 50}]
        self._cache, self._install = cache, install
        self._node = shutil.which("node") or ""

    @property
    def _library(self) -> Path:
        return self._cache / "node_modules" / "nodemailer"

    def look(self) -> str:
        if not self._node:
            raise Missing("Debian package nodejs")
        if self._install and not self._library.is_dir():
            self._fetch()
        try:
            manifest = json.loads((self._library / "package.json").read_text(encoding="utf-8"))
        except OSError:
            raise Missing(f"npm package nodemailer@{NODEMAILER} (--install puts it into {self._cache})") from None
        runtime = subprocess.run([self._node, "--version"], capture_output=True, text=True, check=False, timeout=30)
        return f"nodemailer {manifest['version']}, node {runtime.stdout.strip().removeprefix('v')}"

    def _fetch(self) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise Missing("Debian package npm (or node's own)")
        self._cache.mkdir(parents=True, exist_ok=True)
        command = [
            npm, "install", "--prefix", str(self._cache), "--ignore-scripts", "--no-audit", "--no-fund", "--no-save",
            f"nodemailer@{NODEMAILER}",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=environment())
        except subprocess.TimeoutExpired:
            raise Missing(f"npm package nodemailer@{NODEMAILER}: npm took too long") from None
        if done.returncode:
            raise Missing(f"npm package nodemailer@{NODEMAILER}: npm ended with code {done.returncode}")

    def command(self, place: Place, key: Path, port: int, setting: Setting, first: int, count: int) -> list[str]:
        numbers = (first, self.processes, count, setting["pool"])
        return [
            self._node, str(_WORKER), str(self._library.absolute()), str(place.corpus), str(port), str(key),
            DOMAIN, signing.SELECTOR, *map(str, numbers),
        ]  # fmt: skip

    def configuration(self, setting: Setting) -> dict[str, str]:
        return {
            "setting.json": json.dumps({"processes": self.processes, **setting}),
            _WORKER.name: _WORKER.read_text(encoding="utf-8"),
        }
