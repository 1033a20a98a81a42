"""Each mutant of the harness fits the sources as they are: one that does not would prove nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.chaos.mutants import MUTANTS, apply
from tests.chaos.world import ROOT


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_mutant_changes_one_place(name: str, tmp_path: Path) -> None:
    file = MUTANTS[name].file
    (tmp_path / file).parent.mkdir(parents=True)
    shutil.copy(ROOT / file, tmp_path / file)
    apply(name, tmp_path)
    assert (tmp_path / file).read_text() != (ROOT / file).read_text()
    if file.endswith(".py"):
        compile((tmp_path / file).read_text(), file, "exec")


def test_a_mutant_that_does_not_fit_says_so(tmp_path: Path) -> None:
    file = tmp_path / MUTANTS["no-rate"].file
    file.parent.mkdir(parents=True)
    file.write_text("-- another rate.lua\n")
    with pytest.raises(ValueError, match="does not fit"):
        apply("no-rate", tmp_path)
