"""Logs: one line an event, JSON on stderr, and no address in it, whoever logs and whatever he passes.

Law: what leaves through a handler configured here matches nothing that looks like an address. Rooms do not log
addresses in the first place; this is the belt to those braces (a library's message, an exception's text, a URL).

    configure("tracker", json=True)          once, first thing in a process
    log = structlog.get_logger()             log.info("listening", port=8080)

Lines of the standard library's logging (asyncio, aiohttp, alembic) pass through the same processors.

Known limits: something that looks like an address but is none (a Message-ID) is blanked too. An address cut in two
fields is not found. Tracebacks show code, never the values of variables.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog

BLANK = "<address>"
# wide on purpose: anything @ anything, also quoted, percent-, QP- or entity-encoded, also in full-width; no nesting, so
# the time is bounded by 256 steps a character
_LOOKS_LIKE = re.compile(
    r"""(?:"[^"\n]{0,128}"|[^\s@<>]{1,256})(?:@|%40|=40|＠|&\#64;)(?:\[[^\]\n]{0,64}\]|[^\s@<>"'(),;\[\]{}]{1,256})""",
    re.IGNORECASE,
)
_TEXT_LIMIT = 8192  # a line longer than this is a mistake; logs are not a place for payloads
_DEPTH = 6


def without_addresses(text: str) -> str:
    """The text with everything that looks like an address blanked, cut at 8,192 characters."""
    if len(text) > _TEXT_LIMIT:
        text = text[:_TEXT_LIMIT] + "…"
    if "@" in text or "%40" in text or "=40" in text or "＠" in text or "&#64;" in text:
        return _LOOKS_LIKE.sub(BLANK, text)
    return text


def _clean(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return without_addresses(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"  # bytes in a log line are keys, tags or payloads: never shown
    if depth >= _DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {without_addresses(str(key)): _clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, depth + 1) for item in value]
    return without_addresses(str(value))


def drop_addresses(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The last processor before the renderer: every key and value, nested ones included."""
    for key in list(event):
        if key.startswith("_"):
            continue  # structlog's own: the record, removed before rendering
        value = _clean(event[key])
        clean_key = without_addresses(key)
        if clean_key != key:
            del event[key]
        event[clean_key] = value
    return event


def configure(role: str, json: bool = True, level: str = "info", stream: TextIO | None = None) -> None:
    """Send structlog and standard logging of this process to stderr (or stream). role: engine-0, tracker, policy, …"""

    def name_role(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("role", role)
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        name_role,
        structlog.processors.format_exc_info,
    ]
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=False)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, drop_addresses, renderer],
    )
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # one line a request or a migration step is noise at info
    for noisy in ("aiohttp.access", "alembic", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
