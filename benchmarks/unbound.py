"""Debian's unbound as a resolver of our own: it answers from a file, asks nobody, and ends with us.

    with unbound(folder, names) as resolver:      names: domain to MX hosts, host to address
        resolver.address                          ``127.0.0.1:PORT``
        ...
    resolver.questions                            how many it was asked, once it has ended

Law: it listens on loopback alone, forwards nothing, reads nothing of the host's own configuration, needs no root.

Known limits: a port chosen here is free for a moment only; everything it is asked outside ``test.`` is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.rehearsal.machine import use_of

MISSING = "unbound is not installed: apt-get install unbound"
START_SECONDS = 30.0  # 40,000 records are read in less than one
TTL = 3600
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
_SERVER = """server:
  interface: 127.0.0.1
  port: {port}
  access-control: 127.0.0.0/8 allow
  do-daemonize: no
  do-ip6: no
  num-threads: 1
  username: ""
  chroot: ""
  directory: "{folder}"
  pidfile: "{folder}/unbound.pid"
  logfile: "{folder}/unbound.log"
  use-syslog: no
  verbosity: 1
  module-config: "iterator"
  local-zone: "." refuse
  local-zone: "test." static
{records}
remote-control:
  control-enable: no
"""
# What it logs when it ends, such as "server stats for thread 0: 12 queries, 12 answers from cache, …"
_ASKED = re.compile(r"server stats for thread \d+: (\d+) queries")


class NoUnbound(Exception):
    """It is not there, or did not start; the text says which."""


@dataclass(slots=True)
class Resolver:
    """address: for [engine.dns] servers; questions: known when it has ended."""

    address: str
    pid: int
    questions: int = 0

    def cpu_seconds(self) -> float:
        return use_of(self.pid).total()


def program() -> str:
    """Raises NoUnbound."""
    found = shutil.which("unbound", path=_PATH)
    if found is None:
        raise NoUnbound(MISSING)
    return found


@contextlib.contextmanager
def unbound(folder: Path, mx: Mapping[str, Sequence[str]], addresses: Mapping[str, str]) -> Iterator[Resolver]:
    """mx: hosts by domain, the first is preferred; addresses: by host. Raises NoUnbound."""
    command, port = program(), _free_port()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [
        f'  local-data: "{domain}. {TTL} IN MX {10 * place} {host}."'
        for domain, hosts in mx.items()
        for place, host in enumerate(hosts, 1)
    ]
    lines += [f'  local-data: "{host}. {TTL} IN A {address}"' for host, address in addresses.items()]
    config, log = folder / "unbound.conf", folder / "unbound.log"
    config.write_text(_SERVER.format(port=port, folder=folder, records="\n".join(lines)))
    process = subprocess.Popen(
        [command, "-c", str(config)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _wait(process, port, log)
        resolver = Resolver(f"127.0.0.1:{port}", process.pid)
        yield resolver
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()
    resolver.questions = sum(int(count) for count in _ASKED.findall(log.read_text())) - 1  # one was ours


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until it answers a question."""
    # A header with one question, the root's NS: refused, and that is an answer (RFC 1035 4.1).
    question = bytes.fromhex("0000 0100 0001 0000 0000 0000 00 0002 0001")
    deadline = time.monotonic() + START_SECONDS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.1)
        asking.connect(("127.0.0.1", port))
        while process.poll() is None and time.monotonic() < deadline:
            try:
                asking.send(question)
                asking.recv(512)
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
            except TimeoutError:
                continue
    said = log.read_text() if log.exists() else ""
    raise NoUnbound(f"unbound did not start: {said[-500:] or process.returncode}")


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
