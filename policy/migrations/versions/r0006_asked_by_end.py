"""0006: consents that end, jobs that have ended and erasures of a tag are found without reading their tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    ends = sa.text("expires_at IS NOT NULL")
    op.create_index("ix_consent_expires_at", "consent", ["expires_at"], sqlite_where=ends, postgresql_where=ends)
    op.create_index("ix_job_done_at", "job", ["done_at"])
    op.create_index("ix_erasure_tag", "erasure", ["tag"])
