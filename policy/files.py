"""Every file there is under the data folder: its family, its owner, its class and its end (design decision 14).

Law: no file is written whose name matches no family of `CATALOGUE`, and no name holds an address or anything that can
be tested against one without a secret. A census test watches a whole campaign and names what it does not know
(tests/journeys/test_census.py). Patterns are of the path from the data folder on, with forward slashes.

Known limits: temporary folders of the system are not ours to list; nothing of this program writes there. Where
`keys_dir`, `writer_socket` and the like are set to places outside of the data folder, the names stay the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Family:
    """Files of one kind. personal: what of a person is in them; retention: requirements 4.3; end: when they go."""

    name: str
    pattern: re.Pattern[str]
    owner: str
    personal: str
    retention: str
    end: str


def _family(name: str, pattern: str, owner: str, personal: str, retention: str, end: str) -> Family:
    return Family(name, re.compile(pattern), owner, personal, retention, end)


_LIFE: Final = "life of the installation"
CATALOGUE: Final[tuple[Family, ...]] = (
    _family("ledger", r"policy\.db(-wal|-shm)?", "policy.schema", "see the SQL inventory", "R7", _LIFE),
    _family(
        "ledger, being converted", r"policy\.db-journal", "policy.schema", "as the ledger", "R0", "with its transaction"
    ),
    _family("writer's lock", r"policy\.lock", "policy.writer", "none", "R0", _LIFE),
    _family("writer's socket", r"policy\.sock", "policy.writer", "none", "R0", "with the process"),
    _family(
        "queue",
        r"valkey/appendonlydir/appendonly\.aof\.(manifest|\d+\.(base\.rdb|incr\.aof))",
        "policy.valkey",
        "see the Redis inventory",
        "R0",
        "rewritten 10 minutes after a burst at the latest",
    ),
    _family(
        "queue, being rewritten",
        r"valkey/(temp|appendonlydir/temp)[\w.-]*",
        "policy.valkey",
        "as the queue",
        "R0",
        "with the rewrite",
    ),
    _family("queue's configuration", r"valkey/valkey\.conf", "policy.valkey", "none", "R0", "written at every start"),
    _family("queue's log", r"valkey/valkey\.log", "policy.valkey", "none", "R0", _LIFE),
    _family("queue's lock", r"valkey/lock", "policy.valkey", "none", "R0", _LIFE),
    _family("queue's process", r"valkey/valkey\.(pid|sock)", "policy.valkey", "none", "R0", "with the process"),
    _family(
        "journal",
        r"journal/\d+/\d{8}\.journal",
        "engine.queue.journal",
        "job and mref",
        "R0",
        "when all in it is settled",
    ),
    _family(
        "journal, carried out",
        r"journal/\d+/\d{8}\.kept",
        "engine.queue.journal",
        "job and mref",
        "R0",
        "when the ledger has all of it",
    ),
    _family("journal's lock", r"journal/\d+/lock", "engine.queue.replay", "none", "R0", _LIFE),
    _family("vitals", r"run/[a-z]+-\d+\.(json|\d+\.new)", "policy.vitals", "none", "R0", "with the process"),
    _family(
        "keys",
        r"keys/(pepper|token|return-path|service|intake|lane|audit)\.\d+",
        "policy.keys",
        "none",
        "R5",
        "rotation",
    ),
    _family("keys, being rotated", r"keys/(pepper|token)\.\d+\.next", "policy.keys", "none", "R0", "with the rotation"),
    _family(
        "tombstones",
        r"tombstones/tombstones\.jsonl(\.head)?",
        "policy.tombstones",
        "keyed tags, subject numbers",
        "R5",
        _LIFE,
    ),
    _family(
        "backup, being made",
        r"backup/[0-9a-f]{8}-policy\.(db(-journal)?|dump)",
        "policy.backup",
        "as the ledger",
        "R0",
        "with the backup, 6 hours after a crash",
    ),
    _family(
        "restore, being made ready", r"restoring/[\w.-]+", "policy.restoring", "as the ledger", "R0", "with the restore"
    ),
    _family(
        "quarantine mark", r"quarantine\.json(\.new)?", "policy.restoring", "none", "R0", "when the replay is done"
    ),
    _family(
        "bundles",
        r"exports/export-[A-Za-z0-9-]+\.zip(\.part)?",
        "policy.bundle",
        "everything about one person, encrypted",
        "R0",
        "7 days after it was made",
    ),
    _family(
        "letters",
        r"outbox/(failed/)?\.?R-[A-Z2-9]+\.\d+\.[a-z-]+\.(eml|draft)",
        "policy.rights",
        "address, letter text, proof token, passphrase of a bundle",
        "R0",
        "when sent, 14 days at most",
    ),
    _family(
        "unsorted mail",
        r"rights-mail/\.?\d+-[0-9a-f]{8}\.(eml|draft)",
        "policy.rights",
        "mail as it came",
        "R6",
        "when read, 90 days at most",
    ),
    _family("weekly keys", r"keys/(queue|kek)\.\d+", "policy.keys", "none", "R0", "with what they seal"),
    _family("keys, being made", r"keys/\.[a-z.-]+\d+\.[0-9a-f]{8}", "policy.keys", "none", "R0", "at once"),
    _family("keys, being destroyed", r"keys/\.destroyed\.(queue|kek)\.\d+", "policy.keys", "none", "R0", "at once"),
    _family(
        "signing keys",
        r"keys/dkim/[a-z0-9.-]+\.(rsa|ed25519)\.pem",
        "engine.message.dkim",
        "none",
        "R4",
        "rotation, or the end of the account",
    ),
)


def family_of(name: str) -> Family | None:
    """The family a path from the data folder on belongs to, or None: a file that should not exist."""
    return next((family for family in CATALOGUE if family.pattern.fullmatch(name)), None)
