"""Alembic's revisions: how a store of any earlier release becomes today's. Run by `policy.schema.upgrade` only.

Law: a revision that was released never changes, and imports nothing of `policy.schema`: it says what the tables were
on its day. A test compares the end of the chain with `policy.schema.metadata`.
"""
