"""Simulated readers: they do over HTTP what people and their machines do with a delivered message.

Path: 1. `read_mail` takes the links out of a message as a mail client shows it; 2. `visit` sends one reader's requests:
most fetch the pixel, many follow a link (never leaving this machine: redirects are looked at, not followed), some opt
out, half of those by their mail client's one-click POST (RFC 8058) and half by the page's button.

Known limits: readers are well behaved; what attackers send is in the tracker's tests.
"""

from __future__ import annotations

import asyncio
import email
import email.message
import random
import re
from collections import Counter
from dataclasses import dataclass, field

import aiohttp

_PIXEL = re.compile(r'src="(https?://[^"]+/o/[^"]+\.gif)"')
_CLICK = re.compile(r'href="(https?://[^"]+/c/[^"]+)"')
_ANGLE = re.compile(r"<(https?://[^>]+)>")
_AGENTS = (
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko)",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0 Safari/537.36",
    "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
)


@dataclass(frozen=True, slots=True)
class Mail:
    """What a reader can act on. recipient: the To address; optout: the HTTPS address of List-Unsubscribe."""

    recipient: str
    pixel: str
    clicks: tuple[str, ...]
    optout: str
    message_id: str


@dataclass(slots=True)
class Visits:
    """What the readers did and what they were answered: status codes by kind of request."""

    opened: int = 0
    clicked: int = 0
    opted_out: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)


def read_mail(wire: bytes) -> Mail:
    """Parse a delivered message the way a client does (standard library, not our own code)."""
    message = email.message_from_bytes(wire)
    html = ""
    for part in message.walk():
        if part.get_content_type() == "text/html":
            body = part.get_payload(decode=True)
            html = body.decode(part.get_content_charset() or "utf-8", "replace") if isinstance(body, bytes) else ""
    unfolded = re.sub(r"\s+", "", str(message.get("List-Unsubscribe", "")))
    optout = _ANGLE.search(unfolded)
    pixel = _PIXEL.search(html)
    return Mail(
        recipient=str(message.get("To", "")).strip().strip("<>").rpartition("<")[2],
        pixel=pixel.group(1) if pixel else "",
        clicks=tuple(dict.fromkeys(_CLICK.findall(html))),
        optout=optout.group(1) if optout else "",
        message_id=str(message.get("Message-ID", "")),
    )


async def visit(mails: list[Mail], *, opt_outs: int, seed: int = 1, timeout: float = 30.0) -> Visits:
    """Let one reader per mail act, all at once; the first `opt_outs` of them opt out at the end of their visit.

    Raises aiohttp.ClientError when the tracker does not answer at all.
    """
    visits = Visits()
    draw = random.Random(seed)
    plans = [(mail, draw.choice(_AGENTS), draw.random() < 0.8, number) for number, mail in enumerate(mails)]
    limits = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(timeout=limits, cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def one(mail: Mail, agent: str, curious: bool, number: int) -> None:
            headers = {"User-Agent": agent, "Accept-Language": "en"}
            if mail.pixel:
                async with session.get(mail.pixel, headers=headers) as answer:
                    visits.statuses[f"pixel {answer.status}"] += 1
                    visits.opened += answer.status == 200
            if curious and mail.clicks:
                link = mail.clicks[number % len(mail.clicks)].replace("&amp;", "&")
                async with session.get(link, headers=headers, allow_redirects=False) as answer:
                    visits.statuses[f"click {answer.status}"] += 1
                    visits.clicked += answer.status == 302
            if number < opt_outs and mail.optout:
                async with session.get(mail.optout, headers=headers) as answer:
                    visits.statuses[f"opt-out page {answer.status}"] += 1
                body = {"List-Unsubscribe": "One-Click"} if number % 2 == 0 else {"confirm": "yes"}
                async with session.post(mail.optout, data=body, headers=headers) as answer:
                    visits.statuses[f"opt-out {answer.status}"] += 1
                    if answer.status in (200, 202):
                        visits.opted_out.append(mail.recipient)

        async with asyncio.TaskGroup() as group:
            for plan in plans:
                group.create_task(one(*plan))
    return visits
