"""What the ledger says of a rehearsal: figures by provider, the course over time, the rate.

Law: everything here is read from the read-only ledger (policy.schema), nothing from the processes that sent. A row of
the audience counts where it ended; `deferrals` are attempts, all others are recipients.

The rate of a provider: delivered recipients / (instant of the last outcome - instant of the first outcome at its
domains). An outcome's instant is Redis time when its reply was judged; the first lease lies one gate question and
one composition before it (some 20 ms), so it is within a percent of "first lease to last settle" from 2 s upwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine, select

from policy.events import Kind
from policy.ledger import Report
from policy.schema import domain, history, message

TALLIED = ("delivered", "refused", "bounced", "expired", "unknown", "cancelled", "lost")
ELSEWHERE = "(no address)"
# Fields of engine.rehearsal.server.Counts that are shown, in words.
SINK_FIGURES = {
    "accepted": "accepted",
    "deferred": "deferred",
    "refused": "refused",
    "connections": "connections",
    "closed_421": "closed with 421",
    "most_open": "open at once",
}


@dataclass(slots=True)
class Tally:
    """One provider's figures. counts: recipients by terminal kind; deferrals: attempts put off; reasons: by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    deferrals: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __getitem__(self, kind: str) -> int:
        return self.counts[kind]

    @property
    def ended(self) -> int:
        return self.counts.total()


def tallies(report: Report, homes: Mapping[str, str]) -> dict[str, Tally]:
    """A job's figures by behaviour of the provider; ELSEWHERE holds what has no domain. homes: domain -> behaviour."""
    found: dict[str, Tally] = {}
    for name, kind, reason, n in report.domains:
        tally = found.setdefault(homes.get(name, ELSEWHERE), Tally())
        if kind == "deferred":
            tally.deferrals += n
        elif kind in TALLIED:
            tally.counts[kind] += n
        if reason:
            tally.reasons[kind, reason] += n
    return found


def total(found: Mapping[str, Tally]) -> Tally:
    whole = Tally()
    for tally in found.values():
        whole.counts.update(tally.counts)
        whole.reasons.update(tally.reasons)
        whole.deferrals += tally.deferrals
    return whole


@dataclass(slots=True)
class Course:
    """A job over time. at: sorted instants in microseconds by (behaviour, kind); attempts: recipients by number of
    attempts they needed until delivery."""

    at: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)

    @property
    def span(self) -> tuple[int, int]:
        """First and last instant, (0, 0) when nothing happened."""
        ends = [(times[0], times[-1]) for times in self.at.values() if times]
        return (min(a for a, _ in ends), max(b for _, b in ends)) if ends else (0, 0)

    def rate(self, behaviour: str) -> float:
        """Delivered messages a second at one provider (see the plate); 0.0 when fewer than two were."""
        delivered = self.at.get((behaviour, "delivered"), [])
        if len(delivered) < 2:
            return 0.0
        outcomes = [
            times for (home, kind), times in self.at.items() if home == behaviour and kind != "refused" and times
        ]
        seconds = (max(times[-1] for times in outcomes) - min(times[0] for times in outcomes)) / 1e6
        return len(delivered) / seconds if seconds > 0 else 0.0

    def buckets(self, behaviour: str, kind: str, start: int, width: int, count: int) -> list[int]:
        """How many fell into each of `count` spans of `width` microseconds from `start` on."""
        found = [0] * count
        for at in self.at.get((behaviour, kind), []):
            place = (at - start) // width
            if 0 <= place < count:
                found[place] += 1
        return found


def course(store: Engine, job: int, homes: Mapping[str, str]) -> Course:
    """Read the course of a job: terminal rows from `message`, deferrals from `history` (one domain by its message)."""
    found = Course()
    with store.connect() as conn:
        _terminal(conn, job, homes, found)
        deferred = (
            select(history.c.at, domain.c.name)
            .select_from(history)
            .join(message, (message.c.job == history.c.job) & (message.c.mref == history.c.mref))
            .outerjoin(domain, domain.c.number == message.c.domain)
            .where(history.c.job == job, history.c.kind == int(Kind.DEFERRED))
        )
        for at, name in conn.execute(deferred):
            found.at.setdefault((homes.get(name, ELSEWHERE), "deferred"), []).append(at)
    for times in found.at.values():
        times.sort()
    return found


def _terminal(conn: Connection, job: int, homes: Mapping[str, str], found: Course) -> None:
    rows = (
        select(message.c.at, message.c.kind, message.c.attempts, domain.c.name)
        .select_from(message)
        .outerjoin(domain, domain.c.number == message.c.domain)
        .where(message.c.job == job)
    )
    names = {int(kind): kind.name.lower() for kind in Kind}
    for at, kind, attempts, name in conn.execute(rows):
        found.at.setdefault((homes.get(name, ELSEWHERE), names.get(kind, str(kind))), []).append(at)
        if kind == Kind.DELIVERED:
            found.attempts[attempts] += 1
