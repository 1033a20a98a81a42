"""The registry of hosts: which workers have people's mail in their hands, and which hosts are asked to rest.

An officer asks who works on the data at this moment, an operator which host may be switched off, the writer whether a
program of an older layout is still at work before it raises the schema (`policy.valkey.raise_schema`): three floors'
question, hence on the ground.

One hash, `keyspace.HOSTS`: a field for each worker, named by its holder (``host:index:pid-hex``, as its leases are),
and a field ``drain <host>`` for each host that is asked to rest; no holder holds a space.

Laws:
- a worker says it lives every few seconds and takes its field away at an orderly end; what is left is a death;
- `Worker.at` is Redis TIME, so ages are the same whoever asks, whatever the hosts' clocks say;
- nothing here decides over a lease: leases have tokens and heartbeat counters (decision 6), this is what people read.

Known limits: programs up to 0.1.0 do not register; they show as holders of leases only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec

from policy import keyspace

if TYPE_CHECKING:
    from redis.asyncio import Redis

STATES = ("starting", "working", "draining", "drained", "ending")
_DRAIN = "drain "


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as last heard of. at: Redis TIME in µs; schema: newest layout it understands; home: names its data
    folder without telling it, so that two installations on one host are told apart; slices, recipients: in its hands.
    """

    holder: str
    pid: int
    version: str
    schema: int
    state: str
    at: int = 0
    home: str = ""
    slices: int = 0
    recipients: int = 0

    @property
    def host(self) -> str:
        return host_of(self.holder)

    @property
    def index(self) -> int:
        return index_of(self.holder)


@dataclass(frozen=True, slots=True)
class Registry:
    """What the hash says at one instant. now: Redis TIME in µs; resting: hosts asked to rest, since when (µs)."""

    now: int
    workers: tuple[Worker, ...] = ()
    resting: dict[str, int] = field(default_factory=dict)

    def of(self, host: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.host == host]


def host_of(holder: str) -> str:
    """ "mx1" of "mx1:0:4711-9f2c31aa"; a name that is none of ours is its own host."""
    parts = holder.rsplit(":", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdigit() else holder


def index_of(holder: str) -> int:
    """0 of "mx1:0:4711-9f2c31aa", -1 for a name that is none of ours."""
    parts = holder.rsplit(":", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdigit() else -1


def program_version() -> str:
    """The version of the program that runs."""
    try:
        return version("sales-push")
    except PackageNotFoundError:
        return "unknown"


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Worker)


async def say(redis: Redis, worker: Worker) -> bool:
    """This worker lives, now. True when its host is asked to rest. Raises RedisError."""
    seconds, micros = await redis.time()
    entry = _encoder.encode(msgspec.structs.replace(worker, at=seconds * 1_000_000 + micros))
    async with redis.pipeline(transaction=False) as pipe:
        pipe.hset(keyspace.HOSTS, worker.holder, entry)
        pipe.hexists(keyspace.HOSTS, _DRAIN + worker.host)
        _, rest = await pipe.execute()
    return bool(rest)


async def withdraw(redis: Redis, holders: list[str]) -> None:
    """These workers have ended."""
    if holders:
        await redis.hdel(keyspace.HOSTS, *holders)


async def read(redis: Redis) -> Registry:
    """All of it. Raises RedisError."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.hgetall(keyspace.HOSTS)
        (seconds, micros), stored = await pipe.execute()
    return parse(seconds * 1_000_000 + micros, stored)


def parse(now: int, stored: dict[Any, Any]) -> Registry:
    """now: Redis TIME in µs; stored: the hash. What a newer program wrote in a way we cannot read is shown as far as
    its name goes, with a schema above ours."""
    workers: list[Worker] = []
    resting: dict[str, int] = {}
    for raw, value in stored.items():
        name = _text(raw)
        if name.startswith(_DRAIN):
            since = _text(value)
            resting[name.removeprefix(_DRAIN)] = int(since) if since.isdigit() else now
            continue
        try:
            workers.append(msgspec.structs.replace(_decoder.decode(value), holder=name))
        except msgspec.MsgspecError:
            workers.append(Worker(holder=name, pid=0, version="?", schema=keyspace.SCHEMA_VERSION + 1, state="?"))
    return Registry(now, tuple(sorted(workers, key=lambda worker: (worker.host, worker.index, worker.at))), resting)


async def ask_to_rest(redis: Redis, host: str) -> bool:
    """Its workers lease nothing more, finish and wait. False when it was asked already. Raises RedisError."""
    seconds, micros = await redis.time()
    return bool(await redis.hsetnx(keyspace.HOSTS, _DRAIN + host, str(seconds * 1_000_000 + micros)))


async def let_work(redis: Redis, host: str) -> bool:
    """Undo `ask_to_rest`. False when it was not asked. Raises RedisError."""
    return bool(await redis.hdel(keyspace.HOSTS, _DRAIN + host))


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode("utf-8", "replace")
