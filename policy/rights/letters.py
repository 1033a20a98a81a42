"""What is written to people about their request: plain text from templates, untracked, in few words.

Laws: a letter says the ticket, what happens next and by when, and who answers for it (GDPR 12(1), P-04); a refusal
says its ground and where to complain (12(4), P-51); an extension says its reason (12(3)). No pixel, no tracked link, no
HTML. A letter to an address that we may not know says nothing about whether we do (P-15, P-53).

Header fields follow RFC 3834 (Auto-Submitted), so that two machines do not write to each other for ever.

Known limits: English only; an operator who writes in another language replaces the files of `templates`.
"""

from __future__ import annotations

import email.policy
import re
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any, Final

import jinja2

from policy.instants import SECOND_US
from policy.rights.requests import Asked

_QUOTED_PAIR: Final = re.compile(r"\\(.)", re.DOTALL)
LETTERS: Final = ("acknowledged", "proof", "extended", "refused", "withdrawn", "done", "lifting")


@dataclass(frozen=True, slots=True)
class Letterhead:
    """Who writes. public_url: base of proof links; appeal: where to complain; zone: of the dates."""

    officer_name: str
    officer_address: str
    public_url: str
    appeal: str
    zone: tzinfo = UTC


class Letters:
    """compose(letter, asked, …) -> a message ready to be sent."""

    def __init__(self, head: Letterhead) -> None:
        self._head = head
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("policy.rights"),
            autoescape=False,  # plain text
            undefined=jinja2.StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def compose(self, letter: str, asked: Asked, now: int, **values: Any) -> EmailMessage:
        """letter: one of LETTERS; values: what its template names. The first line of a template is the subject."""
        if letter not in LETTERS:
            raise ValueError(f"there is no letter {letter}")
        template = self._templates.get_template(f"{letter}.txt")
        due = last_day_of(asked.due, self._head.zone)
        text = template.render(
            asked=asked, kind=asked.kind.value, ticket=asked.ticket, due=due, head=self._head, **values
        )
        subject, _, body = text.partition("\n")
        message = EmailMessage(policy=email.policy.SMTP.clone(utf8=not asked.address.isascii()))
        message["From"] = Address(self._head.officer_name, addr_spec=self._head.officer_address)
        message["To"] = _mailbox(asked.address)
        message["Subject"] = subject.strip()
        message["Date"] = format_datetime(datetime.fromtimestamp(now // SECOND_US, UTC))
        domain = self._head.officer_address.rpartition("@")[2]
        message["Message-ID"] = f"<{asked.ticket}.{letter}.{now}@{domain}>"
        message["Auto-Submitted"] = "auto-replied"
        message["X-Auto-Response-Suppress"] = "All"
        message.set_content(body.strip() + "\n")
        return message


def last_day_of(due: int, zone: tzinfo) -> str:
    """The last day before an exclusive due date, as the officer's calendar has it."""
    return datetime.fromtimestamp((due - 1) // SECOND_US, zone).date().isoformat()


def _mailbox(wire: str) -> Address:
    """Of an address as `policy.address` writes it; given in two parts, because addr_spec refuses RFC 6531."""
    local, _, domain = wire.rpartition("@")
    if local.startswith('"'):
        local = _QUOTED_PAIR.sub(r"\1", local[1:-1])
    return Address(username=local, domain=domain)
