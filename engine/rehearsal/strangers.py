"""Sinks that others wrote, for the benchmark: Postfix's smtp-sink, and Postfix's smtpd before its discard transport.

    postfix   smtp-sink (Debian: postfix): answers and drops; counted by its own running counter
    smtpd     a whole Postfix of its own in the run's folder: smtpd, cleanup and its queue file, the queue's manager,
              delivery to nowhere. Counted by the lines its cleanup logs

smtpd can play a scene: it asks a judge of ours about every recipient (`delegation`), which refuses, puts off and takes
its time.

Law: nothing of the host's own Postfix is read, started or stopped; everything lies in the run's folder.

Known limits: they know no unique recipients; the instants of their first and last message are those at which the
counter was seen to have moved (a look every 0.1 s). Postfix's master wants root. A benchmark killed
by SIGKILL and started by root leaves smtp-sink behind.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from engine.rehearsal.certificate import made_now
from engine.rehearsal.delegation import Delegate
from engine.rehearsal.machine import use_of
from engine.rehearsal.providers import Judge

KINDS: Final = ("postfix", "smtpd")
LOOK_SECONDS: Final = 0.1
_DAEMONS: Final = "/usr/lib/postfix/sbin"
_MESSAGES: Final = re.compile(rb"mesg=([0-9]+)")
_PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"

# Ends with us where the system can do that: PR_SET_PDEATHSIG is 1, SIGTERM 15 (linux/prctl.h). It lasts over exec, and
# is lost when the program gives up root, as smtp-sink does.
_TIED: Final = (
    "import ctypes, os, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
_MAIN: Final = """compatibility_level = 3.6
queue_directory = {folder}/spool
data_directory = {folder}/lib
command_directory = {commands}
daemon_directory = {daemons}
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
mail_owner = postfix
setgid_group = postdrop
myhostname = rehearsal.test
mydestination =
alias_maps =
alias_database =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_recipient_restrictions = {asked}permit_mynetworks, reject
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
default_process_limit = 200
default_transport = discard
relay_transport = discard
message_size_limit = 50000000
in_flow_delay = 0
{tls}"""
_TLS: Final = """smtpd_tls_security_level = may
smtpd_tls_chain_files = {folder}/tls.pem
tls_random_source = dev:/dev/urandom
"""
_MASTER: Final = """127.0.0.1:{port} inet n - n - 1100 smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
proxymap unix - - n - - proxymap
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
tlsmgr unix - - n 1000? 1 tlsmgr
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


def missing(kind: str) -> str:
    """What stands in the way of a sink on this machine, with the remedy; "" when nothing does."""
    if kind == "postfix" and _program("smtp-sink") is None:
        return "smtp-sink is not installed: apt-get install postfix"
    if kind == "smtpd" and (_program("postfix") is None or not Path(_DAEMONS, "smtpd").exists()):
        return "Postfix is not installed: apt-get install postfix"
    if kind == "smtpd" and os.getuid():
        return "Postfix's master must be started by root; without it use --sink postfix"
    return ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


class Stranger:
    """One such sink. folder: short, and of this run alone; judge: whom smtpd asks about recipients. start() listens a
    moment later; stop() with its Popen. The judge answers between `answer` and `fall_silent`."""

    def __init__(
        self, kind: str, folder: Path, port: int, *, starttls: bool = False, judge: Judge | None = None
    ) -> None:
        self.kind = kind
        self.port = port
        self.process: subprocess.Popen[bytes]
        self._folder = folder
        self._starttls = starttls
        self._delegate = Delegate(judge, folder / "judge") if judge is not None else None
        self._said = folder / "log"
        self._count = 0
        self._read = 0
        self._first = self._last = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        command = self._smtp_sink() if self.kind == "postfix" else self._smtpd()
        with self._said.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _TIED, *command],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self.process

    def _smtp_sink(self) -> list[str]:
        user = ("-u", "nobody") if os.getuid() == 0 else ()  # it insists on giving up root
        return [_program("smtp-sink") or "smtp-sink", *user, "-c", "-m", "1100", f"127.0.0.1:{self.port}", "1000"]

    def _smtpd(self) -> list[str]:
        postfix = _program("postfix") or "postfix"
        for parent in self._folder.parents:  # Postfix's own user has to reach its folder
            if parent.name.startswith("sales-push-"):
                parent.chmod(0o711)
        tls = _TLS.format(folder=self._folder) if self._starttls else ""
        if self._starttls:
            pem = self._folder / "tls.pem"
            pem.touch(mode=0o600)
            pem.write_bytes(made_now())
        asked = f"check_policy_service unix:{self._delegate.path}, " if self._delegate is not None else ""
        main = _MAIN.format(
            folder=self._folder, commands=Path(postfix).parent, daemons=_DAEMONS, tls=tls, asked=asked
        )  # fmt: skip
        (self._folder / "main.cf").write_text(main)
        (self._folder / "master.cf").write_text(_MASTER.format(port=self.port))
        (self._folder / "spool").mkdir(exist_ok=True)
        lib = self._folder / "lib"
        lib.mkdir(exist_ok=True)
        shutil.chown(lib, "postfix")
        # `check` makes the queue's folders; the master itself, not `start-fg`, whose shell would be what we stop
        subprocess.run([postfix, "-c", str(self._folder), "check"], capture_output=True, check=False, timeout=60)
        return [f"{_DAEMONS}/master", "-c", str(self._folder), "-d"]

    async def answer(self) -> None:
        """Let the judge answer; in the loop that runs it, after `start`. Raises OSError."""
        if self._delegate is not None:
            await self._delegate.start()

    async def fall_silent(self) -> None:
        """Safe to call twice."""
        if self._delegate is not None:
            await self._delegate.stop()

    def look(self) -> None:
        """Read the counter; call it every LOOK_SECONDS."""
        before = self._count
        with self._said.open("rb") as log:
            if self.kind == "postfix":
                log.seek(max(0, log.seek(0, os.SEEK_END) - 200))
                found = _MESSAGES.findall(log.read())
                self._count = int(found[-1]) if found else self._count
            else:
                log.seek(self._read)
                lines = log.read()
                whole = lines.rfind(b"\n") + 1
                self._read += whole
                self._count += lines.count(b": message-id=", 0, whole)
        if self._count != before:
            self._last = time.time()
            self._first = self._first or self._last

    def counts(self) -> dict[str, Any]:
        """As the control port of our own sink says it, but for what a stranger does not know."""
        self.look()
        return {
            "providers": {},
            "accepted": self._count,
            "unique": None,
            "first_at": self._first,
            "last_at": self._last,
            "cpu_seconds": use_of(self.process.pid).total(),
        }

    def stop(self, patience: float = 10.0) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
