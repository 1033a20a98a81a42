"""The scripts of the queue, by name (style 10): loaded from the .lua files beside this one, called by digest.

Law: a script that the server has forgotten (restart, SCRIPT FLUSH, another node after a failover) is sent again in
full with the same arguments; nobody above notices.

A file may begin with ``-- with NAME`` lines: the fragment NAME.lua is put in front, for the few functions several
scripts share.

The calls of a moment are one write: packed by hiredis in C, sent and read on a connection of the client's pool. That is
a third of what redis-py's own pipeline takes, which packs in Python and walks five coroutines a reply (200 against 520
us of CPU for 32 calls, 390 against 1,280 for 64). Retries, the fence at a new connection and what becomes of a
connection that was left in the middle stay redis-py's.

Known limits: a Redis Cluster needs a client that routes by the first key, and then redis-py's pipeline again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, ResponseError


class QueueError(Exception):
    """The engine contradicted itself in a call to the queue: a fault of ours, never of the world's."""


@dataclass(frozen=True, slots=True)
class Call:
    """One script run. prefix becomes KEYS[1]: it holds the hash tag, scripts append the rest."""

    script: str
    prefix: str
    args: Sequence[bytes | str | int]


@dataclass(frozen=True, slots=True)
class Script:
    source: str
    digest: str


_WITH = re.compile(r"^-- with ([a-z]+)$", re.MULTILINE)


@cache
def script(name: str) -> Script:
    """Source and SHA-1 of NAME.lua with its fragments. The digest is the server's own name for it, not a secret."""
    source = _read(name)
    fragments = _WITH.findall(source)
    whole = "\n".join([*map(_read, fragments), source])
    return Script(whole, sha1(whole.encode(), usedforsecurity=False).hexdigest())


def _read(name: str) -> str:
    return (files("engine.queue") / f"{name}.lua").read_text(encoding="utf-8")


class Scripts:
    """Runs scripts in pipelines. Not transactional: each script is atomic, the pipeline only saves round trips."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def run(self, calls: Sequence[Call], after: Sequence[tuple[str, ...]] = ()) -> list[Any]:
        """Answers in order; an error of one script is returned in its place. `after`: plain commands behind them,
        their answers dropped. Raises ConnectionError or TimeoutError when there was no conversation at all."""
        if not calls:
            return []
        answers = await self._talk(
            [("EVALSHA", script(call.script).digest, 1, call.prefix, *call.args) for call in calls], after
        )
        forgotten = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if forgotten:
            again = [calls[index] for index in forgotten]
            for index, answer in zip(
                forgotten,
                await self._talk([("EVAL", script(c.script).source, 1, c.prefix, *c.args) for c in again], after),
                strict=True,
            ):
                answers[index] = answer
        return answers

    async def plain(self, commands: Sequence[tuple[str | bytes, ...]]) -> list[Any]:
        """Plain commands in one pipeline; raises the first error."""
        if not commands:
            return []
        async with self._redis.pipeline(transaction=False) as pipe:  # its answers are parsed by the command's name
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _talk(self, commands: Sequence[tuple[Any, ...]], after: Sequence[tuple[str, ...]]) -> list[Any]:
        packed = b"".join([hiredis.pack_command(command) for command in (*commands, *after)])
        replies = len(commands) + len(after)
        pool: Any = self._redis.connection_pool  # redis-py's own types leave get_connection out
        connection: AbstractConnection = await pool.get_connection()
        try:
            # as redis-py's pipeline does between two tries: the connection is made anew, and admitted anew
            answers: list[Any] = await connection.retry.call_with_retry(
                lambda: _said(connection, packed, replies), lambda error: connection.disconnect()
            )
        finally:
            # Not shielded (14 us): it waits only while another connection is being closed.
            await pool.release(connection)
        return answers[: len(commands)]


async def _said(connection: AbstractConnection, packed: bytes, replies: int) -> list[Any]:
    """Raises ConnectionError or TimeoutError. Cut short, redis-py closes the connection: nobody reads the rest."""
    await connection.send_packed_command(packed, check_health=False)
    answers: list[Any] = []
    for _ in range(replies):
        try:
            answers.append(await connection.read_response())
        except ResponseError as error:
            answers.append(error)
    return answers
