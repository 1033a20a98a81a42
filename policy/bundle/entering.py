"""A bundle entered into an instance: the same person, the same will, the same history, as far as it can mean that here.

    profile        a subject at the account of that name, found by the address; `resolve` makes it when it is new
    consent        evidence by the rules of `policy.consent`: without source or time, or from the future, it is none
    suppression    reasons not to write, in the scopes of the same names; a domain's are the domain's, not the person's
    subscription   lists and topics of these names
    message, event rows of the ledger under a job of the same name (`imported`)

Laws:
- entering never makes anybody more writable: withdrawals and suppressions are entered whatever else is refused, and
  who was erased here stays erased: of them only the reasons not to write are taken (P-22);
- repeated, it changes nothing;
- a job that was sent from here is never added to: only jobs that an import made take rows, and their names are used
  up, so that nobody sends the same campaign again by accident.

What is about the other house stays there: its consultations, disclosures, uses, requests, conclusions, and what waits
in its queue. All that is not taken is counted by kind in `Entered.left`, never silently.

Known limits: `recorded_at` of consent is the instant of entering: when *this* house learned of it. Replies are sealed
anew. One bundle, one person: two addresses of different people are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection, insert, select, update

from policy import accounts, audit, consent, negative, remarks, suppression, vault
from policy.address import AddressError, normalise, parse, tag_of
from policy.bundle.imported import Book, EnteringError, instant
from policy.bundle.reading import Opened
from policy.enforcement import Effects
from policy.instants import parse_rfc3339, week_of
from policy.keys import Keyring
from policy.keyspace import partition_of
from policy.personal import Record, Value
from policy.schema import consent as consent_table
from policy.schema import subject as subject_table

__all__ = ["Entered", "EnteringError", "enter"]

_VISITS: Final = "visits: "  # reasons so named are of the negative list (policy.records)
_TAKEN: Final = frozenset({"profile", "subscription", "consent", "suppression", "message", "event"})


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
    ref = remarks.named(keyring, "foreign-bundle", opened.manifest.ticket)
    audit.append(conn, now, "operator", "bundle-import", ref, "portability", "done")
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
        who.tag, who.partition, scope, number, reason, instant(values, "created_at"),
        str(values.get("source") or "")[:64], None if expires is None else parse_rfc3339(str(expires)),
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
    since = min(instant(values, "created_at"), now)
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
                since = instant(record.values, name)
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
        str(values.get("source") or ""), instant(values, "given_at"),
        None if ends is None else parse_rfc3339(str(ends)),
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
        (instant(record.values, "created_at"), cause != negative.LIFTED, cause)
        for record in by_kind.get("suppression", [])
        if record.values.get("account") == account
        and (cause := str(record.values["reason"]).removeprefix(_VISITS)) != record.values["reason"]
    ]
    _, stands, cause = max(said, default=(0, False, ""))
    return (cause if cause in negative.CAUSES else "objected") if stands else ""


def _ledger(
    conn: Connection, keyring: Keyring, who: _Who, name: str, by_kind: dict[str, list[Record]], done: Entered
) -> None:
    subject = who.subjects[name]
    jobs: dict[str, tuple[list[dict[str, Value]], list[dict[str, Value]]]] = {}
    for place, kind in enumerate(("message", "event")):
        for record in by_kind.get(kind, []):
            if record.values.get("account") == name and record.values.get("job"):
                jobs.setdefault(str(record.values["job"]), ([], []))[place].append(record.values)
    for job_id, (messages, events) in sorted(jobs.items()):
        try:
            book = Book.of(conn, keyring, subject, who.normalised, name, job_id, messages, events)
            if book is not None:
                done.taken["message"] += book.messages(messages)
                done.taken["event"] += book.events(events)
                done.rows += book.close()
        except (KeyError, TypeError, AttributeError, OverflowError):
            raise EnteringError("a message or event lacks a field, or has one of another type") from None
