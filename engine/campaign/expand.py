"""Expansion, the pure part: rows of one chunk in, questions and slices out. Nothing here awaits anything.

Laws:
- every row ends in exactly one place: a slice, or one refusal event of this chunk (T2: the sum of recipients holds);
- the same chunk gives the same questions and, to the same answers, the same slices and events: a crash anywhere is
  repaired by doing it again;
- a slice holds only the fields the templates name (P-09): what is not needed is not queued;
- tracking is what account, campaign *and* the person's own consent allow, the strictest wins (decision 12); evidence
  never outranks a later withdrawal, and without time or source it counts as none (decision 19), as it does from the
  instant on at which it ends (implied consent: CASL s.10).

    1. `prepare`     rows -> people by partition; what is no address is refused `invalid`
    2. `questions`   -> Lanes.facts (one script a partition; where a provider files several spellings in one mailbox,
                     the opt-out of another spelling counts too)
    3. `decide`      facts + consent ledger -> permitted people, refusals
    4. `evidence`    permitted people + their vault numbers -> new lines for the consent ledger
    5. `shares`      -> Lanes.put: sealed slices, refusal events, one share a partition

A chunk here is at most `CHUNK_ROWS` rows of one audience entry; its number is entry * 64 + place, so entries may be
expanded in any order by several workers. An entry of 1 MiB cannot hold more rows than 64 chunks.

Cost: 13 to 16 us of CPU a recipient on the build machine (benchmarks/test_expand.py), 27 with I/O and SQL
(benchmarks/intake.py).

Known limits: a job's `rate` is kept by spreading due times over entries of equal size; a resubmitted shape with unequal
entries may run a little faster at its end. Rows of one domain with different sets of fields go into different slices.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, TypeAlias, cast

from engine.campaign.job import Evidence, Recipient
from engine.campaign.people import Person
from engine.client import CHUNK_ROWS
from engine.queue.lanes import FactsRequest, JobState, PutRequest
from engine.queue.slices import FLAG_PRIORITY, FLAG_RESEND, Contents, Row, build_packed, packed
from engine.queue.windows import Window, after, opens_in
from policy import consent, keyspace
from policy.address import (
    DOTLESS,
    AddressError,
    References,
    domain_tag,
    mref_of,
    normalise,
    parse,
    provider_canonical,
    tag_of,
)
from policy.events import Batch, Event, Kind, Reason, encode_batch
from policy.gate import Mode, Permit, decide_entry
from policy.instants import SECOND_US, parse_rfc3339
from policy.keys import Keyring
from policy.wire import ConsentRow, Resolved

CHUNKS_AN_ENTRY: Final = 64
CLOCK_AHEAD_US: Final = 300 * SECOND_US  # as policy.consent: clocks of producers run ahead, five minutes are forgiven
INVALID_PARTITION: Final = keyspace.partition_of("")  # where refusals of rows without a domain are told
ERASED_ADDRESS: Final = "\0"  # of a row that was blanked while its job was held (engine.campaign.naming): no address
_NOT_IN_A_HEADER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# (given, withdrawn) in microseconds, the latest of each in the consent ledger, by (tag, purpose)
Standing: TypeAlias = Mapping[tuple[bytes, str], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Terms:
    """What expansion must know of an accepted job.

    due: microseconds before which nothing is sent (0: at once); rate: messages a second, 0 for no limit; buckets: see
    FactsRequest; columns: the fields templates name, required: those without a default, one_line: those that end in a
    header; opens, clicks: strictest of account and campaign; window: hours in which its mail may leave; fate: what
    becomes of rows of a job that was stopped.
    """

    job: int
    account: int
    list_number: int
    topic_number: int
    job_key: bytes
    expires_at: int
    due: int = 0
    rate: float = 0.0
    buckets: int = 1
    priority: bool = False
    resend: bool = False
    needs_consent: bool = False
    consent: Mapping[str, Evidence] = field(default_factory=dict)
    opens: Mode = Mode.OFF
    clicks: Mode = Mode.OFF
    columns: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    one_line: frozenset[str] = frozenset()
    window: Window | None = None
    fate: Kind | None = None

    @property
    def state(self) -> JobState:
        return JobState(
            self.account, self.list_number, self.topic_number, self.priority, self.expires_at, self.resend, self.buckets
        )


@dataclass(slots=True)
class Prepared:
    """A chunk on its way. people: by partition, in the order of rows; events: refusals by (partition, domain)."""

    chunk: int
    at: int
    rows: int
    people: dict[int, list[Person]]
    events: dict[tuple[int, str], list[Event]]

    @property
    def partitions(self) -> list[int]:
        return sorted(self.people.keys() | {partition for partition, _ in self.events})

    def refuse(self, person: Person, kind: Kind, reason: Reason) -> None:
        event = Event(kind, person.mref, 0, self.at, person.pseudonym, person.tag, reason)
        self.events[person.partition, person.domain].append(event)


@lru_cache(maxsize=100_000)
def _domain(domain: str, pepper: bytes, lane_key: bytes) -> tuple[int, bytes, str]:
    """(partition, tag of the domain, lane reference): a mailing meets few domains many times."""
    return keyspace.partition_of(domain), domain_tag(pepper, domain), keyspace.lane_ref(domain, lane_key)


@lru_cache(maxsize=4_096)
def _instant(text: str) -> int:
    """Microseconds, or 0 for a time that says none."""
    try:
        return parse_rfc3339(text)
    except ValueError:
        return 0


def prepare(
    terms: Terms, keyring: Keyring, chunk: int, rows: Sequence[Recipient | None], first: int, now_us: int
) -> Prepared:
    """Parse and key the rows. None is a row that could not be read; first: place of rows[0] in the whole audience."""
    prepared = Prepared(chunk, now_us, len(rows), defaultdict(list), defaultdict(list))
    pepper, lane_key, job_key = keyring.pepper, keyring.lane, terms.job_key
    references = References(job_key, pepper)
    people, ordered = prepared.people, sorted(terms.columns)
    everything = tuple(ordered)
    required, one_line = sorted(terms.required), sorted(terms.one_line)
    default = terms.consent
    latest = now_us + CLOCK_AHEAD_US
    default_given = _given(default, latest, now_us)
    invalid: list[Event] = []
    for index, row in enumerate(rows):
        if row is None:
            invalid.append(_invalid(job_key, chunk, index, now_us))
            continue
        try:
            mailbox = parse(row.address)
        except (AddressError, UnicodeError):
            reason = Reason.ERASED if row.address == ERASED_ADDRESS else Reason.INVALID
            invalid.append(_invalid(job_key, chunk, index, now_us, reason))
            continue
        domain = mailbox.domain
        partition, _, _ = _domain(domain, pepper, lane_key)
        spelled = normalise(mailbox.local, domain)
        mref, tag = references.of(spelled)
        fields = row.fields
        if row.name and "name" not in fields:
            fields = {**fields, "name": row.name}
        columns = everything if fields.keys() >= terms.columns else tuple([name for name in ordered if name in fields])
        if row.consent:
            # the job's word for everybody, the row's own over it
            own = cast(Mapping[str, Evidence], row.consent)
            evidence: Mapping[str, Evidence] = {**default, **own} if default else own
            given = _given(evidence, latest, now_us)
        else:
            evidence, given = default, default_given
        person = Person(
            mailbox.local, domain, mailbox.wire, mref, tag, partition,
            columns, [fields[name] for name in columns], evidence, given, first + index,
        )  # fmt: skip
        if domain in DOTLESS and (filed := provider_canonical(spelled)) != spelled:
            person.canonical = tag_of(pepper, filed)
        if _lacks(required, fields) or _breaks_a_header(one_line, fields):
            prepared.refuse(person, Kind.REFUSED, Reason.INVALID)
            continue
        if terms.fate is not None:
            prepared.refuse(person, terms.fate, Reason.NONE)
            continue
        people[partition].append(person)
    if invalid:
        prepared.events[INVALID_PARTITION, ""] = invalid
    return prepared


def _given(evidence: Mapping[str, Evidence], latest: int, now_us: int) -> dict[str, int]:
    """When consent was given, by purpose, for what is evidence (decision 19): it has a source, a time that is not in
    the future, and no end that has come."""
    given: dict[str, int] = {}
    for purpose, word in evidence.items():
        at = _instant(word.time)
        if 0 < at <= latest and word.source and not word.source.isspace():
            if word.expires or word.basis == "implied":
                end = _end(word.basis, word.implied_by, word.expires, at)
                if end and end <= now_us:
                    continue
            given[purpose] = at
    return given


@lru_cache(maxsize=4_096)
def _end(basis: str, implied_by: str, expires: str, at: int) -> int:
    """When evidence ends by itself, in microseconds; 0: never. An end that says no time has come long ago."""
    return consent.ends(basis, implied_by, at, (_instant(expires) or 1) if expires else None) or 0


def _invalid(job_key: bytes, chunk: int, index: int, now_us: int, reason: Reason = Reason.INVALID) -> Event:
    # no address, so no reference of one: the row's own place, keyed like any other mref (a NUL is in no address)
    mref = mref_of(job_key, f"\0row {chunk * CHUNK_ROWS + index}")
    return Event(Kind.REFUSED, mref, 0, now_us, 0, b"", reason)


def _lacks(names: Sequence[str], fields: Mapping[str, Any]) -> bool:
    for name in names:  # noqa: SIM110 - any() takes twice the time, and this runs once a recipient
        if fields.get(name) is None:
            return True
    return False


def _breaks_a_header(names: Sequence[str], fields: Mapping[str, Any]) -> bool:
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and _NOT_IN_A_HEADER.search(value) is not None:
            return True
    return False


def questions(terms: Terms, keyring: Keyring, prepared: Prepared) -> list[FactsRequest]:
    """One question a partition; its rows are those of ``prepared.people[partition]``, in order, and behind them the
    canonical tags of those who have one."""
    pepper, lane_key = keyring.pepper, keyring.lane
    asked: list[FactsRequest] = []
    for partition, people in prepared.people.items():
        rows = [(person.mref, person.tag) for person in people]
        domains = [_domain(person.domain, pepper, lane_key)[1] for person in people]
        for person in _filed_elsewhere(people):
            # a reference of its own for each, or the script would take it for a repetition and not look at the tag
            rows.append((mref_of(terms.job_key, f"\0filed {person.local}@{person.domain}"), person.canonical))
            domains.append(_domain(person.domain, pepper, lane_key)[1])
        numbers = terms.account, terms.list_number, terms.topic_number
        asked.append(FactsRequest(partition, terms.job, prepared.chunk, terms.buckets, *numbers, rows, domains))
    return asked


def _filed_elsewhere(people: Sequence[Person]) -> list[Person]:
    return [person for person in people if person.canonical]


def _with_canonical(people: Sequence[Person], facts: bytes) -> bytes:
    """One fact a person. What is known against the canonical spelling counts when it is a suppression; an erasure or
    a restriction was asked for by who writes it that way. Facts for people alone: nobody asked about others."""
    filed = _filed_elsewhere(people)
    if not filed or len(facts) == len(people):
        return facts
    if len(facts) != len(people) + len(filed):
        raise ValueError("facts for another number of rows")
    others = iter(facts[len(people) :])
    told = [
        Reason.SUPPRESSED if person.canonical and next(others) == Reason.SUPPRESSED and not fact else fact
        for person, fact in zip(people, facts, strict=False)
    ]
    return bytes(told)


def decide(
    terms: Terms, prepared: Prepared, facts: Mapping[int, bytes], standing: Standing, asked_at: float
) -> list[Person]:
    """Who may be written to; everybody else becomes a refusal event. facts: by partition, one byte a person
    (and behind them one for each canonical tag asked about).

    asked_at: monotonic seconds at which the facts were asked for. Sets the modes of those permitted.
    """
    permitted: list[Person] = []
    for partition, people in prepared.people.items():
        for person, fact in zip(people, _with_canonical(people, facts[partition]), strict=True):
            verdict = decide_entry(
                fact, terms.job, person.mref, asked_at,
                needs_consent=terms.needs_consent,
                has_consent=not terms.needs_consent or _agreed(person, "mail_marketing", standing),
            )  # fmt: skip
            if not isinstance(verdict, Permit):
                prepared.refuse(person, Kind.REFUSED, verdict.reason)
                continue
            if terms.opens and _agreed(person, "open_tracking", standing):
                person.opens = int(terms.opens)
            if terms.clicks and _agreed(person, "click_tracking", standing):
                person.clicks = int(terms.clicks)
            permitted.append(person)
        people.clear()
    for person in permitted:
        prepared.people[person.partition].append(person)
    return permitted


def spare(
    prepared: Prepared, permitted: Sequence[Person], ended: Container[int], repeated: Mapping[int, int]
) -> list[Person]:
    """What is left of a chunk that is expanded anew because Redis came back older (T12): who has reached an end by the
    ledger is neither put nor refused again. ended: mrefs; repeated: how many further rows of this chunk the ledger has
    for an mref: so many repetitions of it are not told again."""
    left = [person for person in permitted if person.mref not in ended]
    for people in prepared.people.values():
        people[:] = [person for person in people if person.mref not in ended]
    told = Counter(repeated)
    for place, events in prepared.events.items():
        fresh = []
        for event in events:
            if event.reason == Reason.DUPLICATE and told[event.mref] > 0:
                told[event.mref] -= 1
            elif event.reason == Reason.DUPLICATE or event.mref not in ended:
                fresh.append(event)
        prepared.events[place] = fresh
    return left


def _agreed(person: Person, purpose: str, standing: Standing) -> bool:
    """Consent holds when the latest word was yes: the job's evidence or the ledger's, against the ledger's no."""
    own = person.given.get(purpose, 0)
    known = standing.get((person.tag, purpose))
    if known is None:
        return own > 0
    return max(known[0], own) > known[1]


def evidence(permitted: Sequence[Person], standing: Standing) -> list[ConsentRow]:
    """Lines the consent ledger does not have yet, for people that have their vault numbers."""
    lines: list[ConsentRow] = []
    for person in permitted:
        for purpose, at in person.given.items():
            if at > standing.get((person.tag, purpose), (0, 0))[0]:
                word = person.evidence[purpose]
                end = _end(word.basis, word.implied_by, word.expires, at)
                lines.append(ConsentRow(person.subject, purpose, word.basis, word.wording, word.source, at, end))
    return lines


def number(permitted: Sequence[Person], resolved: Sequence[Resolved]) -> None:
    """Give people their vault numbers. resolved: in the order of `permitted`."""
    for person, answer in zip(permitted, resolved, strict=True):
        person.subject, person.pseudonym = answer.subject, answer.pseudonym


def shares(terms: Terms, keyring: Keyring, prepared: Prepared) -> list[PutRequest]:
    """Everything this chunk leaves in the queue: one share a partition it touches."""
    batches: dict[int, list[bytes]] = defaultdict(list)
    for (partition, domain), events in prepared.events.items():
        if not events:
            continue
        # one batch a chunk and domain: the ledger tells duplicates apart by their place in it
        batches[partition].append(encode_batch(Batch(terms.job, domain, events, prepared.chunk)))
    return [
        PutRequest(
            partition, terms.job, prepared.chunk, terms.state,
            _slices(terms, keyring, prepared.people.get(partition, []), prepared.at), batches.get(partition, ()),
        )
        for partition in prepared.partitions
    ]  # fmt: skip


def _slices(terms: Terms, keyring: Keyring, people: Sequence[Person], now_us: int) -> list[tuple[int, bytes]]:
    groups: dict[tuple[str, tuple[str, ...], int], list[Person]] = defaultdict(list)
    rate = terms.rate
    for person in people:
        # a slice is due as a whole, so with a rate it holds people of one second only
        groups[person.domain, person.columns, int(person.place / rate) if rate else 0].append(person)
    key_id = keyring.queue_id
    key = keyring.queue[key_id]
    flags = (FLAG_PRIORITY if terms.priority else 0) | (FLAG_RESEND if terms.resend else 0)
    made: list[tuple[int, bytes]] = []
    for (domain, columns, _), members in groups.items():
        partition, _, lane = _domain(domain, keyring.pepper, keyring.lane)
        rows = [Row(p.local, p.subject, p.pseudonym, p.opens, p.clicks, p.values) for p in members]
        for start, end, contents in packed(Contents(domain, list(columns), rows)):
            data = build_packed(
                key, key_id, terms.job, partition, lane, end - start, contents, expires_at=terms.expires_at, flags=flags
            )
            made.append((_due(terms, members[start], now_us), data))
    return made


def _due(terms: Terms, person: Person, now_us: int) -> int:
    """When somebody may be written to first, 0 for now. A rate counts the hours in which the window is open."""
    if terms.rate:
        return after(terms.due, person.place / terms.rate, terms.window, max(terms.due, terms.expires_at))
    wait = opens_in(max(terms.due, now_us), terms.window)
    return max(terms.due, now_us) + round(wait * SECOND_US) if wait else terms.due
