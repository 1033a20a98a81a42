"""0003: two indexes less for each new subject, one less for each row of the ledger, and that one grows day by day.

`policy.schema` says beside each table which questions the ones that stay answer.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_subject_tag", table_name="subject")
    op.drop_index("ix_subject_kek_id", table_name="subject")
    op.drop_index("ix_message_pseudonym", table_name="message")
    op.drop_index("ix_message_day", table_name="message")
    op.create_index("ix_message_day_pseudonym", "message", ["day", "pseudonym"])
