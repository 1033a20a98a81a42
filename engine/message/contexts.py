"""Contexts: where a field stands, so how it is escaped; nothing reaches HTML or a destination in any other way.

Law: a value in TEXT cannot end its element or attribute; a value in a destination cannot change its scheme, host or
path segments; whatever cannot stand where it is put is refused with `RenderError`, never repaired.
"""

from __future__ import annotations

import enum
import html
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

from engine.message.renderer import RenderError
from tracker.links import safe_target


class Context(enum.Enum):
    """Where a field stands, so how it is escaped. PLAIN is the text part and the subject: not at all."""

    TEXT = "text"
    URL = "url"
    HOST = "host"
    PATH = "path"
    QUERY = "query"
    PLAIN = "plain"
    HEADER = "header"


PROVIDED: Final = ("unsubscribe_url", "preferences_url", "notice_url", "view_url", "postal_address")
PROVIDED_PATHS: Final[frozenset[tuple[str, ...] | None]] = frozenset((name,) for name in PROVIDED)

_ADDRESS_FIELD = re.compile(
    r"(?:^|[_.\d])(?:e_?mails?|e?mail_?addr(?:ess)?(?:es)?|addr(?:ess)?(?:es)?|recipients?|rcpt|to)(?:$|[_.\d])",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def looks_like_address(name: str) -> bool:
    """{{ email }}, {{ customer.emailAddress }}, {{ addr2 }}: a field that may hold an address (P-47)."""
    return _ADDRESS_FIELD.search(_CAMEL.sub("_", name)) is not None


# ---- escapes: str in, str out; RenderError when a value cannot stand there


def escape_text(value: str) -> str:
    return html.escape(clean_text(value), quote=True)


_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_BAD_IN_URL = re.compile("[\x00-\x20\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def clean_text(value: str) -> str:
    """Controls and lone surrogates have no form in HTML or UTF-8: the replacement character says that something was."""
    return value if value.isprintable() else _CONTROLS.sub("\ufffd", value)


def _url(value: str) -> str:
    """A whole destination, or the part that begins it: http, https or mailto, nothing that could be another scheme."""
    value = value.strip(" ")
    if not value.lower().startswith(("https://", "http://", "mailto:")) or _BAD_IN_URL.search(value):
        raise RenderError("a field that begins a link is not an http, https or mailto address")
    return quote(value, safe="%/:?#[]@!$&()*+,;=~-._")


def _component(safe: str) -> Callable[[str], str]:
    def escape(value: str) -> str:
        if _CONTROLS.search(value):
            raise RenderError("a field inside a link holds control characters")
        return quote(value, safe=safe)

    return escape


_path, _query = _component("/"), _component("")


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]*", value):
        raise RenderError("a field in the host part of a link has other than letters, digits, dots and hyphens")
    return value


URL_ESCAPES: Final[dict[Context, Callable[[str], str]]] = {
    Context.URL: _url,
    Context.HOST: _host,
    Context.PATH: _path,
    Context.QUERY: _query,
}
FILTER_NAMES: Final = {context: f"sp_{context.value}" for context in URL_ESCAPES}


def _as_filter(escape: Callable[[str], str]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        return None if value is None else escape(str(value))  # None: absent, the finalizer's business

    return apply


FILTERS: Final = {FILTER_NAMES[context]: _as_filter(escape) for context, escape in URL_ESCAPES.items()}


def destination_context(before: str) -> Context:
    """Which part of a destination begins where `before` ends."""
    before = before.lstrip()
    if not before:
        return Context.URL
    if "?" in before or "#" in before:
        return Context.QUERY
    authority = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//", before)
    if authority is not None and "/" not in before[authority.end() :]:
        return Context.HOST
    return Context.PATH


def trackable(value: str) -> str | None:
    """The destination of a static http or https link, as a browser would read the attribute; None for all others, and
    for those that the tracker would not redirect to (`tracker.links.safe_target`): they are left as they are."""
    destination = html.unescape(value).strip()
    if not destination.lower().startswith(("http://", "https://")) or _BAD_IN_URL.search(destination):
        return None
    return destination if len(destination) <= 2_000 and safe_target(destination) is not None else None
