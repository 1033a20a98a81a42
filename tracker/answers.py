"""Answers: every response there is, made in one place, so that none leaves without its headers (tracking.md 3.3).

Law: no answer sets a cookie, a validator (ETag, Last-Modified) or Accept-CH; none echoes anything of the request; the
pixel is the same 43 bytes under the same headers always. Pages forbid everything but their own style sheet, which
Content-Security-Policy names by hash; referrers never carry a token onward.

Web views (the account holder's own HTML) come in a sandbox: no scripts, no forms, no plug-ins, an origin of its own.
"""

from __future__ import annotations

import base64
from hashlib import sha256
from importlib import resources
from typing import Any, Final
from urllib.parse import urlsplit

import jinja2
from aiohttp import web
from markupsafe import Markup

from policy.pages import NOTHING, Shown

GIF: Final = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAICRAEAOw==")
assert len(GIF) == 43

_NO_STORE: Final = "no-store, no-cache, private, max-age=0"
_ALWAYS: Final = {
    "Cache-Control": _NO_STORE,
    "Pragma": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Referrer-Policy": "no-referrer",
}
_PIXEL: Final = {**_ALWAYS, "Content-Type": "image/gif", "Cross-Origin-Resource-Policy": "cross-origin"}
_TEXT: Final = {**_ALWAYS, "Content-Type": "text/plain; charset=utf-8", "Cross-Origin-Resource-Policy": "same-origin"}
# Sandboxed without allow-same-origin the page is its own opaque origin; links open by themselves, nothing else does.
_VIEW_POLICY: Final = (
    "sandbox allow-popups allow-popups-to-escape-sandbox allow-top-navigation-by-user-activation; "
    "default-src 'none'; img-src https: http: data:; style-src 'unsafe-inline' https:; font-src https: data:; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def is_web(url: str) -> bool:
    """A link that may stand in a page: http or https, nothing cleverer."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def pixel() -> web.Response:
    return web.Response(body=GIF, headers=_PIXEL)


def redirect(target: str) -> web.Response:
    """302, never 301: that would be cached for ever and could not be taken back. target: from `links.safe_target`."""
    return web.Response(status=302, headers={**_ALWAYS, "Location": target})


def text(body: str, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body.encode(), headers=_TEXT)


def nothing(allow: str) -> web.Response:
    """To OPTIONS: what may be asked, and no effect."""
    return web.Response(status=204, headers={**_ALWAYS, "Allow": allow})


def view(html: str) -> web.Response:
    headers = {**_ALWAYS, "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": _VIEW_POLICY}
    return web.Response(body=html.encode("utf-8", "replace"), headers=headers)


_PLAIN: Final = {
    400: ("This request is not understood", "Your browser sent something that is not a valid request."),
    404: ("There is nothing here", "The link may be cut or mistyped, or what it led to no longer exists."),
    405: ("This is not how it works", "The page exists, but not for this kind of request."),
    413: ("That is too much", "The request was larger than any form of ours."),
    500: ("Something went wrong here", "It is our mistake and has been noted. Please try again."),
    503: (
        "Not now, please try again",
        "Your request could not be stored safely just now. Please try again in a minute.",
    ),
}


class Answers:
    """Pages from templates. officer: name and address of the privacy officer, on every page (P-04); shown: the
    operator's own pages and the periods that the sweeper goes by (`policy.pages`, P-06)."""

    def __init__(self, officer_name: str, officer_address: str, *, retry_after: int, shown: Shown = NOTHING) -> None:
        folder = resources.files(__package__).joinpath("templates")
        style = folder.joinpath("style.css").read_text("utf-8")
        digest = base64.b64encode(sha256(style.encode()).digest()).decode("ascii")
        self._headers = {
            **_ALWAYS,
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; "
            "frame-ancestors 'none'; base-uri 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "interest-cohort=(), browsing-topics=()",
            "X-Frame-Options": "DENY",
        }
        self._retry_after = retry_after
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("tracker"), autoescape=True, undefined=jinja2.StrictUndefined, auto_reload=False
        )
        self._templates.filters["is_web"] = is_web
        self._templates.globals.update(
            style=Markup(style),  # our own file, hashed above: not escaped
            officer_name=officer_name,
            officer_address=officer_address,
            shown=shown,
        )
        self._plain = {
            status: self._render("plain.html", title=title, text=words) for status, (title, words) in _PLAIN.items()
        }

    def page(self, template: str, **values: Any) -> web.Response:
        return web.Response(body=self._render(template, **values), headers=self._headers)

    def plain(self, status: int, allow: str = "") -> web.Response:
        """One of our few constant pages; a status without one of its own gets the words of 400 or 500."""
        body = self._plain.get(status) or self._plain[500 if status >= 500 else 400]
        response = web.Response(status=status, body=body, headers=self._headers)
        if status == 503:
            response.headers["Retry-After"] = str(self._retry_after)
        if allow:
            response.headers["Allow"] = allow
        return response

    def _render(self, template: str, **values: Any) -> bytes:
        return self._templates.get_template(template).render(values).encode("utf-8", "replace")
