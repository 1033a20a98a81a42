"""The fence: no command of a worker reaches a Redis that the writer has not compared with SQL (promise T12).

A Redis that comes back older forgets opt-outs and deliveries without knowing it. So every new connection of a worker
asks, before anything else is written on it, which run of the server answers (INFO `run_id`, new at every start) and
what META says: the run the writer has cleared last, and the epoch, which counts restores.

Laws:
- a connection whose run is not cleared is closed unused: `RunNotCleared`, a ConnectionError, so everybody who waits
  for Redis waits for this too; nothing is sent meanwhile (fails closed, also where META is empty);
- a worker belongs to the epoch of its first connection; another one is `StoreOlder` for good: the worker ends in order
  and the next one begins by telling the restored Redis what the journals know;
- a connection that was not asked to the end is never found in the pool: redis-py 8.1 keeps one whose connect callback
  was cancelled.

Which data may be trusted is the privacy officer's question before it is the queue's, hence on the ground floor.

Known limits: FLUSHALL keeps the run, so connections survive it; workers see META empty within a second
(`engine.queue.epoch`).
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

import redis.exceptions

from policy import keyspace

RUN: Final = "run"
EPOCH: Final = "epoch"
_RUN_ID = re.compile(rb"^run_id:([0-9a-f]+)", re.MULTILINE)


class RunNotCleared(redis.exceptions.ConnectionError):
    """This run of Redis has not been compared with SQL yet. Wait: the writer looks every second."""


class StoreOlder(redis.exceptions.ConnectionError):
    """Redis was restored since this process began: its leases mean nothing any more. End, and start anew."""


class Fence:
    """One a process; hand it to `policy.valkey.connect`. epoch: None until the first connection was let through;
    admitted: how many were."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.admitted = 0
        self._older = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Fence of epoch {self.epoch}{', the store is older' if self.older else ''}>"

    @property
    def older(self) -> bool:
        """Whether the store has been restored since the first connection."""
        return self._older.is_set()

    async def wait_older(self) -> None:
        await self._older.wait()

    async def admit(self, connection: Any) -> None:
        """The connect callback of redis-py (`redis_connect_func`). Raises RunNotCleared, StoreOlder, RedisError."""
        try:
            await connection.on_connect()
            if not connection.is_connected:  # sending would connect again, from inside of connecting
                raise redis.exceptions.ConnectionError("the connection ended while it began")
            asked = connection.pack_commands([("INFO", "server"), ("HMGET", keyspace.META, RUN, EPOCH)])
            await connection.send_packed_command(asked, check_health=False)
            answering = _RUN_ID.search(_bytes(await connection.read_response()))
            cleared, epoch = await connection.read_response()
            if answering is None or not cleared or _bytes(cleared) != answering[1]:
                raise RunNotCleared("this run of Redis is not cleared by the policy writer")
            self.meet(int(epoch or 0))
            self.admitted += 1
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    def meet(self, epoch: int) -> None:
        """META names this epoch. Raises StoreOlder when it is not ours."""
        if self.epoch is None:
            self.epoch = epoch
        elif epoch != self.epoch:
            self._older.set()
        if self.older:
            raise StoreOlder(f"Redis came back older: epoch {epoch}, this process is of {self.epoch}")


def _bytes(told: Any) -> bytes:
    return told if isinstance(told, bytes) else str(told).encode()
