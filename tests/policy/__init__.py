"""The ground floor's tests: real SQLite files, a real Valkey, no clock but an argument."""
