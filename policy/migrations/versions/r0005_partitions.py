"""0005: on PostgreSQL the tables that grow with each message are partitioned by day. SQLite: nothing changes.

The key of a partitioned table must hold the column it is divided by, so ``day`` joins the primary keys; what kept a
(job, mref) unique before is asked by the writer now (policy.drains). Rows there are go to the default partitions, from
where `policy.partitions.prepare` moves them to their days.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_KEYS = {
    "message": "job, mref, day",
    "history": "job, mref, attempt, kind, day",
    "hit": "id, day",
}
_INDEXES = {
    "ix_message_day_pseudonym": ("message", ["day", "pseudonym"]),
    "ix_history_day": ("history", ["day"]),
    "ix_hit_job_mref": ("hit", ["job", "mref"]),
    "ix_hit_day": ("hit", ["day"]),
}


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in _KEYS:
        op.execute(f"ALTER TABLE {table} RENAME TO {table}_whole")
        op.execute(f"CREATE TABLE {table} (LIKE {table}_whole INCLUDING DEFAULTS) PARTITION BY RANGE (day)")
        op.execute(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT")
        op.execute(f"INSERT INTO {table} SELECT * FROM {table}_whole")
    op.execute("ALTER SEQUENCE hit_id_seq OWNED BY hit.id")
    for table, key in _KEYS.items():
        op.execute(f"DROP TABLE {table}_whole")  # with its indexes: their names are free again
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT pk_{table} PRIMARY KEY ({key})")
    for name, (table, columns) in _INDEXES.items():
        op.create_index(name, table, columns)
