"""0007: whether anybody was erased, and who of a chunk, is asked of an index that holds only them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    erased = sa.text("reason = 'erasure'")
    op.create_index("ix_suppression_erased", "suppression", ["tag"], sqlite_where=erased, postgresql_where=erased)
