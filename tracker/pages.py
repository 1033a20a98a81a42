"""Pages: what a visitor gets for each URL of a mail (tracking.md 3.3, mail-standards.md 2.4).

Law: GET and HEAD never change state; HEAD leaves no event. An opt-out is POST, in either encoding of RFC 8058 or none,
and 200 is said only after the policy writer said that it is durable in both stores; else 503 with Retry-After, never a
false 200. What the token in the URL says is all that counts: no login, no cookie, no Origin, no query is looked at.

    GET  /o/<token>.gif   the pixel, the same whatever the token                      hit: OPENED
    GET  /c/<token>/<n>   302 to link n of the job's table, else the one 404          hit: CLICKED
    GET  /u/<token>       the page with the button                    POST            leaves the list
    GET  /v/<token>       the web version, sandboxed                  GET /n/<token>  the notice (P-52)

Redirects go only where the job's own link table says, and only to plain http and https (`links.safe_target`): there is
no URL in the URL. A token that opens to nothing gets the page for leaving by hand, with 200: it tells a guesser nothing
and a person what to do; its words say that nothing was changed.

Known limits: the web version shows the campaign without anything personal, so its links are untracked and it has no
opt-out of its own.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp import web

from policy.events import Hit, Kind
from policy.gate import Mode
from tracker.answers import Answers, nothing, pixel, redirect, text, view
from tracker.links import Links
from tracker.recorder import Recorder
from tracker.tables import Sender, Shelf, Unavailable
from tracker.visitors import Bursts, Clues, classify

log = logging.getLogger(__name__)

_ONE_CLICK: Final = (b"List-Unsubscribe", b"One-Click")
_CODE: Final = re.compile(r"[A-Za-z2-7]{56}")  # an opt-out token anywhere in what was pasted

MODE_WORDS: Final[Mapping[Mode, str]] = {
    Mode.OFF: "Nothing.",
    Mode.AGGREGATE: "One more in an anonymous count for the whole campaign; nobody can tell that it was you.",
    Mode.DELIVERABILITY: "The day of the last opening, so that addresses nobody reads are no longer written to.",
    Mode.INDIVIDUAL: "That you did, and in which hour, with the kind of program in one word (such as “Windows”).",
}


class OptOutWriter(Protocol):
    """The seam to policy.wire.WriterClient; returns only when it is durable, else raises."""

    async def opt_out(self, list: int, partition: int, tag: bytes, source: str) -> None: ...


async def body_of(request: web.Request, limit: int, seconds: float) -> bytes | None:
    """A POST's body, None when it is too long, too slow or broken. Never raises for what the peer did."""
    try:
        async with asyncio.timeout(seconds):
            body = bytearray()
            async for part in request.content.iter_any():
                body += part
                if len(body) > limit:
                    return None
            return bytes(body)
    except (TimeoutError, OSError, web.HTTPException, ValueError):
        return None
    except Exception as error:  # aiohttp's payload errors share no public ancestor with the ones above
        log.info("a request body could not be read: %s", type(error).__name__)
        return None


def form_of(body: bytes) -> list[tuple[str, str]]:
    """Fields of an urlencoded body; nothing for anything else. Never raises."""
    try:
        return parse_qsl(body.decode("utf-8", "replace"), max_num_fields=20)
    except ValueError:
        return []


def is_one_click(body: bytes) -> bool:
    """RFC 8058 3.2: List-Unsubscribe=One-Click, urlencoded or multipart. Decides the shape of the answer, no more."""
    plain = unquote_to_bytes(body)
    return all(word in plain for word in _ONE_CLICK)


class Pages:
    """The handlers. Everything they need is handed in; `count` says what happened by name, for the metrics."""

    def __init__(
        self,
        *,
        links: Links,
        answers: Answers,
        recorder: Recorder,
        targets: Shelf[int, tuple[str, ...]],
        job_senders: Shelf[int, Sender],
        list_senders: Shelf[int, Sender],
        views: Shelf[int, str],
        writer: OptOutWriter,
        clock: Callable[[], int],
        body_bytes: int,
        body_seconds: float,
        writer_seconds: float,
    ) -> None:
        self._links = links
        self._answers = answers
        self._recorder = recorder
        self._targets = targets
        self._job_senders = job_senders
        self._list_senders = list_senders
        self._views = views
        self._writer = writer
        self._clock = clock
        self._body_bytes = body_bytes
        self._body_seconds = body_seconds
        self._writer_seconds = writer_seconds
        self._bursts = Bursts()
        self.count: Counter[str] = Counter()

    def routes(self) -> list[web.AbstractRouteDef]:
        return [
            web.get("/o/{token:.*}", self.open),
            web.get("/c/{token:.*}", self.click),
            web.get("/u/{token:.*}", self.ask),
            web.post("/u/{token:.*}", self.leave),
            web.options("/u/{token:.*}", self.options),
            web.get("/v/{token}", self.view),
            web.get("/n/{token}", self.notice),
            web.get("/", self.ask_by_hand),
        ]

    # ---- hits

    async def open(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            try:
                self._opened(request)
            except Exception as error:  # whatever is wrong with us, the reader's mail shows no broken image
                self.count["failures"] += 1
                log.error("a pixel could not be recorded: %s", type(error).__name__)
        return pixel()

    def _opened(self, request: web.Request) -> None:
        token = self._links.open_hit("open", request.match_info["token"].removesuffix(".gif"))
        if token is None:
            self.count["invalid_open"] += 1
            return
        self.count["opens"] += 1
        visitor = classify(self._clues(request, is_click=False))
        hit = Hit(Kind.OPENED, token.job, token.mref, self._clock(), token.mode, visitor)
        self._recorder.record(token.subject, hit)

    async def click(self, request: web.Request) -> web.Response:
        head, _, tail = request.match_info["token"].partition("/")
        token = self._links.open_hit("click", head)
        number = int(tail) if re.fullmatch(r"0|[1-9][0-9]{0,4}", tail) else -1
        if token is None or number < 0:
            self.count["invalid_click"] += 1
            return self._answers.plain(404)
        try:
            targets = await self._targets.get(token.job)
        except Unavailable:
            return self._answers.plain(503)
        if targets is None or number >= len(targets) or not targets[number]:
            self.count["unknown_click"] += 1
            return self._answers.plain(404)
        if request.method == "GET":
            self.count["clicks"] += 1
            now = self._clock()
            burst = self._bursts.saw(token.job, token.mref, number, len(targets), now)
            visitor = classify(self._clues(request, is_click=True, is_burst=burst))
            # Sec-GPC and DNT say no to being followed: count, and forget who (tracking.md, Signals)
            objects = request.headers.get("Sec-GPC") == "1" or request.headers.get("DNT") == "1"
            mode = min(token.mode, Mode.AGGREGATE) if objects else token.mode
            hit = Hit(Kind.CLICKED, token.job, token.mref, now, mode, visitor, number)
            self._recorder.record(token.subject, hit)
        return redirect(targets[number])

    @staticmethod
    def _clues(request: web.Request, *, is_click: bool, is_burst: bool = False) -> Clues:
        headers = request.headers
        purpose = " ".join(headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz")).lower()
        return Clues(
            agent=headers.get("User-Agent", ""),
            is_click=is_click,
            is_prefetch="prefetch" in purpose or "preview" in purpose or "prerender" in purpose,
            has_manners="Accept-Language" in headers or "Sec-Fetch-Mode" in headers or "Sec-Fetch-Dest" in headers,
            is_burst=is_burst,
        )

    # ---- leaving a list

    async def ask(self, request: web.Request) -> web.Response:
        """GET: the page with the button. Scanners and previews come here too; nothing happens to anybody."""
        return await self._ask(request.match_info["token"])

    async def ask_by_hand(self, _request: web.Request) -> web.Response:
        return self._answers.page("code.html")

    async def _ask(self, text_of_token: str) -> web.Response:
        token = self._links.open_optout(text_of_token)
        if token is None:
            self.count["invalid_optout"] += 1
            return self._answers.page("code.html")
        return self._answers.page("leave.html", token=text_of_token, sender=await self._sender(token.list))

    async def leave(self, request: web.Request) -> web.Response:
        """POST: first the deed, then its durability, then the body (which only shapes the answer), then 200."""
        name = request.match_info["token"]
        token = self._links.open_optout(name)
        if token is None:
            pasted = form_of(await body_of(request, self._body_bytes, self._body_seconds) or b"")
            found = [code[0] for key, value in pasted if key == "code" for code in _CODE.finditer(value)]
            return await self._ask(found[-1] if found else "")
        if not await self.durable(lambda: self._writer.opt_out(token.list, token.partition, token.tag, "opt-out link")):
            return self._answers.plain(503)
        self.count["opted_out"] += 1
        body = await body_of(request, self._body_bytes, self._body_seconds)
        if body is not None and is_one_click(body):
            response = text("Unsubscribed.\n")
        else:
            response = self._answers.page("left.html", token=name, sender=await self._sender(token.list))
        if body is None:
            response.force_close()
        return response

    async def durable(self, deed: Callable[[], Awaitable[object]]) -> bool:
        """True when the writer said so in time. False, counted and logged, whatever else happened: fails closed."""
        try:
            async with asyncio.timeout(self._writer_seconds):
                await deed()
        except Exception as error:
            self.count["not_durable"] += 1
            log.error("an opt-out could not be stored, 503: %s", type(error).__name__)
            return False
        return True

    async def options(self, _request: web.Request) -> web.Response:
        return nothing("GET, HEAD, OPTIONS, POST")

    async def _sender(self, list_number: int) -> Sender | None:
        """Names are a courtesy: the page works without them when SQL does not answer."""
        try:
            return await self._list_senders.get(list_number)
        except Unavailable:
            return None

    # ---- about a message

    async def view(self, request: web.Request) -> web.Response:
        job = self._links.open_job("view", request.match_info["token"])
        html = await self._views.get(job) if job is not None else None
        return self._answers.plain(404) if not html else view(html)

    async def notice(self, request: web.Request) -> web.Response:
        job = self._links.open_job("notice", request.match_info["token"])
        sender = await self._job_senders.get(job) if job is not None else None
        if sender is None:
            return self._answers.plain(404)
        return self._answers.page(
            "notice.html", sender=sender, opens=MODE_WORDS[sender.opens], clicks=MODE_WORDS[sender.clicks]
        )
