"""`engine.compiled`: a build is taken whole and only for the very sources it was made of, or the text is."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine import compiled
from engine.cli import commands
from tests.world.mail import ROOT


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sources in a folder of their own, a build of nothing beside them, and no room imported."""
    for room in (*compiled.ROOMS, "engine.smtp.words"):
        path = tmp_path.joinpath(*room.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(compiled.source(room), path)
    monkeypatch.setattr(compiled, "_ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if type(one).__name__ != "_Finder"])
    for room in compiled.ROOMS:
        monkeypatch.delitem(sys.modules, room, raising=False)
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    compiled.digest.cache_clear()
    yield tmp_path
    compiled.digest.cache_clear()


def lay_a_build() -> None:
    where = compiled.folder()
    where.mkdir(parents=True)
    (where / f"{compiled.LIBRARY}{compiled.SUFFIX}").touch()


def test_without_a_build_the_text_is_imported(copy: Path) -> None:
    assert not compiled.install()
    assert not compiled.is_installed()


def test_a_build_of_these_sources_is_taken(copy: Path) -> None:
    lay_a_build()
    assert compiled.install()
    assert compiled.is_installed()
    finder = sys.meta_path[0]
    spec = finder.find_spec("engine.smtp.lines", None)
    assert spec is not None
    assert spec.origin == str(compiled.folder() / f"engine.smtp.lines{compiled.SUFFIX}")
    assert finder.find_spec("engine.smtp.words", None) is None


@pytest.mark.parametrize("room", ["engine.smtp.lines", "engine.smtp.words"])
def test_one_changed_octet_and_it_is_another(copy: Path, room: str) -> None:
    """Also in a room that is not compiled: its constants are written into those that are."""
    lay_a_build()
    path = compiled.source(room)
    path.write_bytes(path.read_bytes().replace(b"2", b"3", 1))
    compiled.digest.cache_clear()
    assert not compiled.install()


def test_a_room_that_is_imported_already_leaves_all_of_it_text(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_a_build()
    monkeypatch.setitem(sys.modules, "tracker.links", sys)
    assert not compiled.install()
    monkeypatch.setenv(compiled.VARIABLE, "1")
    with pytest.raises(compiled.CompileError, match=r"tracker\.links was imported before"):
        compiled.install()


def test_the_variable_decides(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "1")
    with pytest.raises(compiled.CompileError, match="sales-push compile"):
        compiled.install()
    lay_a_build()
    monkeypatch.setenv(compiled.VARIABLE, "0")
    assert not compiled.install()
    monkeypatch.setenv(compiled.VARIABLE, "1")
    assert compiled.install()


def test_what_is_missing_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mypyc" else sys)
    with pytest.raises(compiled.CompileError, match=r"mypyc missing: .*requirements-compile\.txt"):
        compiled.build()


def test_a_compiler_that_fails_is_told_and_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 1, "lines.py:1: error: no\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: ended)
    with pytest.raises(compiled.CompileError, match="error: no"):
        compiled.build()
    assert not compiled.folder().exists()


def test_the_command_finds_what_is_there(copy: Path) -> None:
    lay_a_build()
    told = CliRunner().invoke(commands, ["compile", "--json"])
    assert told.exit_code == 0
    assert str(compiled.folder()) in told.stdout


@pytest.mark.parametrize("room", compiled.ROOMS)
def test_a_room_has_nothing_that_mypyc_makes_into_something_else(room: str) -> None:
    """Class keywords are dropped and annotations not kept (msgspec and pydantic read them), without a word."""
    tree = ast.parse(ROOT.joinpath(*room.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert not node.keywords, node.name
            assert not bases & {"msgspec.Struct", "Struct", "BaseModel", "pydantic.BaseModel"}, node.name


def test_this_process_runs_what_it_was_asked_for() -> None:
    """Under `make compiled` the rooms of all these tests come from the build, else from the text."""
    from engine.smtp import lines

    assert (Path(lines.__file__).suffix == ".so") is compiled.is_installed()
