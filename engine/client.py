"""What producers import: hand in jobs, sealed, from Python; sync and async. Everything else speaks the same contract.

Promise: when `submit` returned, the job is in Redis (T0: with ``appendfsync always``, on its disk); submitting the same
job again with the same `job_id` is safe for 90 days. Nothing is sent in clear while the service's public key is known:
given as `intake_key`, else read from the store, where the service publishes it (field ``intake`` of the meta key).
`status` tells what became of a job, with a reason for every refusal; it is a mirror of the service's ledger and may be
a moment behind it. None: the service has not looked at the job yet, or it ended more than 90 days ago.

The contract (docs/jobs.md): stream ``salespush:{in}:jobs``.
1. the job: field ``job`` (JSON, UTF-8) or ``sealed``;
2. its audience, when it has one: entries with ``audience`` = job id, ``account``, ``n`` from 0 and ``data`` (NDJSON, at
   most 1 MiB) or ``sealed``. Same number, same bytes: no effect.

Sealing: one byte 1, an ephemeral X25519 public key (32), then nonce (12) and AES-256-GCM. The key is HKDF-SHA256 of the
shared secret, salt = ephemeral key + service key, info = ``sales-push intake 1``; associated data is ``job`` or
``audience/<account>/<job id>/<n>``, so that a sealed chunk cannot be moved to another job.

Known limits: a one-shot iterator of recipients is packed in memory first (compressed, about 25 bytes a row),
because the job says how many entries follow; a list or any other iterable that can be read twice is not.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from policy import keyspace

CHUNK_ROWS: Final = 1000  # one step of expansion: a chunk of this size is resolved, put and acknowledged at once
CHUNK_BYTES: Final = 1024 * 1024  # design section 5
META_FIELD: Final = "intake"  # where the service publishes its public key, 64 hexadecimal digits
_SEAL_VERSION: Final = b"\x01"
_SEAL_BYTES: Final = 1 + 32 + 12 + 16
_INFO: Final = b"sales-push intake 1"

Fields: TypeAlias = dict[Any, Any]  # a stream entry, in the words of redis-py
Progress: TypeAlias = Callable[[int, int], None]


class SubmitError(ValueError):
    """A mistake of the caller: nothing was sent, or (a row in the middle) nothing that starts without the rest."""


class UnsealError(ValueError):
    """Bytes that this service's key does not open as what they claim to be."""

    def __init__(self) -> None:
        super().__init__("sealed for another service, for another purpose, or changed on the way")


def seal(intake_public: bytes, plaintext: bytes, purpose: bytes) -> bytes:
    """Seal to the service's X25519 public key (32 raw bytes). purpose: `job_purpose` or `audience_purpose`."""
    ephemeral = X25519PrivateKey.generate()
    public = ephemeral.public_key().public_bytes_raw()
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(intake_public))
    key = _derive(shared, public + intake_public)
    nonce = os.urandom(12)
    return _SEAL_VERSION + public + nonce + AESGCM(key).encrypt(nonce, plaintext, purpose)


def unseal(intake_private: bytes, data: bytes, purpose: bytes) -> bytes:
    """The other end, for the intake. Raises UnsealError."""
    if len(data) < _SEAL_BYTES or data[:1] != _SEAL_VERSION:
        raise UnsealError
    public, nonce = data[1:33], data[33:45]
    private = X25519PrivateKey.from_private_bytes(intake_private)
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        key = _derive(shared, public + private.public_key().public_bytes_raw())
        return AESGCM(key).decrypt(nonce, data[45:], purpose)
    except (InvalidTag, ValueError):  # ValueError: a public key of low order gives no secret (RFC 7748 6.1)
        raise UnsealError from None


def _derive(shared: bytes, salt: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=_INFO).derive(shared)


def job_purpose() -> bytes:
    return b"job"


def audience_purpose(account: str, job_id: str, number: int) -> bytes:
    return f"audience/{account}/{job_id}/{number}".encode()


_encoder = msgspec.json.Encoder()


def chunks(recipients: Iterable[Mapping[str, Any]], rows: int = CHUNK_ROWS) -> Iterator[tuple[bytes, int]]:
    """NDJSON chunks (bytes, rows) of at most `rows` rows and 1 MiB: the same recipients give the same chunks."""
    lines: list[bytes] = []
    size = 0
    for number, recipient in enumerate(recipients, start=1):
        line = _encoder.encode(recipient)
        if len(line) + 1 > CHUNK_BYTES:
            raise SubmitError(f"recipient {number} is larger than 1 MiB")
        if lines and (len(lines) >= rows or size + len(line) + 1 > CHUNK_BYTES):
            yield b"\n".join(lines), len(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield b"\n".join(lines), len(lines)


class Submission:
    """One job on its way, decided without I/O: the entries to XADD, in order. Sync and async producers share it."""

    def __init__(
        self, job: Mapping[str, Any], recipients: Iterable[Mapping[str, Any]] | None, intake_public: bytes | None
    ) -> None:
        self._job = dict(job)
        self._public = intake_public
        self._recipients = recipients
        self._packed: list[tuple[bytes, int]] | None = None
        for name in ("job_id", "account"):
            if not isinstance(self._job.get(name), str) or not self._job[name]:
                raise SubmitError(f"the job has no {name}")
        self.job_id: str = self._job["job_id"]
        self.account: str = self._job["account"]
        self.total = 0
        if recipients is None:
            return
        if self._job.get("recipients") is not None:
            raise SubmitError("recipients are given twice: in the job and beside it")
        count = 0
        once = iter(recipients) is recipients
        packed: list[tuple[bytes, int]] = []
        for data, rows in chunks(recipients):
            count += 1
            self.total += rows
            if once:
                packed.append((zlib.compress(data, 1), rows))
        self._packed = packed if once else None
        if count == 0:
            raise SubmitError("there are no recipients")
        self._job["audience"] = {"chunks": count}

    def entries(self) -> Iterator[tuple[Fields, int]]:
        """(stream fields, rows in it); the job comes first."""
        payload = json.dumps(self._job, ensure_ascii=False, allow_nan=False).encode("utf-8")
        yield self._sealed({}, "job", payload, job_purpose()), 0
        if self._recipients is None:
            return
        source: Iterable[tuple[bytes, int]] = (
            chunks(self._recipients) if self._packed is None else ((zlib.decompress(d), r) for d, r in self._packed)
        )
        for number, (data, rows) in enumerate(source):
            named: Fields = {"audience": self.job_id, "account": self.account, "n": number}
            yield self._sealed(named, "data", data, audience_purpose(self.account, self.job_id, number)), rows

    def _sealed(self, fields: Fields, name: str, plain: bytes, purpose: bytes) -> Fields:
        if self._public is None:
            return {**fields, name: plain}
        return {**fields, "sealed": seal(self._public, plain, purpose)}


def _key(intake_key: bytes | str | None) -> bytes | None:
    if intake_key is None:
        return None
    key = bytes.fromhex(intake_key) if isinstance(intake_key, str) else intake_key
    if len(key) != 32:
        raise SubmitError("the intake key is a raw X25519 public key: 32 bytes, or 64 hexadecimal digits")
    return key


def _published(stored: bytes | str | None) -> bytes | None:
    return None if stored is None else _key(stored.decode("ascii") if isinstance(stored, bytes) else stored)


class JobProblem(NamedTuple):
    """One mistake. path: ``$.from.address``; suggestion: what to do, or ""."""

    path: str
    message: str
    suggestion: str


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What became of a job. state: accepted, expanding, sending, paused, done, cancelled, expired, lost or rejected;
    rows: None until its whole audience is in; counts: rows by their last state, when the last one has ended;
    problems: of the last refusal under this id (the first hundred of problems_total), also when the job itself was
    accepted and something later was refused; updated_at: microseconds."""

    state: str
    reason: str
    rows: int | None
    problems: list[JobProblem]
    counts: dict[str, int]
    updated_at: int
    problems_total: int = 0


_problems = msgspec.json.Decoder(list[JobProblem])


def status_of(fields: Mapping[bytes, bytes]) -> JobStatus | None:
    """The hash at ``policy.keyspace.job_status`` in words. None: there is no such hash."""
    if b"state" not in fields:
        return None

    def number(name: bytes) -> int | None:
        text = fields.get(name, b"")
        return int(text) if text.isdigit() else None

    try:
        problems = _problems.decode(fields[b"problems"]) if b"problems" in fields else []
    except (msgspec.DecodeError, UnicodeDecodeError):  # a newer service: the rest is worth telling all the same
        problems = []
    counts = {name[6:].decode("utf-8", "replace"): number(name) or 0 for name in fields if name.startswith(b"count:")}
    return JobStatus(
        state=fields[b"state"].decode("utf-8", "replace"),
        reason=fields.get(b"reason", b"").decode("utf-8", "replace"),
        rows=number(b"rows"),
        problems=problems,
        counts=counts,
        updated_at=number(b"updated_at") or 0,
        problems_total=number(b"problems_total") or 0,
    )


# bytes are wanted even of a connection that decodes what it reads: `status_of` decides what is text
_AS_BYTES: Final = {"NEVER_DECODE": True}


class Producer:
    """Hands in jobs over a blocking connection. intake_key: see the plate; seal=False sends in clear on purpose."""

    def __init__(self, redis: Redis | str, *, intake_key: bytes | str | None = None, seal: bool = True) -> None:
        self._owned = isinstance(redis, str)
        self._redis = Redis.from_url(redis) if isinstance(redis, str) else redis
        self._public = _key(intake_key)
        self._seal = seal

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._owned:
            self._redis.close()

    def submit(
        self,
        job: Mapping[str, Any],
        recipients: Iterable[Mapping[str, Any]] | None = None,
        *,
        progress: Progress | None = None,
    ) -> str:
        """Send a job (and its audience, rows as in the schema); returns its job_id. progress: (rows sent, rows).

        Raises SubmitError for what is no job at all, redis.RedisError when the store did not take it: submit again.
        """
        if self._seal and self._public is None:
            self._public = _published(self._redis.hget(keyspace.META, META_FIELD))
        submission = Submission(job, recipients, self._public if self._seal else None)
        sent = 0
        for fields, rows in submission.entries():
            self._redis.xadd(keyspace.INTAKE, fields)
            sent += rows
            if progress is not None:
                progress(sent, submission.total)
        self._redis.publish(keyspace.WAKE, "in")
        return submission.job_id

    def status(self, account: str, job_id: str) -> JobStatus | None:
        """What became of a job. None: not looked at yet, or ended more than 90 days ago."""
        key = keyspace.job_status(account, job_id)
        ask: Callable[..., Any] = self._redis.execute_command
        return status_of(ask("HGETALL", key, **_AS_BYTES))

    def waiting(self) -> int:
        """Entries of all producers that are not yet expanded: 0 means that everything handed in was taken."""
        return int(self._redis.xlen(keyspace.INTAKE))


class AsyncProducer:
    """The same over asyncio; recipients are an ordinary iterable."""

    def __init__(self, redis: AsyncRedis | str, *, intake_key: bytes | str | None = None, seal: bool = True) -> None:
        self._owned = isinstance(redis, str)
        self._redis = AsyncRedis.from_url(redis) if isinstance(redis, str) else redis
        self._public = _key(intake_key)
        self._seal = seal

    async def __aenter__(self) -> AsyncProducer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._owned:
            await self._redis.aclose()

    async def submit(
        self,
        job: Mapping[str, Any],
        recipients: Iterable[Mapping[str, Any]] | None = None,
        *,
        progress: Progress | None = None,
    ) -> str:
        """As Producer.submit. Cut off in the middle (cancelled, connection lost), submit the same job again."""
        if self._seal and self._public is None:
            self._public = _published(await self._redis.hget(keyspace.META, META_FIELD))
        submission = Submission(job, recipients, self._public if self._seal else None)
        sent = 0
        for fields, rows in submission.entries():
            await self._redis.xadd(keyspace.INTAKE, fields)
            sent += rows
            if progress is not None:
                progress(sent, submission.total)
        await self._redis.publish(keyspace.WAKE, "in")
        return submission.job_id

    async def status(self, account: str, job_id: str) -> JobStatus | None:
        """As Producer.status."""
        key = keyspace.job_status(account, job_id)
        ask: Callable[..., Any] = self._redis.execute_command
        return status_of(await ask("HGETALL", key, **_AS_BYTES))

    async def waiting(self) -> int:
        """As Producer.waiting."""
        return int(await self._redis.xlen(keyspace.INTAKE))
