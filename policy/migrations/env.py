"""Alembic's door: runs the revisions on the connection that `policy.schema.upgrade` hands over, in its transaction.

There is no offline mode and no alembic.ini: an operator never runs the ``alembic`` command.
"""

from __future__ import annotations

from alembic import context

from policy.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="schema_version",
    render_as_batch=True,  # SQLite alters a column by copying its table
)
with context.begin_transaction():
    context.run_migrations()
