"""Rights pages: the button that proves a mailbox, and a form for people without an account (P-15, P-53).

Law: GET and HEAD ask nobody and change nothing, so a mail scanner that follows the link does nothing; POST confirms.
The answers are the same whatever the token and whatever the address: who guesses learns neither whether a request
exists nor whether anybody holds data. No cookie, no script, no query is looked at.

    GET  /r/<token>   the page with the button        POST   the mailbox is proved
    GET  /r           the form: which right, address   POST   the request is open; letters go to that address

Done is said only after the policy writer said that it is committed; else 503 with Retry-After.

Known limits: the form limits nobody by where he comes from (we do not look); the writer limits how many requests an
hour strangers may open.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from aiohttp import web

from policy.wire import WireError
from tracker.answers import Answers, nothing

KINDS: Final = (
    ("access", "a copy of the data you hold about me"),
    ("portability", "my data in a form I can take elsewhere"),
    ("rectification", "a correction of data about me"),
    ("erasure", "the erasure of my data"),
    ("restriction", "that my data are kept but not used"),
    ("objection", "no use of my data for marketing"),
    ("withdrawal", "what I agreed to no longer to hold"),
    ("minor", "the erasure of a child's data"),
)
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_BUSY: Final = ("busy", "redis", "internal", "unknown")  # ours, not the visitor's


class RightsWriter(Protocol):
    """policy.wire.WriterClient, as far as these pages use it."""

    async def call(self, op: str, **kwargs: Any) -> Any: ...


class Rights:
    """The handlers. writer None: this installation has no desk for rights, and says 503. form and durable as in
    `tracker.preferences`."""

    def __init__(
        self,
        *,
        answers: Answers,
        writer: RightsWriter | None,
        form: Callable[[web.Request], Awaitable[list[tuple[str, str]] | None]],
        durable: Callable[[Callable[[], Awaitable[object]]], Awaitable[bool]],
    ) -> None:
        self._answers = answers
        self._writer = writer
        self._form = form
        self._durable = durable

    def routes(self) -> list[web.AbstractRouteDef]:
        return [
            web.get("/r", self.ask),
            web.post("/r", self.open),
            web.options("/r", self.options),
            web.get("/r/{token:.*}", self.show),
            web.post("/r/{token:.*}", self.confirm),
            web.options("/r/{token:.*}", self.options),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """The token is neither looked up nor repeated in the page: the form posts to where it is."""
        return self._answers.page("confirm.html")

    async def confirm(self, request: web.Request) -> web.Response:
        token = request.match_info["token"]
        if _TOKEN.fullmatch(token):  # else nobody's: the same answer without asking
            if self._writer is None:
                return self._answers.plain(503)
            writer = self._writer
            if not await self._durable(lambda: writer.call("rights_confirm", token=token)):
                return self._answers.plain(503)
        return self._answers.page("confirmed.html")

    async def ask(self, _request: web.Request) -> web.Response:
        return self._answers.page("ask.html", kinds=KINDS, wrong=False)

    async def open(self, request: web.Request) -> web.Response:
        fields = await self._form(request)
        if fields is None:
            response = self._answers.plain(413)
            response.force_close()
            return response
        given = dict(reversed(fields))
        kind, address = given.get("kind", ""), given.get("address", "").strip()
        if kind not in [name for name, _ in KINDS] or not 3 <= len(address) <= 320:
            return self._answers.page("ask.html", kinds=KINDS, wrong=True)
        if self._writer is None:
            return self._answers.plain(503)
        writer, refused = self._writer, False

        async def deed() -> None:
            nonlocal refused
            try:
                await writer.call("rights_open", kind=kind, address=address, channel="page")
            except WireError as error:
                if error.kind in _BUSY:
                    raise
                refused = True  # not an address

        if not await self._durable(deed):
            return self._answers.plain(503)
        if refused:
            return self._answers.page("ask.html", kinds=KINDS, wrong=True)
        return self._answers.page("asked.html")

    async def options(self, _request: web.Request) -> web.Response:
        return nothing("GET, HEAD, OPTIONS, POST")
