"""Made-up records of one person, place by place, and places that hand them out: the oracle a bundle is held against.

The generator knows nothing of how bundles are written: it makes values by hand and keeps its own list.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from policy.bundle.manifest import About, Party, Place
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.personal import Erased, Person, Record, Value

NOW = 1_795_376_640_000_000
ADDRESS = "Eve.Adams@example.com"
PERSON = Person(tag=bytes(12), partition=3, lane="lane", domain="example.com", address="eve.adams@example.com")


@dataclass
class Shelf:
    """A place of personal data in memory. moving: how often its records change between counting and reading."""

    name: str
    records: list[Record]
    covers: Sequence[str] = ("table:fake",)
    moving: int = 0
    asked: int = field(default=0, init=False)

    async def find(self, person: Person) -> int:
        self.asked += 1
        return len(self.records) + (self.asked <= self.moving)

    async def export(self, person: Person) -> list[Record]:
        return list(self.records)

    async def erase(self, person: Person) -> Erased:
        raise NotImplementedError

    async def amend(self, person: Person, field: str, value: str) -> int:
        raise NotImplementedError


def about(right: str, places: Iterable[Place] = ()) -> About:
    return About(
        ticket="T-7", right=right, made_at=NOW, generator="sales-push test", places=tuple(places),
        controllers=(Party(name="Acme <& Sons>", address="1 Road"),),
        officer=Party(name="Officer", address="privacy@sender.example"),
    )  # fmt: skip


def shelves(seed: int, rows: int) -> list[Shelf]:
    """Twelve places of `rows` records each, every kind in one of them; texts are as ugly as data can be."""
    draw = random.Random(seed)

    def text() -> str:
        return draw.choice(
            ["", "=1+1", "a,b", 'say "x"', "line\r\nline", "<b>&amp;", "żółć 🎈", "'", "123", "true", "-5"]
        )

    def at(n: int) -> str:
        return rfc3339(NOW - DAY_US * draw.randrange(300) - n * HOUR_US)

    def of(kind: str, n: int) -> dict[str, Value]:
        account, job = draw.choice(["acme", "globex"]), f"job-{draw.randrange(5)}"
        made: dict[str, dict[str, Value]] = {
            "profile": {"account": account, "address": ADDRESS, "created_at": at(n)},
            "subscription": {"account": account, "list": f"list{n}", "topic": None, "state": "subscribed"},
            "consent": {
                "account": account, "purpose": "mail_marketing", "basis": "express", "wording": text(),
                "source": text(), "given_at": at(n), "recorded_at": at(n), "withdrawn": n % 3 == 0, "expires_at": None,
            },
            "message": {
                "account": account, "job": job, "reference": f"{n:016x}", "kind": "campaign", "list": "news",
                "outcome": draw.choice(["delivered", "bounced", "refused"]), "reason": None, "at": at(n),
                "domain": "example.com", "attempts": n, "code": 250, "enhanced": "2.0.0", "reply": text(),
                "tls": "TLS 1.3",
            },
            "event": {
                "account": account, "job": job, "reference": f"{n:016x}", "at": at(n), "attempt": n - 2,
                "event": draw.choice(["deferred", "opened", "clicked", "complained"]), "link": text(),
                "visitor": "browser",
            },
            "inferred": {"account": account, "what": "engagement", "value": text(), "at": at(n)},
            "suppression": {
                "target": "address", "scope": "account", "account": account, "reason": "opt-out", "source": text(),
                "created_at": at(n), "expires_at": None,
            },
            "consultation": {"at": at(n), "actor": "support", "purpose": "support", "what": "why", "count": 1},
            "disclosure": {"at": at(n), "recipient": "Police", "purpose": "criminal inquiry", "basis": "warrant"},
            "queued": {"account": account, "job": job, "state": "deferred", "due": at(n), "first_name": text()},
            "request": {"ticket": f"T-{n}", "kind": "access", "state": "done", "received_at": at(n)},
            "keepsake": {"note": text(), "n": n},  # of a kind no version knows
        }  # fmt: skip
        return made[kind]

    kinds = [
        "profile", "subscription", "consent", "message", "event", "inferred", "suppression", "consultation",
        "disclosure", "queued", "request", "keepsake",
    ]  # fmt: skip
    return [Shelf(f"shelf {kind}", [Record(kind, of(kind, n)) for n in range(rows)]) for kind in kinds]
