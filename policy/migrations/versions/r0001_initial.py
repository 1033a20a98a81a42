"""0001: the tables of the first release, written out: a released revision never changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SMALL = sa.SmallInteger().with_variant(sa.Integer(), "sqlite")
INT = sa.Integer()
TEXT = sa.Text()
BLOB = sa.LargeBinary()


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("number", INT, primary_key=True),
        sa.Column("name", TEXT, unique=True, nullable=False),
        sa.Column("display_name", TEXT, nullable=False),
        sa.Column("postal_address", TEXT, nullable=False),
        sa.Column("website", TEXT, nullable=False),
        sa.Column("privacy_url", TEXT, nullable=False),
        sa.Column("state", TEXT, sa.CheckConstraint("state in ('active', 'frozen')", name="state"), nullable=False),
        sa.Column("opens_mode", SMALL, nullable=False),
        sa.Column("clicks_mode", SMALL, nullable=False),
        sa.Column("created", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "audit",
        sa.Column("seq", BIG, primary_key=True),
        sa.Column("at", BIG, nullable=False),
        sa.Column("actor", TEXT, nullable=False),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("object_ref", TEXT, nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("result", TEXT, nullable=False),
        sa.Column("prev", BLOB, nullable=False),
        sa.Column("hash", BLOB, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "consent",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("purpose", TEXT, nullable=False),
        sa.Column("basis", TEXT, nullable=False),
        sa.Column("wording", TEXT, nullable=False),
        sa.Column("source", TEXT, nullable=False),
        sa.Column("given_at", BIG, nullable=False),
        sa.Column("recorded_at", BIG, nullable=False),
        sa.Column("withdrawn", SMALL, nullable=False),
        sa.Column("expires_at", BIG, nullable=True),
        sa.UniqueConstraint("subject", "purpose", "given_at", "withdrawn"),
        sqlite_strict=True,
    )
    op.create_index("ix_consent_recorded_at", "consent", ["recorded_at"])
    op.create_table(
        "counter",
        sa.Column("job", BIG, primary_key=True, autoincrement=False),
        sa.Column("domain", INT, primary_key=True, autoincrement=False),
        sa.Column("kind", SMALL, primary_key=True, autoincrement=False),
        sa.Column("reason", SMALL, primary_key=True, autoincrement=False),
        sa.Column("n", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "cursor",
        sa.Column("stream", TEXT, primary_key=True),
        sa.Column("last_id", TEXT, nullable=False),
        sqlite_strict=True,
    )
    op.create_table(
        "domain",
        sa.Column("number", INT, primary_key=True),
        sa.Column("name", TEXT, unique=True, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "history",
        sa.Column("job", BIG, primary_key=True, autoincrement=False),
        sa.Column("mref", BIG, primary_key=True, autoincrement=False),
        sa.Column("attempt", INT, primary_key=True, autoincrement=False),
        sa.Column("kind", SMALL, primary_key=True, autoincrement=False),
        sa.Column("at", BIG, nullable=False),
        sa.Column("day", INT, nullable=False),
        sa.Column("reason", SMALL, nullable=False),
        sa.Column("code", SMALL, nullable=False),
        sa.Column("enhanced", TEXT, nullable=False),
        sa.Column("note", BLOB, nullable=True),
        sqlite_strict=True,
    )
    op.create_index("ix_history_day", "history", ["day"])
    op.create_table(
        "hit",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("job", BIG, nullable=False),
        sa.Column("mref", BIG, nullable=False),
        sa.Column("kind", SMALL, nullable=False),
        sa.Column("link", INT, nullable=False),
        sa.Column("hour", INT, nullable=False),
        sa.Column("day", INT, nullable=False),
        sa.Column("visitor", SMALL, nullable=False),
        sa.Column("mode", SMALL, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("ix_hit_day", "hit", ["day"])
    op.create_index("ix_hit_job_mref", "hit", ["job", "mref"])
    op.create_table(
        "hit_counter",
        sa.Column("job", BIG, primary_key=True, autoincrement=False),
        sa.Column("link", INT, primary_key=True, autoincrement=False),
        sa.Column("kind", SMALL, primary_key=True, autoincrement=False),
        sa.Column("visitor", SMALL, primary_key=True, autoincrement=False),
        sa.Column("n", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "last_open",
        sa.Column("job", BIG, primary_key=True, autoincrement=False),
        sa.Column("mref", BIG, primary_key=True, autoincrement=False),
        sa.Column("day", INT, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("ix_last_open_day", "last_open", ["day"])
    op.create_table(
        "message",
        sa.Column("job", BIG, primary_key=True, autoincrement=False),
        sa.Column("mref", BIG, primary_key=True, autoincrement=False),
        sa.Column("kind", SMALL, nullable=False),
        sa.Column("reason", SMALL, nullable=False),
        sa.Column("domain", INT, nullable=False),
        sa.Column("code", SMALL, nullable=False),
        sa.Column("enhanced", TEXT, nullable=False),
        sa.Column("attempts", INT, nullable=False),
        sa.Column("at", BIG, nullable=False),
        sa.Column("day", INT, nullable=False),
        sa.Column("pseudonym", BIG, nullable=False),
        sa.Column("tag_sealed", BLOB, nullable=True),
        sa.Column("tls", SMALL, nullable=False),
        sa.Column("note", BLOB, nullable=True),
        sqlite_strict=True,
    )
    op.create_index("ix_message_day", "message", ["day"])
    op.create_index("ix_message_pseudonym", "message", ["pseudonym"])
    op.create_table(
        "negative",
        sa.Column("seq", BIG, primary_key=True),
        sa.Column("subject", BIG, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("since", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_index("ix_negative_subject", "negative", ["subject"])
    op.create_table(
        "suppression",
        sa.Column("tag", BLOB, primary_key=True),
        sa.Column("scope", SMALL, primary_key=True, autoincrement=False),
        sa.Column("scope_id", BIG, primary_key=True, autoincrement=False),
        sa.Column("reason", TEXT, primary_key=True),
        sa.Column("partition", SMALL, nullable=False),
        sa.Column("source", TEXT, nullable=False),
        sa.Column("created", BIG, nullable=False),
        sa.Column("expires", BIG, nullable=True),
        sa.CheckConstraint("scope between 1 and 4", name="scope"),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("ix_suppression_expires", "suppression", ["expires"])
    op.create_index("ix_suppression_partition_tag", "suppression", ["partition", "tag"])
    op.create_table(
        "list",
        sa.Column("number", INT, primary_key=True),
        sa.Column("account", INT, sa.ForeignKey("account.number"), nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("display_name", TEXT, nullable=False),
        sa.UniqueConstraint("account", "name"),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "subject",
        sa.Column("number", BIG, primary_key=True, autoincrement=False),
        sa.Column("account", INT, sa.ForeignKey("account.number"), nullable=False),
        sa.Column("tag", BLOB, nullable=False),
        sa.Column("partition", SMALL, nullable=False),
        sa.Column("address", BLOB, nullable=False),
        sa.Column("key", BLOB, nullable=False),
        sa.Column("kek_id", INT, nullable=False),
        sa.Column("created", BIG, nullable=False),
        sa.UniqueConstraint("account", "tag"),
        sqlite_strict=True,
    )
    op.create_index("ix_subject_kek_id", "subject", ["kek_id"])
    op.create_index("ix_subject_tag", "subject", ["tag"])
    op.create_table(
        "topic",
        sa.Column("number", INT, primary_key=True),
        sa.Column("account", INT, sa.ForeignKey("account.number"), nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("display_name", TEXT, nullable=False),
        sa.UniqueConstraint("account", "name"),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "job",
        sa.Column("number", BIG, primary_key=True),
        sa.Column("account", INT, sa.ForeignKey("account.number"), nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("hash", BLOB, nullable=False),
        sa.Column(
            "state",
            TEXT,
            sa.CheckConstraint(
                "state in ('accepted', 'expanding', 'sending', 'paused', 'done', 'cancelled', 'expired', 'lost',"
                " 'rejected')",
                name="state",
            ),
            nullable=False,
        ),
        sa.Column(
            "kind", TEXT, sa.CheckConstraint("kind in ('campaign', 'transactional')", name="kind"), nullable=False
        ),
        sa.Column("list", INT, sa.ForeignKey("list.number"), nullable=True),
        sa.Column("topic", INT, sa.ForeignKey("topic.number"), nullable=True),
        sa.Column("legal_basis", TEXT, nullable=False),
        sa.Column(
            "in_doubt", TEXT, sa.CheckConstraint("in_doubt in ('hold', 'resend')", name="in_doubt"), nullable=False
        ),
        sa.Column("priority", SMALL, nullable=False),
        sa.Column("wait", SMALL, nullable=False),
        sa.Column("opens_mode", SMALL, nullable=False),
        sa.Column("clicks_mode", SMALL, nullable=False),
        sa.Column("subject_sealed", BLOB, nullable=True),
        sa.Column("payload", BLOB, nullable=True),
        sa.Column("job_key", BLOB, nullable=True),
        sa.Column("created_at", BIG, nullable=False),
        sa.Column("accepted_at", BIG, nullable=False),
        sa.Column("send_at", BIG, nullable=True),
        sa.Column("expires_at", BIG, nullable=True),
        sa.Column("chunks_expected", INT, nullable=False),
        sa.Column("rows_submitted", BIG, nullable=True),
        sa.Column("done_at", BIG, nullable=True),
        sa.Column("reason", TEXT, nullable=True),
        sa.UniqueConstraint("account", "job_id"),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_state", "job", ["state"])
    op.create_table(
        "job_chunk",
        sa.Column("job", BIG, sa.ForeignKey("job.number"), primary_key=True, autoincrement=False),
        sa.Column("number", INT, primary_key=True, autoincrement=False),
        sa.Column("hash", BLOB, nullable=False),
        sa.Column("rows", INT, nullable=False),
        sa.Column("expanded_at", BIG, nullable=True),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "job_view",
        sa.Column("job", BIG, sa.ForeignKey("job.number"), primary_key=True, autoincrement=False),
        sa.Column("html", TEXT, nullable=False),
        sqlite_strict=True,
    )
    op.create_table(
        "link",
        sa.Column("job", BIG, sa.ForeignKey("job.number"), primary_key=True, autoincrement=False),
        sa.Column("number", INT, primary_key=True, autoincrement=False),
        sa.Column("url", TEXT, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
