"""The mark of a promise's test: which promise, and what to put where its enforcement stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import pytest

MARK: Final = "promise"
F = TypeVar("F", bound=Callable[..., Any])


def promise(number: str, *, off: Mapping[str, Any]) -> Callable[[F], F]:
    """number: "P-07"; off: dotted paths where an enforcement is looked up, each with what takes its place."""
    if not off:
        raise ValueError(f"{number}: a test of a promise names the enforcement it guards")
    mark = getattr(pytest.mark, MARK)(number, off=dict(off))

    def put(test: F) -> F:
        marked: F = mark(test)
        return marked

    return put
