"""A bundle entered into an instance: the same person, the same will, the same history, as far as it can mean that here.

    profile        a subject at the account of that name, found by the address; `resolve` makes it when it is new
    consent        evidence by the rules of `policy.consent`: without source or time, or from the future, it is none
    suppression    reasons not to write, in the scopes of the same names; a domain's are the domain's, not the person's
    subscription   lists and topics of these names
    message, event rows of the ledger under a job of the same name, with counters that agree (I6)

Laws:
- entering never makes anybody more writable: withdrawals and suppressions are entered whatever else is refused, and
  who was erased here stays erased: of them only the reasons not to write are taken (P-22);
- repeated, it changes nothing;
- a job that was sent from here is never added to: only jobs that an import made take rows, and their names are used
  up, so that nobody sends the same campaign again by accident.

What is about the other house stays there: its consultations, disclosures, uses, requests, conclusions, and what waits
in its queue. All that is not taken is counted by kind in `Entered.left`, never silently.

Known limits: `recorded_at` of consent is the instant of entering: when *this* house learned of it. Replies are sealed
anew, links get numbers of their own. One bundle, one person: two addresses of different people are refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Table, insert, select, update

from policy import accounts, audit, consent, negative, suppression, vault
from policy.address import AddressError, mref_of, normalise, parse, tag_of
from policy.bundle.reading import Opened
from policy.enforcement import Effects
from policy.events import TERMINAL, Kind, Reason
from policy.gate import Mode
from policy.instants import day_of, hour_of, parse_rfc3339, week_of
from policy.keys import KEY_BYTES, Keyring, open_sealed, seal, seal_note
from policy.keyspace import partition_of
from policy.personal import Record, Value
from policy.schema import consent as consent_table
from policy.schema import counter, domain, history, hit, hit_counter, job, link, message
from policy.schema import subject as subject_table
from policy.store import mark
from policy.wire import job_aad

IMPORTED: Final = "imported"
_VISITS: Final = "visits: "  # reasons so named are of the negative list (policy.records)
_HITS: Final = {Kind.OPENED, Kind.CLICKED}
_TLS: Final = {"TLS 1.2": 2, "TLS 1.3": 3}
_TAKEN: Final = frozenset({"profile", "subscription", "consent", "suppression", "message", "event"})

T = TypeVar("T")


class EnteringError(ValueError):
    """This bundle cannot be entered here. The text names accounts and fields, never content."""


@dataclass(slots=True)
class Entered:
    """taken, left: records by kind, those that were here already included in taken; rows: of the ledger, new ones."""

    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    rows: int = 0


@dataclass(slots=True, repr=False)
class _Who:
    tag: bytes
    partition: int
    normalised: str
    subjects: dict[str, vault.Subject] = field(default_factory=dict)  # by account name
    numbers: dict[str, int] = field(default_factory=dict)  # of accounts


def enter(
    conn: Connection, effects: Effects, keyring: Keyring, opened: Opened, now: int, *, make_accounts: bool = False
) -> Entered:
    """In the writer's transaction. Raises EnteringError: then nothing is entered."""
    done = Entered()
    by_kind: dict[str, list[Record]] = {}
    for record in opened.records:
        by_kind.setdefault(record.kind, []).append(record)
    for kind, records in by_kind.items():
        if kind not in _TAKEN:
            done.left[kind] += len(records)
    who = _who(conn, keyring, by_kind, make_accounts, now)
    _each(done, by_kind, "suppression", lambda values: _suppress(conn, effects, who, values))
    _each(done, by_kind, "profile", lambda values: _resolve(conn, keyring, who, values, now))
    _each(done, by_kind, "subscription", lambda values: _subscribe(conn, who, values))
    _each(done, by_kind, "consent", lambda values: _agree(conn, effects, who, values, now))
    for name in who.subjects:
        _enforce(conn, effects, who, name, by_kind, now)
        _ledger(conn, keyring, who, name, by_kind, done)
        _known_since(conn, who.subjects[name].number, name, by_kind)
    for kind in ("message", "event"):
        done.left[kind] += len(by_kind.get(kind, [])) - done.taken[kind]
    done.left = +done.left
    audit.append(conn, now, "operator", "bundle-import", f"bundle/{opened.manifest.ticket[:64]}", "portability", "done")
    return done


def _each(done: Entered, by_kind: dict[str, list[Record]], kind: str, take: Callable[[dict[str, Value]], bool]) -> None:
    for record in by_kind.get(kind, []):
        try:
            (done.taken if take(record.values) else done.left)[kind] += 1
        except (KeyError, TypeError, AttributeError, OverflowError):
            raise EnteringError(f"a {kind} lacks a field, or has one of another type") from None


def _who(conn: Connection, keyring: Keyring, by_kind: dict[str, list[Record]], make_accounts: bool, now: int) -> _Who:
    found: dict[bytes, _Who] = {}
    for record in by_kind.get("profile", []):
        try:
            mailbox = parse(str(record.values.get("address")))
        except AddressError as error:
            raise EnteringError(f"a profile has no deliverable address ({error.reason})") from None
        normalised = normalise(mailbox.local, mailbox.domain)
        tag = tag_of(keyring.pepper, normalised)
        found[tag] = _Who(tag, partition_of(mailbox.domain), normalised)
    if len(found) != 1:
        raise EnteringError("a bundle to enter has the profile of exactly one person")
    [who] = found.values()
    taken = [record for kind in sorted(_TAKEN) for record in by_kind.get(kind, [])]
    for name in sorted({str(record.values["account"]) for record in taken if record.values.get("account")}):
        account = accounts.get(conn, name)
        if account is None:
            if not make_accounts:
                raise EnteringError(f"there is no account {name[:64]!r} here: add it first")
            account = accounts.add(conn, name, display_name=name, now=now)
        who.numbers[name] = account.number
    return who


def _suppress(conn: Connection, effects: Effects, who: _Who, values: dict[str, Value]) -> bool:
    if values["target"] != "address":
        return False
    if str(values["reason"]).startswith(_VISITS):
        return True  # of the negative list: `_enforce`
    scope = suppression.Scope[str(values["scope"]).upper()]
    name = str(values.get("name") or "")
    number = 0 if scope is suppression.Scope.PLATFORM else who.numbers[str(values["account"])]
    if scope is suppression.Scope.LIST:
        number = accounts.list_number(conn, number, name)
    elif scope is suppression.Scope.TOPIC:
        number = accounts.topic_number(conn, number, name)
    reason, expires = str(values["reason"]), values.get("expires_at")
    if reason not in suppression.REASONS:
        reason = "manual"  # a newer version's word: that somebody is not to be written to is what counts
    entry = suppression.Entry(
        who.tag, who.partition, scope, number, reason, _at(values, "created_at"), str(values.get("source") or "")[:64],
        None if expires is None else parse_rfc3339(str(expires)),
    )  # fmt: skip
    suppression.add(conn, [entry])
    effects.tags.add((who.tag, who.partition))
    return True


def _resolve(conn: Connection, keyring: Keyring, who: _Who, values: dict[str, Value], now: int) -> bool:
    name = str(values["account"])
    number = who.numbers[name]
    # what the bundle itself says of an erasure counts too: it was entered before
    if any(entry.reason == "erasure" for entry in _against(conn, who, number)):
        return False
    wire = parse(str(values["address"])).wire
    since = min(_at(values, "created_at"), now)
    [(subject, _)] = vault.resolve(conn, keyring, number, [(who.tag, who.partition, wire)], week_of(now), since)
    found = vault.get(conn, keyring, subject)
    assert found is not None
    who.subjects[name] = found
    return True


def _known_since(conn: Connection, subject: int, account: str, by_kind: dict[str, list[Record]]) -> None:
    """A person's messages are looked for from the week on in which they became known (`policy.erasure.person_of`)."""
    for kind, name in (("profile", "created_at"), ("message", "at")):
        for record in by_kind.get(kind, []):
            if record.values.get("account") == account:
                since = _at(record.values, name)
                older = update(subject_table).where(subject_table.c.number == subject, subject_table.c.created > since)
                conn.execute(older.values(created=since))


def _against(conn: Connection, who: _Who, account: int) -> list[suppression.Entry]:
    """What stands against the person at an account as a whole."""
    whole = ((suppression.Scope.PLATFORM, 0), (suppression.Scope.ACCOUNT, account))
    return [entry for entry in suppression.check(conn, who.tag) if (entry.scope, entry.scope_id) in whole]


def _subscribe(conn: Connection, who: _Who, values: dict[str, Value]) -> bool:
    number = who.numbers[str(values["account"])]
    accounts.list_number(conn, number, str(values["list"]))
    if values.get("topic"):
        accounts.topic_number(conn, number, str(values["topic"]))
    return True


def _agree(conn: Connection, effects: Effects, who: _Who, values: dict[str, Value], now: int) -> bool:
    subject = who.subjects.get(str(values["account"]))
    if subject is None:
        return False
    ends = values.get("expires_at")
    evidence = consent.Evidence(
        subject.number, str(values["purpose"]), str(values["basis"]), str(values.get("wording") or ""),
        str(values.get("source") or ""), _at(values, "given_at"), None if ends is None else parse_rfc3339(str(ends)),
    )  # fmt: skip
    if not values["withdrawn"]:
        return consent.record(conn, [evidence], now) == 1
    if evidence.purpose not in consent.PURPOSES:
        return False
    # a withdrawal counts without a source, and one from the future from now on: the strictest reading
    given = min(evidence.given_at, now)
    known = select(consent_table.c.id).where(
        consent_table.c.subject == subject.number, consent_table.c.purpose == evidence.purpose,
        consent_table.c.given_at == given, consent_table.c.withdrawn == 1,
    )  # fmt: skip
    if conn.execute(known).first() is None:
        row = {
            "subject": subject.number, "purpose": evidence.purpose, "basis": evidence.basis,
            "wording": evidence.wording, "source": evidence.source, "given_at": given, "recorded_at": now,
            "withdrawn": 1, "expires_at": None,
        }  # fmt: skip
        conn.execute(insert(consent_table).values(row))
    return True


def _enforce(
    conn: Connection, effects: Effects, who: _Who, name: str, by_kind: dict[str, list[Record]], now: int
) -> None:
    """What was withdrawn and not given again is put where gate and trackers look, as `op_withdraw` and `op_restrict`
    do: the gate asks suppressions, not consent (T4), a visit asks the negative list (decision 12)."""
    subject = who.subjects[name]
    acts = consent.history(conn, subject.number)
    gone: set[str] = set()
    for purpose in {act.purpose for act in acts if act.withdrawn}:
        if not consent.holds([act for act in acts if act.purpose == purpose], now):
            gone.add(purpose)
    if "mail_marketing" in gone:
        entry = suppression.Entry(
            who.tag, who.partition, suppression.Scope.ACCOUNT, subject.account, "opt-out", now, "bundle-import"
        )
        suppression.add(conn, [entry])
        effects.tags.add((who.tag, who.partition))
    cause = "withdrawn" if gone & consent.TRACKING else ""
    if any(entry.reason == "restriction" for entry in _against(conn, who, subject.account)):
        cause = "restricted"
    cause = cause or _last_word_on_visits(by_kind, name)
    if cause and negative.standing(conn, subject.number) is None:
        effects.negative.append((subject.number, cause, negative.add(conn, subject.number, cause, now)))


def _last_word_on_visits(by_kind: dict[str, list[Record]], account: str) -> str:
    """What the negative list of the other house said last of the person at an account; at one instant the strictest."""
    said = [
        (_at(record.values, "created_at"), cause != negative.LIFTED, cause)
        for record in by_kind.get("suppression", [])
        if record.values.get("account") == account
        and (cause := str(record.values["reason"]).removeprefix(_VISITS)) != record.values["reason"]
    ]
    _, stands, cause = max(said, default=(0, False, ""))
    return (cause if cause in negative.CAUSES else "objected") if stands else ""


# --- the ledger -------------------------------------------------------------------------------------------------


def _ledger(
    conn: Connection, keyring: Keyring, who: _Who, name: str, by_kind: dict[str, list[Record]], done: Entered
) -> None:
    jobs: dict[str, tuple[list[dict[str, Value]], list[dict[str, Value]]]] = {}
    for place, kind in enumerate(("message", "event")):
        for record in by_kind.get(kind, []):
            if record.values.get("account") == name and record.values.get("job"):
                jobs.setdefault(str(record.values["job"]), ([], []))[place].append(record.values)
    for job_id, (messages, events) in sorted(jobs.items()):
        try:
            book = _Book.of(conn, keyring, who, name, job_id, messages, events)
            if book is not None:
                done.taken["message"] += book.messages(messages)
                done.taken["event"] += book.events(events)
                done.rows += book.close()
        except (KeyError, TypeError, AttributeError, OverflowError):
            raise EnteringError("a message or event lacks a field, or has one of another type") from None


@dataclass(slots=True, repr=False)
class _Book:
    """One imported job, while rows are entered under it."""

    conn: Connection
    keyring: Keyring
    number: int
    mref: int
    subject: vault.Subject
    domain: int
    references: dict[str, int] = field(default_factory=dict)
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    hits: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    rows: int = 0
    terminal: int = 0

    @classmethod
    def of(
        cls, conn: Connection, keyring: Keyring, who: _Who, name: str, job_id: str,
        messages: list[dict[str, Value]], events: list[dict[str, Value]],
    ) -> _Book | None:  # fmt: skip
        """None: a job of this name was sent from here."""
        account = who.numbers[name]
        row = conn.execute(
            select(job.c.number, job.c.reason, job.c.job_key).where(job.c.account == account, job.c.job_id == job_id)
        ).one_or_none()
        aad = job_aad("key", name, job_id)
        if row is None:
            key = os.urandom(KEY_BYTES)
            number = _enter_job(conn, account, job_id, seal(keyring.service, key, aad), messages, events)
        elif row.reason != IMPORTED or row.job_key is None:
            return None
        else:
            number, key = int(row.number), open_sealed(keyring.service, row.job_key, aad)
        domain_name = who.normalised.rpartition("@")[2]
        return cls(
            conn, keyring, number, mref_of(key, who.normalised), who.subjects[name],
            _numbered(conn, domain, {"name": domain_name}, {}),
        )  # fmt: skip

    def messages(self, lines: list[dict[str, Value]]) -> int:
        """How many are in the ledger now. One job has one message to one person; a second is a row of its history."""
        taken = 0
        for values in sorted(lines, key=lambda values: str(values["at"])):
            kind = _word(Kind, values["outcome"])
            if kind is None or kind not in TERMINAL:
                continue  # "waiting": its events say as much
            at = _at(values, "at")
            taken += 1
            if self._there(message, {}):
                continue
            row = {
                **self._line(values, kind, at),
                "domain": self.domain,
                "attempts": _integer(values, "attempts"),
                "pseudonym": self.subject.pseudonym(week_of(at)),
                "tag_sealed": None,  # for bounces and complaints that come late: none will come to this house
                "tls": _TLS.get(str(values.get("tls")), 0),
            }
            self.conn.execute(insert(message).values(row))
            self._count(kind, row["reason"])
            self.terminal += 1
        return taken

    def events(self, lines: list[dict[str, Value]]) -> int:
        taken = 0
        visits: Counter[tuple[int, int, int]] = Counter()
        for values in lines:
            kind = _word(Kind, values["event"])
            if kind is None:
                continue
            at, taken = _at(values, "at"), taken + 1
            if kind in _HITS:
                visits[int(kind), self._link(values), at] += 1
                continue
            attempt = _integer(values, "attempt")
            if self._there(history, {"attempt": attempt, "kind": int(kind)}):
                continue
            row = {**self._line(values, kind, at), "attempt": attempt}
            self.conn.execute(insert(history).values(row))
            self._count(kind, row["reason"])
        for (number, place, at), n in visits.items():
            self._visit(number, place, at, n)
        return taken

    def close(self) -> int:
        """Counters and the job's size, from what was really entered. The rows."""
        for (kind, reason), n in self.counts.items():
            _add(self.conn, counter, {"job": self.number, "domain": self.domain, "kind": kind, "reason": reason}, n)
        for (kind, place, visitor), n in self.hits.items():
            _add(self.conn, hit_counter, {"job": self.number, "link": place, "kind": kind, "visitor": visitor}, n)
        if self.terminal:
            more = update(job).where(job.c.number == self.number)
            self.conn.execute(more.values(rows_submitted=job.c.rows_submitted + self.terminal))
            mark(self.conn, self.number)
        return self.rows

    def _line(self, values: dict[str, Value], kind: Kind, at: int) -> dict[str, Any]:
        return {
            "job": self.number,
            "mref": self.mref,
            "kind": int(kind),
            "at": at,
            "day": day_of(at),
            "reason": int(_word(Reason, values.get("reason") or "none") or Reason.NONE),
            "code": _integer(values, "code"),
            "enhanced": str(values.get("enhanced") or ""),
            "note": seal_note(self.keyring, str(values.get("reply") or "")) or None,
        }

    def _count(self, kind: Kind, reason: int) -> None:
        self.counts[int(kind), reason] += 1
        self.rows += 1

    def _there(self, table: Table, where: dict[str, int]) -> bool:
        wanted = {"job": self.number, "mref": self.mref, **where}
        asked = select(table.c.job).where(*(table.c[name] == value for name, value in wanted.items()))
        return self.conn.execute(asked).first() is not None

    def _link(self, values: dict[str, Value]) -> int:
        url = values.get("link")
        if not url:
            return -1
        numbers = self.conn.execute(select(link.c.url, link.c.number).where(link.c.job == self.number)).all()
        known = {row.url: int(row.number) for row in numbers}
        if url not in known:
            known[url] = max(known.values(), default=-1) + 1
            self.conn.execute(insert(link).values(job=self.number, number=known[url], url=url))
        return known[str(url)]

    def _visit(self, kind: int, place: int, at: int, wanted: int) -> None:
        """Hits have no identity of their own: those that are missing are entered."""
        row = {
            "job": self.number, "mref": self.mref, "kind": kind, "link": place, "hour": hour_of(at),
            "day": day_of(at), "visitor": 0, "mode": int(Mode.INDIVIDUAL),
        }  # fmt: skip
        there = self.conn.execute(select(hit.c.id).where(*(hit.c[name] == value for name, value in row.items()))).all()
        for _ in range(wanted - len(there)):
            self.conn.execute(insert(hit).values(row))
            self.hits[kind, place, 0] += 1
            self.rows += 1


def _enter_job(
    conn: Connection, account: int, job_id: str, sealed: bytes,
    messages: Iterable[dict[str, Value]], events: Iterable[dict[str, Value]],
) -> int:  # fmt: skip
    lines = [*messages, *events]
    moments = [_at(values, "at") for values in lines]
    said = next((values for values in messages if values.get("list")), {})
    names = next((values for values in messages if values.get("topic")), {})
    kinds = {values.get("kind") for values in messages}
    values = {
        "account": account,
        "job_id": job_id,
        # of no payload there is: whoever offers a job of this name meets a conflict
        "hash": sha256(f"{IMPORTED} {account}/{job_id}".encode()).digest(),
        "state": "done",
        "kind": "transactional" if kinds == {"transactional"} else "campaign",
        "list": accounts.list_number(conn, account, str(said.get("list") or "default")),
        "topic": accounts.topic_number(conn, account, str(names["topic"])) if names else None,
        "legal_basis": IMPORTED,
        "in_doubt": "hold",
        "priority": 0,
        "wait": 0,
        "opens_mode": int(Mode.OFF),
        "clicks_mode": int(Mode.OFF),
        "job_key": sealed,
        "created_at": min(moments),
        "accepted_at": min(moments),
        "chunks_expected": 0,
        "rows_submitted": 0,
        "done_at": max(moments),
        "reason": IMPORTED,
    }
    made = conn.execute(insert(job).values(values)).inserted_primary_key
    assert made is not None
    return int(made[0])


def _numbered(conn: Connection, table: Table, where: dict[str, Any], more: dict[str, Any]) -> int:
    asked = select(table.c.number).where(*(table.c[name] == value for name, value in where.items()))
    number = conn.execute(asked).scalar()
    if number is None:
        made = conn.execute(insert(table).values(**where, **more)).inserted_primary_key
        assert made is not None
        number = made[0]
    return int(number)


def _add(conn: Connection, table: Table, where: dict[str, int], n: int) -> None:
    more = update(table).where(*(table.c[name] == value for name, value in where.items())).values(n=table.c.n + n)
    if conn.execute(more).rowcount == 0:
        conn.execute(insert(table).values(**where, n=n))


def _word(names: type[T], word: Value) -> T | None:
    """The member that `policy.stories.word` writes so; None for a word of another version."""
    members: dict[str, T] = names.__members__  # type: ignore[attr-defined]  # enums only
    return members.get(str(word).upper().replace("-", "_"))


def _at(values: dict[str, Value], name: str) -> int:
    try:
        return parse_rfc3339(str(values[name]))
    except ValueError:
        raise EnteringError(f"a field {name} is not an instant") from None


def _integer(values: dict[str, Value], name: str) -> int:
    return int(values.get(name) or 0)
