"""The unix socket of the one SQL writer: frames, records and the client (design decision 15).

Promise: a call that returned was committed; where the operation also belongs in Redis (opt-outs, suppressions, T11),
the Redis write is done too. A call that raised may or may not have been committed: every operation may be repeated.

One frame is a 4-byte big-endian length and a msgpack body. Question: ``[op, kwargs]``; answer: ``["ok", value]`` or
``["error", kind, text]``. Answers come in the order of the questions, so one connection carries many calls at once.
The socket is 0600: who may open it may do what the service may do, there is no other authentication.

Known limits: one writer, so one socket a host; over PostgreSQL each host runs a writer of its own. Error texts carry
no values from the question, because they end in logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

FRAME_LIMIT: Final = 32 * 1024 * 1024  # a job payload with attachments is the largest thing said here
CALL_SECONDS: Final = 30.0  # a big resolve behind a busy drain takes < 1 s; longer means that the writer is stuck
CONNECT_SECONDS: Final = 5.0
_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """The writer answered that it did not do it. kind is a slug: refused, not-found, ambiguous, redis, internal, …"""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class WriterUnavailable(Exception):
    """No answer: the writer is not there, went away or took too long. Whether it was done is not known: ask again."""


class JobRecord(msgspec.Struct, kw_only=True, frozen=True):
    """An accepted job as the intake hands it over: names for account, list and topic; contents sealed already.

    hash: 32 bytes, SHA-256 of the parsed job (RFC 8785). Instants are microseconds. opens_mode, clicks_mode:
    policy.gate.Mode numbers the campaign asks for. payload, job_key, subject: sealed with keyring.service under
    `job_aad`. view: web version without personal data ("" = none). links: link table, index = link number.
    entry_hash, entry_rows: of the job's only entry where its recipients came with it; registered in one transaction.
    """

    account: str
    job_id: str
    hash: bytes
    kind: str  # campaign | transactional
    created_at: int
    payload: bytes
    job_key: bytes
    legal_basis: str
    accepted_at: int = 0  # 0: the writer's clock
    list: str = ""
    topic: str = ""
    subject: bytes = b""
    in_doubt: str = "hold"  # hold | resend
    priority: bool = False
    wait: bool = False
    opens_mode: int = 0
    clicks_mode: int = 0
    send_at: int = 0  # 0: at once
    expires_at: int = 0
    chunks_expected: int = 0
    links: tuple[str, ...] = ()
    view: str = ""
    entry_hash: bytes = b""  # none: its audience follows, each entry is registered by `chunk`
    entry_rows: int = 0


class Accepted(msgspec.Struct, frozen=True):
    """What became of a job offered. status: new | same | conflict | unknown-account | frozen.

    payload and job_key are the stored ones where they are another offer's ("same", a lost job taken up again): the
    caller goes on with those. They are empty where those of this offer were stored.
    state is the stored job's state; opens_mode and clicks_mode are the account's ceilings. topic 0: none.
    has_entry: the only entry is registered, `chunk` need not be asked.
    """

    status: str
    number: int = 0
    account: int = 0
    list: int = 0
    topic: int = 0
    opens_mode: int = 0
    clicks_mode: int = 0
    state: str = ""
    job_key: bytes = b""
    payload: bytes = b""
    has_entry: bool = False


class SuppressionRecord(msgspec.Struct, array_like=True, frozen=True):
    """One suppression by keyed tag. scope: policy.suppression.Scope number; scope_id 0 for the platform."""

    tag: bytes
    partition: int
    scope: int
    scope_id: int
    reason: str
    source: str = ""
    created: int = 0  # 0: the writer's clock
    expires: int = 0  # 0: never


class ConsentRow(msgspec.Struct, array_like=True, frozen=True):
    """One piece of evidence (decision 19): given_at in microseconds, subject the vault's number. expires_at: when it
    ends by itself, exclusive; 0: never."""

    subject: int
    purpose: str
    basis: str
    wording: str
    source: str
    given_at: int
    expires_at: int = 0


class Resolved(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A person of one account: the vault's number and this week's name for the ledger."""

    subject: int
    pseudonym: int


class Halted(msgspec.Struct, frozen=True):
    """How an account or domain stands after it was paused, resumed or cancelled: active | paused | frozen | cancelled.

    changed: False when it stood so before; jobs: numbers of those cancelled with their account.
    """

    state: str
    changed: bool
    jobs: tuple[int, ...] = ()


def job_aad(what: str, account: str, job_id: str) -> bytes:
    """What a job's sealed columns are bound to, so that none stands in for another: what is payload | key | subject."""
    return f"job/{what}/{account}/{job_id}".encode()


_encoder = msgspec.msgpack.Encoder()
_question = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_answer = msgspec.msgpack.Decoder(list[msgspec.Raw])
_text = msgspec.msgpack.Decoder(str)


def encode_question(op: str, kwargs: dict[str, Any]) -> bytes:
    return _frame(_encoder.encode((op, kwargs)))


def decode_question(body: bytes) -> tuple[str, msgspec.Raw]:
    """Operation and undecoded kwargs. Raises msgspec.DecodeError."""
    return _question.decode(body)


def encode_ok(value: Any) -> bytes:
    return _frame(_encoder.encode(("ok", value)))


def encode_error(kind: str, text: str) -> bytes:
    return _frame(_encoder.encode(("error", kind, text)))


def decode_answer(body: bytes) -> msgspec.Raw:
    """The value of an ok; raises WireError for an error, msgspec.DecodeError for anything else."""
    parts = _answer.decode(body)
    if len(parts) == 2 and _text.decode(parts[0]) == "ok":
        return parts[1]
    if len(parts) == 3 and _text.decode(parts[0]) == "error":
        raise WireError(_text.decode(parts[1]), _text.decode(parts[2]))
    raise msgspec.DecodeError("answer is neither ok nor error")


def _frame(body: bytes) -> bytes:
    if len(body) > FRAME_LIMIT:
        raise ValueError(f"frame of {len(body)} bytes is over the limit of {FRAME_LIMIT}")
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next body, None at a clean end. Raises ConnectionError on a cut or oversized frame."""
    try:
        head = await reader.readexactly(4)
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise ConnectionError("frame cut in its length") from error
    length: int = _LENGTH.unpack(head)[0]
    if length > FRAME_LIMIT:
        raise ConnectionError(f"frame of {length} bytes is over the limit")
    try:
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("frame cut in its body") from error


T = TypeVar("T")


class WriterClient:
    """Calls to the writer over one pipelined connection, opened at the first call and again after it broke.

    A call that times out leaves its place in the queue of answers, so a late answer is never taken for another's.
    """

    def __init__(self, path: Path | str, *, timeout: float = CALL_SECONDS) -> None:
        self._path = str(path)
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[bytes]] = deque()

    def __repr__(self) -> str:
        state = "open" if self._writer is not None else "closed"
        return f"<WriterClient {state} waiting={len(self._waiting)}>"

    async def __aenter__(self) -> WriterClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def call(self, op: str, **kwargs: Any) -> Any:
        """The plain value of an operation. Raises WireError or WriterUnavailable."""
        return msgspec.msgpack.decode(await self._call(op, kwargs))

    async def _call(self, op: str, kwargs: dict[str, Any]) -> msgspec.Raw:
        frame = encode_question(op, kwargs)
        try:
            async with asyncio.timeout(self._timeout):
                writer = await self._connected()
                answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
                self._waiting.append(answer)
                writer.write(frame)
                try:
                    await writer.drain()
                    body = await answer
                finally:
                    answer.cancel()  # keeps its place in the queue; nobody waits for it any more
        except TimeoutError as error:
            raise WriterUnavailable(f"the policy writer did not answer {op} in {self._timeout:g} s") from error
        except OSError as error:
            raise WriterUnavailable(f"the policy writer is not reachable ({type(error).__name__})") from error
        return decode_answer(body)

    async def _typed(self, kind: type[T], op: str, **kwargs: Any) -> T:
        return msgspec.msgpack.decode(await self._call(op, kwargs), type=kind)

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._lock:
            if self._writer is None or self._writer.is_closing():
                await self._drop()
                async with asyncio.timeout(CONNECT_SECONDS):
                    reader, writer = await asyncio.open_unix_connection(self._path)
                self._writer = writer
                self._waiting = deque()
                self._pump = asyncio.create_task(self._receive(reader, writer, self._waiting), name="writer-client")
            return self._writer

    async def _receive(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, waiting: deque[asyncio.Future[bytes]]
    ) -> None:
        cause = "closed"
        try:
            while (body := await read_frame(reader)) is not None:
                if not waiting:
                    raise ConnectionError("an answer nobody asked for")
                answer = waiting.popleft()
                if not answer.done():
                    answer.set_result(body)
        except OSError as error:
            cause = str(error) or type(error).__name__
        finally:
            writer.close()
            for answer in waiting:
                if not answer.done():
                    answer.set_exception(ConnectionError(cause))
            waiting.clear()

    async def _drop(self) -> None:
        pump, writer = self._pump, self._writer
        self._pump = self._writer = None
        if pump is not None:
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def close(self) -> None:
        async with self._lock:
            await self._drop()

    # --- operations, by name ------------------------------------------------------------------------------------

    async def ping(self) -> dict[str, Any]:
        return await self._typed(dict[str, Any], "ping")

    async def statistics(self) -> dict[str, Any]:
        """Counters of the writer for /metrics: numbers by name, see policy.writer.Writer.statistics."""
        return await self._typed(dict[str, Any], "statistics")

    async def accept_job(self, record: JobRecord) -> Accepted:
        return await self._typed(Accepted, "accept_job", record=record)

    async def chunk(self, job: int, number: int, hash: bytes, rows: int) -> str:
        """Before a chunk is expanded: "new" | "same" | "conflict" (other bytes under a known number)."""
        return await self._typed(str, "chunk", job=job, number=number, hash=hash, rows=rows)

    async def expanded(self, job: int, rows_submitted: int) -> None:
        """Every chunk is in the lanes: from now on the job can be done."""
        await self._call("expanded", {"job": job, "rows_submitted": rows_submitted})

    async def expanded_all(self, jobs: Sequence[tuple[int, int]]) -> list[str]:
        """As `expanded`, of several jobs (number, rows); "" for each it was done for, else why it was not."""
        return await self._typed(list[str], "expanded_all", jobs=jobs)

    async def reject_note(self, account: str, job_id: str, reason: str) -> None:
        """Leaves a line in the audit chain that a job was rejected; the id is not taken, it may be offered again."""
        await self._call("reject_note", {"account": account, "job_id": job_id, "reason": reason})

    async def job_state(self, job: int | str, state: str, reason: str = "") -> str:
        """state: paused | sending (resume) | cancelled | expired | lost. job: number, job_id or account/job_id."""
        return await self._typed(str, "job_state", job=job, state=state, reason=reason)

    async def resolve(self, account: int, week: int, rows: list[tuple[bytes, int, str]]) -> list[Resolved]:
        """(tag, partition, wire address) in, (subject, pseudonym) out, in order; the missing are made."""
        return await self._typed(list[Resolved], "resolve", account=account, week=week, rows=rows)

    async def consents(self, account: int, rows: list[ConsentRow]) -> int:
        return await self._typed(int, "consents", account=account, rows=rows)

    async def suppress(self, entries: list[SuppressionRecord]) -> int:
        """How many were changed. In force at the gate when this returns (T11)."""
        return await self._typed(int, "suppress", entries=entries)

    async def unsuppress(self, tag: bytes, partition: int, scope: int, scope_id: int) -> int:
        return await self._typed(int, "unsuppress", tag=tag, partition=partition, scope=scope, scope_id=scope_id)

    async def opt_out(self, list: int, partition: int, tag: bytes, source: str) -> None:
        """A recipient's own word (RFC 8058 or the page): durable in both stores when this returns, else it raises."""
        await self._call("opt_out", {"list": list, "partition": partition, "tag": tag, "source": source})

    async def withdraw(self, account: int, tag: bytes, purpose: str, source: str = "preferences") -> bool:
        """Consent for one purpose withdrawn; False when the account's vault knows nobody by that tag."""
        return await self._typed(bool, "withdraw", account=account, tag=tag, purpose=purpose, source=source)

    async def restrict(self, account: int, partition: int, tag: bytes, source: str) -> None:
        """Processing restricted (GDPR 18): not written to, hits not stored."""
        await self._call("restrict", {"account": account, "partition": partition, "tag": tag, "source": source})

    async def account_add(
        self,
        name: str,
        *,
        display_name: str = "",
        postal_address: str = "",
        website: str = "",
        privacy_url: str = "",
        opens_mode: int = 3,
        clicks_mode: int = 3,
    ) -> int:
        """Its number. Modes are ceilings (policy.gate.Mode): consent and campaign still decide below them."""
        return await self._typed(
            int,
            "account_add",
            name=name,
            display_name=display_name,
            postal_address=postal_address,
            website=website,
            privacy_url=privacy_url,
            opens_mode=opens_mode,
            clicks_mode=clicks_mode,
        )

    async def account_freeze(self, name: str, frozen: bool) -> bool:
        """False: no such account."""
        return await self._typed(bool, "account_freeze", name=name, frozen=frozen)

    async def halt_account(self, name: str, act: str, reason: str = "") -> Halted:
        """act: pause | resume | cancel (every open job of it)."""
        return await self._typed(Halted, "halt_account", name=name, act=act, reason=reason)

    async def halt_domain(self, domain: str, act: str, reason: str = "") -> Halted:
        """act: pause | resume | cancel (whoever waits there, until it is resumed)."""
        return await self._typed(Halted, "halt_domain", domain=domain, act=act, reason=reason)

    async def list_add(self, account: int, name: str) -> int:
        return await self._typed(int, "list_add", account=account, name=name)

    async def topic_add(self, account: int, name: str) -> int:
        return await self._typed(int, "topic_add", account=account, name=name)


async def ask(path: Path | str, op: str, **kwargs: Any) -> Any:
    """One call on a connection of its own: what a command line needs."""
    async with WriterClient(path) as client:
        return await client.call(op, **kwargs)
