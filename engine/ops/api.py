"""The listener of the ops process: ``/metrics``, ``/healthz``, ``/readyz`` on loopback.

Answers: ``/healthz`` 200 as long as this process answers at all; ``/readyz`` 200 when Redis answers, the writer's
socket answers (if this host has one), no process fell silent and no supervised child is down, else 503; its body names
every part. ``/metrics``: `engine.ops.metrics`.

Never: authentication (it binds to loopback, a proxy in front may add some), state changes, personal data.
Known limits: over several hosts each has its own listener; readiness is that of this host.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import redis.exceptions
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST
from redis.asyncio import Redis

from engine.ops.metrics import StoreFacts, exposition, store_facts
from engine.settings import EngineSettings
from policy import logs, outlets
from policy.restoring import is_quarantined
from policy.settings import PolicySettings, load
from policy.valkey import connect
from policy.vitals import Sign, Vitals, read_all, run_dir

_ASK_SECONDS = 2.0  # Prometheus gives up a scrape after 10 s; a part that needs more than 2 is not ready


@dataclass(frozen=True, slots=True)
class Readiness:
    """Every part and whether it works."""

    parts: dict[str, bool]

    @property
    def ready(self) -> bool:
        return all(self.parts.values())


def readiness(signs: list[Sign], now: float, stale_seconds: float, redis_up: bool, writer_up: bool | None) -> Readiness:
    """Pure: a process is up when it spoke within stale_seconds; a child of `up` when, besides, its supervisor says so.

    So a child that was started and has not spoken yet is not up. writer_up None: no writer on this host. now: seconds
    since the epoch.
    """
    parts = {"redis": redis_up}
    if writer_up is not None:
        parts["writer"] = writer_up
    for sign in signs:
        # as engine.supervisor.roles_of names them: of these there may be several
        name = f"{sign.role}-{sign.index}" if sign.role in ("engine", "tracker") else sign.role
        parts[name] = now - sign.at <= stale_seconds
    for sign in signs:
        children = sign.numbers.get("up")
        if sign.role == "supervisor" and isinstance(children, dict):
            for child, running in children.items():
                # the embedded server says nothing by itself: its supervisor and PING speak for it
                parts[child] = bool(running) and (child == "valkey" or parts.get(child, False))
    return Readiness(parts)


class Api:
    """The three routes over one data folder and one Redis."""

    def __init__(self, data_dir: Path, writer_socket: Path, redis: Redis, stale_seconds: float) -> None:
        self._data_dir = data_dir
        self._writer_socket = writer_socket
        self._redis = redis
        self._stale_seconds = stale_seconds
        self.scrapes = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1024)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        return app

    def statistics(self) -> dict[str, int]:
        return {"scrapes_total": self.scrapes}

    async def _metrics(self, _request: web.Request) -> web.Response:
        self.scrapes += 1
        store: StoreFacts | None = None
        with contextlib.suppress(redis.exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_ASK_SECONDS):
                store = await store_facts(self._redis)
        body = exposition(read_all(self._data_dir), store, time.time())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"})

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"alive": True}, headers={"Cache-Control": "no-store"})

    async def _readyz(self, _request: web.Request) -> web.Response:
        redis_up, writer_up = await asyncio.gather(self._redis_answers(), self._writer_answers())
        state = readiness(read_all(self._data_dir), time.time(), self._stale_seconds, redis_up, writer_up)
        if is_quarantined(self._data_dir):
            state.parts["quarantine"] = False
        return web.json_response(
            {"ready": state.ready, "parts": state.parts},
            status=200 if state.ready else 503,
            headers={"Cache-Control": "no-store"},
        )

    async def _redis_answers(self) -> bool:
        with contextlib.suppress(redis.exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_ASK_SECONDS):
                return bool(await self._redis.ping())
        return False

    async def _writer_answers(self) -> bool | None:
        """None: no socket, so no writer on this host (several hosts over PostgreSQL, or ops alone)."""
        if not self._writer_socket.exists():
            return None
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ASK_SECONDS):
                _, writer = await asyncio.open_unix_connection(str(self._writer_socket))
                writer.close()
                await writer.wait_closed()
                return True
        return False


async def serve(
    policy: PolicySettings,
    engine: EngineSettings,
    stop: asyncio.Event,
    listening: Callable[[str], None] = lambda _url: None,
) -> None:
    """Listen until stop is set. The URL in use goes to listening and ``data_dir/run/ops.url`` (port 0 picks one)."""
    store = connect(policy.redis_address(), max_connections=2)
    api = Api(policy.data_dir, policy.writer_socket, store, engine.ops.stale_seconds)
    # no access log: a scrape every few seconds is no news
    runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=1.0)
    vitals = Vitals(policy.data_dir, "ops")
    note = run_dir(policy.data_dir) / "ops.url"
    await runner.setup()
    beat: asyncio.Task[None] | None = None
    try:
        await web.TCPSite(runner, engine.ops.host, engine.ops.port).start()
        host, port = runner.addresses[0][:2]
        vitals.publish(api.statistics(), time.time())
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        note.write_text(f"{url}\n", encoding="ascii")
        listening(url)
        beat = asyncio.create_task(vitals.beat(api.statistics, time.time))
        await stop.wait()
    finally:
        if beat is not None:
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat
        note.unlink(missing_ok=True)
        await runner.cleanup()
        await store.aclose()


def run_api(config: Path | None) -> int:
    """`sales-push run ops`: 0 after SIGTERM or SIGINT, 1 when the address is taken."""
    policy, engine = load(PolicySettings, config), load(EngineSettings, config)
    outlets.check(policy, (), datetime.now(UTC).date())
    logs.configure("ops", policy.log_json, policy.log_level)

    async def main() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await serve(policy, engine, stop)
        except OSError as error:
            logging.getLogger("sales_push.ops").error(
                "cannot listen on %s:%s: %s", engine.ops.host, engine.ops.port, error.strerror
            )
            return 1
        return 0

    return uvloop.run(main())
