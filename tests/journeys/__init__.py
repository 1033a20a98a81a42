"""Journeys: several rooms together, on a real Valkey and a real SQLite in a temporary folder, over real sockets."""
