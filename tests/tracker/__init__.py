"""The tracker's rooms alone: twins in memory where only its own behaviour counts, real Valkey and SQLite where not."""
