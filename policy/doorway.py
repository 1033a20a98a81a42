"""The writer's unix socket: many calls at once on a connection, answers in the order of the questions.

Law: what a caller did wrong is an error answer of a known kind; what we did wrong is logged and answered ``internal``
without details; no answer text repeats a value of the question (it may be an address). A call once begun goes on to its
commit, whether or not the caller is still there.

Known limits: at most 256 calls of a connection are under way; a client that sends more waits in its socket.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import typing
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import redis.exceptions
import structlog
from sqlalchemy.exc import SQLAlchemyError

from policy import wire
from policy.accounts import AccountError
from policy.enforcement import RedisBehind
from policy.jobs import Refused
from policy.ledger import Ambiguous
from policy.vault import VaultError

log = structlog.get_logger()

_CALLS_A_CONNECTION: Final = 256

Run = Callable[[msgspec.Raw], Awaitable[Any]]


def handlers(*groups: object) -> dict[str, Run]:
    """Every method ``op_<name>`` of these objects by its name, its arguments decoded by annotation. Raises ValueError
    when two groups have one name."""
    found: dict[str, Run] = {}
    for group in groups:
        for attribute in dir(group):
            if not attribute.startswith("op_"):
                continue
            name = attribute.removeprefix("op_")
            if name in found:
                raise ValueError(f"two operations are called {name}")
            found[name] = _handler(name, getattr(group, attribute))
    return found


def _handler(name: str, method: Callable[..., Awaitable[Any]]) -> Run:
    hints = typing.get_type_hints(method)
    parameters = inspect.signature(method).parameters.values()
    fields: list[Any] = [
        (p.name, hints[p.name]) if p.default is inspect.Parameter.empty else (p.name, hints[p.name], p.default)
        for p in parameters
    ]
    arguments = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    decoder = msgspec.msgpack.Decoder(arguments)
    names = [field[0] for field in fields]

    async def run(raw: msgspec.Raw) -> Any:
        decoded = decoder.decode(raw)
        return await method(**{field: getattr(decoded, field) for field in names})

    return run


class Doorway:
    """Listens on a path; the caller holds the lock of the folder, so whatever is at the path is dead."""

    def __init__(self, path: Path, operations: Mapping[str, Run]) -> None:
        self._path = path
        self._operations = operations
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.calls: defaultdict[str, int] = defaultdict(int)

    def __repr__(self) -> str:
        return f"<Doorway connections={len(self._connections)}>"

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def open(self) -> None:
        self._clear()
        before = os.umask(0o177)  # 0600 from the first instant, not after a chmod
        try:
            self._server = await asyncio.start_unix_server(self._converse, str(self._path), backlog=512)
        finally:
            os.umask(before)

    async def close(self) -> None:
        """No new calls; those begun are finished."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        self._clear()

    def _clear(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Many calls at once, answers in the order of the questions."""
        me = asyncio.current_task()
        assert me is not None
        self._connections.add(me)
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(_CALLS_A_CONNECTION)
        answering = asyncio.create_task(self._answer(writer, answers))
        try:
            while (body := await wire.read_frame(reader)) is not None:
                await answers.put(asyncio.create_task(self._handle(body)))
            await answers.put(None)
            await answering
        except (OSError, asyncio.CancelledError):
            pass  # the peer went away, or we stop: what was begun goes on to its commit
        finally:
            self._connections.discard(me)
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            begun = []
            while not answers.empty():
                if (task := answers.get_nowait()) is not None:
                    begun.append(task)
            await asyncio.gather(*begun, return_exceptions=True)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, answers: asyncio.Queue[asyncio.Task[bytes] | None]) -> None:
        while (task := await answers.get()) is not None:
            body = await asyncio.shield(task)
            if writer.is_closing():
                continue  # nobody listens any more: keep taking, so that the reading side never waits for us
            try:
                writer.write(body)
                await writer.drain()
            except OSError:
                writer.close()

    async def _handle(self, body: bytes) -> bytes:
        op = ""
        try:
            op, arguments = wire.decode_question(body)
            handler = self._operations.get(op)
            if handler is None:
                return wire.encode_error("unknown", "no such operation")
            self.calls[op] += 1
            return wire.encode_ok(await handler(arguments))
        except Refused as error:
            return wire.encode_error(error.kind, str(error))
        except RedisBehind as error:
            return wire.encode_error("redis", str(error))
        except (redis.exceptions.RedisError, OSError) as error:
            log.warning("redis is away", op=op, error=type(error).__name__)
            return wire.encode_error("redis", "Redis does not answer; what belongs in SQL is kept")
        except msgspec.DecodeError as error:
            return wire.encode_error("refused", f"arguments: {error}")
        except Ambiguous as error:
            return wire.encode_error("ambiguous", str(error))
        except (AccountError, VaultError, ValueError) as error:
            return wire.encode_error("refused", str(error))
        except SQLAlchemyError as error:
            log.error("the store refused", op=op, error=type(error).__name__)
            return wire.encode_error("internal", "the store refused; nothing was written")
        except Exception:
            log.exception("operation failed", op=op)
            return wire.encode_error("internal", "see the log of the policy process")
