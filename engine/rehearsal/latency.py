"""How long a message of a job took: from the XADD of the entry that carried its row to its 250, for a sample.

From: the moment before the XADD of the audience entry the row travels in (some hundreds of rows each), by this
process's clock. To: the ledger's `at` of the recipient's DELIVERED event, which is Redis time when the reply to the
final dot was judged, in microseconds; both clocks are this host's. So it holds intake, expansion, the wait for a turn,
composition, signature, dialogue and the provider's answer. A job handed in at once waits for its own first messages:
its last percentile is about the length of the run, by nature, and says how long the list took, not how quick one is.

Known limits: rows that are no address or were not delivered are not in it; one row in `step` is looked at.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Engine, select

from policy.address import AddressError, mref_of, normalise, parse
from policy.events import Kind
from policy.keys import Keyring, open_sealed
from policy.schema import job as job_table
from policy.schema import message
from policy.wire import job_aad

PEOPLE: Final = 2000  # looked at: the 99th percentile of them is one of 20
_AT_ONCE: Final = 500  # a question's IN list


class Watch:
    """Rows on their way: hand `rows()` to submit instead of the rows, and `sent` as its progress.

    account: of the job, part of what its key is sealed with; begin: called when all rows are packed, that is just
    before the first XADD (a producer packs an iterator whole, because the job names the number of its chunks).
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], count: int, account: str, begin: Callable[[], None]) -> None:
        self._rows = rows
        self._begin = begin
        self._account = account
        self._step = max(1, count // PEOPLE)
        self.people: list[tuple[int, str]] = []
        self._begins: list[int] = []  # rows sent once the entry of the same place had left
        self._instants: list[int] = []
        self._next = 0

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for number, row in enumerate(self._rows):
            if number % self._step == 0:
                self.people.append((number, str(row["address"])))
            yield row
        self._begin()
        self._next = time.time_ns() // 1000

    def sent(self, rows: int, _total: int) -> None:
        """An entry has left; rows: so far."""
        self._begins.append(rows)
        self._instants.append(self._next)
        self._next = time.time_ns() // 1000

    def left_at(self, row: int) -> int:
        """When the entry left that carried the row of this number: the first after which more than it were sent."""
        return self._instants[bisect_right(self._begins, row)]

    def delays(self, store: Engine, keyring: Keyring, number: int) -> list[float]:
        """Milliseconds, sorted, of those who were delivered. number: the job's."""
        with store.connect() as conn:
            row = conn.execute(
                select(job_table.c.job_id, job_table.c.job_key).where(job_table.c.number == number)
            ).one()
        key = open_sealed(keyring.service, row.job_key, job_aad("key", self._account, row.job_id))
        wanted: dict[int, int] = {}
        for place, address in self.people:
            try:
                mailbox = parse(address)
            except AddressError:
                continue
            wanted.setdefault(mref_of(key, normalise(mailbox.local, mailbox.domain)), self.left_at(place))
        found: list[float] = []
        mrefs = sorted(wanted)
        with store.connect() as conn:
            for begin in range(0, len(mrefs), _AT_ONCE):
                arrived = select(message.c.mref, message.c.at).where(
                    message.c.job == number,
                    message.c.kind == int(Kind.DELIVERED),
                    message.c.mref.in_(mrefs[begin : begin + _AT_ONCE]),
                )
                found += [(at - wanted[mref]) / 1000 for mref, at in conn.execute(arrived)]
        return sorted(found)


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The value that `share` of them do not exceed; None of none."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))], 1)
