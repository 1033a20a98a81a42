"""What goes when: every place that keeps something, and the plan of what is to be swept today.

Law: every SQL table and every family of Redis keys is swept by time (`PLACES`, `TRIMMED`), ends by an act that another
room carries out (`BY_ACT`), or has no end with its reason (`ENDLESS`). A test fails on one that is in none of them, or
in two. Pure: the days that places hold and the instant are arguments; `policy.sweeping` carries out.

    1. `limits`  the newest day of each place that is over, for everybody or for an account that keeps less
    2. `plan`    of the days that there are, those that are over: one `Sweep` a class, place, day and account

An account that shortened a class (`shortening`) has sweeps of its own for the days between its end and the general one.
A hold moves no boundary: what it protects is copied before (`policy.holds`), the day goes as always, so that nobody
else's data is kept because of it (P-21).

What is dated by a job's end is one day for the whole job. Order: a place stands after those whose rows it must outlive.

Known limits: a day is the grain. A sweep that was missed is made up for by the next one, however late.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from policy.classes import Period, last_gone, today_of


@dataclass(frozen=True, slots=True)
class Place:
    """One thing that is swept. table, dated: where its day stands (column ``day`` in days, others instants).

    person: by what somebody's rows are found: pseudonym, reference, subject or tag; "": nobody's are in it.
    account: how rows of an account that keeps less are told: by job or subject; "": its own period does not apply.
    clears: only these columns go, the row stays; with_rows: (table, column) of what goes with a row.
    when: why a row is over, in words for the inventory."""

    name: str
    retention: str
    table: str
    dated: str
    when: str
    person: str = ""
    account: str = ""
    clears: tuple[str, ...] = ()
    with_rows: tuple[tuple[str, str], ...] = ()


PLACES: Final[tuple[Place, ...]] = (
    Place("hit", "R2", "hit", "day", "day of the visit", "reference", "job"),
    Place("last_open", "R2", "last_open", "day", "last day of reading", "reference", "job"),
    Place("history", "R3", "history", "day", "day of the event, once the job is over", "reference", "job"),
    Place("message", "R3", "message", "day", "day of the event, once the job is over", "pseudonym", "job"),
    Place("job.payload", "R0", "job", "done_at", "end of the job", clears=("payload",)),
    Place(
        "job.keys", "R3", "job", "done_at", "end of the job, and of its last row in the send log", "", "job",
        ("payload", "job_key", "subject_sealed"),
    ),
    Place("link", "R2", "job", "done_at", "end of the job", "", "job", (), (("link", "job"),)),
    Place("job_view", "R2", "job", "done_at", "end of the job", "", "job", (), (("job_view", "job"),)),
    Place(
        "job", "R4", "job", "done_at", "end of the job: till then its bare row heads its sums", "", "", (),
        (("job_chunk", "job"), ("counter", "job"), ("hit_counter", "job")),
    ),
    Place("consent", "R4", "consent", "recorded_at", "last act of the person, while nothing is sent to them", "subject",
          "subject"),
    Place("subject", "R2", "subject", "created", "when neither messages, consents, holds nor cases refer to them"),
    Place("domain", "R3", "domain", "", "when neither messages nor sums refer to it"),
    Place("reading", "R6", "reading", "day", "day of the consultation", "subject"),
    Place("disclosure", "R6", "disclosure", "day", "day of the disclosure", "subject"),
    Place("rectification", "R6", "rectification", "at", "day of the correction", "subject"),
    Place("request", "R6", "request", "closed", "end of the case", "tag", "", (),
          (("request_step", "request"), ("proof", "request"))),
    Place("erasure", "R6", "erasure", "purged", "end of the purge", "subject", "", (), (("purge", "erasure"),)),
    Place("hold", "RH", "hold", "released", "release of the hold", "", "", (), (("held", "hold"),)),
    Place("backup", "R7", "backup", "destroyed", "destruction of the copy"),
    Place("audit", "R7", "audit", "at", "day of the line; always from the oldest line on"),
    Place("checkpoint", "R7", "checkpoint", "at", "day of the checkpoint"),
    Place("sweep", "R7", "sweep", "at", "day of the sweep"),
)  # fmt: skip
_BY_NAME: Final = {place.name: place for place in PLACES}

# Redis streams that are trimmed by age: days. Their entries are for the operator's eyes, who has a month to look.
TRIMMED: Final[dict[str, int]] = {"rejected": 30, "dead": 30}

# What ends by an act of the room that is named, not by the clock of the sweeps.
BY_ACT: Final[dict[str, str]] = {
    "table:account": "end of the contract (P-18), by the room of account erasure",
    "table:list": "with its account: its number stands in opt-out links of delivered mail",
    "table:topic": "with its account",
    "table:shortening": "with its account",
    "table:halt": "when an operator resumes (policy.halts)",
    "table:purge": "when the purge of the erasure is done; with the erasure at the latest",
    "key:intake": "acceptance; the file of writes is rewritten within 10 minutes (policy.chores)",
    "key:held chunks": "expansion, an hour before send_at",
    "key:job status": "expiry, 90 days after its last change (policy.statuses)",
    "key:hosts": "orderly end of the process, or `host forget`",
    "key:hits": "once it is in the ledger (policy.streams)",
    "key:events": "once it is in the ledger (policy.streams)",
    "key:slice": "when every recipient is settled",
    "key:lane": "with its last slice",
    "key:lane sites": "with the lane",
    "key:due index": "with its last slice",
    "key:due sites": "with its last slice",
    "key:leases": "settle, release or reclaim",
    "key:holders": "with the worker",
    "key:job state": "with the job (policy.chores)",
    "key:chunks put": "with the job (policy.chores)",
    "key:duplicates": "with the job (policy.chores)",
    "key:halts": "when an operator resumes (policy.halts)",
    "key:site permits": "expiry",
    "key:site rate": "expiry",
    "key:site back-off": "expiry",
}

# What has no end while the installation lives, and why that is right.
ENDLESS: Final[dict[str, str]] = {
    "table:cursor": "one row a stream, overwritten; nothing of a person",
    "table:suppression": "must outlive everything: not to write again (GDPR 21(3)); entries with an end of their own go"
    " then (policy.suppression); counted for the yearly review",
    "table:negative": "delivered pixels can be fetched for ever: whose visits are not remembered must stay known;"
    " counted for the yearly review",
    "key:meta": "one hash of numbers about the installation",
    "key:counters": "one hash of numbers a partition",
    "key:negative list": "capped copy of table negative",
    "key:suppression": "copy of table suppression: keyed values that the gate asks",
}


@dataclass(frozen=True, slots=True, order=True)
class Sweep:
    """One class in one place of one day; account 0: everybody's, else of one that keeps less."""

    place: str
    day: int
    account: int
    retention: str


def place_of(name: str) -> Place:
    """Raises KeyError."""
    return _BY_NAME[name]


def period_of(place: Place, periods: Mapping[str, Period]) -> Period | None:
    """None: what has no period goes as soon as the act that ends it has happened (RH)."""
    return periods.get(place.retention)


def limits(
    now: int, periods: Mapping[str, Period], shortenings: Mapping[tuple[int, str], int]
) -> dict[tuple[str, int], int]:
    """The newest day that is over, by (place, account); account 0: whoever keeps the full period. shortenings: days by
    (account, class); one that is longer than the period changes nothing."""
    today = today_of(now)
    found: dict[tuple[str, int], int] = {}
    for place in PLACES:
        if not place.dated:
            continue
        kept = period_of(place, periods)
        general = found[place.name, 0] = today if kept is None else last_gone(today, kept)
        if not place.account:
            continue
        for (account, name), days in shortenings.items():
            if name == place.retention and (own := today - max(days, 0)) > general:
                found[place.name, account] = min(own, today - 1)  # today is not over yet
    return found


def plan(
    now: int,
    periods: Mapping[str, Period],
    shortenings: Mapping[tuple[int, str], int],
    holdings: Mapping[str, Collection[int]],
) -> list[Sweep]:
    """What is to be swept, in the order of `PLACES`, the oldest day first. holdings: days that each place holds."""
    over = limits(now, periods, shortenings)
    sweeps: list[Sweep] = []
    for place in PLACES:
        days = sorted(set(holdings.get(place.name, ())))
        general = over.get((place.name, 0))
        if general is None:
            continue
        sweeps += [Sweep(place.name, day, 0, place.retention) for day in days if day <= general]
        sweeps += [
            Sweep(place.name, day, account, place.retention)
            for (name, account), limit in sorted(over.items())
            if name == place.name and account
            for day in days
            if general < day <= limit
        ]
    return sweeps
