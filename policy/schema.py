"""Every SQL table there is: each column with what it holds of a person, why, and its retention class (decision 14).

Law: a column without ``personal``, ``purpose`` and ``retention`` does not exist, and there are no JSON blobs: a
free-form column defeats the inventory (P-01). A person is a subject number, a weekly pseudonym or a keyed tag;
the one address is sealed in `subject` (decision 13). Classes R0 to R8 and RH are those of requirements 4.3.

One code path, two stores (decision 15): SQLite (STRICT tables, WAL) embedded, PostgreSQL by URL, where `message`,
`history` and `hit` are divided by day and have ``day`` in their keys (policy.partitions). One process writes
(the policy process); all others open ``mode=ro``, because SQLite before 3.51.3 can corrupt a database that two
connections checkpoint at once. The writer commits with ``synchronous=FULL``: an opt-out acknowledged is on the disk
(T11), and deletes with ``secure_delete=ON``.

Instants are integer microseconds, ``day`` columns whole days since the epoch (what the sweeps go by), references
(`mref`, `pseudonym`, `number` of a subject) signed 64-bit integers.

Known limits: readers need write permission on the folder (SQLite's shared-memory file), not on the database. Foreign
keys hold the small tables together; message, history and hit have none, they outlive or predecease their job.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.pool import StaticPool

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite knows one integer, of 64 bits; STRICT tables refuse every other name for it.
BIG = BigInteger().with_variant(Integer(), "sqlite")
SMALL = SmallInteger().with_variant(Integer(), "sqlite")
INT = Integer()
TEXT = Text()
BLOB = LargeBinary()

NONE = "none"


def _table(name: str, *parts: Any, rowid: bool = True, autoincrement: bool = False) -> Table:
    return Table(
        name, metadata, *parts, sqlite_strict=True, sqlite_with_rowid=rowid, sqlite_autoincrement=autoincrement
    )


class _Columns:
    """Makes the columns of one table, which mostly share purpose and retention class."""

    def __init__(self, purpose: str, retention: str) -> None:
        self.purpose = purpose
        self.retention = retention

    def __call__(
        self,
        name: str,
        type_: Any,
        *parts: Any,
        personal: str = NONE,
        purpose: str = "",
        retention: str = "",
        null: bool = False,
        **options: Any,
    ) -> Column[Any]:
        info = {"personal": personal, "purpose": purpose or self.purpose, "retention": retention or self.retention}
        return Column(name, type_, *parts, nullable=null, info=info, **options)


_c = _Columns("to know whose campaigns these are, and to name the sender (P-52)", "R4")
account = _table(
    "account",
    _c("number", INT, primary_key=True),
    _c("name", TEXT, unique=True),
    _c("display_name", TEXT, personal="account holder's name, when a person"),
    _c("postal_address", TEXT, personal="account holder's postal address"),
    _c("website", TEXT),
    _c("privacy_url", TEXT),
    _c("state", TEXT, CheckConstraint("state in ('active', 'frozen')", name="state")),
    _c("opens_mode", SMALL),
    _c("clicks_mode", SMALL),
    _c("created", BIG),
    autoincrement=True,
)

_c = _Columns("scope of opt-outs and consent", "R5")
list_ = _table(
    "list",
    _c("number", INT, primary_key=True),
    _c("account", INT, ForeignKey("account.number")),
    _c("name", TEXT),
    _c("display_name", TEXT),
    UniqueConstraint("account", "name"),
    autoincrement=True,  # a number is in delivered opt-out links and may never name another list
)
topic = _table(
    "topic",
    _c("number", INT, primary_key=True),
    _c("account", INT, ForeignKey("account.number")),
    _c("name", TEXT),
    _c("display_name", TEXT),
    UniqueConstraint("account", "name"),
    autoincrement=True,
)

_c = _Columns("figures per destination domain", "R3")
domain = _table(
    "domain",
    _c("number", INT, primary_key=True),
    _c("name", TEXT, unique=True, personal="a domain of one's own can name its owner"),
    autoincrement=True,
)

_c = _Columns("what an operator has halted, until it is resumed", "R3")
halt = _table(
    "halt",
    _c("account", INT, primary_key=True, autoincrement=False),  # 0: a domain
    _c("domain", TEXT, primary_key=True, personal="a domain of one's own can name its owner"),  # "": an account
    _c("lane", TEXT, personal="keyed domain reference"),
    _c("state", TEXT, CheckConstraint("state in ('paused', 'cancelled')", name="state")),
    _c("reason", TEXT, personal="as the operator gave it"),
    _c("since", BIG),
    rowid=False,
)

_c = _Columns("to carry out the job and to refuse its repetition", "R3")
job = _table(
    "job",
    _c("number", BIG, primary_key=True),  # 40 bits in tokens
    _c("account", INT, ForeignKey("account.number")),
    _c("job_id", TEXT),
    _c("hash", BLOB),
    _c(
        "state",
        TEXT,
        CheckConstraint(
            "state in ('accepted', 'expanding', 'sending', 'paused', 'done', 'cancelled', 'expired', 'lost',"
            " 'rejected')",
            name="state",
        ),
    ),
    _c("kind", TEXT, CheckConstraint("kind in ('campaign', 'transactional')", name="kind")),
    _c("list", INT, ForeignKey("list.number"), null=True),
    _c("topic", INT, ForeignKey("topic.number"), null=True),
    _c("legal_basis", TEXT, purpose="proof of the basis a campaign named (P-07)", retention="R4"),
    _c("in_doubt", TEXT, CheckConstraint("in_doubt in ('hold', 'resend')", name="in_doubt")),
    _c("priority", SMALL),
    _c("wait", SMALL),
    _c("opens_mode", SMALL),
    _c("clicks_mode", SMALL),
    _c("subject_sealed", BLOB, null=True, personal="subject line, sealed", retention="R3"),
    _c("payload", BLOB, null=True, personal="the job without its recipients, sealed", retention="R0"),
    _c("job_key", BLOB, null=True, personal="key that makes references of addresses, sealed"),
    _c("created_at", BIG),
    _c("accepted_at", BIG),
    _c("send_at", BIG, null=True),
    _c("expires_at", BIG, null=True),
    _c("chunks_expected", INT),
    _c("rows_submitted", BIG, null=True),  # unknown until every chunk is expanded
    _c("done_at", BIG, null=True),
    _c("reason", TEXT, null=True),
    UniqueConstraint("account", "job_id"),
    Index(None, "state"),
    Index(None, "done_at"),
    autoincrement=True,
)
job_chunk = _table(
    "job_chunk",
    _c("job", BIG, ForeignKey("job.number"), primary_key=True, autoincrement=False),
    _c("number", INT, primary_key=True, autoincrement=False),
    _c("hash", BLOB),
    _c("rows", INT),
    _c("expanded_at", BIG, null=True),
    rowid=False,
)
link = _table(
    "link",
    _c("job", BIG, ForeignKey("job.number"), primary_key=True, autoincrement=False),
    _c("number", INT, primary_key=True, autoincrement=False),
    _c("url", TEXT, purpose="where a tracked link leads", retention="R2"),
    rowid=False,
)
job_view = _table(
    "job_view",
    _c("job", BIG, ForeignKey("job.number"), primary_key=True, autoincrement=False),
    _c("html", TEXT, purpose="the campaign as a web page, without anybody's fields", retention="R2"),
)

_c = _Columns("figures of a job, rolled up when its ledger rows are written", "R3")
counter = _table(
    "counter",
    _c("job", BIG, primary_key=True, autoincrement=False),
    _c("domain", INT, primary_key=True, autoincrement=False),  # 0: an address that has no domain (refused, invalid)
    _c("kind", SMALL, primary_key=True, autoincrement=False),
    _c("reason", SMALL, primary_key=True, autoincrement=False),
    _c("n", BIG),
    rowid=False,
)

_c = _Columns("the one place of identity: whom a pseudonym means", "R4")
subject = _table(
    "subject",
    _c("number", BIG, primary_key=True, autoincrement=False, personal="random number of a person at an account"),
    _c("account", INT, ForeignKey("account.number")),
    _c("tag", BLOB, personal="keyed suppression tag"),
    _c("partition", SMALL),
    _c("address", BLOB, personal="address, sealed under the subject's key"),
    _c("key", BLOB, personal="the subject's key, wrapped"),
    _c("kek_id", INT),
    _c("created", BIG),
    # the only index: a new subject writes one random page here and one in the table. Who is meant by a tag at any
    # account is asked account by account (`vault.find`), whom a week's key wraps by reading the table, once a week.
    UniqueConstraint("account", "tag"),
)

_c = _Columns("proof of consent and of its withdrawal (P-07)", "R4")
consent = _table(
    "consent",
    _c("id", BIG, primary_key=True),
    _c("subject", BIG, personal="subject number"),
    _c("purpose", TEXT),
    _c("basis", TEXT),
    _c("wording", TEXT, personal="as the account holder gave it"),
    _c("source", TEXT, personal="as the account holder gave it"),
    _c("given_at", BIG, personal="when the person agreed or withdrew"),
    _c("recorded_at", BIG),
    _c("withdrawn", SMALL),
    _c("expires_at", BIG, null=True),
    # what ends is looked for by its end, and is rare
    Index(
        "ix_consent_expires_at",
        "expires_at",
        sqlite_where=text("expires_at IS NOT NULL"),
        postgresql_where=text("expires_at IS NOT NULL"),
    ),
    # one act an instant and purpose: the evidence a job repeats with every campaign is kept once
    UniqueConstraint("subject", "purpose", "given_at", "withdrawn"),
    Index(None, "recorded_at"),
)

_c = _Columns("whose visits are not remembered (decision 12)", "R5")
negative = _table(
    "negative",
    _c("seq", BIG, primary_key=True),
    _c("subject", BIG, personal="subject number"),
    _c("reason", TEXT),
    _c("since", BIG),
    Index(None, "subject"),
    autoincrement=True,
)

_c = _Columns("not to write to somebody again; survives erasure (P-22)", "R5")
suppression = _table(
    "suppression",
    _c("tag", BLOB, primary_key=True, personal="keyed suppression tag"),
    _c("scope", SMALL, primary_key=True, autoincrement=False),
    _c("scope_id", BIG, primary_key=True, autoincrement=False),
    _c("reason", TEXT, primary_key=True),
    _c("partition", SMALL),
    _c("source", TEXT),
    _c("created", BIG),
    _c("expires", BIG, null=True),
    CheckConstraint("scope between 1 and 4", name="scope"),
    Index(None, "partition", "tag"),
    Index(None, "expires"),
    # asked for with every chunk of an audience: who may not be made a subject again
    Index(
        "ix_suppression_erased",
        "tag",
        sqlite_where=text("reason = 'erasure'"),
        postgresql_where=text("reason = 'erasure'"),
    ),
    rowid=False,
)

_c = _Columns("what happened to each recipient of a job", "R3")
# With rowids on purpose: rows go to the end of the table and only the narrow index is written at random places, which
# measured half the cost of a row once the table has 300,000 (34 us against 18 us; references are random by design).
message = _table(
    "message",
    _c("job", BIG, primary_key=True, autoincrement=False),
    _c("mref", BIG, primary_key=True, autoincrement=False, personal="keyed reference of a message"),
    _c("kind", SMALL),
    _c("reason", SMALL),
    _c("domain", INT, personal="number of the destination domain"),
    _c("code", SMALL),
    _c("enhanced", TEXT),
    _c("attempts", INT),
    _c("at", BIG),
    _c("day", INT),
    _c("pseudonym", BIG, personal="weekly pseudonym"),
    _c("tag_sealed", BLOB, null=True, personal="suppression tag, sealed", purpose="complaints and late bounces"),
    _c("tls", SMALL),
    _c("note", BLOB, null=True, personal="reply text, sealed: it may quote the address (P-12)"),
    # One index for two questions. Sweeps go by day. A person's rows: a pseudonym belongs to a known week, so they are
    # looked for in the days from that week on. By pseudonym first, every row would be written at a random place of a
    # year's rows; so it is one of today's, which fit into memory.
    Index(None, "day", "pseudonym"),
)
history = _table(
    "history",
    _c("job", BIG, primary_key=True, autoincrement=False),
    _c("mref", BIG, primary_key=True, autoincrement=False, personal="keyed reference of a message"),
    _c("attempt", INT, primary_key=True, autoincrement=False),
    _c("kind", SMALL, primary_key=True, autoincrement=False),
    _c("at", BIG),
    _c("day", INT),
    _c("reason", SMALL),
    _c("code", SMALL),
    _c("enhanced", TEXT),
    _c("note", BLOB, null=True, personal="reply text, sealed: it may quote the address (P-12)"),
    Index(None, "day"),
)

_c = _Columns("opens and clicks of people who agreed to it (mode individual)", "R2")
hit = _table(
    "hit",
    _c("id", BIG, primary_key=True),
    _c("job", BIG),
    _c("mref", BIG, personal="keyed reference of a message"),
    _c("kind", SMALL),
    _c("link", INT),
    _c("hour", INT, personal="when somebody read, to the hour"),
    _c("day", INT),
    _c("visitor", SMALL),
    _c("mode", SMALL),
    Index(None, "job", "mref"),
    Index(None, "day"),
)
_c = _Columns("opens and clicks in sum (mode aggregate and above)", "R3")
hit_counter = _table(
    "hit_counter",
    _c("job", BIG, primary_key=True, autoincrement=False),
    _c("link", INT, primary_key=True, autoincrement=False),  # -1: an open
    _c("kind", SMALL, primary_key=True, autoincrement=False),
    _c("visitor", SMALL, primary_key=True, autoincrement=False),
    _c("n", BIG),
    rowid=False,
)
_c = _Columns("whether a mailbox is still read (mode deliverability): the last day only, overwritten", "R2")
last_open = _table(
    "last_open",
    _c("job", BIG, primary_key=True, autoincrement=False),
    _c("mref", BIG, primary_key=True, autoincrement=False, personal="keyed reference of a message"),
    _c("day", INT, personal="last day of reading"),
    Index(None, "day"),
    rowid=False,
)

_c = _Columns("how far each event stream is in the ledger (T9)", "R0")
cursor = _table(
    "cursor",
    _c("stream", TEXT, primary_key=True),
    _c("last_id", TEXT),
)

_c = _Columns("who did what, without saying to whom (accountability, 5(2))", "R7")
audit = _table(
    "audit",
    _c("seq", BIG, primary_key=True),
    _c("at", BIG),
    _c("actor", TEXT, personal="keyed reference of who acted"),
    _c("action", TEXT),
    _c("object_ref", TEXT, personal="keyed reference of what was acted on"),
    _c("purpose", TEXT),
    _c("result", TEXT),
    _c("prev", BLOB),
    _c("hash", BLOB),
    autoincrement=True,
)

_c = _Columns("proof for the people concerned of how far the erasure of their data is (P-17, P-54)", "R6")
erasure = _table(
    "erasure",
    _c("number", INT, primary_key=True),
    _c("subject", BIG, personal="random number of a person whose identity is gone"),
    _c("account", INT),
    _c("tag", BLOB, personal="keyed suppression tag"),
    _c("partition", SMALL),
    _c("lane", TEXT, personal="keyed domain reference"),
    _c("cause", TEXT, CheckConstraint("cause in ('request', 'minor', 'account', 'replay')", name="cause")),
    _c("state", TEXT, CheckConstraint("state in ('suppressed', 'shredded', 'purged')", name="state")),
    _c("request", INT, null=True),
    _c("begun", BIG),
    _c("shredded", BIG, null=True),
    _c("purged", BIG, null=True),
    _c("records", BIG),
    Index(None, "state"),
    Index(None, "subject"),
    Index(None, "tag"),
    autoincrement=True,
)
purge = _table(
    "purge",
    _c("erasure", INT, ForeignKey("erasure.number"), primary_key=True, autoincrement=False, retention="R0"),
    _c("job", BIG, primary_key=True, autoincrement=False, retention="R0"),
    _c("mref", BIG, primary_key=True, autoincrement=False, personal="keyed reference of a message", retention="R0"),
    rowid=False,
)

_c = _Columns("what must be kept of one person beyond its class: claims, law, a decision about them (P-21)", "RH")
hold = _table(
    "hold",
    _c("number", INT, primary_key=True),
    _c("subject", BIG, personal="subject number"),
    _c("reason", TEXT, personal="as the officer gave it"),
    _c("authority", TEXT),
    _c("actor", TEXT),
    _c("placed", BIG),
    _c("review", BIG),
    _c("released", BIG, null=True),
    Index(None, "subject"),
    autoincrement=True,
)
held = _table(
    "held",
    _c("id", BIG, primary_key=True),
    _c("hold", INT, ForeignKey("hold.number")),
    _c("place", TEXT),
    _c("day", INT),
    _c("record", BLOB, personal="copy of a record under hold, sealed"),
    _c("at", BIG),
    Index(None, "hold"),
)

_c = _Columns("proof that each class went at its boundary, once (P-10)", "R7")
sweep = _table(
    "sweep",
    _c("retention", TEXT, primary_key=True),
    _c("place", TEXT, primary_key=True),
    _c("day", INT, primary_key=True, autoincrement=False),
    _c("account", INT, primary_key=True, autoincrement=False),  # 0: all; else a class shortened by that account
    _c("rows", BIG),
    _c("digest", BLOB),
    _c("at", BIG),
    rowid=False,
)
_c = _Columns("an account may keep less than the classes allow, never more (P-10)", "R4")
shortening = _table(
    "shortening",
    _c("account", INT, ForeignKey("account.number"), primary_key=True, autoincrement=False),
    _c("retention", TEXT, primary_key=True),
    _c("days", INT, CheckConstraint("days >= 0", name="days")),
    _c("since", BIG),
    rowid=False,
)

_c = _Columns("to carry out the rights of the people concerned in time, and to prove it (P-45, P-51)", "R6")
request = _table(
    "request",
    _c("number", INT, primary_key=True),
    _c("ticket", TEXT, unique=True),
    _c(
        "kind",
        TEXT,
        CheckConstraint(
            "kind in ('access', 'rectification', 'erasure', 'restriction', 'portability', 'objection', 'withdrawal',"
            " 'minor')",
            name="kind",
        ),
    ),
    _c("role", TEXT, CheckConstraint("role in ('contact', 'holder')", name="role")),
    _c("account", INT, null=True),  # none: every account, and the platform
    _c("address", BLOB, null=True, personal="address as given, sealed; gone with the end of an erasure"),
    _c("tag", BLOB, personal="keyed suppression tag"),
    _c("partition", SMALL),
    _c("channel", TEXT, CheckConstraint("channel in ('api', 'cli', 'mail', 'letter', 'page')", name="channel")),
    _c("jurisdiction", TEXT),
    _c("state", TEXT),
    _c("identity", TEXT, CheckConstraint("identity in ('open', 'asked', 'proved', 'by-hand')", name="identity")),
    _c("details", BLOB, null=True, personal="what was asked for, sealed"),
    _c("received", BIG),
    _c("due", BIG),
    _c("extended", BIG, null=True),
    _c("closed", BIG, null=True),
    _c("outcome", TEXT),
    _c("ground", TEXT),
    Index(None, "tag"),
    Index(None, "state", "due"),
    autoincrement=True,
)
request_step = _table(
    "request_step",
    _c("request", INT, ForeignKey("request.number"), primary_key=True, autoincrement=False),
    _c("seq", INT, primary_key=True, autoincrement=False),
    _c("at", BIG),
    _c("actor", TEXT),
    _c("act", TEXT),
    _c("state", TEXT),
    _c("note", BLOB, null=True, personal="as the officer wrote it, sealed"),
    rowid=False,
)
proof = _table(
    "proof",
    _c("hash", BLOB, primary_key=True),  # of a random token that only the mailbox was sent
    _c("request", INT, ForeignKey("request.number")),
    _c("expires", BIG),
    _c("used", BIG, null=True),
    rowid=False,
)
rectification = _table(
    "rectification",
    _c("id", BIG, primary_key=True),
    _c("subject", BIG, personal="subject number"),
    _c("field", TEXT),
    _c("state", TEXT, CheckConstraint("state in ('corrected', 'contested')", name="state")),
    _c("value", BLOB, null=True, personal="the corrected value, or the note to a contested one, sealed"),
    _c("request", INT, null=True),
    _c("at", BIG),
    Index(None, "subject"),
)

_c = _Columns("who looked at whose data, why (P-38), for the account of the use (P-43)", "R6")
reading = _table(
    "reading",
    _c("id", BIG, primary_key=True),
    _c("at", BIG),
    _c("day", INT),
    _c("actor", TEXT, personal="role or keyed reference of who read"),
    _c("purpose", TEXT),
    _c("what", TEXT),
    _c("subject", BIG, personal="subject number; 0: more than one"),
    _c("account", INT),
    _c("count", INT),
    _c("query", BLOB),
    Index(None, "subject"),
    Index(None, "day"),
)
_c = _Columns("to whom else somebody's data went, on what ground (P-33, P-43)", "R6")
disclosure = _table(
    "disclosure",
    _c("id", BIG, primary_key=True),
    _c("at", BIG),
    _c("day", INT),
    _c("subject", BIG, personal="subject number; 0: of an account as a whole"),
    _c("account", INT),
    _c("recipient", TEXT),
    _c("purpose", TEXT),
    _c("basis", TEXT),
    _c("what", TEXT),
    _c("count", INT),
    _c("actor", TEXT),
    _c("gag_until", BIG, null=True),
    Index(None, "subject"),
    Index(None, "day"),
)

_c = _Columns("proof that the audit chain was not cut or rewritten", "R7")
checkpoint = _table(
    "checkpoint",
    _c("seq", BIG, primary_key=True, autoincrement=False),  # of the last line it covers
    _c("hash", BLOB),
    _c("at", BIG),
    _c("key_id", TEXT),
    _c("signature", BLOB),
    _c("exported", BIG, null=True),
)
_c = _Columns("what copies of the data exist, and how old they are (P-11)", "R7")
backup = _table(
    "backup",
    _c("number", INT, primary_key=True),
    _c("at", BIG),
    _c("digest", BLOB),
    _c("bytes", BIG),
    _c("ends", BIG),  # when it is to be destroyed
    _c("destroyed", BIG, null=True),
    autoincrement=True,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One column of the inventory. personal: what of a person it holds ("none"); retention: class R0 to R8, or RH."""

    column: str
    personal: str
    purpose: str
    retention: str


def inventory() -> Iterator[Item]:
    """``table.column`` with what it holds, why and for how long, in the order of this file."""
    for table in metadata.tables.values():
        for column in table.columns:
            info = column.info
            yield Item(f"{table.name}.{column.name}", info["personal"], info["purpose"], info["retention"])


class StoreError(Exception):
    """This store cannot be opened here."""


WAL_AUTOCHECKPOINT_PAGES = 64 * 1024 * 1024 // 4096  # ecosystem.md a: 64 MiB beats the default of 4 MiB by a third
_BUSY_TIMEOUT_MS = 30_000
_CACHE_KIB = {True: 256 * 1024, False: 32 * 1024}  # writer, reader


def open_store(url: str, *, writer: bool) -> Engine:
    """An engine over a SQLite or PostgreSQL URL (``sqlite:////data/policy.db``, ``postgresql+psycopg://…``).

    SQLite: a writer holds one connection and begins every transaction IMMEDIATE, so what it reads first it may change;
    a reader opens ``mode=ro`` and sees one snapshot a transaction. The database is made (0600) by a writer only;
    its tables by `upgrade`. PostgreSQL: the same, by an advisory lock and by REPEATABLE READ, READ ONLY.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return _open_postgresql(parsed, writer=writer)
    if parsed.database in (None, "", ":memory:"):
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    else:
        path = Path(str(parsed.database)).absolute()
        if writer:
            with suppress(FileExistsError):  # O_EXCL: closing a file that is open in SQLite here lets go of its locks
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # -wal and -shm inherit the mode
        # RFC 3986 escapes, because "?" and "#" mean something in SQLite's URI file names
        query = {"mode": "rw" if writer else "ro", "uri": "true"}
        engine = create_engine(
            URL.create("sqlite", database=path.as_uri(), query=query),
            connect_args={"check_same_thread": False, "timeout": _BUSY_TIMEOUT_MS / 1000},
            **({"pool_size": 1, "max_overflow": 0} if writer else {}),
        )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late: SELECT and DDL would stay outside
        pragmas = [f"busy_timeout={_BUSY_TIMEOUT_MS}", "foreign_keys=ON", f"cache_size=-{_CACHE_KIB[writer]}"]
        if writer:
            pragmas += [
                "journal_mode=WAL",
                "synchronous=FULL",
                "secure_delete=ON",
                f"wal_autocheckpoint={WAL_AUTOCHECKPOINT_PAGES}",
                # what a savepoint may have to bring back is kept in memory (at most the pages one transaction changes):
                # by default it goes to a file, a sixth of the writer's time, and pages outside of secure_delete's reach
                "temp_store=MEMORY",
            ]
        else:
            pragmas += ["query_only=ON"]
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine


_WRITER_LOCK = 0x73705F777269  # "sp_wri": advisory locks are numbers, one space a database


def _open_postgresql(url: URL, *, writer: bool) -> Engine:
    """Laws of `open_store` on PostgreSQL. Each transaction of a writer takes the writer's lock first (BEGIN IMMEDIATE):
    writers of several hosts take turns, and what is asked before an insert is still true at the insert (policy.drains
    needs that, where ``day`` stands in every key). The lock ends with its transaction, however that ends."""
    options: dict[str, Any] = {"pool_pre_ping": True}
    if writer:
        options |= {"pool_size": 1, "max_overflow": 0}
    try:
        engine = create_engine(url, **options)
    except ModuleNotFoundError as error:
        raise StoreError(f"PostgreSQL needs {error.name}: pip install sales-push[postgres]") from None
    if not writer:
        return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = on")  # whatever the server's own: an answer means durable (T11)
            cursor.execute(f"SET lock_timeout = {_BUSY_TIMEOUT_MS}")
        connection.commit()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")

    return engine


def upgrade(engine: Engine) -> None:
    """Bring the tables to the newest form: Alembic to head, in one transaction. A repeat does nothing."""
    from alembic import command  # a tenth of a second to import, and only the writer needs it
    from alembic.config import Config

    config = Config()
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
