"""Every Redis key there is: its name, its owner, its class and its end (design decision 14).

Law: no key is named anywhere else, and no key name holds an address or anything that can be tested against one
without a secret. `CATALOGUE` is the inventory; a census test fails on a key that no entry of it matches.

A domain belongs to one of P hash tags (``{p07}``); everything one script touches lives under one tag, so the same
code runs on one server or a cluster (decision 5).
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from hashlib import blake2b

SCHEMA_VERSION = 1  # newest layout of keys, scripts and slices this program writes and understands
OLDEST_SCHEMA = 1  # oldest one it still works on; the writer raises it when no older program is at work any more
PARTITIONS = 64  # fixed by `sales-push init`, stored in META, checked at start
SUPPRESSION_BUCKETS = 1024  # a partition: 15 entries a bucket at one million, far below the listpack limit of 128

INTAKE = "salespush:{in}:jobs"
REJECTED = "salespush:{in}:rejected"
DEAD = "salespush:{in}:dead"
INTAKE_GROUP = "engine"
META = "salespush:{meta}"
HOSTS = "salespush:{meta}:hosts"
HITS = "salespush:{t}:hits"
NEGATIVE = "salespush:{t}:negative"
WAKE = "salespush:wake"  # a channel, not a key: message is the partition number, "in" for intake, or the next line
WAKE_HALTS = "halts"  # something was halted, resumed or cancelled


def partition_of(domain: str) -> int:
    """0..P-1 of an A-label domain. Unkeyed on purpose: six bits test nothing, and it may never change."""
    return blake2b(domain.encode("ascii"), digest_size=1, person=b"sp-partition").digest()[0] % PARTITIONS


def lane_ref(domain: str, key: bytes) -> str:
    """11 characters naming a domain's lane; keyed, because a personal domain can name its person."""
    return _short(blake2b(domain.encode("ascii"), digest_size=8, key=key, person=b"sp-lane").digest())


def site_ref(site: str, key: bytes) -> str:
    """11 characters naming a site (sorted MX host set, or a route)."""
    return _short(blake2b(site.encode("utf-8"), digest_size=8, key=key, person=b"sp-site").digest())


def _short(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


UNRESOLVED = "?"  # the due index of lanes whose site is not known yet


def tag_of(partition: int) -> str:
    return f"{{p{partition:02d}}}"


def prefix(partition: int) -> str:
    """What every key of a partition begins with; scripts get it as KEYS[1] and append the rest."""
    return f"sp:{{p{partition:02d}}}:"


def slice_key(partition: int, slice_id: str) -> str:
    return f"{prefix(partition)}s:{slice_id}"


def lane(partition: int, ref: str) -> str:
    return f"{prefix(partition)}l:{ref}"


def lane_sites(partition: int) -> str:
    return f"{prefix(partition)}site"


def due(partition: int, site: str, priority: bool) -> str:
    return f"{prefix(partition)}{'D' if priority else 'd'}:{site}"


def due_sites(partition: int) -> str:
    return f"{prefix(partition)}idx"


def leases(partition: int) -> str:
    return f"{prefix(partition)}lease"


def holders(partition: int) -> str:
    return f"{prefix(partition)}hold"


def counter(partition: int) -> str:
    """One hash a partition: slice ids (seq), lease tokens (tok), heartbeats (beat), the clock as last seen (at)."""
    return f"{prefix(partition)}n"


def job(partition: int, number: int) -> str:
    return f"{prefix(partition)}j:{number}"


JOB_KEYS = "sp:{p??}:[juw]:*"  # a pattern for SCAN: everything that is kept for one job


def job_key_of(name: str) -> tuple[str, int]:
    """(letter, job number) of a key that JOB_KEYS matches."""
    _, _, letter, number, *_ = name.split(":")
    return letter, int(number)


def chunks_put(partition: int, number: int) -> str:
    return f"{prefix(partition)}w:{number}"


def duplicates(partition: int, number: int, bucket: int) -> str:
    return f"{prefix(partition)}u:{number}:{bucket}"


def events(partition: int) -> str:
    return f"{prefix(partition)}ev"


def suppression(partition: int, tag: bytes) -> str:
    """The bucket of a 12-byte suppression tag: its first ten bits."""
    return f"{prefix(partition)}x:{int.from_bytes(tag[:2], 'big') >> 6}"


def halts(partition: int) -> str:
    """Set of what is halted, in the words of `policy.halts`."""
    return f"{prefix(partition)}halt"


def site_permits(site: str) -> str:
    return f"sp:{{s:{site}}}:c"


def site_rate(site: str) -> str:
    return f"sp:{{s:{site}}}:r"


def site_backoff(site: str) -> str:
    return f"sp:{{s:{site}}}:b"


def stream_of_chunks(number: int) -> str:
    """Sealed chunks of a job that is not due for more than an hour (decision 3)."""
    return f"salespush:{{in}}:held:{number}"


def job_status(account: str, job_id: str) -> str:
    """What a producer reads of its job (T0). Names are hashed, not hidden: unkeyed, so that producers can ask, and
    without our usual personalisation, so that ``b2sum -l 128`` makes the name too."""
    named = account.encode("utf-8") + b"\0" + job_id.encode("utf-8")
    return f"salespush:{{in}}:status:{_short(blake2b(named, digest_size=16).digest())}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One family of keys. personal: what of a person is in it; retention: requirements 4.3; end: when it goes."""

    name: str
    pattern: re.Pattern[str]
    owner: str
    personal: str
    retention: str
    end: str


def _entry(name: str, pattern: str, owner: str, personal: str, retention: str, end: str) -> Entry:
    return Entry(name, re.compile(pattern), owner, personal, retention, end)


_P = r"sp:\{p\d\d\}:"
_S = r"sp:\{s:[A-Za-z0-9_-]{11}\}:"
CATALOGUE: tuple[Entry, ...] = (
    _entry(
        "intake",
        r"salespush:\{in\}:jobs",
        "engine.campaign",
        "addresses until acceptance",
        "R0",
        "deleted after expansion, append-only file rewritten within 10 minutes",
    ),
    _entry(
        "rejected", r"salespush:\{in\}:rejected", "engine.campaign", "sealed payload", "R0", "capped at 10,000, 30 days"
    ),
    _entry("dead", r"salespush:\{in\}:dead", "engine.campaign", "sealed payload", "R0", "capped at 10,000, 30 days"),
    _entry(
        "held chunks", r"salespush:\{in\}:held:\d+", "engine.campaign", "sealed chunks", "R0", "an hour before send_at"
    ),
    _entry(
        "job status",
        r"salespush:\{in\}:status:[A-Za-z0-9_-]{22}",
        "policy.statuses, engine.campaign",
        "none",
        "R0",
        "90 days after the last change, by expiry",
    ),
    _entry("meta", r"salespush:\{meta\}", "policy.writer", "none", "R0", "life of the installation"),
    _entry("hosts", r"salespush:\{meta\}:hosts", "policy.hosts", "none", "R0", "orderly end, or `host forget`"),
    _entry("hits", r"salespush:\{t\}:hits", "tracker.recorder", "job and mref", "R0", "drained into the ledger"),
    _entry(
        "negative list",
        r"salespush:\{t\}:negative",
        "policy.negative",
        "subject number",
        "R5",
        "capped; SQL is the truth",
    ),
    _entry("slice", _P + r"s:[0-9a-z]+", "engine.queue", "sealed recipients", "R0", "when every recipient is settled"),
    _entry("lane", _P + r"l:[A-Za-z0-9_-]{11}", "engine.queue", "keyed domain reference", "R0", "with its last slice"),
    _entry("lane sites", _P + r"site", "engine.queue", "keyed domain references", "R0", "with the lane"),
    _entry("due index", _P + r"[dD]:(\?|[A-Za-z0-9_-]{11})", "engine.queue", "none", "R0", "with its last slice"),
    _entry("due sites", _P + r"idx", "engine.queue", "none", "R0", "with its last slice"),
    _entry("leases", _P + r"lease", "engine.queue", "none", "R0", "settle, release or reclaim"),
    _entry("holders", _P + r"hold", "engine.queue", "none", "R0", "forgotten with the worker"),
    _entry("counters", _P + r"n", "engine.queue", "none", "R0", "life of the installation"),
    _entry("job state", _P + r"j:\d+", "engine.queue", "none", "R0", "with the job"),
    _entry("chunks put", _P + r"w:\d+", "engine.queue", "none", "R0", "with the job"),
    _entry("duplicates", _P + r"u:\d+:\d+", "engine.queue", "keyed fingerprints (mref)", "R0", "with the job"),
    _entry("events", _P + r"ev", "engine.queue", "job, mref, pseudonym, tag", "R0", "drained into the ledger"),
    _entry("suppression", _P + r"x:\d+", "policy.suppression", "keyed tag", "R5", "while the scope exists"),
    _entry("halts", _P + r"halt", "policy.halts", "keyed domain references", "R0", "resume"),
    _entry("site permits", _S + r"c", "engine.delivery", "none", "R0", "expiry"),
    _entry("site rate", _S + r"r", "engine.delivery", "none", "R0", "expiry"),
    _entry("site back-off", _S + r"b", "engine.delivery", "none", "R0", "expiry"),
)


def entry_of(key: str) -> Entry | None:
    """The inventory entry a key belongs to, or None: a key that should not exist."""
    for entry in CATALOGUE:
        if entry.pattern.fullmatch(key):
            return entry
    return None
