"""Benchmarks measure the build where there is one, although they borrow from the tests, which test the text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = "import os, sys, {first}, {second}; print(repr(os.environ['SALESPUSH_COMPILED']))"


def asked(first: str, second: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "SALESPUSH_COMPILED"}
    words = [sys.executable, "-c", ASK.format(first=first, second=second)]
    told = subprocess.run(words, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True)
    return told.stdout.strip()


@pytest.mark.parametrize("first", ["benchmarks", "benchmarks.__main__", "benchmarks.test_compose"])
def test_a_benchmark_takes_the_build_and_so_does_what_it_starts(first: str) -> None:
    assert asked(first, "tests") == "''"
    assert asked(first, "tests", SALESPUSH_COMPILED="0") == "'0'"


def test_the_tests_take_the_text() -> None:
    assert asked("tests", "benchmarks") == "'0'"
