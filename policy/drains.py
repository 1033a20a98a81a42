"""From the event streams into the ledger: each event has its effect exactly once (promises T9, T10).

Law: a row and the cursor that passes it are committed together, and a counter rises only for a row that was really
inserted. So whatever is read twice (a crash before the commit, two settles of one slice, Redis come back older) folds
by identity: a terminal event is (job, mref), everything else (job, mref, attempt, kind).

    1. `policy.streams.look`   what is new in all partitions
    2. `EventBook.record`      rows, counters and cursors in one SQL transaction of bounded size
    3. `policy.streams.trim`   only what is committed leaves Redis

Several rows of an audience may name one address, so one (job, mref): refused duplicates, and rows that expansion ended
for another reason. What ended at expansion therefore carries its chunk and place as an attempt below zero: told again
it folds, another place is another row. One of them holds the message row (delivery before expansion), the others stand
in history; all count as terminal rows (I6: rows submitted = the sum of the terminal states).

Hot path: 10,000 events/s over millions of rows (benchmarks/ledger.py: 9 to 11 µs of CPU an event with a million).
Hence tuples and ``executemany`` on the driver, one upsert a counter and transaction, one draw of nonces, domains
numbered in memory. Our own share is 3 µs; the rest is SQLite logging one random page for each row and index, so bigger
transactions are cheaper: the writer lets events gather while there are many, and takes more at once when it is behind.

Who was erased of late (`policy.latecomers`, empty in the normal case) loses in these transactions what identifies;
what was refused as erased never has any. Counters stay exact (I6), and the visit of an erased person is not kept.

On PostgreSQL, where these tables are divided by day (policy.partitions), the identity is asked in one question a
transaction and table first: a slice settled twice around midnight would have a row on each day otherwise.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, delete, func, select, update

from policy import keyspace, statements
from policy.events import TERMINAL, Batch, Hit, Kind, Reason
from policy.gate import Mode
from policy.instants import DAY_US, HOUR_US
from policy.latecomers import Guard
from policy.schema import counter, domain, job, message
from policy.store import mark
from policy.streams import read_events as read_events  # tests of T12 read by this name

TAG_AAD: Final = b"sp-ledger-tag"
_NONCE: Final = 12  # bytes
_DOMAINS_KEPT: Final = 200_000
_ATTEMPTS_A_CHUNK: Final = 1 << 16
_MESSAGE: Final = "job, mref, kind, reason, domain, code, enhanced, attempts, at, day, pseudonym, tag_sealed, tls, note"
_HISTORY: Final = "job, mref, attempt, kind, at, day, reason, code, enhanced, note"
_TERMINAL: Final = frozenset(int(kind) for kind in TERMINAL)
_REFUSED: Final = int(Kind.REFUSED)
_DUPLICATE: Final = int(Reason.DUPLICATE)
_ERASED: Final = int(Reason.ERASED)
_BITS: Final = {keyspace.events(partition): 1 << partition for partition in range(keyspace.PARTITIONS)}


class _Statements:
    """The inserts of this room, for one dialect."""

    def __init__(self, dialect: str) -> None:
        insert = functools.partial(statements.insert, dialect)
        self.message = insert("message", _MESSAGE, "DO NOTHING")
        self.history = insert("history", _HISTORY, "DO NOTHING")
        # where ``day`` stands in the keys (PostgreSQL), one identity could have a row on each of two days
        self.known: dict[str, str] = {}
        self.copied = {self.message: ("message", _MESSAGE), self.history: ("history", _HISTORY)}
        if dialect != "sqlite":
            self.known = {
                self.message: statements.known("message", "job, mref"),
                self.history: statements.known("history", "job, mref, attempt, kind"),
            }
        self.counter = insert(
            "counter",
            "job, domain, kind, reason, n",
            "(job, domain, kind, reason) DO UPDATE SET n = counter.n + excluded.n",
        )
        self.domain = insert("domain", "name", "(name) DO NOTHING")
        self.cursor = insert("cursor", "stream, last_id", "(stream) DO UPDATE SET last_id = excluded.last_id")
        self.hit_counter = insert(
            "hit_counter",
            "job, link, kind, visitor, n",
            "(job, link, kind, visitor) DO UPDATE SET n = hit_counter.n + excluded.n",
        )
        self.last_open = insert(
            "last_open",
            "job, mref, day",
            "(job, mref) DO UPDATE SET day = excluded.day WHERE excluded.day > last_open.day",
        )
        self.hit = insert("hit", "job, mref, kind, link, hour, day, visitor, mode")


@dataclass(slots=True)
class Recorded:
    """What a transaction added: terminal rows a job, events seen, events folded away because known. places: the
    partitions its jobs' events came from, one bit each."""

    terminal: dict[int, int]
    places: dict[int, int]
    events: int = 0
    folded: int = 0


class EventBook:
    """Writes batches and hits. One a process; its memory of domain numbers is only ever behind, never wrong.

    guard: who was erased of late; filled by `policy.erasing`."""

    def __init__(self, dialect: str, service_key: bytes, guard: Guard | None = None) -> None:
        self.guard = Guard() if guard is None else guard
        self._sql = _Statements(dialect)
        self._aes = AESGCM(service_key)
        self._domains: dict[str, int] = {"": 0}
        self._fresh: dict[str, int] = {}
        self.lost: set[int] = set()  # jobs with rows that were given up as lost (policy.losses)

    def record(self, conn: Connection, items: Iterable[tuple[str, str, Batch]]) -> Recorded:
        """One transaction's worth of batches, with the cursors that pass them. Idempotent by identity."""
        items = list(items)
        late: list[tuple[int, int, int]] = []
        if self.guard:
            items, late = self.guard.sift(conn, items)
        numbers = self._number_domains(conn, {batch.domain for _, _, batch in items})
        messages: list[tuple[Any, ...]] = []
        histories: list[tuple[Any, ...]] = []
        last: dict[str, str] = {}
        places: dict[int, int] = defaultdict(int)
        # one draw for all: the system call costs as much as a row's other work, and most batches hold one or two
        nonces = os.urandom(_NONCE * sum(len(batch.events) for _, _, batch in items))
        drawn = 0
        for stream, identity, batch in items:
            last[stream] = identity
            places[batch.job] |= _BITS.get(stream, 0)
            self._rows(batch, numbers[batch.domain], messages, histories, nonces, drawn)
            drawn += _NONCE * len(batch.events)
        recorded = Recorded(defaultdict(int), places, events=len(messages) + len(histories))
        counts: dict[tuple[int, int, int, int], int] = defaultdict(int)
        for row in self._insert_messages(conn, messages, histories):
            counts[row[0], row[4], row[2], row[3]] += 1
            recorded.terminal[row[0]] += 1
        for history in self._insert(conn, self._sql.history, [row[:10] for row in histories], histories):
            kind = history[3]
            counts[history[0], history[10], kind, history[6]] += 1
            if kind in _TERMINAL:
                recorded.terminal[history[0]] += 1
        self._many(conn, self._sql.counter, [(*key, n) for key, n in counts.items()])
        for number in self.lost & recorded.terminal.keys():
            _found(conn, number, recorded.terminal[number])
        self.guard.enlist(conn, late)
        self._many(conn, self._sql.cursor, list(last.items()))
        recorded.folded = recorded.events - sum(counts.values())
        return recorded

    def _rows(
        self,
        batch: Batch,
        number: int,
        messages: list[tuple[Any, ...]],
        histories: list[tuple[Any, ...]],
        nonces: bytes,
        drawn: int,
    ) -> None:
        """nonces: one an event of the transaction; this batch's begin at `drawn`."""
        job_number, chunk, aes = batch.job, batch.chunk, self._aes
        for place, e in enumerate(batch.events):
            kind = e.kind
            if kind not in _TERMINAL or (kind == _REFUSED and e.reason == _DUPLICATE):
                attempt = e.attempt
                if kind == _REFUSED:  # several rows of one mref: told apart by where in the audience they stood
                    attempt = _place(chunk, place)
                histories.append(
                    (job_number, e.mref, attempt, kind, e.at, e.at // DAY_US, e.reason, e.code, e.enhanced,
                     e.note or None, number)
                )  # fmt: skip
                continue
            sealed = None
            if e.tag and e.reason != _ERASED:  # nobody will complain of what was never sent
                at = drawn + _NONCE * place
                nonce = nonces[at : at + _NONCE]
                sealed = nonce + aes.encrypt(nonce, e.tag, TAG_AAD)
            messages.append(
                (job_number, e.mref, kind, e.reason, number, e.code, e.enhanced,
                 e.attempt if chunk < 0 else _place(chunk, place), e.at, e.at // DAY_US,
                 e.pseudonym, sealed, e.tls, e.note or None)
            )  # fmt: skip

    def _insert_messages(
        self, conn: Connection, rows: list[tuple[Any, ...]], histories: list[tuple[Any, ...]]
    ) -> list[tuple[Any, ...]]:
        """The rows that were new; what belongs to another row of the same address goes to the histories."""
        # by job and mref: neighbours in the clustered tree are written together
        rows.sort(key=_job_and_mref)
        added = self._insert(conn, self._sql.message, rows, rows)
        if len(added) == len(rows):
            return added
        known = {id(row) for row in added}
        return added + [row for row in rows if id(row) not in known and self._second(conn, row, histories)]

    def _second(self, conn: Connection, row: tuple[Any, ...], histories: list[tuple[Any, ...]]) -> bool:
        """A terminal row whose (job, mref) is taken: a repetition (nothing to do), or another row of the audience with
        the same address. True when it took the place of one that ended at expansion."""
        mine = message.c.job == row[0], message.c.mref == row[1]
        held = conn.execute(select(message).where(*mine)).one()
        if row[7] < 0:
            if held.attempts != row[7]:
                histories.append((row[0], row[1], row[7], row[2], row[8], row[9], row[3], 0, "", None, row[4]))
            return False
        if held.attempts >= 0:
            return False
        # what was delivered (or not) says more than what expansion refused: that one moves, its count stays
        moved = (row[0], row[1], held.attempts, held.kind, held.at, held.day, held.reason, 0, "", None)
        self._insert(conn, self._sql.history, [moved], [moved])  # its place may stand there already, on another day
        conn.execute(delete(message).where(*mine))
        conn.exec_driver_sql(self._sql.message, row)
        return True

    def _insert(
        self, conn: Connection, sql: str, rows: list[tuple[Any, ...]], marks: list[tuple[Any, ...]]
    ) -> list[tuple[Any, ...]]:
        """Insert what is new; the marks (one a row, in order) of the rows that were. executemany tells only the sum:
        when it is short, the batch is undone to a savepoint and asked row by row (after crashes only)."""
        if sql in self._sql.known:
            rows, marks = self._unknown(conn, self._sql.known[sql], rows, marks)
            if rows:
                statements.copy(conn, *self._sql.copied[sql], rows)
            return marks
        if not rows:
            return []
        savepoint = conn.begin_nested()
        if conn.exec_driver_sql(sql, rows).rowcount == len(rows):
            savepoint.commit()
            return marks
        savepoint.rollback()
        return [mark for row, mark in zip(rows, marks, strict=True) if conn.exec_driver_sql(sql, row).rowcount == 1]

    def _unknown(
        self, conn: Connection, known: str, rows: list[tuple[Any, ...]], marks: list[tuple[Any, ...]]
    ) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """Rows (with their marks) whose identity has no row yet on any day, each identity once. True until the commit:
        a writer's transaction holds the writer's lock (policy.schema)."""
        width = known.count("bigint[]")
        fresh: dict[tuple[Any, ...], int] = {}
        for place, row in enumerate(rows):
            fresh.setdefault(row[:width], place)
        if not fresh:
            return [], []
        columns = [list(column) for column in zip(*fresh, strict=True)]
        for identity in conn.exec_driver_sql(known, (*columns, self._since(conn, set(columns[0])))):
            del fresh[tuple(identity)]
        return [rows[place] for place in fresh.values()], [marks[place] for place in fresh.values()]

    def _since(self, conn: Connection, jobs: set[int]) -> int:
        """The first day on which any of these jobs can have rows: older days need not be looked at."""
        told = select(func.count(), func.min(job.c.accepted_at)).where(job.c.number == func.any(sorted(jobs)))
        found, earliest = conn.execute(told).one()
        return int(earliest) // DAY_US - 1 if found == len(jobs) else 0  # clocks of hosts differ by less than a day

    def record_hits(self, conn: Connection, items: Iterable[tuple[str, str, list[Hit]]]) -> int:
        """Visits, as much of each as its mode allows (decision 12); how many were looked at."""
        sums: dict[tuple[int, int, int, int], int] = defaultdict(int)
        days: dict[tuple[int, int], int] = {}
        rows: list[tuple[Any, ...]] = []
        last: dict[str, str] = {}
        erased = self.guard.mrefs
        seen = 0
        for stream, identity, hits in items:
            last[stream] = identity
            for h in hits:
                seen += 1
                if h.mode == Mode.OFF:
                    continue  # no consent, no row: not even in a sum
                if erased and h.mref in erased:
                    self.guard.dropped += 1
                    continue
                if (
                    h.mode == Mode.DELIVERABILITY
                ):  # the day of the last open and nothing else, no count (tracking.md 3.1)
                    key = (h.job, h.mref)
                    days[key] = max(days.get(key, 0), h.at // DAY_US)
                    continue
                sums[h.job, h.link, h.kind, h.visitor] += 1
                if h.mode == Mode.INDIVIDUAL:
                    rows.append((h.job, h.mref, h.kind, h.link, h.at // HOUR_US, h.at // DAY_US, h.visitor, h.mode))
        self._many(conn, self._sql.hit_counter, [(*key, n) for key, n in sums.items()])
        self._many(conn, self._sql.last_open, [(*key, day) for key, day in days.items()])
        self._many(conn, self._sql.hit, rows)
        self._many(conn, self._sql.cursor, list(last.items()))
        return seen

    def pass_over(self, conn: Connection, last: Mapping[str, str]) -> None:
        """Move cursors past entries that brought nothing (poison)."""
        self._many(conn, self._sql.cursor, list(last.items()))

    def _many(self, conn: Connection, sql: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            conn.exec_driver_sql(sql, rows)

    def _number_domains(self, conn: Connection, names: set[str]) -> dict[str, int]:
        numbers = {name: self._domains[name] for name in names if name in self._domains}
        missing = sorted(names - numbers.keys())
        self._many(conn, self._sql.domain, [(name,) for name in missing])
        self._fresh = {}
        for start in range(0, len(missing), 500):
            some = missing[start : start + 500]
            for row in conn.execute(select(domain.c.name, domain.c.number).where(domain.c.name.in_(some))):
                self._fresh[row.name] = row.number
        return numbers | self._fresh

    def forget(self, names: Sequence[str]) -> None:
        """Domains whose rows are gone: whoever comes back gets a new number."""
        for name in names:
            self._domains.pop(name, None)
            self._fresh.pop(name, None)

    def committed(self) -> None:
        """The last `record` is in the store: only now may its new domain numbers be remembered."""
        if len(self._domains) > _DOMAINS_KEPT:
            self._domains = {"": 0}
        self._domains.update(self._fresh)
        self._fresh = {}


def _found(conn: Connection, number: int, rows: int) -> None:
    """Rows that were counted as lost have told their end after all."""
    mine = counter.c.job == number, counter.c.domain == 0, counter.c.kind == int(Kind.LOST), counter.c.reason == 0
    held = int(conn.execute(select(counter.c.n).where(*mine)).scalar() or 0)
    if held > rows:
        conn.execute(update(counter).where(*mine).values(n=held - rows))
    elif held:
        conn.execute(delete(counter).where(*mine))
    mark(conn, number)


def _place(chunk: int, place: int) -> int:
    """An attempt number that no delivery has: below zero, one a row of the audience."""
    return -1 - ((max(chunk, 0) * _ATTEMPTS_A_CHUNK + place) % 0x7FFFFFFF)


def places_of(chunk: int) -> tuple[int, int]:
    """(lowest, highest) attempt number that an event of this chunk of an audience can have in the ledger."""
    highest = _place(chunk, 0)
    return highest - _ATTEMPTS_A_CHUNK + 1, highest


def _job_and_mref(row: tuple[Any, ...]) -> tuple[int, int]:
    return row[0], row[1]
