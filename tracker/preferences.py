"""Preferences: one plain form, no script, for the three choices a recipient has (P-08, P-53, RFC 8058's human side).

Law: GET shows, POST acts, and a choice is confirmed only when the policy writer said that all of what was chosen is
durable; else 503, and posting again is harmless (every choice is idempotent). The page never shows what was chosen
before: whoever holds a forwarded mail may add to a person's peace, and learns nothing.

    list      no more of this list              opt_out
    account   nothing of this account           suppress, scope ACCOUNT
    tracking  no record of opens and clicks     withdraw, both purposes; delivered mail falls silent too (decision 12)

Known limits: choosing fewer messages instead of none, and asking for messages again, belong to the account holder's
own pages. Tracking is withdrawn at this account, not at every account that knows the address.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from aiohttp import web

from policy.suppression import Scope
from policy.wire import SuppressionRecord
from tracker.answers import Answers, nothing
from tracker.links import Links, OptOut
from tracker.tables import Sender, Shelf, Unavailable

CHOICES: Final = ("list", "account", "tracking")
PURPOSES: Final = ("open_tracking", "click_tracking")
_SOURCE: Final = "preference page"


class ChoiceWriter(Protocol):
    """The seam to policy.wire.WriterClient: each returns only when durable, else raises."""

    async def opt_out(self, list: int, partition: int, tag: bytes, source: str) -> None: ...

    async def suppress(self, entries: list[SuppressionRecord]) -> int: ...

    async def withdraw(self, account: int, tag: bytes, purpose: str) -> bool: ...


class Preferences:
    """The handlers. form: reads a request's fields; durable: runs a deed and says whether it is stored (`Pages`)."""

    def __init__(
        self,
        *,
        links: Links,
        answers: Answers,
        senders: Shelf[int, Sender],
        writer: ChoiceWriter,
        form: Callable[[web.Request], Awaitable[list[tuple[str, str]] | None]],
        durable: Callable[[Callable[[], Awaitable[object]]], Awaitable[bool]],
    ) -> None:
        self._links = links
        self._answers = answers
        self._senders = senders
        self._writer = writer
        self._form = form
        self._durable = durable

    def routes(self) -> list[web.AbstractRouteDef]:
        return [
            web.get("/p/{token:.*}", self.show),
            web.post("/p/{token:.*}", self.save),
            web.options("/p/{token:.*}", self.options),
        ]

    async def show(self, request: web.Request) -> web.Response:
        return await self._show(request.match_info["token"], nothing_chosen=False)

    async def _show(self, name: str, *, nothing_chosen: bool) -> web.Response:
        token = self._links.open_optout(name)
        if token is None:
            return self._answers.page("code.html")
        try:
            sender = await self._senders.get(token.list)
        except Unavailable:
            sender = None  # the names are a courtesy, the choices are not
        return self._answers.page("preferences.html", token=name, sender=sender, nothing_chosen=nothing_chosen)

    async def save(self, request: web.Request) -> web.Response:
        name = request.match_info["token"]
        token = self._links.open_optout(name)
        if token is None:
            return self._answers.page("code.html")
        fields = await self._form(request)
        if fields is None:
            response = self._answers.plain(413)
            response.force_close()
            return response
        chosen = [choice for choice in CHOICES if ("choice", choice) in fields]
        if not chosen:
            return await self._show(name, nothing_chosen=True)
        # What needs no look-up comes first: leaving the list must work when nothing else does.
        if "list" in chosen and not await self._durable(lambda: self._leave(token)):
            return self._answers.plain(503)
        try:
            sender = await self._senders.get(token.list)
        except Unavailable:
            sender = None
        if chosen != ["list"]:
            if sender is None:  # the list, and with it the account, is not known just now
                return self._answers.plain(503)
            account = sender.account
            if "account" in chosen and not await self._durable(lambda: self._leave_account(account, token)):
                return self._answers.plain(503)
            if "tracking" in chosen and not await self._durable(lambda: self._fall_silent(account, token)):
                return self._answers.plain(503)
        return self._answers.page("saved.html", token=name, sender=sender, chosen=chosen)

    async def _leave(self, token: OptOut) -> None:
        await self._writer.opt_out(token.list, token.partition, token.tag, _SOURCE)

    async def _leave_account(self, account: int, token: OptOut) -> None:
        entry = SuppressionRecord(token.tag, token.partition, Scope.ACCOUNT, account, "opt-out", _SOURCE)
        await self._writer.suppress([entry])

    async def _fall_silent(self, account: int, token: OptOut) -> None:
        for purpose in PURPOSES:  # False means that nobody by that tag is known: then nothing is tracked either
            await self._writer.withdraw(account, token.tag, purpose)

    async def options(self, _request: web.Request) -> web.Response:
        return nothing("GET, HEAD, OPTIONS, POST")
