"""A row of an audience on its way through expansion: one record, apart from what is done with it.

Apart because `engine.campaign.expand` is compiled and a room with msgspec's records is not (engine.compiled).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.campaign.job import Evidence


class Person(msgspec.Struct, gc=False):
    """A row that is an address. evidence: what the job says they agreed to, by purpose; given: when, in microseconds,
    for what counts as evidence; canonical: the tag under which their provider files this spelling, b"" for this one."""

    local: str
    domain: str
    wire: str
    mref: int
    tag: bytes
    partition: int
    columns: tuple[str, ...]
    values: list[Any]
    evidence: Mapping[str, Evidence]
    given: Mapping[str, int]
    place: int
    opens: int = 0
    clicks: int = 0
    subject: int = 0
    pseudonym: int = 0
    canonical: bytes = b""
