"""Options of the whole suite."""

from __future__ import annotations

import os

import pytest

# The text is what is tested, also where a build of it lies in the environment; `make compiled` asks for the build.
os.environ.setdefault("SALESPUSH_COMPILED", "0")
import engine  # noqa: F401  (before any room of another floor: engine.compiled decides where they come from)
from tests.world.octets import guard

guard()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("promises")
    group.addoption("--unguarded", action="store_true", help="switch off what each test of a promise names")
    group.addoption("--promises", metavar="FILE", default="", help="how the tests of promises ended, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "promise(number, off): a promise of the privacy policy and its enforcement")
