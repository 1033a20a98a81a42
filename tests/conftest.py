"""Options of the whole suite."""

from __future__ import annotations

import pytest

from tests.world.octets import guard

guard()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("promises")
    group.addoption("--unguarded", action="store_true", help="switch off what each test of a promise names")
    group.addoption("--promises", metavar="FILE", default="", help="how the tests of promises ended, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "promise(number, off): a promise of the privacy policy and its enforcement")
