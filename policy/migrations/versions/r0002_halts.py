"""0002: accounts and domains that are paused, domains that are cancelled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
INT = sa.Integer()
TEXT = sa.Text()


def upgrade() -> None:
    op.create_table(
        "halt",
        sa.Column("account", INT, primary_key=True, autoincrement=False),
        sa.Column("domain", TEXT, primary_key=True),
        sa.Column("lane", TEXT, nullable=False),
        sa.Column("state", TEXT, sa.CheckConstraint("state in ('paused', 'cancelled')", name="state"), nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("since", BIG, nullable=False),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
