"""The hot rooms as machine code: the same sources, translated by mypyc, are imported instead of the text where a build
of exactly these sources for exactly this interpreter is there.

Laws:
- no build, another interpreter, one changed octet in any source, a room that is imported already: then the text
  is imported, all of it. There is no mixture and nothing stale;
- there is one source. What a room does compiled is what its text says, and the tests of the hot path run on both.

    ROOMS      the modules that are translated: where `benchmarks/README.md` says that the microseconds go
    install    by `engine/__init__`, before any room is imported
    build      `sales-push compile`: needs mypyc (the lock file deploy/requirements-compile.txt), a C compiler and the
               interpreter's headers; a minute and a half on two cores

SALESPUSH_COMPILED=0 leaves a build aside; 1 refuses to start without one.

What stays text: rooms with msgspec structs and what pydantic or msgspec reads the annotations of (mypyc does not keep
them), and everything that is not on the way of a message.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

VARIABLE: Final = "SALESPUSH_COMPILED"
ROOMS: Final = (
    "engine.bounce.verp",
    "engine.campaign.expand",
    "engine.delivery.campaigns",
    "engine.delivery.conclusions",
    "engine.delivery.connection",
    "engine.delivery.desk",
    "engine.delivery.gatekeeper",
    "engine.delivery.hand",
    "engine.delivery.press",
    "engine.delivery.settling",
    "engine.delivery.stock",
    "engine.message.bundles",
    "engine.message.compose",
    "engine.message.contents",
    "engine.message.dkim",
    "engine.message.headers",
    "engine.message.mime",
    "engine.message.recall",
    "engine.message.renderer",
    "engine.message.sevenbit",
    "engine.message.slots",
    "engine.queue.journal",
    "engine.queue.lanes",
    "engine.queue.pace",
    "engine.rehearsal.session",
    "engine.rehearsal.window",
    "engine.smtp.dialogue",
    "engine.smtp.lines",
    "engine.smtp.opening",
    "engine.smtp.parser",
    "engine.smtp.script",
    "policy.address",
    "policy.gate",
    "tracker.links",
)
GROUP: Final = "sales_push"  # mypyc: all of it in one library, so that rooms call each other directly
LIBRARY: Final = f"{GROUP}__mypyc"
SUFFIX: Final = importlib.machinery.EXTENSION_SUFFIXES[0]  # "cpython-311-x86_64-linux-gnu.so": interpreter and machine
_ROOT: Final = Path(__file__).parent.parent


class CompileError(Exception):
    """There is no build, or none can be made. The text says what is missing."""


def source(room: str) -> Path:
    """The text of a module."""
    return _ROOT.joinpath(*room.split(".")).with_suffix(".py")


@cache
def digest() -> str:
    """Of all sources of all floors and their names, 16 hexadecimal digits. Of all, because mypyc writes constants of
    other rooms into those it translates. 8 ms, and only asked where there is a build."""
    seen = hashlib.blake2b(digest_size=8)
    for floor in ("engine", "policy", "tracker"):
        for path in sorted((_ROOT / floor).rglob("*.py")):
            text = path.read_bytes()
            seen.update(b"%b %d\n" % (str(path.relative_to(_ROOT)).encode(), len(text)))
            seen.update(text)
    return seen.hexdigest()


def folder() -> Path:
    """Where the build of these sources is, or would be: with the interpreter's environment, not with the sources."""
    return builds() / digest()


def builds() -> Path:
    """Where builds lie."""
    return Path(sys.prefix) / "lib" / "sales-push"


class _Finder:
    """Answers for the rooms and the library they share."""

    def __init__(self, where: Path) -> None:
        self._paths = {name: where / f"{name}{SUFFIX}" for name in (*ROOMS, LIBRARY)}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = self._paths.get(name)
        if found is None:
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, str(found))
        return importlib.util.spec_from_file_location(name, found, loader=loader)


def is_built(where: Path) -> bool:
    """Whether a build lies there."""
    return (where / f"{LIBRARY}{SUFFIX}").is_file()


def install() -> bool:
    """Import the rooms from their build from now on. False: there is none that fits, or it is not wanted.

    Raises CompileError where SALESPUSH_COMPILED=1 and there is none."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "0":
        return False
    found = builds().is_dir() and is_built(folder())
    early = [room for room in ROOMS if room in sys.modules]
    if found and not early:
        sys.meta_path.insert(0, _Finder(folder()))
        return True
    if wanted == "1" and found:
        raise CompileError(f"{VARIABLE}=1, and {early[0]} was imported before the package `engine`")
    if wanted == "1":
        raise CompileError(f"{VARIABLE}=1, and there is no build of these sources: sales-push compile")
    return False


def is_installed() -> bool:
    """Whether this process runs the build."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def build() -> Path:
    """Translate and compile. Answers the folder. Raises CompileError."""
    missing = [name for name in ("mypyc", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompileError(f"{' and '.join(missing)} missing: pip install -r deploy/requirements-compile.txt")
    where = folder()
    if is_built(where):
        return where
    ended = subprocess.run(
        [sys.executable, "-m", "engine.compiling", str(where)],
        cwd=_ROOT,
        env={**os.environ, VARIABLE: "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        told = (ended.stdout + ended.stderr).strip().splitlines()[-20:]
        raise CompileError("\n".join(["it could not be compiled:", *told]))
    return where
