"""Requests that come by mail to the officer: by SMTP from a relay in front, or as files that another system drops.

Laws: a mail is answered 250 only when what it asks is committed, or the mail itself is kept for the officer; the clock
starts when it came (P-45). What no rule understands is never dropped and never guessed: it lies in the folder of
unsorted mail until a person reads it. Nothing is written back to a machine (RFC 3834): such mail is for the officer,
bounces of our own letters above all (P-15).

    read(bytes) -> Mail        pure: who, which right, which ticket, whether a machine wrote it
    take(bytes, received)      opens a request, or notes it at the ticket it names, or keeps it

Which right is told by words of the subject first, then of the first lines that are not quoted: "delete my data", "copy
of my data", "unsubscribe", in English, French and German. A reply to a campaign that says so counts as well.

Known limits: the From field proves nothing; what must not be had by a stranger waits for proof (`states`). A note from
another mailbox than the request's is unsorted. A dropped file is read whole. Words in other languages are unsorted.
"""

from __future__ import annotations

import asyncio
import email
import email.policy
import os
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
from aiosmtpd.smtp import SMTP, Envelope, Session

from policy.address import AddressError, normalise, parse
from policy.instants import DAY_US
from policy.jobs import Refused
from policy.personal import Premises
from policy.rights.settings import RightsSettings
from policy.rights.states import Kind

log = structlog.get_logger()

UNSORTED: Final = "rights-mail"  # folder in data_dir
MAX_BYTES: Final = 1 << 20
_LINES: Final = 40
_A_LOOK: Final = 50  # files of the drop folder a look
_TICKET: Final = re.compile(r"\bR-[A-HJKMNP-Z2-9]{10}\b")
_AUTOMATIC: Final = ("bulk", "list", "junk", "auto_reply")

# The more a right takes away from us, the earlier it is looked for: "unsubscribe and delete my data" is an erasure.
_WORDS: Final[tuple[tuple[Kind, re.Pattern[str]], ...]] = tuple(
    (kind, re.compile(words, re.IGNORECASE))
    for kind, words in (
        (Kind.MINOR, r"\b(my (child|son|daughter|pupil)\b|is a minor|under ?age|mineur|minderj\w+|mein kind)"),
        (
            Kind.ERASURE,
            r"\b(delete|erase|remove) (all )?(of )?((my|the|our|any) )?"
            r"(personal )?(data|information|details|account|records)\b"
            r"|\b(erasure|(erase|forget|delete) me|right to be forgotten)\b"
            r"|\b(effacer|supprimer|effacement|l(ö|oe)schen|l(ö|oe)schung)\b",
        ),
        (
            Kind.PORTABILITY,
            r"\b(portability|portabilit\w+|machine.readable|daten(ü|ue)bertragbarkeit)\b",
        ),
        (
            Kind.ACCESS,
            r"\b(copy of (my|the|our|all)|(subject )?access request|dsar|sar\b|right of access|what (data|information) "
            r"(do )?you (hold|have)|droit d.acc\w+|auskunft\w*)",
        ),
        (Kind.RECTIFICATION, r"\b(rectif\w+|correct (my|the)|berichtig\w+)"),
        (Kind.RESTRICTION, r"\b(restrict(ion)?|limitation du traitement|einschr(ä|ae)nkung)\b"),
        (Kind.WITHDRAWAL, r"\b(withdraw (my )?consent|retirer mon consentement|einwilligung)"),
        (
            Kind.OBJECTION,
            r"\b(unsubscribe|opt.?out|object(ion)?\b|stop (e?mailing|sending|writing|contacting)|no more (e?mails?|"
            r"messages)|(take|remove) me\b|d(é|e)sabonner|d(é|e)sinscri\w+|abmelden|abbestellen|widerspr\w+)",
        ),
    )
)


@dataclass(frozen=True, slots=True, repr=False)
class Mail:
    """sender: normalised by `policy.address`, "" when there is not exactly one; kind: None when no rule knows."""

    sender: str
    kind: Kind | None
    ticket: str
    automatic: bool
    text: str


def read(raw: bytes) -> Mail:
    """What a mail wants. Never raises: a mail that is not one wants nothing."""
    try:
        message = email.message_from_bytes(raw, EmailMessage, policy=email.policy.default)
        subject = str(message.get("Subject", ""))
        text = _first_lines(message) if len(raw) <= MAX_BYTES else ""
        return Mail(_sender(message), _kind(subject, text), _ticket(subject), _is_automatic(message), text)
    except (ValueError, LookupError, TypeError, AttributeError, IndexError, RecursionError):
        # the standard library's parser of hostile headers raises all of these
        return Mail("", None, "", True, "")


def _sender(message: EmailMessage) -> str:
    found = message.get_all("From", [])
    addresses = [one.addr_spec for field in found for one in field.addresses]
    if len(addresses) != 1:
        return ""
    try:
        return parse(addresses[0]).wire
    except AddressError:
        return ""


def _is_automatic(message: EmailMessage) -> bool:
    submitted = str(message.get("Auto-Submitted", "no")).partition(";")[0].strip().lower()
    return (
        submitted != "no"
        or str(message.get("Precedence", "")).strip().lower() in _AUTOMATIC
        or str(message.get("Return-Path", "-")).strip() == "<>"
        or message.get_content_type() == "multipart/report"
        or "List-Id" in message
    )


def _ticket(subject: str) -> str:
    match = _TICKET.search(subject)
    return match[0] if match else ""


def _kind(subject: str, text: str) -> Kind | None:
    for where in (subject, text):
        for kind, words in _WORDS:
            if words.search(where):
                return kind
    return None


def _first_lines(message: EmailMessage) -> str:
    """What the person wrote: the plain part, without what they quoted."""
    part = message.get_body(preferencelist=("plain",))
    if part is None:
        return ""
    content = part.get_content()
    lines = [line for line in str(content).splitlines() if line.strip() and not line.lstrip().startswith(">")]
    return "\n".join(lines[:_LINES])[:4000]


class Desk(Protocol):
    """policy.rights.operations.RightsOperations, as far as mail uses it."""

    async def op_rights_open(
        self,
        kind: str,
        address: str,
        role: str = "contact",
        account: str = "",
        channel: str = "cli",
        jurisdiction: str = "",
        received: int = 0,
        details: dict[str, str] | None = None,
    ) -> dict[str, Any]: ...

    async def is_of(self, ticket: str, address: str) -> bool: ...

    async def op_rights_note(self, ticket: str, note: str) -> None: ...


class MailIntake:
    """take a mail; look into the drop folder; listen for a relay. `count` says what became of them."""

    def __init__(
        self,
        desk: Desk,
        addresses: Iterable[str],
        unsorted_dir: Path,
        clock: Callable[[], int],
        *,
        drop_dir: Path | None = None,
        listen: str = "",
        keep_days: int = 90,
    ) -> None:
        self._keep_days = keep_days
        self._desk = desk
        self._addresses = {_folded(one) for one in addresses}
        self._unsorted = unsorted_dir
        self._clock = clock
        self._drop = drop_dir
        self._listen = listen
        self._server: asyncio.Server | None = None
        self.count: Counter[str] = Counter()

    @classmethod
    def of(cls, desk: Desk, premises: Premises, settings: RightsSettings) -> MailIntake:
        """As the settings have it."""
        return cls(
            desk, [premises.settings.officer.address, *settings.addresses], premises.settings.data_dir / UNSORTED,
            premises.clock, drop_dir=settings.drop_dir, listen=settings.listen, keep_days=settings.unsorted_days,
        )  # fmt: skip

    async def take(self, raw: bytes, received: int) -> str:
        """opened, noted or unsorted: in each case nothing is lost when this returns. Raises: ask again."""
        mail = read(raw)
        became = await self._understood(mail, received)
        if not became:
            became = "unsorted"
            await asyncio.to_thread(self._keep, raw, received)
        self.count[became] += 1
        return became

    async def _understood(self, mail: Mail, received: int) -> str:
        if mail.automatic or not mail.sender:
            return ""
        try:
            if mail.ticket:
                if await self._desk.is_of(mail.ticket, mail.sender):
                    await self._desk.op_rights_note(mail.ticket, mail.text)
                    return "noted"
                return ""
            if mail.kind is None:
                return ""
            details = {"text": mail.text} if mail.kind is Kind.RECTIFICATION else None
            await self._desk.op_rights_open(
                mail.kind.value, mail.sender, channel="mail", received=min(received, self._clock()), details=details
            )
        except Refused as error:
            if error.kind == "busy":
                raise
            return ""  # e.g. a mailbox we could not write to
        return "opened"

    def _keep(self, raw: bytes, received: int) -> None:
        self._unsorted.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{received}-{secrets.token_hex(4)}"
        draft = self._unsorted / f".{name}.draft"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._unsorted / f"{name}.eml")
        folder = os.open(self._unsorted, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    async def look(self) -> int:
        """Take what lies in the drop folder, the oldest first; how many. A file goes when it is taken, and unsorted
        mail that nobody read goes after its days."""
        await asyncio.to_thread(self._forget)
        taken = 0
        for path, received in await asyncio.to_thread(self._dropped):
            raw = await asyncio.to_thread(path.read_bytes)
            try:
                await self.take(raw, min(received, self._clock()))
            except Refused:
                break  # too many in this hour: they keep, and so does the time they came
            await asyncio.to_thread(path.unlink, True)
            taken += 1
        return taken

    def unsorted(self) -> list[Path]:
        """What waits for the officer, the oldest first."""
        return sorted(self._unsorted.glob("[0-9]*-*.eml"), key=_received)

    def _forget(self) -> None:
        end = self._clock() - self._keep_days * DAY_US
        for path in self.unsorted():
            if _received(path) > end:
                break
            path.unlink(missing_ok=True)
            self.count["forgotten"] += 1

    def _dropped(self) -> list[tuple[Path, int]]:
        if self._drop is None or not self._drop.is_dir():
            return []
        found = [(path, path.stat().st_mtime_ns // 1000) for path in self._drop.glob("*.eml") if path.is_file()]
        return sorted(found, key=lambda one: (one[1], one[0].name))[:_A_LOOK]

    async def start(self) -> int:
        """Open the port, if one is set; its number, else 0. Raises OSError when it is taken."""
        if not self._listen:
            return 0
        host, _, port = self._listen.rpartition(":")
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: SMTP(
                _Handler(self.take, self._accepts, self._clock),
                data_size_limit=MAX_BYTES,
                hostname="rights",
                ident="ready",
                enable_SMTPUTF8=True,
                timeout=60,
                loop=loop,
            ),
            host.strip("[]"),
            int(port),
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    def _accepts(self, address: str) -> bool:
        return _folded(address) in self._addresses


class _Handler:
    """aiosmtpd's hooks. One a connection."""

    def __init__(
        self,
        take: Callable[[bytes, int], Awaitable[str]],
        accepts: Callable[[str], bool],
        clock: Callable[[], int],
    ) -> None:
        self._take = take
        self._accepts = accepts
        self._clock = clock

    async def handle_RCPT(
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if not self._accepts(address):
            return "550 5.1.1 this place takes mail to the privacy officer only"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        content = envelope.content
        raw = content if isinstance(content, bytes) else str(content or "").encode()
        if envelope.mail_from in (None, "", "<>"):  # a bounce says so in the envelope only
            raw = b"Return-Path: <>\r\n" + raw
        try:
            await self._take(raw, self._clock())
        except Exception as error:  # whatever is wrong with us, the relay keeps the mail and asks again
            log.warning("a mail to the officer is put off", error=type(error).__name__)
            return "451 4.3.0 not now, please try again"
        return "250 2.0.0 taken"


def _folded(address: str) -> str:
    try:
        mailbox = parse(address)
    except AddressError:
        return ""
    return normalise(mailbox.local, mailbox.domain)


def _received(path: Path) -> int:
    head = path.name.partition("-")[0]
    return int(head) if head.isascii() and head.isdigit() else 0
