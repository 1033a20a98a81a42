"""The app: the tracker's parts put together, from settings to a listening socket.

Law: what the peer sends costs bounded memory and time (header bytes, header count, body bytes, patience, connections),
bodies are never decompressed, and neither a log line nor an answer holds a peer's address, a URL or a header: the
access log is off and aiohttp's own error reports, which name the peer, are replaced.

Start: keys, read-only SQL, Redis, the writer's socket; then the port opens, at once. Until the negative list is read,
hits wait and pages work. Stop: no new connections, requests in hand are answered, waiting hits are written.

Known limits: TLS belongs to a proxy in front, which must not log either. Over the limit of connections the oldest that
is not being served is closed; a flood of complete requests is answered, in order of arrival.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web
from sqlalchemy import Engine

from policy import schema, valkey
from policy.keysource import source_of
from policy.pages import NOTHING, Shown
from policy.pages import shown as told_of
from policy.restoring import is_quarantined
from policy.settings import PolicySettings
from policy.wire import WriterClient
from tracker.answers import Answers
from tracker.links import Links, safe_target
from tracker.pages import Pages, body_of, form_of
from tracker.preferences import ChoiceWriter, Preferences
from tracker.recorder import Recorder, Replays
from tracker.rights import Rights, RightsWriter
from tracker.settings import TrackerSettings
from tracker.tables import Sender, Shelf, Source, SqlSource, Unavailable, Withdrawn

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

_SQL_THREADS = 2  # a miss is one small SELECT; more threads would only queue at SQLite
_OLDEST_LOOKED_AT = 64  # connections examined for an idle one when the limit is reached
_STOP_SECONDS = 5.0


def _safe(targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Acceptance looked at the links too; what would not be redirected to now is "", and its click a 404."""
    return None if targets is None else tuple(safe_target(url) or "" for url in targets)


class Writer(ChoiceWriter, Protocol):
    """policy.wire.WriterClient, as far as the tracker uses it."""

    async def close(self) -> None: ...


class _Connection(web.RequestHandler):
    """aiohttp's connection, without its error reports (they name the peer and quote the request)."""

    def __init__(self, server: web.Server, listener: _Listener, **options: Any) -> None:
        super().__init__(server, **options)
        self._listener = listener

    @property
    def is_served(self) -> bool:
        return self._request_in_progress

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.closed(self)
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        self._listener.count_error(exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = self._listener.answers.plain(status)
        response.headers["Server"] = ""  # else aiohttp names itself and its version
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        self._listener.count_error(kwargs.get("exc_info"))


class _Listener:
    """Makes connections and keeps their number within the limit: the oldest that is not being served makes room."""

    def __init__(self, server: web.Server, answers: Answers, limit: int, options: Mapping[str, Any]) -> None:
        self._server = server
        self._limit = limit
        self._options = options
        self._open: dict[_Connection, None] = {}  # oldest first
        self.answers = answers
        self.shed = 0
        self.errors = 0

    def __len__(self) -> int:
        return len(self._open)

    def __call__(self) -> _Connection:
        return _Connection(self._server, self, loop=asyncio.get_running_loop(), **self._options)

    def opened(self, connection: _Connection) -> None:
        self._open[connection] = None
        if len(self._open) <= self._limit:
            return
        self.shed += 1
        oldest = itertools.islice(self._open, _OLDEST_LOOKED_AT)
        idle = next((old for old in oldest if not old.is_served), connection)
        del self._open[idle]
        idle.force_close()

    def closed(self, connection: _Connection) -> None:
        self._open.pop(connection, None)

    def count_error(self, error: object) -> None:
        self.errors += 1
        log.info("a request was not understood: %s", type(error).__name__)


def create_app(
    pages: Pages, preferences: Preferences, rights: Rights, answers: Answers, ready: Callable[[], bool]
) -> web.Application:
    """The application: routes, the shield around them, and no header that names the software."""

    @web.middleware
    async def shield(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        try:
            return await handler(request)
        except web.HTTPMethodNotAllowed as refused:
            return answers.plain(405, allow=", ".join(sorted(refused.allowed_methods)))
        except web.HTTPException as refused:
            return answers.plain(refused.status)
        except Unavailable:
            return answers.plain(503)
        except Exception as error:
            pages.count["failures"] += 1
            log.error("a page failed: %s", type(error).__name__)
            return answers.plain(503)

    async def nameless(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.popall("Server", None)

    async def health(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else answers.plain(503)

    app = web.Application(middlewares=[shield])
    app.on_response_prepare.append(nameless)
    app.add_routes([*pages.routes(), *preferences.routes(), *rights.routes(), web.get("/healthz", health)])
    return app


class Tracker:
    """The running service. start() -> the port; stop() leaves nothing open. Everything outside is handed in."""

    def __init__(
        self,
        settings: TrackerSettings,
        *,
        links: Links,
        source: Source,
        redis: Redis,
        writer: Writer,
        officer: tuple[str, str],
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
        rights: RightsWriter | None = None,
        shown: Shown = NOTHING,
        quarantined: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._writer = writer
        self._threads = ThreadPoolExecutor(_SQL_THREADS, thread_name_prefix="tracker-sql")
        self._answers = Answers(*officer, retry_after=settings.retry_after_seconds, shown=shown)
        self.withdrawn = Withdrawn(
            source.withdrawn,
            self._in_thread,
            redis,
            stale_seconds=settings.negative_stale_seconds,
            reload_seconds=settings.negative_reload_seconds,
            clock=time.monotonic,
        )
        self.recorder = Recorder(
            redis,
            is_withdrawn=self.withdrawn.__contains__,
            may_write=lambda: self.withdrawn.is_fresh() and not quarantined(),
            replays=Replays(secrets.token_bytes(16)),
            capacity=settings.buffer_hits,
            flush_seconds=settings.flush_seconds,
            stream_hits=settings.stream_hits,
        )
        list_senders: Shelf[int, Sender] = self._shelf(source.sender_of_list)
        self.pages = Pages(
            links=links,
            answers=self._answers,
            recorder=self.recorder,
            targets=self._shelf(lambda job: _safe(source.links(job))),
            job_senders=self._shelf(source.sender_of_job),
            list_senders=list_senders,
            views=self._shelf(source.view),
            writer=writer,
            clock=clock,
            body_bytes=settings.body_bytes,
            body_seconds=settings.body_seconds,
            writer_seconds=settings.writer_seconds,
        )
        preferences = Preferences(
            links=links,
            answers=self._answers,
            senders=list_senders,
            writer=writer,
            form=self._form,
            durable=self.pages.durable,
        )
        desk = Rights(answers=self._answers, writer=rights, form=self._form, durable=self.pages.durable)
        app = create_app(self.pages, preferences, desk, self._answers, self.withdrawn.is_loaded)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_STOP_SECONDS)
        self._listener: _Listener | None = None
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Open the port and begin to follow; the port's number. Raises OSError when the address is taken."""
        settings = self._settings
        await self._runner.setup()
        assert self._runner.server is not None
        options = {
            "access_log": None,
            "auto_decompress": False,  # CVE-2025-69223: a small body must not become a large one
            "keepalive_timeout": settings.keepalive_seconds,
            "max_line_size": settings.header_bytes,
            "max_field_size": settings.header_bytes,
            "max_headers": settings.headers,
            "lingering_time": 1.0,
        }
        self._listener = _Listener(self._runner.server, self._answers, settings.connections, options)
        self._server = await asyncio.get_running_loop().create_server(
            self._listener,
            settings.host,
            settings.port,
            backlog=settings.backlog,
            reuse_port=settings.workers > 1 or None,
        )
        self._tasks = [
            asyncio.create_task(self.withdrawn.run(), name="negative-list"),
            asyncio.create_task(self.recorder.run(), name="recorder"),
        ]
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Finish what is in hand, write what waits, close everything that start and __init__ opened. Twice is fine."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._runner.cleanup()
        if len(self._tasks) == 2:
            following, recording = self._tasks
            recording.cancel()
            await asyncio.gather(recording, return_exceptions=True)
            await self.recorder.close()  # the negative list is still followed while the last hits are asked about
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            self._tasks = []
        await self._writer.close()
        await self._redis.aclose()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def statistics(self) -> dict[str, float | dict[str, float]]:
        """For policy.vitals: names are ours, values are counts."""
        hits = self.recorder.statistics()
        return {
            "requests": dict(self.pages.count),
            "hits_recorded": hits.recorded,
            "hits_written": hits.written,
            "hits_dropped": hits.dropped,
            "hits_withheld": hits.withheld,
            "hits_replayed": hits.replayed,
            "hits_waiting": hits.waiting,
            "negative_size": len(self.withdrawn),
            "negative_fresh": int(self.withdrawn.is_fresh()),
            "connections": 0 if self._listener is None else len(self._listener),
            "connections_shed": 0 if self._listener is None else self._listener.shed,
            "bad_requests": 0 if self._listener is None else self._listener.errors,
        }

    async def _form(self, request: web.Request) -> list[tuple[str, str]] | None:
        body = await body_of(request, self._settings.body_bytes, self._settings.body_seconds)
        return None if body is None else form_of(body)

    async def _in_thread(self, question: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, question)

    def _shelf(self, read: Callable[[int], Any]) -> Shelf[int, Any]:
        return Shelf(
            read,
            self._in_thread,
            capacity=self._settings.tables,
            seconds=self._settings.table_seconds,
            clock=time.monotonic,
        )


def build(settings: TrackerSettings, policy: PolicySettings) -> tuple[Tracker, Engine]:
    """The tracker over the real stores. Raises policy.keys.KeyringError; SQL and Redis may be away still.

    The engine is the caller's to dispose of after stop().
    """
    keyring = source_of(policy).load()
    engine = schema.open_store(policy.sql_address(), writer=False)
    writer = WriterClient(policy.writer_socket)
    tracker = Tracker(
        settings,
        links=Links(keyring.token, keyring.token_id, policy.public_url, keyring.heard),
        source=SqlSource(engine),
        redis=valkey.connect(policy.redis_address()),
        writer=writer,
        officer=(policy.officer.name, policy.officer.address),
        rights=writer,
        shown=told_of(policy.pages, policy.retention, policy.subprocessors),
        quarantined=lambda: is_quarantined(policy.data_dir),
    )
    return tracker, engine
