"""An installation's SQL with one person in every place of this floor and a neighbour beside her, and the oracle of it.

What is entered goes through the rooms that enter it in service (vault, consent, suppression, jobs, drains); `FACTS` is
written down by hand and knows none of the rooms that read it.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Final

from sqlalchemy import Connection, insert

from policy import accounts, consent, jobs, negative, schema, suppression, vault
from policy.address import mref_of, normalise, parse
from policy.drains import EventBook
from policy.events import Batch, Event, Hit, Kind, Reason
from policy.instants import DAY_US, HOUR_US, day_of, week_of
from policy.keys import Keyring, seal, seal_note
from policy.wire import JobRecord, job_aad
from tests.policy.people import row_of

NOW: Final = 1_795_376_640_000_000
EVE: Final = "Eve.Adams@example.com"
BOB: Final = "bob@example.com"
DAYS: Final = (40, 20, 3)  # before now: three jobs in three weeks

# (kind, what tells one record from another) of everything that `furnish` enters about Eve
FACTS: Final = sorted(
    [
        ("profile", "acme", EVE),
        ("profile", "globex", EVE),
        ("consent", "acme", "mail_marketing", False),
        ("consent", "acme", "open_tracking", False),
        ("consent", "acme", "open_tracking", True),
        ("consent", "globex", "mail_marketing", False),
        ("message", "acme", "job-0", "delivered"),
        ("message", "acme", "job-1", "bounced"),
        ("message", "globex", "job-2", "delivered"),
        ("event", "acme", "job-0", "deferred"),
        ("event", "acme", "job-0", "opened"),
        ("event", "acme", "job-0", "opened"),
        ("event", "acme", "job-0", "clicked"),
        ("event", "globex", "job-2", "complained"),
        ("subscription", "acme", "news"),
        ("subscription", "globex", "news"),
        ("suppression", "acme", "list", "opt-out"),
        ("suppression", "globex", "account", "complaint"),
        ("suppression", "acme", "account", "visits: withdrawn"),
        ("consultation", "support"),
        ("disclosure", "Police"),
    ],
    key=repr,
)
_TOLD_BY: Final = {
    "profile": ("account", "address"), "consent": ("account", "purpose", "withdrawn"),
    "message": ("account", "job", "outcome"), "event": ("account", "job", "event"),
    "subscription": ("account", "list"), "suppression": ("account", "scope", "reason"),
    "consultation": ("purpose",), "disclosure": ("recipient",),
}  # fmt: skip


def facts(records: list[Any]) -> list[tuple[Any, ...]]:
    """Records by what `FACTS` says of them."""
    told = [(one.kind, *(one.values[name] for name in _TOLD_BY[one.kind])) for one in records if one.kind in _TOLD_BY]
    return sorted(told, key=repr)


def furnish(conn: Connection, keyring: Keyring) -> None:
    """Eve at two accounts, Bob with the same at one of them."""
    for name in ("acme", "globex"):
        accounts.add(conn, name, display_name=name.title(), now=NOW - 100 * DAY_US, postal_address="1 Road")
    book = EventBook(conn.dialect.name, keyring.service)
    places = ["acme", "acme", "globex"]
    for number, (account, days) in enumerate(zip(places, DAYS, strict=True)):
        for person in (EVE, BOB) if account == "acme" else (EVE,):
            _job(conn, keyring, book, account, f"job-{number}", NOW - days * DAY_US, person, number)
    eve, at = _subject(conn, keyring, "acme", EVE, NOW), NOW - 41 * DAY_US
    given = functools.partial(consent.Evidence, basis="express", wording="Yes, =please", source="form", given_at=at)
    bob = _subject(conn, keyring, "acme", BOB, NOW)
    for subject in (eve, bob):
        consent.record(conn, [given(subject, "mail_marketing"), given(subject, "open_tracking")], NOW - DAY_US)
    consent.withdraw(conn, eve, "open_tracking", "preferences", NOW - DAY_US)
    globex = _subject(conn, keyring, "globex", EVE, NOW)
    consent.record(conn, [given(globex, "mail_marketing")], NOW - DAY_US)
    tag, partition, _ = row_of(keyring.pepper, EVE)
    news = accounts.list_number(conn, 1, "news")
    suppression.add(
        conn,
        [
            suppression.Entry(tag, partition, suppression.Scope.LIST, news, "opt-out", NOW - DAY_US, "page"),
            suppression.Entry(tag, partition, suppression.Scope.ACCOUNT, 2, "complaint", NOW - 2 * DAY_US, "arf"),
        ],
    )
    day = day_of(NOW)
    for subject, purpose in ((eve, "support"), (bob, "rights")):
        row = {"at": NOW, "day": day, "actor": "support", "purpose": purpose, "what": "why", "subject": subject,
               "account": 1, "count": 1, "query": b"q"}  # fmt: skip
        conn.execute(insert(schema.reading).values(row))
    row = {"at": NOW, "day": day, "subject": eve, "account": 1, "recipient": "Police", "purpose": "inquiry",
           "basis": "warrant", "what": "profile", "count": 1, "actor": "officer", "gag_until": None}  # fmt: skip
    conn.execute(insert(schema.disclosure).values(row))
    hidden = {**row, "recipient": "Secret service", "gag_until": NOW + DAY_US}
    conn.execute(insert(schema.disclosure).values(hidden))
    assert negative.standing(conn, eve) == "withdrawn"


def _subject(conn: Connection, keyring: Keyring, account: str, address: str, now: int) -> int:
    holder = accounts.get(conn, account)
    assert holder is not None
    [(number, _)] = vault.resolve(
        conn, keyring, holder.number, [row_of(keyring.pepper, address)], week_of(now), NOW - 90 * DAY_US
    )
    return number


def _job(
    conn: Connection, keyring: Keyring, book: EventBook, account: str, job_id: str, at: int, address: str, place: int
) -> None:
    key = keyring.service[::-1]  # the same for both recipients of a job: references differ by address
    record = JobRecord(
        account=account, job_id=job_id, hash=bytes(32), kind="campaign", created_at=at, payload=b"",
        job_key=seal(keyring.service, key, job_aad("key", account, job_id)), legal_basis="consent", list="news",
        links=("https://shop.example/?a=1&b=2",), opens_mode=3, clicks_mode=3, accepted_at=at,
    )  # fmt: skip
    number = jobs.accept(conn, record, at).number
    mailbox = parse(address)
    mref = mref_of(key, normalise(mailbox.local, mailbox.domain))
    holder = accounts.get(conn, account)
    assert holder is not None
    row = row_of(keyring.pepper, address)
    [(_, pseudonym)] = vault.resolve(conn, keyring, holder.number, [row], week_of(at), NOW - 90 * DAY_US)
    note = seal_note(keyring, f"250 2.0.0 <{address}> taken")
    ends = Event(Kind.DELIVERED, mref, 2, at + HOUR_US, pseudonym, row[0], 0, 250, "2.0.0", 3, note)
    if place == 1:
        ends = Event(Kind.BOUNCED, mref, 1, at, pseudonym, row[0], Reason.USER_UNKNOWN, 550, "5.1.1", 2, note)
    events = [ends]
    if place == 0:
        events.insert(0, Event(Kind.DEFERRED, mref, 1, at, pseudonym, row[0], Reason.GREYLISTED, 451, "4.7.1"))
    if place == 2:
        events.append(Event(Kind.COMPLAINED, mref, 0, at + 2 * HOUR_US, pseudonym, row[0]))
    stream = f"test-{job_id}-{os.urandom(4).hex()}"
    book.record(conn, [(stream, f"{at}-0", Batch(number, mailbox.domain, events))])
    book.committed()
    if place == 0:
        hits = [
            Hit(Kind.OPENED, number, mref, at + 3 * HOUR_US, 3, 33),
            Hit(Kind.OPENED, number, mref, at + 3 * HOUR_US, 3, 33),
            Hit(Kind.CLICKED, number, mref, at + 4 * HOUR_US, 3, 33, 0),
        ]
        book.record_hits(conn, [(stream, f"{at}-1", hits)])
