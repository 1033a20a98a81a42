"""0004: the ground floor in full: erasure, holds, sweeps, rights, reading, disclosure, checkpoints, backups."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
INT = sa.Integer()
TEXT = sa.Text()
BLOB = sa.LargeBinary()


def upgrade() -> None:
    op.create_table(
        "erasure",
        sa.Column("number", INT, primary_key=True),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("account", INT, nullable=False),
        sa.Column("tag", BLOB, nullable=False),
        sa.Column("partition", SMALL, nullable=False),
        sa.Column("lane", TEXT, nullable=False),
        sa.Column(
            "cause",
            TEXT,
            sa.CheckConstraint("cause in ('request', 'minor', 'account', 'replay')", name="cause"),
            nullable=False,
        ),
        sa.Column(
            "state",
            TEXT,
            sa.CheckConstraint("state in ('suppressed', 'shredded', 'purged')", name="state"),
            nullable=False,
        ),
        sa.Column("request", INT, nullable=True),
        sa.Column("begun", BIG, nullable=False),
        sa.Column("shredded", BIG, nullable=True),
        sa.Column("purged", BIG, nullable=True),
        sa.Column("records", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_index("ix_erasure_state", "erasure", ["state"])
    op.create_index("ix_erasure_subject", "erasure", ["subject"])
    op.create_table(
        "purge",
        sa.Column("erasure", INT, sa.ForeignKey("erasure.number"), primary_key=True, autoincrement=False),
        sa.Column("job", BIG, primary_key=True, autoincrement=False),
        sa.Column("mref", BIG, primary_key=True, autoincrement=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "hold",
        sa.Column("number", INT, primary_key=True),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("authority", TEXT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("placed", BIG, nullable=False),
        sa.Column("review", BIG, nullable=False),
        sa.Column("released", BIG, nullable=True),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_index("ix_hold_subject", "hold", ["subject"])
    op.create_table(
        "held",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("hold", INT, sa.ForeignKey("hold.number"), nullable=False),
        sa.Column("place", TEXT, nullable=False),
        sa.Column("day", INT, nullable=False),
        sa.Column("record", BLOB, nullable=False),
        sa.Column("at", BIG, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("ix_held_hold", "held", ["hold"])
    op.create_table(
        "sweep",
        sa.Column("retention", TEXT, primary_key=True),
        sa.Column("place", TEXT, primary_key=True),
        sa.Column("day", INT, primary_key=True, autoincrement=False),
        sa.Column("account", INT, primary_key=True, autoincrement=False),
        sa.Column("rows", BIG, nullable=False),
        sa.Column("digest", BLOB, nullable=False),
        sa.Column("at", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "shortening",
        sa.Column("account", INT, sa.ForeignKey("account.number"), primary_key=True, autoincrement=False),
        sa.Column("retention", TEXT, primary_key=True),
        sa.Column("days", INT, sa.CheckConstraint("days >= 0", name="days"), nullable=False),
        sa.Column("since", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "request",
        sa.Column("number", INT, primary_key=True),
        sa.Column("ticket", TEXT, unique=True, nullable=False),
        sa.Column(
            "kind",
            TEXT,
            sa.CheckConstraint(
                "kind in ('access', 'rectification', 'erasure', 'restriction', 'portability', 'objection',"
                " 'withdrawal', 'minor')",
                name="kind",
            ),
            nullable=False,
        ),
        sa.Column("role", TEXT, sa.CheckConstraint("role in ('contact', 'holder')", name="role"), nullable=False),
        sa.Column("account", INT, nullable=True),
        sa.Column("address", BLOB, nullable=True),
        sa.Column("tag", BLOB, nullable=False),
        sa.Column("partition", SMALL, nullable=False),
        sa.Column(
            "channel",
            TEXT,
            sa.CheckConstraint("channel in ('api', 'cli', 'mail', 'letter', 'page')", name="channel"),
            nullable=False,
        ),
        sa.Column("jurisdiction", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column(
            "identity",
            TEXT,
            sa.CheckConstraint("identity in ('open', 'asked', 'proved', 'by-hand')", name="identity"),
            nullable=False,
        ),
        sa.Column("details", BLOB, nullable=True),
        sa.Column("received", BIG, nullable=False),
        sa.Column("due", BIG, nullable=False),
        sa.Column("extended", BIG, nullable=True),
        sa.Column("closed", BIG, nullable=True),
        sa.Column("outcome", TEXT, nullable=False),
        sa.Column("ground", TEXT, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_index("ix_request_state_due", "request", ["state", "due"])
    op.create_index("ix_request_tag", "request", ["tag"])
    op.create_table(
        "request_step",
        sa.Column("request", INT, sa.ForeignKey("request.number"), primary_key=True, autoincrement=False),
        sa.Column("seq", INT, primary_key=True, autoincrement=False),
        sa.Column("at", BIG, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("act", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("note", BLOB, nullable=True),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "proof",
        sa.Column("hash", BLOB, primary_key=True),
        sa.Column("request", INT, sa.ForeignKey("request.number"), nullable=False),
        sa.Column("expires", BIG, nullable=False),
        sa.Column("used", BIG, nullable=True),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "rectification",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("field", TEXT, nullable=False),
        sa.Column(
            "state", TEXT, sa.CheckConstraint("state in ('corrected', 'contested')", name="state"), nullable=False
        ),
        sa.Column("value", BLOB, nullable=True),
        sa.Column("request", INT, nullable=True),
        sa.Column("at", BIG, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("ix_rectification_subject", "rectification", ["subject"])
    op.create_table(
        "reading",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("at", BIG, nullable=False),
        sa.Column("day", INT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("what", TEXT, nullable=False),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("account", INT, nullable=False),
        sa.Column("count", INT, nullable=False),
        sa.Column("query", BLOB, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("ix_reading_day", "reading", ["day"])
    op.create_index("ix_reading_subject", "reading", ["subject"])
    op.create_table(
        "disclosure",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("at", BIG, nullable=False),
        sa.Column("day", INT, nullable=False),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("account", INT, nullable=False),
        sa.Column("recipient", TEXT, nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("basis", TEXT, nullable=False),
        sa.Column("what", TEXT, nullable=False),
        sa.Column("count", INT, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("gag_until", BIG, nullable=True),
        sqlite_strict=True,
    )
    op.create_index("ix_disclosure_day", "disclosure", ["day"])
    op.create_index("ix_disclosure_subject", "disclosure", ["subject"])
    op.create_table(
        "checkpoint",
        sa.Column("seq", BIG, primary_key=True, autoincrement=False),
        sa.Column("hash", BLOB, nullable=False),
        sa.Column("at", BIG, nullable=False),
        sa.Column("key_id", TEXT, nullable=False),
        sa.Column("signature", BLOB, nullable=False),
        sa.Column("exported", BIG, nullable=True),
        sqlite_strict=True,
    )
    op.create_table(
        "backup",
        sa.Column("number", INT, primary_key=True),
        sa.Column("at", BIG, nullable=False),
        sa.Column("digest", BLOB, nullable=False),
        sa.Column("bytes", BIG, nullable=False),
        sa.Column("ends", BIG, nullable=False),
        sa.Column("destroyed", BIG, nullable=True),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
