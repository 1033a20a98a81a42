"""Who read whose data, for what: asked before it is shown, and written down without saying what it was (P-03, P-38).

Whoever reads data of people through us (a command, the desk, an export) asks `op_read_log` first and shows nothing
before the answer. The answer is yes when the registry of purposes says so of each person (`policy.purposes`), and the
reader stays below what their role may read in a day.

    1 whose     by tag at every account (or one), by subject number, or nobody by name: a number of people
    2 allowed   purpose x field class, data older than the purpose, consent, figures of enough people; no: denied
    3 limit     people this actor has read today (UTC) and this read, against the role's limit; over it: denied
    4 written   a row of the table reading for each person, one for a group; a bypass of consent is a line of the
                audit chain too (P-32)

Laws:
- no read without its row, and a denied one leaves a line in the audit chain instead: both are committed before the
  answer;
- rows and lines hold numbers, words of closed vocabularies and keyed hashes. The query is a hash under a key, so that
  the same question is seen again and nobody can try addresses;
- the person is told when and for what they were looked up, not by whom (C-579/21 *Pankki S*, `consultations`).

An actor is ``role/reference``: the reference is the login, keyed (`actor_of`).

Known limits: who may open the socket may say any role; telling people apart is the matter of accounts and the desk.
What somebody reads past us, with the keys and an SQL shell, is seen by nobody here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from sqlalchemy import Connection, func, insert, or_, select

from policy import audit, consent, purposes
from policy.instants import day_of
from policy.jobs import Refused
from policy.keys import Keyring
from policy.purposes import Registry
from policy.schema import account as account_table
from policy.schema import audit as audit_table
from policy.schema import reading as table
from policy.schema import subject as subject_table
from policy.store import Store

# People a day, by role; 0: no limit. The officer carries out rights, of everybody if need be; rows tell how many.
LIMITS: Final[Mapping[str, int]] = {"support": 200, "operator": 2000, "officer": 0, "service": 0}
BYPASS: Final = "consent-bypass"
DENIED: Final = "read-denied"
_ACTOR: Final = re.compile(r"(?P<role>[a-z]+)(/[0-9a-f]{16})?")
_WHAT: Final = re.compile(r"[a-z][a-z0-9 -]{0,39}")
_HASH_BYTES: Final = 16


class ReadDenied(Refused):
    """kind "denied"; the text names the rule, never the person."""

    def __init__(self, reason: str) -> None:
        super().__init__("denied", f"reading is not allowed: {_TEXTS.get(reason, reason)}")
        self.reason = reason


_TEXTS: Final = {
    "unknown-purpose": "no such purpose is declared (policy/purposes.toml)",
    "not-yet": "the purpose is declared for later",
    "field-class": "the purpose has no use for such fields",
    "no-consent": "it needs consent, and there is none; where a law says so, name it (legal_basis_ref)",
    "older-than-purpose": "the data are older than the purpose, and nobody agreed since",
    "too-few-people": "a figure about so few people would tell of each of them",
    "over-limit": "the role's limit of people a day is reached",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One read. what: the command or call, in plain words; tag (all accounts, or one) or subject say whose, neither a
    group of `count` people; query: of `query_hash`, b"" for none."""

    actor: str
    purpose: str
    what: str
    field_class: str = "C2"
    tag: bytes = b""
    subject: int = 0
    account: int = 0
    count: int = 1
    query: bytes = b""
    legal_basis_ref: str = ""

    @property
    def role(self) -> str:
        return self.actor.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """denied: why not, "" when it was allowed; rows: how many were written."""

    denied: str = ""
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Consultation:
    """One reading as its subject is told. count: people read with it; 0 where nothing was known."""

    at: int
    account: int
    purpose: str
    what: str
    count: int


class ReadingOperations:
    """limits: people a day by role; a role that is not in it reads nothing."""

    def __init__(
        self,
        store: Store,
        clock: Callable[[], int],
        *,
        limits: Mapping[str, int] = LIMITS,
        registry: Callable[[], Registry] = purposes.registry,
    ) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._registry = registry
        self.denied = 0

    async def op_read_log(
        self,
        actor: str,
        purpose: str,
        what: str,
        field_class: str = "C2",
        tag: bytes = b"",
        subject: int = 0,
        account: int = 0,
        count: int = 1,
        query: bytes = b"",
        legal_basis_ref: str = "",
    ) -> int:
        """Rows written: the read may go on. Raises ReadDenied, or ValueError for what is no question."""
        asked = Asked(actor, purpose, what, field_class, tag, subject, account, count, query, legal_basis_ref)
        now = self._clock()
        # a denied read commits its line too, so it is told after the transaction and not by an error inside
        answer = await self._store.write(lambda conn: enter(conn, asked, self._limits, self._registry(), now))
        if answer.denied:
            self.denied += 1
            raise ReadDenied(answer.denied)
        return answer.rows

    async def op_bypasses(self, since: int = 0) -> dict[str, int]:
        """For the transparency report: how often consent was passed over, by law and case (P-32)."""
        return await self._store.write(lambda conn: bypasses(conn, since))


def enter(conn: Connection, asked: Asked, limits: Mapping[str, int], registry: Registry, now: int) -> Answer:
    """Judge a read and write it down. Raises ValueError for what is no question."""
    _check(asked)
    people = _people(conn, asked)
    bypassed = False
    denied = ""
    for number, _, created in people or [(0, 0, None)]:
        verdict = registry.allows(
            asked.purpose, asked.field_class, now, collected=created,
            consent=consent.since(conn, number, asked.purpose, now) if number else None,
            legal_basis_ref=asked.legal_basis_ref,
        )  # fmt: skip
        if not verdict:
            denied = denied or verdict.reason
        bypassed = bypassed or verdict.reason == "bypass"
    wanted = len(people) or (0 if asked.tag else asked.count)  # one person asked for, whom no account knows: nobody
    if not denied and asked.field_class == "C0" and not people and not asked.tag:
        denied = registry.allows_figure(asked.purpose, asked.count, now).reason  # a group of few names its members
    if not denied and _is_over(conn, asked, wanted, limits, now):
        denied = "over-limit"
    if denied:
        return _deny(conn, asked, registry, denied, now)
    if bypassed:
        audit.append(conn, now, asked.actor, BYPASS, f"law/{asked.legal_basis_ref}", asked.purpose, "done")
    rows = [(number, account, 1) for number, account, _ in people] or [(0, asked.account, wanted)]
    conn.execute(
        insert(table),
        [
            {
                "at": now, "day": day_of(now), "actor": asked.actor, "purpose": asked.purpose, "what": asked.what,
                "subject": number, "account": account, "count": count, "query": asked.query,
            }
            for number, account, count in rows
        ],
    )  # fmt: skip
    return Answer(rows=len(rows))


def enter_each(
    conn: Connection, asked: Sequence[Asked], limits: Mapping[str, int], registry: Registry, now: int
) -> Answer:
    """One question that is answered about several people: all of it is written down, or a line that says why not."""
    rows = 0
    whole = conn.begin_nested()
    for one in asked:
        answer = enter(conn, one, limits, registry, now)
        if answer.denied:
            whole.rollback()  # the others are not shown either: no row may say that they were
            return _deny(conn, one, registry, answer.denied, now)
        rows += answer.rows
    whole.commit()
    return Answer(rows=rows)


def consultations(conn: Connection, accounts_of: Mapping[int, int]) -> list[Consultation]:
    """When and for what somebody was looked up, by subject number and their account there; reads of groups of an
    account, or of all, tell that they were among so many."""
    groups = (table.c.subject == 0) & (table.c["count"] > 0) & table.c.account.in_([0, *set(accounts_of.values())])
    mine = select(table).where(or_(table.c.subject.in_(sorted(accounts_of)), groups)).order_by(table.c.at, table.c.id)
    return [
        Consultation(row.at, row.account, row.purpose, row.what, row._mapping["count"]) for row in conn.execute(mine)
    ]


def bypasses(conn: Connection, since: int = 0) -> dict[str, int]:
    """How often consent was passed over, by law and case."""
    counted = (
        select(audit_table.c.object_ref, func.count())
        .where(audit_table.c.action == BYPASS, audit_table.c.at >= since)
        .group_by(audit_table.c.object_ref)
        .order_by(audit_table.c.object_ref)
    )
    return {str(ref).removeprefix("law/"): int(n) for ref, n in conn.execute(counted)}


def actor_of(keyring: Keyring, role: str, login: str) -> str:
    """``role/reference``: the same login has the same reference, and nobody without the key learns which login."""
    return f"{role}/{_keyed(keyring, b'sp-actor', login.encode())[:8].hex()}"


def query_hash(keyring: Keyring, *parts: str) -> bytes:
    """What was asked, so that the same question is seen again."""
    return _keyed(keyring, b"sp-query", "\0".join(parts).encode())


def _keyed(keyring: Keyring, person: bytes, data: bytes) -> bytes:
    return blake2b(data, digest_size=_HASH_BYTES, key=keyring.service, person=person).digest()


def _deny(conn: Connection, asked: Asked, registry: Registry, reason: str, now: int) -> Answer:
    declared = asked.purpose if asked.purpose in registry.purposes else "unknown"  # else it is somebody's free text
    audit.append(conn, now, asked.actor, DENIED, f"reading/{asked.what}", declared, reason)
    return Answer(reason)


def _check(asked: Asked) -> None:
    if not _ACTOR.fullmatch(asked.actor):
        raise ValueError("an actor is a role, or role/reference: never a name")
    if not _WHAT.fullmatch(asked.what):
        raise ValueError("what was read is said in a few plain words")
    if asked.field_class not in purposes.CLASSES:
        raise ValueError(f"a field class is one of {', '.join(purposes.CLASSES)}")
    if asked.count < 0 or len(asked.query) not in (0, _HASH_BYTES) or (asked.tag and asked.subject):
        raise ValueError("a read is of a tag, of a subject or of a number of people, its query a keyed hash")


def _people(conn: Connection, asked: Asked) -> list[tuple[int, int, int | None]]:
    """(subject, account, when their data began to be kept). An erased person has a number and nothing else."""
    known = select(subject_table.c.number, subject_table.c.account, subject_table.c.created)
    if asked.subject:
        row = conn.execute(known.where(subject_table.c.number == asked.subject)).one_or_none()
        return [(asked.subject, asked.account, None) if row is None else (row.number, row.account, row.created)]
    if not asked.tag:
        return []
    if asked.account:
        mine = known.where(subject_table.c.account == asked.account, subject_table.c.tag == asked.tag)
    else:  # account by account, over the index of (account, tag)
        mine = known.where(
            subject_table.c.account.in_(select(account_table.c.number)), subject_table.c.tag == asked.tag
        )
    return [(row.number, row.account, row.created) for row in conn.execute(mine.order_by(subject_table.c.account))]


def _is_over(conn: Connection, asked: Asked, wanted: int, limits: Mapping[str, int], now: int) -> bool:
    limit = limits.get(asked.role)
    if limit is None:
        return True
    if limit == 0:
        return False
    today = select(func.coalesce(func.sum(table.c["count"]), 0))
    read = conn.execute(today.where(table.c.day == day_of(now), table.c.actor == asked.actor)).scalar_one()
    return int(read) + wanted > limit
