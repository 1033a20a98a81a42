"""DNS in memory: a zone as a dictionary, the same seam as the real one (engine.delivery.lookup.Dns).

    Zone({"example.com": {"MX": [(10, "mx.example.com")]}, "mx.example.com": {"A": ["192.0.2.1"]}})

A name that is not there is NXDOMAIN; a kind that is not there is NODATA; ``fail`` names (kind, name) that are in
trouble (mox ``dns/mock.go``). ``asked`` counts questions; ``gate`` lets a test hold all answers back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from engine.delivery.lookup import Answer, Status

Records = Mapping[str, Sequence[str | tuple[int, str]]]


class Zone:
    def __init__(self, names: Mapping[str, Records] | None = None, *, ttl: float = 300.0) -> None:
        self.names: dict[str, Records] = dict(names or {})
        self.fail: set[tuple[str, str]] = set()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.ttl = ttl
        self.gate: asyncio.Event | None = None

    async def query(self, name: str, kind: str) -> Answer:
        self.asked[kind, name] += 1
        if self.gate is not None:
            await self.gate.wait()
        if (kind, name) in self.fail:
            return Answer(Status.TROUBLE, text="ServFail")
        records = self.names.get(name)
        if records is None:
            return Answer(Status.NXDOMAIN, ttl=self.ttl)
        found = tuple((0, record) if isinstance(record, str) else record for record in records.get(kind, ()))
        return Answer(Status.FOUND, found, self.ttl) if found else Answer(Status.NODATA, ttl=self.ttl)
