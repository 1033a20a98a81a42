"""The two campaigns of a rehearsal as a producer would hand them in, and the census of their audience.

Promise: the census counts what was submitted from the audience itself, before the engine sees any of it, so that the
equations of a rehearsal compare two independent counts.

Known limits: an audience is generated again each time it is iterated (40 ms per thousand rows), never held in memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.rehearsal import newsletter
from engine.rehearsal.audience import PROVIDERS, Provider, people
from engine.rehearsal.setting import ACCOUNT, DOMAIN, SENDER
from policy.address import AddressError, parse
from policy.instants import rfc3339

LIST = "weekly"
NO_ADDRESS = "(no address)"  # where rows are counted that name nobody


@dataclass(frozen=True, slots=True)
class Audience:
    """Recipient rows that can be iterated as often as needed, always the same ones."""

    count: int
    seed: int = 1
    providers: Sequence[Provider] = PROVIDERS

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return people(self.count, seed=self.seed, providers=tuple(self.providers))

    @property
    def homes(self) -> dict[str, str]:
        """Domain -> behaviour of its provider."""
        return {domain: provider.behaviour for provider in self.providers for domain in provider.domains}


@dataclass(slots=True)
class Census:
    """What is known of an audience before anything is sent. rows: by behaviour, NO_ADDRESS for rows that are none;
    without_consent: addresses that agreed to no mail; tracked: those that agreed to be tracked."""

    rows: Counter[str] = field(default_factory=Counter)
    without_consent: list[str] = field(default_factory=list)
    tracked: set[str] = field(default_factory=set)
    at: dict[str, list[str]] = field(default_factory=dict)

    @property
    def submitted(self) -> int:
        return sum(self.rows.values())


def census(audience: Audience) -> Census:
    """Count an audience. at: a sample of addresses by behaviour, for `why`."""
    found = Census(Counter({provider.behaviour: 0 for provider in audience.providers}))  # in their order
    homes = audience.homes
    for row in audience:
        address = str(row["address"])
        try:
            home = homes[parse(address).domain]
        except AddressError:
            found.rows[NO_ADDRESS] += 1
            continue
        found.rows[home] += 1
        if not row["consent"]:
            found.without_consent.append(address)
            continue
        if "open_tracking" in row["consent"]:
            found.tracked.add(address)
        sample = found.at.setdefault(home, [])
        if len(sample) < 400:
            sample.append(address)
    return found


def first(name: str, *, wait: bool = False) -> dict[str, Any]:
    """The newsletter: 26 kB, 25 links, tracked for those who agreed. name: the job id."""
    return {
        **_job(name),
        "subject": newsletter.SUBJECT,
        "html": newsletter.html(),
        "tracking": {"opens": "individual", "clicks": "individual"},
        "wait": wait,
    }


def second(name: str) -> dict[str, Any]:
    """A short letter to the same list."""
    return {**_job(name), "subject": "One more thing, {{ name }}", "html": newsletter.second_html()}


def _job(name: str) -> Mapping[str, Any]:
    return {
        "v": 1,
        "job_id": name,
        "created_at": rfc3339(time.time_ns() // 1000),
        "account": ACCOUNT,
        "kind": "campaign",
        "from": {"address": f"letter@{DOMAIN}", "name": SENDER},
        "reply_to": f"editors@{DOMAIN}",
        "list": LIST,
        "legal_basis": {"basis": "consent"},
    }
