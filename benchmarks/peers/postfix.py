"""Postfix + OpenDKIM: an instance of its own in a temporary folder, never the system's; queue on disk or on tmpfs.

    folder/etc/main.cf, master.cf     written here (`postfix_files`); folder/etc/opendkim.conf
    folder/spool/                     the queue        folder/data/      Postfix's data directory
    folder/milter                     OpenDKIM's socket

Two measures: `end to end`, from the first injected byte to the last message at the sink, intake, queue and delivery at
once; and `drain`: the queue is filled (and signed: a milter signs at intake) while no queue manager runs, then Postfix
is started and the time runs from that start.

What was done so that it is as fast as it can be (`postfix_files`): no DNS, no address rewriting, no
header or body checks, no client limits, connection reuse without a limit, destination concurrency as probed, no
in_flow_delay, no TLS. Its log goes to syslog as always; where no syslog daemon runs the lines go nowhere. Only the
check before the timed runs writes a log of its own, for its last words.

Known limits: Postfix's master starts as root only; its processes run as the users the Debian package made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers.peer import Missing, Place, Run, Setting
from benchmarks.peers.postfix_files import QUEUES, main_cf, master_cf, opendkim_conf
from benchmarks.peers.processes import Child, RunError, cpu_seconds, result
from benchmarks.peers.sink import Sink

_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"
_START_SECONDS: Final = 30.0


def program(name: str, package: str) -> str:
    """Raises Missing, naming Debian's package."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if found is None:
        raise Missing(f"Debian package {package}")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postfix:
    """drain: the other measure; where: folder on the file system wanted, storage: its word ("" is disk)."""

    def __init__(self, where: Path, *, drain: bool = False, storage: str = "") -> None:
        self.where, self.drain = where, drain
        self.name = "_".join(word for word in ("postfix", storage, "drain" if drain else "") if word)
        measure = "drain of a full queue" if drain else "end to end"
        self.title = f"Postfix + OpenDKIM, {measure}, queue on {storage or 'disk'}"
        self.settings: Sequence[Setting] = [
            {"concurrency": 5, "connections": 10},
            {"concurrency": 10, "connections": 20},
            {"concurrency": 20, "connections": 20},
            {"concurrency": 100, "connections": 20},
            *([] if drain else [{"concurrency": 100, "connections": 50}]),
        ]

    def look(self) -> str:
        postconf, opendkim = program("postconf", "postfix"), program("opendkim", "opendkim")
        if os.geteuid() != 0:
            raise Missing("root: Postfix's master starts as root only")
        if not self.where.is_dir():
            raise Missing(f"the folder {self.where}")
        if shut := next(
            (one for one in (self.where, *self.where.absolute().parents) if not one.stat().st_mode & 1), None
        ):
            raise Missing(f"a folder that others may enter: {shut} keeps Postfix's user out")
        try:
            pwd.getpwnam("postfix")
        except KeyError:
            raise Missing("Debian package postfix: it makes the user postfix") from None
        said = subprocess.run([opendkim, "-V"], capture_output=True, text=True, check=False, timeout=30)
        first = (said.stdout + said.stderr).splitlines()[0].strip() if said.stdout + said.stderr else "opendkim"
        return f"Postfix {_default(postconf, 'mail_version')}, {first.replace(': ', ' ')}"

    def configuration(self, setting: Setting) -> dict[str, str]:
        folder = Path("FOLDER")
        return {
            "main.cf": main_cf(folder, 2525, setting),
            "master.cf": master_cf(2526, setting),
            "opendkim.conf": opendkim_conf(folder),
            "setting.json": json.dumps(dict(setting)),
        }

    def run(self, place: Place, setting: Setting, count: int, keep: int = 0) -> Run:
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(Sink(place.folder, keep))
            instance = stack.enter_context(_instance(self.where, place, sink.port, setting, log=keep > 0))
            measure = instance.drained if self.drain else instance.through
            return measure(place, sink, count)


@contextlib.contextmanager
def _instance(where: Path, place: Place, sink_port: int, setting: Setting, *, log: bool) -> Iterator[_Instance]:
    """A folder of its own on the wanted file system, OpenDKIM in it; Postfix is started by the measures."""
    folder = Path(tempfile.mkdtemp(prefix="sp-postfix-", dir=where))
    try:
        with contextlib.ExitStack() as stack:
            yield _Instance(folder, place, sink_port, setting, log, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Instance:
    def __init__(
        self, folder: Path, place: Place, sink_port: int, setting: Setting, log: bool, stack: contextlib.ExitStack
    ) -> None:
        self.folder, self.port, self._setting, self._stack, self._place = folder, free_port(), setting, stack, place
        folder.chmod(0o755)
        owner = pwd.getpwnam("postfix")
        for name in ("etc", "data", "spool"):
            (folder / name).mkdir(0o755)
        os.chown(folder / "data", owner.pw_uid, owner.pw_gid)
        (folder / "spool" / "pid").mkdir(0o755)
        for name in QUEUES:
            (folder / "spool" / name).mkdir(0o700)
            os.chown(folder / "spool" / name, owner.pw_uid, owner.pw_gid)
        (folder / "etc" / "main.cf").write_text(main_cf(folder, sink_port, setting, log=log), encoding="utf-8")
        conf = folder / "etc" / "opendkim.conf"
        conf.write_text(opendkim_conf(folder), encoding="utf-8")
        key = folder / "dkim.pem"
        key.touch(0o600)
        key.write_bytes(place.key.pem)
        os.chown(key, owner.pw_uid, owner.pw_gid)
        os.chown(folder, owner.pw_uid, owner.pw_gid)  # OpenDKIM runs as Postfix's user and makes its socket here
        # it sleeps up to 5 s before it ends; it has nothing to keep
        self._signer = stack.enter_context(
            Child(
                "opendkim", [program("opendkim", "opendkim"), "-f", "-x", str(conf)], place.folder,
                patience=0.2, user="postfix", group="postfix",
            )
        )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not (folder / "milter").is_socket():
            self._signer.check(deadline)
            time.sleep(0.01)

    def start(self, *, delivering: bool) -> Child:
        """A master that has been started; its first line says when."""
        (self.folder / "etc" / "master.cf").write_text(
            master_cf(self.port, self._setting, delivering=delivering), encoding="utf-8"
        )
        daemons = _default(program("postconf", "postfix"), "daemon_directory")
        # -d: stay in the foreground; patience: the shepherd's is less, and nothing may be left behind
        shepherd = [sys.executable, "-m", "benchmarks.peers.shepherd"]
        command = [*shepherd, f"{daemons}/master", "-d", "-c", str(self.folder / "etc")]
        return self._stack.enter_context(Child("postfix", command, self._place.folder, patience=20.0))

    def wait_listening(self, master: Child) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
                if probe.recv(3) == b"220":
                    probe.sendall(b"QUIT\r\n")
                    return
            try:
                master.check(deadline)
            except RunError as error:
                raise RunError(f"{error}\n{self.last_words()}") from None
            time.sleep(0.02)

    def last_words(self) -> str:
        """The end of Postfix's log, where the run keeps one (invented addresses only)."""
        try:
            return "\n".join((self.folder / "data" / "log").read_text(encoding="utf-8").splitlines()[-12:])
        except OSError:
            return ""

    def inject(self, place: Place, count: int, deadline: float) -> Child:
        """An injector that has begun."""
        command = [
            sys.executable, "-m", "benchmarks.peers.inject", str(place.corpus), "--port", str(self.port),
            "--count", str(count), "--connections", str(self._setting["connections"]),
        ]  # fmt: skip
        injector = self._stack.enter_context(Child("injector", command, place.folder))
        injector.line(0, deadline)
        injector.say("go")
        return injector

    def through(self, place: Place, sink: Sink, count: int) -> Run:
        """End to end."""
        master = self.start(delivering=True)
        self.wait_listening(master)
        sessions = [master.pid, self._signer.pid]
        cpu, before = cpu_seconds(sessions), sink.taken()
        deadline = time.monotonic() + place.patience
        injector = self.inject(place, count, deadline)
        try:
            taken = sink.wait(count, deadline, [master, self._signer, injector])
        except RunError as error:
            raise RunError(f"{error}\n{self.last_words()}") from None
        began = float(result(injector, deadline)["began"])
        return self._run(sink, count, taken.last_at - began, cpu_seconds(sessions) - cpu, before.cpu_seconds)

    def drained(self, place: Place, sink: Sink, count: int) -> Run:
        """Fill while nobody delivers, then time the delivery alone, Postfix's start included."""
        master = self.start(delivering=False)
        self.wait_listening(master)
        deadline = time.monotonic() + place.patience
        if (sent := int(result(self.inject(place, count, deadline), deadline)["sent"])) != count:
            raise RunError(f"{sent} of {count} messages were taken into the queue")
        master.stop()
        held = sum(1 for path in (self.folder / "spool" / "incoming").rglob("*") if path.is_file())
        if held != count:
            raise RunError(f"{held} of {count} messages wait in the queue\n{self.last_words()}")
        before = sink.taken()
        deadline = time.monotonic() + place.patience
        master = self.start(delivering=True)
        began = float(master.line(0, deadline))
        try:
            sink.wait(count, deadline, [master, self._signer])
        except RunError as error:
            raise RunError(f"{error}\n{self.last_words()}") from None
        return self._run(sink, count, sink.taken().last_at - began, cpu_seconds([master.pid]), before.cpu_seconds)

    def _run(self, sink: Sink, count: int, seconds: float, cpu: float, sink_before: float) -> Run:
        taken = sink.taken()
        return Run(
            messages=count,
            seconds=seconds,
            window=taken.last_at - taken.first_at,
            cpu_us=cpu / count * 1e6,
            sink_cpu_us=(taken.cpu_seconds - sink_before) / count * 1e6,
            samples=sink.kept(),
        )


def _default(postconf: str, name: str) -> str:
    """A built-in value of this Postfix; it needs no configuration of the system's."""
    done = subprocess.run([postconf, "-dh", name], capture_output=True, text=True, check=False, timeout=30)
    if done.returncode or not done.stdout.strip():
        raise Missing("Debian package postfix: its postconf does not answer")
    return done.stdout.strip()
