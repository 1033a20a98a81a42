"""What takes a machine down, or its disk, for the matrix: a small disk, a chosen appendfsync, a power cut (promises 3).

    server = Matrix(folder, "everysec")     the embedded server with another appendfsync; `around` it a program
    async with small_disk(folder, kilobytes) as disk:       disk.fill(), disk.empty()
    before = traced(world); await power_cut(world, before)  all of the machine at one instant, unsynced bytes gone

How a power cut is played: Valkey, the writer and the worker run under strace; all are stopped (SIGSTOP), so that
nobody sees another one fall, then killed; every file they touched is cut back to what `power` says; afterwards the
machine has another boot id. The sink is another machine and sees connections end.

Known limits: Linux, strace with --seccomp-bpf, mount namespaces (root, or user namespaces). What SQLite had written
over in the database itself by a checkpoint that was not over stays written: the log holds it too. Logs are left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.queue.journal import BOOT_VARIABLE
from policy.valkey import EmbeddedServer
from tests.chaos.checker import Fault
from tests.chaos.power import Disk, Kept, wrapper
from tests.chaos.world import World

MACHINE = ("redis", "policy", "engine-0")  # what a power cut takes; in this order their logs are read: a worker opens
# the database that the writer makes
_APART = ("src", "logs", "strace")  # of the harness, not of the machine
_ENDS = 20.0  # s for a tracer to write its last line


class Matrix(EmbeddedServer):
    """sync: appendfsync; around: words of a program it runs under; place: of its data."""

    def __init__(self, folder: Path, sync: str) -> None:
        super().__init__(folder)
        self.sync = sync
        self.around: Sequence[str] = ()
        self.place = self.folder

    def _configuration(self) -> str:
        written = super()._configuration()
        for old, new in (
            ("appendfsync always", f"appendfsync {self.sync}"),
            (f'\ndir "{self.folder}"', f'\ndir "{self.place}"'),
        ):
            assert old in written
            written = written.replace(old, new, 1)
        return written

    def _spawn(self, binary: Path) -> None:
        if self.around:
            script = self.folder / "around.sh"
            words = " ".join(shlex.quote(word) for word in (*self.around, str(binary)))
            script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            script.chmod(0o700)
            binary = script
        super()._spawn(binary)


# --- a full disk -----------------------------------------------------------------------------------------------------


@dataclass
class SmallDisk:
    """Only who is started with `enter` sees it. path: it, from outside."""

    path: Path
    enter: Sequence[str]

    @property
    def filler(self) -> Path:
        return self.path / "filler"

    def fill(self) -> None:
        """To the last byte."""
        free = os.statvfs(self.path)
        with self.filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            file.write(bytes(free.f_bavail * free.f_frsize))
            while file.write(b"\0"):
                pass

    def empty(self) -> None:
        self.filler.unlink()


@contextlib.asynccontextmanager
async def small_disk(folder: Path, kilobytes: int) -> AsyncIterator[SmallDisk]:
    """A tmpfs of this size at a folder, in a mount namespace of its own."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    holder = await asyncio.create_subprocess_exec(
        "unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={kilobytes}k small "$0" && echo here && exec cat',
        folder, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        if await holder.stdout.readline() != b"here\n":
            raise RuntimeError("no small disk: mount namespaces (root, or user namespaces) are needed")
        enter = ("nsenter", "--preserve-credentials", "-U", "-m", "-t", str(holder.pid), "--")
        yield SmallDisk(Path(f"/proc/{holder.pid}/root{folder}"), enter)
    finally:
        holder.stdin.close()
        await holder.communicate()


# --- a power cut -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """at: when the power went; lost: bytes that had been written and were not on the disk, by kind of file; gone: names
    that were not in their folders yet."""

    at: float
    lost: Mapping[str, int]
    gone: Sequence[str]


def sizes(folder: Path) -> dict[str, int]:
    """What lies on the machine's disk, and is believed to be there safely."""
    found: dict[str, int] = {}
    for place, folders, files in os.walk(folder):
        if place == str(folder):
            folders[:] = [name for name in folders if name not in _APART]
        for name in files:
            path = Path(place, name)
            if path.is_file():
                found[str(path)] = path.stat().st_size
    return found


def traced(world: World) -> dict[str, int]:
    """From the next start on the machine's programs are watched; what lies there now counts as synced."""
    assert isinstance(world.server, Matrix)
    (world.folder / "strace").mkdir(exist_ok=True)
    world.extra[BOOT_VARIABLE] = str(uuid.uuid4())
    world.server.around = wrapper(str(_log(world, "redis")))
    world.wrap.update((name, wrapper(str(_log(world, name)))) for name in MACHINE if name != "redis")
    return sizes(world.folder)


def untraced(world: World) -> None:
    assert isinstance(world.server, Matrix)
    world.server.around = ()
    world.wrap.clear()


def _log(world: World, name: str) -> Path:
    return world.folder / "strace" / f"{name}.log"


async def power_cut(world: World, before: Mapping[str, int]) -> Cut:
    """All of the machine is gone, and its disk shows what it would show at the next boot. before: of `traced`.

    Nobody of the harness may hold the database open: its locks and its shared memory would outlive the machine."""
    tracers = [_tracer(world.pids()[name]) for name in MACHINE]
    began = time.monotonic()
    for name in MACHINE:
        world.signal(name, signal.SIGSTOP)
    for name in MACHINE:
        if name != "redis":
            world.roles[name].ours = "kill"
        world.signal(name, signal.SIGKILL)
    while world.server.running():
        await asyncio.sleep(0.005)
    for name in MACHINE:
        if name != "redis":
            await world.roles[name].ended.wait()
            world.faults.append(world._fault(world.roles[name], began, time.monotonic()))
    world.faults.append(Fault("redis", began, time.monotonic()))
    for tracer in tracers:
        await _ended(tracer)
    kept = await asyncio.to_thread(_what_is_kept, world, before)
    world.extra[BOOT_VARIABLE] = str(uuid.uuid4())
    return await asyncio.to_thread(_apply, kept, world.folder, began)


def _tracer(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("TracerPid:")).split()[1])


async def _ended(tracer: int) -> None:
    """Until the tracer has said its last word; it ends with the last thread it watched."""
    deadline = time.monotonic() + _ENDS
    while Path(f"/proc/{tracer}").exists() and _state(tracer) != "Z":
        if time.monotonic() > deadline:
            raise RuntimeError(f"strace does not end: {tracer} is {_state(tracer)}")
        await asyncio.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _what_is_kept(world: World, before: Mapping[str, int]) -> list[Kept]:
    disk = Disk(before)
    for name in MACHINE:
        syncs = disk.syncs
        with _log(world, name).open() as lines:
            disk.read(lines, str(world.sources))
        if disk.syncs == syncs:
            raise RuntimeError(f"{name} never synced anything: was it watched?")
    return disk.after_cut()


def _apply(kept: Iterable[Kept], folder: Path, at: float) -> Cut:
    lost: dict[str, int] = {}
    gone: list[str] = []
    for one in kept:
        path = Path(one.path)
        inside = path.is_relative_to(folder) and path.relative_to(folder).parts[0] not in _APART
        if not inside or path.suffix == ".log" or not path.is_file():
            continue
        kind = _kind(path)
        size = path.stat().st_size
        if not one.name:
            lost[kind] = lost.get(kind, 0) + size
            gone.append(str(path.relative_to(folder)))
            path.unlink()
            continue
        if size > one.size:
            lost[kind] = lost.get(kind, 0) + size - one.size
            os.truncate(path, one.size)
        if kind == "wal":
            for start, end in one.rewritten:  # frames of a new round over those of an old one: as if never written
                lost[kind] = lost.get(kind, 0) + end - start
                with path.open("r+b") as file:
                    file.seek(start)
                    file.write(bytes(end - start))
        if one.name != one.path:
            path.rename(one.name)
    return Cut(at, {kind: count for kind, count in sorted(lost.items()) if count}, gone)


def _kind(path: Path) -> str:
    names = ((".aof", "aof"), ("-wal", "wal"), (".db", "sql"), (".journal", "journal"), (".kept", "journal"))
    return next((kind for end, kind in names if path.name.endswith(end)), "other")
