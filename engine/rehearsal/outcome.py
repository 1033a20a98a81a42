"""What came of a rehearsal: its figures (the last line of the demo) and the equations it stands for, in words.

Law: every equation compares counts of different origin, and what was not looked at does not hold: an outcome that
never got far fails its equations instead of passing them by silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.rehearsal import findings, proof
from engine.rehearsal.findings import Course, Tally
from engine.rehearsal.readers import Visits
from policy.ledger import JobStatus, Report


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for. folder: of the installation, None for a temporary one; results: where report and message go;
    deadline: seconds from the beginning for all that waits; lasting: leave it running; wait: intake before delivery."""

    recipients: int = 20_000
    folder: Path | None = None
    results: Path = Path("demo-data")
    deadline: float = 140.0
    lasting: bool = False
    workers: int = 0
    wait: bool = False


@dataclass(slots=True)
class Story:
    """One person's `why`, as the command printed it."""

    title: str
    command: str
    text: str


@dataclass(slots=True)
class Outcome:
    """What came of a rehearsal. figures: the last line; everything else is for the screen, the report and tests."""

    submitted: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    status: JobStatus | None = None
    report: Report | None = None
    tallies: dict[str, Tally] = field(default_factory=dict)
    course: Course = field(default_factory=Course)
    submitted_at: int = 0
    sink: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.0
    visits: Visits = field(default_factory=Visits)
    readers: int = 0
    pixels: int = 0
    pixels_unasked: int = 0
    second_submitted: int = 0
    second_refused: int = 0
    second: Tally = field(default_factory=Tally)
    signed: Path | None = None
    signatures: list[proof.Signature] = field(default_factory=list)
    messages_verified: int = 0
    messages_checked: int = 0
    scan: proof.Scan | None = None
    stories: list[Story] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    workers: int = 0
    seconds: float = 0.0

    @property
    def whole(self) -> Tally:
        return findings.total(self.tallies)

    @property
    def waiting(self) -> int:
        """Recipients without an end."""
        return self.submitted - self.whole.ended

    @property
    def dkim_verified(self) -> bool:
        return proof.is_proven(self.signatures) and 0 < self.messages_checked == self.messages_verified

    def figures(self) -> dict[str, Any]:
        """The last line of the demo. deferred: recipients that have not ended; messages_per_second: findings' plate."""
        whole = self.whole
        return {
            "submitted": self.submitted,
            "delivered": whole["delivered"],
            "refused": whole["refused"],
            "bounced": whole["bounced"],
            "deferred": self.waiting,
            "expired": whole["expired"],
            "unknown": whole["unknown"],
            "sink_accepted": int(self.sink.get("accepted", 0)),
            "messages_per_second": round(self.rate, 1),
            "dkim_verified": self.dkim_verified,
            "opted_out": len(self.visits.opted_out),
            "second_refused": self.second_refused,
            "seconds": round(self.seconds, 1),
            "deferrals": whole.deferrals,
            "opened": self.visits.opened,
            "clicked": self.visits.clicked,
            "files_with_addresses": -1 if self.scan is None else len(self.scan.hits),
            "ok": all(good for _, good in self.checks()) and not self.troubles,
        }

    def checks(self) -> list[tuple[str, bool]]:
        """The equations a rehearsal stands for, each with whether it holds."""
        whole = self.whole
        ended = whole["delivered"] + whole["refused"] + whole["bounced"] + whole["expired"]
        accepted = int(self.sink.get("accepted", -1))
        opted = len(self.visits.opted_out)
        return [
            ("delivered + refused + bounced + expired = submitted", ended == self.submitted),
            ("nobody is left deferred", self.waiting == 0),
            ("nobody is in doubt", whole["unknown"] == 0),
            ("at least 80 % delivered", whole["delivered"] >= 0.8 * self.submitted),
            ("the sink counts as many accepted as we count delivered", accepted == whole["delivered"]),
            ("the sink counts no message twice", accepted == int(self.sink.get("unique", -1))),
            ("every line the sink kept ends in CRLF", self.bare_newlines == 0),
            ("dkimpy verifies RSA and Ed25519, one-click headers under both", self.dkim_verified),
            ("no pixel without consent", self.pixels_unasked == 0 and self.pixels > 0),
            ("the second campaign refused exactly those who opted out", 0 < opted == self.second_refused),
            ("no address in clear in any file of the data folder", self.scan is not None and not self.scan.hits),
        ]

    @property
    def bare_newlines(self) -> int:
        providers = self.sink.get("providers", {})
        return sum(int(counts["bare_newlines"]) for counts in providers.values())
